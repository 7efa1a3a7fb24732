"""The JSON Schema of every payload, from the models. Pure; any thread may call it.

What the consumer reads is closed: an unknown field is rejected. What it publishes is open, for fields may be added.
Only keywords are used that drafts 7 to 2020-12 understand in the same way: AsyncAPI and Node-RED know only draft 7.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from cesar_mqtt.protocol import commands, consumer_payloads, payloads, requests
from cesar_mqtt.protocol.fields import MUST
from cesar_mqtt.protocol.parsing import SHORT_FORM_BYTES
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN

Schema = dict[str, Any]

READ: Mapping[str, type] = {
    "JobRequest": requests.JobRequest,
    "Command": commands.Command,
    "JobCommand": commands.JobCommand,
    "ListCommand": commands.ListCommand,
    "ResultCommand": commands.ResultCommand,
    "RejectedCommand": commands.RejectedCommand,
    "SetCommand": commands.SetCommand,
}
"""The payloads that the consumer reads, by their public names."""
PUBLISHED: Mapping[str, type] = {
    "Answer": payloads.Answer,
    "Status": payloads.Status,
    "Segment": payloads.JobSegment,
    "Word": payloads.Word,
    "TimedSegment": payloads.TimedSegment,
    "TranscriptFile": payloads.TranscriptFile,
    "Event": payloads.Event,
    "Rejection": payloads.Rejection,
    "ConsumerState": consumer_payloads.ConsumerState,
    "Queue": consumer_payloads.Queue,
    "Last": consumer_payloads.Last,
    "LastError": consumer_payloads.LastError,
    "Info": consumer_payloads.Info,
    "Limits": consumer_payloads.Limits,
    "Health": consumer_payloads.HealthMessage,
    "Quarantined": consumer_payloads.Quarantined,
    "WebhookHealth": consumer_payloads.WebhookHealth,
    "Done": commands.CommandResult,
    "CancelledJobs": commands.CancelledJobs,
    "Rejections": commands.Rejections,
    "Defaults": commands.Defaults,
    "Paused": commands.Paused,
    "Brief": commands.JobSummary,
    "JobList": commands.JobList,
    "Piece": commands.ResultPage,
    "Models": commands.Models,
    "Model": commands.Model,
    "Vitals": commands.HealthResponse,
}
"""The payloads that it publishes, except the responses, whose `data` they are."""
MODELS: Mapping[str, type] = {**READ, **PUBLISHED}

NAMES: Mapping[type, str] = {model: name for name, model in MODELS.items()}


class _WithoutTitles(GenerateJsonSchema):
    """Leaves out titles that only repeat a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature
        return False


def payload_schemas(reference: str = "#/$defs/{model}") -> dict[str, Schema]:
    """Return the schema of every payload by its public name; they refer to each other.

    Args:
        reference: how to write a reference to another one of them, which stands for `{model}`.
    """
    _, document = TypeAdapter.json_schemas(
        [(name, "serialization", TypeAdapter(model)) for name, model in MODELS.items()],
        ref_template="{model}",
        schema_generator=_WithoutTitles,
    )
    names = {model.__name__: name for model, name in NAMES.items()}
    references = {model: reference.format(model=name) for model, name in names.items()}
    schemas = {names[model]: _public(names[model], schema) for model, schema in document["$defs"].items()}
    ordered = {name: _with_references(schemas[name], references) for name in MODELS}
    for command, kind in commands.COMMANDS.items():
        data = {"$ref": reference.format(model=NAMES[kind.data])}
        ordered[response_name(command)] = _response(command, data)
    return {**ordered, "Failure": _failure()}


def bundle(name: str, schemas: Mapping[str, Schema]) -> Schema:
    """Return one of `payload_schemas()` with those that it refers to in its `$defs`, so that it is complete."""
    needed: dict[str, Schema] = {}
    waiting = [name]
    while waiting:
        for other in _references(schemas[waiting.pop()]):
            if other not in needed:
                needed[other] = schemas[other]
                waiting.append(other)
    return {**schemas[name], **({"$defs": needed} if needed else {})}


