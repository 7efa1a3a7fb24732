"""A view of a Whisper model that can be cancelled between any two steps, and needs little memory for its features.

faster-whisper can only be cancelled between two segments, and minutes of music may lie between them, or the same half
minute decoded at six temperatures. The threads that may use the model may use its view, several at once.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.feature_extractor import FeatureExtractor
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.errors import Cancelled
from cesar_mqtt.whisper.hardware import release_memory

LARGE_SAMPLES = 120 * SAMPLE_RATE
"""From this length on the 40 ms of `release_memory` do not count beside the work itself."""

_BLOCK_FRAMES = 1500
"""15 s."""


def interruptible(model: WhisperModel, should_stop: Callable[[], bool]) -> WhisperModel:
    """Return a view of the model of which each step asks `should_stop` first, and raises Cancelled if that is True.

    The longest steps are the VAD, about a second for ten minutes of audio, and a beam search over 30 s.
    """
    view = copy.copy(model)
    view.model = _CancellableModel(model.model, should_stop)
    view.feature_extractor = _BlockwiseFeatures(model.feature_extractor, should_stop)
    return view


class _CancellableModel:
    """Wraps `ctranslate2.models.Whisper`."""

    def __init__(self, model: Any, should_stop: Callable[[], bool]) -> None:
        self._model = model
        self._should_stop = should_stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _step(self, name: str, *args: object, **options: object) -> Any:
        if self._should_stop():
            raise Cancelled
        return getattr(self._model, name)(*args, **options)

    def encode(self, *args: object, **options: object) -> Any:
        return self._step("encode", *args, **options)

    def generate(self, *args: object, **options: object) -> Any:
        return self._step("generate", *args, **options)

    def detect_language(self, *args: object, **options: object) -> Any:
        return self._step("detect_language", *args, **options)

    def align(self, *args: object, **options: object) -> Any:
        return self._step("align", *args, **options)


class _BlockwiseFeatures:
    """Wraps faster-whisper's `FeatureExtractor` and computes the same, block by block.

    For ten minutes at once, the complex spectrum and its copies take more than 500 MB.
    """

    def __init__(self, extractor: FeatureExtractor, should_stop: Callable[[], bool]) -> None:
        self._extractor = extractor
        self._should_stop = should_stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extractor, name)

    def __call__(self, waveform: Samples, padding: int = 160, chunk_length: int | None = None) -> NDArray[np.float32]:
        """Compute the log-Mel spectrogram, shape (mels, frames)."""
        extractor = self._extractor
        if chunk_length is not None:
            features: NDArray[np.float32] = extractor(waveform, padding=padding, chunk_length=chunk_length)
            return features
        if len(waveform) > LARGE_SAMPLES:
            release_memory()  # the VAD has just freed large blocks
        padded = np.pad(np.pad(waveform, (0, padding)), extractor.n_fft // 2, mode="reflect")
        spectrum = np.empty(
            (len(extractor.mel_filters), (len(padded) - extractor.n_fft) // extractor.hop_length), np.float32
        )
        for first in range(0, spectrum.shape[1], _BLOCK_FRAMES):
            if self._should_stop():
                raise Cancelled
            block = spectrum[:, first : first + _BLOCK_FRAMES]
            block[:] = self._log_mel(padded, first, block.shape[1])
        # Whisper's own scale (openai/whisper, `log_mel_spectrogram`): 80 dB below the loudest, then about -1 to 1.
        np.maximum(spectrum, spectrum.max() - 8.0, out=spectrum)
        spectrum += 4.0
        spectrum /= 4.0
        return spectrum

    def _log_mel(self, padded: Samples, first: int, count: int) -> NDArray[np.float32]:
        extractor = self._extractor
        hop, size = extractor.hop_length, extractor.n_fft
        window = np.hanning(size + 1)[:-1].astype(np.float32)
        part = padded[first * hop : (first + count - 1) * hop + size]
        transform = extractor.stft(part, size, hop, window=window, center=False, return_complex=True)
        power = np.abs(transform.astype(np.complex64)) ** 2
        log_mel: NDArray[np.float32] = np.log10(np.clip(extractor.mel_filters @ power, 1e-10, None))
        return log_mel
