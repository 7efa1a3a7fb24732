"""Which audio is ready before the worker claims a job, what `take` does itself, and that no file is left over."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from cesar_mqtt.audio.download import DownloadedFile
from cesar_mqtt.consumer import prefetch
from cesar_mqtt.consumer.prefetch import Prefetcher
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.jobs import AudioSource, Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from tests import factories
from tests.conftest import PATIENCE_S

if TYPE_CHECKING:
    from cesar_mqtt.audio.download import Downloader
    from cesar_mqtt.audio.windows import Recording

FAILURE = JobFailedError(ErrorCode.DOWNLOAD_FAILED, "The server is away.")


class Changes:
    """A condition that the fakes share, so that a test can wait for what they note."""

    def __init__(self) -> None:
        self.condition = threading.Condition()

    def note(self, change: Callable[[], object]) -> None:
        with self.condition:
            change()
            self.condition.notify_all()

    def until(self, satisfied: Callable[[], object]) -> None:
        with self.condition:
            assert self.condition.wait_for(satisfied, PATIENCE_S)


class FakeQueue:
    """The next jobs and the processing ones, as a test sets them, and the observer of both."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.running: tuple[int, ...] = ()
        self.is_paused = False
        self.waiting: set[int] = set()
        self.limits: list[int] = []
        self.error: Exception | None = None
        self.looking: Callable[[], object] = lambda: None
        self._observer: Callable[[], None] = lambda: None

    def upcoming(self, limit: int) -> list[Job]:
        self.limits.append(limit)
        jobs = self.jobs[:limit]
        self.looking()
        if self.error is not None:
            raise self.error
        return jobs

    def preempted(self) -> frozenset[int]:
        return frozenset(self.waiting)

    def processing(self) -> tuple[int, ...]:
        return self.running

    def resume_position_s(self, _seq: int) -> float:
        return 0.0

    def observe(self, observer: Callable[[], None]) -> None:
        self._observer = observer

    def set(self, *jobs: Job) -> None:
        self.jobs = list(jobs)
        self._observer()


class FakeRecording:
    """Nothing is decoded."""

    def __init__(self, path: Path, job: Job, changes: Changes, from_s: float = 0.0) -> None:
        self.path = path
        self.job = job
        self.from_s = from_s
        self.is_current = True
        self.closed = False
        self._changes = changes

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        if should_stop():
            raise Cancelled
        return f"recording of {self.path.name}"

    def close(self) -> None:
        self._changes.note(lambda: setattr(self, "closed", True))


