"""What the worker relies on in its prefetcher, tried on the tests' fake and on the real one."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from cesar_mqtt.audio.decoder import AudioLimits
from cesar_mqtt.audio.download import Downloader
from cesar_mqtt.audio.windows import Recording
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.consumer.prefetch import Prefetcher
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.jobs import AudioSource, Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from tests import factories
from tests.unit.consumer.test_worker import FakePrefetcher

_SPEECH = Path(__file__).parents[1] / "data" / "speech.wav"


class Takes(Protocol):
    """The part of the prefetcher that the worker uses."""

    def take(self, job: Job, should_stop: Callable[[], bool]) -> Any: ...
    def identity(self, should_stop: Callable[[], bool]) -> str | None: ...
    def release(self, job: Job, *, final: bool) -> None: ...


class Subject(ABC):
    """A prefetcher with a spool, and a folder of audio that it may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "audio"
        self.folder.mkdir()
        self.spool = Spool(folder / "spool")

    prefetcher: Takes

    @abstractmethod
    def path_of(self, recording: Any) -> Path:
        """The file that a recording reads."""

    def file(self, name: str = "a.wav") -> Path:
        path = self.folder / name
        path.write_bytes(_SPEECH.read_bytes())
        return path

    def upload(self) -> tuple[Job, Path]:
        (name,) = self.spool.store([_SPEECH.read_bytes()])
        return _job("spool", name), self.spool.path(name)


def _job(kind: str, name: str) -> Job:
    return factories.job(state="processing", audio=AudioSource(kind, name))


def _go() -> bool:
    return False


def _stop() -> bool:
    return True


class PrefetcherContract:
    """The contract; a subclass has the fixture `subject`."""

    def test_a_path_is_looked_up_in_the_audio_directories(self, subject: Subject) -> None:
        job, path = _job("path", "a.wav"), subject.file()
        assert subject.path_of(subject.prefetcher.take(job, _go)) == path.resolve()
        subject.prefetcher.release(job, final=True)

    def test_an_upload_is_read_from_the_spool_and_stays_there(self, subject: Subject) -> None:
        job, path = subject.upload()
        assert subject.path_of(subject.prefetcher.take(job, _go)) == path
        subject.prefetcher.release(job, final=True)
        assert path.exists(), "the ledger decides how long an upload is kept"

    @pytest.mark.parametrize(
        ("kind", "name", "code"),
        [
            ("path", "missing.wav", ErrorCode.AUDIO_NOT_FOUND),
            ("path", "../secret.wav", ErrorCode.AUDIO_NOT_ALLOWED),
            ("path", "/etc/passwd", ErrorCode.AUDIO_NOT_ALLOWED),
            ("spool", "gone", ErrorCode.AUDIO_NOT_FOUND),
        ],
    )
    def test_audio_that_cannot_be_had_is_an_error_with_a_code(
        self, kind: str, name: str, code: ErrorCode, subject: Subject
    ) -> None:
        with pytest.raises(JobFailedError) as caught:
            subject.prefetcher.take(_job(kind, name), _go)
        assert caught.value.code is code

    def test_a_job_without_audio_is_an_error_of_ours(self, subject: Subject) -> None:
        with pytest.raises(JobFailedError) as caught:
            subject.prefetcher.take(factories.job(state="processing", audio=None), _go)
        assert caught.value.code is ErrorCode.INTERNAL

    def test_nothing_is_taken_when_it_is_to_stop(self, subject: Subject) -> None:
        subject.file()
        with pytest.raises(Cancelled):
            subject.prefetcher.take(_job("path", "a.wav"), _stop)

    def test_audio_in_the_spool_has_no_identity_for_it_cannot_change(self, subject: Subject) -> None:
        job, _ = subject.upload()
        subject.prefetcher.take(job, _go)
        assert subject.prefetcher.identity(_go) is None
        subject.prefetcher.release(job, final=True)

    def test_the_end_of_an_attempt_that_holds_nothing_does_nothing(self, subject: Subject) -> None:
        subject.file()
        job = _job("path", "a.wav")
        subject.prefetcher.release(job, final=True)
        subject.prefetcher.take(job, _go)
        subject.prefetcher.release(job, final=False)
        subject.prefetcher.release(job, final=True)

    def test_a_job_can_be_taken_again_after_a_failed_attempt(self, subject: Subject) -> None:
        job, path = _job("path", "a.wav"), subject.file()
        for final in (False, True):
            assert subject.path_of(subject.prefetcher.take(job, _go)) == path.resolve()
            subject.prefetcher.release(job, final=final)


class _Fake(Subject):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.prefetcher = FakePrefetcher(self.spool, self.folder)

    def path_of(self, recording: Any) -> Path:
        return Path(recording)


class _Real(Subject):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ledger = Ledger(folder / "ledger.json")
        self._paths: dict[int, Path] = {}
        self.prefetcher = self._real = Prefetcher(
            self._ledger,
            open_recording=self._open,
            spool=self.spool,
            directories=[self.folder],
            downloader=Downloader(AudioSettings(), self.spool.folder),
            ahead=2,
        )
        self._real.start()

    def _open(self, path: Path, _job: Job) -> Recording:
        recording = Recording(path, limits=AudioLimits(max_bytes=1 << 20, max_duration_s=60.0), window_s=600.0)
        self._paths[id(recording)] = path
        return recording

    def path_of(self, recording: Any) -> Path:
        return self._paths[id(recording)]

    def close(self) -> None:
        self._real.stop()
        self._ledger.close()


class TestFakePrefetcher(PrefetcherContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Subject:
        return _Fake(tmp_path)


class TestPrefetcher(PrefetcherContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        real = _Real(tmp_path)
        yield real
        real.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]
