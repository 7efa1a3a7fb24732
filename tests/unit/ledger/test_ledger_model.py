"""The ledger compared with a simple model, through any order of calls, crashes, stops and disk failures."""

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
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cesar_mqtt.errors import ErrorCode, LedgerError
from cesar_mqtt.jobs import (
    Admission,
    AudioSource,
    DeletedJob,
    IllegalTransitionError,
    Job,
    JobState,
    NewJob,
    Result,
    request_key,
)
from cesar_mqtt.ledger import journal
from cesar_mqtt.ledger import ledger as ledger_module
from cesar_mqtt.ledger.documents import retry_rejection
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
    """A job in the model."""

    seq: int
    fingerprint: str
    packet_id: int | None
    has_generated_id: bool
    audio: str
    formats: tuple[str, ...]
    priority: int = 0
    preempted: bool = False
    """Whether it waits as the first of its priority, since it was preempted."""
    state: JobState = JobState.QUEUED
    attempt: int = 0
    crashes: int = 0
    not_before: float = 0.0
    cancelling: bool = False
    not_retryable: bool = False
    """Whether it failed with an error that a retry cannot fix."""
    windows: int = 0
    rejected: bool = False

    @property
    def order(self) -> tuple[int, bool, int]:
        """Where it stands in the queue."""
        return -self.priority, not self.preempted, self.seq


