"""Priorities and preemption in the ledger: the order of claims, what is on disk, positions, expiry, and crashes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tinydb import TinyDB

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import Admission, IllegalTransitionError, Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from tests.factories import new_job, result, window
from tests.unit.ledger.faults import FaultyDisk, Killed, killing


class Opened:
    """A ledger that can be killed and opened again; the clock stands still unless it is moved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1_700_000_000.0
        self.disk = FaultyDisk()
        self.ledger = self.open()

    def open(self) -> Ledger:
        self.disk = FaultyDisk()
        self.ledger = Ledger(self.path, max_attempts=2, clock=lambda: self.now, monotonic=lambda: 0.0, disk=self.disk)
        return self.ledger

    def crash(self) -> Ledger:
        self.kill()
        return self.open()

    def kill(self) -> None:
        self.ledger._storage.abandon()
        self.ledger._file_lock.release()

    def add(self, **priorities: int) -> None:
        """Append jobs in one batch, by name with their priorities."""
        self.ledger.append([new_job(name, priority=priority) for name, priority in priorities.items()])

    def claim(self) -> Job:
        job = self.ledger.claim()
        assert job is not None
        return job

    def job(self, name: str) -> Job:
        job = self.ledger.get(name)
        assert job is not None
        return job

    def queue(self) -> list[str]:
        return [job.job_id for job in self.ledger.upcoming(100)]

    def publish_all(self) -> list[tuple[str, int | None]]:
        """Acknowledge every status; return the ids and the positions in the order of publication."""
        published: list[tuple[str, int | None]] = []
        self.ledger.republish_moved()
        while handed := self.ledger.unpublished(100):
            published += [(job.job_id, job.queue_position) for _, job in handed]
            self.ledger.mark_published([(job.seq, number) for number, job in handed])
        return published


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    made = Opened(tmp_path / "ledger.json")
    yield made
    made.kill()


# -- order --------------------------------------------------------------------------------------------------------


def test_jobs_are_claimed_by_priority_and_in_the_order_of_acceptance(opened: Opened) -> None:
    opened.add(a=0, b=5, c=0)
    opened.add(d=9, e=5, f=1)
    expected = ["d", "b", "e", "f", "a", "c"]
    assert opened.queue() == expected
    opened.crash()
    assert [opened.claim().job_id for _ in expected] == expected


def test_a_preempted_job_is_the_first_of_its_priority_also_after_a_crash(opened: Opened) -> None:
    opened.add(a=0, b=0, c=0)
    opened.ledger.cancel("a")
    running = opened.claim()
    opened.ledger.retry("a")
    opened.add(high=1)
    assert opened.ledger.is_outranked(running.seq)
    assert opened.ledger.preempt(running.seq).queue_position == 2
    assert opened.queue() == ["high", "b", "a", "c"], "before an older job that was queued again meanwhile"
    opened.crash()
    assert opened.queue() == ["high", "b", "a", "c"]
    assert [opened.claim().job_id for _ in range(4)] == ["high", "b", "a", "c"]


def test_a_job_is_first_of_its_priority_only_until_it_is_started(opened: Opened) -> None:
    opened.add(a=0, b=0)
    opened.ledger.cancel("a")
    running = opened.claim()
    opened.ledger.retry("a")
    opened.ledger.preempt(running.seq)
    opened.ledger.requeue(opened.claim().seq)
    assert opened.queue() == ["a", "b"]
    opened.crash()
    assert opened.queue() == ["a", "b"]


def test_a_preempted_job_that_is_cancelled_and_retried_has_lost_its_place(opened: Opened) -> None:
    opened.add(a=0, b=0)
    opened.ledger.cancel("a")
    opened.ledger.preempt(opened.claim().seq)
    opened.ledger.retry("a")
    opened.ledger.cancel("b")
    opened.ledger.retry("b")
    assert opened.queue() == ["a", "b"]


