"""Makes a data directory with every table filled, as it is after a power cut in mid-job, and what the broker retains.

    python -m tests.golden.version_1 FOLDER --python PYTHON

PYTHON is an interpreter with the cesar-mqtt whose files are wanted. `version_1/` was made so, with the code of commit
def30a9 (the first that called its format 1), mosquitto 2.0.11 and tiny.en; it is never made again. The tests make
another one with the present code, and compare the documents.

It takes three starts of the consumer: one as a member of a group, which ends in order, so that `ledger.json` and
`subscriptions` are written; one that is killed in mid-job; and one that is killed when it has worked on the same job
again, while nothing that it sends reaches the broker any more.
"""

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import av

from tests.acceptance.harness import DATA, LONG, PATIENCE_S, SPEECH, Bus
from tests.conftest import Mosquitto
from tests.golden.stored import SETTINGS

_KEPT = ("ledger.json", "ledger.json.journal", "homeassistant.json", "subscriptions")


def make(folder: Path, python: str, mosquitto: Mosquitto) -> None:
    """Make `data` and `retained.json` in `folder`; the broker is to be a new one."""
    work = folder / "work"
    work.mkdir()
    long, short = work / "long.ogg", work / "short.ogg"
    # Long enough to be killed in the middle twice. What is stored was made with 72 s, before windows ran in parallel.
    _encode([LONG] * 8, long, seconds=420)
    _encode([SPEECH], short, seconds=10)
    gate = Gate(mosquitto.port)
    maker = _Maker(python, work, gate, mosquitto)
    try:
        _end_in_order(maker)
        _die_in_mid_job(maker, long.read_bytes())
        _die_cut_off(maker, gate, short.read_bytes())
    finally:
        maker.close()
        gate.close()
    data = folder / "data"
    data.mkdir()
    for name in _KEPT:
        (data / name).write_bytes((maker.data_dir / name).read_bytes().rstrip(b"\0"))
    shutil.copytree(maker.data_dir / "spool", data / "spool")
    (folder / "retained.json").write_text(json.dumps(retained(mosquitto.port), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)


def _end_in_order(maker: "_Maker") -> None:
    maker.start(CESAR_CONSUMER__GROUP="house")
    maker.bus.publish("cesar/jobs", {"job_id": "completed", "audio_path": "speech.wav"})
    files = {"audio_path": "speech.wav", "formats": ["srt", "json"], "word_timestamps": True}
    maker.bus.publish("cesar/jobs", {"job_id": "files", "metadata": {"room": "porch", "tags": ["a"]}, **files})
    maker.bus.publish("cesar/jobs", {"job_id": "deleted", **files})
    maker.bus.publish("cesar/jobs", {"job_id": "replaced", **files})
    maker.bus.status("replaced")
    maker.stop()


def _die_in_mid_job(maker: "_Maker", long: bytes) -> None:
    bus = maker.bus
    maker.start()
    bus.publish("cesar/jobs", {"audio_path": "speech.wav", "metadata": {"name": "retained"}}, retain=True)
    bus.publish("cesar/jobs", {"job_id": "forgotten", "audio_path": "speech.wav", "formats": ["txt"]})
    bus.publish("cesar/audio/uploaded", SPEECH.read_bytes())
    bus.publish("cesar/jobs", {"job_id": "missing", "audio_path": "missing.wav"})
    bus.publish("cesar/jobs", {"job_id": "refused", "audio_path": "speech.wav", "beam_size": "wide"})
    bus.publish("cesar/jobs", {"job_id": "unreachable", "audio_url": "http://127.0.0.1:9/a.wav"})
    bus.publish("cesar/jobs", "{")
    bus.publish("cesar/jobs", {"audio_path": "missing.wav", "metadata": {"name": "nameless"}})
    _wait(lambda: _nameless(bus) != "", "the end of the job without an id")
    bus.publish("cesar/request/retry", {"job_id": "unreachable"})
    bus.status("unreachable", "queued")
    for job_id in ("forgotten", _nameless(bus)):
        bus.publish("cesar/request/delete", {"job_id": job_id})
        maker.wait_for_journal(f'{{"job_id":"{job_id}","f')
    bus.publish("cesar/request/pause", {})
    bus.publish("cesar/jobs", {"job_id": "cancelled", "audio_path": "speech.wav"})
    bus.status("cancelled", "queued")
    bus.publish("cesar/request/cancel", {"job_id": "cancelled"})
    bus.status("cancelled")
    bus.publish("cesar/request/resume", {})
    maker.mark_journal()
    bus.publish("cesar/audio/interrupted", long)
    maker.wait_for_journal('"windows"')
    maker.kill()


def _die_cut_off(maker: "_Maker", gate: "Gate", short: bytes) -> None:
    bus = maker.bus
    maker.start()
    bus.wait("cesar/status/interrupted", lambda status: status["status"] == "processing" and status["attempt"] == 2)
    maker.mark_journal()
    gate.hold()
    bus.publish("cesar/request/pause", {})
    for job_id in ("deleted", "replaced"):
        bus.publish("cesar/request/delete", {"job_id": job_id})
    bus.publish("cesar/jobs", {"job_id": "replaced", "audio_path": "speech.wav"})
    bus.publish("cesar/audio/waiting-upload", short)
    options = {"language": "en", "initial_prompt": "Plumber.", "temperature": [0, 0.4], "clip_timestamps": [[0, 3.5]]}
    later = {"formats": ["vtt"], "stream": True, "expires_in": 3_000_000_000, "metadata": {"number": 7}}
    bus.publish("cesar/jobs", {"job_id": "waiting", "audio_path": "speech.wav", **options, **later})
    maker.wait_for_journal('{"job_id":"deleted"', '"status":false', '"job_id":"waiting"', '"paused":true', '"until_s"')
    maker.kill()


def _nameless(bus: Bus) -> str:
    """The id of the job that came without one and has failed; empty as long as it has not."""
    failed = [status for status in bus.every_status() if status["status"] == "error"]
    return next((status["job_id"] for status in failed if status["metadata"] == {"name": "nameless"}), "")


class _Maker:
    """The consumer as a process, a client that gives it work, and a look into its journal."""

    def __init__(self, python: str, folder: Path, gate: "Gate", mosquitto: Mosquitto) -> None:
        self.data_dir = folder / "data"
        self.bus = Bus(mosquitto.port)
        self._python, self._folder, self._gate = python, folder, gate
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = 0

    def start(self, **environment: str) -> None:
        command = [self._python, "-m", "cesar_mqtt", "serve", "--data-dir", str(self.data_dir)]
        command += ["--audio-dir", str(DATA), "--broker", f"mqtt://127.0.0.1:{self._gate.port}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**os.environ, **SETTINGS, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        before = len(self.bus.messages)
        _wait(lambda: any(m.payload == b'{"state":"online"}' for m in self.bus.messages[before:]), "online")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a power cut would; returns when the broker has noticed."""
        before = len(self.bus.messages)
        self._end(signal.SIGKILL)
        _wait(lambda: any(m.payload == b'{"state":"offline"}' for m in self.bus.messages[before:]), "offline")

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)
            self._process = None

    def close(self) -> None:
        self._end(signal.SIGKILL)
        self.bus.close()

    def mark_journal(self) -> None:
        """Let `wait_for_journal` look only at what is written from now on."""
        self._mark = len(self._journal())

    def wait_for_journal(self, *texts: str) -> None:
        """Wait until each text stands in the journal."""
        wanted = [text.encode() for text in texts]
        _wait(lambda: all(text in self._journal()[self._mark :] for text in wanted), f"{texts} in the journal")

    def _journal(self) -> bytes:
        """The lines of the journal; zeros behind them are room that it has taken in advance."""
        return (self.data_dir / "ledger.json.journal").read_bytes().rstrip(b"\0")


class Gate:
    """Passes a connection on to a broker on loopback; after `hold`, nothing more of what the client sends."""

    def __init__(self, broker: int) -> None:
        self._broker = broker
        self._held = threading.Event()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def hold(self) -> None:
        self._held.set()

    def close(self) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._door.accept()
                thread = threading.Thread(target=self._carry, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._broker)) as broker, suppress(OSError):
            while True:
                readable, _, _ = select.select([client, broker], [], [], 0.1)
                for source in readable:
                    data = source.recv(65_536)
                    if not data:
                        return
                    if source is broker:
                        client.sendall(data)
                    elif not self._held.is_set():
                        broker.sendall(data)


def retained(port: int) -> list[dict[str, str]]:
    """What a broker retains, as topics and payloads, by topic."""
    bus = Bus(port, topic_filter="#")
    bus.settle()
    bus.leave()
    found = {message.topic: message.payload.decode() for message in bus.messages if message.retain}
    return [{"topic": topic, "payload": found[topic]} for topic in sorted(found)]


def _encode(sources: Sequence[Path], target: Path, *, seconds: float) -> None:
    """Put the sources one behind the other into a small Ogg file."""
    with av.open(target, "w", format="ogg") as written:
        stream: Any = written.add_stream("libopus", rate=16_000)
        stream.layout, stream.codec_context.bit_rate = "mono", 6_000
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=16_000)
        samples = 0
        for source in sources:
            with av.open(source) as recording:
                for frame in recording.decode(audio=0):
                    for part in resampler.resample(frame):
                        if samples / 16_000 < seconds:
                            part.pts, samples = samples, samples + part.samples
                            written.mux(stream.encode(part))
        written.mux(stream.encode(None))


def _wait(when: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while not when():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        pause.wait(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.version_1", description=(__doc__ or "")[:115])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable)
    wanted = parser.parse_args()
    wanted.folder.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        mosquitto = Mosquitto(Path(folder), ["persistence true", f"persistence_location {folder}/"])
        mosquitto.start()
        try:
            make(wanted.folder, wanted.python, mosquitto)
        finally:
            mosquitto.kill()


if __name__ == "__main__":
    main()
