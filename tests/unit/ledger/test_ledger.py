"""The ledger: order, verdicts, transitions, windows, what people ask for, crashes, the outbox, threads, processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinydb import Query, TinyDB

from cesar_mqtt.errors import ErrorCode, LedgerError, LedgerInUseError
from cesar_mqtt.jobs import Admission, AudioSource, IllegalTransitionError, Job, JobState, NewJob, Result
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger import ledger as ledger_module
from cesar_mqtt.ledger.checkpoint import Snapshot
from cesar_mqtt.ledger.documents import window_document
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.index import window_id
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.queue import POSITIONS_TRACKED, JobQueue
from cesar_mqtt.ledger.storage import Change
from cesar_mqtt.transcript import Segment, Window, Word
from tests.unit.ledger.faults import FaultyDisk, Killed, QuickDisk, failing, killing

RESULT = Result("good morning", 2.5, "en", 0.98, no_speech=False, warnings=("half of it was noise",))


def request(name: str, kind: str = "path", **fields: Any) -> NewJob:
    fields.setdefault("fingerprint", f"print of {name}")
    return NewJob(name, audio=AudioSource(kind, f"{name}.wav"), model_size="base", **fields)


def window(number: int, text: str = " good morning \U0001f600") -> Window:
    words = (Word(number * 30.0, number * 30.0 + 0.5, " good", 0.75), Word(number * 30.0 + 0.5, 1e9, text, 1 / 3))
    segment = Segment(2 * number + 1, number * 30.0, 1e9, text.strip(), -0.25, 0.0625)
    spoken = Segment(2 * number + 2, 0.1, 0.2, "x", -1.5, 1e-9, words=words)
    return Window(number, 30.0 * (number + 1), text, "en", 0.875, (segment, spoken))


def result(windows: int) -> Result:
    return replace(RESULT, windows=tuple(window(number) for number in range(windows)))


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
        self.ledger._storage.abandon()
        self.ledger._file_lock.release()
        return self.open(disk, **options)

    def restart(self, **options: Any) -> Ledger:
        self.ledger.close()
        return self.open(**options)

    def close(self) -> None:
        self.ledger._storage.abandon()
        self.ledger._file_lock.release()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "ledger.json")
    yield made
    made.close()


def names(jobs: list[tuple[int, Job]]) -> list[str]:
    return [job.job_id for _, job in jobs]


def publish_all(ledger: Ledger, *, cleared: bool = True) -> list[Job]:
    """Let the broker acknowledge everything, and return what it was told; not that jobs are gone, unless `cleared`."""
    for job in ledger.pending_clears(100) if cleared else ():
        ledger.mark_cleared(job.seq)
    told = []
    while handed := ledger.unpublished(100):
        told += [job for _, job in handed]
        ledger.mark_published([(job.seq, number) for number, job in handed])
    return told


def claimed(ledger: Ledger) -> Job:
    job = ledger.claim()
    assert job is not None
    return job


def verdicts(ledger: Ledger, *requests: NewJob) -> list[Admission]:
    return [verdict for verdict, _ in ledger.append(requests)]


def accept(ledger: Ledger, *ids: str) -> list[Job]:
    return [known(ledger, job_id) for _, job_id in ledger.append([request(name) for name in ids])]


def known(ledger: Ledger, job_id: str) -> Job:
    job = ledger.get(job_id)
    assert job is not None
    return job


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
        desk.ledger.delete_finished(before=0.0, keep=0)


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
    assert (same, conflict) == (Admission.DUPLICATE, Admission.CONFLICT)
    assert job == other == "a"
    assert known(desk.ledger, "a") == first
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
    accepted, same, conflict = Admission.ACCEPTED, Admission.DUPLICATE, Admission.CONFLICT
    assert got == [accepted, same, conflict, accepted, same, same]
    assert desk.ledger.totals().queued == 1


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_an_id_is_remembered_over_restarts_and_in_every_state(desk: Desk, leave: str) -> None:
    accept(desk.ledger, "done", "working", "waiting")
    desk.ledger.complete(claimed(desk.ledger).seq, RESULT)
    claimed(desk.ledger)
    getattr(desk, leave)()
    for name in ("done", "working", "waiting"):
        assert verdicts(desk.ledger, request(name), request(name, fingerprint="x")) == ["duplicate", "conflict"]
    assert desk.ledger.totals().queued == 2


def test_a_request_that_is_wrong_is_recorded_as_an_error_and_never_claimed(desk: Desk) -> None:
    assert verdicts(desk.ledger, request("bad", failure="beam_size: at most 10.")) == [Admission.ACCEPTED]
    job = known(desk.ledger, "bad")
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
        _, (verdict, same) = desk.ledger.append([first, again])
    else:
        desk.ledger.append([first])
        if leave != "stay":
            getattr(desk, leave)()
        ((verdict, same),) = desk.ledger.append([again])
    assert verdict is Admission.DUPLICATE
    assert same == "uuid-1"
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
    *_, again = desk.ledger.append([delivered("old", 7), delivered("new", 7), redelivered("again", 7)])
    assert again == (Admission.DUPLICATE, "new")


def test_a_packet_id_means_the_newest_message_that_bore_it(desk: Desk) -> None:
    desk.ledger.append([delivered("old", 7), delivered("new", 7)])
    for _ in range(2):
        assert desk.ledger.append([redelivered("again", 7)]) == [(Admission.DUPLICATE, "new")]
        desk.crash()


def test_a_full_queue_refuses_new_jobs_and_nothing_else(desk: Desk) -> None:
    ledger = desk.restart(max_queued=3)
    accepted, full = Admission.ACCEPTED, Admission.FULL
    wrong = request("wrong", failure="no")
    requests = [request("a"), wrong, request("b"), request("c"), request("d"), request("a"), request("d")]
    assert verdicts(ledger, *requests) == [accepted, accepted, accepted, accepted, full, Admission.DUPLICATE, full]
    assert ledger.append([request("d")]) == [(full, "d")]
    assert verdicts(ledger, request("b", fingerprint="x"), request("wrong too", failure="no")) == ["conflict", accepted]
    claimed(ledger)
    assert verdicts(ledger, request("d"), request("e")) == [accepted, full]
    assert ledger.get("e") is None


def test_a_ledger_with_more_waiting_jobs_than_a_new_limit_keeps_them(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c")
    ledger = desk.restart(max_queued=1)
    assert verdicts(ledger, request("d"), request("a")) == ["full", "duplicate"]
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
    with pytest.raises(IllegalTransitionError, match=rf"ob (number {seq}|[ab])\b"):
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
    assert desk.ledger.needed_spool_files() == {"file of broken", "file of a"}
    claimed(desk.ledger)
    assert desk.crash().needed_spool_files() == {"file of broken", "file of a"}


# -- windows ------------------------------------------------------------------------------------------------------


def work_on(ledger: Ledger, windows: int) -> Job:
    """Claim a job and finish so many of its windows."""
    job = claimed(ledger)
    for number in range(len(ledger.windows(job.seq)), windows):
        ledger.add_window(job.seq, window(number))
    return job


def stored_windows(ledger: Ledger) -> int:
    """How many documents there are for windows, of whatever job."""
    return len(ledger._storage.rows("windows"))


@pytest.mark.parametrize("leave", ["crash", "restart", "requeue", "defer"])
def test_windows_come_back_as_they_were_and_the_next_attempt_goes_on_behind_them(desk: Desk, leave: str) -> None:
    desk.restart(monotonic=desk.clock)
    accept(desk.ledger, "a", "b")
    job = work_on(desk.ledger, 2)
    assert desk.ledger.windows(job.seq) == (window(0), window(1))
    if leave == "requeue":
        desk.ledger.requeue(job.seq)
    elif leave == "defer":
        desk.ledger.defer(job.seq, 5.0)
        desk.clock.now += 5.0
    else:
        getattr(desk, leave)()
    assert desk.ledger.windows(job.seq) == (window(0), window(1))
    assert (desk.ledger.resume_position_s(job.seq), desk.ledger.resume_position_s(2)) == (60.0, 0.0)
    assert work_on(desk.ledger, 3).job_id == "a"
    assert desk.crash().windows(job.seq) == (window(0), window(1), window(2))
    assert desk.ledger.windows(2) == ()


def test_a_window_out_of_its_turn_or_of_a_job_that_is_not_in_work_is_refused(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    job = work_on(desk.ledger, 1)
    for seq, number in ((job.seq, 0), (job.seq, 2), (2, 0), (99, 0)):
        with pytest.raises(
            IllegalTransitionError, match=f"number {seq} is not processing, or window {number} is not its next"
        ):
            desk.ledger.add_window(seq, window(number))
    assert desk.ledger.windows(job.seq) == (window(0),)
    assert desk.ledger.windows(2) == desk.ledger.windows(99) == ()


def test_windows_of_another_audio_are_dropped_and_the_work_begins_at_the_first(desk: Desk) -> None:
    desk.ledger.append([request("a", formats=("srt",)), request("b")])
    job = claimed(desk.ledger)
    assert desk.ledger.keep_windows_of(job.seq, "one"), "there are none"
    for number in range(2):
        desk.ledger.add_window(job.seq, window(number), identity="one")
    claimed(desk.crash())
    assert desk.ledger.keep_windows_of(job.seq, "one")
    assert desk.ledger.windows(job.seq) == (window(0), window(1))
    assert not desk.ledger.keep_windows_of(job.seq, "another")
    for _ in range(2):
        assert (desk.ledger.windows(job.seq), desk.ledger.resume_position_s(job.seq)) == ((), 0.0)
        assert stored_windows(desk.ledger) == 0
        desk.crash()
    silence = Window(0, 30.0, "", None, None, ())
    claimed(desk.ledger)
    desk.ledger.add_window(job.seq, silence, identity="another")
    assert desk.ledger.keep_windows_of(job.seq, "another")
    desk.ledger.complete(job.seq, replace(result(2), windows=(silence, window(1))))
    assert desk.crash().windows(job.seq) == (silence, window(1))


def test_a_single_window_of_another_audio_is_dropped_as_well(desk: Desk) -> None:
    desk.ledger.append([request("a", formats=("srt",))])
    job = claimed(desk.ledger)
    desk.ledger.add_window(job.seq, window(0), identity="one")
    assert not desk.ledger.keep_windows_of(job.seq, "another")
    assert desk.ledger.windows(job.seq) == ()


def test_windows_of_an_audio_that_nobody_noted_are_not_taken_for_those_of_this_one(desk: Desk) -> None:
    """An earlier version wrote them."""
    accept(desk.ledger, "a")
    job = work_on(desk.ledger, 2)
    assert not desk.crash().keep_windows_of(job.seq, "one")
    assert stored_windows(desk.ledger) == 0


def test_windows_that_the_disk_does_not_let_go_are_still_there(desk: Desk) -> None:
    accept(desk.ledger, "a")
    job = work_on(desk.ledger, 2)
    disk = FaultyDisk()
    desk.crash(disk)
    disk.fault = failing(times=1)
    with pytest.raises(LedgerError):
        desk.ledger.keep_windows_of(job.seq, "one")
    assert desk.ledger.windows(job.seq) == (window(0), window(1))
    disk.heal()
    assert not desk.ledger.keep_windows_of(job.seq, "one")


def test_a_window_is_one_transaction_and_nothing_to_tell(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    accept(desk.ledger, "a")
    job = claimed(desk.ledger)
    publish_all(desk.ledger)
    disk.calls.clear()
    desk.ledger.add_window(job.seq, window(0))
    assert disk.calls == ["write", "sync_data"]
    assert not desk.ledger.has_unpublished


@pytest.mark.parametrize("formats", [("srt",), ("txt",), ("json", "txt")])
@pytest.mark.parametrize("written", [0, 2, 3])
def test_a_completed_job_keeps_all_its_windows_when_its_formats_need_them(
    desk: Desk, formats: tuple[str, ...], written: int
) -> None:
    desk.ledger.append([request("a", formats=formats)])
    job = work_on(desk.ledger, written)
    desk.ledger.complete(job.seq, result(3))
    for _ in range(2):
        assert desk.ledger.windows(job.seq) == (window(0), window(1), window(2))
        desk.crash()
    assert known(desk.ledger, "a").formats == formats


def test_a_completed_job_leaves_no_windows_when_nothing_needs_them(desk: Desk) -> None:
    desk.ledger.append([request("a")])
    job = work_on(desk.ledger, 2)
    desk.ledger.complete(job.seq, result(3))
    for _ in range(2):
        assert desk.ledger.windows(job.seq) == ()
        assert stored_windows(desk.ledger) == 0
        assert desk.ledger._index.windows == {}, "not even that there are none takes memory"
        desk.crash()


def test_a_result_of_fewer_windows_than_were_written_leaves_no_others(desk: Desk) -> None:
    desk.ledger.append([request("a", formats=("srt",))])
    job = work_on(desk.ledger, 3)
    desk.ledger.complete(job.seq, result(1))
    for _ in range(2):
        assert desk.ledger.windows(job.seq) == (window(0),)
        assert stored_windows(desk.ledger) == 1
        desk.crash()


@pytest.mark.parametrize("code", ErrorCode)
def test_a_failure_keeps_the_windows_if_a_retry_may_help(desk: Desk, code: ErrorCode) -> None:
    accept(desk.ledger, "a")
    job = work_on(desk.ledger, 2)
    desk.ledger.fail(job.seq, code, "It failed.")
    for _ in range(2):
        assert len(desk.ledger.windows(job.seq)) == stored_windows(desk.ledger) == (2 if code.retryable else 0)
        desk.crash()


def test_the_windows_of_other_jobs_stay_when_a_job_goes(desk: Desk) -> None:
    desk.ledger.append([request(name, "spool", formats=("srt",)) for name in "abc"])
    for _ in range(3):
        desk.ledger.complete(claimed(desk.ledger).seq, result(2))
    desk.ledger.delete("b")
    assert [len(desk.ledger.windows(seq)) for seq in (1, 2, 3)] == [2, 0, 2]
    desk.ledger.delete_finished(before=0.0, keep=1)
    for _ in range(2):
        assert [len(desk.ledger.windows(seq)) for seq in (1, 2, 3)] == [0, 0, 2]
        assert stored_windows(desk.ledger) == 2
        desk.crash()


def test_windows_that_belong_to_nobody_are_dropped_at_the_next_start(desk: Desk) -> None:
    """A salvaged ledger may have them; the next window of that number would be mixed with what was there."""
    accept(desk.ledger, "a", "b")
    job = work_on(desk.ledger, 1)
    orphans = [window_id(job.seq, 2), window_id(2, 1), window_id(7, 0)]
    desk.ledger._commit([Change("windows", doc_id, window_document(window(5))) for doc_id in orphans])
    ledger = desk.crash()
    assert (stored_windows(ledger), ledger.windows(job.seq), ledger.windows(2)) == (1, (window(0),), ())
    silence = Window(1, 60.0, "", None, None, ())
    claimed(ledger)
    ledger.add_window(job.seq, silence)
    ledger.add_window(job.seq, window(2))
    assert desk.crash().windows(job.seq) == (window(0), silence, window(2))
    assert [accepted.seq for accepted in accept(desk.ledger, "c")] == [3]


def test_the_words_of_an_hour_take_little_memory(desk: Desk) -> None:
    accept(desk.ledger, "a")
    job = claimed(desk.ledger)
    words = tuple(Word(round(n / 3, 3), round(n / 3 + 0.25, 3), " hello", 0.987) for n in range(150))
    for number in range(6):
        segments = tuple(Segment(10 * number + n, 0.0, 60.0, " hello" * 150, -0.3, 0.01, words) for n in range(10))
        desk.ledger.add_window(job.seq, Window(number, 600.0, " hello" * 1500, "en", 0.9, segments))
    rows = desk.crash()._storage.rows("windows").values()
    assert sum(sys.getsizeof(value) for row in rows for value in row.values()) < 500_000
    assert len(desk.ledger.windows(job.seq)[5].segments) == 10


# -- what people ask for ------------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once_and_those_behind_it_move_up(desk: Desk) -> None:
    desk.ledger.append([request("a", "spool"), request("b"), request("c")])
    publish_all(desk.ledger)
    job = desk.ledger.cancel("a")
    assert job is not None
    assert (job.state, job.completed_at, job.queue_position) == (JobState.CANCELLED, desk.clock.now, None)
    told = {job.job_id: (job.state, job.queue_position) for job in publish_all(desk.ledger)}
    assert told == {"a": ("cancelled", None), "b": ("queued", 1), "c": ("queued", 2)}
    for _ in range(2):
        assert (desk.ledger.totals().cancelled_total, desk.ledger.totals().queued) == (1, 2)
        assert desk.ledger.needed_spool_files() == {"a.wav"}, "it may be retried"
        assert desk.ledger.last_finished() == job
        desk.crash()
    assert [claimed(desk.ledger).job_id for _ in range(2)] == ["b", "c"]


def test_a_job_in_work_goes_on_until_the_worker_has_ended_it(desk: Desk) -> None:
    desk.ledger.append([request("a", "spool")])
    job = work_on(desk.ledger, 1)
    assert not desk.ledger.is_cancelling(job.seq)
    asked = desk.ledger.cancel("a")
    assert asked is not None
    assert (asked.state, asked.completed_at) == (JobState.PROCESSING, None)
    assert desk.ledger.is_cancelling(job.seq)
    desk.ledger.add_window(job.seq, window(1))
    desk.clock.now += 1
    desk.ledger.finish_cancelling(job.seq)
    for _ in range(2):
        ended = known(desk.ledger, "a")
        assert (ended.state, ended.attempt, ended.completed_at) == (JobState.CANCELLED, 1, desk.clock.now)
        assert not desk.ledger.is_cancelling(job.seq)
        assert desk.ledger.needed_spool_files() == {"a.wav"}
        assert len(desk.ledger.windows(job.seq)) == 2, "a retry goes on behind them"
        desk.crash()


def test_a_job_that_is_cancelled_twice_touches_the_disk_once(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    accept(desk.ledger, "a")
    claimed(desk.ledger)
    desk.ledger.cancel("a")
    disk.calls.clear()
    assert desk.ledger.cancel("a") is not None
    assert disk.calls == []


@pytest.mark.parametrize("leave", ["crash", "crash again", "restart", "requeue", "defer"])
def test_a_job_whose_end_was_asked_for_is_never_worked_on_again(desk: Desk, leave: str) -> None:
    desk.ledger.append([request("a", "spool"), request("b")])
    job = work_on(desk.ledger, 1)
    publish_all(desk.ledger)
    desk.ledger.cancel("a")
    if leave == "requeue":
        desk.ledger.requeue(job.seq)
    elif leave == "defer":
        desk.ledger.defer(job.seq, 5.0)
    elif leave == "crash again":
        with pytest.raises(LedgerError):
            desk.crash(FaultyDisk(failing(only="sync_data")))
        desk.open()
    else:
        getattr(desk, leave)()
    ended = known(desk.ledger, "a")
    assert (ended.state, ended.crashes, ended.retries) == (JobState.CANCELLED, 0, 0)
    assert desk.ledger.totals().cancelled_total == 1
    assert ("a", "cancelled") in [(job.job_id, job.state) for _, job in desk.ledger.unpublished(10)]
    assert len(desk.ledger.windows(job.seq)) == 1
    assert claimed(desk.ledger).job_id == "b"
    assert desk.ledger.claim() is None


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_job_that_ends_by_itself_before_it_is_cancelled_has_ended_so(desk: Desk, end: str) -> None:
    accept(desk.ledger, "a")
    job = claimed(desk.ledger)
    desk.ledger.cancel("a")
    OPERATIONS[end](desk.ledger, job.seq)
    with pytest.raises(IllegalTransitionError):
        desk.ledger.finish_cancelling(job.seq)
    for _ in range(2):
        assert known(desk.ledger, "a").state is (JobState.COMPLETED if end == "complete" else JobState.ERROR)
        assert not desk.ledger.is_cancelling(job.seq)
        desk.crash()


def end_as(ledger: Ledger, state: str) -> None:
    """Bring the oldest job into a state."""
    if state == "cancelled":
        ledger.finish_cancelling(claimed(ledger).seq)
    elif state == "completed":
        ledger.complete(claimed(ledger).seq, RESULT)
    elif state == "processing":
        claimed(ledger)
    elif state != "queued":
        ledger.fail(claimed(ledger).seq, ErrorCode(state), "It failed.")


@pytest.mark.parametrize("state", ["completed", "timeout", "cancelled"])
def test_what_has_ended_cannot_be_cancelled_and_the_refusal_says_so(desk: Desk, state: str) -> None:
    accept(desk.ledger, "a")
    end_as(desk.ledger, state)
    before = picture(desk.ledger)
    ended = "error" if state == "timeout" else state
    with pytest.raises(
        IllegalTransitionError, match=rf"^Job a has already ended as {ended} and cannot be cancelled\.$"
    ):
        desk.ledger.cancel("a")
    assert picture(desk.ledger) == before


def test_nobody_can_be_asked_of_a_job_that_there_is_not(desk: Desk) -> None:
    ledger = desk.ledger
    assert (ledger.cancel("a"), ledger.retry("a"), ledger.delete("a"), ledger.get("a")) == (None, None, None, None)


RETRIES = [
    ("path", "queued", "Job a is queued: only a job that ended as error or cancelled can be retried."),
    ("path", "processing", "Job a is processing: only a job that ended as error or cancelled can be retried."),
    ("spool", "completed", "Job a is completed: only a job that ended as error or cancelled can be retried."),
    ("spool", "audio_empty", "The audio of job a was not kept, since a retry cannot fix audio_empty."),
    ("spool", "refused", "Job a was rejected as invalid: correct the request and submit it under a new id."),
    ("path", "audio_not_found", None),
    ("url", "download_failed", None),
    ("spool", "timeout", None),
    ("spool", "cancelled", None),
    ("path", "cancelled", None),
]


@pytest.mark.parametrize(("kind", "state", "refusal"), RETRIES)
def test_a_job_is_retried_if_that_makes_sense(desk: Desk, kind: str, state: str, refusal: str | None) -> None:
    if state == "refused":
        desk.ledger.append([NewJob("a", "x", None, "base", failure="No such field.")])
    else:
        desk.ledger.append([request("a", kind)])
        end_as(desk.ledger, state)
    if refusal is None:
        retried = desk.ledger.retry("a")
        assert retried is not None
        assert retried.state is JobState.QUEUED
        return
    before = picture(desk.ledger)
    with pytest.raises(IllegalTransitionError) as raised:
        desk.ledger.retry("a")
    assert str(raised.value) == refusal
    assert picture(desk.ledger) == before


def test_a_retried_job_is_as_if_it_had_just_come_but_for_its_attempts(desk: Desk) -> None:
    fields: dict[str, Any] = {"options": {"beam_size": 2}, "metadata": {"x": 1}, "formats": ("srt",), "stream": True}
    desk.ledger.append([request("a", "spool", **fields)])
    for _ in range(3):
        work_on(desk.ledger, 2)
        desk.crash()
    assert known(desk.ledger, "a").error_code is ErrorCode.CRASHED
    desk.ledger.retry("a")
    for _ in range(2):
        job = known(desk.ledger, "a")
        assert (job.state, job.attempt, job.crashes, job.retries) == (JobState.QUEUED, 3, 0, 0)
        assert (job.started_at, job.completed_at, job.error_code, job.error_message) == (None, None, None, None)
        assert (job.options, job.metadata, job.formats, job.stream) == tuple(fields.values())
        assert desk.ledger.totals().error_total == 1, "it counts how often jobs have ended so"
        assert desk.ledger.last_finished() is None
        desk.crash()
    assert claimed(desk.ledger).attempt == 4
    desk.crash()
    assert known(desk.ledger, "a").state is JobState.QUEUED, "crashes of before the retry do not count"


def test_a_retried_job_is_tried_again_as_often_by_itself_as_a_new_one(desk: Desk) -> None:
    accept(desk.ledger, "a")
    for _ in range(2):
        desk.ledger.defer(claimed(desk.ledger).seq, 0.0)
    desk.ledger.fail(claimed(desk.ledger).seq, ErrorCode.DOWNLOAD_FAILED, "It did not answer.")
    assert known(desk.ledger, "a").retries == 2
    desk.ledger.retry("a")
    assert known(desk.ledger, "a").retries == 0


@pytest.mark.parametrize("back", ["requeue", "defer", "crash"])
def test_a_job_that_waits_again_has_not_been_started(desk: Desk, back: str) -> None:
    accept(desk.ledger, "a")
    job = claimed(desk.ledger)
    assert job.started_at == desk.clock.now
    if back == "crash":
        desk.crash()
    elif back == "defer":
        desk.ledger.defer(job.seq, 5.0)
    else:
        assert desk.ledger.requeue(job.seq).started_at is None
    assert known(desk.ledger, "a").started_at is None


@pytest.mark.parametrize("kind", ["spool", "path", "url"])
@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_a_retry_goes_on_behind_the_windows_of_audio_that_is_surely_the_same(desk: Desk, kind: str, end: str) -> None:
    desk.ledger.append([request("a", kind)])
    job = work_on(desk.ledger, 2)
    if end == "cancelled":
        desk.ledger.finish_cancelling(job.seq)
    else:
        desk.ledger.fail(job.seq, ErrorCode.TIMEOUT, "Too slow.")
    desk.ledger.retry("a")
    for _ in range(2):
        assert len(desk.ledger.windows(job.seq)) == stored_windows(desk.ledger) == (2 if kind == "spool" else 0)
        desk.crash()
    work_on(desk.ledger, 3)


def test_a_retried_job_takes_the_place_that_its_number_gives_it(desk: Desk) -> None:
    accept(desk.ledger, *"abcdef")
    for name in ("b", "d", "f"):
        desk.ledger.cancel(name)
    desk.ledger.fail(claimed(desk.ledger).seq, ErrorCode.TIMEOUT, "Too slow.")
    publish_all(desk.ledger)
    places = []
    for name in ("d", "a", "f", "b"):
        job = desk.ledger.retry(name)
        assert job is not None
        places.append(job.queue_position)
    assert places == [2, 1, 5, 2]
    newest = {job.job_id: job.queue_position for job in publish_all(desk.ledger)}
    assert newest == {name: place for place, name in enumerate("abcdef", start=1)}
    assert [claimed(desk.ledger).job_id for _ in range(6)] == list("abcdef")


def test_a_job_that_is_retried_far_back_in_the_queue_has_a_position_as_well(desk: Desk) -> None:
    """Only the first ten were given theirs, so that this one was queued with a position of null."""
    accept(desk.ledger, *(f"job-{number}" for number in range(30)))
    for number in (20, 29):
        desk.ledger.cancel(f"job-{number}")
    publish_all(desk.ledger)
    for number in (29, 20):
        desk.ledger.retry(f"job-{number}")
    assert {job.job_id: job.queue_position for job in publish_all(desk.ledger)} == {"job-29": 29, "job-20": 21}
    assert known(desk.crash(), "job-20").queue_position == 21


def test_a_retried_job_is_not_what_a_job_was_that_waits_for_a_moment(desk: Desk) -> None:
    desk.restart(monotonic=desk.clock)
    accept(desk.ledger, "a", "b")
    desk.ledger.defer(claimed(desk.ledger).seq, 1e6)
    desk.ledger.cancel("a")
    desk.ledger.retry("a")
    assert claimed(desk.ledger).job_id == "a"


def test_a_waiting_job_that_is_deleted_lets_those_behind_it_move_up_and_frees_its_id(desk: Desk) -> None:
    desk.ledger.append([request("a", "spool", packet_id=3, has_generated_id=True), request("b")])
    publish_all(desk.ledger)
    deleted = desk.ledger.delete("a")
    assert deleted is not None
    job, files = deleted
    assert (job.job_id, job.state, job.queue_position, files) == ("a", JobState.QUEUED, 1, ["a.wav"])
    assert [(job.job_id, job.queue_position) for job in publish_all(desk.ledger, cleared=False)] == [("b", 1)]
    for _ in range(2):
        assert (desk.ledger.get("a"), desk.ledger.totals().queued) == (None, 1)
        assert [gone.job_id for gone in desk.ledger.pending_clears(10)] == ["a"]
        assert (desk.ledger.needed_spool_files(), desk.ledger.count()) == (set(), 1)
        desk.crash()
    assert verdicts(desk.ledger, request("a", fingerprint="other")) == ["accepted"]
    assert [claimed(desk.ledger).job_id for _ in range(2)] == ["b", "a"]


@pytest.mark.parametrize("state", ["completed", "timeout", "cancelled"])
def test_a_job_that_has_ended_can_be_deleted(desk: Desk, state: str) -> None:
    desk.ledger.append([request("a", "spool")])
    end_as(desk.ledger, state)
    totals = desk.ledger.totals()
    deleted = desk.ledger.delete("a")
    assert deleted is not None
    assert deleted[1] == ["a.wav"]
    assert (desk.ledger.get("a"), desk.ledger.last_finished(), desk.ledger.delete("a")) == (None, None, None)
    assert desk.crash().totals() == replace(totals, deleted_total=1)


def test_a_job_in_work_cannot_be_deleted(desk: Desk) -> None:
    accept(desk.ledger, "a")
    job = work_on(desk.ledger, 1)
    for _ in range(2):
        with pytest.raises(IllegalTransitionError, match=r"^Job a is processing: cancel it first\.$"):
            desk.ledger.delete("a")
        desk.ledger.cancel("a")
    desk.ledger.finish_cancelling(job.seq)
    assert desk.ledger.delete("a") is not None


def gone(ledger: Ledger) -> list[tuple[int, tuple[str, ...], bool]]:
    return [(gone.seq, gone.formats, gone.owns_status) for gone in ledger.pending_clears(10)]


def test_the_results_of_a_deleted_job_are_cleared_also_when_a_new_job_bears_its_id(desk: Desk) -> None:
    ledger = desk.ledger
    ledger.append([request("a", formats=("txt", "srt"))])
    finish(ledger, 1)
    ledger.delete("a")
    assert gone(ledger) == [(1, ("txt", "srt"), True)]
    ledger.append([request("a", formats=("json",))])
    for _ in range(2):
        assert gone(desk.ledger) == [(1, ("txt", "srt"), False)], "the status is the new job's"
        desk.crash()
    ledger = desk.ledger
    ledger.delete("a")
    assert gone(ledger) == [(1, ("txt", "srt"), False), (2, ("json",), True)]
    ledger.mark_cleared(1)
    ledger.append([request("a")])
    for _ in range(2):
        assert gone(desk.ledger) == [(2, ("json",), False)]
        desk.crash()
    desk.ledger.delete("a")
    desk.ledger.mark_cleared(2)
    desk.ledger.mark_cleared(2)
    assert gone(desk.ledger) == [(3, (), True)]
    desk.ledger.append([request("a")])
    assert gone(desk.ledger) == [(3, (), False)], "nobody has been told yet that it is deleted"
    desk.ledger.mark_cleared(3)
    desk.ledger.append([request("b")])
    for _ in range(2):
        assert gone(desk.ledger) == []
        kept = desk.ledger._storage.rows("gone").values()
        assert [row["cleared"] for row in kept] == [True, True], "the results, for a broker that goes back"
        desk.crash()


def test_what_was_deleted_is_cleared_again_at_a_broker_that_went_back_also_after_a_crash(desk: Desk) -> None:
    """It is killed, and comes back with what it had saved before the deletions."""
    accept(desk.ledger, "a", "b", "c")
    for name in "abc":
        desk.ledger.delete(name)
    for seq in (1, 2):
        desk.ledger.mark_cleared(seq)
    desk.ledger.republish_all()
    assert [gone.job_id for gone in desk.ledger.pending_clears(10)] == ["c"], (
        "a broker that has lost everything shows nothing old"
    )
    desk.crash().republish_all(restored=True)
    for _ in range(2):
        pending = sorted(desk.ledger.pending_clears(10), key=lambda gone: gone.seq)
        assert [(gone.job_id, gone.event_pending) for gone in pending] == [("a", False), ("b", False), ("c", True)]
        desk.crash()


def test_a_new_job_with_the_id_of_one_that_was_cleared_is_not_cleared_with_it(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    for seq, name in enumerate("ab", start=1):
        desk.ledger.delete(name)
        desk.ledger.mark_cleared(seq)
    accept(desk.ledger, "a")
    desk.ledger.republish_all(restored=True)
    for _ in range(2):
        assert [gone.job_id for gone in desk.ledger.pending_clears(10)] == ["b"]
        desk.crash()


def test_a_retained_request_that_comes_again_after_its_job_was_deleted_is_not_done_again(desk: Desk) -> None:
    """MQTT 3.1.1 sends what is retained at every connect, and retention had deleted the job meanwhile."""
    live = request("uuid", has_generated_id=True, fingerprint="f")
    again = request("retained-f", has_generated_id=True, retained=True, fingerprint="f")
    desk.ledger.append([live])
    desk.ledger.delete("uuid")
    for _ in range(2):
        assert desk.ledger.append([again]) == [(Admission.DUPLICATE, "uuid")]
        desk.ledger.mark_cleared(1)
        desk.ledger.append([request("other")])
        desk.crash()
    assert desk.ledger.append([request("uuid-2", has_generated_id=True, fingerprint="f")])[0][0] is Admission.ACCEPTED
    assert desk.ledger.append([again]) == [(Admission.DUPLICATE, "uuid-2")]


def test_of_what_the_broker_has_forgotten_no_more_is_kept_on_disk_than_may_be(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.ledger.tombstones.CLEARED_KEPT", 2)
    for number, job in enumerate(accept(desk.ledger, *"abcde"), start=1):
        desk.ledger.delete(job.job_id)
        desk.ledger.mark_cleared(number)
    accept(desk.ledger, "f")
    assert sorted(desk.ledger._storage.rows("gone")) == ["4", "5"]
    desk.crash().republish_all(restored=True)
    assert [gone.job_id for gone in desk.ledger.pending_clears(10)] == ["d", "e"]


def test_that_no_packet_id_can_come_again_is_on_disk_at_once(desk: Desk) -> None:
    """After a crash right then, another message with that packet id was taken for a redelivery, and lost."""
    desk.ledger.append([delivered("old", 7)])
    desk.ledger.release_all_packet_ids()
    desk.crash()
    assert verdicts(desk.ledger, redelivered("new", 7)) == [Admission.ACCEPTED]


def test_that_no_packet_id_can_come_again_reaches_the_disk_when_it_takes_it(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    desk.ledger.append([delivered("old", 7)])
    disk.fault = failing(times=float("inf"))
    desk.ledger.release_all_packet_ids()
    disk.heal()
    desk.restart()
    assert verdicts(desk.ledger, redelivered("new", 7)) == [Admission.ACCEPTED]


def test_a_deferred_job_that_was_cancelled_meanwhile_is_not_put_off_when_it_is_retried(desk: Desk) -> None:
    desk.restart(monotonic=desk.clock)
    accept(desk.ledger, "a")
    job = claimed(desk.ledger)
    desk.ledger.cancel("a")
    desk.ledger.defer(job.seq, 3600.0)
    assert known(desk.ledger, "a").state is JobState.CANCELLED
    desk.ledger.retry("a")
    assert claimed(desk.ledger).job_id == "a"


def stored(ledger: Ledger, table: str) -> int:
    return len(ledger._storage.rows(table))


@pytest.mark.parametrize("leave", ["stay", "crash", "restart"])
def test_a_paused_ledger_hands_out_no_job_until_it_is_resumed(desk: Desk, leave: str) -> None:
    desk.ledger.pause(on=True)
    accept(desk.ledger, "a")
    if leave != "stay":
        getattr(desk, leave)()
    ledger = desk.ledger
    assert ledger.totals().paused
    assert ledger.claim() is None
    assert not ledger.wait_for_work(lambda: False, 0.0)
    assert [job.job_id for job in ledger.upcoming(5)] == ["a"], "its audio may be prepared meanwhile"
    ledger.pause(on=False)
    assert ledger.wait_for_work(lambda: False, 0.0)
    assert not desk.crash().totals().paused
    assert claimed(desk.ledger).job_id == "a"


def test_a_pause_lets_the_job_in_work_go_on(desk: Desk) -> None:
    accept(desk.ledger, "a", "b")
    job = claimed(desk.ledger)
    desk.ledger.pause(on=True)
    desk.ledger.add_window(job.seq, window(0))
    desk.ledger.complete(job.seq, RESULT)
    assert desk.ledger.claim() is None


def test_a_pause_of_what_is_paused_touches_nothing(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    for on in (True, False):
        desk.ledger.pause(on=on)
        disk.calls.clear()
        seen: list[bool] = []
        desk.ledger.observe(lambda seen=seen: seen.append(True))  # type: ignore[misc]
        desk.ledger.pause(on=on)
        assert (disk.calls, seen) == ([], [])


# -- looking ------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_in_the_order_of_acceptance_page_by_page(desk: Desk) -> None:
    accept(desk.ledger, *(f"job-{number}" for number in range(10)))
    finish(desk.ledger, 2)
    desk.ledger.cancel("job-7")
    desk.ledger.delete("job-4")
    claimed(desk.ledger)
    for _ in range(2):
        pages, after = [], 0
        while page := desk.ledger.jobs(after=after, limit=3):
            pages.append([job.seq for job in page])
            after = page[-1].seq
        assert pages == [[1, 2, 3], [4, 6, 7], [8, 9, 10]]
        desk.crash(max_attempts=9)
        claimed(desk.ledger)
    listed = {state: [job.seq for job in desk.ledger.jobs(states=[state])] for state in JobState}
    assert listed == {"queued": [4, 6, 7, 9, 10], "processing": [3], "completed": [1, 2], "error": [], "cancelled": [8]}
    ended = [JobState.COMPLETED, JobState.CANCELLED]
    assert [job.seq for job in desk.ledger.jobs(states=ended, after=1, limit=5)] == [2, 8]
    assert (desk.ledger.count(), desk.ledger.count(ended), desk.ledger.count([JobState.QUEUED])) == (9, 3, 5)
    assert desk.ledger.jobs(limit=0) == []
    assert desk.ledger.jobs(after=10) == desk.ledger.jobs(after=10**12) == []


def test_a_list_takes_no_longer_for_the_numbers_of_jobs_that_are_gone(desk: Desk) -> None:
    """It once looked for every number that had ever been given out."""
    accept(desk.ledger, "old")
    desk.ledger._commit([Change("counters", 1, {"last_seq": 10**12})])
    accept(desk.crash(), "new")
    assert [(job.job_id, job.seq) for job in desk.ledger.jobs()] == [("old", 1), ("new", 10**12 + 1)]


def test_what_comes_next_is_known_in_order_without_what_is_put_off(desk: Desk) -> None:
    desk.restart(monotonic=desk.clock)
    accept(desk.ledger, *"abcde")
    desk.ledger.defer(claimed(desk.ledger).seq, 10.0)
    claimed(desk.ledger)
    assert [job.job_id for job in desk.ledger.upcoming(2)] == ["c", "d"]
    assert [job.job_id for job in desk.ledger.upcoming(9)] == ["c", "d", "e"]
    desk.clock.now += 10.0
    assert [job.job_id for job in desk.ledger.upcoming(2)] == ["a", "c"]
    assert desk.ledger.upcoming(0) == []


def test_whoever_waits_for_work_waits_no_longer_than_it_wants(desk: Desk) -> None:
    assert not desk.ledger.wait_for_work(lambda: False, 0.01)
    assert not desk.ledger.wait_for_work(lambda: True, 1e6)
    accept(desk.ledger, "a")
    assert desk.ledger.wait_for_work(lambda: False, 0.0)
    assert not desk.ledger.wait_for_work(lambda: True, 0.0)


def test_whoever_waits_for_work_sleeps_through_a_pause(desk: Desk) -> None:
    """A job whose delay is over is no reason to look again and again."""
    accept(desk.ledger, "a")
    desk.ledger.defer(claimed(desk.ledger).seq, 0.0)
    desk.ledger.pause(on=True)
    looks = 0

    def stopped() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not desk.ledger.wait_for_work(stopped, 0.05)
    assert looks < 10


def test_whoever_waits_for_work_is_woken_when_a_pause_is_over(desk: Desk) -> None:
    desk.ledger.pause(on=True)
    accept(desk.ledger, "a")
    asked = threading.Semaphore(0)
    woken: list[bool] = []

    def stopped() -> bool:
        asked.release()
        return False

    waiting = threading.Thread(target=lambda: woken.append(desk.ledger.wait_for_work(stopped, 30.0)), daemon=True)
    waiting.start()
    assert asked.acquire(timeout=10)
    desk.ledger.pause(on=False)
    waiting.join(10)
    assert woken == [True]


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
    assert [job.queue_position for job in told[2:]] == list(range(1, POSITIONS_TRACKED + 1))
    assert {job.updated_at for job in told} == {desk.clock.now}
    beyond = desk.ledger.get("job-11")
    assert beyond is not None
    assert (beyond.queue_position, beyond.updated_at) == (12, desk.clock.now - 60), "as it was at updated_at"
    assert publish_all(desk.ledger) == []


def test_those_before_a_job_that_leaves_the_queue_keep_their_positions_and_are_not_told(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c", "d")
    publish_all(desk.ledger)
    desk.ledger.cancel("c")
    assert [(job.job_id, job.queue_position) for job in publish_all(desk.ledger)] == [("c", None), ("d", 3)]


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_a_job_far_back_in_the_queue_has_its_position_after_a_start(desk: Desk, leave: str) -> None:
    accept(desk.ledger, *(f"job-{number}" for number in range(1, POSITIONS_TRACKED + 3)))
    getattr(desk, leave)()
    assert [job.queue_position for job in desk.ledger.upcoming(100)] == list(range(1, POSITIONS_TRACKED + 3))


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
    assert desk.ledger.unpublished(100, exclude={1}) == [entry for entry in again if entry[1].job_id == "b"]
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
    assert desk.ledger.delete_finished(before=0.0, keep=0) == (1, [])
    finish(desk.ledger, 1)
    desk.ledger.mark_published([(job.seq, number) for number, job in desk.ledger.unpublished(100)])
    finish(desk.ledger, 1)
    desk.crash()
    assert names(desk.ledger.unpublished(10)) == ["c"]
    assert [gone.job_id for gone in desk.ledger.pending_clears(10)] == ["deleted"]


def test_a_job_that_moved_up_before_it_was_ever_told_is_told_after_a_crash(desk: Desk) -> None:
    """Its new position put it behind newer changes; the watermark then passed its own transaction, and it was lost."""
    accept(desk.ledger, *(f"job-{number}" for number in range(POSITIONS_TRACKED + 5)))
    finish(desk.ledger, 2)
    for number, job in desk.ledger.unpublished(100):
        if job.job_id in ("job-0", "job-1"):
            desk.ledger.mark_published([(job.seq, number)])
    desk.ledger.append([request("last"), request("job-5")])
    desk.crash()
    expected = {f"job-{number}" for number in range(2, POSITIONS_TRACKED + 5)} | {"last"}
    assert set(names(desk.ledger.unpublished(100))) >= expected


def test_everything_is_told_again_when_the_broker_has_lost_it(desk: Desk) -> None:
    accept(desk.ledger, "a", "b", "c")
    finish(desk.ledger, 2)
    publish_all(desk.ledger)
    desk.ledger.republish_all()
    assert names(desk.ledger.unpublished(10)) == ["a", "b", "c"]
    assert [job.job_id for job in publish_all(desk.ledger)] == ["a", "b", "c"]


def test_a_disk_that_refuses_does_not_keep_the_broker_from_being_told_everything_again(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    accept(desk.ledger, "a", "b")
    finish(desk.ledger, 2)
    publish_all(desk.ledger)
    disk.fault = failing(times=float("inf"))
    desk.ledger.republish_all()
    assert names(desk.ledger.unpublished(1)) == ["a"]
    disk.heal()
    accept(desk.ledger, "c")
    desk.crash()
    assert sorted(names(desk.ledger.unpublished(10))) == ["a", "b", "c"], "a crash in the middle of it does not end it"


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_a_start_in_the_middle_of_telling_everything_again_goes_on_with_it(desk: Desk, leave: str) -> None:
    """The broker's session is there again by then, so nobody would ask for it once more."""
    accept(desk.ledger, "a", "b", "c")
    finish(desk.ledger, 3)
    publish_all(desk.ledger)
    desk.ledger.republish_all()
    for number, job in desk.ledger.unpublished(2):
        desk.ledger.mark_published([(job.seq, number)])
    getattr(desk, leave)()
    assert "c" in names(desk.ledger.unpublished(10))


