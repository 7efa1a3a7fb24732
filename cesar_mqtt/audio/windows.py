"""A recording of any length, decoded ahead of need and given in stretches that end in pauses.

Each `Recording` has a thread of its own, the only one that touches the file; what its methods may be called from stands
at each of them. Memory is bounded whatever the length: the window in use, one ahead, and what a cut left over.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioInfo, AudioLimits, Samples, open_audio
from cesar_mqtt.audio.paths import file_identity, lasting_identity
from cesar_mqtt.audio.vad import find_cut
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_LOOK_S = 0.1
"""How often whoever waits for a stretch asks whether it still wants one."""
_END_S = 1.0
"""How long `close` waits for the thread; it needs so long only where the disk or FFmpeg does not answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Part of a recording, not longer than the window.

    Attributes:
        start_s: where it begins in the file.
        samples: may be empty, if nothing is left of the file behind `from_s`.
        last: whether no other follows.
    """

    start_s: float
    samples: Samples
    last: bool

    @property
    def end_s(self) -> float:
        """Where it ends in the file."""
        return _seconds(round(self.start_s * SAMPLE_RATE) + len(self.samples))


class Recording:
    """A file that is being decoded, a window at a time, ahead of need, by a thread of its own.

    The thread opens the file, fills a window, and waits with the next one until the one before was taken.

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
    ) -> None:
        """Start decoding; returns at once, what is wrong with the file is told by `stretches`.

        Args:
            path: absolute and without symbolic links, as `audio.open_audio` wants it.
            limits: the most that the file may bring.
            window_s: the most seconds of one stretch; what is no longer is one stretch.
            clips: only these ranges, as (start, end) in seconds, each in stretches of its own. They are worked in the
                order of time, ranges that overlap as one. An end behind that of the file means the end of the file.
            from_s: what lies before is left out; where a stretch ended, the next ones are the same as without it.
        """
        self._path = path
        self._limits = limits
        self._window = round(window_s * SAMPLE_RATE)
        self._clips = tuple(clips)
        self.from_s = from_s
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
        """Whether the file under the path is still the one that was opened, unchanged; False if it could not be.

        True while it has not been opened yet. Any thread may ask.
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
        """Wait until the file is open, and return what tells it apart from another under the same name, for good.

        Any thread may ask; `should_stop` is asked ten times a second.

        Returns:
            `lasting_identity` of the file that is decoded; None: it could not be opened, and `stretches` says why.

        Raises:
            Cancelled: `should_stop` returned True.
        """
        while not should_stop():
            with self._changed:
                if self._identity is not None:
                    return lasting_identity(self._identity)
                if self._ended:
                    return None
                self._changed.wait(_LOOK_S)
        raise Cancelled

    @property
    def duration_s(self) -> float | None:
        """Seconds of the whole file: as declared, and exact once it was decoded to its end; None: not known yet.

        A file that turns out to be longer than it declares lasts at least as long as what was decoded. With clips, a
        file that declares its duration is not decoded behind the last of them. Any thread may ask.
        """
        with self._changed:
            if self._complete:
                return self._decoded_s
            return None if self._declared_s is None else max(self._declared_s, self._decoded_s)

    @property
    def warnings(self) -> tuple[str, ...]:
        """As `audio.AudioReader.warnings`; complete when the last stretch was given. Any thread may ask."""
        with self._changed:
            return self._warnings

    def chunks(self, should_stop: Callable[[], bool]) -> Iterator[Chunk]:
        """Give the stretches, in order of time. Only once, and for one thread.

        Args:
            should_stop: asked before each stretch and, ten times a second, while it is waited for.

        Raises:
            JobFailedError: `audio_*` for the file, `invalid_request` for a range that begins behind its end or is
                none, `internal` if decoding broke off for a reason of our own.
            Cancelled: `should_stop` returned True, or the recording was closed.
        """
        last = False
        while not last:
            stretch = self._take(should_stop)
            last = stretch.last
            yield stretch
            del stretch  # before the next one is waited for: two at a time are enough

    def close(self) -> None:
        """End the thread and let go of the samples; any thread may call it, and again.

        On return the file is closed, unless the disk, or FFmpeg inside of a broken file, holds the thread up: it then
        ends by itself as soon as it can.
        """
        with self._changed:
            self._closed = True
            self._ready = None
            self._changed.notify_all()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            log.warning("Decoding is stopped, and has not ended yet", action="decoder_stuck")

    # -- the consumer's side --------------------------------------------------------------------------------------

    def _take(self, should_stop: Callable[[], bool]) -> Chunk:
        while True:
            if should_stop():
                raise Cancelled
            with self._changed:
                if self._closed:
                    raise Cancelled
                if self._ready is not None:
                    stretch, self._ready = self._ready, None
                    self._changed.notify_all()
                    return stretch
                if self._ended:
                    raise self._failure or _broken_off()
                self._changed.wait(_LOOK_S)

    # -- the thread's side ----------------------------------------------------------------------------------------

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
        finally:  # whatever else comes up here, nobody may wait for this thread for ever
            with self._changed:
                self._failure = failure
                self._ended = True
                self._changed.notify_all()

    def _decode(self) -> None:
        plan = _Plan(_ranges(self._clips, self._begin), self._window)
        with open_audio(self._path, self._limits) as audio:
            self._opened(audio.info)
            if audio.info.duration_s is not None:
                # It may be a little wrong, so that only what lies far behind it can be refused before the work.
                plan.check(round((1.05 * audio.info.duration_s + 1.0) * SAMPLE_RATE))
            tape = _Tape(audio.blocks(lambda: self._closed))
            for stretch in plan.chunks(tape):
                if stretch.last and audio.info.duration_s is None:
                    tape.skip(math.inf)  # its duration cannot be known otherwise
                with self._changed:
                    self._decoded_s = audio.decoded_s
                    self._complete = tape.ended
                    # What lies behind the last range was not looked at, and is not missed.
                    unseen = () if tape.ended else ("audio_truncated",)
                    self._warnings = tuple(warning for warning in audio.warnings if warning not in unseen)
                    self._hand_over(stretch)

    def _opened(self, info: AudioInfo) -> None:
        with self._changed:
            self._identity = info.identity
            self._declared_s = info.duration_s
            self._changed.notify_all()

    def _hand_over(self, stretch: Chunk) -> None:
        """Wait until the stretch was taken, so that no more than one is ever ahead."""
        if not self._closed:  # nobody would take it any more
            self._ready = stretch
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready is not stretch)
        if self._closed:
            raise Cancelled


class _Tape:
    """Decoded samples, read in order."""

    def __init__(self, blocks: Iterator[Samples]) -> None:
        self._blocks = blocks
        self._block: Samples = np.empty(0, np.float32)
        self.at = 0
        self.ended = False

    def read(self, into: Samples) -> int:
        """Fill an array as far as there are samples, and return how many there were."""
        filled = 0
        while filled < len(into) and self._more():
            part = self._block[: len(into) - filled]
            into[filled : filled + len(part)] = part
            filled += self._drop(len(part))
        return filled

    def skip(self, until: float) -> None:
        """Go on to a sample, or to the end if that comes before."""
        while self.at < until and self._more():
            self._drop(int(min(until - self.at, len(self._block))))

    def _more(self) -> bool:
        while not self._block.size and not self.ended:
            block = next(self._blocks, None)
            if block is None:
                self.ended = True
            else:
                self._block = block
        return bool(self._block.size)

    def _drop(self, count: int) -> int:
        self._block = self._block[count:]
        self.at += count
        return count


@dataclass(frozen=True, slots=True)
class _Range:
    """Samples from `start` to before `end`; `asked` for by name, so that it has to be there."""

    start: int
    end: float
    asked: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which ranges are wanted, and how long a stretch of them may be; in samples."""

    ranges: tuple[_Range, ...]
    window: int

    def check(self, length: int) -> None:
        """Refuse ranges that cannot be in a file of this length. Raises JobFailedError: `invalid_request`."""
        for wanted in self.ranges:
            if wanted.asked and wanted.start >= length:
                raise _outside(wanted)

    def chunks(self, tape: _Tape) -> Iterator[Chunk]:
        """Cut what is on the tape. Raises JobFailedError: `invalid_request` for a range that is not in the file."""
        for wanted in self.ranges:
            tape.skip(wanted.start)
            yield from self._windows(tape, wanted, is_last=wanted is self.ranges[-1])

    def _windows(self, tape: _Tape, wanted: _Range, *, is_last: bool) -> Iterator[Chunk]:
        """Cut one range; the one sample more than a window tells whether something follows."""
        start, rest = tape.at, np.empty(0, np.float32)
        while True:
            buffer = np.empty(self.window + 1, np.float32)
            buffer[: len(rest)] = rest
            room = int(min(len(buffer), wanted.end - start))
            filled = len(rest) + tape.read(buffer[len(rest) : room])
            if wanted.asked and not filled:
                raise _outside(wanted)
            if filled <= self.window:
                yield Chunk(_seconds(start), buffer[:filled], last=is_last)
                return
            cut = find_cut(buffer[: self.window])
            rest = buffer[cut:filled].copy()
            yield Chunk(_seconds(start), buffer[:cut], last=False)
            start += cut


