"""A recording of any length, decoded ahead of need and cut at pauses into chunks for the model.

Each `Recording` has a thread of its own, named `decoder`, the only one that touches the file; the methods say which
threads may call them. Memory is bounded whatever the length: the chunk in use, one ahead, and the remainder of a cut.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioInfo, AudioLimits, Samples, TrackChoice
from cesar_mqtt.audio.decoder_process import GrowingReader, open_audio
from cesar_mqtt.audio.paths import file_identity, lasting_identity
from cesar_mqtt.audio.samples import own_pages
from cesar_mqtt.audio.vad import Probabilities, Range, find_cut, speech_probabilities, speech_ranges
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import wait

log = get_logger(__name__)

_CLOSE_S = 1.0
"""How long `close` waits for the thread; it takes so long only if the disk does not answer."""
_MAX_CLIP_S = 1e9
_MAX_SEARCH_WINDOW = 60 * SAMPLE_RATE


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Samples that are handed to the model together, no more than a window; the result of each is a `Window`.

    Attributes:
        start_s: where it begins in the file.
        samples: may be empty, if nothing remains after `from_s`.
        speech: the ranges of samples that hold speech, in order of time, by the rules of faster-whisper's `vad_filter`;
            all samples, if the recording was opened without it.
        last: whether no other follows.
    """

    start_s: float
    samples: Samples
    speech: tuple[Range, ...]
    last: bool

    @property
    def end_s(self) -> float:
        """Where it ends in the file."""
        return _seconds(round(self.start_s * SAMPLE_RATE) + len(self.samples))


