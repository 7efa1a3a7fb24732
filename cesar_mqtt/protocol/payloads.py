"""The wire: every payload of the contract as a frozen model, and what makes JSON of a job. Any thread may call it."""

import re
from bisect import bisect_right
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from cesar_mqtt import __version__
from cesar_mqtt.jobs import AudioSource, Job, JobState
from cesar_mqtt.protocol.field_types import (
    CLIPS,
    TEMPERATURES,
    URL_CHARACTERS,
    BatchSize,
    BeamSize,
    Clips,
    Formats,
    Language,
    Metadata,
    Temperature,
    Temperatures,
    Url,
)
from cesar_mqtt.protocol.formats import FORMATS, segment_fields
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN
from cesar_mqtt.transcript import Segment, cut_hotwords, cut_prompt

_EXCERPT_BYTES = 200
_LOOKED_AT_BYTES = 4096
_CREDENTIALS = re.compile(rb"(?<=://)[^/\s\"]*@")
_TOPIC_CHARACTERS = 200
_PATH_CHARACTERS = 4096
_PROMPT_CHARACTERS = 65_536
_MODEL_CHARACTERS = 200


class Payload(BaseModel):
    """A message as JSON: frozen, types taken literally, unknown fields refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def encode(self) -> bytes:
        """Return the payload as it goes over the wire."""
        return self.model_dump_json().encode()


class JobRequest(Payload):
    """What a producer publishes on `cesar/jobs`; a field's description is what a refusal says that it must be."""

    job_id: Annotated[str, Field(pattern=JOB_ID_PATTERN)] | None = Field(
        default=None, description="text of 1 to 64 of A-Z, a-z, 0-9, _ and -"
    )
    audio_path: Annotated[str, Field(min_length=1, max_length=_PATH_CHARACTERS)] | None = Field(
        default=None, description=f"text of 1 to {_PATH_CHARACTERS} characters"
    )
    audio_url: Url | None = Field(
        default=None, description=f"an http or https URL of at most {URL_CHARACTERS} characters"
    )
    audio_base64: Annotated[str, Field(min_length=1)] | None = Field(default=None, description="a file in base64")
    model_size: Annotated[str, Field(min_length=1, max_length=_MODEL_CHARACTERS)] | None = Field(
        default=None, description="the name of a model"
    )
    language: Language | None = Field(default=None, description="text such as 'de', or be left out")
    task: Literal["transcribe", "translate"] = Field(default="transcribe", description="'transcribe' or 'translate'")
    initial_prompt: Annotated[str, Field(max_length=_PROMPT_CHARACTERS)] | None = Field(
        default=None, description=f"text of at most {_PROMPT_CHARACTERS} characters"
    )
    hotwords: Annotated[str, Field(max_length=_PROMPT_CHARACTERS)] | None = Field(
        default=None, description=f"text of at most {_PROMPT_CHARACTERS} characters"
    )
    beam_size: BeamSize = Field(default=5, description="a whole number from 1 to 10")
    temperature: Temperature | Temperatures | None = Field(
        default=None, description=f"a number from 0 to 1, or a list of 1 to {TEMPERATURES} such numbers"
    )
    vad_filter: bool = Field(default=True, description="true or false")
    word_timestamps: bool = Field(default=False, description="true or false")
    clip_timestamps: Clips | None = Field(
        default=None, description=f"a list of 1 to {CLIPS} ranges, each as [start, end] in seconds"
    )
    batch_size: BatchSize = Field(default=1, description="a whole number from 1 to 32")
    formats: Formats = Field(
        default_factory=list, description=f'a list such as ["txt"], of any of {", ".join(FORMATS)}'
    )
    stream: bool = Field(default=False, description="true or false")
    expires_in: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="a number of seconds above 0"
    )
    metadata: Metadata = Field(default_factory=dict, description="a JSON object")

    @model_validator(mode="after")
    def _one_audio(self) -> Self:
        given = [name for name in AUDIO_FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"Exactly one of {', '.join(AUDIO_FIELDS)} is needed, found {found}")
        return self

    def options(self) -> dict[str, Any]:
        """Return the transcription options that differ from their defaults; of very long prompts, what can count."""
        options = self.model_dump(include=_OPTIONS, exclude_defaults=True)
        return options | {name: kept(options[name]) for name, kept in _PROMPTS.items() if name in options}


AUDIO_FIELDS = ("audio_path", "audio_url", "audio_base64")
_OPTIONS = {
    "language",
    "task",
    "initial_prompt",
    "hotwords",
    "beam_size",
    "temperature",
    "vad_filter",
    "word_timestamps",
    "clip_timestamps",
    "batch_size",
}
_PROMPTS = {"initial_prompt": cut_prompt, "hotwords": cut_hotwords}


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


class Live(BaseModel):
    """How far the job in work is; never on disk. Seconds, and `speed` as audio seconds per second."""

    model_config = ConfigDict(frozen=True)

    progress: float | None
    processed_duration: float
    audio_duration: float | None
    speed: float | None
    eta: float | None
    updated_at: float


def status_of(job: Job, consumer: str, live: Live | None = None, *, result_truncated: bool = False) -> Status:
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
    live: Live | None = None,
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


def _status_fields(job: Job, consumer: str, live: Live | None, result_truncated: bool) -> dict[str, Any]:  # noqa: FBT001
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
