from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio.clock import Clock, Witnesses
from tests.recordings import LIMITS, Picture, Sound, decode, spans, tone, write

NO_WITNESS = Witnesses()


def clock(*, zero_s: float = 0.0, declared_s: float | None = None, witnesses: Witnesses = NO_WITNESS) -> Clock:
    return Clock(zero_s, declared_s, 86_400.0, witnesses)


def test_a_late_start_and_a_gap_are_silence_and_jitter_is_not() -> None:
    ours = clock(zero_s=100.0)
    assert ours.gap_s(105.0, 0.0) == pytest.approx(5.0)
    assert ours.gap_s(106.05, 6.0) == 0.0
    assert ours.gap_s(105.5, 6.0) == 0.0
    assert ours.gap_s(120.0, 7.0) == pytest.approx(13.0)


def test_rounded_time_stamps_that_run_away_are_followed_in_small_steps() -> None:
    # A recorder that lost one packet of 20 ms in each second: nothing in it is a gap, but its clock goes on.
    ours, heard_s, inserted_s = clock(), 0.0, 0.0
    for second in range(100):
        gap_s = ours.gap_s(second * 1.0, heard_s)
        inserted_s += gap_s
        heard_s += gap_s + 0.98
    assert inserted_s == pytest.approx(2.0, abs=0.15)


def test_a_jump_back_starts_a_new_clock_and_the_gaps_after_it_still_count() -> None:
    ours = clock()
    assert ours.gap_s(1.4, 60.0) == 0.0
    assert ours.gap_s(2.4, 61.0) == 0.0
    assert ours.gap_s(12.4, 62.0) == pytest.approx(9.0)


def test_a_jump_that_the_file_does_not_declare_inserts_nothing() -> None:
    ours = clock(declared_s=30.0)
    assert ours.gap_s(20.0, 10.0) == pytest.approx(10.0)
    assert ours.gap_s(95_443.7, 21.0) == 0.0
    assert ours.gap_s(95_447.7, 24.0) == pytest.approx(1.0)


def test_of_a_file_that_declares_less_than_it_has_the_gaps_still_count() -> None:
    assert clock(declared_s=10.0).gap_s(40.0, 30.0) == pytest.approx(10.0)


def test_without_a_declared_end_hours_are_believed_only_if_the_picture_goes_on_meanwhile() -> None:
    assert clock().gap_s(9000.0, 10.0) == 0.0
    seen = Witnesses()
    for second in range(10, 9000):
        seen.note(second + 0.2)
    assert clock(witnesses=seen).gap_s(9000.0, 10.0) == pytest.approx(8990.0)
    seen.forget()
    assert clock(witnesses=seen).gap_s(9000.0, 10.0) == 0.0


CODECS = {"matroska": "libopus", "mov": "aac", "mpegts": "aac", "flv": "aac", "nut": "flac", "asf": "libmp3lame"}


@pytest.mark.parametrize("container", CODECS)
def test_sound_that_starts_after_the_picture_is_where_it_belongs(container: str, tmp_path: Path) -> None:
    picture = Picture(9.0, "flv1" if container == "flv" else "mpeg4")
    sound = Sound(CODECS[container], 48_000 if container == "matroska" else 44_100, [])
    sound.pieces = [(5.0, tone(2, sound.rate))]
    samples, audio = decode(write(tmp_path / "late", container, picture, sound))
    ((start_s, end_s),) = spans(samples)
    assert (start_s, end_s) == pytest.approx((5.0, 7.0), abs=0.15)
    assert audio.warnings == ()


@pytest.mark.parametrize("container", CODECS)
@pytest.mark.parametrize("with_picture", [False, True])
def test_a_gap_in_the_time_stamps_is_silence(container: str, *, with_picture: bool, tmp_path: Path) -> None:
    sound = Sound(CODECS[container], 48_000 if container == "matroska" else 44_100, [])
    sound.pieces = [(0.0, tone(2, sound.rate)), (17.0, tone(2, sound.rate))]
    picture = [Picture(20.0, "flv1" if container == "flv" else "mpeg4")] if with_picture else []
    samples, audio = decode(write(tmp_path / "gap", container, *picture, sound))
    first, second = spans(samples)
    assert first == pytest.approx((0.0, 2.0), abs=0.15)
    assert second == pytest.approx((17.0, 19.0), abs=0.15)
    assert audio.decoded_s == pytest.approx(19.0, abs=0.2)
    assert audio.warnings == ()


