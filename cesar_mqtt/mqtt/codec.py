"""PUBLISH and PUBACK as bytes: the packets that go by in thousands. All others are paho's.

paho makes its tables of properties and reason codes anew for each packet: for the four packets of a job it needs 37 us
of a processor, what stands here needs 4. Pure; any thread may call it. Read from sections 3.3 and 3.4 of MQTT 3.1.1 and
of MQTT 5.0.
"""

import time
from dataclasses import dataclass, field

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from cesar_mqtt.mqtt.messages import Delivery, Publication, Receipt

KIND = 0xF0
"""The bits of a packet's first byte that tell its kind."""
PUBLISH, PUBACK = 0x30, 0x40
QOS = 0x06
"""The bits of a PUBLISH's first byte that tell its QoS."""
QOS_2 = 0x04
PINGREQ = b"\xc0\x00"

_RETAIN, _DUP = 0x01, 0x08
_MOST_LENGTH_BYTES = 4
_MORE = 0x80
_FAILURE = 0x80

# Properties of a PUBLISH, MQTT 5.0 section 2.2.2.2.
_EXPIRY, _RESPONSE_TOPIC, _CORRELATION_DATA, _USER_PROPERTY = 2, 8, 9, 38
_FIXED_BYTES = {1: 1, _EXPIRY: 4, 35: 2}  # payload format, message expiry, topic alias
_COUNTED = {3, _RESPONSE_TOPIC, _CORRELATION_DATA}  # content type and these: two bytes say how many follow
_SUBSCRIPTION_IDENTIFIER = 11


class UnreadablePacketError(Exception):
    """A packet that does not keep to MQTT; what comes after it cannot be trusted either."""


_MOST_USER_BYTES = 65_536
"""Of user properties that are kept: many more than metadata may have, so that what is left out changes nothing."""


@dataclass(slots=True)
class _Properties:
    expires_in_s: int | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_properties: list[tuple[str, str]] = field(default_factory=list)
    user_bytes: int = 0


# -- out ---------------------------------------------------------------------------------------------------------------


def frame(first: int, *parts: bytes) -> bytes:
    """Put the fixed header before the rest of a packet."""
    return b"".join((bytes((first,)), _number(sum(map(len, parts))), *parts))


def write_publish(publication: Publication, mid: int, *, five: bool) -> bytes:
    """Return the PUBLISH of a message; correlation data and user properties only if `five`."""
    topic = publication.topic.encode()
    packet_id = mid.to_bytes(2, "big") if publication.qos else b""
    properties = _write_properties(publication) if five else b""
    first = PUBLISH | publication.qos << 1 | publication.retain
    return frame(first, len(topic).to_bytes(2, "big"), topic, packet_id, properties, publication.payload)


def write_puback(mid: int) -> bytes:
    """Return the PUBACK that says: taken."""
    return b"\x40\x02" + mid.to_bytes(2, "big")


def _write_properties(publication: Publication) -> bytes:
    if publication.correlation_data is None and not publication.user_properties:
        return b"\0"
    parts = []
    if publication.correlation_data is not None:
        parts.append(bytes((_CORRELATION_DATA,)) + _counted(publication.correlation_data))
    for name, value in publication.user_properties:
        parts.append(bytes((_USER_PROPERTY,)) + _counted(name.encode()) + _counted(value.encode()))
    properties = b"".join(parts)
    return _number(len(properties)) + properties


