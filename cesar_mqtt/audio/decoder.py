"""Decoding of audio files, in blocks.

Any thread may call it; an `AudioReader` belongs to the thread that opened it. FFmpeg gets the bytes of an open file and
never a name, so no protocol and no playlist can make it read anything else.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.paths import UNREADABLE, failed, file_identity, io_failed, open_regular
from cesar_mqtt.errors import Cancelled, ErrorCode

SAMPLE_RATE = 16_000
"""Samples per second of everything decoded here, the rate that Whisper models expect."""

Samples: TypeAlias = NDArray[np.float32]
"""Mono at `SAMPLE_RATE`, shape (n,), values from -1 to 1."""

# Containers of recorded sound; deliberately no playlists, network sessions or image sequences.
_CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,rm,tta,voc,w64,"
    "wav,wv"
)


def _is_audio_decoder(name: str) -> bool:
    try:
        return av.codec.Codec(name, "r").type == "audio"
    except ValueError:  # it only encodes
        return False


# While FFmpeg looks for the parameters of the streams, it would decode cover art: a picture of 2 MB can take 2 GB and
# 30 s. With this list it has only the decoders of audio there.
_AUDIO_DECODERS = ",".join(sorted(name for name in av.codecs_available if _is_audio_decoder(name)))
_OPEN_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "", "codec_whitelist": _AUDIO_DECODERS}

# Raw streams declare no duration; FFmpeg then guesses one from the bit rate of the first frames, which was ten times
# too long for speech after silence. A guess must not reject a file or report it as truncated.
_RAW_STREAMS = frozenset({"aac", "ac3", "dts", "eac3"})
_MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")
_RIFF_SIZE_UNKNOWN = 0x7FF0_0000
"""RIFF sizes from here on are placeholders of programs that wrote to a pipe."""

_FFMPEG_TIMEOUT_S = 30.0
"""For opening and for each packet: in a file of the wrong kind FFmpeg may search for hours, 16 bytes at a time."""
_HEAD_BYTES = 4096
_BLOCK_SAMPLES = 10 * SAMPLE_RATE

_NO_STREAM = (ErrorCode.AUDIO_NO_STREAM, "The file holds no audio track: submit one with sound.")
_EMPTY = (ErrorCode.AUDIO_EMPTY, "The audio file holds no sound: check how it was recorded.")
_TOO_LARGE = (
    ErrorCode.AUDIO_TOO_LARGE,
    "The audio file has {size} bytes, and `audio.max_bytes` is {most}: submit a smaller one, or raise the limit.",
)
_TOO_LONG = (
    ErrorCode.AUDIO_TOO_LONG,
    "The audio lasts longer than `audio.max_duration`, {most:g} s: submit it in parts, or raise the limit.",
)


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """The maximum size and duration of a file, and what the process that decodes it may use.

    Attributes:
        decoder_memory_bytes: beyond what the process has before it opens the file.
        decoder_timeout_s: how long it may take without progress.
    """

    max_bytes: int
    max_duration_s: float
    decoder_memory_bytes: int = 512 << 20
    decoder_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a file declares; nothing of it has been decoded yet.

    Attributes:
        duration_s: None if the file does not declare it.
        container: FFmpeg's name of the container, such as `ogg` or `mov,mp4,m4a,3gp,3g2,mj2`.
        size_bytes: the size of the whole file.
        identity: the `file_identity` of the file that was opened.
    """

    duration_s: float | None
    container: str
    size_bytes: int
    identity: tuple[int, ...]


@contextmanager
def open_audio(path: Path, limits: AudioLimits) -> Iterator["AudioReader"]:
    """Open a file for decoding, within the limits on its size and on the duration that it declares.

    Args:
        path: absolute and without symbolic links in any part of it (from `resolve_audio_path`, or a resolved path of
            our own): a link that has replaced a part since then is rejected, not followed.
        limits: on its size and duration.

    Raises:
        JobFailedError: `audio_not_found`, `audio_not_allowed`, and as `open_descriptor`.
    """
    with open_regular(path) as descriptor, open_descriptor(descriptor, limits) as audio:
        yield audio


