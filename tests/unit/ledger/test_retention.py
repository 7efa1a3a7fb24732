"""Retention: which finished jobs `Ledger.delete_finished` deletes, in which order, and what has to be cleared."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.jobs import JobState, Result
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger.checkpoint import Snapshot
from cesar_mqtt.ledger.ledger import Ledger
from tests.factories import new_job
from tests.unit.ledger.faults import QuickDisk

RESULT = Result("spoken", 1.0, "en", 0.9, no_speech=False)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.json", clock=clock, monotonic=clock) as ledger:
        yield ledger


def finish(ledger: Ledger, *job_ids: str, kind: str = "path") -> None:
    ledger.append([new_job(job_id, f"{job_id}.wav", kind=kind) for job_id in job_ids])
    for _ in job_ids:
        job = ledger.claim()
        assert job is not None
        ledger.complete(job.seq, RESULT)


def publish_all(ledger: Ledger) -> None:
    while jobs := ledger.unpublished(100):
        for number, job in jobs:
            ledger.mark_published([(job.seq, number)])


def existing(ledger: Ledger, *job_ids: str) -> list[str]:
    return [job_id for job_id in job_ids if ledger.get(job_id) is not None]


def test_jobs_that_ended_before_the_limit_are_deleted_oldest_first(ledger: Ledger, clock: Clock) -> None:
    finish(ledger, "a", "b")
    clock.now += 100
    finish(ledger, "c")
    ledger.append([new_job("queued")])

    assert ledger.delete_finished(before=clock.now - 50, keep=1000) == (2, [])

    assert existing(ledger, "a", "b", "c", "queued") == ["c", "queued"]
    assert ledger.totals().completed_total == 3, "totals count ended jobs, not kept ones"


def test_only_the_newest_finished_jobs_are_kept_and_queued_jobs_are_not_touched(ledger: Ledger) -> None:
    finish(ledger, *"abcde")
    ledger.append([new_job("queued")])
    ledger.append([new_job("running")])
    ledger.claim()
    assert ledger.delete_finished(before=0.0, keep=2)[0] == 3
    assert existing(ledger, *"abcde", "queued", "running") == ["d", "e", "queued", "running"]
    assert ledger.delete_finished(before=0.0, keep=0)[0] == 2
    assert ledger.delete_finished(before=0.0, keep=0) == (0, [])


def test_rejected_requests_have_a_quota_of_their_own_and_displace_no_finished_job(
    ledger: Ledger, tmp_path: Path, clock: Clock
) -> None:
    """1,001 invalid requests with ids deleted the results of everybody else."""
    finish(ledger, *"abc")
    ledger.append([new_job(f"wrong-{n}", None, failure="It is wrong.") for n in range(20)])

    assert ledger.delete_finished(before=0.0, keep=3, keep_rejected=5) == (15, [])
    assert existing(ledger, *"abc", *(f"wrong-{n}" for n in range(20))) == [
        *"abc",
        *(f"wrong-{n}" for n in range(15, 20)),
    ]
    assert ledger.totals().error_total == 20
    last = ledger.last_finished(JobState.COMPLETED)
    assert last is not None
    assert last.job_id == "c", "no rejection"

    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock, monotonic=clock) as again:
        assert again.delete_finished(before=0.0, keep=3, keep_rejected=5) == (0, [])
        assert again.delete_finished(before=0.0, keep=0, keep_rejected=5)[0] == 3
        assert again.delete_finished(before=clock.now, keep=0, keep_rejected=5)[0] == 5, "they become old as well"


def test_jobs_that_ended_while_the_clock_was_ahead_do_not_delay_the_deletion_of_others(
    ledger: Ledger, tmp_path: Path, clock: Clock
) -> None:
    today = clock.now
    clock.now = today + 1e9
    finish(ledger, *"abc")
    clock.now = today
    finish(ledger, *"de")
    clock.now = today - 50
    finish(ledger, "f")
    clock.now = today + 100
    assert ledger.delete_finished(before=today - 10, keep=1000, limit=2)[0] == 1
    assert existing(ledger, *"abcdef") == [*"abcde"]
    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        assert again.delete_finished(before=today - 10, keep=1000, limit=2)[0] == 0
        assert [again.delete_finished(before=today + 50, keep=4, limit=2)[0] for _ in range(3)] == [2, 1, 0]
        assert existing(again, *"abcdef") == ["b", "c"], "one is surplus, two are too old"


def test_the_age_of_a_retried_job_counts_from_its_last_end(ledger: Ledger, clock: Clock) -> None:
    ledger.append([new_job("a"), new_job("b")])
    ledger.cancel("a")
    ledger.retry("a")
    clock.now += 100
    ledger.cancel("a")
    ledger.cancel("b")
    assert ledger.delete_finished(before=clock.now - 50, keep=1000) == (0, [])
    assert ledger.delete_finished(before=clock.now + 1, keep=1, limit=10)[0] == 2, "too old and surplus"


def test_one_call_deletes_no_more_than_the_limit(ledger: Ledger) -> None:
    finish(ledger, *(f"job-{number}" for number in range(25)))
    assert [ledger.delete_finished(before=0.0, keep=0, limit=10)[0] for _ in range(4)] == [10, 10, 5, 0]


def test_spool_files_of_deleted_jobs_are_returned(ledger: Ledger) -> None:
    finish(ledger, "a", kind="spool")
    assert ledger.delete_finished(before=0.0, keep=0) == (1, ["a.wav"])


def test_cancelled_jobs_are_deleted_like_other_finished_jobs(ledger: Ledger, clock: Clock) -> None:
    ledger.append(
        [
            new_job("a", "a.wav", kind="spool"),
            new_job("b", "b.wav", kind="spool"),
            new_job("retried", "retried.wav", kind="spool"),
        ]
    )
    for name in ("a", "b", "retried"):
        ledger.cancel(name)
        clock.now += 10
    ledger.retry("retried")
    assert ledger.delete_finished(before=clock.now - 25, keep=100) == (1, ["a.wav"])
    assert ledger.delete_finished(before=0.0, keep=0) == (1, ["b.wav"])
    assert existing(ledger, "a", "b", "retried") == ["retried"]
    assert ledger.needed_spool_files() == {"retried.wav"}


def test_a_clear_is_pending_until_the_broker_has_acknowledged_it(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    finish(ledger, "a", "b")
    publish_all(ledger)
    ledger.delete_finished(before=0.0, keep=0)
    assert ledger.has_unpublished
    assert [deleted.job_id for deleted in ledger.pending_clears(10)] == ["a", "b"]
    assert ledger.unpublished(10) == []
    ledger.mark_cleared(1)
    assert [deleted.job_id for deleted in ledger.pending_clears(10)] == ["b"]
    ledger.close()

    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        assert [deleted.job_id for deleted in again.pending_clears(10)] == ["b"], "also after a restart"
        again.mark_cleared(2)
        assert not again.has_unpublished
        again.append([new_job("c")])
    with Ledger(tmp_path / "ledger.json", clock=clock) as later:
        assert later.pending_clears(10) == []


def test_a_hundred_thousand_finished_jobs_are_deleted_in_steps_and_jobs_accepted_between_them(
    tmp_path: Path,
) -> None:
    count = 100_000
    fixed = {"state": "completed", "created_at": 1.0, "updated_at": 1.0, "completed_at": 1.0, "model_size": "base"}
    jobs = {
        str(seq): {"job_id": f"job-{seq}", "revision": seq, "fingerprint": f"f-{seq}", **fixed}
        for seq in range(1, count + 1)
    }
    path, disk = tmp_path / "ledger.json", QuickDisk()
    checkpoint.save(Snapshot({"jobs": jobs}, transaction=count, watermark=count, is_complete=True), path, disk=disk)
    del jobs
    accepted = 0
    with Ledger(path, disk=disk) as ledger:
        while (deleted := ledger.delete_finished(before=2.0, keep=count)[0]) > 0:
            assert deleted <= 200, "no thread waits for more than one small transaction"
            if accepted < 20:
                accepted += 1
                ledger.append([new_job(f"new-{accepted}", None)])
        assert ledger.totals().queued == accepted
    with Ledger(path, disk=disk) as ledger:
        assert [job.seq for job in ledger.jobs()] == list(range(count + 1, count + accepted + 1))
        while pending := ledger.pending_clears(1000):
            for job in pending:
                ledger.mark_cleared(job.seq)
        ledger.append([new_job("after", None)])
    with Ledger(path, disk=disk) as ledger:
        assert ledger.pending_clears(1) == []
        assert ledger.claim() is not None
    assert path.stat().st_size < 2_000_000, "deleted jobs do not fill the disk"
