"""The ledger: order, verdicts, transitions, crashes, the outbox, threads and processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tinydb import Query, TinyDB

from cesar_mqtt import ledger as ledger_module
from cesar_mqtt.disk import Disk
from cesar_mqtt.errors import ErrorCode, LedgerError, LedgerInUseError
from cesar_mqtt.jobs import AudioSource, IllegalTransitionError, Job, JobState, NewJob, Result, Verdict
from cesar_mqtt.ledger import Ledger
from cesar_mqtt.line import HEAD, Line
from tests.unit.faults import FaultyDisk, Killed, QuickDisk, failing, killing

RESULT = Result("good morning", 2.5, "en", 0.98, no_speech=False, warnings=("half of it was noise",))


def request(name: str, **fields: Any) -> NewJob:
    fields.setdefault("fingerprint", f"print of {name}")
    return NewJob(name, audio=AudioSource("path", f"{name}.wav"), model_size="base", **fields)


class Clock:
    """Seconds since the epoch, as a test sets them."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """One ledger file, opened and left in every way there is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        self.options: dict[str, Any] = {}
        self.ledger = self.open()

    def open(self, disk: Disk | None = None, **options: Any) -> Ledger:
        self.options |= options
        self.ledger = Ledger(self.path, clock=self.clock, disk=disk or QuickDisk(), **self.options)
        return self.ledger

    def crash(self, disk: Disk | None = None, **options: Any) -> Ledger:
        """Open the ledger after its process has died."""
        self.ledger._db.journal.abandon()
        self.ledger._file_lock.release()
        return self.open(disk, **options)

    def restart(self, **options: Any) -> Ledger:
        self.ledger.close()
        return self.open(**options)

    def close(self) -> None:
        self.ledger._db.journal.abandon()
        self.ledger._file_lock.release()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "ledger.json")
    yield made
    made.close()


def names(jobs: list[tuple[int, Job]]) -> list[str]:
    return [job.job_id for _, job in jobs]


def publish_all(ledger: Ledger) -> list[Job]:
    """Let the broker acknowledge everything, and return what it was told."""
    told = []
    while ledger.has_unpublished:
        for number, job in ledger.unpublished(100):
            told.append(job)
            ledger.mark_published([(job.seq, number)])
    return told


def claimed(ledger: Ledger) -> Job:
    job = ledger.claim()
    assert job is not None
    return job


def verdicts(ledger: Ledger, *requests: NewJob) -> list[Verdict]:
    return [verdict for verdict, _ in ledger.append(requests)]


def accept(ledger: Ledger, *ids: str) -> list[Job]:
    accepted = [job for _, job in ledger.append([request(name) for name in ids])]
    assert None not in accepted
    return [job for job in accepted if job is not None]


# -- order --------------------------------------------------------------------------------------------------------


def test_a_thousand_jobs_are_claimed_in_the_order_of_acceptance_whatever_the_clock_does(desk: Desk) -> None:
    expected = [f"job-{number}" for number in range(1000)]
    for start in range(0, 1000, 50):
        desk.clock.now -= 3600 if start % 100 else -10
        accept(desk.ledger, *expected[start : start + 50])
        if start == 300:
            desk.crash()
        if start == 600:
            desk.restart()
    got = []
    while (job := desk.ledger.claim()) is not None:
        desk.clock.now -= 1
        got.append(job.job_id)
        desk.ledger.complete(job.seq, RESULT)
        if len(got) in (250, 500):
            desk.crash()
    assert got == expected


def test_a_sequence_number_is_never_used_again(desk: Desk) -> None:
    seqs = [job.seq for job in accept(desk.ledger, "a", "b", "c")]
    assert seqs == [1, 2, 3]
    for again in (desk.crash, desk.restart):
        again()
        (job,) = accept(desk.ledger, f"d-{again.__name__}")
        assert job.seq not in seqs
        seqs.append(job.seq)
        finish(desk.ledger, desk.ledger.totals().queued)
        desk.ledger.retire(before=0.0, keep=0)


