"""The ledger by example: what the state machine in test_ledger_model does not assert.

Messages and fields, windows, the outbox, one fsync per transaction, a disk that fails, processes, threads and locks.
"""

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
from tests.conftest import PATIENCE_S
from tests.factories import new_job
from tests.unit.ledger.faults import FaultyDisk, Killed, QuickDisk, failing, killing

RESULT = Result("good morning", 2.5, "en", 0.98, no_speech=False, warnings=("half of it was noise",))


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


class LedgerFolder:
    """A folder with a ledger that can be stopped, killed and opened again."""

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
        """Open the ledger as after the death of its process."""
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
def folder(tmp_path: Path) -> Iterator[LedgerFolder]:
    made = LedgerFolder(tmp_path / "ledger.json")
    yield made
    made.close()


def names(jobs: list[tuple[int, Job]]) -> list[str]:
    return [job.job_id for _, job in jobs]


def publish_all(ledger: Ledger, *, cleared: bool = True) -> list[Job]:
    """Acknowledge every status, and every clear if `cleared`; return the published jobs."""
    for job in ledger.pending_clears(100) if cleared else ():
        ledger.mark_cleared(job.seq)
    published = []
    ledger.republish_moved()
    while handed := ledger.unpublished(100):
        published += [job for _, job in handed]
        ledger.mark_published([(job.seq, number) for number, job in handed])
    return published


def claim(ledger: Ledger) -> Job:
    job = ledger.claim()
    assert job is not None
    return job


def admissions(ledger: Ledger, *requests: NewJob) -> list[Admission]:
    return [admission for admission, _ in ledger.append(requests)]


def append(ledger: Ledger, *ids: str) -> list[Job]:
    return [get_job(ledger, job_id) for _, job_id in ledger.append([new_job(name) for name in ids])]


def get_job(ledger: Ledger, job_id: str) -> Job:
    job = ledger.get(job_id)
    assert job is not None
    return job


# -- order --------------------------------------------------------------------------------------------------------


def test_a_thousand_jobs_are_claimed_in_the_order_of_acceptance_whatever_the_clock_does(folder: LedgerFolder) -> None:
    expected = [f"job-{number}" for number in range(1000)]
    for start in range(0, 1000, 50):
        folder.clock.now -= 3600 if start % 100 else -10
        append(folder.ledger, *expected[start : start + 50])
        if start == 300:
            folder.crash()
        if start == 600:
            folder.restart()
    got = []
    while (job := folder.ledger.claim()) is not None:
        folder.clock.now -= 1
        got.append(job.job_id)
        folder.ledger.complete(job.seq, RESULT)
        if len(got) in (250, 500):
            folder.crash()
    assert got == expected


def test_a_sequence_number_is_never_used_again(folder: LedgerFolder) -> None:
    seqs = [job.seq for job in append(folder.ledger, "a", "b", "c")]
    assert seqs == [1, 2, 3]
    for again in (folder.crash, folder.restart):
        again()
        (job,) = append(folder.ledger, f"d-{again.__name__}")
        assert job.seq not in seqs
        seqs.append(job.seq)
        complete_jobs(folder.ledger, folder.ledger.totals().queued)
        folder.ledger.delete_finished(before=0.0, keep=0)


