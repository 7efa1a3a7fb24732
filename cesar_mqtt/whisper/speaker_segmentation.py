"""Who of at most three speakers speaks when within ten seconds: pyannote's segmentation model, window after window.

A `Segmentation` belongs to the thread that uses it. The speakers of one window have no names that hold in another one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.whisper.onnx_models import OnnxModel

WINDOW_SAMPLES = 10 * SAMPLE_RATE
FRAME_SAMPLES = 270
"""From one frame of the model to the next: 16.9 ms."""
FIRST_FRAME_SAMPLES = 360
"""Where the first frame begins: in the middle of what the model sees of it, less half a frame."""
WINDOW_FRAMES = 589
HOP_FRAMES = 296
"""From one window to the next: 5 s, in whole frames, so that all windows share one grid."""
HOP_SAMPLES = HOP_FRAMES * FRAME_SAMPLES
SPEAKERS = 3
"""The most that the model tells apart in a window, two of them at once."""

_MEMBERS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)
"""Which speakers each of the model's seven classes means."""

Activity: TypeAlias = NDArray[np.float32]
"""How probable it is that each speaker speaks; shape (`WINDOW_FRAMES`, `SPEAKERS`)."""


@dataclass(frozen=True, slots=True, eq=False)
class AudioWindow:
    """Ten seconds of a recording.

    Attributes:
        number: from 0; it begins `number * HOP_SAMPLES` samples after the recording.
        samples: `WINDOW_SAMPLES`, silence after the end of the recording.
        length: how many of the samples are the recording's.
        is_last: whether no other follows.
    """

    number: int
    samples: Samples
    length: int
    is_last: bool


def windows(blocks: Iterable[Samples]) -> Iterator[AudioWindow]:
    """Cut a recording into overlapping windows, each second of it into two; holds no more than a window and a block."""
    held: Samples = np.empty(0, np.float32)
    number = 0
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) > WINDOW_SAMPLES:  # so that another one follows
            yield AudioWindow(number, held[:WINDOW_SAMPLES], WINDOW_SAMPLES, is_last=False)
            held = held[HOP_SAMPLES:]
            number += 1
    yield AudioWindow(number, np.pad(held, (0, WINDOW_SAMPLES - len(held))), len(held), is_last=True)


class Segmentation:
    """The model, loaded."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def __call__(self, window: AudioWindow) -> Activity:
        scores = self._model.run(window.samples[np.newaxis, np.newaxis])[0]
        activity: Activity = np.exp(scores) @ _MEMBERS
        return activity
