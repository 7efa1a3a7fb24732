"""A file that is still being written while it is decoded: how to notice, and how long to wait.

A `GrowthWatch` belongs to the thread that opened the file.
"""

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable

_POLL_S = 0.25
_SETTLED_S = 3.0
"""A file that has not grown for so long has ended, or its recorder is paused: what there is will be transcribed."""
_RECENT_S = 10.0
"""Of a file that was last written before that, no lease is asked for: some network shares always report writers."""


class GrowthWatch:
    """Watches one open file from its opening on.

    Attributes:
        changed: whether it was still being written when the time ran out, or was changed or cut in place.
    """

    def __init__(self, descriptor: int, timeout_s: float) -> None:
        self.changed = False
        self._descriptor = descriptor
        self._left_s = timeout_s
        self._seen = os.fstat(descriptor)

    def has_grown(self, should_stop: Callable[[], bool], *, is_complete: bool = True) -> bool:
        """Whether there is more of the file than at the last call, or at its opening; waits while it is written.

        Once the time has run out, what is new no longer counts.

        Args:
            should_stop: asked four times a second; True ends the wait.
            is_complete: whether what there is looks like a whole recording.
        """
        before, now = self._seen, os.fstat(self._descriptor)
        if self._left_s <= 0:
            self.changed = self.changed or now.st_size != before.st_size
            return False
        if now.st_size != before.st_size or _is_being_written(self._descriptor, now, is_complete=is_complete):
            now = self._wait(now, should_stop)
        self._seen = now
        grown = now.st_size > before.st_size
        # Written again in place, or cut: what was decoded is of two recordings.
        self.changed = self.changed or now.st_size < before.st_size
        self.changed = self.changed or (not grown and now.st_mtime_ns != before.st_mtime_ns)
        return grown

    def _wait(self, now: os.stat_result, should_stop: Callable[[], bool]) -> os.stat_result:
        """Wait until no process writes any more, or nothing has come for a while, or the time is over."""
        pause = threading.Event()
        started = grown_at = time.monotonic()
        while not should_stop():
            pause.wait(_POLL_S)
            later = os.fstat(self._descriptor)
            at = time.monotonic()
            if later.st_size != now.st_size:
                grown_at = at
            elif at - grown_at > _SETTLED_S or not _is_being_written(self._descriptor, later, is_complete=True):
                return os.fstat(self._descriptor)
            now = later
            if at - started > self._left_s:
                self.changed = True
                break
        self._left_s = max(0.0, self._left_s - (time.monotonic() - started))
        return now


def _is_being_written(descriptor: int, status: os.stat_result, *, is_complete: bool) -> bool:
    """Whether another process has the file open for writing, as far as the system tells."""
    if time.time() - status.st_mtime > _RECENT_S:
        return False
    try:
        # A lease for reading is given only while no process has the file open for writing (fcntl(2)). A process that
        # opens it before the lease is returned causes a signal, here one that does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except AttributeError:  # no Linux
        return not is_complete
    except OSError as exc:
        return exc.errno == errno.EAGAIN or not is_complete
    return False
