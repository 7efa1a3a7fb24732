"""The message that submits a recording, read as the consumer reads it."""

from collections.abc import Mapping
from typing import Any

import pytest

from cesar_mqtt.gateway.submission import Submission, request_of
from cesar_mqtt.protocol.parsing import Accepted, fingerprint, parse_audio, parse_submission
from cesar_mqtt.protocol.topics import Topics

TOPICS = Topics("cesar", "cesar")
OPTIONS: Mapping[str, Any] = {
    "language": "de",
    "formats": ["srt", "txt"],
    "priority": 7,
    "initial_prompt": "12",
    "word_timestamps": True,
    "metadata": {"source": "inbox"},
}


def parsed(item: Submission, *, has_properties: bool) -> Accepted:
    request = request_of(item, TOPICS, has_properties=has_properties)
    if request.topic == TOPICS.jobs:
        found = parse_submission(request.payload, tuple(request.user_properties))
    else:
        job_id = TOPICS.audio_job_id(request.topic) or ""
        found = parse_audio(job_id, request.payload, tuple(request.user_properties))
    assert isinstance(found, Accepted), found
    return found


@pytest.mark.parametrize("audio", [b"RIFF....", None])
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_both_versions_of_mqtt_make_the_same_job(audio: bytes | None, options: Mapping[str, Any]) -> None:
    item = Submission("note-1", audio, "talk.wav", options, name="talk.wav")
    new, old = (parsed(item, has_properties=has) for has in (True, False))

    assert fingerprint(new) == fingerprint(old)
    assert new.request.job_id == old.request.job_id == "note-1"
    assert new.audio == old.audio == audio
    assert new.request.metadata == {"file": "talk.wav", **options.get("metadata", {})}
    assert new.request.audio_path == (None if audio else "talk.wav")
    for name, value in options.items():
        if name != "metadata":
            assert getattr(new.request, name) == (["txt", "srt"] if name == "formats" else value)


def test_a_recording_without_options_is_sent_as_it_is() -> None:
    request = request_of(Submission("note-1", b"RIFF", "-", {}), TOPICS, has_properties=False)
    assert (request.topic, request.payload, list(request.user_properties)) == ("cesar/audio/note-1", b"RIFF", [])
