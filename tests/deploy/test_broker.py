"""The broker's configuration in `deploy/mosquitto`, run by a real mosquitto with a real consumer."""

import json
import os
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests import template
from tests.acceptance.harness import CONNECTED, SMALL, SPEECH, SPOKEN, Consumer, FrontDoor, command, wait_until, words
from tests.acceptance.web_page import Page
from tests.conftest import PATIENCE_S, Certificates, find_free_port
from tests.deploy.conftest import DEPLOY, USERS, Client, DeployedMosquitto, StartDeployed, script

pytestmark = [pytest.mark.mosquitto]

Serve = Callable[..., Consumer]


@pytest.fixture
def broker(start_deployed: StartDeployed) -> DeployedMosquitto:
    return start_deployed("mosquitto.conf")


def as_user(broker: DeployedMosquitto, user: str, *flags: str) -> Client:
    return Client(broker, user, broker.password(user), flags)


def flags_of(broker: DeployedMosquitto, user: str, *, scheme: str = "mqtt") -> tuple[str, ...]:
    return ("--broker", f"{scheme}://{user}@127.0.0.1:{broker.port}")


def password_of(broker: DeployedMosquitto, user: str) -> dict[str, str]:
    return {"CESAR_BROKER__PASSWORD_FILE": str(broker.folder / "config" / f"{user}.password")}


def denied(broker: DeployedMosquitto) -> list[str]:
    return [line for line in broker.log if "Denied" in line]


@pytest.mark.model
def test_a_producer_hands_in_a_recording_and_reads_the_transcript_and_nobody_is_denied_anything(
    broker: DeployedMosquitto, serve: Serve
) -> None:
    consumer = serve(*flags_of(broker, "cesar"), environ=password_of(broker, "cesar"))
    producer = password_of(broker, "producer")

    submitted = command(
        "submit", str(SPEECH), "--format", "srt", "--job-id", "note-1", *flags_of(broker, "producer"), environ=producer
    )
    status = as_user(broker, "producer").sub("cesar/status/note-1", "-C", "1", "-W", "100")
    announced = as_user(broker, "homeassistant").sub("homeassistant/#", "-C", "1", "-W", "100")
    healthy = command("health", "--json", *flags_of(broker, "cesar"), environ=password_of(broker, "cesar"))
    cancelled = command("pause", *flags_of(broker, "homeassistant"), environ=password_of(broker, "homeassistant"))
    assert consumer.stop() == 0
    state = as_user(broker, "producer").sub("cesar/consumer/cesar/state", "-C", "1", "-W", "100")

    assert submitted.returncode == 0, submitted.stderr
    assert "-->" in submitted.stdout
    assert words(json.loads(status.stdout)["result_text"]) == SPOKEN
    assert json.loads(announced.stdout)["device"]["manufacturer"] == "cesar-mqtt"
    assert healthy.returncode == 0, healthy.stderr
    assert json.loads(healthy.stdout)["worker_alive"] is True
    assert cancelled.returncode == 0, cancelled.stderr
    assert json.loads(state.stdout) == {"state": "offline"}
    assert not denied(broker), denied(broker)


@pytest.mark.model
def test_the_page_submits_follows_and_deletes_a_job_and_is_denied_nothing(
    broker: DeployedMosquitto, serve: Serve, tmp_path: Path
) -> None:
    script("make-passwords.sh", str(broker.folder / "config"), "web")
    broker.restart()
    serve(*flags_of(broker, "cesar"), environ=password_of(broker, "cesar"))
    page = Page(find_free_port())
    with (tmp_path / "web.log").open("wb") as log:
        process = template.start(
            ["web", f"127.0.0.1:{page.port}", *flags_of(broker, "web")],
            cwd=tmp_path,
            env={**os.environ, **SMALL, **password_of(broker, "web")},
            stdout=log,
            stderr=log,
        )
    try:
        with closing(page):
            page.wait_ready()
            job_id = page.submit(formats="json")["job_id"]
            wait_until(lambda: page.http.get(f"/api/jobs/{job_id}").json()["status"] == "completed")
            assert page.http.get(f"/api/jobs/{job_id}/result.srt").status_code == 200
            assert page.http.delete(f"/api/jobs/{job_id}").status_code == 200
            wait_until(lambda: page.http.get(f"/api/jobs/{job_id}").status_code == 404)
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert not denied(broker), denied(broker)


