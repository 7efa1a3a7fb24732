"""The commands `jobs`, `show`, `cancel`, `retry`, `delete`, `pause`, `resume` and `health`; for the main thread.

A consumer's response goes to stdout; everything else is an error, which the command line prints on stderr.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cesar_mqtt.cli import text
from cesar_mqtt.cli.console import GAP, columns_that_fit, new_table, out, print_message, print_table, write
from cesar_mqtt.cli.control_client import ControlClient
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError
from cesar_mqtt.protocol.commands import CURRENT, MAX_LISTED_JOBS, MAX_RESULT_BYTES

_T = TypeVar("_T")

_COLUMNS = ("JOB", "STATUS", "ACCEPTED", "LENGTH", "MODEL", "AUDIO")
_DROPPED_FIRST = ("MODEL", "LENGTH", "ACCEPTED", "AUDIO", "STATUS")
_AUDIO_LEAST = 12
_TRIES = 3
_GROUP = 2
_OPEN = frozenset({"queued", "processing"})
_LATER = {
    "cancel": {
        "processing": "Job {} is running; it ends as cancelled within seconds.",
        "cancelled": "Job {} is cancelled.",
    },
    "retry": {"queued": "Job {} is queued again."},
    "delete": {"deleted": "Job {} is deleted."},
}


def quiet() -> None:
    """Keep the log off the terminal: the command prints sentences of its own."""
    logging.getLogger("cesar_mqtt").addHandler(logging.NullHandler())


def print_jobs(
    settings: Settings, *, status: str | None, limit: int, consumer: str | None, as_json: bool, timeout_s: float
) -> ExitCode:
    """Print the newest jobs, the newest first.

    Args:
        settings: name the broker and the topic prefix.
        status: only jobs in this state; None: all.
        limit: the most jobs to print; 0: all.
        consumer: only jobs of this consumer; None: of all that are online.
        as_json: print one JSON object a line.
        timeout_s: the longest wait for the broker, and for each response.

    Raises:
        CesarError: see `ControlClient`.
    """
    quiet()
    lists: list[tuple[list[dict[str, Any]], int]] = []
    silent: NoAnswerError | None = None
    with ControlClient(settings, ["list"], timeout_s=timeout_s) as client:
        try:
            lists += _from_each(client, consumer, lambda each: _newest(client, status, limit, each))
        except NoAnswerError as exc:
            if not lists:
                raise
            silent = exc
    total = sum(count for _, count in lists)
    merged = [job for newest, _ in lists for job in newest]
    if len(lists) > 1:
        merged.sort(key=lambda job: str(job.get("created_at")), reverse=True)
        total -= len(merged)
        merged = list({(job["job_id"], None if job.get("shared") else job["consumer"]): job for job in merged}.values())
        total += len(merged)
    found = merged[: limit or None]
    if as_json:
        for job in found:
            out(json.dumps(job, ensure_ascii=False))
    else:
        _print_jobs(found)
        if len(found) < total:
            print_message(f"{len(found)} of {text.many(total, 'job')} shown, the newest first; --limit 0 shows all.")
    if silent is not None:
        raise silent
    return ExitCode.OK


def show(
    settings: Settings,
    job_id: str,
    *,
    result_format: str | None,
    consumer: str | None,
    as_json: bool,
    timeout_s: float,
) -> ExitCode:
    """Print the whole status of a job, the transcript last, or only its result in a format.

    Raises:
        CesarError: as `ControlClient`; the job is unknown, or has no such result.
    """
    quiet()
    with ControlClient(settings, ["get", "result", "list"], timeout_s=timeout_s) as client:
        status = _ask_for_job(client, "get", job_id, consumer)
        if result_format is not None:
            write(_whole_result(client, str(status["job_id"]), result_format, consumer).encode())
            return ExitCode.OK
        if status.get("result_truncated") and status.get("status") == "completed":
            status |= {
                "result_text": _whole_result(client, str(status["job_id"]), "txt", consumer),
                "result_truncated": False,
            }
    if as_json:
        out(json.dumps(status, ensure_ascii=False))
        return ExitCode.OK
    transcript = status.pop("result_text", None)
    print_table(_pairs({name: value for name, value in status.items() if value not in (None, {}, [])}))
    if transcript:
        out("\n" + text.readable(str(transcript)))
    return ExitCode.OK


def change(
    settings: Settings,
    command: str,
    job_ids: Sequence[str],
    *,
    status: str | None,
    consumer: str | None,
    as_json: bool,
    timeout_s: float,
) -> ExitCode:
    """Cancel, retry or delete jobs and print the state of each; a refusal does not stop the others.

    Args:
        settings: name the broker and the topic prefix.
        command: `cancel`, `retry` or `delete`.
        job_ids: ids, or beginnings of ids that are unique.
        status: also all jobs in this state; None: none.
        consumer: the consumer to ask; None: all that are online.
        as_json: print one JSON object a line.
        timeout_s: the longest wait for the broker, and for each response.

    Raises:
        CesarError: see `ControlClient`.
    """
    quiet()
    code = ExitCode.OK
    with ControlClient(settings, [command, "list"], timeout_s=timeout_s) as client:
        found = [(job_id, consumer) for job_id in job_ids]
        if status is not None:
            found += [(job["job_id"], job["consumer"]) for job in _all_jobs(client, status, consumer)]
        if not found:
            print_message(f"No job is {status}.")
        for job_id, owner in found:
            try:
                done = _ask_for_job(client, command, job_id, owner)
            except RequestRefusedError as exc:
                print_message(str(exc))
                code = ExitCode.FAILED
            else:
                _print_change(command, done, as_json=as_json)
    return code


def job_ids_that_begin(settings: Settings, beginning: str, *, timeout_s: float) -> list[str]:
    """Return the ids of jobs for the completion of a shell, the newest first. Raises CesarError."""
    quiet()
    with ControlClient(settings, ["list"], timeout_s=timeout_s) as client:
        ids = [str(job["job_id"]) for job in _all_jobs(client, None, None)]
    return [job_id for job_id in reversed(ids) if job_id.startswith(beginning)]


def model_names(settings: Settings, *, timeout_s: float) -> list[str]:
    """Return the names of the models that the consumers have. Raises CesarError."""
    quiet()
    answers = _ask_each(settings, "models", None, timeout_s)
    return sorted({str(model["name"]) for answer in answers for model in answer["models"]})


def _ask_for_job(client: ControlClient, command: str, job_id: str, consumer: str | None) -> dict[str, Any]:
    """Ask about the job with this id, or else about the only one whose id begins so.

    Raises:
        RequestRefusedError: the consumer did not execute the command, or several ids begin so.
    """
    try:
        return client.ask(command, {"job_id": job_id}, consumer=consumer)
    except (RequestRefusedError, NoAnswerError) as exc:
        is_silence = isinstance(exc, NoAnswerError)  # in a group only the owner of a job responds
        if job_id == CURRENT or (is_silence and len(client.online) < _GROUP):
            raise
        ids = {str(job["job_id"]) for job in _all_jobs(client, None, consumer)}
        meant = sorted(each for each in ids if each.startswith(job_id))
        if job_id in ids or not meant:
            raise
    if len(meant) > 1:
        shown = text.listed([text.printable(each) for each in meant])
        raise RequestRefusedError(f"{len(meant)} job ids begin with {job_id}: {shown}.")
    return client.ask(command, {"job_id": meant[0]}, consumer=consumer)


def _all_jobs(client: ControlClient, status: str | None, consumer: str | None) -> list[dict[str, Any]]:
    """Return the jobs of the consumers, oldest first, each with its consumer."""
    return [
        {**job, "consumer": page.get("consumer", each)}
        for each in client.targets(consumer)
        for page in _pages(client, status, each)
        for job in page["jobs"]
    ]


def _print_change(command: str, done: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        out(json.dumps(done, ensure_ascii=False))
        return
    state = str(done.get("status"))
    sentence = _LATER[command].get(state, f"Job {{}} is {text.printable(state)}.")
    out(sentence.format(text.printable(str(done.get("job_id")))))


def pause(settings: Settings, *, on: bool, consumer: str | None, as_json: bool, timeout_s: float) -> ExitCode:
    """Pause or resume the consumers. Raises CesarError as `ControlClient` does."""
    for done in _ask_each(settings, "pause" if on else "resume", consumer, timeout_s):
        name = text.printable(str(done.get("consumer", "the consumer")))
        if as_json:
            out(json.dumps(done, ensure_ascii=False))
        elif done.get("paused"):
            out(f"Paused: {name} accepts jobs and starts none until `cesar-mqtt resume`.")
        else:
            out(f"Resumed: {name} starts queued jobs again.")
    return ExitCode.OK


def health(settings: Settings, *, consumer: str | None, as_json: bool, timeout_s: float) -> ExitCode:
    """Print the health of each consumer; OK only if all are alive. Raises CesarError as `ControlClient` does."""
    code = ExitCode.OK
    for measured in _ask_each(settings, "health", consumer, timeout_s):
        if as_json:
            out(json.dumps(measured))
        else:
            print_table(_pairs(measured))
        if measured.get("worker_alive") is not True or measured.get("network_alive") is not True:
            code = ExitCode.FAILED
    return code


def _ask_each(settings: Settings, command: str, consumer: str | None, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Ask the one consumer, or each that is online."""
    quiet()
    with ControlClient(settings, [command], timeout_s=timeout_s) as client:
        yield from _from_each(client, consumer, lambda each: client.ask(command, consumer=each))


