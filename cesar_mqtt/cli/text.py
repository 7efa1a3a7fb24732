"""Durations, sizes, times and untrusted text as a person reads them; pure, any thread may call these."""

import math
from collections.abc import Sequence
from datetime import datetime

_MINUTE_S = 60
_HOUR_S = 3600
_DAY_S = 24 * _HOUR_S
_UNITS = ("B", "kB", "MB", "GB", "TB")
_STEP = 1000.0
_SMALL = 10


def printable(text: str) -> str:
    """Return a text without control characters, so that it cannot steer the terminal; line ends become blanks."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else " " if char in "\t\r\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def readable(text: str) -> str:
    """Return a text of several lines without other control characters."""
    return "\n".join(printable(line) for line in text.splitlines())


def duration(seconds: float | None) -> str:
    """Format seconds as 0:07, 12:30 or 1:02:03, from a day on as 3 d 04:05; None as an empty text."""
    if seconds is None:
        return ""
    whole = round(max(0.0, seconds))
    if whole >= _DAY_S:
        return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S:02}:{whole % _HOUR_S // _MINUTE_S:02}"
    hours, minutes = divmod(whole // _MINUTE_S, _MINUTE_S)
    tail = f"{whole % _MINUTE_S:02}"
    return f"{hours}:{minutes:02}:{tail}" if hours else f"{minutes}:{tail}"


def size(number: float) -> str:
    """Format bytes as 512 B, 1.5 MB or 20 GB."""
    power = 0 if number < 1 else min(len(_UNITS) - 1, int(math.log(number, _STEP)))
    value = number / _STEP**power
    return f"{value:.{1 if power and value < _SMALL else 0}f} {_UNITS[power]}"


def local_time(text: object) -> str:
    """Format an RFC 3339 time in this machine's time zone, with the zone's name; anything else as an empty text."""
    return _local(text, "%Y-%m-%d %H:%M:%S %Z")


def local_minute(text: object) -> str:
    """Format day and minute of an RFC 3339 time in this machine's time zone."""
    return _local(text, "%m-%d %H:%M")


def local_clock(text: object) -> str:
    """Format the time of day of an RFC 3339 time in this machine's time zone."""
    return _local(text, "%H:%M:%S")


def _local(text: object, layout: str) -> str:
    try:
        return datetime.fromisoformat(str(text)).astimezone().strftime(layout)
    except (ValueError, OverflowError):
        return ""


def number(value: object) -> float | None:
    """Return an untrusted value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def many(number: int, noun: str) -> str:
    """Format a number of things: 1 job, 2 jobs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str], most: int = 5) -> str:
    """List names, of very many only the first: a.wav, b.wav and 7 more."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
