"""What can be published: the limits that a broker would enforce by closing the connection.

A message over one of them, in an outbox that sends again after each reconnect, would stop everything behind it for
ever. So it is refused here. Pure; any thread may call it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cesar_mqtt.errors import CesarError

MOST_PACKET_BYTES = 268_435_455
"""What MQTT itself allows."""

_MOST_TEXT_BYTES = 65_535
_MOST_LEVELS = 200  # mosquitto's TOPIC_HIERARCHY_LIMIT

# Control characters, surrogates and non-characters: who sends one is thrown out by mosquitto 2.0.11 [tried].
_LAST_OF_PLANES = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_FORBIDDEN = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{_LAST_OF_PLANES}]")


class CannotPublishError(CesarError):
    """A message that no broker takes, now or later: it has to be changed or dropped."""


class PacketTooLargeError(CannotPublishError):
    """A message over the broker's limit.

    Attributes:
        size_bytes: what its packet would have.
        limit_bytes: what the broker takes.
    """

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"The message makes a packet of {size_bytes} bytes; the broker takes {limit_bytes}.")
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


@dataclass(frozen=True, slots=True)
class Publication:
    """A message to be sent; making one checks that it can be.

    Raises:
        CannotPublishError: its topic or its properties are none.
    """

    topic: str
    payload: bytes = field(repr=False)
    qos: int
    retain: bool
    correlation_data: bytes | None = None
    user_properties: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        """Check."""
        if not self.topic or "+" in self.topic or "#" in self.topic or not _is_sound(self.topic):
            raise CannotPublishError(f"Nothing can be published on {self.topic[:80]!r}: brokers take no such topic.")
        if self.topic.count("/") >= _MOST_LEVELS:
            raise CannotPublishError(f"Nothing can be published on a topic of more than {_MOST_LEVELS} levels.")
        if self.user_properties and not all(_is_sound(text) for pair in self.user_properties for text in pair):
            raise CannotPublishError("A user property is too long, or holds characters that brokers do not take.")
        if len(self.correlation_data or b"") > _MOST_TEXT_BYTES:
            raise CannotPublishError("The correlation data is too long.")


@dataclass(frozen=True, slots=True)
class PublishTicket:
    """Stands for one published message; void when its connection is lost."""

    connection: int
    mid: int


def _is_sound(text: str) -> bool:
    return not _FORBIDDEN.search(text) and len(text.encode()) <= _MOST_TEXT_BYTES
