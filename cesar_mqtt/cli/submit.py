"""The command `submit`: recordings out, a progress bar on stderr, transcripts on stdout."""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cesar_mqtt.cli.console import out, print_message, write
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.producer import Producer, submission
from cesar_mqtt.cli.text import duration, number, printable
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, ConnectionFailure
from cesar_mqtt.protocol.topics import Topics

_CONNECT_S = 10.0
_LOOK_S = 0.5
_OPEN = frozenset({"queued", "processing"})
_NOT_THERE = frozenset({"audio_not_found", "audio_not_allowed"})


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """The arguments of the command.

    Attributes:
        recordings: files, `-` being stdin, or with `by_path` paths as the consumer is to look them up.
        by_path: whether only the paths are sent.
        job_id: the id of the only recording; None: one is made for each.
        fields: further fields of the request.
        result_format: which result to print instead of the transcript; None: the transcript.
        wait: whether to wait for the ends.
        timeout_s: counts from the start; None: as long as it takes.
        as_json: whether to print statuses.
    """

    recordings: tuple[str, ...]
    by_path: bool
    job_id: str | None
    fields: Mapping[str, Any]
    result_format: str | None
    wait: bool
    timeout_s: float | None
    as_json: bool


def submit_and_wait(options: SubmitOptions, settings: Settings) -> ExitCode:
    """Send the recordings, wait until they are final unless told not to, and print their results.

    Raises:
        CesarError: a file cannot be read, no broker answers, or it refuses.
    """
    quiet()
    deadline = None if options.timeout_s is None else time.monotonic() + options.timeout_s
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    fields = {**options.fields, "formats": [options.result_format]} if options.result_format else options.fields
    limit = min(settings.queue.max_payload_bytes, MAX_PACKET_BYTES)
    submissions = [
        submission(path, job_id=options.job_id, by_path=options.by_path, options=fields, max_bytes=limit)
        for path in options.recordings
    ]
    with ExitStack() as stack:
        producer = stack.enter_context(
            Producer(
                settings.broker,
                topics,
                submissions,
                result_format=options.result_format,
                on_lost=_print_connection_lost,
            )
        )
        producer.connect(_CONNECT_S if options.timeout_s is None else min(_CONNECT_S, options.timeout_s))
        acknowledged = producer.publish(deadline)
        if not options.wait:
            _print_ids(submissions, as_json=options.as_json)
        if acknowledged:
            producer.check_taken(time.monotonic() + _LOOK_S)
        if not options.wait:
            if not producer.wait_for_consumer(time.monotonic() + _LOOK_S):
                print_message("no consumer is online; the jobs wait at the broker if that keeps them for a consumer.")
            return ExitCode.OK if acknowledged else ExitCode.TIMEOUT
        in_time = acknowledged and _follow(producer, submissions, deadline)
    code = _print_results(producer, options)
    return code if in_time else ExitCode.TIMEOUT


def _follow(producer: Producer, submissions: list[Submission], deadline: float | None) -> bool:
    """Show the progress of the jobs until all are final; False at the deadline."""
    try:
        with _Bars(submissions) as bars:
            while True:
                until = time.monotonic() + _LOOK_S
                if producer.follow(until if deadline is None else min(until, deadline), bars.show):
                    return True
                bars.set_trouble(producer.trouble, online=producer.consumer_online)
                if deadline is not None and time.monotonic() >= deadline:
                    return False
    except KeyboardInterrupt:
        for item, status in producer.results():
            if status is None or status["status"] in _OPEN:
                state = "was sent" if status is None else f"is {status['status']}"
                print_message(f"job {item.job_id} {state}: cesar-mqtt show {item.job_id}")
        raise


