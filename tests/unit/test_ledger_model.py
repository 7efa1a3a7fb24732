"""The ledger against a plain model of it, through any order of calls, crashes, stops and refusals of the disk."""

import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cesar_mqtt import journal
from cesar_mqtt import ledger as ledger_module
from cesar_mqtt.errors import ErrorCode, LedgerError
from cesar_mqtt.jobs import Gone, JobState, NewJob, Result, Verdict
from cesar_mqtt.ledger import Ledger
from cesar_mqtt.line import HEAD
from tests.unit.faults import FaultyDisk, Killed, failing, killing

MAX_ATTEMPTS = 2
MAX_QUEUED = 12
RESULT = Result("text", 1.0, "en", 0.5, no_speech=False)


@dataclass
class Entry:
    """What the model knows of a job."""

    seq: int
    fingerprint: str
    packet_id: int | None
    anonymous: bool
    state: JobState = JobState.QUEUED
    attempt: int = 0
    crashes: int = 0
    not_before: float = 0.0


@dataclass
class Model:
    """The ledger as one would explain it on a blackboard."""

    jobs: dict[str, Entry] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    gone: dict[int, str] = field(default_factory=dict)
    ended: dict[JobState, int] = field(default_factory=lambda: dict.fromkeys(JobState, 0))
    rejected: int = 0
    rejected_on_disk: int = 0
    last_seq: int = 0

    @property
    def queue(self) -> list[int]:
        return sorted(entry.seq for entry in self.jobs.values() if entry.state is JobState.QUEUED)

    @property
    def processing(self) -> list[Entry]:
        return [entry for entry in self.jobs.values() if entry.state is JobState.PROCESSING]

    def judge(self, request: NewJob) -> tuple[Verdict, str]:
        """Decide on one request, and take it in if it is accepted."""
        if request.retained and request.anonymous:
            twins = [
                (entry.seq, name)
                for name, entry in self.jobs.items()
                if entry.anonymous and entry.fingerprint == request.fingerprint
            ]
            if twins:
                return Verdict.SAME, max(twins)[1]
        if request.redelivered and request.packet_id is not None:
            bearers = [(entry.seq, name) for name, entry in self.jobs.items() if entry.packet_id == request.packet_id]
            name = max(bearers, default=(0, ""))[1]
            if name and self.jobs[name].fingerprint == request.fingerprint:
                return Verdict.SAME, name
        known = self.jobs.get(request.job_id)
        if known is not None:
            same = known.fingerprint == request.fingerprint
            return Verdict.SAME if same else Verdict.CONFLICT, request.job_id
        if request.failure is None and len(self.queue) >= MAX_QUEUED:
            return Verdict.FULL, request.job_id
        self.last_seq += 1
        entry = Entry(self.last_seq, request.fingerprint, request.packet_id, request.anonymous)
        self.jobs[request.job_id] = entry
        self.gone = {seq: name for seq, name in self.gone.items() if name != request.job_id}
        if request.failure is not None:
            self.end(entry, JobState.ERROR)
        return Verdict.ACCEPTED, request.job_id

    def end(self, entry: Entry, state: JobState) -> None:
        entry.state = state
        self.ended[state] += 1
        self.finished.append(next(name for name, one in self.jobs.items() if one is entry))

    def retire(self, keep: int) -> int:
        retired = self.finished[: max(0, len(self.finished) - keep)]
        for name in retired:
            self.finished.remove(name)
            self.gone[self.jobs.pop(name).seq] = name
        return len(retired)

    def crash(self) -> None:
        self.rejected = self.rejected_on_disk
        for entry in self.jobs.values():
            entry.not_before = 0.0
        for entry in self.processing:
            entry.crashes += 1
            if entry.crashes < MAX_ATTEMPTS:
                entry.state = JobState.QUEUED
            else:
                self.end(entry, JobState.ERROR)

    def picture(self) -> object:
        jobs = {name: (e.seq, e.state, e.attempt, e.crashes) for name, e in self.jobs.items()}
        final = (JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED)
        return jobs, self.queue, [self.ended[state] for state in final], self.rejected


def picture_of(ledger: Ledger) -> object:
    """The same of the real ledger."""
    jobs = {}
    for name in ledger._register:
        job = ledger.get(name)
        assert job is not None
        jobs[name] = (job.seq, job.state, job.attempt, job.crashes)
    totals = ledger.totals()
    ended = [totals.completed_total, totals.error_total, totals.cancelled_total]
    return jobs, list(ledger._queue), ended, totals.rejected_total


