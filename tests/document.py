"""The AsyncAPI document, checked by itself and against every message on the bus."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match
from paho.mqtt.client import MQTTMessage

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.protocol.asyncapi import document
from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.parsing import Accepted, parse_command, parse_submission

OFFICIAL = Path(__file__).parent / "data" / "asyncapi-3.0.0.json"

_EXPRESSION = re.compile(r"\{([^{}]*)\}")


@functools.cache
def default_document() -> dict[str, Any]:
    """The document of a consumer with all defaults; copy it before a change."""
    settings = Settings(broker=BrokerSettings(url="mqtt://127.0.0.1:1883"))
    return document(settings, parse_broker_url(settings.broker.url))


def resolve(contract: Mapping[str, Any], pointer: str) -> Any:
    """What a local reference points to. Raises KeyError."""
    value: Any = contract
    for part in pointer.removeprefix("#/").split("/"):
        value = value[part.replace("~1", "/").replace("~0", "~")]
    return value


# -- of itself -----------------------------------------------------------------------------------------------------


def faults(contract: Mapping[str, Any]) -> list[str]:
    """What is wrong with a document that the official schema does not find."""
    dangling = sorted({*_dangling(contract)})
    return dangling or [*_parameters(contract), *_not_of_the_channel(contract), *_examples(contract)]


def _dangling(contract: Mapping[str, Any]) -> Iterator[str]:
    for reference in _references(contract):
        try:
            resolve(contract, reference)
        except (KeyError, TypeError):
            yield f"{reference} leads nowhere"


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _references(inner)


def _parameters(contract: Mapping[str, Any]) -> Iterator[str]:
    for name, channel in contract["channels"].items():
        used, declared = set(_EXPRESSION.findall(channel["address"] or "")), set(channel.get("parameters", {}))
        if used != declared:
            yield f"channel {name} has {sorted(used)} in its address and declares {sorted(declared)}"


def _not_of_the_channel(contract: Mapping[str, Any]) -> Iterator[str]:
    """Each operation refers to messages of its own channel, and each message of a channel is referred to."""
    referred = set()
    for name, operation in contract["operations"].items():
        for part in (operation, operation.get("reply")):
            for message in part["messages"] if part else ():
                referred.add(message["$ref"])
                if not message["$ref"].startswith(part["channel"]["$ref"] + "/messages/"):
                    yield f"operation {name} refers to {message['$ref']}, which is of another channel"
    for name, channel in contract["channels"].items():
        for message in channel["messages"]:
            if f"#/channels/{name}/messages/{message}" not in referred:
                yield f"no operation refers to message {message} of channel {name}"


def _examples(contract: Mapping[str, Any]) -> Iterator[str]:
    for name, message in contract["components"]["messages"].items():
        if "payload" not in message:
            continue
        judge = _judge(contract, message["payload"])
        if not message.get("examples"):
            yield f"message {name} has no example"
        for number, example in enumerate(message.get("examples", ())):
            error = best_match(judge.iter_errors(example["payload"]))
            if error is not None:
                yield f"example {number} of {name}: {error.json_path}: {error.message}"


def _judge(contract: Mapping[str, Any], payload: Mapping[str, Any]) -> Draft7Validator:
    """A validator that also refuses fields that the document does not name."""
    return Draft7Validator({"allOf": [_closed(payload)], "components": {"schemas": _closed_schemas(contract)}})


def _closed_schemas(contract: Mapping[str, Any]) -> Any:
    return _closed(contract["components"]["schemas"])


def _closed(value: Any) -> Any:
    if isinstance(value, list):
        return [_closed(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    closed = {key: _closed(inner) for key, inner in value.items()}
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


# -- of messages ---------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Which message of which channel of the document it was."""

    channel: str
    message: str


class Fault(NamedTuple):
    """Why a message is not as the document says."""

    topic: str
    why: str


