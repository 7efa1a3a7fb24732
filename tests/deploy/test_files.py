"""The files of `deploy/` that need a machine of their own to run: that they are whole, and fit what they talk to."""

import json
import re
import runpy
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer.main
import yaml  # type: ignore[import-untyped,unused-ignore]
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from cesar_mqtt.cli.app import app
from cesar_mqtt.config import Settings, load_settings
from cesar_mqtt.consumer.discovery import discovery_messages
from cesar_mqtt.gateway.web.access import Guard
from cesar_mqtt.gateway.web.server import parse_address, rules_of
from cesar_mqtt.protocol.topics import Topics
from tests.conftest import PATIENCE_S, need, run
from tests.deploy.conftest import DEPLOY, USERS

ROOT = DEPLOY.parent
ADDON = DEPLOY / "home-assistant-addon" / "cesar_mqtt"
COMPOSE = sorted((DEPLOY / "docker").glob("compose*.yaml"))
BLUEPRINT = DEPLOY / "home-assistant" / "blueprints" / "cesar_transcribe.yaml"
PACKAGE = DEPLOY / "home-assistant" / "package.yaml"
FLOW = DEPLOY / "node-red" / "flow.json"


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Knows the tags of Home Assistant, ESPHome and compose: each stands for itself."""


def _tagged(_loader: Loader, tag: str, node: yaml.Node) -> tuple[str, Any]:
    return tag, node.value


for known in ("input", "secret", "lambda", "include_dir_named"):
    Loader.add_multi_constructor(f"!{known}", lambda loader, _suffix, node, tag=known: _tagged(loader, tag, node))
Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader)  # noqa: S506 - a SafeLoader with tags that make no objects


def every(value: Any) -> Iterator[Any]:
    """Each value inside a document, at any depth."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from every(item)


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_file_can_be_read(path: Path) -> None:
    assert isinstance(read(path), dict)


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_one_that_a_plain_shell_reads(path: Path) -> None:
    assert path.stat().st_mode & stat.S_IXUSR
    assert run("sh", "-n", str(path)).returncode == 0


# -- containers --------------------------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_runs_as_nobody_special_and_is_asked_for_its_health() -> None:
    steps = instructions(DEPLOY / "docker" / "Dockerfile")
    last = dict(steps)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"]) == ["cesar-mqtt", "serve"]
    assert json.loads(last["HEALTHCHECK"].partition(" CMD ")[2]) == ["cesar-mqtt", "health"]
    assert last["STOPSIGNAL"] == "SIGTERM"


def test_the_image_is_made_of_what_the_context_lets_through() -> None:
    allowed = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [what for step, what in instructions(DEPLOY / "docker" / "Dockerfile") if step == "COPY"]
    sources = [source for what in copied if "--from" not in what for source in what.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in allowed


def test_every_image_of_others_is_named_by_version_and_digest() -> None:
    services = [service for path in COMPOSE for service in read(path)["services"].values()]
    images = [service["image"] for service in services if "image" in service and "build" not in service]
    images += re.findall(r"eclipse-mosquitto:\S+", (DEPLOY / "docker" / "setup.sh").read_text())
    for path in DEPLOY.rglob("Dockerfile"):
        steps = instructions(path)
        arguments = dict(what.split("=", 1) for step, what in steps if step == "ARG")
        bases = [what.split()[0] for step, what in steps if step == "FROM"]
        images += [re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], base) for base in bases]  # noqa: B023
    for image in images:
        assert re.fullmatch(r"[a-z-]+:\d+\.\d+\.\d+[a-z-]*@sha256:[0-9a-f]{64}", image), image
    assert len(images) >= 5
    assert len({image for image in images if "mosquitto" in image}) == 1
    assert len({image for image in images if "python" in image}) == 1


