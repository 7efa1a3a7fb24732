"""How durations, sizes and texts from elsewhere are written for a person; pure, any thread may call it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from rich.cells import cell_len, set_cell_size

_MINUTE_S = 60
_HOUR_S = 3600
_DAY_S = 24 * _HOUR_S
_UNITS = ("B", "kB", "MB", "GB", "TB")
_STEP = 1000.0
_SMALL = 10


def printable(text: str) -> str:
    """Return a text without what a terminal would take for an order; line ends become blanks."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else " " if char in "\t\r\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def readable(text: str) -> str:
    """Return a text of several lines without what a terminal would take for an order."""
    return "\n".join(printable(line) for line in text.splitlines())


def duration(seconds: float | None) -> str:
    """Write seconds as 0:07, 12:30 or 1:02:03, and from a day on as 3 d 04:05; None as nothing."""
    if seconds is None:
        return ""
    whole = round(max(0.0, seconds))
    if whole >= _DAY_S:
        return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S:02}:{whole % _HOUR_S // _MINUTE_S:02}"
    hours, minutes = divmod(whole // _MINUTE_S, _MINUTE_S)
    tail = f"{whole % _MINUTE_S:02}"
    return f"{hours}:{minutes:02}:{tail}" if hours else f"{minutes}:{tail}"


def size(number: float) -> str:
    """Write bytes as 512 B, 1.5 MB or 20 GB."""
    power = 0 if number < 1 else min(len(_UNITS) - 1, int(math.log(number, _STEP)))
    value = number / _STEP**power
    return f"{value:.{1 if power and value < _SMALL else 0}f} {_UNITS[power]}"


def local_time(text: object) -> str:
    """Write a time of the contract as this machine's clock shows it, with its zone; what is none, as nothing."""
    return _as_here(text, "%Y-%m-%d %H:%M:%S %Z")


def local_minute(text: object) -> str:
    """Write day and minute of a time of the contract, as this machine's clock shows it."""
    return _as_here(text, "%m-%d %H:%M")


def local_clock(text: object) -> str:
    """Write only the time of day of a time of the contract, as this machine's clock shows it."""
    return _as_here(text, "%H:%M:%S")


def _as_here(text: object, layout: str) -> str:
    try:
        return datetime.fromisoformat(str(text)).astimezone().strftime(layout)
    except (ValueError, OverflowError):
        return ""


def number(value: object) -> float | None:
    """Return a number that somebody else has sent; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows of equally many cells as lines whose columns stand below each other."""
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    for row in rows:
        yield "  ".join(_padded(row, widths)).rstrip()


def fitting(widths: Mapping[str, int], width: int, *, gap: int, dropped_first: Iterable[str]) -> list[str]:
    """Choose the columns that go into a line: all of them, or without one after the other of those to be dropped.

    Args:
        widths: of each column, in cells; it is as wide as that, or not there.
        width: of the line.
        gap: between two columns.
        dropped_first: in this order. What is not among them stays, whether it fits or not.
    """
    shown = dict(widths)
    for name in dropped_first:
        if sum(shown.values()) + gap * (len(shown) - 1) <= width:
            break
        del shown[name]
    return list(shown)


def shortened(text: str, cells: int) -> str:
    """Return a text of at most so many cells, its end replaced by an ellipsis if it had more."""
    return text if cell_len(text) <= cells else set_cell_size(text, max(0, cells - 1)).rstrip() + "…"


def many(number: int, noun: str) -> str:
    """Write a number of things: 1 job, 2 jobs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _padded(row: Iterable[str], widths: Iterable[int]) -> Iterator[str]:
    return (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
