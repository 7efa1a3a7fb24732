"""The JSON Schema of every payload, made from the models that read and write them; pure, any thread may call it.

What the consumer takes is closed: an unknown field is refused. What it says is open, for fields may be added.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import JobState
from cesar_mqtt.protocol import commands as control
from cesar_mqtt.protocol import consumer_payloads as own
from cesar_mqtt.protocol import payloads as messages
from cesar_mqtt.protocol import requests
from cesar_mqtt.protocol.descriptions import ANYWHERE, FIELDS, PAYLOADS
from cesar_mqtt.protocol.formats import FORMATS
from cesar_mqtt.protocol.parsing import SHORT_FORM_BYTES
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN

Schema = dict[str, Any]

_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"
_TASKS = ("transcribe", "translate")


class Answer(messages.Payload):
    """What the intake says to who named a Response Topic."""

    job_id: str
    status: JobState | None


class TimedSegment(messages.Payload):
    """A segment in a file: its job stands in the topic."""

    id: int
    start: float
    end: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    words: list[messages.WordMessage] | None = None


class TranscriptFile(messages.Payload):
    """What `formats` writes as JSON."""

    text: str
    language: str | None
    language_probability: float | None
    duration: float | None
    task: Literal["transcribe", "translate"]
    truncated: bool
    segments: list[TimedSegment]


_READ: Mapping[str, type[messages.Payload]] = {
    "JobRequest": requests.JobRequest,
    "Command": control.Request,
    "JobCommand": control.JobCommand,
    "ListCommand": control.ListCommand,
    "ResultCommand": control.ResultCommand,
}
_SAID: Mapping[str, type[messages.Payload]] = {
    "Answer": Answer,
    "Status": messages.Status,
    "Segment": messages.SegmentMessage,
    "Word": messages.WordMessage,
    "TimedSegment": TimedSegment,
    "TranscriptFile": TranscriptFile,
    "Event": messages.Event,
    "Rejection": messages.Rejection,
    "ConsumerState": own.ConsumerState,
    "Queue": own.Queue,
    "Last": own.Last,
    "Info": own.Info,
    "Limits": own.Limits,
    "Health": own.HealthMessage,
    "Done": control.CommandResult,
    "Paused": control.Paused,
    "Brief": control.JobSummary,
    "JobList": control.JobList,
    "Piece": control.ResultPage,
    "Models": control.Models,
    "Model": control.Model,
    "Vitals": control.HealthResponse,
}
MODELS: Mapping[str, type[messages.Payload]] = {**_READ, **_SAID}
"""Every payload that is a JSON object, by the name that its schema has, except the responses."""

ANSWERS: Mapping[str, str] = {
    "cancel": "Done",
    "retry": "Done",
    "delete": "Done",
    "get": "Status",
    "result": "Piece",
    "list": "JobList",
    "pause": "Paused",
    "resume": "Paused",
    "health": "Vitals",
    "models": "Models",
}
"""What stands in `data` when a command succeeds."""

_VALUES: Mapping[tuple[str, str], Iterable[str]] = {
    ("Done", "status"): (*JobState, "deleted"),
    ("Brief", "status"): JobState,
    ("Piece", "format"): FORMATS,
    ("Status", "task"): _TASKS,
    ("Info", "device"): ("cpu", "cuda"),
    ("Models", "device"): ("cpu", "cuda"),
    ("Model", "origin"): ("folder", "package", "cache"),
}
"""What a field can hold that is plain text in its model."""


def payload_schemas(reference: str = "#/$defs/{model}") -> dict[str, Schema]:
    """Return the schema of every payload by name; they refer to each other.

    Only keywords are used that drafts 7 to 2020-12 of JSON Schema understand in the same way.

    Args:
        reference: how to write a reference to another one of them, which stands for `{model}`.
    """
    _, document = models_json_schema(
        [(model, "serialization") for model in MODELS.values()],
        ref_template=reference,
        schema_generator=_Generator,
    )
    public = {model.__name__: name for name, model in MODELS.items()}
    refer = {reference.format(model=old): reference.format(model=new) for old, new in public.items()}
    made = {public.get(old, old): _renamed(schema, refer) for old, schema in document["$defs"].items()}
    schemas = {name: _told(name, made[name], made) for name in MODELS}
    for command, data in ANSWERS.items():
        schemas[response_name(command)] = _response(command, {"$ref": reference.format(model=data)})
    schemas["Failure"] = _failure()
    return schemas


def bundle(name: str, schemas: Mapping[str, Schema]) -> Schema:
    """Return one of `payload_schemas()` with those that it refers to in its `$defs`, so that it stands for itself."""
    needed: dict[str, Schema] = {}
    waiting = [name]
    while waiting:
        for other in _referred(schemas[waiting.pop()]):
            if other not in needed:
                needed[other] = schemas[other]
                waiting.append(other)
    return {**schemas[name], **({"$defs": needed} if needed else {})}


def _referred(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield str(value["$ref"]).rpartition("/")[2]
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _referred(inner)


def response_name(command: str) -> str:
    """Return the name of the schema of a command's response."""
    return f"{command.title()}Response"


