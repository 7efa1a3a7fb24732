"""How loud the samples are that the model gets: very quiet speech is amplified, and what is too loud scaled down.

Pure; a `Loudness` belongs to the thread that decodes.
"""

import numpy as np

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples

_FRAME = SAMPLE_RATE // 50
_QUIET = 0.003
"""-50 dB, as the level of the louder frames: what the VAD hears less and less of."""
_TARGET = 0.05
"""-26 dB, a usual level of speech."""
_INAUDIBLE = 5e-6
"""-106 dB: the dither of 16 bits, or less."""
_MIN_MODULATION = 2.5
"""Speech is at times much louder than at others (by 8 dB and more, from its pauses to its vowels); noise is not."""
_PEAK_PERCENTILE = 99.9
_RAMP = SAMPLE_RATE // 20


class Loudness:
    """Sets the level of each block by itself, so that a quiet speaker is heard before and after a loud one.

    Attributes:
        amplified: whether any block was too quiet.
    """

    def __init__(self) -> None:
        self.amplified = False
        self._gain = 1.0

    def level(self, block: Samples) -> Samples:
        """Return the block at a level that the VAD and the model can use, with values from -1 to 1."""
        if not np.isfinite(block).all():
            block = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
        gain = self._gain_for(block)
        self.amplified = self.amplified or gain > 1.0
        if gain != 1.0 or self._gain != 1.0:
            gains = np.full(len(block), gain, np.float32)
            ramp = min(_RAMP, len(block))
            gains[:ramp] = np.geomspace(self._gain, gain, ramp)
            block = block * gains
            self._gain = gain
        return np.clip(block, -1.0, 1.0)

    def _gain_for(self, block: Samples) -> float:
        # A percentile: a single click, or one wild value in a file of floats, says nothing about the speech.
        peak = float(np.percentile(np.abs(block), _PEAK_PERCENTILE)) if len(block) else 0.0
        if peak > 1.0:
            return 1.0 / peak
        frames = len(block) // _FRAME
        if peak > 10 * _QUIET or not frames:
            return 1.0
        power = np.square(block[: frames * _FRAME], dtype=np.float64).reshape(frames, _FRAME).mean(axis=1)
        floor, speech = np.sqrt(np.percentile(power, (20, 95)))
        if not _INAUDIBLE < speech < _QUIET or speech < _MIN_MODULATION * floor:
            return 1.0
        return float(min(_TARGET / speech, 1.0 / max(peak, 1e-9)))
