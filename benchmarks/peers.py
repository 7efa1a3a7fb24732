"""The whole consumer beside other programs on faster-whisper, on the same audio; `make bench-peers` installs them.

whisper-ctranslate2 is a command, which loads its model each time; wyoming-faster-whisper is a server that takes one
connection for each clip. Both transcribe with a beam of 5 and as many threads as there are cores.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.bus import _mosquitto
from benchmarks.clips import bare_loop
from benchmarks.corpus import ROOT, character_error_rate, decode, edits, english, noisy, to_pcm, write, write_wav
from benchmarks.jobs import PATIENCE_S, _consumer, _idle, _listening, take
from benchmarks.table import Row, median
from benchmarks.transcription import TEN_MINUTES_S, _make_speech, _words
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper.model_store import ModelStore
from tests.acceptance.harness import Bus

PEERS = ROOT / "build" / "peers" / "bin"
MODEL = "tiny.en"
ROUNDS = 3
SNR_DB = 10.0
_WAIT_S = 0.2

_WYOMING_CLIENT = """
import json, sys, time, wave
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
import asyncio

async def transcribe(port, path):
    async with AsyncTcpClient("127.0.0.1", port) as client:
        with wave.open(path) as file:
            form = {"rate": file.getframerate(), "width": file.getsampwidth(), "channels": file.getnchannels()}
            audio = file.readframes(file.getnframes())
        await client.write_event(Transcribe(language="en").event())
        await client.write_event(AudioStart(**form).event())
        for start in range(0, len(audio), 32000):
            await client.write_event(AudioChunk(audio=audio[start:start + 32000], **form).event())
        await client.write_event(AudioStop().event())
        while event := await client.read_event():
            if Transcript.is_type(event.type):
                return Transcript.from_event(event).text
        raise SystemExit("the server closed the connection")

started = time.perf_counter()
texts = [asyncio.run(transcribe(int(sys.argv[1]), path)) for path in sys.argv[2:]]
print(json.dumps([time.perf_counter() - started, texts]))
"""


@dataclass(frozen=True)
class _Recordings:
    """What all contenders transcribe, and how wrong their texts are, in percent."""

    what: str
    paths: list[str]
    error_rate: Callable[[list[str]], float]


_Transcribe = Callable[[Sequence[str]], tuple[float, list[str]]]
"""Returns the seconds and the texts."""


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _command(folder: Path, model: Path, paths: Sequence[str]) -> tuple[float, list[str]]:
    """Run whisper-ctranslate2 once for all files; the load of the model counts."""
    command = [str(PEERS / "whisper-ctranslate2"), "--model_directory", str(model), "--output_dir", str(folder)]
    command += ["--output_format", "txt", "--threads", str(_cores()), "--beam_size", "5", "--compute_type", "int8"]
    command += ["--language", "en", "--vad_filter", "True", "--condition_on_previous_text", "False"]
    started = time.perf_counter()
    subprocess.run([*command, *paths], check=True, capture_output=True)
    took_s = time.perf_counter() - started
    return took_s, [(folder / f"{Path(path).stem}.txt").read_text() for path in paths]


@contextmanager
def _wyoming(folder: Path, model: Path) -> Iterator[_Transcribe]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PEERS / "python"), "-m", "wyoming_faster_whisper", "--uri", f"tcp://127.0.0.1:{port}"]
    command += ["--model", str(model), "--stt-library", "faster-whisper", "--data-dir", str(folder), "--language", "en"]
    command += ["--beam-size", "5", "--cpu-threads", str(_cores()), "--compute-type", "int8", "--vad-filter"]
    with (folder / "wyoming.log").open("wb") as log:
        server = subprocess.Popen([*command, "--local-files-only"], stdout=log, stderr=log)

    def transcribe(paths: Sequence[str]) -> tuple[float, list[str]]:
        client = [str(PEERS / "python"), "-c", _WYOMING_CLIENT, str(port), *paths]
        seconds, texts = json.loads(subprocess.run(client, check=True, capture_output=True, text=True).stdout)
        return seconds, texts

    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    "wyoming-faster-whisper did not start:\n" + (folder / "wyoming.log").read_text()[-2000:]
                )
            time.sleep(_WAIT_S)
        yield transcribe
    finally:
        server.terminate()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _recordings(folder: Path) -> list[_Recordings]:
    clips = [*english(4.0), *english(6.0)]
    clips += noisy(clips, SNR_DB)
    long = folder / "ten-minutes.wav"
    reference = _make_speech(folder / "ten-minutes.flac", TEN_MINUTES_S)
    write_wav(long, to_pcm(decode(folder / "ten-minutes.flac")))
    return [
        _Recordings(
            f"{len(clips)} short clips",
            [str(write(folder, clip)) for clip in clips],
            lambda texts: 100 * character_error_rate(clips, texts),
        ),
        _Recordings(
            "ten minutes of speech",
            [str(long)],
            lambda texts: 100 * edits(_words(texts[0]), reference) / len(reference),
        ),
    ]


def _measure(bus: Bus, bare: Connection, peers: dict[str, _Transcribe], recordings: _Recordings) -> list[Row]:
    def bare_run(paths: Sequence[str]) -> tuple[float, list[str]]:
        bare.send(list(paths))
        seconds, texts = bare.recv()
        return seconds, texts

    runs = 0

    def ours(paths: Sequence[str]) -> tuple[float, list[str]]:
        nonlocal runs
        runs += 1
        prefix = f"{recordings.what.split()[0]}-{runs}"
        return take(bus, prefix, [{"audio_path": path, "language": "en"} for path in paths])

    contenders: dict[str, _Transcribe] = {"bare faster-whisper": bare_run, "cesar-mqtt": ours, **peers}
    took: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, transcribe in contenders.items():
            seconds, texts = transcribe(recordings.paths)
            took[name].append(seconds)
            errors[name] = recordings.error_rate(texts)
    theirs = took["bare faster-whisper"]
    return [
        Row(
            f"{recordings.what}, {MODEL}: {name} over bare faster-whisper",
            median([one / other for one, other in zip(took[name], theirs, strict=True)]),
            beside=f"{median(took[name]):.1f} s, {errors[name]:.2f} % wrong",
        )
        for name in contenders
    ]


def run(folder: Path) -> list[Row]:
    if not (PEERS / "whisper-ctranslate2").exists():
        raise SystemExit("The peers are not installed: run `make bench-peers`.")
    model = ModelStore(ModelSettings(download=False)).catalogue.obtain(MODEL)
    recordings = _recordings(folder)
    here, there = get_context("spawn").Pipe()
    bare = get_context("spawn").Process(target=bare_loop, args=(MODEL, recordings[0].paths, there), daemon=True)
    bare.start()
    threads = here.recv()
    print(f"bare faster-whisper runs with {threads} threads, the fastest", file=sys.stderr)
    with (
        _mosquitto(folder) as port,
        _listening(port) as bus,
        _consumer(folder / "consumer", port, "--model", MODEL),
        _wyoming(folder, model) as wyoming,
    ):
        _idle(bus)
        peers: dict[str, _Transcribe] = {
            "whisper-ctranslate2": lambda paths: _command(folder, model, paths),
            "wyoming-faster-whisper": wyoming,
        }
        rows = [row for each in recordings for row in _measure(bus, here, peers, each)]
    here.send([])
    bare.join(PATIENCE_S)
    return rows
