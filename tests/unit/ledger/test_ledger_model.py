"""The ledger against a plain model of it, through any order of calls, crashes, stops and refusals of the disk."""

import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cesar_mqtt.errors import ErrorCode, LedgerError
from cesar_mqtt.jobs import Admission, AudioSource, DeletedJob, IllegalTransitionError, Job, JobState, NewJob, Result
from cesar_mqtt.ledger import journal
from cesar_mqtt.ledger import ledger as ledger_module
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.queue import POSITIONS_TRACKED
from cesar_mqtt.transcript import Window
from tests.unit.ledger.faults import FaultyDisk, Killed, failing, killing

MAX_ATTEMPTS = 2
MAX_QUEUED = 12
RESULT = Result("text", 1.0, "en", 0.5, no_speech=False)
FAILURES = {code: code.retryable for code in (ErrorCode.TIMEOUT, ErrorCode.AUDIO_EMPTY)}


def window(seq: int, number: int) -> Window:
    return Window(number, number + 1.0, f"window {number} of {seq}", "en" if number % 2 else None, None, ())


@dataclass
class Entry:
    """What the model knows of a job."""

    seq: int
    fingerprint: str
    packet_id: int | None
    has_generated_id: bool
    audio: str
    formats: tuple[str, ...]
    state: JobState = JobState.QUEUED
    attempt: int = 0
    crashes: int = 0
    not_before: float = 0.0
    cancelling: bool = False
    hopeless: bool = False
    """Whether it failed in a way that no retry can mend."""
    windows: int = 0


