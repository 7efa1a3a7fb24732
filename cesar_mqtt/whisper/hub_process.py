"""The child process that downloads one model from the hub: `python -m cesar_mqtt.whisper.hub_process REPOSITORY`.

It writes JSON objects of one key, one a line, to its output: `progress` (bytes fetched, bytes in all), then `path` or
`error` (a reason and a detail). It ends when its input does, which is when whoever started it ends, or says so.
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
from huggingface_hub import DryRunFileInfo, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from cesar_mqtt.whisper.model_files import PATTERNS

_ANSWER_S = 5.0
_REPORT_EVERY_S = 0.5
_STALE_S = 600.0
_SPARE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 18
_REFUSALS = frozenset({401, 403, 404, 410})
_written = threading.Lock()


def main() -> int:
    """Fetch the repository that the command line names."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # systemd stops all of a service at once; who started this one decides
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    try:
        path = _fetch(sys.argv[1])
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError) as exc:
        _say("error", [_reason(exc), f"{type(exc).__name__}: {exc}"])
        return 1
    _say("path", str(path))
    return 0


def _fetch(repository: str) -> Path:
    # The client keeps 10 MB before it writes them: on a slow line that would look like a stall, and a break lose them.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    # It would wait for the hub's answer without end.
    httpx2.head(constants.ENDPOINT, timeout=_ANSWER_S)
    plan = snapshot_download(repository, allow_patterns=list(PATTERNS), dry_run=True)
    for stale in _unfinished(plan):
        if time.time() - stale.stat().st_mtime > _STALE_S:  # of a download that was killed; a live one writes
            stale.unlink(missing_ok=True)
    _check_room(plan)
    threading.Thread(target=_report, args=(plan,), name="report", daemon=True).start()
    # One file at a time: all but one are small, and only one has to be tidied away when this is ended.
    path = snapshot_download(repository, allow_patterns=list(PATTERNS), max_workers=1)
    _say("progress", [_total(plan), _total(plan)])
    return Path(path)


def _check_room(plan: list[DryRunFileInfo]) -> None:
    needed = sum(file.file_size or 0 for file in plan if file.will_download)
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    if needed and shutil.disk_usage(place).free < needed + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed", str(place))


def _report(plan: list[DryRunFileInfo]) -> None:
    """Say how far it is, by the sizes of the files: that holds for each way in which the client may fetch them."""
    wait = threading.Event()
    while not wait.wait(_REPORT_EVERY_S):
        finished = sum(file.file_size or 0 for file in plan if Path(file.local_path).exists())
        with suppress(OSError):  # a file was finished while we looked
            finished += sum(file.stat().st_size for file in _unfinished(plan))
        _say("progress", [min(finished, _total(plan)), _total(plan)])


def _total(plan: list[DryRunFileInfo]) -> int:
    return sum(file.file_size or 0 for file in plan)


def _unfinished(plan: list[DryRunFileInfo]) -> Iterator[Path]:
    """Find what is being fetched: the cache keeps it beside the finished files, which snapshots only point to."""
    for repository in {Path(file.local_path).parents[2] for file in plan}:
        yield from repository.glob("blobs/*.incomplete")


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _written.acquire()  # nothing is said any more
    for descriptor in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            file = descriptor.readlink()
            if file.suffix == ".incomplete":
                file.unlink()
    os._exit(1)


def _reason(exc: BaseException) -> str:
    """Find what was at the root of it: the client wraps what it gets."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return "refused" if cause.response.status_code in _REFUSALS else "failed"
        if isinstance(cause, httpx2.ConnectError | httpx2.TimeoutException):
            return "silent"
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            return "no_room"
        cause = cause.__cause__ or cause.__context__
    return "failed"


def _say(kind: str, value: object) -> None:
    with _written, suppress(BrokenPipeError):
        sys.stdout.write(json.dumps({kind: value}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
