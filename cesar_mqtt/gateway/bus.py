"""The front doors' side of the bus: jobs and commands out, statuses and results in, over a connection that comes back.

A `Bus` has a thread of its own, `bus`, which receives. Any thread may call its methods; no method waits.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError, CesarError
from cesar_mqtt.gateway.session import NoAnswerError, response_data
from cesar_mqtt.gateway.submission import Request, Submission, request_of
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import (
    CannotPublishError,
    ConnectionFailure,
    ConnectionInfo,
    Delivery,
    PublishTicket,
    Refusal,
    Subscription,
)
from cesar_mqtt.protocol.topics import Topics, matches_filter
from cesar_mqtt.threads import StoppableThread

log = get_logger(__name__)

T = TypeVar("T")

_POLL_S = 0.25
"""How often commands without a response are looked for."""


@dataclass(eq=False, slots=True)
class _Outgoing:
    """A message that the broker has not acknowledged."""

    request: Callable[[ConnectionInfo], Request]
    """Returns the message as a connection can carry it."""
    is_repeated: bool = True
    """Whether it is published again at the next connection."""
    is_routed: bool = True
    future: "Future[bool]" = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _Command:
    """A command without a response yet; `due` is on the monotonic clock."""

    topic: str
    due: float
    future: "Future[dict[str, Any]]" = field(default_factory=Future)


class Bus(StoppableThread):
    """A producer that stays: it follows what is published under the prefix, and publishes jobs and commands.

    The broker keeps no session for it: after a lost connection the retained messages arrive again, and what was
    published without an acknowledgement is published again. Jobs have ids, so that a repeated request is the same job.

    The callbacks run on the thread `bus`, `on_lost` on the network thread; they must not block for long. What a
    callback raises is logged, and the message counts as received.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        topics: Topics,
        *,
        role: str,
        subscriptions: Sequence[Subscription] = (),
        sends_commands: bool = False,
        on_message: Callable[[Delivery], None] = lambda _delivery: None,
        on_connected: Callable[[], None] = lambda: None,
        on_lost: Callable[[ConnectionFailure], None] = lambda _failure: None,
    ) -> None:
        """Prepare the connection; `start` connects.

        Args:
            settings: how to reach the broker.
            topics: the prefix, and the name of a consumer that does not matter here.
            role: a part of the client id, for the broker's log.
            subscriptions: what `on_message` receives; renewed at each connection.
            sends_commands: whether `command` will be called: subscribes to the responses.
            on_message: called with each message of the subscriptions, in order.
            on_connected: called at each connection, before its first message.
            on_lost: called when a connection is lost.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        super().__init__("bus")
        self.address = parse_broker_url(settings.url).redacted
        """The broker's URL, without credentials."""
        self._topics = topics
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._states = f"{topics.prefix}/consumer/+/state"
        self._responses = f"{topics.prefix}/response/"
        wanted = list(subscriptions)
        needed = {self._states: True, **({f"{self._responses}+": False} if sends_commands else {})}
        for topic_filter, wants_retained in needed.items():  # a broker may deliver twice where filters overlap
            if not any(matches_filter(topic_filter, each.topic_filter) for each in subscriptions):
                wanted.append(Subscription(topic_filter, wants_retained=wants_retained))
        self._lock = threading.RLock()  # a future's callback may call the bus
        self._waiting: list[_Outgoing] = []
        self._in_flight: dict[PublishTicket, _Outgoing] = {}
        self._commands: dict[str, _Command] = {}
        self._consumers: dict[str, bool] = {}
        self._reported = 0
        self.refusal: BrokerRefusedError | None = None
        """Why the broker refused the first connection, for good; None: it did not."""
        self._client = MqttClient(
            settings,
            client_id=f"cesar-{role}-{uuid.uuid4().hex[:12]}",
            persistent=False,
            subscriptions=wanted,
            on_connected=lambda _info: self._publish_waiting(),
            on_disconnected=self._on_disconnected,
            on_published=self._on_published,
            on_unrouted=self._on_unrouted,
            on_refused=self._on_refused,
        )

    # -- any thread ----------------------------------------------------------------------------------------------------

    @property
    def connection(self) -> ConnectionInfo | None:
        """The current connection; None: there is none."""
        return self._client.connected

    @property
    def trouble(self) -> str | None:
        """See `MqttClient.trouble`."""
        return self._client.trouble

    @property
    def consumers(self) -> dict[str, bool]:
        """Whether each known consumer is online, by name."""
        with self._lock:
            return dict(self._consumers)

    def wait_connected(self, timeout_s: float | None = None) -> ConnectionInfo | None:
        """Wait for a connection; None: not in time. Raises BrokerRefusedError."""
        return self._client.wait_connected(timeout_s)

    def submit(self, item: Submission) -> "Future[bool]":
        """Publish a job at QoS 1, again at each connection until the broker acknowledges it.

        Returns:
            A future: True at the PUBACK, False if nothing subscribes to the topic, so that the broker has dropped the
            message (only MQTT 5 tells); BrokerRefusedError; CannotPublishError, such as for a packet over the broker's
            limit. A cancelled future is not published again; `close` cancels it.
        """
        return self._publish(
            _Outgoing(lambda info: request_of(item, self._topics, has_properties=info.protocol == "5"))
        )

    def command(
        self, name: str, fields: Mapping[str, Any] | None = None, *, consumer: str | None = None, timeout_s: float = 5.0
    ) -> "Future[dict[str, Any]]":
        """Send a command to a consumer, or to all, and return the data of the first response.

        Nothing is sent while no consumer is online: the broker would keep a `delete` for days.

        Returns:
            A future with the data; RequestRefusedError: the consumer did not execute the command; NoAnswerError: no
            consumer is online, or none answered in time; BrokerRefusedError.
        """
        command = _Command(f"{self._topics.prefix}/request/{name}", time.monotonic() + timeout_s)
        transaction = uuid.uuid4().hex
        named = {} if consumer is None else {"consumer": consumer}
        payload = json.dumps({**(fields or {}), **named, "transaction": transaction}).encode()
        with self._lock:
            online = self._consumers.get(consumer, False) if consumer else any(self._consumers.values())
            if self._client.connected is None or not online:
                who = "No consumer is" if consumer is None else f"Consumer {consumer} is not"
                where = f"at {self.address} under '{self._topics.prefix}'"
                problem = f"{who} online {where}." if self._client.connected else f"No connection to {self.address}."
                command.future.set_exception(NoAnswerError(problem, "Try again when it is."))
                return command.future
            self._commands[transaction] = command
        sent = self._publish(_Outgoing(lambda _: Request(command.topic, payload), is_repeated=False))
        sent.add_done_callback(lambda sent: self._on_command_sent(transaction, sent))
        return command.future

    def close(self) -> None:
        """Disconnect and end the thread; what the broker has not acknowledged is dropped. May be called twice."""
        self.stop()
        self._client.close()
        with self._lock:
            jobs = [job.future for job in (*self._waiting, *self._in_flight.values())]
            commands = [command.future for command in self._commands.values()]
        for job in jobs:
            job.cancel()
        for command in commands:
            command.cancel()

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish(self, outgoing: _Outgoing) -> "Future[bool]":
        with self._lock:
            self._send(outgoing)
        return outgoing.future

    def _send(self, outgoing: _Outgoing) -> None:
        """Publish a message, or keep it for the next connection; the caller holds the lock."""
        connection = self._client.connected
        if outgoing.future.cancelled():
            return
        ticket = None
        try:
            if connection is not None:
                topic, payload, properties = outgoing.request(connection)
                ticket = self._client.publish(topic, payload, user_properties=properties)
        except CannotPublishError as exc:
            _end(outgoing.future, error=exc)
            return
        if ticket is None:
            self._waiting.append(outgoing)
        else:
            self._in_flight[ticket] = outgoing

    def _publish_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            for outgoing in waiting:
                self._send(outgoing)

    def _on_published(self, ticket: PublishTicket, refusal: Refusal | None) -> None:
        with self._lock:
            outgoing = self._in_flight.pop(ticket, None)
        if outgoing is None:
            return
        if refusal is None:
            _end(outgoing.future, result=outgoing.is_routed)
        else:
            problem = f"{self.address} does not let this client publish jobs or commands: {refusal}."
            _end(outgoing.future, error=BrokerRefusedError(problem, "Allow it in the broker's access list."))

    def _on_unrouted(self, tickets: Sequence[PublishTicket]) -> None:
        with self._lock:
            for ticket in tickets:
                if ticket in self._in_flight:
                    self._in_flight[ticket].is_routed = False

    def _on_disconnected(self, failure: ConnectionFailure) -> None:
        with self._lock:
            self._waiting[:0] = [outgoing for outgoing in self._in_flight.values() if outgoing.is_repeated]
            self._in_flight.clear()
        self._on_lost(failure)

    def _on_refused(self, error: BrokerRefusedError) -> None:
        self.refusal = error

    def _on_command_sent(self, transaction: str, sent: "Future[bool]") -> None:
        error = None if sent.cancelled() else sent.exception()
        with self._lock:
            command = None if error is None else self._commands.pop(transaction, None)
        if command is not None and error is not None:
            _end(command.future, error=error)

    # -- the thread `bus` ----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._client.stop_receiving()

    def _run(self) -> None:
        self._client.start()
        while not self._stopping.is_set():
            self.run_once(_POLL_S)

    def run_once(self, timeout_s: float) -> None:
        """Receive what has arrived, or wait for it; end commands whose time is up."""
        deliveries = self._client.receive(timeout_s)
        for delivery in deliveries:
            self._report_connection(delivery.receipt.connection)
            self._receive(delivery)
        self._client.acknowledge(deliveries)
        connection = self._client.connected
        if connection is not None:
            self._report_connection(connection.number)
            self._publish_waiting()  # what did not fit into the client's queue
        self._expire_commands()

    def _report_connection(self, number: int) -> None:
        if number > self._reported:
            self._reported = number
            _log_errors(self._on_connected)

    def _receive(self, delivery: Delivery) -> None:
        if matches_filter(delivery.topic, self._states):
            document = json_object(delivery.payload)
            with self._lock:
                self._consumers[delivery.topic.split("/")[-2]] = document.get("state") == "online"
        elif delivery.topic.startswith(self._responses) and self._take_response(json_object(delivery.payload)):
            return
        _log_errors(lambda: self._on_message(delivery))

    def _take_response(self, document: Mapping[str, Any]) -> bool:
        """Whether a response belongs to a command of this client, which then has its result."""
        transaction = document.get("transaction")
        with self._lock:
            command = self._commands.pop(transaction, None) if isinstance(transaction, str) else None
        if command is None:
            return False
        try:
            data = response_data(document)
        except CesarError as exc:
            _end(command.future, error=exc)
        else:
            _end(command.future, result=data)
        return True

    def _expire_commands(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [transaction for transaction, command in self._commands.items() if command.due <= now]
            expired = [self._commands.pop(transaction) for transaction in late]
        for command in expired:
            _end(command.future, error=NoAnswerError(f"No answer on {command.topic} in time.", "Try again."))


def _end(future: "Future[T]", *, result: T | None = None, error: BaseException | None = None) -> None:
    """Give a future its result or its error, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(cast("T", result))
        else:
            future.set_exception(error)


def json_object(payload: bytes) -> dict[str, Any]:
    """Return the JSON object of a message; empty for everything else: any client may publish anything.

    Half a surrogate pair, which neither UTF-8 nor SQLite can hold, becomes a question mark.
    """
    try:
        document = json.loads(payload or b"null")
        if b"\\u" in payload:
            document = json.loads(json.dumps(document, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _log_errors(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        log.exception("The front door continues after an error", action="bus_failed")
