"""The view of `watch`: the board drawn by rich into a terminal of any size, and plain lines; pure, for one thread."""

from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cesar_mqtt.cli.console import columns_that_fit
from cesar_mqtt.cli.text import duration, local_clock, printable
from cesar_mqtt.cli.watch_model import Board, ConsumerRow, JobRow, Rejection

_NAME = "RECORDING"
_NAME_MOST, _NAME_SHARE = 32, 3
"""The name gets at most so many cells, and at most this fraction of the line."""
_TEXT = "PROGRESS / TEXT"
_TEXT_LEAST = 9
_JOB_CELLS = {"STATUS": 10, _TEXT: 20, "LENGTH": 7, "SPEED": 6, "ETA/END": 8}
"""The widths of the columns beside name and id, in cells; the text takes the rest."""
_KEYS = "up/down select, c cancel, r retry, q quit"
_CONSUMER_SHARE = 3
_BAR_LEAST, _BAR_MOST = 4, 40
_PERCENT = 5
_STYLES = {
    "processing": "cyan",
    "queued": "",
    "completed": "green",
    "error": "red",
    "cancelled": "yellow",
    "idle": "green",
    "offline": "red",
    "degraded": "red",
    "paused": "yellow",
    "draining": "yellow",
}
_CONSUMER_COLUMNS = ("CONSUMER", "ACTIVITY", "QUEUED", "OLDEST", "COMPLETED", "ERROR", "CANCELLED")
_CONSUMER_CELLS = {"ACTIVITY": 10, "OLDEST": 7}


