"""The command line as a user meets it: what it prints, and what it returns to the shell."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.broker import EmbeddedBroker
from cesar_mqtt.cli import run
from tests.acceptance.harness import DATA, LONG, SPEECH, SPOKEN, Bus, Consumer, command, words
from tests.conftest import Mosquitto, StartMosquitto, find_free_port

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

HEAVY = ("faster_whisper", "ctranslate2", "av", "numpy", "amqtt", "pydantic", "paho", "tinydb", "rich.progress")


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    loaded = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    script = f"import sys; from cesar_mqtt.cli import run; run(['--help']); {loaded}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert all(name in ended.stdout for name in ("serve", "submit", "demo"))
    assert ended.stdout.splitlines()[-1] == "[]"


def test_the_version_is_that_of_the_package() -> None:
    assert command("--version").stdout == f"cesar-mqtt {version('cesar-mqtt')}\n"


def test_wrong_usage_returns_2() -> None:
    for arguments in (
        ["serve", "--no-such-flag"],
        ["submit"],
        ["no-such-command"],
        ["submit", "--job-id", "a b", "x.wav"],
        ["submit", "--format", "doc", "x.wav"],
    ):
        ended = command(*arguments)
        assert ended.returncode == 2, arguments
        assert ended.stderr.strip()
        assert "Traceback" not in ended.stderr


@pytest.mark.model
def test_the_demo_prints_the_transcript_and_nothing_else_on_stdout() -> None:
    ended = command("demo")
    assert ended.returncode == 0, ended.stderr
    spoken = Path(sys.modules["tests.acceptance.harness"].__file__ or "").parents[2] / "cesar_mqtt/demo/recording.txt"
    assert words(ended.stdout) == words(spoken.read_text())
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("environ", "flags", "named"),
    [
        ({"CESAR_BROKER__KEEPALIVE": "soon"}, [], "CESAR_BROKER__KEEPALIVE"),
        ({"CESAR_BROKR__URL": "mqtt://127.0.0.1"}, [], "CESAR_BROKR__URL"),
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
    assert f"Port {mosquitto.port} on 127.0.0.1 is taken" in ended.stderr


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
    assert ended.returncode == 1
    assert "--broker" in ended.stderr


@pytest.mark.model
@pytest.mark.mosquitto
def test_submit_waits_and_prints_the_transcript(mosquitto: Mosquitto, serve: Serve) -> None:
    serve("--broker", mosquitto.url)
    ended = command("submit", "--broker", mosquitto.url, str(SPEECH))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert words(ended.stdout) == SPOKEN

    several = command("submit", "--broker", mosquitto.url, "--by-path", "--language", "en", "speech.wav", "long.ogg")
    assert several.returncode == 0
    first, second = several.stdout.splitlines()
    assert first.startswith("speech.wav: ")
    assert second.startswith("long.ogg: ")

    status = json.loads(command("submit", "--broker", mosquitto.url, "--json", "--job-id", "j-1", str(SPEECH)).stdout)
    assert (status["job_id"], status["status"]) == ("j-1", "completed")
    again = json.loads(command("submit", "--broker", mosquitto.url, "--json", "--job-id", "j-1", str(SPEECH)).stdout)
    assert again == status, "the same id and recording is the same job"


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
    late = command("submit", "--broker", mosquitto.url, "--timeout", "1.5", "--job-id", "late", str(SPEECH))
    consumer.process.send_signal(signal.SIGCONT)
    assert late.returncode == 3
    assert late.stdout == ""
    assert "late" in late.stderr
    assert bus.status("late")["status"] == "completed", "the job is done all the same"


@pytest.mark.model
def test_submit_reaches_an_embedded_broker(serve: Serve, free_port: int) -> None:
    consumer = serve("--broker", f"embedded://127.0.0.1:{free_port}", "--log-level", "debug")
    ended = command("submit", "--broker", f"mqtt://127.0.0.1:{free_port}", str(DATA / "speech.wav"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert words(ended.stdout) == SPOKEN
    # It once waited for its own PUBACK without taking what was retained, and amqtt waited five seconds for that.
    assert "Timeout waiting for PUBACK" not in consumer.logged()


# -- results in a format, from a consumer of which only the answers are there -----------------------------------------


class Answers:
    """Publishes what a consumer would, when a request comes: results first, then the final status, all retained."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._threads = ThreadPoolExecutor()

    def close(self) -> None:
        self._threads.shutdown()

    def soon(self, path: str, results: Mapping[str, bytes], **status: Any) -> Future[dict[str, Any]]:
        """Answer the request for this path, in a thread; gives the request."""
        return self._threads.submit(self._answer, path, results, status)

    def _answer(self, path: str, results: Mapping[str, bytes], status: Mapping[str, Any]) -> dict[str, Any]:
        request = self._bus.wait("cesar/jobs", lambda request: request.get("audio_path", "upload") == path)
        self.publish(request["job_id"], results, **status)
        return request

    def publish(self, job_id: str, results: Mapping[str, bytes], **status: Any) -> None:
        for name, payload in results.items():
            self._bus.publish(f"cesar/result/{job_id}/{name}", payload, retain=True)
        times = {"created_at": "2026-01-23T21:45:00.120Z", "completed_at": "2026-01-23T21:45:09.120Z", "attempt": 1}
        document = {"job_id": job_id, "status": "completed", "result_text": "Hello.", **times, **status}
        self._bus.publish(f"cesar/status/{job_id}", document, retain=True)


@pytest.fixture
def answers(mosquitto: Mosquitto, join: Join) -> Iterator[Answers]:
    answers = Answers(join(mosquitto.port))
    yield answers
    answers.close()


SRT = "1\r\n00:00:00,000 --> 00:00:01,000\r\nGrüße ✓\r\n".encode()


