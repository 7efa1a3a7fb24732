"""What may be asked on `cesar/request/<command>` and what is answered, as frozen models; pure, any thread may call it.

Everything that is read here is untrusted. A bad request is a result, never an exception.
"""

import codecs
import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from cesar_mqtt.json_codec import encode
from cesar_mqtt.protocol.consumer_payloads import HealthMessage
from cesar_mqtt.protocol.formats import FORMATS, Format
from cesar_mqtt.protocol.payloads import Payload, Status
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN, is_job_id

CURRENT = "current"
"""Stands for the job in work, whatever its id is."""
MAX_LISTED_JOBS = 1000
MAX_RESULT_BYTES = 65_536
"""Of a result in one answer."""

_REQUEST_BYTES = 65_536
_LINE_BYTES = 4096
_TRANSACTION_BYTES = 4096
_TOLD_MISTAKES = 3
_LARGEST_INTEGER = 2**53

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 40


def _short(value: Any) -> Any:
    try:
        size = len(encode(value))
    except ValueError as exc:
        raise ValueError("holds too large a number") from exc
    if size > _TRANSACTION_BYTES:
        raise ValueError(f"has more than {_TRANSACTION_BYTES} bytes as JSON")
    return value


Transaction = Annotated[Any, AfterValidator(_short)]
_TRANSACTION: TypeAdapter[Any] = TypeAdapter(Transaction)

JobId = Annotated[str, Field(pattern=JOB_ID_PATTERN)]
_JOB_ID = "the id of a job, 1 to 64 of A-Z, a-z, 0-9, _ and -"
_NAME = "the name of a consumer, 1 to 64 of A-Z, a-z, 0-9, _ and -, or null"


class Request(Payload):
    """A request that says no more than its command: `pause`, `resume`, `health`, `models`.

    With `consumer` it is for the one of that name only, and the others are silent.
    """

    consumer: JobId | None = Field(default=None, description=_NAME)
    transaction: Transaction = Field(default=None, description=f"at most {_TRANSACTION_BYTES} bytes of any JSON")


class JobCommand(Request):
    """`cancel`, `retry`, `delete`, `get`."""

    job_id: JobId = Field(description=f"{_JOB_ID}, or '{CURRENT}'")


class ListCommand(Request):
    """`list`: jobs in the order of acceptance, from the one behind `after` on."""

    status: Literal["queued", "processing", "completed", "error", "cancelled"] | None = Field(
        default=None, description="'queued', 'processing', 'completed', 'error', 'cancelled' or null"
    )
    limit: Annotated[int, Field(ge=1, le=MAX_LISTED_JOBS)] = Field(
        default=100, description=f"a whole number from 1 to {MAX_LISTED_JOBS}"
    )
    after: JobId | None = Field(default=None, description=f"{_JOB_ID}, or null")


class ResultCommand(JobCommand):
    """`result`: a piece of a result as a file. Offset and length count bytes of its UTF-8."""

    format: Format = Field(default="txt", description=f"one of {', '.join(FORMATS)}")
    offset: Annotated[int, Field(ge=0, le=_LARGEST_INTEGER)] = Field(
        default=0, description="the byte to begin with: a whole number, 0 or the offset + length of the answer before"
    )
    # A character has up to four bytes, and a piece holds at least one.
    length: Annotated[int, Field(ge=4, le=MAX_RESULT_BYTES)] = Field(
        default=MAX_RESULT_BYTES, description=f"a whole number from 4 to {MAX_RESULT_BYTES}"
    )


COMMANDS: Mapping[str, type[Request]] = {
    "cancel": JobCommand,
    "retry": JobCommand,
    "delete": JobCommand,
    "get": JobCommand,
    "result": ResultCommand,
    "list": ListCommand,
    "pause": Request,
    "resume": Request,
    "health": Request,
    "models": Request,
}


class Response(Payload):
    """What is published on `cesar/response/<command>`; an error's `data` only name the consumer."""

    status: Literal["ok", "error"]
    data: dict[str, Any]
    error: str | None
    transaction: Any


class CommandResult(Payload):
    """What became of a job: its status, or `deleted`."""

    job_id: str
    status: str
    consumer: str


class Paused(Payload):
    """Whether no job is started."""

    paused: bool
    consumer: str


class HealthResponse(HealthMessage):
    """How the consumer of this name is."""

    consumer: str


class JobSummary(Payload):
    """A job in a list; its fields are those of its status, `audio_source` perhaps cut."""

    job_id: str
    status: str
    attempt: int
    created_at: str
    updated_at: str
    completed_at: str | None
    queue_position: int | None
    audio_source: str | None
    audio_duration: float | None
    model_size: str
    error_code: str | None
    metadata: dict[str, Any]


class JobList(Payload):
    """A page of jobs; `next` is what to send as `after` for the one behind it, `total` counts all that match."""

    jobs: list[JobSummary]
    next: str | None
    total: int
    consumer: str


class ResultPage(Payload):
    """A piece of a result; `offset`, `length` and `total` are bytes of UTF-8."""

    job_id: str
    format: str
    offset: int
    length: int
    total: int
    text: str
    more: bool
    consumer: str


