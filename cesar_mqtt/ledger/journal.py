"""The journal: JSON entries in one append-only file, each on disk when `append` returns.

An entry is a line: CRC-32, a space, JSON, a line feed. After the last line the file is NUL bytes: it grows in steps in
advance, since a sync without a new file size is a third cheaper and wears the medium less.
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
"""Format of the ledger's files; a higher number in one of them means that a newer version wrote it."""

REPAIR_ADVICE = (
    "Nothing was changed. `cesar-mqtt ledger check` lists what can be recovered, "
    "`cesar-mqtt ledger repair` recovers it."
)

_STEP_BYTES = 256 << 10
_SECTOR_BYTES = 512


def check_format(path: Path, version: int) -> None:
    """Raise LedgerError if a newer version wrote `path`."""
    if version > FORMAT:
        raise LedgerError(
            f"{path} has format {version}; this version of cesar-mqtt reads up to {FORMAT}. "
            "Install the newer version again."
        )


class Journal:
    """The file: it knows lines, not their meaning.

    After a failed append the file is restored to what it was. If that fails, too, `suspect` is true, and `restart` has
    to replace the file before the next append: a line of unknown state must never be followed by another one.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.size = 0
        """Where the last complete line ends, in bytes."""
        self.suspect = False
        """Whether the content after `size` is unknown, or whether the file's name might not survive a power cut."""
        self._disk = disk
        self._reserved = 0
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether the open file still has its name: what is appended to another one is lost at the next start."""
        try:
            return _identity(os.stat(self.path)) == self._identity  # noqa: PTH116 - asked for each transaction
        except OSError:
            return False

    @property
    def has_begun(self) -> bool:
        """Whether the file is there with a first line, whole or damaged; a header is never torn. Raises OSError."""
        try:
            first = next(lines_of(self.path.read_bytes().rstrip(b"\0")), b"")
        except FileNotFoundError:
            return False
        return body_of(first) is not None or not is_torn(first, 0)

    def open(self, replay: Callable[[int, Any], None]) -> None:
        """Open or create the file, and pass the entry of each complete line to `replay`, with its number from 1.

        A last line that a crash has torn is dropped: it was never acknowledged. A complete last line is written again
        and synced before anything acts on it: it may exist in the kernel's cache only, left by a process that died
        before its sync or whose sync failed (another sync would then succeed and do nothing).

        Raises:
            LedgerError: a line is damaged; nothing was changed.
            OSError: the disk failed.
        """
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        raw = self.path.read_bytes()
        last, end = self._replay(raw.rstrip(b"\0"), replay)
        if end:
            self._disk.write_all(self._descriptor, raw[last : end - 1] + b"\n", last)
        if raw.count(b"\0", end) != max(0, len(raw) - end):
            self._disk.truncate(self._descriptor, end)
        self._disk.sync(self._descriptor)
        self._disk.sync_folder(self.path.parent)
        status = os.fstat(self._descriptor)
        self.size, self._reserved, self._identity = end, status.st_size, _identity(status)

    def _replay(self, used: bytes, replay: Callable[[int, Any], None]) -> tuple[int, int]:
        """Return where the last complete line begins and ends, as if it had its line feed."""
        last = end = 0
        for number, line in enumerate(lines_of(used), start=1):
            body = body_of(line)
            if body is None:
                if end + len(line) == len(used) and is_torn(line, end):
                    break
                raise LedgerError(f"{self.path} is damaged in line {number}. {REPAIR_ADVICE}")
            replay(number, json.loads(body))
            last, end = end, end + _PREFIX_BYTES + len(body) + 1
        return last, end

    def append(self, entry: Any, *, exact: bool = False) -> None:
        """Add a line; on return it is on disk.

        Args:
            entry: what the line holds.
            exact: whether the file grows by no more than the line.

        Raises:
            OSError: the disk failed, and the line does not exist; if not even that is certain, `suspect` is true.
            ValueError, TypeError: `entry` is not JSON.
        """
        line, descriptor = _line(entry), self._open_descriptor
        disk, size = self._disk, self.size
        end = size + len(line)
        self.suspect = True  # stays so after any other exception, such as KeyboardInterrupt
        try:
            if end > self._reserved:
                self._reserve(end, exact=exact)
            disk.write_all(descriptor, line, size)
            disk.sync_data(descriptor)
        except OSError:
            self._undo()
            raise
        self.size, self.suspect = end, False

    def _reserve(self, end: int, *, exact: bool) -> None:
        """Allocate more than the next line needs; if that fails, the disk may still have room for the line alone."""
        self._reserved = end
        if exact:
            return
        self._reserved = end - end % _STEP_BYTES + _STEP_BYTES
        try:
            self._disk.reserve(self._open_descriptor, self.size, self._reserved)
        except OSError:
            self._reserved = end

    def _undo(self) -> None:
        """Remove what a failed append may have left.

        After a failed sync the content of the medium is unknown, and the next sync may succeed without writing (the
        kernel marks the pages as clean). Truncating makes the last block dirty again; only a sync after that counts.
        """
        self._reserved = self.size
        try:
            self._disk.truncate(self._open_descriptor, self.size)
            self._disk.sync(self._open_descriptor)
        except OSError:
            return
        self.suspect = False

    def restart(self, header: Any, *, keep_from: int) -> None:
        """Replace the file, atomically, by one with `header` and the lines from byte `keep_from` on.

        Raises:
            OSError: the disk failed; the old or the new file is there, and `suspect` is true if that may still change.
        """
        tail = self._lines_from(keep_from)
        temporary = self.path.with_name(self.path.name + ".tmp")
        size = self._disk.create(temporary, (_line(header), tail))
        descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._disk.replace(temporary, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        # From here on the old file has no name: no line may be appended to it, even if the folder's sync fails.
        self.close()
        self._descriptor, self.size, self._reserved, self.suspect = descriptor, size, size, True
        self._identity = _identity(os.fstat(descriptor))
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
        """Close the file as it is; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def closed(self) -> bool:
        return self._descriptor is None

    @property
    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise LedgerError(f"The ledger's journal {self.path} is closed.")
        return self._descriptor


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


_PREFIX_BYTES = 9


def _line(entry: Any) -> bytes:
    body = encode(entry)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def body_of(line: bytes) -> bytes | None:
    """Return the JSON of a line; None: it is damaged. A line is complete even if its line feed is missing or wrong."""
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
    """Distinguish a last line that a crash tore from one that was complete and was damaged later.

    A power cut loses the end of the line, or whole sectors in any order: those are NUL, which JSON never contains. A
    single NUL byte is no proof. (If the medium later loses a whole sector of the last line, the line counts as torn:
    the two cases cannot be distinguished.)
    """
    if not line.endswith(b"\n"):
        return True
    first = _SECTOR_BYTES - start % _SECTOR_BYTES
    cuts = [0, *range(first, len(line), _SECTOR_BYTES), len(line)]
    sectors = (line[a:b] for a, b in pairwise(cuts))
    return any(len(sector) > 1 and not sector.strip(b"\0") for sector in sectors)
