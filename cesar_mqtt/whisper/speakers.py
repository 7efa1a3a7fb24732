"""Whose words they are: the speakers of a recording that has been transcribed. For the worker's thread."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.audio.windows import Recording
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.threads import until_stopped
from cesar_mqtt.transcript import TranscriptionOptions, Window
from cesar_mqtt.whisper.channel_speakers import levels_of, turns_of
from cesar_mqtt.whisper.diarization import DiarizationError, Turn
from cesar_mqtt.whisper.diarization_models import load
from cesar_mqtt.whisper.known_voices import KnownVoices
from cesar_mqtt.whisper.speaker_labels import SpokenTurn, label_windows

_MAX_CHANNELS = 20
"""The contract knows no more speakers."""
_ONE_CHANNEL = (
    "The recording has only one channel, so everything in it is given to one speaker. Submit it again with `diarize` "
    "true to have the voices told apart."
)


@dataclass(frozen=True, slots=True)
class LabelledWindows:
    """A transcript whose segments have speakers.

    Attributes:
        windows: all of them; each segment has one speaker.
        speakers: how many were found.
        problem: what keeps the labels from being what was asked for, as a sentence; None: nothing.
    """

    windows: tuple[Window, ...]
    speakers: int
    problem: str | None = None


class SpeakerLabeller:
    """Tells the speakers of recordings apart, one recording at a time. The models are loaded for each."""

    def __init__(
        self,
        models: ModelSettings,
        *,
        known_voices: KnownVoices | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            models: where the models are, and whether they may be downloaded.
            known_voices: names the speakers that are known; None: all are numbered.
        """
        self._models = models
        self._known_voices = known_voices

    def label(
        self,
        recording: Recording,
        options: TranscriptionOptions,
        windows: Sequence[Window],
        *,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> LabelledWindows:
        """Find the speakers of a recording, and give each segment its own.

        Args:
            recording: decoded once more; it may be closed.
            options: of the job.
            windows: the transcript, its segments with words.
            on_progress: called with the seconds of the file that are done.
            should_stop: asked many times a second.

        Raises:
            DiarizationError: a model is missing, failed, or ran out of memory; a sentence for the user.
            JobFailedError: the recording cannot be decoded.
            Cancelled: `should_stop` returned True.
        """
        if not any(window.segments for window in windows):
            return LabelledWindows(tuple(windows), 0)
        if options.diarize == "channels":
            return _by_channels(recording, windows, on_progress, should_stop)
        diarizer = load(self._models, should_stop=should_stop)
        found = diarizer.diarize(
            _only_clips(recording.samples(should_stop), options.clips),
            min_speakers=options.min_speakers,
            max_speakers=options.max_speakers,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        names: Mapping[int, str] = {}
        if self._known_voices is not None:
            names = self._known_voices.names_of(found.voices, diarizer, should_stop=should_stop)
        return _labelled(until_stopped(windows, should_stop), found.turns, names)


def _by_channels(
    recording: Recording,
    windows: Sequence[Window],
    on_progress: Callable[[float], None],
    should_stop: Callable[[], bool],
) -> LabelledWindows:
    channels = recording.channel_count(should_stop)
    if channels > _MAX_CHANNELS:
        raise DiarizationError(
            f"The recording has {channels} channels, and at most {_MAX_CHANNELS} can be one speaker each.",
            "Submit it again with `diarize` true to have the voices told apart.",
        )
    if channels == 1:
        turn = SpokenTurn(0.0, windows[-1].until_s, _name(1))
        return LabelledWindows(label_windows(until_stopped(windows, should_stop), [turn]), 1, _ONE_CHANNEL)
    heard = 0

    def count(samples: int) -> None:
        nonlocal heard
        heard += samples
        on_progress(heard / SAMPLE_RATE / channels)

    levels = [levels_of(recording.samples(should_stop, channel=number), count) for number in range(channels)]
    return _labelled(until_stopped(windows, should_stop), turns_of(levels), {})


def _labelled(windows: Iterable[Window], turns: Sequence[Turn], names: Mapping[int, str]) -> LabelledWindows:
    spoken = [SpokenTurn(turn.start, turn.end, names.get(turn.speaker, _name(turn.speaker))) for turn in turns]
    return LabelledWindows(label_windows(windows, spoken), len({turn.speaker for turn in spoken}))


def _name(number: int) -> str:
    return f"Speaker {number}"


def _only_clips(blocks: Iterable[Samples], clips: Sequence[tuple[float, float]]) -> Iterator[Samples]:
    """Silence what lies outside of the clips, if there are any, and end after the last one."""
    if not clips:
        yield from blocks
        return
    ranges = [(round(start_s * SAMPLE_RATE), round(end_s * SAMPLE_RATE)) for start_s, end_s in clips]
    last = max(end for _, end in ranges)
    position = 0
    for block in blocks:
        heard = np.zeros(len(block), np.float32)
        for start, end in ranges:
            part = slice(max(0, start - position), max(0, end - position))
            heard[part] = block[part]
        yield heard[: max(0, last - position)]
        position += len(block)
        if position >= last:
            return
