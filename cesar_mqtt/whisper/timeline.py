"""Ranges of speech that are decoded one after another as if no silence lay between them, and where they are in a chunk.

Immutable; any thread may use it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import Range

_SILENT_S = 0.4
"""The VAD leaves so much silence at either end of a range: what reaches no further into it does not belong there."""


class Timeline:
    """Converts seconds of the joined ranges into seconds of the chunk.

    Attributes:
        length_s: of all ranges together.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = tuple(ranges)
        self._begins_s = [
            count / SAMPLE_RATE for count in accumulate((end - start for start, end in ranges), initial=0)
        ]
        self.length_s = self._begins_s[-1]

    def join(self, samples: Samples) -> Samples:
        """Return the samples of the ranges, one range after another."""
        if len(self._ranges) == 1:
            return samples[slice(*self._ranges[0])]
        return np.concatenate([samples[start:end] for start, end in self._ranges])

    def range_at(self, time_s: float) -> int:
        """Return the number of the range that a time lies in; before the first it is the first, and so on."""
        return min(max(bisect_right(self._begins_s, time_s) - 1, 0), len(self._ranges) - 1)

    def ranges_of(self, start_s: float, end_s: float) -> list[int]:
        """Return the numbers of the ranges that a segment reaches into, at least one."""
        overlaps_s = [
            min(end_s, self._begins_s[number + 1]) - max(start_s, self._begins_s[number])
            for number in range(len(self._ranges))
        ]
        reached = [number for number, overlap_s in enumerate(overlaps_s) if overlap_s > _SILENT_S]
        return reached or [max(range(len(overlaps_s)), key=overlaps_s.__getitem__)]

    def in_chunk(self, time_s: float, number: int) -> float:
        """Convert a time into seconds from the start of the chunk, limited to a range."""
        start, end = self._ranges[number]
        return min(max(start / SAMPLE_RATE + time_s - self._begins_s[number], start / SAMPLE_RATE), end / SAMPLE_RATE)


def join_near(ranges: Sequence[Range], *, gap: int, most: float = math.inf) -> list[list[Range]]:
    """Group neighbours with gaps of at most `gap` samples, while a group has at most `most` samples of speech."""
    groups: list[list[Range]] = []
    spoken = 0
    for start, end in ranges:
        spoken += end - start
        if groups and spoken <= most and start - groups[-1][-1][1] <= gap:
            groups[-1].append((start, end))
        else:
            groups.append([(start, end)])
            spoken = end - start
    return groups
