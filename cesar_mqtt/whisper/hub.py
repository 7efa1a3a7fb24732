"""The Hugging Face hub: what each model is called there, which are in the cache, and the download of one.

Any thread may call. A download runs in a daemon thread of its own, because the requests of huggingface_hub cannot be
cancelled: on a cancel the thread is abandoned, ends with its next block or read timeout, and delays nothing.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from cesar_mqtt.errors import Cancelled, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import Task, wait
from cesar_mqtt.whisper.model_files import PATTERNS, missing_files, unavailable

log = get_logger(__name__)

REPOSITORIES = {
    "tiny.en": "Systran/faster-whisper-tiny.en",
    "tiny": "Systran/faster-whisper-tiny",
    "base.en": "Systran/faster-whisper-base.en",
    "base": "Systran/faster-whisper-base",
    "small.en": "Systran/faster-whisper-small.en",
    "small": "Systran/faster-whisper-small",
    "medium.en": "Systran/faster-whisper-medium.en",
    "medium": "Systran/faster-whisper-medium",
    "large-v1": "Systran/faster-whisper-large-v1",
    "large-v2": "Systran/faster-whisper-large-v2",
    "large-v3": "Systran/faster-whisper-large-v3",
    "large": "Systran/faster-whisper-large-v3",
    "distil-large-v2": "Systran/faster-distil-whisper-large-v2",
    "distil-medium.en": "Systran/faster-distil-whisper-medium.en",
    "distil-small.en": "Systran/faster-distil-whisper-small.en",
    "distil-large-v3": "Systran/faster-distil-whisper-large-v3",
    "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
}
"""Every name that faster-whisper knows (a test compares), and its repository, which faster-whisper keeps private."""

REVISIONS = {
    "Systran/faster-whisper-tiny.en": "0d3d19a32d3338f10357c0889762bd8d64bbdeba",
    "Systran/faster-whisper-tiny": "d90ca5fe260221311c53c58e660288d3deb8d356",
    "Systran/faster-whisper-base.en": "3d3d5dee26484f91867d81cb899cfcf72b96be6c",
    "Systran/faster-whisper-base": "ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66",
    "Systran/faster-whisper-small.en": "d1d751a5f8271d482d14ca55d9e2deeebbae577f",
    "Systran/faster-whisper-small": "536b0662742c02347bc0e980a01041f333bce120",
    "Systran/faster-whisper-medium.en": "a29b04bd15381511a9af671baec01072039215e3",
    "Systran/faster-whisper-medium": "08e178d48790749d25932bbc082711ddcfdfbc4f",
    "Systran/faster-whisper-large-v1": "b07c8d4be0be90092aa01a29c975077acb8d15c9",
    "Systran/faster-whisper-large-v2": "f0fe81560cb8b68660e564f55dd99207059c092e",
    "Systran/faster-whisper-large-v3": "edaa852ec7e145841d8ffdb056a99866b5f0a478",
    "Systran/faster-distil-whisper-large-v2": "fe9b404fc56de3f7c38606ef9ba6fd83526d05e4",
    "Systran/faster-distil-whisper-medium.en": "80ddfce281f77766d8943d63109199fc8145dfa5",
    "Systran/faster-distil-whisper-small.en": "ef77d90526ccd62cde3808ee70626a01e5cf83e4",
    "Systran/faster-distil-whisper-large-v3": "c3058b475261292e64a0412df1d2681c06260fab",
    "distil-whisper/distil-large-v3.5-ct2": "9793ccc07920e0f830e1dba0343efcdf0ef8c903",
    "mobiuslabsgmbh/faster-whisper-large-v3-turbo": "0a363e9161cbc7ed1431c9597a8ceaf0c4f78fcf",
}
"""The commit of each repository that is used: what its owner changes later is never loaded unseen."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository.

    Attributes:
        repository: its owner and name.
        revision: the commit that is used.
        name: of the file.
        sha256: of its content.
        size_bytes: of its content.
    """

    repository: str
    revision: str
    name: str
    sha256: str
    size_bytes: int


STALL_S = 30.0
"""A download that receives nothing for so long fails; huggingface_hub has then tried to resume it twice."""
_ANSWER_S = 5.0
_LOG_EVERY_S = 5.0
_STALE_S = 600.0
_SPARE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 18
_REFUSALS = frozenset({401, 403, 404, 410})
_REASONS = {
    "offline": "the hub's own offline mode is on (HF_HUB_OFFLINE)",
    "silent": "the Hugging Face hub does not answer: check the network",
    "stalled": "nothing more came from the Hugging Face hub: check the network and retry, what is complete is kept",
    "refused": "the Hugging Face hub refuses it: check HF_ENDPOINT and HF_TOKEN if you have set them",
    "no_room": "there is not enough room on the disk for it: free some",
    "failed": "it could not be fetched from the Hugging Face hub: check the network and retry",
}


def is_offline() -> bool:
    """Whether the hub's own offline mode is on."""
    return bool(constants.HF_HUB_OFFLINE)


