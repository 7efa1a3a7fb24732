"""Recordings as phones, cameras and recorders make them, written by PyAV: several tracks, pauses, odd channels."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, AudioReader, Samples, TrackChoice, open_audio

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.video.stream import VideoStream

LIMITS = AudioLimits(max_bytes=50_000_000, max_duration_s=600.0)
_PART = 1024


def tone(duration_s: float, rate: int, frequency: float = 440.0, peak: float = 0.4) -> NDArray[np.float32]:
    times = np.arange(int(duration_s * rate)) / rate
    return (peak * np.sin(2 * np.pi * frequency * times)).astype(np.float32)


@dataclass
class Sound:
    """A track: pieces of sound, each as the second at which it begins and samples of shape (n,) or (n, channels)."""

    codec: str
    rate: int
    pieces: Sequence[tuple[float, NDArray[np.float32]]]
    default: bool | None = None
    layout: str = "mono"
    options: dict[str, str] = field(default_factory=dict)


@dataclass
class Picture:
    """A track of small pictures."""

    duration_s: float
    codec: str = "mpeg4"
    rate: int = 5


def write(path: Path, container: str, *tracks: Sound | Picture, options: dict[str, str] | None = None) -> Path:
    """Write the tracks, interleaved by time."""
    with av.open(path, "w", format=container, options=options) as written:
        packets: list[tuple[float, Any]] = []
        for number, track in enumerate(tracks):
            made = _picture(written, track) if isinstance(track, Picture) else _sound(written, track)
            packets += [(_time_of(packet, number), packet) for packet in made]
        for _, packet in sorted(packets, key=lambda pair: pair[0]):
            written.mux(packet)
    return path


def _time_of(packet: Any, number: int) -> float:
    return float((packet.dts or 0) * packet.time_base) + number * 1e-6


def _picture(written: av.container.OutputContainer, track: Picture) -> list[Any]:
    stream = cast("VideoStream", written.add_stream(track.codec, rate=track.rate))
    stream.width = stream.height = 32
    packets: list[Any] = []
    for number in range(int(track.duration_s * track.rate)):
        frame = av.VideoFrame(32, 32, "yuv420p")
        frame.pts = number
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _sound(written: av.container.OutputContainer, track: Sound) -> list[Any]:
    stream = cast("AudioStream", written.add_stream(track.codec, rate=track.rate, options=track.options or None))
    stream.layout = track.layout
    if track.default is not None:
        stream.disposition = Disposition.default if track.default else Disposition(0)
    packets: list[Any] = []
    for start_s, samples in track.pieces:
        for place in range(0, len(samples), _PART):
            part = samples[place : place + _PART].reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part, np.float32), "flt", track.layout)
            frame.sample_rate = track.rate
            frame.pts = round(start_s * track.rate) + place
            packets += stream.encode(frame)
    return packets + stream.encode(None)


def write_wav(
    path: Path,
    samples: NDArray[Any],
    rate: int,
    *,
    declared_s: float | None = None,
    codec: int | None = None,
    riff_bytes: int | None = None,
) -> Path:
    """Write samples of shape (n,) or (n, channels), in their own type, under a header that may declare more of them."""
    data = np.ascontiguousarray(samples)
    channels = 1 if data.ndim == 1 else data.shape[1]
    block = channels * data.itemsize
    codec = (3 if data.dtype.kind == "f" else 1) if codec is None else codec
    size = data.nbytes if declared_s is None else round(declared_s * rate) * block
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, codec, channels, rate, rate * block, block, data.itemsize * 8)
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size if riff_bytes is None else riff_bytes, b"WAVE")
    path.write_bytes(riff + head + struct.pack("<4sI", b"data", size) + data.tobytes())
    return path


def decode(path: Path, limits: AudioLimits = LIMITS, *, track: TrackChoice = None) -> tuple[Samples, AudioReader]:
    with open_audio(path, limits, track=track) as audio:
        return np.concatenate(list(audio.blocks())), audio


def spans(samples: Samples, *, level: float = 0.02) -> list[tuple[float, float]]:
    """Where there is sound, as (start, end) in seconds, with pauses of less than half a second left out."""
    frame = SAMPLE_RATE // 50
    loud = np.abs(samples[: len(samples) // frame * frame]).reshape(-1, frame).max(axis=1) > level
    edges = np.flatnonzero(np.diff(np.concatenate(([0], loud.astype(np.int8), [0]))))
    found: list[list[float]] = []
    for start, end in zip(edges[::2] / 50, edges[1::2] / 50, strict=True):
        if found and start - found[-1][1] < 0.5:
            found[-1][1] = float(end)
        else:
            found.append([float(start), float(end)])
    return [(start, end) for start, end in found]


def frequencies(samples: Samples, *, count: int = 1) -> list[float]:
    """The strongest tones in Hz, rounded to tens, in ascending order."""
    spectrum = np.abs(np.fft.rfft(samples))
    found: list[float] = []
    for place in np.argsort(-spectrum):
        frequency = float(place) * SAMPLE_RATE / len(samples)
        if all(abs(frequency - other) > 50 for other in found):
            found.append(frequency)
        if len(found) == count:
            break
    return sorted(round(frequency / 10) * 10.0 for frequency in found)
