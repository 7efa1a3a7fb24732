"""The commands `discovery show` and `discovery remove`: a consumer's discovery messages for Home Assistant.

For the main thread; they use the broker, not the consumer.
"""

import json
import time
from collections.abc import Mapping
from typing import Self

from cesar_mqtt import logs
from cesar_mqtt.cli.console import out, say
from cesar_mqtt.cli.session import NoAnswerError, ephemeral_client, reach
from cesar_mqtt.config import Settings
from cesar_mqtt.consumer import discovery as homeassistant
from cesar_mqtt.errors import CesarError, ExitCode
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.mqtt.messages import PublishTicket, Subscription
from cesar_mqtt.protocol.topics import Topics

_TIMEOUT_S = 10.0
_LOOK_S = 0.05
_QUIET_S = 1.0
"""Retained messages follow the subscription at once: after this long without one, all have arrived."""


def show(settings: Settings) -> ExitCode:
    """Print the discovery messages of these settings: a JSON object with a message for each topic."""
    wanted = settings.homeassistant
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    messages = homeassistant.discovery_messages(topics, mode=wanted.discovery, prefix=wanted.prefix)
    out(json.dumps({topic: json.loads(payload) for topic, payload in messages.items()}, indent=2, ensure_ascii=False))
    return ExitCode.OK


def remove(settings: Settings, *, as_json: bool) -> ExitCode:
    """Clear every discovery message of the consumer, of either mode, and print their topics.

    Raises:
        CesarError: no broker answered, or it refused to clear one.
    """
    logs.configure(settings.log.format, "error")  # the command prints sentences of its own
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    with _Retained(settings, topics) as broker:
        found = broker.find()
        announced = sorted(topic for topic in found if topic != topics.own("state"))
        broker.clear(announced)
    if as_json:
        out(json.dumps({"removed": announced}))
        return ExitCode.OK
    for topic in announced:
        out(f"removed {topic}")
    if not announced:
        name, prefix = settings.consumer.name, settings.homeassistant.prefix
        out(f"Nothing of the consumer {name!r} is announced below {prefix}/: there is nothing to remove.")
    elif b"online" in found.get(topics.own("state"), b""):
        say(
            f"The consumer {settings.consumer.name!r} is running, and announces itself again when it or Home Assistant "
            "connects the next time: set homeassistant.enabled to false, or stop it, and remove again."
        )
    return ExitCode.OK


class _Retained:
    """A connection that reads and clears a consumer's retained discovery messages."""

    def __init__(self, settings: Settings, topics: Topics) -> None:
        filters = homeassistant.discovery_filters(topics.consumer, prefix=settings.homeassistant.prefix)
        self._address = parse_broker_url(settings.broker.url).redacted
        self._published: dict[PublishTicket, str | None] = {}
        wanted = [Subscription(name, wants_retained=True) for name in (*filters, topics.own("state"))]
        self._client = ephemeral_client(settings.broker, "discovery", wanted, on_published=self._published.__setitem__)

    def __enter__(self) -> Self:
        reach(self._client, self._address, _TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def find(self) -> Mapping[str, bytes]:
        """Return the retained payloads by topic."""
        found: dict[str, bytes] = {}
        while deliveries := self._client.receive(_QUIET_S):
            found.update({delivery.topic: delivery.payload for delivery in deliveries if delivery.payload})
            self._client.acknowledge(deliveries)
        return found

    def clear(self, topics: list[str]) -> None:
        """Clear the retained messages of these topics. Raises CesarError."""
        tickets = {topic: self._client.publish(topic, b"", qos=1, retain=True) for topic in topics}
        missing = dict(tickets)
        deadline = time.monotonic() + _TIMEOUT_S
        while missing:
            # Incoming messages, our own among them, are received first: an acknowledgement comes behind them.
            self._client.acknowledge(self._client.receive(_LOOK_S))
            missing = {topic: ticket for topic, ticket in missing.items() if ticket not in self._published}
            if missing and time.monotonic() >= deadline:
                raise NoAnswerError(f"The broker did not acknowledge the removal of {next(iter(missing))}: try again.")
        for topic, ticket in tickets.items():
            reason = None if ticket is None else self._published[ticket]
            if reason is not None:
                raise CesarError(f"The broker refuses to remove {topic}: {reason}.")