def cached(name: str) -> Path | None:
    """Return the folder of a model that is complete in the hub's cache; uses no network.

    That of another revision counts, too, where the known one is not there: it was put there on purpose.
    """
    if name not in REPOSITORIES:
        return None
    repository = REPOSITORIES[name]
    for revision in (REVISIONS[repository], None):
        options: dict[str, Any] = {"revision": revision, "allow_patterns": list(PATTERNS), "local_files_only": True}
        with suppress(OSError, ValueError):
            path = Path(snapshot_download(repository, **options))
            if not missing_files(path):  # an interrupted download leaves such a folder; the next one completes it
                return path
    return None


def cached_file(file: HubFile) -> Path | None:
    """Return where a file is in the hub's cache; uses no network."""
    options: dict[str, Any] = {"revision": file.revision, "local_files_only": True}
    with suppress(OSError, ValueError):
        return Path(hf_hub_download(file.repository, file.name, **options))
    return None


def download_file(
    file: HubFile, title: str, *, should_stop: Callable[[], bool], on_progress: Callable[[int, int], None]
) -> Path:
    """Download one file as `download` does, and return where it is.

    Args:
        file: of any repository.
        title: what messages call it.
        should_stop: asked ten times a second.
        on_progress: called in this thread with the bytes downloaded and the bytes in all.

    Raises:
        JobFailedError: as `download`.
        Cancelled: `should_stop` returned True.
    """
    wanted = _Repository(file.repository, file.revision, (file.name,))
    return _fetch(title, wanted, should_stop, on_progress, STALL_S) / file.name


def download(
    name: str,
    *,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int, int], None],
    stall_s: float = STALL_S,
) -> Path:
    """Download a model into the hub's cache; files that an earlier attempt completed are not downloaded again.

    A broken connection is resumed where it was. Progress is logged every few seconds.

    Args:
        name: one of `REPOSITORIES`.
        should_stop: asked ten times a second.
        on_progress: called in this thread with the bytes downloaded and the bytes in all; the first may go back when
            the hub starts a file again.
        stall_s: seconds without a byte after which the download fails.

    Raises:
        JobFailedError: `model_unavailable`: offline, no answer, refused, no room, stalled or failed.
        Cancelled: `should_stop` returned True.
    """
    repository = REPOSITORIES[name]
    wanted = _Repository(repository, REVISIONS[repository], PATTERNS, ", or choose a model that is already here")
    return _fetch(name, wanted, should_stop, on_progress, stall_s)


@dataclass(frozen=True, slots=True)
class _Repository:
    """What is wanted of a repository: one commit of the files that match a pattern.

    Attributes:
        alternative: what else than a download a message offers.
    """

    name: str
    revision: str
    patterns: tuple[str, ...]
    alternative: str = ""


def _fetch(
    name: str,
    wanted: _Repository,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int, int], None],
    stall_s: float,
) -> Path:
    if is_offline():
        raise _failure(name, "offline", wanted)
    progress = _Progress(name, on_progress)
    running = _Download(wanted)

    def is_over(timeout_s: float) -> bool:
        done = bool(wait_for_futures([running.future], timeout_s).done)
        progress.update(*running.progress())
        return done or progress.silent_s > stall_s

    try:
        wait(is_over, should_stop)
    finally:
        running.abandon()
    # The client raises what it is built on: httpx2's errors, OSError, ValueError, AssertionError and its own.
    exc = running.future.exception() if running.future.done() else _StalledError(f"no byte for {stall_s:g} s")
    if exc is None:
        return running.future.result()
    reason, detail = _reason(exc), f"{type(exc).__name__}: {exc}"
    message = "Model %s cannot be downloaded: %s (%s)"
    log.warning(message, name, _REASONS[reason], detail, action="model_download_failed")
    raise _failure(name, reason, wanted) from exc


class _StalledError(Exception):
    """Nothing was received for too long."""


