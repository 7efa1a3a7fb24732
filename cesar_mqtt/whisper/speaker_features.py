"""The features of the model for voices: log-Mel filter banks as Kaldi has them. No state; any thread may call it."""

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples

HOP_SAMPLES = 160
"""From one frame to the next: 10 ms."""
FRAME_SAMPLES = 400
"""Of which a frame is computed: 25 ms."""
BANDS = 80

_FFT_SAMPLES = 512
_LOWEST_HZ = 20.0
_PREEMPHASIS = 0.97
_TELEPHONE_HZ = (300.0, 3400.0)
_HIGH_HZ = 4000.0
_WIDE_DB, _NARROW_DB = -16.0, -24.0
_FLOOR = np.float32(np.finfo(np.float32).eps)

Features = NDArray[np.float32]
"""Shape (frames, `BANDS`)."""


def log_mel_banks(samples: Samples) -> Features:
    """Compute the features that 3D-Speaker's models were trained with, without its dither and before its mean is taken.

    Those of `torchaudio.compliance.kaldi.fbank` with 80 bands and `snip_edges`: only whole frames, each without its
    mean, pre-emphasised, under a Povey window.
    """
    count = 1 + (len(samples) - FRAME_SAMPLES) // HOP_SAMPLES
    if count < 1:
        return np.empty((0, BANDS), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME_SAMPLES)[::HOP_SAMPLES]
    frames = frames - frames.mean(axis=1, keepdims=True)
    before = np.concatenate((frames[:, :1], frames[:, :-1]), axis=1)
    spectrum = np.fft.rfft((frames - np.float32(_PREEMPHASIS) * before) * _WINDOW, _FFT_SAMPLES)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    banks: Features = np.log(np.maximum(power.astype(np.float32) @ _BANKS, _FLOOR))
    return banks


def narrowness(features: Features) -> float:
    """Tell how surely a voice was heard through the band of a telephone, from 0 to 1.

    Above 4 kHz a telephone lets nothing pass, or 18 dB less than below it with what its codec adds; a microphone, and
    codecs of music at 16 kbit/s, 16 dB less at most (pre-emphasised).
    """
    power = np.exp(features)
    difference_db = 10.0 * np.log10(power[:, _HIGH].sum() / power[:, _LOW].sum())
    return float(np.clip((_WIDE_DB - difference_db) / (_WIDE_DB - _NARROW_DB), 0.0, 1.0))


def _mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1127.0 * np.log1p(hertz / 700.0)


def _mel_edges() -> NDArray[np.float64]:
    """The edges of the bands, in Mel; band n begins at the n-th and ends at the second one after it."""
    limits = _mel(np.array([_LOWEST_HZ, SAMPLE_RATE / 2]))
    return np.linspace(limits[0], limits[1], BANDS + 2)


def _mel_banks() -> NDArray[np.float32]:
    """Triangles of equal width in Mel, which Kaldi samples at the bins of the spectrum; shape (bins, bands)."""
    bins = _mel(np.arange(_FFT_SAMPLES // 2 + 1) * SAMPLE_RATE / _FFT_SAMPLES)[:, np.newaxis]
    edges = _mel_edges()
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    banks: NDArray[np.float32] = np.maximum(triangles, 0.0).astype(np.float32)
    return banks


_BANKS = _mel_banks()
_WINDOW = (np.hanning(FRAME_SAMPLES) ** 0.85).astype(np.float32)
_LOW = (_mel_edges()[:-2] >= _mel(np.array(_TELEPHONE_HZ[0]))) & (_mel_edges()[2:] <= _mel(np.array(_TELEPHONE_HZ[1])))
_HIGH = _mel_edges()[:-2] >= _mel(np.array(_HIGH_HZ))
