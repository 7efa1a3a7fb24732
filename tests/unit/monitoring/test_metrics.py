"""What is counted and read, and that it is served over HTTP under the documented names."""

import re
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cesar_mqtt import service
from cesar_mqtt.config import MetricsSettings, ModelSettings, Settings
from cesar_mqtt.errors import ConfigError, ErrorCode
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.monitoring.metrics import Metrics, MetricSources
from cesar_mqtt.protocol.consumer_payloads import HealthMessage
from cesar_mqtt.protocol.payloads import Rejection
from cesar_mqtt.whisper.model_store import ModelStore
from tests.conftest import PATIENCE_S, find_free_port
from tests.factories import new_job, result

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
RESULT = result("Good morning.", audio_duration=60.0)
HEALTH = HealthMessage(
    uptime=1.0,
    worker_alive=True,
    network_alive=False,
    ledger_bytes=3,
    rss_bytes=4000,
    spool_bytes=5,
    disk_free_bytes=6,
    events_dropped=7,
    quarantined=[],
)


@pytest.fixture
def port() -> int:
    return find_free_port()


@pytest.fixture
def metrics(port: int) -> Iterator[Metrics]:
    metrics = Metrics("127.0.0.1", port, consumer="porch")
    yield metrics
    metrics.close()


@pytest.fixture
def ledger(tmp_path: Path, metrics: Metrics) -> Iterator[Ledger]:
    times = iter(range(1_000, 100_000, 10))
    disk = timed_disk(metrics, "ledger")
    with Ledger(tmp_path / "ledger.json", clock=lambda: float(next(times)), disk=disk) as ledger:
        yield ledger


def timed_disk(metrics: Metrics, part: str) -> Disk:
    disk = Disk()
    disk.timed = metrics.sync_timer(part)
    return disk


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def submit(ledger: Ledger, *names: str) -> None:
    ledger.append([new_job(name) for name in names])


def claim(ledger: Ledger) -> Job:
    job = ledger.claim()
    assert job is not None
    return job


def rejection() -> Rejection:
    return Rejection(
        reason="queue_full",
        detail="Full.",
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt="",
        received_at="2026-01-23T21:45:00.120Z",
    )


def ended(ledger: Ledger, name: str) -> Job:
    job = ledger.get(name)
    assert job is not None
    return job


def sources(ledger: Ledger, health: HealthMessage = HEALTH) -> MetricSources:
    return MetricSources(
        ledger=ledger.path,
        totals=ledger.totals,
        health=lambda: health,
        in_flight=lambda: 7,
        has_unpublished=lambda: True,
        shared_queue=lambda: (True, 8),
    )


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


# -- off --------------------------------------------------------------------------------------------------------------


def test_without_a_port_nothing_is_counted() -> None:
    assert service._create_metrics(Settings()) is None


def test_a_port_without_the_extra_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cesar_mqtt.monitoring.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert service._create_metrics(Settings()) is None
    with pytest.raises(ConfigError, match=r"metrics\.port is set.*\[metrics\]"):
        service._create_metrics(Settings(metrics=MetricsSettings(port=9464)))


def test_with_a_port_there_are_metrics() -> None:
    assert isinstance(service._create_metrics(Settings(metrics=MetricsSettings(port=9464))), Metrics)


# -- the port ---------------------------------------------------------------------------------------------------------


def test_the_metrics_are_served_in_the_format_of_prometheus(metrics: Metrics, ledger: Ledger, port: int) -> None:
    submit(ledger, "a", "b", "c")
    claim(ledger)
    ledger.complete(1, RESULT)
    claim(ledger)
    ledger.pause(on=True)
    metrics.serve(sources(ledger))
    families = text_string_to_metric_families(scrape(port))
    served = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert served["cesar_jobs_queued",] == served["cesar_jobs_processing",] == served["cesar_paused",] == 1
    assert served["cesar_jobs_total", "completed"] == 1
    assert served["cesar_jobs_total", "error"] == served["cesar_jobs_total", "cancelled"] == 0
    assert served["cesar_oldest_queued_seconds",] > 0
    assert (served["cesar_worker_alive",], served["cesar_broker_connected",]) == (1, 0)
    assert (served["cesar_messages_in_flight",], served["cesar_statuses_unpublished",]) == (7, 1)
    assert (served["cesar_shared_queue_connected",], served["cesar_shared_queue_jobs",]) == (1, 8)
    assert (served["cesar_rss_bytes",], served["cesar_spool_bytes",], served["cesar_disk_free_bytes",]) == (4000, 5, 6)
    assert served["cesar_ledger_bytes", "journal"] > 0
    assert any(name == "cesar_info" and "porch" in labels for name, *labels in served)


