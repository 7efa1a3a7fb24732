"""The messages of Home Assistant's MQTT discovery: the consumer as a device with entities. Pure, for any thread.

Home Assistant renders the templates in here for each message (`value`, `value_json`; `this` is the entity before it).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from cesar_mqtt import __version__
from cesar_mqtt.protocol.consumer_payloads import Activity
from cesar_mqtt.protocol.languages import CODES
from cesar_mqtt.protocol.payloads import EVENT_TYPES
from cesar_mqtt.protocol.topics import Topics

Mode = Literal["device", "component"]
"""One message for the whole device, or one for each entity; Home Assistant before 2024.11 needs the latter."""

BIRTH_PAYLOAD = b"online"
"""Home Assistant publishes it on its birth topic when it has started."""
PAUSE_SWITCH = "pause/set"
"""Below the consumer's own topics: `ON` pauses, `OFF` resumes. Home Assistant's switch has one command topic only."""

_STATE_CHARACTERS = 255
"""The longest state that Home Assistant accepts; it logs a longer one in full."""
_PRODUCT = "cesar-mqtt"
_DETECTED = "auto"
"""The choice of the default language that has it detected."""


def birth_topics(prefix: str) -> tuple[str, ...]:
    """Return the birth topics of Home Assistant: the one below the prefix, and the default one.

    A birth topic with another name is not supported.
    """
    return tuple(dict.fromkeys((f"{prefix}/status", "homeassistant/status")))


def device_id(consumer: str) -> str:
    """Return the part of discovery topics that differs between consumers."""
    return f"{_PRODUCT}_{consumer}"


def discovery_filters(consumer: str, *, prefix: str) -> tuple[str, str]:
    """Return the subscriptions that match every discovery topic of a consumer, in either mode and of any version."""
    return f"{prefix}/device/{device_id(consumer)}/config", f"{prefix}/+/{device_id(consumer)}/+/config"


def discovery_messages(
    topics: Topics, *, mode: Mode, prefix: str, models: Sequence[str] = (), page: str | None = None
) -> dict[str, bytes]:
    """Return the retained messages that announce a consumer, by topic.

    Args:
        topics: those of the consumer.
        mode: one message or one for each entity.
        prefix: Home Assistant's prefix of discovery topics.
        models: the names to choose the default model from; without any it cannot be chosen.
        page: the address of the consumer's web page; None: it has none.

    Home Assistant rejects a device's whole message if it does not know one key at its root, or an entity has no
    `unique_id`; and keys at the root reach the entities in some versions only. So each entity repeats all keys.
    """
    common = {"device": _device(topics.consumer, page), "origin": {"name": _PRODUCT, "sw_version": __version__}}
    name = device_id(topics.consumer)
    if mode == "device":
        components = {key: {"platform": platform, **fields} for key, platform, fields in _entities(topics, models)}
        return {f"{prefix}/device/{name}/config": _encode({**common, "components": components})}
    return {
        f"{prefix}/{platform}/{name}/{key}/config": _encode({**fields, **common})
        for key, platform, fields in _entities(topics, models)
    }


def _encode(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _device(consumer: str, page: str | None) -> dict[str, Any]:
    """Describe the device; the ids of the entities begin with its name, so it contains "cesar"."""
    return {
        "identifiers": [f"{_PRODUCT}.{consumer}"],
        "name": consumer if consumer.lower().startswith("cesar") else f"cesar {consumer}",
        "manufacturer": _PRODUCT,
        "model": "Transcription worker",
        "sw_version": __version__,
        **({} if page is None else {"configuration_url": page}),
    }


def _entities(topics: Topics, models: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield key, platform and configuration of each entity. Keys never change: users' entities depend on them."""
    for platform, entities in (
        ("binary_sensor", _binary_sensors(topics)),
        (
            "sensor",
            {
                **_queue_sensors(topics),
                **_job_sensors(topics),
                **_total_sensors(topics),
                **_text_sensors(topics),
                **_diagnostic_sensors(topics),
            },
        ),
        ("event", _events(topics)),
        ("notify", _notifiers(topics)),
        ("switch", _switches(topics)),
        ("select", _selects(topics, models)),
        ("button", _buttons(topics)),
    ):
        for key, fields in entities.items():
            # A consumer's name has no dot, so no two pairs of name and key make the same id.
            yield key, platform, {"unique_id": f"{_PRODUCT}.{topics.consumer}.{key}", "qos": 1, **fields}


Entities = dict[str, dict[str, Any]]


def _binary_sensors(topics: Topics) -> Entities:
    connection = {
        "name": "Connection",
        "device_class": "connectivity",
        "entity_category": "diagnostic",
        "state_topic": topics.own("state"),
        "value_template": "{{ value_json.state }}",
        "payload_on": "online",
        "payload_off": "offline",
    }
    return {"connection": connection}


