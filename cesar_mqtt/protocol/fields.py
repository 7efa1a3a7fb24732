"""What payloads have in common: the base class of the models and the types of fields that several payloads have.

Pure; any thread may call it.
"""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import JobState
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN

Format = Literal["txt", "srt", "vtt", "tsv", "json", "md"]
FORMATS: tuple[Format, ...] = get_args(Format)
TASKS = ("transcribe", "translate")

MUST = "must"
"""In a field's `json_schema_extra`: what a valid value is, as the end of "FIELD must be ..."."""


class Payload(BaseModel):
    """A message as JSON: frozen, types taken literally, unknown fields rejected."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def encode(self) -> bytes:
        """Return the payload as it is published."""
        return self.model_dump_json().encode()


def one_of(*values: str) -> WithJsonSchema:
    """Return the schema of published text that has one of these values."""
    return WithJsonSchema({"type": "string", "enum": [str(value) for value in values]})


# Types of published fields. The consumer's own values are described for the subscriber, and not checked again.
PublishedId = Annotated[str, WithJsonSchema({"type": "string", "pattern": JOB_ID_PATTERN})]
Timestamp = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"})]
State = Annotated[str, one_of(*JobState)]
Task = Annotated[str, one_of(*TASKS)]

# Published fields that several payloads have.
JobId = Annotated[PublishedId, Field(description="The id of the job.")]
JobStatus = Annotated[State, Field(description="The state of the job.")]
Attempt = Annotated[int, Field(description="How many times processing has started.")]
CreatedAt = Annotated[Timestamp, Field(description="When the job was accepted.")]
UpdatedAt = Annotated[Timestamp, Field(description="When a field of the status last changed.")]
EndedAt = Annotated[Timestamp | None, Field(description="When the job ended, in whatever state.")]
QueuePosition = Annotated[
    int | None,
    Field(description="The position in the queue, from 1; null unless queued. Kept up to date for the first ten."),
]
Priority = Annotated[
    int, Field(description="The priority of the job, as far as `queue.max_priority` allows it; left out where it is 0.")
]
AudioDuration = Annotated[
    float | None, Field(description="The length of the recording in seconds; null until it is known.")
]
AudioName = Annotated[
    str | None,
    Field(
        description="The path or the URL of the recording, `upload` for one that came with the request, null if an "
        "invalid request names none. A URL is shown without user, password and query."
    ),
]
ModelSize = Annotated[str, Field(description="The model that the job uses.")]
DetectedLanguage = Annotated[
    str | None, Field(description="The detected language, as Whisper's code; null if there is no speech.")
]
LanguageProbability = Annotated[
    float | None, Field(description="How certain the language is, 0 to 1; null if there is no speech.")
]
TextTruncated = Annotated[bool, Field(description="Whether the text was cut.")]
FailureCode = Annotated[
    Annotated[str, one_of(*ErrorCode)] | None, Field(description="Why the job ended without a transcript.")
]
FailureMessage = Annotated[str | None, Field(description="The same as a sentence, with what to do.")]
Metadata = Annotated[
    dict[str, Any], Field(description="The object that came with the request; empty if that object was invalid.")
]
Consumer = Annotated[str, Field(description="The name of the consumer that published this.")]
Version = Annotated[str, Field(description="The version of cesar-mqtt.")]
DefaultModel = Annotated[str, Field(description="The model of jobs that name none.")]
DefaultLanguage = Annotated[
    str | None,
    Field(description="The language of jobs that name none, where their model knows it; null: it is detected."),
]
Device = Annotated[str, one_of("cpu", "cuda"), Field(description="The device that runs the models.")]
ComputeType = Annotated[str, Field(description="The precision, as CTranslate2 names it.")]
CpuThreads = Annotated[int, Field(description="How many threads each worker uses on the CPU.")]
Workers = Annotated[int, Field(description="How many windows of a long recording are transcribed at once.")]
ResultFormat = Annotated[str, one_of(*FORMATS), Field(description="The format of the file.")]
IsPaused = Annotated[bool, Field(description="Whether the consumer starts no job.")]


@lru_cache(maxsize=64)  # most statuses hold the same time more than once, and a burst arrives within one
def timestamp(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, in milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
