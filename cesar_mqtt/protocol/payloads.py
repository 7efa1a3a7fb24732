"""What the consumer publishes about jobs: status, event, segment, rejection. Any thread may make them.

There are thousands of statuses, events and segments, so these are typed dictionaries: mypy checks the fields where one
is made, pydantic describes them in the schema, and making one costs what a dictionary costs (a model takes twice the
time, measured with `timeit`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired
from urllib.parse import urlsplit

from pydantic import Field
from typing_extensions import TypedDict

from cesar_mqtt import __version__
from cesar_mqtt.jobs import AudioSource, Job, JobState
from cesar_mqtt.protocol.fields import (
    Attempt,
    AudioDuration,
    AudioName,
    Consumer,
    CreatedAt,
    DetectedLanguage,
    EndedAt,
    FailureCode,
    FailureMessage,
    JobId,
    JobStatus,
    LanguageProbability,
    Metadata,
    ModelSize,
    Payload,
    Priority,
    PublishedId,
    QueuePosition,
    State,
    Task,
    TextTruncated,
    Timestamp,
    UpdatedAt,
    Version,
    one_of,
    timestamp,
)
from cesar_mqtt.protocol.truncate import truncate_text
from cesar_mqtt.redaction import redact_name
from cesar_mqtt.transcript import Segment
from cesar_mqtt.transcript import Word as SpokenWord

EVENT_TEXT_BYTES = 8_000
"""Home Assistant records at most 16 KiB of attributes with a state; this leaves room for the metadata of the job."""

_Speaker = Annotated[str, Field(description="Who speaks, `Speaker 1` or a known name, if the request set `diarize`.")]
_Time = "Seconds from the start of the recording."


class Answer(TypedDict):
    """The answer to a job request with a Response Topic: the job is on disk."""

    job_id: JobId
    status: Annotated[State | None, Field(description="The state of the job; null if it is deleted already.")]


class Status(TypedDict):
    """Everything that is known about a job. Null: not known yet, or it does not apply."""

    job_id: JobId
    status: JobStatus
    attempt: Attempt
    created_at: CreatedAt
    started_at: Annotated[Timestamp | None, Field(description="When the latest attempt started.")]
    completed_at: EndedAt
    updated_at: UpdatedAt
    queue_position: QueuePosition
    priority: NotRequired[Priority]
    progress: Annotated[
        float | None, Field(description="0 to 1; 1 only when completed. It never goes back within an attempt.")
    ]
    processed_duration: Annotated[
        float | None, Field(description="How much of the recording is transcribed, in seconds.")
    ]
    audio_duration: AudioDuration
    speed: Annotated[float | None, Field(description="Seconds of audio per second of processing.")]
    eta: Annotated[float | None, Field(description="The estimated seconds until the job is completed.")]
    audio_source: AudioName
    model_size: ModelSize
    language: Annotated[
        str | None, Field(description="The language that the request names, as Whisper's code; null: it is detected.")
    ]
    task: Annotated[Task, Field(description="`transcribe` or `translate`.")]
    result_text: Annotated[str | None, Field(description="The whole transcript; empty if there is no speech.")]
    detected_language: DetectedLanguage
    language_probability: LanguageProbability
    no_speech: Annotated[bool | None, Field(description="Whether the recording holds no speech.")]
    error_code: FailureCode
    error_message: FailureMessage
    retryable: Annotated[bool | None, Field(description="Whether the same request may succeed later.")]
    warnings: Annotated[
        list[str],
        Field(
            description="What may be missing from the transcript, or wrong in it: `audio_truncated`, `audio_damaged`, "
            "`audio_changed`, `audio_tracks_ignored`, `audio_out_of_phase`, `audio_quiet`, `language_assumed`, "
            "`initial_prompt_truncated` or `hotwords_truncated`; `diarization_failed`: see `diarization_error`; "
            "`priority_ignored`: the queue has no priorities."
        ),
    ]
    speakers: Annotated[
        int | None, Field(description="How many speakers were distinguished; null without `diarize`, or not known yet.")
    ]
    diarization_error: Annotated[
        str | None,
        Field(
            description="Why the speakers could not be told apart, as a sentence. The transcript is complete all the "
            "same; the command `retry` repeats only the diarization."
        ),
    ]
    diarization_progress: NotRequired[
        Annotated[
            float, Field(description="0 to 1; only while the speakers are distinguished, after the transcription.")
        ]
    ]
    formats: Annotated[list[str], Field(description="The formats in which the result is published.")]
    result_truncated: Annotated[
        bool,
        Field(
            description="Whether the text, or a result, was cut to the broker's packet limit; the command `result` "
            "returns all of it."
        ),
    ]
    metadata: Metadata
    consumer: Consumer
    version: Version


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a running job is; never on disk. Seconds, and `speed` as audio seconds per second."""

    progress: float | None
    processed_duration: float
    audio_duration: float | None
    speed: float | None
    eta: float | None
    updated_at: float
    diarization: float | None = None
    """How much of the recording is listened to for its speakers, 0 to 1; None: it is being transcribed."""


