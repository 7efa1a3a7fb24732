"""The numbers for Prometheus: counters that other parts increment, and values that are read at each scrape.

Importing this module needs the extra `metrics`. Any thread may count; the HTTP server answers in threads of its own,
which only read.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cesar_mqtt import __version__
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.jobs import Job, JobState, Totals
from cesar_mqtt.protocol.consumer_payloads import HealthMessage
from cesar_mqtt.protocol.payloads import Rejection

if TYPE_CHECKING:
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

# The upper bounds of the histograms' buckets: from what an idle machine needs to what a long recording takes.
_WAIT_S: Final = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_WORK_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600)
_SYNC_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_FETCH_S: Final = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CLOSE_S: Final = 5.0
"""How long `close` waits for the server's thread: a scrape in progress takes milliseconds."""


@dataclass(frozen=True, slots=True)
class MetricSources:
    """What a scrape reads; any thread may call these functions at any time.

    Attributes:
        ledger: the path of `ledger.json`; the journal is beside it.
        totals: the counts of jobs.
        health: the measurements of process and files.
        in_flight: the number of published messages without PUBACK.
        has_unpublished: whether a status is not acknowledged by the broker.
        shared_queue: whether the queue that consumers share is connected, and how many jobs wait in it; None: there is
            none.
    """

    ledger: Path
    totals: Callable[[], Totals]
    health: Callable[[], HealthMessage]
    in_flight: Callable[[], int]
    has_unpublished: Callable[[], bool]
    shared_queue: Callable[[], tuple[bool, int]] | None = None


class Metrics:
    """The metrics of one consumer, in a registry of their own. docs/operations.md lists them."""

    def __init__(self, host: str, port: int, *, consumer: str) -> None:
        """Create the counters, all of them zero; nothing listens before `serve`."""
        self._host = host
        self._port = port
        self._server: tuple[WSGIServer, Thread] | None = None
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        info = Gauge("cesar_info", "Always 1; the version and the name.", ("version", "consumer"), registry=registry)
        info.labels(__version__, consumer).set(1)
        self._errors = Counter("cesar_job_errors", "Jobs that ended as error.", ("code",), registry=registry)
        self._rejected = Counter("cesar_rejected", "Rejected messages.", ("reason",), registry=registry)
        self._waited = Histogram(
            "cesar_job_wait_seconds", "From acceptance to the last start.", registry=registry, buckets=_WAIT_S
        )
        self._worked = Histogram(
            "cesar_job_work_seconds", "From the last start to the end.", registry=registry, buckets=_WORK_S
        )
        self._audio = Counter("cesar_audio_seconds", "Audio of completed jobs.", registry=registry)
        self._speed = Gauge("cesar_job_speed_ratio", "Audio over work of the last completed job.", registry=registry)
        self._syncs = Histogram(
            "cesar_fsync_seconds", "How long the disk took to sync.", ("of",), registry=registry, buckets=_SYNC_S
        )
        self._loads = Counter("cesar_model_loads", "Models loaded into memory.", ("model",), registry=registry)
        self._load_s = Histogram(
            "cesar_model_load_seconds", "How long models took to load, downloads included.", registry=registry
        )
        self._unloads = Counter("cesar_model_unloads", "Models unloaded from memory.", registry=registry)
        self._downloads = Counter(
            "cesar_downloads", "Downloads: done, stopped, or the error code.", ("outcome",), registry=registry
        )
        self._download_s = Histogram(
            "cesar_download_seconds", "How long downloads took, retries included.", registry=registry, buckets=_FETCH_S
        )

    # -- counting --------------------------------------------------------------------------------------------------

    def count_job(self, job: Job) -> None:
        """Count a job that has just become final."""
        if job.error_code is not None:
            self._errors.labels(job.error_code.value).inc()
        if job.started_at is None or job.completed_at is None:
            return
        worked_s = max(0.0, job.completed_at - job.started_at)  # a clock that is set back must not stop the worker
        self._waited.observe(max(0.0, job.started_at - job.created_at))
        self._worked.observe(worked_s)
        if job.state is JobState.COMPLETED and job.audio_duration is not None:
            self._audio.inc(job.audio_duration)
            if worked_s and job.attempt == 1:  # a later attempt may resume behind the windows of an earlier one
                self._speed.set(job.audio_duration / worked_s)

    def count_rejection(self, rejection: Rejection) -> None:
        self._rejected.labels(rejection.reason).inc()

    def count_load(self, model: str, seconds: float) -> None:
        self._loads.labels(model).inc()
        self._load_s.observe(seconds)

    def count_unload(self) -> None:
        self._unloads.inc()

    def count_download(self, outcome: str, seconds: float) -> None:
        """Count a download: `done`, `stopped`, or the code of its error."""
        self._downloads.labels(outcome).inc()
        self._download_s.observe(seconds)

    def sync_timer(self, part: str) -> Callable[[], AbstractContextManager[object]]:
        """Return what times one sync of a part of the consumer, `ledger` or `spool`; see `Disk.timed`."""
        return self._syncs.labels(part).time

    # -- the HTTP server -------------------------------------------------------------------------------------------

    def serve(self, sources: MetricSources) -> None:
        """Start to answer scrapes. Raises ConfigError when the port cannot be opened."""
        self.registry.register(_Readings(sources))
        try:
            server, thread = start_http_server(self._port, self._host, self.registry)
        except OSError as exc:
            raise ConfigError(
                f"metrics.port {self._port} on {self._host} cannot be opened: {exc.strerror or exc}. "
                "Choose another port or metrics.host, or leave metrics.port out."
            ) from exc
        thread.name = "metrics"
        self._server = server, thread

    def render(self) -> bytes:
        """Return all numbers as a scrape gets them."""
        return generate_latest(self.registry)

    def close(self) -> None:
        """Close the port and end the server's thread; may be called twice, and without `serve`."""
        opened, self._server = self._server, None
        if opened is not None:
            server, thread = opened
            server.shutdown()
            server.server_close()
            thread.join(_CLOSE_S)


