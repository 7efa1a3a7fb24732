"""The journal: entries of JSON in one file, each on disk when `append` returns.

An entry is a line: a CRC-32, a blank, JSON, a line feed. Behind the last line the file is NUL bytes: it grows in steps
ahead of its use, for a sync that has no new size to record is a third cheaper and spares the medium.
Not locked: one thread at a time.
"""

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.json_codec import encode
from cesar_mqtt.ledger.fsync import Disk

FORMAT = 1
"""Of the ledger's files; a higher number in one of them means that a newer version wrote it."""

_STEP_BYTES = 256 << 10
_SECTOR_BYTES = 512


def check_format(path: Path, version: int) -> None:
    """Raise LedgerError when `path` says that a newer version wrote it."""
    if version > FORMAT:
        raise LedgerError(
            f"{path} has format {version}; this version of cesar-mqtt reads up to {FORMAT}. "
            "Install the newer version again."
        )


class Journal:
    """The file. It knows lines, not what they mean.

    After a failed append the file is put back to what it was. When that fails, too, `suspect` is true and has to be
    cured by `restart` before the next append, so that a line of unknown state is never followed by another.

    Attributes:
        size: where the last whole line ends, in bytes.
        suspect: whether it is unknown what stands behind `size`, or whether the file's name will outlast a power cut.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.size = 0
        self.suspect = False
        self._disk = disk
        self._reserved = 0
        self._descriptor: int | None = None

    def open(self, replay: Callable[[int, Any], None]) -> None:
        """Open or create the file, and hand the entry of each whole line to `replay`, with the line's number from 1.

        A last line that a crash has torn is dropped: it was never acknowledged to anybody. A whole one is written once
        more and synced, for whoever is told of it may act on it: it may be there only because the kernel remembers it,
        after a process that did not live to sync it, or whose sync failed (and would now succeed and do nothing).

        Raises:
            LedgerError: a line is damaged; nothing was changed.
            OSError: the disk refused.
        """
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        raw = self.path.read_bytes()
        last, end = self._replay(raw.rstrip(b"\0"), replay)
        if end:
            self._disk.write_all(self._descriptor, raw[last : end - 1] + b"\n", last)
        if raw.count(b"\0", end) != max(0, len(raw) - end):
            self._disk.truncate(self._descriptor, end)
        self._disk.sync(self._descriptor)
        self._disk.sync_folder(self.path.parent)
        self.size, self._reserved = end, os.fstat(self._descriptor).st_size

    def _replay(self, used: bytes, replay: Callable[[int, Any], None]) -> tuple[int, int]:
        """Return where the last whole line begins, and where it ends, or would with its line feed."""
        last = end = 0
        for number, line in enumerate(lines_of(used), start=1):
            body = body_of(line)
            if body is None:
                if end + len(line) == len(used) and is_torn(line, end):
                    break
                raise LedgerError(
                    f"{self.path} is damaged in line {number}. Nothing was changed. "
                    "`cesar-mqtt ledger check` tells what can be kept, `ledger repair` keeps it."
                )
            replay(number, json.loads(body))
            last, end = end, end + _PREFIX_BYTES + len(body) + 1
        return last, end

    def append(self, entry: Any) -> None:
        """Add a line; on return it is on disk.

        Raises:
            OSError: the disk refused, and there is no such line. Where even that cannot be said, `suspect` is true.
            ValueError, TypeError: `entry` is not JSON.
        """
        line, descriptor = _line(entry), self._open_descriptor
        disk, size = self._disk, self.size
        end = size + len(line)
        self.suspect = True  # also after whatever else may interrupt this
        try:
            if end > self._reserved:
                self._reserve(end)
            disk.write_all(descriptor, line, size)
            disk.sync_data(descriptor)
        except OSError:
            self._undo()
            raise
        self.size, self.suspect = end, False

    def _reserve(self, end: int) -> None:
        """Make room for more than the next line, if there is any: a nearly full disk may still take the line."""
        self._reserved = end - end % _STEP_BYTES + _STEP_BYTES
        try:
            self._disk.reserve(self._open_descriptor, self.size, self._reserved)
        except OSError:
            self._reserved = end

    def _undo(self) -> None:
        """Take back what a failed append may have left.

        A failed sync says nothing about what is on the medium, and the next one may lie (the kernel takes the pages for
        clean): only cutting the file, which makes its last block dirty again, and a good sync right then, count.
        """
        self._reserved = self.size
        try:
            self._disk.truncate(self._open_descriptor, self.size)
            self._disk.sync(self._open_descriptor)
        except OSError:
            return
        self.suspect = False

    def restart(self, header: Any, *, keep_from: int) -> None:
        """Replace the file, in one step, by one that has `header` and the lines from byte `keep_from` on.

        Raises:
            OSError: the disk refused; either file is there, and `suspect` is true if that may yet change.
        """
        tail = self._lines_from(keep_from)
        temporary = self.path.with_name(self.path.name + ".tmp")
        size = self._disk.create(temporary, (_line(header), tail))
        descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._disk.replace(temporary, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        # From here on the old file has no name: not one more line may go there, whatever the folder's sync says.
        self.close()
        self._descriptor, self.size, self._reserved, self.suspect = descriptor, size, size, True
        self._disk.sync_folder(self.path.parent)
        self.suspect = False

    def _lines_from(self, offset: int) -> bytes:
        tail = os.pread(self._open_descriptor, self.size - offset, offset)
        if len(tail) != self.size - offset or any(body_of(line) is None for line in lines_of(tail)):
            self.suspect = True
            raise OSError(errno.EIO, "the journal does not read back as it was written")
        return tail

    def remove(self) -> None:
        """Close and delete the file; durable on return. Raises OSError."""
        self.close()
        self._disk.remove(self.path)
        self._disk.sync_folder(self.path.parent)

    def close(self) -> None:
        """Close the file as it is; can be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def closed(self) -> bool:
        """Whether the file is not open."""
        return self._descriptor is None

    @property
    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise LedgerError(f"The ledger's journal {self.path} is closed.")
        return self._descriptor


_PREFIX_BYTES = 9


def _line(entry: Any) -> bytes:
    body = encode(entry)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def body_of(line: bytes) -> bytes | None:
    """Return the JSON of a line, None for a damaged one. A line whose line feed alone is missing or wrong is whole."""
    for body in (line[_PREFIX_BYTES:-1], line[_PREFIX_BYTES:]):
        if body and line[:_PREFIX_BYTES] == b"%08x " % zlib.crc32(body):
            return body
    return None


def lines_of(raw: bytes) -> Iterator[bytes]:
    """Yield the lines of a journal, each with its line feed; the last one may have none."""
    start = 0
    while start < len(raw):
        end = raw.find(b"\n", start) + 1 or len(raw)
        yield raw[start:end]
        start = end


def is_torn(line: bytes, start: int) -> bool:
    """Tell a last line that a crash tore from one that was whole and has been damaged since.

    A power cut leaves out the end, or whole sectors, in any order: those are NUL, which JSON never has. One byte alone
    is no proof of that. (Where a medium later loses all that a sector holds of the last line, that transaction is taken
    for torn: there is no telling the two apart.)
    """
    if not line.endswith(b"\n"):
        return True
    first = _SECTOR_BYTES - start % _SECTOR_BYTES
    cuts = [0, *range(first, len(line), _SECTOR_BYTES), len(line)]
    sectors = (line[a:b] for a, b in pairwise(cuts))
    return any(len(sector) > 1 and not sector.strip(b"\0") for sector in sectors)
