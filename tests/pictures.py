"""Cover art for tests: a PNG of any size that is small on disk, and recordings that carry it."""

import base64
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.audio.stream import AudioStream


def png(side: int) -> bytes:
    """A black picture of `side` by `side` pixels, 1 MB for 16,000: one compressed row, repeated."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    row = bytes(1 + 3 * side)
    packed = pack.compress(row) + pack.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    checksum = 1
    for _ in range(side):
        checksum = zlib.adler32(row, checksum)
    pixels = b"\x78\xda" + packed * side + b"\x03\x00" + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(path: Path, codec: str, tone: NDArray[np.int16], *, rate: int = 16_000) -> Path:
    """Write mono samples; the ending of the name tells the container."""
    with av.open(path, "w") as file:
        audio = cast("AudioStream", file.add_stream(codec, rate=rate, layout="mono"))
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[np.newaxis, start : start + 1024], "s16", "mono")
            frame.sample_rate, frame.pts = rate, start
            file.mux(audio.encode(frame))
        file.mux(audio.encode(None))
    return path


def with_cover(path: Path, picture: bytes) -> Path:
    """Put a picture into an MP3 or a FLAC file, as players do (ID3v2.3 section 4.15; FLAC METADATA_BLOCK_PICTURE)."""
    content = path.read_bytes()
    if path.suffix == ".mp3":
        frame = b"\x00image/png\x00\x03\x00" + picture
        tag = b"APIC" + struct.pack(">IH", len(frame), 0) + frame
        size = bytes(len(tag) >> shift & 0x7F for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\x00\x00" + size + tag + content)
    else:
        block = _flac_picture(picture)
        # After STREAMINFO, which is always first and 4 + 34 bytes long; bit 7 marks the last block.
        head, rest = bytearray(content[:42]), content[42:]
        is_last, head[4] = head[4] & 0x80, head[4] & 0x7F
        path.write_bytes(bytes(head) + bytes([6 | is_last]) + struct.pack(">I", len(block))[1:] + block + rest)
    return path


def _flac_picture(picture: bytes) -> bytes:
    kind = b"image/png"
    fields = struct.pack(">II", 3, len(kind)) + kind + struct.pack(">IIIIII", 0, 0, 0, 0, 0, len(picture))
    return fields + picture


def tagged(path: Path, picture: bytes, tone: NDArray[np.int16]) -> Path:
    """Write mono samples at 16 kHz as `.ogg` (a comment), `.m4a` (`covr`) or `.mka` (an attachment), with a picture."""
    with av.open(path, "w", format={".ogg": "ogg", ".m4a": "mp4", ".mka": "matroska"}[path.suffix]) as file:
        audio = file.add_stream("libopus" if path.suffix == ".ogg" else "aac", rate=16_000, layout="mono")
        packets: list[av.Packet[Any]] = []
        if path.suffix == ".ogg":
            file.metadata["METADATA_BLOCK_PICTURE"] = base64.b64encode(_flac_picture(picture)).decode()
        elif path.suffix == ".mka":
            file.add_attachment("cover.png", "image/png", picture)
        else:
            cover = file.add_stream("png", rate=1)
            cover.width = cover.height = 16
            cover.pix_fmt = "rgb24"
            cover.disposition = Disposition.attached_pic
            image: av.Packet[Any] = av.Packet(picture)
            image.stream, image.pts, image.dts, image.time_base = cover, 0, 0, Fraction(1)
            packets.append(image)
        frame = av.AudioFrame.from_ndarray(tone[np.newaxis], "s16", "mono")
        frame.sample_rate = 16_000
        file.mux([*packets, *audio.encode(frame), *audio.encode(None)])
    return path
