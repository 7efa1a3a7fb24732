"""The commands that ask a consumer, as a user meets them: a real mosquitto, a real consumer, real terminals."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.cli.app import run
from tests.acceptance.harness import PATIENCE_S, SMALL, SPOKEN, Bus, Consumer, command, words
from tests.conftest import Mosquitto, Process, StartMosquitto, find_free_port

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


class Watching:
    """`cesar-mqtt watch` as its own process, on a pipe or on a terminal, and all that it writes."""

    def __init__(self, url: str, *flags: str, terminal: bool = False) -> None:
        reader, writer = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cesar_mqtt", "watch", "--broker", url, *flags],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(writer)
        self._written = b""
        self._changed = threading.Condition()
        self._reader = reader
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._reader, 65_536)
            except OSError:  # how Linux says that no process has the other side of a terminal open
                return
            if not piece:
                return
            with self._changed:
                self._written += piece
                self._changed.notify_all()

    def text(self) -> str:
        return self._written.decode()

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.text(), PATIENCE_S), self.text()[-3000:]

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        os.close(self._reader)
        if self.process.stderr is not None:
            self.process.stderr.close()


@pytest.fixture
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watching]]:
    started: list[Watching] = []

    def start(*arguments: str, **options: Any) -> Watching:
        started.append(Watching(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.mark.model
@pytest.mark.mosquitto
@pytest.mark.usefixtures("_small_model")
def test_a_day_at_the_shell(
    mosquitto: Mosquitto,
    serve: Serve,
    join: Join,
    watch: Callable[..., Watching],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked(*arguments: str, code: int = 0) -> str:
        ended = run([*arguments, "--broker", mosquitto.url])
        told = capsys.readouterr()
        assert ended == code, (arguments, told)
        return told.out if code == 0 else told.err

    consumer = serve("--broker", mosquitto.url)
    screen = watch(mosquitto.url, terminal=True)
    lines = watch(mosquitto.url)
    lines.wait_for("consumer cesar online")
    bus = join(mosquitto.port)

    assert "Paused: " in asked("pause")
    bus.publish("cesar/jobs", {"job_id": "first", "audio_path": "speech.wav"})
    bus.publish("cesar/jobs", {"job_id": "second", "audio_path": "speech.wav"})
    bus.status("second", "queued")
    assert asked("cancel", "second") == "Job second is cancelled.\n"
    assert "There is no job third" in asked("cancel", "third", code=1)
    assert json.loads(asked("resume", "--json"))["paused"] is False
    bus.status("first", "completed")

    assert words(asked("show", "first").splitlines()[-1]) == SPOKEN
    assert json.loads(asked("show", "first", "--json"))["status"] == "completed"
    assert [line.split()[0] for line in asked("jobs").splitlines()] == ["JOB", "second", "first"]
    assert json.loads(asked("jobs", "--status", "completed", "--json"))["job_id"] == "first"
    assert asked("retry", "second") == "Job second is queued again.\n"
    bus.wait("cesar/status/second", lambda status: status["status"] == "completed")
    assert asked("show", "fi", "--format", "txt") == asked("show", "first", "--format", "txt")
    assert asked("delete", "sec") == "Job second is deleted.\n"
    assert "second" not in asked("jobs")
    healthy = command("health", "--json", "--broker", mosquitto.url)
    assert (healthy.returncode, json.loads(healthy.stdout)["worker_alive"]) == (0, True), healthy.stderr

    report = asked("doctor", "--data-dir", str(consumer.data_dir)).splitlines()
    findings = [line for line in report if not line.startswith(" ")]
    assert {line.split()[0] for line in findings} <= {"ok", "note"}
    assert any("in use by a consumer" in line for line in findings)

    for seen in ("job first completed", "job second cancelled", "job second deleted"):
        lines.wait_for(seen)
    screen.wait_for("completed")
    assert screen.stop() == 0
    assert screen.text().index("\x1b[?1049h") < screen.text().rindex("\x1b[?1049l"), "the terminal is as it was"

    assert consumer.stop() == 0
    lines.wait_for("consumer cesar offline")
    assert lines.stop(signal.SIGTERM) == 0
    assert "cesar: offline" in asked("health", code=3)


@pytest.mark.mosquitto
def test_watch_says_that_the_broker_is_gone_and_goes_on_when_it_is_back(
    mosquitto: Mosquitto, join: Join, watch: Callable[..., Watching]
) -> None:
    lines = watch(mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/status/a", {"status": "queued"}, retain=True)
    lines.wait_for("job a queued")
    bus.close()
    mosquitto.stop()
    lines.wait_for("no connection: ")
    mosquitto.start()
    lines.wait_for("connected again")
    join(mosquitto.port).publish("cesar/status/b", {"status": "queued"})
    lines.wait_for("job b queued")
    assert lines.text().count("job a queued") == 1
    assert lines.stop() == 0


@pytest.mark.mosquitto
def test_keys_of_watch_reach_a_consumer_and_the_terminal_is_left_as_it_was(mosquitto: Mosquitto, join: Join) -> None:
    bus = join(mosquitto.port)
    bus.publish(
        "cesar/status/porch-17", {"status": "queued", "consumer": "cesar", "audio_source": "porch.wav"}, retain=True
    )
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    watching = [sys.executable, "-m", "cesar_mqtt", "watch", "--broker", mosquitto.url]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with Process(watching, stdin=theirs, stdout=theirs, env=environ) as process:
        shown = b""
        while b"q quit" not in shown or b"porch.wav" not in shown:
            assert select.select([ours], [], [], PATIENCE_S)[0], shown
            shown += os.read(ours, 4096)
        os.write(ours, b"c")
        asked = bus.wait("cesar/request/cancel")
        assert (asked["job_id"], asked["consumer"]) == ("porch-17", "cesar")
        os.write(ours, b"q")
        while process.poll() is None:
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 4096)
        assert process.returncode == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.mosquitto
def test_errors_help_and_have_their_codes(start_mosquitto: StartMosquitto) -> None:
    broker = start_mosquitto(users={"me": "right"})
    wrong, right = (f"mqtt://me:{password}@127.0.0.1:{broker.port}" for password in ("wr0ng", "right"))
    away = f"mqtt://127.0.0.1:{find_free_port()}"
    for arguments, code, told in (
        (["jobs", "--broker", wrong], 78, "broker.password_file"),
        (["watch", "--broker", wrong], 78, "broker.password_file"),
        (["health", "--broker", away, "--timeout", "1"], 3, "--broker"),
        (["health", "--broker", right, "--timeout", "5"], 3, "cesar-mqtt serve"),
        (["show", "a b"], 2, "A-Z"),
        (["jobs", "--status", "done"], 2, "completed"),
    ):
        ended = command(*arguments)
        assert ended.returncode == code, (arguments, ended.stderr)
        assert told in ended.stderr
        assert "wr0ng" not in ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""


def test_a_shell_can_complete_commands_flags_and_models_and_is_silent_without_a_broker(free_port: int) -> None:
    program = Path(sys.executable).with_name("cesar-mqtt")
    for typed, place, offered in (
        ("cesar-mqtt ca", "1", "cancel"),
        ("cesar-mqtt jobs --st", "2", "--status"),
        ("cesar-mqtt models pull tiny.", "3", "tiny.en"),
        ("cesar-mqtt serve --model medium.", "3", "medium.en"),
        (f"cesar-mqtt show --broker mqtt://127.0.0.1:{free_port} por", "4", ""),
    ):
        environ = {"_CESAR_MQTT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": place}
        ended = subprocess.run(
            [program], env={**os.environ, **environ}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert (ended.stdout.split(), ended.stderr) == (offered.split(), "")
