"""Measurements of one consumer's process and files; any thread may call it."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cesar_mqtt.protocol.consumer_payloads import HealthMessage, Quarantined, WebhookHealth

_STATM = Path("/proc/self/statm")


class HealthProbe:
    """Measures the health of one consumer."""

    def __init__(
        self,
        folder: Path,
        *,
        worker_alive: Callable[[], bool],
        network_alive: Callable[[], bool],
        events_dropped: Callable[[], int],
        quarantined: Callable[[], list[Quarantined]],
        webhook: Callable[[], WebhookHealth | None] = lambda: None,
    ) -> None:
        """Start the clock of `uptime`.

        Args:
            folder: the data directory.
            worker_alive: whether the worker's thread runs.
            network_alive: whether the client is connected to the broker.
            events_dropped: how many changes of jobs have had no event.
            quarantined: the messages that the broker does not accept.
            webhook: what becomes of its requests; None: there is none.
        """
        self._folder = folder
        self._worker_alive = worker_alive
        self._network_alive = network_alive
        self._events_dropped = events_dropped
        self._quarantined = quarantined
        self._webhook = webhook
        self._started = time.monotonic()

    def measure(self) -> HealthMessage:
        return HealthMessage(
            uptime=round(time.monotonic() - self._started, 1),
            worker_alive=self._worker_alive(),
            network_alive=self._network_alive(),
            ledger_bytes=_total_bytes(self._folder, "ledger.json*"),
            rss_bytes=_rss_bytes(),
            spool_bytes=_total_bytes(self._folder / "spool", "*"),
            disk_free_bytes=_free_bytes(self._folder),
            events_dropped=self._events_dropped(),
            quarantined=self._quarantined(),
            webhook=self._webhook(),
        )

    def fields(self) -> dict[str, Any]:
        """Measure, and return the fields by their names in the contract."""
        return self.measure().model_dump()


def _total_bytes(folder: Path, pattern: str) -> int:
    try:
        return sum(_size_bytes(path) for path in folder.glob(pattern))
    except OSError:  # no file descriptor is left to list the folder
        return 0


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it was removed after the listing
        return 0


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _rss_bytes() -> int:
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # without /proc only the peak is known
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
