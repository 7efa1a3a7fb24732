"""The commands on `cesar/request/<command>`: what a request may hold, and what a response holds, as frozen models.

Pure; any thread may make and read them.
"""

import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from cesar_mqtt.jobs import JobState
from cesar_mqtt.json_codec import encode
from cesar_mqtt.protocol.consumer_payloads import HealthMessage
from cesar_mqtt.protocol.fields import (
    FORMATS,
    MUST,
    Attempt,
    AudioDuration,
    AudioName,
    ComputeType,
    Consumer,
    CpuThreads,
    CreatedAt,
    DefaultLanguage,
    DefaultModel,
    Device,
    EndedAt,
    FailureCode,
    Format,
    IsPaused,
    JobId,
    JobStatus,
    Metadata,
    ModelSize,
    Payload,
    Priority,
    PublishedId,
    QueuePosition,
    ResultFormat,
    UpdatedAt,
    Workers,
    one_of,
)
from cesar_mqtt.protocol.languages import DETECT, language_code
from cesar_mqtt.protocol.payloads import Rejection, Status
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN
from cesar_mqtt.protocol.truncate import shorten

CURRENT = "current"
"""Stands for the running job, whatever its id is."""
MAX_LISTED_JOBS = 1000
MAX_REJECTIONS = 100
"""So many of the newest ones are kept."""
AS_CONFIGURED = "auto"
"""In place of a default model: that of the settings."""
MAX_RESULT_BYTES = 65_536
"""Of a result in one response."""

_TRANSACTION_BYTES = 4096
_MODEL_CHARACTERS = 200
_LARGEST_INTEGER = 2**53
_LARGEST_CHARACTER = 4  # bytes of UTF-8; a page holds at least one

# -- requests -----------------------------------------------------------------------------------------------------


def _limited(value: Any) -> Any:
    try:
        size = len(encode(value))
    except ValueError as exc:
        raise ValueError("holds a number that is too large") from exc
    if size > _TRANSACTION_BYTES:
        raise ValueError(f"has more than {_TRANSACTION_BYTES} bytes as JSON")
    return value


Transaction = Annotated[Any, AfterValidator(_limited)]
Name = Annotated[str, Field(pattern=JOB_ID_PATTERN)]
_JOB_ID = "the id of a job, 1 to 64 of A-Z, a-z, 0-9, _ and -"


class Command(Payload):
    """A request without fields of its own: `retry_last`, `cancel_all`, `pause`, `resume`, `health`, `models`."""

    consumer: Name | None = Field(
        default=None,
        description="Only the consumer of this name answers; null: each one does.",
        json_schema_extra={MUST: "the name of a consumer, 1 to 64 of A-Z, a-z, 0-9, _ and -, or null"},
    )
    transaction: Transaction = Field(
        default=None,
        repr=False,
        description="Any short value; the response repeats it.",
        json_schema_extra={MUST: f"at most {_TRANSACTION_BYTES} bytes of any JSON"},
    )


class JobCommand(Command):
    """A request about one job: `cancel`, `retry`, `delete`, `get`."""

    job_id: Name = Field(
        description=f"The job; `{CURRENT}` is the running one.",
        json_schema_extra={MUST: f"{_JOB_ID}, or '{CURRENT}'"},
    )


class ListCommand(Command):
    """Which jobs to list, oldest first, from the one after `after` on."""

    status: Literal["queued", "processing", "completed", "error", "cancelled"] | None = Field(
        default=None,
        description="Only jobs in this state; null: all.",
        json_schema_extra={MUST: "'queued', 'processing', 'completed', 'error', 'cancelled' or null"},
    )
    limit: Annotated[int, Field(ge=1, le=MAX_LISTED_JOBS)] = Field(
        default=100,
        description="How many jobs at most.",
        json_schema_extra={MUST: f"a whole number from 1 to {MAX_LISTED_JOBS}"},
    )
    after: Name | None = Field(
        default=None,
        description="The last job of the previous page; null: start with the first.",
        json_schema_extra={MUST: f"{_JOB_ID}, or null"},
    )