class FakeDownloader:
    """Writes files into the spool; the download of a held URL goes on until the URL is released or the job dropped."""

    def __init__(self, spool: Spool, changes: Changes) -> None:
        self.fetched: list[str] = []
        self.stopped: list[str] = []
        self.held: set[str] = set()
        self.errors: dict[str, Exception] = {}
        self._spool = spool
        self._changes = changes
        self._pace = threading.Event()

    def fetch(self, url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        self._changes.note(lambda: self.fetched.append(url))
        while url in self.held:
            if should_stop():
                self._changes.note(lambda: self.stopped.append(url))
                raise Cancelled
            self._pace.wait(0.01)
        if url in self.errors:
            raise self.errors[url]
        (name,) = self._spool.store([url.encode()])
        return DownloadedFile(self._spool.path(name), f"digest of {url}")


class Stage:
    """A prefetcher among fakes."""

    def __init__(self, folder: Path, ahead: int = 3) -> None:
        self.changes = Changes()
        self.queue = FakeQueue()
        self.folder = folder
        self.spool = Spool(folder / "spool")
        self.downloader = FakeDownloader(self.spool, self.changes)
        self.recordings: list[FakeRecording] = []
        self.open_error: Exception | None = None
        self.opening: Callable[[], object] = lambda: None
        self.downloaded: list[str] = []
        self.prefetcher = self.prefetcher_of(cast("Ledger", self.queue), self.open, ahead)

    def prefetcher_of(
        self, ledger: Ledger, open_recording: Callable[[Path, Job], "FakeRecording"], ahead: int
    ) -> Prefetcher:
        prefetcher = Prefetcher(
            ledger,
            open_recording=cast("Callable[[Path, Job], Recording]", open_recording),
            spool=self.spool,
            directories=[self.folder],
            downloader=cast("Downloader", self.downloader),
            ahead=ahead,
        )
        prefetcher.on_downloaded = lambda outcome, _seconds: self.downloaded.append(outcome)
        return prefetcher

    def open(self, path: Path, job: Job) -> FakeRecording:
        self.opening()
        if self.open_error is not None:
            raise self.open_error
        recording = FakeRecording(path, job, self.changes)
        self.changes.note(lambda: self.recordings.append(recording))
        return recording

    def until(self, satisfied: Callable[[], object]) -> None:
        self.changes.until(satisfied)

    def take(self, job: Job, should_stop: Callable[[], bool] = lambda: False) -> FakeRecording:
        return cast("FakeRecording", self.prefetcher.take(job, should_stop))

    def look(self) -> None:
        self.prefetcher.run_once()

    def settle(self) -> None:
        """Wait for the downloads that are not held."""
        for download in list(self.prefetcher._downloads):
            audio = download._job.audio
            if audio is not None and audio.name not in self.downloader.held:
                download.join(PATIENCE_S)

    @property
    def spooled(self) -> list[bytes]:
        return sorted(path.read_bytes() for path in self.spool.folder.iterdir())

    @property
    def open_now(self) -> list[str]:
        return [recording.job.job_id for recording in self.recordings if not recording.closed]


def never() -> bool:
    return False


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.downloader.held.clear()
    stage.prefetcher.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("fetch-", "prefetch"))]


def a_job(seq: int, kind: str, name: str) -> Job:
    return factories.job(f"job-{seq}", seq=seq, audio=AudioSource(kind, name) if kind else None)


def remote(seq: int) -> Job:
    return a_job(seq, "url", f"http://cam.test/{seq}")


def local(stage: Stage, seq: int) -> Job:
    (stage.folder / f"{seq}.wav").write_bytes(b"sound")
    return a_job(seq, "path", f"{seq}.wav")


# -- take without prefetching --------------------------------------------------------------------------------------


def test_each_kind_of_audio_can_be_taken_without_prefetching(stage: Stage) -> None:
    (name,) = stage.spool.store([b"in the message"])
    for job, content in [
        (local(stage, 1), b"sound"),
        (a_job(2, "spool", name), b"in the message"),
        (remote(3), b"http://cam.test/3"),
    ]:
        recording = stage.take(job)
        assert (recording.path.read_bytes(), recording.job) == (content, job)
        stage.prefetcher.release(job, final=True)
        assert recording.closed
    assert stage.spooled == [b"in the message"]


def test_a_recording_that_is_missing_from_the_spool_is_reported_as_lost(stage: Stage) -> None:
    (name,) = stage.spool.store([b"in the message"])
    stage.spool.remove([name])
    with pytest.raises(JobFailedError, match="gone from the spool") as failed:
        stage.take(a_job(1, "spool", name))
    assert failed.value.code is ErrorCode.AUDIO_NOT_FOUND
    assert name not in str(failed.value)


def test_a_job_without_audio_fails(stage: Stage) -> None:
    with pytest.raises(JobFailedError, match="no audio"):
        stage.take(a_job(1, "", ""))


def test_a_path_outside_the_directories_is_not_allowed(stage: Stage) -> None:
    with pytest.raises(JobFailedError) as error:
        stage.take(a_job(1, "path", "../x"))
    assert error.value.code is ErrorCode.AUDIO_NOT_ALLOWED