def status_of(
    job: Job, consumer: str, progress: JobProgress | None = None, *, result_truncated: bool = False
) -> Status:
    """Return the status of a job.

    Args:
        job: as the ledger has it.
        consumer: the name of the consumer.
        progress: how far it is; used only while the job is processing.
        result_truncated: whether a result in one of its formats was cut.
    """
    running = job.state is JobState.PROCESSING
    completed = job.state is JobState.COMPLETED
    now = progress if running else None
    duration = now.audio_duration if now else job.audio_duration
    share = 1.0 if completed else (0.0 if running else None)
    code = job.error_code
    status: Status = {
        "job_id": job.job_id,
        "status": job.state,
        "attempt": job.attempt,
        "created_at": timestamp(job.created_at),
        "started_at": None if job.started_at is None else timestamp(job.started_at),
        "completed_at": None if job.completed_at is None else timestamp(job.completed_at),
        "updated_at": timestamp(max(job.updated_at, now.updated_at if now else 0.0)),
        "queue_position": job.queue_position,
        "progress": now.progress if now else share,
        "processed_duration": now.processed_duration if now else (duration if completed else None),
        "audio_duration": duration,
        "speed": now.speed if now else _speed(job),
        "eta": now.eta if now else None,
        "audio_source": audio_source_of(job),
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
        "warnings": list(job.warnings) if job.diarization_error is None else [*job.warnings, "diarization_failed"],
        "speakers": job.speakers,
        "diarization_error": job.diarization_error,
        "formats": list(job.formats),
        "result_truncated": result_truncated,
        "metadata": dict(job.metadata),
        "consumer": consumer,
        "version": __version__,
    }
    if job.priority:
        status["priority"] = job.priority
    if now is not None and now.diarization is not None:
        status["diarization_progress"] = now.diarization
    return status


def audio_source_of(job: Job) -> str | None:
    """Return where the recording of a job is, as it is published; None: an invalid request names none."""
    return None if job.audio is None else public_source(job.audio)


def public_source(audio: AudioSource) -> str:
    """Return where the audio is, of a URL without the user and without the query, which may be a key."""
    if audio.kind == "url":
        parts = urlsplit(audio.name)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return redact_name(audio.name) if audio.kind == "path" else "upload"


def _speed(job: Job) -> float | None:
    if job.audio_duration is None or job.started_at is None or job.completed_at is None:
        return None
    took_s = job.completed_at - job.started_at
    return round(job.audio_duration / took_s, 2) if took_s > 0 else None


EVENT_TYPES = (*(state.value for state in JobState), "deleted")


class Event(TypedDict):
    """A job has changed its state. Published when it happens, not retained."""

    event_type: Annotated[str, one_of(*EVENT_TYPES), Field(description="The new state of the job, or `deleted`.")]
    job_id: JobId
    attempt: Annotated[int | None, Field(description="How many times processing has started.")]
    text: Annotated[
        str | None,
        Field(description=f"The transcript of a completed job, at most {EVENT_TEXT_BYTES:,} bytes of it."),
    ]
    text_truncated: TextTruncated
    language: DetectedLanguage
    audio_duration: AudioDuration
    error_code: FailureCode
    error_message: FailureMessage
    audio_source: AudioName
    no_speech: Annotated[bool | None, Field(description="Whether a completed job's recording has no speech.")]
    metadata: Metadata
    consumer: Consumer
    time: Annotated[Timestamp, Field(description="When it happened.")]


def event_of(job: Job, consumer: str) -> Event:
    """Return the event of the state that a job is in."""
    text = None if job.result_text is None else truncate_text(job.result_text, EVENT_TEXT_BYTES)
    return {
        "event_type": job.state,
        "job_id": job.job_id,
        "attempt": job.attempt,
        "text": text,
        "text_truncated": text != job.result_text,
        "language": job.detected_language,
        "audio_duration": job.audio_duration,
        "error_code": job.error_code,
        "error_message": job.error_message,
        "audio_source": audio_source_of(job),
        "no_speech": job.no_speech,
        "metadata": dict(job.metadata),
        "consumer": consumer,
        "time": timestamp(job.updated_at),
    }


