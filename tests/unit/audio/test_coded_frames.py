from pathlib import Path

import av
import pytest

from cesar_mqtt.audio.coded_frames import HEAD_BYTES, declared_bytes
from tests.recordings import Sound, tone, write

KINDS = [
    ("mp3", "libmp3lame", 44_100, "mp3"),
    ("mp3", "libmp3lame", 16_000, "mp3float"),
    ("mp3", "libmp3lame", 8_000, "mp3"),
    ("mp2", "mp2", 48_000, "mp2float"),
    ("mp2", "mp2", 22_050, "mp2"),
    ("adts", "aac", 44_100, "aac"),
    ("ac3", "ac3", 48_000, "ac3"),
    ("ac3", "ac3", 44_100, "ac3_fixed"),
    ("ac3", "ac3", 32_000, "ac3"),
    ("eac3", "eac3", 48_000, "eac3"),
]


@pytest.mark.parametrize(("container", "codec", "rate", "decoder"), KINDS)
def test_each_frame_has_the_length_that_it_declares(
    container: str, codec: str, rate: int, decoder: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", container, Sound(codec, rate, [(0.0, tone(2, rate))]))
    with av.open(path) as file:
        packets = [packet for packet in file.demux(audio=0) if packet.size]
    assert len(packets) > 20
    # The decoder's own tag in the first frame of an MP3 is not a packet of its own.
    assert all(declared_bytes(decoder, bytes(packet)[:HEAD_BYTES]) == packet.size for packet in packets)


@pytest.mark.parametrize("decoder", ["mp3", "aac", "ac3", "eac3", "flac", "opus"])
@pytest.mark.parametrize("data", [b"", b"\xff", bytes(7), b"\xff" * 7, b"TAG....", b"\xff\xf2\x00\x00\x00\x00\x00"])
def test_what_is_no_head_declares_nothing(decoder: str, data: bytes) -> None:
    assert declared_bytes(decoder, data) is None