class Model(Payload):
    """A model that jobs may name. `origin` is None if it is not on this machine, `problem` if none is known."""

    name: str
    origin: str | None
    size_bytes: int | None
    multilingual: bool | None
    default: bool
    problem: str | None


class Models(Payload):
    """Which models there are, and which one is in memory."""

    default: str
    loaded: str | None
    device: str
    compute_type: str
    cpu_threads: int
    models: list[Model]
    consumer: str


def summary_of(status: Status) -> JobSummary:
    """Return what a list tells of a job."""
    source = status.audio_source
    fields = {name: getattr(status, name) for name in JobSummary.model_fields}
    short = source if source is None or len(source) <= _SOURCE_CHARACTERS else source[: _SOURCE_CHARACTERS - 1] + "…"
    return JobSummary(**{**fields, "status": str(status.status), "audio_source": short})


_SOURCE_CHARACTERS = 200


# -- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParsedCommand:
    """A request as far as it could be read.

    Attributes:
        request: None for a bad one.
        mistakes: what is wrong with a bad one, as a sentence for whoever asks.
        transaction: to be echoed; None also where it could not be read.
        consumer: the only one that is asked, however bad the request is; None: all are.
    """

    request: Request | None = None
    mistakes: str = ""
    transaction: Any = None
    consumer: str | None = None


def read(command: str, payload: bytes) -> ParsedCommand:
    """Read a request, whose command need not be known: a JSON object, a line that names a job, or nothing at all."""
    document = _document(payload)
    fields = {} if isinstance(document, str) else document
    name = fields.get("consumer")
    consumer = name if isinstance(name, str) and is_job_id(name) else None
    asked = ParsedCommand(transaction=_transaction(fields), consumer=consumer)
    kind = COMMANDS.get(command)
    if kind is None:
        return replace(asked, mistakes=f"There is no command {shown(command)}: use one of {', '.join(COMMANDS)}.")
    if isinstance(document, str):
        return replace(asked, mistakes=document)
    if "job_id" in document and "job_id" not in kind.model_fields:
        return replace(asked, mistakes=f"`{command}` is not about one job: leave its id out.")
    checked = _checked(kind, document)
    return replace(asked, mistakes=checked) if isinstance(checked, str) else replace(asked, request=checked)


def _document(payload: bytes) -> dict[str, Any] | str:
    """Return the request's fields, or why there are none."""
    if len(payload) > _REQUEST_BYTES:
        return f"The request has {len(payload)} bytes: at most {_REQUEST_BYTES} are read."
    payload = payload.removeprefix(codecs.BOM_UTF8).strip()
    if not payload:
        return {}
    if payload[:1] not in (b"{", b"[", b'"'):
        return _line(payload)
    try:
        document = from_json(payload, allow_inf_nan=False)
    except ValueError as exc:
        return f"The payload is not JSON: {exc}."
    return document if isinstance(document, dict) else "The payload must be a JSON object, or a line with a job's id."


def _line(payload: bytes) -> dict[str, Any] | str:
    neither = "The payload is neither a JSON object nor one line of text with a job's id."
    if len(payload) > _LINE_BYTES or any(byte in payload for byte in b"\r\n\0"):
        return neither
    try:
        return {"job_id": payload.decode()}
    except UnicodeDecodeError:
        return neither


def _transaction(document: Mapping[str, Any]) -> Any:
    try:
        return _TRANSACTION.validate_python(document.get("transaction"), strict=True)
    except ValidationError:
        return None


def _checked(kind: type[Request], document: dict[str, Any]) -> Request | str:
    """Return the request, or what is wrong with it; null counts as left out, except where something is needed."""
    names = kind.model_fields
    unknown = (name for name in document if name not in names)
    mistakes = [_unknown(name, names) for name in islice(unknown, _TOLD_MISTAKES + 1)]
    try:  # of what is known only: a request may bring thousands of other fields, and pydantic would report each
        request = kind.model_validate(
            {
                name: document[name]
                for name, field in names.items()
                if name in document and (document[name] is not None or field.is_required())
            }
        )
    except ValidationError as exc:
        mistakes += _mistakes(exc, kind)
    if not mistakes:
        return request
    more = " There are other mistakes beside these." if len(mistakes) > _TOLD_MISTAKES else ""
    return ". ".join(mistakes[:_TOLD_MISTAKES]) + "." + more


def _unknown(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name[:64], names, n=1)
    return f"There is no field {shown(name)}" + (f" (did you mean {close[0]}?)" if close else "")


def _mistakes(exc: ValidationError, kind: type[Request]) -> list[str]:
    """Say in our own words what pydantic found, once for each field."""
    mistakes: dict[str, str] = {}
    for error in exc.errors(include_url=False):
        name = str(error["loc"][0])
        must = f"{name} must be {kind.model_fields[name].description}"
        if error["type"] == "value_error":
            mistakes[name] = f"{name} {error['ctx']['error']}"
        elif error["type"] == "missing":
            mistakes[name] = f"{must}; it is missing"
        else:
            mistakes[name] = f"{must}, not {shown(error['input'])}"
    return list(mistakes.values())


def shown(value: object) -> str:
    """Return a value as a person would write it, in some 40 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return _SHORT.repr(value)