def test_a_batch_is_one_transaction_with_one_sync(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    disk.calls.clear()
    append(folder.ledger, *(f"job-{number}" for number in range(500)))
    assert [call for call in disk.calls if call != "reserve"] == ["write", "sync_data"]


def test_what_changes_nothing_does_not_touch_the_disk(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    append(folder.ledger, "a")
    disk.calls.clear()
    folder.ledger.append([new_job("a"), new_job("a", fingerprint="other")])
    publish_all(folder.ledger)
    folder.ledger.count_rejected()
    folder.ledger.totals()
    assert disk.calls == []


# -- admission ---------------------------------------------------------------------------------------------------


def test_the_same_id_is_the_same_job_or_a_conflict(folder: LedgerFolder) -> None:
    (first,) = append(folder.ledger, "a")
    publish_all(folder.ledger)
    (same, job), (conflict, other) = folder.ledger.append([new_job("a"), new_job("a", fingerprint="other")])
    assert (same, conflict) == (Admission.DUPLICATE, Admission.CONFLICT)
    assert job == other == "a"
    assert get_job(folder.ledger, "a") == first
    assert names(folder.ledger.unpublished(10)) == ["a"], "its status is published again, once"


def test_an_invalid_request_is_recorded_as_an_error_and_never_claimed(folder: LedgerFolder) -> None:
    assert admissions(folder.ledger, new_job("bad", failure="beam_size: at most 10.")) == [Admission.ACCEPTED]
    job = get_job(folder.ledger, "bad")
    assert (job.state, job.error_code, job.error_message) == (
        JobState.ERROR,
        ErrorCode.INVALID_REQUEST,
        "beam_size: at most 10.",
    )
    assert job.completed_at == folder.clock.now
    assert job.queue_position is None
    assert folder.ledger.claim() is None
    assert folder.ledger.totals().error_total == 1
    assert names(folder.ledger.unpublished(10)) == ["bad"]
    assert folder.crash().totals().error_total == 1


def redelivered(name: str, packet_id: int, fingerprint: str = "same") -> NewJob:
    return new_job(name, packet_id=packet_id, redelivered=True, fingerprint=fingerprint)


def delivered(name: str, packet_id: int, fingerprint: str = "same") -> NewJob:
    return new_job(name, packet_id=packet_id, fingerprint=fingerprint)


def test_a_full_queue_rejects_new_jobs_and_nothing_else(folder: LedgerFolder) -> None:
    ledger = folder.restart(max_queued=3)
    accepted, full = Admission.ACCEPTED, Admission.FULL
    wrong = new_job("wrong", failure="no")
    requests = [new_job("a"), wrong, new_job("b"), new_job("c"), new_job("d"), new_job("a"), new_job("d")]
    assert admissions(ledger, *requests) == [accepted, accepted, accepted, accepted, full, Admission.DUPLICATE, full]
    assert ledger.append([new_job("d")]) == [(full, "d")]
    assert admissions(ledger, new_job("b", fingerprint="x"), new_job("wrong too", failure="no")) == [
        "conflict",
        accepted,
    ]
    claim(ledger)
    assert admissions(ledger, new_job("d"), new_job("e")) == [accepted, full]
    assert ledger.get("e") is None


def test_queued_jobs_beyond_a_lowered_limit_are_kept(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b", "c")
    ledger = folder.restart(max_queued=1)
    assert admissions(ledger, new_job("d"), new_job("a")) == ["full", "duplicate"]
    assert [claim(ledger).job_id for _ in range(3)] == ["a", "b", "c"]


# -- transitions --------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Ledger, int], object]] = {
    "complete": lambda ledger, seq: ledger.complete(seq, RESULT),
    "fail": lambda ledger, seq: ledger.fail(seq, ErrorCode.INTERNAL, "It broke."),
    "requeue": lambda ledger, seq: ledger.requeue(seq),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("state", ["queued", "completed", "error", "requeued", "unknown", "refused"])
def test_an_illegal_transition_raises_and_changes_nothing(folder: LedgerFolder, operation: str, state: str) -> None:
    ledger = folder.ledger
    (job,) = append(ledger, "a")
    seq = job.seq
    if state == "unknown":
        seq = 99
    elif state == "refused":
        ledger.append([new_job("b", failure="no")])
        seq = 2
    elif state != "queued":
        claim(ledger)
        before = {"completed": "complete", "error": "fail", "requeued": "requeue"}[state]
        OPERATIONS[before](ledger, seq)
    earlier = (ledger.get("a"), ledger.get("b"), ledger.totals())
    with pytest.raises(IllegalTransitionError, match=rf"ob (number {seq}|[ab])\b"):
        OPERATIONS[operation](ledger, seq)
    assert (ledger.get("a"), ledger.get("b"), ledger.totals()) == earlier
    ledger = folder.crash()
    assert ledger.totals() == earlier[2]


def test_every_field_of_a_job_is_read_as_it_was_recorded(folder: LedgerFolder) -> None:
    folder.ledger.append(
        [new_job("a", options={"beam_size": 2}, metadata={"room": ["hall"]}), new_job("b"), new_job("c")]
    )
    start = folder.clock.now
    folder.clock.now += 5
    job = claim(folder.ledger)
    assert job.state is JobState.PROCESSING
    assert (job.attempt, job.created_at, job.started_at, job.updated_at) == (1, start, start + 5, start + 5)
    folder.clock.now += 5
    folder.ledger.complete(job.seq, RESULT)
    claim(folder.ledger)
    folder.ledger.fail(2, ErrorCode.AUDIO_EMPTY, "There is no sound.")
    folder.restart()
    done, failed, waiting = (folder.ledger.get(name) for name in "abc")
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
    assert folder.ledger.get("d") is None
    assert folder.ledger.last_finished(JobState.ERROR) == failed
    assert folder.ledger.last_finished(JobState.COMPLETED) == done


def test_jobs_share_nothing_mutable_with_the_ledger(folder: LedgerFolder) -> None:
    metadata = {"tags": ["a"]}
    folder.ledger.append([new_job("a", metadata=metadata)])
    metadata["tags"].append("from the producer")
    for job in (folder.ledger.get("a"), folder.ledger.unpublished(1)[0][1], folder.ledger.claim()):
        assert job is not None
        assert job.metadata == {"tags": ["a"]}
        job.metadata["tags"].append("from a reader")
    again = folder.crash().get("a")
    assert again is not None
    assert again.metadata == {"tags": ["a"]}


def test_totals_count_since_the_ledger_was_created(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b", "c", "d")
    start = folder.clock.now
    folder.clock.now += 60
    folder.ledger.complete(claim(folder.ledger).seq, RESULT)
    folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.INTERNAL, "no")
    working = claim(folder.ledger)
    folder.ledger.count_rejected()
    totals = folder.ledger.totals()
    assert (totals.queued, totals.completed_total, totals.error_total) == (1, 1, 1)
    assert (totals.cancelled_total, totals.rejected_total) == (0, 1)
    assert (totals.processing, totals.oldest_queued_at) == ("c", start)
    folder.ledger.complete(working.seq, RESULT)
    totals = folder.ledger.totals()
    assert folder.crash().totals() == totals
    folder.ledger.count_rejected()
    folder.ledger.count_rejected()
    assert folder.restart().totals().rejected_total == 3
    assert folder.ledger.processing() == ()


def test_needed_spool_files_are_those_of_unfinished_and_retryable_jobs(folder: LedgerFolder) -> None:
    kinds = {"done": "spool", "broken": "spool", "hopeless": "spool", "a": "spool", "b": "path"}
    folder.ledger.append([new_job(name, f"file of {name}", kind=kind) for name, kind in kinds.items()])
    folder.ledger.complete(claim(folder.ledger).seq, RESULT)
    folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.MODEL_UNAVAILABLE, "Later, perhaps.")
    folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.AUDIO_UNREADABLE, "Never.")
    assert folder.ledger.needed_spool_files() == {"file of broken", "file of a"}
    claim(folder.ledger)
    assert folder.crash().needed_spool_files() == {"file of broken", "file of a"}


# -- deferred jobs ------------------------------------------------------------------------------------------------


def test_a_deferred_job_keeps_its_position_while_the_next_ones_go_first(folder: LedgerFolder) -> None:
    folder.restart(monotonic=folder.clock)
    append(folder.ledger, "a", "b", "c")
    folder.ledger.defer(claim(folder.ledger).seq, 10.0)
    deferred = get_job(folder.ledger, "a")
    assert (deferred.state, deferred.queue_position) == (JobState.QUEUED, 1)
    assert (deferred.retries, deferred.crashes) == (1, 0)
    second = claim(folder.ledger)
    assert second.job_id == "b"
    folder.ledger.complete(second.seq, RESULT)
    folder.clock.now += 10.0
    again = claim(folder.ledger)
    assert (again.job_id, again.attempt) == ("a", 2)


def test_the_worker_waits_no_longer_than_the_delay_of_a_deferred_job(folder: LedgerFolder) -> None:
    folder.restart(monotonic=folder.clock)
    append(folder.ledger, "a")
    folder.ledger.defer(claim(folder.ledger).seq, 5.0)
    assert folder.ledger.claim() is None
    calls = 0

    def stopped() -> bool:
        nonlocal calls
        calls += 1
        folder.clock.now += 3.0
        return calls > 10

    assert folder.ledger.wait_for_work(stopped)
    assert calls < 10


def test_after_a_restart_a_deferred_job_is_ready_at_once(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    folder.ledger.defer(claim(folder.ledger).seq, 1e6)
    folder.restart(monotonic=folder.clock)
    assert claim(folder.ledger).retries == 1


def test_only_a_processing_job_can_be_deferred(folder: LedgerFolder) -> None:
    (job,) = append(folder.ledger, "a")
    with pytest.raises(IllegalTransitionError):
        folder.ledger.defer(job.seq, 1.0)
    folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.INTERNAL, "It failed.")
    with pytest.raises(IllegalTransitionError):
        folder.ledger.defer(job.seq, 1.0)


# -- windows ------------------------------------------------------------------------------------------------------


def work_on(ledger: Ledger, windows: int) -> Job:
    """Claim a job and store its first `windows` windows."""
    job = claim(ledger)
    for number in range(len(ledger.windows(job.seq)), windows):
        ledger.add_window(job.seq, window(number))
    return job


def stored_windows(ledger: Ledger) -> int:
    """The number of window documents of all jobs."""
    return len(ledger._storage.rows("windows"))


@pytest.mark.parametrize("leave", ["crash", "restart", "requeue", "defer"])
def test_the_next_attempt_continues_after_the_stored_windows(folder: LedgerFolder, leave: str) -> None:
    folder.restart(monotonic=folder.clock)
    append(folder.ledger, "a", "b")
    job = work_on(folder.ledger, 2)
    assert folder.ledger.windows(job.seq) == (window(0), window(1))
    if leave == "requeue":
        folder.ledger.requeue(job.seq)
    elif leave == "defer":
        folder.ledger.defer(job.seq, 5.0)
        folder.clock.now += 5.0
    else:
        getattr(folder, leave)()
    assert folder.ledger.windows(job.seq) == (window(0), window(1))
    assert (folder.ledger.resume_position_s(job.seq), folder.ledger.resume_position_s(2)) == (60.0, 0.0)
    assert work_on(folder.ledger, 3).job_id == "a"
    assert folder.crash().windows(job.seq) == (window(0), window(1), window(2))
    assert folder.ledger.windows(2) == ()


def test_a_window_out_of_order_or_of_a_job_that_is_not_processing_raises(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    job = work_on(folder.ledger, 1)
    for seq, number in ((job.seq, 0), (job.seq, 2), (2, 0), (99, 0)):
        with pytest.raises(
            IllegalTransitionError, match=f"number {seq} is not processing, or window {number} is not its next"
        ):
            folder.ledger.add_window(seq, window(number))
    assert folder.ledger.windows(job.seq) == (window(0),)
    assert folder.ledger.windows(2) == folder.ledger.windows(99) == ()


def test_windows_of_changed_audio_are_deleted_and_the_job_starts_again(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", formats=("srt",)), new_job("b")])
    job = claim(folder.ledger)
    assert folder.ledger.keep_windows_of(job.seq, "one"), "there are none"
    for number in range(2):
        folder.ledger.add_window(job.seq, window(number), identity="one")
    claim(folder.crash())
    assert folder.ledger.keep_windows_of(job.seq, "one")
    assert folder.ledger.windows(job.seq) == (window(0), window(1))
    assert not folder.ledger.keep_windows_of(job.seq, "another")
    for _ in range(2):
        assert (folder.ledger.windows(job.seq), folder.ledger.resume_position_s(job.seq)) == ((), 0.0)
        assert stored_windows(folder.ledger) == 0
        folder.crash()
    silence = Window(0, 30.0, "", None, None, ())
    claim(folder.ledger)
    folder.ledger.add_window(job.seq, silence, identity="another")
    assert folder.ledger.keep_windows_of(job.seq, "another")
    folder.ledger.complete(job.seq, replace(result(2), windows=(silence, window(1))))
    assert folder.crash().windows(job.seq) == (silence, window(1))


def test_a_single_window_of_changed_audio_is_deleted_too(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", formats=("srt",))])
    job = claim(folder.ledger)
    folder.ledger.add_window(job.seq, window(0), identity="one")
    assert not folder.ledger.keep_windows_of(job.seq, "another")
    assert folder.ledger.windows(job.seq) == ()


def test_windows_without_an_audio_identity_are_deleted(folder: LedgerFolder) -> None:
    """An earlier version did not store it."""
    append(folder.ledger, "a")
    job = work_on(folder.ledger, 2)
    assert not folder.crash().keep_windows_of(job.seq, "one")
    assert stored_windows(folder.ledger) == 0


def test_windows_are_kept_if_the_disk_fails_to_delete_them(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    job = work_on(folder.ledger, 2)
    disk = FaultyDisk()
    folder.crash(disk)
    disk.fault = failing(times=1)
    with pytest.raises(LedgerError):
        folder.ledger.keep_windows_of(job.seq, "one")
    assert folder.ledger.windows(job.seq) == (window(0), window(1))
    disk.heal()
    assert not folder.ledger.keep_windows_of(job.seq, "one")


def test_a_window_is_one_transaction_and_publishes_nothing(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    append(folder.ledger, "a")
    job = claim(folder.ledger)
    publish_all(folder.ledger)
    disk.calls.clear()
    folder.ledger.add_window(job.seq, window(0))
    assert disk.calls == ["write", "sync_data"]
    assert not folder.ledger.has_unpublished


@pytest.mark.parametrize("formats", [("srt",), ("txt",), ("json", "txt")])
@pytest.mark.parametrize("written", [0, 2, 3])
def test_a_completed_job_keeps_all_its_windows_when_its_formats_need_them(
    folder: LedgerFolder, formats: tuple[str, ...], written: int
) -> None:
    folder.ledger.append([new_job("a", formats=formats)])
    job = work_on(folder.ledger, written)
    folder.ledger.complete(job.seq, result(3))
    for _ in range(2):
        assert folder.ledger.windows(job.seq) == (window(0), window(1), window(2))
        folder.crash()
    assert get_job(folder.ledger, "a").formats == formats


def test_a_completed_job_without_formats_keeps_no_windows(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a")])
    job = work_on(folder.ledger, 2)
    folder.ledger.complete(job.seq, result(3))
    for _ in range(2):
        assert folder.ledger.windows(job.seq) == ()
        assert stored_windows(folder.ledger) == 0
        assert folder.ledger._index.windows == {}, "no entry is kept for no windows"
        folder.crash()


def test_a_result_with_fewer_windows_than_stored_deletes_the_others(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", formats=("srt",))])
    job = work_on(folder.ledger, 3)
    folder.ledger.complete(job.seq, result(1))
    for _ in range(2):
        assert folder.ledger.windows(job.seq) == (window(0),)
        assert stored_windows(folder.ledger) == 1
        folder.crash()


@pytest.mark.parametrize("code", ErrorCode)
def test_a_failure_keeps_the_windows_if_a_retry_may_help(folder: LedgerFolder, code: ErrorCode) -> None:
    append(folder.ledger, "a")
    job = work_on(folder.ledger, 2)
    folder.ledger.fail(job.seq, code, "It failed.")
    for _ in range(2):
        assert len(folder.ledger.windows(job.seq)) == stored_windows(folder.ledger) == (2 if code.retryable else 0)
        folder.crash()


def test_deleting_a_job_deletes_its_windows_and_no_others(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job(name, f"{name}.wav", kind="spool", formats=("srt",)) for name in "abc"])
    for _ in range(3):
        folder.ledger.complete(claim(folder.ledger).seq, result(2))
    folder.ledger.delete("b")
    assert [len(folder.ledger.windows(seq)) for seq in (1, 2, 3)] == [2, 0, 2]
    folder.ledger.delete_finished(before=0.0, keep=1)
    for _ in range(2):
        assert [len(folder.ledger.windows(seq)) for seq in (1, 2, 3)] == [0, 0, 2]
        assert stored_windows(folder.ledger) == 2
        folder.crash()


def test_orphaned_windows_are_deleted_at_the_next_start(folder: LedgerFolder) -> None:
    """A repaired ledger may have them; the next window with that number would be mixed up with an old one."""
    append(folder.ledger, "a", "b")
    job = work_on(folder.ledger, 1)
    orphans = [window_id(job.seq, 2), window_id(2, 1), window_id(7, 0)]
    folder.ledger._commit([Change("windows", doc_id, window_document(window(5))) for doc_id in orphans])
    ledger = folder.crash()
    assert (stored_windows(ledger), ledger.windows(job.seq), ledger.windows(2)) == (1, (window(0),), ())
    silence = Window(1, 60.0, "", None, None, ())
    claim(ledger)
    ledger.add_window(job.seq, silence)
    ledger.add_window(job.seq, window(2))
    assert folder.crash().windows(job.seq) == (window(0), silence, window(2))
    assert [accepted.seq for accepted in append(folder.ledger, "c")] == [3]


def test_the_words_of_an_hour_take_little_memory(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    job = claim(folder.ledger)
    words = tuple(Word(round(n / 3, 3), round(n / 3 + 0.25, 3), " hello", 0.987) for n in range(150))
    for number in range(6):
        segments = tuple(Segment(10 * number + n, 0.0, 60.0, " hello" * 150, -0.3, 0.01, words) for n in range(10))
        folder.ledger.add_window(job.seq, Window(number, 600.0, " hello" * 1500, "en", 0.9, segments))
    rows = folder.crash()._storage.rows("windows").values()
    assert sum(sys.getsizeof(value) for row in rows for value in row.values()) < 500_000
    assert len(folder.ledger.windows(job.seq)[5].segments) == 10


# -- commands ----------------------------------------------------------------------------------------------------


def test_cancelling_a_queued_job_ends_it_and_moves_the_next_ones_up(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", "a.wav", kind="spool"), new_job("b"), new_job("c")])
    publish_all(folder.ledger)
    job = folder.ledger.cancel("a")
    assert job is not None
    assert (job.state, job.completed_at, job.queue_position) == (JobState.CANCELLED, folder.clock.now, None)
    published = {job.job_id: (job.state, job.queue_position) for job in publish_all(folder.ledger)}
    assert published == {"a": ("cancelled", None), "b": ("queued", 1), "c": ("queued", 2)}
    for _ in range(2):
        assert (folder.ledger.totals().cancelled_total, folder.ledger.totals().queued) == (1, 2)
        assert folder.ledger.needed_spool_files() == {"a.wav"}, "a retry needs it"
        assert folder.ledger.last_finished(JobState.CANCELLED) == job
        folder.crash()
    assert [claim(folder.ledger).job_id for _ in range(2)] == ["b", "c"]


def test_a_processing_job_is_cancelled_only_when_the_worker_has_stopped_it(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", "a.wav", kind="spool")])
    job = work_on(folder.ledger, 1)
    assert not folder.ledger.is_cancelling(job.seq)
    asked = folder.ledger.cancel("a")
    assert asked is not None
    assert (asked.state, asked.completed_at) == (JobState.PROCESSING, None)
    assert folder.ledger.is_cancelling(job.seq)
    folder.ledger.add_window(job.seq, window(1))
    folder.clock.now += 1
    folder.ledger.finish_cancelling(job.seq)
    for _ in range(2):
        ended = get_job(folder.ledger, "a")
        assert (ended.state, ended.attempt, ended.completed_at) == (JobState.CANCELLED, 1, folder.clock.now)
        assert not folder.ledger.is_cancelling(job.seq)
        assert folder.ledger.needed_spool_files() == {"a.wav"}
        assert len(folder.ledger.windows(job.seq)) == 2, "a retry continues after them"
        folder.crash()


def test_cancelling_twice_writes_once(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    append(folder.ledger, "a")
    claim(folder.ledger)
    folder.ledger.cancel("a")
    disk.calls.clear()
    assert folder.ledger.cancel("a") is not None
    assert disk.calls == []


@pytest.mark.parametrize("leave", ["crash", "crash again", "restart", "requeue", "defer"])
def test_a_cancelling_job_is_never_started_again(folder: LedgerFolder, leave: str) -> None:
    folder.ledger.append([new_job("a", "a.wav", kind="spool"), new_job("b")])
    job = work_on(folder.ledger, 1)
    publish_all(folder.ledger)
    folder.ledger.cancel("a")
    if leave == "requeue":
        folder.ledger.requeue(job.seq)
    elif leave == "defer":
        folder.ledger.defer(job.seq, 5.0)
    elif leave == "crash again":
        with pytest.raises(LedgerError):
            folder.crash(FaultyDisk(failing(only="sync_data")))
        folder.open()
    else:
        getattr(folder, leave)()
    ended = get_job(folder.ledger, "a")
    assert (ended.state, ended.crashes, ended.retries) == (JobState.CANCELLED, 0, 0)
    assert folder.ledger.totals().cancelled_total == 1
    assert ("a", "cancelled") in [(job.job_id, job.state) for _, job in folder.ledger.unpublished(10)]
    assert len(folder.ledger.windows(job.seq)) == 1
    assert claim(folder.ledger).job_id == "b"
    assert folder.ledger.claim() is None


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_cancelling_job_that_ends_by_itself_keeps_that_state(folder: LedgerFolder, end: str) -> None:
    append(folder.ledger, "a")
    job = claim(folder.ledger)
    folder.ledger.cancel("a")
    OPERATIONS[end](folder.ledger, job.seq)
    with pytest.raises(IllegalTransitionError):
        folder.ledger.finish_cancelling(job.seq)
    for _ in range(2):
        assert get_job(folder.ledger, "a").state is (JobState.COMPLETED if end == "complete" else JobState.ERROR)
        assert not folder.ledger.is_cancelling(job.seq)
        folder.crash()


def end_as(ledger: Ledger, state: str) -> None:
    """Bring the oldest queued job into a state."""
    if state == "cancelled":
        ledger.finish_cancelling(claim(ledger).seq)
    elif state == "completed":
        ledger.complete(claim(ledger).seq, RESULT)
    elif state == "processing":
        claim(ledger)
    elif state != "queued":
        ledger.fail(claim(ledger).seq, ErrorCode(state), "It failed.")


@pytest.mark.parametrize("state", ["completed", "timeout", "cancelled"])
def test_cancelling_a_finished_job_raises_and_names_its_state(folder: LedgerFolder, state: str) -> None:
    append(folder.ledger, "a")
    end_as(folder.ledger, state)
    before = visible_state(folder.ledger)
    ended = "error" if state == "timeout" else state
    with pytest.raises(
        IllegalTransitionError, match=rf"^Job a has already ended as {ended} and cannot be cancelled\.$"
    ):
        folder.ledger.cancel("a")
    assert visible_state(folder.ledger) == before


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
def test_only_a_failed_or_cancelled_job_with_its_audio_can_be_retried(
    folder: LedgerFolder, kind: str, state: str, refusal: str | None
) -> None:
    if state == "refused":
        folder.ledger.append([new_job("a", None, failure="No such field.")])
    else:
        folder.ledger.append([new_job(kind=kind)])
        end_as(folder.ledger, state)
    if refusal is None:
        retried = folder.ledger.retry("a")
        assert retried is not None
        assert retried.state is JobState.QUEUED
        return
    before = visible_state(folder.ledger)
    with pytest.raises(IllegalTransitionError) as raised:
        folder.ledger.retry("a")
    assert str(raised.value) == refusal
    assert visible_state(folder.ledger) == before


def test_a_retried_job_is_like_a_new_one_except_for_its_attempts(folder: LedgerFolder) -> None:
    fields: dict[str, Any] = {"options": {"beam_size": 2}, "metadata": {"x": 1}, "formats": ("srt",), "stream": True}
    folder.ledger.append([new_job("a", "a.wav", kind="spool", **fields)])
    for _ in range(3):
        work_on(folder.ledger, 2)
        folder.crash()
    assert get_job(folder.ledger, "a").error_code is ErrorCode.CRASHED
    folder.ledger.retry("a")
    for _ in range(2):
        job = get_job(folder.ledger, "a")
        assert (job.state, job.attempt, job.crashes, job.retries) == (JobState.QUEUED, 3, 0, 0)
        assert (job.started_at, job.completed_at, job.error_code, job.error_message) == (None, None, None, None)
        assert (job.options, job.metadata, job.formats, job.stream) == tuple(fields.values())
        assert folder.ledger.totals().error_total == 1, "totals count ends, not jobs"
        assert folder.ledger.last_finished(JobState.ERROR) is None
        folder.crash()
    assert claim(folder.ledger).attempt == 4
    folder.crash()
    assert get_job(folder.ledger, "a").state is JobState.QUEUED, "crashes before the retry do not count"


def test_a_retry_resets_the_count_of_automatic_retries(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    for _ in range(2):
        folder.ledger.defer(claim(folder.ledger).seq, 0.0)
    folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.DOWNLOAD_FAILED, "It did not answer.")
    assert get_job(folder.ledger, "a").retries == 2
    folder.ledger.retry("a")
    assert get_job(folder.ledger, "a").retries == 0


@pytest.mark.parametrize("way", ["requeue", "defer", "crash"])
def test_a_requeued_job_has_no_start_time(folder: LedgerFolder, way: str) -> None:
    append(folder.ledger, "a")
    job = claim(folder.ledger)
    assert job.started_at == folder.clock.now
    if way == "crash":
        folder.crash()
    elif way == "defer":
        folder.ledger.defer(job.seq, 5.0)
    else:
        assert folder.ledger.requeue(job.seq).started_at is None
    assert get_job(folder.ledger, "a").started_at is None


@pytest.mark.parametrize("kind", ["spool", "path", "url"])
@pytest.mark.parametrize("end", ["timeout", "cancelled"])
def test_a_retry_keeps_the_windows_of_uploaded_audio_only(folder: LedgerFolder, kind: str, end: str) -> None:
    folder.ledger.append([new_job(kind=kind)])
    job = work_on(folder.ledger, 2)
    if end == "cancelled":
        folder.ledger.finish_cancelling(job.seq)
    else:
        folder.ledger.fail(job.seq, ErrorCode.TIMEOUT, "Too slow.")
    folder.ledger.retry("a")
    for _ in range(2):
        assert len(folder.ledger.windows(job.seq)) == stored_windows(folder.ledger) == (2 if kind == "spool" else 0)
        folder.crash()
    work_on(folder.ledger, 3)


def test_the_position_of_a_retried_job_follows_from_its_number(folder: LedgerFolder) -> None:
    append(folder.ledger, *"abcdef")
    for name in ("b", "d", "f"):
        folder.ledger.cancel(name)
    folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.TIMEOUT, "Too slow.")
    publish_all(folder.ledger)
    places = []
    for name in ("d", "a", "f", "b"):
        job = folder.ledger.retry(name)
        assert job is not None
        places.append(job.queue_position)
    assert places == [2, 1, 5, 2]
    newest = {job.job_id: job.queue_position for job in publish_all(folder.ledger)}
    assert newest == {name: place for place, name in enumerate("abcdef", start=1)}
    assert [claim(folder.ledger).job_id for _ in range(6)] == list("abcdef")


def test_a_job_retried_far_back_in_the_queue_has_a_position(folder: LedgerFolder) -> None:
    """Only the first ten got one, so this one was queued with a position of null."""
    append(folder.ledger, *(f"job-{number}" for number in range(30)))
    for number in (20, 29):
        folder.ledger.cancel(f"job-{number}")
    publish_all(folder.ledger)
    for number in (29, 20):
        folder.ledger.retry(f"job-{number}")
    assert {job.job_id: job.queue_position for job in publish_all(folder.ledger)} == {"job-29": 29, "job-20": 21}
    assert get_job(folder.crash(), "job-20").queue_position == 21


def test_a_retry_drops_the_delay_of_a_deferred_job(folder: LedgerFolder) -> None:
    folder.restart(monotonic=folder.clock)
    append(folder.ledger, "a", "b")
    folder.ledger.defer(claim(folder.ledger).seq, 1e6)
    folder.ledger.cancel("a")
    folder.ledger.retry("a")
    assert claim(folder.ledger).job_id == "a"


def test_deleting_a_queued_job_moves_the_next_ones_up_and_frees_its_id(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", "a.wav", kind="spool", packet_id=3, has_generated_id=True), new_job("b")])
    publish_all(folder.ledger)
    deleted = folder.ledger.delete("a")
    assert deleted is not None
    job, files = deleted
    assert (job.job_id, job.state, job.queue_position, files) == ("a", JobState.QUEUED, 1, ["a.wav"])
    assert [(job.job_id, job.queue_position) for job in publish_all(folder.ledger, cleared=False)] == [("b", 1)]
    for _ in range(2):
        assert (folder.ledger.get("a"), folder.ledger.totals().queued) == (None, 1)
        assert [deleted.job_id for deleted in folder.ledger.pending_clears(10)] == ["a"]
        assert (folder.ledger.needed_spool_files(), folder.ledger.count()) == (set(), 1)
        folder.crash()
    assert admissions(folder.ledger, new_job("a", fingerprint="other")) == ["accepted"]
    assert [claim(folder.ledger).job_id for _ in range(2)] == ["b", "a"]


@pytest.mark.parametrize("state", ["completed", "timeout", "cancelled"])
def test_a_finished_job_can_be_deleted(folder: LedgerFolder, state: str) -> None:
    folder.ledger.append([new_job("a", "a.wav", kind="spool")])
    end_as(folder.ledger, state)
    totals = folder.ledger.totals()
    deleted = folder.ledger.delete("a")
    assert deleted is not None
    assert deleted[1] == ["a.wav"]
    assert (folder.ledger.get("a"), folder.ledger.delete("a")) == (None, None)
    assert all(folder.ledger.last_finished(state) is None for state in JobState if state.final)
    assert folder.crash().totals() == replace(totals, deleted_total=1, revision=totals.revision + 1, retryable=0)


def test_a_processing_job_cannot_be_deleted(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    job = work_on(folder.ledger, 1)
    for _ in range(2):
        with pytest.raises(IllegalTransitionError, match=r"^Job a is processing: cancel it first\.$"):
            folder.ledger.delete("a")
        folder.ledger.cancel("a")
    folder.ledger.finish_cancelling(job.seq)
    assert folder.ledger.delete("a") is not None


def pending_clears(ledger: Ledger) -> list[tuple[int, tuple[str, ...], bool]]:
    return [(deleted.seq, deleted.formats, deleted.owns_status) for deleted in ledger.pending_clears(10)]


def test_results_of_a_deleted_job_are_cleared_even_if_a_new_job_has_its_id(folder: LedgerFolder) -> None:
    ledger = folder.ledger
    ledger.append([new_job("a", formats=("txt", "srt"))])
    complete_jobs(ledger, 1)
    ledger.delete("a")
    assert pending_clears(ledger) == [(1, ("txt", "srt"), True)]
    ledger.append([new_job("a", formats=("json",))])
    for _ in range(2):
        assert pending_clears(folder.ledger) == [(1, ("txt", "srt"), False)], "the status is the new job's"
        folder.crash()
    ledger = folder.ledger
    ledger.delete("a")
    assert pending_clears(ledger) == [(1, ("txt", "srt"), False), (2, ("json",), True)]
    ledger.mark_cleared(1)
    ledger.append([new_job("a")])
    for _ in range(2):
        assert pending_clears(folder.ledger) == [(2, ("json",), False)]
        folder.crash()
    folder.ledger.delete("a")
    folder.ledger.mark_cleared(2)
    folder.ledger.mark_cleared(2)
    assert pending_clears(folder.ledger) == [(3, (), True)]
    folder.ledger.append([new_job("a")])
    assert pending_clears(folder.ledger) == [(3, (), False)], "its event is pending"
    folder.ledger.mark_cleared(3)
    folder.ledger.append([new_job("b")])
    for _ in range(2):
        assert pending_clears(folder.ledger) == []
        kept = folder.ledger._storage.rows("gone").values()
        assert [row["cleared"] for row in kept] == [True] * 3, "for a broker that restores results or retains requests"
        folder.crash()


def test_deleted_jobs_are_cleared_again_when_the_broker_restored_an_older_state(folder: LedgerFolder) -> None:
    """It was killed and restored a state from before the deletions."""
    append(folder.ledger, "a", "b", "c")
    for name in "abc":
        folder.ledger.delete(name)
    for seq in (1, 2):
        folder.ledger.mark_cleared(seq)
    folder.ledger.republish_all()
    assert [deleted.job_id for deleted in folder.ledger.pending_clears(10)] == ["c"], (
        "a broker that has lost everything shows nothing old"
    )
    folder.crash().republish_all(restored=True)
    for _ in range(2):
        pending = sorted(folder.ledger.pending_clears(10), key=lambda deleted: deleted.seq)
        assert [(deleted.job_id, deleted.event_pending) for deleted in pending] == [
            ("a", False),
            ("b", False),
            ("c", True),
        ]
        folder.crash()


def test_a_new_job_with_the_id_of_a_cleared_one_is_not_cleared(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    for seq, name in enumerate("ab", start=1):
        folder.ledger.delete(name)
        folder.ledger.mark_cleared(seq)
    append(folder.ledger, "a")
    folder.ledger.republish_all(restored=True)
    for _ in range(2):
        assert [deleted.job_id for deleted in folder.ledger.pending_clears(10)] == ["b"]
        folder.crash()


def test_a_retained_request_whose_job_was_deleted_does_not_run_again(folder: LedgerFolder) -> None:
    """MQTT 3.1.1 sends retained messages at every connect, and retention had deleted the job in between."""
    live = new_job("uuid", has_generated_id=True, fingerprint="f")
    again = new_job("retained-f", has_generated_id=True, retained=True, fingerprint="f")
    folder.ledger.append([live])
    folder.ledger.delete("uuid")
    for _ in range(2):
        assert folder.ledger.append([again]) == [(Admission.DUPLICATE, "uuid")]
        folder.ledger.mark_cleared(1)
        folder.ledger.append([new_job("other")])
        folder.crash()
    assert folder.ledger.append([new_job("uuid-2", has_generated_id=True, fingerprint="f")])[0][0] is Admission.ACCEPTED
    assert folder.ledger.append([again]) == [(Admission.DUPLICATE, "uuid-2")]


def test_a_retained_request_with_an_id_does_not_run_again_after_its_job_was_deleted(folder: LedgerFolder) -> None:
    again = new_job("a", retained=True, fingerprint="f")
    folder.ledger.append([new_job("a", fingerprint="f")])
    folder.ledger.delete("a")
    for _ in range(2):
        assert folder.ledger.append([again]) == [(Admission.DUPLICATE, "a")]
        assert folder.ledger.get("a") is None
        folder.ledger.mark_cleared(1)
        folder.crash()
    other = new_job("a", retained=True, fingerprint="other")
    assert admissions(folder.ledger, new_job("b", retained=True, fingerprint="f"), other) == [Admission.ACCEPTED] * 2
    assert admissions(folder.ledger, again) == [Admission.DUPLICATE], "not a conflict with the newer job"
    folder.ledger.delete("a")
    assert admissions(folder.ledger, again, other) == [Admission.DUPLICATE] * 2
    assert folder.ledger.append([new_job("a", fingerprint="f")]) == [(Admission.ACCEPTED, "a")], "published on purpose"
    assert admissions(folder.ledger, again) == [Admission.DUPLICATE]


def test_a_rejected_request_that_is_retained_is_not_recorded_again(folder: LedgerFolder) -> None:
    folder.ledger.append([new_job("a", None, failure="wrong", retained=True)])
    folder.ledger.delete("a")
    assert admissions(folder.ledger, new_job("a", None, failure="wrong", retained=True)) == [Admission.DUPLICATE]
    assert folder.ledger.get("a") is None


@pytest.mark.parametrize("when", ["accepted", "known", "deleted"])
@pytest.mark.parametrize("has_id", [True, False])
def test_a_deleted_job_whose_request_was_seen_retained_is_remembered_longer(
    when: str, folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch, *, has_id: bool
) -> None:
    monkeypatch.setattr("cesar_mqtt.ledger.tombstones.CLEARED_KEPT", 2)
    live = new_job("a", fingerprint="f", has_generated_id=not has_id)
    retained = replace(live, retained=True)
    folder.ledger.append([retained if when == "accepted" else live])
    if when == "known":
        folder.ledger.append([retained])
        folder.crash()
    folder.ledger.delete("a")
    folder.ledger.mark_cleared(1)
    if when == "deleted":
        folder.ledger.append([retained])
        before = folder.ledger._storage.transaction
        folder.ledger.append([retained])
        assert folder.ledger._storage.transaction == before, "once is enough"
        folder.crash()
    for number, job in enumerate(append(folder.ledger, *"bcdefg"), start=2):
        folder.ledger.delete(job.job_id)
        folder.ledger.mark_cleared(number)
    folder.crash()
    assert admissions(folder.ledger, retained) == [Admission.DUPLICATE]
    assert admissions(folder.ledger, new_job("b", fingerprint="b", retained=True)) == [Admission.ACCEPTED], "forgotten"


def test_cleared_tombstones_on_disk_are_limited(folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.ledger.tombstones.CLEARED_KEPT", 2)
    for number, job in enumerate(append(folder.ledger, *"abcde"), start=1):
        folder.ledger.delete(job.job_id)
        folder.ledger.mark_cleared(number)
    append(folder.ledger, "f")
    assert sorted(folder.ledger._storage.rows("gone")) == ["4", "5"]
    folder.crash().republish_all(restored=True)
    assert [deleted.job_id for deleted in folder.ledger.pending_clears(10)] == ["d", "e"]


def test_releasing_all_packet_ids_is_on_disk_at_once(folder: LedgerFolder) -> None:
    """After a crash right then, a new message with that packet id was taken for a redelivery, and lost."""
    folder.ledger.append([delivered("old", 7)])
    folder.ledger.release_all_packet_ids()
    folder.crash()
    assert admissions(folder.ledger, redelivered("new", 7)) == [Admission.ACCEPTED]


def test_released_packet_ids_are_written_later_if_the_disk_fails(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    folder.ledger.append([delivered("old", 7)])
    disk.fault = failing(times=float("inf"))
    folder.ledger.release_all_packet_ids()
    disk.heal()
    folder.restart()
    assert admissions(folder.ledger, redelivered("new", 7)) == [Admission.ACCEPTED]


def test_a_cancelled_deferred_job_is_ready_at_once_after_a_retry(folder: LedgerFolder) -> None:
    folder.restart(monotonic=folder.clock)
    append(folder.ledger, "a")
    job = claim(folder.ledger)
    folder.ledger.cancel("a")
    folder.ledger.defer(job.seq, 3600.0)
    assert get_job(folder.ledger, "a").state is JobState.CANCELLED
    folder.ledger.retry("a")
    assert claim(folder.ledger).job_id == "a"


def row_count(ledger: Ledger, table: str) -> int:
    return len(ledger._storage.rows(table))


@pytest.mark.parametrize("leave", ["stay", "crash", "restart"])
def test_a_paused_ledger_starts_no_job_until_it_is_resumed(folder: LedgerFolder, leave: str) -> None:
    folder.ledger.pause(on=True)
    append(folder.ledger, "a")
    if leave != "stay":
        getattr(folder, leave)()
    ledger = folder.ledger
    assert ledger.totals().paused
    assert ledger.claim() is None
    assert not ledger.wait_for_work(lambda: False, 0.0)
    assert [job.job_id for job in ledger.upcoming(5)] == ["a"], "its audio may be prefetched meanwhile"
    ledger.pause(on=False)
    assert ledger.wait_for_work(lambda: False, 0.0)
    assert not folder.crash().totals().paused
    assert claim(folder.ledger).job_id == "a"


def test_a_pause_lets_the_running_job_continue(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    job = claim(folder.ledger)
    folder.ledger.pause(on=True)
    folder.ledger.add_window(job.seq, window(0))
    folder.ledger.complete(job.seq, RESULT)
    assert folder.ledger.claim() is None


def test_pausing_twice_writes_once(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    for on in (True, False):
        folder.ledger.pause(on=on)
        disk.calls.clear()
        seen: list[bool] = []
        folder.ledger.observe(lambda seen=seen: seen.append(True))  # type: ignore[misc]
        folder.ledger.pause(on=on)
        assert (disk.calls, seen) == ([], [])


# -- queries -----------------------------------------------------------------------------------------------------


def test_jobs_are_listed_oldest_first_page_by_page(folder: LedgerFolder) -> None:
    append(folder.ledger, *(f"job-{number}" for number in range(10)))
    complete_jobs(folder.ledger, 2)
    folder.ledger.cancel("job-7")
    folder.ledger.delete("job-4")
    claim(folder.ledger)
    for _ in range(2):
        pages, after = [], 0
        while page := folder.ledger.jobs(after=after, limit=3):
            pages.append([job.seq for job in page])
            after = page[-1].seq
        assert pages == [[1, 2, 3], [4, 6, 7], [8, 9, 10]]
        folder.crash(max_attempts=9)
        claim(folder.ledger)
    listed = {state: [job.seq for job in folder.ledger.jobs(states=[state])] for state in JobState}
    assert listed == {"queued": [4, 6, 7, 9, 10], "processing": [3], "completed": [1, 2], "error": [], "cancelled": [8]}
    ended = [JobState.COMPLETED, JobState.CANCELLED]
    assert [job.seq for job in folder.ledger.jobs(states=ended, after=1, limit=5)] == [2, 8]
    assert (folder.ledger.count(), folder.ledger.count(ended), folder.ledger.count([JobState.QUEUED])) == (9, 3, 5)
    assert folder.ledger.jobs(limit=0) == []
    assert folder.ledger.jobs(after=10) == folder.ledger.jobs(after=10**12) == []


def test_a_list_does_not_iterate_over_unused_sequence_numbers(folder: LedgerFolder) -> None:
    """It once iterated over every number that had ever been used."""
    append(folder.ledger, "old")
    folder.ledger._commit([Change("counters", 1, {"last_seq": 10**12})])
    append(folder.crash(), "new")
    assert [(job.job_id, job.seq) for job in folder.ledger.jobs()] == [("old", 1), ("new", 10**12 + 1)]


def test_upcoming_jobs_are_in_order_without_deferred_ones(folder: LedgerFolder) -> None:
    folder.restart(monotonic=folder.clock)
    append(folder.ledger, *"abcde")
    folder.ledger.defer(claim(folder.ledger).seq, 10.0)
    claim(folder.ledger)
    assert [job.job_id for job in folder.ledger.upcoming(2)] == ["c", "d"]
    assert [job.job_id for job in folder.ledger.upcoming(9)] == ["c", "d", "e"]
    folder.clock.now += 10.0
    assert [job.job_id for job in folder.ledger.upcoming(2)] == ["a", "c"]
    assert folder.ledger.upcoming(0) == []


def test_waiting_for_work_ends_at_the_timeout(folder: LedgerFolder) -> None:
    assert not folder.ledger.wait_for_work(lambda: False, 0.01)
    assert not folder.ledger.wait_for_work(lambda: True, 1e6)
    append(folder.ledger, "a")
    assert folder.ledger.wait_for_work(lambda: False, 0.0)
    assert not folder.ledger.wait_for_work(lambda: True, 0.0)


def test_waiting_for_work_sleeps_through_a_pause(folder: LedgerFolder) -> None:
    """A job whose delay is over must not cause polling."""
    append(folder.ledger, "a")
    folder.ledger.defer(claim(folder.ledger).seq, 0.0)
    folder.ledger.pause(on=True)
    looks = 0

    def stopped() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not folder.ledger.wait_for_work(stopped, 0.05)
    assert looks < 10


def test_waiting_for_work_wakes_when_a_pause_ends(folder: LedgerFolder) -> None:
    folder.ledger.pause(on=True)
    append(folder.ledger, "a")
    asked = threading.Semaphore(0)
    woken: list[bool] = []

    def stopped() -> bool:
        asked.release()
        return False

    waiting = threading.Thread(target=lambda: woken.append(folder.ledger.wait_for_work(stopped, 30.0)), daemon=True)
    waiting.start()
    assert asked.acquire(timeout=PATIENCE_S)
    folder.ledger.pause(on=False)
    waiting.join(PATIENCE_S)
    assert woken == [True]


# -- crashes ------------------------------------------------------------------------------------------------------


def test_the_third_crash_ends_a_job_as_crashed(folder: LedgerFolder) -> None:
    append(folder.ledger, "poison", "good")
    for attempt in (1, 2, 3):
        assert claim(folder.ledger).attempt == attempt
        folder.crash()
    job = folder.ledger.get("poison")
    assert job is not None
    assert (job.state, job.error_code, job.crashes) == (JobState.ERROR, ErrorCode.CRASHED, 3)
    assert job.completed_at is not None
    assert "3 times" in str(job.error_message)
    assert claim(folder.ledger).job_id == "good"
    assert folder.ledger.totals().error_total == 1
    assert folder.restart().totals().error_total == 1


def test_one_crash_is_enough_when_one_attempt_is_allowed(folder: LedgerFolder) -> None:
    folder.restart(max_attempts=1)
    append(folder.ledger, "a")
    claim(folder.ledger)
    job = folder.crash().get("a")
    assert job is not None
    assert job.error_code is ErrorCode.CRASHED


def test_a_recovery_that_the_disk_refuses_releases_the_lock_and_is_repeated(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    claim(folder.ledger)
    open_before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(LedgerError):
            folder.crash(FaultyDisk(failing(only="sync_data")))
    assert len(list(Path("/dev/fd").iterdir())) <= open_before
    job = folder.open().get("a")
    assert job is not None
    assert (job.state, job.crashes) == (JobState.QUEUED, 1)


# -- positions ----------------------------------------------------------------------------------------------------


def test_each_claim_republishes_the_first_ten_positions_and_no_others(folder: LedgerFolder) -> None:
    append(folder.ledger, *(f"job-{number}" for number in range(15)))
    assert [job.queue_position for job in publish_all(folder.ledger)] == list(range(1, 16))
    folder.clock.now += 60
    folder.ledger.complete(claim(folder.ledger).seq, RESULT)
    published = publish_all(folder.ledger)
    assert [job.job_id for job in published] == ["job-0", "job-0", *(f"job-{number}" for number in range(1, 11))]
    assert [job.queue_position for job in published[2:]] == list(range(1, POSITIONS_TRACKED + 1))
    assert {job.updated_at for job in published} == {folder.clock.now}
    beyond = folder.ledger.get("job-11")
    assert beyond is not None
    assert (beyond.queue_position, beyond.updated_at) == (12, folder.clock.now - 60), "the position of that time"
    assert publish_all(folder.ledger) == []


def test_jobs_before_a_removed_one_are_not_republished(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b", "c", "d")
    publish_all(folder.ledger)
    folder.ledger.cancel("c")
    assert [(job.job_id, job.queue_position) for job in publish_all(folder.ledger)] == [("c", None), ("d", 3)]


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_a_job_far_back_in_the_queue_has_its_position_after_a_start(folder: LedgerFolder, leave: str) -> None:
    append(folder.ledger, *(f"job-{number}" for number in range(1, POSITIONS_TRACKED + 3)))
    getattr(folder, leave)()
    assert [job.queue_position for job in folder.ledger.upcoming(100)] == list(range(1, POSITIONS_TRACKED + 3))


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_every_start_republishes_the_first_ten_positions(folder: LedgerFolder, leave: str) -> None:
    """Published positions are not on disk: a crash between a claim and its publications left them wrong."""
    append(folder.ledger, *(f"job-{number}" for number in range(15)))
    publish_all(folder.ledger)
    folder.ledger.complete(claim(folder.ledger).seq, RESULT)
    getattr(folder, leave)()
    published = {job.job_id: job.queue_position for job in publish_all(folder.ledger)}
    assert published == {"job-0": None} | {f"job-{number}": number for number in range(1, 11)}


# -- the outbox ---------------------------------------------------------------------------------------------------


def test_each_state_is_returned_once_and_in_order(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    job = claim(folder.ledger)
    folder.ledger.complete(job.seq, RESULT)
    handed = folder.ledger.unpublished(2) + folder.ledger.unpublished(2)
    states = [(job.job_id, job.state.value) for _, job in handed]
    assert states == [("a", "queued"), ("b", "queued"), ("a", "processing"), ("a", "completed")]


def test_an_unacknowledged_job_is_returned_again_in_its_newest_state(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    folder.ledger.complete(claim(folder.ledger).seq, RESULT)
    first = folder.ledger.unpublished(100)
    assert len(first) == 4
    again = folder.ledger.unpublished(100)
    assert sorted((job.job_id, job.state.value) for _, job in again) == [("a", "completed"), ("b", "queued")]
    assert folder.ledger.unpublished(100, exclude={1}) == [entry for entry in again if entry[1].job_id == "b"]
    assert folder.ledger.unpublished(1) == again[:1]


def test_after_coalescing_only_the_newest_states_are_published(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    folder.ledger.complete(claim(folder.ledger).seq, RESULT)
    folder.ledger.coalesce()
    published = [(job.job_id, job.state.value) for _, job in folder.ledger.unpublished(100)]
    assert sorted(published) == [("a", "completed"), ("b", "queued")]


def test_the_acknowledgement_of_an_older_state_does_not_count(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    ((old, _),) = folder.ledger.unpublished(1)
    job = claim(folder.ledger)
    folder.ledger.mark_published([(job.seq, old)])
    folder.ledger.mark_published([(99, 1)])
    assert folder.ledger.has_unpublished
    ((new, published),) = folder.ledger.unpublished(10)
    assert published.state is JobState.PROCESSING
    folder.ledger.mark_published([(job.seq, new)])
    folder.ledger.mark_published([(job.seq, new)])
    assert not folder.ledger.has_unpublished


def complete_jobs(ledger: Ledger, count: int) -> list[str]:
    done = []
    for _ in range(count):
        job = claim(ledger)
        ledger.complete(job.seq, RESULT)
        done.append(job.job_id)
    return done


def test_after_a_crash_states_acknowledged_before_the_last_transaction_are_not_republished(
    folder: LedgerFolder,
) -> None:
    append(folder.ledger, "a", "b", "c")
    complete_jobs(folder.ledger, 1)
    publish_all(folder.ledger)
    complete_jobs(folder.ledger, 1)
    folder.crash()
    folder.ledger.republish_moved()
    assert sorted(names(folder.ledger.unpublished(10))) == ["b", "c"], "c is among the first ten"


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_unacknowledged_states_are_published_after_a_restart(folder: LedgerFolder, leave: str) -> None:
    append(folder.ledger, "a", "b", "c")
    complete_jobs(folder.ledger, 3)
    for number, job in folder.ledger.unpublished(100):
        if job.job_id != "b":
            folder.ledger.mark_published([(job.seq, number)])
    append(folder.ledger, "d")
    getattr(folder, leave)()
    assert "b" in names(folder.ledger.unpublished(10))
    publish_all(folder.ledger)
    append(folder.ledger, "e")
    getattr(folder, leave)()
    assert "b" not in names(folder.ledger.unpublished(10))


def test_after_a_clean_stop_acknowledged_states_are_not_republished(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    complete_jobs(folder.ledger, 2)
    publish_all(folder.ledger)
    folder.restart()
    assert not folder.ledger.has_unpublished


def test_an_unpublished_deleted_job_does_not_hold_back_the_watermark(folder: LedgerFolder) -> None:
    append(folder.ledger, "deleted", "b", "c")
    complete_jobs(folder.ledger, 1)
    assert folder.ledger.delete_finished(before=0.0, keep=0) == (1, [])
    complete_jobs(folder.ledger, 1)
    folder.ledger.mark_published([(job.seq, number) for number, job in folder.ledger.unpublished(100)])
    complete_jobs(folder.ledger, 1)
    folder.crash()
    assert names(folder.ledger.unpublished(10)) == ["c"]
    assert [deleted.job_id for deleted in folder.ledger.pending_clears(10)] == ["deleted"]


def test_a_job_that_moved_up_before_it_was_published_is_published_after_a_crash(folder: LedgerFolder) -> None:
    """Its new position put it behind newer changes; the watermark passed its transaction, and the status was lost."""
    append(folder.ledger, *(f"job-{number}" for number in range(POSITIONS_TRACKED + 5)))
    complete_jobs(folder.ledger, 2)
    for number, job in folder.ledger.unpublished(100):
        if job.job_id in ("job-0", "job-1"):
            folder.ledger.mark_published([(job.seq, number)])
    folder.ledger.append([new_job("last"), new_job("job-5")])
    folder.crash()
    expected = {f"job-{number}" for number in range(2, POSITIONS_TRACKED + 5)} | {"last"}
    assert set(names(folder.ledger.unpublished(100))) >= expected


def test_every_status_is_republished_when_the_broker_lost_them(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b", "c")
    complete_jobs(folder.ledger, 2)
    publish_all(folder.ledger)
    folder.ledger.republish_all()
    assert names(folder.ledger.unpublished(10)) == ["a", "b", "c"]
    assert [job.job_id for job in publish_all(folder.ledger)] == ["a", "b", "c"]


def test_statuses_are_republished_even_if_the_disk_fails(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    append(folder.ledger, "a", "b")
    complete_jobs(folder.ledger, 2)
    publish_all(folder.ledger)
    disk.fault = failing(times=float("inf"))
    folder.ledger.republish_all()
    assert names(folder.ledger.unpublished(1)) == ["a"]
    disk.heal()
    append(folder.ledger, "c")
    folder.crash()
    assert sorted(names(folder.ledger.unpublished(10))) == ["a", "b", "c"], (
        "a crash in the middle of it does not end it"
    )


@pytest.mark.parametrize("leave", ["crash", "restart"])
def test_a_restart_continues_an_unfinished_republication(folder: LedgerFolder, leave: str) -> None:
    """The broker has its session again by then, so nothing else would start the republication."""
    append(folder.ledger, "a", "b", "c")
    complete_jobs(folder.ledger, 3)
    publish_all(folder.ledger)
    folder.ledger.republish_all()
    for number, job in folder.ledger.unpublished(2):
        folder.ledger.mark_published([(job.seq, number)])
    getattr(folder, leave)()
    assert "c" in names(folder.ledger.unpublished(10))


CHANGES: list[tuple[Callable[[Ledger], object], dict[str, str]]] = [
    (lambda ledger: append(ledger, *"abc"), {"a": "queued", "b": "queued", "c": "queued"}),
    (lambda ledger: ledger.append([new_job("a")]), {}),
    (lambda ledger: ledger.count_rejected(), {}),
    (lambda ledger: ledger.claim(), {"a": "processing"}),
    (lambda ledger: ledger.complete(1, RESULT), {"a": "completed"}),
    (lambda ledger: ledger.claim(), {"b": "processing"}),
    (lambda ledger: ledger.cancel("b"), {}),
    (lambda ledger: ledger.finish_cancelling(2), {"b": "cancelled"}),
    (lambda ledger: ledger.retry("b"), {"b": "queued"}),
    (lambda ledger: ledger.pause(on=True), {}),
    (lambda ledger: ledger.delete_finished(before=0.0, keep=0), {"a": "deleted"}),
    (lambda ledger: ledger.mark_cleared(1), {}),
    (lambda ledger: ledger.delete("c"), {"c": "deleted"}),
    (lambda ledger: ledger.republish_all(), {}),
]


def test_observers_are_called_at_every_change_and_see_it(folder: LedgerFolder) -> None:
    """The publisher sleeps until then: a change without a call would be published with the next job, or never."""
    seen: list[dict[str, str]] = []

    def look() -> None:
        jobs = {name: folder.ledger.get(name) for name in "abc"}
        seen.append({name: "deleted" if job is None else job.state.value for name, job in jobs.items()})

    folder.ledger.observe(look)
    expected = dict.fromkeys("abc", "deleted")
    for change, new_states in CHANGES:
        expected |= new_states
        seen.clear()
        change(folder.ledger)
        assert expected in seen


# -- a disk that fails, a process that dies -----------------------------------------------------------------------


def visible_state(ledger: Ledger) -> tuple[object, ...]:
    """Everything that can be observed of a ledger; the first item is what a crash must not change."""
    return (
        (
            {name: ledger.get(name) for name in ledger._index.deduplication},
            {seq: ledger.windows(seq) for seq in range(1, ledger._index.last_seq + 1)},
            row_count(ledger, "windows"),
            pending_clears(ledger),
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
    lambda ledger: ledger.append([new_job("a"), new_job("b", failure="no"), new_job("c"), new_job("a")]),
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
    lambda ledger: ledger.append([new_job("f", formats=("srt",)), new_job("s", "s.wav", kind="spool"), new_job("g")]),
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
    lambda ledger: ledger.append([new_job("f", formats=("vtt", "txt"))]),
    lambda ledger: ledger.delete("d"),
    lambda ledger: ledger.mark_cleared(4),
    lambda ledger: ledger.claim(),
    lambda ledger: ledger.complete(ledger.processing()[0], result(2)),
    lambda ledger: ledger.delete("f"),
    lambda ledger: ledger.checkpoint_if_due(),
]


def run_steps(folder: LedgerFolder, upto: int, disk: Disk | None = None) -> Ledger:
    """Create the ledger again and run its first steps."""
    for file in (folder.path, folder.path.with_name("ledger.json.journal")):
        file.unlink(missing_ok=True)
    ledger = folder.crash(disk)
    for step in STEPS[:upto]:
        step(ledger)
    return ledger


@pytest.mark.parametrize("times", [1, 2, 3, 4, float("inf")])
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_call_that_the_disk_refuses_changes_nothing_and_can_be_repeated(
    folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch, step: int, times: float
) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    after = visible_state(run_steps(folder, step + 1))
    after_crash = visible_state(folder.crash())
    for skip in range(6):
        disk = FaultyDisk()
        ledger = run_steps(folder, step, disk)
        before = visible_state(ledger)
        disk.fault = failing(skip=skip, times=times)
        try:
            STEPS[step](ledger)
        except LedgerError:
            assert visible_state(ledger) == before
            disk.heal()
            STEPS[step](ledger)
        assert visible_state(ledger) == after
        assert visible_state(folder.crash()) == after_crash


def test_a_failed_call_can_be_repeated_until_it_succeeds(folder: LedgerFolder) -> None:
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
    ledger = folder.crash(disk)
    stubborn(lambda: append(ledger, "a", "b"))
    stubborn(ledger.claim)
    stubborn(lambda: ledger.complete(1, RESULT))
    stubborn(ledger.claim)
    stubborn(lambda: ledger.requeue(2))
    disk.heal()
    ledger = folder.crash()
    a, b = ledger.get("a"), ledger.get("b")
    assert a is not None
    assert b is not None
    assert (a.state, a.attempt) == (JobState.COMPLETED, 1)
    assert (b.state, b.attempt, b.crashes) == (JobState.QUEUED, 1, 0)
    assert ledger.totals().completed_total == 1


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_process_that_dies_at_any_call_leaves_each_job_before_or_after_its_step(
    folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    possible = []
    for upto in (step, step + 1):
        run_steps(folder, upto)
        possible.append(visible_state(folder.crash())[0])
    for skip in range(20):
        disk = FaultyDisk()
        ledger = run_steps(folder, step, disk)
        disk.fault = killing(skip=skip)
        try:
            STEPS[step](ledger)
        except Killed:
            assert visible_state(folder.crash())[0] in possible
        else:
            assert visible_state(folder.crash())[0] == possible[1]
            break
    assert skip < 19


def test_a_close_that_the_disk_refuses_keeps_the_journal_and_releases_the_lock(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    ledger = folder.crash(disk)
    append(ledger, "a")
    disk.fault = failing(times=float("inf"))
    with pytest.raises(LedgerError, match="The journal is complete"):
        ledger.close()
    ledger.close()
    assert folder.open().get("a") is not None


def test_a_closed_ledger_rejects_changes_and_answers_queries(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    folder.ledger.close()
    for call in (lambda: append(folder.ledger, "b"), folder.ledger.claim):
        with pytest.raises(LedgerError, match="closed"):
            call()
    assert folder.ledger.get("a") is not None


def test_a_checkpoint_is_written_only_when_the_journal_has_outgrown_it(
    folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cost grows with the number of jobs: written more often, the cost of each job would grow, too."""
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 5000)
    disk = FaultyDisk()
    journal = folder.crash(disk)._storage
    sizes: list[int] = []
    number = 0
    while len(sizes) < 4:
        number += 1
        append(folder.ledger, f"job-{number}")
        due = journal.journal_bytes >= max(5000, journal.checkpoint_bytes)
        disk.calls.clear()
        folder.ledger.checkpoint_if_due()
        assert bool(disk.calls) == due
        if due:
            sizes.append(journal.checkpoint_bytes)
            assert journal.journal_bytes < 100, "the journal starts again"
    assert sizes[0] < 5000 * 2 < sizes[3], "it may grow with the checkpoint"


def test_a_checkpoint_after_close_does_not_touch_the_files(
    folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the closed ledger would have overwritten the changes of the next process."""
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)
    append(folder.ledger, "a")
    old = folder.ledger
    old.close()
    monkeypatch.setattr(type(old._storage), "journal_bytes", property(lambda _self: 1 << 40))
    append(folder.open(), "b")
    folder.ledger.checkpoint_if_due()
    content = folder.path.read_bytes()
    old.checkpoint_if_due()
    assert folder.path.read_bytes() == content


def test_stock_tinydb_reads_a_stopped_ledger(folder: LedgerFolder) -> None:
    append(folder.ledger, "a", "b")
    complete_jobs(folder.ledger, 1)
    folder.ledger.close()
    with TinyDB(folder.path, access_mode="r") as stock:
        (row,) = stock.table("jobs").search(Query().state == "completed")
        assert (row["job_id"], row["result_text"], row.doc_id) == ("a", "good morning", 1)
    names = sorted(file.name for file in folder.path.parent.iterdir())
    assert names == ["ledger.json", "ledger.json.lock", "ledger.reserve"]


# -- threads and processes ----------------------------------------------------------------------------------------


class Load:
    """Producers, workers, a publisher and the maintenance, in parallel on one ledger."""

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
            batch = [new_job(f"{name}-{number}-{n}") for n in range(3)]
            assert admissions(self.ledger, *batch, batch[0]) == ["accepted"] * 3 + ["duplicate"]

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
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_parallel_threads_lose_and_duplicate_nothing(folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 2000)
    load = Load(folder.ledger)
    load.run()
    assert load.failed == []
    assert len(load.done) == len(set(load.done)) == 360
    assert len(load.broker) == 360
    assert all(job.state is JobState.COMPLETED for job in load.broker.values())
    assert folder.path.stat().st_size > 2000, "there were checkpoints in between"
    before = visible_state(folder.ledger)
    assert visible_state(folder.crash())[:3] == before[:3]


def test_commits_while_a_checkpoint_is_written_are_kept(folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_BYTES", 0)

    class Visited(FaultyDisk):
        """Appends while the checkpoint is written, and before the journal is cut."""

        visits = 0

        def sync(self, descriptor: int) -> None:
            super().sync(descriptor)
            if self.calls.count("sync") <= 2:
                self.visits += 1
                visitor = threading.Thread(target=append, args=(ledger, f"during-{self.visits}"), daemon=True)
                visitor.start()
                visitor.join(PATIENCE_S)
                assert not visitor.is_alive(), "no thread waits for a checkpoint"

    disk = Visited()
    disk.calls = ["sync", "sync"]
    ledger = folder.crash(disk)
    append(ledger, *(f"job-{number}" for number in range(50)))
    disk.calls.clear()
    ledger.checkpoint_if_due()
    append(ledger, "after")
    assert disk.visits == 2
    assert '"checkpoint"' in folder.path.read_text()
    ledger = folder.crash()
    expected = [*(f"job-{number}" for number in range(50)), "during-1", "during-2", "after"]
    assert [claim(ledger).job_id for _ in range(ledger.totals().queued)] == expected


def test_a_thread_that_waits_for_work_is_woken_by_a_job_and_by_a_stop(folder: LedgerFolder) -> None:
    stop = threading.Event()
    woken: list[bool] = []
    ready = threading.Semaphore(0)

    def wait() -> None:
        for _ in range(2):
            woken.append(folder.ledger.wait_for_work(stop.is_set))
            folder.ledger.claim()
            ready.release()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    append(folder.ledger, "a")
    assert ready.acquire(timeout=PATIENCE_S)
    stop.set()
    folder.ledger.wake()
    waiting.join(PATIENCE_S)
    assert woken == [True, False]


def test_only_pending_delays_determine_when_the_next_job_is_ready() -> None:
    queue = JobQueue([(1, 0), (2, 0)])
    queue.delay(1, 5.0)
    assert queue.next_ready_in(2.0, 0.0) == 3.0
    assert (list(queue.all_ready(4.0, 0.0)), list(queue.all_ready(5.0, 0.0))) == ([2], [1, 2])
    queue.remove(1)
    queue.delay(2, 20.0)
    assert list(queue.all_ready(10.0, 0.0)) == []
    assert queue.next_ready_in(10.0, 0.0) == 10.0
    queue.delay(2, 5.0)
    assert queue.next_ready_in(10.0, 0.0) == 0.0


def test_delays_do_not_depend_on_the_wall_clock(folder: LedgerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    passed, slept = Clock(), []
    folder.restart(monotonic=passed)
    append(folder.ledger, "a")
    folder.ledger.defer(claim(folder.ledger).seq, 5.0)

    def sleep(timeout_s: float) -> None:
        slept.append(timeout_s)
        passed.now += timeout_s

    monkeypatch.setattr(folder.ledger._changed, "wait", sleep)
    folder.clock.now = 0.0
    assert folder.ledger.wait_for_work(lambda: False, 60.0)
    assert slept == [5.0]


def test_the_first_of_several_delays_ends_the_wait() -> None:
    queue = JobQueue([(1, 0), (2, 0), (3, 0)])
    for seq, until in ((1, 30.0), (2, 20.0), (3, 40.0)):
        queue.delay(seq, until)
    assert queue.next_ready_in(10.0, 0.0) == 10.0


def test_an_expired_delayed_job_does_not_end_the_wait() -> None:
    queue = JobQueue([(1, 0)])
    queue.set_expiry(1, 50.0)
    queue.delay(1, 5.0)
    assert queue.next_ready_in(10.0, 49.0) == 0.0
    assert queue.next_ready_in(10.0, 50.0) is None


def test_the_status_of_a_job_with_a_reused_id_is_not_cleared(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    complete_jobs(folder.ledger, 1)
    folder.ledger.delete_finished(before=0.0, keep=0)
    (again,) = append(folder.ledger, "a")
    assert again.seq == 2
    for _ in range(2):
        assert pending_clears(folder.ledger) == [(1, (), False)], "its event is pending"
        folder.crash()
    folder.ledger.mark_cleared(1)
    append(folder.ledger, "b")
    folder.ledger.republish_all(restored=True)
    for _ in range(2):
        assert pending_clears(folder.ledger) == []
        assert row_count(folder.ledger, "gone") == 1, "the request, which the broker may retain"
        folder.crash()


def test_any_thread_may_close_the_ledger(folder: LedgerFolder) -> None:
    """The lock was once released only if the thread that had acquired it closed the ledger."""
    closing = threading.Thread(target=folder.ledger.close)
    closing.start()
    closing.join(PATIENCE_S)
    folder.open()


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


def test_a_second_process_gets_ledger_in_use(folder: LedgerFolder) -> None:
    process = in_another_process(OPEN, str(folder.path))
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (75, "")
    assert output.startswith(f"LedgerInUseError The ledger {folder.path} is in use by another consumer.")
    with pytest.raises(LedgerInUseError):
        Ledger(folder.path)
    folder.ledger.close()
    process = in_another_process(OPEN, str(folder.path))
    assert process.wait(timeout=PATIENCE_S) == 0
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


def test_a_killed_process_keeps_every_promise_it_made(folder: LedgerFolder) -> None:
    folder.ledger.close()
    promised: list[tuple[str, str]] = []
    for lines in (5, 240, 123):
        process = in_another_process(ENDLESS, str(folder.path))
        assert process.stdout is not None
        promised += [tuple(process.stdout.readline().split()) for _ in range(lines)]  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        assert process.stderr is not None
        with process:  # `communicate` would lose what `readline` has buffered
            rest, errors = process.stdout.read(), process.stderr.read()
        assert "Traceback" not in errors
        promised += [tuple(line.split()) for line in rest.splitlines() if line.count(" ") == 1]  # type: ignore[misc]
    ledger = folder.open()
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
def test_a_folder_that_cannot_be_written_is_named_in_the_error() -> None:
    with pytest.raises(LedgerError, match=r"The folder /sys cannot be written: \w+"):
        Ledger(Path("/sys/ledger.json"))


def test_a_damaged_ledger_releases_the_lock(folder: LedgerFolder) -> None:
    append(folder.ledger, "a")
    folder.ledger.close()
    good = folder.path.read_bytes()
    folder.path.write_bytes(good[:-5])
    refusals = []  # each of them holds on to the ledger that could not be opened
    for _ in range(2):
        with pytest.raises(LedgerError, match="damaged") as refused:
            Ledger(folder.path)
        refusals.append(refused)
    folder.path.write_bytes(good)
    assert folder.open().get("a") is not None


def test_a_ledger_with_unreadable_documents_releases_the_lock(folder: LedgerFolder) -> None:
    folder.ledger.close()
    good = folder.path.read_bytes()
    foreign = Snapshot({"jobs": {"1": {"job_id": "of another program"}}}, is_complete=True)
    checkpoint.save(foreign, folder.path, disk=QuickDisk())
    refusals = []
    for _ in range(2):
        with pytest.raises(KeyError) as refused:
            Ledger(folder.path)
        refusals.append(refused)
    folder.path.with_name("ledger.json.journal").unlink()
    folder.path.write_bytes(good)
    assert folder.open().jobs() == []


# -- jobs that expire ----------------------------------------------------------------------------------------------


def expiring(name: str, folder: LedgerFolder, seconds: float) -> NewJob:
    return new_job(name, expires_at=folder.clock.now + seconds)


@pytest.mark.parametrize("leave", ["stay", "crash", "restart"])
def test_an_expired_job_is_never_started_and_ends_cancelled(folder: LedgerFolder, leave: str) -> None:
    folder.ledger.append([expiring("late", folder, 60.0), new_job("other"), expiring("early", folder, 3600.0)])
    assert folder.ledger.expire() == []
    if leave != "stay":
        getattr(folder, leave)()
    folder.clock.now += 61.0
    assert claim(folder.ledger).job_id == "other", "not even before `expire`"
    (expired,) = folder.ledger.expire()
    assert (expired.job_id, expired.state, expired.error_code) == ("late", JobState.CANCELLED, ErrorCode.EXPIRED)
    assert "expires_in" in (expired.error_message or "")
    assert expired.completed_at == folder.clock.now
    assert folder.ledger.expire() == []
    assert claim(folder.ledger).job_id == "early"
    assert folder.ledger.totals().cancelled_total == 1


def test_a_job_is_never_both_ready_and_expired(folder: LedgerFolder) -> None:
    folder.ledger.append([expiring("a", folder, 60.0)])
    folder.clock.now += 60.0
    assert folder.ledger.claim() is None
    assert [job.job_id for job in folder.ledger.expire()] == ["a"]


def test_a_job_that_was_started_in_time_does_not_expire(folder: LedgerFolder) -> None:
    folder.ledger.append([expiring("a", folder, 60.0)])
    job = claim(folder.ledger)
    folder.clock.now += 61.0
    assert folder.ledger.expire() == []
    folder.ledger.complete(job.seq, RESULT)
    assert folder.ledger.expire() == []


def test_a_job_requeued_after_its_expiry_expires(folder: LedgerFolder) -> None:
    folder.ledger.append([expiring("a", folder, 60.0)])
    claim(folder.ledger)
    folder.clock.now += 61.0
    assert folder.ledger.expire() == []
    folder.crash()
    assert folder.ledger.claim() is None
    assert [job.job_id for job in folder.ledger.expire()] == ["a"]


@pytest.mark.parametrize("leave", ["stay", "crash", "restart"])
@pytest.mark.parametrize("end", ["expired", "failed"])
def test_a_retried_job_does_not_expire(folder: LedgerFolder, end: str, leave: str) -> None:
    folder.ledger.append([expiring("a", folder, 60.0)])
    if end == "failed":
        folder.ledger.fail(claim(folder.ledger).seq, ErrorCode.DOWNLOAD_FAILED, "It did not answer.")
    folder.clock.now += 61.0
    folder.ledger.expire()
    if leave != "stay":
        getattr(folder, leave)()
    folder.ledger.retry("a")
    assert folder.ledger.expire() == []
    assert claim(folder.ledger).job_id == "a"


def test_expired_jobs_are_ended_later_if_the_disk_fails(folder: LedgerFolder) -> None:
    disk = FaultyDisk()
    folder.crash(disk)
    folder.ledger.append([expiring(name, folder, 60.0) for name in "abc"])
    folder.clock.now += 61.0
    disk.fault = failing(times=float("inf"), skip=2)
    with pytest.raises(LedgerError):
        folder.ledger.expire()
    disk.heal()
    ended = [name for name in "abc" if get_job(folder.ledger, name).state is JobState.CANCELLED]
    assert len(ended) < 3
    left = [job.job_id for job in folder.ledger.expire()]
    assert ended + left == ["a", "b", "c"]


def test_an_expired_job_does_not_wake_the_worker(folder: LedgerFolder) -> None:
    folder.ledger.append([expiring("a", folder, 60.0)])
    folder.clock.now += 61.0
    assert folder.ledger.wait_for_work(lambda: False, 0.01) is False
    assert folder.ledger.upcoming(10) == []


def test_a_job_requeued_many_times_expires_once(folder: LedgerFolder) -> None:
    folder.ledger.append([expiring("a", folder, 60.0), expiring("b", folder, 60.0)])
    for _ in range(50):
        folder.ledger.requeue(claim(folder.ledger).seq)
    job = claim(folder.ledger)
    folder.clock.now += 61.0
    assert [ended.job_id for ended in folder.ledger.expire()] == ["b"], "not the running one"
    folder.ledger.requeue(job.seq)
    assert [ended.job_id for ended in folder.ledger.expire()] == ["a"]


def test_a_crashed_job_does_not_expire(folder: LedgerFolder) -> None:
    folder.ledger.append([expiring("a", folder, 60.0)])
    claim(folder.ledger)
    folder.crash(max_attempts=1)
    folder.clock.now += 61.0
    assert folder.ledger.expire() == []
    assert get_job(folder.ledger, "a").error_code is ErrorCode.CRASHED


def test_expiry_times_of_removed_jobs_do_not_pile_up() -> None:
    """They were kept until the jobs would have expired, perhaps for weeks."""
    queue = JobQueue()
    queue.add(1)
    queue.set_expiry(1, 5e8)
    for seq in range(2, 2000):
        queue.add(seq)
        queue.set_expiry(seq, 1e9)
        queue.remove(seq)
        queue.add(seq)
        queue.remove(seq)
        queue.drop_expiry(seq)
    assert len(queue._expiries._heap) < 100
    assert queue.expired(1e9, 10) == [1]
