"""The OpenAPI document of the HTTP API. Its schemas come from the models of the contract. Any thread may read it."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from cesar_mqtt import __version__
from cesar_mqtt.protocol.commands import CommandResult, Paused
from cesar_mqtt.protocol.consumer_payloads import Queue
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.payloads import Rejection, Status
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest

_REF = "#/components/schemas/{model}"
_MODELS: Mapping[str, Any] = {
    "Status": Status,
    "JobRequest": JobRequest,
    "Rejection": Rejection,
    "CommandResult": CommandResult,
    "Paused": Paused,
    "Queue": Queue,
}


@cache
def openapi_document() -> dict[str, Any]:
    """Return the document; version 3.1 takes JSON Schemas as they are."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cesar-mqtt",
            "version": __version__,
            "description": "The HTTP API of the web page. An MQTT client can do the same: see `schema asyncapi`.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "."}],
        "security": [{}, {"password": []}, {"session": []}],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "password": {"type": "http", "scheme": "bearer", "description": "The password of the page."},
                "session": {"type": "apiKey", "in": "cookie", "name": "cesar_session"},
            },
            "parameters": {
                "job_id": _parameter("job_id", "path", "The id of the job."),
                "name": _parameter("name", "path", "The name of the consumer."),
            },
        },
    }


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for name, model in _MODELS.items():
        schema = TypeAdapter(model).json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[name] = schema
    text = {"type": "string"}
    optional_text = {"type": ["string", "null"]}
    status = schemas["Status"]["properties"]
    listed = {name: schema for name, schema in status.items() if name not in {"result_text", "metadata", "version"}}
    listed["file"] = {**optional_text, "description": "The name of the file, from the metadata."}
    listed["excerpt"] = {**optional_text, "description": "The beginning of the transcript."}
    listed["passage"] = {**text, "description": "Where the transcript has a word that was searched for."}
    schemas["Job"] = {"type": "object", "properties": listed, "required": ["job_id", "status", "file", "excerpt"]}
    schemas["Consumer"] = {
        "type": "object",
        "required": ["name", "online", "queue", "models"],
        "properties": {
            "name": text,
            "online": {"type": "boolean"},
            "queue": _ref("Queue"),
            "version": optional_text,
            "models": {"type": "array", "items": text},
            "default_model": optional_text,
        },
    }
    schemas["Problem"] = {
        "type": "object",
        "description": "RFC 9457.",
        "required": ["type", "title", "status", "detail", "code"],
        "properties": {
            "type": text,
            "title": text,
            "status": {"type": "integer"},
            "detail": {**text, "description": "What happened, and what to do."},
            "code": {**text, "description": "The same for programs."},
        },
    }
    schemas["Upload"] = _upload(schemas["JobRequest"])
    return schemas


def _upload(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a form: the file, and the fields of a request, those that are not text as JSON."""
    fields = {name: schema for name, schema in request["properties"].items() if name not in AUDIO_FIELDS}
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": "The recording."}
    return {"type": "object", "required": ["file"], "properties": {**fields, "file": file}}


def _paths() -> dict[str, Any]:
    job, consumer = _shared("job_id"), _shared("name")
    listing = [
        _parameter("status", "query", "Only jobs in this state."),
        _parameter("q", "query", "Only jobs whose transcript, file, source or id holds each of these words."),
        _parameter("limit", "query", "How many at most; default 100.", kind="integer"),
        _parameter("after", "query", "The last job of the page before."),
    ]
    one = _parameter("format", "path", f"One of {', '.join(FORMATS)}.")
    resume = _parameter("Last-Event-ID", "header", "The last event that was read: the stream goes on behind it.")
    return {
        "/api/jobs": {
            "get": _operation(
                "listJobs",
                "List jobs: running, queued in their order, then the newest.",
                _page("jobs", "Job"),
                parameters=listing,
            ),
            "post": {
                **_operation(
                    "submitJob",
                    "Submit a recording, as a form with its file, or a request that names it.",
                    _ref("Status"),
                    status="201",
                ),
                "requestBody": {
                    "required": True,
                    "content": {
                        "multipart/form-data": {"schema": _ref("Upload")},
                        "application/json": {"schema": _ref("JobRequest")},
                    },
                },
            },
        },
        "/api/jobs/{job_id}": {
            "parameters": job,
            "get": _operation("getJob", "Return the status of a job, with its transcript.", _ref("Status")),
            "delete": _operation("deleteJob", "Delete a job, its results and its audio.", _ref("CommandResult")),
        },
        "/api/jobs/{job_id}/cancel": {
            "parameters": job,
            "post": _operation("cancelJob", "End a job that is queued or running.", _ref("CommandResult")),
        },
        "/api/jobs/{job_id}/retry": {
            "parameters": job,
            "post": _operation("retryJob", "Queue a job again that failed or was cancelled.", _ref("CommandResult")),
        },
        "/api/jobs/{job_id}/result.{format}": {
            "parameters": [*job, one],
            "get": _operation("getResult", "Download the transcript.", {"type": "string"}, media="*/*"),
        },
        "/api/consumers": {"get": _operation("listConsumers", "List the consumers.", _page("consumers", "Consumer"))},
        "/api/consumers/{name}/pause": {
            "parameters": consumer,
            "post": _operation("pauseConsumer", "Start no further job.", _ref("Paused")),
        },
        "/api/consumers/{name}/resume": {
            "parameters": consumer,
            "post": _operation("resumeConsumer", "Start jobs again.", _ref("Paused")),
        },
        "/api/rejected": {
            "get": _operation("listRejections", "List the latest rejections.", _page("rejected", "Rejection"))
        },
        "/api/events": {
            "get": _operation(
                "readEvents",
                "Server-sent events: `snapshot` with everything, then `job`, `job_deleted`, `consumer`, "
                "`consumer_removed`, `rejected`, `rejections` (the latest ones) and `broker` as they happen.",
                {"type": "string"},
                parameters=[resume],
                media="text/event-stream",
            )
        },
        "/healthz": {"get": _operation("health", "200: the broker and a consumer can be reached.", {"type": "object"})},
    }


def _operation(
    name: str,
    summary: str,
    schema: Mapping[str, Any],
    *,
    status: str = "200",
    parameters: list[dict[str, Any]] | None = None,
    media: str = "application/json",
) -> dict[str, Any]:
    problem = {
        "description": "It is not possible.",
        "content": {"application/problem+json": {"schema": _ref("Problem")}},
    }
    operation = {
        "operationId": name,
        "summary": summary,
        "responses": {status: {"description": "Done.", "content": {media: {"schema": schema}}}, "default": problem},
    }
    return {**operation, "parameters": parameters} if parameters else operation


def _page(name: str, model: str) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": _ref(model)}}}


def _parameter(name: str, place: str, description: str, *, kind: str = "string") -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": {"type": kind},
    }


def _shared(name: str) -> list[dict[str, Any]]:
    return [{"$ref": f"#/components/parameters/{name}"}]


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(model=name)}