class SetUp:
    """A copy of `deploy/docker`, what its setup.sh makes there, and what Compose reads of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "docker"
        for name in ("docker", "mosquitto"):
            shutil.copytree(DEPLOY / name, folder / name, ignore=shutil.ignore_patterns("state", "audio", ".env"))

    def run(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return run(str(self.folder / "setup.sh"), *arguments, text=typed, timeout_s=PATIENCE_S)

    @property
    def variables(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.folder / ".env").read_text().splitlines())

    @property
    def documents(self) -> list[dict[str, Any]]:
        return [read(self.folder / name) for name in self.variables["COMPOSE_FILE"].split(":")]

    def missing(self) -> list[str]:
        """What Compose would mount, and is not there: Docker would make a folder of it, owned by root."""
        mounted = [
            volume
            for document in self.documents
            for service in document["services"].values()
            for volume in service.get("volumes", [])
        ]
        mounted += [secret["file"] for document in self.documents for secret in document.get("secrets", {}).values()]
        return [source for source in mounted if not (self.folder / source.split(":")[0]).exists()]

    def settings(self) -> Settings:
        """The consumer's settings, as Compose gives them to it."""
        said: dict[str, str] = {}
        for document in self.documents:
            said |= document["services"].get("cesar-mqtt", {}).get("environment", {})
        filled = {name: self.filled(value) for name, value in said.items() if name != "HF_HOME"}
        return load_settings(flags={}, config_file=None, environ=filled, cwd=Path("/nowhere"))

    def filled(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: self.variables[found[1]], text)


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_set_up_for_ones_own_broker_asks_for_its_password(set_up: SetUp) -> None:
    done = set_up.run("--broker", "mqtt://me@broker.lan:1884", typed="geheim\n")

    assert done.returncode == 0, done.stderr
    assert set_up.missing() == []
    assert [list(document["services"]) for document in set_up.documents] == [["cesar-mqtt"]]
    assert set_up.settings().broker.url == "mqtt://me@broker.lan:1884"
    assert set_up.settings().broker.password_file == Path("/run/secrets/broker-password")
    password = set_up.folder / "state/config/broker-password"
    assert password.read_text() == "geheim\n"
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    assert set_up.variables["CESAR_UID"] != "0"


def test_set_up_again_keeps_the_password_and_the_lines_of_others(set_up: SetUp) -> None:
    assert set_up.run("--broker", "mqtt://me@broker.lan", typed="geheim\n").returncode == 0
    with (set_up.folder / ".env").open("a") as file:
        file.write("CESAR_MEMORY=4g\n")

    done = set_up.run("--broker", "mqtt://me@broker.lan", typed="")

    assert done.returncode == 0, done.stderr
    assert "delete that file" in done.stderr
    assert (set_up.folder / "state/config/broker-password").read_text() == "geheim\n"
    assert set_up.variables["CESAR_MEMORY"] == "4g"


def test_another_broker_has_another_password(set_up: SetUp) -> None:
    assert set_up.run("--broker", "mqtt://me@broker.lan", typed="geheim\n").returncode == 0
    assert set_up.run("--broker", "mqtt://me@other.lan", typed="anders\n").returncode == 0
    assert (set_up.folder / "state/config/broker-password").read_text() == "anders\n"
    assert set_up.settings().broker.url == "mqtt://me@other.lan"
    need("mosquitto_passwd")
    assert set_up.run().returncode == 0
    made = (set_up.folder / "state/config/cesar.password").read_text()
    assert (set_up.folder / "state/config/broker-password").read_text() == made


def test_a_broker_without_passwords_needs_none(set_up: SetUp) -> None:
    assert set_up.run("--broker", "mqtt://broker.lan").returncode == 0
    assert set_up.missing() == []
    assert set_up.settings().broker.password_file is None