@contextmanager
def open_descriptor(descriptor: int, limits: AudioLimits) -> Iterator["AudioReader"]:
    """Open the file of a descriptor as `open_audio` does; the caller closes the descriptor.

    Raises:
        JobFailedError: `audio_too_large`, `audio_too_long`, `audio_empty`, `audio_unreadable`, `audio_no_stream`,
            `audio_io_error`.
    """
    try:
        status = os.fstat(descriptor)
    except OSError as exc:
        raise io_failed(exc) from exc
    size_bytes = status.st_size
    if size_bytes == 0:
        raise failed(_EMPTY)
    if size_bytes > limits.max_bytes:
        raise failed(_TOO_LARGE, size=size_bytes, most=limits.max_bytes)
    file = FileReader(descriptor)
    with _open_container(file) as container:
        duration_s = _declared_s(container, _read_head(file), size_bytes)
        _check_duration(duration_s, limits.max_duration_s)
        info = AudioInfo(duration_s, container.format.name, size_bytes, file_identity(status))
        yield AudioReader(container, info, file=file, max_duration_s=limits.max_duration_s)


def _never() -> bool:
    return False


class AudioReader:
    """One open file, decoded once from start to end. Only for the thread that opened it.

    Attributes:
        info: what the file declares.
    """

    def __init__(self, container: InputContainer, info: AudioInfo, *, file: FileReader, max_duration_s: float) -> None:
        self.info = info
        self._file = file
        self._container = container
        self._stream = container.streams.audio[0]
        self._max_duration_s = max_duration_s
        self._resampler = _Resampler()
        self._input_s = 0.0
        self._samples = 0
        self._skipped = 0
        self._should_stop: Callable[[], bool] = _never

    @property
    def decoded_s(self) -> float:
        """Seconds decoded so far."""
        return self._samples / SAMPLE_RATE

    @property
    def read_bytes(self) -> int:
        """How far the file has been read."""
        return self._file.reached

    @property
    def warnings(self) -> tuple[str, ...]:
        """Faults of a file that could be decoded all the same; complete when `blocks` has ended.

        `audio_truncated`: more than a second and more than 5 % of the declared duration are missing.
        `audio_damaged`: parts that could not be decoded were skipped.
        """
        missing_s = (self.info.duration_s or 0.0) - self.decoded_s
        truncated = missing_s > max(1.0, 0.05 * (self.info.duration_s or 0.0))
        found = {"audio_truncated": truncated, "audio_damaged": self._skipped > 0}
        return tuple(name for name, is_so in found.items() if is_so)

    def blocks(self, should_stop: Callable[[], bool] = _never) -> Iterator[Samples]:
        """Decode, about ten seconds at a time; damaged parts are skipped and counted.

        Args:
            should_stop: asked before each packet: a large, wholly damaged file yields no block for a long time.

        Raises:
            Cancelled: `should_stop` returned True.
            JobFailedError: `audio_too_long` as soon as the limit is exceeded, whatever the file declared;
                `audio_io_error` if the disk fails; at the end `audio_empty` if there was no sample, and
                `audio_unreadable` if no packet could be decoded.
        """
        self._should_stop = should_stop
        pending: list[Samples] = []
        yielded = 0
        for samples in self._resampled():
            pending.append(samples)
            self._samples += samples.size
            if self._samples - yielded >= _BLOCK_SAMPLES:
                yield np.concatenate(pending)
                pending.clear()
                yielded = self._samples
        if pending:
            yield np.concatenate(pending)
        if not self._samples:
            raise failed(UNREADABLE if self._skipped else _EMPTY)

    def _resampled(self) -> Iterator[Samples]:
        for frame in chain(self._frames(), (None,)):
            try:
                yield from self._resampler.push(frame)
            except (av.FFmpegError, ValueError):  # a channel layout or rate without a conversion
                self._resampler = _Resampler()
                self._skipped += 1

    def _frames(self) -> Iterator[av.AudioFrame]:
        for packet in self._packets():
            if self._should_stop():
                raise Cancelled
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self._skipped += 1
                continue
            for frame in frames:
                # Before resampling: a header that declares one sample a second must not fill the memory first.
                self._input_s += frame.samples / max(1, frame.sample_rate)
                _check_duration(self._input_s, self._max_duration_s)
                yield frame

    def _packets(self) -> Iterator["av.Packet[av.AudioStream]"]:
        packets = self._container.demux(self._stream)
        while True:
            self._file.allow(_FFMPEG_TIMEOUT_S)
            try:
                packet = next(packets, None)
            except av.FFmpegError as exc:  # the container itself is damaged: no further packet can be found
                _check_memory(exc)
                self._skipped += 1
                packet = None
            self._file.raise_error()
            if packet is None:
                self._skipped += self._file.timed_out
                return
            yield packet


