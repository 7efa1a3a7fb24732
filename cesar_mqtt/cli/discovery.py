"""The commands `discovery show` and `discovery remove`: a consumer's discovery messages for Home Assistant.

For the main thread; they use the broker, not the consumer.
"""

import json
import time
from collections.abc import Mapping

from cesar_mqtt import logs
from cesar_mqtt.cli.console import out, print_message
from cesar_mqtt.cli.session import NoAnswerError, Session
from cesar_mqtt.config import Settings
from cesar_mqtt.consumer import discovery as homeassistant
from cesar_mqtt.errors import CesarError, ExitCode
from cesar_mqtt.mqtt.messages import Subscription
from cesar_mqtt.protocol.topics import Topics

_TIMEOUT_S = 10.0
_POLL_S = 0.05
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
    filters = homeassistant.discovery_filters(topics.consumer, prefix=settings.homeassistant.prefix)
    wanted = [Subscription(name, wants_retained=True) for name in (*filters, topics.own("state"))]
    with Session(settings.broker, "discovery", wanted) as session:
        session.connect(_TIMEOUT_S)
        found = _find(session)
        announced = sorted(topic for topic in found if topic != topics.own("state"))
        _clear(session, announced)
    if as_json:
        out(json.dumps({"removed": announced}))
        return ExitCode.OK
    for topic in announced:
        out(f"removed {topic}")
    if not announced:
        name, prefix = settings.consumer.name, settings.homeassistant.prefix
        out(f"Nothing of the consumer {name!r} is announced below {prefix}/: there is nothing to remove.")
    elif b"online" in found.get(topics.own("state"), b""):
        print_message(
            f"The consumer {settings.consumer.name!r} is running, and announces itself again when it or Home Assistant "
            "connects the next time: set homeassistant.enabled to false, or stop it, and remove again."
        )
    return ExitCode.OK


def _find(session: Session) -> Mapping[str, bytes]:
    """Return the retained payloads by topic."""
    found: dict[str, bytes] = {}
    while deliveries := session.receive(_QUIET_S):
        found.update({delivery.topic: delivery.payload for delivery in deliveries if delivery.payload})
    return found


def _clear(session: Session, topics: list[str]) -> None:
    """Clear the retained messages of these topics. Raises CesarError."""
    tickets = {topic: session.publish(topic, b"", retain=True) for topic in topics}
    deadline = time.monotonic() + _TIMEOUT_S
    while missing := [topic for topic, ticket in tickets.items() if not session.is_published(ticket)]:
        if time.monotonic() >= deadline:
            raise NoAnswerError(f"The broker did not acknowledge the removal of {missing[0]}: try again.")
        session.receive(_POLL_S)
    for topic, ticket in tickets.items():
        if reason := session.refusal(ticket):
            raise CesarError(f"The broker refuses to remove {topic}: {reason}.")