def test_equal_and_lower_priorities_do_not_preempt(opened: Opened) -> None:
    opened.add(a=3, b=3, c=0)
    running = opened.claim()
    assert not opened.ledger.is_outranked(running.seq)
    opened.add(d=4)
    assert opened.ledger.is_outranked(running.seq)


@pytest.mark.parametrize("why", ["paused", "delayed", "expired"])
def test_a_job_that_cannot_be_started_does_not_preempt(opened: Opened, why: str) -> None:
    opened.ledger.append([new_job("high", priority=9, expires_at=opened.now + 60.0)])
    high = opened.claim()
    opened.add(low=0)
    running = opened.claim()
    if why == "delayed":
        opened.ledger.defer(high.seq, 5.0)
    else:
        opened.ledger.requeue(high.seq)
    if why == "paused":
        opened.ledger.pause(on=True)
    elif why == "expired":
        opened.now += 61.0
    assert not opened.ledger.is_outranked(running.seq)


def test_the_order_of_priorities_does_not_change_what_is_listed(opened: Opened) -> None:
    opened.add(a=0, b=9, c=5)
    listed = opened.ledger.jobs()
    assert [job.job_id for job in listed] == ["a", "b", "c"], "oldest first"
    assert [job.priority for job in listed] == [0, 9, 5]
    assert [job.queue_position for job in listed] == [3, 1, 2]


def test_the_oldest_job_is_the_one_that_waits_longest_whatever_its_priority(opened: Opened) -> None:
    opened.add(a=0)
    first = opened.now
    opened.now += 60.0
    opened.add(b=9)
    assert opened.ledger.totals().oldest_queued_at == first
    opened.claim()
    assert opened.ledger.totals().oldest_queued_at == first
    opened.claim()
    assert opened.ledger.totals().oldest_queued_at is None


# -- attempts, windows, expiry ------------------------------------------------------------------------------------


def test_preemption_counts_as_an_attempt_and_not_as_a_crash(opened: Opened) -> None:
    opened.add(a=0)
    for attempt in range(1, 6):
        job = opened.claim()
        assert (job.attempt, job.crashes) == (attempt, 0)
        opened.ledger.add_window(job.seq, window(attempt - 1))
        requeued = opened.ledger.preempt(job.seq)
        assert (requeued.state, requeued.started_at, requeued.queue_position) == (JobState.QUEUED, None, 1)
    job = opened.claim()
    assert (job.attempt, len(opened.ledger.windows(job.seq))) == (6, 5)
    assert opened.crash().get("a") == opened.job("a")
    assert (opened.job("a").state, opened.job("a").crashes) == (JobState.QUEUED, 1)
    opened.claim()
    opened.crash()
    assert opened.job("a").error_code is ErrorCode.CRASHED


def test_a_job_that_has_started_in_time_does_not_expire_while_it_is_preempted(opened: Opened) -> None:
    opened.ledger.append([new_job("a", expires_at=opened.now + 60.0)])
    opened.ledger.preempt(opened.claim().seq)
    opened.now += 61.0
    assert opened.ledger.expire() == []
    opened.crash()
    assert opened.ledger.expire() == []
    assert opened.claim().job_id == "a"


def test_a_job_that_is_being_cancelled_ends_instead_of_being_requeued(opened: Opened) -> None:
    opened.add(a=0)
    job = opened.claim()
    opened.ledger.cancel("a")
    assert opened.ledger.preempt(job.seq).state is JobState.CANCELLED
    assert opened.ledger.preempted() == frozenset()


@pytest.mark.parametrize("state", ["queued", "completed"])
def test_only_a_running_job_can_be_preempted(opened: Opened, state: str) -> None:
    opened.add(a=0)
    if state == "completed":
        opened.ledger.complete(opened.claim().seq, result())
    before = opened.job("a")
    with pytest.raises(IllegalTransitionError):
        opened.ledger.preempt(before.seq)
    assert opened.job("a") == before