def _ranges(clips: Sequence[tuple[float, float]], begin: int) -> tuple[_Range, ...]:
    """Put ranges in order, join those that overlap, and leave out what lies before `begin`.

    Raises:
        JobFailedError: `invalid_request` for what is no range.
    """
    joined: list[tuple[int, int]] = []
    for start, end in sorted(map(_samples, clips)):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    left = tuple(_Range(max(start, begin), end, asked=True) for start, end in joined if end > begin)
    # With nothing left to be done there is still a last stretch, an empty one.
    return left or (_Range(begin, begin if clips else math.inf, asked=False),)


_FOREVER_S = 1e9


def _samples(clip: tuple[float, float]) -> tuple[int, int]:
    start_s, end_s = (min(second, _FOREVER_S) for second in clip)
    if 0 <= start_s < end_s and clip[1] < math.inf and round(start_s * SAMPLE_RATE) < round(end_s * SAMPLE_RATE):
        return round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)
    raise JobFailedError(
        ErrorCode.INVALID_REQUEST,
        f"In `clip_timestamps`, {start_s:g} s to {end_s:g} s is no range: give a start of 0 or more and a later end.",
    )


def _seconds(samples: int) -> float:
    return round(samples / SAMPLE_RATE, 7)


def _outside(wanted: _Range) -> JobFailedError:
    return JobFailedError(
        ErrorCode.INVALID_REQUEST,
        f"The range of `clip_timestamps` that begins at {_seconds(wanted.start):g} s lies behind the end of the audio: "
        "choose ranges inside it.",
    )


def _broken_off() -> JobFailedError:
    return JobFailedError(
        ErrorCode.INTERNAL, "The audio could not be decoded to its end; the consumer's log says why: retry."
    )
