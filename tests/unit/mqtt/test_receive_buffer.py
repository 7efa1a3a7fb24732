"""Incoming messages between two threads, without a network."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cesar_mqtt.mqtt.messages import Delivery, Receipt
from cesar_mqtt.mqtt.receive_buffer import ReceiveBuffer, RedeliveryBounds
from tests.conftest import PATIENCE_S
from tests.factories import delivery

SMALL = delivery("t", b"")
LARGE = "x" * 60_000


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
def test_the_buffer_is_bounded_in_bytes_for_every_part_of_a_message(held: dict[str, Any]) -> None:
    buffer = ReceiveBuffer(2000, 200_000, on_room=lambda: None)
    assert [buffer.put(replace(SMALL, **held)) for _ in range(4)] == [True, True, True, False]
    assert len(buffer.take(0)) == 3
    assert buffer.put(replace(SMALL, payload=bytes(10_000_000))), "one always fits"
    assert not buffer.put(SMALL)


def test_messages_fit_to_the_byte_and_taken_ones_make_room() -> None:
    two = 2 * SMALL.size_bytes
    buffer = ReceiveBuffer(10, two, on_room=lambda: None)
    for _ in range(3):
        assert [buffer.put(message(number)) for number in range(3)] == [True, True, False]
        assert len(buffer.take(0)) == 2


def test_the_buffer_is_bounded_in_messages_and_keeps_their_order() -> None:
    buffer = ReceiveBuffer(3, 1_000_000, on_room=lambda: None)
    assert [buffer.put(message(number)) for number in range(4)] == [True, True, True, False]
    assert buffer.take(0) == [message(0), message(1), message(2)], "a message without room is not kept"
    assert buffer.take(0) == []


def test_on_room_is_called_once_after_a_message_found_no_room() -> None:
    on_room = Called()
    buffer = ReceiveBuffer(1, 1_000_000, on_room=on_room)
    buffer.put(message(0))
    buffer.take(0)
    assert on_room.times == 0, "no message waited for room"
    buffer.put(message(1))
    assert not buffer.put(message(2))
    assert on_room.times == 0, "there is none yet"
    buffer.take(0)
    buffer.take(0)
    assert on_room.times == 1
    buffer.put(message(2))
    assert buffer.put(message(3, qos=0)), "it is dropped and does not wait for room"
    buffer.take(0)
    assert on_room.times == 1


def test_messages_of_qos_0_without_room_are_dropped_and_logged_at_intervals(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("cesar_mqtt.mqtt.receive_buffer.time.monotonic", lambda: now[0])
    buffer = ReceiveBuffer(1, 1_000_000, on_room=lambda: None)
    buffer.put(message(0))

    def logged(drops: int) -> list[str]:
        caplog.clear()
        assert all(buffer.put(message(1, qos=0)) for _ in range(drops))
        return [record.getMessage().split(": ")[1].split(".")[0] for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        assert logged(3) == ["dropped 1 messages of QoS 0"]
        now[0] += 60
        assert logged(2) == ["dropped 3 messages of QoS 0"]
        now[0] += 60
        assert logged(1) == ["dropped 2 messages of QoS 0"]
    assert buffer.take(0) == [message(0)]


@pytest.mark.parametrize("end", [lambda buffer: buffer.put(message(0)), ReceiveBuffer.close], ids=["message", "end"])
def test_take_is_woken_by_the_first_message_and_by_close(end: Callable[[ReceiveBuffer], object]) -> None:
    """Otherwise an idle consumer would never receive its next job."""
    buffer = ReceiveBuffer(10, 1_000_000, on_room=lambda: None)
    waits = threading.Event()
    taken: list[list[Delivery]] = []
    buffer._changed = Watched(waits)
    thread = threading.Thread(target=lambda: taken.append(buffer.take(None)), daemon=True)
    thread.start()
    assert waits.wait(PATIENCE_S)
    end(buffer)
    thread.join(PATIENCE_S)
    assert taken in ([[message(0)]], [[]])


class Watched(threading.Condition):
    """Sets an event when a thread is about to wait: a later `notify` is not lost."""

    def __init__(self, waits: threading.Event) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits.set()
        return super().wait(timeout)


def test_after_close_nothing_is_added_or_taken_and_on_room_is_called() -> None:
    on_room = Called()
    buffer = ReceiveBuffer(1, 1_000_000, on_room=on_room)
    buffer.put(message(0))
    assert not buffer.put(message(1))
    buffer.close()
    assert on_room.times == 1, "else the network thread would hold back the message for ever"
    assert buffer.put(message(1)), "it is not held back, and not acknowledged either"
    assert buffer.take(None) == []


def test_received_acknowledgements_are_returned_once_and_the_session_always() -> None:
    buffer = ReceiveBuffer(1, 1_000_000, on_room=lambda: None)
    assert buffer.take_redelivery_bounds() == RedeliveryBounds(0, {})
    buffer.start_session(4)
    buffer.set_acks_received(4, 1)
    buffer.set_acks_received(4, 7)
    buffer.set_acks_received(5, 2)
    assert buffer.take_redelivery_bounds() == RedeliveryBounds(4, {4: 7, 5: 2})
    assert buffer.take_redelivery_bounds() == RedeliveryBounds(4, {})
