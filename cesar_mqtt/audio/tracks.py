"""The audio tracks of a file: which one is heard, and its way from packets to samples on the file's clock.

Everything here belongs to the thread that decodes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition

from cesar_mqtt.audio.channels import ChannelMixer
from cesar_mqtt.audio.clock import Clock
from cesar_mqtt.audio.coded_frames import HEAD_BYTES, declared_bytes
from cesar_mqtt.audio.containers import FFMPEG_TIMEOUT_S, check_memory
from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.paths import UNREADABLE, failed
from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.errors import ErrorCode

if TYPE_CHECKING:
    from numpy.typing import NDArray

TrackChoice: TypeAlias = int | Literal["mix"] | None
"""The number of a track, from 0; `mix`: all together; None: the default one."""
Packet: TypeAlias = "av.Packet[AudioStream]"

_NO_STREAM = (ErrorCode.AUDIO_NO_STREAM, "The file holds no audio track: submit one with sound.")
_NO_SUCH_TRACK = (
    ErrorCode.AUDIO_NO_STREAM,
    "The file has no audio track {track:d}: its tracks are numbered from 0 to {last:d}, or leave `audio_track` out.",
)

TOO_LONG = (
    ErrorCode.AUDIO_TOO_LONG,
    "The audio lasts longer than `audio.max_duration`, {most:g} s: submit it in parts, or raise the limit.",
)

_BETTER_DECODERS = {"amrnb": "libopencore_amrnb", "amrwb": "libopencore_amrwb"}
"""FFmpeg's own ones refuse the frames of pauses (SID, NO_DATA), and so shorten the recording."""
_CHECKED = frozenset({"flac", "tta", "wavpack"})
"""Lossless codecs with checksums: a frame that does not match is noise, and is left out only if FFmpeg is asked to."""
_SILENT_PEAK = 2e-4
"""-74 dB: above the dither of silence, below speech that can still be made audible."""
_LISTEN_S = 600.0
"""How much of a track is listened to before another one is preferred that has sound."""
_LEAST_RATE = 1000
"""Samples per second. With fewer a file of some KB would last for hours, and speech has no room in it: a frame that
declares less is damaged."""
_MAX_PLANES = 7
"""PyAV crashes on frames with more planes: it counts them up to a null pointer that only shorter lists end with."""
_BATCH_VALUES = 1 << 20
"""The most values of all channels that are converted at once; a second, where that is fewer."""
_SILENCE = 10 * SAMPLE_RATE
"""The most silence that is handed out at once."""
_MAX_SKEW = 60 * SAMPLE_RATE
"""How far one of several tracks may be ahead of another before the other counts as silent."""


class TrackDecoder:
    """Decodes the packets of one track.

    Attributes:
        index: of the stream in the container.
        damaged: whether parts could not be decoded.
        is_cut: whether the last packet, which is known at the end, is shorter than it declares.
    """

    def __init__(self, stream: AudioStream, codec: AudioCodecContext) -> None:
        self.index = stream.index
        self.damaged = False
        self.is_cut = False
        self._codec = codec
        self._last: Packet | None = None

    def decode(self, packet: "Packet | None") -> Sequence[av.AudioFrame]:
        """Decode a packet, or None at the end; what cannot be decoded is skipped."""
        if packet is not None:
            self._last = packet
        elif self._last is not None:
            declared = declared_bytes(self._codec.name, bytes(memoryview(self._last)[:HEAD_BYTES]))
            self.is_cut = declared is not None and self._last.size < declared
        try:
            return self._codec.decode(packet)
        except av.EOFError:
            return ()
        except av.FFmpegError as exc:
            check_memory(exc)
            if packet is None or not _is_tag(packet):
                self.damaged = True
            return ()


def _is_tag(packet: Packet) -> bool:
    """Whether a packet is the tag of an MP3 that was joined to another one, and no damage."""
    return bytes(memoryview(packet)[:8]).startswith((b"ID3", b"TAG", b"APETAGEX", b"LYRICS"))


