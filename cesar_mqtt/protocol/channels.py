"""The kinds of messages and the topics that they go to, as tables for the AsyncAPI document; pure values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.schema import MODELS, Schema, line_schema, named_job_schema, response_name

JSON = "application/json"
_TEXT, _BYTES = "text/plain", "application/octet-stream"
_FILES = {
    "txt": _TEXT,
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
    "tsv": "text/tab-separated-values",
    "json": JSON,
}


@dataclass(frozen=True, slots=True)
class Message:
    """A kind of message; a payload that is text names a schema, one that is None has nothing to check."""

    title: str
    payload: str | Schema | None
    content_type: str = JSON
    headers: str | None = None
    asks: bool = False
    """Whether a Response Topic in it is honoured."""
    answers: bool = False
    transaction: bool = False


@dataclass(frozen=True, slots=True)
class Channel:
    """Where messages go; `address` is None for a topic that the request names."""

    address: str | None
    action: Literal["send", "receive"]
    operation: str
    title: str
    description: str
    messages: tuple[str, ...]
    retain: bool = False


_EMPTY: Schema = {"type": "string", "maxLength": 0}

_NAMES = {model: name for name, model in MODELS.items()}
_REQUESTS = {
    f"{command}Request": Message(f"Request `{command}`", _NAMES[model], asks=True, transaction=True)
    for command, model in COMMANDS.items()
}
_RESPONSES = {
    f"{command}Response": Message(f"Response to `{command}`", response_name(command), answers=True, transaction=True)
    for command in COMMANDS
}
_RESULTS = {
    f"{name}Result": Message(
        f"The transcript as {name}", "TranscriptFile" if name == "json" else {"type": "string"}, kind
    )
    for name, kind in _FILES.items()
}

MESSAGES: Mapping[str, Message] = {
    "job": Message("A job", "JobRequest", headers="JobProperties", asks=True),
    "line": Message("A job in a line", line_schema(), _TEXT, headers="JobProperties", asks=True),
    "audio": Message("The audio file itself", None, _BYTES, headers="AudioProperties", asks=True),
    **_REQUESTS,
    "named": Message("A request that is only the id of a job", named_job_schema(), _TEXT, asks=True),
    "nothing": Message("A request without anything", _EMPTY, _TEXT, asks=True),
    "status": Message("The status of a job", "Status"),
    **_RESULTS,
    "cleared": Message("Nothing is retained here any more", _EMPTY, _TEXT),
    "segment": Message("A segment", "Segment"),
    "event": Message("A change of a job", "Event"),
    "rejection": Message("A refused message", "Rejection", answers=True),
    "accepted": Message("A job that is on disk", "Answer", answers=True),
    **_RESPONSES,
    "failure": Message("A request that was not done", "Failure", answers=True, transaction=True),
    "state": Message("Whether the consumer is there", "ConsumerState"),
    "queue": Message("What it does and what waits", "Queue"),
    "last": Message("The job that ended last", "Last"),
    "info": Message("What the consumer is", "Info"),
    "health": Message("How the consumer is", "Health"),
}
"""By their names in the document."""

_OWN = {
    "state": ("Presence", "At each connect; `offline` is also the last will."),
    "queue": ("Queue", "At each change, at most once a second."),
    "last": ("Last job", "When a job has ended. What it says fits into the attributes of a Home Assistant entity."),
    "info": ("Set-up", "At each start."),
    "health": ("Health", "Once a minute."),
}
_OWN_CHANNELS = {
    name: Channel(
        "{prefix}/consumer/{consumer}/" + name, "send", f"publish{name.title()}", title, told, (name,), retain=True
    )
    for name, (title, told) in _OWN.items()
}

CHANNELS: Mapping[str, Channel] = {
    "jobs": Channel(
        "{prefix}/jobs",
        "receive",
        "takeJob",
        "Jobs",
        "Each message asks for one transcription. An empty one is ignored.",
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
        "What is asked of the consumer; it must not be retained. Which message a command takes, its operation tells.",
        (*_REQUESTS, "named", "nothing"),
    ),
    "responses": Channel(
        "{prefix}/response/{command}",
        "send",
        "publishResponse",
        "Responses",
        "One for each request, and the same on its Response Topic; for an unknown command, a failure.",
        (*_RESPONSES, "failure"),
    ),
    "statuses": Channel(
        "{prefix}/status/{job_id}",
        "send",
        "publishStatus",
        "Statuses",
        "The newest status of each job; while it is in work, at most one a second.",
        ("status", "cleared"),
        retain=True,
    ),
    "results": Channel(
        "{prefix}/result/{job_id}/{format}",
        "send",
        "publishResult",
        "Results",
        "The transcript in each format that was asked for; it is there before the status says `completed`.",
        (*_RESULTS, "cleared"),
        retain=True,
    ),
    "segments": Channel(
        "{prefix}/segments/{job_id}",
        "send",
        "publishSegment",
        "Segments",
        "Of jobs with `stream`, for whoever listens now.",
        ("segment",),
    ),
    "events": Channel(
        "{prefix}/events",
        "send",
        "publishEvent",
        "Events",
        "Each change of each job, for whoever listens now. States that were passed through offline are left out.",
        ("event",),
    ),
    "rejections": Channel(
        "{prefix}/rejected",
        "send",
        "publishRejection",
        "Refusals",
        "Each message that was refused. It was acknowledged and does not come back.",
        ("rejection",),
    ),
    **_OWN_CHANNELS,
    "answers": Channel(
        None,
        "send",
        "answer",
        "Answers",
        "The Response Topic of an MQTT 5 request: none of the consumer's own topics, save those below `response`.",
        ("accepted", "rejection", *_RESPONSES, "failure"),
    ),
}
"""By their names in the document."""
