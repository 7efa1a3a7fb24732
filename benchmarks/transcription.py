"""Transcription beside bare faster-whisper on the same file, with the same model and the same settings."""

import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from faster_whisper import WhisperModel

from benchmarks.corpus import edits
from benchmarks.table import Row, median
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, Samples, open_audio
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.transcript import TranscriptionOptions
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.transcriber import Transcriber

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
ROUNDS = 3
TEN_MINUTES_S = 600.0
THREE_HOURS_S = 3 * 3600.0
MODEL = "tiny.en"
_MEASURE = "import sys; from benchmarks.transcription import peak_kib; print(peak_kib(sys.argv[1]))"
RECORDINGS = ("long.ogg", "speech.wav", "long.ogg")


def _decode(path: Path) -> Samples:
    with open_audio(path, AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0)) as audio:
        return np.concatenate(list(audio.blocks()))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _make_speech(target: Path, duration_s: float) -> list[str]:
    """Write the tests' recordings in random order, with pauses of 0.3 to 6 s between them, and return the words."""
    rng = random.Random(1)  # noqa: S311 - the same file in every run
    recordings = [(_decode(DATA / name), _words((DATA / name).with_suffix(".txt").read_text())) for name in RECORDINGS]
    words: list[str] = []
    with av.open(target, "w", format="flac") as file:
        stream = file.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        written = 0
        while written < duration_s * SAMPLE_RATE:
            samples, reference = rng.choice(recordings)
            pause = np.zeros(int(rng.uniform(0.3, 6.0) * SAMPLE_RATE), np.float32)
            part = np.concatenate((samples, pause))
            if written + len(part) > duration_s * SAMPLE_RATE:
                part = np.zeros(int(duration_s * SAMPLE_RATE) - written, np.float32)
                reference = []
            frame = av.AudioFrame.from_ndarray((part * 32767).astype(np.int16)[np.newaxis, :], "s16", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, written
            file.mux(stream.encode(frame))
            written += len(part)
            words += reference
        file.mux(stream.encode(None))
    return words


def _word_error_rate(words: list[str], reference: list[str]) -> float:
    return edits(words, reference) / len(reference)


def _ours(transcriber: Transcriber, path: Path, options: TranscriptionOptions) -> str:
    recording = transcriber.open(path, options)
    try:
        return transcriber.transcribe(
            recording,
            options,
            on_progress=lambda _: None,
            on_segment=lambda _: None,
            on_window=lambda _: None,
            should_stop=lambda: False,
        ).text
    finally:
        recording.close()


def _bare(model: WhisperModel, path: Path) -> str:
    segments, _ = model.transcribe(
        str(path), beam_size=5, vad_filter=True, condition_on_previous_text=False, language_detection_segments=4
    )
    return "".join(segment.text for segment in segments)


def _timed(transcribe: Callable[[], str]) -> tuple[float, list[str]]:
    started = time.perf_counter()
    text = transcribe()
    return time.perf_counter() - started, _words(text)


def peak_kib(path: str) -> int:
    """Transcribe a file and return the peak memory of this process; run it in a process of its own."""
    store = ModelStore(ModelSettings(download=False))
    _ours(Transcriber(store, AudioSettings()), Path(path), TranscriptionOptions(MODEL, beam_size=1))
    # Not `getrusage`: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def _memory_mib(path: Path) -> float:
    command = [sys.executable, "-c", _MEASURE, str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout) / 1024


def _speeds(folder: Path) -> list[Row]:
    path = folder / "ten-minutes.flac"
    reference = _make_speech(path, TEN_MINUTES_S)
    store = ModelStore(ModelSettings(download=False))
    model, transcriber = store.load(MODEL), Transcriber(store, AudioSettings())
    contenders: dict[str, Callable[[], str]] = {
        "bare": lambda: _bare(model, path),
        "plain": lambda: _ours(transcriber, path, TranscriptionOptions(MODEL)),
        "batched": lambda: _ours(transcriber, path, TranscriptionOptions(MODEL, batch_size=8)),
    }
    took: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, transcribe in contenders.items():
            seconds, words = _timed(transcribe)
            took[name].append(seconds)
            errors[name] = 100 * _word_error_rate(words, reference)
    ratios = {name: median([a / b for a, b in zip(took[name], took["bare"], strict=True)]) for name in took}
    beside = {name: f"{median(took[name]):.1f} against {median(took['bare']):.1f} s" for name in took}
    worse = {name: f"{errors[name]:.2f} % against {errors['bare']:.2f} %" for name in errors}
    return [
        Row(
            "ten minutes of speech, time over bare faster-whisper",
            ratios["plain"],
            at_most=1.05,
            beside=beside["plain"],
        ),
        Row(
            "the same: word error rate, less that of bare faster-whisper",
            errors["plain"] - errors["bare"],
            "points",
            at_most=0.5,
            beside=worse["plain"],
        ),
        Row(
            "the same with batch_size 8: speed over bare", 1 / ratios["batched"], at_least=2.0, beside=beside["batched"]
        ),
        Row(
            "the same with batch_size 8: word error rate, less that of bare",
            errors["batched"] - errors["bare"],
            "points",
            at_most=0.5,
            beside=worse["batched"],
        ),
    ]


def _memory(folder: Path) -> Row:
    """Peak memory by the length of the file; all of it speech, with beam_size 1 because three hours take long."""
    measured = []
    for name, duration_s in (("short", TEN_MINUTES_S), ("long", THREE_HOURS_S)):
        path = folder / f"{name}.flac"
        _make_speech(path, duration_s)
        measured.append(_memory_mib(path))
    short, long = measured
    return Row(
        "peak memory of three hours of speech over ten minutes",
        long / short,
        at_most=1.3,
        beside=f"{long:.0f} against {short:.0f} MiB",
    )


def run(folder: Path) -> list[Row]:
    return [*_speeds(folder), _memory(folder)]
