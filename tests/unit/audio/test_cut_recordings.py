"""Recordings whose ends or beginnings are missing, in containers that do not declare how long they are."""

import struct
from pathlib import Path

import pytest

from tests.recordings import Picture, Sound, decode, tone, write

KINDS = {
    "mp3": Sound("libmp3lame", 44_100, [(0.0, tone(8, 44_100))]),
    "mp2": Sound("mp2", 48_000, [(0.0, tone(8, 48_000))]),
    "adts": Sound("aac", 44_100, [(0.0, tone(8, 44_100))]),
    "ac3": Sound("ac3", 48_000, [(0.0, tone(8, 48_000))]),
    "eac3": Sound("eac3", 48_000, [(0.0, tone(8, 48_000))]),
    "mpegts": Sound("mp2", 48_000, [(0.0, tone(8, 48_000))]),
    "vob": Sound("mp2", 48_000, [(0.0, tone(8, 48_000))]),
    "voc": Sound("pcm_u8", 16_000, [(0.0, tone(8, 16_000))]),
    "webm": Sound("libopus", 48_000, [(0.0, tone(8, 48_000))]),
}


def recording(container: str, tmp_path: Path) -> bytes:
    picture = [Picture(8.0, "mpeg2video", 25)] if container == "vob" else []
    options = {"write_xing": "0"} if container == "mp3" else {"live": "1"} if container == "webm" else None
    return write(tmp_path / "whole", container, *picture, KINDS[container], options=options).read_bytes()


@pytest.mark.parametrize("container", KINDS)
def test_a_cut_in_the_middle_of_a_frame_is_noticed(container: str, tmp_path: Path) -> None:
    content = recording(container, tmp_path)
    samples, whole = decode(tmp_path / "whole")
    assert whole.warnings == ()
    for share in (0.31, 0.635, 0.93):
        (tmp_path / "cut").write_bytes(content[: int(share * len(content)) | 1])
        shorter, audio = decode(tmp_path / "cut")
        assert len(shorter) < len(samples)
        assert "audio_truncated" in audio.warnings, share


@pytest.mark.parametrize("layout", ["192 bytes", "204 bytes", "begins in a packet"])
def test_a_whole_transport_stream_is_not_called_cut(layout: str, tmp_path: Path) -> None:
    content = recording("mpegts", tmp_path)
    packets = [content[start : start + 188] for start in range(0, len(content), 188)]
    changed = {
        "192 bytes": b"".join(struct.pack(">I", number) + packet for number, packet in enumerate(packets)),
        "204 bytes": b"".join(packet + bytes(16) for packet in packets),
        "begins in a packet": content[100:],
    }
    (tmp_path / "a.ts").write_bytes(changed[layout])
    samples, audio = decode(tmp_path / "a.ts")
    assert len(samples) / 16_000 == pytest.approx(8.0, abs=0.2)
    assert audio.warnings == ()


def tag(size: int, *, declared: int | None = None, footer: bool = False) -> bytes:
    declares = size if declared is None else declared
    sizes = bytes(declares >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0" + bytes([0x10 if footer else 0]) + sizes + bytes(size + (10 if footer else 0))


@pytest.mark.parametrize("container", ["mp3", "adts", "flac", "wav"])
@pytest.mark.parametrize("front", [tag(4000), tag(3_000_000), tag(500) + tag(700), tag(500, footer=True)], ids=len)
def test_a_tag_of_any_size_before_the_sound_is_skipped(container: str, front: bytes, tmp_path: Path) -> None:
    codecs = {"mp3": "libmp3lame", "adts": "aac", "flac": "flac", "wav": "pcm_s16le"}
    sound = Sound(codecs[container], 44_100, [(0.0, tone(3, 44_100))])
    content = write(tmp_path / "a", container, sound).read_bytes()
    (tmp_path / "a").write_bytes(front + content)
    samples, audio = decode(tmp_path / "a")
    assert len(samples) / 16_000 == pytest.approx(3.0, abs=0.1)
    assert audio.warnings == ()


def test_a_tag_that_declares_more_than_it_has_and_an_mp3_without_its_beginning_are_damaged(tmp_path: Path) -> None:
    content = recording("mp3", tmp_path)
    for damaged in (tag(1000, declared=20_000) + content, content[len(content) // 3 + 17 :]):
        (tmp_path / "a.mp3").write_bytes(damaged)
        samples, audio = decode(tmp_path / "a.mp3")
        assert 3.0 < len(samples) / 16_000 < 7.5
        assert "audio_damaged" in audio.warnings


@pytest.mark.parametrize("codec", ["flac", "libopus"])
def test_sound_that_is_lost_in_a_recording_that_declares_too_little_is_noticed(codec: str, tmp_path: Path) -> None:
    container = "flac" if codec == "flac" else "ogg"
    content = bytearray(write(tmp_path / "a", container, Sound(codec, 48_000, [(0.0, tone(12, 48_000))])).read_bytes())
    if codec == "flac":  # how many samples there are (RFC 9639, section 8.2)
        content[21:26] = (int.from_bytes(content[21:26], "big") - 300_000).to_bytes(5, "big")
        del content[len(content) // 2 : len(content) * 3 // 4]
    else:
        pages = content.split(b"OggS")
        del pages[len(pages) // 2 : len(pages) * 3 // 4]
        content = bytearray(b"OggS".join(pages))
    (tmp_path / "a").write_bytes(content)
    samples, audio = decode(tmp_path / "a")
    assert len(samples) / 16_000 < 12.5
    assert "audio_damaged" in audio.warnings
