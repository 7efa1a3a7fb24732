"""Stop signals: the first SIGTERM, SIGINT or SIGHUP asks for a graceful stop, the second for an immediate one.

The main thread enters `handle_stop_signals`; any thread may call the methods of what it yields.
"""

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from cesar_mqtt.errors import ExitCode

_Handler = Callable[[int, FrameType | None], object] | int | None

_EXIT_CODES = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,  # the terminal was closed; not handled where it is ignored, as under `nohup`
}


_FORCED_STOP_S = 15.0
"""How long after the second signal the process ends, whatever blocks it."""


class StopSignals:
    """The signals that have arrived. A stop that was requested or forced stays so."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Keeps the order of the signals when several threads read them; the signal handler never takes it."""
        self._numbers: list[int] = []
        self._count = 0
        self.on_forced: Callable[[int], object] = lambda _number: None
        """Called with the second signal, in its handler."""

    def is_requested(self) -> bool:
        """Whether a first signal asks to finish the running job and stop."""
        return bool(self._read())

    def is_forced(self) -> bool:
        """Whether a second signal asks to stop at once."""
        return len(self._read()) > 1

    @property
    def exit_code(self) -> ExitCode:
        """The code of a stop that was cut short: by the second signal, or by a timeout after the first; OK: no signal.

        A third signal changes nothing.
        """
        numbers = self._read()[:2]
        return _EXIT_CODES[signal.Signals(numbers[-1])] if numbers else ExitCode.OK

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the first signal; return whether it has arrived."""
        if not self.is_requested():
            # In the main thread a signal interrupts this `get`: its handler runs and fills the queue.
            with suppress(queue.Empty):
                number = self._arrived.get(timeout=timeout_s)
                with self._lock:
                    self._numbers.append(number)
        return self.is_requested()

    def request(self) -> None:
        """Ask for a graceful stop, as a first SIGTERM does; does nothing after a signal."""
        if not self.is_requested():
            self.arrive(signal.SIGTERM)

    def arrive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle one signal.

        A handler runs between any two steps of the main thread, even while that thread holds the lock of an Event,
        where `Event.set` would wait for ever. `SimpleQueue.put` is reentrant (documentation of `queue`).
        """
        self._arrived.put(number)
        self._count += 1
        if self._count == 2:  # noqa: PLR2004 - the second signal
            self.on_forced(number)

    def _read(self) -> list[int]:
        with self._lock, suppress(queue.Empty):
            while True:
                self._numbers.append(self._arrived.get_nowait())
        return self._numbers


def _end_soon(number: int) -> None:
    """End the process after a while, whatever blocks it: a forced stop takes a few seconds.

    A timer of the kernel, since a handler may not take the locks that a thread needs to start.
    """
    signal.signal(signal.SIGALRM, lambda *_: os._exit(_EXIT_CODES[signal.Signals(number)]))
    signal.setitimer(signal.ITIMER_REAL, _FORCED_STOP_S)


@contextmanager
def handle_stop_signals() -> Iterator[StopSignals]:
    """Handle the stop signals for the duration of the block; afterwards the former handlers are back.

    Raises:
        ValueError: not called in the main thread.
    """
    stop = StopSignals()
    former: dict[signal.Signals, _Handler] = {signal.SIGALRM: signal.getsignal(signal.SIGALRM)}
    stop.on_forced = _end_soon
    try:
        for number in _EXIT_CODES:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, stop.arrive)
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
