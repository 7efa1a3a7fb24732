from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio import tracks
from cesar_mqtt.audio.tracks import TrackMixer
from cesar_mqtt.errors import ErrorCode, JobFailedError
from tests.recordings import LIMITS, Picture, Sound, decode, frequencies, spans, tone, write, write_wav

LOW = Sound("aac", 44_100, [(0.0, tone(3, 44_100, 440))])
HIGH = Sound("aac", 44_100, [(0.0, tone(3, 44_100, 1200))])
SILENT = Sound("aac", 44_100, [(0.0, np.zeros(3 * 44_100, np.float32))])
IGNORED = ("audio_tracks_ignored",)


def opus(track: Sound) -> Sound:
    frequency = 440 if track is LOW else 1200
    return replace(track, codec="libopus", rate=48_000, pieces=[(0.0, tone(3, 48_000, frequency))])


def test_the_first_of_several_tracks_is_heard_and_the_others_are_named(tmp_path: Path) -> None:
    samples, audio = decode(write(tmp_path / "a.mp4", "mp4", Picture(3.0), LOW, HIGH))
    assert frequencies(samples) == [440.0]
    assert audio.warnings == IGNORED


@pytest.mark.parametrize("container", ["matroska", "mov"])
def test_the_track_flagged_as_default_is_heard(container: str, tmp_path: Path) -> None:
    first, second = replace(LOW, default=False), replace(HIGH, default=True)
    samples, audio = decode(write(tmp_path / "a", container, first, second))
    assert frequencies(samples) == [1200.0]
    assert audio.warnings == IGNORED


@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska"])
@pytest.mark.parametrize("silent", [1, 3])
def test_a_silent_track_does_not_hide_a_speaking_one(container: str, silent: int, tmp_path: Path) -> None:
    samples, audio = decode(write(tmp_path / "a", container, *[SILENT] * silent, LOW))
    assert frequencies(samples) == [440.0]
    assert audio.warnings == ()


def test_a_track_that_is_silent_for_long_and_then_speaks_is_the_first_all_the_same(tmp_path: Path) -> None:
    late = replace(LOW, pieces=[(0.0, np.concatenate((np.zeros(20 * 44_100, np.float32), tone(2, 44_100))))])
    samples, audio = decode(write(tmp_path / "a.mp4", "mp4", late, HIGH))
    assert spans(samples) == [pytest.approx((20.0, 22.0), abs=0.1)]
    assert audio.warnings == IGNORED


def test_a_silent_other_track_is_not_worth_a_warning(tmp_path: Path) -> None:
    assert decode(write(tmp_path / "a.mp4", "mp4", LOW, SILENT))[1].warnings == ()


@pytest.mark.parametrize(("number", "frequency"), [(0, 440.0), (1, 1200.0)])
def test_a_track_is_chosen_by_number(number: int, frequency: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", "matroska", Picture(3.0), opus(LOW), opus(HIGH))
    samples, audio = decode(path, track=number)
    assert frequencies(samples) == [frequency]
    assert audio.warnings == ()


def test_a_track_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match=r"no audio track 2: its tracks are numbered from 0 to 1") as caught:
        decode(write(tmp_path / "a.mp4", "mp4", LOW, HIGH), track=2)
    assert caught.value.code is ErrorCode.AUDIO_NO_STREAM


