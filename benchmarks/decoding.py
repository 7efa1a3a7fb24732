"""What a process of its own costs a short clip, beside the same decoder in this process."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.table import Row, median
from cesar_mqtt.audio import decoder, decoder_process
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits
from tests.pictures import encode

CLIP_S = 3.0
ROUNDS = 50
MOST_MS = 10.0
_LIMITS = AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0)


def run(folder: Path) -> list[Row]:
    tone = (np.sin(np.arange(CLIP_S * SAMPLE_RATE) / 5) * 9000).astype(np.int16)
    clip = encode((folder / "clip.mp3").resolve(), "libmp3lame", tone)
    inside_ms, beside_ms = [], []
    _milliseconds(decoder_process.open_audio, clip)  # starts the template
    for _ in range(ROUNDS):
        inside_ms.append(_milliseconds(decoder.open_audio, clip))
        beside_ms.append(_milliseconds(decoder_process.open_audio, clip))
    decoder_process.stop()
    inside, beside = median(inside_ms), median(beside_ms)
    figures = f"{beside:.1f} ms in a process of its own, {inside:.1f} ms without; medians of {ROUNDS}"
    return [Row(f"decoding a {CLIP_S:g} s clip, more than in process", beside - inside, "ms", None, MOST_MS, figures)]


def _milliseconds(open_audio: Callable[..., object], clip: Path) -> float:
    started = time.perf_counter()
    with open_audio(clip, _LIMITS) as audio:  # type: ignore[attr-defined]
        for _ in audio.blocks():
            pass
    return 1000 * (time.perf_counter() - started)
