import os
import threading
import time
import tracemalloc
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from cesar_mqtt.audio import windows as module
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioInfo, AudioLimits, Samples, open_audio
from cesar_mqtt.audio.paths import lasting_identity
from cesar_mqtt.audio.windows import Chunk, Recording
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from tests.conftest import PATIENCE_S

DATA = Path(__file__).resolve().parents[2] / "data"
LONG = DATA / "long.ogg"
LIMITS = AudioLimits(max_bytes=500_000_000, max_duration_s=100_000.0)


def never() -> bool:
    return False


def write_wav(path: Path, samples: NDArray[np.float64] | Samples) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32_767).astype("<i2").tobytes())
    return path


def write_aac(path: Path, duration_s: float) -> Path:
    """A raw stream, which declares no duration."""
    pcm = np.random.default_rng(1).integers(-3000, 3000, int(duration_s * SAMPLE_RATE), np.int16)
    with av.open(path, "w", format="adts") as file:
        stream = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for start in range(0, len(pcm), 1024):
            frame = av.AudioFrame.from_ndarray(pcm[np.newaxis, start : start + 1024], "s16", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def decode(path: Path) -> Samples:
    with open_audio(path, LIMITS) as audio:
        return np.concatenate(list(audio.blocks()))


@contextmanager
def opened(
    path: Path,
    *,
    window_s: float = 600.0,
    limits: AudioLimits = LIMITS,
    clips: tuple[tuple[float, float], ...] = (),
    from_s: float = 0.0,
    vad_filter: bool = True,
) -> Iterator[Recording]:
    recording = Recording(path, limits=limits, window_s=window_s, clips=clips, from_s=from_s, vad_filter=vad_filter)
    try:
        yield recording
    finally:
        recording.close()
        assert not recording._thread.is_alive()


def chunks_of(path: Path, *, window_s: float = 600.0, from_s: float = 0.0) -> list[Chunk]:
    with opened(path, window_s=window_s, from_s=from_s) as recording:
        return list(recording.chunks(never))


def clipped(path: Path, *clips: tuple[float, float], window_s: float = 600.0, from_s: float = 0.0) -> list[Chunk]:
    with opened(path, window_s=window_s, clips=clips, from_s=from_s) as recording:
        return list(recording.chunks(never))


def failure(path: Path, *clips: tuple[float, float], limits: AudioLimits = LIMITS) -> JobFailedError:
    with opened(path, limits=limits, clips=clips) as recording, pytest.raises(JobFailedError) as caught:
        list(recording.chunks(never))
    return caught.value


def spans(found: list[Chunk]) -> list[tuple[float, float]]:
    return [(chunk.start_s, chunk.end_s) for chunk in found]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.005)


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_CLOSE_S", PATIENCE_S)
    yield
    wait_until(lambda: not any(thread.name == "decoder" for thread in threading.enumerate()))


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """100 s in which each sample tells its place, to the second."""
    return write_wav(tmp_path / "numbered.wav", np.repeat(np.arange(100) / 128, SAMPLE_RATE))


class FakeAudio:
    """Stands in for an open file: one second of ones after the other, as many as are asked for, and counts them."""

    def __init__(self, *, seconds: float = float("inf"), declared_s: float | None = None) -> None:
        self.info = AudioInfo(declared_s, "wav", 1, (1, 2, 3, 4))
        self.warnings: tuple[str, ...] = ()
        self.decoded_s = 0.0
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()
        self.given: list[Samples] = []
        self.error: Exception | None = None

    def blocks(self, should_stop: Callable[[], bool]) -> Iterator[Samples]:
        if self.given:
            yield from self.given
            return
        if self.error is not None:
            raise self.error
        while self.decoded_s < self.seconds:
            while not self.gate.wait(0.01):
                if should_stop():
                    raise Cancelled
            if should_stop():
                raise Cancelled
            self.decoded_s += 1.0
            yield np.ones(SAMPLE_RATE, np.float32)


