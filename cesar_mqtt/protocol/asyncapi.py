"""The contract as an AsyncAPI 3.0 document, seen from the consumer: it receives requests and sends all else.

Payloads come from `schemas`, examples from `examples`. Pure; any thread may call it.
"""

from typing import Any

from cesar_mqtt import __version__
from cesar_mqtt.config import Settings
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.protocol.channels import CHANNELS, JSON, MESSAGES, Channel, Message
from cesar_mqtt.protocol.commands import COMMANDS, CURRENT, JobCommand
from cesar_mqtt.protocol.consumer_payloads import ConsumerState
from cesar_mqtt.protocol.examples import examples
from cesar_mqtt.protocol.formats import FORMATS
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest
from cesar_mqtt.protocol.schema import Schema, payload_schemas
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN, Topics

Document = dict[str, Any]

_BINDING = "0.2.0"
_SESSION_NEVER_EXPIRES = 0xFFFFFFFF
_PROTOCOLS = {"mqtt": "mqtt", "mqtts": "secure-mqtt", "ws": "ws", "wss": "wss", "embedded": "mqtt"}
_DESCRIPTION = """\
A durable, offline transcription worker on MQTT: publish audio, subscribe to the transcript.

Publish a request at QoS 1: it is acknowledged once its job is on disk. The retained status of the job tells the rest.
All JSON is UTF-8, times are RFC 3339 in UTC with a `Z`, durations are seconds. Messages of the consumer may get further
fields, and its enumerations further values: ignore what you do not know.

`send` and `receive` are meant as by the consumer: a producer publishes what is received here."""


def document(settings: Settings) -> Document:
    """Return the document of a consumer with these settings: its prefix, its name, its broker.

    Raises:
        ConfigError: the broker's URL is wrong.
    """
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "cesar-mqtt",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT"},
        },
        "defaultContentType": JSON,
        "servers": {"broker": _server(settings)},
        "channels": {name: _channel(channel) for name, channel in CHANNELS.items()},
        "operations": _operations(),
        "components": {
            "parameters": _parameters(settings),
            "messages": _told_messages(),
            "schemas": {
                **payload_schemas("#/components/schemas/{model}"),
                "JobProperties": _user_properties(frozenset()),
                "AudioProperties": _user_properties(frozenset(AUDIO_FIELDS)),
            },
        },
    }


def _server(settings: Settings) -> Document:
    address = parse_broker_url(settings.broker.url)
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    host = f"[{address.host}]" if ":" in address.host else address.host
    version = "5" if settings.broker.protocol == "auto" else settings.broker.protocol
    return {
        "host": f"{host}:{address.port}",
        **({"pathname": address.path.partition("?")[0]} if address.websockets else {}),
        "protocol": _PROTOCOLS[address.scheme],
        "protocolVersion": "3.1.1" if address.scheme == "embedded" else version,
        "description": "The broker, and how the consumer connects to it. MQTT 3.1.1 will do for all but user "
        "properties, Response Topics and Message Expiry.",
        "bindings": {
            "mqtt": {
                "clientId": settings.consumer.name,
                "cleanSession": False,
                "keepAlive": settings.broker.keepalive,
                "sessionExpiryInterval": _SESSION_NEVER_EXPIRES,
                "lastWill": {
                    "topic": topics.own("state"),
                    "qos": 1,
                    "retain": True,
                    "message": ConsumerState(state="offline").encode().decode(),
                },
                "bindingVersion": _BINDING,
            }
        },
    }


def _parameters(settings: Settings) -> Document:
    return {
        "prefix": {
            "description": "What all topics begin with: one level or more (`topic_prefix`).",
            "default": settings.topic_prefix,
        },
        "consumer": {
            "description": "The name of a consumer, which is also its MQTT client id (`consumer.name`).",
            "default": settings.consumer.name,
        },
        "job_id": {
            "description": f"The id of a job, as `{JOB_ID_PATTERN}`; `{CURRENT}` is none.",
            "examples": ["porch-17"],
        },
        "format": {"description": "The format of a result.", "enum": list(FORMATS)},
        "command": {
            "description": "What is asked for. Anything else gets a failure, and is refused as `unknown_command`.",
            "examples": list(COMMANDS),
        },
    }


