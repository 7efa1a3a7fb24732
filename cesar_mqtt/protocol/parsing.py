"""From untrusted bytes to a checked request, or to the reason why it is rejected: submissions and commands alike.

A bad message is a result, never an exception. The cost is linear in its size, and a sentence names at most three of its
mistakes. Pure; any thread may call it.
"""

import codecs
import functools
import hashlib
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from cesar_mqtt.jobs import AudioSource
from cesar_mqtt.json_codec import canonical
from cesar_mqtt.protocol.commands import COMMANDS, CURRENT, Command, Transaction
from cesar_mqtt.protocol.encoded_audio import decode_audio
from cesar_mqtt.protocol.field_names import meant_field
from cesar_mqtt.protocol.fields import MUST, Payload
from cesar_mqtt.protocol.payloads import Reason
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest
from cesar_mqtt.protocol.topics import is_job_id
from cesar_mqtt.redaction import redact_value

SHORT_FORM_BYTES = 4096
UPLOAD = AudioSource("upload", "")
"""The audio of a rejected request that came with it: it is not stored."""

_COMMAND_BYTES = 65_536
_NAMED_MISTAKES = 3
_FIELDS = frozenset(JobRequest.model_fields)
_DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in JobRequest.model_fields.items()}
_TEXT_FIELDS = frozenset(
    name
    for name, schema in JobRequest.model_json_schema()["properties"].items()
    if {kind.get("type") for kind in schema.get("anyOf", (schema,))} <= {"string", "null"}
)
_MOST_VALUES = 150_000
"""Of a JSON payload, counted as its commas: two prompts may hold 65,536 each. Parsing half a million takes a second."""
_MOST_PROPERTIES = 1000
_WITHOUT_BLANKS = (_TEXT_FIELDS | {"formats"}) - {"job_id", "audio_path", "initial_prompt", "hotwords"}
"""Not the id, which is also a level of a topic; nor a path, which is looked up as it is first."""
_WRONG_LENGTH = frozenset({"too_long", "too_short"})
"""Of a list: to name its value as "a list" would not explain the mistake."""
_TRANSACTION: TypeAdapter[Any] = TypeAdapter(Transaction)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 40