@pytest.fixture
def fake_audio(monkeypatch: pytest.MonkeyPatch) -> FakeAudio:
    audio = FakeAudio()

    @contextmanager
    def opens(_path: Path, _limits: AudioLimits, **_: object) -> Iterator[FakeAudio]:
        yield audio

    monkeypatch.setattr(module, "open_audio", opens)
    monkeypatch.setattr(module, "speech_probabilities", lambda samples: np.ones(len(samples) // 512 + 1, np.float32))
    monkeypatch.setattr(module, "find_cut", lambda samples, *_, **__: len(samples) * 3 // 4)
    return audio


# --- windows


def test_what_is_no_longer_than_the_window_is_one_chunk() -> None:
    (chunk,) = chunks_of(LONG, window_s=47.0)
    assert np.array_equal(chunk.samples, decode(LONG))
    assert (chunk.start_s, chunk.last) == (0.0, True)


@pytest.mark.parametrize(("more", "count"), [(-1, 1), (0, 1), (1, 2)])
def test_one_sample_decides_whether_it_is_cut(more: int, count: int, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "edge.wav", np.zeros(30 * SAMPLE_RATE + more))
    assert len(chunks_of(path, window_s=30.0)) == count


@pytest.mark.parametrize("window_s", [4.0, 7.0, 10.0, 20.0, 30.0])
def test_the_chunks_together_are_the_whole_file(window_s: float) -> None:
    found = chunks_of(LONG, window_s=window_s)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in found]), decode(LONG))
    assert all(0 < len(chunk.samples) <= window_s * SAMPLE_RATE for chunk in found)
    assert [chunk.last for chunk in found] == [False] * (len(found) - 1) + [True]
    assert [start for start, _ in spans(found)] == [0.0, *[end for _, end in spans(found)[:-1]]]
    assert all(round(end_s, 3) == end_s for _, end_s in spans(found)[:-1])


def test_a_file_that_comes_in_one_huge_block_is_cut_like_any_other(fake_audio: FakeAudio) -> None:
    whole = np.arange(100 * SAMPLE_RATE, dtype=np.float32)
    fake_audio.given = [whole]
    found = chunks_of(Path("any"), window_s=10.0)
    assert np.array_equal(np.concatenate([chunk.samples for chunk in found]), whole)
    assert len(found) > 10


@pytest.mark.parametrize("window_s", [7.0, 20.0])
def test_what_follows_a_window_is_the_same_when_the_work_is_resumed_there(window_s: float) -> None:
    whole = chunks_of(LONG, window_s=window_s)
    for number, chunk in enumerate(whole[:-1], start=1):
        resumed = chunks_of(LONG, window_s=window_s, from_s=chunk.end_s)
        assert spans(resumed) == spans(whole[number:])
        for ours, theirs in zip(resumed, whole[number:], strict=True):
            assert np.array_equal(ours.samples, theirs.samples)


@pytest.mark.parametrize("from_s", [100.0, 100.01, 5000.0])
def test_where_nothing_is_left_the_only_chunk_is_empty(from_s: float, numbered: Path) -> None:
    with opened(numbered, from_s=from_s) as recording:
        (chunk,) = recording.chunks(never)
        assert (len(chunk.samples), chunk.last) == (0, True)
        assert recording.duration_s == 100.0


def test_speech_is_where_the_vad_finds_it_in_each_chunk(tmp_path: Path) -> None:
    sentence, pause = decode(DATA / "speech.wav"), np.zeros(10 * SAMPLE_RATE, np.float32)
    path = write_wav(tmp_path / "two.wav", np.concatenate([pause, sentence, pause, sentence, pause]))
    for window_s in (60.0, 20.0):
        found = chunks_of(path, window_s=window_s)
        times_s = [chunk.start_s + place / SAMPLE_RATE for chunk in found for part in chunk.speech for place in part]
        assert times_s == [pytest.approx(place_s, abs=0.2) for place_s in (10.0, 13.9, 24.0, 27.9)]
        assert all(0 <= start < end <= len(chunk.samples) for chunk in found for start, end in chunk.speech)


def test_without_the_vad_filter_a_whole_chunk_is_speech(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "silent.wav", np.zeros(50 * SAMPLE_RATE))
    with opened(path, window_s=20.0, vad_filter=False) as recording:
        found = list(recording.chunks(never))
    assert len(found) > 1
    assert [chunk.speech for chunk in found] == [((0, len(chunk.samples)),) for chunk in found]
    assert {chunk.speech for chunk in chunks_of(path, window_s=20.0)} == {()}
    with opened(path, from_s=50.0, vad_filter=False) as recording:
        assert [chunk.speech for chunk in recording.chunks(never)] == [()]


# --- clips