@pytest.mark.parametrize("calls", range(4))
def test_a_death_during_a_preemption_leaves_the_job_before_or_after_it(opened: Opened, calls: int) -> None:
    opened.add(a=0, b=0)
    job = opened.claim()
    opened.ledger.add_window(job.seq, window(0))
    opened.add(high=9)
    opened.disk.fault = killing(skip=calls)
    died = False
    try:
        opened.ledger.preempt(job.seq)
    except Killed:
        died = True
    opened.crash()
    assert opened.queue() == ["high", "a", "b"]
    after = opened.job("a")
    assert (after.state, after.attempt, after.crashes in ((0, 1) if died else (0,))) == (JobState.QUEUED, 1, True)
    assert len(opened.ledger.windows(job.seq)) == 1


# -- positions ----------------------------------------------------------------------------------------------------


def test_the_positions_of_a_batch_are_those_behind_the_whole_batch(opened: Opened) -> None:
    names = [f"low-{number}" for number in range(12)]
    opened.ledger.append([*(new_job(name) for name in names), new_job("high", priority=1)])
    assert dict(opened.publish_all()) == {"high": 1} | {name: place for place, name in enumerate(names, start=2)}


def test_a_job_of_a_higher_priority_moves_the_others_and_their_statuses_follow(opened: Opened) -> None:
    opened.add(**{f"low-{number}": 0 for number in range(12)})
    opened.publish_all()
    opened.add(high=1)
    assert opened.publish_all() == [("high", 1), *((f"low-{number}", number + 2) for number in range(10))]
    running = opened.claim()
    assert opened.publish_all() == [("high", None), *((f"low-{number}", number + 1) for number in range(10))]
    opened.ledger.preempt(running.seq)
    assert dict(opened.publish_all()) == {"high": 1} | {f"low-{number}": number + 2 for number in range(10)}


def test_a_preempted_job_has_the_position_behind_the_higher_ones(opened: Opened) -> None:
    opened.add(a=0, b=0)
    running = opened.claim()
    opened.add(high=9, higher=9)
    opened.publish_all()
    assert opened.ledger.preempt(running.seq).queue_position == 3
    assert dict(opened.publish_all()) == {"a": 3, "b": 4}


# -- on disk ------------------------------------------------------------------------------------------------------


def test_stock_tinydb_opens_a_ledger_with_priorities(opened: Opened) -> None:
    opened.add(a=0, b=7)
    opened.ledger.preempt(opened.claim().seq)
    opened.ledger.close()
    with TinyDB(opened.path, access_mode="r") as stock:
        documents = {document["job_id"]: document for document in stock.table("jobs")}
    assert "priority" not in documents["a"]
    assert "preempted" not in documents["a"]
    assert (documents["b"]["priority"], documents["b"]["preempted"]) == (7, True)
    assert opened.open().preempted() == {2}


def test_a_job_of_the_default_priority_takes_no_byte_more(opened: Opened) -> None:
    journal = opened.path.with_name("ledger.json.journal")
    opened.add(a=0)
    opened.ledger.complete(opened.claim().seq, result())
    lines = [json.loads(line.partition(b" ")[2] or line) for line in _lines(journal)]
    fields: set[str] = set()
    for entry in lines[1:]:
        for _, _, changed, *dropped in entry[2]:
            fields |= set(changed or {})
            assert not dropped
    assert not fields & {"priority", "preempted"}


def _lines(journal: Path) -> list[bytes]:
    return journal.read_bytes().rstrip(b"\0").splitlines()


def test_the_same_request_is_the_same_job_and_another_priority_another_request(opened: Opened) -> None:
    opened.ledger.append([new_job("a", fingerprint="one", priority=5)])
    again: Any = [
        new_job("a", fingerprint="one", priority=5),
        new_job("a", fingerprint="two", priority=9),
    ]
    assert [admission for admission, _ in opened.ledger.append(again)] == [Admission.DUPLICATE, Admission.CONFLICT]
    assert opened.job("a").priority == 5