def test_an_unexpected_failure_of_a_take_reaches_the_worker(stage: Stage) -> None:
    stage.open_error = RuntimeError("odd")
    with pytest.raises(RuntimeError, match="odd"):
        stage.take(remote(1))
    assert stage.spooled == []


# -- looking ahead -------------------------------------------------------------------------------------------------


def test_the_next_urls_are_downloaded_at_once_and_only_the_very_next_is_opened(stage: Stage) -> None:
    stage.downloader.held = {"http://cam.test/1", "http://cam.test/2", "http://cam.test/3"}
    stage.queue.jobs = [remote(seq) for seq in range(1, 6)]
    stage.prefetcher.start()
    stage.until(lambda: len(stage.downloader.fetched) == 3)
    assert stage.queue.limits[0] == 3
    stage.downloader.held = {"http://cam.test/1"}
    stage.queue.set(*stage.queue.jobs)
    assert stage.recordings == []
    stage.downloader.held = set()
    stage.until(lambda: stage.recordings)
    assert stage.open_now == ["job-1"]
    assert sorted(stage.downloader.fetched) == [f"http://cam.test/{seq}" for seq in (1, 2, 3)]
    recording = stage.take(stage.queue.jobs[0])
    assert recording is stage.recordings[0]


def test_take_returns_the_recording_that_was_opened_ahead(stage: Stage) -> None:
    job = local(stage, 1)
    stage.queue.jobs = [job]
    stage.look()
    assert stage.take(job) is stage.recordings[0]
    assert len(stage.recordings) == 1


def test_a_file_that_changed_since_is_opened_again(stage: Stage) -> None:
    job = local(stage, 1)
    stage.queue.jobs = [job]
    stage.look()
    stage.recordings[0].is_current = False
    assert stage.take(job) is stage.recordings[1]
    assert stage.recordings[0].closed


def test_a_retry_of_a_queued_job_discards_the_recording_opened_behind_its_windows(stage: Stage) -> None:
    """Its windows went with the retry; what was opened behind them would leave out the beginning of the recording."""
    (stage.folder / "a.wav").write_bytes(b"sound")
    with Ledger(stage.folder / "ledger.json") as ledger:
        ledger.append([factories.new_job("a")])
        job = ledger.claim()
        assert job is not None
        ledger.add_window(job.seq, factories.window(0))
        ledger.requeue(job.seq)
        prefetcher = stage.prefetcher_of(
            ledger,
            lambda path, job: FakeRecording(path, job, stage.changes, ledger.resume_position_s(job.seq)),
            ahead=2,
        )
        prefetcher.run_once()
        ledger.pause(on=True)
        ledger.cancel("a")
        prefetcher.run_once()
        ledger.retry("a")
        prefetcher.run_once()
        ledger.pause(on=False)
        job = ledger.claim()
        assert job is not None
        assert prefetcher.take(job, never).from_s == 0.0
        prefetcher.release(job, final=True)


def test_a_paused_consumer_opens_no_recording(stage: Stage) -> None:
    first = local(stage, 1)
    stage.queue.jobs, stage.queue.is_paused = [first], True
    stage.prefetcher.run_once()
    assert stage.recordings == []
    stage.queue.is_paused = False
    stage.prefetcher.run_once()
    assert stage.open_now == ["job-1"]


def test_the_first_recording_is_opened_as_soon_as_the_consumer_resumes(stage: Stage) -> None:
    (stage.folder / "a.wav").write_bytes(b"sound")
    with Ledger(stage.folder / "ledger.json") as ledger:
        ledger.pause(on=True)
        ledger.append([factories.new_job("a")])
        opened: list[Path] = []

        def open_recording(path: Path, job: Job) -> FakeRecording:
            stage.changes.note(lambda: opened.append(path))
            return FakeRecording(path, job, stage.changes)

        prefetcher = stage.prefetcher_of(ledger, open_recording, ahead=2)
        prefetcher.start()
        ledger.pause(on=False)
        stage.until(lambda: opened)
        prefetcher.stop()


