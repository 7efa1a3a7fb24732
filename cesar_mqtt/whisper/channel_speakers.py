"""One speaker for each channel of a recording, as telephone systems record calls. For the worker's thread.

No model of voices: at each moment the loudest of the channels that have speech has the floor, so that the sound of one
side that leaks into the channel of the other counts for nothing.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import FRAME_SAMPLES, SPEECH_FROM, speech_probabilities
from cesar_mqtt.whisper.diarization import Turn

_LEVEL_FLOOR = 1e-10
_SMOOTHED_FRAMES = 5
"""Over so many frames (0.16 s) levels are compared: a word has pauses in it."""
_JOINED_FRAMES = 16
"""A shorter silence (0.5 s) of a speaker ends no turn, unless another one speaks in it."""
_BLOCK_FRAMES = 2_000
"""Given to the VAD at once (64 s)."""

Levels = NDArray[np.float32]
"""The power of a channel in each frame in which it has speech, else 0."""


def levels_of(samples: Iterator[Samples], on_samples: Callable[[int], None]) -> Levels:
    """Listen to one channel from its start to its end; `on_samples` gets the number of samples of each step."""
    found: list[Levels] = []
    held: Samples = np.empty(0, np.float32)
    for block in samples:
        held = np.concatenate((held, block))
        whole = len(held) // FRAME_SAMPLES * FRAME_SAMPLES
        if whole >= _BLOCK_FRAMES * FRAME_SAMPLES:
            found.append(_levels(held[:whole]))
            held = held[whole:].copy()
        on_samples(len(block))
    if len(held):
        found.append(_levels(np.pad(held, (0, -len(held) % FRAME_SAMPLES))))
    return np.concatenate(found) if found else np.empty(0, np.float32)


def _levels(samples: Samples) -> Levels:
    power = np.square(samples.reshape(-1, FRAME_SAMPLES)).mean(axis=1, dtype=np.float32)
    level: Levels = np.where(speech_probabilities(samples) >= SPEECH_FROM, power, np.float32(0.0))
    return level


def turns_of(channels: list[Levels]) -> list[Turn]:
    """Return the turns; the speaker's number is that of the channel, counted from 1."""
    length = max(map(len, channels), default=0)
    if not length:
        return []
    kernel = np.ones(_SMOOTHED_FRAMES, np.float32) / _SMOOTHED_FRAMES
    padded = [np.pad(levels, (0, length - len(levels))) for levels in channels]
    smoothed = np.stack([np.convolve(levels, kernel, mode="same")[:length] for levels in padded])
    loudest = np.where(smoothed.max(axis=0) > _LEVEL_FLOOR, smoothed.argmax(axis=0), -1)
    return list(_runs(loudest))


def _runs(loudest: NDArray[np.int64]) -> Iterator[Turn]:
    borders = [0, *(np.flatnonzero(np.diff(loudest)) + 1).tolist(), len(loudest)]
    frame_s = FRAME_SAMPLES / SAMPLE_RATE
    pending: tuple[int, int, int] | None = None
    for begin, end in pairwise(borders):
        channel = int(loudest[begin])
        if channel < 0:
            continue
        if pending is not None and pending[0] == channel and begin - pending[2] < _JOINED_FRAMES:
            pending = (channel, pending[1], end)
            continue
        if pending is not None:
            yield Turn(round(pending[1] * frame_s, 3), round(pending[2] * frame_s, 3), pending[0] + 1)
        pending = (channel, begin, end)
    if pending is not None:
        yield Turn(round(pending[1] * frame_s, 3), round(pending[2] * frame_s, 3), pending[0] + 1)
