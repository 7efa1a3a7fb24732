"""The writer of the log of `serve`: a thread, so that a full pipe that is not read blocks no other thread."""

import os
import threading
from collections import deque
from contextlib import suppress

MAX_WAITING_LINES = 10_000


class LogWriter:
    """Owns the thread `log`, which writes lines to a descriptor; any thread may call the methods, which never wait.

    A line that cannot be written, to a closed pipe or a full disk, is dropped. The thread is a daemon: blocked in a
    write, it does not hold up the end of the process.
    """

    def __init__(self, descriptor: int, *, max_waiting: int = MAX_WAITING_LINES) -> None:
        """Start the thread; at most `max_waiting` lines wait to be written."""
        self._descriptor = descriptor
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> bool:
        """Enqueue a line; False: too many are waiting, and it is dropped."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append(f"{line}\n".encode(errors="backslashreplace"))
            self._changed.notify_all()
            return True

    @property
    def has_room(self) -> bool:
        """Whether a few more lines can be enqueued."""
        return len(self._waiting) < self._max_waiting - 1

    def close(self, timeout_s: float) -> None:
        """Write what is waiting, for at most so long; may be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while lines := self._take():
            for line in lines:
                self._write(line)

    def _take(self) -> list[bytes]:
        """Wait for lines and return them; none: the writer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            lines = list(self._waiting)
            self._waiting.clear()
            return lines

    def _write(self, line: bytes) -> None:
        # Not through `sys.stderr`: at its exit the interpreter would wait for the lock of that stream.
        with suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]
