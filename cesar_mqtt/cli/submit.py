"""The command `submit`: recordings out, their progress on stderr, transcripts on stdout or into files.

For the main thread. Each transcript is printed or written as soon as it is there.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cesar_mqtt.cli.console import out, print_message, write
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.producer import STDIN, UNSENT, Producer, Recording, new_job_id
from cesar_mqtt.cli.text import duration, listed, many, number, printable
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import CesarError, ExitCode
from cesar_mqtt.gateway.folder import scan
from cesar_mqtt.gateway.session import SUBSCRIBE_S
from cesar_mqtt.gateway.transcript_files import write_transcripts
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, ConnectionFailure
from cesar_mqtt.protocol.topics import Topics

_CONNECT_S = 10.0
_LOOK_S = 0.5
_OPEN = frozenset({"queued", "processing"})
_NOT_THERE = frozenset({"audio_not_found", "audio_not_allowed"})
_EXACT_POSITIONS = 10
"""Positions behind these are those at the status's last change (docs/topics.md)."""
_SPARE_LINES = 3
_BAR_CELLS = 20
_DRAW_S = 0.2
"""The shortest time between two drawings."""


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """The arguments of the command.

    Attributes:
        recordings: files and folders, `-` being stdin, or with `by_path` paths as the consumer is to look them up.
        by_path: whether only the paths are sent.
        job_id: the id of the only recording; None: one is made for each.
        fields: further fields of the request.
        formats: which results to print or write instead of the transcript; empty: the transcript.
        output_dir: where to write a file for each recording and format; None: print.
        wait: whether to wait for the ends.
        timeout_s: counts from the start; None: as long as it takes.
        as_json: whether to print statuses.
    """

    recordings: tuple[str, ...]
    by_path: bool
    job_id: str | None
    fields: Mapping[str, Any]
    formats: tuple[str, ...]
    output_dir: Path | None
    wait: bool
    timeout_s: float | None
    as_json: bool


def submit_and_wait(options: SubmitOptions, settings: Settings) -> ExitCode:
    """Send the recordings, wait until they are final unless told not to, and print or write their results.

    Raises:
        CesarError: no broker answers, it refuses, or no consumer takes jobs there.
    """
    quiet()
    deadline = None if options.timeout_s is None else time.monotonic() + options.timeout_s
    formats = options.formats or (("txt",) if options.output_dir else ())
    found, code = _search(options)
    if options.job_id is not None and len(found) > 1:
        raise CesarError(f"--job-id is for one recording, and there are {len(found)}.")
    if not found:
        return code
    fields = {**options.fields, "formats": list(formats)} if formats else options.fields
    limit = min(settings.queue.max_payload_bytes, MAX_PACKET_BYTES)
    recordings = [
        Recording(options.job_id or new_job_id(path), path, options.by_path, fields, folder, limit)
        for path, folder in found
    ]
    output = _Output(options, formats, alone=len(recordings) == 1, code=code)
    progress = _Progress(recordings)
    with Producer(
        settings.broker,
        Topics(settings.topic_prefix, settings.consumer.name),
        recordings,
        formats=formats if options.wait else (),
        on_status=progress.on_status,
        on_done=lambda recording, status: progress.print_above(lambda: output.finish(producer, recording, status)),
        on_lost=_print_connection_lost,
    ) as producer:
        left_s = math.inf if options.timeout_s is None else options.timeout_s
        producer.connect(min(_CONNECT_S, left_s), min(SUBSCRIBE_S, max(0.0, left_s - _CONNECT_S)))
        if not options.wait:
            return _send(producer, recordings, output, deadline)
        try:
            with progress:
                in_time = producer.publish(deadline) and _follow(producer, progress, deadline)
        except KeyboardInterrupt:
            _print_open(producer)
            raise
        for recording in producer.open:
            output.fail(_unfinished(recording, producer))
    return output.code if in_time else ExitCode.TIMEOUT


def _search(options: SubmitOptions) -> tuple[list[tuple[str, Path]], ExitCode]:
    """Return the recordings, each with the sub-folder of the searched folder that it is in; FAILED: one has none."""
    found, code = [], ExitCode.OK
    for argument in options.recordings:
        path = Path(argument)
        if not options.by_path and argument != STDIN and not path.exists():
            print_message(f"{printable(argument)} cannot be read: there is no such file.")
            code = ExitCode.FAILED
            continue
        if argument == STDIN or not path.is_dir():
            found.append((argument, Path()))
            continue
        try:
            names = sorted(file.name for file in scan(Path(argument)))
        except OSError as exc:
            names, problem = [], f"cannot be read: {exc.strerror}"
        else:
            problem = "holds no recordings"
        if not names:
            print_message(f"{printable(argument)} {problem}.")
            code = ExitCode.FAILED
        found += [(str(Path(argument, name)), Path(name).parent) for name in names]
    return found, code