CHANGES: list[tuple[Callable[[Ledger], object], dict[str, str]]] = [
    (lambda ledger: accept(ledger, *"abc"), {"a": "queued", "b": "queued", "c": "queued"}),
    (lambda ledger: ledger.append([request("a")]), {}),
    (lambda ledger: ledger.count_rejected(), {}),
    (lambda ledger: ledger.claim(), {"a": "processing"}),
    (lambda ledger: ledger.complete(1, RESULT), {"a": "completed"}),
    (lambda ledger: ledger.claim(), {"b": "processing"}),
    (lambda ledger: ledger.cancel("b"), {}),
    (lambda ledger: ledger.finish_cancelling(2), {"b": "cancelled"}),
    (lambda ledger: ledger.retry("b"), {"b": "queued"}),
    (lambda ledger: ledger.pause(on=True), {}),
    (lambda ledger: ledger.delete_finished(before=0.0, keep=0), {"a": "gone"}),
    (lambda ledger: ledger.mark_cleared(1), {}),
    (lambda ledger: ledger.delete("c"), {"c": "gone"}),
    (lambda ledger: ledger.republish_all(), {}),
]


def test_observers_are_called_at_every_change_and_see_it(desk: Desk) -> None:
    """Who publishes sleeps until then: what nobody is told of would come with the next job only, or never."""
    seen: list[dict[str, str]] = []

    def look() -> None:
        jobs = {name: desk.ledger.get(name) for name in "abc"}
        seen.append({name: "gone" if job is None else job.state.value for name, job in jobs.items()})

    desk.ledger.observe(look)
    expected = dict.fromkeys("abc", "gone")
    for change, news in CHANGES:
        expected |= news
        seen.clear()
        change(desk.ledger)
        assert expected in seen


