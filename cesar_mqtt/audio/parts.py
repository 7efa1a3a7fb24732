"""One container that is decoded from start to end: its chosen tracks, mixed, on its clock.

A file may be several that were joined; each of them is a part. For the thread that decodes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from av.container import InputContainer

from cesar_mqtt.audio.clock import Clock, Witnesses
from cesar_mqtt.audio.containers import (
    GAPLESS,
    JOINED_CLOCKS,
    TIMED,
    declaration,
    lacks_beginning,
    name_of,
    open_container,
    zero_s,
)
from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.paths import failed
from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.audio.tracks import TOO_LONG, Listener, Packet, Track, TrackChoice, TrackMixer, choose_tracks, packets
from cesar_mqtt.errors import Cancelled

_EXACT_S = 0.02
"""FLAC declares the number of its samples: less is a lost frame."""


class Part:
    """An open container with the tracks that are heard.

    Attributes:
        format_name: FFmpeg's name of the container.
        channels: of the track that is heard, as declared; of several tracks the most.
        duration_s: where its sound ends, as far as it declares that and has bytes for it; None: it does not declare it.
        position: how many samples there were so far.
    """

    def __init__(
        self,
        container: InputContainer,
        chosen: list[int],
        *,
        file: FileReader,
        max_s: float,
        heeds_others: bool,
        channel: int | None,
    ) -> None:
        self.format_name = container.format.name
        self.position = 0
        self._container = container
        self._file = file
        self._max_s = max_s
        self._damaged = name_of(container) == "mp3" and lacks_beginning(file)
        self._other_end_s = 0.0
        self._units_s = {stream.index: float(stream.time_base) for stream in container.streams if stream.time_base}
        streams = container.streams.audio
        declarations = [declaration(container, streams[number], file) for number in chosen]
        self.duration_s = _latest(declared.expected_s for declared in declarations)
        self._declared_s = _latest(declared.end_s for declared in declarations)
        self._is_of_track = all(declared.is_of_track for declared in declarations)
        self._is_cut = any(declared.is_cut for declared in declarations)
        self._is_gapless = name_of(container) in GAPLESS
        self._has_one_clock = name_of(container) not in JOINED_CLOCKS
        self._is_exact = name_of(container) == "flac"
        self._zero_s = zero_s(container, file)
        self._witnesses = Witnesses()
        self._tracks = [Track(streams[number], self._clock(), max_s, channel) for number in chosen]
        self.channels = max(streams[number].codec_context.channels for number in chosen)
        self._mixer = TrackMixer(len(chosen))
        others = [stream for number, stream in enumerate(streams) if number not in chosen] if heeds_others else []
        self._listeners = {stream.index: Listener(stream) for stream in others}

    def _clock(self) -> Clock | None:
        if name_of(self._container) not in TIMED:
            return None
        return Clock(self._zero_s, self._declared_s, self._max_s, self._witnesses)

    @property
    def damaged(self) -> bool:
        if self._damaged or any(track.damaged or track.decoder.damaged for track in self._tracks):
            return True
        if self._is_gapless and any(track.has_jumps for track in self._tracks):
            return True
        if self._has_one_clock and any(track.left_out_gap for track in self._tracks):
            return True
        return self._is_exact and (self._declared_s or 0.0) - self.position / SAMPLE_RATE > _EXACT_S

    @property
    def out_of_phase(self) -> bool:
        return any(track.out_of_phase for track in self._tracks)

    @property
    def ignores_tracks(self) -> bool:
        """Whether another track has, or may have, sound."""
        return any(listener.may_have_sound for listener in self._listeners.values())

    @property
    def truncated(self) -> bool:
        """Whether the end is missing: a part of the last frame, or over a second and 5 % of the declared duration."""
        if self._is_cut or any(track.decoder.is_cut for track in self._tracks):
            return True
        declared_s = self._declared_s or 0.0
        reached_s = self.position / SAMPLE_RATE
        if not self._is_of_track:
            reached_s = max(reached_s, self._other_end_s)
        return declared_s - reached_s > max(1.0, 0.05 * declared_s)

    def samples(self, should_stop: Callable[[], bool]) -> Iterator[Samples]:
        """Decode, contiguous on the clock from second 0.

        Raises:
            Cancelled: `should_stop`, which is asked before each packet, returned True.
            JobFailedError: `audio_too_long`.
        """
        numbers = {track.decoder.index: number for number, track in enumerate(self._tracks)}
        for packet in packets(self._container, self._file, self._mark_damaged):
            if should_stop():
                raise Cancelled
            number = numbers.get(packet.stream_index)
            if number is not None:
                yield from self._mixed(number, self._tracks[number].push(packet))
                self._witnesses.forget()
            elif packet.stream_index in self._listeners:
                self._listeners[packet.stream_index].listen(packet)
            self._note_time(packet, is_heard=number is not None)
        for number, track in enumerate(self._tracks):
            yield from self._mixed(number, track.push(None))
        for mixed in self._mixer.finish():
            yield self._counted(mixed)

    def _mixed(self, number: int, parts: Iterator[Samples]) -> Iterator[Samples]:
        for samples in parts:
            if len(self._tracks) == 1:
                yield self._counted(samples)
                continue
            for mixed in self._mixer.push(number, samples):
                yield self._counted(mixed)

    def _counted(self, samples: Samples) -> Samples:
        self.position += len(samples)
        return samples

    def _note_time(self, packet: Packet, *, is_heard: bool) -> None:
        unit_s = self._units_s.get(packet.stream_index)
        if packet.pts is None or unit_s is None:
            return
        stamp_s = packet.pts * unit_s
        self._other_end_s = max(self._other_end_s, stamp_s - self._zero_s)
        if not is_heard:
            self._witnesses.note(stamp_s)

    def _mark_damaged(self) -> None:
        self._damaged = True


def _latest(ends: Iterable[float | None]) -> float | None:
    known = [end_s for end_s in ends if end_s is not None]
    return max(known, default=None)


@contextmanager
def open_part(file: FileReader, *, track: TrackChoice, max_s: float, channel: int | None = None) -> Iterator[Part]:
    """Open the container that begins where the file does, and choose what is heard of it.

    Raises:
        JobFailedError: `audio_unreadable`, `audio_not_allowed`, `audio_no_stream`, `audio_too_long`, `audio_io_error`.
    """
    heeds_others = not isinstance(track, int)
    with open_container(file) as container:
        chosen, was_read = choose_tracks(container, file, track)
        part = Part(container, chosen, file=file, max_s=max_s, heeds_others=heeds_others, channel=channel)
        if part.duration_s is not None and part.duration_s > max_s:
            _check_packets(container, file, chosen, max_s)
            was_read = True
        file.raise_error()
        if not was_read:
            yield part
            return
    with open_container(file) as container:
        yield Part(container, chosen, file=file, max_s=max_s, heeds_others=heeds_others, channel=channel)


def _check_packets(container: InputContainer, file: FileReader, chosen: list[int], max_s: float) -> None:
    """Add up the packets of a file that declares too much: the header of a planned recording is no recording.

    Raises:
        JobFailedError: `audio_too_long`.
    """
    total_s = dict.fromkeys((container.streams.audio[number].index for number in chosen), 0.0)
    for packet in packets(container, file):
        if packet.stream_index in total_s and packet.duration and packet.time_base:
            total_s[packet.stream_index] += float(packet.duration * packet.time_base)
            if total_s[packet.stream_index] > max_s:
                raise failed(TOO_LONG, most=max_s)