def test_the_job_after_the_running_one_is_prefetched_meanwhile(stage: Stage) -> None:
    first, second, third = local(stage, 1), remote(2), local(stage, 3)
    stage.queue.jobs = [first, second, third]
    stage.prefetcher.start()
    stage.until(lambda: stage.open_now == ["job-1"])
    stage.queue.set(second, third)
    stage.take(first)
    stage.until(lambda: stage.open_now == ["job-1", "job-2"])
    stage.queue.set(third)
    stage.prefetcher.release(first, final=True)
    taken = stage.take(second)
    assert taken.path.read_bytes() == b"http://cam.test/2"
    stage.until(lambda: stage.open_now == ["job-2", "job-3"])


def test_a_job_that_is_queued_before_the_next_one_takes_its_place_in_memory(stage: Stage) -> None:
    first, second = local(stage, 1), local(stage, 2)
    stage.queue.jobs = [second]
    stage.look()
    stage.queue.jobs = [first, second]
    stage.look()
    assert stage.open_now == ["job-1"]
    stage.queue.jobs = [second]
    stage.take(first)
    stage.look()
    assert stage.open_now == ["job-1", "job-2"]


def test_a_look_at_an_unchanged_queue_does_nothing(stage: Stage) -> None:
    stage.queue.jobs = [remote(1), local(stage, 2)]
    for _ in range(3):
        stage.look()
        stage.settle()
    assert len(stage.recordings) == 1
    assert stage.downloader.fetched == ["http://cam.test/1"]


def test_a_change_of_the_queue_wakes_the_thread(stage: Stage) -> None:
    stage.prefetcher.start()
    stage.queue.set(local(stage, 1))
    stage.until(lambda: stage.open_now == ["job-1"])


# -- identity ------------------------------------------------------------------------------------------------------


def test_audio_that_can_change_is_identified_while_the_worker_holds_it(stage: Stage) -> None:
    (name,) = stage.spool.store([b"in the message"])
    for job, identity in [
        (local(stage, 1), "recording of 1.wav"),
        (remote(2), "digest of http://cam.test/2"),
        (a_job(3, "spool", name), None),
    ]:
        stage.take(job)
        assert stage.prefetcher.identity(never) == identity
        stage.prefetcher.release(job, final=True)
        assert stage.prefetcher.identity(never) is None


def test_a_stop_ends_the_wait_for_the_identity(stage: Stage) -> None:
    job = local(stage, 1)
    stage.take(job)
    with pytest.raises(Cancelled):
        stage.prefetcher.identity(lambda: True)
    stage.prefetcher.stop()
    with pytest.raises(Cancelled):
        stage.prefetcher.identity(never)
    stage.prefetcher.release(job, final=False)
    assert stage.open_now == []


# -- waiting and failing -------------------------------------------------------------------------------------------


def test_take_waits_for_a_running_download(stage: Stage) -> None:
    job = remote(1)
    stage.downloader.held = {"http://cam.test/1"}
    stage.queue.jobs = [job]
    stage.look()
    looked = []

    def should_stop() -> bool:
        looked.append(1)
        if len(looked) == 3:
            stage.downloader.held.clear()
        return False

    assert stage.take(job, should_stop).path.read_bytes() == b"http://cam.test/1"
    assert stage.downloader.fetched == ["http://cam.test/1"]


def test_a_stop_ends_the_wait_and_the_download(stage: Stage) -> None:
    job = remote(1)
    stage.downloader.held = {"http://cam.test/1"}
    looked = []
    with pytest.raises(Cancelled):
        stage.take(job, lambda: looked.append(1) or len(looked) > 2)  # type: ignore[func-returns-value]
    stage.until(lambda: stage.downloader.stopped == ["http://cam.test/1"])
    stage.settle()
    stage.prefetcher.stop()
    assert stage.downloaded == ["stopped"]


