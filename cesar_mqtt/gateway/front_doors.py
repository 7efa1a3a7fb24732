"""The front doors that `serve` opens beside its consumer, and what it needs to know of each."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cesar_mqtt.config import BrokerSettings, Settings, WyomingSettings
from cesar_mqtt.errors import BrokerRefusedError, ConfigError, lacks
from cesar_mqtt.protocol.consumer_payloads import WebhookHealth
from cesar_mqtt.protocol.topics import Topics

_USER_INFO = re.compile(r"(?<=://)[^/]*@")


class FrontDoor(Protocol):
    """A client of the bus with threads of its own."""

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""

    @property
    def refusal(self) -> BrokerRefusedError | None:
        """Why the broker refused its connection, for good; None: it did not."""

    def start(self) -> None:
        """Connect and begin."""

    def close(self) -> None:
        """End; what is not finished goes on at the next start. May be called twice, and before `start`."""


def create_front_doors(settings: Settings, broker: BrokerSettings, topics: Topics) -> list[tuple[str, FrontDoor]]:
    """Return the front doors that the settings ask for, by name; none of them has started.

    Args:
        settings: all of them.
        broker: how the consumer reaches the broker.
        topics: the consumer's.

    Raises:
        ConfigError: a setting is wrong, or an extra is not installed.
        LedgerError: the records of one cannot be used.
    """
    broker = gateway_broker(settings, broker)
    found: list[tuple[str, FrontDoor]] = []
    if settings.inbox.directories:
        from cesar_mqtt.gateway.inbox import Inbox  # noqa: PLC0415 - only where it is wanted

        found.append(
            (
                "inbox",
                Inbox(settings.inbox, settings.output, broker, topics, data_dir=settings.data_dir, by_path=True),
            )
        )
    if settings.output.directory is not None:
        from cesar_mqtt.gateway.transcript_writer import TranscriptWriter  # noqa: PLC0415 - only where it is wanted

        has_inbox = bool(settings.inbox.directories)
        writer = TranscriptWriter(settings.output, broker, topics, data_dir=settings.data_dir, has_inbox=has_inbox)
        found.append(("transcript-writer", writer))
    if settings.wyoming.listen is not None:
        found.append(("wyoming", create_wyoming(settings.wyoming, broker, topics)))
    if settings.webhook.url is not None:
        from cesar_mqtt.gateway.webhook import Webhook  # noqa: PLC0415 - only where it is wanted

        hosts = settings.webhook.allowed_hosts
        allowed_hosts = settings.audio.allowed_hosts if hosts is None else hosts
        webhook = Webhook(settings.webhook, broker, topics, allowed_hosts=allowed_hosts, data_dir=settings.data_dir)
        found.append(("webhook", webhook))
    return found


def webhook_health(front_doors: Sequence[tuple[str, FrontDoor]]) -> WebhookHealth | None:
    """Return what becomes of the webhook's requests; None: there is no webhook."""
    from cesar_mqtt.gateway.webhook import Webhook  # noqa: PLC0415 - only where it is wanted

    return next((door.health() for _, door in front_doors if isinstance(door, Webhook)), None)


def create_wyoming(settings: WyomingSettings, broker: BrokerSettings, topics: Topics) -> FrontDoor:
    """Return a Wyoming server, its port open. Raises ConfigError, also where the extra is not installed."""
    try:
        from cesar_mqtt.gateway.wyoming_server import WyomingServer  # noqa: PLC0415 - its libraries are an extra
    except ModuleNotFoundError as exc:
        if not lacks(exc, "wyoming", "zeroconf"):
            raise
        raise ConfigError(
            f"A Wyoming server is to run, but {exc.name} is not installed.",
            "Install it with pip install '.[wyoming]' in the clone of cesar-mqtt.",
        ) from exc
    return WyomingServer(settings, broker, topics)


def audio_directories(settings: Settings, *, default: Path) -> tuple[Path, ...]:
    """Return where the consumer of `serve` reads recordings: a watch folder is one of its directories, too."""
    return (*(settings.audio.directories or (default,)), *settings.inbox.directories)


def gateway_broker(settings: Settings, broker: BrokerSettings) -> BrokerSettings:
    """Return how the front doors reach the broker: as `gateway.username`, or as the consumer does."""
    user = settings.gateway
    if user.username is None:
        return broker
    url = _USER_INFO.sub("", broker.url)
    return broker.model_copy(update={"url": url, "username": user.username, "password_file": user.password_file})
