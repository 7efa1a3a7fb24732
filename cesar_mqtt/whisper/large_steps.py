"""A limit on how much memory the steps of a model take at once, on behalf of several workers."""

import threading
from typing import Any

from cesar_mqtt.whisper.hardware import trim_heap

_SAMPLES_AT_ONCE = 2
"""More need more memory than encoding does; one at a time takes twice as long as all at once."""


class LargeSteps:
    """Wraps `ctranslate2.models.Whisper`, whose workers otherwise need all of their memory at the same time.

    Encoding 30 s takes 72 MB (tiny) or 95 MB (base), all of it freed at the end of the step; a beam search takes 30 MB
    or 50 MB. Five samples at a temperature above 0 would take 130 MB or 200 MB: they are drawn few at a time, in 60 MB
    or 85 MB. Any thread may call it.
    """

    def __init__(self, model: Any, at_once: int) -> None:
        """`at_once`: how many large steps may run at the same time."""
        self._model = model
        self._slots = threading.BoundedSemaphore(at_once)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, *args: Any, **options: Any) -> Any:
        with self._slots:
            trim_heap()
            return self._model.encode(*args, **options)

    def generate(self, *args: Any, num_hypotheses: int = 1, **options: Any) -> list[Any]:
        """Return for each prompt the result with the most probable hypothesis as its first; needs `return_scores`."""
        if num_hypotheses == 1:
            return list(self._model.generate(*args, **options))
        drawn = []
        for number in range(0, num_hypotheses, _SAMPLES_AT_ONCE):
            count = min(_SAMPLES_AT_ONCE, num_hypotheses - number)
            with self._slots:
                drawn.append(self._model.generate(*args, num_hypotheses=count, **options))
        return [max(results, key=lambda result: result.scores[0]) for results in zip(*drawn, strict=True)]