def test_a_stop_precedes_what_was_prefetched(stage: Stage) -> None:
    job = remote(1)
    stage.queue.jobs = [job]
    stage.look()
    stage.settle()
    stage.look()
    with pytest.raises(Cancelled):
        stage.take(job, lambda: True)
    assert (stage.open_now, stage.spooled) == ([], [])


def test_the_failure_of_a_download_is_reported_once_and_then_the_download_is_repeated(stage: Stage) -> None:
    job = remote(1)
    stage.downloader.errors["http://cam.test/1"] = FAILURE
    stage.queue.jobs = [job]
    stage.look()
    stage.settle()
    with pytest.raises(JobFailedError) as error:
        stage.take(job)
    assert error.value is FAILURE
    assert len(stage.downloader.fetched) == 1
    stage.downloader.errors.clear()
    assert stage.take(job).path.read_bytes() == b"http://cam.test/1"


def test_a_download_that_failed_long_ago_is_repeated(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_RECENT_S", 0.0)
    job = remote(1)
    stage.downloader.errors["http://cam.test/1"] = FAILURE
    stage.queue.jobs = [job]
    stage.look()
    stage.settle()
    stage.downloader.errors.clear()
    assert stage.take(job).path.read_bytes() == b"http://cam.test/1"


def test_the_failure_of_a_download_during_take_is_reported(stage: Stage) -> None:
    stage.downloader.errors["http://cam.test/1"] = FAILURE
    with pytest.raises(JobFailedError) as error:
        stage.take(remote(1))
    assert error.value is FAILURE


def test_a_path_that_did_not_exist_ahead_is_looked_up_again(stage: Stage) -> None:
    job = a_job(1, "path", "1.wav")
    stage.queue.jobs = [job]
    stage.look()
    stage.look()
    assert stage.recordings == []
    assert stage.take(local(stage, 1)) is stage.recordings[0]


def test_an_unexpected_failure_ahead_is_logged_and_take_tries_again(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    job, other = remote(1), remote(2)
    stage.downloader.errors["http://cam.test/1"] = RuntimeError("odd")
    stage.queue.jobs = [job, other]
    stage.look()
    stage.settle()
    assert "Downloading the audio failed" in caplog.text
    stage.downloader.errors.clear()
    assert stage.take(job).path.read_bytes() == b"http://cam.test/1"
    stage.prefetcher.release(job, final=True)
    caplog.clear()
    stage.queue.jobs = [other]
    stage.open_error = RuntimeError("odd")
    stage.look()
    assert "Opening the audio ahead failed" in caplog.text
    stage.open_error = None
    assert stage.take(other).path.read_bytes() == b"http://cam.test/2"


def test_an_unexpected_failure_does_not_end_the_thread(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()
    stage.queue.error = RuntimeError("odd")
    stage.queue.looking = failed.set
    stage.prefetcher.start()
    assert failed.wait(PATIENCE_S)
    stage.queue.error = None
    stage.queue.set(local(stage, 1))
    stage.until(lambda: stage.recordings)
    assert stage.prefetcher.alive
    assert "Looking ahead in the queue failed" in caplog.text


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (None, "done"),
        (JobFailedError(ErrorCode.AUDIO_TOO_LARGE, "Too large."), "audio_too_large"),
        (RuntimeError("unforeseen"), "internal"),
    ],
)
def test_the_outcome_of_each_download_is_reported(stage: Stage, failure: Exception | None, outcome: str) -> None:
    if failure is not None:
        stage.downloader.errors["http://cam.test/1"] = failure
    stage.queue.jobs = [remote(1)]
    stage.look()
    stage.settle()
    assert stage.downloaded == [outcome]


# -- jobs that leave the queue -------------------------------------------------------------------------------------


def test_a_job_that_is_cancelled_while_another_runs_leaves_nothing(stage: Stage) -> None:
    current, fetching, fetched, opened = local(stage, 1), remote(2), remote(3), remote(4)
    stage.take(current)
    stage.downloader.held = {"http://cam.test/2"}
    stage.queue.jobs = [opened, fetched, fetching]
    stage.look()
    stage.settle()
    stage.look()
    assert stage.open_now == ["job-1", "job-4"]
    assert len(stage.spooled) == 2
    stage.queue.jobs = []
    stage.look()
    stage.until(lambda: stage.downloader.stopped == ["http://cam.test/2"])
    assert stage.spooled == []
    assert stage.open_now == ["job-1"]


def test_a_download_that_ends_just_after_it_was_dropped_leaves_no_file(stage: Stage) -> None:
    fetched, dropped = threading.Event(), threading.Event()
    fetch = stage.downloader.fetch

    def late(url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        found = fetch(url, should_stop)
        fetched.set()
        assert dropped.wait(PATIENCE_S)
        return found

    stage.downloader.fetch = late  # type: ignore[method-assign]
    stage.take(local(stage, 1))
    stage.queue.jobs = [remote(2)]
    stage.look()
    assert fetched.wait(PATIENCE_S)
    downloads = list(stage.prefetcher._downloads)
    stage.queue.jobs = []
    stage.look()
    assert len(stage.spooled) == 1
    dropped.set()
    downloads[0].join(PATIENCE_S)
    assert stage.spooled == []
    assert stage.downloaded == ["done"]


def test_a_claimed_job_that_is_not_taken_yet_keeps_what_was_prefetched(stage: Stage) -> None:
    """Between the claim and `take` the job has left the queue, as a cancelled one has, but it is in `processing`."""
    job = remote(1)
    stage.queue.jobs = [job]
    stage.look()
    stage.settle()
    stage.look()
    stage.queue.jobs, stage.queue.running = [local(stage, 2)], (1,)
    stage.look()
    assert stage.open_now == ["job-1", "job-2"]
    assert stage.take(job) is stage.recordings[0]
    stage.look()
    assert stage.downloader.fetched == ["http://cam.test/1"]


def test_a_job_that_leaves_the_queue_while_no_job_runs_lets_go_at_once(stage: Stage) -> None:
    stage.queue.jobs = [remote(1)]
    stage.prefetcher.start()
    stage.until(lambda: stage.open_now == ["job-1"])
    stage.queue.set()
    stage.until(lambda: stage.open_now == [])
    stage.prefetcher.stop()
    assert stage.spooled == []


def test_a_take_waits_for_a_look_that_knows_the_queue_before_it(stage: Stage) -> None:
    first, second = remote(1), remote(2)
    stage.queue.jobs = [first]
    stage.look()
    stage.settle()
    stage.look()
    worker = threading.Thread(target=stage.take, args=(first,))

    def claim_meanwhile() -> None:
        stage.queue.looking = lambda: None
        stage.queue.jobs, stage.queue.running = [second], (1,)
        worker.start()

    stage.queue.looking = claim_meanwhile
    stage.look()
    worker.join(PATIENCE_S)
    stage.look()
    stage.settle()
    assert stage.downloader.fetched == ["http://cam.test/1", "http://cam.test/2"]
    assert stage.open_now == ["job-1"]


def test_a_job_that_is_claimed_during_a_look_is_kept(stage: Stage) -> None:
    first, second = local(stage, 1), remote(2)
    stage.take(first)
    stage.queue.jobs, stage.queue.running = [second], (1,)
    stage.look()
    stage.settle()
    stage.look()

    def claim_meanwhile() -> None:
        stage.queue.looking = lambda: None
        stage.queue.running = (2,)

    stage.prefetcher.release(first, final=True)
    stage.queue.jobs, stage.queue.looking = [], claim_meanwhile
    stage.look()
    assert stage.take(second) is stage.recordings[1]
    assert stage.downloader.fetched == ["http://cam.test/2"]


def test_with_a_real_ledger_a_claimed_job_keeps_its_audio_and_a_cancelled_or_deferred_one_lets_go(stage: Stage) -> None:
    (stage.folder / "a.wav").write_bytes(b"sound")
    with Ledger(stage.folder / "ledger.json") as ledger:
        ledger.append([factories.new_job("a"), factories.new_job("b")])
        prefetcher = stage.prefetcher_of(ledger, stage.open, ahead=2)
        prefetcher.run_once()
        assert stage.open_now == ["a"]
        job = ledger.claim()
        assert job is not None
        prefetcher.run_once()
        assert stage.open_now == ["a", "b"]
        assert cast("FakeRecording", prefetcher.take(job, never)) is stage.recordings[0]
        ledger.cancel("b")
        prefetcher.run_once()
        assert stage.open_now == ["a"]
        ledger.defer(job.seq, 3600.0)
        prefetcher.release(job, final=False)
        prefetcher.run_once()
        assert stage.open_now == []


def test_a_recording_that_is_opened_too_late_is_closed(stage: Stage) -> None:
    job = local(stage, 1)
    stage.queue.jobs = [job]

    def meanwhile() -> None:
        stage.opening = lambda: None
        stage.take(job)

    stage.opening = meanwhile
    stage.look()
    assert [recording.closed for recording in stage.recordings] == [False, True]


def test_no_more_downloads_run_at_once_than_jobs_are_looked_at(stage: Stage) -> None:
    jobs = [remote(seq) for seq in range(1, 7)]
    fetch = stage.downloader.fetch
    unmoved = threading.Event()

    def stubborn(url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        fetched = fetch(url, never)
        unmoved.wait(PATIENCE_S)
        del should_stop
        return fetched

    stage.downloader.fetch = stubborn  # type: ignore[method-assign]
    stage.take(local(stage, 9))
    stage.queue.jobs = jobs[:3]
    stage.look()
    stage.until(lambda: len(stage.downloader.fetched) == 3)
    stage.queue.jobs = jobs[3:]
    stage.look()
    assert len(stage.downloader.fetched) == 3
    unmoved.set()
    stage.settle()
    stage.look()
    stage.settle()
    assert len(stage.downloader.fetched) == 6


# -- release -------------------------------------------------------------------------------------------------------


def test_a_download_is_kept_for_a_further_attempt_that_follows_at_once(stage: Stage) -> None:
    job = remote(1)
    stage.queue.running = (1,)
    first = stage.take(job)
    stage.prefetcher.release(job, final=False)
    assert first.closed
    stage.look()
    second = stage.take(job)
    assert second is not first
    assert second.path == first.path
    assert stage.downloader.fetched == ["http://cam.test/1"]
    stage.prefetcher.release(job, final=True)
    assert stage.spooled == []


def test_the_download_of_a_requeued_job_is_kept(stage: Stage) -> None:
    job = remote(1)
    stage.take(job)
    stage.prefetcher.release(job, final=False)
    stage.queue.jobs = [job]
    stage.look()
    assert stage.take(job).path.read_bytes() == b"http://cam.test/1"
    assert stage.downloader.fetched == ["http://cam.test/1"]


def test_a_deferred_job_lets_go_of_its_download_and_fetches_it_again(stage: Stage) -> None:
    """A thousand jobs that a missing model defers would otherwise fill the disk."""
    job = remote(1)
    stage.take(job)
    stage.prefetcher.release(job, final=False)
    assert len(stage.spooled) == 1
    stage.look()
    assert stage.spooled == []
    assert stage.take(job).path.read_bytes() == b"http://cam.test/1"
    assert len(stage.downloader.fetched) == 2


def test_a_preempted_job_keeps_its_download_however_many_jobs_come_before_it(stage: Stage) -> None:
    preempted, urgent = remote(1), [local(stage, seq) for seq in range(2, 8)]
    taken = stage.take(preempted)
    stage.queue.jobs, stage.queue.waiting = [*urgent, preempted], {1}
    stage.look()
    stage.prefetcher.release(preempted, final=False)
    assert taken.closed
    for seq in range(2, 8):
        stage.look()
        assert stage.open_now == [f"job-{seq}"]
        stage.prefetcher.release(stage.take(stage.queue.jobs.pop(0)).job, final=True)
    stage.look()
    assert stage.open_now == ["job-1"]
    stage.queue.jobs = [*urgent, preempted]
    stage.look()
    assert stage.open_now == ["job-2"], "it releases the memory of its recording, and not its download"
    assert stage.take(preempted).path.read_bytes() == b"http://cam.test/1"
    assert stage.downloader.fetched == ["http://cam.test/1"]


def test_a_preempted_job_that_is_cancelled_loses_its_download(stage: Stage) -> None:
    job = remote(1)
    stage.take(job)
    stage.queue.waiting = {1}
    stage.prefetcher.release(job, final=False)
    stage.look()
    assert len(stage.spooled) == 1
    stage.queue.waiting = set()
    stage.look()
    assert stage.spooled == []


def test_a_job_that_is_requeued_before_its_release_is_not_prefetched_a_second_time(stage: Stage) -> None:
    """A forced stop requeues the job before the worker releases its recording."""
    job = remote(1)
    stage.take(job)
    stage.queue.jobs = [job]
    stage.look()
    stage.settle()
    assert len(stage.downloader.fetched) == 1
    stage.prefetcher.release(job, final=False)
    stage.look()
    assert stage.open_now == ["job-1"]
    assert len(stage.spooled) == 1
    stage.prefetcher.release(stage.take(job, never).job, final=True)
    assert (stage.open_now, stage.spooled) == ([], [])


def test_a_release_of_a_job_that_is_not_held_does_nothing(stage: Stage) -> None:
    stage.prefetcher.release(remote(1), final=True)
    stage.take(remote(2))
    stage.prefetcher.release(remote(1), final=True)
    assert stage.open_now == ["job-2"]
    stage.prefetcher.release(remote(2), final=True)
    stage.prefetcher.release(remote(2), final=True)
    assert (stage.open_now, stage.spooled) == ([], [])


# -- stop ----------------------------------------------------------------------------------------------------------


def test_a_stop_ends_everything_and_leaves_only_what_the_worker_holds(stage: Stage) -> None:
    current, fetched, fetching = remote(1), remote(2), remote(3)
    stage.downloader.held = {"http://cam.test/3"}
    stage.take(current)
    stage.queue.jobs = [fetched, fetching]
    stage.prefetcher.start()
    stage.until(lambda: stage.open_now == ["job-1", "job-2"])
    stage.until(lambda: len(stage.downloader.fetched) == 3)
    assert stage.prefetcher.alive
    stage.prefetcher.stop()
    stage.prefetcher.stop()
    assert not stage.prefetcher.alive
    assert stage.downloader.stopped == ["http://cam.test/3"]
    assert (stage.open_now, stage.spooled) == (["job-1"], [b"http://cam.test/1"])
    stage.prefetcher.release(current, final=False)
    assert (stage.open_now, stage.spooled) == ([], [])


def test_a_stop_ends_the_wait_of_the_worker(stage: Stage) -> None:
    stage.downloader.held = {"http://cam.test/1"}
    ended = threading.Event()

    def work() -> None:
        with pytest.raises(Cancelled):
            stage.take(remote(1))
        ended.set()

    worker = threading.Thread(target=work)
    worker.start()
    stage.until(lambda: stage.downloader.fetched)
    stage.prefetcher.stop()
    assert ended.wait(PATIENCE_S)
    worker.join(PATIENCE_S)
    stage.settle()
    assert stage.spooled == []


def test_after_a_stop_nothing_is_started(stage: Stage) -> None:
    stage.queue.jobs = [remote(1)]
    stage.prefetcher.stop()
    stage.look()
    with pytest.raises(Cancelled):
        stage.take(remote(1))
    assert stage.downloader.fetched == []
