"""The asking side of the control topics: a request, and the answer that belongs to it.

One thread uses a `ControlClient`; it knows nothing of ledgers and models.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import BrokerRefusedError, CesarError, ExitCode
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import ConnectionFailure, ConnectionInfo, Delivery, PublishTicket, Subscription
from cesar_mqtt.protocol.topics import Topics

_LOOK_S = 0.1
_PRESENCE_S = 0.5
"""What is retained comes right behind the subscription; so long is waited for a consumer that says it is online."""
_SECOND_TRY_S = 2.0
"""A broker that is just being restarted is there again by then; one that still refuses connections is not running."""


class UnreachableError(CesarError):
    """There is no broker at the address, or no connection to it can be made.

    Attributes:
        cause: why the attempt failed.
    """

    def __init__(self, problem: str, advice: str, *, cause: ConnectionFailure) -> None:
        super().__init__(problem, advice)
        self.cause = cause


class NoAnswerError(CesarError):
    """Nobody answered in time: no consumer, or not even a broker."""

    exit_code = ExitCode.TIMEOUT


class RequestRefusedError(CesarError):
    """A consumer answered that it did not do what was asked for; the message is its own sentence."""


def ephemeral_client(
    settings: BrokerSettings,
    role: str,
    subscriptions: Sequence[Subscription],
    *,
    on_published: Callable[[PublishTicket, str | None], None] | None = None,
) -> MqttClient:
    """Return a client, not started yet, whose name nobody else has and whom the broker forgets. Raises ConfigError."""
    return MqttClient(
        settings,
        client_id=f"cesar-{role}-{uuid.uuid4().hex[:12]}",
        persistent=False,
        subscriptions=subscriptions,
        on_published=on_published,
    )


def reach(client: MqttClient, where: str, timeout_s: float, *, patience_s: float = _SECOND_TRY_S) -> ConnectionInfo:
    """Start a client and wait for its first connection; on failure nothing is left open.

    Args:
        client: not started yet.
        where: the broker's address as it may be shown.
        timeout_s: how long at most.
        patience_s: how long for a broker that refuses connections.

    Raises:
        UnreachableError: there is no broker, or no connection to it comes about.
        NoAnswerError: it did not answer in time.
        BrokerRefusedError: it answered and said no.
    """
    connection = None
    try:
        client.start()
        connection = client.wait_connected(min(timeout_s, patience_s))
        if connection is None and client.failure is None:
            connection = client.wait_connected(timeout_s - patience_s)
    finally:
        if connection is None:
            client.close()
    if connection is None:
        raise _unreached(where, client.failure, timeout_s)
    return connection


def _unreached(where: str, failure: ConnectionFailure | None, timeout_s: float) -> CesarError:
    if failure is None or failure.is_timeout:
        return NoAnswerError(
            f"Nothing at {where} answered within {timeout_s:g} s.", "Is it a broker, and is it reachable?"
        )
    if failure.advice:
        return UnreachableError(f"No connection to {where}: {failure.problem}.", failure.advice, cause=failure)
    advice = "Is it running? Name another one with --broker."
    return UnreachableError(f"No broker at {where}: {failure.problem}.", advice, cause=failure)


class ControlClient:
    """A connection that asks consumers for something, one question at a time.

    Attributes:
        address: the broker's, as it may be shown.
        consumers: whether each consumer that was heard of is online, by name.
    """

    def __init__(
        self, settings: Settings, commands: Sequence[str], *, timeout_s: float, also: Sequence[str] = ()
    ) -> None:
        """Wire it; `connect` does the work.

        Args:
            settings: where the broker is, and what topics begin with.
            commands: what will be asked for.
            timeout_s: how long to wait for the broker, and for each answer.
            also: further topic filters to subscribe to, to see whether the broker grants them.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self.address = parse_broker_url(settings.broker.url).redacted
        self.consumers: dict[str, bool] = {}
        self._prefix = settings.topic_prefix
        self._topics = Topics(settings.topic_prefix, settings.consumer.name)
        self._timeout_s = timeout_s
        self._awaited: str | None = None
        self._answer: dict[str, Any] | None = None
        self._published: dict[PublishTicket, str | None] = {}
        answers = [Subscription(self._topics.response(command)) for command in commands]
        wanted = [
            Subscription(f"{self._prefix}/consumer/+/state", wants_retained=True),
            *answers,
            *(Subscription(topic_filter) for topic_filter in also),
        ]
        self._client = ephemeral_client(settings.broker, "ask", wanted, on_published=self._published.__setitem__)

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> ConnectionInfo:
        """Connect and subscribe. Raises as `reach`."""
        return reach(self._client, self.address, self._timeout_s)

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._client.close()

    @property
    def online(self) -> list[str]:
        """The names of the consumers that say that they are there."""
        return sorted(name for name, is_online in self.consumers.items() if is_online)

    def wait_for_consumer(self, name: str | None = None) -> bool:
        """Wait a moment for a consumer, or for the one of that name, to say that it is online; False: it has not."""
        deadline = time.monotonic() + min(_PRESENCE_S, self._timeout_s)
        while not self._is_online(name) and time.monotonic() < deadline:
            self._receive()
        return self._is_online(name)

    def everyone(self, consumer: str | None) -> Sequence[str | None]:
        """Return whom to ask one by one: the consumer that is wanted, else all that are online; None: whoever is there.

        What is retained comes in one go, so that a short silence is its end.
        """
        if consumer is not None:
            return [consumer]
        deadline = time.monotonic() + min(_PRESENCE_S, self._timeout_s)
        self.wait_for_consumer()
        while self._receive() and time.monotonic() < deadline:
            pass
        return self.online if len(self.online) > 1 else [None]

    def ask(
        self, command: str, fields: Mapping[str, Any] | None = None, *, consumer: str | None = None
    ) -> dict[str, Any]:
        """Ask, and return the data of the answer.

        Args:
            command: what is asked for.
            fields: the request, but for its transaction.
            consumer: whom to ask; None: everyone, and the first answer counts. In a group the owner of a job answers.

        Raises:
            RequestRefusedError: the consumer did not do it, and says why.
            NoAnswerError: no consumer is online, or none answered in time.
            BrokerRefusedError: the broker does not let this client ask.
        """
        self._awaited, self._answer = uuid.uuid4().hex, None
        topic = f"{self._prefix}/request/{command}"
        named = {} if consumer is None else {"consumer": consumer}
        payload = json.dumps({**(fields or {}), **named, "transaction": self._awaited}).encode()
        ticket = self._client.publish(topic, payload, qos=self._care(consumer))
        deadline = time.monotonic() + self._timeout_s
        while self._answer is None:
            reason = None if ticket is None else self._published.get(ticket)
            if reason is not None:
                raise BrokerRefusedError(
                    f"{self.address} does not let this client publish on {topic}: {reason}.",
                    "Allow this user to write there, in the broker's access list.",
                )
            if time.monotonic() >= deadline or self._client.connected is None:
                raise self._no_answer(command, consumer)
            self._receive()
        return _data(self._answer)

    def try_to_publish(self, topic: str, payload: bytes) -> str | None:
        """Publish at QoS 1 and wait until the broker has it; returns why it was refused, None: it was not.

        In MQTT 3.1.1 a broker has no way to say so: there None means nothing.
        """
        ticket = self._client.publish(topic, payload, qos=1)
        if ticket is None:
            return self._client.failure.problem if self._client.failure else "the connection was lost"
        deadline = time.monotonic() + self._timeout_s
        while ticket not in self._published:
            if time.monotonic() >= deadline:
                return "the broker did not acknowledge it in time"
            self._receive()
        return self._published[ticket]

    def _is_online(self, name: str | None) -> bool:
        return bool(self.online) if name is None else self.consumers.get(name, False)

    def _care(self, name: str | None) -> Literal[0, 1]:
        """Return the QoS of a request.

        At QoS 1 the broker keeps it for a consumer that is away, and a job would be deleted days after its user was
        told that nobody answered. So that is for consumers that are there, and those known to be away are not asked.
        """
        if self.wait_for_consumer(name):
            return 1
        known = ", ".join(f"{each}: {'online' if on else 'offline'}" for each, on in sorted(self.consumers.items()))
        if known and (name is None or name in self.consumers):
            who = "No consumer is" if name is None else f"Consumer {name} is not"
            raise NoAnswerError(
                f"{who} online at {self.address} under '{self._prefix}' ({known}), so nothing was asked.",
                "Start it with `cesar-mqtt serve`.",
            )
        return 0

    def _no_answer(self, command: str, consumer: str | None) -> NoAnswerError:
        if self._client.connected is None:
            failure = self._client.failure
            why = failure.problem if failure else "no reason is known"
            return NoAnswerError(
                f"The connection to {self.address} was lost before an answer arrived: {why}.", "Ask again."
            )
        waited, online = f"within {self._timeout_s:g} s", ", ".join(self.online)
        if not self._is_online(consumer):
            who = "no consumer" if consumer is None else f"no consumer called {consumer}"
            return NoAnswerError(
                f"No answer {waited}, and {who} is known at {self.address} under '{self._prefix}' "
                f"({online or 'none'} is online).",
                "Start it with `cesar-mqtt serve`, or name its --topic-prefix.",
            )
        if consumer is None and len(self.online) > 1:
            return NoAnswerError(
                f"None of {online} answered {waited}. In a group only the consumer that owns the job answers.",
                "Check the job id, or ask one consumer with --consumer NAME.",
            )
        return NoAnswerError(
            f"{consumer or online} is online but did not answer {waited}.",
            f"If it is busy, wait longer with --timeout. Else the broker may not let this client publish on "
            f"{self._prefix}/request/{command} or read {self._topics.response(command)}: run `cesar-mqtt doctor`.",
        )

    def _receive(self) -> bool:
        deliveries = self._client.receive(_LOOK_S)
        for delivery in deliveries:
            self._take(delivery)
        self._client.acknowledge(deliveries)
        return bool(deliveries)

    def _take(self, delivery: Delivery) -> None:
        try:
            document = json.loads(delivery.payload or b"null")
        except (ValueError, RecursionError):  # anybody may publish anything there
            return
        if not isinstance(document, dict):
            return
        _, _, behind = delivery.topic.partition(f"{self._prefix}/consumer/")
        if behind:
            self.consumers[behind.rpartition("/")[0]] = document.get("state") == "online"
        elif self._awaited is not None and document.get("transaction") == self._awaited:
            self._answer = document


def _data(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer brings. Raises RequestRefusedError."""
    data = answer.get("data")
    if answer.get("status") != "ok" or not isinstance(data, dict):
        raise RequestRefusedError(str(answer.get("error") or "The consumer's answer cannot be read."))
    return data