def _from_each(client: ControlClient, consumer: str | None, ask: Callable[[str | None], _T]) -> Iterator[_T]:
    """Yield what the consumers answer; after that the error of the last one that did not answer in time.

    A broker that dies together with a consumer publishes no will: the consumer stays online there, and must not hide
    what the others answer.
    """
    silent: NoAnswerError | None = None
    for each in client.targets(consumer):
        try:
            yield ask(each)
        except NoAnswerError as exc:
            silent = exc
    if silent is not None:
        raise silent


def _newest(
    client: ControlClient, status: str | None, limit: int, consumer: str | None
) -> tuple[list[dict[str, Any]], int]:
    """Return the newest jobs, newest first, and the number of all; starts again when a job is deleted between pages."""
    for tries_left in reversed(range(_TRIES)):
        newest: deque[dict[str, Any]] = deque(maxlen=limit or None)
        total = 0
        try:
            for page in _pages(client, status, consumer):
                newest.extend({**job, "consumer": page.get("consumer", consumer)} for job in page["jobs"])
                total = page["total"]
        except RequestRefusedError:
            if not tries_left or not newest:
                raise
            continue
        break
    return list(reversed(newest)), total


def _pages(client: ControlClient, status: str | None, consumer: str | None) -> Iterator[dict[str, Any]]:
    """Yield the pages of all jobs, oldest first: the order of the command `list`."""
    after = None
    while True:
        page = client.ask("list", {"status": status, "limit": MAX_LISTED_JOBS, "after": after}, consumer=consumer)
        yield page
        after = page["next"]
        if after is None:
            return