# -- a disk that refuses, a process that dies ---------------------------------------------------------------------


def picture(ledger: Ledger) -> tuple[object, ...]:
    """All that the ledger says of itself; first what no crash may change but for the steps that it interrupts."""
    return (
        (
            {name: ledger.get(name) for name in ledger._index.deduplication},
            {seq: ledger.windows(seq) for seq in range(1, ledger._index.last_seq + 1)},
            stored(ledger, "windows"),
            gone(ledger),
            [ledger.is_cancelling(seq) for seq in ledger.processing()],
            ledger.totals().paused,
        ),
        ledger.totals(),
        ledger.processing(),
        list(ledger._index.queue),
        list(ledger._outbox._pending),
        ledger.needed_spool_files(),
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
    lambda ledger: ledger.checkpoint_if_due(),
    lambda ledger: ledger.add_window(ledger.processing()[0], window(0)),
    lambda ledger: ledger.cancel("d"),
    lambda ledger: ledger.finish_cancelling(ledger.processing()[0]),
    lambda ledger: ledger.append([request("f", formats=("srt",)), request("s", "spool"), request("g")]),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.add_window(ledger.processing()[0], window(0)),
    lambda ledger: ledger.complete(ledger.processing()[0], result(3)),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.add_window(ledger.processing()[0], window(0)),
    lambda ledger: ledger.fail(ledger.processing()[0], ErrorCode.TIMEOUT, "Too slow."),
    lambda ledger: ledger.cancel("g"),
    lambda ledger: ledger.retry("s"),
    lambda ledger: ledger.retry("d"),
    lambda ledger: ledger.pause(on=True),
    lambda ledger: ledger.delete("f"),
    lambda ledger: ledger.pause(on=False),
    lambda ledger: ledger.append([request("f", formats=("vtt", "txt"))]),
    lambda ledger: ledger.delete("d"),
    lambda ledger: ledger.mark_cleared(4),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.complete(ledger.processing()[0], result(2)),
    lambda ledger: ledger.delete("f"),
    lambda ledger: ledger.checkpoint_if_due(),
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
    with pytest.raises(LedgerError, match="The journal is complete"):
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


def test_a_checkpoint_is_written_when_the_journal_has_outgrown_it_and_not_before(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs as much as there are jobs: written more often, each job would cost more the more there are."""
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 5000)
    disk = FaultyDisk()
    journal = desk.crash(disk)._storage
    sizes: list[int] = []
    number = 0
    while len(sizes) < 4:
        number += 1
        accept(desk.ledger, f"job-{number}")
        due = journal.journal_bytes >= max(5000, journal.checkpoint_bytes)
        disk.calls.clear()
        desk.ledger.checkpoint_if_due()
        assert bool(disk.calls) == due
        if due:
            sizes.append(journal.checkpoint_bytes)
            assert journal.journal_bytes < 100, "it begins anew"
    assert sizes[0] < 5000 * 2 < sizes[3], "it may grow with the checkpoint"


def test_upkeep_after_the_stop_leaves_the_files_to_whoever_has_them_now(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the closed ledger would have overwritten what the next process had written since."""
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    accept(desk.ledger, "a")
    old = desk.ledger
    old.close()
    monkeypatch.setattr(type(old._storage), "journal_bytes", property(lambda _self: 1 << 40))
    accept(desk.open(), "b")
    desk.ledger.checkpoint_if_due()
    content = desk.path.read_bytes()
    old.checkpoint_if_due()
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
            assert verdicts(self.ledger, *batch, batch[0]) == ["accepted"] * 3 + ["duplicate"]

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
            self.ledger.checkpoint_if_due()

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
    ledger.checkpoint_if_due()
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
    line = JobQueue([1, 2])
    line.delay(1, 5.0)
    assert line.next_ready_in(2.0, 0.0) == 3.0
    assert (list(line.all_ready(4.0, 0.0)), list(line.all_ready(5.0, 0.0))) == ([2], [1, 2])
    line.remove(1)
    line.delay(2, 20.0)
    assert list(line.all_ready(10.0, 0.0)) == []
    assert line.next_ready_in(10.0, 0.0) == 10.0
    line.delay(2, 5.0)
    assert line.next_ready_in(10.0, 0.0) == 0.0


def test_a_delay_is_as_long_as_it_is_whatever_the_clock_on_the_wall_says(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, slept = Clock(), []
    desk.restart(monotonic=passed)
    accept(desk.ledger, "a")
    desk.ledger.defer(claimed(desk.ledger).seq, 5.0)

    def sleep(timeout_s: float) -> None:
        slept.append(timeout_s)
        passed.now += timeout_s

    monkeypatch.setattr(desk.ledger._changed, "wait", sleep)
    desk.clock.now = 0.0
    assert desk.ledger.wait_for_work(lambda: False, 60.0)
    assert slept == [5.0]


def test_whoever_waits_is_woken_for_the_first_of_several_delayed_jobs() -> None:
    line = JobQueue([1, 2, 3])
    for seq, until in ((1, 30.0), (2, 20.0), (3, 40.0)):
        line.delay(seq, until)
    assert line.next_ready_in(10.0, 0.0) == 10.0


def test_a_delayed_job_that_is_no_longer_worth_starting_wakes_nobody() -> None:
    line = JobQueue([1])
    line.set_expiry(1, 50.0)
    line.delay(1, 5.0)
    assert line.next_ready_in(10.0, 49.0) == 0.0
    assert line.next_ready_in(10.0, 50.0) is None


def test_a_job_id_that_was_deleted_and_is_used_again_is_not_deleted_at_the_broker(desk: Desk) -> None:
    accept(desk.ledger, "a")
    finish(desk.ledger, 1)
    desk.ledger.delete_finished(before=0.0, keep=0)
    (again,) = accept(desk.ledger, "a")
    assert again.seq == 2
    for _ in range(2):
        assert gone(desk.ledger) == [(1, (), False)], "nobody has been told yet that it is deleted"
        desk.crash()
    desk.ledger.mark_cleared(1)
    accept(desk.ledger, "b")
    desk.ledger.republish_all(restored=True)
    for _ in range(2):
        assert gone(desk.ledger) == []
        assert stored(desk.ledger, "gone") == 0
        desk.crash()


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
from cesar_mqtt.ledger.ledger import Ledger
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
from cesar_mqtt.ledger import ledger as module
from cesar_mqtt.jobs import NewJob, Result
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.transcript import Segment, Window
module._CHECKPOINT_BYTES = 3000
ledger = Ledger(Path(sys.argv[1]))
start = ledger.totals().completed_total
windows = tuple(Window(n, n + 1.0, f" part {n}", "en", 0.5, (Segment(n, n, n + 1, "part", 0, 0),)) for n in range(3))
for number in range(start, start + 100_000):
    formats = ("srt",)[: number % 2]
    ledger.append([NewJob(f"{name}-{number}", "print", None, "base", formats=formats) for name in ("job", "other")])
    print(f"accepted job-{number}", flush=True)
    job = ledger.claim()
    for window in windows[len(ledger.windows(job.seq)) : 2]:
        ledger.add_window(job.seq, window)
        print(f"window-{window.number} {job.job_id}", flush=True)
    ledger.complete(job.seq, Result("text", 1.0, None, None, True, windows=windows))
    print(f"completed {job.job_id}", flush=True)
    ledger.checkpoint_if_due()
"""


def test_a_killed_process_keeps_every_promise_it_made(desk: Desk) -> None:
    desk.ledger.close()
    promised: list[tuple[str, str]] = []
    for lines in (5, 240, 123):
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
        done = job.state is JobState.COMPLETED
        assert done or promise != "completed", name
        windows = ledger.windows(job.seq)
        assert [window.text for window in windows] == [f" part {number}" for number in range(len(windows))]
        if done:
            assert len(windows) == (3 if job.formats else 0), name
        elif promise.startswith("window-"):
            assert len(windows) > int(promise.removeprefix("window-")), name
    completed = sum(promise == "completed" for promise, _ in promised)
    assert completed <= ledger.totals().completed_total <= completed + 3


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(LedgerError, match=r"The folder /sys cannot be written: \w+"):
        Ledger(Path("/sys/ledger.json"))


def test_a_damaged_ledger_gives_the_lock_back(desk: Desk) -> None:
    accept(desk.ledger, "a")
    desk.ledger.close()
    good = desk.path.read_bytes()
    desk.path.write_bytes(good[:-5])
    refusals = []  # each of them holds on to the ledger that could not be opened
    for _ in range(2):
        with pytest.raises(LedgerError, match="damaged") as refused:
            Ledger(desk.path)
        refusals.append(refused)
    desk.path.write_bytes(good)
    assert desk.open().get("a") is not None


def test_a_ledger_of_documents_that_nobody_understands_gives_the_lock_back(desk: Desk) -> None:
    desk.ledger.close()
    good = desk.path.read_bytes()
    checkpoint.save(Snapshot({"jobs": {"1": {"job_id": "of another program"}}}), desk.path, disk=QuickDisk())
    refusals = []
    for _ in range(2):
        with pytest.raises(KeyError) as refused:
            Ledger(desk.path)
        refusals.append(refused)
    desk.path.with_name("ledger.json.journal").unlink()
    desk.path.write_bytes(good)
    assert desk.open().jobs() == []


# -- jobs that expire ----------------------------------------------------------------------------------------------


def expiring(name: str, desk: Desk, seconds: float) -> NewJob:
    return request(name, expires_at=desk.clock.now + seconds)


@pytest.mark.parametrize("leave", ["stay", "crash", "restart"])
def test_a_job_that_could_not_start_in_time_is_never_started_and_ends_cancelled(desk: Desk, leave: str) -> None:
    desk.ledger.append([expiring("late", desk, 60.0), request("other"), expiring("early", desk, 3600.0)])
    assert desk.ledger.expire() == []
    if leave != "stay":
        getattr(desk, leave)()
    desk.clock.now += 61.0
    assert claimed(desk.ledger).job_id == "other", "not even before anybody has ended it"
    (expired,) = desk.ledger.expire()
    assert (expired.job_id, expired.state, expired.error_code) == ("late", JobState.CANCELLED, ErrorCode.EXPIRED)
    assert "expires_in" in (expired.error_message or "")
    assert expired.completed_at == desk.clock.now
    assert desk.ledger.expire() == []
    assert claimed(desk.ledger).job_id == "early"
    assert desk.ledger.totals().cancelled_total == 1


def test_at_no_moment_a_job_may_be_both_started_and_expired(desk: Desk) -> None:
    desk.ledger.append([expiring("a", desk, 60.0)])
    desk.clock.now += 60.0
    assert desk.ledger.claim() is None
    assert [job.job_id for job in desk.ledger.expire()] == ["a"]


def test_a_job_that_was_started_in_time_does_not_expire(desk: Desk) -> None:
    desk.ledger.append([expiring("a", desk, 60.0)])
    job = claimed(desk.ledger)
    desk.clock.now += 61.0
    assert desk.ledger.expire() == []
    desk.ledger.complete(job.seq, RESULT)
    assert desk.ledger.expire() == []


def test_a_job_that_is_put_back_too_late_expires(desk: Desk) -> None:
    desk.ledger.append([expiring("a", desk, 60.0)])
    claimed(desk.ledger)
    desk.clock.now += 61.0
    assert desk.ledger.expire() == []
    desk.crash()
    assert desk.ledger.claim() is None
    assert [job.job_id for job in desk.ledger.expire()] == ["a"]


@pytest.mark.parametrize("leave", ["stay", "crash", "restart"])
@pytest.mark.parametrize("end", ["expired", "failed"])
def test_a_retry_of_a_job_that_has_ended_has_all_the_time_in_the_world(desk: Desk, end: str, leave: str) -> None:
    desk.ledger.append([expiring("a", desk, 60.0)])
    if end == "failed":
        desk.ledger.fail(claimed(desk.ledger).seq, ErrorCode.DOWNLOAD_FAILED, "It did not answer.")
    desk.clock.now += 61.0
    desk.ledger.expire()
    if leave != "stay":
        getattr(desk, leave)()
    desk.ledger.retry("a")
    assert desk.ledger.expire() == []
    assert claimed(desk.ledger).job_id == "a"


def test_a_disk_that_refuses_leaves_expired_jobs_for_later(desk: Desk) -> None:
    disk = FaultyDisk()
    desk.crash(disk)
    desk.ledger.append([expiring(name, desk, 60.0) for name in "abc"])
    desk.clock.now += 61.0
    disk.fault = failing(times=float("inf"), skip=2)
    with pytest.raises(LedgerError):
        desk.ledger.expire()
    disk.heal()
    ended = [name for name in "abc" if known(desk.ledger, name).state is JobState.CANCELLED]
    assert len(ended) < 3
    left = [job.job_id for job in desk.ledger.expire()]
    assert ended + left == ["a", "b", "c"]


def test_a_thread_that_waits_for_work_is_not_woken_by_what_has_expired(desk: Desk) -> None:
    desk.ledger.append([expiring("a", desk, 60.0)])
    desk.clock.now += 61.0
    assert desk.ledger.wait_for_work(lambda: False, 0.01) is False
    assert desk.ledger.upcoming(10) == []


def test_a_job_that_is_put_back_again_and_again_expires_once(desk: Desk) -> None:
    desk.ledger.append([expiring("a", desk, 60.0), expiring("b", desk, 60.0)])
    for _ in range(50):
        desk.ledger.requeue(claimed(desk.ledger).seq)
    job = claimed(desk.ledger)
    desk.clock.now += 61.0
    assert [ended.job_id for ended in desk.ledger.expire()] == ["b"], "not the one in work"
    desk.ledger.requeue(job.seq)
    assert [ended.job_id for ended in desk.ledger.expire()] == ["a"]


def test_a_job_that_a_crash_has_ended_does_not_expire(desk: Desk) -> None:
    desk.ledger.append([expiring("a", desk, 60.0)])
    claimed(desk.ledger)
    desk.crash(max_attempts=1)
    desk.clock.now += 61.0
    assert desk.ledger.expire() == []
    assert known(desk.ledger, "a").error_code is ErrorCode.CRASHED


def test_times_of_jobs_that_wait_no_longer_do_not_pile_up() -> None:
    """They were kept until the jobs would have expired, which may be weeks."""
    line = JobQueue([])
    line.add(1)
    line.set_expiry(1, 5e8)
    for seq in range(2, 2000):
        line.add(seq)
        line.set_expiry(seq, 1e9)
        line.remove(seq)
        line.requeue(seq)
        line.remove(seq)
        line.drop_expiry(seq)
    assert len(line._expiries._heap) < 100
    assert line.expired(1e9, 10) == [1]
