"""The command `watch`: follows jobs and consumers on a live screen, or as lines where stdout is no terminal.

For the main thread, which takes messages, draws and looks for signals in turn.
"""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Self

from rich.console import Console
from rich.live import Live

from cesar_mqtt.cli.console import out, say
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.session import ephemeral_client, reach
from cesar_mqtt.cli.text import printable
from cesar_mqtt.cli.watch_model import MOST_JOBS, Board, ConsumerRow, JobRow
from cesar_mqtt.cli.watch_view import View, line_of
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.monitoring.signals import StopSignals, handle_stop_signals
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.mqtt.messages import Delivery, Subscription

_CONNECT_S = 10.0
_LOOK_S = 0.25
"""A screen is drawn so often at most."""
_CLOCK_S = 1.0


def watch(settings: Settings, *, as_json: bool) -> ExitCode:
    """Show what happens until a signal says that it is enough; a connection that is lost comes back by itself.

    Raises:
        CesarError: as `reach`.
    """
    quiet()
    console = Console()
    with handle_stop_signals() as stop, Feed(settings) as feed:
        if as_json:
            _follow(feed, stop, JsonLines())
        elif console.is_terminal:
            _draw(feed, stop, console)
        else:
            _follow(feed, stop, Lines(settings.topic_prefix))
    return ExitCode.OK


class Feed:
    """The messages of jobs and consumers, those that are retained first, at each connection anew."""

    def __init__(self, settings: Settings) -> None:
        """Wire it; entering connects. Raises ConfigError."""
        prefix = settings.topic_prefix
        self.prefix = prefix
        self.address = parse_broker_url(settings.broker.url).redacted
        topics = (f"{prefix}/consumer/+/state", f"{prefix}/consumer/+/queue", f"{prefix}/status/+")
        wanted = [Subscription(topic, wants_retained=True) for topic in topics]
        self._client = ephemeral_client(settings.broker, "watch", wanted)

    def __enter__(self) -> Self:
        reach(self._client, self.address, _CONNECT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def trouble(self) -> str | None:
        """Why nothing comes; None: there is a connection."""
        if self._client.connected:
            return None
        failure = self._client.failure
        return failure.problem if failure else "the connection was lost"

    def take(self, timeout_s: float) -> list[Delivery]:
        """Wait for messages."""
        deliveries = self._client.receive(timeout_s)
        self._client.acknowledge(deliveries)
        return deliveries


class Screen:
    """The board behind the live table."""

    def __init__(self, prefix: str, address: str) -> None:
        """Start empty."""
        self.board = Board(prefix)
        self._title = f"{prefix} at {address}"
        self._connection = 0

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Learn; what comes by a new connection replaces all that was known."""
        for delivery in deliveries:
            if delivery.receipt.connection != self._connection:
                self._connection = delivery.receipt.connection
                self.board.clear()
            self.board.take(delivery.topic, delivery.payload)

    def view(self, trouble: str | None) -> View:
        """Return what to draw."""
        return View(self.board, self._title, trouble, datetime.now().astimezone())


class Lines:
    """A line for each change; of what had ended before nothing is said."""

    def __init__(self, prefix: str) -> None:
        """Start."""
        self._board = Board(prefix)
        self._said: dict[str, str] = {}

    def take(self, delivery: Delivery) -> None:
        """Print what is new."""
        row = self._board.take(delivery.topic, delivery.payload)
        if row is None:
            self._forget(delivery)
            return
        subject = f"consumer {row.name}" if isinstance(row, ConsumerRow) else _status_of(delivery.topic)
        line = line_of(row)
        known = self._said.pop(subject, None)
        ended_before = delivery.retain and isinstance(row, JobRow) and row.is_final
        if line != known and not (known is None and ended_before):
            self._say(line)
        self._said[subject] = line  # at the end: the one that was heard of longest ago goes first
        if len(self._said) > MOST_JOBS:
            del self._said[next(iter(self._said))]

    def _forget(self, delivery: Delivery) -> None:
        subject = _status_of(delivery.topic)
        if not delivery.payload and self._said.pop(subject, None) is not None:
            self._say(f"{subject} deleted")

    def trouble(self, text: str | None) -> None:
        """Print that the connection was lost, or is back."""
        self._say("connected again" if text is None else f"no connection: {text}; trying again")

    def _say(self, line: str) -> None:
        out(f"{datetime.now().astimezone():%H:%M:%S} {line}", flush=True)


class JsonLines:
    """An object a line for each message: its topic, and its payload, which is null when it was cleared."""

    def take(self, delivery: Delivery) -> None:
        """Print it; what is not JSON does not belong there and is passed over."""
        try:
            payload = json.loads(delivery.payload or b"null")
        except (ValueError, RecursionError):
            return
        out(json.dumps({"topic": delivery.topic, "payload": payload}, ensure_ascii=False), flush=True)

    def trouble(self, text: str | None) -> None:
        """Tell on stderr that the connection was lost, or is back."""
        told = "connected again" if text is None else f"no connection: {text}; trying again"
        say(told)


def _draw(feed: Feed, stop: StopSignals, console: Console) -> None:
    screen = Screen(feed.prefix, feed.address)
    drawn_at, changed = 0.0, True
    with Live(screen.view(None), console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_requested():
            now = time.monotonic()
            if now - drawn_at >= (_LOOK_S if changed else _CLOCK_S):
                drawn_at, changed = now, False
                live.update(screen.view(feed.trouble), refresh=True)
            deliveries = feed.take(_LOOK_S)
            screen.take(deliveries)
            changed |= bool(deliveries)


def _follow(feed: Feed, stop: StopSignals, lines: Lines | JsonLines) -> None:
    trouble: str | None = None
    while not stop.is_requested():
        now = feed.trouble
        if (now is None) != (trouble is None):
            lines.trouble(now)
        trouble = now
        for delivery in feed.take(_LOOK_S):
            lines.take(delivery)


def _status_of(topic: str) -> str:
    return f"job {printable(topic.rpartition('/')[2])}"
