"""What is measured: parts that count pass everything on, the numbers are told over HTTP, and off means off."""

import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cesar_mqtt.audio.download import DownloadedFile
from cesar_mqtt.config import MetricsSettings, ModelSettings
from cesar_mqtt.errors import Cancelled, ConfigError, ErrorCode, JobFailedError
from cesar_mqtt.jobs import AudioSource, Job, NewJob, Result
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.monitoring.metrics import Metrics, MetricSources, metrics_of
from cesar_mqtt.monitoring.prometheus import Instruments
from cesar_mqtt.protocol.consumer_payloads import HealthMessage
from cesar_mqtt.protocol.payloads import JobProgress, Rejection
from cesar_mqtt.transcript import Segment
from cesar_mqtt.whisper.model_store import ModelStore
from tests.conftest import find_free_port

RESULT = Result("Good morning.", 60.0, "en", 0.98, no_speech=False)
HEALTH = HealthMessage(
    uptime=1.0,
    worker_alive=True,
    network_alive=False,
    ledger_bytes=3,
    rss_bytes=4000,
    spool_bytes=5,
    disk_free_bytes=6,
)


@dataclass
class Told:
    """Notes every call that reaches it."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: self.calls.append((name, args, options))


class Fetching:
    """Fetches nothing, and ends as it is told to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def fetch(self, url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        if self.failure is not None:
            raise self.failure
        assert not should_stop()
        return DownloadedFile(Path(url), "digest")


@pytest.fixture
def port() -> int:
    return find_free_port()


@pytest.fixture
def instruments(port: int) -> Iterator[Instruments]:
    made = Instruments("127.0.0.1", port, consumer="porch")
    yield made
    made.close()


@pytest.fixture
def ledger(tmp_path: Path, instruments: Instruments) -> Iterator[Ledger]:
    times = iter(range(1_000, 100_000, 10))
    with Ledger(tmp_path / "ledger.json", clock=lambda: float(next(times)), disk=instruments.disk("ledger")) as made:
        yield made


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def submit(ledger: Ledger, *names: str) -> None:
    ledger.append([NewJob(name, name, AudioSource("path", "a.wav"), "base") for name in names])


def claim(ledger: Ledger) -> Job:
    job = ledger.claim()
    assert job is not None
    return job


def ended(ledger: Ledger, name: str) -> Job:
    job = ledger.get(name)
    assert job is not None
    return job


def readings(ledger: Ledger, health: HealthMessage = HEALTH) -> MetricSources:
    return MetricSources(
        ledger=ledger.path, totals=ledger.totals, health=lambda: health, in_flight=lambda: 7, behind=lambda: True
    )


# -- off --------------------------------------------------------------------------------------------------------------


def test_without_a_port_every_part_is_the_plain_one(tmp_path: Path) -> None:
    metrics = metrics_of(MetricsSettings(), consumer="cesar")
    told, fetching = Told(), Fetching()
    assert type(metrics) is Metrics
    assert type(metrics.disk("ledger")) is Disk
    assert metrics.reports(told) is told
    assert metrics.downloader(fetching) is fetching
    assert type(metrics.models(ModelSettings(), folder=tmp_path)) is ModelStore
    metrics.close()


def test_numbers_that_nobody_can_make_are_refused_with_the_name_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cesar_mqtt.monitoring.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert type(metrics_of(MetricsSettings(), consumer="cesar")) is Metrics
    with pytest.raises(ConfigError, match=r"metrics\.port is set.*cesar-mqtt\[metrics\]"):
        metrics_of(MetricsSettings(port=9464), consumer="cesar")


def test_with_a_port_there_are_instruments() -> None:
    assert isinstance(metrics_of(MetricsSettings(port=9464), consumer="cesar"), Instruments)


# -- the port ---------------------------------------------------------------------------------------------------------


def test_the_numbers_are_told_in_prometheus_own_format(instruments: Instruments, ledger: Ledger, port: int) -> None:
    submit(ledger, "a", "b", "c")
    claim(ledger)
    ledger.complete(1, RESULT)
    claim(ledger)
    ledger.pause(on=True)
    instruments.serve(readings(ledger))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    told = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert told["cesar_jobs_queued",] == told["cesar_jobs_processing",] == told["cesar_paused",] == 1
    assert told["cesar_jobs_total", "completed"] == 1
    assert told["cesar_jobs_total", "error"] == told["cesar_jobs_total", "cancelled"] == 0
    assert told["cesar_oldest_queued_seconds",] > 0
    assert (told["cesar_worker_alive",], told["cesar_broker_connected",]) == (1, 0)
    assert (told["cesar_messages_in_flight",], told["cesar_statuses_unpublished",]) == (7, 1)
    assert (told["cesar_rss_bytes",], told["cesar_spool_bytes",], told["cesar_disk_free_bytes",]) == (4000, 5, 6)
    assert told["cesar_ledger_bytes", "journal"] > 0
    assert any(name == "cesar_info" and "porch" in labels for name, *labels in told)


def test_a_taken_port_is_named_in_the_error(instruments: Instruments, ledger: Ledger, port: int) -> None:
    instruments.serve(readings(ledger))
    other = Instruments("127.0.0.1", port, consumer="cellar")
    with pytest.raises(ConfigError, match=rf"metrics\.port {port} on 127\.0\.0\.1 cannot be opened: Address already"):
        other.serve(readings(ledger))
    other.close()


def test_an_address_that_is_not_this_machine_is_named_in_the_error(ledger: Ledger, port: int) -> None:
    elsewhere = Instruments("192.0.2.1", port, consumer="porch")
    with pytest.raises(ConfigError, match=r"on 192\.0\.2\.1 cannot be opened"):
        elsewhere.serve(readings(ledger))


def test_closing_gives_the_port_back_and_leaves_no_thread(instruments: Instruments, ledger: Ledger, port: int) -> None:
    before = set(threading.enumerate())
    instruments.serve(readings(ledger))
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"metrics"}
    instruments.close()
    instruments.close()
    assert set(threading.enumerate()) <= before
    again = Instruments("127.0.0.1", port, consumer="porch")
    again.serve(readings(ledger))
    again.close()


