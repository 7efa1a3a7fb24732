from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.joined import next_start
from tests.recordings import Picture, Sound, decode, frequencies, spans, tone, write, write_wav

KINDS = [
    ("wav", "pcm_s16le", 16_000),
    ("flac", "flac", 16_000),
    ("aiff", "pcm_s16be", 16_000),
    ("mp4", "aac", 16_000),
    ("matroska", "aac", 16_000),
    ("webm", "libopus", 48_000),
    ("ogg", "libopus", 48_000),
    ("caf", "pcm_s16le", 16_000),
    ("au", "pcm_s16be", 16_000),
    ("w64", "pcm_s16le", 16_000),
    ("mp3", "libmp3lame", 44_100),
    ("adts", "aac", 44_100),
    ("amr", "libopencore_amrnb", 8_000),
    ("avi", "pcm_s16le", 16_000),
    ("flv", "aac", 44_100),
    ("tta", "tta", 16_000),
    ("mpegts", "mp2", 48_000),
]


def kind(container: str, codec: str, rate: int, frequency: float, tmp_path: Path) -> bytes:
    sound = Sound(codec, rate, [(0.0, tone(3, rate, frequency))])
    return write(tmp_path / "part", container, sound).read_bytes()


@pytest.mark.parametrize(("container", "codec", "rate"), KINDS)
def test_of_joined_files_all_are_heard_and_nothing_is_called_cut_or_damaged(
    container: str, codec: str, rate: int, tmp_path: Path
) -> None:
    parts = [kind(container, codec, rate, frequency, tmp_path) for frequency in (440, 1200, 700)]
    (tmp_path / "joined").write_bytes(b"".join(parts))
    samples, audio = decode(tmp_path / "joined")
    assert audio.decoded_s == pytest.approx(9.0, abs=0.3)
    for number, frequency in enumerate((440.0, 1200.0, 700.0)):
        middle = samples[(3 * number + 1) * 16_000 : (3 * number + 2) * 16_000]
        assert frequencies(middle) == [frequency]
    assert audio.warnings == ()


def test_joined_mp3s_of_different_rates_and_channels_are_whole(tmp_path: Path) -> None:
    first = write(tmp_path / "a.mp3", "mp3", Sound("libmp3lame", 16_000, [(0.0, tone(3, 16_000))])).read_bytes()
    stereo = np.repeat(tone(3, 44_100, 1200)[:, None], 2, axis=1)
    second = Sound("libmp3lame", 44_100, [(0.0, stereo)], layout="stereo")
    (tmp_path / "joined.mp3").write_bytes(first + write(tmp_path / "b.mp3", "mp3", second).read_bytes())
    samples, audio = decode(tmp_path / "joined.mp3")
    assert audio.decoded_s == pytest.approx(6.0, abs=0.2)
    assert frequencies(samples[4 * 16_000 : 5 * 16_000]) == [1200.0]
    assert audio.warnings == ()


@pytest.mark.parametrize(
    ("first", "second"), [(("flac", 16_000), ("libopus", 48_000)), (("flac", 44_100), ("flac", 8_000))]
)
def test_chained_ogg_may_change_its_codec_and_its_rate(
    first: tuple[str, int], second: tuple[str, int], tmp_path: Path
) -> None:
    parts = [
        kind("ogg", codec, rate, frequency, tmp_path) for (codec, rate), frequency in ((first, 440), (second, 1200))
    ]
    (tmp_path / "chained.ogg").write_bytes(b"".join(parts))
    samples, audio = decode(tmp_path / "chained.ogg")
    assert audio.decoded_s == pytest.approx(6.0, abs=0.1)
    assert frequencies(samples[16_000 : 2 * 16_000]) == [440.0]
    assert frequencies(samples[4 * 16_000 : 5 * 16_000]) == [1200.0]
    assert audio.warnings == ()


def test_a_joined_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    first = write_wav(tmp_path / "a.wav", tone(2, 16_000), 16_000).read_bytes()
    (tmp_path / "joined.wav").write_bytes(first + b"RIFF\x64\0\0\0WAVEjunk" + bytes(100))
    samples, audio = decode(tmp_path / "joined.wav")
    assert len(samples) == 2 * 16_000
    assert audio.warnings == ("audio_damaged",)


def test_tags_behind_the_sound_are_no_further_file(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(2, 16_000), 16_000)
    for tail in (b"LIST\x04\0\0\0INFO", b"ID3\x04" + bytes(300), bytes(5000), b"TAG" + b"x" * 125):
        path.write_bytes(write_wav(tmp_path / "a.wav", tone(2, 16_000), 16_000).read_bytes() + tail)
        samples, audio = decode(path)
        assert (len(samples), audio.warnings) == (2 * 16_000, ())


