"""The contract as an AsyncAPI 3.0 document, from the consumer's side: it receives requests and sends everything else.

Payloads come from `schema`, examples from `examples`. Pure; any thread may call it.
"""

from typing import Any, Protocol

from cesar_mqtt import __version__
from cesar_mqtt.config import Settings
from cesar_mqtt.protocol.channels import CHANNELS, JSON, MESSAGES, Channel, Message
from cesar_mqtt.protocol.commands import COMMANDS, CURRENT, JobCommand
from cesar_mqtt.protocol.consumer_payloads import ConsumerState
from cesar_mqtt.protocol.examples import examples
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest
from cesar_mqtt.protocol.schema import Schema, message_name, payload_schemas
from cesar_mqtt.protocol.topics import JOB_ID_PATTERN, Topics

Document = dict[str, Any]

_BINDING = "0.2.0"
_SESSION_NEVER_EXPIRES = 0xFFFFFFFF
_PROTOCOLS = {"mqtt": "mqtt", "mqtts": "secure-mqtt", "ws": "ws", "wss": "wss", "embedded": "mqtt"}
_DESCRIPTION = """\
A durable, offline transcription worker on MQTT: publish audio, subscribe to the transcript.

Publish a request at QoS 1: it is acknowledged once its job is on disk. Then follow the retained status of the job.
All JSON is UTF-8, times are RFC 3339 in UTC with a `Z`, durations are seconds. Messages of the consumer may get further
fields, and its enumerations further values: ignore what you do not know.

`send` and `receive` are from the consumer's side: a producer publishes what is received here."""


class BrokerAddress(Protocol):
    """What the document names of the broker."""

    @property
    def scheme(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def path(self) -> str:
        """For WebSockets; may end with a query."""
        ...

    @property
    def websockets(self) -> bool: ...


def document(settings: Settings, broker: BrokerAddress) -> Document:
    """Return the document of a consumer with these settings: its prefix, its name, its broker."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "cesar-mqtt",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT"},
        },
        "defaultContentType": JSON,
        "servers": {"broker": _server(settings, broker)},
        "channels": {name: _channel(channel) for name, channel in CHANNELS.items()},
        "operations": _operations(),
        "components": {
            "parameters": _parameters(settings),
            "messages": _messages(),
            "schemas": {
                **payload_schemas("#/components/schemas/{model}"),
                "JobProperties": _user_properties(frozenset()),
                "AudioProperties": _user_properties(frozenset(AUDIO_FIELDS)),
            },
        },
    }


def _server(settings: Settings, address: BrokerAddress) -> Document:
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    host = f"[{address.host}]" if ":" in address.host else address.host
    version = "5" if settings.broker.protocol == "auto" else settings.broker.protocol
    return {
        "host": f"{host}:{address.port}",
        **({"pathname": address.path.partition("?")[0]} if address.websockets else {}),
        "protocol": _PROTOCOLS[address.scheme],
        "protocolVersion": "3.1.1" if address.scheme == "embedded" else version,
        "description": "The broker, and how the consumer connects to it. MQTT 3.1.1 is enough for all but user "
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
            "description": "The prefix of all topics: one level or more (`topic_prefix`).",
            "default": settings.topic_prefix,
        },
        "consumer": {
            "description": "The name of a consumer, which is also its MQTT client id (`consumer.name`).",
            "default": settings.consumer.name,
        },
        "job_id": {
            "description": f"The id of a job, `{JOB_ID_PATTERN}`; not `{CURRENT}`.",
            "examples": ["porch-17"],
        },
        "format": {"description": "The format of a result.", "enum": list(FORMATS)},
        "command": {
            "description": "The command. Any other gets a failure, and is rejected as `unknown_command`.",
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
    operations = {
        channel.operation: _operation(name, channel, channel.messages, channel.title)
        for name, channel in CHANNELS.items()
        if name != "requests"
    }
    for name in ("jobs", "audio"):
        operations[CHANNELS[name].operation]["reply"] = {
            "address": {
                "location": "$message.header#/responseTopic",
                "description": "The Response Topic of MQTT 5; without one that is allowed there is no answer.",
            },
            "channel": {"$ref": "#/channels/answers"},
            "messages": _references("answers", ("accepted", "rejection")),
        }
    for command, kind in COMMANDS.items():
        short = "named" if issubclass(kind.request, JobCommand) else "nothing"
        operations[command] = _operation(
            "requests", CHANNELS["requests"], (message_name(command, "Request"), short), kind.summary
        )
        operations[command]["reply"] = {
            "channel": {"$ref": "#/channels/responses"},
            "messages": _references("responses", (message_name(command, "Response"),)),
        }
    return operations


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


def _messages() -> Document:
    shown = examples()
    return {name: _message(name, message, shown.get(name, [])) for name, message in MESSAGES.items()}


def _message(name: str, message: Message, payloads: list[Any]) -> Document:
    payload = message.payload
    if isinstance(payload, str):
        payload = {"$ref": f"#/components/schemas/{payload}"}
    document: Document = {"name": name, "title": message.title, "contentType": message.content_type}
    if message.headers is not None:
        document["headers"] = {"$ref": f"#/components/schemas/{message.headers}"}
    if payload is not None:
        document["payload"] = payload
    if message.transaction:
        document["correlationId"] = {"location": "$message.payload#/transaction"}
    if payloads:
        document["examples"] = [{"payload": payload} for payload in payloads]
    if message.is_request or message.is_response:
        document["bindings"] = {"mqtt": _message_binding(message)}
    return document


def _message_binding(message: Message) -> Document:
    returned = "Returned with the answer." if message.is_request else "That of the request, on its Response Topic."
    topic = {"type": "string", "description": "The topic for an answer."}
    return {
        "correlationData": {"type": "string", "description": returned},
        **({"responseTopic": topic} if message.is_request else {}),
        "bindingVersion": _BINDING,
    }


def _user_properties(without: frozenset[str]) -> Schema:
    names = [name for name in JobRequest.model_fields if name not in without]
    return {
        "title": "User properties",
        "description": "MQTT 5 user properties named like a field of a job request set that field. What is not text is "
        "written as JSON, true and false in any case, formats also as names with commas between them. "
        "Others are added to the metadata.",
        "type": "object",
        "properties": {name: {"type": "string", "description": f"Sets `{name}`."} for name in names},
        "additionalProperties": {"type": "string"},
    }
