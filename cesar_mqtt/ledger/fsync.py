"""Durable writes: the few calls to the operating system that the promises rest on, in one place.

Nothing here keeps state; any thread may call it. `Disk` is a class so that a test can put a failing one in its place.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has none


class Disk:
    """The primitives; each raises OSError as the operating system gives it.

    Attributes:
        timed: returns a context manager that is entered for each sync, such as a timer.
    """

    timed: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write some of `data` at `offset` and return how many bytes that was, as `os.pwrite` does."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Return when the file's content and size are on the medium."""
        with self.timed():
            os.fsync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        """As `sync`, less what reading back does not need (the times); cheaper when the size is as it was."""
        with self.timed():
            _fdatasync(descriptor)

    def reserve(self, descriptor: int, start: int, end: int) -> None:
        """Let the file reach to `end`, with NUL bytes: the room is there to be written to.

        They are written, not only allocated: the first sync into blocks that never were has to record that they are
        now, and took a tenth longer for it (ext4). Where not all of them can be, there is less room.
        """
        os.pwrite(descriptor, bytes(end - start), start)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file to `size` bytes; durable only after `sync`."""
        os.ftruncate(descriptor, size)

    def replace(self, source: Path, target: Path) -> None:
        """Give `source` the name `target` in one step; durable only after `sync_folder`."""
        os.replace(source, target)  # noqa: PTH105 - one call for one system call

    def remove(self, path: Path) -> None:
        """Remove a file that may be missing; durable only after `sync_folder`."""
        path.unlink(missing_ok=True)

    def write_all(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write every byte of `data` at `offset`; a short write is continued."""
        written = self.write(descriptor, data, offset)
        while written < len(data):
            written += self.write(descriptor, memoryview(data)[written:], offset + written)

    def sync_folder(self, folder: Path) -> None:
        """Return when the names in `folder` are on the medium."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def put(self, path: Path, chunks: Iterable[bytes]) -> int:
        """Write a file in place of what bears its name; on return it is on disk under that name. Returns its size.

        After an error either is there, whole.
        """
        temporary = path.with_name(path.name + ".tmp")
        size = self.create(temporary, chunks)
        self.replace(temporary, path)
        self.sync_folder(path.parent)
        return size

    def create(self, path: Path, chunks: Iterable[bytes]) -> int:
        """Write a new file and sync it; its name is durable only after `sync_folder`. Returns its size in bytes.

        After an error nothing is left of it: what has filled a disk must not go on filling it.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        size = 0
        try:
            for chunk in chunks:
                self.write_all(descriptor, chunk, size)
                size += len(chunk)
            self.sync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(path)
            raise
        finally:
            os.close(descriptor)
        return size