def _send(producer: Producer, recordings: list[Recording], output: "_Output", deadline: float | None) -> ExitCode:
    """Publish without waiting for the ends, and print the ids of what was sent."""
    try:
        acknowledged = producer.publish(deadline)
    finally:
        unsent = {recording.job_id for recording in producer.unsent}
        for recording in recordings:
            status = producer.status(recording) or {}
            if recording.job_id not in unsent and status.get("status") != UNSENT:
                out(json.dumps({"job_id": recording.job_id}) if output.as_json else recording.job_id)
    if not acknowledged:
        for recording in producer.unsent:
            print_message(_unfinished(recording, producer))
        return ExitCode.TIMEOUT
    if not producer.wait_for_consumer(time.monotonic() + _LOOK_S):
        print_message("no consumer is online; the jobs wait at the broker if that keeps them for a consumer.")
    return output.code


def _follow(producer: Producer, progress: "_Progress", deadline: float | None) -> bool:
    """Show the progress of the jobs until all are done; False at the deadline."""
    while True:
        until = time.monotonic() + _LOOK_S
        if producer.follow(until if deadline is None else min(until, deadline)):
            return True
        progress.set_trouble(_trouble(producer), paused=producer.is_paused)
        if deadline is not None and time.monotonic() >= deadline:
            return False


def _trouble(producer: Producer) -> str | None:
    if producer.trouble is not None:
        return "no connection; reconnecting"
    return None if producer.consumer_online else "no consumer is online; waiting"


