"""Bare faster-whisper, with the number of threads that is its fastest on this machine."""

import time
from collections.abc import Sequence
from pathlib import Path

from faster_whisper import WhisperModel

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper.hardware import usable_cores
from cesar_mqtt.whisper.model_store import ModelStore


def load_fastest(model_name: str, tried_on: Sequence[str | Path]) -> tuple[WhisperModel, int]:
    """Load the model with as many threads as there are cores, and with half as many, and keep the faster.

    Two virtual cores may share one real core: two threads were slower there than one.
    """
    folder = str(ModelStore(ModelSettings(download=False)).catalogue.obtain(model_name))
    cores = usable_cores()
    models = {
        threads: WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=threads)
        for threads in sorted({max(1, cores // 2), cores})
    }
    for model in models.values():
        transcribe(model, tried_on[0])
    took: dict[int, float] = {}
    for threads, model in models.items():
        started = time.perf_counter()
        for path in tried_on:
            transcribe(model, path)
        took[threads] = time.perf_counter() - started
    best = min(took, key=lambda threads: took[threads])
    return models[best], best


def transcribe(model: WhisperModel, path: str | Path) -> str:
    segments, _ = model.transcribe(
        str(path), beam_size=5, vad_filter=True, condition_on_previous_text=False, language_detection_segments=4
    )
    return "".join(segment.text for segment in segments)