def test_the_names_and_labels_are_those_of_the_documentation(metrics: Metrics, ledger: Ledger, port: int) -> None:
    submit(ledger, "good", "bad")
    ledger.complete(claim(ledger).seq, RESULT)
    ledger.fail(claim(ledger).seq, ErrorCode.AUDIO_NOT_FOUND, "There is no such file.")
    metrics.count_job(ended(ledger, "bad"))
    metrics.count_rejection(rejection())
    metrics.count_load("base", 1.0)
    metrics.count_download("done", 1.0)
    metrics.serve(sources(ledger))
    served: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape(port)):
        for sample in family.samples:
            name = re.sub(r"_(bucket|count|sum)$", "", sample.name) if family.type == "histogram" else sample.name
            if not name.endswith("_created"):
                served.setdefault(name, set()).update(sample.labels.keys() - {"le"})

    documented: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`cesar_.*|`process_.*)$", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE):
        names, _, labels = row.split("|")[:3]
        for name in re.findall(r"`(cesar_[a-z_]+)`", names):
            documented[name] = set(re.findall(r"`([a-z]+)`", labels.partition(":")[0]))
    assert {name: labels for name, labels in served.items() if name.startswith("cesar_")} == documented
    assert any(name.startswith("process_") for name in served)


def test_a_taken_port_is_named_in_the_error(metrics: Metrics, ledger: Ledger, port: int) -> None:
    metrics.serve(sources(ledger))
    other = Metrics("127.0.0.1", port, consumer="cellar")
    with pytest.raises(ConfigError, match=rf"metrics\.port {port} on 127\.0\.0\.1 cannot be opened: Address already"):
        other.serve(sources(ledger))
    other.close()


def test_an_address_that_is_not_this_machine_is_named_in_the_error(ledger: Ledger, port: int) -> None:
    elsewhere = Metrics("192.0.2.1", port, consumer="porch")
    with pytest.raises(ConfigError, match=r"on 192\.0\.2\.1 cannot be opened"):
        elsewhere.serve(sources(ledger))


def test_close_frees_the_port_and_ends_the_thread(metrics: Metrics, ledger: Ledger, port: int) -> None:
    before = set(threading.enumerate())
    metrics.serve(sources(ledger))
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"metrics"}
    metrics.close()
    metrics.close()
    assert set(threading.enumerate()) <= before
    again = Metrics("127.0.0.1", port, consumer="porch")
    again.serve(sources(ledger))
    again.close()


def test_what_cannot_be_measured_here_is_left_out(metrics: Metrics, ledger: Ledger) -> None:
    metrics.serve(sources(ledger, HEALTH.model_copy(update={"disk_free_bytes": None})))
    assert value(metrics.registry, "cesar_disk_free_bytes") is None
    assert value(metrics.registry, "cesar_rss_bytes") == 4000


# -- parts ------------------------------------------------------------------------------------------------------------