@pytest.mark.mosquitto
def test_submit_prints_the_file_that_was_asked_for_byte_by_byte(mosquitto: Mosquitto, answers: Answers) -> None:
    asked = answers.soon("upload", {"vtt": b"another", "srt": SRT})
    ended = subprocess.run(
        [sys.executable, "-m", "cesar_mqtt", "submit", "--broker", mosquitto.url, "--format", "srt", str(SPEECH)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, SRT, b"")
    request = asked.result()
    assert request["formats"] == ["srt"]
    assert request["audio_base64"]


@pytest.mark.mosquitto
def test_the_files_of_several_recordings_come_one_after_the_other_in_the_order_of_the_command_line(
    mosquitto: Mosquitto, answers: Answers, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    asked = [answers.soon(f"{name}.wav", {"txt": f"{name}\n".encode()}) for name in ("second", "first")]
    code = run(["submit", "--broker", mosquitto.url, "--format", "txt", "--by-path", "first.wav", "second.wav"])
    assert (code, *capsysbinary.readouterr()) == (0, b"first\nsecond\n", b"")
    assert [request.result()["formats"] for request in asked] == [["txt"], ["txt"]]


@pytest.mark.mosquitto
@pytest.mark.parametrize(
    ("name", "payload", "result"),
    [
        ("srt", SRT, SRT.decode()),
        ("json", b'{"text": "Hello.", "segments": []}\n', {"text": "Hello.", "segments": []}),
        ("json", b"not JSON", "not JSON"),
        ("txt", b"\xff", "\ufffd"),
    ],
)
def test_with_json_the_file_is_a_field_of_the_status(
    mosquitto: Mosquitto,
    answers: Answers,
    capsys: pytest.CaptureFixture[str],
    *,
    name: str,
    payload: bytes,
    result: object,
) -> None:
    answers.soon("a.wav", {name: payload})
    assert run(["submit", "--broker", mosquitto.url, "--format", name, "--json", "--by-path", "a.wav"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["status"], status["result_text"], status["result"]) == ("completed", "Hello.", result)


@pytest.mark.mosquitto
def test_a_result_that_does_not_come_is_not_waited_for_without_end(
    mosquitto: Mosquitto,
    answers: Answers,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cesar_mqtt.producer._RESULT_S", 0.5)
    flags = ["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path"]
    answers.soon("a.wav", {"vtt": b"another"})
    answers.soon("b.wav", {"srt": b"one"})
    assert run([*flags, "a.wav", "b.wav"]) == 1
    said = capsys.readouterr()
    assert said.out == "one", "what has come is printed all the same"
    assert said.err.startswith("cesar-mqtt: a.wav: job ")
    assert said.err.endswith(" is completed, but its srt result has not come.\n")

    answers.soon("c.wav", {})
    assert run([*flags, "--json", "c.wav"]) == 1
    assert json.loads(capsys.readouterr().out)["result"] is None

    answers.soon("d.wav", {})
    monkeypatch.setattr("cesar_mqtt.producer._RESULT_S", 3600.0)
    assert run([*flags, "--timeout", "2", "d.wav"]) == 3


@pytest.mark.mosquitto
def test_a_job_that_failed_has_no_result_to_wait_for(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.producer._RESULT_S", 3600.0)
    answers.soon("a.wav", {}, status="error", error_code="audio_empty", error_message="It is empty.")
    assert run(["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path", "a.wav"]) == 1
    assert "audio_empty: It is empty." in capsys.readouterr().err


@pytest.mark.mosquitto
def test_a_result_of_an_earlier_job_of_the_same_id_is_not_passed_off_as_this_ones(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.producer._RESULT_S", 0.5)
    flags = ["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path"]
    for path, results, code, printed in (("a.wav", {}, 1, ""), ("b.wav", {"srt": b"new"}, 0, "new")):
        answers.publish(path[0], {"srt": b"old"}, created_at="2025-01-01T00:00:00.000Z")
        answers.soon(path, results)
        assert run([*flags, "--job-id", path[0], path]) == code
        assert capsys.readouterr().out == printed


@pytest.mark.mosquitto
def test_the_same_job_again_has_the_result_that_is_retained(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.producer._RESULT_S", 3600.0)
    answers.publish("a", {"srt": b"known"})
    answers.soon("a.wav", {})
    flags = ["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path"]
    assert run([*flags, "--job-id", "a", "a.wav"]) == 0
    assert capsys.readouterr().out == "known"


@pytest.mark.mosquitto
def test_a_result_that_was_taken_back_is_not_printed(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.producer._RESULT_S", 0.5)
    answers.publish("a", {"srt": b"known"})
    answers.soon("a.wav", {"srt": b""})
    flags = ["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path"]
    assert run([*flags, "--job-id", "a", "a.wav"]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.mosquitto
@pytest.mark.parametrize("flags", [[], ["--format", "srt"]])
def test_a_result_that_was_cut_is_printed_with_a_warning(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    answers.soon("a.wav", {"srt": b"Hello."}, result_truncated=True)
    assert run(["submit", "--broker", mosquitto.url, *flags, "--by-path", "a.wav"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "Hello."
    assert said.err.endswith("the end may be missing.\n")


def test_a_file_comes_through_an_embedded_broker_too(
    embedded_broker: EmbeddedBroker, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answers(join(embedded_broker.port))
    answers.soon("a.wav", {"srt": b"one"})
    flags = ["--broker", f"mqtt://127.0.0.1:{embedded_broker.port}", "--timeout", "30"]
    assert run(["submit", *flags, "--format", "srt", "--by-path", "a.wav"]) == 0
    assert capsys.readouterr().out == "one"
    answers.close()
