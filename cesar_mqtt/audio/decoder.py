"""Decoding of audio files, in blocks.

Any thread may call it; an `AudioReader` belongs to the thread that opened it. FFmpeg gets the bytes of an open file and
never a name, so no protocol and no playlist can make it read anything else.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cesar_mqtt.audio.containers import id3_bytes
from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.joined import next_start
from cesar_mqtt.audio.loudness import Loudness
from cesar_mqtt.audio.parts import Part, open_part
from cesar_mqtt.audio.paths import UNREADABLE, failed, file_identity, io_failed, open_regular
from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.audio.tracks import TOO_LONG, TrackChoice
from cesar_mqtt.errors import ErrorCode, JobFailedError

__all__ = ["SAMPLE_RATE", "AudioInfo", "AudioLimits", "AudioReader", "Samples", "TrackChoice", "open_audio"]

_BLOCK_SAMPLES = 10 * SAMPLE_RATE

_EMPTY = (ErrorCode.AUDIO_EMPTY, "The audio file holds no sound: check how it was recorded.")
_TOO_LARGE = (
    ErrorCode.AUDIO_TOO_LARGE,
    "The audio file has {size} bytes, and `audio.max_bytes` is {most}: submit a smaller one, or raise the limit.",
)


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """The maximum size and duration of a file, and what the process that decodes it may use.

    Attributes:
        decoder_memory_bytes: beyond what the process has before it opens the file.
        decoder_timeout_s: how long it may take without progress.
        growing_timeout_s: how long a file is waited for that is still being written.
    """

    max_bytes: int
    max_duration_s: float
    decoder_memory_bytes: int = 512 << 20
    decoder_timeout_s: float = 60.0
    growing_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a file declares; nothing of it has been decoded yet.

    Attributes:
        duration_s: where its sound ends on the file's clock; None if the file does not declare it.
        container: FFmpeg's name of the container, such as `ogg` or `mov,mp4,m4a,3gp,3g2,mj2`.
        size_bytes: the size of the whole file.
        identity: the `file_identity` of the file that was opened.
        channels: of the track that is heard, as the file declares it.
    """

    duration_s: float | None
    container: str
    size_bytes: int
    identity: tuple[int, ...]
    channels: int = 1


@contextmanager
def open_audio(
    path: Path, limits: AudioLimits, *, track: TrackChoice = None, channel: int | None = None
) -> Iterator["AudioReader"]:
    """Open a file for decoding, within the limits on its size and duration.

    Args:
        path: absolute and without symbolic links in any part of it (from `resolve_audio_path`, or a resolved path of
            our own): a link that has replaced a part since then is rejected, not followed.
        limits: on its size and duration.
        track: which of its audio tracks.
        channel: the only one of the track's channels that is heard, from 0, and never amplified; None: all, mixed.

    Raises:
        JobFailedError: `audio_not_found`, `audio_not_allowed`, and as `open_descriptor`.
    """
    with open_regular(path) as descriptor, open_descriptor(descriptor, limits, track=track, channel=channel) as audio:
        yield audio