def open_decoder(stream: AudioStream) -> TrackDecoder | None:
    """Return a decoder for a track; None: there is none for its codec."""
    codec = stream.codec_context
    if codec is None:
        return None
    if codec.name in _BETTER_DECODERS:
        codec = cast("AudioCodecContext", av.CodecContext.create(_BETTER_DECODERS[codec.name], "r"))
    if codec.name in _CHECKED:
        codec.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
    try:
        codec.open(strict=False)
    except (av.FFmpegError, ValueError):
        return None
    return TrackDecoder(stream, codec)


def choose_tracks(container: InputContainer, file: FileReader, choice: TrackChoice) -> tuple[list[int], bool]:
    """Return the numbers, among the audio tracks, of those to hear, and whether the container has been read from.

    Without a choice it is the first that has sound, of the one that is flagged as default and then the others in order.

    Raises:
        JobFailedError: `audio_no_stream`, `audio_unreadable`.
    """
    streams = container.streams.audio
    if not streams:
        raise failed(_NO_STREAM)
    if isinstance(choice, int) and choice >= len(streams):
        raise failed(_NO_SUCH_TRACK, track=choice, last=len(streams) - 1)
    wanted = [choice] if isinstance(choice, int) else range(len(streams))
    usable = [number for number in wanted if open_decoder(streams[number]) is not None]
    if not usable:
        raise failed(UNREADABLE)
    if choice is not None or len(usable) == 1:
        return usable, False
    usable.sort(key=lambda number: not streams[number].disposition & Disposition.default)
    return [_first_with_sound(container, file, usable)], True


def _first_with_sound(container: InputContainer, file: FileReader, numbers: Sequence[int]) -> int:
    """Decode several tracks until the first has sound; if it has none, the next that has; else one that decodes.

    The first is waited for no longer than `_LISTEN_S` where another one speaks: its rest is listened to later, while
    the other one is decoded.
    """
    streams = container.streams.audio
    listeners = [Listener(streams[number]) for number in numbers]
    by_index = {streams[number].index: listener for number, listener in zip(numbers, listeners, strict=True)}
    for packet in packets(container, file):
        if packet.stream_index in by_index:
            by_index[packet.stream_index].listen(packet)
        if listeners[0].has_sound or (listeners[0].heard_s > _LISTEN_S and any(each.has_sound for each in listeners)):
            break
    ranked = [(listener.has_sound, listener.decodes) for listener in listeners]
    return numbers[ranked.index(max(ranked))]


def packets(
    container: InputContainer, file: FileReader, on_damage: Callable[[], None] = lambda: None
) -> Iterator[Packet]:
    """Yield the packets of all tracks, pictures and texts as well; empty ones, which end a decoder, are left out.

    Raises:
        JobFailedError: `audio_io_error`.
    """
    demuxed = container.demux()
    failed_at = -1
    while True:
        file.allow(FFMPEG_TIMEOUT_S)
        try:
            packet = next(demuxed, None)
        except av.FFmpegError as exc:  # the container itself is damaged, here or from here on
            check_memory(exc)
            on_damage()
            packet = None
            if file.tell() > failed_at and not file.timed_out and file.error is None:
                failed_at = file.tell()
                demuxed = container.demux()
                continue
        except IndexError:  # PyAV, at the end, for a stream that appeared after the container was opened
            packet = None
        file.raise_error()
        if packet is None:
            if file.timed_out:
                on_damage()
            return
        if packet.size:
            yield cast("Packet", packet)


