"""A limit on how many of a model's steps that need much memory run at once, on behalf of several workers."""

import threading
from typing import Any


class LargeSteps:
    """Wraps `ctranslate2.models.Whisper`, whose workers otherwise need all of their memory at the same time.

    Encoding 30 s takes 60 MB (tiny) or 115 MB (base), and five samples at a temperature above 0 take 75 MB or 190 MB,
    all of it freed at the end of the step; a beam search takes less than 40 MB. Any thread may call it.
    """

    def __init__(self, model: Any, at_once: int) -> None:
        """`at_once`: how many large steps may run at the same time."""
        self._model = model
        self._slots = threading.BoundedSemaphore(at_once)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, *args: Any, **options: Any) -> Any:
        with self._slots:
            return self._model.encode(*args, **options)

    def generate(self, *args: Any, num_hypotheses: int = 1, **options: Any) -> Any:
        if num_hypotheses == 1:
            return self._model.generate(*args, **options)
        with self._slots:
            return self._model.generate(*args, num_hypotheses=num_hypotheses, **options)