class _Progress:
    """A line for each open recording on stderr, as many as fit, and a summary; silent where that is no terminal."""

    def __init__(self, recordings: list[Recording]) -> None:
        self._console = Console(stderr=True)
        self._recordings = recordings
        self._statuses: dict[str, Mapping[str, Any]] = {}
        self._trouble: str | None = None
        self._paused = False
        self._drawn_at = 0.0
        # Only stderr is redirected: what is printed there meanwhile stands above.
        self._live = Live(console=self._console, transient=True, auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def on_status(self, recording: Recording, status: Mapping[str, Any]) -> None:
        self._statuses[recording.job_id] = status
        self._draw()

    def set_trouble(self, trouble: str | None, *, paused: bool) -> None:
        """Show beside the bars why there is no progress."""
        self._trouble, self._paused = trouble, paused
        self._draw()

    def print_above(self, print_all: Callable[[], None]) -> None:
        """Print something, with the lines out of the way."""
        self._live.stop()
        print_all()
        self._start()

    def _start(self) -> None:
        if self._console.is_terminal:
            self._live.update(self._view())
            self._live.start(refresh=True)

    def _draw(self) -> None:
        now = time.monotonic()
        if self._live.is_started and now - self._drawn_at >= _DRAW_S:
            self._drawn_at = now
            self._live.update(self._view(), refresh=True)

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column(width=_BAR_CELLS)
        table.add_column(no_wrap=True)
        counts = Counter[str]()
        waiting: list[tuple[bool, Recording, Mapping[str, Any]]] = []
        for recording in self._recordings:
            status = self._statuses.get(recording.job_id, {"status": "sent"})
            state = status["status"]
            counts[state] += 1
            if state in _OPEN or state == "sent":
                waiting.append((state != "processing", recording, status))
        waiting.sort(key=lambda row: row[0])
        for _, recording, status in waiting[: max(1, self._console.height - _SPARE_LINES)]:
            done = number(status.get("progress")) or 0.0
            table.add_row(Text(recording.shown), ProgressBar(1.0, done), Text(self._state(status)))
        if len(self._recordings) == 1:
            return Group(table)
        ended = {name: counts[name] for name in counts if name not in _OPEN and name != "sent"}
        others = ", ".join(
            f"{counts[name]} {name}" for name in (*ended, "processing", "queued", "sent") if counts[name]
        )
        summary = f"{sum(ended.values())} of {many(len(self._recordings), 'recording')} done: {others}"
        return Group(table, Text(summary, style="dim", no_wrap=True, overflow="ellipsis"))

    def _state(self, status: Mapping[str, Any]) -> str:
        if self._trouble is not None:
            return self._trouble
        if self._paused and status["status"] != "processing":
            return "paused; `cesar-mqtt resume` continues"
        return _state(status)


def _state(status: Mapping[str, Any]) -> str:
    position, progress, eta = (number(status.get(name)) for name in ("queue_position", "progress", "eta"))
    if position:
        return f"queued ({position:.0f})" if position <= _EXACT_POSITIONS else f"queued (behind {_EXACT_POSITIONS})"
    done = f" {progress:.0%}" if progress and status["status"] == "processing" else ""
    return f"{status['status']}{done}" + (f", {duration(eta)} left" if done and eta is not None else "")


def _print_connection_lost(failure: ConnectionFailure) -> None:
    print_message(f"the connection was lost: {failure.problem}; reconnecting")


def _print_open(producer: Producer) -> None:
    """Name, after Ctrl-C, the files that are not done; what is done was printed or written before."""
    unsent = {recording.job_id: recording for recording in producer.unsent}
    sent = [recording for recording in producer.open if recording.job_id not in unsent]
    if unsent:
        print_message(f"Not sent: {listed([recording.shown for recording in unsent.values()])}.")
    if len(sent) == 1:
        print_message(f"The job of {sent[0].shown} goes on without this command: cesar-mqtt show {sent[0].job_id}")
    elif sent:
        names = listed([recording.shown for recording in sent])
        print_message(f"{len(sent)} jobs go on without this command: {names}. `cesar-mqtt watch` shows them.")


class _Output:
    """What becomes of the results: lines on stdout, or files.

    Attributes:
        code: the exit code; FAILED as soon as something is missing.
    """

    def __init__(self, options: SubmitOptions, formats: tuple[str, ...], *, alone: bool, code: ExitCode) -> None:
        self.code = code
        self.as_json = options.as_json
        self._formats = formats
        self._output_dir = options.output_dir
        self._by_path = options.by_path
        self._waits = options.wait
        self._alone = alone

    def finish(self, producer: Producer, recording: Recording, status: Mapping[str, Any]) -> None:
        """Print or write the results of a recording that is done; print on stderr why one is missing."""
        if not self._waits:
            if status["status"] in ("rejected", UNSENT):
                self.fail(self._failure(recording, status))
            return
        results = producer.results(recording)
        completed = status["status"] == "completed"
        missing = [name for name in self._formats if name not in results] if completed else []
        files = self._write(recording, results) if completed and self._output_dir is not None and results else []
        if self.as_json:
            self._print_status(status, results, files)
        elif completed and self._output_dir is not None:
            for file in files:
                out(str(file), flush=True)
        elif completed and not missing:
            self._print_result(recording, status, results)
        if missing:
            late = f"its {listed(missing)} result did not arrive"
            self.fail(f"{recording.shown}: job {recording.job_id} is completed, but {late}.", quietly=self.as_json)
        elif not completed:
            self.fail(self._failure(recording, status), quietly=self.as_json)
        elif not self.as_json:
            _print_notes(recording, status)

    def fail(self, sentence: str, *, quietly: bool = False) -> None:
        """Note that something is missing, and print why, unless the status that was printed says it."""
        self.code = ExitCode.FAILED
        if not quietly:
            print_message(sentence)

    def _write(self, recording: Recording, results: Mapping[str, bytes]) -> list[Path]:
        folder = (self._output_dir or Path()) / recording.folder
        try:
            return write_transcripts(folder, recording.name, results)
        except OSError as exc:
            self.fail(f"{recording.shown}: nothing can be written in {folder}: {exc.strerror}.")
            return []

    def _print_status(self, status: Mapping[str, Any], results: Mapping[str, bytes], files: list[Path]) -> None:
        document = dict(status)
        if self._output_dir is not None:
            document["files"] = [str(file) for file in files]
        elif self._formats:
            (name,) = self._formats
            document["result"] = _readable(results[name], name) if name in results else None
        out(json.dumps(document, ensure_ascii=False), flush=True)

    def _print_result(self, recording: Recording, status: Mapping[str, Any], results: Mapping[str, bytes]) -> None:
        """Print a result as it is, byte by byte, or the transcript; after the file's name if there are others."""
        if results:
            if not self._alone:
                out(f"==> {recording.shown} <==", flush=True)
            write(b"".join(results.values()))
        else:
            text = str(status["result_text"])
            out(text if self._alone else f"{recording.shown}: {text}", flush=True)

    def _failure(self, recording: Recording, status: Mapping[str, Any]) -> str:
        if status["status"] == UNSENT:
            return str(status["error_message"])
        if status.get("error_code") is None:
            return f"{recording.shown}: job {recording.job_id} is {status['status']}."
        reason = f"{recording.shown}: {status['error_code']}: {status['error_message']} (job {recording.job_id})"
        here = Path(recording.path).resolve()
        if self._by_path and status["error_code"] in _NOT_THERE and here.exists():
            also = "" if str(here) == recording.path else f" On this machine the file is {here}: submit that path, or"
            reason += f"{also or ' To send the file itself,'} leave out --by-path."
        return reason


def _unfinished(recording: Recording, producer: Producer) -> str:
    """Return why the time ran out."""
    status = producer.status(recording)
    if recording in producer.unsent:
        return f"{recording.shown}: it was not sent in time."
    if status is None and not producer.consumer_online:
        return f"{recording.shown}: no consumer is online; the broker may keep job {recording.job_id} for one."
    if status is None:
        return f"{recording.shown}: no status of job {recording.job_id} arrived in time."
    return f"{recording.shown}: job {recording.job_id} is {status['status']}."


def _readable(result: bytes, result_format: str) -> object:
    text = result.decode(errors="replace")
    with suppress(ValueError):
        return json.loads(text) if result_format == "json" else text
    return text


def _print_notes(recording: Recording, status: Mapping[str, Any]) -> None:
    if status.get("no_speech"):
        print_message(f"{recording.shown}: no speech.")
    for warning in status.get("warnings") or ():
        print_message(f"{recording.shown}: {printable(str(warning))}")
    if status.get("result_truncated"):
        print_message(
            f"{recording.shown}: job {recording.job_id} exceeds the broker's packet limit: the transcript's end may be "
            "missing."
        )