def _whole_result(client: ControlClient, job_id: str, result_format: str, consumer: str | None) -> str:
    """Return a result, which may not fit one packet, page by page."""
    result, more, offset = "", True, 0
    while more:
        asked = {"job_id": job_id, "format": result_format, "offset": offset, "length": MAX_RESULT_BYTES}
        page = client.ask("result", asked, consumer=consumer)
        result += page["text"]
        more, offset = page["more"], page["offset"] + page["length"]
    return result


def _print_jobs(found: list[dict[str, Any]]) -> None:
    console = Console()
    print_table(_table(found, console.width if console.is_terminal else None))


def _table(found: list[dict[str, Any]], width: int | None) -> Table:
    """Lay out the jobs for a line of so many cells (None: any number); what has no room is dropped, but never an id."""
    rows = [_cells(job) for job in found]
    heads = {name: name for name in _COLUMNS}
    if width is not None and sum(_widths([heads, *rows]).values()) + GAP * (len(_COLUMNS) - 1) > width:
        heads["ACCEPTED"] = f"ACCEPTED {datetime.now().astimezone():%Z}"
        rows = [_short_cells(job) for job in found]
    widths = _widths([heads, *rows])
    names = list(_COLUMNS)
    if width is not None:
        least = widths | {"AUDIO": min(widths["AUDIO"], _AUDIO_LEAST)}
        names = columns_that_fit(least, width, gap=GAP, dropped_first=_DROPPED_FIRST)
    table = new_table()
    for name in names:
        # An id that is longer than the line goes on in the next one; a file's name is shortened.
        table.add_column(heads[name], width=None if name == "AUDIO" else widths[name], overflow="fold")
    for job, row in zip(found, rows, strict=True):
        audio = Text(row["AUDIO"], no_wrap=True, overflow="ellipsis")
        cells = (audio if name == "AUDIO" else Text(row[name]) for name in names)
        table.add_row(*cells, style="red" if job["status"] == "error" else "")
    return table


def _widths(rows: list[dict[str, str]]) -> dict[str, int]:
    return {name: max(cell_len(row[name]) for row in rows) for name in _COLUMNS}


def _short_cells(job: Mapping[str, Any]) -> dict[str, str]:
    accepted = text.local_minute(job["created_at"])
    return _cells({**job, "error_code": None}) | {"ACCEPTED": accepted}


def _cells(job: Mapping[str, Any]) -> dict[str, str]:
    state, code = str(job["status"]), job["error_code"]
    details = [str(job["queue_position"] or "")]
    if state in _OPEN and job.get("priority"):
        details.append(f"priority {job['priority']}")
    shown = ", ".join(detail for detail in details if detail) or code
    detail = f" ({shown})" if shown else ""
    metadata = job.get("metadata")
    file = metadata.get("file") if isinstance(metadata, Mapping) else None
    cells = (
        job["job_id"],
        f"{state}{detail}",
        text.local_time(job["created_at"]),
        text.duration(text.number(job["audio_duration"])),
        job["model_size"],
        file or job["audio_source"] or "",
    )
    return {name: text.printable(str(cell)) for name, cell in zip(_COLUMNS, cells, strict=True)}


def _pairs(fields: Mapping[str, Any]) -> Table:
    """Lay out fields, one a line."""
    table = new_table(show_header=False)
    for name, value in fields.items():
        table.add_row(name, Text(_readable(name, value)))
    return table


def _readable(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    measure = text.number(value)
    if measure is not None and name.endswith("_bytes"):
        return text.size(measure)
    if measure is not None and (name.endswith("_duration") or name in {"eta", "uptime"}):
        return text.duration(measure)
    if name.endswith("_at") and (local := text.local_time(value)):
        return local
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.printable(plain)
