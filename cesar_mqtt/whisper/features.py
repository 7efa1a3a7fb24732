"""Log-Mel features of audio of any length, in little memory. No state; any thread may call it."""

from collections.abc import Callable

import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.errors import Cancelled
from cesar_mqtt.whisper.hardware import release_memory

LARGE_SAMPLES = 120 * SAMPLE_RATE
"""From this length on the 40 ms of `release_memory` do not count beside the work itself."""

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
    if len(samples) > LARGE_SAMPLES:
        release_memory()  # the VAD has just freed large blocks
    padded = np.pad(np.pad(samples, (0, HOP_SAMPLES)), extractor.n_fft // 2, mode="reflect")
    frames = len(samples) // HOP_SAMPLES
    spectrum = np.empty((len(extractor.mel_filters), frames), np.float32)
    for first in range(0, frames, _BLOCK_FRAMES):
        if should_stop():
            raise Cancelled
        block = spectrum[:, first : first + _BLOCK_FRAMES]
        block[:] = _log_mel_of(extractor, padded, first, block.shape[1])
    # Whisper's own scale (openai/whisper, `log_mel_spectrogram`): 80 dB below the loudest, then about -1 to 1.
    np.maximum(spectrum, spectrum.max() - 8.0, out=spectrum)
    spectrum += 4.0
    spectrum /= 4.0
    return spectrum


def _log_mel_of(extractor: FeatureExtractor, padded: Samples, first: int, count: int) -> Features:
    hop, size = HOP_SAMPLES, extractor.n_fft
    window = np.hanning(size + 1)[:-1].astype(np.float32)
    part = padded[first * hop : (first + count - 1) * hop + size]
    transform = extractor.stft(part, size, hop, window=window, center=False, return_complex=True)
    power = np.abs(transform.astype(np.complex64)) ** 2
    mel = np.empty((len(extractor.mel_filters), count), np.float32)
    for begin in range(0, count, _PRODUCT_FRAMES):
        frames = slice(begin, begin + _PRODUCT_FRAMES)
        np.matmul(extractor.mel_filters, power[:, frames], out=mel[:, frames])
    return np.log10(np.maximum(mel, 1e-10, out=mel), out=mel)
