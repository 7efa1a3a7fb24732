"""Jobs through the whole consumer, on a real mosquitto: what the way over the bus and the disk costs, and recovery."""

import random
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bus import _mosquitto
from benchmarks.corpus import Pcm, decode, to_pcm, write_wav
from benchmarks.table import Row, median
from cesar_mqtt.config import ModelSettings, TranscriberSettings
from cesar_mqtt.whisper.model_store import ModelStore
from tests.acceptance.harness import LONG, SPEECH, Bus, Consumer

ROUNDS = 3
CANCELS = 20
URGENT = 8
MEMORY_JOBS = 300
URLS = 24
SERVER_S = 2.0
PATIENCE_S = 900.0
_REPEATED_S = 240.0
"""However many workers there are, a crash costs no more."""
_MIB = 1 << 20
_RATE = 16_000


def _pcm(path: Path) -> Pcm:
    return to_pcm(decode(path))


def _speech(seconds: float) -> Pcm:
    """So much speech, with pauses of other lengths between the same sentences."""
    chance = random.Random(4)  # noqa: S311
    parts: list[Pcm] = []
    long, short = _pcm(LONG), _pcm(SPEECH)
    while sum(part.size for part in parts) < seconds * _RATE:
        parts += [chance.choice((long, short)), np.zeros(int(chance.uniform(0.3, 2.0) * _RATE), np.int16)]
    return np.concatenate(parts)[: int(seconds * _RATE)]


def _clips(folder: Path, count: int, seconds: tuple[float, float]) -> list[Path]:
    """Files of some seconds of speech, each another stretch."""
    chance = random.Random(5)  # noqa: S311
    spoken = _pcm(LONG)
    clips = []
    for number in range(count):
        length = int(chance.uniform(*seconds) * _RATE)
        start = chance.randrange(spoken.size - length)
        clips.append(write_wav(folder / f"clip-{number}.wav", spoken[start : start + length]))
    return clips


@contextmanager
def _consumer(folder: Path, port: int, *flags: str, environ: dict[str, str] | None = None) -> Iterator[Consumer]:
    folder.mkdir(exist_ok=True)
    # All cores, as anyone has it who sets nothing: the tests use one.
    settings = {"CESAR_RETENTION__MAX_FINISHED": "100000", "CESAR_MODELS__CPU_THREADS": "0", **(environ or {})}
    flags = ("--broker", f"mqtt://127.0.0.1:{port}", "--audio-dir", str(folder.parent), "--model", "tiny.en", *flags)
    consumer = Consumer(folder, *flags, environ=settings)
    try:
        yield consumer
    finally:
        consumer.stop()


@contextmanager
def _listening(port: int) -> Iterator[Bus]:
    bus = Bus(port)
    try:
        yield bus
    finally:
        bus.close()


def _idle(bus: Bus) -> None:
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["activity"] == "idle", PATIENCE_S)


def _finished(bus: Bus, job_id: str) -> dict[str, Any]:
    final = ("completed", "error", "cancelled")
    return bus.wait(f"cesar/status/{job_id}", lambda status: status["status"] in final, PATIENCE_S)


def take(bus: Bus, prefix: str, sources: Sequence[Mapping[str, object]]) -> tuple[float, list[str]]:
    """Publish the jobs at once; seconds until the last is completed, and the texts."""
    started = time.perf_counter()
    for number, source in enumerate(sources):
        bus.publish("cesar/jobs", {"job_id": f"{prefix}-{number}", **source})
    ends = [_finished(bus, f"{prefix}-{number}") for number in range(len(sources))]
    took_s = time.perf_counter() - started
    assert {end["status"] for end in ends} == {"completed"}, ends
    return took_s, [end["result_text"] for end in ends]


# -- cancel --------------------------------------------------------------------------------------------------------


def _cancel(folder: Path) -> Row:
    chance = random.Random(6)  # noqa: S311
    path = write_wav(folder / "ten-minutes.wav", _speech(600.0))
    took = []
    pause = threading.Event()
    with _mosquitto(folder) as port, _listening(port) as bus, _consumer(folder / "consumer", port):
        _idle(bus)
        for number in range(CANCELS):
            job_id = f"long-{number}"
            bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": str(path)})
            bus.wait(f"cesar/status/{job_id}", lambda status: status["status"] == "processing", PATIENCE_S)
            pause.wait(chance.uniform(0.0, 8.0))
            started = time.perf_counter()
            bus.publish("cesar/request/cancel", job_id if number % 2 else "current")
            end = _finished(bus, job_id)
            took.append(time.perf_counter() - started)
            assert end["status"] == "cancelled", end
    return cancel_row("cancel", took)


def cancel_row(what: str, took_s: list[float]) -> Row:
    """Return the row of cancels at random moments of a file of ten minutes."""
    return Row(
        f"{what}, from request to retained `cancelled`, 95th percentile",
        statistics.quantiles(took_s, n=20, method="inclusive")[-1],
        "s",
        at_most=1.0,
        beside=f"{len(took_s)} at random moments, median {median(took_s):.2f} s, worst {max(took_s):.2f} s",
    )


# -- priority ------------------------------------------------------------------------------------------------------


