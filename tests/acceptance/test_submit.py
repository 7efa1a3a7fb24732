"""`submit` as a user meets it, at a consumer of which only the answers are there."""

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cesar_mqtt.cli.app import run
from cesar_mqtt.cli.producer import new_job_id
from cesar_mqtt.mqtt.embedded import EmbeddedBroker
from cesar_mqtt.protocol.topics import is_job_id
from tests.acceptance.harness import PATIENCE_S, SPEECH, Bus
from tests.conftest import Mosquitto, Process, StartMosquitto

Join = Callable[..., Bus]

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
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
    answers = Answers(bus)
    yield answers
    answers.close()


SRT = "1\r\n00:00:00,000 --> 00:00:01,000\r\nGrüße ✓\r\n".encode()


@pytest.mark.mosquitto
def test_submit_prints_the_file_that_was_asked_for_byte_by_byte(mosquitto: Mosquitto, answers: Answers) -> None:
    asked = answers.soon("upload", {"vtt": b"another", "srt": SRT})
    ended = subprocess.run(
        [sys.executable, "-m", "cesar_mqtt", "submit", "--broker", mosquitto.url, "--format", "srt", str(SPEECH)],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, SRT, b"")
    request = asked.result()
    assert request["formats"] == ["srt"]
    assert request["audio_base64"]


