"""What `jobs`, `show`, `cancel`, `retry`, `delete`, `pause`, `resume` and `health` ask and print; for the main thread.

What a consumer answers goes to stdout, everything else is an error that the command line tells on stderr.
"""

import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from cesar_mqtt.cli import text as wording
from cesar_mqtt.cli.console import out, say
from cesar_mqtt.cli.session import ControlClient, RequestRefusedError
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.protocol.commands import MAX_LISTED_JOBS, MAX_RESULT_BYTES

_COLUMNS = ("JOB", "STATUS", "ACCEPTED", "LENGTH", "MODEL", "AUDIO")
_HEAD = {name: name for name in _COLUMNS}
_DROPPED_FIRST = ("MODEL", "LENGTH", "ACCEPTED", "AUDIO", "STATUS")
_AUDIO_LEAST = 12
_GAP = 2
_TRIES = 3
_LATER = {
    "cancel": {
        "processing": "Job {} is in work; it ends as cancelled within seconds.",
        "cancelled": "Job {} is cancelled.",
    },
    "retry": {"queued": "Job {} is queued again."},
    "delete": {"deleted": "Job {} is deleted."},
}


def quiet() -> None:
    """Keep the client's log off the terminal: what matters of it is told in the command's own sentences."""
    logging.getLogger("cesar_mqtt").addHandler(logging.NullHandler())


def print_jobs(
    settings: Settings, *, status: str | None, limit: int, consumer: str | None, as_json: bool, timeout_s: float
) -> ExitCode:
    """Print the newest jobs, the newest first.

    Args:
        settings: where to ask.
        status: only jobs in this state; None: all.
        limit: how many at most; 0: all.
        consumer: only jobs of this one; None: of all that are online.
        as_json: whether to print a JSON object a line.
        timeout_s: how long to wait for the broker, and for each answer.

    Raises:
        CesarError: see `ControlClient`.
    """
    quiet()
    with ControlClient(settings, ["list"], timeout_s=timeout_s) as requester:
        told = [_newest(requester, status, limit, each) for each in requester.everyone(consumer)]
    total = sum(count for _, count in told)
    merged = sorted((job for page, _ in told for job in page), key=_accepted, reverse=True) if told[1:] else told[0][0]
    found = merged[: limit or None]
    if as_json:
        for job in found:
            out(json.dumps(job, ensure_ascii=False))
        return ExitCode.OK
    _print_jobs(found)
    if len(found) < total:
        say(f"These are the newest {len(found)} of {total} jobs; --limit 0 shows all.")
    return ExitCode.OK


def show(settings: Settings, job_id: str, *, consumer: str | None, as_json: bool, timeout_s: float) -> ExitCode:
    """Print all that a job's status says, the transcript last. Raises CesarError as `ControlClient` does."""
    quiet()
    with ControlClient(settings, ["get", "result"], timeout_s=timeout_s) as requester:
        status = requester.ask("get", {"job_id": job_id}, consumer=consumer)
        if status.get("result_truncated") and status.get("status") == "completed":
            status |= {"result_text": _whole(requester, str(status["job_id"]), consumer), "result_truncated": False}
    if as_json:
        out(json.dumps(status, ensure_ascii=False))
        return ExitCode.OK
    text = status.pop("result_text", None)
    for line in wording.aligned([(name, _told(name, value)) for name, value in status.items() if _says(value)]):
        out(line)
    if text:
        out("\n" + wording.readable(str(text)))
    return ExitCode.OK


def change(
    settings: Settings, command: str, job_id: str, *, consumer: str | None, as_json: bool, timeout_s: float
) -> ExitCode:
    """Cancel, retry or delete a job and print its state. Raises CesarError as `ControlClient` does."""
    quiet()
    with ControlClient(settings, [command], timeout_s=timeout_s) as requester:
        done = requester.ask(command, {"job_id": job_id}, consumer=consumer)
    if as_json:
        out(json.dumps(done, ensure_ascii=False))
        return ExitCode.OK
    state = str(done.get("status"))
    sentence = _LATER[command].get(state, f"Job {{}} is {wording.printable(state)}.")
    out(sentence.format(wording.printable(str(done.get("job_id")))))
    return ExitCode.OK


def pause(settings: Settings, *, on: bool, consumer: str | None, as_json: bool, timeout_s: float) -> ExitCode:
    """Have no further job started, or have them started again. Raises CesarError as `ControlClient` does."""
    for done in _ask_each(settings, "pause" if on else "resume", consumer, timeout_s):
        name = wording.printable(str(done.get("consumer", "the consumer")))
        if as_json:
            out(json.dumps(done, ensure_ascii=False))
        elif done.get("paused"):
            out(f"Paused: {name} accepts jobs, and starts none until `cesar-mqtt resume`.")
        else:
            out(f"Resumed: {name} starts the jobs that wait.")
    return ExitCode.OK


