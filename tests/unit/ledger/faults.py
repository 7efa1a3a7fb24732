"""Disks that fail on demand, and one that knows what a power cut would leave."""

import errno
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cesar_mqtt.ledger.fsync import Disk

SECTOR_BYTES = 512

Fault = Callable[[str], None]
"""Called with the name of each system call before it is made; raises to make it fail."""


class Killed(BaseException):
    """The process dies here. Not an Exception, so that no handler of the code under test continues."""


def nothing(_primitive: str) -> None:
    """Let every call succeed."""


def failing(*, times: float = 1, skip: int = 0, only: str | None = None, code: int = errno.EIO) -> Fault:
    """Let `times` calls fail after `skip` others; only calls of one kind, or all."""
    seen = 0

    def fault(primitive: str) -> None:
        nonlocal seen
        if only in (None, primitive):
            seen += 1
            if skip < seen <= skip + times:
                raise OSError(code, os.strerror(code))

    return fault


def killing(*, skip: int) -> Fault:
    """Let the process die after `skip` calls; every later call dies, too."""
    seen = 0

    def fault(_primitive: str) -> None:
        nonlocal seen
        seen += 1
        if seen > skip:
            raise Killed

    return fault


class QuickDisk(Disk):
    """Does not wait for the medium; for tests that open hundreds of ledgers."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_data(self, descriptor: int) -> None:
        pass


class FaultyDisk(QuickDisk):
    """Calls `fault` before each system call. A failed write has written half of its bytes.

    Attributes:
        calls: the names of the system calls made.
        short: the most bytes that one write takes.
    """

    def __init__(self, fault: Fault = nothing, *, short: int | None = None) -> None:
        self.fault = fault
        self.short = short
        self.calls: list[str] = []

    def heal(self) -> None:
        self.fault = nothing

    def _call(self, primitive: str) -> None:
        self.calls.append(primitive)
        self.fault(primitive)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        try:
            self._call("write")
        except (OSError, Killed):
            super().write(descriptor, data[: len(data) // 2], offset)
            raise
        return super().write(descriptor, data[: self.short], offset)

    def sync(self, descriptor: int) -> None:
        self._call("sync")
        super().sync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        self._call("sync_data")
        super().sync_data(descriptor)

    def reserve(self, descriptor: int, start: int, end: int) -> None:
        self._call("reserve")
        super().reserve(descriptor, start, end)

    def truncate(self, descriptor: int, size: int) -> None:
        self._call("truncate")
        super().truncate(descriptor, size)

    def replace(self, source: Path, target: Path) -> None:
        self._call("replace")
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._call("remove")
        super().remove(path)


@dataclass(eq=False)
class _File:
    """What is on the medium for certain, and the unsynced writes; `data` of None stands for a new size."""

    medium: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


class PoweredDisk(FaultyDisk):
    """Models what the medium may hold if the power fails now, according to POSIX.

    A write is on the medium after a sync of its file, a name after a sync of its folder; before that, any of its
    sectors may be there or not. After a failed sync its data is there or not, and no later sync changes that: the
    kernel marks the pages as clean.

    Attributes:
        on_step: called after each system call.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)  # noqa: S311
        self.on_step: Callable[[], None] = lambda: None
        self._files: dict[str, _File] = {}
        self._durable: dict[str, _File] = {}
        self._renames: list[tuple[str, str | None, _File | None]] = []

    def media(self) -> dict[str, bytes]:
        """Return one possible content of the folder after a power cut now, by file name."""
        names = dict(self._durable)
        for rename in self._renames[: self.random.randint(0, len(self._renames))]:
            _rename(names, *rename)
        return {name: bytes(self._settle(file)) for name, file in names.items()}

    def _settle(self, file: _File) -> bytearray:
        content = bytearray(file.medium)
        luck = self.random.choice((0.0, 0.5, 0.9, 1.0))
        for offset, data in file.pending:
            if data is None:
                if self.random.random() < luck:
                    _resize(content, offset)
                continue
            for start, piece in _sectors(data, offset):
                if self.random.random() < luck:
                    _resize(content, max(len(content), start + len(piece)))
                    content[start : start + len(piece)] = piece
        return content

    # -- recording of the calls ----------------------------------------------------------------------------------

    def _file(self, descriptor: int) -> _File:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name.endswith(" (deleted)"):
            return _File()
        if name not in self._files:  # it was opened without this class
            self._files[name] = _File()
            self._renames.append((name, None, self._files[name]))
        return self._files[name]

    def create(self, path: Path, chunks: Iterable[bytes]) -> int:
        if path.name in self._files:
            self._files[path.name].pending.append((0, None))
        return super().create(path, chunks)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        file, content = self._file(descriptor), bytes(data)
        try:
            written = super().write(descriptor, data, offset)
        except OSError:
            file.pending.append((offset, content[: len(content) // 2]))
            self.on_step()
            raise
        file.pending.append((offset, content[:written]))
        self.on_step()
        return written

    def sync(self, descriptor: int) -> None:
        folder = Path(f"/proc/self/fd/{descriptor}").is_dir()
        try:
            super().sync(descriptor)
        except OSError:
            if not folder:
                self._sync_failed(descriptor)
            raise
        if folder:
            self._durable, self._renames = dict(self._files), []
        else:
            self._synced(descriptor)
        self.on_step()

    def sync_data(self, descriptor: int) -> None:
        try:
            super().sync_data(descriptor)
        except OSError:
            self._sync_failed(descriptor)
            raise
        self._synced(descriptor)
        self.on_step()

    def _synced(self, descriptor: int) -> None:
        file = self._file(descriptor)
        for offset, data in file.pending:
            _resize(file.medium, offset if data is None else max(len(file.medium), offset + len(data)))
            if data is not None:
                file.medium[offset : offset + len(data)] = data
        file.pending.clear()

    def _sync_failed(self, descriptor: int) -> None:
        file = self._file(descriptor)
        file.medium = self._settle(file)
        file.pending.clear()
        self.on_step()

    def reserve(self, descriptor: int, start: int, end: int) -> None:
        super().reserve(descriptor, start, end)
        self._file(descriptor).pending.append((os.fstat(descriptor).st_size, None))
        self.on_step()

    def truncate(self, descriptor: int, size: int) -> None:
        super().truncate(descriptor, size)
        self._file(descriptor).pending.append((size, None))
        self.on_step()

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._name(target.name, source.name)

    def remove(self, path: Path) -> None:
        super().remove(path)
        if path.name in self._files:
            self._name(path.name, None)

    def _name(self, name: str, source: str | None) -> None:
        rename = (name, source, None)
        _rename(self._files, *rename)
        self._renames.append(rename)
        self.on_step()


def _rename(names: dict[str, _File], name: str, source: str | None, new: _File | None) -> None:
    """Make `name` a new file, or the file of `source`, or remove it."""
    if new is not None:
        names[name] = new
    elif source is not None:
        names[name] = names.pop(source)
    else:
        names.pop(name, None)


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _sectors(data: bytes, offset: int) -> Iterable[tuple[int, bytes]]:
    start = offset
    while start < offset + len(data):
        end = min(offset + len(data), start - start % SECTOR_BYTES + SECTOR_BYTES)
        yield start, data[start - offset : end - offset]
        start = end
