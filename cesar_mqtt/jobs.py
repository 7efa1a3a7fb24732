"""Jobs: their states, the legal transitions between them, and the frozen values that modules exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from cesar_mqtt.errors import CesarError, ErrorCode
from cesar_mqtt.transcript import Window

_EMPTY: Mapping[str, Any] = {}


class JobState(StrEnum):
    """The states in the life of a job; the values are those of the payloads and of the ledger."""

    QUEUED = "queued"
    """On disk, waiting for the worker."""
    PROCESSING = "processing"
    """The worker runs it; the attempt was counted on disk before it began."""
    COMPLETED = "completed"
    """The transcript is on disk."""
    ERROR = "error"
    """Ended without a transcript; the error code tells why, and whether a retry may help."""
    CANCELLED = "cancelled"
    """Ended by a `cancel` command, or because it expired."""

    @property
    def final(self) -> bool:
        """Whether the worker has finished with the job. A retry may still queue it again."""
        return self in _FINAL


STATES: Mapping[str, JobState] = {state.value: state for state in JobState}
"""The states by value: a lookup here takes a tenth of the time of `JobState(...)`."""

_FINAL = frozenset({JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED})

TRANSITIONS: Mapping[JobState | None, frozenset[JobState]] = {
    None: frozenset({JobState.QUEUED, JobState.ERROR}),
    JobState.QUEUED: frozenset({JobState.PROCESSING, JobState.CANCELLED, JobState.COMPLETED}),
    JobState.PROCESSING: frozenset({JobState.QUEUED, JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset({JobState.QUEUED}),
    JobState.ERROR: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
"""All legal transitions; None stands for a job that does not exist yet.

A completed job is queued again only to tell its speakers apart, and is completed again however that ends.
"""


class IllegalTransitionError(CesarError):
    """A transition that `TRANSITIONS` does not have was requested."""


def may_need_audio(state: JobState, code: ErrorCode | None, *, diarization_failed: bool) -> bool:
    """Whether the uploaded audio of a job has to be kept: the job has not ended, or it may be retried."""
    may_be_retried = state is JobState.CANCELLED or (code is not None and code.retryable) or diarization_failed
    return not state.final or may_be_retried


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Where the audio of a job is."""

    kind: str
    """`path`: as the producer gave it, resolved in the allowed directories when the job starts; `url`; `spool`: a file
    in the spool folder; `upload`: audio of a rejected request, which is not kept."""
    name: str
    """The path, the URL, or the file's name in the spool folder."""


def request_key(job_id: str | None, fingerprint: str) -> str:
    """Return what identifies a retained request: its id, if it has one, and its content."""
    return fingerprint if job_id is None else f"{job_id} {fingerprint}"


class Claim(NamedTuple):
    """The delivery of a job by a queue that consumers share: the greater one of a job is the newer one."""

    seq: int
    """The number of the job's message in the queue."""
    delivery: int
    """How often that was delivered, from 1: it is the attempt of the job."""


@dataclass(slots=True)  # frozen it would take three times as long to make
class NewJob:
    """A validated request, ready to be appended to the ledger."""

    job_id: str
    fingerprint: str
    """Equal for requests with equal content; decides whether a request with a known id is a duplicate or a conflict."""
    audio: AudioSource | None
    model_size: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """The transcription options that differ from their defaults, by their names in the payload."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    """Result files to publish beside the status, without duplicates."""
    stream: bool = False
    """Whether each segment is published as soon as it is transcribed."""
    priority: int = 0
    """0 to 9: jobs of a higher priority go first."""
    expires_at: float | None = None
    """The job expires if it has not started by then (seconds since the epoch); None: never."""
    packet_id: int | None = None
    """The MQTT packet id of a QoS 1 request without an id: a redelivery has the same one."""
    redelivered: bool = False
    """Whether the request came with the DUP flag."""
    has_generated_id: bool = False
    """Whether the consumer generated the id, because the request had none."""
    retained: bool = False
    """Whether the request came from the broker's retained messages."""
    received_at: float | None = None
    """When a shared queue received the request (seconds since the epoch); None: when the ledger accepts it."""
    claim: "Claim | None" = None
    """The delivery by a queue that consumers share; None: the ledger is the queue."""
    warnings: tuple[str, ...] = ()
    """Known when the job is accepted; those of the result are added to them."""
    failure: str | None = None
    """Why the job is recorded as `error` `invalid_request` without being run; None for a valid request."""

    @property
    def request_key(self) -> str:
        """Equal for requests that become the same job when the broker sends them again; see `request_key`."""
        return request_key(None if self.has_generated_id else self.job_id, self.fingerprint)


