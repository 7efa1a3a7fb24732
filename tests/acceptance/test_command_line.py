"""The command line as a user meets it: what it prints, and what it returns to the shell."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cesar_mqtt.cli.app import app
from tests.acceptance.harness import DATA, LONG, SPEECH, SPOKEN, Bus, Consumer, command, words
from tests.conftest import PATIENCE_S, Mosquitto, StartMosquitto, find_free_port

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

HEAVY = ("faster_whisper", "ctranslate2", "av", "numpy", "amqtt", "pydantic", "paho", "tinydb", "rich")


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    loaded = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    script = f"import sys; from cesar_mqtt.cli.app import run; run(['--help']); {loaded}"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert all(name in ended.stdout for name in ("serve", "submit", "demo"))
    assert ended.stdout.splitlines()[-1] == "[]"


def test_the_version_is_that_of_the_package() -> None:
    assert command("--version", fresh=True).stdout == f"cesar-mqtt {version('cesar-mqtt')}\n"


def test_every_command_takes_the_flags_that_the_contract_promises() -> None:
    def commands(group: Any) -> Iterator[Any]:
        for each in group.commands.values():
            yield from commands(each) if hasattr(each, "commands") else (each,)

    found = list(commands(get_command(app)))
    assert len(found) > 20
    for each in found:
        options = {option for parameter in each.params for option in parameter.opts}
        assert options >= {"--broker", "--topic-prefix", "--config"}, each.name
    ended = command("schema", "json", "--broker", "mqtt://127.0.0.1", "--topic-prefix", "p", "--config", "x")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "config" not in command("demo", "--help").stdout, "what means nothing is not shown"


def test_wrong_usage_returns_2() -> None:
    for arguments in (
        ["serve", "--no-such-flag"],
        ["submit"],
        ["no-such-command"],
        ["submit", "--job-id", "a b", "x.wav"],
        ["submit", "--format", "doc", "x.wav"],
        ["submit", "--format", "srt", "--format", "vtt", "x.wav"],
        ["submit", "--task", "foo", "x.wav"],
    ):
        ended = command(*arguments)
        assert ended.returncode == 2, arguments
        assert ended.stderr.strip()
        assert "Traceback" not in ended.stderr


@pytest.mark.model
def test_the_demo_prints_the_transcript_and_nothing_else_on_stdout() -> None:
    ended = command("demo", fresh=True)
    assert ended.returncode == 0, ended.stderr
    spoken = (
        Path(sys.modules["tests.acceptance.harness"].__file__ or "").parents[2] / "cesar_mqtt/cli/demo/recording.txt"
    )
    assert words(ended.stdout) == words(spoken.read_text())
    assert len(ended.stdout.splitlines()) == 1


def test_a_variable_that_kubernetes_injects_is_ignored_with_a_warning() -> None:
    ended = command("schema", "asyncapi", environ={"CESAR_PORT": "tcp://10.0.0.1:1883"})
    assert ended.returncode == 0
    assert ended.stderr.startswith("cesar-mqtt: Ignoring CESAR_PORT: there is no such setting")
    assert json.loads(ended.stdout)["asyncapi"] == "3.0.0"


@pytest.mark.parametrize(
    ("environ", "flags", "named"),
    [
        ({"CESAR_BROKER__KEEPALIVE": "soon"}, [], "CESAR_BROKER__KEEPALIVE"),
        ({"CESAR_BROKER__URl": "mqtt://127.0.0.1"}, [], "CESAR_BROKER__URl"),
        ({}, ["--broker", "http://127.0.0.1"], "http"),
        ({}, ["--broker", "embedded://192.0.2.1"], "192.0.2.1"),
        ({}, ["--name", "with blanks"], "--name"),
        ({}, ["--log-level", "loud"], "--log-level"),
        ({}, ["--config", "no-such.toml"], "no-such.toml"),
        ({}, ["--model", "enormous"], "enormous"),
        ({"CESAR_MODELS__DEVICE": "mps"}, [], "CESAR_MODELS__DEVICE"),
        ({"CESAR_MODELS__COMPUTE_TYPE": "int3"}, [], "int3"),
        ({"CESAR_BROKER__PASSWORD_FILE": "/no/such/file"}, ["--broker", "mqtt://u@127.0.0.1"], "/no/such/file"),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(
    environ: dict[str, str], flags: list[str], named: str, tmp_path: Path
) -> None:
    port = find_free_port()
    arguments = ["serve", "--data-dir", str(tmp_path / "data"), "--broker", f"embedded://127.0.0.1:{port}", *flags]
    ended = command(*arguments, cwd=tmp_path, environ=environ)
    assert ended.returncode == 78, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("cesar-mqtt: ")]
    assert len(said) == 1
    assert named in said[0]
    assert "Traceback" not in ended.stderr


def test_a_wrong_setting_in_the_file_is_named_and_a_secret_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "cesar.toml").write_text('[broker]\nurl = "mqtt://me:s3cret@127.0.0.1:99999"\n')
    ended = command("serve", "--data-dir", str(tmp_path / "data"), cwd=tmp_path)
    assert ended.returncode == 78
    assert "broker" in ended.stderr
    assert "s3cret" not in ended.stderr


def test_a_taken_port_of_the_embedded_broker_is_a_clear_error(mosquitto: Mosquitto, tmp_path: Path) -> None:
    ended = command("serve", "--data-dir", str(tmp_path), "--broker", f"embedded://127.0.0.1:{mosquitto.port}")
    assert ended.returncode == 78
    assert f"Port {mosquitto.port} on 127.0.0.1 is in use" in ended.stderr


@pytest.mark.mosquitto
def test_refused_credentials_end_the_consumer_and_the_password_is_not_shown(
    start_mosquitto: StartMosquitto, tmp_path: Path
) -> None:
    broker = start_mosquitto(users={"cesar": "right"})
    url = f"mqtt://cesar:wr0ng@127.0.0.1:{broker.port}"
    ended = command("serve", "--data-dir", str(tmp_path), "--broker", url)
    assert ended.returncode == 78
    assert "Traceback" not in ended.stderr
    assert "wr0ng" not in ended.stderr
    assert ended.stderr.count("refused this client") == 1
    assert command("submit", "--broker", url, str(SPEECH)).returncode == 78


def test_a_data_directory_that_cannot_be_made_is_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = command("serve", "--data-dir", str(tmp_path / "file" / "data"), "--broker", "mqtt://127.0.0.1:1")
    assert ended.returncode == 74
    assert "data" in ended.stderr


def test_a_damaged_ledger_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"jobs": {"1": {"job')
    ended = command("serve", "--data-dir", str(tmp_path), "--broker", "mqtt://127.0.0.1:1")
    assert ended.returncode == 74
    assert (tmp_path / "ledger.json").read_text() == '{"jobs": {"1": {"job'


def test_submit_without_a_broker_says_so() -> None:
    ended = command("submit", "--broker", f"mqtt://127.0.0.1:{find_free_port()}", "--timeout", "2", str(SPEECH))
    assert ended.returncode == 3
    assert "`cesar-mqtt serve` without --broker brings its own" in ended.stderr


@pytest.mark.model
@pytest.mark.mosquitto
def test_submit_waits_and_prints_the_transcript(mosquitto: Mosquitto, serve: Serve) -> None:
    serve("--broker", mosquitto.url)
    ended = command("submit", "--broker", mosquitto.url, "--language", "en", str(SPEECH))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert words(ended.stdout) == SPOKEN
    listed = json.loads(command("jobs", "--broker", mosquitto.url, "--json").stdout)
    told = json.loads(command("show", "--broker", mosquitto.url, "--json", listed["job_id"]).stdout)
    assert told["metadata"] == {"file": "speech.wav"}, "several uploads can be told apart"

    several = command("submit", "--broker", mosquitto.url, "--by-path", "--language", "en", "speech.wav", "long.ogg")
    assert several.returncode == 0
    first, second = sorted(several.stdout.splitlines())
    assert first.startswith("long.ogg: ")
    assert second.startswith("speech.wav: ")

    status = json.loads(command("submit", "--broker", mosquitto.url, "--json", "--job-id", "j-1", str(SPEECH)).stdout)
    assert (status["job_id"], status["status"]) == ("j-1", "completed")
    again = json.loads(command("submit", "--broker", mosquitto.url, "--json", "--job-id", "j-1", str(SPEECH)).stdout)
    assert again == status, "the same id and recording is the same job"
    assert status["metadata"] == {"file": "speech.wav"}


@pytest.mark.model
@pytest.mark.mosquitto
def test_submit_says_what_failed_and_returns_1(mosquitto: Mosquitto, serve: Serve, tmp_path: Path) -> None:
    serve("--broker", mosquitto.url)
    junk = tmp_path / "junk.wav"
    junk.write_text("no audio")

    ended = command("submit", "--broker", mosquitto.url, str(SPEECH), str(junk))
    assert ended.returncode == 1
    assert words(ended.stdout)[-len(SPOKEN) :] == SPOKEN
    assert "audio_unreadable" in ended.stderr

    assert command("submit", "--broker", mosquitto.url, "--job-id", "mine", str(SPEECH)).returncode == 0
    conflict = command("submit", "--broker", mosquitto.url, "--job-id", "mine", str(LONG))
    assert conflict.returncode == 1
    assert conflict.stdout == "", "the transcript of another recording is not passed off as this one's"
    assert "job_id_conflict" in conflict.stderr

    refused = command("submit", "--broker", mosquitto.url, "--model", "enormous", str(SPEECH))
    assert refused.returncode == 1
    assert "enormous" in refused.stderr
    assert command("submit", "--broker", mosquitto.url, str(tmp_path / "missing.wav")).returncode == 1


@pytest.mark.model
@pytest.mark.mosquitto
def test_submit_does_not_wait_when_told_not_to_and_gives_up_in_time(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    ended = command("submit", "--broker", mosquitto.url, "--no-wait", str(SPEECH))
    assert ended.returncode == 0
    assert words(bus.status(ended.stdout.strip())["result_text"]) == SPOKEN

    consumer.process.send_signal(signal.SIGSTOP)  # there, but not answering
    late = command("submit", "--broker", mosquitto.url, "--timeout", "10", "--job-id", "late", str(SPEECH))
    consumer.process.send_signal(signal.SIGCONT)
    assert late.returncode == 3
    assert late.stdout == ""
    assert "late" in late.stderr
    assert bus.status("late")["status"] == "completed", "the job is done all the same"


@pytest.mark.model
def test_submit_reaches_an_embedded_broker(serve: Serve, free_port: int) -> None:
    consumer = serve("--broker", f"embedded://127.0.0.1:{free_port}", "--log-level", "debug")
    ended = command("submit", "--broker", f"mqtt://127.0.0.1:{free_port}", "--json", str(DATA / "speech.wav"))
    assert (ended.returncode, ended.stderr) == (0, "")
    status = json.loads(ended.stdout)
    assert words(status["result_text"]) == SPOKEN
    assert status["metadata"] == {"file": "speech.wav"}, "in MQTT 3.1.1, too"
    # It once waited for its own PUBACK without taking what was retained, and amqtt waited five seconds for that.
    assert "Timeout waiting for PUBACK" not in consumer.logged()
