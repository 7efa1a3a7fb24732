"""The client side of the bus: one connection of a command, and the errors of reaching a broker and a consumer.

One thread uses a `Session`.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import CesarError, ExitCode
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import ConnectionFailure, ConnectionInfo, Delivery, PublishTicket, Refusal, Subscription

_RETRY_WITHIN_S = 2.0
"""A broker that is restarting accepts connections again within this; one that still refuses them is not running."""

_STARTING_S = 20.0
"""How long a port that accepts connections and closes them without an answer is taken for a broker that is starting, or
elects a leader."""
SUBSCRIBE_S = 60.0
"""How long a command without a time limit lets a broker that has accepted the connection take to grant the
subscriptions: a cluster of NATS that has lost a server needs up to 10 s for each."""


class UnreachableError(CesarError):
    """There is no broker at the address, or no connection to it can be made.

    Attributes:
        cause: why the attempt failed.
    """

    exit_code = ExitCode.TIMEOUT

    def __init__(self, problem: str, advice: str, *, cause: ConnectionFailure) -> None:
        super().__init__(problem, advice)
        self.cause = cause


class RequestRefusedError(CesarError):
    """The consumer answered that it did not execute the command; the message is the consumer's own sentence."""


class NoAnswerError(CesarError):
    """No answer in time, from a consumer or from the broker."""

    exit_code = ExitCode.TIMEOUT


class Session:
    """A connection with a client id of its own; the broker keeps no session when it ends.

    It reconnects by itself; the broker then delivers the retained messages of its subscriptions again.

    Attributes:
        address: the broker's URL, without credentials.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        role: str,
        subscriptions: Sequence[Subscription],
        *,
        on_disconnected: Callable[[ConnectionFailure], None] | None = None,
    ) -> None:
        """Prepare the client; `connect` connects.

        Args:
            settings: of the broker.
            role: a part of the client id, for the broker's log.
            subscriptions: renewed at each connection.
            on_disconnected: called on the network thread.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self.address = parse_broker_url(settings.url).redacted
        self._published: dict[PublishTicket, Refusal | None] = {}
        self._unrouted: set[PublishTicket] = set()
        self._client = MqttClient(
            settings,
            client_id=f"cesar-{role}-{uuid.uuid4().hex[:12]}",
            persistent=False,
            subscriptions=subscriptions,
            on_published=self._published.__setitem__,
            on_unrouted=self._unrouted.update,
            on_disconnected=on_disconnected,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(
        self, timeout_s: float, *, retry_s: float = _RETRY_WITHIN_S, subscribe_s: float = 0.0
    ) -> ConnectionInfo:
        """Connect and subscribe; on failure the client is closed.

        Args:
            timeout_s: the longest wait.
            retry_s: the longest wait for a broker that refuses connections.
            subscribe_s: the longest wait beyond both for a broker that accepts connections, and takes long to
                subscribe.

        Raises:
            UnreachableError: there is no broker, or no connection to it can be made.
            NoAnswerError: the broker did not answer in time.
            BrokerRefusedError: the broker refused the connection.
        """
        connection, is_accepted = None, False
        try:
            self._client.start()
            connection = self._client.wait_connected(min(timeout_s, retry_s))
            if connection is None and self._client.failure is None:
                connection = self._client.wait_connected(timeout_s - retry_s)
            if connection is None:
                connection = self._wait_longer(subscribe_s)
        finally:
            if connection is None:
                is_accepted = self._client.is_accepted
                self._client.close(timeout_s=0.0)
        if is_accepted:
            raise NoAnswerError(
                f"{self.address} accepted the connection, but did not grant the subscriptions within "
                f"{timeout_s + subscribe_s:g} s.",
                "Wait longer with --timeout: a cluster that has lost a server takes up to 10 s for each of them.",
            )
        if connection is None:
            raise _unreached(self.address, self._client.failure, timeout_s)
        return connection

    def _wait_longer(self, longest_s: float) -> ConnectionInfo | None:
        """Wait for a broker that is there: a cluster without a leader closes connections, or subscribes slowly."""
        client, connection, starting_s = self._client, None, min(longest_s, _STARTING_S)
        if not client.is_accepted and client.failure is not None and client.failure.is_broker_away:
            connection = client.wait_connected(starting_s)
            longest_s -= starting_s
        if connection is None and client.is_accepted:
            connection = client.wait_connected(longest_s)
        return connection

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._client.close()

    @property
    def connection(self) -> ConnectionInfo | None:
        """The current connection; None: there is none."""
        return self._client.connected

    @property
    def trouble(self) -> str | None:
        """See `MqttClient.trouble`."""
        return self._client.trouble

    def wait_connected(self, timeout_s: float) -> None:
        """Wait for the next connection, at most so long."""
        self._client.wait_connected(timeout_s)

    def receive(self, timeout_s: float) -> list[Delivery]:
        """Wait for messages, at most so long, and acknowledge them."""
        deliveries = self._client.receive(timeout_s)
        self._client.acknowledge(deliveries)
        return deliveries

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: Literal[0, 1] = 1,
        retain: bool = False,
        user_properties: Sequence[tuple[str, str]] = (),
    ) -> PublishTicket | None:
        """Publish and return the ticket for `is_published`; None: there is no connection. Raises CannotPublishError."""
        return self._client.publish(topic, payload, qos=qos, retain=retain, user_properties=user_properties)

    def is_published(self, ticket: PublishTicket | None) -> bool:
        """Whether the broker has acknowledged or refused the message; False also for a connection that was lost.

        The acknowledgement arrives behind incoming messages: call `receive` while waiting for it.
        """
        return ticket in self._published

    def is_unrouted(self, ticket: PublishTicket | None) -> bool:
        """Whether the broker has dropped a message since nothing subscribes to its topic; only MQTT 5 tells."""
        return ticket in self._unrouted

    def refusal(self, ticket: PublishTicket | None) -> str | None:
        """Why the broker refused the message (MQTT 5); None: it did not, or not yet."""
        refusal = None if ticket is None else self._published.get(ticket)
        return None if refusal is None else str(refusal)


def response_data(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a response. Raises RequestRefusedError."""
    data = response.get("data")
    if response.get("status") != "ok" or not isinstance(data, dict):
        raise RequestRefusedError(str(response.get("error") or "The consumer's response cannot be read."))
    return data


def _unreached(address: str, failure: ConnectionFailure | None, timeout_s: float) -> CesarError:
    if failure is None or failure.is_timeout:
        return NoAnswerError(
            f"Nothing at {address} answered within {timeout_s:g} s.", "Is it a broker, and is it reachable?"
        )
    if failure.advice:
        return UnreachableError(f"No connection to {address}: {failure.problem}.", failure.advice, cause=failure)
    advice = "Start it, or name another one with --broker. `cesar-mqtt serve` without --broker brings its own."
    return UnreachableError(f"No broker at {address}: {failure.problem}.", advice, cause=failure)
