"""Who speaks when: from samples on the file's clock to turns of numbered speakers.

Three steps, the first two window by window: a model for the speakers of ten seconds (`speaker_segmentation`), a model
that turns the voice of each into an embedding, and one clustering of all embeddings (`speaker_clustering`). What stays
of a window is a few kilobytes, so that the memory hardly depends on the length of the recording.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.errors import Cancelled
from cesar_mqtt.whisper.onnx_models import EMBEDDING_FILE, SEGMENTATION_FILE, DiarizationError, OnnxModel
from cesar_mqtt.whisper.speaker_clustering import Embedding, Labels, Voices, cluster
from cesar_mqtt.whisper.speaker_features import FRAME_SAMPLES as FEATURE_SAMPLES
from cesar_mqtt.whisper.speaker_features import HOP_SAMPLES as FEATURE_HOP_SAMPLES
from cesar_mqtt.whisper.speaker_features import log_mel_banks
from cesar_mqtt.whisper.speaker_segmentation import (
    FIRST_FRAME_SAMPLES,
    FRAME_SAMPLES,
    HOP_FRAMES,
    HOP_SAMPLES,
    SPEAKERS,
    WINDOW_FRAMES,
    Activity,
    AudioWindow,
    Segmentation,
    windows,
)

__all__ = ["Diarization", "DiarizationError", "Diarizer", "Embedding", "Turn"]

_SPEAKS_FROM = 0.5
_SHORTEST_VOICE_S = 0.3
"""Less of a voice gives no embedding."""
_JOINED_S = 0.5
_SHORTEST_TURN_S = 0.1
_EDGE_FRAMES = 60
_FRAME_S = FRAME_SAMPLES / SAMPLE_RATE
_FIRST_FRAME_S = FIRST_FRAME_SAMPLES / SAMPLE_RATE


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
class _LocalVoice:
    """The voice of a speaker of one window, made of so many seconds of speech of nobody else."""

    window: int
    speaker: int
    seconds: float
    embedding: Embedding


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
        activities: list[NDArray[np.uint8]] = []
        found: list[_LocalVoice] = []
        length = 0
        for window in windows(samples):
            if should_stop():
                raise Cancelled
            activity = self._segmentation(window)
            found += self._voices(window, activity, should_stop)
            activities.append(np.rint(activity * 255).astype(np.uint8))
            length = window.number * HOP_SAMPLES + window.length
            on_progress(length / SAMPLE_RATE)
        if not found:
            return Diarization([], {})
        voices = Voices(
            np.array([voice.embedding for voice in found], np.float32),
            np.array([voice.seconds for voice in found], np.float32),
            np.array([voice.window for voice in found], np.int64),
        )
        labels = cluster(voices, min_speakers=min_speakers, max_speakers=max_speakers, should_stop=should_stop)
        speaks = _join_windows(activities, found, labels)
        turns = _turns(speaks, length / SAMPLE_RATE)
        order = {label: number for number, label in enumerate(dict.fromkeys(turn.speaker for turn in turns), start=1)}
        weighted = voices.embeddings * voices.seconds[:, np.newaxis]
        centres = {label: weighted[labels == label].sum(axis=0) for label in order}
        return Diarization(
            [Turn(turn.start, turn.end, order[turn.speaker]) for turn in turns],
            {order[label]: (centre / np.linalg.norm(centre)).astype(np.float32) for label, centre in centres.items()},
        )

    def _voices(self, window: AudioWindow, activity: Activity, should_stop: Callable[[], bool]) -> list[_LocalVoice]:
        active = activity > _SPEAKS_FROM
        active[_frame_of(window.length) :] = False
        if not active.any():
            return []
        features = log_mel_banks(window.samples[: window.length])
        if not len(features):
            return []
        middles = np.arange(len(features)) * FEATURE_HOP_SAMPLES + FEATURE_SAMPLES // 2
        frames = np.clip((middles - FIRST_FRAME_SAMPLES) // FRAME_SAMPLES, 0, WINDOW_FRAMES - 1)
        alone = active & (active.sum(axis=1, keepdims=True) == 1)
        found = []
        for speaker in range(SPEAKERS):
            heard = features[alone[frames, speaker]]
            seconds = len(heard) * FEATURE_HOP_SAMPLES / SAMPLE_RATE
            if seconds < _SHORTEST_VOICE_S:
                continue
            if should_stop():
                raise Cancelled
            vector = self._embedding.run((heard - heard.mean(axis=0))[np.newaxis])[0]
            embedding = vector / np.linalg.norm(vector)
            found.append(_LocalVoice(window.number, speaker, seconds, embedding))
        return found


def _frame_of(sample: int) -> int:
    return max(0, (sample - FIRST_FRAME_SAMPLES) // FRAME_SAMPLES)


def _join_windows(activities: list[NDArray[np.uint8]], voices: list[_LocalVoice], labels: Labels) -> NDArray[np.bool_]:
    """Average over windows how probable it is that each cluster speaks; shape (frames, clusters)."""
    ramp = np.minimum(np.arange(1, WINDOW_FRAMES + 1), np.arange(WINDOW_FRAMES, 0, -1))
    weight = np.minimum(ramp / _EDGE_FRAMES, 1.0).astype(np.float32)[:, np.newaxis]
    speakers = int(labels.max()) + 1
    of_window: dict[int, list[tuple[int, int]]] = {}
    for voice, label in zip(voices, labels.tolist(), strict=True):
        of_window.setdefault(voice.window, []).append((voice.speaker, label))
    rest = WINDOW_FRAMES - HOP_FRAMES
    before = np.zeros((rest, speakers), np.float32)
    before_weight = np.zeros((rest, 1), np.float32)
    parts = []
    for number, activity in enumerate(activities):
        mapped = np.zeros((WINDOW_FRAMES, speakers), np.float32)
        for speaker, label in of_window.get(number, ()):
            mapped[:, label] = np.maximum(mapped[:, label], activity[:, speaker] / np.float32(255))
        mapped *= weight
        mapped[:rest] += before
        total = weight.copy()
        total[:rest] += before_weight
        parts.append(mapped[:HOP_FRAMES] / total[:HOP_FRAMES] > _SPEAKS_FROM)
        before, before_weight = mapped[HOP_FRAMES:].copy(), total[HOP_FRAMES:].copy()
    parts.append(before / before_weight > _SPEAKS_FROM)
    return np.concatenate(parts)


def _turns(speaks: NDArray[np.bool_], length_s: float) -> list[Turn]:
    """The stretches of each column, without short gaps and short stretches; `speaker` is the number of the column."""
    found = []
    for column in range(speaks.shape[1]):
        changes = np.flatnonzero(np.diff(speaks[:, column].astype(np.int8), prepend=0, append=0))
        times = np.minimum(changes * _FRAME_S + _FIRST_FRAME_S, length_s).reshape(-1, 2)
        joined: list[list[float]] = []
        for start, end in times.tolist():
            if joined and start - joined[-1][1] < _JOINED_S:
                joined[-1][1] = end
            else:
                joined.append([start, end])
        found += [
            Turn(round(start, 3), round(end, 3), column) for start, end in joined if end - start >= _SHORTEST_TURN_S
        ]
    return sorted(found, key=lambda turn: (turn.start, turn.end))
