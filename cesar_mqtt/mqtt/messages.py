"""The values of the MQTT client: messages in both directions, subscriptions, and what a connection is and was.

Frozen values without paho; any thread may use them.
"""

import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Literal, NamedTuple

from cesar_mqtt.errors import CesarError
from cesar_mqtt.mqtt.broker_url import BrokerUrl, Credentials, Version

MAX_PACKET_BYTES = 268_435_455
"""The largest packet of MQTT itself."""

_PACKET_TOO_LARGE = 0x95
_MAX_TEXT_BYTES = 65_535  # texts of MQTT have a two-byte length
_MAX_TOPIC_LEVELS = 200  # mosquitto's TOPIC_HIERARCHY_LIMIT
_PAIR_BYTES = 64
"""The memory of the tuple that holds the two texts of a user property."""

# Control characters, surrogates and non-characters: mosquitto 2.0.11 disconnects a client that sends one [tried].
_LAST_OF_PLANES = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_FORBIDDEN = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_LAST_OF_PLANES}]")


# -- incoming ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)  # frozen it would take three times as long to make
class Receipt:
    """Identifies an incoming message for its acknowledgement: the number of its connection, and its packet id there."""

    connection: int
    mid: int


@dataclass(slots=True)  # frozen it would take three times as long to make
class Delivery:
    """An incoming message.

    In `topic` U+FFFD replaces each byte that is not UTF-8. `user_properties`, `response_topic`, `correlation_data` and
    `expires_in_s` exist in MQTT 5 only.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    receipt: Receipt
    user_properties: tuple[tuple[str, str], ...] = ()
    response_topic: str | None = None
    correlation_data: bytes | None = None
    expires_in_s: int | None = None
    received_at: float = 0.0
    """Seconds since the epoch."""

    @property
    def size_bytes(self) -> int:
        """The memory of all parts whose size the sender chooses."""
        texts = self.topic, self.payload, self.response_topic, self.correlation_data
        pairs = (getsizeof(name) + getsizeof(value) + _PAIR_BYTES for name, value in self.user_properties)
        return sum(map(getsizeof, texts)) + sum(pairs)


# -- outgoing ----------------------------------------------------------------------------------------------------------


class CannotPublishError(CesarError):
    """No broker accepts this message, now or later: it has to be changed or dropped."""


class PacketTooLargeError(CannotPublishError):
    """The packet of a message exceeds the broker's limit.

    Attributes:
        size_bytes: the size of the packet.
        limit_bytes: the largest packet that the broker accepts.
    """

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"The message makes a packet of {size_bytes} bytes; the broker accepts {limit_bytes}.")
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


@dataclass(slots=True)  # frozen it would take three times as long to make
class Publication:
    """An outgoing message, checked against the limits that brokers enforce by closing the connection.

    The publisher sends unacknowledged messages again after each reconnect: a message over one of these limits would
    block everything behind it for ever.

    Raises:
        CannotPublishError: the topic or a property is invalid.
    """

    topic: str
    payload: bytes = field(repr=False)
    qos: int
    retain: bool
    correlation_data: bytes | None = None
    user_properties: Sequence[tuple[str, str]] = ()
    alone: bool = False
    """Whether it may not be in flight together with other messages."""

    def __post_init__(self) -> None:
        if not self.topic or "+" in self.topic or "#" in self.topic or not _is_valid_text(self.topic):
            raise CannotPublishError(f"Brokers accept no message on the topic {self.topic[:80]!r}.")
        if self.topic.count("/") >= _MAX_TOPIC_LEVELS:
            raise CannotPublishError(f"Brokers accept no topic of more than {_MAX_TOPIC_LEVELS} levels.")
        if self.user_properties and not all(_is_valid_text(text) for pair in self.user_properties for text in pair):
            raise CannotPublishError("A user property is too long, or has characters that brokers do not accept.")
        if len(self.correlation_data or b"") > _MAX_TEXT_BYTES:
            raise CannotPublishError(f"The correlation data is longer than {_MAX_TEXT_BYTES} bytes.")


class PublishTicket(NamedTuple):
    """Identifies a published message until it is acknowledged; void when its connection is lost."""

    connection: int
    mid: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the broker has refused a message (MQTT 5); as text the reason.

    Attributes:
        reason_code: that of PUBACK.
        reason: its name.
    """

    reason_code: int
    reason: str

    def __str__(self) -> str:
        return self.reason

    @property
    def is_too_large(self) -> bool:
        """Whether the packet exceeds a limit of the broker."""
        return self.reason_code == _PACKET_TOO_LARGE


def _is_valid_text(text: str) -> bool:
    if text.isascii() and text.isprintable():  # most topics, in a tenth of the time
        return len(text) <= _MAX_TEXT_BYTES
    return not _FORBIDDEN.search(text) and len(text.encode()) <= _MAX_TEXT_BYTES


# -- connections -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subscription:
    """A topic filter to subscribe to, at QoS 1."""

    topic_filter: str
    wants_retained: bool = False
    """Whether the broker sends the retained messages at each connect; in 3.1.1 it always does."""
    may_go_ahead: bool = False
    """Whether it is at QoS 0 while `MqttClient.let_go_ahead` is on."""


@dataclass(frozen=True, slots=True)
class Will:
    """The message that the broker publishes when the client disappears without DISCONNECT."""

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = True


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """What all connections of a client have in common."""

    address: BrokerUrl
    credentials: Credentials
    tls: ssl.SSLContext | None
    client_id: str
    persistent: bool
    """Whether the broker keeps the session, with its subscriptions and messages, while the client is away."""
    will: Will | None
    subscriptions: tuple[Subscription, ...]
    unwanted: tuple[str, ...]
    """Topic filters that the session may still have from an earlier start, to be unsubscribed."""
    keepalive_s: int
    receive_maximum: int
    """How many unacknowledged messages the broker may send; MQTT 5 only."""
    max_packet_bytes: int | None


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """A connection that is ready: connected and subscribed."""

    session_present: bool
    """Whether the broker still had the client's session; if not, what the session held is lost."""
    protocol: Version
    max_packet_bytes: int | None
    """The largest packet that the broker accepts; None: no limit is known."""
    number: int
    """Counts the client's connections."""
    refused_filters: tuple[str, ...] = ()
    """Subscriptions that the broker refused, or granted at a lower QoS than was asked for."""


@dataclass(frozen=True, slots=True)
class ConnectionFailure:
    """Why there is no connection, or why it ended; as text the problem, then the advice."""

    problem: str
    """A clause without a full stop, such as "Connection refused"."""
    advice: str = ""
    """What to do, as sentences; "" where nothing can be done."""
    reason_code: int | None = None
    """The one of CONNACK or DISCONNECT, as MQTT 5 numbers them; None: the broker sent none."""
    is_timeout: bool = False
    """Whether nothing answered in time."""
    is_broker_away: bool = False
    """Whether the broker said that it ends, or is busy, or closed the connection without a word."""
    unacknowledged: tuple[PublishTicket, ...] = ()
    """The messages that were sent and not acknowledged when the connection ended: it may have ended because of one."""
    is_stalled: bool = False
    """Whether the broker answered pings, and not the messages that are `unacknowledged`."""

    def __str__(self) -> str:
        return f"{self.problem}. {self.advice}" if self.advice else f"{self.problem}."