def test_what_cannot_be_measured_here_is_left_out(instruments: Instruments, ledger: Ledger) -> None:
    instruments.serve(readings(ledger, HEALTH.model_copy(update={"disk_free_bytes": None})))
    assert value(instruments.registry, "cesar_disk_free_bytes") is None
    assert value(instruments.registry, "cesar_rss_bytes") == 4000


# -- parts ------------------------------------------------------------------------------------------------------------


def test_jobs_are_counted_by_how_they_ended(instruments: Instruments, ledger: Ledger) -> None:
    reports = instruments.reports(Told())
    submit(ledger, "good", "bad", "dropped")  # at 1000; each step takes 10 s
    ledger.complete(claim(ledger).seq, RESULT)
    ledger.fail(claim(ledger).seq, ErrorCode.AUDIO_NOT_FOUND, "There is no such file.")
    ledger.cancel("dropped")
    for name in ("good", "bad", "dropped"):
        reports.finished(ended(ledger, name))
    registry = instruments.registry
    assert value(registry, "cesar_job_errors_total", code="audio_not_found") == 1
    assert value(registry, "cesar_job_work_seconds_count") == 2, "one was never in work"
    assert value(registry, "cesar_job_wait_seconds_count") == 2
    good, bad = ended(ledger, "good"), ended(ledger, "bad")
    waited = sum((job.started_at or 0) - job.created_at for job in (good, bad))
    worked = sum((job.completed_at or 0) - (job.started_at or 0) for job in (good, bad))
    assert value(registry, "cesar_job_wait_seconds_sum") == pytest.approx(waited)
    assert value(registry, "cesar_job_work_seconds_sum") == pytest.approx(worked)
    assert value(registry, "cesar_audio_seconds_total") == 60.0
    speed = 60.0 / ((good.completed_at or 0) - (good.started_at or 0))
    assert value(registry, "cesar_job_speed_ratio") == pytest.approx(speed)


def test_the_speed_of_a_later_attempt_is_not_told_for_part_of_it_may_have_been_done(
    instruments: Instruments, ledger: Ledger
) -> None:
    submit(ledger, "a")
    ledger.requeue(claim(ledger).seq)
    ledger.complete(claim(ledger).seq, RESULT)
    instruments.reports(Told()).finished(ended(ledger, "a"))
    assert value(instruments.registry, "cesar_job_speed_ratio") == 0
    assert value(instruments.registry, "cesar_audio_seconds_total") == 60.0