@dataclass
class Model:
    """The ledger in its simplest form."""

    jobs: dict[str, Entry] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    pending_clears: dict[int, DeletedJob] = field(default_factory=dict)
    """Deleted jobs whose retained messages have to be cleared."""
    tombstones: dict[int, DeletedJob] = field(default_factory=dict)
    """Those, and the cleared ones."""
    paused: bool = False
    ended: dict[JobState, int] = field(default_factory=lambda: dict.fromkeys(JobState, 0))
    rejected: int = 0
    rejected_on_disk: int = 0
    packet_ids: dict[int | None, int] = field(default_factory=dict)
    """The newest job of each packet id that is not released."""
    released_until: int = 0
    released_on_disk: int = 0
    """The packet ids of all jobs up to this number are released."""
    last_seq: int = 0

    @property
    def queue(self) -> list[int]:
        queued = [entry for entry in self.jobs.values() if entry.state is JobState.QUEUED]
        return [entry.seq for entry in sorted(queued, key=lambda entry: entry.order)]

    @property
    def processing(self) -> list[Entry]:
        return [entry for entry in self.jobs.values() if entry.state is JobState.PROCESSING]

    def admit(self, request: NewJob) -> tuple[Admission, str]:
        """Decide on one request, and add it if it is accepted."""
        if request.retained and (newest_with := self.newest_with(request)):
            return Admission.DUPLICATE, newest_with
        if request.redelivered and request.packet_id in self.packet_ids:
            name = self.name_of(self.packet_ids[request.packet_id])
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
            self.last_seq,
            request.fingerprint,
            request.packet_id,
            request.has_generated_id,
            audio,
            request.formats,
            request.priority,
        )
        self.jobs[request.job_id] = entry
        self.take_packet_id(entry)
        if request.failure is not None:
            entry.rejected = True
            self.end(entry, JobState.ERROR)
        return Admission.ACCEPTED, request.job_id

    def release_statuses(self) -> None:
        """Leave the status of each deleted job whose id is used again to the new job.

        After the whole batch, as in the ledger: until then the tombstone still identifies a retained request.
        """
        for old in [old for old in self.tombstones.values() if old.job_id in self.jobs and old.owns_status]:
            self.tombstones[old.seq] = replace(old, owns_status=False)
            if self.pending_clears.pop(old.seq, None) and old.formats:
                self.pending_clears[old.seq] = self.tombstones[old.seq]

    def newest_with(self, request: NewJob) -> str | None:
        """Return the newest job without an id and with this fingerprint, else the newest deleted job of the request."""
        existing = [
            (entry.seq, name)
            for name, entry in self.jobs.items()
            if request.has_generated_id and entry.has_generated_id and entry.fingerprint == request.fingerprint
        ]
        deleted = [(job.seq, job.job_id) for job in self.tombstones.values() if job.request_key == request.request_key]
        return max(existing or deleted, default=(0, None))[1]

    def name_of(self, seq: int) -> str:
        return next(name for name, entry in self.jobs.items() if entry.seq == seq)

    def take_packet_id(self, entry: Entry) -> None:
        if entry.packet_id is not None:
            self.release(self.packet_ids.get(entry.packet_id))
            self.packet_ids[entry.packet_id] = entry.seq

    def release(self, seq: int | None) -> None:
        """A later message with the packet id of this job is a new request."""
        for packet_id in [packet_id for packet_id, owner in self.packet_ids.items() if owner == seq]:
            del self.packet_ids[packet_id]
            self.released_until = (
                min(self.packet_ids.values()) - 1 if self.packet_ids else max(self.released_until, seq or 0)
            )

    def release_all(self, keep: Sequence[str]) -> None:
        for seq in sorted(self.packet_ids.values()):
            if self.name_of(seq) not in keep:
                self.release(seq)

    def ready(self, uptime: float) -> list[Entry]:
        """Return the jobs that may be started, in order."""
        by_seq = {entry.seq: entry for entry in self.jobs.values()}
        return [by_seq[seq] for seq in self.queue if by_seq[seq].not_before <= uptime]

    def claim(self, uptime: float) -> tuple[int, int] | None:
        ready = self.ready(uptime)
        if self.paused or not ready:
            return None
        entry = ready[0]
        entry.state, entry.preempted = JobState.PROCESSING, False
        entry.attempt += 1
        return entry.seq, entry.attempt

    def end(self, entry: Entry, state: JobState) -> None:
        entry.state, entry.cancelling, entry.preempted = state, False, False
        self.ended[state] += 1
        self.finished.append(next(name for name, one in self.jobs.items() if one is entry))

    def complete(self, entry: Entry, windows: int) -> None:
        entry.windows = windows if entry.formats else 0
        self.end(entry, JobState.COMPLETED)

    def fail(self, entry: Entry, code: ErrorCode) -> None:
        entry.not_retryable = not FAILURES[code]
        entry.windows = 0 if entry.not_retryable else entry.windows
        self.end(entry, JobState.ERROR)

    def requeue(self, entry: Entry, not_before: float) -> None:
        if entry.cancelling:
            self.end(entry, JobState.CANCELLED)
        else:
            entry.state, entry.not_before = JobState.QUEUED, not_before

    def preempt(self, entry: Entry) -> JobState:
        self.requeue(entry, 0.0)
        entry.preempted = entry.state is JobState.QUEUED
        return entry.state

    def cancel(self, name: str) -> object:
        entry = self.jobs.get(name)
        if entry is None:
            return None
        if entry.state.final:
            return "illegal"
        if entry.state is JobState.PROCESSING:
            entry.cancelling = True
        else:
            self.end(entry, JobState.CANCELLED)
        return entry.state

    def retry(self, name: str) -> object:
        entry = self.jobs.get(name)
        if entry is None:
            return None
        can_be = entry.audio == "path" or (entry.audio == "spool" and not entry.not_retryable)
        if entry.state not in (JobState.ERROR, JobState.CANCELLED) or not can_be:
            return "illegal"
        entry.state, entry.crashes, entry.not_before, entry.not_retryable = JobState.QUEUED, 0, 0.0, False
        entry.windows = entry.windows if entry.audio == "spool" else 0
        self.finished.remove(name)
        return entry.state

    def delete(self, name: str) -> object:
        entry = self.jobs.get(name)
        if entry is None:
            return None
        if entry.state is JobState.PROCESSING:
            return "illegal"
        self.add_tombstone(name)
        return entry.seq, ["file"] if entry.audio == "spool" else []

    def delete_finished(self, keep: int, keep_rejected: int) -> int:
        ran, rejected = (
            [name for name in self.finished if self.jobs[name].rejected is wanted] for wanted in (False, True)
        )
        deleted = ran[: max(0, len(ran) - keep)] + rejected[: max(0, len(rejected) - keep_rejected)]
        for name in deleted:
            self.add_tombstone(name)
        return len(deleted)

    def add_tombstone(self, name: str) -> None:
        entry = self.jobs.pop(name)
        self.release(entry.seq)
        if entry.state.final:
            self.finished.remove(name)
        key = request_key(None if entry.has_generated_id else name, entry.fingerprint)
        self.tombstones[entry.seq] = self.pending_clears[entry.seq] = DeletedJob(
            entry.seq, name, entry.formats, request_key=key
        )

    def crash(self) -> None:
        self.rejected = self.rejected_on_disk
        self.released_until = self.released_on_disk
        self.packet_ids.clear()
        for entry in sorted(self.jobs.values(), key=lambda entry: entry.seq):
            entry.not_before = 0.0
            if entry.seq > self.released_on_disk:
                self.take_packet_id(entry)
        for entry in self.processing:
            if entry.cancelling:
                self.end(entry, JobState.CANCELLED)
                continue
            entry.crashes += 1
            if entry.crashes < MAX_ATTEMPTS:
                entry.state = JobState.QUEUED
            else:
                self.end(entry, JobState.ERROR)

    def state_tuple(self) -> object:
        jobs = {
            n: (e.seq, e.priority, e.state, e.attempt, e.crashes, e.cancelling, e.windows) for n, e in self.jobs.items()
        }
        final = (JobState.COMPLETED, JobState.ERROR, JobState.CANCELLED)
        return jobs, self.queue, [self.ended[state] for state in final], self.rejected, self.paused, self.packet_ids


