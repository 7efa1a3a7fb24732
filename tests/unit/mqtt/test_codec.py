"""PUBLISH and PUBACK, with paho as the oracle, and malformed packets."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet as paho_packet
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cesar_mqtt.mqtt.codec import (
    PUBLISH,
    MalformedPacketError,
    decode_number,
    decode_puback,
    decode_publish,
    encode_puback,
    encode_publish,
    frame,
    is_unrouted,
)
from cesar_mqtt.mqtt.messages import Publication, Receipt, Refusal

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn"), exclude_characters="\ufeff"))
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=4)


def versions(*, five: bool) -> MQTTProtocolVersion:
    return MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311


def body_of(packet: bytes) -> tuple[int, bytes]:
    """The first byte of a packet, and what follows its header."""
    found = decode_number(packet, 1)
    assert found is not None
    length, start = found
    assert start + length == len(packet)
    return packet[0], packet[start:]


def packed(**fields: Any) -> bytes:
    """Properties of a PUBLISH, as paho encodes them."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in fields.items():
        if value is not None:
            setattr(properties, name, value)
    encoded: bytes = properties.pack()  # type: ignore[no-untyped-call]
    return encoded


EVERY_PROPERTY = {
    "PayloadFormatIndicator": 1,
    "MessageExpiryInterval": 60,
    "ContentType": "text/plain",
    "ResponseTopic": "reply/to",
    "CorrelationData": b"\x00\xff",
    "SubscriptionIdentifier": 300,
    "TopicAlias": 1,
    "UserProperty": [("a", "1"), ("a", "ü")],
}


def brought(properties: bytes, payload: bytes = b"x") -> bytes:
    """What follows the header of a PUBLISH of QoS 1 with these properties."""
    return b"\0\1t" + b"\0\7" + properties + payload


@given(
    topic=TEXT.filter(lambda text: text and not {"+", "#"} & set(text)),
    payload=st.binary(max_size=300),
    qos=st.sampled_from([0, 1]),
    retain=st.booleans(),
    correlation_data=st.none() | st.binary(max_size=200),
    pairs=PAIRS,
    five=st.booleans(),
)
def test_paho_decodes_what_is_encoded(  # noqa: PLR0917 - hypothesis names them
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,  # noqa: FBT001
    correlation_data: bytes | None,
    pairs: list[tuple[str, str]],
    five: bool,  # noqa: FBT001
) -> None:
    publication = Publication(topic, payload, qos, retain, correlation_data, pairs)
    first, body = body_of(encode_publish(publication, 513, five=five))
    read = paho_packet.decode_publish(first, body, versions(five=five))
    assert (read.topic.decode(), bytes(read.payload)) == (topic, payload)
    assert (read.qos, read.retain, read.dup, read.mid) == (qos, retain, False, 513 if qos else 0)
    found: dict[str, Any] = vars(read.properties) if five else {}
    assert found.get("CorrelationData") == (correlation_data if five else None)
    assert found.get("UserProperty", []) == (pairs if five else [])
    assert decode_publish(first, body, five=five, connection=3).user_properties == (tuple(pairs) if five else ())


@given(
    topic=TEXT.filter(bool),
    payload=st.binary(max_size=300),
    flags=st.tuples(st.sampled_from([0, 1, 2]), st.booleans(), st.booleans()),
    known=st.fixed_dictionaries(
        {
            "MessageExpiryInterval": st.none() | st.integers(0, 0xFFFFFFFF),
            "ResponseTopic": st.none() | TEXT,
            "CorrelationData": st.none() | st.binary(max_size=200),
            "UserProperty": st.none() | PAIRS.filter(bool),
        }
    ),
    ignored=st.fixed_dictionaries(
        {
            "PayloadFormatIndicator": st.none() | st.integers(0, 1),
            "ContentType": st.none() | TEXT,
            "SubscriptionIdentifier": st.none() | st.integers(1, 268_435_455),
            "TopicAlias": st.none() | st.integers(1, 65_535),
        }
    ),
    five=st.booleans(),
)
def test_what_paho_encodes_is_decoded(  # noqa: PLR0917 - hypothesis names them
    topic: str,
    payload: bytes,
    flags: tuple[int, bool, bool],
    known: dict[str, Any],
    ignored: dict[str, Any],
    five: bool,  # noqa: FBT001
) -> None:
    qos, retain, dup = flags
    name, packet_id = topic.encode(), b"\0\7" if qos else b""
    body = len(name).to_bytes(2, "big") + name + packet_id + (packed(**known, **ignored) if five else b"") + payload
    delivery = decode_publish(PUBLISH | dup << 3 | qos << 1 | retain, body, five=five, connection=3)
    assert (delivery.topic, delivery.payload) == (topic, payload)
    assert (delivery.qos, delivery.retain, delivery.dup) == flags
    assert delivery.receipt == Receipt(3, 7 if qos else 0)
    assert delivery.expires_in_s == (known["MessageExpiryInterval"] if five else None)
    assert delivery.response_topic == (known["ResponseTopic"] if five else None)
    assert delivery.correlation_data == (known["CorrelationData"] if five else None)
    assert delivery.user_properties == (tuple(known["UserProperty"] or ()) if five else ())


