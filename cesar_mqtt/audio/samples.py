"""What decoded sound is: mono float32 at one rate; and where much of it is kept. Any thread may use it."""

import math
import mmap
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
"""Samples per second of everything decoded here, the rate that Whisper models expect."""

Samples: TypeAlias = NDArray[np.float32]
"""Mono at `SAMPLE_RATE`, shape (n,), values from -1 to 1."""


def own_pages(*shape: int) -> NDArray[np.float32]:
    """Return zeros that lie outside the heap, which what comes and goes with each window leaves full of holes.

    They take as much memory as is written to, and return it to the system at once.
    """
    size = max(1, math.prod(shape) * np.dtype(np.float32).itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32, math.prod(shape)).reshape(shape)
