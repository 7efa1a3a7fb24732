"""The spool: uploaded audio, on disk before the ledger refers to it, until no job needs it any more.

Any thread may call it.
"""

import contextlib
import os
import resource
import sys
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.ledger.fsync import Disk


class Spool:
    """Files with generated names in one folder."""

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        """Create the folder, durably, if it is missing. Raises LedgerError if that fails."""
        self._folder = folder.resolve()
        self._disk = disk or Disk()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._disk.sync_folder(folder.parent)
        except OSError as exc:
            raise LedgerError(f"The spool folder {folder} cannot be created: {exc.strerror}.") from exc

    @property
    def folder(self) -> Path:
        """The absolute path; downloads are stored there as well, and `sweep` deletes them like all other files."""
        return self._folder

    @property
    def capacity_bytes(self) -> int:
        """The size of the largest file that can ever be stored: that of the file system, or the process's limit."""
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return sys.maxsize
        size = status.f_blocks * status.f_frsize or sys.maxsize  # some network file systems do not know it
        return size if limit == resource.RLIM_INFINITY else min(size, limit)

    def path(self, name: str) -> Path:
        return self._folder / name

    def store(self, files: Sequence[bytes]) -> list[str]:
        """Write the files; on return all of them and their names are on disk.

        Returns:
            The generated names, in order.

        Raises:
            LedgerError: the disk failed; no file is left behind.
        """
        names: list[str] = []
        try:
            for content in files:
                names.append(uuid.uuid4().hex)
                self._disk.create(self.path(names[-1]), (content,))
            if names:
                self._disk.sync_folder(self._folder)
        except OSError as exc:
            self.remove(names)
            raise LedgerError(f"The spool folder {self._folder} cannot be written: {exc.strerror}.") from exc
        return names

    def remove(self, names: Collection[str]) -> None:
        """Delete files; those that cannot be deleted now are swept at the next start."""
        for name in names:
            with contextlib.suppress(OSError):
                self.path(name).unlink(missing_ok=True)

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