@pytest.mark.parametrize(
    "topic",
    [
        "cesar/status/note-1",
        "cesar/result/note-1/txt",
        "cesar/consumer/cesar/state",
        "cesar/request/delete",
        "cesar/events",
        "homeassistant/device/x/config",
        "zigbee2mqtt/lock/set",
    ],
)
def test_a_producer_is_told_that_it_may_not_publish_what_is_not_a_recording(
    broker: DeployedMosquitto, topic: str
) -> None:
    sent = as_user(broker, "producer").pub(topic, "{}")
    assert "Not authorized" in sent.stderr
    assert broker.wait_logged("Denied PUBLISH")


def test_a_producer_reads_neither_the_requests_of_others_nor_anything_else(broker: DeployedMosquitto) -> None:
    owner = as_user(broker, "homeassistant")
    owner.pub("cesar/audio/secret", "a secret", "-r")
    owner.pub("homeassistant/device/lock/config", "{}", "-r")

    everything = as_user(broker, "producer").sub("#", "-W", "1", "-v")
    as_consumer = as_user(broker, "cesar").sub("cesar/audio/#", "-W", "100", "-C", "1")

    assert everything.stdout == ""
    assert as_consumer.stdout.strip() == "a secret"  # it was there


@pytest.mark.parametrize("topic", ["cesar/status/note-1", "cesar/result/note-1/txt"])
def test_home_assistant_may_ask_for_anything_but_speaks_for_no_consumer(broker: DeployedMosquitto, topic: str) -> None:
    client = as_user(broker, "homeassistant")
    assert "Not authorized" in client.pub(topic, "{}").stderr
    for allowed in ("cesar/request/pause", "cesar/consumer/cesar/pause/set", "cesar/jobs", "homeassistant/status"):
        assert client.pub(allowed, "").stderr == ""


@pytest.mark.parametrize(
    "topic",
    [
        "zigbee2mqtt/lock/set",
        "homeassistant/tag/evil/config",
        "homeassistant/device/lock/config",
        "homeassistant/status",
        "cesar/jobs",
        "cesar/request/delete",
        "cesar/consumer/kitchen/state",
        "cesar/consumer/cesar/pause/set",
    ],
)
def test_the_consumer_may_not_publish_outside_of_its_own_topics(broker: DeployedMosquitto, topic: str) -> None:
    assert "Not authorized" in as_user(broker, "cesar").pub(topic, "{}").stderr


@pytest.mark.parametrize("acl", ["shipped", "everything"])
def test_a_producer_publishes_nothing_through_the_consumers_rights(
    broker: DeployedMosquitto, serve: Serve, acl: str
) -> None:
    """A rejection that the consumer published below the discovery prefix registered a tag scanner in Home Assistant."""
    if acl == "everything":
        rules = broker.folder / "config" / "acl"
        rules.write_text(rules.read_text().replace("user cesar\n", "user cesar\ntopic readwrite #\n"))
        broker.restart()
    consumer = serve(*flags_of(broker, "cesar"), environ=password_of(broker, "cesar"))
    producer = as_user(broker, "producer")
    forbidden = ("homeassistant/tag/evil/config", "zigbee2mqtt/lock/set", "cesar/status/other", "cesar/response/health")
    for topic in forbidden:
        assert producer.pub("cesar/audio/no!id", "x", "-D", "publish", "response-topic", topic).stderr == ""
    producer.pub("cesar/audio/no!id", "x", "-D", "publish", "response-topic", "cesar/replies/producer/1")

    assert broker.wait_logged("'cesar/replies/producer/1'"), "it was the last one"
    assert not [line for line in broker.log if any(f"'{topic}'" in line for topic in forbidden)]
    for topic in forbidden:
        consumer.wait_for_log(f"No response on {topic}: ")