def _channel(channel: Channel) -> Document:
    names = [part[1:-1] for part in (channel.address or "").split("/") if part.startswith("{")]
    return {
        "address": channel.address,
        "title": channel.title,
        "description": channel.description,
        "servers": [{"$ref": "#/servers/broker"}],
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in channel.messages},
        **({"parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names}} if names else {}),
    }


def _operations() -> Document:
    told = {
        channel.operation: _operation(name, channel, channel.messages, channel.title)
        for name, channel in CHANNELS.items()
        if name != "requests"
    }
    for name in ("jobs", "audio"):
        told[CHANNELS[name].operation]["reply"] = {
            "address": {
                "location": "$message.header#/responseTopic",
                "description": "The Response Topic of MQTT 5; without one there is no answer.",
            },
            "channel": {"$ref": "#/channels/answers"},
            "messages": _references("answers", ("accepted", "rejection")),
        }
    for command in COMMANDS:
        short = "named" if issubclass(COMMANDS[command], JobCommand) else "nothing"
        taken = (f"{command}Request", short)
        told[command] = _operation("requests", CHANNELS["requests"], taken, _COMMANDS[command])
        told[command]["reply"] = {
            "channel": {"$ref": "#/channels/responses"},
            "messages": _references("responses", (f"{command}Response",)),
        }
    return told


_COMMANDS = {
    "cancel": "End a job: a queued one at once, one in work at its next segment.",
    "retry": "Put a job that ended in an error, or was cancelled, into the queue again.",
    "delete": "Forget a job, with its results and its audio.",
    "get": "Tell the status of a job.",
    "result": "Send a piece of a result.",
    "list": "Tell which jobs there are.",
    "pause": "Start no further job; jobs are still accepted. Kept over restarts.",
    "resume": "Start jobs again.",
    "health": "Tell how the consumer is.",
    "models": "Tell which models there are.",
}


def _operation(name: str, channel: Channel, messages: tuple[str, ...], summary: str) -> Document:
    expiry = {"type": "integer", "minimum": 0, "description": "The same as `expires_in`, in whole seconds."}
    return {
        "action": channel.action,
        "channel": {"$ref": f"#/channels/{name}"},
        "summary": summary,
        "messages": _references(name, messages),
        "bindings": {
            "mqtt": {
                "qos": 1,
                "retain": channel.retain,
                **({"messageExpiryInterval": expiry} if name in {"jobs", "audio"} else {}),
                "bindingVersion": _BINDING,
            }
        },
    }


def _references(channel: str, messages: tuple[str, ...]) -> list[Document]:
    return [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in messages]


def _told_messages() -> Document:
    shown = examples()
    return {name: _message(name, message, shown.get(name, [])) for name, message in MESSAGES.items()}


def _message(name: str, message: Message, shown: list[Any]) -> Document:
    payload = message.payload
    if isinstance(payload, str):
        payload = {"$ref": f"#/components/schemas/{payload}"}
    told: Document = {"name": name, "title": message.title, "contentType": message.content_type}
    if message.headers is not None:
        told["headers"] = {"$ref": f"#/components/schemas/{message.headers}"}
    if payload is not None:
        told["payload"] = {**payload}
    if message.transaction:
        told["correlationId"] = {"location": "$message.payload#/transaction"}
    if shown:
        told["examples"] = [{"payload": value} for value in shown]
    if message.asks or message.answers:
        told["bindings"] = {"mqtt": _message_binding(message)}
    return told


def _message_binding(message: Message) -> Document:
    which = "Comes back with the answer." if message.asks else "That of the request, on its Response Topic."
    topic = {"responseTopic": {"type": "string", "description": "Where an answer is wanted."}} if message.asks else {}
    return {"correlationData": {"type": "string", "description": which}, **topic, "bindingVersion": _BINDING}


def _user_properties(without: frozenset[str]) -> Schema:
    names = [name for name in JobRequest.model_fields if name not in without]
    return {
        "title": "User properties",
        "description": "MQTT 5 user properties named like a field of a job request set that field. What is not text is "
        "written as JSON, true and false in any case, formats also as names with commas between them. "
        "Others go into the metadata.",
        "type": "object",
        "properties": {name: {"type": "string", "description": f"Sets `{name}`."} for name in names},
        "additionalProperties": {"type": "string"},
    }
