"""The command as its own process, a plain paho client as everybody else on the bus, and the words that were spoken."""

import functools
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties

from cesar_mqtt.audio.decoder import AudioLimits, open_audio
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper.packages import PackagedModels
from tests import conftest, template
from tests.document import Fault, Judge, Seen, default_document

DATA = Path(__file__).parents[1] / "data"
SPEECH = DATA / "speech.wav"
LONG = DATA / "long.ogg"
PATIENCE_S = conftest.PATIENCE_S
CONNECTED = "Connected to "
SMALL = {"CESAR_MODELS__DEFAULT": "tiny.en", "CESAR_MODELS__CPU_THREADS": "1"}
"""Where more than one model is installed, the larger one would be the default; other tests need the other cores."""


def repeated_long(path: Path, *, times: int) -> Path:
    """Make a WAV file of `LONG`, over and over, with a second of silence behind each."""
    with open_audio(LONG.resolve(), AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0)) as audio:
        spoken = (np.concatenate(list(audio.blocks())) * 32767).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        for _ in range(times):
            file.writeframes(spoken.tobytes())
            file.writeframes(bytes(32_000))
    return path


def wait_until(is_done: Callable[[], bool]) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while not is_done():
        assert time.monotonic() < deadline
        pause.wait(0.02)


def words(text: str) -> list[str]:
    """The words of a text, for comparing what was said with what was heard."""
    return re.findall(r"[a-z]+", text.lower())


SPOKEN = words((DATA / "speech.txt").read_text())

_MARKS = "cesar/settled/"


@functools.cache
def _judge() -> Judge:
    return Judge(default_document(), marks=(_MARKS,))


@functools.cache
def _checked_models() -> dict[str, bytes]:
    """What a consumer records of a model that it has checked, which would take longer than most jobs each time."""
    with tempfile.TemporaryDirectory() as folder:
        packages = PackagedModels(Path(folder) / "models")
        path = packages.find("tiny.en")
        if path is None:
            return {}
        packages.check("tiny.en", path, should_stop=never_stop)
        return {file.name: file.read_bytes() for file in (Path(folder) / "models").iterdir()}


