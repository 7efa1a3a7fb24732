"""Formats that recorders send: which decode, how long they last, and what stays out."""

import struct
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.errors import ErrorCode, JobFailedError
from tests.recordings import Picture, Sound, decode, frequencies, spans, tone, write

FORMATS = [
    ("nut", "flac", 16_000),
    ("mxf", "pcm_s16le", 48_000),
    ("asf", "libmp3lame", 44_100),
    ("latm", "aac", 44_100),
    ("tta", "tta", 16_000),
    ("voc", "pcm_u8", 16_000),
    ("w64", "pcm_s24le", 44_100),
    ("sox", "pcm_s32le", 16_000),
    ("wv", "wavpack", 16_000),
    ("3g2", "aac", 44_100),
    ("vob", "mp2", 48_000),
    ("wav", "pcm_mulaw", 8_000),
    ("wav", "pcm_alaw", 8_000),
    ("wav", "adpcm_ima_wav", 16_000),
    ("wav", "pcm_f64le", 16_000),
    ("wav", "pcm_u8", 16_000),
    ("matroska", "pcm_s16le", 16_000),
    ("mov", "alac", 44_100),
    ("mov", "pcm_s24le", 48_000),
    ("avi", "adpcm_ms", 16_000),
    ("eac3", "eac3", 48_000),
    ("wav", "g726", 8_000),
    ("wav", "g722", 16_000),
    ("flv", "nellymoser", 16_000),
    ("caf", "adpcm_ima_qt", 44_100),
    ("caf", "alac", 44_100),
    ("mp4", "flac", 44_100),
    ("mp4", "libopus", 48_000),
    ("mp4", "libmp3lame", 44_100),
    ("wav", "libmp3lame", 44_100),
    ("wav", "pcm_s64le", 16_000),
    ("aiff", "pcm_mulaw", 8_000),
]


@pytest.mark.parametrize(("container", "codec", "rate"), FORMATS)
def test_a_recorders_format_is_decoded(container: str, codec: str, rate: int, tmp_path: Path) -> None:
    picture = [Picture(3.0, "mpeg2video", rate=25)] if container == "mxf" else []
    path = write(tmp_path / "recording", container, *picture, Sound(codec, rate, [(0.0, tone(3, rate))]))
    decoded, audio = decode(path)
    assert audio.decoded_s == pytest.approx(3.0, abs=0.15)
    assert frequencies(decoded) == [440.0]
    assert audio.warnings == ()


NO_DATA = b"\x7c"
"""A frame of 20 ms in which nothing was sent (3GPP TS 26.101, 26.201)."""


@pytest.mark.parametrize("container", ["amr", "3gp"])
@pytest.mark.parametrize("pause", ["no data", "comfort noise"])
def test_ten_seconds_of_pause_in_amr_last_ten_seconds(container: str, pause: str, tmp_path: Path) -> None:
    speech = write(tmp_path / "a.amr", "amr", Sound("libopencore_amrnb", 8000, [(0.0, tone(3, 8000))])).read_bytes()
    head, frames = speech[:6], speech[6:]
    descriptor = b"\x44" + bytes(5)  # SID
    silent = NO_DATA * 500 if pause == "no data" else (descriptor + NO_DATA * 7) * 62 + NO_DATA * 4
    path = tmp_path / "pause.amr"
    path.write_bytes(head + frames + silent + frames)
    if container == "3gp":
        path = copied(path, tmp_path / "pause.3gp")
    samples, audio = decode(path)
    assert audio.decoded_s == pytest.approx(16.0, abs=0.1)
    first, second = spans(samples, level=0.2)
    assert first[0] == pytest.approx(0.0, abs=0.1)
    assert second == pytest.approx((13.0, 16.0), abs=0.15)
    assert audio.warnings == ()


def copied(source: Path, target: Path) -> Path:
    import av  # noqa: PLC0415

    with av.open(source) as read, av.open(target, "w", format="3gp") as written:
        stream = written.add_stream_from_template(read.streams.audio[0])
        for packet in read.demux(read.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    return target


def test_pauses_in_wideband_amr_last_as_long_as_they_are(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    speech = b"".join(b"\x14" + chance.bytes(32) for _ in range(100))  # 12.65 kbit/s
    path = tmp_path / "a.amr"
    path.write_bytes(b"#!AMR-WB\n" + speech + (b"\x4c" + bytes(5) + NO_DATA * 7) * 50 + speech)
    _, audio = decode(path)
    assert audio.decoded_s == pytest.approx(12.0, abs=0.1)
    assert audio.warnings == ()


def test_gsm_of_telephone_systems_is_decoded(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    path = tmp_path / "a.gsm"
    path.write_bytes(b"".join(bytes([0xD0 | chance.integers(0, 16)]) + chance.bytes(32) for _ in range(150)))
    _, audio = decode(path)
    assert audio.decoded_s == pytest.approx(3.0, abs=0.05)


LEFT_OUT = {
    "list.m3u8": b"#EXTM3U\n#EXTINF:2,\nreal.ts\n",
    "list.pls": b"[playlist]\nFile1=http://127.0.0.1/a.mp3\n",
    "list.asx": b'<asx version="3.0"><entry><ref href="http://127.0.0.1/a.wma"/></entry></asx>',
    "list.mpd": b'<?xml version="1.0"?><MPD></MPD>',
    "list.ffconcat": b"ffconcat version 1.0\nfile real.ts\n",
    "call.sdp": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
    "a.srt": b"1\n00:00:01,000 --> 00:00:02,000\nHello\n\n" * 5,
    "a.png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 8, 8, 8, 2, 0, 0, 0) + bytes(500),
    "a.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + bytes(500),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_no_recording_is_not_allowed_and_the_error_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(LEFT_OUT[name])
    with pytest.raises(JobFailedError, match="kind that is not decoded here") as caught:
        decode(tmp_path / name)
    assert caught.value.code is ErrorCode.AUDIO_NOT_ALLOWED