def test_a_clock_that_was_set_back_stops_nothing(instruments: Instruments, tmp_path: Path) -> None:
    times = iter(range(10_000, 0, -10))
    with Ledger(tmp_path / "other.json", clock=lambda: float(next(times))) as ledger:
        submit(ledger, "a")
        ledger.complete(claim(ledger).seq, RESULT)
        instruments.reports(Told()).finished(ended(ledger, "a"))
    assert value(instruments.registry, "cesar_job_work_seconds_sum") == 0


def test_whatever_is_told_is_passed_on(instruments: Instruments, ledger: Ledger) -> None:
    submit(ledger, "a")
    job = ended(ledger, "a")
    rejection = Rejection(
        reason="queue_full",
        detail="Full.",
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt="",
        received_at="2026-01-23T21:45:00.120Z",
    )
    live = JobProgress(progress=0.5, processed_duration=30.0, audio_duration=60.0, speed=None, eta=None, updated_at=0.0)
    segment = Segment(1, 0.0, 1.0, "Good", -0.1, 0.1)
    told = Told()
    reports = instruments.reports(told)
    reports.finished(job)
    reports.reject(rejection)
    reports.activity("idle")
    reports.degraded("worker", on=True)
    reports.progress(job, live)
    reports.segment(job, segment)
    reports.answer("a/b", b"c", correlation_data=b"d")
    reports.found_retained(b"e")
    assert told.calls == [
        ("finished", (job,), {}),
        ("reject", (rejection,), {}),
        ("activity", ("idle",), {}),
        ("degraded", ("worker",), {"on": True}),
        ("progress", (job, live), {}),
        ("segment", (job, segment), {}),
        ("answer", ("a/b", b"c"), {"correlation_data": b"d"}),
        ("found_retained", (b"e",), {}),
    ]
    assert value(instruments.registry, "cesar_rejected_total", reason="queue_full") == 1


def test_syncs_are_timed_for_ledger_and_spool_apart(instruments: Instruments, ledger: Ledger, tmp_path: Path) -> None:
    def syncs(of: str) -> float:
        return value(instruments.registry, "cesar_fsync_seconds_count", of=of) or 0

    spool, before = Spool(tmp_path / "spool", instruments.disk("spool")), syncs("spool")
    opened = syncs("ledger")
    submit(ledger, "a")
    assert syncs("ledger") == opened + 1, "one transaction, one sync"
    spool.store([b"RIFF"])
    assert syncs("spool") > before
    assert (value(instruments.registry, "cesar_fsync_seconds_sum", of="ledger") or 0) > 0


def test_a_model_is_counted_when_it_comes_into_memory_and_when_it_goes(
    instruments: Instruments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = instruments.models(ModelSettings(), folder=tmp_path)
    monkeypatch.setattr(models.catalogue, "obtain", lambda name, **_: Path(name))
    monkeypatch.setattr(models, "_start_or_renew", lambda name, *_: SimpleNamespace(name=name))
    models.load("base")
    models.load("base")
    models.load("tiny.en")
    models.unload()
    models.unload()
    registry = instruments.registry
    assert value(registry, "cesar_model_loads_total", model="base") == 1
    assert value(registry, "cesar_model_loads_total", model="tiny.en") == 1
    assert value(registry, "cesar_model_unloads_total") == 2
    assert value(registry, "cesar_model_load_seconds_count") == 2


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (None, "done"),
        (JobFailedError(ErrorCode.AUDIO_TOO_LARGE, "Too large."), "audio_too_large"),
        (Cancelled(), "stopped"),
        (RuntimeError("unforeseen"), "internal"),
    ],
)
def test_downloads_are_counted_by_how_they_ended(
    instruments: Instruments, failure: Exception | None, outcome: str
) -> None:
    downloader = instruments.downloader(Fetching(failure))
    if failure is None:
        assert downloader.fetch("a", lambda: False) == DownloadedFile(Path("a"), "digest")
    else:
        with pytest.raises(type(failure)):
            downloader.fetch("a", lambda: False)
    assert value(instruments.registry, "cesar_downloads_total", outcome=outcome) == 1
    assert value(instruments.registry, "cesar_download_seconds_count") == 1