class Judge:
    """Finds the message of the document that a message on the bus is, or why it is none."""

    def __init__(self, contract: Mapping[str, Any], *, marks: tuple[str, ...] = ()) -> None:
        """Compile all that is needed for many messages; topics that begin with one of `marks` are not judged."""
        self._contract = contract
        self._marks = marks
        self._prefix = contract["components"]["parameters"]["prefix"]["default"]
        self._channels = {
            name: re.compile(_pattern(channel["address"], self._prefix))
            for name, channel in contract["channels"].items()
            if channel["address"] is not None
        }
        self._senders = {
            operation["channel"]["$ref"].rpartition("/")[2]: operation
            for operation in contract["operations"].values()
            if operation["action"] == "send"
        }
        closed = {"components": {"schemas": _closed_schemas(contract)}}
        self._judges = {
            name: Draft7Validator({"allOf": [_closed(message["payload"])], **closed})
            for name, message in contract["components"]["messages"].items()
            if "payload" in message
        }

    def judge(self, message: MQTTMessage) -> Seen | Fault | None:
        """None: the document does not cover the message, or its producer made it invalid on purpose."""
        topic = message.topic
        if not topic.startswith(f"{self._prefix}/") or topic.startswith(self._marks):
            return None
        for name, pattern in self._channels.items():
            found = pattern.fullmatch(topic)
            if found is None:
                continue
            sender = self._senders.get(name)
            if sender is None and not _is_taken(name, found.groupdict(), bytes(message.payload)):
                return None
            binding = {} if sender is None else sender["bindings"]["mqtt"]
            if message.retain and binding.get("retain") is False:
                return Fault(topic, "is retained, the document says that it is not")
            if binding.get("qos", message.qos) != message.qos:
                return Fault(topic, f"came at QoS {message.qos}, and the document says {binding['qos']}")
            return self.judge_payload(name, bytes(message.payload), topic=topic, parameters=found.groupdict())
        return (
            None
            if re.match(f"{self._prefix}/(jobs|audio|request|replies)(/|$)", topic)
            else Fault(topic, "is no channel")
        )

    def judge_payload(
        self, channel: str, payload: bytes, *, topic: str, parameters: Mapping[str, str] | None = None
    ) -> Seen | Fault:
        """Find the message of a channel that a payload is."""
        whys = []
        for name in self._candidates(channel, parameters or {}):
            why = self._why_not(name, payload)
            if why is None:
                return Seen(channel if name in self._contract["channels"][channel]["messages"] else "answers", name)
            whys.append(why)
        return Fault(topic, "; ".join(whys))

    def _candidates(self, channel: str, parameters: Mapping[str, str]) -> list[str]:
        """The messages that may be on a topic: a command's own, a format's own, else all of the channel."""
        messages = list(self._contract["channels"][channel]["messages"])
        operation = self._contract["operations"].get(parameters.get("command", ""))
        if operation is not None:
            part = operation if channel == "requests" else operation["reply"]
            messages = [reference["$ref"].rpartition("/")[2] for reference in part["messages"]]
        elif "command" in parameters:  # a request may name a response topic there that is no command's
            messages = ["failure", "accepted", "rejection"]
        if "format" in parameters:
            messages = [name for name in messages if name in {f"{parameters['format']}Result", "cleared"}]
        return messages

    def _why_not(self, name: str, payload: bytes) -> str | None:
        message = self._contract["components"]["messages"][name]
        judge = self._judges.get(name)
        if judge is None:  # any bytes at all
            return None
        try:
            value = json.loads(payload) if message["contentType"] == "application/json" else payload.decode()
        except ValueError as exc:
            return f"{name}: {exc}"
        error = best_match(judge.iter_errors(value))
        if error is None:
            return None
        path = "/".join(str(part) for part in error.absolute_schema_path)
        return f"{name}: {error.json_path}: {error.message} (schema: {path})"


def _pattern(address: str, prefix: str) -> str:
    levels = _EXPRESSION.sub(lambda found: f"(?P<{found[1]}>[^/]+)", address)
    return levels.replace("(?P<prefix>[^/]+)", re.escape(prefix))


def _is_taken(channel: str, parameters: Mapping[str, str], payload: bytes) -> bool:
    """Whether the consumer takes what is published for it; what it refuses need not be as the document says."""
    if channel == "jobs":
        return isinstance(parse_submission(payload), Accepted)
    if channel == "requests":
        command = parameters["command"]
        return command in COMMANDS and parse_command(command, payload).command is not None
    return bool(payload)