Step = tuple[Callable[[Ledger], object], Callable[[Model], object]]
"""The same thing done to the ledger and to the model."""

requests = st.builds(
    NewJob,
    job_id=st.sampled_from([f"job-{number}" for number in range(16)]),
    fingerprint=st.sampled_from(["one", "two"]),
    audio=st.none(),
    model_size=st.just("base"),
    packet_id=st.none() | st.integers(1, 3),
    redelivered=st.booleans(),
    anonymous=st.booleans(),
    retained=st.sampled_from([False, False, True]),
    failure=st.none() | st.none() | st.none() | st.just("wrong"),
)
faults = st.sampled_from([None, None, None, None, 1, 2, 3, 4])
chances = st.integers(0, 1 << 32).map(random.Random)


class LedgerMachine(RuleBasedStateMachine):
    """Does things to the ledger and to the model, and compares the two after each.

    A call that the disk refused has not happened. But if the process dies before the next one has gone through, it may
    turn out to have happened: `maybe` is the model of that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.json"
        self.disk = FaultyDisk()
        self.model = Model()
        self.maybe: Model | None = None
        self.broker: dict[str, tuple[JobState, int]] = {}
        self.positions: dict[str, int | None] = {}
        self.now = 1_700_000_000.0
        self.uptime = 0.0
        self.ledger = self.open()

    def open(self) -> Ledger:
        self.disk = FaultyDisk()
        return Ledger(
            self.path,
            max_attempts=MAX_ATTEMPTS,
            max_queued=MAX_QUEUED,
            clock=self.tick,
            monotonic=lambda: self.uptime,
            disk=self.disk,
        )

    def tick(self) -> float:
        self.now += random.Random(self.now).choice((-100, 0, 1, 50))  # noqa: S311
        return self.now

    def teardown(self) -> None:
        try:
            while self.ledger.has_unpublished:
                self.deliver(self.ledger.unpublished(3), None)
                self.forget(self.ledger.gone(2), None)
            self.the_broker_agrees()
        finally:
            self.drop()
            self.folder.cleanup()

    # -- doing ----------------------------------------------------------------------------------------------------

    def do(self, step: Step, refusals: int | None = None) -> None:
        """Do it to both, unless the disk refuses it."""
        real, modelled = step
        after = copy.deepcopy(self.model)
        expected = modelled(after)
        before = self.ledger._db.journal.transaction
        if refusals is not None:
            self.disk.fault = failing(times=refusals)
        try:
            got = real(self.ledger)
        except LedgerError:
            assert refusals is not None
            after.rejected_on_disk = after.rejected
            self.maybe = after
        else:
            assert got == expected
            if self.ledger._db.journal.transaction != before:
                after.rejected_on_disk = after.rejected
                self.maybe = None
            self.model = after
        finally:
            self.disk.heal()

    def append_step(self, batch: Sequence[NewJob]) -> Step:
        def real(ledger: Ledger) -> object:
            return [(verdict, job and job.job_id) for verdict, job in ledger.append(batch)]

        def modelled(model: Model) -> object:
            verdicts = [model.judge(request) for request in batch]
            return [(verdict, None if verdict is Verdict.FULL else name) for verdict, name in verdicts]

        return real, modelled

    def end_step(self, seq: int, state: JobState, delay_s: float = 0.0) -> Step:
        def real(ledger: Ledger) -> None:
            if state is JobState.COMPLETED:
                ledger.complete(seq, RESULT)
            elif state is JobState.ERROR:
                ledger.fail(seq, ErrorCode.TIMEOUT, "Too slow.")
            elif delay_s:
                ledger.defer(seq, delay_s)
            else:
                ledger.requeue(seq)

        def modelled(model: Model) -> None:
            entry = next(entry for entry in model.jobs.values() if entry.seq == seq)
            if state is JobState.QUEUED:
                entry.state = state
                entry.not_before = self.uptime + delay_s
            else:
                model.end(entry, state)

        return real, modelled

    def claim_step(self) -> Step:
        def real(ledger: Ledger) -> object:
            job = ledger.claim()
            return job and (job.seq, job.attempt)

        def modelled(model: Model) -> object:
            ready = [e for e in model.jobs.values() if e.state is JobState.QUEUED and e.not_before <= self.uptime]
            if not ready:
                return None
            entry = min(ready, key=lambda e: e.seq)
            entry.state = JobState.PROCESSING
            entry.attempt += 1
            return entry.seq, entry.attempt

        return real, modelled

    @staticmethod
    def retire_step(keep: int) -> Step:
        return (lambda ledger: ledger.retire(before=0.0, keep=keep)[0]), (lambda model: model.retire(keep))

    def any_step(self, data: st.DataObject) -> Step:
        steps = [self.claim_step(), self.append_step(data.draw(st.lists(requests, min_size=1, max_size=4)))]
        ends = (JobState.COMPLETED, JobState.ERROR, JobState.QUEUED)
        steps += [self.end_step(entry.seq, state) for entry in self.model.processing for state in ends]
        steps.append(self.retire_step(data.draw(st.integers(0, 5))))
        return data.draw(st.sampled_from(steps))

    # -- rules ----------------------------------------------------------------------------------------------------

    @rule(batch=st.lists(requests, max_size=6), refusals=faults)
    def append(self, batch: list[NewJob], refusals: int | None) -> None:
        self.do(self.append_step(batch), refusals)

    @rule(refusals=faults)
    def claim(self, refusals: int | None) -> None:
        self.do(self.claim_step(), refusals)

    @precondition(lambda self: self.model.processing)
    @rule(
        chance=chances,
        state=st.sampled_from([JobState.COMPLETED, JobState.ERROR, JobState.QUEUED]),
        delay_s=st.sampled_from([0.0, 5.0]),
        refusals=faults,
    )
    def end(self, chance: random.Random, state: JobState, delay_s: float, refusals: int | None) -> None:
        self.do(self.end_step(chance.choice(self.model.processing).seq, state, delay_s), refusals)

    @rule(keep=st.sampled_from([0, 0, 1, 3]), refusals=faults)
    def retire(self, keep: int, refusals: int | None) -> None:
        self.do(self.retire_step(keep), refusals)

    @rule()
    def time_passes(self) -> None:
        self.uptime += 3.0

    @rule()
    def count_rejected(self) -> None:
        self.ledger.count_rejected()
        self.model.rejected += 1
        if self.maybe is not None:
            self.maybe.rejected = self.maybe.rejected_on_disk

    @rule(refusals=faults, skip=st.integers(0, 8))
    def maintain(self, refusals: int | None, skip: int) -> None:
        if refusals is not None:
            self.disk.fault = failing(times=refusals, skip=skip)
        with contextlib.suppress(LedgerError):
            self.ledger.maintain()
        self.disk.heal()

    @rule(limit=st.integers(1, 8), chance=chances)
    def publish(self, limit: int, chance: random.Random) -> None:
        """Some messages get there, some acknowledgements come back."""
        self.deliver(self.ledger.unpublished(limit), chance)

    @rule()
    def reconnect(self) -> None:
        self.ledger.coalesce()

    @rule()
    def lose_the_broker(self) -> None:
        self.broker.clear()
        self.positions.clear()
        self.ledger.publish_again()
        self.model.rejected_on_disk = self.model.rejected
        self.maybe = None

    def deliver(self, messages: Sequence[tuple[int, Any]], chance: random.Random | None) -> None:
        for number, job in messages:
            luck = 1.0 if chance is None else chance.random()
            if luck > 0.2:
                self.broker[job.job_id] = (job.state, job.attempt)
                self.positions[job.job_id] = job.queue_position
            if luck > 0.4:
                self.ledger.mark_published([(job.seq, number)])

    @rule(limit=st.integers(1, 4), chance=chances)
    def clear(self, limit: int, chance: random.Random) -> None:
        """The broker is told to forget jobs; some messages get there, some acknowledgements come back."""
        self.forget(self.ledger.gone(limit), chance)

    def forget(self, gone: Sequence[Gone], chance: random.Random | None) -> None:
        for job in gone:
            luck = 1.0 if chance is None else chance.random()
            if luck > 0.2:
                self.broker.pop(job.job_id, None)
            if luck > 0.4:
                self.ledger.mark_cleared(job.seq)
                self.model.gone.pop(job.seq, None)

    # -- ends and starts ------------------------------------------------------------------------------------------

    def drop(self) -> None:
        self.ledger._db.journal.abandon()
        self.ledger._file_lock.release()

    def reopen(self, *possible: Model) -> None:
        """Open the ledger after a crash; it is one of what it may be."""
        self.ledger = self.open()
        for model in possible:
            model.crash()
        self.model = next((m for m in possible if m.picture() == picture_of(self.ledger)), possible[0])
        self.model.rejected_on_disk = self.model.rejected
        self.maybe = None

    @rule()
    def stop_and_start(self) -> None:
        self.ledger.close()
        if self.model.rejected != self.model.rejected_on_disk:
            self.maybe = None
        self.model.rejected_on_disk = self.model.rejected
        self.reopen(self.model)

    @rule(refusals=faults, skip=st.integers(0, 6))
    def stop_that_may_be_refused(self, refusals: int | None, skip: int) -> None:
        before = copy.deepcopy(self.model)
        self.model.rejected_on_disk = self.model.rejected
        self.disk.fault = failing(times=refusals or 0, skip=skip)
        possible = [self.model]
        try:
            self.ledger.close()
        except LedgerError:
            possible += [before, *([] if self.maybe is None else [self.maybe])]
        self.reopen(*possible)

    @rule()
    def crash(self) -> None:
        self.drop()
        self.reopen(self.model, *([] if self.maybe is None else [self.maybe]))

    @rule(data=st.data(), skip=st.integers(0, 6))
    def die_in_the_middle(self, data: st.DataObject, skip: int) -> None:
        """The process dies at some call to the disk; nobody was told that anything had happened."""
        real, modelled = self.any_step(data)
        after = copy.deepcopy(self.model)
        modelled(after)
        after.rejected_on_disk = after.rejected
        self.disk.fault = killing(skip=skip)
        possible = [self.model, after, *([] if self.maybe is None else [self.maybe])]
        before = self.ledger._db.journal.transaction
        try:
            real(self.ledger)
        except Killed:
            pass
        else:
            possible = possible if self.ledger._db.journal.transaction == before else [after]
        self.drop()
        self.reopen(*possible)

    @rule(data=st.data(), chance=chances)
    def die_with_half_a_line(self, data: st.DataObject, chance: random.Random) -> None:
        """The last line is cut somewhere: what was being written is not there, or all of it."""
        self.do((lambda ledger: ledger.append([]), lambda _model: []))
        journal_path = self.path.with_name("ledger.json.journal")
        start, transaction = self.ledger._db.journal.journal_bytes, self.ledger._db.journal.transaction
        before = copy.deepcopy(self.model)
        before_maybe = self.maybe
        self.do(self.any_step(data))
        end = self.ledger._db.journal.journal_bytes
        self.drop()
        if (
            end < start or self.ledger._db.journal.transaction == transaction
        ):  # the journal was started anew, or nothing
            self.reopen(self.model, *([] if self.maybe is None else [self.maybe]))
            return
        with journal_path.open("r+b") as file:
            file.truncate(chance.randint(start, end))
        self.reopen(before, self.model, *([] if before_maybe is None else [before_maybe]))

    # -- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def the_ledger_is_what_the_model_says(self) -> None:
        assert picture_of(self.ledger) == self.model.picture()
        assert list(self.ledger.processing()) == [entry.seq for entry in self.model.processing]

    @invariant()
    def what_the_broker_lacks_is_in_the_outbox(self) -> None:
        for name, entry in self.model.jobs.items():
            if self.broker.get(name) != (entry.state, entry.attempt):
                assert entry.seq in self.ledger._outbox._newest, name

    @invariant()
    def what_the_broker_has_too_much_is_known(self) -> None:
        gone = {gone.job_id for gone in self.ledger.gone(1000)}
        assert self.broker.keys() - self.model.jobs.keys() <= gone
        assert set(self.model.gone.values()) <= gone
        assert not gone & self.model.jobs.keys()

    def the_broker_agrees(self) -> None:
        expected = {name: (entry.state, entry.attempt) for name, entry in self.model.jobs.items()}
        assert self.broker == expected
        names = {entry.seq: name for name, entry in self.model.jobs.items()}
        for rank, seq in enumerate(self.model.queue[:HEAD], start=1):
            assert self.positions[names[seq]] == rank


def test_the_ledger_does_what_its_model_does_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_STEP_BYTES", 2048)
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    stateful.run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes: add it to study a failure
        ),
    )