class _Readings(Collector):
    """Reads the values that are not counted, once for each scrape."""

    def __init__(self, sources: MetricSources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        yield from self._queue(self._sources.totals())
        yield from self._process(self._sources.health())
        yield _gauge("cesar_messages_in_flight", "Published messages without PUBACK.", self._sources.in_flight())
        behind = self._sources.has_unpublished()
        yield _gauge("cesar_statuses_unpublished", "1: a status is not acknowledged by the broker.", behind)
        if self._sources.shared_queue is not None:
            connected, waiting = self._sources.shared_queue()
            yield _gauge("cesar_shared_queue_connected", "1: connected to the queue that consumers share.", connected)
            yield _gauge("cesar_shared_queue_jobs", "Jobs that wait there for any consumer.", waiting)

    def _queue(self, totals: Totals) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        age_s = 0.0 if totals.oldest_queued_at is None else max(0.0, time.time() - totals.oldest_queued_at)
        yield _gauge("cesar_jobs_queued", "Queued jobs.", totals.queued)
        yield _gauge("cesar_jobs_processing", "Running jobs: 1 or 0.", totals.processing is not None)
        yield _gauge("cesar_oldest_queued_seconds", "How long the oldest queued job has waited.", age_s)
        yield _gauge("cesar_paused", "1: no job is started.", totals.paused)
        ended = CounterMetricFamily("cesar_jobs", "Final jobs since the ledger was created.", labels=("state",))
        ended.add_metric((JobState.COMPLETED.value,), totals.completed_total)
        ended.add_metric((JobState.ERROR.value,), totals.error_total)
        ended.add_metric((JobState.CANCELLED.value,), totals.cancelled_total)
        yield ended

    def _process(self, health: HealthMessage) -> Iterator[GaugeMetricFamily]:
        yield _gauge("cesar_worker_alive", "1: the worker's thread runs.", health.worker_alive)
        yield _gauge("cesar_broker_connected", "1: connected to the broker.", health.network_alive)
        yield _gauge("cesar_rss_bytes", "Memory of the process.", health.rss_bytes)
        yield _gauge("cesar_spool_bytes", "Uploaded audio and downloads.", health.spool_bytes)
        if health.disk_free_bytes is not None:
            yield _gauge("cesar_disk_free_bytes", "Free space on the data directory's disk.", health.disk_free_bytes)
        ledger = self._sources.ledger
        files = GaugeMetricFamily("cesar_ledger_bytes", "Size of the ledger's files.", labels=("file",))
        files.add_metric(("ledger",), _size_bytes(ledger))
        files.add_metric(("journal",), _size_bytes(ledger.with_name(ledger.name + ".journal")))
        yield files


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # the first change creates the journal, and a checkpoint replaces it
        return 0