class Recording:
    """A file that is decoded chunk by chunk, ahead of need, by a thread of its own.

    The thread opens the file, fills a chunk, and waits with the next one until the one before was taken.

    Attributes:
        from_s: the second from which it is decoded, as it was given.
    """

    def __init__(
        self,
        path: Path,
        *,
        limits: AudioLimits,
        window_s: float,
        clips: Sequence[tuple[float, float]] = (),
        from_s: float = 0.0,
        vad_filter: bool = True,
        track: TrackChoice = None,
    ) -> None:
        """Start decoding; returns at once. What is wrong with the file is raised by `chunks`.

        Args:
            path: absolute and without symbolic links, as `open_audio` requires it.
            limits: on the size and duration of the file.
            window_s: the maximum length of a chunk; a shorter file is one chunk.
            clips: only these ranges, as (start, end) in seconds, each in chunks of its own. They are processed in order
                of time, overlapping ones as one. An end past the end of the file means the end of the file.
            from_s: what lies before is skipped; if a chunk ended there, the following ones are the same as without it.
            vad_filter: whether only what the VAD takes for speech is `speech` of a chunk.
            track: which of the file's audio tracks.
        """
        self._path = path
        self._limits = limits
        self._window = round(window_s * SAMPLE_RATE)
        self._clips = tuple(clips)
        self.from_s = from_s
        self._vad_filter = vad_filter
        self._track = track
        self._begin = round(from_s * SAMPLE_RATE)
        self._changed = threading.Condition()
        self._ready: Chunk | None = None
        self._ended = False
        self._closed = False
        self._failure: JobFailedError | None = None
        self._identity: tuple[int, ...] | None = None
        self._declared_s: float | None = None
        self._decoded_s = 0.0
        self._complete = False
        self._warnings: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the file at the path is still the one that was opened, unchanged; False if it could not be opened.

        True until it has been opened. Any thread may ask.
        """
        with self._changed:
            identity, ended = self._identity, self._ended
        if identity is None:
            return not ended
        try:
            return file_identity(self._path.lstat()) == identity
        except OSError:
            return False

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        """Wait until the file is open, and return its `lasting_identity`. Any thread may call it.

        Returns:
            None if the file could not be opened; `chunks` raises why.

        Raises:
            Cancelled: `should_stop`, which is asked ten times a second, returned True.
        """
        self._wait_until(lambda: self._identity is not None or self._ended, should_stop)
        with self._changed:
            return None if self._identity is None else lasting_identity(self._identity)

    def wait_until_open(self, should_stop: Callable[[], bool]) -> None:
        """Wait until the file is open and its first samples are being decoded.

        Raises:
            JobFailedError, Cancelled: as `chunks`.
        """
        if self.identity(should_stop) is None:
            raise self._failure or (Cancelled() if self._closed else _incomplete())

    @property
    def duration_s(self) -> float | None:
        """Seconds of the whole file: as declared, and exact once it was decoded to its end; None: not known yet.

        A file that is longer than it declares lasts at least as long as what was decoded. With clips, a file that
        declares its duration is not decoded past the last of them. Any thread may ask.
        """
        with self._changed:
            if self._complete:
                return self._decoded_s
            return None if self._declared_s is None else max(self._declared_s, self._decoded_s)

    @property
    def warnings(self) -> tuple[str, ...]:
        """As `AudioReader.warnings`; complete once the last chunk was taken. Any thread may ask."""
        with self._changed:
            return self._warnings

    def chunks(self, should_stop: Callable[[], bool]) -> Iterator[Chunk]:
        """Yield the chunks in order of time. Only once, and for one thread.

        Args:
            should_stop: asked before each chunk and, ten times a second, while waiting for it.

        Raises:
            JobFailedError: `audio_*` for the file, `invalid_request` for a clip range that begins after the end of
                the file or is not valid, `internal` if decoding ended for an internal reason.
            Cancelled: `should_stop` returned True, or the recording was closed.
        """
        last = False
        while not last:
            chunk = self._take_chunk(should_stop)
            last = chunk.last
            yield chunk
            del chunk  # before the wait for the next one: two at a time are enough

    def channel_count(self, should_stop: Callable[[], bool]) -> int:
        """Return how many channels the file declares. Raises as `samples`."""
        with self._open_again(should_stop) as audio:
            return audio.info.channels

    def samples(self, should_stop: Callable[[], bool], *, channel: int | None = None) -> Iterator[Samples]:
        """Decode the whole file once more, from its start and in the calling thread, also after `close`.

        Args:
            should_stop: asked ten times a second while nothing is decoded.
            channel: the only one that is heard, from 0; None: all, mixed.

        Raises:
            JobFailedError: as `chunks`.
            Cancelled: `should_stop` returned True.
        """
        with self._open_again(should_stop, channel) as audio:
            yield from audio.blocks(should_stop)

    def _open_again(
        self, should_stop: Callable[[], bool], channel: int | None = None
    ) -> AbstractContextManager[GrowingReader]:
        return open_audio(self._path, self._limits, track=self._track, channel=channel, should_stop=should_stop)

    def close(self) -> None:
        """End the thread and release the samples. Any thread may call it, and more than once.

        On return the decoder is killed, whatever it was doing, unless opening the file delays the thread: it then
        ends by itself as soon as it can.
        """
        with self._changed:
            self._closed = True
            self._ready = None
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("Decoding is stopped, and has not ended yet", action="decoder_stuck")

    def _take_chunk(self, should_stop: Callable[[], bool]) -> Chunk:
        self._wait_until(lambda: self._closed or self._ready is not None or self._ended, should_stop)
        with self._changed:
            if self._closed:
                raise Cancelled
            if self._ready is None:
                raise self._failure or _incomplete()
            chunk, self._ready = self._ready, None
            self._changed.notify_all()
            return chunk

    def _wait_until(self, is_true: Callable[[], bool], should_stop: Callable[[], bool]) -> None:
        def ready(timeout_s: float) -> bool:
            with self._changed:
                return self._changed.wait_for(is_true, timeout_s)

        wait(ready, should_stop)

    # -- the decoder thread

    def _run(self) -> None:
        failure: JobFailedError | None = None
        try:
            self._decode()
        except Cancelled:
            pass
        except JobFailedError as exc:
            failure = exc
        except (MemoryError, OSError):
            log.exception("Decoding failed", action="decoder_failed")
        finally:  # also after an unexpected exception: the worker must not wait for ever
            with self._changed:
                self._failure = failure
                self._ended = True
                self._changed.notify_all()

    def _decode(self) -> None:
        chunker = _Chunker(_clip_ranges(self._clips, self._begin), self._window, vad_filter=self._vad_filter)
        with open_audio(self._path, self._limits, track=self._track, should_stop=lambda: self._closed) as audio:
            if audio.info.duration_s is not None:
                # A declared duration may be a little wrong: only a range far beyond it is rejected before the work.
                chunker.check(round((1.05 * audio.info.duration_s + 1.0) * SAMPLE_RATE))
            self._set_opened(audio.info)
            reader = _SampleReader(audio.blocks(lambda: self._closed))
            for chunk in chunker.chunks(reader):
                if chunk.last and audio.info.duration_s is None:
                    reader.skip(math.inf)  # only so its duration becomes known
                with self._changed:
                    self._decoded_s = audio.decoded_s
                    self._complete = reader.ended
                    # What comes after the last range was not decoded, so nothing is known to be missing.
                    unverifiable = () if reader.ended else ("audio_truncated",)
                    self._warnings = tuple(warning for warning in audio.warnings if warning not in unverifiable)
                    self._hand_over(chunk)

    def _set_opened(self, info: AudioInfo) -> None:
        with self._changed:
            self._identity = info.identity
            self._declared_s = info.duration_s
            self._changed.notify_all()

    def _hand_over(self, chunk: Chunk) -> None:
        """Wait until the chunk was taken, so that there is never more than one ahead."""
        if not self._closed:  # it would never be taken
            self._ready = chunk
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready is not chunk)
        if self._closed:
            raise Cancelled


class _SampleReader:
    """Decoded samples, read in order.

    Attributes:
        position: the number of the next sample.
        ended: whether there are no more.
    """

    def __init__(self, blocks: Iterator[Samples]) -> None:
        self._blocks = blocks
        self._block: Samples = np.empty(0, np.float32)
        self.position = 0
        self.ended = False

    def read(self, into: Samples) -> int:
        """Fill an array as far as there are samples, and return their number."""
        filled = 0
        while filled < len(into) and self._has_more():
            part = self._block[: len(into) - filled]
            into[filled : filled + len(part)] = part
            filled += self._consume(len(part))
        return filled

    def skip(self, until: float) -> None:
        """Go on to a position, or to the end if that comes before."""
        while self.position < until and self._has_more():
            self._consume(int(min(until - self.position, len(self._block))))

    def _has_more(self) -> bool:
        while not self._block.size and not self.ended:
            block = next(self._blocks, None)
            if block is None:
                self.ended = True
            else:
                self._block = block
        return bool(self._block.size)

    def _consume(self, count: int) -> int:
        self._block = self._block[count:]
        self.position += count
        return count


@dataclass(frozen=True, slots=True)
class _ClipRange:
    """Samples from `start` to before `end`; `requested`: the job names the range, so that it has to exist."""

    start: int
    end: float
    requested: bool


@dataclass(frozen=True, slots=True)
class _Chunker:
    """Cuts the clip ranges of a file into chunks of at most `window` samples, with one run of the VAD for each."""

    ranges: tuple[_ClipRange, ...]
    window: int
    vad_filter: bool

    def check(self, length: int) -> None:
        """Reject ranges that cannot be in a file of `length` samples. Raises JobFailedError: `invalid_request`."""
        for clip in self.ranges:
            if clip.requested and clip.start >= length:
                raise _behind_the_end(clip)

    def chunks(self, reader: _SampleReader) -> Iterator[Chunk]:
        """Read and cut. Raises JobFailedError: `invalid_request` for a range that is not in the file."""
        for clip in self.ranges:
            reader.skip(clip.start)
            yield from self._chunks_of(clip, reader, is_last=clip is self.ranges[-1])

    def _chunks_of(self, clip: _ClipRange, reader: _SampleReader, *, is_last: bool) -> Iterator[Chunk]:
        """Cut one range; one sample more than a window is read, to know whether anything follows."""
        start, remainder = reader.position, np.empty(0, np.float32)
        while True:
            buffer = own_pages(self.window + 1)
            buffer[: len(remainder)] = remainder
            room = int(min(len(buffer), clip.end - start))
            filled = len(remainder) + reader.read(buffer[len(remainder) : room])
            if clip.requested and not filled:
                raise _behind_the_end(clip)
            samples = buffer[: min(filled, self.window)]
            probabilities = speech_probabilities(samples)
            if filled <= self.window:
                yield Chunk(_seconds(start), samples, self._speech(probabilities, filled), last=is_last)
                return
            cut = find_cut(samples, probabilities, search_window=min(_MAX_SEARCH_WINDOW, self.window // 4))
            remainder = buffer[cut:filled].copy()
            yield Chunk(_seconds(start), samples[:cut], self._speech(probabilities, cut), last=False)
            start += cut

    def _speech(self, probabilities: Probabilities, length: int) -> tuple[Range, ...]:
        if self.vad_filter:
            return speech_ranges(probabilities, length)
        return ((0, length),) if length else ()


def _clip_ranges(clips: Sequence[tuple[float, float]], begin: int) -> tuple[_ClipRange, ...]:
    """Sort the ranges, join those that overlap, and drop what lies before `begin`.

    Raises:
        JobFailedError: `invalid_request` for what is no range.
    """
    joined: list[tuple[int, int]] = []
    for start, end in sorted(map(_to_samples, clips)):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    remaining = tuple(_ClipRange(max(start, begin), end, requested=True) for start, end in joined if end > begin)
    # With nothing left there is still a last chunk, an empty one.
    return remaining or (_ClipRange(begin, begin if clips else math.inf, requested=False),)


def _to_samples(clip: tuple[float, float]) -> tuple[int, int]:
    start_s, end_s = (min(second, _MAX_CLIP_S) for second in clip)
    if 0 <= start_s < end_s and clip[1] < math.inf and round(start_s * SAMPLE_RATE) < round(end_s * SAMPLE_RATE):
        return round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
    raise JobFailedError(
        ErrorCode.INVALID_REQUEST,
        f"In `clip_timestamps`, {start_s:g} s to {end_s:g} s is not a valid range: start at 0 or more, end later.",
    )


def _seconds(samples: int) -> float:
    return round(samples / SAMPLE_RATE, 7)


def _behind_the_end(clip: _ClipRange) -> JobFailedError:
    return JobFailedError(
        ErrorCode.INVALID_REQUEST,
        f"The range of `clip_timestamps` that begins at {_seconds(clip.start):g} s starts after the end of the audio: "
        "choose ranges inside it.",
    )


def _incomplete() -> JobFailedError:
    return JobFailedError(
        ErrorCode.INTERNAL, "The audio could not be decoded to its end; the consumer's log says why: retry."
    )
