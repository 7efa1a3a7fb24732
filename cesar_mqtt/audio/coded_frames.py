"""How long a coded frame is by its own head: the last one of a file that was cut is shorter. Pure; any thread."""

from collections.abc import Callable, Mapping

_MPEG_HEAD_BYTES, _ADTS_HEAD_BYTES, _AC3_HEAD_BYTES = 4, 7, 6
_MPEG_SYNC, _ADTS_SYNC, _ADTS_MASK = 0xFFE0, 0xFFF0, 0xFFF6
_MPEG_KBPS = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""By whether it is MPEG-1, and the layer (ISO/IEC 11172-3 and 13818-3, section 2.4.2.3); 0: it is not told."""
_MPEG_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""By the version: 1, 2 and 2.5."""
_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


def _mpeg(data: bytes) -> int | None:
    if len(data) < _MPEG_HEAD_BYTES or int.from_bytes(data[:2], "big") & _MPEG_SYNC != _MPEG_SYNC:
        return None
    version, layer = data[1] >> 3 & 3, 4 - (data[1] >> 1 & 3)
    rates, kbps = _MPEG_HZ.get(version, ()), _MPEG_KBPS.get((version == max(_MPEG_HZ), layer), ())
    rate_index, kbps_index, padding = data[2] >> 2 & 3, data[2] >> 4, data[2] >> 1 & 1
    if rate_index >= len(rates) or kbps_index >= len(kbps) or not kbps[kbps_index]:
        return None
    bits_per_s, rate = 1000 * kbps[kbps_index], rates[rate_index]
    if layer == 1:
        return (12 * bits_per_s // rate + padding) * 4
    samples = 576 if layer == max(_MPEG_HZ) and version != max(_MPEG_HZ) else 1152
    return samples // 8 * bits_per_s // rate + padding


def _adts(data: bytes) -> int | None:
    """ISO/IEC 13818-7, section 6.2; other AAC has no head."""
    if len(data) < _ADTS_HEAD_BYTES or int.from_bytes(data[:2], "big") & _ADTS_MASK != _ADTS_SYNC:
        return None
    return (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5


def _ac3(data: bytes) -> int | None:
    """ETSI TS 102 366, section 4.3.1 and table 4.13."""
    if len(data) < _AC3_HEAD_BYTES or data[:2] != b"\x0b\x77":
        return None
    rate, size = data[4] >> 6, data[4] & 0x3F
    if size >= 2 * len(_AC3_KBPS):
        return None
    kbps = _AC3_KBPS[size // 2]
    return {0: 4 * kbps, 1: 2 * (kbps * 320 // 147 + size % 2), 2: 6 * kbps}.get(rate)


def _eac3(data: bytes) -> int | None:
    """ETSI TS 102 366, section E.1.2.1."""
    if len(data) < _AC3_HEAD_BYTES or data[:2] != b"\x0b\x77":
        return None
    return 2 * (((data[2] & 7) << 8 | data[3]) + 1)


_READERS: Mapping[str, Callable[[bytes], int | None]] = {
    "mp1": _mpeg,
    "mp2": _mpeg,
    "mp3": _mpeg,
    "aac": _adts,
    "ac3": _ac3,
    "eac3": _eac3,
}
HEAD_BYTES = _ADTS_HEAD_BYTES


def declared_bytes(codec: str, head: bytes) -> int | None:
    """Return the length that a frame declares in its first `HEAD_BYTES` bytes; None: it does not.

    Args:
        codec: FFmpeg's name of it, or of one of its decoders (`mp3float`).
        head: the beginning of the frame.
    """
    read = _READERS.get(codec.removesuffix("float").removesuffix("_fixed"))
    return None if read is None else read(head)
