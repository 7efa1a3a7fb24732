"""Paths of audio files: which are allowed, and opening them inside their directories. Any thread may call it."""

import errno
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cesar_mqtt.errors import ConfigError, ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.redaction import redact_name

log = get_logger(__name__)

_MAX_SHOWN_CHARACTERS = 120

# O_PATH: opening a file needs only permission to search its folders, not to list them.
_FOLDER_FLAGS = (os.O_PATH if sys.platform == "linux" else os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that has replaced the file would otherwise block for ever, before it can be checked.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# The errors of a job: the code, and a sentence with what to do. A path that leads out of the directories is not quoted.
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
_IO_FAILED = (
    ErrorCode.AUDIO_IO_ERROR,
    "The audio file could not be read ({reason}): check its disk or network share, and retry the job.",
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
_NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})


def check_directories(directories: Sequence[Path]) -> None:
    """Check `audio.directories`; a missing folder may be mounted later, so it is only logged.

    Raises:
        ConfigError: one of them is not a folder.
    """
    for folder in directories:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"audio.directories names {folder}, which is not a folder: name the folder that holds it")
        if not folder.exists():
            log.warning("The folder %s (audio.directories) does not exist yet", folder, action="audio")


def resolve_audio_path(name: str, directories: Sequence[Path]) -> Path:
    """Find the file that a producer named, if it is allowed.

    The answer does not reveal whether anything exists outside the directories: every name that leads out, with or
    without symbolic links, is rejected with the same code and sentence.

    A name is looked up as it is first, then with each part of it in the Unicode forms NFC and NFD (producers on macOS
    send the latter), then without the blanks around it.

    Args:
        name: relative to the directories, which are tried in order, or absolute and inside one of them.
        directories: the allowed ones; empty: no file is allowed.

    Returns:
        An absolute path without symbolic links; `open_audio` checks that again.

    Raises:
        JobFailedError: `audio_not_found`, or `audio_not_allowed` for what leads out of the directories, cannot be a
            file name, or is not a regular file.
    """
    if not _is_file_name(name):
        raise failed(_OUTSIDE)
    # Normalised lexically, without touching the disk: the answer must not reveal whether a folder outside exists.
    names = [os.path.normpath(each) for each in dict.fromkeys((name, name.strip())) if each]
    if Path(names[-1]).parts[:1] == ("..",):
        raise failed(_OUTSIDE)
    roots = [Path(os.path.realpath(directory)) for directory in directories]
    shown = _shown(names[-1], (*directories, *roots))
    leads_out = not roots
    try:
        for each in names:
            for directory in directories:
                for path in _spellings(each, directory, roots):
                    if not _is_inside(path, roots):
                        leads_out = True
                    elif _is_regular(path, shown):
                        return path
    except OSError as exc:  # a link was replaced after `realpath` had seen that it is one
        raise failed(_NOT_FOUND, shown) from exc
    raise failed(_OUTSIDE) if leads_out else failed(_NOT_FOUND, shown)


def _spellings(name: str, directory: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """Yield where a name leads from one of the directories, first as it is spelled, then in other Unicode forms.

    Not strict, so that a name that leads out is rejected before anything is looked up there.
    """
    root = Path(os.path.realpath(directory))
    yield Path(os.path.realpath(root / name))
    if name.isascii():
        return
    for top in dict.fromkeys((directory, root)):
        parts = _parts_below(top, Path(name))
        if parts:
            yield from _other_spellings(root, parts, roots)


def _parts_below(top: Path, path: Path) -> tuple[str, ...]:
    """Return the parts of a path below `top`, in whatever form both are; a relative one is below it."""
    if not path.is_absolute():
        return path.parts
    size = len(top.parts)
    return path.parts[size:] if _nfc(path.parts[:size]) == _nfc(top.parts) else ()


def _nfc(parts: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", part) for part in parts]


def _other_spellings(folder: Path, parts: Sequence[str], roots: Sequence[Path]) -> Iterator[Path]:
    """Yield where the parts lead in each form, through the folders that there are inside of `roots`."""
    first, *rest = parts
    for form in dict.fromkeys((first, unicodedata.normalize("NFC", first), unicodedata.normalize("NFD", first))):
        path = Path(os.path.realpath(folder / form))
        if not rest or not _is_inside(path, roots):
            yield path
        elif os.path.isdir(path):  # noqa: PTH112 - False, not an error, for what may not be searched
            yield from _other_spellings(path, rest, roots)


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """What distinguishes a file from another at the same path, and from itself before a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def lasting_identity(identity: tuple[int, ...]) -> str:
    """The parts of a `file_identity` that survive a restart: the size and both times.

    Device numbers change with a restart, and inode numbers on network file systems. A file that replaces another can be
    given the same size and modification time, but not the same change time.
    """
    return "-".join(map(str, identity[2:]))


def _is_file_name(name: str) -> bool:
    """Whether a file can have this name at all."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return bool(encoded) and b"\0" not in encoded


def _shown(name: str, directories: Sequence[Path]) -> str:
    """The part of an allowed name that may be quoted: a link outside of the directories may lead inside."""
    path = Path(name)
    inside = not path.is_absolute() or any(path.is_relative_to(directory) for directory in directories)
    return name if inside else path.name


def _is_regular(path: Path, name: str) -> bool:
    try:
        mode = path.lstat().st_mode
    except OSError as exc:
        if exc.errno in _NO_SUCH_FILE:
            return False
        raise _why_not_open(exc, name) from exc
    if not stat.S_ISREG(mode):
        raise failed(_NOT_REGULAR, name)
    return True


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open a file part by part from the root, without following symbolic links, and yield its descriptor.

    Raises:
        JobFailedError: `audio_not_found`, `audio_not_allowed` for what is no regular file, `audio_io_error`.
    """
    try:
        descriptor = _open_without_links(path)
    except OSError as exc:
        raise _why_not_open(exc, path.name) from exc
    try:
        if not _is_regular_file(descriptor):
            raise failed(_NOT_REGULAR, path.name)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_without_links(path: Path) -> int:
    folder = os.open(path.anchor or ".", _FOLDER_FLAGS)
    try:
        for part in path.parts[1 if path.anchor else 0 : -1]:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, _FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)


def io_failed(error: OSError) -> JobFailedError:
    """Return `audio_io_error`: the operating system could not read, which says nothing about the recording."""
    code, sentence = _IO_FAILED
    return JobFailedError(code, sentence.format(reason=error.strerror or type(error).__name__))


def _why_not_open(error: OSError, name: str) -> JobFailedError:
    reason = _WHY_NOT_OPEN.get(error.errno or 0)
    return io_failed(error) if reason is None else failed(reason, name)


def _is_regular_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError as exc:
        raise io_failed(exc) from exc


def failed(reason: tuple[ErrorCode, str], name: str = "", **values: float) -> JobFailedError:
    """Fill in the sentence; the name is quoted, without control characters and cut to a bounded length."""
    code, sentence = reason
    name = redact_name(name)
    shown = repr(name if len(name) <= _MAX_SHOWN_CHARACTERS else name[:_MAX_SHOWN_CHARACTERS] + "…")
    return JobFailedError(code, sentence.format(name=shown, **values))