class ResultCommand(JobCommand):
    """Which page of which result to send. Offset and length count bytes of its UTF-8."""

    format: Format = Field(
        default="txt",
        description="The format of the file.",
        json_schema_extra={MUST: f"one of {', '.join(FORMATS)}"},
    )
    offset: Annotated[int, Field(ge=0, le=_LARGEST_INTEGER)] = Field(
        default=0,
        description="The first byte.",
        json_schema_extra={MUST: "a whole number: 0, or the offset + length of the previous response"},
    )
    length: Annotated[int, Field(ge=_LARGEST_CHARACTER, le=MAX_RESULT_BYTES)] = Field(
        default=MAX_RESULT_BYTES,
        description="How many bytes at most.",
        json_schema_extra={MUST: f"a whole number from {_LARGEST_CHARACTER} to {MAX_RESULT_BYTES}"},
    )


class RejectedCommand(Command):
    """How many rejections to return, newest first."""

    limit: Annotated[int, Field(ge=1, le=MAX_REJECTIONS)] = Field(
        default=MAX_REJECTIONS,
        description="How many at most.",
        json_schema_extra={MUST: f"a whole number from 1 to {MAX_REJECTIONS}"},
    )


def _known_language(text: str) -> str:
    code = "" if text.strip().lower() in DETECT else language_code(text)
    if code is None:
        raise ValueError("is not a language that Whisper knows: use a code such as 'de', or 'auto'")
    return code


class SetCommand(Command):
    """What jobs get that name no model or no language. Without a field nothing changes; the response has both."""

    default_model: Annotated[str, Field(min_length=1, max_length=_MODEL_CHARACTERS)] | None = Field(
        default=None,
        description=f"The model of jobs that name none; `{AS_CONFIGURED}`: that of the settings. Left out: unchanged.",
        json_schema_extra={MUST: f"the name of a model, or '{AS_CONFIGURED}'"},
    )
    default_language: Annotated[str, AfterValidator(_known_language)] | None = Field(
        default=None,
        description="The language of jobs that name none, as a code, a name or a BCP-47 tag; `auto` or empty: it is "
        "detected. Left out: unchanged.",
        json_schema_extra={MUST: "text such as 'de', or 'auto'"},
    )


# -- responses ----------------------------------------------------------------------------------------------------


class Response(Payload):
    """What is published on `cesar/response/<command>`; an error's `data` names only the consumer."""

    status: Literal["ok", "error"]
    data: dict[str, Any]
    error: str | None
    transaction: Any


class CommandResult(Payload):
    """What became of the job."""

    job_id: JobId
    status: Annotated[str, one_of(*JobState, "deleted")] = Field(description="The state of the job now, or `deleted`.")
    consumer: Consumer


class Paused(Payload):
    """Whether the consumer starts no job."""

    paused: IsPaused
    consumer: Consumer


class CancelledJobs(Payload):
    """What became of all jobs that had not ended."""

    cancelled: int = Field(description="How many queued jobs were cancelled.")
    processing: PublishedId | None = Field(
        description="The running job, which ends as cancelled within seconds; null if there is none."
    )
    consumer: Consumer


class Rejections(Payload):
    """The rejections since the consumer's start, at most the newest ones."""

    rejected: list[Rejection] = Field(description="Newest first.")
    total: int = Field(description="How many messages have been rejected since the ledger was created.")
    consumer: Consumer


class Defaults(Payload):
    """The model and the language of jobs that name none."""

    default_model: DefaultModel
    default_language: DefaultLanguage
    consumer: Consumer


class HealthResponse(HealthMessage):
    """The health of the consumer."""

    consumer: Consumer


class JobSummary(Payload):
    """A job in a list; the fields are those of its status, a long `audio_source` cut."""

    job_id: JobId
    status: JobStatus
    attempt: Attempt
    created_at: CreatedAt
    updated_at: UpdatedAt
    completed_at: EndedAt
    queue_position: QueuePosition
    priority: Priority = Field(default=0, exclude_if=operator.not_)
    audio_source: AudioName
    audio_duration: AudioDuration
    model_size: ModelSize
    error_code: FailureCode
    metadata: Metadata
    shared: bool = Field(
        default=False,
        exclude_if=operator.not_,
        description="True: it waits in a queue that consumers share, and each of them lists it. Left out when false.",
    )