@dataclass
class Model:
    """The ledger as one would explain it on a blackboard."""

    jobs: dict[str, Entry] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    gone: dict[int, DeletedJob] = field(default_factory=dict)
    """What the broker has yet to forget."""
    buried: dict[int, DeletedJob] = field(default_factory=dict)
    """That, and what it has forgotten."""
    paused: bool = False
    ended: dict[JobState, int] = field(default_factory=lambda: dict.fromkeys(JobState, 0))
    rejected: int = 0
    rejected_on_disk: int = 0
    marks: dict[int | None, int] = field(default_factory=dict)
    """Who bore a packet id last, of those whose requests may come again."""
    settled: int = 0
    settled_on_disk: int = 0
    """The jobs up to this number bear none."""
    last_seq: int = 0

    @property
    def queue(self) -> list[int]:
        return sorted(entry.seq for entry in self.jobs.values() if entry.state is JobState.QUEUED)

    @property
    def processing(self) -> list[Entry]:
        return [entry for entry in self.jobs.values() if entry.state is JobState.PROCESSING]

    def admit(self, request: NewJob) -> tuple[Admission, str]:
        """Decide on one request, and take it in if it is accepted."""
        if request.retained and request.has_generated_id and (twin := self.twin(request.fingerprint)):
            return Admission.DUPLICATE, twin
        if request.redelivered and request.packet_id in self.marks:
            name = self.name_of(self.marks[request.packet_id])
            if self.jobs[name].fingerprint == request.fingerprint:
                return Admission.DUPLICATE, name
        known = self.jobs.get(request.job_id)
        if known is not None:
            same = known.fingerprint == request.fingerprint
            return Admission.DUPLICATE if same else Admission.CONFLICT, request.job_id
        if request.failure is None and len(self.queue) >= MAX_QUEUED:
            return Admission.FULL, request.job_id
        self.last_seq += 1
        audio = "none" if request.audio is None else request.audio.kind
        entry = Entry(
            self.last_seq, request.fingerprint, request.packet_id, request.has_generated_id, audio, request.formats
        )
        self.jobs[request.job_id] = entry
        self.bear(entry)
        for gone in [gone for gone in self.buried.values() if gone.job_id == request.job_id and gone.owns_status]:
            for graves in (self.buried, self.gone):
                if graves.pop(gone.seq, None) and gone.formats:
                    graves[gone.seq] = replace(gone, owns_status=False)
        if request.failure is not None:
            self.end(entry, JobState.ERROR)
        return Admission.ACCEPTED, request.job_id

    def twin(self, fingerprint: str) -> str | None:
        """Return the newest job that such a request without an id became: one that there is, or one that was."""
        alive = [(e.seq, name) for name, e in self.jobs.items() if e.has_generated_id and e.fingerprint == fingerprint]
        dead = [(gone.seq, gone.job_id) for gone in self.buried.values() if gone.fingerprint == fingerprint]
        return max(alive or dead, default=(0, None))[1]

    def name_of(self, seq: int) -> str:
        return next(name for name, entry in self.jobs.items() if entry.seq == seq)

    def bear(self, entry: Entry) -> None:
        if entry.packet_id is not None:
            self.settle(self.marks.get(entry.packet_id))
            self.marks[entry.packet_id] = entry.seq

    def settle(self, seq: int | None) -> None:
        """Whatever comes with the packet id of this job is another request."""
        for packet_id in [packet_id for packet_id, bearer in self.marks.items() if bearer == seq]:
            del self.marks[packet_id]
            self.settled = min(self.marks.values()) - 1 if self.marks else max(self.settled, seq or 0)

    def forget(self, but: Sequence[str]) -> None:
        for seq in sorted(self.marks.values()):
            if self.name_of(seq) not in but:
                self.settle(seq)

    def claim(self, uptime: float) -> tuple[int, int] | None:
        ready = [entry for entry in self.jobs.values() if entry.seq in self.queue and entry.not_before <= uptime]
        if self.paused or not ready:
            return None
        entry = min(ready, key=lambda entry: entry.seq)
        entry.state = JobState.PROCESSING
        entry.attempt += 1
        return entry.seq, entry.attempt

    def end(self, entry: Entry, state: JobState) -> None:
        entry.state, entry.cancelling = state, False
        self.ended[state] += 1
        self.finished.append(next(name for name, one in self.jobs.items() if one is entry))

    def complete(self, entry: Entry, windows: int) -> None:
        entry.windows = windows if entry.formats else 0
        self.end(entry, JobState.COMPLETED)

    def fail(self, entry: Entry, code: ErrorCode) -> None:
        entry.hopeless = not FAILURES[code]
        entry.windows = 0 if entry.hopeless else entry.windows
        self.end(entry, JobState.ERROR)

    def put_back(self, entry: Entry, not_before: float) -> None:
        if entry.cancelling:
            self.end(entry, JobState.CANCELLED)
        else:
            entry.state, entry.not_before = JobState.QUEUED, not_before

    def cancel(self, name: str) -> object:
        entry = self.jobs.get(name)
        if entry is None:
            return None
        if entry.state.final:
            return "refused"
        if entry.state is JobState.PROCESSING:
            entry.cancelling = True
        else:
            self.end(entry, JobState.CANCELLED)
        return entry.state

    def retry(self, name: str) -> object:
        entry = self.jobs.get(name)
        if entry is None:
            return None
        can_be = entry.audio == "path" or (entry.audio == "spool" and not entry.hopeless)
        if entry.state not in (JobState.ERROR, JobState.CANCELLED) or not can_be:
            return "refused"
        entry.state, entry.crashes, entry.not_before, entry.hopeless = JobState.QUEUED, 0, 0.0, False
        entry.windows = entry.windows if entry.audio == "spool" else 0
        self.finished.remove(name)
        return entry.state

    def delete(self, name: str) -> object:
        entry = self.jobs.get(name)
        if entry is None:
            return None
        if entry.state is JobState.PROCESSING:
            return "refused"
        self.bury(name)
        return entry.seq, ["file"] if entry.audio == "spool" else []

    def retire(self, keep: int) -> int:
        retired = self.finished[: max(0, len(self.finished) - keep)]
        for name in retired:
            self.bury(name)
        return len(retired)

    def bury(self, name: str) -> None:
        entry = self.jobs.pop(name)
        self.settle(entry.seq)
        if entry.state.final:
            self.finished.remove(name)
        fingerprint = entry.fingerprint if entry.has_generated_id else None
        self.buried[entry.seq] = self.gone[entry.seq] = DeletedJob(
            entry.seq, name, entry.formats, fingerprint=fingerprint
        )

    def crash(self) -> None:
        self.rejected = self.rejected_on_disk
        self.settled = self.settled_on_disk
        self.marks.clear()
        for entry in sorted(self.jobs.values(), key=lambda entry: entry.seq):
            entry.not_before = 0.0
            if entry.seq > self.settled_on_disk:
                self.bear(entry)
        for entry in self.processing:
            if entry.cancelling:
                self.end(entry, JobState.CANCELLED)
                continue
            entry.crashes += 1
            if entry.crashes < MAX_ATTEMPTS:
                entry.state = JobState.QUEUED
            else:
                self.end(entry, JobState.ERROR)

    def picture(self) -> object:
        jobs = {n: (e.seq, e.state, e.attempt, e.crashes, e.cancelling, e.windows) for n, e in self.jobs.items()}
        final = (JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED)
        return jobs, self.queue, [self.ended[state] for state in final], self.rejected, self.paused, self.marks


