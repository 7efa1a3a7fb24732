"""What decoded sound is: mono float32 at one rate. Values; any thread may use them."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
"""Samples per second of everything decoded here, the rate that Whisper models expect."""

Samples: TypeAlias = NDArray[np.float32]
"""Mono at `SAMPLE_RATE`, shape (n,), values from -1 to 1."""
