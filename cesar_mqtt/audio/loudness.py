"""How loud the samples are that the model gets: very quiet speech is amplified, and what is too loud scaled down.

Pure; a `Loudness` belongs to the thread that decodes.
"""

from itertools import groupby

import numpy as np

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples

_FRAME = SAMPLE_RATE // 50
_PIECE = 2 * SAMPLE_RATE
_MIN_PIECES = 2
"""Fewer of them are a pause between louder words."""
_QUIET = 0.0015
"""-56 dB, as the level of the louder frames: from there on the VAD misses more and more."""
_TARGET = 0.05
"""-26 dB, a usual level of speech."""
_INAUDIBLE = 5e-6
"""-106 dB: less than the dither of 16 bits."""
_MIN_MODULATION = 2.5
"""Speech is at times much louder than at others (by 8 dB and more, from its pauses to its vowels); noise is not."""
_PEAK_PERCENTILE = 99.9
_RAMP = SAMPLE_RATE // 20
_NOTABLE = 0.25


class Loudness:
    """Sets the level of each block, or of its pieces, so that a quiet speaker is heard before and after a loud one.

    A block's gain depends on that block alone, and so is the same whenever it is decoded again.
    """

    def __init__(self) -> None:
        self._gain: float | None = None
        self._sounding_s = 0.0
        self._amplified_s = 0.0

    @property
    def amplified(self) -> bool:
        """Whether a good part of the sound was too quiet."""
        return self._amplified_s > _NOTABLE * self._sounding_s

    def level(self, block: Samples) -> Samples:
        """Return the block at a level that the VAD and the model can use, with values from -1 to 1."""
        peaks = _peaks(block)
        if not np.isfinite(peaks).all():
            block = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
            peaks = _peaks(block)
        pieces = [block[start : start + _PIECE] for start in range(0, len(block), _PIECE)]
        gains = self._gains(block, pieces, peaks)
        for gain, piece, peak in zip(gains, pieces, peaks, strict=True):
            duration_s = len(piece) / SAMPLE_RATE
            self._sounding_s += duration_s if peak > _INAUDIBLE else 0.0
            self._amplified_s += duration_s if gain > 1.0 else 0.0
        if self._gain in {None, 1.0} and all(gain == 1.0 for gain in gains):
            self._gain = 1.0
            return block if max(peaks) <= 1.0 else block.clip(-1.0, 1.0)
        amplified: Samples = np.concatenate(
            [self._amplify(gain, piece) for gain, piece in zip(gains, pieces, strict=True)]
        )
        return amplified.clip(-1.0, 1.0)

    def _gains(self, block: Samples, pieces: list[Samples], peaks: list[float]) -> list[float]:
        powers = _frame_powers(block)
        whole = _gain_for(block, max(peaks), powers)
        if whole != 1.0:
            return [whole] * len(pieces)
        of_piece = _PIECE // _FRAME
        own = [
            _gain_for(piece, peaks[number], powers[number * of_piece : (number + 1) * of_piece])
            for number, piece in enumerate(pieces)
        ]
        gains: list[float] = []
        for quiet, run in groupby(own, key=lambda gain: gain > 1.0):
            found = list(run)
            gains += found if quiet and len(found) >= _MIN_PIECES else [1.0] * len(found)
        return gains

    def _amplify(self, gain: float, piece: Samples) -> Samples:
        """Multiply; the gain changes smoothly, so that a change is not heard as a click."""
        gains = np.full(len(piece), gain, np.float32)
        ramp = min(_RAMP, len(piece))
        gains[:ramp] = np.geomspace(gain if self._gain is None else self._gain, gain, ramp)
        self._gain = gain
        return piece * gains


def _peaks(block: Samples) -> list[float]:
    """The highest value of each piece."""
    return [float(np.abs(block[start : start + _PIECE]).max()) for start in range(0, len(block), _PIECE)]


def _frame_powers(block: Samples) -> Samples:
    framed = block[: len(block) // _FRAME * _FRAME].reshape(-1, _FRAME)
    powers: Samples = np.einsum("ij,ij->i", framed, framed) / _FRAME
    return powers


def _gain_for(samples: Samples, highest: float, powers: Samples) -> float:
    if highest > 1.0 and (peak := _peak(samples)) > 1.0:
        return 1.0 / peak
    if not powers.size:
        return 1.0
    floor, speech = np.sqrt(np.percentile(powers, (20, 95)))
    if not _INAUDIBLE < speech < _QUIET or speech < _MIN_MODULATION * floor:
        return 1.0
    return float(min(_TARGET / speech, 1.0 / max(_peak(samples), 1e-9)))


def _peak(samples: Samples) -> float:
    """Without the highest: a single click, or one wild value in a file of floats, says nothing about the speech."""
    return float(np.percentile(np.abs(samples), _PEAK_PERCENTILE))
