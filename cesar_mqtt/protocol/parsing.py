"""From the bytes of a message to a checked request or a refusal; pure functions, any thread may call them.

Everything here is untrusted. A bad message is a result, never an exception.
"""

import base64
import binascii
import codecs
import difflib
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from cesar_mqtt.jobs import AudioSource
from cesar_mqtt.protocol.commands import CURRENT
from cesar_mqtt.protocol.payloads import Reason
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest
from cesar_mqtt.protocol.topics import is_job_id

SHORT_FORM_BYTES = 4096
UPLOAD = AudioSource("upload", "")
"""The audio of a refused request that came with it: it is not kept."""

_BLANKS = b" \t\r\n\v\f"
_TOLD_MISTAKES = 3
_FIELDS = frozenset(JobRequest.model_fields)
_NOT_SHOWN = frozenset({"audio_url", "audio_base64", "initial_prompt", "hotwords"})
_WRONG_LENGTH = frozenset({"too_long", "too_short"})
"""Of a list: that it is one is not what is wrong with it."""
_TEXT_FIELDS = frozenset(
    name
    for name, schema in JobRequest.model_json_schema()["properties"].items()
    if any(kind.get("type") == "string" for kind in (schema, *schema.get("anyOf", ())))
)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 40

UserProperties = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a message is not a job.

    Attributes:
        reason: a `reason` of the contract's section 5.
        detail: a sentence for the producer.
        job_id: the usable id that the message names, if any.
        recordable: whether whoever waits on that id's status is to be told (only the rest of the request is wrong).
        metadata: that of the request if it is right in itself; recorded with it.
        audio: where the audio would have been, if the request says so rightly; recorded with it.
    """

    reason: Reason
    detail: str
    job_id: str | None = None
    recordable: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    audio: AudioSource | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is right in itself, and the audio that came with it (None: it is named by path or URL)."""

    request: JobRequest
    audio: bytes | None


Parsed = Accepted | Refusal


def parse_submission(payload: bytes, properties: UserProperties = ()) -> Parsed:
    """Read a message from `cesar/jobs`: a JSON object, or one line of text that names the audio."""
    payload = payload.removeprefix(codecs.BOM_UTF8)
    if payload.lstrip()[:1] not in (b"{", b"[", b'"'):
        return _parse_short_form(payload, properties)
    try:
        # Not `json`, which takes NaN and lone surrogates, and answers deep nesting with RecursionError.
        document = from_json(payload, allow_inf_nan=False)
    except ValueError as exc:
        return Refusal("malformed_json", f"The payload is not JSON: {exc}.")
    if not isinstance(document, dict):
        return Refusal("invalid_request", "The payload must be a JSON object, or one line of text with a path.")
    return _validated(_with_properties(document, properties))


def parse_audio(job_id: str, payload: bytes, properties: UserProperties = ()) -> Parsed:
    """Read a message from `cesar/audio/<job_id>`, whose payload is the audio file itself."""
    if not is_usable_id(job_id):
        return _bad_id(job_id)
    document = _with_properties({}, properties)
    named = [name for name in AUDIO_FIELDS if name in document]
    if named:
        return reject_upload("invalid_request", f"The payload is the audio: leave out {named[0]}.", job_id, properties)
    if document.setdefault("job_id", job_id) != job_id:
        detail = "The user property job_id differs from the topic: leave it out."
        return reject_upload("invalid_request", detail, job_id, properties)
    parsed = _validated({**document, "audio_path": "-"})  # any source will do: the payload takes its place
    if isinstance(parsed, Refusal):
        return replace(parsed, audio=UPLOAD)
    return Accepted(parsed.request.model_copy(update={"audio_path": None}), payload)


def reject_upload(reason: Reason, detail: str, job_id: str, properties: UserProperties) -> Refusal:
    """Refuse audio that was sent for a usable id, without a look at it."""
    metadata = _metadata(_with_properties({}, properties))
    return Refusal(reason, detail, job_id, recordable=True, metadata=metadata, audio=UPLOAD)


def is_usable_id(job_id: str) -> bool:
    """Whether a new job may have this id."""
    return is_job_id(job_id) and job_id != CURRENT


def source_of(request: JobRequest) -> AudioSource | None:
    """Return where the audio is; None: it comes with the request."""
    if request.audio_url is not None:
        return AudioSource("url", request.audio_url)
    return None if request.audio_path is None else AudioSource("path", request.audio_path)


def _parse_short_form(payload: bytes, properties: UserProperties) -> Parsed:
    if not payload.strip():
        detail = "The payload is an empty line: publish a JSON object, or one line of text with a path."
        return Refusal("malformed_json", detail)
    if len(payload) > SHORT_FORM_BYTES + len(b"\r\n"):
        return _neither()
    line = payload.removesuffix(b"\n").removesuffix(b"\r")
    if len(line) > SHORT_FORM_BYTES or any(byte in line for byte in b"\r\n\0"):
        return _neither()
    try:
        path = line.decode()
    except UnicodeDecodeError:
        return _neither()
    name = "audio_url" if path[: len("https://")].lower().startswith(("http://", "https://")) else "audio_path"
    return _validated(_with_properties({name: path}, properties))


def _neither() -> Refusal:
    return Refusal(
        "malformed_json",
        "The payload is neither a JSON object nor one line of text with a path. "
        "To send the audio itself, publish its bytes on the audio topic.",
    )


