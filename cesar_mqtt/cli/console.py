"""What a command writes: stdout is its product, stderr is for the person; any thread may call it.

A stdout that cannot be written is an error, but for a reader that has enough, as `head` has. A stderr that cannot be
written changes nothing: what was to be said is lost, and the exit code stays what it is.
"""

import os
import sys
from contextlib import suppress
from typing import TextIO

from cesar_mqtt.errors import CesarError


class OutputError(CesarError):
    """Stdout cannot be written."""


def out(text: str, *, flush: bool = False) -> None:
    """Print a line of the product.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: nobody reads any more.
    """
    try:
        print(text, flush=flush)  # noqa: T201 - stdout is the product
    except OSError as exc:
        raise _translated(exc) from exc


def write(data: bytes) -> None:
    """Write a file byte by byte behind what was printed. Raises as `out`."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as exc:
        raise _translated(exc) from exc


def say(text: str) -> None:
    """Tell the person something."""
    tell(f"cesar-mqtt: {text}")


def tell(line: str) -> None:
    """Write a line to stderr as it is."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal


def open_closed_streams() -> None:
    """Put the null device in the place of standard streams that are closed (`2>&-`).

    Else the next file to be opened, the ledger perhaps, would get a number on which libraries write their messages.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def flush() -> None:
    """Write out what is still buffered, so that the interpreter's own last flush cannot fail and change the exit code.

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
    """Flush; what cannot be written goes to the null device. Raises OSError."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):  # a test's stream has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        raise


def _translated(exc: OSError) -> OSError | OutputError:
    return exc if isinstance(exc, BrokenPipeError) else OutputError(f"Stdout cannot be written: {exc.strerror}.")
