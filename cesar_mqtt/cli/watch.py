"""The command `watch`: jobs and consumers on a live screen, or as lines where stdout is no terminal.

For the main thread, which receives messages, draws and checks for signals in turn.
"""

import json
import os
import re
import select
import sys
import termios
import time
import tty
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from rich.console import Console
from rich.live import Live

from cesar_mqtt.cli.console import out, print_message
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.text import printable
from cesar_mqtt.cli.watch_model import MOST_JOBS, Board, ConsumerRow, JobRow, Rejection
from cesar_mqtt.cli.watch_view import View, line_of
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.gateway.session import SUBSCRIBE_S, RequestRefusedError, Session, response_data
from cesar_mqtt.monitoring.signals import StopSignals, handle_stop_signals
from cesar_mqtt.mqtt.messages import Delivery, Subscription

_CONNECT_S = 10.0
_POLL_S = 0.25
"""The shortest time between two drawings."""
_CLOCK_S = 1.0
_KEY_S = 0.1
"""How often keys are looked for."""
_KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_PAGE, _ALL = 10, MOST_JOBS
_STEPS = {
    "\x1b[A": -1,
    "\x1bOA": -1,
    "k": -1,
    "\x1b[B": 1,
    "\x1bOB": 1,
    "j": 1,
    "\x1b[5~": -_PAGE,
    "\x1b[6~": _PAGE,
    "\x1b[H": -_ALL,
    "g": -_ALL,
    "\x1b[F": _ALL,
    "G": _ALL,
}
"""By how many rows a key moves the selection; xterm's sequences."""
_COMMANDS = {"c": "cancel", "r": "retry"}


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
    wanted.append(Subscription(f"{prefix}/rejected"))
    if console.is_terminal and not as_json:
        wanted += [Subscription(f"{prefix}/response/{command}") for command in _COMMANDS.values()]
    with handle_stop_signals() as stop, Session(settings.broker, "watch", wanted) as session:
        session.connect(_CONNECT_S, subscribe_s=SUBSCRIBE_S)
        if as_json:
            _follow(session, stop, JsonLines())
        elif console.is_terminal:
            _draw(session, stop, Screen(prefix, session.address), console)
        else:
            _follow(session, stop, Lines(prefix))
    return ExitCode.OK


class Screen:
    """The board behind the live table, and which of its jobs the keys are for."""

    def __init__(self, prefix: str, address: str) -> None:
        self.board = Board(prefix)
        self._prefix = prefix
        self._title = f"{prefix} at {address}"
        self._connection = 0
        self._selected = 0
        self._message = ""
        self._transaction: str | None = None

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Update the board; the messages of a new connection replace everything."""
        for delivery in deliveries:
            if delivery.receipt.connection != self._connection:
                self._connection = delivery.receipt.connection
                self.board.clear()
            if delivery.topic.startswith(f"{self._prefix}/response/"):
                self._take_response(delivery.payload)
            else:
                self.board.take(delivery.topic, delivery.payload)

    def view(self, trouble: str | None, *, has_keys: bool = False) -> View:
        self._select(self._selected)
        selected = self._selected if has_keys else None
        now = datetime.now().astimezone()
        return View(self.board, self._title, trouble, now, selected=selected, message=self._message)

    def press(self, key: str) -> tuple[str, bytes] | None:
        """Select a job, or return the topic and the payload of a command for the selected one."""
        self._message = ""
        self._select(self._selected + _STEPS.get(key, 0))
        jobs = self.board.jobs(self._selected + 1)
        command = _COMMANDS.get(key)
        if command is None or len(jobs) <= self._selected:
            return None
        job = jobs[self._selected]
        self._transaction = uuid.uuid4().hex
        self._message = f"{command}: {job.name or job.job_id} ..."
        payload = {"job_id": job.job_id, "transaction": self._transaction}
        if job.consumer:
            payload["consumer"] = job.consumer
        return f"{self._prefix}/request/{command}", json.dumps(payload).encode()

    def _select(self, number: int) -> None:
        self._selected = max(0, min(number, sum(self.board.counts().values()) - 1))

    def report(self, message: str) -> None:
        """Show a message until the next key."""
        self._message = message

    def _take_response(self, payload: bytes) -> None:
        try:
            document = json.loads(payload)
        except (ValueError, RecursionError):
            return
        if not isinstance(document, dict) or document.get("transaction") != self._transaction:
            return
        try:
            data = response_data(document)
        except RequestRefusedError as exc:
            self._message = printable(str(exc))
        else:
            self._message = printable(f"Job {data.get('job_id')} is {data.get('status')}.")


class Lines:
    """One line for each change; jobs that were final before the start are left out."""

    def __init__(self, prefix: str) -> None:
        self._board = Board(prefix)
        self._lines: dict[str, str] = {}

    def take(self, delivery: Delivery) -> None:
        row = self._board.take(delivery.topic, delivery.payload)
        if isinstance(row, Rejection):
            self._print(line_of(row))
            return
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
    with (
        _keyboard() as keyboard,
        Live(screen.view(None), console=console, screen=True, auto_refresh=False) as live,
    ):
        while not stop.is_requested():
            pressed = _pressed(keyboard)
            if "q" in pressed:
                return
            for command in filter(None, map(screen.press, pressed)):
                if session.publish(*command) is None:
                    screen.report("There is no connection: nothing was asked.")
            now = time.monotonic()
            if pressed or now - drawn_at >= (_POLL_S if changed else _CLOCK_S):
                drawn_at, changed = now, False
                live.update(screen.view(session.trouble, has_keys=keyboard is not None), refresh=True)
            deliveries = session.receive(_POLL_S if keyboard is None else _KEY_S)
            screen.take(deliveries)
            changed |= bool(deliveries)


@contextmanager
def _keyboard() -> Iterator[int | None]:
    """Have the terminal pass on each key at once, without showing it; None: stdin is no terminal."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield None
        return
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _pressed(keyboard: int | None) -> list[str]:
    """Return the keys that were pressed, an arrow as its sequence."""
    if keyboard is None or not select.select([keyboard], [], [], 0)[0]:
        return []
    return _KEY.findall(os.read(keyboard, 1024).decode(errors="replace"))


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
