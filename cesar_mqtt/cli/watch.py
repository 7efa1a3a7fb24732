"""The command `watch`: jobs and consumers on a live screen, or as lines where stdout is no terminal.

For the main thread, which receives messages, draws and checks for signals in turn.
"""

import json
import time
from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.live import Live

from cesar_mqtt.cli.console import out, print_message
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.text import printable
from cesar_mqtt.cli.watch_model import MOST_JOBS, Board, ConsumerRow, JobRow
from cesar_mqtt.cli.watch_view import View, line_of
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.gateway.session import Session
from cesar_mqtt.monitoring.signals import StopSignals, handle_stop_signals
from cesar_mqtt.mqtt.messages import Delivery, Subscription

_CONNECT_S = 10.0
_POLL_S = 0.25
"""The shortest time between two drawings."""
_CLOCK_S = 1.0


def watch(settings: Settings, *, as_json: bool) -> ExitCode:
    """Show jobs and consumers until a stop signal; reconnects when the connection is lost.

    Raises:
        CesarError: as `Session.connect`.
    """
    quiet()
    console = Console()
    prefix = settings.topic_prefix
    topics = (f"{prefix}/consumer/+/state", f"{prefix}/consumer/+/queue", f"{prefix}/status/+")
    wanted = [Subscription(topic, wants_retained=True) for topic in topics]
    with handle_stop_signals() as stop, Session(settings.broker, "watch", wanted) as session:
        session.connect(_CONNECT_S)
        if as_json:
            _follow(session, stop, JsonLines())
        elif console.is_terminal:
            _draw(session, stop, Screen(prefix, session.address), console)
        else:
            _follow(session, stop, Lines(prefix))
    return ExitCode.OK


class Screen:
    """The board behind the live table."""

    def __init__(self, prefix: str, address: str) -> None:
        self.board = Board(prefix)
        self._title = f"{prefix} at {address}"
        self._connection = 0

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Update the board; the messages of a new connection replace everything."""
        for delivery in deliveries:
            if delivery.receipt.connection != self._connection:
                self._connection = delivery.receipt.connection
                self.board.clear()
            self.board.take(delivery.topic, delivery.payload)

    def view(self, trouble: str | None) -> View:
        return View(self.board, self._title, trouble, datetime.now().astimezone())


class Lines:
    """One line for each change; jobs that were final before the start are left out."""

    def __init__(self, prefix: str) -> None:
        self._board = Board(prefix)
        self._lines: dict[str, str] = {}

    def take(self, delivery: Delivery) -> None:
        row = self._board.take(delivery.topic, delivery.payload)
        if row is None:
            self._forget(delivery)
            return
        subject = f"consumer {row.name}" if isinstance(row, ConsumerRow) else _status_of(delivery.topic)
        line = line_of(row)
        known = self._lines.pop(subject, None)
        ended_before = delivery.retain and isinstance(row, JobRow) and row.is_final
        if line != known and not (known is None and ended_before):
            self._print(line)
        self._lines[subject] = line  # at the end: the least recently updated is dropped first
        if len(self._lines) > MOST_JOBS:
            del self._lines[next(iter(self._lines))]

    def _forget(self, delivery: Delivery) -> None:
        subject = _status_of(delivery.topic)
        if not delivery.payload and self._lines.pop(subject, None) is not None:
            self._print(f"{subject} deleted")

    def trouble(self, text: str | None) -> None:
        """Print that the connection was lost, or was restored (None)."""
        self._print("connected again" if text is None else f"no connection: {text}; reconnecting")

    def _print(self, line: str) -> None:
        out(f"{datetime.now().astimezone():%H:%M:%S} {line}", flush=True)


class JsonLines:
    """One JSON object a line for each message: its topic and payload, null if it was cleared."""

    def take(self, delivery: Delivery) -> None:
        """Print the message; a payload that is not JSON is ignored."""
        try:
            payload = json.loads(delivery.payload or b"null")
        except (ValueError, RecursionError):
            return
        out(json.dumps({"topic": delivery.topic, "payload": payload}, ensure_ascii=False), flush=True)

    def trouble(self, text: str | None) -> None:
        """Print on stderr that the connection was lost, or was restored (None)."""
        print_message("connected again" if text is None else f"no connection: {text}; reconnecting")


def _draw(session: Session, stop: StopSignals, screen: Screen, console: Console) -> None:
    drawn_at, changed = 0.0, True
    with Live(screen.view(None), console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_requested():
            now = time.monotonic()
            if now - drawn_at >= (_POLL_S if changed else _CLOCK_S):
                drawn_at, changed = now, False
                live.update(screen.view(session.trouble), refresh=True)
            deliveries = session.receive(_POLL_S)
            screen.take(deliveries)
            changed |= bool(deliveries)


def _follow(session: Session, stop: StopSignals, lines: Lines | JsonLines) -> None:
    trouble: str | None = None
    while not stop.is_requested():
        now = session.trouble
        if (now is None) != (trouble is None):
            lines.trouble(now)
        trouble = now
        for delivery in session.receive(_POLL_S):
            lines.take(delivery)


def _status_of(topic: str) -> str:
    return f"job {printable(topic.rpartition('/')[2])}"