def test_the_authority_of_a_broker_is_copied(set_up: SetUp, tmp_path: Path) -> None:
    (tmp_path / "own.pem").write_text("PEM\n")
    done = set_up.run("--broker", "mqtts://me@broker.lan", "--ca", str(tmp_path / "own.pem"), typed="geheim")
    assert done.returncode == 0, done.stderr
    assert set_up.settings().broker.ca_file == Path("/run/ca/ca.pem")
    assert (set_up.folder / "state/ca/ca.pem").read_text() == "PEM\n"
    assert "./state/ca:/run/ca:ro" in set_up.documents[0]["services"]["cesar-mqtt"]["volumes"]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mqtt://me@127.0.0.1", "the container itself"),
        ("mqtt://localhost:1883", "the container itself"),
        ("mqtt://me:geheim@broker.lan", "leave the password out"),
        ("broker.lan", "must be a URL"),
    ],
)
def test_an_address_that_cannot_work_is_rejected(set_up: SetUp, url: str, sentence: str) -> None:
    done = set_up.run("--broker", url)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (set_up.folder / "state/config/broker-password").exists()


@pytest.mark.parametrize("arguments", [["--broker"], ["--ca", "x"], ["--help"], ["--broker", "mqtt://b", "host"]])
def test_a_wrong_call_shows_the_usage(set_up: SetUp, arguments: list[str]) -> None:
    done = set_up.run(*arguments)
    assert done.returncode == 2
    assert "setup.sh --broker URL" in done.stderr
    assert "setup.sh [HOST]" in done.stderr


def test_set_up_with_mosquitto_and_its_certificate(set_up: SetUp) -> None:
    need("mosquitto_passwd")
    assert set_up.run().returncode == 0
    assert set_up.missing() == []
    assert set_up.settings().broker.url == "mqtt://cesar@mosquitto:1883"
    assert set_up.settings().broker.ca_file is None

    done = set_up.run("broker.home.arpa")

    assert done.returncode == 0, done.stderr
    assert set_up.missing() == []
    assert set_up.settings().broker.url == "mqtts://cesar@mosquitto:8883"
    assert set_up.settings().broker.ca_file == Path("/run/ca/ca.pem")
    certificate = run(
        need("openssl"), "x509", "-noout", "-text", "-in", str(set_up.folder / "state/certificates/broker.pem")
    )
    assert "DNS:mosquitto, DNS:broker.home.arpa" in certificate.stdout


def test_every_container_has_a_limit_of_memory_and_no_rights() -> None:
    services = [service for path in COMPOSE for service in read(path)["services"].values() if "image" in service]
    assert len(services) == 2
    for service in services:
        assert service["mem_limit"]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True


def test_the_acl_knows_the_users_that_get_passwords_and_the_front_doors() -> None:
    lines = (DEPLOY / "mosquitto" / "acl").read_text().splitlines()
    users = tuple(line.removeprefix("user ") for line in lines if line.startswith("user "))
    assert users == (*USERS, "web", "inbox", "wyoming")


# -- Home Assistant ----------------------------------------------------------------------------------------------------


def entity_ids() -> set[str]:
    """The ids that Home Assistant gives the entities of a consumer called cesar."""
    (message,) = discovery_messages(Topics("cesar", "cesar"), mode="device", prefix="homeassistant").values()
    told = json.loads(message)
    device = told["device"]["name"]
    names = {(entity["platform"], f"{device} {entity['name']}".lower()) for entity in told["components"].values()}
    return {f"{platform}.{re.sub(r'[^a-z0-9]+', '_', name)}" for platform, name in names}


@pytest.mark.parametrize("path", [PACKAGE, ROOT / "docs" / "homeassistant.md"], ids=lambda path: path.name)
def test_entities_that_are_named_are_announced(path: Path) -> None:
    platforms = "binary_sensor|sensor|event|notify|switch|button"
    named = set(re.findall(rf"\b(?:{platforms})\.cesar_\w+", path.read_text()))
    assert named
    assert named <= entity_ids()


def test_every_input_of_the_blueprint_is_used_and_every_one_used_is_there() -> None:
    document = read(BLUEPRINT)
    used = {value[1] for value in every(document) if isinstance(value, tuple) and value[0] == "input"}
    assert used == set(document["blueprint"]["input"])


