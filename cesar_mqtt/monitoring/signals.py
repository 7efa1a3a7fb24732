"""Being asked to stop: the first SIGTERM, SIGINT or SIGHUP asks for a graceful stop, the second for an immediate end.

The main thread enters `handle_stop_signals`; any thread may look at, or wait for, what it yields.
"""

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cesar_mqtt.errors import ExitCode

_Handler = Callable[[int, FrameType | None], object] | int | None

_EXIT_CODES = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,  # the terminal is closed; unless it is ignored, as `nohup` has it
}


class StopSignals:
    """What the signals asked for so far; safe to read from any thread, and nothing in it is ever taken back.

    Attributes:
        requested: set by the first signal: finish the current job, then stop.
        forced: set by the second signal: stop at once.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.forced = threading.Event()
        self._latest: signal.Signals | None = None

    @property
    def exit_code(self) -> ExitCode:
        """What a stop that was cut short returns: by the second signal or, for want of one, the first; else OK."""
        return ExitCode.OK if self._latest is None else _EXIT_CODES[self._latest]

    def record(self, number: signal.Signals) -> None:
        """Take note of one signal; the code is in place before the event that tells of it. A third changes nothing."""
        if self.forced.is_set():
            return
        self._latest = number
        (self.forced if self.requested.is_set() else self.requested).set()


@contextmanager
def handle_stop_signals() -> Iterator[StopSignals]:
    """Turn these signals into events for the duration of the block; afterwards the former handlers are back.

    A handler runs between any two steps of the main thread, even while that holds the lock inside an Event, where
    `Event.set` would wait for ever. So it only puts a number into a SimpleQueue, whose `put` is reentrant (says the
    documentation of `queue`), and the thread "signals" sets the events.

    Raises:
        ValueError: not called in the main thread.
    """
    stop = StopSignals()
    arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.put(number)

    def pass_on() -> None:
        while (number := arrived.get()) is not None:
            stop.record(signal.Signals(number))

    thread = threading.Thread(target=pass_on, name="signals", daemon=True)
    former: dict[signal.Signals, _Handler] = {}
    thread.start()
    try:
        for number in _EXIT_CODES:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, note)
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        arrived.put(None)
        thread.join()
