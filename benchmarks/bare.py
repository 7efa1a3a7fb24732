"""Bare faster-whisper, with the number of threads that is its fastest on this machine."""

import time
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from faster_whisper import WhisperModel

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper.catalogue import Catalogue
from cesar_mqtt.whisper.hardware import usable_cores


def load_fastest(model_name: str, tried_on: Sequence[str | Path]) -> tuple[WhisperModel, int]:
    """Load the model with as many threads as there are cores, with half as many, and with four, and keep the fastest.

    Two virtual cores may share one real core: two threads were slower there than one. With a GPU, the model runs there,
    with the same precision as ours.
    """
    folder, cores = str(Catalogue(ModelSettings(download=False)).obtain(model_name)), usable_cores()
    device, compute_type = ("cuda", "float16") if ctranslate2.get_cuda_device_count() else ("cpu", "int8")
    models = {
        threads: WhisperModel(folder, device=device, compute_type=compute_type, cpu_threads=threads)
        for threads in sorted({max(1, cores // 2), min(4, cores), cores})
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
