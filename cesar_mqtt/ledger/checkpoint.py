"""The checkpoint: all tables in one JSON file that stock TinyDB opens, with a header and a checksum as two more tables.

Any thread may write one from a `Snapshot`; one thread at a time per path.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.json_codec import encode
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.journal import FORMAT, REPAIR_ADVICE, check_format

Document = dict[str, Any]
Image = dict[str, dict[str, Document]]
"""Table name, then document id as a string (as in TinyDB's JSON), then the document."""

RESERVED = frozenset({"checkpoint", "checksum"})
"""Table names that the file itself uses."""

_CHECKSUM = b',\n"checksum": '
_END = b"}\n"
_COMPLETE = b"\n"
"""Behind the end: the file needs no journal. Opening the ledger removes it, in place; a field of the header would
change the checksum with it."""
_LINES_PER_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The storage at one moment; commits may go on meanwhile."""

    image: Image
    """Never changed."""
    transaction: int = 0
    """The last transaction in it."""
    watermark: int = 0
    journal_size: int = 0
    """Where the later transactions begin in the journal, in bytes."""
    is_complete: bool = False
    """Whether it needs no journal: the ledger was closed in order, or an earlier version wrote it, which did not tell.
    """


def save(snapshot: Snapshot, path: Path, *, disk: Disk) -> int:
    """Replace the file at `path` by `snapshot`; on return it is on disk under that name.

    Returns:
        The size of the file in bytes.

    Raises:
        OSError: the disk failed; either the old or the new file is there, complete.
    """
    return disk.put(path, chain(_with_checksum(_chunks(snapshot)), (_COMPLETE,) if snapshot.is_complete else ()))


def mark_incomplete(path: Path, *, disk: Disk) -> None:
    """Record, durably, that from now on the file needs its journal; it says nothing else. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, len(_END + _COMPLETE), max(0, size - len(_END + _COMPLETE))) == _END + _COMPLETE:
            disk.truncate(descriptor, size - len(_COMPLETE))
            disk.sync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> tuple[Snapshot, int] | None:
    """Read what `save` wrote; None if there is no such file.

    Returns:
        The snapshot, and the size of the file in bytes.

    Raises:
        LedgerError: the file is damaged, was changed by another program, or was written by a newer version.
        OSError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    marked = raw.endswith(_END + _COMPLETE)
    end = raw.rfind(_CHECKSUM)
    if end < 0 or raw[end : len(raw) - marked * len(_COMPLETE)] != _checksum(zlib.crc32(memoryview(raw)[:end])):
        raise LedgerError(
            f"{path} is damaged or was changed by another program: its checksum does not match. {REPAIR_ADVICE}"
        )
    tables = json.loads(raw)
    del tables["checksum"]
    header = tables.pop("checkpoint")["1"]
    check_format(path, header["format"])
    is_complete = marked or "journal" not in header
    return Snapshot(tables, header["transaction"], header["mark"], is_complete=is_complete), len(raw)


def _chunks(snapshot: Snapshot) -> Iterator[bytes]:
    """Yield the JSON, one document per line; the whole of it is never in memory."""
    header = {"format": FORMAT, "transaction": snapshot.transaction, "mark": snapshot.watermark, "journal": True}
    yield b'{"checkpoint": ' + encode({"1": header})
    for table, rows in snapshot.image.items():
        yield b",\n" + encode(table) + b": {"
        separator = b"\n"
        lines: list[bytes] = []
        for key, document in rows.items():
            lines.append(b'%s"%s": %s' % (separator, key.encode(), encode(document)))
            separator = b",\n"
            if len(lines) == _LINES_PER_CHUNK:
                yield b"".join(lines)
                lines.clear()
        yield b"".join(lines) + b"}"


def _with_checksum(chunks: Iterable[bytes]) -> Iterator[bytes]:
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
        yield chunk
    yield _checksum(crc)


def _checksum(crc: int) -> bytes:
    return _CHECKSUM + encode({"1": {"crc32": f"{crc:08x}"}}) + _END