class Job(NamedTuple):
    """A snapshot of a job in the ledger. Times are seconds since the epoch, durations are seconds.

    A named tuple because every change creates one: a frozen dataclass with as many fields takes three times as long.
    """

    seq: int
    """The ledger's own number, ascending in the order of acceptance; never used again."""
    job_id: str
    state: JobState
    revision: int
    """The ledger transaction of the last change of state."""
    created_at: float
    updated_at: float
    """The last change of the state or of the queue position."""
    fingerprint: str
    model_size: str
    audio: AudioSource | None = None
    options: Mapping[str, Any] = _EMPTY
    metadata: Mapping[str, Any] = _EMPTY
    formats: tuple[str, ...] = ()
    stream: bool = False
    priority: int = 0
    expires_at: float | None = None
    attempt: int = 0
    """How often the job was started, over its whole life."""
    crashes: int = 0
    """How often the process died while it ran the job, since the last `retry` command."""
    retries: int = 0
    """How often a passing failure deferred the job, since the last `retry` command."""
    started_at: float | None = None
    completed_at: float | None = None
    """When the job entered its final state, whichever that is."""
    result_text: str | None = None
    detected_language: str | None = None
    language_probability: float | None = None
    no_speech: bool | None = None
    audio_duration: float | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    warnings: tuple[str, ...] = ()
    queue_position: int | None = None
    """From 1 while queued, else None."""
    speakers: int | None = None
    """How many were told apart; None: that was not asked for, failed, or is not done yet."""
    diarization_error: str | None = None
    """Why the speakers could not be told apart, as a sentence."""
    claim: Claim | None = None
    """As in `NewJob`."""

    @property
    def may_need_audio(self) -> bool:
        """See `may_need_audio`."""
        return may_need_audio(self.state, self.error_code, diarization_failed=self.diarization_error is not None)


@dataclass(frozen=True, slots=True)
class DeletedJob:
    """A deleted job of which the broker may still retain messages, or the request."""

    seq: int
    job_id: str
    formats: tuple[str, ...] = ()
    """The result files that the broker may retain."""
    owns_status: bool = True
    """Whether the retained status is this job's and has to be cleared; False once a newer job has the same id."""
    request_key: str | None = None
    """That of the request; None: unknown, for the job was deleted by version 1 and had an id."""
    retained: bool = False
    """Whether the broker was seen to retain the request."""
    event_pending: bool = True
    """Whether the `deleted` event has not been published yet."""


class Admission(StrEnum):
    """The ledger's decision on a `NewJob`."""

    ACCEPTED = "accepted"
    """A new job."""
    DUPLICATE = "duplicate"
    """The same request as an earlier one: it is that one's job."""
    CONFLICT = "conflict"
    """The id belongs to a job with different content."""
    FULL = "full"
    """The queue is full."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the worker records of a completed job. Units as in `Job`."""

    text: str
    audio_duration: float
    detected_language: str | None
    language_probability: float | None
    no_speech: bool
    warnings: tuple[str, ...] = ()
    windows: tuple[Window, ...] = ()
    """All windows of the recording; the ledger keeps them with the job if its formats need them."""
    speakers: int | None = None
    diarization_error: str | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Job counts: now, and since the ledger was created (`..._total`)."""

    queued: int
    completed_total: int
    error_total: int
    cancelled_total: int
    rejected_total: int
    oldest_queued_at: float | None
    """When the oldest job in the queue was accepted; None: the queue is empty."""
    processing: str | None
    """The id of the running job."""
    paused: bool = False
    deleted_total: int = 0
    revision: int = 0
    """The number of the ledger's newest transaction."""
    retryable: int = 0
    """How many of the finished jobs can be retried."""