UserProperties = tuple[tuple[str, str], ...]
Document = dict[str, Any]
Model = TypeVar("Model", bound=Payload)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a message is rejected.

    Attributes:
        reason: a `reason` of the contract's section 5.
        detail: a sentence for the producer.
        job_id: the usable id in the message, if any.
        recordable: whether the job is recorded as failed, for subscribers of its status: only the rest of the request
            is wrong.
        metadata: that of the request if it is valid by itself; recorded with the job.
        audio: the source of the audio, if the request names it validly; recorded with the job.
    """

    reason: Reason
    detail: str
    job_id: str | None = None
    recordable: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    audio: AudioSource | None = None


@dataclass(slots=True)  # frozen it would take three times as long to make
class Accepted:
    """A valid request, and the audio that came with it (None: the request names it by path or URL)."""

    request: JobRequest
    audio: bytes | None


Parsed = Accepted | Refusal


@dataclass(frozen=True, slots=True)
class ParsedCommand:
    """A command as far as it could be read.

    Attributes:
        command: None for an invalid one.
        mistakes: what is wrong with an invalid one, as a sentence for the sender.
        transaction: to be repeated in the response; None also where it could not be read.
        consumer: the only consumer that answers, however invalid the command is; None: each one does.
    """

    command: Command | None = None
    mistakes: str = ""
    transaction: Any = None
    consumer: str | None = None


# -- submissions ---------------------------------------------------------------------------------------------------


def parse_submission(payload: bytes, properties: UserProperties = ()) -> Parsed:
    """Read a message from `cesar/jobs`: a JSON object, or one line of text that names the audio."""
    if len(properties) > _MOST_PROPERTIES:
        return _too_many_properties(properties)
    payload = payload.removeprefix(codecs.BOM_UTF8)
    document = _object_or_line(payload, "a path", _SEND_AUDIO)
    if isinstance(document, str):
        document = {_audio_field(document): document}
    if isinstance(document, Refusal):
        if not payload.strip():
            detail = "The payload is an empty line: publish a JSON object, or one line of text with a path."
            return replace(document, detail=detail)
        return document
    return _request(_with_properties(document, properties))


def parse_audio(job_id: str, payload: bytes, properties: UserProperties = ()) -> Parsed:
    """Read a message from `cesar/audio/<job_id>`, whose payload is the audio file itself."""
    if not is_usable_id(job_id):
        return _bad_id(job_id)
    if len(properties) > _MOST_PROPERTIES:
        return _too_many_properties(properties)
    document = _with_properties({}, properties)
    named = [name for name in AUDIO_FIELDS if name in document]
    if named:
        return reject_upload("invalid_request", f"The payload is the audio: leave out {named[0]}.", job_id, properties)
    if document.setdefault("job_id", job_id) != job_id:
        detail = "The user property job_id differs from the topic: leave it out."
        return reject_upload("invalid_request", detail, job_id, properties)
    parsed = _request({**document, "audio_path": "-"})  # any source will do: the payload replaces it
    if isinstance(parsed, Refusal):
        return replace(parsed, audio=UPLOAD)
    return Accepted(parsed.request.model_copy(update={"audio_path": None}), payload)


def reject_upload(reason: Reason, detail: str, job_id: str, properties: UserProperties) -> Refusal:
    """Reject audio that was sent for a usable id, without reading it."""
    metadata = _metadata(_with_properties({}, properties[:_MOST_PROPERTIES]))
    return Refusal(reason, detail, job_id, recordable=True, metadata=metadata, audio=UPLOAD)


def is_usable_id(job_id: str) -> bool:
    """Whether a new job may have this id."""
    return is_job_id(job_id) and job_id != CURRENT


def source_of(request: JobRequest) -> AudioSource | None:
    """Return where the audio is; None: it comes with the request."""
    if request.audio_url is not None:
        return AudioSource("url", request.audio_url)
    return None if request.audio_path is None else AudioSource("path", request.audio_path)


def fingerprint(parsed: Accepted) -> str:
    """Return 128 bits that are equal for requests with the same options and the same audio."""
    request = parsed.request
    values = {name: getattr(request, name) for name in request.model_fields_set - _NOT_IN_FINGERPRINT}
    if values.get("beam_size") == _FORMER_BEAM_SIZE:
        del values["beam_size"]
    digest = hashlib.sha256(canonical({name: value for name, value in values.items() if value != _DEFAULTS[name]}))
    if parsed.audio is not None:
        digest.update(hashlib.sha256(parsed.audio).digest())
    return digest.hexdigest()[:32]


_NOT_IN_FINGERPRINT = frozenset({"job_id", "audio_base64"})
"""Fields that name the job, or hold the audio, whose bytes are compared instead."""
_FORMER_BEAM_SIZE = 5
"""The default of version 1: a request that is sent again after an upgrade is known, whether it names it or not."""


_SEND_AUDIO = " To send the audio itself, publish its bytes on the audio topic."


def _audio_field(line: str) -> str:
    is_url = line.lstrip()[: len("https://")].lower().startswith(("http://", "https://"))
    return "audio_url" if is_url else "audio_path"


def _request(document: Document) -> Parsed:
    document = document | {name: _without_blanks(document[name]) for name in _WITHOUT_BLANKS & document.keys()}
    parsed = _checked_request(document)
    if isinstance(parsed, Refusal) and parsed.recordable:
        return replace(parsed, metadata=_metadata(document), audio=_source(document))
    return parsed


def _checked_request(document: Document) -> Parsed:
    job_id = document.get("job_id")
    if job_id is not None and not (isinstance(job_id, str) and is_usable_id(job_id)):
        return _bad_id(job_id)
    request = _validated(JobRequest, document)
    if isinstance(request, str):
        return Refusal("invalid_request", request, job_id, recordable=job_id is not None)
    return _with_audio(request)


def _with_audio(request: JobRequest) -> Parsed:
    if request.audio_base64 is None:
        return Accepted(request, None)
    try:
        return Accepted(request, decode_audio(request.audio_base64))
    except ValueError as exc:
        detail = f"audio_base64 {exc}."
        return Refusal("invalid_request", detail, request.job_id, recordable=request.job_id is not None)


def _without_blanks(value: Any) -> Any:
    """Remove the blanks around a text that is a name, as shells and templates leave them."""
    if isinstance(value, list):
        return [each.strip() if isinstance(each, str) else each for each in value]
    return value.strip() if isinstance(value, str) else value


def _metadata(document: Document) -> Mapping[str, Any]:
    request = _only("metadata", document, audio_path="-")
    return {} if request is None else request.metadata


def _source(document: Document) -> AudioSource | None:
    named = [name for name in AUDIO_FIELDS if name in document]
    request = _only(named[0], document) if len(named) == 1 else None
    return None if request is None else source_of(request) or UPLOAD


def _only(name: str, document: Document, **others: str) -> JobRequest | None:
    """Return the request with one field of the document and `others`; None: the field is missing or invalid."""
    try:
        return JobRequest.model_validate({name: document[name], **others})
    except (KeyError, ValidationError):
        return None


def _bad_id(job_id: object) -> Refusal:
    if job_id == CURRENT:
        detail = f"{CURRENT!r} is no job id: in commands it stands for the running job. Use another one."
        return Refusal("invalid_job_id", detail)
    return Refusal("invalid_job_id", f"{_shown(job_id)} is no job id: use text of 1 to 64 of A-Z, a-z, 0-9, _ and -.")


def _too_many_properties(properties: UserProperties) -> Refusal:
    detail = f"The message has {len(properties):,} user properties: at most {_MOST_PROPERTIES:,} are read."
    return Refusal("invalid_request", detail)


# -- user properties -----------------------------------------------------------------------------------------------


def _with_properties(document: Document, properties: UserProperties) -> Document:
    """Let user properties set the fields that the payload does not, and add the others to the metadata."""
    document = _without_nulls(JobRequest, document)
    if not properties:
        return document
    named = {name: _field_value(name, text) for name, text in properties if name in _FIELDS}
    others = {name: text for name, text in properties if name not in _FIELDS}
    merged = {**_without_nulls(JobRequest, named), **document}
    if others and isinstance(merged.get("metadata", {}), dict):
        merged["metadata"] = {**others, **merged.get("metadata", {})}
    return merged


def _field_value(name: str, text: str) -> Any:
    """Return the value of a field that is not text, written as JSON; what is not JSON is left for validation to name.

    True and false may be written in any case, as people and Python do. Formats may also be written as names with commas
    between them, the first thing to try in a shell.
    """
    if name in _TEXT_FIELDS:
        return text
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    try:
        return from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return [part.strip() for part in text.split(",")] if name == "formats" else text


# -- commands ------------------------------------------------------------------------------------------------------


def parse_command(command: str, payload: bytes) -> ParsedCommand:
    """Read a message from `cesar/request/<command>`: a JSON object, a line that names a job, or an empty payload."""
    document = _command_fields(payload)
    fields = {} if isinstance(document, str) else document
    name = fields.get("consumer")
    consumer = name if isinstance(name, str) and is_job_id(name) else None
    parsed = ParsedCommand(transaction=_transaction(fields), consumer=consumer)
    kind = COMMANDS.get(command)
    if kind is None:
        return replace(parsed, mistakes=f"There is no command {_shown(command)}: use one of {', '.join(COMMANDS)}.")
    if isinstance(document, str):
        return replace(parsed, mistakes=document)
    model = kind.request
    if "job_id" in document and "job_id" not in model.model_fields:
        return replace(parsed, mistakes=f"`{command}` is not about one job: leave job_id out.")
    checked = _validated(model, _without_nulls(model, document))
    return replace(parsed, mistakes=checked) if isinstance(checked, str) else replace(parsed, command=checked)


def _command_fields(payload: bytes) -> Document | str:
    """Return the fields of a command, or why there are none."""
    if len(payload) > _COMMAND_BYTES:
        return f"The request has {len(payload)} bytes: at most {_COMMAND_BYTES} are read."
    payload = payload.removeprefix(codecs.BOM_UTF8).strip()
    if not payload:
        return {}
    document = _object_or_line(payload, "a job's id")
    if isinstance(document, Refusal):
        return document.detail
    return {"job_id": document} if isinstance(document, str) else document


def _transaction(document: Mapping[str, Any]) -> Any:
    try:
        return _TRANSACTION.validate_python(document.get("transaction"), strict=True)
    except ValidationError:
        return None


# -- any message ---------------------------------------------------------------------------------------------------


def _object_or_line(payload: bytes, line: str, advice: str = "") -> Document | str | Refusal:
    """Return the JSON object or the line of text in a payload; `line` is what such a line holds."""
    if payload.lstrip()[:1] not in (b"{", b"[", b'"'):
        text = _line_of(payload)
        neither = f"The payload is neither a JSON object nor one line of text with {line}.{advice}"
        return Refusal("malformed_json", neither) if text is None else text
    if payload.count(b",") > _MOST_VALUES:
        return Refusal("invalid_request", f"The payload has more than {_MOST_VALUES:,} values: leave out most of them.")
    try:
        # Not `json`, which accepts NaN and lone surrogates, and raises RecursionError for deep nesting.
        document = from_json(payload, allow_inf_nan=False)
    except ValueError as exc:
        return Refusal("malformed_json", f"The payload is not JSON: {exc}.")
    if not isinstance(document, dict):
        return Refusal("invalid_request", f"The payload must be a JSON object, or one line of text with {line}.")
    return document


def _line_of(payload: bytes) -> str | None:
    """Return a payload that is one line of text, without its line end; None: it is none."""
    if len(payload) > SHORT_FORM_BYTES + len(b"\r\n"):
        return None
    line = payload.removesuffix(b"\n").removesuffix(b"\r")
    if not line.strip() or len(line) > SHORT_FORM_BYTES or any(byte in line for byte in b"\r\n\0"):
        return None
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


@functools.cache
def _optional_fields(model: type[Payload]) -> frozenset[str]:
    return frozenset(name for name, info in model.model_fields.items() if not info.is_required())


def _without_nulls(model: type[Payload], document: Document) -> Document:
    """Leave out optional fields that are null: Home Assistant and Node-RED write what is not set as null."""
    if None not in document.values():
        return document
    optional = _optional_fields(model)
    return {name: value for name, value in document.items() if value is not None or name not in optional}


def _validated(model: type[Model], document: Document) -> Model | str:
    """Return the model, or a sentence that names the first mistakes and how many there are beside them."""
    fields = model.model_fields
    unknown = [] if document.keys() <= fields.keys() else [name for name in document if name not in fields]
    if unknown:  # a message may bring a million of them, and pydantic would report each
        document = {name: value for name, value in document.items() if name in fields}
    mistakes: dict[str | None, str] = {}
    try:
        checked = model.model_validate(document)
        if not unknown:
            return checked
    except ValidationError as exc:
        mistakes = _mistakes(model, exc)
        if unknown:
            mistakes.pop(None, None)  # no audio was found, but the unknown field may be meant to name it
    named = [*_unknown(model, unknown), *mistakes.values()][:_NAMED_MISTAKES]
    others = len(unknown) + len(mistakes) - len(named)
    if others:
        named.append(f"Mistakes beside these: {others}")
    return ". ".join(named) + "."


def _unknown(model: type[Payload], names: list[str]) -> Iterator[str]:
    for name in islice(names, _NAMED_MISTAKES):
        meant = meant_field(name, model.model_fields)
        hint = f" (did you mean {meant}?)" if meant else ""
        yield f"There is no field {_shown(name)}{hint}"


def _mistakes(model: type[Payload], exc: ValidationError) -> dict[str | None, str]:
    """Return pydantic's errors in our own words, one for each field (None: the request as a whole)."""
    mistakes: dict[str | None, str] = {}
    for error in exc.errors(include_url=False):
        if error["loc"]:
            name = str(error["loc"][0])
            mistakes[name] = _mistake(model, name, error)
        else:
            mistakes[None] = str(error["ctx"]["error"])
    return mistakes


def _mistake(model: type[Payload], name: str, error: ErrorDetails) -> str:
    info, kind, value = model.model_fields[name], error["type"], error["input"]
    if kind == "value_error":
        shown = f" {_shown(value)}" if info.repr and isinstance(value, str) else ""
        return f"{name}{shown} {error['ctx']['error']}"
    extra = info.json_schema_extra
    must = f"{name} must be {extra[MUST] if isinstance(extra, dict) else ''}"
    if kind == "missing":
        return f"{must}; it is missing"
    return must if kind in _WRONG_LENGTH or not info.repr else f"{must}, not {_shown(value)}"


def _shown(value: object) -> str:
    """Return a value as a person would write it, in about 40 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return _SHORT.repr(redact_value(value) if isinstance(value, str) else value)