def _queue_sensors(topics: Topics) -> Entities:
    queue_topic = {**_only_online(topics), "state_topic": topics.own("queue")}
    activity = {
        "name": "Activity",
        "icon": "mdi:progress-clock",
        "device_class": "enum",
        "options": list(get_args(Activity)),
        "value_template": "{{ value_json.activity }}",
        "json_attributes_topic": topics.own("queue"),
        "json_attributes_template": "{{ {'job_id': value_json.job_id} | tojson }}",
    }
    queued = {
        "name": "Queue length",
        "icon": "mdi:tray-full",
        "state_class": "measurement",
        "value_template": "{{ value_json.queued }}",
    }
    return {"activity": {**queue_topic, **activity}, "queued": {**queue_topic, **queued}}


def _job_sensors(topics: Topics) -> Entities:
    """Describe the sensors of the running job."""
    queue_topic = {**_only_online(topics), "state_topic": topics.own("queue")}
    return {
        "progress": {
            **queue_topic,
            "name": "Progress",
            "icon": "mdi:percent-circle-outline",
            "unit_of_measurement": "%",
            "value_template": "{{ (value_json.progress * 100) | round if value_json.progress is number else 'None' }}",
        },
        "eta": {
            **queue_topic,
            "name": "Ready at",
            "device_class": "timestamp",
            # Ten seconds: an estimate that moves by less is no change of the state.
            "value_template": (
                "{% if value_json.eta is number %}"
                "{% set tens = ((as_timestamp(now()) + value_json.eta) / 10) | round %}"
                "{{ (tens * 10) | timestamp_utc }}"
                "{% else %}None{% endif %}"
            ),
        },
        "current_recording": {
            **queue_topic,
            "name": "Current recording",
            "icon": "mdi:file-music",
            "value_template": f"{{{{ (value_json.audio_source or 'None')[:{_STATE_CHARACTERS}] }}}}",
        },
    }


def _total_sensors(topics: Topics) -> Entities:
    names = {"completed": "Completed", "error": "Errors", "cancelled": "Cancelled", "rejected": "Rejected"}
    return {
        f"{what}_total": {
            "name": name,
            "icon": "mdi:counter",
            "entity_category": "diagnostic",
            "state_class": "total_increasing",
            "state_topic": topics.own("queue"),
            "value_template": f"{{{{ value_json.{what}_total }}}}",
        }
        for what, name in names.items()
    }


def _text_sensors(topics: Topics) -> Entities:
    """Describe the sensors that stay readable while the consumer is offline."""
    transcript = {
        "name": "Last transcript",
        "icon": "mdi:text-long",
        **_kept_text(
            topics.own("last"),
            when="value_json.text is string",
            text="'no speech' if value_json.no_speech else value_json.text",
            attributes=(
                "text",
                "text_truncated",
                "no_speech",
                "job_id",
                "audio_source",
                "language",
                "audio_duration",
                "completed_at",
            ),
        ),
    }
    failed = {
        "name": "Last error",
        "icon": "mdi:alert-circle-outline",
        "entity_category": "diagnostic",
        **_kept_text(
            topics.own("last_error"),
            when="value_json.error_message is string",
            text="value_json.error_message",
            attributes=("error_code", "error_message", "job_id", "audio_source", "completed_at"),
        ),
    }
    rejected = {
        "name": "Last rejection",
        "icon": "mdi:email-remove-outline",
        "entity_category": "diagnostic",
        **_kept_text(
            topics.rejected,
            when="value_json.detail is string",
            text="value_json.detail",
            attributes=("reason", "detail", "topic", "job_id", "received_at"),
        ),
    }
    return {"last_transcript": transcript, "last_error": failed, "last_rejection": rejected}


def _diagnostic_sensors(topics: Topics) -> Entities:
    size = {"device_class": "data_size", "unit_of_measurement": "B", "suggested_display_precision": 1}
    measured = {"state_topic": topics.own("health"), "state_class": "measurement", **_only_online(topics)}
    info = {"state_topic": topics.own("info")}
    last = {"state_topic": topics.own("last"), "unit_of_measurement": "s", "device_class": "duration"}
    sensors = {
        "oldest_waiting": {
            **_only_online(topics),
            "name": "Oldest waiting",
            "state_topic": topics.own("queue"),
            "device_class": "duration",
            "unit_of_measurement": "s",
            "value_template": "{{ value_json.oldest_age | round if value_json.oldest_age is number else 0 }}",
        },
        "disk_free": {
            **measured,
            **size,
            "name": "Free space",
            "suggested_unit_of_measurement": "GB",
            "value_template": "{{ value_json.disk_free_bytes if value_json.disk_free_bytes is number else 'None' }}",
        },
        "memory": {
            **measured,
            **size,
            "name": "Memory",
            "suggested_unit_of_measurement": "MB",
            "value_template": "{{ value_json.rss_bytes }}",
        },
        "started": {
            **info,
            "name": "Started",
            "device_class": "timestamp",
            "value_template": "{{ value_json.started_at }}",
        },
        "device": {
            **info,
            "name": "Computes on",
            "icon": "mdi:chip",
            "value_template": "{{ value_json.device }} {{ value_json.compute_type }}",
        },
        "last_duration": {
            **last,
            "name": "Length of the last recording",
            "value_template": "{{ value_json.audio_duration if value_json.audio_duration is number else 'None' }}",
        },
    }
    return {key: {"entity_category": "diagnostic", **fields} for key, fields in sensors.items()}