def test_the_silence_of_a_long_gap_never_is_in_memory_at_once(tmp_path: Path) -> None:
    sound = Sound("flac", 16_000, [(0.0, tone(1, 16_000)), (590.0, tone(1, 16_000))])
    samples, _ = decode(write(tmp_path / "gap.mkv", "matroska", sound))
    assert [round(start_s) for start_s, _ in spans(samples)] == [0, 590]
    assert len(samples) == pytest.approx(591 * 16_000, abs=1600)


def test_two_transport_streams_in_one_file_follow_each_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "mpegts", Sound("mp2", 48_000, [(0.0, tone(3, 48_000))])).read_bytes()
    later = write(tmp_path / "b", "mpegts", Sound("mp2", 48_000, [(40_000.0, tone(3, 48_000))])).read_bytes()
    for name, content in (("same", first + first), ("later", first + later), ("earlier", later + first)):
        (tmp_path / name).write_bytes(content)
        samples, audio = decode(tmp_path / name)
        assert len(samples) / 16_000 == pytest.approx(6.0, abs=0.2), name
        assert audio.warnings == (), name


@pytest.mark.parametrize(("container", "warnings"), [("matroska", ("audio_damaged",)), ("mpegts", ())])
def test_a_long_gap_that_nothing_confirms_is_warned_of_where_it_cannot_be_another_recording(
    container: str, warnings: tuple[str, ...], tmp_path: Path
) -> None:
    rate = 48_000
    sound = Sound("mp2", rate, [(0.0, tone(3, rate)), (2000.0, tone(3, rate))])
    options = {"live": "1"} if container == "matroska" else None
    samples, audio = decode(
        write(tmp_path / "gap", container, sound, options=options), replace(LIMITS, max_duration_s=9000.0)
    )
    assert len(samples) / 16_000 == pytest.approx(6.0, abs=0.2)
    assert audio.warnings == warnings


def test_sound_starts_late_in_an_avi_that_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.avi", "avi", Picture(9.0), Sound("pcm_s16le", 16_000, [(0.0, tone(2, 16_000))]))
    content = bytearray(path.read_bytes())
    begin = content.find(b"auds") + 28  # dwStart of the stream's head, in units of dwScale / dwRate
    content[begin : begin + 4] = (5 * 16_000).to_bytes(4, "little")
    path.write_bytes(content)
    samples, audio = decode(path)
    assert spans(samples) == [pytest.approx((5.0, 7.0), abs=0.1)]
    assert audio.warnings == ()


def test_an_edit_list_that_delays_the_sound_is_honoured(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mov", "mov", Sound("pcm_s16le", 16_000, [(4.0, tone(2, 16_000))]))
    samples, _ = decode(path)
    assert spans(samples) == [pytest.approx((4.0, 6.0), abs=0.1)]


def test_a_piece_of_a_live_stream_begins_at_its_own_start(tmp_path: Path) -> None:
    sound = Sound("aac", 44_100, [(36_000.0, tone(3, 44_100))])
    samples, audio = decode(write(tmp_path / "piece.ts", "mpegts", sound))
    assert spans(samples) == [pytest.approx((0.0, 3.0), abs=0.1)]
    assert audio.warnings == ()


def test_the_limit_counts_the_silence_as_well(tmp_path: Path) -> None:
    sound = Sound("flac", 16_000, [(0.0, tone(1, 16_000)), (500.0, tone(1, 16_000))])
    path = write(tmp_path / "gap.mkv", "matroska", sound)
    assert LIMITS.max_duration_s > 501
    samples, _ = decode(path)
    assert np.abs(samples[-8000:]).max() > 0.3
