"""The bytes of an open file, as FFmpeg reads them. A `FileReader` belongs to the thread that decodes.

FFmpeg mixes up damage and a failing disk: many of its demuxers report a short read as EIO. So the errors of the
operating system are kept here, and FFmpeg sees the end of the file in their place.
"""

import math
import os
import time

from cesar_mqtt.audio.paths import io_failed


class FileReader:
    """A binary file for `av.open`. It never moves the position of the descriptor, and raises nothing while FFmpeg runs.

    Attributes:
        start: the byte of the file at which it begins: what comes before is not there.
        end: the byte at which it ends; None: at the end of the file.
        error: the first error of the operating system; None: none so far.
        timed_out: whether FFmpeg read on after the time that `allow` gave it; it then sees the end of the file.
        reached: the end of the farthest read, in bytes.
    """

    def __init__(self, descriptor: int, *, start: int = 0, end: int | None = None) -> None:
        self.start = start
        self.end = end
        self._descriptor = descriptor
        self._position = 0
        self._deadline = math.inf
        self.error: OSError | None = None
        self.timed_out = False
        self.reached = 0

    def allow(self, seconds: float) -> None:
        """Limit the time until the next call: in a file of the wrong kind FFmpeg may search for hours."""
        self._deadline = time.monotonic() + seconds

    def raise_error(self) -> None:
        """Report an error of the operating system. Raises JobFailedError: `audio_io_error`."""
        if self.error is not None:
            raise io_failed(self.error) from self.error

    def read_at(self, position: int, size: int) -> bytes:
        """Read at most `size` bytes; b"" at the end of the file and after an error."""
        if self.end is not None:
            size = min(size, self.end - self.start - position)
        if self.error is not None or size <= 0:
            return b""
        try:
            data = os.pread(self._descriptor, size, self.start + position)
        except OSError as exc:
            self.error = exc
            return b""
        if data:
            self.reached = max(self.reached, self.start + position + len(data))
        return data

    def read(self, size: int) -> bytes:
        if time.monotonic() > self._deadline:
            self.timed_out = True
            return b""
        data = self.read_at(self._position, size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = max(0, offset + (self.size() if base is None else base))
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """How many bytes there are from `start` on."""
        try:
            end = os.fstat(self._descriptor).st_size
            return max(0, (end if self.end is None else min(end, self.end)) - self.start)
        except OSError as exc:
            self.error = self.error or exc
            return self._position