def test_very_many_user_properties_are_decoded_in_linear_time_and_not_all_kept() -> None:
    one = b"\x26" + len(b"name").to_bytes(2, "big") + b"name" + b"\0\0"
    properties = frame(PUBLISH, one * 100_000)[1:]
    found = decode_publish(PUBLISH | 1 << 1, brought(properties), five=True, connection=1)
    assert found.payload == b"x"
    assert set(found.user_properties) == {("name", "")}
    assert 4_096 < sum(len(name) for name, _ in found.user_properties) <= 65_536


def test_very_many_empty_user_properties_are_not_all_kept() -> None:
    properties = frame(PUBLISH, b"\x26\0\0\0\0" * 100_000)[1:]
    found = decode_publish(PUBLISH | 1 << 1, brought(properties), five=True, connection=1)
    assert found.payload == b"x"
    assert 1_000 < len(found.user_properties) <= 16_384


def test_a_byte_order_mark_in_a_property_is_kept() -> None:
    """paho 2.2 takes it for a malformed packet; MQTT 5, section 1.5.4, wants it kept."""
    properties = b"\x0b\x26\0\3\xef\xbb\xbf\0\3abc"
    assert decode_publish(0x32, brought(properties), five=True, connection=1).user_properties == (("\ufeff", "abc"),)


def test_invalid_utf_8_is_replaced() -> None:
    properties = b"\x07\x26\0\1\xff\0\1\xfe"
    delivery = decode_publish(0x32, b"\0\2\xff\xfe\0\1" + properties + b"x", five=True, connection=1)
    assert delivery.topic == "\ufffd\ufffd"
    assert delivery.user_properties == (("\ufffd", "\ufffd"),)


def test_a_truncated_message_is_malformed() -> None:
    whole = brought(packed(**EVERY_PROPERTY), b"")
    for size in range(len(whole)):
        with pytest.raises(MalformedPacketError):
            decode_publish(0x32, whole[:size], five=True, connection=1)


@given(st.binary(max_size=60), st.booleans(), st.sampled_from([0x30, 0x32, 0x3B]))
def test_any_bytes_are_decoded_or_malformed(body: bytes, five: bool, first: int) -> None:  # noqa: FBT001
    with suppress(MalformedPacketError):
        delivery = decode_publish(first, body, five=five, connection=1)
        assert len(delivery.payload) <= len(body)


@pytest.mark.parametrize(
    "properties",
    [b"\x02\x63\0", b"\xff\xff\xff\xff\x01", b"\x02\x0b\x80", b"\x03\x26\0\1", b"\x02\x02\0", b"\x03\x03\0\1"],
    ids=["unknown", "endless", "cut number", "cut pair", "cut expiry", "cut text"],
)
def test_invalid_properties_are_malformed(properties: bytes) -> None:
    with pytest.raises(MalformedPacketError):
        decode_publish(0x32, brought(properties), five=True, connection=1)


def test_there_is_no_qos_3() -> None:
    with pytest.raises(MalformedPacketError, match="QoS 3"):
        decode_publish(0x36, brought(b""), five=True, connection=1)


def test_a_puback_has_a_packet_id_and_a_reason() -> None:
    assert body_of(encode_puback(513)) == (0x40, b"\x02\x01")
    assert decode_puback(b"\x02\x01") == (513, None)
    assert decode_puback(b"\x02\x01\x10") == (513, None)
    assert [is_unrouted(body) for body in (b"\x02\x01", b"\x02\x01\x00", b"\x02\x01\x10")] == [False, False, True]
    assert decode_puback(b"\x02\x01\x87\x00") == (513, Refusal(0x87, "Not authorized"))
    assert decode_puback(b"\x02\x01\xfa") == (513, Refusal(250, "reason code 250"))
    with pytest.raises(MalformedPacketError):
        decode_puback(b"\x02")


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_a_length_is_decoded_as_it_was_encoded(size: int) -> None:
    packet = frame(PUBLISH, bytes(size))
    assert body_of(packet) == (PUBLISH, bytes(size))
    assert decode_number(packet[: 1 + (size > 127)], 1) is None


def test_a_length_of_five_bytes_is_malformed() -> None:
    with pytest.raises(MalformedPacketError):
        decode_number(b"\x30\x80\x80\x80\x80\x01", 1)