def _kept_text(topic: str, *, when: str, text: str, attributes: tuple[str, ...]) -> dict[str, Any]:
    """Describe a sensor that shows the beginning of a text, and keeps it at a message that does not match `when`.

    The whole text goes into an attribute, which may be longer than a state. No attribute may be named `state` or
    `icon`: Home Assistant omits those. `None` is its word for an unknown state.
    """
    kept = "{{ 'None' if this.state in ('unknown', 'unavailable') else this.state }}"
    when = f"value != '' and {when}"  # empty: the message was cleared
    start = f"{{{{ ({text})[:{_STATE_CHARACTERS}] }}}}"
    wanted = ", ".join(f"'{name}': told.get('{name}')" for name in attributes)
    return {
        "state_topic": topic,
        "value_template": f"{{% if {when} %}}{start}{{% else %}}{kept}{{% endif %}}",
        "json_attributes_topic": topic,
        "json_attributes_template": (
            f"{{% set told = value_json if {when} else this.attributes %}}{{{{ {{{wanted}}} | tojson }}}}"
        ),
    }


def _events(topics: Topics) -> Entities:
    job = {
        "name": "Job",
        "icon": "mdi:microphone-message",
        "state_topic": topics.events,
        "event_types": list(EVENT_TYPES),
        # All consumers under one prefix publish events on one topic; Home Assistant ignores an empty value.
        "value_template": f"{{% if value_json.consumer == '{topics.consumer}' %}}{{{{ value }}}}{{% endif %}}",
    }
    return {"job": job}


def _notifiers(topics: Topics) -> Entities:
    # Without availability: the broker keeps a request for a consumer that is offline.
    submit = {
        "name": "Transcribe",
        "icon": "mdi:file-music-outline",
        "command_topic": topics.jobs,
        "command_template": (
            "{% set text = value | trim %}"
            "{% if text.startswith('{') %}{{ text }}{% else %}"
            "{% set is_url = (text | lower).startswith(('http://', 'https://')) %}"
            "{{ {'audio_url' if is_url else 'audio_path': text} | tojson }}{% endif %}"
        ),
    }
    return {"submit": submit}


def _switches(topics: Topics) -> Entities:
    paused = {
        **_only_online(topics),
        "name": "Pause",
        "entity_category": "config",
        "icon": "mdi:pause-circle-outline",
        "state_topic": topics.own("queue"),
        "value_template": "{{ 'ON' if value_json.paused else 'OFF' }}",
        "command_topic": topics.own(PAUSE_SWITCH),
    }
    return {"paused": paused}


def _selects(topics: Topics, models: Sequence[str]) -> Entities:
    """Describe what jobs get that name no model and no language; the command `set` changes it."""
    choice = {
        **_only_online(topics),
        "entity_category": "config",
        "state_topic": topics.own("info"),
        "command_topic": f"{topics.prefix}/request/set",
    }

    def choose(field: str) -> str:
        return f"{{{{ {{'{field}': value, 'consumer': '{topics.consumer}'}} | tojson }}}}"

    language = {
        **choice,
        "name": "Default language",
        "icon": "mdi:translate",
        "options": [_DETECTED, *CODES],
        "value_template": f"{{{{ value_json.default_language or '{_DETECTED}' }}}}",
        "command_template": choose("default_language"),
    }
    model = {
        **choice,
        "name": "Default model",
        "icon": "mdi:brain",
        "options": list(models),
        "value_template": "{{ value_json.default_model }}",
        "command_template": choose("default_model"),
    }
    return {"default_language": language} | ({"default_model": model} if models else {})


def _buttons(topics: Topics) -> Entities:
    def button(name: str, icon: str, command: str, *, when: str | None = None, **fields: str) -> dict[str, Any]:
        """Describe a button that can be pressed while the queue satisfies `when`; None: at any time."""
        available: list[dict[str, str]] = _only_online(topics)["availability"]
        if when is not None:
            state = f"{{{{ 'online' if {when} else 'offline' }}}}"
            available.append({"topic": topics.own("queue"), "value_template": state})
        return {
            "availability": available,
            "availability_mode": "all",
            "name": name,
            "icon": f"mdi:{icon}",
            "command_topic": f"{topics.prefix}/request/{command}",
            "payload_press": json.dumps({**fields, "consumer": topics.consumer}),
        }

    return {
        "cancel": button("Cancel current job", "cancel", "cancel", when="value_json.job_id", job_id="current"),
        "cancel_all": button(
            "Cancel all jobs", "playlist-remove", "cancel_all", when="value_json.job_id or value_json.queued"
        ),
        "retry_last": button("Retry last failure", "replay", "retry_last", when="value_json.retryable"),
    }


def _only_online(topics: Topics) -> dict[str, Any]:
    return {"availability": [{"topic": topics.own("state"), "value_template": "{{ value_json.state }}"}]}
