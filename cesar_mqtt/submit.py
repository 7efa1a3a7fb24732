"""The command `submit`: recordings out, a progress bar on stderr, transcripts on stdout."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.producer import Producer, Submission, submission
from cesar_mqtt.topics import Topics

_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for.

    Attributes:
        recordings: files, or with `by_path` paths as the consumer is to look them up.
        by_path: whether only the paths are sent.
        job_id: the id of the only recording; None: one is made for each.
        options: further fields of the request.
        result_format: which result to print instead of the transcript; None: the transcript.
        wait: whether to wait for the ends.
        timeout_s: counts from the start; None: as long as it takes.
        as_json: whether to print statuses.
    """

    recordings: tuple[str, ...]
    by_path: bool
    job_id: str | None
    options: Mapping[str, Any]
    result_format: str | None
    wait: bool
    timeout_s: float | None
    as_json: bool


def submit_and_wait(order: Order, settings: Settings) -> ExitCode:
    """Send the recordings, wait for their ends if asked to, and print what came of them.

    Raises:
        CesarError: a file cannot be read, no broker answers, or it refuses.
    """
    deadline = None if order.timeout_s is None else time.monotonic() + order.timeout_s
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    options = {**order.options, "formats": [order.result_format]} if order.result_format else order.options
    submissions = [
        submission(path, job_id=order.job_id, by_path=order.by_path, options=options) for path in order.recordings
    ]
    with ExitStack() as stack:
        producer = stack.enter_context(
            Producer(settings.broker, topics, submissions, result_format=order.result_format)
        )
        producer.connect(_CONNECT_S if order.timeout_s is None else min(_CONNECT_S, order.timeout_s))
        taken = producer.publish(deadline)
        if not order.wait:
            _print_ids(submissions, as_json=order.as_json)
            return ExitCode.OK if taken else ExitCode.TIMEOUT
        bars = stack.enter_context(_Bars(submissions))
        in_time = taken and producer.follow(deadline, bars.show)
    code = _print_results(producer, order)
    return code if in_time else ExitCode.TIMEOUT


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
        """Move the bar of one job."""
        position = status.get("queue_position")
        state = f"queued ({position})" if position else str(status["status"])
        self._progress.update(self._tasks[job_id], completed=status.get("progress") or 0.0, state=state)


def _print_ids(submissions: list[Submission], *, as_json: bool) -> None:
    for item in submissions:
        _out(json.dumps({"job_id": item.job_id}) if as_json else item.job_id)


def _print_results(producer: Producer, order: Order) -> ExitCode:
    """Print in the order of the command line, and say on stderr what cannot be printed."""
    code = ExitCode.OK
    for item, status in producer.results():
        result = producer.result(item.job_id)
        done = status is not None and status["status"] == "completed"
        if order.as_json:
            _print_status(item, status, result, result_format=order.result_format)
        elif status is not None and done and (result is not None or order.result_format is None):
            _print_result(item, status, result, alone=len(order.recordings) == 1)
        else:
            _say(_why(item, status, online=producer.consumer_online, result_format=order.result_format))
        if not done or (result is None and order.result_format is not None):
            code = ExitCode.FAILED
    return code


def _print_status(
    item: Submission, status: Mapping[str, Any] | None, result: bytes | None, *, result_format: str | None
) -> None:
    document = dict(status or {"job_id": item.job_id, "status": None})
    if result_format is not None:
        document["result"] = None if result is None else _readable(result, result_format)
    _out(json.dumps(document, ensure_ascii=False))


def _readable(result: bytes, result_format: str) -> object:
    text = result.decode(errors="replace")
    with suppress(ValueError):
        return json.loads(text) if result_format == "json" else text
    return text


def _print_result(item: Submission, status: Mapping[str, Any], result: bytes | None, *, alone: bool) -> None:
    """Print a result byte by byte, as the file that it is; else the transcript, with its name if there are others."""
    if result is not None:
        sys.stdout.flush()
        sys.stdout.buffer.write(result)
        sys.stdout.buffer.flush()
    else:
        text = str(status["result_text"])
        _out(text if alone else f"{item.path}: {text}")
    if status.get("result_truncated"):
        _say(f"{item.path}: the broker's packets are too small for all of job {item.job_id}: the end may be missing.")


def _why(item: Submission, status: Mapping[str, Any] | None, *, online: bool, result_format: str | None = None) -> str:
    if status is None and not online:
        return f"{item.path}: no consumer is online; job {item.job_id} waits at the broker, if that keeps it for one."
    if status is None:
        return f"{item.path}: nothing was heard of job {item.job_id} in time."
    if status["status"] == "completed":
        return f"{item.path}: job {item.job_id} is completed, but its {result_format} result has not come."
    if status.get("error_code") is None:
        return f"{item.path}: job {item.job_id} is {status['status']}."
    return f"{item.path}: {status['error_code']}: {status['error_message']} (job {item.job_id})"


def _out(text: str) -> None:
    print(text)  # noqa: T201 - stdout is the product


def _say(text: str) -> None:
    print(f"cesar-mqtt: {text}", file=sys.stderr)  # noqa: T201 - this is the terminal
