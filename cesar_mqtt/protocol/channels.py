"""The messages and the topics of the contract, as tables for the AsyncAPI document. Pure values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.schema import NAMES, Schema, job_line_schema, line_schema, message_name, response_name

JSON = "application/json"
_TEXT, _BYTES = "text/plain", "application/octet-stream"
_FILES = {
    "txt": _TEXT,
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
    "tsv": "text/tab-separated-values",
    "json": JSON,
    "md": "text/markdown",
}


@dataclass(frozen=True, slots=True)
class Message:
    """A kind of message; `payload` is a schema or the name of one, None if any bytes are valid."""

    title: str
    payload: str | Schema | None
    content_type: str = JSON
    headers: str | None = None
    is_request: bool = False
    """Whether the consumer answers on its Response Topic."""
    is_response: bool = False
    transaction: bool = False


@dataclass(frozen=True, slots=True)
class Channel:
    """A topic and its messages; `address` is None for a topic that the request names."""

    address: str | None
    action: Literal["send", "receive"]
    operation: str
    title: str
    description: str
    messages: tuple[str, ...]
    retain: bool = False


_EMPTY: Schema = {"type": "string", "maxLength": 0}

_REQUESTS = {
    message_name(command, "Request"): Message(
        f"Request `{command}`", NAMES[kind.request], is_request=True, transaction=True
    )
    for command, kind in COMMANDS.items()
}
_RESPONSES = {
    message_name(command, "Response"): Message(
        f"Response to `{command}`", response_name(command), is_response=True, transaction=True
    )
    for command in COMMANDS
}
_RESULTS = {
    f"{name}Result": Message(
        f"The transcript as {name}", "TranscriptFile" if name == "json" else {"type": "string"}, kind
    )
    for name, kind in _FILES.items()
}

MESSAGES: Mapping[str, Message] = {
    "job": Message("A job", "JobRequest", headers="JobProperties", is_request=True),
    "line": Message("A job as a line of text", line_schema(), _TEXT, headers="JobProperties", is_request=True),
    "audio": Message("The audio file itself", None, _BYTES, headers="AudioProperties", is_request=True),
    **_REQUESTS,
    "named": Message("A command as the id of its job", job_line_schema(), _TEXT, is_request=True),
    "nothing": Message("A command without fields", _EMPTY, _TEXT, is_request=True),
    "status": Message("The status of a job", "Status"),
    **_RESULTS,
    "cleared": Message("Clears the retained message", _EMPTY, _TEXT),
    "segment": Message("A segment", "Segment"),
    "event": Message("A change of a job", "Event"),
    "rejection": Message("A rejected message", "Rejection", is_response=True),
    "accepted": Message("A job that is on disk", "Answer", is_response=True),
    **_RESPONSES,
    "failure": Message("A command that was not executed", "Failure", is_response=True, transaction=True),
    "state": Message("Whether the consumer is connected", "ConsumerState"),
    "queue": Message("What it is doing, and the queue", "Queue"),
    "last": Message("The job that was completed last", "Last"),
    "last_error": Message("The job that failed last", "LastError"),
    "info": Message("What the consumer is and how it is configured", "Info"),
    "health": Message("The health of the consumer", "Health"),
}
"""By their names in the document."""

_OWN = {
    "state": ("Presence", "At each connect; `offline` is also the last will."),
    "queue": ("Queue", "At each change, at most once a second."),
    "last": ("Last transcript", "When a job is completed. It fits into the attributes of a Home Assistant entity."),
    "last_error": ("Last error", "When a job has failed; cleared when that job is deleted."),
    "info": ("Configuration", "At each start, and when a default was set."),
    "health": ("Health", "Once a minute."),
}
_OWN_CHANNELS = {
    name: Channel(
        "{prefix}/consumer/{consumer}/" + name,
        "send",
        f"publish{name.title().replace('_', '')}",
        title,
        description,
        (name, "cleared") if name == "last_error" else (name,),
        retain=True,
    )
    for name, (title, description) in _OWN.items()
}

CHANNELS: Mapping[str, Channel] = {
    "jobs": Channel(
        "{prefix}/jobs",
        "receive",
        "takeJob",
        "Jobs",
        "Each message requests one transcription. An empty one is ignored.",
        ("job", "line"),
    ),
    "audio": Channel(
        "{prefix}/audio/{job_id}",
        "receive",
        "takeAudio",
        "Audio files",
        "The payload is the file; all options have their defaults, unless MQTT 5 user properties set them. "
        "An empty one is ignored.",
        ("audio",),
    ),
    "requests": Channel(
        "{prefix}/request/{command}",
        "receive",
        "takeRequest",
        "Requests",
        "The commands. Do not retain them. The operation of a command names its messages.",
        (*_REQUESTS, "named", "nothing"),
    ),
    "responses": Channel(
        "{prefix}/response/{command}",
        "send",
        "publishResponse",
        "Responses",
        "One for each command, and the same on its Response Topic if that is allowed; a failure for an unknown "
        "command.",
        (*_RESPONSES, "failure"),
    ),
    "statuses": Channel(
        "{prefix}/status/{job_id}",
        "send",
        "publishStatus",
        "Statuses",
        "The newest status of each job; while it is processing, at most one a second.",
        ("status", "cleared"),
        retain=True,
    ),
    "results": Channel(
        "{prefix}/result/{job_id}/{format}",
        "send",
        "publishResult",
        "Results",
        "The transcript in each requested format, published before the status `completed`.",
        (*_RESULTS, "cleared"),
        retain=True,
    ),
    "segments": Channel(
        "{prefix}/segments/{job_id}",
        "send",
        "publishSegment",
        "Segments",
        "Of jobs with `stream`, for current subscribers.",
        ("segment",),
    ),
    "events": Channel(
        "{prefix}/events",
        "send",
        "publishEvent",
        "Events",
        "Each change of each job, for current subscribers. States passed through while offline are left out.",
        ("event",),
    ),
    "rejections": Channel(
        "{prefix}/rejected",
        "send",
        "publishRejection",
        "Rejections",
        "Each message that was rejected. It was acknowledged and does not come back.",
        ("rejection",),
    ),
    **_OWN_CHANNELS,
    "answers": Channel(
        None,
        "send",
        "answer",
        "Answers",
        "The Response Topic of an MQTT 5 request, if it matches `security.response_topics` (by default below "
        "`replies`, or below `response` and no command's). To any other topic the consumer publishes nothing.",
        ("accepted", "rejection", *_RESPONSES, "failure"),
    ),
}
"""By their names in the document."""
