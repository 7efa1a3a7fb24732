"""How many of its threads a worker of CTranslate2 uses for a step of the model.

A worker gets its number of threads for good. The encoder gains from each. The decoder computes little at a time: it
starts its threads some hundred times for each token, and where that is slow, as on most virtual machines, it takes
twice as long with two threads as with one (docs/performance.md).
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock

from cesar_mqtt.whisper.hardware import bundled_library

_ROUNDS = 3
_ENOUGH_S = 0.1
"""A slow model is not measured again: chance is then small beside the difference."""
_ONE_THREAD = 0
"""Of `omp_set_max_active_levels`: no region of a program is run by several threads."""


class StepThreads:
    """Lets the decoder use one thread only, if that is faster. Any thread may call it.

    While it does, so does everything that uses CTranslate2's OpenMP in this process: an encoder that runs beside it, on
    cores that are busy anyway.

    Attributes:
        decodes_in_one: as measured; False: not measured, or cannot be chosen.
    """

    def __init__(self) -> None:
        self.decodes_in_one = False
        self._openmp = bundled_library("libgomp")
        self._levels = 0 if self._openmp is None else self._openmp.omp_get_max_active_levels()
        self._lock = Lock()
        self._decoding = 0

    def measure(self, decode: Callable[[], object]) -> None:
        """Choose, by some runs of a short `decode` in each way; nothing else may use a model meanwhile."""
        if self._openmp is None:
            return
        started = time.perf_counter()
        took_s: dict[bool, float] = {}
        for _ in range(_ROUNDS):
            for in_one in (False, True):
                self.decodes_in_one = in_one
                begin = time.perf_counter()
                with self.decoding():
                    decode()
                took_s[in_one] = min(took_s.get(in_one, float("inf")), time.perf_counter() - begin)
            if time.perf_counter() - started > _ENOUGH_S:
                break
        self.decodes_in_one = took_s[True] < took_s[False]

    @contextmanager
    def decoding(self) -> Generator[None, None, None]:
        """Around each step of the decoder."""
        if self._openmp is None or not self.decodes_in_one:
            yield
            return
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._decoding += change
            if self._openmp is not None:
                self._openmp.omp_set_max_active_levels(_ONE_THREAD if self._decoding else self._levels)
