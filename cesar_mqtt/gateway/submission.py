"""A recording on its way to a consumer: what is known of it, and the message that submits it. Pure values."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cesar_mqtt.protocol.topics import Topics

_NAMED_BYTES = 64 << 20
"""On MQTT 3.1.1 the file's name is sent only with recordings up to this size: it needs JSON, a third larger."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One recording to be transcribed; the same id with the same recording again is the same job."""

    job_id: str
    audio: bytes | None = field(repr=False)
    """The recording; None: `path` is sent instead."""
    path: str
    """The path as the consumer looks it up; with `audio` it only names the recording in messages. "": `options` have an
    `audio_url`."""
    options: Mapping[str, Any]
    """Further fields of the request."""
    name: str | None = None
    """The file's name in the job's metadata; None: it has none."""


class Request(NamedTuple):
    """The message that submits a recording."""

    topic: str
    payload: bytes
    user_properties: Sequence[tuple[str, str]] = ()


def request_of(item: Submission, topics: Topics, *, has_properties: bool) -> Request:
    """Return the message; `has_properties`: whether the connection carries user properties (MQTT 5).

    With them a recording is sent as it is. Without, options need a JSON object, and base64, which is a third larger.
    """
    options = dict(item.options)
    if item.name and (has_properties or item.audio is None or options or len(item.audio) <= _NAMED_BYTES):
        options["metadata"] = {"file": item.name, **options.get("metadata", {})}
    if item.audio is not None and (has_properties or not options):
        return Request(topics.audio(item.job_id), item.audio, [(name, _text(value)) for name, value in options.items()])
    document = {"job_id": item.job_id, **options}
    if item.audio is None and item.path:
        document["audio_path"] = item.path
    elif item.audio is not None:
        document["audio_base64"] = base64.b64encode(item.audio).decode()
    return Request(topics.jobs, json.dumps(document, ensure_ascii=False).encode())


def _text(value: object) -> str:
    """Write a field's value as a user property: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
