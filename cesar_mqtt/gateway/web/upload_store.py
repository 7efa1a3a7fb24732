"""Uploads of the page inside `serve`: files in a folder of the consumer's own, until no job needs them any more.

A job names its file by path, so that no recording has to fit into a message. Any thread may use it.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cesar_mqtt.errors import SpoolFullError
from cesar_mqtt.gateway.web.forms import PART_SUFFIX, UploadedFile
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_PREFIX = "upload-"
_UNKNOWN_S = 24 * 3600.0
"""How long an upload is kept of which the ledger has no job (yet): its request may wait at the broker."""


class UploadStore:
    """Files named after their content and their job: the same upload of the same job again is the same request."""

    def __init__(
        self,
        folder: Path,
        *,
        is_needed: Callable[[str], bool | None],
        has_ended: Callable[[str], bool] = lambda _job_id: False,
        check_room: Callable[[int], None] = lambda _bytes: None,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Create the folder.

        Args:
            folder: one in which the consumer looks for `audio_path`.
            is_needed: whether the job with this id still needs its audio; None: there is no such job.
            has_ended: whether the job with this id is final: then only a retry needs its audio.
            check_room: raises SpoolFullError where so many bytes more cannot be stored.
            disk: for tests.
            clock: seconds since the epoch.

        Raises:
            OSError: the folder cannot be created.
        """
        self.folder = folder
        self._is_needed = is_needed
        self._has_ended = has_ended
        self._disk = disk or Disk()
        self._clock = clock
        self._check_room = check_room
        self._lock = threading.Lock()
        """Guards the sizes."""
        self._receiving_bytes = 0
        self._kept_bytes = 0
        self._accepted: set[str] = set()
        """The jobs that have been in the ledger: where one is no longer there, it was deleted."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._files():
            if path.suffix == PART_SUFFIX:  # of an earlier process
                path.unlink()
            elif path.name.startswith(_PREFIX):
                self._kept_bytes += path.lstat().st_size

    @property
    def used_bytes(self) -> int:
        """The size of all files here, those that are being received included."""
        return self._kept_bytes + self._receiving_bytes

    def take_room(self, size_bytes: int) -> None:
        """Count bytes that are about to be received; make room for them if need be.

        Raises:
            SpoolFullError: there is no room for them.
        """
        with self._lock:
            try:
                self._check_room(size_bytes)
            except SpoolFullError:
                self._evict(size_bytes)
            self._receiving_bytes += size_bytes

    def _evict(self, needed_bytes: int) -> None:
        """Remove the oldest uploads of ended jobs, which only a retry would need, if that makes enough room.

        Raises:
            SpoolFullError: it does not; nothing was removed.
        """
        ended = [path for path in self._files() if path.name.startswith(_PREFIX) and self._has_ended(_job_id(path))]
        self._check_room(max(1, needed_bytes - sum(path.lstat().st_size for path in ended)))
        for path in sorted(ended, key=lambda each: each.lstat().st_mtime):
            self._kept_bytes -= path.lstat().st_size
            path.unlink()
            log.warning("Upload removed to make room: no retry is possible", action="evicted", job_id=_job_id(path))
            with suppress(SpoolFullError):
                return self._check_room(needed_bytes)
        return self._check_room(needed_bytes)

    def give_room_back(self, size_bytes: int) -> None:
        """Count them no more: they were moved by `keep`, or deleted."""
        with self._lock:
            self._receiving_bytes -= size_bytes

    def keep(self, file: UploadedFile, job_id: str) -> str:
        """Move a file that was received into the folder; return the `audio_path` for it. On return it is on disk.

        Raises:
            OSError: the disk failed.
        """
        name = f"{_PREFIX}{file.sha256[:32]}.{job_id}"
        with self._lock:
            known = (self.folder / name).exists()
            file.path.rename(self.folder / name)
            self._kept_bytes += 0 if known else file.size_bytes
        self._disk.sync_folder(self.folder)
        return name

    def set_accepted(self, job_id: str) -> None:
        """The ledger has the job: when it is deleted, so is its upload."""
        self._accepted.add(job_id)

    def sweep(self) -> int:
        """Delete the files that no job needs; return how many."""
        deleted = 0
        files = self._files()
        for path in files:
            with suppress(OSError):
                if not self._is_wanted(path):
                    size_bytes = path.lstat().st_size
                    with self._lock:
                        path.unlink()
                        self._kept_bytes -= 0 if path.suffix == PART_SUFFIX else size_bytes
                    deleted += 1
        self._accepted &= {_job_id(path) for path in files}
        if deleted:
            log.debug("Deleted %d uploads that no job needs", deleted, action="upload_deleted")
        return deleted

    def _files(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except OSError as exc:
            log.warning("The folder %s cannot be read: %s", self.folder, exc.strerror, action="upload_deleted")
            return []

    def _is_wanted(self, path: Path) -> bool:
        if not path.name.startswith(_PREFIX) and path.suffix != PART_SUFFIX:
            return True  # not ours
        job_id = _job_id(path)
        needed = None if path.suffix == PART_SUFFIX else self._is_needed(job_id)
        if needed is not None:
            self._accepted.add(job_id)
            return needed
        return job_id not in self._accepted and self._clock() - path.lstat().st_mtime < _UNKNOWN_S


def _job_id(path: Path) -> str:
    return path.name.rpartition(".")[2]
