"""The reserve: room on the disk that is held for the changes that free some, for when nothing else fits.

Not locked: the ledger calls from one thread at a time.
"""

import contextlib
import os
from pathlib import Path

from cesar_mqtt.ledger.fsync import Disk

RESERVE_BYTES = 1 << 20
KEPT_FOR_COMMANDS = RESERVE_BYTES // 2
"""The part that the work on jobs leaves: running jobs to their end must not use up what a `delete` needs."""

_BLOCK_BYTES = 4096
_SLACK_BLOCKS = 2
"""A journal that grows by a line takes at most a block more than the line, and its file system one for itself."""
_SPARE_BYTES = 256 << 10
"""Restoring leaves so much for the journal. Uploads leave twice as much: so the reserve gets room before they do."""


class Reserve:
    """A file whose blocks are freed piece by piece, and taken again when there is room.

    On a file system that copies on write (btrfs, ZFS) it helps as far as freed blocks are available at once.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        """Take the blocks as far as there is room; a file that cannot be created is no error."""
        self._path = path
        self._disk = disk
        self._descriptor: int | None = None
        self._size = 0
        with contextlib.suppress(OSError):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._descriptor).st_size
        self.restore()

    def restore(self) -> None:
        """Take again what was freed, as far as there is room."""
        missing = RESERVE_BYTES - self._size
        if missing <= 0 or self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            status = os.fstatvfs(self._descriptor)
            blocks = min(missing, status.f_bavail * status.f_frsize - _SPARE_BYTES) // _BLOCK_BYTES
            if blocks > 0:
                end = self._size + blocks * _BLOCK_BYTES
                self._disk.allocate(self._descriptor, self._size, end)
                self._size = end

    def give_up(self, needed_bytes: int, *, keep_bytes: int) -> bool:
        """Free the blocks for a file that is to grow by `needed_bytes`; False: no more than `keep_bytes` are left."""
        blocks = -(-needed_bytes // _BLOCK_BYTES) + _SLACK_BLOCKS
        size = max(keep_bytes, self._size - blocks * _BLOCK_BYTES)
        if self._descriptor is None or size >= self._size:
            return False
        try:
            self._disk.truncate(self._descriptor, size)
        except OSError:
            return False
        self._size = size
        return True

    def close(self) -> None:
        """Leave the file as it is, for the next start; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