class Listener:
    """Finds out whether a track has sound. Costs nothing more once it has."""

    def __init__(self, stream: AudioStream) -> None:
        self._decoder = open_decoder(stream)
        self._has_packets = False
        self.has_sound = False
        self.decodes = False
        self.heard_s = 0.0

    def listen(self, packet: Packet) -> None:
        self._has_packets = True
        if self.has_sound or self._decoder is None:
            return
        for frame in self._decoder.decode(packet):
            self.decodes = True
            self.heard_s += frame.samples / max(1, frame.sample_rate)
            self.has_sound = self.has_sound or _peak(frame) > _SILENT_PEAK

    @property
    def may_have_sound(self) -> bool:
        """Whether it has sound, or something that cannot be decoded."""
        return self.has_sound or (self._has_packets and not self.decodes)


def _peak(frame: av.AudioFrame) -> float:
    converted = av.AudioResampler(format="flt").resample(frame)
    return max((float(np.abs(part.to_ndarray()).max(initial=0.0)) for part in converted), default=0.0)


def _columns(frame: av.AudioFrame) -> "NDArray[np.float32]":
    """The samples of a frame of floats, of shape (n, channels)."""
    samples = cast("NDArray[np.float32]", frame.to_ndarray())
    return samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)


class Track:
    """A track that is heard: mono samples, contiguous on the file's clock from second 0.

    Attributes:
        decoder: of its packets.
        position: how many samples there were so far, silence included.
        damaged: whether parts could not be converted.
        has_gaps: whether there is silence between its frames.
    """

    def __init__(self, stream: AudioStream, clock: Clock | None, max_s: float, channel: int | None = None) -> None:
        """Begin at second 0.

        Args:
            stream: one that `open_decoder` can decode.
            clock: None: the time stamps mean nothing, and the sound is contiguous.
            max_s: the limit on its duration.
            channel: the only one that is heard, from 0; silence where the track has no such channel. None: all.
        """
        decoder = open_decoder(stream)
        if decoder is None:
            raise failed(UNREADABLE)
        self.decoder = decoder
        self.position = 0
        self.damaged = False
        self.has_gaps = False
        self._out_of_phase = False
        self._clock = clock
        self._max_s = max_s
        self._channel = channel
        self._mixer = ChannelMixer()
        self._format: tuple[str, str, int, int] | None = None
        self._frames = av.AudioFifo()
        self._resampler: av.AudioResampler | None = None
        self._start = 0
        self._since_start_s = 0.0

    @property
    def out_of_phase(self) -> bool:
        """Whether channels would have cancelled each other."""
        return self._out_of_phase or self._mixer.out_of_phase

    @property
    def has_jumps(self) -> bool:
        """Whether there is silence between its frames, or time stamps jump."""
        return self.has_gaps or (self._clock is not None and self._clock.jumped)

    @property
    def left_out_gap(self) -> bool:
        """Whether a long gap may have been taken for a new clock: what comes after it is too early then."""
        return self._clock is not None and self._clock.left_out_gap

    def push(self, packet: "Packet | None") -> Iterator[Samples]:
        """Decode a packet, or None at the end, and yield the samples that are ready.

        Raises:
            JobFailedError: `audio_too_long`.
        """
        for frame in self.decoder.decode(packet):
            yield from self._place(frame)
        if packet is None:
            yield from self._end_run()

    def _place(self, frame: av.AudioFrame) -> Iterator[Samples]:
        if frame.sample_rate < _LEAST_RATE:
            self.damaged = True
            return
        duration_s = frame.samples / frame.sample_rate
        gap_s = self._gap_s(frame)
        if self._heard_s + gap_s + duration_s > self._max_s:
            raise failed(TOO_LONG, most=self._max_s)
        layout = frame.layout
        frame_format = frame.format.name, layout.name, layout.nb_channels, frame.sample_rate
        if gap_s or frame_format != self._format:
            yield from self._end_run()
            if gap_s:
                self.has_gaps = self.has_gaps or self.position > 0
                yield from self._silence_until(round((self._heard_s + gap_s) * SAMPLE_RATE))
            self._begin_run(frame_format)
        self._since_start_s += duration_s
        frame.pts = None  # the clock has heeded it
        self._frames.write(frame)
        if self._frames.samples >= min(frame.sample_rate, _BATCH_VALUES // layout.nb_channels):
            yield from self._convert()

    def _gap_s(self, frame: av.AudioFrame) -> float:
        if self._clock is None or frame.time is None:
            return 0.0
        return self._clock.gap_s(frame.time, self._heard_s)

    @property
    def _heard_s(self) -> float:
        """Where the sound ends that was given to the resampler."""
        return self._start / SAMPLE_RATE + self._since_start_s

    def _silence_until(self, end: int) -> Iterator[Samples]:
        while self.position < end:
            yield self._counted(np.zeros(min(_SILENCE, end - self.position), np.float32))

    def _begin_run(self, frame_format: tuple[str, str, int, int]) -> None:
        # The layout stays: FFmpeg's own way to mono would leave channels out.
        number_format = "fltp" if frame_format[2] <= _MAX_PLANES else "flt"
        self._resampler = av.AudioResampler(format=number_format, rate=SAMPLE_RATE)
        self._frames = av.AudioFifo()
        self._format = frame_format
        self._start, self._since_start_s = self.position, 0.0

    def _end_run(self) -> Iterator[Samples]:
        """Yield what the batch and the resampler still hold."""
        yield from self._convert(ends=True)
        self._resampler = self._format = None

    def _convert(self, *, ends: bool = False) -> Iterator[Samples]:
        """Convert the batch: many frames at once take half the time that they take one by one."""
        if self._resampler is None:
            return
        batch = self._frames.read()
        try:
            converted = [] if batch is None else self._resampler.resample(batch)
            if ends:
                converted += self._resampler.resample(None)
        except (av.FFmpegError, ValueError) as exc:  # a layout or a rate without a conversion
            if isinstance(exc, av.FFmpegError):
                check_memory(exc)
            self.damaged = True
            self._resampler = self._format = None
            return
        if converted:
            yield self._mix(converted)

    def _mix(self, frames: Sequence[av.AudioFrame]) -> Samples:
        parts = [_columns(frame) for frame in frames]
        block = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._channel is not None:
            is_there = self._channel < block.shape[1]
            return self._counted(block[:, self._channel].copy() if is_there else np.zeros(len(block), np.float32))
        if block.shape[1] != self._mixer.channels:
            self._out_of_phase = self.out_of_phase
            self._mixer = ChannelMixer(block.shape[1])
        return self._counted(self._mixer.mix(block))

    def _counted(self, samples: Samples) -> Samples:
        self.position += len(samples)
        return samples


class TrackMixer:
    """Adds up the samples of several tracks that are decoded in turns."""

    def __init__(self, tracks: int) -> None:
        self._queues: list[deque[Samples]] = [deque() for _ in range(tracks)]
        self._ends = [0] * tracks
        self._position = 0

    def push(self, track: int, samples: Samples) -> Iterator[Samples]:
        """Add what follows in one track, and yield what is complete."""
        self._queues[track].append(samples)
        self._ends[track] += len(samples)
        # A track that is far behind is taken for silent until then: what is held of the others must not grow.
        yield from self._take(max(min(self._ends), max(self._ends) - _MAX_SKEW))

    def finish(self) -> Iterator[Samples]:
        """Yield the rest, when no track has any more."""
        yield from self._take(max(self._ends))

    def _take(self, end: int) -> Iterator[Samples]:
        count = end - self._position
        if count <= 0:
            return
        total = np.zeros(count, np.float32)
        for track, queue in enumerate(self._queues):
            filled = 0
            while queue and filled < count:
                part = queue.popleft()
                used = min(len(part), count - filled)
                total[filled : filled + used] += part[:used]
                filled += used
                if used < len(part):
                    queue.appendleft(part[used:])
            self._ends[track] = max(self._ends[track], end)
        self._position = end
        yield total
