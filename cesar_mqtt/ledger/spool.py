"""The spool: uploaded audio, on disk before the ledger refers to it, until no job needs it any more.

Any thread may call it.
"""

import contextlib
import errno
import os
import resource
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from cesar_mqtt.errors import LedgerError, SpoolFullError, UploadRefusedError
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.reserve import RESERVE_BYTES

_LEFT_BYTES = 512 << 10
"""Uploads leave so much of the disk for the journal and the reserve."""


class Spool:
    """Files with generated names in one folder.

    Downloads, which other parts write into the folder, take no part in the limit: they are temporary, and their number
    and size have limits of their own.
    """

    def __init__(
        self,
        folder: Path,
        disk: Disk | None = None,
        *,
        max_bytes: int | None = None,
        beside: Callable[[], int] = lambda: 0,
    ) -> None:
        """Create the folder, durably, if it is missing. Raises LedgerError if that fails.

        Args:
            folder: the spool folder, in the data directory.
            disk: the durable writes; for tests.
            max_bytes: the size of all files together; None: what the disk holds.
            beside: the bytes of uploads that are stored elsewhere and count towards `max_bytes`.
        """
        self._folder = folder.resolve()
        self._disk = disk or Disk()
        self._max_bytes = sys.maxsize if max_bytes is None else max_bytes
        self._beside = beside
        self._lock = threading.Lock()
        """Guards the sizes."""
        self._sizes: dict[str, int] = {}
        self._used_bytes = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._disk.sync_folder(folder.parent)
            self._add({entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()})
        except OSError as exc:
            raise LedgerError(f"The spool folder {folder} cannot be created: {exc.strerror}.") from exc

    def _add(self, sizes: dict[str, int]) -> None:
        with self._lock:
            self._sizes |= sizes
            self._used_bytes += sum(sizes.values())

    @property
    def folder(self) -> Path:
        """The absolute path; downloads are stored there as well, and `sweep` deletes them like all other files."""
        return self._folder

    # -- room --------------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """How much of the limit is taken."""
        return self._used_bytes + self._beside()

    @property
    def room_bytes(self) -> int:
        """How much can be stored now; may be negative."""
        return min(self._max_bytes - self.used_bytes, self._free_bytes())

    def _free_bytes(self) -> int:
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return sys.maxsize
        # Some network file systems do not know their size.
        return status.f_bavail * status.f_frsize - _LEFT_BYTES if status.f_blocks else sys.maxsize

    @property
    def capacity_bytes(self) -> int:
        """The size of the largest file that can ever be stored: in an empty spool, beside the ledger as it is."""
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        capacity = self._max_bytes if limit == resource.RLIM_INFINITY else min(self._max_bytes, limit)
        try:
            status = os.statvfs(self._folder)
            ledger = sum(entry.stat().st_blocks * 512 for entry in os.scandir(self._folder.parent) if entry.is_file())
        except OSError:
            return capacity
        if not status.f_blocks:
            return capacity
        for_users = status.f_blocks - (status.f_bfree - status.f_bavail)
        return min(capacity, max(0, for_users * status.f_frsize - max(ledger, RESERVE_BYTES) - _LEFT_BYTES))

    def fitting(self, sizes: Sequence[int], evictable_bytes: int = 0) -> int:
        """Return how many files, of these sizes and from the first on, can be stored together now; at least one."""
        room = self.room_bytes + evictable_bytes
        return max(1, sum(total <= room for total in accumulate(sizes)))

    def size_bytes(self, names: Iterable[str]) -> int:
        """Return the size of these files; those that are not there count as empty."""
        with self._lock:
            return sum(self._sizes.get(name, 0) for name in names)

    def check_room(self, needed_bytes: int) -> None:
        """Raise SpoolFullError if so much cannot be stored now."""
        if not needed_bytes or needed_bytes <= self.room_bytes:
            return
        if needed_bytes > self._max_bytes - self.used_bytes:
            problem = f"Uploaded audio takes {self.used_bytes} of {self._max_bytes} bytes (queue.max_spool_bytes)"
            advice = "Wait until jobs have ended, delete some, or raise the limit."
        else:
            problem = f"The disk of the spool folder {self._folder} has too little room"
            advice = "Make room, or delete jobs."
        raise SpoolFullError(f"{problem}: {needed_bytes} more do not fit.", advice, needed_bytes=needed_bytes)

    # -- files -------------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self._folder / name

    def store(self, files: Sequence[bytes]) -> list[str]:
        """Write the files; on return all of them and their names are on disk.

        Returns:
            The generated names, in order.

        Raises:
            SpoolFullError: there is no room for them; nothing was written.
            UploadRefusedError: one of them never fits, or not with those before it; no file is left behind.
            LedgerError: the disk failed; no file is left behind.
        """
        self.check_room(sum(map(len, files)))
        names: list[str] = []
        try:
            if files and not self._folder.is_dir():  # it was removed meanwhile
                self._folder.mkdir(mode=0o700)
                self._disk.sync_folder(self._folder.parent)
            for content in files:
                names.append(uuid.uuid4().hex)
                self._disk.create(self.path(names[-1]), (content,))
            if names:
                self._disk.sync_folder(self._folder)
        except OSError as exc:
            self.remove(names)
            problem = f"The spool folder {self._folder} cannot be written: {exc.strerror}."
            index = max(0, len(names) - 1)
            if self._is_refusal(exc, index=index):
                raise UploadRefusedError(problem, index=index) from exc
            raise LedgerError(problem) from exc
        self._add({name: len(content) for name, content in zip(names, files, strict=True)})
        return names

    def _is_refusal(self, error: OSError, *, index: int) -> bool:
        """Whether it does not help to wait for room: `statvfs` knows neither quotas nor the largest size of a file."""
        return error.errno == errno.EFBIG or (error.errno == errno.EDQUOT and (index > 0 or not self.used_bytes))

    def remove(self, names: Collection[str]) -> None:
        """Delete files; those that cannot be deleted now are swept at the next start."""
        for name in names:
            with contextlib.suppress(OSError):
                self.path(name).unlink(missing_ok=True)
        with self._lock:
            self._used_bytes -= sum(self._sizes.pop(name, 0) for name in set(names))

    def sweep(self, needed: Collection[str]) -> int:
        """Delete every file that is not in `needed`; return how many. Not in parallel with `store`.

        Raises:
            LedgerError: the folder cannot be read.
        """
        try:
            orphans = [entry for entry in self._folder.iterdir() if entry.name not in needed]
        except OSError as exc:
            raise LedgerError(f"The spool folder {self._folder} cannot be read: {exc.strerror}.") from exc
        self.remove([entry.name for entry in orphans])
        return sum(not entry.exists() for entry in orphans)