def test_each_range_is_a_chunk_of_its_own_with_the_times_of_the_file(numbered: Path) -> None:
    found = clipped(numbered, (3.0, 5.5), (20.25, 21.0), (99.0, 100.0))
    assert spans(found) == [(3.0, 5.5), (20.25, 21.0), (99.0, 100.0)]
    assert [chunk.last for chunk in found] == [False, False, True]
    for chunk in found:
        places = chunk.samples * 128
        assert (round(float(places.min())), round(float(places.max()))) == (
            int(chunk.start_s),
            int(chunk.end_s - 1 / SAMPLE_RATE),
        )


def test_ranges_are_worked_in_the_order_of_time_and_what_overlaps_is_worked_once(numbered: Path) -> None:
    found = clipped(numbered, (40.0, 50.0), (10.0, 20.0), (15.0, 30.0), (30.0, 35.0), (41.0, 42.0))
    assert spans(found) == [(10.0, 30.0), (30.0, 35.0), (40.0, 50.0)]


def test_a_range_that_is_longer_than_the_window_is_cut(numbered: Path) -> None:
    found = clipped(numbered, (10.0, 60.0), (70.0, 71.0), window_s=20.0)
    assert len(found) > 3
    assert (found[0].start_s, found[-2].end_s, found[-1].start_s) == (10.0, 60.0, 70.0)
    assert sum(len(chunk.samples) for chunk in found) == 51 * SAMPLE_RATE


def test_an_end_behind_the_end_of_the_file_means_its_end(numbered: Path) -> None:
    assert spans(clipped(numbered, (90.0, 100.2))) == [(90.0, 100.0)]
    assert spans(clipped(numbered, (90.0, 5000.0))) == [(90.0, 100.0)]
    assert spans(clipped(numbered, (90.0, 1e305))) == [(90.0, 100.0)]


@pytest.mark.parametrize("start_s", [100.0, 100.01, 104.0, 500.0])
def test_a_range_that_begins_behind_the_end_is_refused(start_s: float, numbered: Path) -> None:
    error = failure(numbered, (1.0, 2.0), (start_s, start_s + 10.0))
    assert error.code is ErrorCode.INVALID_REQUEST
    assert f"{start_s:g} s" in error.message
    assert "clip_timestamps" in error.message


def test_a_range_far_behind_the_declared_end_is_refused_before_the_work(numbered: Path) -> None:
    with opened(numbered, clips=((1.0, 2.0), (500.0, 510.0))) as recording, pytest.raises(JobFailedError):
        next(iter(recording.chunks(never)))


def test_a_range_that_begins_behind_the_end_of_a_file_that_declares_none_is_refused(tmp_path: Path) -> None:
    assert failure(write_aac(tmp_path / "a.aac", 5.0), (7.0, 8.0)).code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("clip", [(5.0, 5.0), (5.0, 4.0), (-1.0, 4.0), (1.0, 1.00001), (1.0, float("inf"))])
def test_what_is_no_range_is_refused(clip: tuple[float, float], numbered: Path) -> None:
    error = failure(numbered, clip)
    assert error.code is ErrorCode.INVALID_REQUEST
    assert "not a valid range" in error.message


def test_ranges_are_resumed_where_the_work_was_left(numbered: Path) -> None:
    clips = ((10.0, 60.0), (70.0, 71.0), (80.5, 90.123456))
    whole = clipped(numbered, *clips, window_s=20.0)
    for number, chunk in enumerate(whole[:-1], start=1):
        resumed = clipped(numbered, *clips, window_s=20.0, from_s=chunk.end_s)
        assert spans(resumed) == spans(whole[number:])
        assert [one.last for one in resumed] == [one.last for one in whole[number:]]
    (nothing,) = clipped(numbered, *clips, from_s=whole[-1].end_s)
    assert (len(nothing.samples), nothing.last) == (0, True)


# --- what is known of the file


def test_the_declared_duration_is_known_early_and_the_exact_one_in_the_end() -> None:
    with opened(LONG, window_s=20.0) as recording:
        found = recording.chunks(never)
        next(found)
        assert recording.duration_s == pytest.approx(46.556, abs=0.001)
        list(found)
        assert recording.duration_s == len(decode(LONG)) / SAMPLE_RATE


