"""Short clips through the whole consumer, on a real mosquitto, beside a bare loop of `WhisperModel.transcribe`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.bus import _mosquitto
from benchmarks.corpus import Clip, character_error_rate, english, nine_languages, noisy, write
from benchmarks.jobs import PATIENCE_S, _consumer, _idle, _listening, take
from benchmarks.table import Row, median

SNR_DB = 10.0
_TRIED = 6


@dataclass(frozen=True)
class _Contest:
    model: str
    clips: Callable[[], list[Clip]]
    rounds: int
    at_most: float


def _multilingual() -> list[Clip]:
    languages = nine_languages()
    return [*languages, *noisy(languages, SNR_DB), *english(6.0)]


def _english_only() -> list[Clip]:
    clips = [*english(4.0), *english(6.0)]
    return [*clips, *noisy(clips, SNR_DB)]


CONTESTS = (_Contest("base", _multilingual, 3, 0.30), _Contest("tiny.en", _english_only, 3, 0.45))


def bare_loop(model_name: str, paths: Sequence[str], pipe: Connection) -> None:
    """Transcribe each list of files that comes, and send the seconds and the texts; runs in a process of its own.

    The number of threads, sent first, is the fastest with the first of `paths`: bare faster-whisper at its best.
    """
    from benchmarks.bare import load_fastest, transcribe  # noqa: PLC0415 - loads the libraries, in this process only

    model, best = load_fastest(model_name, paths[:_TRIED])
    pipe.send(best)
    while files := pipe.recv():
        started = time.perf_counter()
        texts = [transcribe(model, file) for file in files]
        pipe.send((time.perf_counter() - started, texts))


def _contest(folder: Path, contest: _Contest) -> list[Row]:
    clips = contest.clips()
    paths = [str(write(folder, clip)) for clip in clips]
    here, there = get_context("spawn").Pipe()
    bare = get_context("spawn").Process(target=bare_loop, args=(contest.model, paths, there), daemon=True)
    bare.start()
    threads = here.recv()
    took: dict[str, list[float]] = {"bare": [], "same": [], "defaults": []}
    errors: dict[str, list[float]] = {"bare": [], "same": [], "defaults": []}
    sources: dict[str, list[dict[str, object]]] = {
        "same": [{"audio_path": path, "beam_size": 5} for path in paths],
        "defaults": [{"audio_path": path} for path in paths],
    }
    flags = ("--model", contest.model)
    with _mosquitto(folder) as port, _listening(port) as bus, _consumer(folder / "consumer", port, *flags):
        _idle(bus)
        take(bus, "warm", sources["same"][:3])
        for number in range(contest.rounds):
            here.send(paths)
            seconds, texts = here.recv()
            took["bare"].append(seconds)
            errors["bare"].append(100 * character_error_rate(clips, texts))
            for name, jobs in sources.items():
                seconds, texts = take(bus, f"{name}-{number}", jobs)
                took[name].append(seconds)
                errors[name].append(100 * character_error_rate(clips, texts))
    here.send([])
    bare.join(PATIENCE_S)
    # What is sampled at a temperature differs from round to round: one such text of a noisy clip is worth a point.
    wrong = {name: median(rounds) for name, rounds in errors.items()}
    what = f"{len(clips)} clips, {contest.model}"
    rows = []
    for name, options in (("same", "beam 5"), ("defaults", "our defaults")):
        ratios = [ours / theirs for ours, theirs in zip(took[name], took["bare"], strict=True)]
        rows += [
            Row(
                f"{what}, {options}: time over a bare loop, beam 5",
                median(ratios),
                at_most=contest.at_most,
                beside=f"{median(took[name]):.1f} s against {median(took['bare']):.1f} s with {threads} threads",
            ),
            Row(
                f"{what}, {options}: character errors, less those of bare",
                wrong[name] - wrong["bare"],
                "points",
                at_most=0.5,
                beside=f"{wrong[name]:.2f} % against {wrong['bare']:.2f} %",
            ),
        ]
    return rows


def run(folder: Path) -> list[Row]:
    rows = []
    for contest in CONTESTS:
        part = folder / contest.model
        part.mkdir()
        rows += _contest(part, contest)
    return rows
