"""Outgoing messages from `publish` to PUBACK, without a network."""

from dataclasses import replace

import pytest

from cesar_mqtt.mqtt.messages import PacketTooLargeError, Publication, PublishTicket, Refusal
from cesar_mqtt.mqtt.send_queue import MAX_IN_FLIGHT, SendQueue

DENIED = Refusal(0x87, "Not authorized")


class FakeSink:
    """Takes packets; `has_unsent` as the test sets it."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.has_unsent = False

    def send(self, buffer: bytes) -> None:
        self.packets.append(buffer)


def message(number: int, qos: int = 1) -> Publication:
    return Publication("t", str(number).encode(), qos, retain=False)


def outgoing() -> SendQueue:
    return SendQueue(3, five=True, limit_bytes=None)


def publish(out: SendQueue, count: int, qos: int = 1) -> list[PublishTicket]:
    tickets = [out.publish(message(number, qos)) for number in range(count)]
    assert all(tickets)
    return [ticket for ticket in tickets if ticket is not None]


def test_no_more_messages_are_in_flight_than_allowed() -> None:
    out, sink = outgoing(), FakeSink()
    tickets = publish(out, MAX_IN_FLIGHT + 2)
    out.send(sink)
    assert len(sink.packets) == MAX_IN_FLIGHT
    assert out.has_waiting
    out.on_acknowledged(tickets[5].mid, None)
    out.send(sink)
    assert [packet[-2:] for packet in sink.packets[-1:]] == [b"20"]
    out.on_acknowledged(tickets[0].mid, None)
    out.send(sink)
    assert not out.has_waiting
    assert out.take_published() == [(tickets[5], None), (tickets[0], None)]
    assert out.take_published() == []


def test_a_puback_of_a_message_that_was_not_sent_is_ignored() -> None:
    out, sink = outgoing(), FakeSink()
    out.max_in_flight = 1
    first, second = publish(out, 2)
    out.send(sink)
    out.on_acknowledged(second.mid, None)
    out.on_acknowledged(999, None)
    out.send(sink)
    assert len(sink.packets) == 1
    out.on_acknowledged(first.mid, None)
    out.on_acknowledged(first.mid, None)
    assert out.take_published() == [(first, None)]


def test_a_message_of_qos_0_is_published_when_it_is_written() -> None:
    out, sink = outgoing(), FakeSink()
    (ticket,) = publish(out, 1, qos=0)
    sink.has_unsent = True
    out.send(sink)
    out.on_flushed(sink)
    assert out.take_published() == []
    sink.has_unsent = False
    out.on_flushed(sink)
    out.on_flushed(sink)
    assert out.take_published() == [(ticket, None)]


def test_a_refusal_has_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    out, sink = outgoing(), FakeSink()
    (ticket,) = publish(out, 1)
    out.send(sink)
    out.on_acknowledged(ticket.mid, DENIED)
    assert out.take_published() == [(ticket, DENIED)]
    assert out.has_refused
    assert "refused a message on t: Not authorized" in caplog.text


def test_acknowledgements_before_an_acknowledged_message_have_been_received() -> None:
    out, sink = outgoing(), FakeSink()
    for behind in (0, 3, 7):
        publish(out, 1)
        out.send(sink, acks_sent=behind)
    assert out.acks_received == 0
    for mid, received in ((2, 3), (9, 3), (1, 3), (3, 7)):
        out.on_acknowledged(mid, None)
        assert out.acks_received == received


def test_a_packet_id_in_flight_is_not_used_again() -> None:
    out, sink = outgoing(), FakeSink()
    stuck = publish(out, 1)[0]
    seen = {stuck.mid}
    out.send(sink)
    for number in range(65_534):
        ticket = out.publish(message(number))
        assert ticket is not None
        assert 1 <= ticket.mid <= 65_535
        seen.add(ticket.mid)
        out.send(sink)
        out.on_acknowledged(ticket.mid, None)
    assert len(seen) == 65_535
    again = out.publish(message(0))
    assert again is not None
    assert again.mid == stuck.mid + 1


def test_waiting_messages_have_unique_packet_ids_however_many_are_rejected() -> None:
    out = outgoing()
    out.limit_bytes = 100
    tickets = publish(out, 1)
    for _ in range(65_534):
        with pytest.raises(PacketTooLargeError):
            out.publish(Publication("t", bytes(100), 1, retain=False))
    tickets += publish(out, 59_999)
    for _ in range(10_000):
        assert out.publish(message(0)) is None, "60,000 wait"
    assert len({ticket.mid for ticket in tickets}) == 60_000


def test_messages_behind_an_unacknowledged_one_have_unique_packet_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.send_queue._MAX_PACKET_ID", 70)
    monkeypatch.setattr("cesar_mqtt.mqtt.send_queue._MAX_WAITING", 40)
    out, sink = outgoing(), FakeSink()
    stuck, *ours = publish(out, 40)
    out.send(sink)
    for number in range(300):
        ticket = out.publish(message(number))
        assert ticket is not None
        assert ticket not in (stuck, *ours)
        ours.append(ticket)
        while len(ours) > 58:
            out.on_acknowledged(ours.pop(0).mid, None)
            out.send(sink)


def test_a_packet_one_byte_over_the_limit_is_rejected() -> None:
    out, sink = outgoing(), FakeSink()
    ticket = out.publish(Publication("t", bytes(100), 1, retain=False))
    out.send(sink)
    size = len(sink.packets[0])
    assert ticket is not None
    out.limit_bytes = size
    assert out.publish(Publication("t", bytes(100), 1, retain=False)) is not None
    with pytest.raises(PacketTooLargeError) as refused:
        out.publish(Publication("t", bytes(101), 1, retain=False))
    assert (refused.value.size_bytes, refused.value.limit_bytes) == (size + 1, size)


def test_a_full_queue_accepts_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.send_queue._MAX_WAITING", 3)
    out = outgoing()
    publish(out, 3)
    assert out.publish(message(3)) is None


def test_the_configured_limit_applies_from_the_start() -> None:
    with pytest.raises(PacketTooLargeError):
        SendQueue(3, five=True, limit_bytes=50).publish(Publication("t", bytes(100), 1, retain=False))


def test_a_message_that_is_to_be_alone_has_nothing_in_flight_beside_it() -> None:
    out, sink = outgoing(), FakeSink()
    before, alone, behind = (
        out.publish(message(0)),
        out.publish(replace(message(1), alone=True)),
        out.publish(message(2)),
    )
    for sent in (before, alone, behind):
        out.send(sink)
        assert out.unacknowledged == (sent,)
        assert sent is not None
        out.on_acknowledged(sent.mid, None)
    assert len(sink.packets) == 3