def deletion_of(job_id: str, consumer: str, now: float) -> Event:
    """Return the event of a job that was deleted; `now` in seconds since the epoch."""
    return {
        "event_type": "deleted",
        "job_id": job_id,
        "attempt": None,
        "text": None,
        "text_truncated": False,
        "language": None,
        "audio_duration": None,
        "error_code": None,
        "error_message": None,
        "audio_source": None,
        "no_speech": None,
        "metadata": {},
        "consumer": consumer,
        "time": timestamp(now),
    }


class Word(TypedDict):
    """A word of a segment."""

    word: Annotated[str, Field(description="With the blank before it, if there is one.")]
    start: Annotated[float, Field(description=_Time)]
    end: Annotated[float, Field(description=_Time)]
    probability: Annotated[float, Field(description="How certain the word is, 0 to 1.")]
    speaker: NotRequired[_Speaker]


class TimedSegment(TypedDict):
    """A part of the transcript."""

    id: Annotated[int, Field(description="Counts the segments of a job from 1.")]
    start: Annotated[float, Field(description=_Time)]
    end: Annotated[float, Field(description=_Time)]
    text: Annotated[str, Field(description="The text of the segment.")]
    avg_logprob: Annotated[
        float, Field(description="How certain the text is: the mean log probability of its tokens, 0 at best.")
    ]
    no_speech_prob: Annotated[float, Field(description="The probability that there is no speech, 0 to 1.")]
    speaker: NotRequired[_Speaker]
    words: NotRequired[
        Annotated[list[Word], Field(description="The words with their times, if the request set `word_timestamps`.")]
    ]


class JobSegment(TimedSegment):
    """A part of the transcript, published as soon as it is known."""

    job_id: JobId


def segment_fields(segment: Segment) -> TimedSegment:
    """Return a segment as it is published; without `words` unless the request set `word_timestamps`."""
    fields: TimedSegment = {
        "id": segment.id,
        "start": segment.start_s,
        "end": segment.end_s,
        "text": segment.text,
        "avg_logprob": segment.avg_logprob,
        "no_speech_prob": segment.no_speech_prob,
    }
    speaker = segment.speaker
    if speaker is not None:
        fields["speaker"] = speaker
    if segment.words is not None:
        fields["words"] = [_word_fields(word, speaker) for word in segment.words]
    return fields


def _word_fields(word: SpokenWord, speaker: str | None) -> Word:
    fields: Word = {"word": word.text, "start": word.start_s, "end": word.end_s, "probability": word.probability}
    if speaker is not None:
        fields["speaker"] = speaker
    return fields


def segment_of(job_id: str, segment: Segment) -> JobSegment:
    """Return a segment with the id of its job."""
    return {"job_id": job_id, **segment_fields(segment)}


class TranscriptFile(TypedDict):
    """The transcript of a job as JSON, with times: the format `json`."""

    text: Annotated[str, Field(description="The whole transcript.")]
    language: DetectedLanguage
    language_probability: LanguageProbability
    duration: Annotated[
        float | None, Field(description="The length of the recording in seconds; null if it is not known.")
    ]
    task: Annotated[Task, Field(description="`transcribe` or `translate`.")]
    truncated: Annotated[bool, Field(description="Whether segments were left out to keep the broker's packet limit.")]
    segments: Annotated[list[TimedSegment], Field(description="In order of time.")]


Reason = Literal[
    "malformed_json",
    "invalid_request",
    "invalid_job_id",
    "job_id_conflict",
    "payload_too_large",
    "queue_full",
    "storage_full",
    "unknown_command",
]


class Rejection(Payload):
    """A message that was rejected. It does not come back."""

    reason: Reason = Field(description="Why, for programs.")
    detail: str = Field(description="Why, as a sentence.")
    topic: str = Field(description="The topic of the message; of a very long one the beginning.")
    job_id: PublishedId | None = Field(description="The id in the message; null if it has no valid one.")
    payload_excerpt: str = Field(
        description="The first 200 bytes of the message, to recognise it, without what looks like a credential, a "
        "query or a token."
    )
    received_at: Timestamp = Field(description="When the message was received.")
