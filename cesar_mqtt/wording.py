"""How durations, sizes and texts from elsewhere are written for a person; pure, any thread may call it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from rich.cells import cell_len

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
    """Write a time of the contract as this machine's clock shows it; what is none, as nothing."""
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return ""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


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


def _padded(row: Iterable[str], widths: Iterable[int]) -> Iterator[str]:
    return (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