@pytest.mark.parametrize(
    ("user", "commands"), [("web", True), ("inbox", False), ("wyoming", False)], ids=["web", "inbox", "wyoming"]
)
def test_each_front_door_has_a_user_of_its_own(broker: DeployedMosquitto, user: str, *, commands: bool) -> None:
    script("make-passwords.sh", str(broker.folder / "config"), user)
    broker.restart()
    client = as_user(broker, user)
    as_user(broker, "cesar").pub("cesar/status/a", "{}", "-r")

    assert client.pub("cesar/audio/a", "x").stderr == ""
    assert ("Not authorized" in client.pub("cesar/request/delete", "a").stderr) is not commands
    for topic in ("cesar/status/a", "cesar/consumer/cesar/state", "cesar/replies/a", "homeassistant/tag/evil/config"):
        assert "Not authorized" in client.pub(topic, "{}").stderr
    assert client.sub("cesar/status/#", "-C", "1", "-W", "100").stdout == "{}\n"


@pytest.mark.model
def test_front_doors_inside_a_consumer_and_beside_it_need_no_more_rights_than_their_users_have(
    broker: DeployedMosquitto, serve: Serve, tmp_path: Path
) -> None:
    script("make-passwords.sh", str(broker.folder / "config"), "web", "inbox")
    broker.restart()
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    for folder in (inside, beside):
        folder.mkdir()
    quick = {"CESAR_INBOX__SETTLE": "0.3"}
    web = password_of(broker, "web")["CESAR_BROKER__PASSWORD_FILE"]
    user = {"CESAR_GATEWAY__USERNAME": "web", "CESAR_GATEWAY__PASSWORD_FILE": web}
    consumer = serve(
        *flags_of(broker, "cesar"), "--inbox", str(inside), environ={**password_of(broker, "cesar"), **user, **quick}
    )
    door = FrontDoor(
        tmp_path,
        *("inbox", str(beside), *flags_of(broker, "inbox"), "--data-dir", str(tmp_path / "records")),
        ready="Watching ",
        environ={**password_of(broker, "inbox"), **quick},
    )
    try:
        for folder in (inside, beside):
            (folder / "note.wav").write_bytes(SPEECH.read_bytes())
        consumer.wait_for_log("Wrote ")
        door.wait_for_log("Wrote ")
        assert door.stop() == 0
    finally:
        if door.process.poll() is None:
            door.kill()
    assert consumer.stop() == 0
    assert [words((folder / "note.txt").read_text()) for folder in (inside, beside)] == [SPOKEN, SPOKEN]
    assert not denied(broker), denied(broker)


def test_a_wrong_password_is_refused_and_the_consumer_says_what_to_check(
    broker: DeployedMosquitto, serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "wrong").write_text("guessed\n")
    consumer = serve(
        *flags_of(broker, "cesar"), environ={"CESAR_BROKER__PASSWORD_FILE": str(tmp_path / "wrong")}, ready=None
    )
    assert consumer.wait() == 78
    assert "Not authorized. Check broker.username and broker.password_file." in consumer.logged()
    guesser = Client(broker, "producer", "guessed").pub("cesar/jobs", "x.wav")
    assert "authori" in guesser.stderr.lower()


def test_nobody_comes_in_without_a_name(broker: DeployedMosquitto) -> None:
    asked = command("jobs", "--broker", broker.url)
    assert asked.returncode == 78
    assert "refused this client" in asked.stderr