def picture_of(ledger: Ledger) -> object:
    """The same of the real ledger."""
    jobs = {}
    for name in ledger._index.deduplication:
        job = ledger.get(name)
        assert job is not None
        windows = ledger.windows(job.seq)
        assert windows == tuple(window(job.seq, number) for number in range(len(windows)))
        cancelling = ledger.is_cancelling(job.seq)
        jobs[name] = (job.seq, job.state, job.attempt, job.crashes, cancelling, len(windows))
    totals = ledger.totals()
    ended = [totals.completed_total, totals.error_total, totals.cancelled_total]
    marks = ledger._index.deduplication._seq_by_packet_id
    assert [ledger._rows[str(seq)]["packet_id"] for seq in marks.values()] == list(marks)
    return jobs, list(ledger._index.queue), ended, totals.rejected_total, totals.paused, marks


Step = tuple[Callable[[Ledger], object], Callable[[Model], object]]
"""The same thing done to the ledger and to the model."""


def or_refused(call: Callable[[], object]) -> object:
    try:
        return call()
    except IllegalTransitionError:
        return "refused"


NAMES = [f"job-{number}" for number in range(16)]
requests = st.builds(
    NewJob,
    job_id=st.sampled_from(NAMES),
    fingerprint=st.sampled_from(["one", "two"]),
    audio=st.sampled_from([AudioSource("path", "file"), AudioSource("spool", "file")]),
    model_size=st.just("base"),
    packet_id=st.none() | st.integers(1, 3),
    redelivered=st.booleans(),
    has_generated_id=st.booleans(),
    retained=st.sampled_from([False, False, True]),
    failure=st.none() | st.none() | st.none() | st.just("wrong"),
    formats=st.sampled_from([(), ("txt",), ("srt",), ("txt", "json"), ("srt", "json")]),
).map(lambda request: request if request.failure is None else replace(request, audio=None))
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
        self.results: dict[tuple[str, str], int] = {}
        self.positions: dict[str, int | None] = {}
        self.saved: tuple[dict[str, tuple[JobState, int]], dict[tuple[str, str], int]] | None = None
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
                self.deliver(3, None)
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
        after.settled_on_disk = self.model.settled
        before = self.ledger._storage.transaction
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
            if self.ledger._storage.transaction != before:
                after.rejected_on_disk = after.rejected
                self.maybe = None
            else:
                after.settled_on_disk = self.model.settled_on_disk
            self.model = after
        finally:
            self.disk.heal()

    def append_step(self, batch: Sequence[NewJob]) -> Step:
        def real(ledger: Ledger) -> object:
            return ledger.append(batch)

        def modelled(model: Model) -> object:
            return [model.admit(request) for request in batch]

        return real, modelled

    def of(self, model: Model, seq: int) -> Entry:
        return next(entry for entry in model.jobs.values() if entry.seq == seq)

    def complete_step(self, seq: int, more: int) -> Step:
        total = self.of(self.model, seq).windows + more
        result = replace(RESULT, windows=tuple(window(seq, number) for number in range(total)))
        return (
            lambda ledger: ledger.complete(seq, result),
            lambda model: model.complete(self.of(model, seq), total),
        )

    def fail_step(self, seq: int, code: ErrorCode) -> Step:
        return (lambda ledger: ledger.fail(seq, code, "No.")), (lambda model: model.fail(self.of(model, seq), code))

    def put_back_step(self, seq: int, delay_s: float) -> Step:
        def real(ledger: Ledger) -> None:
            ledger.defer(seq, delay_s) if delay_s else ledger.requeue(seq)

        return real, lambda model: model.put_back(self.of(model, seq), self.uptime + delay_s)

    def cancelled_step(self, seq: int) -> Step:
        return (
            lambda ledger: ledger.finish_cancelling(seq),
            lambda model: model.end(self.of(model, seq), JobState.CANCELLED),
        )

    def window_step(self, seq: int) -> Step:
        number = self.of(self.model, seq).windows

        def modelled(model: Model) -> None:
            self.of(model, seq).windows += 1

        return (lambda ledger: ledger.add_window(seq, window(seq, number), identity="one")), modelled

    def audio_step(self, seq: int, identity: str) -> Step:
        def modelled(model: Model) -> bool:
            entry = self.of(model, seq)
            same = identity == "one" or not entry.windows
            entry.windows = entry.windows if same else 0
            return same

        return (lambda ledger: ledger.keep_windows_of(seq, identity)), modelled

    def claim_step(self) -> Step:
        def real(ledger: Ledger) -> object:
            job = ledger.claim()
            return job and (job.seq, job.attempt)

        return real, lambda model: model.claim(self.uptime)

    @staticmethod
    def cancel_step(name: str) -> Step:
        def real(ledger: Ledger) -> object:
            job = ledger.cancel(name)
            return job and job.state

        return (lambda ledger: or_refused(lambda: real(ledger))), (lambda model: model.cancel(name))

    @staticmethod
    def retry_step(name: str) -> Step:
        def real(ledger: Ledger) -> object:
            job = ledger.retry(name)
            assert job is None or job.queue_position is not None
            return job and job.state

        return (lambda ledger: or_refused(lambda: real(ledger))), (lambda model: model.retry(name))

    @staticmethod
    def delete_step(name: str) -> Step:
        def real(ledger: Ledger) -> object:
            deleted = ledger.delete(name)
            return deleted and (deleted[0].seq, deleted[1])

        return (lambda ledger: or_refused(lambda: real(ledger))), (lambda model: model.delete(name))

    @staticmethod
    def pause_step(*, on: bool) -> Step:
        return (lambda ledger: ledger.pause(on=on)), (lambda model: setattr(model, "paused", on))

    @staticmethod
    def retire_step(keep: int) -> Step:
        return (lambda ledger: ledger.delete_finished(before=0.0, keep=keep)[0]), (lambda model: model.retire(keep))

    def any_step(self, data: st.DataObject) -> Step:
        name = data.draw(st.sampled_from(NAMES))
        steps = [self.claim_step(), self.append_step(data.draw(st.lists(requests, min_size=1, max_size=4)))]
        for seq in [entry.seq for entry in self.model.processing]:
            steps += [self.complete_step(seq, more) for more in (0, 2)]
            steps += [self.fail_step(seq, code) for code in FAILURES]
            steps += [self.put_back_step(seq, 0.0), self.cancelled_step(seq), self.window_step(seq)]
            steps.append(self.audio_step(seq, "another"))
        steps.append(self.retire_step(data.draw(st.integers(0, 5))))
        steps += [self.cancel_step(name), self.retry_step(name), self.delete_step(name)]
        steps.append(self.pause_step(on=not self.model.paused))
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
        kind=st.sampled_from(["complete", "fail", "put back", "cancelled", "window", "audio"]),
        refusals=faults,
    )
    def work(self, chance: random.Random, kind: str, refusals: int | None) -> None:
        seq = chance.choice(self.model.processing).seq
        steps = {
            "complete": lambda: self.complete_step(seq, chance.randint(0, 2)),
            "fail": lambda: self.fail_step(seq, chance.choice(list(FAILURES))),
            "put back": lambda: self.put_back_step(seq, chance.choice((0.0, 5.0))),
            "cancelled": lambda: self.cancelled_step(seq),
            "window": lambda: self.window_step(seq),
            "audio": lambda: self.audio_step(seq, chance.choice(("one", "another"))),
        }
        self.do(steps[kind](), refusals)

    @rule(chance=chances, kind=st.sampled_from(["cancel", "retry", "delete"]), refusals=faults)
    def ask(self, chance: random.Random, kind: str, refusals: int | None) -> None:
        name = chance.choice([*self.model.jobs, NAMES[0]])
        steps = {"cancel": self.cancel_step, "retry": self.retry_step, "delete": self.delete_step}
        self.do(steps[kind](name), refusals)

    @rule(on=st.sampled_from([False, False, True]), refusals=faults)
    def pause(self, on: bool, refusals: int | None) -> None:  # noqa: FBT001
        self.do(self.pause_step(on=on), refusals)

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
            self.ledger.checkpoint_if_due()
        self.disk.heal()

    @rule(limit=st.integers(1, 12), chance=chances)
    def publish(self, limit: int, chance: random.Random) -> None:
        """Some messages get there, some acknowledgements come back."""
        self.deliver(limit, chance)

    @rule()
    def reconnect(self) -> None:
        self.ledger.coalesce()

    @rule()
    def lose_the_broker(self) -> None:
        self.broker.clear()
        self.results.clear()
        self.positions.clear()
        self.ledger.republish_all()
        self.written()

    @rule(chance=chances)
    def settle(self, chance: random.Random) -> None:
        names = [name for name in self.model.jobs if chance.random() < 0.5]
        self.ledger.release_packet_ids([*names, "unknown"])
        for name in names:
            self.model.settle(self.model.jobs[name].seq)

    @rule(but=st.lists(st.sampled_from(NAMES)))
    def forget(self, but: list[str]) -> None:
        before = self.ledger._storage.transaction
        self.ledger.release_all_packet_ids(keep=but)
        self.model.forget(but)
        if self.ledger._storage.transaction != before:
            self.written()

    def written(self) -> None:
        """Something else has brought to disk what waited for that."""
        self.model.rejected_on_disk = self.model.rejected
        self.model.settled_on_disk = self.model.settled
        self.maybe = None

    @rule()
    def save_the_broker(self) -> None:
        self.saved = (self.broker.copy(), self.results.copy())

    @precondition(lambda self: self.saved is not None)
    @rule()
    def the_broker_goes_back(self) -> None:
        """It was killed, and comes back with what it had saved."""
        assert self.saved is not None
        self.broker, self.results = self.saved[0].copy(), self.saved[1].copy()
        self.positions.clear()
        self.ledger.republish_all(restored=True)
        self.written()

    def deliver(self, limit: int, chance: random.Random | None) -> None:
        """Do as the publisher does: what is gone goes first, in order; a lost connection loses the rest."""
        gone = self.ledger.pending_clears(limit)
        messages: list[DeletedJob | tuple[int, Job]] = [*gone, *self.ledger.unpublished(limit - len(gone))]
        arrived = len(messages) if chance is None else chance.randint(0, len(messages))
        acknowledged = arrived if chance is None else chance.randint(0, arrived)
        for message in messages[:arrived]:
            self.arrive(message)
        for message in messages[:acknowledged]:
            if isinstance(message, DeletedJob):
                self.ledger.mark_cleared(message.seq)
                self.model.gone.pop(message.seq, None)
            else:
                number, job = message
                self.ledger.mark_published([(job.seq, number)])

    def arrive(self, message: DeletedJob | tuple[int, Job]) -> None:
        if isinstance(message, DeletedJob):
            if message.owns_status:
                self.broker.pop(message.job_id, None)
            for name in message.formats:
                self.results.pop((message.job_id, name), None)
            return
        _, job = message
        self.broker[job.job_id] = (job.state, job.attempt)
        self.positions[job.job_id] = job.queue_position
        if job.state is JobState.COMPLETED:
            self.results |= {(job.job_id, name): job.seq for name in job.formats}

    # -- ends and starts ------------------------------------------------------------------------------------------

    def drop(self) -> None:
        self.ledger._storage.abandon()
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
        if (self.model.rejected, self.model.settled) != (self.model.rejected_on_disk, self.model.settled_on_disk):
            self.maybe = None
        self.model.rejected_on_disk, self.model.settled_on_disk = self.model.rejected, self.model.settled
        self.reopen(self.model)

    @rule(refusals=faults, skip=st.integers(0, 6))
    def stop_that_may_be_refused(self, refusals: int | None, skip: int) -> None:
        before = copy.deepcopy(self.model)
        self.model.rejected_on_disk, self.model.settled_on_disk = self.model.rejected, self.model.settled
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
        after.rejected_on_disk, after.settled_on_disk = after.rejected, self.model.settled
        self.disk.fault = killing(skip=skip)
        possible = [self.model, after, *([] if self.maybe is None else [self.maybe])]
        before = self.ledger._storage.transaction
        try:
            real(self.ledger)
        except Killed:
            pass
        else:
            possible = possible if self.ledger._storage.transaction == before else [after]
        self.drop()
        self.reopen(*possible)

    @rule(data=st.data(), chance=chances)
    def die_with_half_a_line(self, data: st.DataObject, chance: random.Random) -> None:
        """The last line is cut somewhere: what was being written is not there, or all of it."""
        self.do((lambda ledger: ledger.append([]), lambda _model: []))
        journal_path = self.path.with_name("ledger.json.journal")
        start, transaction = self.ledger._storage.journal_bytes, self.ledger._storage.transaction
        before = copy.deepcopy(self.model)
        before_maybe = self.maybe
        self.do(self.any_step(data))
        end = self.ledger._storage.journal_bytes
        self.drop()
        if end < start or self.ledger._storage.transaction == transaction:  # the journal was started anew, or nothing
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
                assert entry.seq in self.ledger._outbox._pending, name

    @invariant()
    def what_the_broker_has_too_much_is_known(self) -> None:
        gone = {gone.seq: gone for gone in self.ledger.pending_clears(1000)}
        statuses = [gone.job_id for gone in gone.values() if gone.owns_status]
        assert self.broker.keys() - self.model.jobs.keys() <= set(statuses)
        assert not set(statuses) & self.model.jobs.keys()
        assert len(statuses) == len(set(statuses))
        assert self.model.gone.items() <= gone.items()
        results = {(gone.job_id, name) for gone in gone.values() for name in gone.formats}
        assert self.results.keys() - self.right_results().keys() <= results

    @invariant()
    def nothing_is_left_of_windows_that_nobody_needs(self) -> None:
        stored = len(self.ledger._storage.rows("windows"))
        assert stored == sum(entry.windows for entry in self.model.jobs.values())

    @invariant()
    def what_can_be_seen_is_what_there_is(self) -> None:
        by_number = sorted(self.model.jobs.values(), key=lambda entry: entry.seq)
        assert [job.seq for job in self.ledger.jobs()] == [entry.seq for entry in by_number]
        for state in JobState:
            there = [entry.seq for entry in by_number if entry.state is state]
            assert [job.seq for job in self.ledger.jobs(states=[state])] == there
        ready = [entry.seq for entry in by_number if entry.seq in self.model.queue and entry.not_before <= self.uptime]
        assert [job.seq for job in self.ledger.upcoming(3)] == ready[:3]

    def right_results(self) -> dict[tuple[str, str], int]:
        return {
            (name, form): entry.seq
            for name, entry in self.model.jobs.items()
            if entry.state is JobState.COMPLETED
            for form in entry.formats
        }

    def the_broker_agrees(self) -> None:
        expected = {name: (entry.state, entry.attempt) for name, entry in self.model.jobs.items()}
        assert self.broker == expected
        assert self.results == self.right_results()
        names = {entry.seq: name for name, entry in self.model.jobs.items()}
        for rank, seq in enumerate(self.model.queue[:POSITIONS_TRACKED], start=1):
            assert self.positions[names[seq]] == rank
        assert all(self.positions[names[seq]] is not None for seq in self.model.queue)


def test_the_ledger_behaves_like_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
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