def state_of(ledger: Ledger) -> object:
    """The same of the real ledger."""
    jobs = {}
    for name in ledger._index.deduplication:
        job = ledger.get(name)
        assert job is not None
        windows = ledger.windows(job.seq)
        assert windows == tuple(window(job.seq, number) for number in range(len(windows)))
        cancelling = ledger.is_cancelling(job.seq)
        jobs[name] = (job.seq, job.priority, job.state, job.attempt, job.crashes, cancelling, len(windows))
    totals = ledger.totals()
    ended = [totals.completed_total, totals.error_total, totals.cancelled_total]
    packet_ids = ledger._index.deduplication._seq_by_packet_id
    assert [ledger._rows[str(seq)]["packet_id"] for seq in packet_ids.values()] == list(packet_ids)
    return jobs, list(ledger._index.queue), ended, totals.rejected_total, totals.paused, packet_ids


Step = tuple[Callable[[Ledger], object], Callable[[Model], object]]
"""The same call on the ledger and on the model."""


def or_illegal(call: Callable[[], object]) -> object:
    try:
        return call()
    except IllegalTransitionError:
        return "illegal"


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
    priority=st.sampled_from([0, 0, 0, 1, 9]),
).map(lambda request: request if request.failure is None else replace(request, audio=None))
faults = st.sampled_from([*[None] * 12, 1, 2, 3, 4])
chances = st.integers(0, 1 << 32).map(random.Random)