@contextmanager
def open_descriptor(
    descriptor: int, limits: AudioLimits, *, track: TrackChoice = None, channel: int | None = None
) -> Iterator["AudioReader"]:
    """Open the file of a descriptor as `open_audio` does; the caller closes the descriptor.

    Raises:
        JobFailedError: `audio_too_large`, `audio_too_long`, `audio_empty`, `audio_unreadable`, `audio_not_allowed`,
            `audio_no_stream`, `audio_io_error`.
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
    file = _file_at(descriptor, 0)
    with open_part(file, track=track, max_s=limits.max_duration_s, channel=channel) as part:
        duration_s = part.duration_s if file.end is None else None
        info = AudioInfo(duration_s, part.format_name, size_bytes, file_identity(status), part.channels)
        yield AudioReader(descriptor, file, part, info, track=track, channel=channel, max_s=limits.max_duration_s)


def _file_at(descriptor: int, start: int) -> FileReader:
    """The file that begins there, behind any tag, as far as no other one was joined to it. Raises JobFailedError."""
    tagged = FileReader(descriptor, start=start)
    start += id3_bytes(tagged)
    whole = FileReader(descriptor, start=start)
    length = next_start(whole)
    for file in (tagged, whole):  # a failed read looks like the end of the file: a joined one would be left out
        file.raise_error()
    return FileReader(descriptor, start=start, end=None if length is None else start + length)


_NO_PART = frozenset({ErrorCode.AUDIO_UNREADABLE, ErrorCode.AUDIO_NOT_ALLOWED, ErrorCode.AUDIO_NO_STREAM})


def _never() -> bool:
    return False


class AudioReader:
    """One open file, decoded once from start to end. Only for the thread that opened it.

    Attributes:
        info: what the file declares.
    """

    def __init__(
        self,
        descriptor: int,
        file: FileReader,
        part: Part,
        info: AudioInfo,
        *,
        track: TrackChoice,
        channel: int | None,
        max_s: float,
    ) -> None:
        self.info = info
        self._descriptor = descriptor
        self._file = file
        self._parts = [part]
        self._track = track
        self._channel = channel
        self._max_s = max_s
        self._lost_part = False
        self._samples = 0
        self._loudness = Loudness()

    @property
    def decoded_s(self) -> float:
        """Seconds decoded so far, on the file's clock: with the silence of late starts and gaps."""
        return self._samples / SAMPLE_RATE

    @property
    def read_bytes(self) -> int:
        """How far the file has been read."""
        return self._file.reached

    @property
    def warnings(self) -> tuple[str, ...]:
        """Faults of a file that could be decoded all the same; complete when `blocks` has ended.

        `audio_truncated`: the end is missing: more than a second and more than 5 % of the declared duration.
        `audio_damaged`: parts that could not be decoded were skipped.
        `audio_tracks_ignored`: another track has sound, or cannot be decoded.
        `audio_out_of_phase`: channels cancel each other; the louder one was used, with what only the other one has.
        `audio_quiet`: very quiet sound was amplified.
        """
        found = {
            "audio_truncated": any(part.truncated for part in self._parts),
            "audio_damaged": self._lost_part or any(part.damaged for part in self._parts),
            "audio_tracks_ignored": any(part.ignores_tracks for part in self._parts),
            "audio_out_of_phase": any(part.out_of_phase for part in self._parts),
            "audio_quiet": self._loudness.amplified,
        }
        return tuple(name for name, is_so in found.items() if is_so)

    def blocks(self, should_stop: Callable[[], bool] = _never) -> Iterator[Samples]:
        """Decode, ten seconds of the file's clock at a time; damaged parts are skipped and counted.

        Args:
            should_stop: asked before each packet: a large, wholly damaged file yields no block for a long time.

        Raises:
            Cancelled: `should_stop` returned True.
            JobFailedError: `audio_too_long` as soon as the limit is exceeded, whatever the file declared;
                `audio_io_error` if the disk fails; at the end `audio_empty` if there was no sample, and
                `audio_unreadable` if no packet could be decoded.
        """
        for block in _blocks(self._joined(should_stop)):
            self._samples += len(block)
            if self.decoded_s > self._max_s:
                raise failed(TOO_LONG, most=self._max_s)
            yield self._loudness.level(block) if self._channel is None else block
        if not self._samples:
            raise failed(UNREADABLE if any(part.damaged for part in self._parts) else _EMPTY)

    def _joined(self, should_stop: Callable[[], bool]) -> Iterator[Samples]:
        """Decode the file, and those that were joined to it."""
        yield from self._parts[0].samples(should_stop)
        while self._file.end is not None:
            self._file = _file_at(self._descriptor, self._file.end)
            try:
                with open_part(self._file, track=self._track, max_s=self._max_s, channel=self._channel) as part:
                    self._parts.append(part)
                    yield from part.samples(should_stop)
            except JobFailedError as exc:
                if exc.code not in _NO_PART:
                    raise
                self._lost_part = True


def _blocks(parts: Iterator[Samples]) -> Iterator[Samples]:
    """Join and cut samples into blocks of `_BLOCK_SAMPLES`, the last one shorter."""
    pending: list[Samples] = []
    missing = _BLOCK_SAMPLES
    for part in parts:
        rest = part
        while len(rest) >= missing:
            yield np.concatenate([*pending, rest[:missing]])
            rest = rest[missing:]
            pending, missing = [], _BLOCK_SAMPLES
        pending.append(rest)
        missing -= len(rest)
    if missing < _BLOCK_SAMPLES:
        yield np.concatenate(pending)
