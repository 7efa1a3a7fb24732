"""The command `submit`: recordings out, a progress bar on stderr, transcripts on stdout."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
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
    """What the command line asks for. `timeout_s` counts from the start; None: as long as it takes."""

    recordings: tuple[str, ...]
    by_path: bool
    job_id: str | None
    options: Mapping[str, Any]
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
    submissions = [
        submission(path, job_id=order.job_id, by_path=order.by_path, options=order.options) for path in order.recordings
    ]
    with ExitStack() as stack:
        producer = stack.enter_context(Producer(settings.broker, topics, submissions))
        producer.connect(_CONNECT_S if order.timeout_s is None else min(_CONNECT_S, order.timeout_s))
        taken = producer.publish(deadline)
        if not order.wait:
            _print_ids(submissions, as_json=order.as_json)
            return ExitCode.OK if taken else ExitCode.TIMEOUT
        bars = stack.enter_context(_Bars(submissions))
        in_time = taken and producer.follow(deadline, bars.show)
    code = _print_results(producer, as_json=order.as_json)
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


def _print_results(producer: Producer, *, as_json: bool) -> ExitCode:
    """Print in the order of the command line; a transcript alone when there is one recording, else with its name."""
    results = list(producer.results())
    for item, status in results:
        if as_json:
            _out(json.dumps(status or {"job_id": item.job_id, "status": None}, ensure_ascii=False))
        elif status is not None and status["status"] == "completed":
            text = str(status["result_text"])
            _out(text if len(results) == 1 else f"{item.path}: {text}")
        else:
            print(f"cesar-mqtt: {_why(item, status, online=producer.consumer_online)}", file=sys.stderr)  # noqa: T201
    done = all(status is not None and status["status"] == "completed" for _, status in results)
    return ExitCode.OK if done else ExitCode.FAILED


def _why(item: Submission, status: Mapping[str, Any] | None, *, online: bool) -> str:
    if status is None and not online:
        return f"{item.path}: no consumer is online; job {item.job_id} waits at the broker, if that keeps it for one."
    if status is None:
        return f"{item.path}: nothing was heard of job {item.job_id} in time."
    if status.get("error_code") is None:
        return f"{item.path}: job {item.job_id} is {status['status']}."
    return f"{item.path}: {status['error_code']}: {status['error_message']} (job {item.job_id})"


def _out(text: str) -> None:
    print(text)  # noqa: T201 - stdout is the product