@dataclass(frozen=True, slots=True)
class View:
    """One screen.

    Attributes:
        board: read again at each drawing.
        title: the topic prefix and the broker.
        trouble: why there is no connection; None: there is one.
        now: the time to show, with its zone.
        height: in lines; None: that of the terminal.
        selected: the number of the job that keys are for, from 0; None: there are no keys.
        message: the response to the last key; empty: none.
    """

    board: Board
    title: str
    trouble: str | None
    now: datetime
    height: int | None = None
    selected: int | None = None
    message: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        height = self.height or options.size.height  # Live sets `options.height` to None
        yield self._head(width)
        consumers = self.board.consumers
        shown = consumers[: max(1, height // _CONSUMER_SHARE - 2)]
        yield _consumer_table(shown, width, self.board.clock(), missing=len(consumers) - len(shown))
        yield self._rejection(width)
        # Title, consumers with their head, the rejection, the jobs' head and the footer.
        room = max(1, height - len(shown or [0]) - 5 - (self.selected is not None))
        first = max(0, (self.selected or 0) - room + 1)
        jobs = self.board.jobs(first + room)[first:]
        selected = None if self.selected is None else self.selected - first
        yield _job_table(jobs, width, ascii_only=options.ascii_only, selected=selected)
        yield self._foot(len(jobs), width)
        if self.selected is not None:
            keys = Text(self.message or _KEYS, style="bold" if self.message else "dim", end="")
            keys.truncate(width, overflow="ellipsis")
            yield keys

    def _rejection(self, width: int) -> Text:
        """Return the newest rejection, or an empty line."""
        rejection, count = self.board.rejection, self.board.rejected
        if rejection is None:
            return Text()
        more = f" ({count} since the start)" if count > 1 else ""
        line = Text(f"{local_clock(rejection.received_at)} rejected{more}: {rejection.text}", style="red")
        line.truncate(width, overflow="ellipsis")
        return line

    def _head(self, width: int) -> Text:
        clock = self.now.strftime("%H:%M:%S")
        head = Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        if self.trouble is not None:
            head = Text(f"No connection: {self.trouble}; reconnecting", style="bold red")
        head.truncate(max(1, width - len(clock) - 1), overflow="ellipsis", pad=True)
        head.append(f" {clock}", style="dim")
        return head

    def _foot(self, shown: int, width: int) -> Text:
        counts = self.board.counts()
        more = sum(counts.values()) - shown
        counted = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        end = "" if self.selected is None else "\n"
        foot = Text(f"{more} more; of all: {counted}" if more else counted or "No jobs yet.", style="dim", end=end)
        foot.truncate(width, overflow="ellipsis")
        return foot


def line_of(row: JobRow | ConsumerRow | Rejection) -> str:
    """Return the state of a job or a consumer, or a rejection, as one line."""
    if isinstance(row, Rejection):
        return f"rejected {row.text}"
    if isinstance(row, ConsumerRow):
        queued, job_id = row.count("queued"), row.queue.get("job_id")
        parts = (
            row.activity,
            printable(str(job_id)) if job_id and row.online else "",
            f"{queued} queued" if queued else "",
        )
        return " ".join(("consumer", row.name, *(part for part in parts if part)))
    percent = f"{row.progress:.0%}" if row.state == "processing" and row.progress is not None else ""
    speed = f"{row.speed:.1f}x" if row.speed else ""
    eta = f"{duration(row.eta_s)} left" if row.eta_s is not None else ""
    shown = ": ".join(part for part in (row.name, row.note) if part)
    facts = (row.state, percent, speed, eta, shown)  # positions change too often, ten at a time
    return " ".join(("job", row.job_id, *(part for part in facts if part)))


def _consumer_table(rows: list[ConsumerRow], width: int, now: float, *, missing: int) -> Table | Text:
    if not rows:
        return Text("No consumer is known.", style="yellow")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    widths = {name: max(len(name), _CONSUMER_CELLS.get(name, 0)) for name in _CONSUMER_COLUMNS}
    widths["CONSUMER"] = max(widths["CONSUMER"], *(len(row.name) for row in rows))
    names = columns_that_fit(widths, width, gap=2, dropped_first=reversed(_CONSUMER_COLUMNS[1:]))
    for name in names:
        right = name not in ("CONSUMER", "ACTIVITY")
        title = f"{name} ({missing} more)" if missing and name == "CONSUMER" else name
        table.add_column(title, no_wrap=True, justify="right" if right else "left", overflow="ellipsis")
    for row in rows:
        cells: dict[str, Text | str] = {
            "CONSUMER": Text(row.name),
            "ACTIVITY": Text(row.activity, style=_STYLES.get(row.activity, "")),
            "QUEUED": row.count("queued"),
            "OLDEST": duration(row.oldest_s(now)),
            "COMPLETED": row.count("completed_total"),
            "ERROR": row.count("error_total"),
            "CANCELLED": row.count("cancelled_total"),
        }
        table.add_row(*(cells[name] for name in names), style="" if row.online else "dim")
    return table


def _job_table(rows: list[JobRow], width: int, *, ascii_only: bool, selected: int | None) -> Table:
    ids = max((len(row.job_id) for row in rows if row.name), default=0)
    longest = max((len(row.name or row.job_id) for row in rows), default=0)
    cells = max(len(_NAME), min(longest, _NAME_MOST, width // _NAME_SHARE))
    widths = {_NAME: cells, **_JOB_CELLS} | ({"JOB": max(ids, len("JOB"))} if ids else {})
    dropped_first = ("SPEED", "LENGTH", *(["JOB"] if ids else []), "ETA/END")
    names = columns_that_fit(widths, width, gap=1, dropped_first=dropped_first)
    least = {name: _TEXT_LEAST if name == _TEXT else widths[name] for name in names}
    names = columns_that_fit(least, width, gap=1, dropped_first=(_TEXT, "STATUS"))
    room = width - sum(widths[name] + 1 for name in names if name != _TEXT)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0), width=width)
    for name in names:
        if name == _TEXT:
            table.add_column(name, ratio=1, no_wrap=True, overflow="ellipsis")
        else:
            right = name not in (_NAME, "STATUS", "JOB")
            cells = min(widths[name], width)
            table.add_column(name, width=cells, no_wrap=True, justify="right" if right else "left", overflow="ellipsis")
    for number, row in enumerate(rows):
        drawn = _job_cells(row, room, ascii_only=ascii_only)
        if "STATUS" not in names:
            drawn[_NAME].stylize(_STYLES[row.state])
        table.add_row(*(drawn[name] for name in names), style="reverse" if number == selected else "")
    return table


def _job_cells(row: JobRow, room: int, *, ascii_only: bool) -> dict[str, Text]:
    working = row.state == "processing"
    return {
        _NAME: Text(row.name or row.job_id),
        "STATUS": Text(f"{row.state} {row.position}" if row.position else row.state, style=_STYLES[row.state]),
        _TEXT: _progress(row, room, ascii_only=ascii_only) if working else Text(row.note),
        "LENGTH": Text(duration(row.duration_s)),
        "SPEED": Text(f"{row.speed:.1f}x" if row.speed else ""),
        "ETA/END": Text(local_clock(row.ended_at) if row.is_final else duration(row.eta_s)),
        "JOB": Text(row.job_id if row.name else "", style="dim"),
    }


def _progress(row: JobRow, room: int, *, ascii_only: bool) -> Text:
    """Draw the progress of a job, before its priority if it has one."""
    most = _BAR_MOST if not row.note else _BAR_MOST // 4
    bar = _bar(row.progress, max(_BAR_LEAST, min(most, room - _PERCENT)), ascii_only)
    return bar.append(f" {row.note}", style="") if row.note and room > len(bar) else bar


def _bar(progress: float | None, width: int, ascii_only: bool) -> Text:  # noqa: FBT001 - it is drawn in one place
    if progress is None:
        return Text("length unknown", style="dim")
    done, rest = ("#", "-") if ascii_only else ("━", "─")
    filled = round(progress * width)
    bar = Text(done * filled, style="cyan")
    bar.append(rest * (width - filled), style="dim")
    return bar.append(f"{progress:{_PERCENT}.0%}", style="")
