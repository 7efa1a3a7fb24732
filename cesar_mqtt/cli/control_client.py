"""The commands of `request/#` from a client: a request, and the response that belongs to it.

One thread uses a `ControlClient`.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from cesar_mqtt.config import Settings
from cesar_mqtt.errors import BrokerRefusedError
from cesar_mqtt.gateway.session import NoAnswerError, Session, response_data
from cesar_mqtt.mqtt.messages import ConnectionInfo, Delivery, Subscription
from cesar_mqtt.protocol.topics import Topics

_POLL_S = 0.1
_PRESENCE_S = 1.5
"""The longest wait for a consumer's retained state, which follows the subscription at once."""


class ControlClient:
    """A session that sends commands to consumers, one at a time.

    Attributes:
        consumers: whether each known consumer is online, by name.
        broker_statistics: the newest payload on each topic below `$SYS`, as text, if they were subscribed to.
    """

    def __init__(
        self, settings: Settings, commands: Sequence[str], *, timeout_s: float, also: Sequence[str] = ()
    ) -> None:
        """Prepare the session; `connect` connects.

        Args:
            settings: name the broker and the topic prefix.
            commands: those that will be sent; their response topics are subscribed to.
            timeout_s: the longest wait for the broker, and for each response.
            also: further topic filters to subscribe to, to learn whether the broker grants them.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self.consumers: dict[str, bool] = {}
        self.broker_statistics: dict[str, str] = {}
        self._prefix = settings.topic_prefix
        self._topics = Topics(settings.topic_prefix, settings.consumer.name)
        self._timeout_s = timeout_s
        self._awaited: str | None = None
        self._response: dict[str, Any] | None = None
        responses = [Subscription(self._topics.response(command)) for command in commands]
        wanted = [
            Subscription(f"{self._prefix}/consumer/+/state", wants_retained=True),
            *responses,
            *(Subscription(topic_filter, wants_retained=topic_filter.startswith("$SYS/")) for topic_filter in also),
        ]
        self._session = Session(settings.broker, "ask", wanted)

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> ConnectionInfo:
        """Connect and subscribe. Raises as `Session.connect`."""
        return self._session.connect(self._timeout_s)

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._session.close()

    @property
    def address(self) -> str:
        """The broker's URL, without credentials."""
        return self._session.address

    @property
    def online(self) -> list[str]:
        """The names of the consumers that are online."""
        return sorted(name for name, is_online in self.consumers.items() if is_online)

    def wait_for_consumer(self, name: str | None = None) -> bool:
        """Wait a moment for the retained state of any consumer, or of the one named; return whether it is online."""
        deadline = time.monotonic() + min(_PRESENCE_S, self._timeout_s)
        while not self._is_online(name) and time.monotonic() < deadline:
            self._receive()
        return self._is_online(name)

    def targets(self, consumer: str | None) -> Sequence[str | None]:
        """Return the consumers to ask one by one: the one named, else all that are online; None: any.

        Retained messages arrive together, so that a short silence is their end.
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
        """Send a command and return the data of its response.

        Args:
            command: one of those given to the constructor.
            fields: the fields of the request, without its transaction.
            consumer: the consumer to ask; None: all, and the first response counts. In a group the owner of a job
                answers.

        Raises:
            RequestRefusedError: the consumer did not execute the command.
            NoAnswerError: no consumer is online, or none answered in time.
            BrokerRefusedError: the broker does not let this client publish the request.
        """
        self._awaited, self._response = uuid.uuid4().hex, None
        topic = f"{self._prefix}/request/{command}"
        named = {} if consumer is None else {"consumer": consumer}
        payload = json.dumps({**(fields or {}), **named, "transaction": self._awaited}).encode()
        ticket = self._session.publish(topic, payload, qos=self._request_qos(consumer))
        deadline = time.monotonic() + self._timeout_s
        while self._response is None:
            reason = self._session.refusal(ticket)
            if reason is not None:
                raise BrokerRefusedError(
                    f"{self.address} does not let this client publish on {topic}: {reason}.",
                    "Allow this user to write there, in the broker's access list.",
                )
            if time.monotonic() >= deadline or self._session.connection is None:
                raise self._no_answer(command, consumer)
            self._receive()
        return response_data(self._response)

    def try_to_publish(self, topic: str, payload: bytes) -> str | None:
        """Publish at QoS 1, wait for the acknowledgement and return why it was refused; None: it was not.

        MQTT 3.1.1 has no refusal: there None proves nothing.
        """
        ticket = self._session.publish(topic, payload)
        deadline = time.monotonic() + self._timeout_s
        while ticket is not None and not self._session.is_published(ticket):
            if time.monotonic() >= deadline:
                return "the broker did not acknowledge it in time"
            self._receive()
        return self._session.trouble if ticket is None else self._session.refusal(ticket)

    def _is_online(self, name: str | None) -> bool:
        return bool(self.online) if name is None else self.consumers.get(name, False)

    def _request_qos(self, name: str | None) -> Literal[0, 1]:
        """Return the QoS of a request: 1 for a consumer that is online, 0 for one that is unknown.

        At QoS 1 the broker keeps the request for an absent consumer, which would delete a job days after the user saw
        that no consumer answered. A consumer that is known to be offline is not asked.

        Raises:
            NoAnswerError: it is offline.
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
        if self._session.connection is None:
            return NoAnswerError(
                f"The connection to {self.address} was lost before an answer arrived: {self._session.trouble}.",
                "Ask again.",
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
        deliveries = self._session.receive(_POLL_S)
        for delivery in deliveries:
            self._process(delivery)
        return bool(deliveries)

    def _process(self, delivery: Delivery) -> None:
        if delivery.topic.startswith("$SYS/"):
            self.broker_statistics[delivery.topic] = delivery.payload.decode(errors="replace")
            return
        try:
            document = json.loads(delivery.payload or b"null")
        except (ValueError, RecursionError):  # any client may publish anything there
            return
        if not isinstance(document, dict):
            return
        _, _, own_topic = delivery.topic.partition(f"{self._prefix}/consumer/")
        if own_topic:
            self.consumers[own_topic.rpartition("/")[0]] = document.get("state") == "online"
        elif self._awaited is not None and document.get("transaction") == self._awaited:
            self._response = document
