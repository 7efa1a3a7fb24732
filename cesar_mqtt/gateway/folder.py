"""Watched folders: which files in them are recordings, and when one of them is complete.

One thread uses a `Settling`; a `FolderWatch` has a thread of its own, `inbox-watch`.
"""

import errno
import fcntl
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cesar_mqtt.errors import ConfigError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import StoppableThread

log = get_logger(__name__)

_AUDIO = (
    "aac ac3 aif aifc aiff amr ape au caf dts eac3 flac gsm m4a m4b mka mp2 mp3 mpga oga ogg opus ra rf64 snd spx tta "
    "w64 wav wave wma wv"
)
_VIDEO = "3g2 3gp 3gpp asf avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv"
RECORDING_SUFFIXES = frozenset(f".{name}" for name in f"{_AUDIO} {_VIDEO}".split())
_TEMPORARY_STEMS = (".part", ".partial", ".temp", ".tmp", ".download")
"""`talk.part.wav`: programs that keep the suffix of the file that they are writing."""
_SYSTEM_FOLDERS = frozenset({"@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"})
_UNKNOWN_FACTOR = 5
"""How many times longer a file has to be unchanged where the system cannot tell whether it is still open."""


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as a scan found it; another size or time is another recording."""

    path: Path
    """Absolute."""
    name: str
    """Relative to the watched folder."""
    size_bytes: int
    mtime_ns: int
    inode: int


def is_recording(name: str) -> bool:
    """Whether a file of this name is a recording, and not one that a program is still writing.

    Syncthing, rsync and Samba write to names that begin with a dot or `~`; browsers, and most others, to a suffix of
    their own, such as `.part`.
    """
    path = Path(name)
    return (
        path.suffix.lower() in RECORDING_SUFFIXES
        and not name.startswith((".", "~"))
        and not path.stem.lower().endswith(_TEMPORARY_STEMS)
    )


def scan(folder: Path, excluded: Sequence[Path] = ()) -> Iterator[FileState]:
    """Yield the recordings in a folder and its sub-folders; links are not followed.

    Args:
        folder: without symbolic links.
        excluded: folders that are left out, such as those that finished recordings are moved to.

    Raises:
        OSError: the folder itself cannot be read.
    """
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            entries = list(os.scandir(current))
        except OSError:
            if current == folder:
                raise
            continue  # removed meanwhile, or not for this user
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    path = Path(entry.path)
                    if (
                        not entry.name.startswith(".")
                        and entry.name.lower() not in _SYSTEM_FOLDERS
                        and path not in excluded
                    ):
                        pending.append(path)
                elif is_recording(entry.name) and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    path = Path(entry.path)
                    name = str(path.relative_to(folder))
                    yield FileState(path, name, found.st_size, found.st_mtime_ns, found.st_ino)


def is_open_for_writing(path: Path) -> bool | None:
    """Whether any process has the file open for writing; None: the system cannot tell.

    Linux grants a read lease on a file only while no process writes to it (fcntl(2), F_SETLEASE): on local file
    systems, for files of the same user, or for root.

    Raises:
        OSError: the file cannot be opened.
    """
    set_lease, set_signal = getattr(fcntl, "F_SETLEASE", None), getattr(fcntl, "F_SETSIG", None)
    if set_lease is None or set_signal is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # A process that opens the file meanwhile has the kernel signal the lease's end, by default with SIGIO, which
        # would end this process; SIGURG is ignored.
        fcntl.fcntl(descriptor, set_signal, signal.SIGURG)
        fcntl.fcntl(descriptor, set_lease, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, set_lease, fcntl.F_UNLCK)
    except OSError as exc:
        return True if exc.errno == errno.EAGAIN else None
    finally:
        os.close(descriptor)
    return False


class Settling:
    """Tells which files are complete: unchanged for a while, not empty, and not open for writing."""

    def __init__(
        self,
        settle_s: float,
        *,
        is_open: Callable[[Path], bool | None] = is_open_for_writing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settle_s = settle_s
        self._is_open = is_open
        self._clock = clock
        self._since: dict[Path, tuple[FileState, float]] = {}

    def complete(self, files: Mapping[Path, FileState]) -> list[FileState]:
        """Return those of the files that are complete; the others are remembered, and all earlier ones forgotten."""
        now = self._clock()
        since = {}
        for path, file in files.items():
            before, first = self._since.get(path, (None, now))
            since[path] = (file, first if before == file else now)
        self._since = since
        return [file for file, first in since.values() if self._is_complete(file, now - first)]

    @property
    def next_look(self) -> float:
        """When one of the files that are not complete yet may be, on the clock; those that stay open are left out."""
        longest_s = self._settle_s * _UNKNOWN_FACTOR
        due = (
            first + (self._settle_s if now - first < self._settle_s else longest_s)
            for now in (self._clock(),)
            for _, first in self._since.values()
            if now - first < longest_s
        )
        return min(due, default=math.inf)

    def _is_complete(self, file: FileState, unchanged_s: float) -> bool:
        if unchanged_s < self._settle_s or not file.size_bytes:
            return False
        try:
            is_open = self._is_open(file.path)
        except OSError:  # removed, or not readable: then reading it fails with a reason
            return True
        if is_open is None:
            return unchanged_s >= self._settle_s * _UNKNOWN_FACTOR
        return not is_open


class FolderWatch(StoppableThread):
    """Reports that something in the folders has changed, where the system tells; network shares often do not."""

    def __init__(self, folders: Sequence[Path], *, on_changed: Callable[[], None]) -> None:
        """Take the folders; `on_changed` is called on this thread. Raises ConfigError: watchfiles is not installed."""
        super().__init__("inbox-watch")
        try:
            import watchfiles  # noqa: F401, PLC0415 - an extra
        except ModuleNotFoundError as exc:
            raise ConfigError(
                "A folder is to be watched, but watchfiles is not installed.",
                "Install it with pip install '.[inbox]' in the clone of cesar-mqtt.",
            ) from exc
        self._folders = folders
        self._on_changed = on_changed

    def _run(self) -> None:
        from watchfiles import watch  # noqa: PLC0415 - an extra

        try:
            for _ in watch(
                *self._folders,
                watch_filter=None,
                stop_event=self._stopping,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                self._on_changed()
        except (OSError, RuntimeError) as exc:  # no more watches in the system, or a folder that is gone
            log.warning("Changes in the folders are only noticed by looking: %s", exc, action="inbox_unwatched")