def test_jobs_are_counted_by_how_they_ended(metrics: Metrics, ledger: Ledger) -> None:
    submit(ledger, "good", "bad", "dropped")  # at 1000; each step takes 10 s
    ledger.complete(claim(ledger).seq, RESULT)
    ledger.fail(claim(ledger).seq, ErrorCode.AUDIO_NOT_FOUND, "There is no such file.")
    ledger.cancel("dropped")
    for name in ("good", "bad", "dropped"):
        metrics.count_job(ended(ledger, name))
    registry = metrics.registry
    assert value(registry, "cesar_job_errors_total", code="audio_not_found") == 1
    assert value(registry, "cesar_job_work_seconds_count") == 2, "one was never started"
    assert value(registry, "cesar_job_wait_seconds_count") == 2
    good, bad = ended(ledger, "good"), ended(ledger, "bad")
    waited = sum((job.started_at or 0) - job.created_at for job in (good, bad))
    worked = sum((job.completed_at or 0) - (job.started_at or 0) for job in (good, bad))
    assert value(registry, "cesar_job_wait_seconds_sum") == pytest.approx(waited)
    assert value(registry, "cesar_job_work_seconds_sum") == pytest.approx(worked)
    assert value(registry, "cesar_audio_seconds_total") == 60.0
    speed = 60.0 / ((good.completed_at or 0) - (good.started_at or 0))
    assert value(registry, "cesar_job_speed_ratio") == pytest.approx(speed)


def test_the_speed_of_a_later_attempt_is_not_reported_as_an_earlier_one_may_have_done_a_part(
    metrics: Metrics, ledger: Ledger
) -> None:
    submit(ledger, "a")
    ledger.requeue(claim(ledger).seq)
    ledger.complete(claim(ledger).seq, RESULT)
    metrics.count_job(ended(ledger, "a"))
    assert value(metrics.registry, "cesar_job_speed_ratio") == 0
    assert value(metrics.registry, "cesar_audio_seconds_total") == 60.0


def test_a_clock_that_is_set_back_counts_as_no_time(metrics: Metrics, tmp_path: Path) -> None:
    times = iter(range(10_000, 0, -10))
    with Ledger(tmp_path / "other.json", clock=lambda: float(next(times))) as ledger:
        submit(ledger, "a")
        ledger.complete(claim(ledger).seq, RESULT)
        metrics.count_job(ended(ledger, "a"))
    assert value(metrics.registry, "cesar_job_work_seconds_sum") == 0


def test_rejections_are_counted_by_their_reason(metrics: Metrics) -> None:
    metrics.count_rejection(rejection())
    assert value(metrics.registry, "cesar_rejected_total", reason="queue_full") == 1


def test_syncs_are_timed_for_ledger_and_spool_apart(metrics: Metrics, ledger: Ledger, tmp_path: Path) -> None:
    def syncs(of: str) -> float:
        return value(metrics.registry, "cesar_fsync_seconds_count", of=of) or 0

    spool, before = Spool(tmp_path / "spool", timed_disk(metrics, "spool")), syncs("spool")
    opened = syncs("ledger")
    submit(ledger, "a")
    assert syncs("ledger") == opened + 1, "one transaction, one sync"
    spool.store([b"RIFF"])
    assert syncs("spool") > before
    assert (value(metrics.registry, "cesar_fsync_seconds_sum", of="ledger") or 0) > 0


def test_a_model_is_counted_when_it_comes_into_memory_and_when_it_goes(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ModelStore(ModelSettings(), folder=tmp_path)
    models.on_loaded, models.on_unloaded = metrics.count_load, metrics.count_unload
    monkeypatch.setattr(models.catalogue, "obtain", lambda name, **_: Path(name))
    monkeypatch.setattr(models, "_load", lambda name, *_: SimpleNamespace(name=name))
    models.load("base")
    models.load("base")
    models.load("tiny.en")
    models.unload()
    models.unload()
    registry = metrics.registry
    assert value(registry, "cesar_model_loads_total", model="base") == 1
    assert value(registry, "cesar_model_loads_total", model="tiny.en") == 1
    assert value(registry, "cesar_model_unloads_total") == 2
    assert value(registry, "cesar_model_load_seconds_count") == 2


def test_downloads_are_counted_by_how_they_ended(metrics: Metrics) -> None:
    metrics.count_download("done", 2.0)
    metrics.count_download("stopped", 1.0)
    for outcome in ("done", "stopped"):
        assert value(metrics.registry, "cesar_downloads_total", outcome=outcome) == 1
    assert value(metrics.registry, "cesar_download_seconds_count") == 2
    assert value(metrics.registry, "cesar_download_seconds_sum") == 3.0
