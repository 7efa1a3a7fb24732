"""The numbers for Prometheus: parts that count what passes through them, and an HTTP server that tells the counts.

The registry is the consumer's own. Each part may be called by whoever may call the plain one; the server answers in
threads of its own, which only read.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from faster_whisper import WhisperModel
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cesar_mqtt import __version__
from cesar_mqtt.audio.download import DownloadedFile
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.consumer.prefetched import Fetches
from cesar_mqtt.errors import Cancelled, ConfigError, JobFailedError
from cesar_mqtt.jobs import Job, JobState, Totals
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.monitoring.metrics import Metrics, MetricSources, Reports
from cesar_mqtt.protocol.consumer_payloads import Activity
from cesar_mqtt.protocol.payloads import JobProgress, Rejection
from cesar_mqtt.threads import never_stop
from cesar_mqtt.transcript import Segment
from cesar_mqtt.whisper.model_store import ModelStore

if TYPE_CHECKING:
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

_WAIT_S: Final = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_WORK_S: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600)
_SYNC_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_FETCH_S: Final = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CLOSE_S: Final = 5.0


class Instruments(Metrics):
    """Hands out parts that count, and serves the counts over HTTP."""

    def __init__(self, host: str, port: int, *, consumer: str) -> None:
        """Make the counters, all of them zero; nothing listens before `serve`."""
        self._host = host
        self._port = port
        self._server: tuple[WSGIServer, Thread] | None = None
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        about = Gauge("cesar_info", "Always 1; who this is.", ("version", "consumer"), registry=self.registry)
        about.labels(__version__, consumer).set(1)
        self._jobs = _Jobs(self.registry)
        self._syncs = Histogram(
            "cesar_fsync_seconds", "How long the disk took to sync.", ("of",), registry=self.registry, buckets=_SYNC_S
        )
        self._models = _Models(self.registry)
        self._downloads = _Downloads(self.registry)

    def disk(self, of: str) -> Disk:
        """Return durable writes whose syncs are timed."""
        return _TimedDisk(self._syncs.labels(of))

    def models(self, settings: ModelSettings, *, folder: Path) -> ModelStore:
        """Return models whose loads are counted."""
        return _CountedModels(settings, self._models, folder=folder)

    def reports(self, to: Reports) -> Reports:
        """Return whom to tell: it counts, and passes on."""
        return _CountedReports(to, self._jobs)

    def downloader(self, downloader: Fetches) -> Fetches:
        """Return what fetches as `downloader` does, and is timed."""
        return _TimedDownloader(downloader, self._downloads)

    def serve(self, readings: MetricSources) -> None:
        """Listen. Raises ConfigError when the port cannot be had."""
        self.registry.register(_Observed(readings))
        try:
            server, thread = start_http_server(self._port, self._host, self.registry)
        except OSError as exc:
            raise ConfigError(
                f"metrics.port {self._port} on {self._host} cannot be opened: {exc.strerror or exc}. "
                "Choose another port or metrics.host, or leave metrics.port out."
            ) from exc
        thread.name = "metrics"
        self._server = server, thread

    def close(self) -> None:
        """Give the port back and end the thread."""
        opened, self._server = self._server, None
        if opened is not None:
            server, thread = opened
            server.shutdown()
            server.server_close()
            thread.join(_CLOSE_S)


class _Observed(Collector):
    """What is looked up when somebody asks."""

    def __init__(self, readings: MetricSources) -> None:
        self._readings = readings

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Look everything up."""
        yield from self._of_the_queue(self._readings.totals())
        yield from self._of_the_process()
        yield from self._of_the_broker()

    def _of_the_queue(self, totals: Totals) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        age_s = 0.0 if totals.oldest_queued_at is None else max(0.0, time.time() - totals.oldest_queued_at)
        yield _gauge("cesar_jobs_queued", "Jobs that wait.", totals.queued)
        yield _gauge("cesar_jobs_processing", "Jobs in work: 1 or 0.", totals.processing is not None)
        yield _gauge("cesar_oldest_queued_seconds", "How long the first job in the queue has waited.", age_s)
        yield _gauge("cesar_paused", "1: no job is started.", totals.paused)
        ended = CounterMetricFamily("cesar_jobs", "Jobs that have ended since the ledger was made.", labels=("state",))
        ended.add_metric((JobState.COMPLETED.value,), totals.completed_total)
        ended.add_metric((JobState.ERROR.value,), totals.error_total)
        ended.add_metric((JobState.CANCELLED.value,), totals.cancelled_total)
        yield ended

    def _of_the_process(self) -> Iterator[GaugeMetricFamily]:
        health = self._readings.health()
        yield _gauge("cesar_worker_alive", "1: the worker's thread runs.", health.worker_alive)
        yield _gauge("cesar_broker_connected", "1: there is a connection to the broker.", health.network_alive)
        yield _gauge("cesar_rss_bytes", "Memory of the process.", health.rss_bytes)
        yield _gauge("cesar_spool_bytes", "Audio that came with jobs, and downloads.", health.spool_bytes)
        if health.disk_free_bytes is not None:
            yield _gauge("cesar_disk_free_bytes", "Room on the data directory's disk.", health.disk_free_bytes)
        ledger = self._readings.ledger
        files = GaugeMetricFamily("cesar_ledger_bytes", "The ledger's files.", labels=("file",))
        files.add_metric(("ledger",), _size(ledger))
        files.add_metric(("journal",), _size(ledger.with_name(ledger.name + ".journal")))
        yield files

    def _of_the_broker(self) -> Iterator[GaugeMetricFamily]:
        in_flight, behind = self._readings.in_flight(), self._readings.behind()
        yield _gauge("cesar_messages_in_flight", "Messages sent, but not acknowledged.", in_flight)
        yield _gauge("cesar_statuses_unpublished", "1: the broker has yet to acknowledge some status.", behind)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a journal is made at the first change, and a checkpoint replaces it
        return 0


