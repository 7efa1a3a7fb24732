"""Put recordings into a watch folder, some half-written, renamed or moved, and kill the consumer meanwhile.

Afterwards each recording has one transcript and one completed job. A short run is part of `make test`; a long one is
`python -m tests.acceptance.inbox_trial` (`--help` for more).
"""

import argparse
import random
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.acceptance.harness import CONNECTED, SPEECH, Bus, Consumer
from tests.conftest import Mosquitto

SPEECH_EVERY = 10
"""One recording in so many is real speech, which takes half a second; the others are short noise."""
SETTLE_S = 1.0
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Report:
    """What there was in the end."""

    recordings: int
    disturbed: int
    kills: int
    transcripts: int
    missing: tuple[str, ...]
    doubled: tuple[str, ...]
    """Recordings with several transcripts, or several completed jobs."""


def run(folder: Path, broker: Mosquitto, *, recordings: int, disturbed: int, kills: int, seed: int) -> Report:
    """Do it; `folder` is empty."""
    chance = random.Random(seed)  # noqa: S311 - a repeatable trial
    watched, outside = folder / "watched", folder / "outside"
    for each in (watched / "sub", outside):
        each.mkdir(parents=True)
    consumer = Consumer(
        folder,
        *("--broker", broker.url, "--inbox", str(watched)),
        environ={"CESAR_INBOX__SETTLE": str(SETTLE_S), "CESAR_INBOX__RESCAN": "2"},
    )
    bus = Bus(broker.port)
    try:
        names = [f"r{number:03}" for number in range(recordings)]
        odd = set(chance.sample(names, disturbed))
        workers: list[threading.Thread] = []
        kill_at = sorted(chance.sample(range(1, recordings), kills))
        for number, name in enumerate(names):
            content = _recording(number)
            if name in odd:
                how = _WAYS[len(workers) % len(_WAYS)]
                workers.append(threading.Thread(target=how, args=(watched, outside, name, content, chance.random())))
                workers[-1].start()
            else:
                (watched / f"{name}.wav").write_bytes(content)
            if number in kill_at:
                _pause(chance.uniform(0.0, 2.0))
                consumer.kill()
                consumer.start(CONNECTED)
        for worker in workers:
            worker.join()
        _wait(lambda: len(_transcripts(watched)) >= recordings)
        _pause(3 * SETTLE_S)  # what comes too late would be a second one
        assert consumer.stop() == 0
    finally:
        if consumer.process.poll() is None:
            consumer.kill()
        bus.leave()
    written = Counter(path.name[:4] for path in _transcripts(watched))
    completed = Counter(
        Path(status["metadata"]["file"]).name[:4]
        for status in {status["job_id"]: status for status in bus.every_status()}.values()
        if status["status"] == "completed"
    )
    return Report(
        recordings,
        disturbed,
        kills,
        transcripts=sum(written.values()),
        missing=tuple(name for name in names if not written[name]),
        doubled=tuple(name for name in names if written[name] > 1 or completed[name] > 1),
    )


# -- what is done to a recording ---------------------------------------------------------------------------------------


def _write_in_two_halves(watched: Path, _outside: Path, name: str, content: bytes, delay: float) -> None:
    """As `cp` from a slow disk: the file stays open, longer than an unchanged one is waited for."""
    with (watched / f"{name}.wav").open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        _pause((1.0 + delay) * 1.5 * SETTLE_S)
        file.write(content[len(content) // 2 :])


def _append_in_steps(watched: Path, _outside: Path, name: str, content: bytes, _delay: float) -> None:
    """As a download that is continued: the file is closed in between."""
    size = len(content) // 4 + 1
    for start in range(0, len(content), size):
        with (watched / f"{name}.wav").open("ab") as file:
            file.write(content[start : start + size])
        _pause(0.3 * SETTLE_S)


def _rename_when_complete(watched: Path, _outside: Path, name: str, content: bytes, delay: float) -> None:
    """As Syncthing and browsers do."""
    temporary = watched / f".syncthing.{name}.wav.tmp"
    temporary.write_bytes(content)
    _pause(2 * delay * SETTLE_S)
    temporary.rename(watched / f"{name}.wav")


def _rename_later(watched: Path, _outside: Path, name: str, content: bytes, delay: float) -> None:
    """A person renames it: before, while or after it is transcribed."""
    path = watched / f"{name}.wav"
    path.write_bytes(content)
    _pause(4 * delay * SETTLE_S)
    path.rename(watched / f"{name} renamed.wav")


def _move_to_a_sub_folder(watched: Path, _outside: Path, name: str, content: bytes, delay: float) -> None:
    path = watched / f"{name}.wav"
    path.write_bytes(content)
    _pause(4 * delay * SETTLE_S)
    path.rename(watched / "sub" / f"{name}.wav")


def _move_out_and_in_again(watched: Path, outside: Path, name: str, content: bytes, delay: float) -> None:
    path = watched / f"{name}.wav"
    path.write_bytes(content)
    _pause(3 * delay * SETTLE_S)
    path.rename(outside / f"{name}.wav")
    _pause(delay * SETTLE_S)
    (outside / f"{name}.wav").rename(watched / "sub" / f"{name}.wav")


_WAYS: tuple[Callable[[Path, Path, str, bytes, float], None], ...] = (
    _write_in_two_halves,
    _append_in_steps,
    _rename_when_complete,
    _rename_later,
    _move_to_a_sub_folder,
    _move_out_and_in_again,
)


def _recording(number: int) -> bytes:
    """A recording that differs from all others."""
    if number % SPEECH_EVERY == 0:
        with wave.open(str(SPEECH)) as file:
            spoken = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        samples = (spoken * (1.0 - number / 2000.0)).astype(np.int16)
    else:
        samples = np.random.default_rng(number).integers(-20, 20, 8000, dtype=np.int16)
    with tempfile.TemporaryFile() as made:
        with wave.open(made, "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
        made.seek(0)
        return made.read()


def _transcripts(watched: Path) -> list[Path]:
    return [path for path in watched.rglob("*.txt") if not path.name.startswith(".")]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        _pause(0.2)


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--disturbed", type=int, default=30)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-inbox-") as name:
        folder = Path(name)
        broker = Mosquitto(folder, ["persistence true", f"persistence_location {folder}/"])
        broker.start()
        try:
            report = run(
                folder / "trial",
                broker,
                recordings=arguments.recordings,
                disturbed=arguments.disturbed,
                kills=arguments.kills,
                seed=arguments.seed,
            )
        finally:
            broker.stop()
    print(f"seed {arguments.seed}: {report.recordings} recordings, {report.disturbed} disturbed, {report.kills} kills,")
    print(f"{report.transcripts} transcripts; missing: {list(report.missing)}; doubled: {list(report.doubled)}")
    return 1 if report.missing or report.doubled or report.transcripts != report.recordings else 0


if __name__ == "__main__":
    sys.exit(main())
