"""How the consumer is: what can be measured of its process and its files; any thread may call it."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cesar_mqtt.protocol.consumer_payloads import HealthMessage

_STATM = Path("/proc/self/statm")


class HealthProbe:
    """Takes measurements of one consumer."""

    def __init__(self, folder: Path, *, worker_alive: Callable[[], bool], network_alive: Callable[[], bool]) -> None:
        """Start the clock.

        Args:
            folder: the data directory.
            worker_alive: whether the worker's thread runs.
            network_alive: whether there is a connection to the broker, and its thread runs.
        """
        self._folder = folder
        self._worker_alive = worker_alive
        self._network_alive = network_alive
        self._started = time.monotonic()

    def measure(self) -> HealthMessage:
        """Measure."""
        return HealthMessage(
            uptime=round(time.monotonic() - self._started, 1),
            worker_alive=self._worker_alive(),
            network_alive=self._network_alive(),
            ledger_bytes=_sizes(self._folder, "ledger.json*"),
            rss_bytes=_rss_bytes(),
            spool_bytes=_sizes(self._folder / "spool", "*"),
            disk_free_bytes=_free_bytes(self._folder),
        )

    def fields(self) -> dict[str, Any]:
        """Measure, and return it by the contract's names."""
        return self.measure().model_dump()


def _sizes(folder: Path, pattern: str) -> int:
    try:
        return sum(_size(path) for path in folder.glob(pattern))
    except OSError:  # no descriptor is left for looking
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it was there a moment ago
        return 0


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _rss_bytes() -> int:
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the most that it ever was is the best that can be had
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