def test_an_undeclared_duration_is_known_in_the_end(tmp_path: Path) -> None:
    path = write_aac(tmp_path / "stream.aac", 40.0)
    with opened(path, window_s=15.0) as recording:
        found = recording.chunks(never)
        next(found)
        assert recording.duration_s is None
        list(found)
        assert recording.duration_s == pytest.approx(40.0, abs=0.2)
        assert recording.warnings == ()
    with opened(path, clips=((1.0, 2.0),)) as recording:
        list(recording.chunks(never))
        assert recording.duration_s == pytest.approx(40.0, abs=0.2)


def test_what_lies_behind_the_last_range_is_not_decoded_and_not_missed(fake_audio: FakeAudio) -> None:
    fake_audio.info = AudioInfo(1000.0, "wav", 1, (1,))
    fake_audio.warnings = ("audio_truncated", "audio_damaged")
    with opened(Path("any"), clips=((3.0, 5.0),)) as recording:
        list(recording.chunks(never))
        assert recording.duration_s == 1000.0
        assert recording.warnings == ("audio_damaged",)
    assert fake_audio.decoded_s <= 6.0


def test_a_file_that_is_longer_than_it_declares_lasts_as_long_as_it_does(fake_audio: FakeAudio) -> None:
    fake_audio.info = AudioInfo(5.0, "wav", 1, (1,))
    fake_audio.seconds = 50.0
    with opened(Path("any"), window_s=10.0) as recording:
        for chunk in recording.chunks(never):
            assert recording.duration_s is not None
            assert recording.duration_s >= chunk.end_s
        assert recording.duration_s == 50.0