# -- disk -------------------------------------------------------------------------------------------------------------


class _TimedDisk(Disk):
    """Times every sync."""

    def __init__(self, syncs: Histogram) -> None:
        self._syncs = syncs

    def sync(self, descriptor: int) -> None:
        started = time.perf_counter()
        super().sync(descriptor)
        self._syncs.observe(time.perf_counter() - started)

    def sync_data(self, descriptor: int) -> None:
        started = time.perf_counter()
        super().sync_data(descriptor)
        self._syncs.observe(time.perf_counter() - started)


# -- jobs -------------------------------------------------------------------------------------------------------------


class _Jobs:
    """What is counted when a job ends, or a message is refused."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._errors = Counter("cesar_job_errors", "Jobs that ended as error.", ("code",), registry=registry)
        self._rejected = Counter("cesar_rejected", "Messages that were refused.", ("reason",), registry=registry)
        self._waited = Histogram(
            "cesar_job_wait_seconds", "From acceptance to the last start.", registry=registry, buckets=_WAIT_S
        )
        self._worked = Histogram(
            "cesar_job_work_seconds", "From the last start to the end.", registry=registry, buckets=_WORK_S
        )
        self._audio = Counter("cesar_audio_seconds", "Audio of completed jobs.", registry=registry)
        self._speed = Gauge("cesar_job_speed_ratio", "Audio over work of the last completed job.", registry=registry)

    def refused(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def ended(self, job: Job) -> None:
        if job.error_code is not None:
            self._errors.labels(job.error_code.value).inc()
        if job.started_at is None or job.completed_at is None:
            return
        worked_s = max(0.0, job.completed_at - job.started_at)  # a clock that was set back must not stop anything
        self._waited.observe(max(0.0, job.started_at - job.created_at))
        self._worked.observe(worked_s)
        if job.state is JobState.COMPLETED and job.audio_duration is not None:
            self._audio.inc(job.audio_duration)
            if worked_s and job.attempt == 1:  # a later attempt may have gone on where another was ended
                self._speed.set(job.audio_duration / worked_s)


@dataclass(frozen=True, slots=True)
class _CountedReports:
    """Counts what is told, and passes everything on."""

    to: Reports
    jobs: _Jobs

    def finished(self, job: Job) -> None:
        self.jobs.ended(job)
        self.to.finished(job)

    def reject(self, rejection: Rejection) -> None:
        self.jobs.refused(rejection.reason)
        self.to.reject(rejection)

    def activity(self, activity: Activity) -> None:
        self.to.activity(activity)

    def degraded(self, who: str, *, on: bool) -> None:
        self.to.degraded(who, on=on)

    def progress(self, job: Job, live: JobProgress) -> None:
        self.to.progress(job, live)

    def segment(self, job: Job, segment: Segment) -> None:
        self.to.segment(job, segment)

    def answer(self, topic: str, payload: bytes, *, correlation_data: bytes | None = None) -> None:
        self.to.answer(topic, payload, correlation_data=correlation_data)

    def found_retained(self, payload: bytes | None) -> None:
        self.to.found_retained(payload)


# -- models -----------------------------------------------------------------------------------------------------------


class _Models:
    """What is counted of models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.loads = Counter("cesar_model_loads", "Models that came into memory.", ("model",), registry=registry)
        self.unloads = Counter("cesar_model_unloads", "Models that were given up.", registry=registry)
        self.seconds = Histogram(
            "cesar_model_load_seconds", "Until a model was ready, fetched if need be.", registry=registry
        )


class _CountedModels(ModelStore):
    """Counts the models that come into memory and go out of it."""

    def __init__(self, settings: ModelSettings, counts: _Models, *, folder: Path) -> None:
        super().__init__(settings, folder=folder)
        self._counts = counts
        self._in_memory = False

    def load(self, name: str, *, should_stop: Callable[[], bool] = never_stop) -> WhisperModel:
        started = time.perf_counter()
        model = super().load(name, should_stop=should_stop)  # calls `unload` when another one was there
        if not self._in_memory:
            self._in_memory = True
            self._counts.loads.labels(name).inc()
            self._counts.seconds.observe(time.perf_counter() - started)
        return model

    def unload(self) -> None:
        if self._in_memory:
            self._in_memory = False
            self._counts.unloads.inc()
        super().unload()


# -- downloads --------------------------------------------------------------------------------------------------------


class _Downloads:
    """What is counted of downloads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "cesar_downloads", "Downloads: done, stopped, or the error's code.", ("outcome",), registry=registry
        )
        self.seconds = Histogram(
            "cesar_download_seconds", "How long they took, retries included.", registry=registry, buckets=_FETCH_S
        )


@dataclass(frozen=True, slots=True)
class _TimedDownloader:
    """Times every download and counts how it ended."""

    to: Fetches
    counts: _Downloads

    def fetch(self, url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        started, outcome = time.perf_counter(), "internal"
        try:
            fetched = self.to.fetch(url, should_stop)
            outcome = "done"
        except JobFailedError as exc:
            outcome = exc.code.value
            raise
        except Cancelled:
            outcome = "stopped"
            raise
        finally:
            self.counts.ended.labels(outcome).inc()
            self.counts.seconds.observe(time.perf_counter() - started)
        return fetched
