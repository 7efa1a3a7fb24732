import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.config import RetentionSettings
from cesar_mqtt.consumer.maintenance import Maintenance
from cesar_mqtt.jobs import JobState
from cesar_mqtt.ledger import ledger as ledger_module
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.threads import never_stop
from tests import factories
from tests.unit.ledger.faults import FaultyDisk, failing

DAY_S = 86_400.0


class Clock:
    """Both clocks in one."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock, disk: FaultyDisk) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.json", clock=clock, disk=disk) as ledger:
        yield ledger


def finish_uploads(ledger: Ledger, spool: Spool, count: int) -> None:
    names = spool.store([b"RIFF"] * count)
    ledger.append([factories.new_job(f"job-{n}", name, kind="spool") for n, name in enumerate(names)])
    while (job := ledger.claim()) is not None:
        ledger.complete(job.seq, factories.result())


def test_rejected_requests_leave_the_finished_jobs_alone(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    maintenance = Maintenance(RetentionSettings(max_finished=10), ledger, spool, clock=clock, monotonic=clock)
    finish_uploads(ledger, spool, 10)
    ledger.append([factories.new_job(f"wrong-{n}", None, failure="It is wrong.") for n in range(401)])
    maintenance.run_once(never_stop)
    assert ledger.count([JobState.COMPLETED]) == 10
    assert ledger.count([JobState.ERROR]) == RetentionSettings().max_rejected == 100


def test_old_jobs_are_deleted_with_their_audio_and_recent_ones_kept(
    ledger: Ledger, clock: Clock, tmp_path: Path
) -> None:
    spool = Spool(tmp_path / "spool")
    maintenance = Maintenance(RetentionSettings(days=7, max_finished=500), ledger, spool, clock=clock, monotonic=clock)
    finish_uploads(ledger, spool, 600)
    maintenance.run_once(never_stop)
    assert len(list((tmp_path / "spool").iterdir())) == 500, "as many as may be kept"
    clock.now += 8 * DAY_S
    maintenance.run_once(never_stop)
    assert list((tmp_path / "spool").iterdir()) == []
    assert ledger.jobs() == []


def test_a_stop_ends_retention_between_two_batches(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    maintenance = Maintenance(RetentionSettings(max_finished=0), ledger, spool, clock=clock, monotonic=clock)
    finish_uploads(ledger, spool, 10)
    maintenance.run_once(lambda: True)
    assert len(ledger.jobs()) == 10


def test_a_disk_that_refuses_is_tried_less_and_less_often(
    ledger: Ledger,
    clock: Clock,
    disk: FaultyDisk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    spool = Spool(ledger.path.parent / "spool")
    maintenance = Maintenance(RetentionSettings(), ledger, spool, clock=clock, monotonic=clock)
    finish_uploads(ledger, spool, 20)
    disk.fault = failing(times=float("inf"))
    tried = []
    with caplog.at_level(logging.WARNING):
        for second in range(20):
            maintenance.run_once(never_stop)
            if caplog.records:
                tried.append(second)
                caplog.clear()
            clock.now += 1.0
    assert tried == [0, 1, 3, 7, 15]
    disk.heal()
    clock.now += 1000.0
    size = ledger.path.stat().st_size
    maintenance.run_once(never_stop)
    assert ledger.path.stat().st_size > size, "the checkpoint is written as soon as the disk takes it"


def test_a_clock_that_is_corrected_after_the_start_makes_no_job_old(
    ledger: Ledger, clock: Clock, tmp_path: Path
) -> None:
    """A machine without a battery starts with a wrong clock."""
    uptime = Clock()
    spool = Spool(tmp_path / "spool")
    maintenance = Maintenance(RetentionSettings(), ledger, spool, clock=clock, monotonic=uptime)
    finish_uploads(ledger, spool, 1)
    clock.now += 30 * DAY_S
    uptime.now += 5
    maintenance.run_once(never_stop)
    assert ledger.get("job-0") is not None
    uptime.now += 8 * DAY_S
    maintenance.run_once(never_stop)
    assert ledger.get("job-0") is None
