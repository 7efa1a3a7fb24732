"""Ctrl-C in a command: it ends with exit code 130 and without a traceback, whatever it is doing.

Imports nothing heavy, since it is in force before anything else is imported. For the main thread.
"""

import os
import signal
import sys
from collections.abc import Callable

_INTERRUPTED = 130
_SHOW_CURSOR = b"\x1b[?25h"

_requested = False


def is_requested() -> bool:
    """Whether Ctrl-C was pressed: a library may turn the KeyboardInterrupt into another error, or drop it."""
    return _requested


def run_interruptibly(load: Callable[[], Callable[[], int]]) -> int:
    """Return the exit code of a command; for the rest of the process Ctrl-C ends it at once.

    Where SIGINT is ignored, as in the background of a script, it stays so.

    Args:
        load: imports the command. An interrupted import may raise anything, so that Ctrl-C ends the process meanwhile.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return load()()
    signal.signal(signal.SIGINT, _leave)
    sys.unraisablehook = _leave_or_report
    command, code = load(), _INTERRUPTED
    try:
        signal.signal(signal.SIGINT, _interrupt)
        code = command()
        signal.signal(signal.SIGINT, _leave)
    except BaseException:
        if not _requested:
            raise
    signal.signal(signal.SIGINT, _leave)  # at its exit the interpreter runs code of libraries, too
    return _INTERRUPTED if _requested else code


def _interrupt(*_: object) -> None:
    """End the command in order the first time, so that it removes its temporary files, and at once the second time."""
    global _requested  # noqa: PLW0603 - a process has one SIGINT
    if _requested:
        _leave()
    _requested = True
    raise KeyboardInterrupt


def _leave(*_: object) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR)  # a progress bar hides it
    os._exit(_INTERRUPTED)


def _leave_or_report(unraisable: "sys.UnraisableHookArgs") -> None:
    """Leave if the interrupt came in a destructor, where it would be reported and dropped."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)
