"""Transient messages that wait to be sent."""

import logging

import pytest

from cesar_mqtt.consumer.job_messages import TransientMessage, TransientMessages


def test_messages_that_fit_to_the_byte_are_kept_also_over_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    message = TransientMessage("topic", bytes(95))
    monkeypatch.setattr("cesar_mqtt.consumer.job_messages.MAX_TRANSIENT_BYTES", 2 * message.size_bytes)
    waiting = TransientMessages(monotonic=lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            waiting.add(message)
        for _ in range(3):
            waiting.on_disconnected([])
            assert len(waiting) == 2
        waiting.warn_of_drops()
    assert caplog.messages == []
