"""The wire: every payload of the contract as a frozen model, and what makes JSON of a job. Any thread may call it."""

import re
from bisect import bisect_right
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from cesar_mqtt import __version__
from cesar_mqtt.jobs import AudioSource, Job, JobState
from cesar_mqtt.protocol.formats import segment_fields
from cesar_mqtt.transcript import Segment

_EXCERPT_BYTES = 200
_LOOKED_AT_BYTES = 4096
_CREDENTIALS = re.compile(rb"(?<=://)[^/\s\"]*@")
EVENT_TEXT_BYTES = 8_000
"""Home Assistant records at most 16 KiB of attributes with a state; this leaves room for the metadata of the job."""
_TOPIC_CHARACTERS = 200


class Payload(BaseModel):
    """A message as JSON: frozen, types taken literally, unknown fields refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def encode(self) -> bytes:
        """Return the payload as it goes over the wire."""
        return self.model_dump_json().encode()


Reason = Literal[
    "malformed_json",
    "invalid_request",
    "invalid_job_id",
    "job_id_conflict",
    "payload_too_large",
    "queue_full",
    "unknown_command",
]


class Rejection(Payload):
    """A refused message, on `cesar/rejected`."""

    reason: Reason
    detail: str
    topic: str
    job_id: str | None
    payload_excerpt: str
    received_at: str


def excerpt(payload: bytes) -> str:
    """Return the beginning of a payload as text that JSON can hold, to recognise it by; without a URL's password."""
    return _CREDENTIALS.sub(b"***@", payload[:_LOOKED_AT_BYTES])[:_EXCERPT_BYTES].decode(errors="replace")


def shortened(topic: str) -> str:
    """Return a topic as it is, or the beginning of one that is longer than any of ours."""
    return topic if len(topic) <= _TOPIC_CHARACTERS else f"{topic[:_TOPIC_CHARACTERS]}…"


class Status(Payload):
    """The retained status of a job; None says that there is nothing to say (yet). Durations are seconds."""

    job_id: str
    status: JobState
    attempt: int
    created_at: str
    started_at: str | None
    completed_at: str | None
    updated_at: str
    queue_position: int | None
    progress: float | None
    processed_duration: float | None
    audio_duration: float | None
    speed: float | None
    eta: float | None
    audio_source: str | None
    model_size: str
    language: str | None
    task: str
    result_text: str | None
    detected_language: str | None
    language_probability: float | None
    no_speech: bool | None
    error_code: str | None
    error_message: str | None
    retryable: bool | None
    warnings: list[str]
    formats: list[str]
    result_truncated: bool
    metadata: dict[str, Any]
    consumer: str
    version: str


class JobProgress(BaseModel):
    """How far the job in work is; never on disk. Seconds, and `speed` as audio seconds per second."""

    model_config = ConfigDict(frozen=True)

    progress: float | None
    processed_duration: float
    audio_duration: float | None
    speed: float | None
    eta: float | None
    updated_at: float


def status_of(job: Job, consumer: str, live: JobProgress | None = None, *, result_truncated: bool = False) -> Status:
    """Return what the world is told of a job.

    Args:
        job: as the ledger has it.
        consumer: the name of the consumer.
        live: how far it is; counts only while it is in work.
        result_truncated: whether a result in one of its formats had to be cut.
    """
    # Our own values: checking them again would take half the time.
    return Status.model_construct(**_status_fields(job, consumer, live, result_truncated))


def status_payload(
    job: Job,
    consumer: str,
    live: JobProgress | None = None,
    *,
    result_truncated: bool = False,
    limit_bytes: int | None = None,
) -> bytes:
    """Return the payload of `status_of`, as `fit` cuts it to `limit_bytes`; the quick way, for there are thousands."""
    fields = _status_fields(job, consumer, live, result_truncated)
    payload = to_json(fields)
    if limit_bytes is None or len(payload) <= limit_bytes:
        return payload
    return fit(Status.model_construct(**fields), limit_bytes)


def _status_fields(job: Job, consumer: str, live: JobProgress | None, result_truncated: bool) -> dict[str, Any]:  # noqa: FBT001
    working = job.state is JobState.PROCESSING
    live = live if working else None
    final = job.state is JobState.COMPLETED
    progress = 1.0 if final else (0.0 if working else None)
    duration = live.audio_duration if live else job.audio_duration
    code = job.error_code
    return {
        "job_id": job.job_id,
        "status": job.state,
        "attempt": job.attempt,
        "created_at": timestamp(job.created_at),
        "started_at": None if job.started_at is None else timestamp(job.started_at),
        "completed_at": None if job.completed_at is None else timestamp(job.completed_at),
        "updated_at": timestamp(max(job.updated_at, live.updated_at if live else 0.0)),
        "queue_position": job.queue_position,
        "progress": live.progress if live else progress,
        "processed_duration": live.processed_duration if live else (duration if final else None),
        "audio_duration": duration,
        "speed": live.speed if live else _speed(job),
        "eta": live.eta if live else None,
        "audio_source": None if job.audio is None else _told_source(job.audio),
        "model_size": job.model_size,
        "language": job.options.get("language"),
        "task": job.options.get("task", "transcribe"),
        "result_text": job.result_text,
        "detected_language": job.detected_language,
        "language_probability": job.language_probability,
        "no_speech": job.no_speech,
        "error_code": code,
        "error_message": job.error_message,
        "retryable": None if code is None else code.retryable,
        "warnings": list(job.warnings),
        "formats": list(job.formats),
        "result_truncated": result_truncated,
        "metadata": dict(job.metadata),
        "consumer": consumer,
        "version": __version__,
    }