def test_mixed_all_tracks_are_heard_each_at_its_time(tmp_path: Path) -> None:
    late = replace(HIGH, pieces=[(2.0, tone(3, 44_100, 1200))])
    samples, audio = decode(write(tmp_path / "a.mp4", "mp4", LOW, late), track="mix")
    assert frequencies(samples[: 16_000 * 19 // 10]) == [440.0]
    assert frequencies(samples[16_000 * 21 // 10 : 16_000 * 29 // 10], count=2) == [440.0, 1200.0]
    assert frequencies(samples[16_000 * 31 // 10 : 16_000 * 49 // 10]) == [1200.0]
    assert audio.decoded_s == pytest.approx(5.0, abs=0.1)
    assert audio.warnings == ()


def test_one_track_can_be_mixed_as_well(tmp_path: Path) -> None:
    assert frequencies(decode(write(tmp_path / "a.mp4", "mp4", LOW), track="mix")[0]) == [440.0]


@pytest.mark.parametrize("fourcc", [b"apac", b"xxxx"])
def test_a_track_that_cannot_be_decoded_does_not_hide_the_next(fourcc: bytes, tmp_path: Path) -> None:
    content = write(tmp_path / "a.mov", "mov", LOW, HIGH).read_bytes()
    (tmp_path / "a.mov").write_bytes(content.replace(b"mp4a", fourcc, 1).replace(b"esds", b"dapa", 1))
    samples, audio = decode(tmp_path / "a.mov")
    assert frequencies(samples) == [1200.0]
    assert audio.warnings == IGNORED
    with pytest.raises(JobFailedError) as caught:
        decode(tmp_path / "a.mov", track=0)
    assert caught.value.code is ErrorCode.AUDIO_UNREADABLE


def test_only_tracks_that_cannot_be_decoded_are_unreadable(tmp_path: Path) -> None:
    content = write(tmp_path / "a.mov", "mov", LOW, HIGH).read_bytes()
    (tmp_path / "a.mov").write_bytes(content.replace(b"mp4a", b"apac").replace(b"esds", b"dapa"))
    with pytest.raises(JobFailedError) as caught:
        decode(tmp_path / "a.mov")
    assert caught.value.code is ErrorCode.AUDIO_UNREADABLE


def test_a_stream_that_appears_late_in_a_transport_stream_is_found(tmp_path: Path) -> None:
    # A camera that began with the picture alone: its tables name the sound only from the second part on.
    silent = write(tmp_path / "a", "mpegts", Picture(40.0)).read_bytes()
    picture_and_sound = write(tmp_path / "b", "mpegts", Picture(40.0), replace(LOW, codec="mp2")).read_bytes()
    (tmp_path / "late.ts").write_bytes(silent * 60 + picture_and_sound)
    assert (tmp_path / "late.ts").stat().st_size > 5_000_000
    samples, audio = decode(tmp_path / "late.ts")
    assert 440.0 in frequencies(samples)
    assert audio.decoded_s >= 2.9


def test_tracks_that_come_far_apart_are_mixed_without_keeping_one_back() -> None:
    mixer = TrackMixer(2)
    ones = np.ones(100 * 16_000, np.float32)
    first = np.concatenate(list(mixer.push(0, ones)))
    assert len(first) == 40 * 16_000
    second = np.concatenate(list(mixer.push(1, ones[: 10 * 16_000])))
    assert len(second) == 10 * 16_000
    assert second.max() == 2.0
    rest = np.concatenate(list(mixer.finish()))
    assert len(rest) == 50 * 16_000
    assert rest.max() == 1.0


@pytest.mark.parametrize("channels", [1, 64])
@pytest.mark.parametrize("rate", [1, 100, 999])
def test_so_few_samples_a_second_that_some_kilobytes_last_for_hours_are_no_sound(
    rate: int, channels: int, tmp_path: Path
) -> None:
    noise = np.random.default_rng(1).integers(-9000, 9000, (20_000 // channels, channels), np.int16)
    with pytest.raises(JobFailedError) as caught:
        decode(write_wav(tmp_path / "a.wav", noise, rate), replace(LIMITS, max_duration_s=86_400.0))
    assert caught.value.code is ErrorCode.AUDIO_UNREADABLE


def test_the_slowest_recording_that_can_hold_speech_is_decoded(tmp_path: Path) -> None:
    assert frequencies(decode(write_wav(tmp_path / "a.wav", tone(3, 4000, 440), 4000))[0]) == [440.0]


def test_of_tracks_that_are_all_silent_for_long_the_first_that_speaks_is_heard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracks, "_LISTEN_S", 5.0)
    silent = replace(SILENT, pieces=[(0.0, np.zeros(12 * 44_100, np.float32))])
    late = replace(HIGH, pieces=[(0.0, np.concatenate((np.zeros(9 * 44_100, np.float32), tone(3, 44_100, 1200))))])
    samples, audio = decode(write(tmp_path / "a.mp4", "mp4", silent, late))
    assert frequencies(samples) == [1200.0]
    assert audio.warnings == ()