def line_schema() -> Schema:
    """Return what a job request as a line of text is; its length is counted in bytes, which no schema can say."""
    return {
        "type": "string",
        "minLength": 1,
        "maxLength": SHORT_FORM_BYTES + len("\r\n"),
        "pattern": r'^[ \t]*[^\s{\["][^\r\n\u0000]*\r?\n?$',
        "description": f"One line of at most {SHORT_FORM_BYTES} bytes of UTF-8 that does not begin with `{{`, `[` or "
        '`"`: a path as in `audio_path`, or a URL as in `audio_url`, which begins with http:// or https://.',
    }


def named_job_schema() -> Schema:
    """Return what a request about a job as a line of text is."""
    inner = JOB_ID_PATTERN.removeprefix("^").removesuffix("$")
    return {
        "type": "string",
        "pattern": rf"^\s*{inner}\s*$",
        "description": "The id of the job, or `current` for the one in work.",
    }


class _Generator(GenerateJsonSchema):
    """Leaves out titles that only say a field's name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature
        return False


def _renamed(value: Any, refer: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: refer.get(inner, inner) if key == "$ref" else _renamed(inner, refer) for key, inner in value.items()
        }
    return [_renamed(inner, refer) for inner in value] if isinstance(value, list) else value


def _told(name: str, schema: JsonSchemaValue, others: Mapping[str, Schema]) -> Schema:
    """Return a model's schema in words for whoever reads or writes the payload."""
    rules = MODELS[name].model_fields
    fields = schema["properties"]
    for field, inner in fields.items():
        fields[field] = _alone(_field(name, field, inner), others)
        rule = rules[field].description if name in _READ else None
        meaning = FIELDS.get(name, {}).get(field) or ANYWHERE[field]
        fields[field]["description"] = meaning if rule is None else f"{meaning} It must be {rule}."
    schema |= {"title": name, "description": PAYLOADS[name]}
    if name in _SAID:
        schema.pop("additionalProperties", None)
    if name == "JobRequest":
        schema["oneOf"] = [
            {"required": [given], "properties": {given: {"type": "string"}}} for given in requests.AUDIO_FIELDS
        ]
    return schema


def _field(name: str, field: str, schema: Schema) -> Schema:
    """Return a field's schema with what its type does not say."""
    if name in _SAID and field == "words":  # left out rather than null
        return {"type": "array", "items": schema["anyOf"][0]["items"]}
    values = _VALUES.get((name, field)) or (ErrorCode if field == "error_code" else None)
    more: Schema = {} if values is None else {"enum": [str(value) for value in values]}
    if re.search("_at$|^time$", field):
        more = {"pattern": _TIME}
    elif field == "job_id" and name in _SAID:
        more = {"pattern": JOB_ID_PATTERN}
    elif field == "job_id" and name == "JobRequest":
        more = {"not": {"const": control.CURRENT}}
    for kind in schema.get("anyOf", [schema]) if more else ():
        if kind.get("type") == "string":
            kind.update(more)
    optional = name in _READ and not MODELS[name].model_fields[field].is_required()
    return _may_be_null(schema) if optional else schema


def _may_be_null(schema: Schema) -> Schema:
    """Return a schema that takes null, too: in a request that says the same as to leave the field out."""
    if "anyOf" in schema or "type" not in schema:
        return schema
    kind = {key: value for key, value in schema.items() if key not in {"default", "description"}}
    return {"anyOf": [kind, {"type": "null"}], **({"default": schema["default"]} if "default" in schema else {})}


def _alone(schema: Schema, others: Mapping[str, Schema]) -> Schema:
    """Return a field's schema so that words may stand beside it: draft 7 ignores all that stands beside a reference."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return {"allOf": [schema]} if name in MODELS else {key: others[name][key] for key in ("type", "enum")}
    if "anyOf" in schema:
        kinds = [
            _alone(kind, others) if kind.get("$ref", "").endswith("JobState") else kind for kind in schema["anyOf"]
        ]
        return schema | {"anyOf": kinds}
    return schema


def _transaction() -> Schema:
    return {"description": "That of the request, whatever JSON it is; null without one."}


def _failure() -> Schema:
    return {
        "title": "Failure",
        "description": "A request that was not done.",
        "type": "object",
        "properties": {
            "status": {"const": "error"},
            "data": {
                "type": "object",
                "properties": {"consumer": {"type": "string", "description": "The consumer that says so."}},
                "description": "Who says so, and nothing else.",
            },
            "error": {"type": "string", "description": "Why, as a sentence."},
            "transaction": _transaction(),
        },
        "required": ["status", "data", "error", "transaction"],
    }


def _response(command: str, data: Schema) -> Schema:
    done = {
        "type": "object",
        "properties": {
            "status": {"const": "ok"},
            "data": data,
            "error": {"type": "null"},
            "transaction": _transaction(),
        },
        "required": ["status", "data", "error", "transaction"],
    }
    title = response_name(command)
    return {"title": title, "description": f"The answer to `{command}`.", "oneOf": [done, _failure()]}
