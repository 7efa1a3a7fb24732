"""Log-Mel features of audio of any length, in little memory. No state; any thread may call it."""

from collections.abc import Callable

import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import Samples, own_pages
from cesar_mqtt.errors import Cancelled

HOP_SAMPLES = 160
"""From one frame to the next: 10 ms."""

_BLOCK_FRAMES = 300
"""3 s."""
_PRODUCT_FRAMES = 10
"""A larger product (of 128 mels, the most that a model has) wakes OpenBLAS's threads. They save no time, and then spin
while the encoder needs the cores: 15 ms of a recording of 5 s here, and 40 ms there."""
Features = NDArray[np.float32]
"""Shape (mels, frames)."""


def log_mel(extractor: FeatureExtractor, samples: Samples, should_stop: Callable[[], bool]) -> Features:
    """Compute what `extractor` computes, block by block: its spectrum of ten minutes at once takes more than 500 MB.

    Without the frame that faster-whisper appends and does not count as content.

    Raises:
        Cancelled: `should_stop`, which is asked before each block, returned True.
    """
    frames = len(samples) // HOP_SAMPLES
    spectrum = own_pages(len(extractor.mel_filters), frames)
    for first in range(0, frames, _BLOCK_FRAMES):
        if should_stop():
            raise Cancelled
        block = spectrum[:, first : first + _BLOCK_FRAMES]
        block[:] = _log_mel_of(extractor, samples, first, block.shape[1])
    # Whisper's own scale (openai/whisper, `log_mel_spectrogram`): 80 dB below the loudest, then about -1 to 1.
    np.maximum(spectrum, spectrum.max() - 8.0, out=spectrum)
    spectrum += 4.0
    spectrum /= 4.0
    return spectrum


def _log_mel_of(extractor: FeatureExtractor, samples: Samples, first: int, count: int) -> Features:
    hop, size = HOP_SAMPLES, extractor.n_fft
    window = np.hanning(size + 1)[:-1].astype(np.float32)
    start = first * hop - size // 2
    part = _mirrored(samples, start, start + (count - 1) * hop + size)
    transform = extractor.stft(part, size, hop, window=window, center=False, return_complex=True)
    power = np.abs(transform.astype(np.complex64)) ** 2
    mel = np.empty((len(extractor.mel_filters), count), np.float32)
    for begin in range(0, count, _PRODUCT_FRAMES):
        frames = slice(begin, begin + _PRODUCT_FRAMES)
        np.matmul(extractor.mel_filters, power[:, frames], out=mel[:, frames])
    return np.log10(np.maximum(mel, 1e-10, out=mel), out=mel)


def _mirrored(samples: Samples, start: int, end: int) -> Samples:
    """Return the samples from `start` to `end`; before the first, and behind a hop of silence, they are mirrored."""
    if start >= 0 and end <= len(samples):
        return samples[start:end]
    last = len(samples) + HOP_SAMPLES - 1
    places = np.abs(np.arange(start, end))
    places = np.where(places > last, 2 * last - places, places)
    found = np.zeros(len(places), np.float32)
    exists = places < len(samples)
    found[exists] = samples[places[exists]]
    return found