def health(settings: Settings, *, consumer: str | None, as_json: bool, timeout_s: float) -> ExitCode:
    """Print the health of each consumer; OK only if all are alive. Raises CesarError as `ControlClient` does."""
    code = ExitCode.OK
    for measured in _ask_each(settings, "health", consumer, timeout_s):
        if as_json:
            out(json.dumps(measured))
        else:
            for line in wording.aligned([(name, _told(name, value)) for name, value in measured.items()]):
                out(line)
        if measured.get("worker_alive") is not True or measured.get("network_alive") is not True:
            code = ExitCode.FAILED
    return code


def _ask_each(settings: Settings, command: str, consumer: str | None, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Ask the one consumer, or each that is online."""
    quiet()
    with ControlClient(settings, [command], timeout_s=timeout_s) as requester:
        for each in requester.everyone(consumer):
            yield requester.ask(command, consumer=each)


def _newest(
    requester: ControlClient, status: str | None, limit: int, consumer: str | None
) -> tuple[list[dict[str, Any]], int]:
    """Return the newest jobs, newest first, and how many there are. A job deleted between two pages: from the start."""
    for tries_left in reversed(range(_TRIES)):
        newest: deque[dict[str, Any]] = deque(maxlen=limit or None)
        total = 0
        try:
            for page in _pages(requester, status, consumer):
                newest.extend({**job, "consumer": page.get("consumer", consumer)} for job in page["jobs"])
                total = page["total"]
        except RequestRefusedError:
            if not tries_left or not newest:
                raise
            continue
        break
    return list(reversed(newest)), total


def _accepted(job: Mapping[str, Any]) -> str:
    return str(job.get("created_at"))


def _pages(requester: ControlClient, status: str | None, consumer: str | None) -> Iterator[dict[str, Any]]:
    """Yield the pages of all jobs, oldest first, for that is the order in which they can be asked for."""
    after = None
    while True:
        page = requester.ask("list", {"status": status, "limit": MAX_LISTED_JOBS, "after": after}, consumer=consumer)
        yield page
        after = page["next"]
        if after is None:
            return


def _whole(requester: ControlClient, job_id: str, consumer: str | None) -> str:
    """Fetch a transcript in pieces."""
    text, more, offset = "", True, 0
    while more:
        asked = {"job_id": job_id, "format": "txt", "offset": offset, "length": MAX_RESULT_BYTES}
        piece = requester.ask("result", asked, consumer=consumer)
        text += piece["text"]
        more, offset = piece["more"], piece["offset"] + piece["length"]
    return text


def _print_jobs(found: list[dict[str, Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        for line in wording.aligned([_COLUMNS, *(tuple(_cells(job).values()) for job in found)]):
            out(line)
        return
    styles = ["bold", *("red" if job["status"] == "error" else "" for job in found)]
    for line, style in zip(wording.aligned(_table(found, console.width)), styles, strict=True):
        console.print(Text(line, style=style), soft_wrap=True)  # an id is never cut: it goes on in the next line


def _table(found: list[dict[str, Any]], width: int) -> list[Sequence[str]]:
    """Lay out head and rows for a line of so many cells; what has no room is shortened, then dropped, but no id."""
    rows = [_HEAD, *map(_cells, found)]
    if sum(_widths(rows).values()) + _GAP * (len(_COLUMNS) - 1) > width:
        rows = [_HEAD | {"ACCEPTED": f"ACCEPTED {datetime.now().astimezone():%Z}"}, *map(_short_cells, found)]
    wide = _widths(rows)
    least = wide | {"AUDIO": min(wide["AUDIO"], _AUDIO_LEAST)}
    names = wording.fitting(least, width, gap=_GAP, dropped_first=_DROPPED_FIRST)
    room = width - sum(wide[name] + _GAP for name in names if name != "AUDIO")
    rows = [row | {"AUDIO": wording.shortened(row["AUDIO"], max(room, _AUDIO_LEAST))} for row in rows]
    return [[row[name] for name in names] for row in rows]


def _widths(rows: list[dict[str, str]]) -> dict[str, int]:
    return {name: max(cell_len(row[name]) for row in rows) for name in _COLUMNS}


def _short_cells(job: Mapping[str, Any]) -> dict[str, str]:
    accepted = wording.local_minute(job["created_at"])
    return _cells({**job, "error_code": None}) | {"ACCEPTED": accepted}


def _cells(job: Mapping[str, Any]) -> dict[str, str]:
    state, position, code = str(job["status"]), job["queue_position"], job["error_code"]
    detail = f" ({position})" if position else f" ({code})" if code else ""
    metadata = job.get("metadata")
    file = metadata.get("file") if isinstance(metadata, Mapping) else None
    cells = (
        job["job_id"],
        f"{state}{detail}",
        wording.local_time(job["created_at"]),
        wording.duration(wording.number(job["audio_duration"])),
        job["model_size"],
        file or job["audio_source"] or "",
    )
    return {name: wording.printable(str(cell)) for name, cell in zip(_COLUMNS, cells, strict=True)}


def _says(value: object) -> bool:
    return value is not None and value not in ({}, [])


def _told(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    measure = wording.number(value)
    if measure is not None and name.endswith("_bytes"):
        return wording.size(measure)
    if measure is not None and (name.endswith("_duration") or name in {"eta", "uptime"}):
        return wording.duration(measure)
    if name.endswith("_at") and (told := wording.local_time(value)):
        return told
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return wording.printable(plain)
