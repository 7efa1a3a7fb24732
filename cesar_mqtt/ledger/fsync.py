"""Durable writes: every system call that durability depends on.

Stateless; any thread may call it. `Disk` is a class so that a test can replace it by one that fails.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has none


def _write_zeros(descriptor: int, offset: int, size: int) -> None:
    if os.pwrite(descriptor, bytes(size), offset) < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_allocate = getattr(os, "posix_fallocate", _write_zeros)  # macOS has none


class Disk:
    """The system calls; each raises OSError."""

    timed: Callable[[], contextlib.AbstractContextManager[object]] | None = None
    """Returns a context manager that is entered for each sync, such as a timer; None: syncs are not timed."""

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write some of `data` at `offset` and return how many bytes that was, as `os.pwrite` does."""
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """Write the file's content and size to the medium."""
        self._sync(os.fsync, descriptor)

    def sync_data(self, descriptor: int) -> None:
        """As `sync` without the file's times; cheaper if the size has not changed."""
        self._sync(_fdatasync, descriptor)

    def _sync(self, sync: Callable[[int], None], descriptor: int) -> None:
        if self.timed is None:
            sync(descriptor)
        else:
            with self.timed():
                sync(descriptor)

    def reserve(self, descriptor: int, start: int, end: int) -> None:
        """Extend the file to `end` with NUL bytes, in advance of later writes; on a full disk by fewer bytes.

        They are written, not only allocated: the first sync into unwritten blocks has to record them as written, which
        took a tenth longer (ext4).
        """
        os.pwrite(descriptor, bytes(end - start), start)

    def allocate(self, descriptor: int, start: int, end: int) -> None:
        """Extend the file from `start` to `end` by blocks that exist; after an error it has its old size."""
        try:
            _allocate(descriptor, start, end - start)
        except OSError:
            os.ftruncate(descriptor, start)
            raise

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file to `size` bytes; durable only after `sync`."""
        os.ftruncate(descriptor, size)

    def replace(self, source: Path, target: Path) -> None:
        """Rename atomically, replacing `target`; durable only after `sync_folder`."""
        os.replace(source, target)  # noqa: PTH105 - one call for one system call

    def remove(self, path: Path) -> None:
        """Remove a file, which may be missing; durable only after `sync_folder`."""
        path.unlink(missing_ok=True)

    def write_all(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write every byte of `data` at `offset`; a short write is continued."""
        written = self.write(descriptor, data, offset)
        while written < len(data):
            written += self.write(descriptor, memoryview(data)[written:], offset + written)

    def sync_folder(self, folder: Path) -> None:
        """Write the names in `folder` to the medium."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def put(self, path: Path, chunks: Iterable[bytes]) -> int:
        """Replace the file at `path`, atomically; on return it is on disk under that name.

        After an error either the old or the new file is there, complete.

        Returns:
            The size of the new file in bytes.
        """
        temporary = path.with_name(path.name + ".tmp")
        size = self.create(temporary, chunks)
        self.replace(temporary, path)
        self.sync_folder(path.parent)
        return size

    def create(self, path: Path, chunks: Iterable[bytes]) -> int:
        """Write a new file and sync it; its name is durable only after `sync_folder`. Returns its size in bytes.

        What has the name already is removed, and never written through: it may be a link that someone has put there.
        After an error the file is removed: it may have filled the disk.
        """
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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