def _counted(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that there are more."""
    if value < _MORE:
        return bytes((value,))
    digits = bytearray()
    while value >= _MORE:
        digits.append(value & 0x7F | _MORE)
        value >>= 7
    digits.append(value)
    return bytes(digits)


# -- in ----------------------------------------------------------------------------------------------------------------


def read_number(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """Return a number of up to four bytes, as `_number` writes it, and where it ends; None: it is not all there.

    Raises:
        UnreadablePacketError: it is longer.
    """
    value = 0
    for place, byte in enumerate(data[at : at + _MOST_LENGTH_BYTES]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < _MORE:
            return value, at + place + 1
    if len(data) - at >= _MOST_LENGTH_BYTES:
        raise UnreadablePacketError("a length of more than four bytes")
    return None


def read_publish(first: int, body: bytes, *, five: bool, connection: int) -> Delivery:
    """Return what a PUBLISH brought.

    Args:
        first: the first byte of the packet.
        body: what follows the fixed header.
        five: whether it is MQTT 5.
        connection: by which connection it came.

    Raises:
        UnreadablePacketError: it is shorter than it says, has a property that a PUBLISH cannot have, or a QoS of 3.
    """
    qos = first >> 1 & 3
    if qos > _HIGHEST_QOS:
        raise UnreadablePacketError(f"a PUBLISH of QoS {qos}")
    end = 2 + int.from_bytes(body[:2], "big")
    topic, mid, properties = body[2:end], 0, _NONE
    if qos:
        mid = int.from_bytes(body[end : end + 2], "big")
        end += 2
    if five and body[end : end + 1] == b"\0":
        end += 1
    elif five:
        properties, end = _read_properties(body, end)
    if end > len(body):
        raise UnreadablePacketError("a PUBLISH that is shorter than it says")
    return Delivery(
        topic.decode(errors="replace"),
        body[end:],
        qos,
        bool(first & _RETAIN),
        bool(first & _DUP),
        Receipt(connection, mid),
        tuple(properties.user_properties),
        properties.response_topic,
        properties.correlation_data,
        properties.expires_in_s,
        time.time(),
    )


_NONE = _Properties()
_HIGHEST_QOS = 2


def _read_properties(body: bytes, at: int) -> tuple[_Properties, int]:
    found = read_number(body, at)
    if found is None or sum(found) > len(body):
        raise UnreadablePacketError("properties that are shorter than they say")
    length, at = found
    properties, end = _Properties(), at + length
    body = body[:end]  # so that no property reaches beyond them
    while at < end:
        at = _read_property(properties, body[at], body, at + 1)
    if at > end:
        raise UnreadablePacketError("a property that is longer than all of them")
    return properties, end


def _read_property(into: _Properties, which: int, body: bytes, at: int) -> int:
    """Note a property if it matters here; return where it ends."""
    if which == _USER_PROPERTY:
        start = at
        name, at = _read_counted(body, at)
        value, at = _read_counted(body, at)
        into.user_bytes += at - start  # with their lengths: there may be millions of empty ones
        if into.user_bytes <= _MOST_USER_BYTES:
            into.user_properties.append((name.decode(errors="replace"), value.decode(errors="replace")))
    elif which in _COUNTED:
        data, at = _read_counted(body, at)
        if which == _RESPONSE_TOPIC:
            into.response_topic = data.decode(errors="replace")
        elif which == _CORRELATION_DATA:
            into.correlation_data = data
    elif which in _FIXED_BYTES:
        data, at = body[at : at + _FIXED_BYTES[which]], at + _FIXED_BYTES[which]
        if which == _EXPIRY:
            into.expires_in_s = int.from_bytes(data, "big")
    elif which == _SUBSCRIPTION_IDENTIFIER and (found := read_number(body, at)) is not None:
        _, at = found
    else:
        raise UnreadablePacketError(f"property {which} in a PUBLISH")
    return at


def _read_counted(body: bytes, at: int) -> tuple[bytes, int]:
    end = at + 2 + int.from_bytes(body[at : at + 2], "big")
    return body[at + 2 : end], end


def read_puback(body: bytes) -> tuple[int, str | None]:
    """Return the packet id of a PUBACK, and why the broker refused the message; None: it did not.

    Raises:
        UnreadablePacketError: it is too short for a packet id.
    """
    if len(body) < 2:  # noqa: PLR2004 - the bytes of a packet id
        raise UnreadablePacketError("a PUBACK without a packet id")
    mid = int.from_bytes(body[:2], "big")
    if len(body) == 2 or body[2] < _FAILURE:  # noqa: PLR2004 - as above
        return mid, None
    try:
        return mid, str(ReasonCode(PacketTypes.PUBACK, identifier=body[2]))
    except (KeyError, ValueError):
        return mid, f"reason code {body[2]}"