def message_name(command: str, kind: str) -> str:
    """Return the name of a command's message, in the AsyncAPI document: `retryLastResponse`."""
    first, *others = command.split("_")
    return first + "".join(map(str.title, others)) + kind


def response_name(command: str) -> str:
    """Return the name of the schema of a command's response."""
    name = message_name(command, "Response")
    return name[0].upper() + name[1:]


def line_schema() -> Schema:
    """Return the schema of a job request as a line of text; a schema cannot limit its length in bytes."""
    return {
        "type": "string",
        "minLength": 1,
        "maxLength": SHORT_FORM_BYTES + len("\r\n"),
        "pattern": r'^[ \t]*[^\s{\["][^\r\n\u0000]*\r?\n?$',
        "description": f"One line of at most {SHORT_FORM_BYTES} bytes of UTF-8 that does not begin with `{{`, `[` or "
        '`"`: a path as in `audio_path`, or a URL as in `audio_url`, which begins with http:// or https://.',
    }


def job_line_schema() -> Schema:
    """Return the schema of a command about a job as a line of text."""
    inner = JOB_ID_PATTERN.removeprefix("^").removesuffix("$")
    return {
        "type": "string",
        "pattern": rf"^\s*{inner}\s*$",
        "description": f"The id of the job, or `{commands.CURRENT}` for the running one.",
    }


def _public(name: str, schema: Schema) -> Schema:
    """Return a model's schema as it is published."""
    required = schema.get("required", ())
    for field, inner in schema["properties"].items():
        must = inner.pop(MUST, None)
        if must is not None:
            inner["description"] = f"{inner['description']} It must be {must}."
        if name in READ and field not in required:
            schema["properties"][field] = _or_null(inner)
        elif "$ref" in inner:  # draft 7 ignores what stands beside a reference
            inner["allOf"] = [{"$ref": inner.pop("$ref")}]
    schema["title"] = name
    schema["description"] = " ".join(schema["description"].split())
    if name in PUBLISHED:
        schema.pop("additionalProperties", None)
    if name == "JobRequest":
        schema["oneOf"] = [
            {"required": [given], "properties": {given: {"type": "string"}}} for given in requests.AUDIO_FIELDS
        ]
    return schema


def _or_null(schema: Schema) -> Schema:
    """Return a schema that also accepts null: in an optional field of a request it is the same as to leave it out."""
    null: Schema = {"type": "null"}
    if "anyOf" in schema:
        return schema if null in schema["anyOf"] else {**schema, "anyOf": [*schema["anyOf"], null]}
    if "type" not in schema:
        return schema
    beside: Schema = {key: schema.pop(key) for key in ("default", "description") if key in schema}
    return {"anyOf": [schema, null], **beside}


def _with_references(value: Any, references: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: references[inner] if key == "$ref" else _with_references(inner, references)
            for key, inner in value.items()
        }
    return [_with_references(inner, references) for inner in value] if isinstance(value, list) else value


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield str(value["$ref"]).rpartition("/")[2]
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _references(inner)


# -- responses ----------------------------------------------------------------------------------------------------

_TRANSACTION: Schema = {"description": "The transaction of the request, any JSON; null without one."}
_ENVELOPE = list(commands.Response.model_fields)


def _response(command: str, data: Schema) -> Schema:
    success = {
        "type": "object",
        "properties": {
            "status": {"const": "ok"},
            "data": data,
            "error": {"type": "null"},
            "transaction": _TRANSACTION,
        },
        "required": _ENVELOPE,
    }
    title = response_name(command)
    return {"title": title, "description": f"The response to `{command}`.", "oneOf": [success, _failure()]}


def _failure() -> Schema:
    return {
        "title": "Failure",
        "description": "The response to a command that was not executed.",
        "type": "object",
        "properties": {
            "status": {"const": "error"},
            "data": {
                "type": "object",
                "properties": {"consumer": {"type": "string", "description": "The consumer that answers."}},
                "description": "Only the name of the consumer.",
            },
            "error": {"type": "string", "description": "Why, as a sentence."},
            "transaction": _TRANSACTION,
        },
        "required": _ENVELOPE,
    }
