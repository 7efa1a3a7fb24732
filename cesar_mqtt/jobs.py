"""What a job is: its states, the legal ways between them, and the frozen values that modules hand each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from cesar_mqtt.errors import CesarError, ErrorCode
from cesar_mqtt.transcript import Window

_NOTHING: Mapping[str, Any] = {}


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    """On disk, waiting for its turn."""
    PROCESSING = "processing"
    """The worker is at it; the attempt was counted on disk before the work began."""
    COMPLETED = "completed"
    """The transcript is on disk."""
    ERROR = "error"
    """Ended without a transcript; the error code says why and whether a retry may help."""
    CANCELLED = "cancelled"
    """Ended because somebody asked for it, or because it expired."""

    @property
    def final(self) -> bool:
        """Whether the worker has nothing more to do with it."""
        return self in _FINAL


STATES: Mapping[str, JobState] = {state.value: state for state in JobState}
"""The states by what is written of them; to look one up takes a tenth of the time of `JobState(...)`."""

_FINAL = frozenset({JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED})

TRANSITIONS: Mapping[JobState | None, frozenset[JobState]] = {
    None: frozenset({JobState.QUEUED, JobState.ERROR}),
    JobState.QUEUED: frozenset({JobState.PROCESSING, JobState.CANCELLED}),
    JobState.PROCESSING: frozenset({JobState.QUEUED, JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    JobState.ERROR: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
"""The only ways from one state to another; None stands for a job that does not exist yet."""


def wants_audio(state: JobState, code: ErrorCode | None) -> bool:
    """Whether the audio that came with a job may still be wanted: it has not ended, or it may be retried."""
    return not state.final or state is JobState.CANCELLED or (code is not None and code.retryable)


class IllegalTransitionError(CesarError):
    """A job was asked to go a way that `TRANSITIONS` does not have: a mistake in the caller."""


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Where the audio of a job is.

    Attributes:
        kind: `path` (as the producer gave it, looked up in the allowed directories when the job starts), `url`,
            `spool`, or `upload` for one that was refused, which nobody keeps.
        name: the path, the URL, or the file's name in the spool folder.
    """

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class NewJob:
    """A request that was checked and can be appended to the ledger.

    Attributes:
        fingerprint: equal for requests that ask for the same; decides what "the same id again" means.
        anonymous: whether the producer gave no id, so that it was made here.
        packet_id: the MQTT packet id of a request that came at QoS 1 without an id, for a redelivery bears it again.
        redelivered: whether the request came with the DUP flag.
        retained: whether it came because the broker retains it.
        options: the transcription options that differ from their defaults, by the contract's names.
        formats: in which the result is to be published beside the status, without repetitions.
        stream: whether segments are to be published as soon as they are known.
        expires_at: from when on it is no longer worth starting, in seconds since the epoch; None: it always is.
        failure: why the request is recorded as `error` without being worked on; None for a good one.
    """

    job_id: str
    fingerprint: str
    audio: AudioSource | None
    model_size: str
    options: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    stream: bool = False
    expires_at: float | None = None
    packet_id: int | None = None
    redelivered: bool = False
    anonymous: bool = False
    retained: bool = False
    failure: str | None = None


class Job(NamedTuple):
    """A job as the ledger has it at one moment. Times are seconds since the epoch, durations seconds.

    A named tuple, for every change makes one: a frozen dataclass of so many fields takes three times as long to make.

    Attributes:
        seq: the ledger's own number, in the order of acceptance; never used again.
        revision: the transaction that changed the job last.
        attempt: how often the work was begun; `crashes` and `retries` say how often the process died or a failure that
            may pass was met in it.
        queue_position: from 1 while queued, else None.
    """

    seq: int
    job_id: str
    state: JobState
    revision: int
    created_at: float
    updated_at: float
    fingerprint: str
    model_size: str
    audio: AudioSource | None = None
    options: Mapping[str, Any] = _NOTHING
    metadata: Mapping[str, Any] = _NOTHING
    formats: tuple[str, ...] = ()
    stream: bool = False
    expires_at: float | None = None
    attempt: int = 0
    crashes: int = 0
    retries: int = 0
    started_at: float | None = None
    completed_at: float | None = None
    result_text: str | None = None
    detected_language: str | None = None
    language_probability: float | None = None
    no_speech: bool | None = None
    audio_duration: float | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    warnings: tuple[str, ...] = ()
    queue_position: int | None = None


@dataclass(frozen=True, slots=True)
class DeletedJob:
    """A job that was deleted, while the broker may still retain something of it.

    Attributes:
        formats: the results that the broker may retain.
        status: whether the status is to be cleared, too; not when a newer job bears the id.
        fingerprint: of the request, if that bore no id.
        news: whether nobody has been told yet that it was deleted.
    """

    seq: int
    job_id: str
    formats: tuple[str, ...] = ()
    status: bool = True
    fingerprint: str | None = None
    news: bool = True


class Admission(StrEnum):
    """What became of a `NewJob`."""

    ACCEPTED = "accepted"
    SAME = "same"
    """The id and the request are known: it is the job that is there already."""
    CONFLICT = "conflict"
    """The id belongs to another request."""
    FULL = "full"
    """As many jobs wait as may wait."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the worker has to record of a completed job. Units as in `Job`.

    Attributes:
        windows: all that the recording was worked through in; kept as long as the job if its formats need them.
    """

    text: str
    audio_duration: float
    detected_language: str | None
    language_probability: float | None
    no_speech: bool
    warnings: tuple[str, ...] = ()
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True)
class Totals:
    """How many jobs stand where, and how many have ended, been refused or deleted since the ledger was made."""

    queued: int
    completed_total: int
    error_total: int
    cancelled_total: int
    rejected_total: int
    oldest_queued_at: float | None
    processing: str | None
    paused: bool = False
    deleted_total: int = 0