class _Bars:
    """A progress bar for each recording on stderr; silent when that is no terminal."""

    def __init__(self, submissions: list[Submission]) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._trouble: str | None = None
        self._statuses: dict[str, Mapping[str, Any]] = {}
        self._tasks: dict[str, TaskID] = {
            submission.job_id: self._progress.add_task(submission.path, total=1.0, state="sent")
            for submission in submissions
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job_id: str, status: Mapping[str, Any]) -> None:
        self._statuses[job_id] = status
        self._draw(job_id)

    def set_trouble(self, trouble: str | None, *, online: bool) -> None:
        """Show beside the bars why there is no progress."""
        self._trouble = None if online else "no consumer is online; waiting"
        if trouble is not None:
            self._trouble = "no connection; reconnecting"
        for job_id in self._tasks:
            self._draw(job_id)

    def _draw(self, job_id: str) -> None:
        status = self._statuses.get(job_id)
        waits = status is None or status["status"] in _OPEN
        state = self._trouble if waits and self._trouble else "sent" if status is None else _state(status)
        done = None if status is None else number(status.get("progress"))
        self._progress.update(self._tasks[job_id], completed=done or 0.0, state=state)


def _state(status: Mapping[str, Any]) -> str:
    position, progress, eta = (number(status.get(name)) for name in ("queue_position", "progress", "eta"))
    if position:
        return f"queued ({position:.0f})"
    done = f" {progress:.0%}" if progress and status["status"] == "processing" else ""
    return f"{status['status']}{done}" + (f", {duration(eta)} left" if done and eta is not None else "")


def _print_connection_lost(failure: ConnectionFailure) -> None:
    print_message(f"the connection was lost: {failure.problem}; reconnecting")


def _print_ids(submissions: list[Submission], *, as_json: bool) -> None:
    for item in submissions:
        out(json.dumps({"job_id": item.job_id}) if as_json else item.job_id)


def _print_results(producer: Producer, options: SubmitOptions) -> ExitCode:
    """Print the results in the order of the arguments; print on stderr why one is missing."""
    code = ExitCode.OK
    for item, status in producer.results():
        result = producer.result(item.job_id)
        done = status is not None and status["status"] == "completed"
        if options.as_json:
            _print_status(item, status, result, result_format=options.result_format)
        elif status is not None and done and (result is not None or options.result_format is None):
            _print_result(item, status, result, alone=len(options.recordings) == 1)
        else:
            print_message(_failure_sentence(item, status, producer, options))
        if not done or (result is None and options.result_format is not None):
            code = ExitCode.FAILED
    return code


def _print_status(
    item: Submission, status: Mapping[str, Any] | None, result: bytes | None, *, result_format: str | None
) -> None:
    document = dict(status or {"job_id": item.job_id, "status": None})
    if result_format is not None:
        document["result"] = None if result is None else _readable(result, result_format)
    out(json.dumps(document, ensure_ascii=False))


def _readable(result: bytes, result_format: str) -> object:
    text = result.decode(errors="replace")
    with suppress(ValueError):
        return json.loads(text) if result_format == "json" else text
    return text


def _print_result(item: Submission, status: Mapping[str, Any], result: bytes | None, *, alone: bool) -> None:
    """Print a result as it is, byte by byte, or the transcript, after the file's name if there are others."""
    if result is not None:
        write(result)
    else:
        text = str(status["result_text"])
        out(text if alone else f"{item.path}: {text}")
    if status.get("no_speech"):
        print_message(f"{item.path}: no speech.")
    for warning in status.get("warnings") or ():
        print_message(f"{item.path}: {printable(str(warning))}")
    if status.get("result_truncated"):
        print_message(
            f"{item.path}: job {item.job_id} exceeds the broker's packet limit: the transcript's end may be missing."
        )


def _failure_sentence(
    item: Submission, status: Mapping[str, Any] | None, producer: Producer, options: SubmitOptions
) -> str:
    if status is None and not producer.consumer_online:
        return f"{item.path}: no consumer is online; the broker may keep job {item.job_id} for one."
    if status is None:
        return f"{item.path}: no status of job {item.job_id} arrived in time."
    if status["status"] == "completed":
        return f"{item.path}: job {item.job_id} is completed, but its {options.result_format} result did not arrive."
    if status.get("error_code") is None:
        return f"{item.path}: job {item.job_id} is {status['status']}."
    reason = f"{item.path}: {status['error_code']}: {status['error_message']} (job {item.job_id})"
    here = Path(item.path).resolve()
    if options.by_path and status["error_code"] in _NOT_THERE and here.exists():
        reason += f" On this machine the file is {here}: submit that path, or leave out --by-path."
    return reason
