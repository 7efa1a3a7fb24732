"""The Hugging Face hub: what each model is called there, what of it is in the cache, and fetching one.

Fetching runs in a process of its own (`hubprocess`): huggingface_hub's requests may wait without end and none of them
can be cancelled, while a process can be ended at any instant and takes its memory with it. Any thread may call.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import constants, snapshot_download

from cesar_mqtt.errors import Cancelled, JobFailedError
from cesar_mqtt.logs import get_logger
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
"""Every name that faster-whisper knows (a test compares), and where it is: faster-whisper tells nobody the second."""

STALL_S = 30.0
"""So long without a byte and a download is given up; huggingface_hub has then tried twice to go on with it."""
_TICK_S = 0.25
_LOG_EVERY_S = 5.0
_SENTENCES = {
    "offline": "the hub's own offline mode is on (HF_HUB_OFFLINE)",
    "silent": "the Hugging Face hub does not answer: check the network",
    "stalled": "nothing more came from the Hugging Face hub: check the network and retry, what is complete is kept",
    "refused": "the Hugging Face hub refuses it: check HF_ENDPOINT and HF_TOKEN if you have set them",
    "no_room": "there is not enough room on the disk for it: free some",
    "failed": "it could not be fetched from the Hugging Face hub: check the network and retry",
}


@dataclass(frozen=True, slots=True)
class _News:
    """One line of the process: `kind` is `progress`, `path`, `error`, or `log` for what is none of these."""

    kind: str
    value: Any


def is_offline() -> bool:
    """Whether the hub's own offline mode is on."""
    return bool(constants.HF_HUB_OFFLINE)


def cached(name: str) -> Path | None:
    """Return the folder of a model that is whole in the hub's cache; never asks the network."""
    if name not in REPOSITORIES:
        return None
    try:
        path = Path(snapshot_download(REPOSITORIES[name], allow_patterns=list(PATTERNS), local_files_only=True))
    except (OSError, ValueError):
        return None
    # An interrupted download leaves such a folder behind; the next one completes it.
    return None if missing_files(path) else path


def fetch(
    name: str,
    *,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int, int], None],
    stall_s: float = STALL_S,
) -> Path:
    """Fetch a model into the hub's cache; the files that an earlier attempt completed are not fetched again.

    A connection that breaks is taken up again where it was. Progress is logged every few seconds.

    Args:
        name: one of `REPOSITORIES`.
        should_stop: asked at least four times a second.
        on_progress: told bytes fetched, and bytes in all; the first may go back when the hub starts a file again.
        stall_s: seconds without a byte after which it is given up.

    Raises:
        JobFailedError: `model_unavailable`: offline, no answer, refused, no room, stalled or failed.
        Cancelled: `should_stop` returned True.
    """
    if is_offline():
        raise _failure(name, "offline")
    tell = _Progress(name, on_progress)
    with _started(REPOSITORIES[name]) as process:
        heard_at, last = time.monotonic(), ""
        for news in _news_of(process):
            if should_stop():
                raise Cancelled
            if news is not None:
                match news.kind:
                    case "path":
                        return Path(news.value)
                    case "error":
                        _fail(name, *news.value)
                    case "progress":
                        heard_at = time.monotonic() if tell(*news.value) else heard_at
                    case _:
                        last = str(news.value)
            if time.monotonic() - heard_at > stall_s:
                _fail(name, "stalled", f"no byte for {stall_s:g} s; {last}")
    return _fail(name, "failed", f"the process ended with {process.returncode}; {last}")


class _Progress:
    """Passes on how far a download is, and logs it now and then."""

    def __init__(self, name: str, on_progress: Callable[[int, int], None]) -> None:
        self._name = name
        self._on_progress = on_progress
        self._done_bytes = -1
        self._logged_at = -_LOG_EVERY_S

    def __call__(self, done_bytes: int, total_bytes: int) -> bool:
        """Return whether anything has come since the last time."""
        if done_bytes == self._done_bytes:
            return False
        self._done_bytes = done_bytes
        self._on_progress(done_bytes, total_bytes)
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            percent = 100 * done_bytes // total_bytes if total_bytes else 0
            text = "Fetching model %s from the hub: %d %% of %.0f MB"
            arguments = (self._name, percent, total_bytes / 1e6)
            log.info(text, *arguments, action="model_download", percent=percent, bytes=done_bytes)
        return True


@contextmanager
def _started(repository: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the process, which ends with the block, or with this process, whatever happens to it.

    In a session of its own, so that Ctrl-C reaches only us; `-P`, so that no file of the current folder is imported.
    Plain HTTP rather than Xet: it needs a fraction of the memory, and it is what is tested.
    """
    defaults = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environ = {**defaults, **os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(  # noqa: S603 - this Python, one of our own modules, a name from our own table
        [sys.executable, "-P", "-m", "cesar_mqtt.whisper.hub_process", repository],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()  # it tidies up and ends
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _news_of(process: subprocess.Popen[bytes]) -> Iterator[_News | None]:
    """Give what the process says as it comes, and None when it has said nothing for a moment; ends as it does."""
    if process.stdout is None:
        return
    descriptor = process.stdout.fileno()
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(_TICK_S):
                yield None
                continue
            block = os.read(descriptor, 1 << 16)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            yield from (_read(line) for line in lines)


def _read(line: bytes) -> _News:
    with suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, dict) and len(said) == 1:
            ((kind, value),) = said.items()
            return _News(kind, value)
    text = line.decode("utf-8", "replace")
    log.debug("The hub's client says: %s", text, action="model_download")
    return _News("log", text)


def _fail(name: str, reason: str, detail: str) -> NoReturn:
    text = "Model %s cannot be fetched (%s): %s"
    log.warning(text, name, reason, detail, action="model_download_failed")
    raise _failure(name, reason)


def _failure(name: str, reason: str) -> JobFailedError:
    sentence = _SENTENCES.get(reason, _SENTENCES["failed"])
    return unavailable(
        f"The model {name!r} is not on this machine and {sentence}, or choose a model that is already here."
    )
