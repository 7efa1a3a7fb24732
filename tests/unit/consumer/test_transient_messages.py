"""What waits to be sent and what is on its way, by themselves."""

import logging

import pytest

from cesar_mqtt.consumer.in_flight import InFlight, PendingAck
from cesar_mqtt.consumer.transient_messages import TransientMessage, TransientMessages


def test_what_fits_to_the_byte_is_kept_also_over_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    note = TransientMessage("topic", bytes(95))
    monkeypatch.setattr("cesar_mqtt.consumer.transient_messages.MOST_BYTES", 2 * note.size_bytes)
    notes = TransientMessages(monotonic=lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            notes.add(note)
        for _ in range(3):
            notes.interrupt([])
            assert len(notes) == 2
        notes.warn()
    assert caplog.messages == [], "nothing had to give way"


def test_a_job_that_was_cleared_may_be_cleared_once_more() -> None:
    """A broker may go back to what it retained before; meanwhile nobody would have told it again to forget the job."""
    in_flight = InFlight()
    in_flight.add("ticket", PendingAck(7, gone=True))
    assert list(in_flight.clearing) == [7]
    in_flight.acknowledge("ticket")
    assert list(in_flight.clearing) == []
    assert list(in_flight.telling) == []
