"""Output of the commands: results on stdout, messages for the person on stderr; any thread may call these.

A stdout that cannot be written is an error, except where the reader closed the pipe, as `head` does. A stderr that
cannot be written changes nothing: the message is lost and the exit code stays. Every command imports this module: rich,
which takes 0.1 s to import, is imported only for a table.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from cesar_mqtt.errors import CesarError

if TYPE_CHECKING:
    from rich.table import Table

GAP = 2
"""Cells between two columns."""
_ANY_WIDTH = 10_000


class OutputError(CesarError):
    """Stdout cannot be written."""


def out(text: str, *, flush: bool = False) -> None:
    """Print a line of the result.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: the reader closed the pipe.
    """
    try:
        print(text, flush=flush)  # noqa: T201 - the result goes to stdout
    except OSError as exc:
        raise _translated(exc) from exc


def write(data: bytes) -> None:
    """Write bytes to stdout, after what was printed. Raises as `out`."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as exc:
        raise _translated(exc) from exc


def print_message(text: str) -> None:
    """Print a message for the person, after the program's name."""
    print_line(f"cesar-mqtt: {text}")


def print_line(line: str) -> None:
    """Print a line on stderr as it is."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal


def new_table(*, show_header: bool = True) -> "Table":
    """Return a table without lines, its columns `GAP` cells apart."""
    from rich.table import Table  # noqa: PLC0415 - see the docstring of the module

    return Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold", show_header=show_header)


def print_table(table: "Table") -> None:
    """Print a table on stdout; where that is no terminal, nothing is cut or wrapped. Raises as `out`."""
    from rich.console import Console  # noqa: PLC0415 - see the docstring of the module

    console = Console()
    if not console.is_terminal:
        console = Console(width=_ANY_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        out(line.rstrip())


def columns_that_fit(widths: Mapping[str, int], width: int, *, gap: int, dropped_first: Iterable[str]) -> list[str]:
    """Choose the columns of a line: all of them, or without as many of `dropped_first`, in order, as have no room.

    Args:
        widths: the width of each column, in cells.
        width: of the line.
        gap: between two columns.
        dropped_first: a column that is not among them stays, whether it fits or not.
    """
    shown = dict(widths)
    for name in dropped_first:
        if sum(shown.values()) + gap * (len(shown) - 1) <= width:
            break
        del shown[name]
    return list(shown)


def open_closed_streams() -> None:
    """Open the null device for standard streams that are closed (`2>&-`).

    Otherwise the next file to be opened, such as the ledger, would get the descriptor that libraries log to.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def flush() -> None:
    """Flush both streams, so that the interpreter's own last flush cannot fail and change the exit code.

    Raises:
        OutputError: stdout cannot be written.
    """
    with suppress(OSError):
        _flush(sys.stderr)
    try:
        _flush(sys.stdout)
    except BrokenPipeError:
        pass
    except OSError as exc:
        raise _translated(exc) from exc


def _flush(stream: TextIO) -> None:
    """Flush a stream; send what cannot be written to the null device. Raises OSError."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):  # a test's stream has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        raise


def _translated(exc: OSError) -> OSError | OutputError:
    return exc if isinstance(exc, BrokenPipeError) else OutputError(f"Stdout cannot be written: {exc.strerror}.")