class LedgerMachine(RuleBasedStateMachine):
    """Makes each call on the ledger and on the model, and compares the two afterwards.

    A call that failed on the disk changes nothing. But if the process dies before the next successful call, its change
    may turn out to be on disk: `maybe` is the model of that.
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
            self.ledger.republish_moved()
            while self.ledger.has_unpublished:
                self.publish_some(3, None)
            self.check_that_the_broker_agrees()
        finally:
            self.kill()
            self.folder.cleanup()

    # -- calls on both -----------------------------------------------------------------------------------------------

    def do(self, step: Step, failures: int | None = None) -> None:
        """Make the call on both; if the disk fails, on the ledger only."""
        real, modelled = step
        after = copy.deepcopy(self.model)
        expected = modelled(after)
        after.released_on_disk = self.model.released_until
        before = self.ledger._storage.transaction
        if failures is not None:
            self.disk.fault = failing(times=failures)
        try:
            got = real(self.ledger)
        except LedgerError:
            assert failures is not None
            after.rejected_on_disk = after.rejected
            self.maybe = after
        else:
            assert got == expected
            if self.ledger._storage.transaction != before:
                after.rejected_on_disk = after.rejected
                self.maybe = None
            else:
                after.released_on_disk = self.model.released_on_disk
            self.model = after
        finally:
            self.disk.heal()

    def append_step(self, batch: Sequence[NewJob]) -> Step:
        def real(ledger: Ledger) -> object:
            return ledger.append(batch)

        def modelled(model: Model) -> object:
            admissions = [model.admit(request) for request in batch]
            model.release_statuses()
            return admissions

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

    def requeue_step(self, seq: int, delay_s: float) -> Step:
        def real(ledger: Ledger) -> None:
            ledger.defer(seq, delay_s) if delay_s else ledger.requeue(seq)

        return real, lambda model: model.requeue(self.of(model, seq), self.uptime + delay_s)

    def preempt_step(self, seq: int) -> Step:
        return (lambda ledger: ledger.preempt(seq).state), (lambda model: model.preempt(self.of(model, seq)))

    def finish_cancelling_step(self, seq: int) -> Step:
        return (
            lambda ledger: ledger.finish_cancelling(seq),
            lambda model: model.end(self.of(model, seq), JobState.CANCELLED),
        )

    def window_step(self, seq: int) -> Step:
        number = self.of(self.model, seq).windows

        def modelled(model: Model) -> None:
            self.of(model, seq).windows += 1

        return (lambda ledger: ledger.add_window(seq, window(seq, number), identity="one")), modelled

    def identity_step(self, seq: int, identity: str) -> Step:
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

        return (lambda ledger: or_illegal(lambda: real(ledger))), (lambda model: model.cancel(name))

    @staticmethod
    def retry_step(name: str) -> Step:
        def real(ledger: Ledger) -> object:
            job = ledger.retry(name)
            assert job is None or job.queue_position is not None
            return job and job.state

        return (lambda ledger: or_illegal(lambda: real(ledger))), (lambda model: model.retry(name))

    @staticmethod
    def delete_step(name: str) -> Step:
        def real(ledger: Ledger) -> object:
            deleted = ledger.delete(name)
            return deleted and (deleted[0].seq, deleted[1])

        return (lambda ledger: or_illegal(lambda: real(ledger))), (lambda model: model.delete(name))

    @staticmethod
    def pause_step(*, on: bool) -> Step:
        return (lambda ledger: ledger.pause(on=on)), (lambda model: setattr(model, "paused", on))

    @staticmethod
    def delete_finished_step(keep: int, keep_rejected: int) -> Step:
        def real(ledger: Ledger) -> object:
            return ledger.delete_finished(before=0.0, keep=keep, keep_rejected=keep_rejected)[0]

        return real, (lambda model: model.delete_finished(keep, keep_rejected))

    def any_step(self, data: st.DataObject) -> Step:
        name = data.draw(st.sampled_from(NAMES))
        steps = [self.claim_step(), self.append_step(data.draw(st.lists(requests, min_size=1, max_size=4)))]
        for seq in [entry.seq for entry in self.model.processing]:
            steps += [self.complete_step(seq, more) for more in (0, 2)]
            steps += [self.fail_step(seq, code) for code in FAILURES]
            steps += [self.requeue_step(seq, 0.0), self.finish_cancelling_step(seq), self.window_step(seq)]
            steps += [self.identity_step(seq, "another"), self.preempt_step(seq)]
        steps.append(self.delete_finished_step(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))))
        steps += [self.cancel_step(name), self.retry_step(name), self.delete_step(name)]
        steps.append(self.pause_step(on=not self.model.paused))
        return data.draw(st.sampled_from(steps))

    # -- rules ----------------------------------------------------------------------------------------------------

    @initialize(batch=st.lists(requests, min_size=4, max_size=8))
    def fill(self, batch: list[NewJob]) -> None:
        self.do(self.append_step(batch))

    @rule(batch=st.lists(requests, min_size=1, max_size=6), failures=faults)
    def append(self, batch: list[NewJob], failures: int | None) -> None:
        self.do(self.append_step(batch), failures)

    @rule(failures=faults)
    def claim(self, failures: int | None) -> None:
        self.do(self.claim_step(), failures)

    # One rule for each action of the worker: a single rule for all of them is drawn too rarely to reach every state.

    @rule(chance=chances, end=st.sampled_from(["complete", "fail", "requeue", "preempt", "cancel", None]))
    def run_a_job(self, chance: random.Random, end: str | None) -> None:
        """Claim a job, store some windows, and end it or leave it running."""
        self.do(self.claim_step())
        if not self.model.processing:
            return
        seq = chance.choice(self.model.processing).seq
        for _ in range(chance.randint(0, 2)):
            self.do(self.window_step(seq))
        steps = {
            "complete": lambda: self.complete_step(seq, chance.randint(0, 2)),
            "fail": lambda: self.fail_step(seq, chance.choice(list(FAILURES))),
            "requeue": lambda: self.requeue_step(seq, chance.choice((0.0, 5.0))),
            "preempt": lambda: self.preempt_step(seq),
            "cancel": lambda: self.cancel_step(self.model.name_of(seq)),
        }
        if end is not None:
            self.do(steps[end]())

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, failures=faults)
    def complete(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.complete_step(chance.choice(self.model.processing).seq, chance.randint(0, 2)), failures)

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, code=st.sampled_from(list(FAILURES)), failures=faults)
    def fail(self, chance: random.Random, code: ErrorCode, failures: int | None) -> None:
        self.do(self.fail_step(chance.choice(self.model.processing).seq, code), failures)

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, delay_s=st.sampled_from([0.0, 5.0]), failures=faults)
    def requeue(self, chance: random.Random, delay_s: float, failures: int | None) -> None:
        self.do(self.requeue_step(chance.choice(self.model.processing).seq, delay_s), failures)

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, failures=faults)
    def preempt(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.preempt_step(chance.choice(self.model.processing).seq), failures)

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, failures=faults)
    def finish_cancelling(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.finish_cancelling_step(chance.choice(self.model.processing).seq), failures)

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, failures=faults)
    def add_window(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.window_step(chance.choice(self.model.processing).seq), failures)

    @precondition(lambda self: self.model.processing)
    @rule(chance=chances, identity=st.sampled_from(["one", "one", "another"]), failures=faults)
    def keep_windows(self, chance: random.Random, identity: str, failures: int | None) -> None:
        self.do(self.identity_step(chance.choice(self.model.processing).seq, identity), failures)

    @rule(chance=chances, failures=faults)
    def cancel(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.cancel_step(chance.choice([*self.model.jobs, NAMES[0]])), failures)

    @rule(chance=chances, failures=faults)
    def retry(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.retry_step(chance.choice([*self.model.jobs, NAMES[0]])), failures)

    @rule(chance=chances, failures=faults)
    def delete(self, chance: random.Random, failures: int | None) -> None:
        self.do(self.delete_step(chance.choice([*self.model.jobs, NAMES[0]])), failures)

    @rule(on=st.sampled_from([False, False, True]), failures=faults)
    def pause(self, on: bool, failures: int | None) -> None:  # noqa: FBT001
        self.do(self.pause_step(on=on), failures)

    @rule(keep=st.sampled_from([0, 0, 1, 3]), keep_rejected=st.sampled_from([0, 1, 3]), failures=faults)
    def delete_finished(self, keep: int, keep_rejected: int, failures: int | None) -> None:
        self.do(self.delete_finished_step(keep, keep_rejected), failures)

    @rule()
    def time_passes(self) -> None:
        self.uptime += 3.0

    @rule()
    def count_rejected(self) -> None:
        self.ledger.count_rejected()
        self.model.rejected += 1
        if self.maybe is not None:
            self.maybe.rejected = self.maybe.rejected_on_disk

    @rule(failures=faults, skip=st.integers(0, 8))
    def checkpoint(self, failures: int | None, skip: int) -> None:
        if failures is not None:
            self.disk.fault = failing(times=failures, skip=skip)
        with contextlib.suppress(LedgerError):
            self.ledger.checkpoint_if_due()
        self.disk.heal()

    @rule(limit=st.integers(1, 12), chance=chances)
    def publish(self, limit: int, chance: random.Random) -> None:
        """Some messages reach the broker, some acknowledgements come back."""
        self.publish_some(limit, chance)

    @rule()
    def reconnect(self) -> None:
        self.ledger.coalesce()

    @rule()
    def broker_loses_retained_messages(self) -> None:
        self.broker.clear()
        self.results.clear()
        self.positions.clear()
        self.ledger.republish_all()
        self.on_transaction()

    @rule(chance=chances)
    def release_packet_ids(self, chance: random.Random) -> None:
        names = [name for name in self.model.jobs if chance.random() < 0.5]
        self.ledger.release_packet_ids([*names, "unknown"])
        for name in names:
            self.model.release(self.model.jobs[name].seq)

    @rule(keep=st.lists(st.sampled_from(NAMES)))
    def release_all_packet_ids(self, keep: list[str]) -> None:
        before = self.ledger._storage.transaction
        self.ledger.release_all_packet_ids(keep=keep)
        self.model.release_all(keep)
        if self.ledger._storage.transaction != before:
            self.on_transaction()

    def on_transaction(self) -> None:
        """Another transaction has written what was waiting for one."""
        self.model.rejected_on_disk = self.model.rejected
        self.model.released_on_disk = self.model.released_until
        self.maybe = None

    @rule()
    def broker_saves_its_state(self) -> None:
        self.saved = (self.broker.copy(), self.results.copy())

    @precondition(lambda self: self.saved is not None)
    @rule()
    def broker_restores_its_state(self) -> None:
        """It was killed and restores an older state."""
        assert self.saved is not None
        self.broker, self.results = self.saved[0].copy(), self.saved[1].copy()
        self.positions.clear()
        self.ledger.republish_all(restored=True)
        self.on_transaction()

    def publish_some(self, limit: int, chance: random.Random | None) -> None:
        """Publish as the publisher does: clears first, in order; a lost connection loses the rest."""
        clears = self.ledger.pending_clears(limit)
        messages: list[DeletedJob | tuple[int, Job]] = [*clears, *self.ledger.unpublished(limit - len(clears))]
        arrived = len(messages) if chance is None else chance.randint(0, len(messages))
        acknowledged = arrived if chance is None else chance.randint(0, arrived)
        for message in messages[:arrived]:
            self.arrive(message)
        for message in messages[:acknowledged]:
            if isinstance(message, DeletedJob):
                self.ledger.mark_cleared(message.seq)
                self.model.pending_clears.pop(message.seq, None)
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

    # -- stops and crashes -------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.ledger._storage.abandon()
        self.ledger._file_lock.release()

    def reopen(self, *possible: Model) -> None:
        """Open the ledger after a crash; it equals one of the `possible` models."""
        self.ledger = self.open()
        for model in possible:
            model.crash()
        self.model = next((m for m in possible if m.state_tuple() == state_of(self.ledger)), possible[0])
        self.model.rejected_on_disk = self.model.rejected
        self.maybe = None

    @rule()
    def stop_and_start(self) -> None:
        self.ledger.close()
        if (self.model.rejected, self.model.released_until) != (
            self.model.rejected_on_disk,
            self.model.released_on_disk,
        ):
            self.maybe = None
        self.model.rejected_on_disk, self.model.released_on_disk = self.model.rejected, self.model.released_until
        self.reopen(self.model)

    @rule(failures=faults, skip=st.integers(0, 6))
    def stop_that_may_fail(self, failures: int | None, skip: int) -> None:
        before = copy.deepcopy(self.model)
        self.model.rejected_on_disk, self.model.released_on_disk = self.model.rejected, self.model.released_until
        self.disk.fault = failing(times=failures or 0, skip=skip)
        possible = [self.model]
        try:
            self.ledger.close()
        except LedgerError:
            possible += [before, *([] if self.maybe is None else [self.maybe])]
        self.reopen(*possible)

    @rule()
    def crash(self) -> None:
        self.kill()
        self.reopen(self.model, *([] if self.maybe is None else [self.maybe]))

    @rule(data=st.data(), skip=st.integers(0, 6))
    def die_during_a_call(self, data: st.DataObject, skip: int) -> None:
        """The process dies in one of its calls to the disk, before the method returns."""
        real, modelled = self.any_step(data)
        after = copy.deepcopy(self.model)
        modelled(after)
        after.rejected_on_disk, after.released_on_disk = after.rejected, self.model.released_until
        self.disk.fault = killing(skip=skip)
        possible = [self.model, after, *([] if self.maybe is None else [self.maybe])]
        before = self.ledger._storage.transaction
        try:
            real(self.ledger)
        except Killed:
            pass
        else:
            possible = possible if self.ledger._storage.transaction == before else [after]
        self.kill()
        self.reopen(*possible)

    @rule(data=st.data(), chance=chances)
    def die_with_half_a_line(self, data: st.DataObject, chance: random.Random) -> None:
        """The last line is cut anywhere: its transaction is there completely or not at all."""
        self.do((lambda ledger: ledger.append([]), lambda _model: []))
        journal_path = self.path.with_name("ledger.json.journal")
        start, transaction = self.ledger._storage.journal_bytes, self.ledger._storage.transaction
        before = copy.deepcopy(self.model)
        before_maybe = self.maybe
        self.do(self.any_step(data))
        end = self.ledger._storage.journal_bytes
        self.kill()
        if end < start or self.ledger._storage.transaction == transaction:  # the journal was started anew, or nothing
            self.reopen(self.model, *([] if self.maybe is None else [self.maybe]))
            return
        with journal_path.open("r+b") as file:
            file.truncate(chance.randint(start, end))
        self.reopen(before, self.model, *([] if before_maybe is None else [before_maybe]))

    # -- invariants --------------------------------------------------------------------------------------------------

    @invariant()
    def the_ledger_equals_the_model(self) -> None:
        assert state_of(self.ledger) == self.model.state_tuple()
        assert set(self.ledger.processing()) == {entry.seq for entry in self.model.processing}

    @invariant()
    def statuses_that_the_broker_lacks_are_pending(self) -> None:
        for name, entry in self.model.jobs.items():
            if self.broker.get(name) != (entry.state, entry.attempt):
                assert entry.seq in self.ledger._outbox._pending, name

    @invariant()
    def messages_of_deleted_jobs_are_pending_clears(self) -> None:
        pending = {job.seq: replace(job, retained=False) for job in self.ledger.pending_clears(1000)}
        statuses = [job.job_id for job in pending.values() if job.owns_status]
        assert self.broker.keys() - self.model.jobs.keys() <= set(statuses)
        assert not set(statuses) & self.model.jobs.keys()
        assert len(statuses) == len(set(statuses))
        assert self.model.pending_clears.items() <= pending.items()
        results = {(job.job_id, name) for job in pending.values() for name in job.formats}
        assert self.results.keys() - self.expected_results().keys() <= results

    @invariant()
    def no_unneeded_windows_are_stored(self) -> None:
        stored = len(self.ledger._storage.rows("windows"))
        assert stored == sum(entry.windows for entry in self.model.jobs.values())

    @invariant()
    def queries_equal_the_model(self) -> None:
        by_seq = sorted(self.model.jobs.values(), key=lambda entry: entry.seq)
        assert [job.seq for job in self.ledger.jobs()] == [entry.seq for entry in by_seq]
        for state in JobState:
            expected = [entry.seq for entry in by_seq if entry.state is state]
            assert [job.seq for job in self.ledger.jobs(states=[state])] == expected
        rows = self.ledger._storage.rows("jobs")
        ended = [seq for seq in self.ledger._index.finished if retry_rejection(rows[str(seq)]) is None]
        assert list(self.ledger._index.retryable) == ended
        assert self.ledger.totals().retryable == len(ended)
        ready = self.model.ready(self.uptime)
        assert [job.seq for job in self.ledger.upcoming(3)] == [entry.seq for entry in ready[:3]]
        assert self.ledger.preempted() == {entry.seq for entry in by_seq if entry.preempted}
        assert self.ledger._index.queue.oldest() == min(self.model.queue, default=None)
        highest = ready[0].priority if ready and not self.model.paused else 0
        for entry in self.model.processing:
            assert self.ledger.is_outranked(entry.seq) is (highest > entry.priority)

    def expected_results(self) -> dict[tuple[str, str], int]:
        return {
            (name, form): entry.seq
            for name, entry in self.model.jobs.items()
            if entry.state is JobState.COMPLETED
            for form in entry.formats
        }

    def check_that_the_broker_agrees(self) -> None:
        expected = {name: (entry.state, entry.attempt) for name, entry in self.model.jobs.items()}
        assert self.broker == expected
        assert self.results == self.expected_results()
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
