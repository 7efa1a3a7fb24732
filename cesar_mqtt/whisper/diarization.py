"""Who speaks when: from samples on the file's clock to turns of numbered speakers.

Window by window, one model finds where up to three people speak (`speaker_segmentation`), and another one computes an
embedding of each second in which one of them speaks alone. One clustering of all embeddings finds the speakers
(`speaker_clustering`); then each second is assigned to the speaker whose voice is most like it. The first model alone
is not enough: it takes two readers who follow one another for one speaker. Of a window a few kilobytes are kept, so
that the memory hardly depends on the length of the recording.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.errors import Cancelled
from cesar_mqtt.threads import until_stopped
from cesar_mqtt.whisper.onnx_models import EMBEDDING_FILE, SEGMENTATION_FILE, DiarizationError, OnnxModel
from cesar_mqtt.whisper.speaker_clustering import Embedding, Embeddings, Labels, Voices, best_path, find_speakers, unit
from cesar_mqtt.whisper.speaker_features import FRAME_SAMPLES as FEATURE_SAMPLES
from cesar_mqtt.whisper.speaker_features import HOP_SAMPLES as FEATURE_HOP_SAMPLES
from cesar_mqtt.whisper.speaker_features import log_mel_banks, narrowness
from cesar_mqtt.whisper.speaker_segmentation import (
    FIRST_FRAME_SAMPLES,
    FRAME_SAMPLES,
    HOP_FRAMES,
    HOP_SAMPLES,
    SPEAKERS,
    WINDOW_FRAMES,
    AudioWindow,
    Segmentation,
    windows,
)

__all__ = ["Diarization", "DiarizationError", "Diarizer", "Embedding", "Turn"]

_FRAME_S = FRAME_SAMPLES / SAMPLE_RATE
_FIRST_FRAME_S = FIRST_FRAME_SAMPLES / SAMPLE_RATE
_SPEAKS_FROM = 0.5
_MARGIN_FRAMES = (WINDOW_FRAMES - HOP_FRAMES) // 2
"""At either end of a window, what the neighbouring window sees with more of its surroundings."""
_PIECE_S = 1.0
_VOICE_S = 1.6
"""Of which an embedding is made, as far as the same speaker goes on around the piece."""
_BRIDGED_FRAMES = 6
"""A shorter interruption (0.1 s) does not end a stretch of speech."""
_LEAST_FEATURES = 15
"""Less of a voice (0.15 s) gives no embedding."""
_INSIDE = 0.6
"""So much of a piece of a neighbouring window has to be a speaker's for it to count as that speaker's."""
_ROUNDS = 4
_JOINED_S, _BRIDGED_S = 0.8, 0.25
"""A shorter silence of all speakers does not end a turn, nor does a shorter one of the speaker alone."""
_SHORTEST_TURN_S = 0.1

Frames = NDArray[np.bool_]
"""Which of a window's speakers speaks in each frame; shape (`WINDOW_FRAMES`, `SPEAKERS`)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A speaker speaks, from second to second of the file; turns of different speakers may overlap.

    Attributes:
        speaker: from 1, in the order in which they are heard first.
    """

    start: float
    end: float
    speaker: int


@dataclass(frozen=True, slots=True, eq=False)
class Diarization:
    """The result.

    Attributes:
        turns: in order of their start.
        voices: of each speaker.
    """

    turns: list[Turn]
    voices: dict[int, Embedding]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """About a second in which one speaker of a window speaks alone.

    Attributes:
        window: its number.
        speaker: of the window.
        start: its first frame, counted in the window.
        end: the frame after its last.
        embedding: of its voice.
        narrow: how surely it was heard through the band of a telephone, from 0 to 1.
    """

    window: int
    speaker: int
    start: int
    end: int
    embedding: Embedding
    narrow: float


class Diarizer:
    """Both models, loaded. One recording at a time."""

    def __init__(self, segmentation: Path, embedding: Path) -> None:
        """Load the models.

        Raises:
            DiarizationError: a file is missing, damaged, or holds another model.
        """
        self._segmentation = Segmentation(OnnxModel(segmentation))
        self._embedding = OnnxModel(embedding)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the models of a folder that has both under their own names.

        Raises:
            DiarizationError: as the constructor.
        """
        return cls(folder / SEGMENTATION_FILE, folder / EMBEDDING_FILE)

    def diarize(
        self,
        samples: Iterable[Samples],
        *,
        min_speakers: int | None = None,
        max_speakers: int | None = None,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Diarization:
        """Find the turns of a recording.

        Args:
            samples: blocks of any length that follow one another from the start of the file's clock.
            min_speakers: at least so many, as far as there are voices for them; None: one.
            max_speakers: at most so many; None: as many as there are.
            on_progress: called with the seconds of the file that are done, after each window.
            should_stop: asked before each step of a model, and during the clustering.

        Raises:
            DiarizationError: a model failed, or memory ran out.
            Cancelled: `should_stop` returned True.
        """
        try:
            return self._diarize(samples, min_speakers, max_speakers, on_progress, should_stop)
        except MemoryError as exc:
            raise DiarizationError(
                "The speakers could not be told apart: memory ran out.", "Free some, and retry."
            ) from exc

    def _diarize(
        self,
        samples: Iterable[Samples],
        min_speakers: int | None,
        max_speakers: int | None,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Diarization:
        activities: list[Frames] = []
        pieces: list[_Piece] = []
        length = 0
        for window in until_stopped(windows(samples), should_stop):
            speaks = self._segmentation(window) > _SPEAKS_FROM
            speaks[_frame_of(window.length) :] = False
            pieces += self._pieces(window, speaks, should_stop)
            activities.append(speaks)
            length = window.number * HOP_SAMPLES + window.length
            on_progress(length / SAMPLE_RATE)
        pieces.sort(key=_start_of)
        return _assign(
            activities,
            pieces,
            length / SAMPLE_RATE,
            min_speakers=min_speakers,
            max_speakers=max_speakers,
            should_stop=should_stop,
        )

    def _pieces(self, window: AudioWindow, speaks: Frames, should_stop: Callable[[], bool]) -> Iterator[_Piece]:
        """The pieces of a window's middle: the rest of it belongs to the windows beside."""
        if not speaks.any():
            return
        features = log_mel_banks(window.samples[: window.length])
        middles = np.arange(len(features)) * FEATURE_HOP_SAMPLES + FEATURE_SAMPLES // 2
        frames = np.clip((middles - FIRST_FRAME_SAMPLES) // FRAME_SAMPLES, 0, WINDOW_FRAMES - 1)
        alone = _alone(speaks)
        first, last = _own_frames(window.number, is_last=window.is_last)
        for speaker in range(SPEAKERS):
            for start, end, from_frame, to_frame in _cut(alone[:, speaker], first, last):
                wanted = (frames >= from_frame) & (frames < to_frame) & alone[frames, speaker]
                voice = features[wanted]
                if len(voice) < _LEAST_FEATURES:
                    continue
                if should_stop():
                    raise Cancelled
                found = self._embedding.run((voice - voice.mean(axis=0))[np.newaxis])[0]
                yield _Piece(window.number, speaker, start, end, unit(found), narrowness(voice))


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """The pieces of one speaker of one window, which are one person's unless their voices say otherwise.

    Attributes:
        window: its number.
        speaker: of the window.
        members: the numbers of the pieces, in order of time; those of the windows beside are among them.
        own: which of the members are the window's own.
        spans: the first frame of each member and the one after its last, counted in the window.
        frames: the window's own frames in which the speaker speaks.
    """

    window: int
    speaker: int
    members: Labels
    own: NDArray[np.bool_]
    spans: NDArray[np.intp]
    frames: NDArray[np.intp]


def _assign(
    activities: list[Frames],
    pieces: list[_Piece],
    length_s: float,
    *,
    min_speakers: int | None,
    max_speakers: int | None,
    should_stop: Callable[[], bool],
) -> Diarization:
    """Find the speakers of all pieces, which are in order of time, and give each piece to one of them."""
    if not pieces:
        return Diarization([], {})
    voices = Voices(
        np.array([piece.embedding for piece in pieces], np.float32),
        np.array([(piece.end - piece.start) * _FRAME_S for piece in pieces]),
        np.array([piece.narrow for piece in pieces]),
    )
    centres = find_speakers(voices, min_speakers=min_speakers, max_speakers=max_speakers, should_stop=should_stop)
    chains = list(until_stopped(_chains(activities, pieces), should_stop))
    labels = np.zeros(len(pieces), np.intp)
    for _ in range(_ROUNDS):
        likeness = voices.likeness(centres)
        for chain in until_stopped(chains, should_stop):
            path = best_path(likeness[chain.members])
            labels[chain.members[chain.own]] = path[chain.own]
        centres = voices.centres(labels, centres)
    speaks = _speakers(activities, until_stopped(chains, should_stop), labels)
    return _diarization(_turns(speaks, length_s), centres)


def _alone(speaks: Frames) -> Frames:
    """Where each speaker speaks alone."""
    alone: Frames = speaks & (speaks.sum(axis=1, keepdims=True) == 1)
    return alone


def _own_frames(number: int, *, is_last: bool) -> tuple[int, int]:
    """The first of the frames that a window decides on, and the one after the last."""
    return (_MARGIN_FRAMES if number else 0), (WINDOW_FRAMES if is_last else _MARGIN_FRAMES + HOP_FRAMES)


def _stretches(values: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Where values are true, as the first and the one after the last; shape (n, 2)."""
    return np.flatnonzero(np.diff(values.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)


def _cut(alone: NDArray[np.bool_], first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a speaker's stretches between two frames into pieces; each also with what its embedding is made of."""
    stretches: list[list[int]] = []
    for start, end in _stretches(alone).tolist():
        if stretches and start - stretches[-1][1] <= _BRIDGED_FRAMES:
            stretches[-1][1] = end
        else:
            stretches.append([start, end])
    for start, end in stretches:
        begin, stop = max(start, first), min(end, last)
        if begin >= stop:
            continue
        count = max(1, round((stop - begin) * _FRAME_S / _PIECE_S))
        edges = np.rint(np.linspace(begin, stop, count + 1)).astype(int).tolist()
        for left, right in pairwise(edges):
            missing = max(0, int(_VOICE_S / _FRAME_S) - (right - left))
            before = min(missing // 2, left - start)
            after = min(missing - before, end - right)
            before = min(missing - after, left - start)
            yield left, right, left - before, right + after


def _start_of(piece: _Piece) -> int:
    return piece.window * HOP_FRAMES + piece.start


def _chains(activities: list[Frames], pieces: list[_Piece]) -> Iterator[_Chain]:
    of_window: dict[int, list[int]] = {}
    for number, piece in enumerate(pieces):
        of_window.setdefault(piece.window, []).append(number)
    for window, speaks in enumerate(activities):
        alone = _alone(speaks)
        first, last = _own_frames(window, is_last=window == len(activities) - 1)
        near = [number for beside in (window - 1, window, window + 1) for number in of_window.get(beside, ())]
        near.sort()
        for speaker in range(SPEAKERS):
            frames = first + np.flatnonzero(speaks[first:last, speaker])
            members = [number for number in near if _belongs(pieces[number], window, speaker, alone)]
            if not members or not frames.size:
                continue
            shift = [(pieces[number].window - window) * HOP_FRAMES for number in members]
            spans = [
                (pieces[number].start + offset, pieces[number].end + offset)
                for number, offset in zip(members, shift, strict=True)
            ]
            yield _Chain(
                window,
                speaker,
                np.array(members, np.intp),
                np.array([not offset for offset in shift]),
                np.array(spans, np.intp),
                frames,
            )


def _belongs(piece: _Piece, window: int, speaker: int, alone: Frames) -> bool:
    """Whether a piece is of a speaker of a window; that of another window, by when it is spoken."""
    if piece.window == window:
        return piece.speaker == speaker
    offset = (piece.window - window) * HOP_FRAMES
    start, end = max(0, piece.start + offset), max(0, piece.end + offset)
    return bool(alone[start:end, speaker].sum() >= _INSIDE * (piece.end - piece.start))


def _speakers(activities: list[Frames], chains: Iterable[_Chain], labels: Labels) -> NDArray[np.bool_]:
    """Which speaker speaks in each frame of the recording; shape (frames, speakers)."""
    speaks = np.zeros((len(activities) * HOP_FRAMES + WINDOW_FRAMES, int(labels.max()) + 1), np.bool_)
    for chain in chains:
        frames = chain.frames[:, np.newaxis]
        distances = np.maximum(chain.spans[:, 0] - frames, frames - chain.spans[:, 1] + 1)
        nearest = chain.members[np.maximum(distances, 0).argmin(axis=1)]
        speaks[chain.window * HOP_FRAMES + chain.frames, labels[nearest]] = True
    return speaks


def _diarization(turns: list[Turn], centres: Embeddings) -> Diarization:
    """Number the speakers in the order in which they are heard first."""
    order = {found: number for number, found in enumerate(dict.fromkeys(turn.speaker for turn in turns), start=1)}
    return Diarization(
        [Turn(turn.start, turn.end, order[turn.speaker]) for turn in turns],
        {number: centres[found] for found, number in order.items()},
    )


def _turns(speaks: NDArray[np.bool_], length_s: float) -> list[Turn]:
    """The stretches of each column, without short gaps and short stretches; `speaker` is the number of the column."""
    found = []
    spoken = speaks.sum(axis=1)
    for column in range(speaks.shape[1]):
        joined: list[list[int]] = []
        for start, end in _stretches(speaks[:, column]).tolist():
            if joined and _is_pause(spoken, joined[-1][1], start):
                joined[-1][1] = end
            else:
                joined.append([start, end])
        times = np.minimum(np.array(joined).reshape(-1, 2) * _FRAME_S + _FIRST_FRAME_S, length_s)
        found += [
            Turn(round(start, 3), round(end, 3), column)
            for start, end in times.tolist()
            if end - start >= _SHORTEST_TURN_S
        ]
    return sorted(found, key=lambda turn: (turn.start, turn.end))


def _is_pause(spoken: NDArray[np.intp], start: int, end: int) -> bool:
    """Whether a gap in the speech of one speaker belongs to a turn: a short one in which no other speaks."""
    most_s = _BRIDGED_S if spoken[start:end].any() else _JOINED_S
    return (end - start) * _FRAME_S < most_s


def _frame_of(sample: int) -> int:
    return max(0, (sample - FIRST_FRAME_SAMPLES) // FRAME_SAMPLES)
