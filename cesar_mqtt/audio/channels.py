"""From any number of channels to one, so that none is lost: neither by cancelling another nor by being one of many.

Pure; a `ChannelMixer` belongs to the thread that decodes.
"""

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples

_FADE = 0.5
"""How much of what was measured before counts in the next block."""
_OPPOSITE = -0.5
"""Channels whose correlation is below this cancel each other."""
_RELEVANT = 0.01
"""A channel of less than this share of the loudest one's power (-20 dB) cancels nothing."""
_SILENT_POWER = 1e-9
_WILD, _WILD_SUM = 1e6, 1e9
"""No sound has such values; floats that were written with the scale of 16 bits have up to 32,768."""
_RAMP = SAMPLE_RATE // 50
"""Samples over which the weights change, so that a change is not heard as a click."""
_MIN_OPPOSITE_S = 0.5


class ChannelMixer:
    """Mixes the channels of one track, block by block.

    What a channel means (left, centre, bass) is not asked: files with many channels rarely say, and often say it
    wrongly. All count alike; of a channel that cancels a louder one only the rest counts, what the louder one does not
    have; and the sum is as loud as the loudest channel, not its nth part.

    Attributes:
        channels: how many each block has.
    """

    def __init__(self, channels: int = 1) -> None:
        self.channels = channels
        self._covariance: NDArray[np.float64] | None = None
        self._gain = 1.0
        self._used: NDArray[np.float32] | None = None
        self._opposite_s = 0.0

    @property
    def out_of_phase(self) -> bool:
        """Whether channels would have cancelled each other."""
        return self._opposite_s >= _MIN_OPPOSITE_S

    def mix(self, block: NDArray[np.float32]) -> Samples:
        """Mix samples of shape (n, channels) down to shape (n,)."""
        if self.channels == 1 or not len(block):
            return block[:, 0]
        if not abs(float(block.sum(dtype=np.float64))) < _WILD_SUM:
            # What float samples may hold, and no sound: it would spoil all that is computed from it.
            block = np.where(np.abs(block) < _WILD, block, np.float32(0.0))
        covariance = self._measure(block)
        weights = self._weights(covariance, len(block) / SAMPLE_RATE)
        mixed: Samples = block @ weights
        before, self._used = self._used, weights
        if before is not None and not np.array_equal(before, weights):
            ramp = np.linspace(1.0, 0.0, min(_RAMP, len(block)), dtype=np.float32)
            mixed[: len(ramp)] += ramp * (block[: len(ramp)] @ (before - weights))
        return mixed

    def _measure(self, block: NDArray[np.float32]) -> NDArray[np.float64]:
        mean = block.mean(axis=0, dtype=np.float64)
        covariance = (block.T @ block).astype(np.float64) / len(block) - np.outer(mean, mean)
        before = covariance if self._covariance is None else self._covariance
        self._covariance = _FADE * before + (1 - _FADE) * covariance
        return self._covariance

    def _weights(self, covariance: NDArray[np.float64], duration_s: float) -> NDArray[np.float32]:
        """The factor of each channel.

        To invert a channel that cancels another one would cancel what both have in phase, such as a voice in the middle
        below a louder hum in antiphase; to leave it out would lose what it alone has. So the louder one is used, with
        the other one's share of it made up for: of an exact inverse nothing remains then.
        """
        power = np.diag(covariance).clip(0.0)
        weights = np.ones(len(power))
        loudest = power.max()
        if loudest >= _SILENT_POWER:
            is_opposite = False
            order = [index for index in np.argsort(-power, kind="stable") if power[index] >= _RELEVANT * loudest]
            for place, index in enumerate(order[1:], start=1):
                louder = order[:place]
                correlation = covariance[index, louder] / np.sqrt(power[index] * power[louder])
                most = int(np.argmax(np.abs(correlation)))
                if correlation[most] < _OPPOSITE:
                    weights[louder[most]] -= covariance[index, louder[most]] / power[louder[most]]
                    is_opposite = True
            self._opposite_s += duration_s if is_opposite else 0.0
            mean_power = float(weights @ covariance @ weights) / len(power) ** 2
            gain = float(np.sqrt(loudest / max(mean_power, _SILENT_POWER / len(power) ** 2)))
            self._gain = min(max(gain, 1.0), float(len(power)))
        return (weights * (self._gain / len(power))).astype(np.float32)
