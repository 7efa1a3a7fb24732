"""The steps of a model, on behalf of several workers: how much memory they take at once, and how many threads."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from cesar_mqtt.whisper.encoder_input import FULL_FRAMES
from cesar_mqtt.whisper.hardware import trim_heap
from cesar_mqtt.whisper.step_threads import StepThreads

_SAMPLES_AT_ONCE = 2
"""More need more memory than encoding does; one at a time takes twice as long as all at once."""


class ModelSteps:
    """Wraps `ctranslate2.models.Whisper`, whose workers otherwise need all of their memory at the same time.

    Encoding 30 s takes 80 MB (tiny) or 115 MB (base), all of it freed at the end of the step; a beam search takes 35 MB
    or 75 MB; aligning 100 tokens with them takes 60 MB or 65 MB. Five samples at a temperature above 0 would take
    130 MB or 200 MB: they are drawn few at a time, in 60 MB or 85 MB. What the steps before have left free in the heap
    is returned before each step on 30 s; on less audio a step takes so little that it is not worth the time. Any thread
    may call it.
    """

    def __init__(self, model: Any, at_once: int, threads: StepThreads) -> None:
        """Wrap a model.

        Args:
            model: as CTranslate2 loaded it.
            at_once: how many large steps may run at the same time.
            threads: for the decoder.
        """
        self._model = model
        self._slots = threading.BoundedSemaphore(at_once)
        self._threads = threads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, features: Any, **options: Any) -> Any:
        with self._slots:
            _trim_before(features.shape[-1])
            return self._model.encode(features, **options)

    def align(self, encoded: Any, *args: Any, **options: Any) -> Any:
        with self._slots:
            _trim_before(2 * encoded.shape[1])  # the encoder halves their number
            return self._model.align(encoded, *args, **options)

    def detect_language(self, encoded: Any) -> Any:
        with self._threads.decoding():
            return self._model.detect_language(encoded)

    def generate(self, encoded: Any, *args: Any, num_hypotheses: int = 1, **options: Any) -> list[Any]:
        """Return for each prompt the result with the most probable hypothesis as its first; needs `return_scores`."""
        if num_hypotheses == 1:
            with self._decoding(encoded):
                return list(self._model.generate(encoded, *args, **options))
        drawn = []
        for number in range(0, num_hypotheses, _SAMPLES_AT_ONCE):
            count = min(_SAMPLES_AT_ONCE, num_hypotheses - number)
            with self._slots, self._decoding(encoded):
                drawn.append(self._model.generate(encoded, *args, num_hypotheses=count, **options))
        return [max(results, key=lambda result: result.scores[0]) for results in zip(*drawn, strict=True)]

    @contextmanager
    def _decoding(self, encoded: Any) -> Generator[None, None, None]:
        _trim_before(2 * encoded.shape[1])
        with self._threads.decoding():
            yield


def _trim_before(frames: int) -> None:
    """Before a step on the encoder's input or output of so many frames."""
    if frames >= FULL_FRAMES:
        trim_heap()
