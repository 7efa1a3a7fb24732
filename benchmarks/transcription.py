"""Transcription beside bare faster-whisper on the same file, with the same model and the same settings."""

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean

import av
import numpy as np

from benchmarks.bare import load_fastest, transcribe
from benchmarks.corpus import DATA, decode, edits, noisy, people, telephone, to_pcm
from benchmarks.table import Row, median
from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.transcript import TranscriptionOptions
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.transcriber import Transcriber

ROUNDS = 3
TEN_MINUTES_S = 600.0
THREE_HOURS_S = 3 * 3600.0
MODEL = "tiny.en"
RECORDINGS = ("long.ogg", "speech.wav", "long.ogg")
_NOISES = 3
"""Each recording of people is there with so many different noises."""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _make_speech(target: Path, duration_s: float, seed: int = 1) -> list[str]:
    """Write the tests' recordings in random order, and return the words."""
    return _write_speech(
        target,
        duration_s,
        seed,
        [(decode(DATA / name), _words((DATA / name).with_suffix(".txt").read_text())) for name in RECORDINGS],
    )


def _make_hard_speech(target: Path, duration_s: float, seed: int) -> list[str]:
    """Write recordings of people, most of them with noise or over a telephone, and return the words."""
    clips = people() * _NOISES
    clips += [*noisy(clips, 15.0), *noisy(clips, 10.0), *telephone(people()), *noisy(telephone(clips), 15.0)]
    return _write_speech(target, duration_s, seed, [(clip.samples, _words(clip.text)) for clip in clips])


def _write_speech(
    target: Path, duration_s: float, seed: int, recordings: Sequence[tuple[Samples, list[str]]]
) -> list[str]:
    """Write recordings in random order, with pauses of 0.3 to 6 s between them, and return the words."""
    rng = random.Random(seed)  # noqa: S311 - the same file in every run
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
            frame = av.AudioFrame.from_ndarray(to_pcm(np.clip(part, -1, 1))[np.newaxis, :], "s16", "mono")
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


def _timed(transcribe: Callable[[], str]) -> tuple[float, list[str]]:
    started = time.perf_counter()
    text = transcribe()
    return time.perf_counter() - started, _words(text)


def _contenders(path: Path) -> dict[str, Callable[[], str]]:
    """Bare faster-whisper and our own path on this process's cores, each with a model of its own."""
    store = ModelStore(ModelSettings(download=False))
    bare, _ = load_fastest(MODEL, [DATA / "long.ogg"])
    store.load(MODEL)
    transcriber = Transcriber(store, AudioSettings())
    return {
        "bare": lambda: transcribe(bare, path),
        "beam 5": lambda: _ours(transcriber, path, TranscriptionOptions(MODEL, beam_size=5)),
        "defaults": lambda: _ours(transcriber, path, TranscriptionOptions(MODEL)),
        "batched": lambda: _ours(transcriber, path, TranscriptionOptions(MODEL, batch_size=8)),
    }


@dataclass(frozen=True)
class _Recording:
    """Ten minutes of speech, made in another order in each round."""

    what: str
    make: Callable[[Path, float, int], list[str]]
    rounds: int


_RECORDINGS = (
    _Recording("ten minutes of speech", _make_speech, 3),
    _Recording("ten minutes of people, noise, telephone", _make_hard_speech, 2),
)


def _compare(path: Path, recording: _Recording, contenders: dict[str, Callable[[], str]]) -> list[Row]:
    took: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(recording.rounds):
        reference = recording.make(path, TEN_MINUTES_S, number + 1)
        for name, contender in contenders.items():
            seconds, words = _timed(contender)
            took[name].append(seconds)
            errors[name].append(100 * _word_error_rate(words, reference))

    def time_over(name: str, other: str, what: str, at_most: float) -> Row:
        ratio = median([a / b for a, b in zip(took[name], took[other], strict=True)])
        beside = f"{median(took[name]):.1f} against {median(took[other]):.1f} s"
        return Row(f"{recording.what}, {what}", ratio, at_most=at_most, beside=beside)

    def errors_over_bare(name: str) -> Row:
        what = f"{recording.what}, {name}: word error rate, less that of bare"
        ours, theirs = mean(errors[name]), mean(errors["bare"])
        return Row(what, ours - theirs, "points", at_most=0.3, beside=f"{ours:.2f} % against {theirs:.2f} %")

    return [
        time_over("beam 5", "bare", "beam 5: time over bare with beam 5", 0.80),
        errors_over_bare("beam 5"),
        time_over("defaults", "bare", "defaults: time over bare with its own, beam 5", 0.65),
        errors_over_bare("defaults"),
        time_over("batched", "defaults", "batch_size 8: time over our plain path", 1.05),
        errors_over_bare("batched"),
    ]


def _time_on_one_core(path: str, pipe: Connection) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    contenders = _contenders(Path(path))
    pipe.send([[_timed(contenders[name])[0] for name in ("beam 5", "bare")] for _ in range(ROUNDS)])


def _on_one_core(path: Path) -> Row:
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_time_on_one_core, args=(str(path), there))
    process.start()
    took = here.recv()
    process.join()
    ours, bare = zip(*took, strict=True)
    return Row(
        "the same pinned to one core, beam 5: time over bare with beam 5",
        median([a / b for a, b in took]),
        at_most=1.05,
        beside=f"{median(ours):.1f} against {median(bare):.1f} s",
    )


def run(folder: Path) -> list[Row]:
    rows: list[Row] = []
    path = folder / "ten-minutes.flac"
    contenders = _contenders(path)
    for recording in reversed(_RECORDINGS):  # the last file of the first is transcribed once more
        rows = _compare(path, recording, contenders) + rows
    return [*rows, _on_one_core(path)]
