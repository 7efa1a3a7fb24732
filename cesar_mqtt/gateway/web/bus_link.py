"""The page's connection to the bus: messages go to the board, requests and commands are awaited.

The threads of the bus hand everything over to the event loop; the methods are for that loop's thread, except `close`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError
from cesar_mqtt.gateway.bus import Bus
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.gateway.web.board import Board
from cesar_mqtt.gateway.web.problems import ProblemError
from cesar_mqtt.mqtt.messages import CannotPublishError, ConnectionFailure, ConnectionInfo, Delivery, Subscription
from cesar_mqtt.protocol.topics import Topics

if TYPE_CHECKING:
    from concurrent.futures import Future

LARGE_RECORDINGS = (
    "Larger recordings go by `audio_path`, `audio_url`, the watch folder, or the page of a consumer (`serve --web`)."
)

_QUIET_S = 1.0
"""Retained messages follow a subscription at once: so long after the last of them there are no more."""
_ANSWER_S = 10.0
_PUBLISHED_S = 60.0
"""How long a broker may take to acknowledge a recording of the largest size."""

T = TypeVar("T")


class BusLink:
    """Connects the bus with an event loop."""

    def __init__(self, settings: BrokerSettings, topics: Topics, board: Board) -> None:
        """Prepare the connection; `start_on` connects.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self._board = board
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: deque[Delivery] = deque()
        self._settling: asyncio.TimerHandle | None = None
        self._loading: asyncio.Task[None] | None = None
        own = f"{topics.prefix}/consumer/+"
        retained = (topics.status("+"), f"{own}/state", f"{own}/queue", f"{own}/info")
        self._bus = Bus(
            settings,
            topics,
            role="web",
            subscriptions=[
                *(Subscription(topic, wants_retained=True) for topic in retained),
                *map(Subscription, (topics.rejected, topics.segments("+"))),
            ],
            sends_commands=True,
            on_message=self._on_message,
            on_connected=lambda: self._call(self._show_connected),
            on_lost=lambda failure: self._call(self._show_lost, failure),
        )

    def start_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Connect, and hand everything that arrives to this loop."""
        self._loop = loop
        self._bus.start()

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._bus.close()

    @property
    def connection(self) -> ConnectionInfo | None:
        """The present connection; None: there is none."""
        return self._bus.connection

    @property
    def refusal(self) -> BrokerRefusedError | None:
        """Why the broker does not let this client connect; None: it does, or has not been asked."""
        return self._bus.refusal

    async def submit(self, item: Submission) -> None:
        """Publish a request and wait until the broker has it.

        Raises:
            ProblemError: there is no connection, or the broker refuses, drops or does not acknowledge the request.
        """
        if self._bus.connection is None:
            raise ProblemError(503, f"There is no connection to the broker: {self._bus.trouble}.", "broker_unreachable")
        if not await _result(
            self._bus.submit(item), _PUBLISHED_S, "The broker has not acknowledged the request in time."
        ):
            raise ProblemError(503, "No consumer takes jobs: start one with `cesar-mqtt serve`.", "consumer_offline")

    async def ask(self, command: str, fields: Mapping[str, Any], *, consumer: str) -> dict[str, Any]:
        """Send a command to a consumer and return the data of its response.

        Raises:
            ProblemError: the consumer is offline, does not answer, or does not execute the command.
        """
        asked = self._bus.command(command, fields, consumer=consumer, timeout_s=_ANSWER_S)
        return await _result(asked, 2 * _ANSWER_S, f"Consumer {consumer} has not answered in time.")

    # -- threads of the bus --------------------------------------------------------------------------------------------

    def _on_message(self, delivery: Delivery) -> None:
        self._arrived.append(delivery)
        if len(self._arrived) == 1:  # else the loop has been called already, and has not come to it yet
            self._call(self._take)

    def _call(self, method: Callable[..., object], *arguments: object) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nothing is shown any more
                self._loop.call_soon_threadsafe(method, *arguments)

    # -- the event loop ------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        is_retained = False
        for _ in range(len(self._arrived)):
            # The last one is removed after it was read: a further one then finds the queue empty, and calls again.
            delivery = self._arrived[0]
            self._board.take(delivery)
            is_retained |= delivery.retain
            self._arrived.popleft()
        if self._arrived:
            self._call(self._take)
        if self._settling is not None and is_retained:
            self._settle_later()

    def _show_connected(self) -> None:
        self._board.set_broker(connected=True)
        self._settle_later()

    def _show_lost(self, failure: ConnectionFailure) -> None:
        self._board.set_broker(connected=False, problem=failure.problem)

    def _settle_later(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.get_running_loop().call_later(_QUIET_S, self._settle)

    def _settle(self) -> None:
        self._settling = None
        if (connection := self._bus.connection) is not None:
            self._board.remove_stale(connection.number)
            self._loading = asyncio.create_task(self._load_rejections())

    async def _load_rejections(self) -> None:
        """Get the rejections from before the connection: their messages are not retained."""
        for consumer in [each.name for each in self._board.consumers.values() if each.online]:
            with suppress(ProblemError):  # an older one does not know the command
                data = await self.ask("rejected", {}, consumer=consumer)
                self._board.add_rejections([each for each in data.get("rejected") or () if isinstance(each, dict)])


async def _result(future: "Future[T]", timeout_s: float, too_late: str) -> T:
    """Wait for a result of the bus; its errors become those of an HTTP request."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError as exc:
        raise ProblemError(504, too_late, "no_answer") from exc
    except CannotPublishError as exc:
        raise ProblemError(413, f"{exc} {LARGE_RECORDINGS}", "payload_too_large") from exc
    except RequestRefusedError as exc:
        raise ProblemError(409, str(exc), "not_possible") from exc
    except NoAnswerError as exc:
        raise ProblemError(503, str(exc), "no_answer") from exc
    except BrokerRefusedError as exc:
        raise ProblemError(502, str(exc), "broker_refused") from exc
