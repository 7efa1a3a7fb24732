"""The view of `watch`: the board drawn by rich into a terminal of any size, and plain lines; pure, for one thread."""

from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cesar_mqtt.cli.console import columns_that_fit
from cesar_mqtt.cli.text import duration, local_clock, printable
from cesar_mqtt.cli.watch_model import Board, ConsumerRow, JobRow

_ID_LEAST = 12
_TEXT = "PROGRESS / TEXT"
_TEXT_LEAST = 9
_NAME_LEAST = 4
_JOB_CELLS = {"STATUS": 10, _TEXT: 20, "LENGTH": 7, "SPEED": 6, "ETA/END": 8}
"""The widths of the columns beside the id, in cells; the text takes the rest."""
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
    """

    board: Board
    title: str
    trouble: str | None
    now: datetime
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        height = self.height or options.size.height  # Live sets `options.height` to None
        yield self._head(width)
        consumers = self.board.consumers
        shown = consumers[: max(1, height // _CONSUMER_SHARE - 2)]
        yield _consumer_table(shown, width, missing=len(consumers) - len(shown))
        yield Text()
        # Title, consumers with their head, a blank line, the jobs' head and the footer.
        room = max(1, height - len(shown or [0]) - 5)
        jobs = self.board.jobs(room)
        yield _job_table(jobs, width, ascii_only=options.ascii_only)
        yield self._foot(len(jobs), width)

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
        foot = Text(f"{more} more; of all: {counted}" if more else counted or "No jobs yet.", style="dim", end="")
        foot.truncate(width, overflow="ellipsis")
        return foot


def line_of(row: JobRow | ConsumerRow) -> str:
    """Return the state of a job or a consumer as one line."""
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
    facts = (row.state, percent, speed, eta, row.note)  # positions change too often, ten at a time
    return " ".join(("job", row.job_id, *(part for part in facts if part)))


def _consumer_table(rows: list[ConsumerRow], width: int, *, missing: int) -> Table | Text:
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
        oldest = row.queue.get("oldest_age")
        cells: dict[str, Text | str] = {
            "CONSUMER": Text(row.name),
            "ACTIVITY": Text(row.activity, style=_STYLES.get(row.activity, "")),
            "QUEUED": row.count("queued"),
            "OLDEST": duration(oldest) if isinstance(oldest, int | float) else "",
            "COMPLETED": row.count("completed_total"),
            "ERROR": row.count("error_total"),
            "CANCELLED": row.count("cancelled_total"),
        }
        table.add_row(*(cells[name] for name in names), style="" if row.online else "dim")
    return table


def _job_table(rows: list[JobRow], width: int, *, ascii_only: bool) -> Table:
    widths = {"JOB": max(_ID_LEAST, *(len(row.job_id) for row in rows), 0), **_JOB_CELLS}
    names = columns_that_fit(widths, width, gap=1, dropped_first=("SPEED", "LENGTH", "ETA/END"))
    least = {name: _TEXT_LEAST if name == _TEXT else widths[name] for name in names}
    names = columns_that_fit(least, width, gap=1, dropped_first=(_TEXT, "STATUS"))
    room = width - sum(widths[name] + 1 for name in names if name != _TEXT)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0), width=width)
    for name in names:
        if name == _TEXT:
            table.add_column(name, ratio=1, no_wrap=True, overflow="ellipsis")
        else:
            right = name not in ("JOB", "STATUS")
            table.add_column(name, width=min(widths[name], width), no_wrap=True, justify="right" if right else "left")
    for row in rows:
        cells = _job_cells(row, room, ascii_only=ascii_only)
        if "STATUS" not in names:
            cells["JOB"].stylize(_STYLES[row.state])
        table.add_row(*(cells[name] for name in names))
    return table


def _job_cells(row: JobRow, room: int, *, ascii_only: bool) -> dict[str, Text]:
    working = row.state == "processing"
    return {
        "JOB": Text(row.job_id),
        "STATUS": Text(f"{row.state} {row.position}" if row.position else row.state, style=_STYLES[row.state]),
        _TEXT: _progress(row, room, ascii_only=ascii_only) if working else Text(row.note),
        "LENGTH": Text(duration(row.duration_s)),
        "SPEED": Text(f"{row.speed:.1f}x" if row.speed else ""),
        "ETA/END": Text(local_clock(row.ended_at) if row.is_final else duration(row.eta_s)),
    }


def _progress(row: JobRow, room: int, *, ascii_only: bool) -> Text:
    """Draw the progress of a job, before the file's name if it has one."""
    most = _BAR_MOST if not row.note else _BAR_MOST // 4
    bar = _bar(row.progress, max(_BAR_LEAST, min(most, room - _PERCENT)), ascii_only)
    return bar.append(f" {row.note}", style="") if row.note and room - len(bar) > _NAME_LEAST else bar


def _bar(progress: float | None, width: int, ascii_only: bool) -> Text:  # noqa: FBT001 - it is drawn in one place
    if progress is None:
        return Text("length unknown", style="dim")
    done, rest = ("#", "-") if ascii_only else ("━", "─")
    filled = round(progress * width)
    bar = Text(done * filled, style="cyan")
    bar.append(rest * (width - filled), style="dim")
    return bar.append(f"{progress:{_PERCENT}.0%}", style="")