@pytest.mark.model
def test_the_way_of_a_job_is_encrypted_with_certificates_from_the_script(
    start_deployed: StartDeployed, serve: Serve
) -> None:
    broker = start_deployed("mosquitto-tls.conf")
    authority = str(broker.folder / "config" / "certificates" / "ca.pem")
    consumer = serve(
        *flags_of(broker, "cesar", scheme="mqtts"),
        environ={**password_of(broker, "cesar"), "CESAR_BROKER__CA_FILE": authority},
    )
    submitted = command(
        "submit",
        str(SPEECH),
        *flags_of(broker, "producer", scheme="mqtts"),
        environ={**password_of(broker, "producer"), "CESAR_BROKER__CA_FILE": authority},
    )
    assert consumer.stop() == 0
    assert words(submitted.stdout) == SPOKEN


def test_a_broker_with_another_authoritys_certificate_gets_no_password(
    start_deployed: StartDeployed, serve: Serve, certificates: Certificates
) -> None:
    broker = start_deployed("mosquitto-tls.conf")
    consumer = serve(
        *flags_of(broker, "cesar", scheme="mqtts"),
        environ={**password_of(broker, "cesar"), "CESAR_BROKER__CA_FILE": str(certificates.other_ca)},
        ready="No connection to ",
    )
    assert "certificate" in consumer.logged()
    assert CONNECTED not in consumer.logged()
    assert not any("u'cesar'" in line for line in broker.log)


def test_a_client_without_a_certificate_is_refused_where_the_broker_asks_for_one(
    start_deployed: StartDeployed,
) -> None:
    broker = start_deployed("mosquitto-tls.conf", "require_certificate true", client="kitchen")
    folder = broker.folder / "config" / "certificates"
    flags = ("--cafile", str(folder / "ca.pem"))
    own = ("--cert", str(folder / "kitchen.pem"), "--key", str(folder / "kitchen.key"))

    without = as_user(broker, "producer", *flags).pub("cesar/jobs", "x.wav")
    with_one = as_user(broker, "producer", *flags, *own).pub("cesar/jobs", "x.wav")

    assert without.returncode != 0
    assert with_one.returncode == 0, with_one.stderr


def test_jobs_for_an_absent_consumer_survive_a_restart_of_the_broker(broker: DeployedMosquitto, serve: Serve) -> None:
    consumer = serve(*flags_of(broker, "cesar"), environ=password_of(broker, "cesar"))
    assert consumer.stop() == 0
    as_user(broker, "producer").pub("cesar/jobs", json.dumps({"job_id": "waited", "audio_path": "not-there.wav"}))

    broker.restart()
    consumer.start()
    status = as_user(broker, "producer").sub("cesar/status/waited", "-C", "1", "-W", "100")

    assert json.loads(status.stdout)["job_id"] == "waited"


def test_passwords_are_readable_by_their_owner_only_and_stay_when_the_script_runs_again(tmp_path: Path) -> None:
    first = script("make-passwords.sh", str(tmp_path))
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    script("make-passwords.sh", str(tmp_path), *USERS, "another")
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert sorted(before) == ["cesar.password", "homeassistant.password", "passwords", "producer.password"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    secrets = [text.strip() for name, text in before.items() if name != "passwords"]
    assert len(set(secrets)) == 3
    assert not any(secret in first or secret in before["passwords"] for secret in secrets)
    assert all(after[name] == text for name, text in before.items() if name != "passwords")
    assert after["passwords"].startswith(before["passwords"])


def test_both_configurations_differ_in_their_encryption_only() -> None:
    plain, encrypted = ({*_lines(name)} for name in ("mosquitto.conf", "mosquitto-tls.conf"))
    assert plain - encrypted == {"listener 1883"}
    assert {line.split()[0] for line in encrypted - plain} == {
        "listener",
        "cafile",
        "certfile",
        "keyfile",
        "tls_version",
    }


def _lines(name: str) -> list[str]:
    text = (DEPLOY / "mosquitto" / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]