def test_jobs_that_are_put_back_keep_their_places(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c", "d")
    a, b, c = (claimed(desk.ledger) for _ in range(3))
    for job in (b, a, c):
        desk.ledger.requeue(job.seq)
    assert [claimed(desk.ledger).job_id for _ in range(4)] == ["a", "b", "c", "d"]


def test_jobs_that_a_crash_puts_back_keep_their_places(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c", "d")
    for _ in range(3):
        claimed(desk.ledger)
    desk.crash()
    assert [claimed(desk.ledger).job_id for _ in range(4)] == ["a", "b", "c", "d"]


def test_a_batch_is_one_transaction_with_one_sync(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    disk.calls.clear()
    accept(desk.ledger, *(f"job-{number}" for number in range(500)))
    assert [call for call in disk.calls if call != "reserve"] == ["write", "sync_data"]


def test_what_changes_nothing_does_not_touch_the_disk(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    accept(desk.ledger, "a")
    disk.calls.clear()
    desk.ledger.append([request("a"), request("a", fingerprint="other")])
    publish_all(desk.ledger)
    desk.ledger.count_rejected()
    desk.ledger.totals()
    assert disk.calls == []


# -- verdicts -----------------------------------------------------------------------------------------------------


def test_the_same_id_is_the_same_job_or_a_conflict(desk: Desk) -> None:
    (first,) = accept(desk.ledger, "a")
    publish_all(desk.ledger)
    (same, job), (conflict, other) = desk.ledger.append([request("a"), request("a", fingerprint="other")])
    assert (same, conflict) == (Verdict.SAME, Verdict.CONFLICT)
    assert job == other == first
    assert names(desk.ledger.unpublished(10)) == ["a"], "its status is published again, once"


def test_verdicts_within_one_batch_are_those_of_one_after_the_other(desk: Desk) -> None:
    got = verdicts(
        desk.ledger,
        request("a"),
        request("a"),
        request("a", fingerprint="other"),
        request("b", failure="no such field"),
        request("b", failure="no such field"),
        request("b"),
    )
    accepted, same, conflict = Verdict.ACCEPTED, Verdict.SAME, Verdict.CONFLICT
    assert got == [accepted, same, conflict, accepted, same, same]
    assert desk.ledger.totals().queued == 1


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_an_id_is_remembered_over_restarts_and_in_every_state(desk: Desk, leave: str) -> None:
    accept(desk.ledger, "done", "working", "waiting")
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    claimed(desk.ledger)
    getattr(desk, leave)()
    for name in ("done", "working", "waiting"):
        assert verdicts(desk.ledger, request(name), request(name, fingerprint="x")) == ["same", "conflict"]
    assert desk.ledger.totals().queued == 2


def test_a_request_that_is_wrong_is_recorded_as_an_error_and_never_claimed(desk: Desk) -> None:
    ((verdict, job),) = desk.ledger.append([request("bad", failure="beam_size: at most 10.")])
    assert verdict is Verdict.ACCEPTED
    assert job is not None
    assert (job.state, job.error_code, job.error_message) == (
        JobState.ERROR,
        ErrorCode.INVALID_REQUEST,
        "beam_size: at most 10.",
    )
    assert job.completed_at == desk.clock.now
    assert job.queue_position is None
    assert desk.ledger.claim() is None
    assert desk.ledger.totals().error_total == 1
    assert names(desk.ledger.unpublished(10)) == ["bad"]
    assert desk.crash().totals().error_total == 1


def redelivered(name: str, packet_id: int, fingerprint: str = "same") -> NewJob:
    return request(name, packet_id=packet_id, redelivered=True, fingerprint=fingerprint)


def delivered(name: str, packet_id: int, fingerprint: str = "same") -> NewJob:
    return request(name, packet_id=packet_id, fingerprint=fingerprint)


@pytest.mark.parametrize("leave", ["stay", "crash", "restart", "one batch"])
def test_a_redelivery_of_a_request_without_an_id_is_the_job_of_the_first_delivery(desk: Desk, leave: str) -> None:
    first, again = delivered("uuid-1", 7), redelivered("uuid-2", 7)
    if leave == "one batch":
        (_, job), (verdict, same) = desk.ledger.append([first, again])
    else:
        ((_, job),) = desk.ledger.append([first])
        if leave != "stay":
            getattr(desk, leave)()
        ((verdict, same),) = desk.ledger.append([again])
    assert verdict is Verdict.SAME
    assert job is not None
    assert same is not None
    assert (same.job_id, same.seq) == ("uuid-1", job.seq)
    assert desk.ledger.totals().queued == 1
    assert desk.ledger.get("uuid-2") is None


def test_requests_that_only_look_alike_are_jobs_of_their_own(desk: Desk) -> None:
    ledger = desk.ledger
    assert verdicts(ledger, delivered("first", 7)) == ["accepted"]
    assert verdicts(ledger, delivered("not redelivered", 7)) == ["accepted"]
    assert verdicts(ledger, redelivered("another packet", 8)) == ["accepted"]
    assert verdicts(ledger, redelivered("another request", 7, "other")) == ["accepted"]
    assert verdicts(ledger, request("without a packet", fingerprint="same", redelivered=True)) == ["accepted"]


def test_a_packet_id_means_the_newest_message_that_bore_it_also_within_a_batch(desk: Desk) -> None:
    *_, (verdict, job) = desk.ledger.append([delivered("old", 7), delivered("new", 7), redelivered("again", 7)])
    assert verdict is Verdict.SAME
    assert job is not None
    assert job.job_id == "new"


def test_a_packet_id_means_the_newest_message_that_bore_it(desk: Desk) -> None:
    desk.ledger.append([delivered("old", 7), delivered("new", 7)])
    for _ in range(2):
        ((verdict, job),) = desk.ledger.append([redelivered("again", 7)])
        assert verdict is Verdict.SAME
        assert job is not None
        assert job.job_id == "new"
        desk.crash()


def test_a_full_queue_refuses_new_jobs_and_nothing_else(desk: Desk) -> None:
    ledger = desk.restart(max_queued=3)
    accepted, full = Verdict.ACCEPTED, Verdict.FULL
    wrong = request("wrong", failure="no")
    requests = [request("a"), wrong, request("b"), request("c"), request("d"), request("a"), request("d")]
    assert verdicts(ledger, *requests) == [accepted, accepted, accepted, accepted, full, Verdict.SAME, full]
    assert ledger.append([request("d")]) == [(full, None)]
    assert verdicts(ledger, request("b", fingerprint="x"), request("wrong too", failure="no")) == ["conflict", accepted]
    claimed(ledger)
    assert verdicts(ledger, request("d"), request("e")) == [accepted, full]
    assert ledger.get("e") is None


def test_a_ledger_with_more_waiting_jobs_than_a_new_limit_keeps_them(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c")
    ledger = desk.restart(max_queued=1)
    assert verdicts(ledger, request("d"), request("a")) == ["full", "same"]
    assert [claimed(ledger).job_id for _ in range(3)] == ["a", "b", "c"]


# -- transitions --------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Ledger, int], object]] = {
    "complete": lambda ledger, seq: ledger.complete(seq, RESULT),
    "fail": lambda ledger, seq: ledger.fail(seq, ErrorCode.INTERNAL, "It broke."),
    "requeue": lambda ledger, seq: ledger.requeue(seq),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("state", ["queued", "completed", "error", "requeued", "unknown", "refused"])
def test_an_illegal_transition_raises_and_changes_nothing(desk: Desk, operation: str, state: str) -> None:
    ledger = desk.ledger
    (job,) = accept(ledger, "a")
    seq = job.seq
    if state == "unknown":
        seq = 99
    elif state == "refused":
        ledger.append([request("b", failure="no")])
        seq = 2
    elif state != "queued":
        claimed(ledger)
        before = {"completed": "complete", "error": "fail", "requeued": "requeue"}[state]
        OPERATIONS[before](ledger, seq)
    earlier = (ledger.get("a"), ledger.get("b"), ledger.totals())
    with pytest.raises(IllegalTransitionError, match=rf"ob number {seq}\b"):
        OPERATIONS[operation](ledger, seq)
    assert (ledger.get("a"), ledger.get("b"), ledger.totals()) == earlier
    ledger = desk.crash()
    assert ledger.totals() == earlier[2]


def test_a_job_is_told_as_it_was_recorded(desk: Desk) -> None:
    desk.ledger.append(
        [request("a", options={"beam_size": 2}, metadata={"room": ["hall"]}), request("b"), request("c")]
    )
    start = desk.clock.now
    desk.clock.now += 5
    job = claimed(desk.ledger)
    assert job.state is JobState.PROCESSING
    assert (job.attempt, job.created_at, job.started_at, job.updated_at) == (1, start, start + 5, start + 5)
    desk.clock.now += 5
    desk.ledger.complete(job.seq, RESULT)
    claimed(desk.ledger)
    desk.ledger.fail(2, ErrorCode.AUDIO_EMPTY, "There is no sound.")
    desk.restart()
    done, failed, waiting = (desk.ledger.get(name) for name in "abc")
    assert done is not None
    assert failed is not None
    assert waiting is not None
    assert (done.state, done.result_text, done.detected_language) == (JobState.COMPLETED, "good morning", "en")
    assert (done.language_probability, done.no_speech, done.audio_duration) == (0.98, False, 2.5)
    assert (done.warnings, done.completed_at) == (("half of it was noise",), start + 10)
    assert (done.options, done.metadata) == ({"beam_size": 2}, {"room": ["hall"]})
    assert (done.audio, done.model_size) == (AudioSource("path", "a.wav"), "base")
    assert (failed.state, failed.error_code) == (JobState.ERROR, ErrorCode.AUDIO_EMPTY)
    assert (failed.error_message, failed.result_text) == ("There is no sound.", None)
    assert (waiting.state, waiting.queue_position, waiting.attempt) == (JobState.QUEUED, 1, 0)
    assert desk.ledger.get("d") is None
    assert desk.ledger.last_finished() == failed


def test_nothing_that_can_be_changed_is_shared_with_the_ledger(desk: Desk) -> None:
    metadata = {"tags": ["a"]}
    desk.ledger.append([request("a", metadata=metadata)])
    metadata["tags"].append("from the producer")
    for job in (desk.ledger.get("a"), desk.ledger.unpublished(1)[0][1], desk.ledger.claim()):
        assert job is not None
        assert job.metadata == {"tags": ["a"]}
        job.metadata["tags"].append("from a reader")
    again = desk.crash().get("a")
    assert again is not None
    assert again.metadata == {"tags": ["a"]}


def test_totals_count_what_ended_since_the_ledger_was_made(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c", "d")
    start = desk.clock.now
    desk.clock.now += 60
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    desk.ledger.fail(claimed(desk.ledger).seq, ErrorCode.INTERNAL, "no")
    working = claimed(desk.ledger)
    desk.ledger.count_rejected()
    totals = desk.ledger.totals()
    assert (totals.queued, totals.completed_total, totals.error_total) == (1, 1, 1)
    assert (totals.cancelled_total, totals.rejected_total) == (0, 1)
    assert (totals.processing, totals.oldest_queued_at) == ("c", start)
    desk.ledger.complete(working.seq, RESULT)
    totals = desk.ledger.totals()
    assert desk.crash().totals() == totals
    desk.ledger.count_rejected()
    desk.ledger.count_rejected()
    assert desk.restart().totals().rejected_total == 3
    assert desk.ledger.processing() == ()


def test_the_audio_that_jobs_still_need_is_named(desk: Desk) -> None:
    kinds = {"done": "spool", "broken": "spool", "hopeless": "spool", "a": "spool", "b": "path"}
    desk.ledger.append(
        [NewJob(name, name, AudioSource(kind, f"file of {name}"), "base") for name, kind in kinds.items()]
    )
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    desk.ledger.fail(claimed(desk.ledger).seq, ErrorCode.MODEL_UNAVAILABLE, "Later, perhaps.")
    desk.ledger.fail(claimed(desk.ledger).seq, ErrorCode.AUDIO_UNREADABLE, "Never.")
    assert desk.ledger.spooled() == {"file of broken", "file of a"}
    claimed(desk.ledger)
    assert desk.crash().spooled() == {"file of broken", "file of a"}


# -- crashes ------------------------------------------------------------------------------------------------------


def test_a_job_that_was_in_work_waits_again_with_its_attempt_counted(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    claimed(desk.ledger)
    publish_all(desk.ledger)
    desk.crash()
    job = desk.ledger.get("a")
    assert job is not None
    assert (job.state, job.attempt, job.crashes, job.started_at) == (JobState.QUEUED, 1, 1, None)
    assert job.queue_position == 1
    assert "a" in names(desk.ledger.unpublished(10))
    again = claimed(desk.ledger)
    assert (again.job_id, again.attempt, again.crashes) == ("a", 2, 1)


def test_the_third_crash_ends_a_job_as_crashed(desk: Desk) -> None:
    accept(desk.ledger, "poison", "good")
    for attempt in (1, 2, 3):
        assert claimed(desk.ledger).attempt == attempt
        desk.crash()
    job = desk.ledger.get("poison")
    assert job is not None
    assert (job.state, job.error_code, job.crashes) == (JobState.ERROR, ErrorCode.CRASHED, 3)
    assert job.completed_at is not None
    assert "3 times" in str(job.error_message)
    assert claimed(desk.ledger).job_id == "good"
    assert desk.ledger.totals().error_total == 1
    assert desk.restart().totals().error_total == 1


def test_a_forced_stop_and_a_clean_one_are_no_crashes(desk: Desk) -> None:
    accept(desk.ledger, "a")
    for attempt in range(1, 6):
        job = claimed(desk.ledger)
        assert (job.attempt, job.crashes) == (attempt, 0)
        desk.ledger.requeue(job.seq)
        desk.restart()


def test_one_crash_is_enough_when_one_attempt_is_allowed(desk: Desk) -> None:
    desk.restart(max_attempts=1)
    accept(desk.ledger, "a")
    claimed(desk.ledger)
    job = desk.crash().get("a")
    assert job is not None
    assert job.error_code is ErrorCode.CRASHED


def test_a_recovery_that_the_disk_refuses_gives_the_lock_back_and_comes_next_time(desk: Desk) -> None:
    accept(desk.ledger, "a")
    claimed(desk.ledger)
    open_before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(LedgerError):
            desk.crash(FaultyDisk(failing(only="sync_data")))
    assert len(list(Path("/dev/fd").iterdir())) <= open_before
    job = desk.open().get("a")
    assert job is not None
    assert (job.state, job.crashes) == (JobState.QUEUED, 1)


# -- positions ----------------------------------------------------------------------------------------------------


def test_each_claim_tells_the_first_ten_their_new_positions_and_nobody_else(desk: Desk) -> None:
    accept(desk.ledger, *(f"job-{number}" for number in range(15)))
    assert [job.queue_position for job in publish_all(desk.ledger)] == list(range(1, 16))
    desk.clock.now += 60
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    told = publish_all(desk.ledger)
    assert [job.job_id for job in told] == ["job-0", "job-0", *(f"job-{number}" for number in range(1, 11))]
    assert [job.queue_position for job in told[2:]] == list(range(1, HEAD + 1))
    assert {job.updated_at for job in told} == {desk.clock.now}
    beyond = desk.ledger.get("job-11")
    assert beyond is not None
    assert (beyond.queue_position, beyond.updated_at) == (12, desk.clock.now - 60), "as it was at updated_at"
    assert publish_all(desk.ledger) == []


def test_a_job_that_is_put_back_tells_those_behind_it(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c")
    job = claimed(desk.ledger)
    publish_all(desk.ledger)
    desk.ledger.requeue(job.seq)
    newest = {job.job_id: job.queue_position for job in publish_all(desk.ledger)}
    assert newest == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_every_start_tells_the_first_ten_their_positions(desk: Desk, leave: str) -> None:
    """What the broker knows of positions is not on disk: a crash between a claim and its news left them wrong."""
    accept(desk.ledger, *(f"job-{number}" for number in range(15)))
    publish_all(desk.ledger)
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    getattr(desk, leave)()
    told = {job.job_id: job.queue_position for job in publish_all(desk.ledger)}
    assert told == {"job-0": None} | {f"job-{number}": number for number in range(1, 11)}


# -- the outbox ---------------------------------------------------------------------------------------------------


def test_each_state_is_handed_out_once_and_in_order(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    job = claimed(desk.ledger)
    desk.ledger.complete(job.seq, RESULT)
    handed = desk.ledger.unpublished(2) + desk.ledger.unpublished(2)
    states = [(job.job_id, job.state.value) for _, job in handed]
    assert states == [("a", "queued"), ("b", "queued"), ("a", "processing"), ("a", "completed")]


def test_what_was_handed_out_and_not_acknowledged_is_handed_out_again_as_the_newest(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    first = desk.ledger.unpublished(100)
    assert len(first) == 4
    again = desk.ledger.unpublished(100)
    assert sorted((job.job_id, job.state.value) for _, job in again) == [("a", "completed"), ("b", "queued")]
    assert desk.ledger.unpublished(100, but={1}) == [entry for entry in again if entry[1].job_id == "b"]
    assert desk.ledger.unpublished(1) == again[:1]


def test_whoever_was_offline_is_told_the_newest_only(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    desk.ledger.coalesce()
    told = [(job.job_id, job.state.value) for _, job in desk.ledger.unpublished(100)]
    assert sorted(told) == [("a", "completed"), ("b", "queued")]


def test_an_acknowledgement_of_an_older_state_does_not_count(desk: Desk) -> None:
    accept(desk.ledger, "a")
    ((old, _),) = desk.ledger.unpublished(1)
    job = claimed(desk.ledger)
    desk.ledger.mark_published([(job.seq, old)])
    desk.ledger.mark_published([(99, 1)])
    assert desk.ledger.has_unpublished
    ((new, told),) = desk.ledger.unpublished(10)
    assert told.state is JobState.PROCESSING
    desk.ledger.mark_published([(job.seq, new)])
    desk.ledger.mark_published([(job.seq, new)])
    assert not desk.ledger.has_unpublished


def finish(ledger: Ledger, count: int) -> list[str]:
    done = []
    for _ in range(count):
        job = claimed(ledger)
        ledger.complete(job.seq, RESULT)
        done.append(job.job_id)
    return done


def test_after_a_crash_what_was_acknowledged_before_the_last_transaction_is_not_told_again(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c")
    finish(desk.ledger, 1)
    publish_all(desk.ledger)
    finish(desk.ledger, 1)
    desk.crash()
    assert sorted(names(desk.ledger.unpublished(10))) == ["b", "c"], "c is in the head of the queue"


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_what_was_not_acknowledged_is_told_after_any_restart(desk: Desk, leave: str) -> None:
    accept(desk.ledger, "a", "b", "c")
    finish(desk.ledger, 3)
    for number, job in desk.ledger.unpublished(100):
        if job.job_id != "b":
            desk.ledger.mark_published([(job.seq, number)])
    accept(desk.ledger, "d")
    getattr(desk, leave)()
    assert "b" in names(desk.ledger.unpublished(10))
    publish_all(desk.ledger)
    accept(desk.ledger, "e")
    getattr(desk, leave)()
    assert "b" not in names(desk.ledger.unpublished(10))


def test_after_a_clean_stop_only_what_the_broker_lacks_is_told(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    finish(desk.ledger, 2)
    publish_all(desk.ledger)
    desk.restart()
    assert not desk.ledger.has_unpublished


def test_a_job_that_is_deleted_before_it_was_told_does_not_keep_others_from_being_done_with(desk: Desk) -> None:
    accept(desk.ledger, "deleted", "b", "c")
    finish(desk.ledger, 1)
    assert desk.ledger.retire(before=0.0, keep=0) == (1, [])
    finish(desk.ledger, 1)
    desk.ledger.mark_published([(job.seq, number) for number, job in desk.ledger.unpublished(100)])
    finish(desk.ledger, 1)
    desk.crash()
    assert names(desk.ledger.unpublished(10)) == ["c"]
    assert [gone.job_id for gone in desk.ledger.gone(10)] == ["deleted"]


def test_a_job_that_moved_up_before_it_was_ever_told_is_told_after_a_crash(desk: Desk) -> None:
    """Its new position put it behind newer changes; the watermark then passed its own transaction, and it was lost."""
    accept(desk.ledger, *(f"job-{number}" for number in range(HEAD + 5)))
    finish(desk.ledger, 2)
    for number, job in desk.ledger.unpublished(100):
        if job.job_id in ("job-0", "job-1"):
            desk.ledger.mark_published([(job.seq, number)])
    desk.ledger.append([request("last"), request("job-5")])
    desk.crash()
    expected = {f"job-{number}" for number in range(2, HEAD + 5)} | {"last"}
    assert set(names(desk.ledger.unpublished(100))) >= expected


def test_everything_is_told_again_when_the_broker_has_lost_it(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c")
    finish(desk.ledger, 2)
    publish_all(desk.ledger)
    desk.ledger.publish_again()
    assert names(desk.ledger.unpublished(10)) == ["a", "b", "c"]
    assert [job.job_id for job in publish_all(desk.ledger)] == ["a", "b", "c"]


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_a_start_in_the_middle_of_telling_everything_again_goes_on_with_it(desk: Desk, leave: str) -> None:
    """The broker's session is there again by then, so nobody would ask for it once more."""
    accept(desk.ledger, "a", "b", "c")
    finish(desk.ledger, 3)
    publish_all(desk.ledger)
    desk.ledger.publish_again()
    for number, job in desk.ledger.unpublished(2):
        desk.ledger.mark_published([(job.seq, number)])
    getattr(desk, leave)()
    assert "c" in names(desk.ledger.unpublished(10))


def test_observers_are_called_at_every_change_and_see_it(desk: Desk) -> None:
    seen: list[int] = []
    desk.ledger.observe(lambda: seen.append(desk.ledger.totals().queued))
    accept(desk.ledger, "a", "b")
    before = len(seen)
    assert before >= 1
    desk.ledger.append([request("a")])
    desk.ledger.count_rejected()
    assert len(seen) >= before + 2


# -- a disk that refuses, a process that dies ---------------------------------------------------------------------


def picture(ledger: Ledger) -> tuple[object, ...]:
    """All that the ledger says of itself."""
    jobs = {name: ledger.get(name) for name in ledger._register}
    return (
        jobs,
        ledger.totals(),
        ledger.processing(),
        list(ledger._queue),
        list(ledger._outbox._newest),
        ledger.spooled(),
    )


STEPS: list[Callable[[Ledger], object]] = [
    lambda ledger: ledger.append([request("a"), request("b", failure="no"), request("c"), request("a")]),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.complete(ledger.processing()[0], RESULT),
    lambda ledger: ledger.count_rejected(),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.requeue(ledger.processing()[0]),
    lambda ledger: ledger.append([delivered("d", 7), redelivered("e", 7)]),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.fail(ledger.processing()[0], ErrorCode.TIMEOUT, "Too slow."),
    publish_all,
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.maintain(),
]


def run_steps(desk: Desk, upto: int, disk: Disk | None = None) -> Ledger:
    """Make the ledger anew and take its first steps."""
    for file in (desk.path, desk.path.with_name("ledger.json.journal")):
        file.unlink(missing_ok=True)
    ledger = desk.crash(disk)
    for step in STEPS[:upto]:
        step(ledger)
    return ledger


@pytest.mark.parametrize("times", [1, 2, 3, 4, float("inf")])
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_call_that_the_disk_refuses_has_not_happened_and_can_be_made_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, step: int, times: float
) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    after = picture(run_steps(desk, step + 1))
    after_crash = picture(desk.crash())
    for skip in range(6):
        disk = FaultyDisk()
        ledger = run_steps(desk, step, disk)
        before = picture(ledger)
        disk.fault = failing(skip=skip, times=times)
        try:
            STEPS[step](ledger)
        except LedgerError:
            assert picture(ledger) == before
            disk.heal()
            STEPS[step](ledger)
        assert picture(ledger) == after
        assert picture(desk.crash()) == after_crash


def test_a_refused_call_can_simply_be_made_again(desk: Desk) -> None:
    def stubborn(call: Callable[[], object]) -> None:
        disk.fault = failing(times=7)
        for _ in range(20):
            try:
                call()
            except LedgerError as exc:
                assert "Input/output error" in str(exc)  # noqa: PT017
            else:
                return
        pytest.fail("it never went through")

    disk = FaultyDisk()
    ledger = desk.crash(disk)
    stubborn(lambda: accept(ledger, "a", "b"))
    stubborn(ledger.claim)
    stubborn(lambda: ledger.complete(1, RESULT))
    stubborn(ledger.claim)
    stubborn(lambda: ledger.requeue(2))
    disk.heal()
    ledger = desk.crash()
    a, b = ledger.get("a"), ledger.get("b")
    assert a is not None
    assert b is not None
    assert (a.state, a.attempt) == (JobState.COMPLETED, 1)
    assert (b.state, b.attempt, b.crashes) == (JobState.QUEUED, 1, 0)
    assert ledger.totals().completed_total == 1


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_process_that_dies_at_any_call_leaves_each_job_before_or_after_its_step(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    possible = []
    for upto in (step, step + 1):
        run_steps(desk, upto)
        possible.append(picture(desk.crash())[0])
    for skip in range(20):
        disk = FaultyDisk()
        ledger = run_steps(desk, step, disk)
        disk.fault = killing(skip=skip)
        try:
            STEPS[step](ledger)
        except Killed:
            assert picture(desk.crash())[0] in possible
        else:
            assert picture(desk.crash())[0] == possible[1]
            break
    assert skip < 19


def test_a_stop_that_the_disk_refuses_keeps_the_journal_and_gives_the_lock_back(desk: Desk) -> None:
    disk = FaultyDisk()
    ledger = desk.crash(disk)
    accept(ledger, "a")
    disk.fault = failing(times=float("inf"))
    with pytest.raises(LedgerError, match="Its journal holds everything"):
        ledger.close()
    ledger.close()
    assert desk.open().get("a") is not None


def test_a_closed_ledger_refuses_changes_and_still_answers(desk: Desk) -> None:
    accept(desk.ledger, "a")
    desk.ledger.close()
    for call in (lambda: accept(desk.ledger, "b"), desk.ledger.claim):
        with pytest.raises(LedgerError, match="closed"):
            call()
    assert desk.ledger.get("a") is not None


def test_upkeep_after_the_stop_leaves_the_files_to_whoever_has_them_now(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the closed ledger would have overwritten what the next process had written since."""
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    accept(desk.ledger, "a")
    old = desk.ledger
    old.close()
    monkeypatch.setattr(type(old._db.journal), "journal_bytes", property(lambda _self: 1 << 40))
    accept(desk.open(), "b")
    desk.ledger.maintain()
    content = desk.path.read_bytes()
    old.maintain()
    assert desk.path.read_bytes() == content


def test_stock_tinydb_reads_a_stopped_ledger(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    finish(desk.ledger, 1)
    desk.ledger.close()
    with TinyDB(desk.path, access_mode="r") as stock:
        (row,) = stock.table("jobs").search(Query().state == "completed")
        assert (row["job_id"], row["result_text"], row.doc_id) == ("a", "good morning", 1)
    assert sorted(file.name for file in desk.path.parent.iterdir()) == ["ledger.json", "ledger.json.lock"]


# -- threads and processes ----------------------------------------------------------------------------------------


class Crowd:
    """Producers, workers, a publisher and the upkeep, all at once on one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.done: list[str] = []
        self.broker: dict[int, Job] = {}
        self.failed: list[BaseException] = []
        self.all_accepted = threading.Event()
        self.all_done = threading.Event()

    def start(self, target: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                target()
            except BaseException as exc:  # noqa: BLE001 - the test looks at it
                self.failed.append(exc)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def produce(self) -> None:
        name = threading.current_thread().name
        for number in range(40):
            batch = [request(f"{name}-{number}-{n}") for n in range(3)]
            assert verdicts(self.ledger, *batch, batch[0]) == ["accepted"] * 3 + ["same"]

    def work(self) -> None:
        while self.ledger.wait_for_work(self.all_accepted.is_set) or self.ledger.totals().queued:
            job = self.ledger.claim()
            if job is not None:
                self.done.append(job.job_id)
                self.ledger.complete(job.seq, RESULT)

    def publish(self) -> None:
        while not self.all_done.is_set() or self.ledger.has_unpublished:
            for number, job in self.ledger.unpublished(7):
                self.broker[job.seq] = job
                self.ledger.mark_published([(job.seq, number)])

    def maintain(self) -> None:
        while not self.all_done.is_set():
            self.ledger.maintain()

    def run(self) -> None:
        others = [self.start(self.publish), self.start(self.maintain)]
        workers = [self.start(self.work) for _ in range(2)]
        producers = [self.start(self.produce) for _ in range(3)]
        self._join(producers)
        self.all_accepted.set()
        self.ledger.wake()
        self._join(workers)
        self.all_done.set()
        self._join(others)

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_many_threads_at_once_lose_and_double_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 2000)
    crowd = Crowd(desk.ledger)
    crowd.run()
    assert crowd.failed == []
    assert len(crowd.done) == len(set(crowd.done)) == 360
    assert len(crowd.broker) == 360
    assert all(job.state is JobState.COMPLETED for job in crowd.broker.values())
    assert desk.path.stat().st_size > 2000, "there were checkpoints in between"
    before = picture(desk.ledger)
    assert picture(desk.crash())[:3] == before[:3]


def test_commits_while_a_checkpoint_is_written_are_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)

    class Visited(FaultyDisk):
        """While the checkpoint is written, and before its journal is cut, others append."""

        visits = 0

        def sync(self, descriptor: int) -> None:
            super().sync(descriptor)
            if self.calls.count("sync") <= 2:
                self.visits += 1
                visitor = threading.Thread(target=accept, args=(ledger, f"during-{self.visits}"), daemon=True)
                visitor.start()
                visitor.join(10)
                assert not visitor.is_alive(), "nobody waits for a checkpoint"

    disk = Visited()
    disk.calls = ["sync", "sync"]
    ledger = desk.crash(disk)
    accept(ledger, *(f"job-{number}" for number in range(50)))
    disk.calls.clear()
    ledger.maintain()
    accept(ledger, "after")
    assert disk.visits == 2
    assert '"checkpoint"' in desk.path.read_text()
    ledger = desk.crash()
    expected = [*(f"job-{number}" for number in range(50)), "during-1", "during-2", "after"]
    assert [claimed(ledger).job_id for _ in range(ledger.totals().queued)] == expected


def test_a_thread_that_waits_for_work_is_woken_by_a_job_and_by_a_stop(desk: Desk) -> None:
    stop = threading.Event()
    woken: list[bool] = []
    ready = threading.Semaphore(0)

    def wait() -> None:
        for _ in range(2):
            woken.append(desk.ledger.wait_for_work(stop.is_set))
            desk.ledger.claim()
            ready.release()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    accept(desk.ledger, "a")
    assert ready.acquire(timeout=10)
    stop.set()
    desk.ledger.wake()
    waiting.join(10)
    assert woken == [True, False]


def test_a_delay_that_is_over_does_not_keep_the_waiting_thread_from_sleeping() -> None:
    line = Line([1, 2])
    line.delay(1, 5.0)
    assert line.next_ready_in(2.0) == 3.0
    assert (line.ready(4.0), line.ready(5.0)) == (2, 1)
    line.remove(1)
    line.delay(2, 20.0)
    assert line.ready(10.0) is None
    assert line.next_ready_in(10.0) == 10.0


def test_a_job_id_that_was_deleted_and_is_used_again_is_not_deleted_at_the_broker(desk: Desk) -> None:
    accept(desk.ledger, "a")
    finish(desk.ledger, 1)
    desk.ledger.retire(before=0.0, keep=0)
    (again,) = accept(desk.ledger, "a")
    assert again.seq == 2
    assert desk.ledger.gone(10) == []
    assert desk.crash().gone(10) == []


def test_any_thread_may_close_the_ledger(desk: Desk) -> None:
    """The lock was once given back only if the thread that had taken it closed the ledger."""
    closing = threading.Thread(target=desk.ledger.close)
    closing.start()
    closing.join(10)
    desk.open()


def in_another_process(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


OPEN = """
import sys
from pathlib import Path
from cesar_mqtt.errors import CesarError
from cesar_mqtt.ledger import Ledger
try:
    Ledger(Path(sys.argv[1])).close()
except CesarError as exc:
    print(type(exc).__name__, exc)
    sys.exit(exc.exit_code)
"""


def test_a_second_process_is_told_that_the_ledger_is_in_use(desk: Desk) -> None:
    process = in_another_process(OPEN, str(desk.path))
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (75, "")
    assert output.startswith(f"LedgerInUseError The ledger {desk.path} is in use by another consumer.")
    with pytest.raises(LedgerInUseError):
        Ledger(desk.path)
    desk.ledger.close()
    process = in_another_process(OPEN, str(desk.path))
    assert process.wait(timeout=30) == 0
    process.communicate()


ENDLESS = """
import sys
from pathlib import Path
from cesar_mqtt import ledger as module
from cesar_mqtt.jobs import NewJob, Result
module._CHECKPOINT_BYTES = 3000
ledger = module.Ledger(Path(sys.argv[1]))
start = ledger.totals().completed_total
for number in range(start, start + 100_000):
    ledger.append([NewJob(f"job-{number}", "print", None, "base"), NewJob(f"other-{number}", "print", None, "base")])
    print(f"accepted job-{number}", flush=True)
    job = ledger.claim()
    ledger.complete(job.seq, Result("text", 1.0, None, None, True))
    print(f"completed {job.job_id}", flush=True)
    ledger.maintain()
"""


def test_a_killed_process_keeps_every_promise_it_made(desk: Desk) -> None:
    desk.ledger.close()
    promised: list[tuple[str, str]] = []
    for lines in (5, 120, 61):
        process = in_another_process(ENDLESS, str(desk.path))
        assert process.stdout is not None
        promised += [tuple(process.stdout.readline().split()) for _ in range(lines)]  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        rest, errors = process.communicate(timeout=30)
        assert "Traceback" not in errors
        promised += [tuple(line.split()) for line in rest.splitlines() if line.count(" ") == 1]  # type: ignore[misc]
    ledger = desk.open()
    for promise, name in promised:
        job = ledger.get(name)
        assert job is not None, name
        assert promise == "accepted" or job.state is JobState.COMPLETED, name
    done = sum(promise == "completed" for promise, _ in promised)
    assert done <= ledger.totals().completed_total <= done + 3


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(LedgerError, match=r"The folder /sys cannot be written: \w+"):
        Ledger(Path("/sys/ledger.json"))


def test_a_damaged_ledger_gives_the_lock_back(desk: Desk) -> None:
    accept(desk.ledger, "a")
    desk.ledger.close()
    good = desk.path.read_bytes()
    desk.path.write_bytes(good[:-5])
    for _ in range(2):
        with pytest.raises(LedgerError, match="damaged"):
            Ledger(desk.path)
    desk.path.write_bytes(good)
    assert desk.open().get("a") is not None