def test_what_is_published_from_home_assistant_cannot_get_lost() -> None:
    for path in (PACKAGE, BLUEPRINT):
        published = [
            value["data"]["qos"]
            for value in every(read(path))
            if isinstance(value, dict) and value.get("action") == "mqtt.publish"
        ]
        assert published
        assert set(published) == {1}


# -- the add-on --------------------------------------------------------------------------------------------------------


def test_the_add_on_explains_each_of_its_options() -> None:
    config, told = read(ADDON / "config.yaml"), read(ADDON / "translations" / "en.yaml")
    assert set(told["configuration"]) == set(config["schema"])
    assert set(config["options"]) <= set(config["schema"])
    drain_s = runpy.run_path(str(ADDON / "run.py"))["DRAIN_S"]
    assert drain_s + 30 < config["timeout"]


@pytest.fixture
def supervisor() -> Iterator[str]:
    """A Supervisor that knows of a broker."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/services/mqtt" and self.headers["Authorization"] == "Bearer token"
            data = {"host": "core-mosquitto", "port": 1883, "ssl": False, "username": "addons", "password": "secret"}
            self.send_response(200 if known else 400)
            self.end_headers()
            self.wfile.write(json.dumps({"result": "ok", "data": data}).encode())

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_add_on_takes_the_broker_that_the_supervisor_knows(supervisor: str, tmp_path: Path) -> None:
    program = runpy.run_path(str(ADDON / "run.py"))
    options = read(ADDON / "config.yaml")["options"]
    found = program["broker"](options, {"SUPERVISOR": supervisor, "SUPERVISOR_TOKEN": "token"})
    said = program["settings"](options, found, tmp_path / "password")

    settings = load_settings(flags={}, config_file=None, environ=said, cwd=tmp_path)
    assert settings.broker.url == "mqtt://core-mosquitto:1883"
    assert settings.broker.username == "addons"
    assert settings.audio.directories == (Path("/media"), Path("/share"))
    assert settings.models.download is True
    assert parse_address(settings.web.listen or "")[1] == read(ADDON / "config.yaml")["ingress_port"]
    assert not rules_of(settings).is_loopback
    assert [str(proxy) for proxy in rules_of(settings).proxies] == ["172.30.32.2/32"]
    assert "secret" not in str(said)
    assert (tmp_path / "password").read_text() == "secret\n"
    assert stat.S_IMODE((tmp_path / "password").stat().st_mode) == 0o600


def test_the_repository_of_the_add_on_is_one(tmp_path: Path) -> None:
    """The Supervisor reads `repository.yaml` at the root, and `config.yaml` in the folders below it."""
    folder = shutil.copytree(ADDON.parent, tmp_path / "deploy" / "home-assistant-addon")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    pip = tmp_path / "python"
    pip.write_text('#!/bin/sh\n# stands for pip wheel\ntouch "$7/cesar_mqtt-1-py3-none-any.whl"\n')
    pip.chmod(0o700)
    made = run("env", f"PYTHON={pip}", str(folder / "prepare.sh"), str(tmp_path / "repository"))
    assert made.returncode == 0, made.stderr
    repository = read(tmp_path / "repository" / "repository.yaml")
    assert repository["name"]
    (config,) = (tmp_path / "repository").glob("*/config.yaml")
    assert config.parent.name == read(config)["slug"]
    wheels = {path.name for path in (config.parent / "wheels").iterdir()}
    assert wheels == {"cesar_mqtt-1-py3-none-any.whl", "pyproject.toml", "build.txt", "all.txt"}
    copied = re.findall(r"/wheels/([a-z]+\.(?:txt|toml))", (config.parent / "Dockerfile").read_text())
    assert set(copied) <= wheels


def test_the_add_on_s_page_is_for_the_ingress_and_its_watchdog_reaches_it(supervisor: str, tmp_path: Path) -> None:
    program = runpy.run_path(str(ADDON / "run.py"))
    config = read(ADDON / "config.yaml")
    found = program["broker"](config["options"], {"SUPERVISOR": supervisor, "SUPERVISOR_TOKEN": "token"})
    said = program["settings"](config["options"], found, tmp_path / "password")
    settings = load_settings(flags={}, config_file=None, environ=said, cwd=tmp_path)
    watchdog = urlsplit(config["watchdog"].replace("[HOST]", "172.30.33.5").replace("[PORT:8188]", "8188"))
    assert watchdog.port == config["ingress_port"] == parse_address(settings.web.listen or "")[1]

    async def answer(_request: Request) -> Response:
        return PlainTextResponse("here")

    routes = [Route(path, answer) for path in ("/", watchdog.path, "/api/jobs")]
    page = Starlette(routes=routes, middleware=[Middleware(Guard, rules=rules_of(settings))])

    def status(path: str, peer: str) -> int:
        client = TestClient(page, base_url=f"http://{watchdog.netloc}", client=(peer, 40000))
        return client.get(path).status_code

    assert status("/api/jobs", program["INGRESS_PROXY"]) == 200
    assert status("/api/jobs", "172.30.33.9") == 403, "another add-on"
    assert status(watchdog.path, program["INGRESS_PROXY"]) == 200
    assert status(watchdog.path, "172.30.32.1") == 200


def test_the_add_on_says_what_to_do_when_there_is_no_broker(supervisor: str) -> None:
    program = runpy.run_path(str(ADDON / "run.py"))
    with pytest.raises(program["SetUpError"], match="install the Mosquitto add-on, or set broker_url"):
        program["broker"]({}, {"SUPERVISOR": supervisor, "SUPERVISOR_TOKEN": "another"})
    own = program["broker"]({"broker_url": "mqtt://me@house", "broker_password": "x"}, {})
    assert (own["url"], own["password"]) == ("mqtt://me@house", "x")


# -- Node-RED ----------------------------------------------------------------------------------------------------------


def test_the_flow_is_connected_and_sends_at_qos_1() -> None:
    nodes = json.loads(FLOW.read_text())
    ids = [node["id"] for node in nodes]
    assert len(set(ids)) == len(ids)
    led_to = {target for node in nodes for wires in node.get("wires", []) for target in wires}
    starts = {"tab", "mqtt-broker", "comment", "inject", "watch", "mqtt in"}
    assert led_to == {node["id"] for node in nodes if node["type"] not in starts}
    assert {node["qos"] for node in nodes if node["type"] in ("mqtt in", "mqtt out")} == {"1"}
    assert not any("credentials" in node for node in nodes)


# -- the pages ---------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("homeassistant", "deployment", "security")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_files_and_commands_that_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#:]+)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"(?<![\w/])(?:deploy|tests)/[\w./-]+\w", text):
        assert (ROOT / target).exists() or "state" in target or target == "deploy/docker/audio", target
    known = set(typer.main.get_group(app).commands)
    assert set(re.findall(r"cesar-mqtt`? ([a-z]+)\b", "\n".join(re.findall(r"`[^`\n]+`|^ *\.venv/.*$", text)))) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_settings_on_a_page_are_settings(page: Path) -> None:
    fields = Settings.model_fields
    sections = {name: field.annotation for name, field in fields.items() if isinstance(field.annotation, type)}
    for section, name in re.findall(r"`([a-z]+)\.([a-z_]+)\b", page.read_text()):
        kind = sections.get(section)
        if kind is not None and issubclass(kind, BaseModel):
            assert name in kind.model_fields, f"{section}.{name}"


def test_a_variable_that_kubernetes_makes_for_a_service_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    environ = {"CESAR_SERVICE_HOST": "10.0.0.1"}
    load_settings(flags={}, config_file=None, environ=environ, cwd=tmp_path, on_warning=warnings.append)
    (warning,) = warnings
    assert "CESAR_SERVICE_HOST" in warning