def test_a_cut_and_a_damaged_file_is_called_so_when_the_last_chunk_is_given(tmp_path: Path) -> None:
    path = tmp_path / "cut.wav"
    path.write_bytes(write_wav(tmp_path / "whole.wav", np.zeros(60 * SAMPLE_RATE)).read_bytes()[:-1_000_000])
    with opened(path, window_s=10.0) as recording:
        called_so = [(chunk.last, recording.warnings) for chunk in recording.chunks(never)]
    assert called_so[-1] == (True, ("audio_truncated",))
    assert called_so[:-2] == [(False, ())] * 2  # the window behind the next one is not decoded yet
    assert not called_so[-2][0]


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", ErrorCode.AUDIO_EMPTY), (b"no audio at all\n" * 99, ErrorCode.AUDIO_UNREADABLE)],
)
def test_what_is_wrong_with_the_file_is_raised_when_its_chunks_are_taken(
    content: bytes, code: ErrorCode, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert failure(tmp_path / "file").code is code
    assert failure(tmp_path / "missing").code is ErrorCode.AUDIO_NOT_FOUND


def test_the_limit_holds_after_windows_were_given(tmp_path: Path) -> None:
    path = write_aac(tmp_path / "stream.aac", 60.0)
    with opened(path, window_s=10.0, limits=AudioLimits(10**7, 45.0)) as recording:
        found = recording.chunks(never)
        assert next(found).start_s == 0.0
        with pytest.raises(JobFailedError) as caught:
            list(found)
        assert caught.value.code is ErrorCode.AUDIO_TOO_LONG


# --- memory


def test_no_more_than_one_window_is_ever_decoded_ahead(fake_audio: FakeAudio) -> None:
    with opened(Path("any"), window_s=10.0) as recording:
        found = recording.chunks(never)
        for _ in range(4):
            chunk = next(found)
            # A window more than is in use is wanted; that nothing comes after it can only be waited for in vain.
            wait_until(lambda ahead_s=chunk.end_s: fake_audio.decoded_s > ahead_s + 10.0)  # type: ignore[misc]
            assert not threading.Event().wait(0.05)
            assert fake_audio.decoded_s <= chunk.end_s + 10.0 + 1.0


def test_memory_does_not_grow_with_the_length_of_the_file(fake_audio: FakeAudio) -> None:
    window_s, seconds = 20.0, 600.0
    fake_audio.seconds = seconds
    tracemalloc.start()
    try:
        with opened(Path("any"), window_s=window_s) as recording:
            total = sum(len(chunk.samples) for chunk in recording.chunks(never))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == seconds * SAMPLE_RATE
    assert peak < 3.5 * window_s * SAMPLE_RATE * 4


# --- ends


def test_closing_ends_the_thread_whatever_it_does(fake_audio: FakeAudio) -> None:
    for act in ("waits to be taken", "waits for the disk", "decodes"):
        if act == "waits for the disk":
            fake_audio.gate.clear()
        recording = Recording(Path("any"), limits=LIMITS, window_s=10.0 if act != "decodes" else 10_000.0)
        if act == "waits to be taken":
            wait_until(lambda held=recording: held._ready is not None)  # type: ignore[misc]
        recording.close()
        recording.close()
        assert not recording._thread.is_alive()
        assert recording._ready is None
        fake_audio.gate.set()


def test_a_chunk_that_is_finished_after_the_close_holds_nothing_up(
    fake_audio: FakeAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting, go_on = threading.Event(), threading.Event()

    def slowly(samples: Samples, *_: object, **__: object) -> int:
        cutting.set()
        go_on.wait(PATIENCE_S)
        return len(samples)

    monkeypatch.setattr(module, "find_cut", slowly)
    recording = Recording(Path("any"), limits=LIMITS, window_s=3.0)
    cutting.wait(PATIENCE_S)
    closer = threading.Thread(target=recording.close)
    closer.start()
    wait_until(lambda: recording._closed)
    go_on.set()
    closer.join(PATIENCE_S)
    recording._thread.join(PATIENCE_S)
    assert not recording._thread.is_alive()
    assert recording._ready is None
    assert fake_audio.decoded_s >= 3.0


def test_a_wait_for_a_chunk_is_cancelled_when_the_recording_is_closed(fake_audio: FakeAudio) -> None:
    fake_audio.gate.clear()
    recording = Recording(Path("any"), limits=LIMITS, window_s=10.0)
    asked = threading.Event()

    def close_when_asked() -> None:
        asked.wait(PATIENCE_S)
        recording.close()

    closer = threading.Thread(target=close_when_asked)
    closer.start()

    def note() -> bool:
        asked.set()
        return False

    with pytest.raises(Cancelled):
        next(iter(recording.chunks(note)))
    closer.join(PATIENCE_S)


def test_a_stop_is_heeded_while_the_file_is_decoded(fake_audio: FakeAudio) -> None:
    fake_audio.gate.clear()
    asked: list[bool] = []

    def stop_at_the_third_time() -> bool:
        asked.append(True)
        return len(asked) == 3

    with opened(Path("any")) as recording:
        with pytest.raises(Cancelled):
            next(iter(recording.chunks(stop_at_the_third_time)))
        assert fake_audio.decoded_s == 0.0


def test_a_close_does_not_wait_for_a_disk_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opening, answered = threading.Event(), threading.Event()

    @contextmanager
    def opens(_path: Path, _limits: AudioLimits, **_: object) -> Iterator[FakeAudio]:
        opening.set()
        answered.wait(PATIENCE_S)
        yield FakeAudio()

    monkeypatch.setattr(module, "open_audio", opens)
    monkeypatch.setattr(module, "_CLOSE_S", 0.1)
    recording = Recording(Path("any"), limits=LIMITS, window_s=10.0)
    opening.wait(PATIENCE_S)
    recording.close()
    assert recording._thread.is_alive()
    assert "has not ended yet" in caplog.text
    answered.set()
    recording._thread.join(PATIENCE_S)
    assert not recording._thread.is_alive()


def test_an_unforeseen_failure_in_the_thread_ends_the_wait_for_a_chunk(
    fake_audio: FakeAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)

    def fail(*_: object, **__: object) -> int:
        raise RuntimeError("the VAD has no legs")

    monkeypatch.setattr(module, "find_cut", fail)
    with opened(Path("any"), window_s=5.0) as recording, pytest.raises(JobFailedError) as caught:
        next(iter(recording.chunks(never)))
    assert caught.value.code is ErrorCode.INTERNAL
    assert len(said) == 1
    assert fake_audio.decoded_s > 5.0


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_a_failure_of_the_machine_can_be_retried(error: Exception, fake_audio: FakeAudio) -> None:
    fake_audio.error = error
    caught = failure(Path("any"))
    assert caught.code is ErrorCode.INTERNAL
    assert caught.code.retryable


# --- the file changes


def test_a_file_that_vanishes_is_decoded_to_its_end(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "note.wav", np.zeros(60 * SAMPLE_RATE))
    with opened(path, window_s=10.0) as recording:
        found = recording.chunks(never)
        heard = len(next(found).samples)
        path.unlink()
        assert heard + sum(len(chunk.samples) for chunk in found) == 60 * SAMPLE_RATE
        assert recording.warnings == ()
        assert not recording.is_current


def test_a_file_that_shrinks_while_it_is_decoded_ends_where_it_is_cut(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "note.wav", np.zeros(600 * SAMPLE_RATE))
    with opened(path, window_s=10.0) as recording:
        found = recording.chunks(never)
        heard = len(next(found).samples)
        os.truncate(path, 4_000_000)
        heard += sum(len(chunk.samples) for chunk in found)
        assert 100 * SAMPLE_RATE < heard < 140 * SAMPLE_RATE
        assert recording.warnings == ("audio_truncated", "audio_changed")


@pytest.mark.parametrize("change", ["rewritten", "replaced", "touched", "removed", "turned into a link"])
def test_a_recording_is_fresh_until_the_file_changes(change: str, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "note.wav", np.zeros(SAMPLE_RATE))
    other = write_wav(tmp_path / "other.wav", np.zeros(SAMPLE_RATE))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    with opened(path) as recording:
        assert recording.is_current
        list(recording.chunks(never))
        assert recording.is_current
        if change == "rewritten":
            path.write_bytes(path.read_bytes() + b"more")
        elif change == "replaced":
            other.rename(path)
        elif change == "touched":
            os.utime(path, ns=(1, 1))
        elif change == "removed":
            path.unlink()
        else:
            path.symlink_to(path.rename(tmp_path / "moved.wav"))
        assert not recording.is_current


@pytest.mark.parametrize("change", ["rewritten", "replaced by a copy", "touched"])
def test_a_file_is_known_again_until_it_changes(change: str, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "note.wav", np.zeros(SAMPLE_RATE))
    other = write_wav(tmp_path / "other.wav", np.full(SAMPLE_RATE, 0.5))
    with opened(path) as recording, opened(path, from_s=0.5) as later:
        identity = recording.identity(never)
        assert identity is not None
        assert later.identity(never) == identity
    if change == "rewritten":
        path.write_bytes(path.read_bytes() + b"more")
    elif change == "replaced by a copy":  # of the same size and time
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        clock = tmp_path / "clock"
        wait_until(lambda: clock.write_bytes(b"") == 0 and clock.stat().st_ctime_ns > path.stat().st_ctime_ns)
        other.rename(path)
    else:
        os.utime(path, ns=(1, 1))
    with opened(path) as recording:
        assert recording.identity(never) != identity


def test_where_a_file_lies_is_no_part_of_what_it_is() -> None:
    """Numbers of devices change at a start of the machine, those of files where a network folder is mounted again."""
    assert lasting_identity((1, 2, 3, 4, 5)) == lasting_identity((7, 8, 3, 4, 5)) != lasting_identity((1, 2, 3, 4, 6))


def test_what_cannot_be_opened_is_nothing_and_the_wait_for_it_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with opened(tmp_path / "none.wav") as recording:
        assert recording.identity(never) is None
    gate = threading.Event()

    @contextmanager
    def hangs(_path: Path, _limits: AudioLimits, **_: object) -> Iterator[FakeAudio]:
        gate.wait(PATIENCE_S)
        raise Cancelled
        yield FakeAudio()

    monkeypatch.setattr(module, "open_audio", hangs)
    with opened(Path("any")) as recording:
        asked = iter([False, True])
        with pytest.raises(Cancelled):
            recording.identity(lambda: next(asked))
        gate.set()


def test_a_recording_that_could_not_be_opened_is_not_fresh(tmp_path: Path) -> None:
    with opened(tmp_path / "later.wav") as recording:
        with pytest.raises(JobFailedError):
            list(recording.chunks(never))
        write_wav(tmp_path / "later.wav", np.zeros(SAMPLE_RATE))
        assert not recording.is_current


def test_a_recording_that_is_not_open_yet_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    @contextmanager
    def opens(_path: Path, _limits: AudioLimits, **_: object) -> Iterator[FakeAudio]:
        gate.wait(PATIENCE_S)
        if gate.is_set():
            raise Cancelled
        yield FakeAudio()

    monkeypatch.setattr(module, "open_audio", opens)
    recording = Recording(Path("any"), limits=LIMITS, window_s=10.0)
    assert recording.is_current
    gate.set()
    recording.close()
    assert not recording.is_current