def _priority(folder: Path) -> Row:
    hour, clip = (
        write_wav(folder / "an-hour.wav", _speech(3600.0)),
        write_wav(folder / "clip.wav", _pcm(SPEECH)[: 3 * _RATE]),
    )
    took = []
    with _mosquitto(folder) as port, _listening(port) as bus, _consumer(folder / "consumer", port):
        bus.publish("cesar/jobs", {"job_id": "hour", "audio_path": str(hour)})
        for number in range(URGENT):
            at_least = 60.0 + 100.0 * number
            bus.wait("cesar/status/hour", lambda hour: (hour["processed_duration"] or 0.0) > at_least, PATIENCE_S)  # noqa: B023 - called at once
            started = time.perf_counter()
            bus.publish("cesar/jobs", {"job_id": f"clip-{number}", "audio_path": str(clip), "priority": 9})
            end = _finished(bus, f"clip-{number}")
            took.append(time.perf_counter() - started)
            assert end["status"] == "completed", end
        bus.publish("cesar/request/cancel", "hour")
        assert _finished(bus, "hour")["status"] == "cancelled"
    return Row(
        "a 3 s clip at priority 9 behind a running hour of speech: publish to `completed`, worst",
        max(took),
        "s",
        at_most=8.0,
        beside=f"of {URGENT}, median {median(took):.2f} s",
    )


# -- recovery ------------------------------------------------------------------------------------------------------


def _killed(folder: Path) -> Row:
    path = write_wav(folder / "an-hour.wav", _speech(3600.0))
    topic = "cesar/status/hour"
    with _mosquitto(folder) as port, _listening(port) as bus, _consumer(folder / "consumer", port) as consumer:
        bus.publish("cesar/jobs", {"job_id": "hour", "audio_path": str(path), "beam_size": 1})
        reached = bus.wait(topic, lambda status: (status["processed_duration"] or 0) > 1750.0, PATIENCE_S)
        consumer.kill()
        done_s = max(status["processed_duration"] or 0.0 for status in bus.seen(topic))
        consumer.start()
        again = bus.wait(
            topic, lambda status: status["attempt"] > reached["attempt"] and status["audio_duration"], PATIENCE_S
        )
        end = _finished(bus, "hour")
    assert end["status"] == "completed", end
    twice_s = done_s - again["processed_duration"]
    workers, window_s = ModelStore(ModelSettings(download=False)).workers, TranscriberSettings().window
    return Row(
        f"SIGKILL in the middle of a 1-hour file, {workers} workers: audio done twice",
        twice_s,
        "s",
        at_most=min(workers * window_s, _REPEATED_S),
        beside=f"killed at {done_s:.0f} s, went on at {again['processed_duration']:.0f} s",
    )


# -- memory --------------------------------------------------------------------------------------------------------


def _resident_bytes(pid: int, mark: str = "VmRSS") -> int:
    """The memory of a process, files included: `VmRSS`, now, or `VmHWM`, its highest mark (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{mark}:"))


def _memory(folder: Path) -> Row:
    clips = _clips(folder, 20, (1.0, 4.0))
    after = {}
    with _mosquitto(folder) as port, _listening(port) as bus, _consumer(folder / "consumer", port) as consumer:
        sources = [{"audio_path": str(clips[number % len(clips)])} for number in range(MEMORY_JOBS)]
        for number, source in enumerate(sources):
            bus.publish("cesar/jobs", {"job_id": f"job-{number}", **source})
        for number in (20, MEMORY_JOBS):
            _finished(bus, f"job-{number - 1}")
            after[number] = _resident_bytes(consumer.process.pid)
    growth = (after[MEMORY_JOBS] - after[20]) / _MIB
    return Row(
        f"{MEMORY_JOBS} jobs in one process: growth of memory after the 20th",
        growth,
        "MiB",
        at_most=20.0,
        beside=f"{after[20] / _MIB:.0f} MiB, then {after[MEMORY_JOBS] / _MIB:.0f} MiB",
    )


# -- downloads -----------------------------------------------------------------------------------------------------


@contextmanager
def _slow_server(folder: Path) -> Iterator[int]:
    """A web server that takes two seconds before it answers."""
    pause = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pause.wait(SERVER_S)
            body = (folder / Path(self.path).name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _downloads(folder: Path) -> Row:
    clips = _clips(folder, URLS, (8.0, 12.0))
    rates: dict[str, list[float]] = {"path": [], "url": []}
    with _mosquitto(folder) as port, _listening(port) as bus, _slow_server(folder) as web:
        allowed = {"CESAR_AUDIO__ALLOWED_HOSTS": f'["127.0.0.1:{web}"]'}
        with _consumer(folder / "consumer", port, environ=allowed):
            _idle(bus)
            paths = [{"audio_path": str(clip)} for clip in clips]
            urls = [{"audio_url": f"http://127.0.0.1:{web}/{clip.name}"} for clip in clips]
            take(bus, "warm", paths[:5])
            for number in range(ROUNDS):
                for name, sources in (("path", paths), ("url", urls)):
                    # Local files in front cover the time of the server's first answers.
                    ahead = [paths[0]] * 12
                    rates[name].append(len(sources) / take(bus, f"{name}-{number}", ahead + sources)[0])
    ratios = [url / path for url, path in zip(rates["url"], rates["path"], strict=True)]
    return Row(
        f"queue of URL jobs whose server takes {SERVER_S:g} s each, over local files",
        median(ratios),
        at_least=0.95,
        beside=f"{median(rates['url']):.2f} against {median(rates['path']):.2f} jobs/s",
    )


def run(folder: Path) -> list[Row]:
    rows = []
    for measure in (_cancel, _priority, _killed, _memory, _downloads):
        part = folder / measure.__name__
        part.mkdir()
        rows.append(measure(part))
    return rows