@pytest.mark.mosquitto
def test_the_files_of_several_recordings_come_as_they_are_done_each_below_its_name(
    mosquitto: Mosquitto, answers: Answers, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    asked = [answers.soon(f"{name}.wav", {"txt": f"{name}\n".encode()}) for name in ("second", "first")]
    code = run(["submit", "--broker", mosquitto.url, "--format", "txt", "--by-path", "first.wav", "second.wav"])
    printed = capsysbinary.readouterr()
    assert (code, printed.err) == (0, b"")
    parts = printed.out.decode().split("==> ")[1:]
    assert sorted(parts) == ["first.wav <==\nfirst\n", "second.wav <==\nsecond\n"]
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
    monkeypatch.setattr("cesar_mqtt.cli.producer._RESULT_S", 0.5)
    flags = ["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path"]
    answers.soon("a.wav", {"vtt": b"another"})
    answers.soon("b.wav", {"srt": b"one"})
    assert run([*flags, "a.wav", "b.wav"]) == 1
    said = capsys.readouterr()
    assert said.out == "==> b.wav <==\none", "what has come is printed all the same"
    assert said.err.startswith("cesar-mqtt: a.wav: job ")
    assert said.err.endswith(" is completed, but its srt result did not arrive.\n")

    answers.soon("c.wav", {})
    assert run([*flags, "--json", "c.wav"]) == 1
    assert json.loads(capsys.readouterr().out)["result"] is None

    answers.soon("d.wav", {})
    monkeypatch.setattr("cesar_mqtt.cli.producer._RESULT_S", 3600.0)
    assert run([*flags, "--timeout", "2", "d.wav"]) == 3


@pytest.mark.mosquitto
def test_a_job_that_failed_has_no_result_to_wait_for(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.cli.producer._RESULT_S", 3600.0)
    answers.soon("a.wav", {}, status="error", error_code="audio_empty", error_message="It is empty.")
    assert run(["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path", "a.wav"]) == 1
    assert "audio_empty: It is empty." in capsys.readouterr().err


@pytest.mark.mosquitto
def test_a_result_of_an_earlier_job_of_the_same_id_is_not_passed_off_as_this_ones(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.cli.producer._RESULT_S", 0.5)
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
    monkeypatch.setattr("cesar_mqtt.cli.producer._RESULT_S", 3600.0)
    answers.publish("a", {"srt": b"known"})
    answers.soon("a.wav", {})
    flags = ["submit", "--broker", mosquitto.url, "--format", "srt", "--by-path"]
    assert run([*flags, "--job-id", "a", "a.wav"]) == 0
    assert capsys.readouterr().out == "known"


@pytest.mark.mosquitto
def test_a_result_that_was_taken_back_is_not_printed(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.cli.producer._RESULT_S", 0.5)
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
    assert said.err.endswith("end may be missing.\n")


def test_a_file_comes_through_an_embedded_broker_too(
    embedded_broker: EmbeddedBroker, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answers(join(embedded_broker.port))
    answers.soon("a.wav", {"srt": b"one"})
    flags = ["--broker", f"mqtt://127.0.0.1:{embedded_broker.port}", "--timeout", "30"]
    assert run(["submit", *flags, "--format", "srt", "--by-path", "a.wav"]) == 0
    assert capsys.readouterr().out == "one"
    answers.close()


# -- many recordings -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recordings, one of them in a sub-folder, and what is none."""
    for name in ("b.wav", "calls/a.mp3", "notes.txt", ".hidden.wav", "calls/c.wav.part"):
        path = tmp_path / "recordings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "recordings"


def answer_all(bus: Bus, number: int, **status: Any) -> list[str]:
    """Complete the next uploads, the last one first; returns their file names."""
    found: list[dict[str, Any]] = []
    while len(found) < number:
        found.append(bus.wait("cesar/jobs", lambda request: request not in found))
    for request in reversed(found):
        for name in request["formats"]:
            bus.publish(
                f"cesar/result/{request['job_id']}/{name}", f"{name} of {request['metadata']['file']}", retain=True
            )
        document = {"job_id": request["job_id"], "status": "completed", "result_text": "", "attempt": 1, **status}
        bus.publish(f"cesar/status/{request['job_id']}", document, retain=True)
    return [request["metadata"]["file"] for request in found]


@pytest.mark.mosquitto
def test_a_folder_is_searched_and_each_recording_gets_its_files_elsewhere(
    mosquitto: Mosquitto, join: Join, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
    with ThreadPoolExecutor() as threads:
        answered = threads.submit(answer_all, bus, 2)
        flags = ["--format", "srt", "--format", "txt", "--output-dir", str(tmp_path / "out")]
        assert run(["submit", "--broker", mosquitto.url, *flags, str(folder)]) == 0
    assert answered.result() == ["b.wav", "a.mp3"]
    written = {path.relative_to(tmp_path / "out"): path.read_text() for path in (tmp_path / "out").rglob("*.*")}
    assert {str(path): text for path, text in written.items()} == {
        "b.srt": "srt of b.wav",
        "b.txt": "txt of b.wav",
        "calls/a.srt": "srt of a.mp3",
        "calls/a.txt": "txt of a.mp3",
    }
    printed = capsys.readouterr()
    lines = [str(Path(line).relative_to(tmp_path / "out")) for line in printed.out.splitlines()]
    assert sorted([tuple(lines[:2]), tuple(lines[2:])]) == [("b.srt", "b.txt"), ("calls/a.srt", "calls/a.txt")]
    assert printed.err == ""


@pytest.mark.mosquitto
def test_a_bad_file_does_not_stop_the_others(
    mosquitto: Mosquitto, answers: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "nothing").mkdir()
    asked = answers.soon("upload", {"txt": b"Hello."})
    bad = [str(tmp_path / name) for name in ("gone.wav", "empty.wav", "nothing")]
    assert run(["submit", "--broker", mosquitto.url, "--format", "txt", *bad, str(SPEECH)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"==> {SPEECH} <==\nHello."
    assert printed.err.splitlines() == [
        f"cesar-mqtt: {bad[0]} cannot be read: there is no such file.",
        f"cesar-mqtt: {bad[2]} holds no recordings.",
        f"cesar-mqtt: {bad[1]} is empty: there is nothing to transcribe.",
    ]
    assert re.fullmatch("speech-[a-z2-9]{5}", asked.result()["job_id"])
    assert run(["submit", "--broker", mosquitto.url, "--job-id", "one", str(tmp_path), "--no-wait"]) == 1
    assert "cannot be read" not in capsys.readouterr().err


@pytest.mark.mosquitto
def test_each_transcript_is_printed_at_once_and_ctrl_c_names_the_files_that_are_open(
    mosquitto: Mosquitto, join: Join, tmp_path: Path
) -> None:
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
    names = [f"{number}.wav" for number in range(5)]
    submit = [sys.executable, "-m", "cesar_mqtt", "submit", "--broker", mosquitto.url, "--by-path", *names]
    with Process(submit, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        second = bus.wait("cesar/jobs", lambda request: request["audio_path"] == "1.wav")
        document = {"job_id": second["job_id"], "status": "completed", "result_text": "Hello.", "attempt": 1}
        bus.publish(f"cesar/status/{second['job_id']}", document, retain=True)
        assert process.stdout.readline() == b"1.wav: Hello.\n"
        bus.wait("cesar/jobs", lambda request: request["audio_path"] == "4.wav")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        left = process.stderr.read().decode()
    assert "jobs go on without this command: 0.wav, 2.wav, 3.wav" in left
    assert sorted(re.findall(r"\d\.wav", left)) == ["0.wav", "2.wav", "3.wav", "4.wav"], "the last may not be sent yet"


@pytest.mark.mosquitto
def test_more_recordings_than_lines_scroll_with_a_summary_and_a_pause_is_shown(
    mosquitto: Mosquitto, join: Join
) -> None:
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
    ours, theirs = pty.openpty()
    names = [f"{number:02}.wav" for number in range(40)]
    submit = [sys.executable, "-m", "cesar_mqtt", "submit", "--broker", mosquitto.url, "--by-path", *names]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "10"}
    with Process(submit, stderr=theirs, stdout=subprocess.DEVNULL, env=environ) as process:
        os.close(theirs)
        last = bus.wait("cesar/jobs", lambda request: request["audio_path"] == "39.wav")
        status = {"job_id": last["job_id"], "status": "processing", "progress": 0.5, "attempt": 1}
        bus.publish(f"cesar/status/{last['job_id']}", status)
        shown = _read_until(ours, b"0 of 40 recordings done: 1 processing, 39 sent")
        frame = shown[shown.rindex(b"39.wav") :]
        assert b"processing 50%" in frame, "the running one is the first"
        bus.publish("cesar/consumer/cesar/queue", {"activity": "paused", "paused": True}, retain=True)
        _read_until(ours, b"paused; `cesar-mqtt resume` continues")
        process.kill()
    os.close(ours)


def test_ids_are_readable() -> None:
    ids = {name: new_job_id(name) for name in ("Café au lait.m4a", "запись.wav", "a/b c_d.e.wav", "x" * 300, "-.wav")}
    beginnings = {name: job_id.rpartition("-")[0] for name, job_id in ids.items()}
    assert [*beginnings.values()] == ["Cafe-au-lait", "recording", "b-c_d-e", "x" * 40, "recording"]
    assert all(is_job_id(job_id) for job_id in ids.values())
    assert new_job_id("a.wav") != new_job_id("a.wav")


# -- what goes wrong, and what is worth knowing ------------------------------------------------------------------------


@pytest.mark.mosquitto
@pytest.mark.parametrize("more", [[], ["--no-wait"], ["--by-path"]])
def test_a_broker_that_refuses_the_recording_is_not_waited_for(
    start_mosquitto: StartMosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, more: list[str]
) -> None:
    (tmp_path / "acl").write_text("topic read cesar/#\n")
    broker = start_mosquitto(f"acl_file {tmp_path / 'acl'}")
    assert run(["submit", "--broker", broker.url, "--job-id", "mine", *more, str(SPEECH)]) == 78
    told = capsys.readouterr()
    assert told.out == ""
    topic = "cesar/jobs" if "--by-path" in more else "cesar/audio/mine"
    assert told.err == f"cesar-mqtt: {broker.url} does not let this client publish on {topic}: Not authorized.\n"


@pytest.mark.mosquitto
def test_no_time_at_all_is_time_that_ran_out(mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--broker", mosquitto.url, "--timeout", "0", str(SPEECH)]) == 3
    assert "No broker" not in capsys.readouterr().err


def test_a_broker_that_says_nothing_is_time_that_ran_out(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        where = ["--broker", f"mqtt://127.0.0.1:{deaf.getsockname()[1]}", "--timeout", "0.5"]
        assert run(["submit", *where, str(SPEECH)]) == 3
        assert run(["jobs", *where]) == 3
    assert "No broker" not in capsys.readouterr().err


@pytest.mark.mosquitto
def test_a_recording_may_come_from_stdin_and_has_no_file_name(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"RIFF")))
    asked = answers.soon("upload", {"srt": b"one"})
    assert run(["submit", "--broker", mosquitto.url, "--format", "srt", "-"]) == 0
    assert capsys.readouterr().out == "one"
    assert "metadata" not in asked.result()

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert run(["submit", "--broker", mosquitto.url, "-"]) == 1
    assert "stdin is empty" in capsys.readouterr().err


@pytest.mark.mosquitto
def test_what_is_over_the_limit_is_not_read_to_its_end(
    mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CESAR_QUEUE__MAX_PAYLOAD_BYTES", "2048")
    assert run(["submit", "--broker", mosquitto.url, "/dev/zero"]) == 1
    assert "/dev/zero is larger than a message may be, 2.0 kB" in capsys.readouterr().err


@pytest.mark.mosquitto
def test_silence_and_warnings_are_told_beside_the_transcript(
    mosquitto: Mosquitto, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.soon("a.wav", {}, result_text="", no_speech=True, warnings=["It ends early."])
    assert run(["submit", "--broker", mosquitto.url, "--by-path", "a.wav"]) == 0
    told = capsys.readouterr()
    assert told.out == "\n"
    assert told.err == "cesar-mqtt: a.wav: no speech.\ncesar-mqtt: a.wav: It ends early.\n"


@pytest.mark.mosquitto
def test_a_path_that_only_this_machine_has_is_told_in_full(
    mosquitto: Mosquitto,
    answers: Answers,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.wav").touch()
    failure = {"status": "error", "error_code": "audio_not_found", "error_message": "There is no such file."}
    for path, told_of in (("here.wav", True), ("gone.wav", False)):
        answers.soon(path, {}, **failure)
        assert run(["submit", "--broker", mosquitto.url, "--by-path", path]) == 1
        assert (f"the file is {tmp_path.resolve() / path}: " in capsys.readouterr().err) is told_of


@pytest.mark.mosquitto
@pytest.mark.parametrize("flags", [[], ["--no-wait"]])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_where_nobody_takes_jobs_that_is_said_at_once(
    mosquitto: Mosquitto,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    flags: list[str],
) -> None:
    """It waited for ever, or with --no-wait exited 0, while the broker had dropped the recording."""
    monkeypatch.setenv("CESAR_BROKER__PROTOCOL", protocol)
    assert run(["submit", "--broker", mosquitto.url, *flags, str(SPEECH)]) == 3
    told = capsys.readouterr().err
    assert told.startswith(f"cesar-mqtt: No consumer takes jobs at {mosquitto.url} under 'cesar'.")
    assert ("The broker has dropped what was sent." in told) is (protocol == "5")


@pytest.mark.mosquitto
def test_a_retained_state_does_not_hide_that_the_broker_dropped_the_recording(
    mosquitto: Mosquitto, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    bus.leave()
    assert run(["submit", "--broker", mosquitto.url, str(SPEECH)]) == 3
    assert "The broker has dropped what was sent." in capsys.readouterr().err


@pytest.mark.mosquitto
def test_a_consumer_that_is_offline_is_told_once_and_gets_the_jobs_later(
    mosquitto: Mosquitto, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    join(mosquitto.port).publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    assert run(["submit", "--broker", mosquitto.url, "--no-wait", str(SPEECH), str(SPEECH)]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert told.err.count("no consumer is online") == len(told.err.splitlines()) == 1


@pytest.mark.mosquitto
def test_who_waits_is_told_why_and_who_leaves_how_to_go_on(mosquitto: Mosquitto, join: Join) -> None:
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    ours, theirs = pty.openpty()
    submit = [sys.executable, "-m", "cesar_mqtt", "submit", "--broker", mosquitto.url, "--job-id", "mine"]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with Process([*submit, str(SPEECH)], stderr=theirs, stdout=subprocess.PIPE, env=environ) as process:
        os.close(theirs)
        shown = _read_until(ours, b"no consumer is online; waiting")
        bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
        bus.publish("cesar/status/mine", {"job_id": "mine", "status": "processing", "progress": 0.42, "eta": 5.0})
        shown = _read_until(ours, b"processing 42%, 0:05 left")
        process.send_signal(signal.SIGINT)
        shown = _read_until(ours, b"goes on without this command: cesar-mqtt show mine")
        assert f"The job of {SPEECH}".encode() in shown
        assert process.wait(PATIENCE_S) == 130
    assert b"Traceback" not in shown
    os.close(ours)


def _read_until(terminal: int, wanted: bytes) -> bytes:
    shown = b""
    while wanted not in shown:
        assert select.select([terminal], [], [], PATIENCE_S)[0], shown
        shown += os.read(terminal, 4096)
    return shown


@pytest.mark.mosquitto
def test_a_lost_connection_is_told_without_talk_of_a_name_that_nobody_else_can_have(
    mosquitto: Mosquitto, join: Join
) -> None:
    bus = join(mosquitto.port)
    bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
    submit = [sys.executable, "-m", "cesar_mqtt", "submit", "--broker", mosquitto.url, "--by-path", "a.wav"]
    with Process(submit, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        bus.wait("cesar/jobs")
        bus.close()
        mosquitto.kill()
        line = _read_until(process.stderr.fileno(), b"\n")
        process.kill()
    assert line.startswith(b"cesar-mqtt: the connection was lost: ")
    assert b"cesar-submit" not in line
