"""How many frames the encoder is given for a piece of audio: all 30 s, or only its own length and some padding.

Whisper is trained on 30 s, and faster-whisper always encodes as much; a clip of 4 s then costs as much as one of 30 s.
With too little padding the decoder repeats itself or invents text, so the padding is measured for each size of model
(docs/performance.md). Any thread may call it.
"""

from weakref import WeakKeyDictionary

import numpy as np
from faster_whisper import WhisperModel

from cesar_mqtt.whisper.features import Features

FULL_FRAMES = 3000
"""30 s."""

PADDING_FRAMES = {384: 300, 512: 300, 768: 1000}
"""The frames of padding by the width of the model: tiny, base, small. `benchmarks/encoder_input.py` measured tiny.en
and base; small is given three times as much without a measurement. A larger model gets the full length."""
_NOISY_BELOW_DB = 13
"""White noise as loud as the voice gives 10 to 12 dB, noise 5 dB below it 14 to 17, and clean speech 28 and more."""
_widths: WeakKeyDictionary[WhisperModel, int] = WeakKeyDictionary()
"""CTranslate2 does not tell the width, and encoding takes 1 to 4 ms."""


def padding_frames(model: WhisperModel) -> int:
    """Return how many frames must follow the content for this model; `FULL_FRAMES`: it needs the full length."""
    width = _widths.get(model)
    if width is None:
        probe = model.encode(np.zeros((model.model.n_mels, 2), np.float32))
        width = _widths[model] = probe.shape[-1]
    return PADDING_FRAMES.get(width, FULL_FRAMES)


def is_noisy(features: Features) -> bool:
    """Whether the loud parts are so little above the quiet ones that the model needs the full length."""
    decibels = 10 * np.log10((10 ** (4 * features - 4)).sum(axis=0))  # the inverse of Whisper's own scale
    quiet, loud = np.percentile(decibels, (10, 95))
    return bool(loud - quiet < _NOISY_BELOW_DB)


def padded(features: Features, frames: int) -> Features:
    """Pad to so many frames, with the value that faster-whisper pads with."""
    return np.pad(features, ((0, 0), (0, max(0, frames - features.shape[1]))))
