"""Audio files: which may be read, and opening them without a way out of their directories. Any thread may call it."""

import errno
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cesar_mqtt.errors import ConfigError, ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_MAX_SHOWN = 120

# Only the right to pass through a folder is needed to open a file in it, where the system can tell the two apart.
_FOLDER_FLAGS = (os.O_PATH if sys.platform == "linux" else os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that took the file's place would otherwise block for ever, before it can be looked at.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# What a producer is told: the code, and a sentence that says what to do. Audio that came inside a message has no name,
# and what leads out of the directories is not named.
_OUTSIDE = (
    ErrorCode.AUDIO_NOT_ALLOWED,
    "The audio path does not lead to a file inside `audio.directories`: put the file into one of those.",
)
_NOT_FOUND = (
    ErrorCode.AUDIO_NOT_FOUND,
    "There is no audio file {name}: put it there and retry the job (command `retry`), or name another under a new id.",
)
_NOT_PERMITTED = (
    ErrorCode.AUDIO_NOT_ALLOWED,
    "The service has no permission to read the audio file {name}: give its user the right to.",
)
_NOT_REGULAR = (
    ErrorCode.AUDIO_NOT_ALLOWED,
    "The audio path {name} does not name a regular file: name the audio file itself.",
)
UNREADABLE = (
    ErrorCode.AUDIO_UNREADABLE,
    "The file cannot be decoded as audio: check that it plays, or convert it to WAV, FLAC, MP3, Ogg or M4A.",
)
_WHY_NOT_OPEN = {
    errno.ENOENT: _NOT_FOUND,
    errno.ENAMETOOLONG: _NOT_FOUND,
    errno.EACCES: _NOT_PERMITTED,
    errno.EPERM: _NOT_PERMITTED,
    errno.ELOOP: _NOT_REGULAR,  # a symbolic link where a file was,
    errno.ENOTDIR: _NOT_REGULAR,  # or where a folder was
    errno.ENXIO: _NOT_REGULAR,  # a socket
}


def check_directories(directories: Sequence[Path]) -> None:
    """See that `audio.directories` are folders; one that is missing may be mounted later, so that is only logged.

    Raises:
        ConfigError: one of them is something else.
    """
    for folder in directories:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"audio.directories names {folder}, which is no folder: name the one that it lies in")
        if not folder.exists():
            log.warning("There is no folder %s (audio.directories) so far", folder, action="audio")


def resolve_audio_path(name: str, directories: Sequence[Path]) -> Path:
    """Find the file that a producer named, if it may be read.

    Whether something exists outside the directories cannot be learnt from the answer: every name that leads out, with
    or without the help of symbolic links, is refused with the same code and sentence.

    Args:
        name: relative to the directories, which are tried in order, or absolute and inside one of them.
        directories: the allowed ones; none allows nothing.

    Returns:
        An absolute path without symbolic links, which `open_audio` opens only as long as that is still so.

    Raises:
        JobFailedError: `audio_not_found`, or `audio_not_allowed` for what leads out of the directories, cannot be a
            file name, or is not a regular file.
    """
    if not _is_plain(name):
        raise failed(_OUTSIDE)
    # By its letters, not by what stands on the disk: a folder outside, there or not, is none on a way that comes back.
    name = os.path.normpath(name)
    if Path(name).parts[:1] == ("..",):
        raise failed(_OUTSIDE)
    roots = [Path(os.path.realpath(directory)) for directory in directories]
    shown = _shown(name, (*directories, *roots))
    led_out = not roots
    for root in roots:
        # Not strict: a name that leads out is refused before anything is asked about what stands there.
        path = Path(os.path.realpath(root / name))
        if not any(path.is_relative_to(allowed) for allowed in roots):
            led_out = True
        elif _is_regular(path, shown):
            return path
    raise failed(_OUTSIDE) if led_out else failed(_NOT_FOUND, shown)


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """Tell a file apart from another under the same name, and from what it was before it was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def lasting_identity(identity: tuple[int, ...]) -> str:
    """Return what holds of a `file_identity` after a restart, too: the size and both times.

    A device may have another number then, and on network file systems a file, too. Whoever puts another file in its
    place can give that the same size and time of modification, but not the same time of change.
    """
    return "-".join(map(str, identity[2:]))


def _is_plain(name: str) -> bool:
    """Whether a name can be one of a file at all."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(encoded) and b"\0" not in encoded


def _shown(name: str, directories: Sequence[Path]) -> str:
    """Return what may be told of a name that leads inside, if need be by a link from outside."""
    path = Path(name)
    inside = not path.is_absolute() or any(path.is_relative_to(directory) for directory in directories)
    return name if inside else path.name


def _is_regular(path: Path, name: str) -> bool:
    try:
        mode = path.lstat().st_mode
    except PermissionError as exc:
        raise failed(_NOT_PERMITTED, name) from exc
    except OSError:  # not there, or a name that no file can have
        return False
    if not stat.S_ISREG(mode):
        raise failed(_NOT_REGULAR, name)
    return True


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open a file part by part from the root, following no symbolic link, and give its descriptor.

    Raises:
        JobFailedError: `audio_not_found`, `audio_not_allowed` for what is no regular file, `audio_unreadable`.
    """
    try:
        descriptor = _walk(path)
    except OSError as exc:
        raise failed(_WHY_NOT_OPEN.get(exc.errno or 0, UNREADABLE), path.name) from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise failed(_NOT_REGULAR, path.name)
        yield descriptor
    finally:
        os.close(descriptor)


def _walk(path: Path) -> int:
    folder = os.open(path.anchor or ".", _FOLDER_FLAGS)
    try:
        for part in path.parts[1 if path.anchor else 0 : -1]:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, _FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)


def failed(reason: tuple[ErrorCode, str], name: str = "", **values: float) -> JobFailedError:
    """Fill a sentence in; the name is quoted, without control characters and not at any length."""
    code, sentence = reason
    shown = repr(name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "…")
    return JobFailedError(code, sentence.format(name=shown, **values))
