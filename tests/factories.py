"""Values for the tests, with defaults for everything that a test does not care about."""

import itertools
from typing import Any

from cesar_mqtt.jobs import AudioSource, Job, JobState, NewJob, Result
from cesar_mqtt.mqtt.messages import Delivery, Receipt
from cesar_mqtt.transcript import Segment, Window, Word

AT = 1_769_204_700.0
"""2026-01-23T21:45:00Z."""

_numbers = itertools.count(1)


def new_job(job_id: str = "a", audio: str | None = "a.wav", *, kind: str = "path", **fields: Any) -> NewJob:
    """A request for a job; the fingerprint is the id, so two ids are two requests. `audio` None: there is none."""
    source = None if audio is None else AudioSource(kind, audio)
    return NewJob(job_id, **{"fingerprint": job_id, "audio": source, "model_size": "base", **fields})


def job(job_id: str = "a", state: str = "queued", **fields: Any) -> Job:
    """A job as the ledger returns it, `a.wav` being its audio."""
    defaults: dict[str, Any] = {
        "seq": 1,
        "revision": 1,
        "created_at": AT,
        "updated_at": AT,
        "fingerprint": job_id,
        "model_size": "base",
        "audio": AudioSource("path", "a.wav"),
    }
    return Job(job_id=job_id, state=JobState(state), **{**defaults, **fields})


def delivery(topic: str = "cesar/jobs", payload: bytes = b"{}", *, connection: int = 1, **fields: Any) -> Delivery:
    """An incoming message at QoS 1; each has another packet id."""
    receipt = Receipt(connection, next(_numbers) % 65_535 + 1)
    defaults: dict[str, Any] = {"qos": 1, "retain": False, "dup": False, "receipt": receipt, "received_at": AT}
    return Delivery(topic, payload, **{**defaults, **fields})


def words(count: int, text: str = " word") -> tuple[Word, ...]:
    """Words of a tenth of a second each, from the start of the file."""
    return tuple(Word(n / 10, (n + 1) / 10, text, 0.9) for n in range(count))


def segment(number: int = 1, text: str = "Hello.", **fields: Any) -> Segment:
    """The `number`-th segment of a file; each takes a second."""
    defaults: dict[str, Any] = {"start_s": number - 1.0, "end_s": float(number), "avg_logprob": -0.2}
    return Segment(id=number, text=text, **{**defaults, "no_speech_prob": 0.01, **fields})


def window(number: int = 0, *segments: Segment, text: str | None = None, **fields: Any) -> Window:
    """The `number`-th window of a file, of ten minutes; its text is that of its segments, or `part <number>`."""
    spoken = " ".join(segment.text for segment in segments) or f"part {number}"
    defaults: dict[str, Any] = {"until_s": 600.0 * (number + 1), "language": "en", "language_probability": 0.9}
    return Window(
        number=number, text=f" {spoken}" if text is None else text, segments=segments, **{**defaults, **fields}
    )


def result(text: str = "Hello.", **fields: Any) -> Result:
    """What the worker records of a job that it has completed."""
    defaults: dict[str, Any] = {"audio_duration": 2.5, "detected_language": "en", "language_probability": 0.9}
    return Result(text, **{**defaults, "no_speech": False, **fields})