class Bus:
    """One client that sees everything under `cesar/` and can wait for it.

    In the end every message has to be one of the AsyncAPI document, except what the test itself has published.
    """

    def __init__(
        self,
        port: int,
        *,
        protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311,
        client_id: str = "",
        topic_filter: str = "cesar/#",
        user: tuple[str, str] | None = None,
    ) -> None:
        """Subscribe to everything; with a `client_id` the broker keeps what comes while the connection is down.

        `user`: name and password; None: anonymous.
        """
        self.messages: list[MQTTMessage] = []
        self.on_cleared: Callable[[], None] = lambda: None
        self.kinds: set[Seen] = set()
        """Which messages of the document have been seen, once it is closed."""
        self._said: set[tuple[str, bytes]] = set()
        self._judged = 0
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        clean = False if client_id else None
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol, clean_session=clean)
        self._client.reconnect_delay_set(1, 1)
        if user is not None:
            self._client.username_pw_set(*user)
        self._client.on_connect = lambda client, *_: client.subscribe(topic_filter, qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S)

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()
        if not message.payload:
            self.on_cleared()

    def close(self) -> None:
        self.leave()
        self._compare_with_the_document()

    def leave(self) -> None:
        """Disconnect, and judge nothing."""
        self._client.disconnect()
        self._client.loop_stop()

    def _compare_with_the_document(self) -> None:
        judge, faults = _judge(), []
        new, self._judged = self.messages[self._judged :], len(self.messages)
        for message in new:
            found = judge.judge(message)
            if isinstance(found, Seen):
                self.kinds.add(found)
            elif isinstance(found, Fault) and (message.topic, message.payload) not in self._said:
                faults.append(f"{found.topic} {found.why}\n  {message.payload[:2000]!r}")
        if faults:
            pytest.fail(f"{len(faults)} messages are not as the AsyncAPI document says:\n" + "\n".join(faults[:5]))

    def publish(
        self,
        topic: str,
        payload: bytes | str | Mapping[str, Any],
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Properties | None = None,
    ) -> None:
        body = json.dumps(payload) if isinstance(payload, Mapping) else payload
        self._said.add((topic, body.encode() if isinstance(body, str) else body))
        info = self._client.publish(topic, body, qos=qos, retain=retain, properties=properties)
        info.wait_for_publish(PATIENCE_S)

    def seen(self, topic: str) -> list[dict[str, Any]]:
        """Every JSON object that was seen on a topic, in order."""
        with self._changed:
            return [json.loads(m.payload) for m in self.messages if m.topic == topic and m.payload]

    def every_status(self) -> list[dict[str, Any]]:
        """Every status of any job that was seen, in order."""
        with self._changed:
            return [json.loads(m.payload) for m in self.messages if m.topic.startswith("cesar/status/") and m.payload]

    def settle(self) -> None:
        """Return when everything that was retained has come: the broker sends it before what comes later."""
        mark = f"{_MARKS}{id(self)}"
        self.publish(mark, "{}")
        self.wait(mark)

    def wait(
        self, topic: str, when: Callable[[dict[str, Any]], bool] = lambda _: True, timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """The first message on a topic that satisfies `when`; waits for it."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found.extend(document for document in self.seen(topic) if when(document))
            return bool(found)

        with self._changed:
            if not self._changed.wait_for(look, timeout_s):
                pytest.fail(f"nothing expected came on {topic}; there was {self.seen(topic)}")
        return found[0]

    def status(self, job_id: str, *states: str) -> dict[str, Any]:
        """The status of a job in one of the states (default: a final one)."""
        wanted = states or ("completed", "error", "cancelled")
        return self.wait(f"cesar/status/{job_id}", lambda status: status["status"] in wanted)

    def states(self, job_id: str) -> list[str]:
        """The states of a job as they were seen, repetitions left out."""
        states = [status["status"] for status in self.seen(f"cesar/status/{job_id}")]
        return [state for n, state in enumerate(states) if n == 0 or states[n - 1] != state]


class Consumer:
    """`cesar-mqtt serve` as its own process."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        ready: str | None = CONNECTED,
        fresh: bool = False,
    ) -> None:
        self.data_dir = folder / "data"
        self.log = folder / "consumer.log"
        self._flags = ("--data-dir", str(self.data_dir), "--audio-dir", str(DATA), *flags)
        self._environ = {**os.environ, **SMALL, **(environ or {})}
        self._folder = folder
        self._fresh = fresh
        if not self.data_dir.exists():
            (self.data_dir / "models").mkdir(mode=0o755, parents=True)
            self.data_dir.chmod(0o700)
            for name, content in _checked_models().items():
                (self.data_dir / "models" / name).write_bytes(content)
        self.start(ready)

    def start(self, ready: str | None = CONNECTED) -> None:
        """Start it, and wait until it has logged `ready`: before its first connection no broker holds its jobs."""
        read = len(self.logged()) if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = template.start(
                ["serve", *self._flags],
                cwd=self._folder,
                env=self._environ,
                stdout=log,
                stderr=log,
                fresh=self._fresh,
            )
        if ready is not None:
            try:
                self.wait_for_log(ready, read)
            except BaseException:
                self.kill()
                raise

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """Stop it gracefully; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def logged(self) -> str:
        return self.log.read_text()

    def wait_for_log(self, text: str, read: int = 0) -> None:
        """Wait for a text in the log, after what had been read before."""
        pause = threading.Event()
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.logged()[read:]:
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"{text!r} was not logged; there was:\n{self.logged()}")
            pause.wait(0.05)


class FrontDoor(Consumer):
    """A front door as its own process: `cesar-mqtt inbox` or `wyoming`."""

    def __init__(
        self, folder: Path, *arguments: str, ready: str = CONNECTED, environ: Mapping[str, str] | None = None
    ) -> None:
        self._arguments = arguments
        self._ready = ready
        super().__init__(folder, ready=ready, environ=environ)

    def start(self, ready: str | None = None) -> None:
        read = len(self.logged()) if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = template.start(self._arguments, cwd=self._folder, env=self._environ, stdout=log, stderr=log)
        self.wait_for_log(ready or self._ready, read)


def command(
    *arguments: str,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = PATIENCE_S,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `cesar-mqtt` to its end."""
    env = {**os.environ, **SMALL, **(environ or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = template.start(arguments, cwd=cwd, env=env, stdout=out, stderr=err, fresh=fresh)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        written = [file.read().decode() for file in (out, err)]
    return subprocess.CompletedProcess(arguments, code, *written)
