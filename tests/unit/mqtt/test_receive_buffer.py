"""What comes in, on its way to whoever fetches it, without a network."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cesar_mqtt.mqtt.messages import Delivery, Receipt
from cesar_mqtt.mqtt.receive_buffer import ReceiveBuffer, RedeliveryBounds

SMALL = Delivery("t", b"", 1, retain=False, dup=False, receipt=Receipt(1, 1))
LARGE = "x" * 60_000
WAIT_S = 10.0


def message(number: int, qos: int = 1) -> Delivery:
    return replace(SMALL, qos=qos, receipt=Receipt(1, number))


class Called:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.mark.parametrize(
    "held",
    [
        {"payload": LARGE.encode()},
        {"topic": LARGE},
        {"response_topic": LARGE},
        {"correlation_data": LARGE.encode()},
        {"user_properties": (("name", LARGE),)},
        {"user_properties": ((LARGE, "value"),)},
        {"user_properties": (("\U0001f600" * 15_000, ""),)},
        {"user_properties": (("", ""),) * 400},
    ],
)
def test_what_waits_is_bounded_in_bytes_whatever_it_holds(held: dict[str, Any]) -> None:
    buffer = ReceiveBuffer(2000, 200_000, on_room=lambda: None)
    assert [buffer.put(replace(SMALL, **held)) for _ in range(4)] == [True, True, True, False]
    assert len(buffer.take(0)) == 3
    assert buffer.put(replace(SMALL, payload=bytes(10_000_000))), "one always fits"
    assert not buffer.put(SMALL)


def test_what_fits_to_the_byte_is_taken_and_what_was_taken_makes_room_for_as_much() -> None:
    two = 2 * SMALL.size_bytes
    buffer = ReceiveBuffer(10, two, on_room=lambda: None)
    for _ in range(3):
        assert [buffer.put(message(number)) for number in range(3)] == [True, True, False]
        assert len(buffer.take(0)) == 2


def test_no_more_wait_than_may_and_they_come_out_in_order() -> None:
    buffer = ReceiveBuffer(3, 1_000_000, on_room=lambda: None)
    assert [buffer.put(message(number)) for number in range(4)] == [True, True, True, False]
    assert buffer.take(0) == [message(0), message(1), message(2)], "nothing is kept of what found no room"
    assert buffer.take(0) == []


def test_room_is_told_once_to_whoever_found_none_and_only_then() -> None:
    on_room = Called()
    buffer = ReceiveBuffer(1, 1_000_000, on_room=on_room)
    buffer.put(message(0))
    buffer.take(0)
    assert on_room.times == 0, "nobody was waiting"
    buffer.put(message(1))
    assert not buffer.put(message(2))
    assert on_room.times == 0, "there is none yet"
    buffer.take(0)
    buffer.take(0)
    assert on_room.times == 1
    buffer.put(message(2))
    assert buffer.put(message(3, qos=0)), "it is dropped, so nobody waits for room"
    buffer.take(0)
    assert on_room.times == 1


def test_of_qos_0_what_has_no_room_is_dropped_and_told_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("cesar_mqtt.mqtt.receive_buffer.time.monotonic", lambda: now[0])
    buffer = ReceiveBuffer(1, 1_000_000, on_room=lambda: None)
    buffer.put(message(0))

    def told(drops: int) -> list[str]:
        caplog.clear()
        assert all(buffer.put(message(1, qos=0)) for _ in range(drops))
        return [record.getMessage().split(": ")[1].split(".")[0] for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        assert told(3) == ["dropped 1 messages of QoS 0"]
        now[0] += 60
        assert told(2) == ["dropped 3 messages of QoS 0"]
        now[0] += 60
        assert told(1) == ["dropped 2 messages of QoS 0"]
    assert buffer.take(0) == [message(0)]


@pytest.mark.parametrize("end", [lambda buffer: buffer.put(message(0)), ReceiveBuffer.close], ids=["message", "end"])
def test_whoever_waits_is_woken_by_the_first_message_and_by_the_end(end: Callable[[ReceiveBuffer], object]) -> None:
    """Without that it would sleep on, and a consumer with nothing else to do would never take its next job."""
    buffer = ReceiveBuffer(10, 1_000_000, on_room=lambda: None)
    waits = threading.Event()
    taken: list[list[Delivery]] = []
    buffer._changed = Watched(waits)
    thread = threading.Thread(target=lambda: taken.append(buffer.take(None)), daemon=True)
    thread.start()
    assert waits.wait(WAIT_S)
    end(buffer)
    thread.join(WAIT_S)
    assert taken in ([[message(0)]], [[]])


class Watched(threading.Condition):
    """Says when somebody is about to wait; whoever then notifies has to come after that."""

    def __init__(self, waits: threading.Event) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.set()
        return super().wait(timeout)


def test_after_the_end_nothing_goes_in_or_comes_out_and_whoever_found_no_room_is_told() -> None:
    on_room = Called()
    buffer = ReceiveBuffer(1, 1_000_000, on_room=on_room)
    buffer.put(message(0))
    assert not buffer.put(message(1))
    buffer.close()
    assert on_room.times == 1, "else the network thread would hold the message back for ever"
    assert buffer.put(message(1)), "it is not held back, and not acknowledged either"
    assert buffer.take(None) == []


def test_what_the_broker_has_heard_is_told_once_and_its_session_as_long_as_it_lasts() -> None:
    buffer = ReceiveBuffer(1, 1_000_000, on_room=lambda: None)
    assert buffer.take_redelivery_bounds() == RedeliveryBounds(0, {})
    buffer.start_session(4)
    buffer.set_acks_received(4, 1)
    buffer.set_acks_received(4, 7)
    buffer.set_acks_received(5, 2)
    assert buffer.take_redelivery_bounds() == RedeliveryBounds(4, {4: 7, 5: 2})
    assert buffer.take_redelivery_bounds() == RedeliveryBounds(4, {})
