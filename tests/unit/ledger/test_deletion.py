"""What is deleted, when, and that the broker is told; and failures that are tried again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cesar_mqtt.config import RetentionSettings
from cesar_mqtt.consumer.maintenance import Maintenance
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import Admission, AudioSource, DeletedJob, IllegalTransitionError, JobState, NewJob, Result
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger.checkpoint import Snapshot
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.threads import never_stop
from cesar_mqtt.transcript import Window
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


def new(job_id: str, kind: str = "path", formats: tuple[str, ...] = ()) -> NewJob:
    return NewJob(job_id, job_id * 2, AudioSource(kind, f"{job_id}.wav"), "tiny.en", formats=formats)


def finish(ledger: Ledger, *job_ids: str, kind: str = "path") -> None:
    ledger.append([new(job_id, kind) for job_id in job_ids])
    for _ in job_ids:
        job = ledger.claim()
        assert job is not None
        ledger.complete(job.seq, RESULT)


def tell_everything(ledger: Ledger) -> None:
    while jobs := ledger.unpublished(100):
        for number, job in jobs:
            ledger.mark_published([(job.seq, number)])


def left(ledger: Ledger, *job_ids: str) -> list[str]:
    return [job_id for job_id in job_ids if ledger.get(job_id) is not None]


def test_a_clock_that_is_set_right_after_the_start_makes_nothing_old(
    tmp_path: Path, ledger: Ledger, clock: Clock
) -> None:
    passed = Clock()
    maintenance = Maintenance(RetentionSettings(), ledger, Spool(tmp_path / "spool"), clock=clock, monotonic=passed)
    finish(ledger, "a")
    clock.now += 30 * 86_400
    passed.now += 5
    maintenance.run_once(never_stop)
    assert left(ledger, "a") == ["a"]
    passed.now += 8 * 86_400
    maintenance.run_once(never_stop)
    assert left(ledger, "a") == []


def test_jobs_that_ended_too_long_ago_are_deleted_oldest_first(ledger: Ledger, clock: Clock) -> None:
    finish(ledger, "a", "b")
    clock.now += 100
    finish(ledger, "c")
    ledger.append([new("waits")])

    assert ledger.delete_finished(before=clock.now - 50, keep=1000) == (2, [])

    assert left(ledger, "a", "b", "c", "waits") == ["c", "waits"]
    assert ledger.totals().completed_total == 3, "totals count what has ended, not what is kept"


def test_of_the_finished_only_the_newest_are_kept_and_nothing_that_waits_is_deleted(ledger: Ledger) -> None:
    finish(ledger, *"abcde")
    ledger.append([new("waits")])
    ledger.append([new("works")])
    ledger.claim()
    assert ledger.delete_finished(before=0.0, keep=2)[0] == 3
    assert left(ledger, *"abcde", "waits", "works") == ["d", "e", "waits", "works"]
    assert ledger.delete_finished(before=0.0, keep=0)[0] == 2
    assert ledger.delete_finished(before=0.0, keep=0) == (0, [])


def test_jobs_that_ended_while_the_clock_was_ahead_do_not_keep_others(
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
    assert left(ledger, *"abcdef") == [*"abcde"]
    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        assert again.delete_finished(before=today - 10, keep=1000, limit=2)[0] == 0
        assert [again.delete_finished(before=today + 50, keep=4, limit=2)[0] for _ in range(3)] == [2, 1, 0]
        assert left(again, *"abcdef") == ["b", "c"], "too many by one, too old by two"


def test_a_job_that_was_retried_is_as_old_as_its_last_end(ledger: Ledger, clock: Clock) -> None:
    ledger.append([new("a"), new("b")])
    ledger.cancel("a")
    ledger.retry("a")
    clock.now += 100
    ledger.cancel("a")
    ledger.cancel("b")
    assert ledger.delete_finished(before=clock.now - 50, keep=1000) == (0, [])
    assert ledger.delete_finished(before=clock.now + 1, keep=1, limit=10)[0] == 2, "too old and too many is once"


def test_no_more_than_the_limit_is_deleted_at_once(ledger: Ledger) -> None:
    finish(ledger, *(f"job-{number}" for number in range(25)))
    assert [ledger.delete_finished(before=0.0, keep=0, limit=10)[0] for _ in range(4)] == [10, 10, 5, 0]


def test_audio_that_nobody_needs_any_more_is_named(ledger: Ledger) -> None:
    finish(ledger, "a", kind="spool")
    assert ledger.delete_finished(before=0.0, keep=0) == (1, ["a.wav"])


def test_the_windows_of_what_is_deleted_go_with_it_and_no_others(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    ledger.append([new(name, formats=("srt",)) for name in "abc"])
    spoken = replace(RESULT, windows=tuple(Window(n, n + 1.0, " spoken", "en", 0.9, ()) for n in range(3)))
    for _ in range(2):
        job = ledger.claim()
        assert job is not None
        ledger.complete(job.seq, spoken)
    working = ledger.claim()
    assert working is not None
    ledger.add_window(working.seq, spoken.windows[0])
    assert ledger.delete_finished(before=0.0, keep=1) == (1, [])
    assert [len(ledger.windows(seq)) for seq in (1, 2, 3)] == [0, 3, 1]
    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        assert [len(again.windows(seq)) for seq in (1, 2, 3)] == [0, 3, 1]


def test_what_was_cancelled_is_deleted_like_all_that_has_ended(ledger: Ledger, clock: Clock) -> None:
    ledger.append([new("a", "spool"), new("b", "spool"), new("retried", "spool")])
    for name in ("a", "b", "retried"):
        ledger.cancel(name)
        clock.now += 10
    ledger.retry("retried")
    assert ledger.delete_finished(before=clock.now - 25, keep=100) == (1, ["a.wav"])
    assert ledger.delete_finished(before=0.0, keep=0) == (1, ["b.wav"])
    assert left(ledger, "a", "b", "retried") == ["retried"]
    assert ledger.needed_spool_files() == {"retried.wav"}


def test_the_broker_is_told_to_forget_the_results_as_well(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    ledger.append([new("a", formats=("txt", "srt"))])
    ledger.cancel("a")
    ledger.delete_finished(before=0.0, keep=0)
    ledger.append([new("a", formats=("vtt",))])
    assert ledger.pending_clears(10) == [DeletedJob(1, "a", ("txt", "srt"), owns_status=False)]
    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        assert again.pending_clears(10) == [DeletedJob(1, "a", ("txt", "srt"), owns_status=False)]
        assert again.has_unpublished
        again.mark_cleared(1)
        again.delete("a")
        assert again.pending_clears(10) == [DeletedJob(2, "a", ("vtt",))]


def test_the_broker_is_told_to_forget_until_it_has(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    finish(ledger, "a", "b")
    tell_everything(ledger)
    ledger.delete_finished(before=0.0, keep=0)
    assert ledger.has_unpublished
    assert [gone.job_id for gone in ledger.pending_clears(10)] == ["a", "b"]
    assert ledger.unpublished(10) == []
    ledger.mark_cleared(1)
    assert [gone.job_id for gone in ledger.pending_clears(10)] == ["b"]
    ledger.close()

    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        assert [gone.job_id for gone in again.pending_clears(10)] == ["b"], "a restart in between changes nothing"
        again.mark_cleared(2)
        assert not again.has_unpublished
        again.append([new("c")])
    with Ledger(tmp_path / "ledger.json", clock=clock) as later:
        assert later.pending_clears(10) == []


def test_a_status_that_was_never_told_is_not_told_after_its_job_is_deleted(ledger: Ledger) -> None:
    finish(ledger, "a")
    ledger.delete_finished(before=0.0, keep=0)
    assert ledger.unpublished(10) == []
    assert [gone.job_id for gone in ledger.pending_clears(10)] == ["a"]


def test_an_id_that_is_used_again_is_a_new_job_and_its_status_is_not_cleared(ledger: Ledger) -> None:
    finish(ledger, "a")
    tell_everything(ledger)
    ledger.delete_finished(before=0.0, keep=0)
    assert [verdict for verdict, _ in ledger.append([new("a")])] == [Admission.ACCEPTED]
    assert [(gone.owns_status, gone.formats) for gone in ledger.pending_clears(10)] == [(False, ())], (
        "only an event is left to tell"
    )
    assert [job.state for _, job in ledger.unpublished(10)] == [JobState.QUEUED]


def test_numbers_are_never_used_again(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    finish(ledger, "a", "b")
    ledger.delete_finished(before=0.0, keep=0)
    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock) as again:
        again.append([new("c")])
        job = again.get("c")
        assert job is not None
        assert job.seq == 3


def test_a_deferred_job_lets_those_behind_it_go_first_and_then_keeps_its_place(ledger: Ledger, clock: Clock) -> None:
    ledger.append([new(name) for name in "abc"])
    first = ledger.claim()
    assert first is not None
    ledger.defer(first.seq, 10.0)
    again = ledger.get("a")
    assert again is not None
    assert (again.state, again.queue_position, again.retries, again.crashes) == (JobState.QUEUED, 1, 1, 0)

    second = ledger.claim()
    assert second is not None
    assert second.job_id == "b"
    ledger.complete(second.seq, RESULT)
    clock.now += 10.0
    third = ledger.claim()
    assert third is not None
    assert (third.job_id, third.attempt) == ("a", 2)


def test_only_a_deferred_job_makes_the_worker_wait_no_longer_than_its_delay(ledger: Ledger, clock: Clock) -> None:
    ledger.append([new("a")])
    job = ledger.claim()
    assert job is not None
    ledger.defer(job.seq, 5.0)
    assert ledger.claim() is None
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        clock.now += 3.0  # time goes on while it is asked
        return asked > 10

    assert ledger.wait_for_work(stopped)
    assert asked < 10


def test_after_a_restart_a_deferred_job_is_ready_at_once(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    ledger.append([new("a")])
    job = ledger.claim()
    assert job is not None
    ledger.defer(job.seq, 1e6)
    ledger.close()
    with Ledger(tmp_path / "ledger.json", clock=clock, monotonic=clock) as again:
        claimed = again.claim()
        assert claimed is not None
        assert claimed.retries == 1


def test_only_a_job_in_work_can_be_deferred(ledger: Ledger) -> None:
    ledger.append([new("a")])
    with pytest.raises(IllegalTransitionError):
        ledger.defer(1, 1.0)
    job = ledger.claim()
    assert job is not None
    ledger.fail(job.seq, ErrorCode.INTERNAL, "It failed.")
    with pytest.raises(IllegalTransitionError):
        ledger.defer(1, 1.0)


def test_a_retained_request_without_an_id_is_the_job_that_its_live_delivery_made(ledger: Ledger) -> None:
    def asked(job_id: str, *, retained: bool) -> NewJob:
        source = AudioSource("path", "a.wav")
        return NewJob(job_id, "same", source, "tiny.en", has_generated_id=True, retained=retained)

    [(first, live)] = ledger.append([asked("uuid-1", retained=False)])
    [(second, known)] = ledger.append([asked("retained-same", retained=True)])
    [(third, _)] = ledger.append([asked("uuid-2", retained=False)])
    assert (first, second, third) == (Admission.ACCEPTED, Admission.DUPLICATE, Admission.ACCEPTED)
    assert known == live == "uuid-1"


def test_deleting_the_newest_of_two_equal_requests_does_not_make_the_other_unknown(ledger: Ledger) -> None:
    def asked(job_id: str, failure: str | None = None, *, retained: bool = False) -> NewJob:
        return NewJob(job_id, "same", None, "tiny.en", has_generated_id=True, retained=retained, failure=failure)

    ledger.append([asked("waits"), asked("failed", "It is wrong.")])
    assert ledger.delete_finished(before=0.0, keep=0)[0] == 1
    assert ledger.append([asked("again", retained=True)]) == [(Admission.DUPLICATE, "waits")]


def test_in_a_new_session_a_packet_id_is_no_sign_of_a_redelivery(ledger: Ledger) -> None:
    def asked(job_id: str, *, redelivered: bool) -> NewJob:
        return NewJob(job_id, "same", None, "tiny.en", has_generated_id=True, packet_id=1, redelivered=redelivered)

    ledger.append([asked("first", redelivered=False)])
    assert ledger.append([asked("again", redelivered=True)])[0][0] is Admission.DUPLICATE
    ledger.release_all_packet_ids()
    assert ledger.append([asked("other", redelivered=True)])[0][0] is Admission.ACCEPTED
    assert ledger.append([asked("again", redelivered=True)])[0][0] is Admission.DUPLICATE
    for _ in range(2):
        job = ledger.claim()
        assert job is not None
        ledger.complete(job.seq, RESULT)
    assert ledger.delete_finished(before=0.0, keep=0)[0] == 2


def test_a_hundred_thousand_finished_jobs_go_in_steps_between_which_the_next_job_is_accepted(tmp_path: Path) -> None:
    count = 100_000
    fixed = {"state": "completed", "created_at": 1.0, "updated_at": 1.0, "completed_at": 1.0, "model_size": "base"}
    jobs = {
        str(seq): {"job_id": f"job-{seq}", "revision": seq, "fingerprint": f"f-{seq}", **fixed}
        for seq in range(1, count + 1)
    }
    path, disk = tmp_path / "ledger.json", QuickDisk()
    checkpoint.save(Snapshot({"jobs": jobs}, transaction=count, watermark=count), path, disk=disk)
    del jobs
    accepted = 0
    with Ledger(path, disk=disk) as ledger:
        while (deleted := ledger.delete_finished(before=2.0, keep=count)[0]) > 0:
            assert deleted <= 200, "nobody waits for more than one small transaction"
            if accepted < 20:
                accepted += 1
                ledger.append([NewJob(f"new-{accepted}", f"{accepted}", None, "base")])
        assert ledger.totals().queued == accepted
    with Ledger(path, disk=disk) as ledger:
        assert [job.seq for job in ledger.jobs()] == list(range(count + 1, count + accepted + 1))
        while gone := ledger.pending_clears(1000):
            for job in gone:
                ledger.mark_cleared(job.seq)
        ledger.append([NewJob("after", "after", None, "base")])
    with Ledger(path, disk=disk) as ledger:
        assert ledger.pending_clears(1) == []
        assert ledger.claim() is not None
    assert path.stat().st_size < 2_000_000, "what was deleted does not go on filling the disk"