class _Resampler:
    """To mono float32 at `SAMPLE_RATE`, even if the format of the frames changes within the file."""

    def __init__(self) -> None:
        self._format: tuple[str, str, int] | None = None
        self._resampler: av.AudioResampler | None = None

    def push(self, frame: av.AudioFrame | None) -> Iterator[Samples]:
        """Convert the next frame, or None at the end, and yield the samples that are ready."""
        frame_format = None if frame is None else (frame.format.name, frame.layout.name, frame.sample_rate)
        if frame_format != self._format:
            yield from self._convert(None)
            # By way of 16-bit integers, as Whisper's own loader: mixing down to mono then cannot overflow.
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
            self._format = frame_format
        if frame is not None:
            yield from self._convert(frame)

    def _convert(self, frame: av.AudioFrame | None) -> Iterator[Samples]:
        if self._resampler is not None:
            for converted in self._resampler.resample(frame):
                yield converted.to_ndarray()[0].astype(np.float32) / 32768.0


def _open_container(file: FileReader) -> InputContainer:
    file.allow(_FFMPEG_TIMEOUT_S)
    try:
        container = av.open(file, "r", container_options=_OPEN_OPTIONS, metadata_errors="ignore")
    except av.FFmpegError as exc:
        file.raise_error()
        _check_memory(exc)
        raise failed(UNREADABLE) from exc
    if file.error is not None or not container.streams.audio:
        container.close()
        file.raise_error()
        raise failed(_NO_STREAM)
    return container


def _declared_s(container: InputContainer, head: bytes, size_bytes: int) -> float | None:
    """The duration that a file declares; None if it declares none and FFmpeg would only guess."""
    name, stream = container.format.name, container.streams.audio[0]
    guessed = name in _RAW_STREAMS or (name == "mp3" and not any(tag in head for tag in _MP3_LENGTH_TAGS))
    # The audio track's own duration first: the video may last longer.
    if stream.duration and stream.time_base:
        declared_s = float(stream.duration * stream.time_base)
    else:
        declared_s = (container.duration or 0) / av.time_base
    if guessed or declared_s <= 0:
        return None
    # FFmpeg computes the duration of a truncated WAV from its size; the header still has the whole size.
    riff_bytes = 8 + int.from_bytes(head[4:8], "little")
    if name == "wav" and head.startswith(b"RIFF") and size_bytes < riff_bytes < _RIFF_SIZE_UNKNOWN:
        declared_s *= riff_bytes / size_bytes
    return declared_s


def _read_head(file: FileReader) -> bytes:
    """The first bytes behind any ID3v2 tag (id3.org, section 3.1: its size is four bytes of seven bits)."""
    head = file.read_at(0, _HEAD_BYTES)
    if head.startswith(b"ID3"):
        tag_bytes = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
        head = file.read_at(10 + tag_bytes, _HEAD_BYTES)
    file.raise_error()
    return head


def _check_memory(error: av.FFmpegError) -> None:
    """Raise MemoryError if FFmpeg had no memory left, which is no damage."""
    if error.errno == errno.ENOMEM:
        raise MemoryError from error


def _check_duration(duration_s: float | None, max_duration_s: float) -> None:
    if duration_s is not None and duration_s > max_duration_s:
        raise failed(_TOO_LONG, most=max_duration_s)