class _Progress:
    """How far a download is: passed on when it changes, and logged now and then."""

    def __init__(self, name: str, on_progress: Callable[[int, int], None]) -> None:
        self._name = name
        self._on_progress = on_progress
        self._done_bytes = -1
        self._changed_at = time.monotonic()
        self._logged_at = -_LOG_EVERY_S

    @property
    def silent_s(self) -> float:
        """Seconds since the last change."""
        return time.monotonic() - self._changed_at

    def update(self, done_bytes: int, total_bytes: int) -> None:
        if done_bytes == self._done_bytes or not total_bytes:
            return
        self._done_bytes, self._changed_at = done_bytes, time.monotonic()
        self._on_progress(done_bytes, total_bytes)
        if self._changed_at - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = self._changed_at
            percent = 100 * done_bytes // total_bytes
            text = "Fetching model %s from the hub: %d %% of %.0f MB"
            arguments = (self._name, percent, total_bytes / 1e6)
            log.info(text, *arguments, action="model_download", percent=percent, bytes=done_bytes)


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a repository: its name, its size, and where the cache will have it."""

    name: str
    size_bytes: int
    path: Path


class _Download:
    """The download of one repository in a daemon thread. Any thread may call its methods.

    File by file with `hf_hub_download`: `snapshot_download` uses a pool whose threads the interpreter joins at exit, so
    that an abandoned one would hold up the end of the process.
    """

    def __init__(self, wanted: _Repository) -> None:
        _configure_client()
        repository = wanted.name
        self._repository = repository
        self._revision = wanted.revision
        self._patterns = wanted.patterns
        self._folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
        self._files: tuple[_File, ...] = ()
        self._abandoned = threading.Event()
        self.future = Task("hub-download", self._run).future

    def progress(self) -> tuple[int, int]:
        """Return the bytes on disk and the bytes in all; zeros until the hub has answered.

        By the sizes of the files, so that what another process downloads into the same cache counts as well.
        """
        files = self._files
        total_bytes = sum(file.size_bytes for file in files)
        done_bytes = sum(file.size_bytes for file in files if file.path.exists())
        with suppress(OSError):  # a file was completed in the meantime
            done_bytes += sum(part.stat().st_size for part in self._partial_files())
        return min(done_bytes, total_bytes), total_bytes

    def abandon(self) -> None:
        """Let the thread end by itself and remove its partial file now: the process may end before the thread."""
        self._abandoned.set()
        if not self.future.done():
            for descriptor in Path("/proc/self/fd").glob("*"):
                with suppress(OSError):
                    file = descriptor.readlink()
                    if file.suffix == ".incomplete" and file.is_relative_to(self._folder.resolve()):
                        file.unlink()

    def _run(self) -> Path:
        # The client itself would wait for this answer without end.
        info = HfApi().model_info(self._repository, revision=self._revision, files_metadata=True, timeout=_ANSWER_S)
        folder = self._folder / "snapshots" / self._revision
        self._files = tuple(
            _File(sibling.rfilename, sibling.size or 0, folder / sibling.rfilename)
            for sibling in info.siblings or ()
            if any(fnmatch(sibling.rfilename, pattern) for pattern in self._patterns)
        )
        self._remove_stale_files()
        self._check_room()
        path = folder
        for file in self._files:
            options: dict[str, Any] = {"etag_timeout": _ANSWER_S, "tqdm_class": self._progress_bar}
            path = Path(hf_hub_download(self._repository, file.name, revision=self._revision, **options)).parent
        return path

    def _progress_bar(self, *_: object, **__: object) -> "_Cancellation":
        return _Cancellation(self._abandoned)

    def _partial_files(self) -> Iterator[Path]:
        return self._folder.glob("blobs/*.incomplete")

    def _remove_stale_files(self) -> None:
        """Remove what killed downloads have left; a file that was written to lately belongs to a live one."""
        for partial in self._partial_files():
            with suppress(OSError):
                if time.time() - partial.stat().st_mtime > _STALE_S:
                    partial.unlink()

    def _check_room(self) -> None:
        needed_bytes = sum(file.size_bytes for file in self._files if not file.path.exists())
        existing = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        if needed_bytes and shutil.disk_usage(existing).free < needed_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"{needed_bytes} bytes are needed", str(existing))


class _Cancellation:
    """Stands in for the progress bar that the client updates with each block: ends an abandoned download there."""

    def __init__(self, abandoned: threading.Event) -> None:
        self._abandoned = abandoned

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _block_bytes: float | None = 1) -> None:
        if self._abandoned.is_set():
            raise Cancelled


def _configure_client() -> None:
    # Blocks of 10 MB, the default, would look like a stall on a slow line.
    constants.DOWNLOAD_CHUNK_SIZE = _BLOCK_BYTES
    # Plain HTTP rather than Xet: it needs a fraction of the memory, and it is what is tested.
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        if name not in os.environ:
            setattr(constants, name, True)
    # Its warnings quote URLs, which may be signed.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _reason(exc: BaseException) -> str:
    """Find the root of an error, which the client wraps."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, _StalledError):
            return "stalled"
        if isinstance(cause, HfHubHTTPError):
            return "refused" if cause.response.status_code in _REFUSALS else "failed"
        if isinstance(cause, httpx2.ConnectError | httpx2.TimeoutException):
            return "silent"
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            return "no_room"
        cause = cause.__cause__ or cause.__context__
    return "failed"


def _failure(name: str, reason: str, wanted: _Repository) -> JobFailedError:
    return unavailable(f"The model {name!r} is not on this machine and {_REASONS[reason]}{wanted.alternative}.")