def _validated(document: dict[str, Any]) -> Parsed:
    parsed = _checked(document)
    if isinstance(parsed, Refusal) and parsed.recordable:
        return replace(parsed, metadata=_metadata(document), audio=_audio(document))
    return parsed


def _metadata(document: dict[str, Any]) -> Mapping[str, Any]:
    request = _alone("metadata", document, audio_path="-")
    return {} if request is None else request.metadata


def _audio(document: dict[str, Any]) -> AudioSource | None:
    named = [name for name in AUDIO_FIELDS if name in document]
    request = _alone(named[0], document) if len(named) == 1 else None
    return None if request is None else source_of(request) or UPLOAD


def _alone(name: str, document: dict[str, Any], **others: str) -> JobRequest | None:
    """Return the request that one field would be if only `others` stood beside it; None: it is missing or wrong."""
    try:
        return JobRequest.model_validate({name: document[name], **others})
    except (KeyError, ValidationError):
        return None


def _checked(document: dict[str, Any]) -> Parsed:
    job_id = document.get("job_id")
    if job_id is not None and not (isinstance(job_id, str) and is_usable_id(job_id)):
        return _bad_id(job_id)
    unknown = [name for name in document if name not in _FIELDS]
    if unknown:  # a message may bring a million of them, and pydantic would report each
        document = {name: value for name, value in document.items() if name in _FIELDS}
    try:
        request = JobRequest.model_validate(document)
    except ValidationError as exc:
        mistakes = _mistakes(exc)
        if unknown:
            mistakes.pop(None, None)  # no audio was found, but it may be what the unknown field was meant to be
        return _refusal([*_unknown(unknown), *mistakes.values()], len(unknown) + len(mistakes), job_id)
    if unknown:
        return _refusal([*_unknown(unknown)], len(unknown), job_id)
    return _with_audio(request)


def _with_audio(request: JobRequest) -> Parsed:
    if request.audio_base64 is None:
        return Accepted(request, None)
    try:
        encoded = request.audio_base64.encode("ascii")
        encoded = encoded.translate(None, _BLANKS)  # line ends, as `base64 FILE` writes them
        audio = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        audio = b""
    if not audio:
        detail = "audio_base64 is not base64: use the standard alphabet, with padding."
        return Refusal("invalid_request", detail, request.job_id, recordable=request.job_id is not None)
    return Accepted(request, audio)


def _with_properties(document: dict[str, Any], properties: UserProperties) -> dict[str, Any]:
    """Let user properties set the fields that the payload does not, and put the others into the metadata."""
    document = _given(document)
    if not properties:
        return document
    fields = _given({name: _field_value(name, text) for name, text in properties if name in _FIELDS})
    others = {name: text for name, text in properties if name not in _FIELDS}
    merged = {**fields, **document}
    if others and isinstance(merged.get("metadata", {}), dict):
        merged["metadata"] = {**others, **merged.get("metadata", {})}
    return merged


def _given(document: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields that are null: that is how Home Assistant and Node-RED write what is not set."""
    return {name: value for name, value in document.items() if value is not None or name not in _FIELDS}


def _field_value(name: str, text: str) -> Any:
    """Return the value of a field that is not text, written as JSON; what is not JSON is left for the check to name.

    True and false may be written in any case, as people and Python do. Formats may also be written as names with commas
    between them: in a shell, that is how anybody would begin.
    """
    if name in _TEXT_FIELDS:
        return text
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    try:
        return from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return [part.strip() for part in text.split(",")] if name == "formats" else text


def _refusal(mistakes: list[str], total: int, job_id: str | None) -> Refusal:
    told = mistakes[:_TOLD_MISTAKES]
    if total > len(told):
        told.append(f"Mistakes beside these: {total - len(told)}")
    return Refusal("invalid_request", ". ".join(told) + ".", job_id, recordable=job_id is not None)


def _bad_id(job_id: object) -> Refusal:
    if job_id == CURRENT:
        detail = f"{CURRENT!r} is no job id: in commands it stands for the job in work. Use another one."
        return Refusal("invalid_job_id", detail)
    return Refusal("invalid_job_id", f"{_shown(job_id)} is no job id: use text of 1 to 64 of A-Z, a-z, 0-9, _ and -.")


def _unknown(names: list[str]) -> Iterator[str]:
    for name in islice(names, _TOLD_MISTAKES):
        close = difflib.get_close_matches(name[:64], JobRequest.model_fields, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        yield f"There is no field {_shown(name)}{hint}"


def _mistakes(exc: ValidationError) -> dict[str | None, str]:
    """Say in our own words what pydantic found, by field (None: the request as a whole)."""
    mistakes: dict[str | None, str] = {}
    for error in exc.errors(include_url=False):
        name = str(error["loc"][0]) if error["loc"] else None
        if name is None:
            mistakes[name] = str(error["ctx"]["error"])
        elif error["type"] == "value_error":
            value = f" {_shown(error['input'])}" if name == "language" else ""
            mistakes[name] = f"{name}{value} {error['ctx']['error']}"
        else:
            shown = "" if name in _NOT_SHOWN or error["type"] in _WRONG_LENGTH else f", not {_shown(error['input'])}"
            mistakes[name] = f"{name} must be {JobRequest.model_fields[name].description}{shown}"
    return mistakes


def _shown(value: object) -> str:
    """Return a value as a person would write it, in some 40 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return _SHORT.repr(value)