def _told_source(audio: AudioSource) -> str:
    """Return what may be told of where the audio is: of a URL not who asks, nor what may be a key to it."""
    if audio.kind == "url":
        parts = urlsplit(audio.name)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return audio.name if audio.kind == "path" else "upload"


def fit(status: Status, size_bytes: int | None) -> bytes:
    """Return the payload of `status` with its text, and if need be its metadata, cut until it fits `size_bytes`.

    None is no limit. A reader sees the cut in `result_truncated`. A limit below what the other fields take is not kept.
    """
    payload = status.encode()
    if size_bytes is None or len(payload) <= size_bytes:
        return payload
    text = status.result_text
    shorter = status.model_copy(update={"result_truncated": True, "result_text": None if text is None else ""})
    room = size_bytes - len(shorter.encode())
    if room < 0:
        shorter = shorter.model_copy(update={"metadata": {}})
        room = size_bytes - len(shorter.encode())
    if text and room > 0:
        shorter = shorter.model_copy(update={"result_text": _cut_json(text, room)})
    return shorter.encode()


def _cut_json(text: str, size_bytes: int) -> str:
    """Return the longest beginning of `text` that has at most `size_bytes` in JSON, which escapes quotes and such."""
    lengths = range(1, min(len(text), size_bytes) + 1)
    return text[: bisect_right(lengths, size_bytes, key=lambda length: len(to_json(text[:length])) - len('""'))]


def _speed(job: Job) -> float | None:
    if job.audio_duration is None or job.started_at is None or job.completed_at is None:
        return None
    took = job.completed_at - job.started_at
    return round(job.audio_duration / took, 2) if took > 0 else None


class Event(Payload):
    """Something that has happened to a job, on `cesar/events`; told when it happens, and not retained.

    Attributes:
        event_type: the state that the job has come to, or `deleted`.
        text: the transcript of a completed job, cut to `EVENT_TEXT_BYTES` of UTF-8.
        time: when it happened.
    """

    event_type: Literal["queued", "processing", "completed", "error", "cancelled", "deleted"]
    job_id: str
    attempt: int | None
    text: str | None
    text_truncated: bool
    language: str | None
    audio_duration: float | None
    error_code: str | None
    error_message: str | None
    metadata: dict[str, Any]
    consumer: str
    time: str


def event_payload(job: Job, consumer: str) -> bytes:
    """Return the `Event` of the state that a job has come to, as it goes over the wire; there are thousands of them."""
    text = None if job.result_text is None else cut(job.result_text, EVENT_TEXT_BYTES)
    return to_json(
        {
            "event_type": job.state,
            "job_id": job.job_id,
            "attempt": job.attempt,
            "text": text,
            "text_truncated": text != job.result_text,
            "language": job.detected_language,
            "audio_duration": job.audio_duration,
            "error_code": job.error_code,
            "error_message": job.error_message,
            "metadata": job.metadata,
            "consumer": consumer,
            "time": timestamp(job.updated_at),
        }
    )


def deletion_of(job_id: str, consumer: str, now: float) -> Event:
    """Return what is told of a job that is deleted; `now` in seconds since the epoch."""
    return Event(
        event_type="deleted",
        job_id=job_id,
        attempt=None,
        text=None,
        text_truncated=False,
        language=None,
        audio_duration=None,
        error_code=None,
        error_message=None,
        metadata={},
        consumer=consumer,
        time=timestamp(now),
    )


class WordMessage(Payload):
    """A word of a segment, with the blank before it if there is one. Times are seconds from the start of the file."""

    word: str
    start: float
    end: float
    probability: float


class SegmentMessage(Payload):
    """A segment of a job with `stream`, on `cesar/segments/<job_id>`; without `words` unless they were asked for."""

    job_id: str
    id: int
    start: float
    end: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    words: list[WordMessage] | None = None

    def encode(self) -> bytes:
        """Return the payload as it goes over the wire."""
        return self.model_dump_json(exclude_none=True).encode()


def segment_of(job_id: str, segment: Segment) -> SegmentMessage:
    """Return what is told of a segment as soon as it is known."""
    return SegmentMessage(job_id=job_id, **segment_fields(segment))


def cut(text: str, size_bytes: int) -> str:
    """Return the longest beginning of `text` that has at most `size_bytes` as UTF-8."""
    return text.encode()[: max(0, size_bytes)].decode(errors="ignore")


@lru_cache(maxsize=64)  # most statuses say the same moment more than once, and a burst comes in one
def timestamp(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, in milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