def test_sound_behind_the_end_that_the_header_declares_is_heard(tmp_path: Path) -> None:
    # A recorder that lost power: it updates its header once a minute.
    noise = np.random.default_rng(1).uniform(-0.3, 0.3, 8 * 16_000).astype(np.float32)
    path = write_wav(tmp_path / "a.wav", noise, 16_000, declared_s=3.0)
    assert decode(path)[1].decoded_s == pytest.approx(8.0, abs=0.01)


@pytest.mark.parametrize(("container", "codec", "rate"), [row for row in KINDS if row[0] not in {"mp4", "mpegts"}])
def test_a_cut_file_is_called_cut_or_damaged(container: str, codec: str, rate: int, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    sound = Sound(codec, rate, [(0.0, tone(12, rate))])
    content = write(path, container, sound).read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10 + 1])
    _, audio = decode(path)
    assert {"audio_truncated", "audio_damaged"} & set(audio.warnings)


@pytest.mark.parametrize(("container", "codec", "rate"), KINDS)
@pytest.mark.parametrize("with_picture", [False, True])
def test_a_whole_file_is_called_neither(
    container: str, codec: str, rate: int, *, with_picture: bool, tmp_path: Path
) -> None:
    if with_picture and container not in {"mp4", "matroska", "avi", "flv", "mpegts"}:
        return
    picture = [Picture(20.0, "flv1" if container == "flv" else "mpeg4")] if with_picture else []
    _, audio = decode(write(tmp_path / "a", container, Sound(codec, rate, [(0.0, tone(4, rate))]), *picture))
    assert audio.decoded_s == pytest.approx(4.0, abs=0.15)
    assert audio.warnings == ()


@pytest.mark.parametrize("container", ["flac", "ogg", "mp4", "adts", "mp3"])
def test_damage_in_the_middle_costs_little_and_is_reported(container: str, tmp_path: Path) -> None:
    codec, rate = {name: (codec, rate) for name, codec, rate in KINDS}[container]
    path = tmp_path / "damaged"
    content = bytearray(write(path, container, Sound(codec, rate, [(0.0, tone(12, rate))])).read_bytes())
    place = len(content) // 2
    content[place : place + 300] = np.random.default_rng(1).bytes(300)
    path.write_bytes(content)
    samples, audio = decode(path)
    assert audio.warnings == ("audio_damaged",)
    assert audio.decoded_s == pytest.approx(12.0, abs=0.2)
    assert frequencies(samples[9 * 16_000 : 11 * 16_000]) == [440.0]


def test_a_header_of_thirty_hours_over_six_seconds_is_six_seconds(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", (tone(6, 8000) * 32_000).astype(np.int16), 8000, declared_s=108_000.0)
    samples, audio = decode(path)
    assert spans(samples) == [pytest.approx((0.0, 6.0), abs=0.1)]
    assert audio.warnings == ("audio_truncated",)
    assert audio.info.duration_s == pytest.approx(6.0)


def test_a_flac_that_declares_thirty_hours_is_measured_before_it_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", "flac", Sound("flac", 16_000, [(0.0, tone(6, 16_000))]))
    content = bytearray(path.read_bytes())
    total = 108_000 * 16_000  # 36 bits of STREAMINFO, RFC 9639, section 8.2
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = (total & 0xFFFF_FFFF).to_bytes(4, "big")
    path.write_bytes(content)
    samples, audio = decode(path)
    assert len(samples) == 6 * 16_000
    assert "audio_truncated" in audio.warnings


def test_the_parts_of_a_file_end_where_the_next_begins(tmp_path: Path) -> None:
    part = write_wav(tmp_path / "a.wav", tone(1, 16_000), 16_000).read_bytes()
    (tmp_path / "joined.wav").write_bytes(part + part)
    with (tmp_path / "joined.wav").open("rb") as file:
        assert next_start(FileReader(file.fileno())) == len(part)
        assert next_start(FileReader(file.fileno(), start=len(part))) is None
        whole = FileReader(file.fileno(), end=len(part))
        assert whole.size() == len(part)
        assert whole.read_at(len(part) - 3, 10) == part[-3:]
        assert whole.read_at(len(part), 10) == b""


def test_a_default_track_of_one_part_only_is_chosen_in_each(tmp_path: Path) -> None:
    low, high = (Sound("aac", 16_000, [(0.0, tone(3, 16_000, frequency))]) for frequency in (440, 1200))
    first = write(tmp_path / "a", "matroska", replace(low, default=False), replace(high, default=True)).read_bytes()
    second = write(tmp_path / "b", "matroska", low).read_bytes()
    (tmp_path / "joined").write_bytes(first + second)
    samples, audio = decode(tmp_path / "joined")
    assert frequencies(samples[16_000 : 2 * 16_000]) == [1200.0]
    assert frequencies(samples[4 * 16_000 : 5 * 16_000]) == [440.0]
    assert audio.warnings == ("audio_tracks_ignored",)