class JobList(Payload):
    """A page of jobs."""

    jobs: list[JobSummary] = Field(description="Oldest first.")
    next: str | None = Field(description="The `after` of the next page; null: this is the last.")
    total: int = Field(description="How many jobs match, on all pages.")
    consumer: Consumer


class ResultPage(Payload):
    """A page of a result as a file; one after the other they are the file."""

    job_id: JobId
    format: ResultFormat
    offset: int = Field(description="The first byte of this page.")
    length: int = Field(description="How many bytes this page has.")
    total: int = Field(description="How many bytes the file has.")
    text: str = Field(description="The page itself.")
    more: bool = Field(description="Whether another page follows: request it from `offset` + `length` on.")
    consumer: Consumer


class Model(Payload):
    """A model that jobs may name."""

    name: str = Field(description="The name that jobs use.")
    origin: Annotated[str, one_of("folder", "package", "cache")] | None = Field(
        description="Where it is; null if it is not on this machine."
    )
    size_bytes: int | None = Field(description="Its size; null if it is not on this machine.")
    multilingual: bool | None = Field(description="Whether it knows more than English; null if that is not known.")
    default: bool = Field(description="Whether it is the model of jobs that name none.")
    problem: str | None = Field(description="What prevents its use; null: nothing known.")


class Models(Payload):
    """The models, and how the consumer runs them."""

    default: DefaultModel
    default_language: DefaultLanguage
    loaded: str | None = Field(description="The model in memory; null: none.")
    device: Device
    compute_type: ComputeType
    cpu_threads: CpuThreads
    workers: Workers
    models: list[Model] = Field(description="Those that are on this machine, and the default.")
    consumer: Consumer


class CommandType(NamedTuple):
    """What a command reads, what the `data` of its successful response holds, and what it does."""

    request: type[Command]
    data: type
    summary: str


COMMANDS: Mapping[str, CommandType] = {
    "cancel": CommandType(
        JobCommand, CommandResult, "End a job: a queued one at once, the running one at its next segment."
    ),
    "retry": CommandType(JobCommand, CommandResult, "Queue a job again that ended in an error or was cancelled."),
    "delete": CommandType(JobCommand, CommandResult, "Delete a job, its results and its audio."),
    "get": CommandType(JobCommand, Status, "Return the status of a job."),
    "result": CommandType(ResultCommand, ResultPage, "Return a page of a result."),
    "list": CommandType(ListCommand, JobList, "List jobs."),
    "rejected": CommandType(RejectedCommand, Rejections, "Return the newest rejections."),
    "retry_last": CommandType(
        Command, CommandResult, "Queue the job again that ended last in an error or was cancelled, and can be retried."
    ),
    "cancel_all": CommandType(Command, CancelledJobs, "Cancel all queued jobs and the running one."),
    "set": CommandType(SetCommand, Defaults, "Set the default model or the default language. It lasts over restarts."),
    "pause": CommandType(Command, Paused, "Start no further job; jobs are still accepted. It lasts over restarts."),
    "resume": CommandType(Command, Paused, "Start jobs again."),
    "health": CommandType(Command, HealthResponse, "Return the health of the consumer."),
    "models": CommandType(Command, Models, "List the models."),
}


def summary_of(status: Status, *, shared: bool = False) -> JobSummary:
    """Return the job as it is listed; `shared`: it is in no ledger."""
    source = status["audio_source"]
    return JobSummary(
        job_id=status["job_id"],
        status=status["status"],
        attempt=status["attempt"],
        created_at=status["created_at"],
        updated_at=status["updated_at"],
        completed_at=status["completed_at"],
        queue_position=status["queue_position"],
        priority=status.get("priority", 0),
        audio_source=None if source is None else shorten(source),
        audio_duration=status["audio_duration"],
        model_size=status["model_size"],
        error_code=status["error_code"],
        metadata=status["metadata"],
        shared=shared,
    )
