"""The images and compose files of `deploy/`, built and run by Docker. `make test-images` fetches it.

Where the base images cannot be pulled, a stand-in of Debian's packages takes their place, which the report says.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from cesar_mqtt.whisper.packages import PackagedModels
from tests.acceptance.harness import PATIENCE_S, SPEECH, SPOKEN, wait_until, words
from tests.acceptance.test_documents import blocks, environment
from tests.acceptance.test_web_browser import DROP, browser, open_tab, row
from tests.conftest import Mosquitto, find_free_port, need
from tests.deploy.docker_engine import BUILD_S, ROOT, STORE, Clone, Docker, daemon
from tests.deploy.test_files import read

__all__ = ["browser", "open_tab"]  # the tabs of the tests of the page

pytestmark = [
    pytest.mark.timeout(2 * BUILD_S),
    pytest.mark.filterwarnings("default::tests.deploy.docker_engine.BaseIsMissing"),
]

IMAGE = "cesar-mqtt:1.1.0"
DEPLOYMENT = ROOT / "docs" / "deployment.md"
MANY_MACHINES = ROOT / "docs" / "many-machines.md"


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    with daemon() as started:
        yield started


@pytest.fixture
def clone(docker: Docker, tmp_path: Path) -> Iterator[Clone]:
    """A clone in which Compose can be started; in the end its containers and networks are removed."""
    tmp_path.chmod(0o755)
    made = Clone.make(tmp_path / "clone", docker)
    yield made
    for folder in ("docker", "nats"):
        if (made.folder / "deploy" / folder / ".env").exists():
            made.shell(f"cd deploy/{folder} && docker compose down --timeout 0 --volumes")


def page_block(page: Path, *texts: str) -> str:
    """The block of a page that has all these texts."""
    (block,) = [block for block in blocks(page) if all(text in block for text in texts)]
    return block


def submitted(clone: Clone, folder: str, script: str, tmp_path: Path) -> list[str]:
    """The words of the transcript that a `submit` of a page prints."""
    return words(clone.shell(f"cd {folder}\n{script}", environ=typing(tmp_path)))


def typing(folder: Path) -> dict[str, str]:
    """What the shell of a person has, in which `cesar-mqtt` is this one."""
    if not (folder / "bin").exists():
        environment(folder, "")
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def test_the_image_has_the_model_and_all_front_doors_and_is_nobody_special(docker: Docker, clone: Clone) -> None:
    built = next(line for line in page_block(DEPLOYMENT, "docker build").replace("\\\n", " ").splitlines())
    clone.shell(built.replace("docker build", "docker build --network host"))
    (described,) = json.loads(docker("inspect", "--type", "image", IMAGE))
    assert described["Config"]["User"] == "10001:10001"
    assert described["Config"]["Healthcheck"]["Test"] == ["CMD", "cesar-mqtt", "health"]
    assert re.search(r"^base +package", docker("run", "--rm", IMAGE, "models", "list"), re.MULTILINE)
    libraries = "import prometheus_client, starlette, watchfiles, wyoming"
    docker("run", "--rm", "--entrypoint", "python", IMAGE, "-c", libraries)
    assert words(docker("run", "--rm", IMAGE, "demo"))


def test_compose_starts_a_consumer_for_the_broker_that_is_there(clone: Clone, tmp_path: Path) -> None:
    gateway = clone.docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    port = find_free_port()
    broker = Mosquitto(tmp_path, [f"listener {port} {gateway}"], users={"cesar": "geheim"})
    broker.start()
    try:
        typed = page_block(DEPLOYMENT, "--broker", "logs --follow").replace("docker compose logs --follow", "")
        typed = typed.replace("192.168.1.2", f"host.docker.internal:{port}")
        clone.shell(typed, text="geheim\n")
        clone.docker.wait_for_log("cesar-mqtt-cesar-mqtt-1", "Connected to")
        shutil.copy(SPEECH, clone.folder / "deploy" / "docker" / "audio" / "porch.wav")
        (clone.folder / "deploy" / "docker" / "audio" / "porch.wav").chmod(0o644)
        command = f"cesar-mqtt submit --by-path porch.wav --broker mqtt://cesar:geheim@127.0.0.1:{broker.port}"
        assert submitted(clone, "deploy/docker/audio", command, tmp_path) == SPOKEN
    finally:
        broker.kill()


def test_compose_starts_a_broker_with_passwords_beside_the_consumer(
    docker: Docker, clone: Clone, tmp_path: Path
) -> None:
    folder = clone.folder / "deploy" / "docker"
    (folder / ".env").write_text("CESAR_CPUS=1\n")
    typed = next(block for block in blocks(DEPLOYMENT) if block.startswith("./setup.sh\n"))
    # As on a machine that has Docker alone: the passwords are made in a container of the broker's image.
    few = tmp_path / "few"
    few.mkdir()
    for program in (*Path("/usr/bin").iterdir(), *Path("/bin").iterdir()):
        if program.name not in ("mosquitto_passwd", "docker") and not (few / program.name).exists():
            (few / program.name).symlink_to(program)
    path = f"{Path(shutil.which('docker', path=docker.environ['PATH']) or '').parent}:{few}"
    clone.shell(f"cd deploy/docker\n{typed}", environ={"PATH": path})
    consumer = "cesar-mqtt-cesar-mqtt-1"
    docker.wait_for_log(consumer, "Connected to")

    shutil.copy(SPEECH, folder / "speech.wav")
    command = page_block(DEPLOYMENT, "export CESAR_BROKER__USERNAME").replace("127.0.0.1", "127.0.0.1:1883")
    assert submitted(clone, "deploy/docker", command, tmp_path) == SPOKEN

    docker("exec", consumer, "cesar-mqtt", "health")
    limit = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
    assert docker("exec", consumer, "sh", "-c", limit) == str(2 << 30)
    assert docker("inspect", "--format", "{{.HostConfig.NanoCpus}}", consumer) == str(10**9)
    clone.shell("cd deploy/docker && docker compose stop")
    assert docker("inspect", "--format", "{{.State.ExitCode}}", consumer) == "0", docker("logs", consumer, check=False)
    assert (folder / "state/data/ledger.json").is_file()


def test_compose_starts_a_broker_with_tls(clone: Clone, tmp_path: Path) -> None:
    need("mosquitto_passwd")
    typed = page_block(DEPLOYMENT, "./setup.sh HOST").replace("HOST", "localhost")
    clone.shell(f"cd deploy/docker\n{typed}")
    clone.docker.wait_for_log("cesar-mqtt-cesar-mqtt-1", "Connected to")
    shutil.copy(SPEECH, clone.folder / "deploy" / "docker" / "speech.wav")
    command = page_block(DEPLOYMENT, "export CESAR_BROKER__USERNAME").replace(
        "mqtt://127.0.0.1", "mqtts://localhost:8883"
    )
    authority = "export CESAR_BROKER__CA_FILE=state/certificates/ca.pem"
    assert submitted(clone, "deploy/docker", f"{authority}\n{command}", tmp_path) == SPOKEN


def test_compose_starts_three_servers_and_two_consumers(docker: Docker, clone: Clone, tmp_path: Path) -> None:
    clone.shell(page_block(MANY_MACHINES, "docker compose"))
    for name in ("attic", "cellar"):
        docker.wait_for_log(f"cesar-mqtt-cluster-{name}-1", "The queue CESAR")
    command = page_block(MANY_MACHINES, "export ")
    printed = submitted(clone, "deploy/nats", command, tmp_path)
    assert printed[: len(SPOKEN)] == SPOKEN
    assert "completed" in printed[len(SPOKEN) :], "another server lists it"


@pytest.fixture
def supervised(docker: Docker) -> Iterator[Callable[..., str]]:
    """Run a container in the network that the Supervisor gives its add-ons; its id."""
    started: list[str] = []
    docker("network", "create", "--subnet=172.30.32.0/23", "--gateway=172.30.32.1", "cesar-test-supervisor")

    def start(address: str, *arguments: str) -> str:
        network = ("--network=cesar-test-supervisor", f"--ip={address}", "--add-host=supervisor:172.30.32.2")
        started.append(docker("run", "--detach", *network, *arguments))
        return started[-1]

    yield start
    for container in started:
        docker("rm", "--force", container)
    docker("network", "rm", "cesar-test-supervisor")


def test_the_add_on_takes_the_supervisor_s_broker_and_shows_its_page_through_the_ingress(
    docker: Docker, clone: Clone, supervised: Callable[..., str], open_tab: Callable[..., Tab], tmp_path: Path
) -> None:
    gateway, at_supervisor, at_addon = "172.30.32.1", "172.30.32.2", "172.30.33.5"
    clone.shell("deploy/home-assistant-addon/prepare.sh")
    addon = clone.folder / "deploy" / "home-assistant-addon" / "cesar_mqtt"
    docker("build", "--network=host", "--tag=cesar-test-add-on", str(addon))
    config = read(addon / "config.yaml")
    data = tmp_path / "data"
    data.mkdir()
    (data / "options.json").write_text(json.dumps({**config["options"], "model": "tiny.en"}))
    model = PackagedModels(tmp_path / "models").find("tiny.en")
    assert model is not None
    port, page_port = find_free_port(), find_free_port()
    broker = Mosquitto(tmp_path, [f"listener {port} {gateway}"], users={"addons": "secret"})
    broker.start()
    try:
        known = {"host": gateway, "port": port, "ssl": False, "username": "addons", "password": "secret"}
        program = Path(__file__).with_name("supervisor.py")
        supervisor = (f"--publish=127.0.0.1:{page_port}:80", f"--volume={program}:/supervisor.py:ro")
        told = ("/supervisor.py", at_addon, json.dumps(known))
        supervised(at_supervisor, *supervisor, f"python:{docker.python}", "python", *told)
        # The model is not in the image, and the hub may be out of reach.
        offline = ("--env=CESAR_MODELS__DIRECTORY=/models", f"--volume={model}:/models/tiny.en:ro")
        options = (f"--volume={data}:/data", "--env=SUPERVISOR_TOKEN=token", *offline)
        container = supervised(at_addon, *options, "cesar-test-add-on")
        docker.wait_for_log(container, "Connected to", "The page is on")

        watchdog = config["watchdog"].replace("[HOST]", at_addon).replace("[PORT:8188]", "8188")
        wait_until(lambda: httpx2.get(watchdog, timeout=PATIENCE_S).status_code == 200)
        assert httpx2.get(f"http://{at_addon}:8188/api/jobs").status_code == 403, "only through the ingress"
        tab = open_tab()
        tab.goto(f"http://127.0.0.1:{page_port}/api/hassio_ingress/a-token/")
        tab.evaluate(DROP, [["call.wav", list(SPEECH.read_bytes())]])
        expect(row(tab, "call.wav")).to_contain_text("completed")
        row(tab, "call.wav").get_by_role("button", name="call.wav", exact=True).click()
        expect(tab.get_by_role("dialog").locator(".word")).to_have_count(len(SPOKEN))
        assert words(tab.get_by_role("dialog").locator("#transcript").inner_text()) == SPOKEN

        docker("exec", container, "python", "/run.py", "health")
        docker("stop", "--time", str(config["timeout"]), container)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
    finally:
        broker.kill()


@pytest.mark.parametrize("name", ["build", "run", "all"])
def test_everything_that_is_installed_has_wheels_for_arm64(name: str) -> None:
    done = subprocess.run(
        [
            need("uv"),
            "pip",
            "install",
            "--dry-run",
            "--quiet",
            f"--target={STORE}/arm64",
            "--python-platform=aarch64-unknown-linux-gnu",
            "--python-version=3.13",
            "--only-binary=:all:",
            *(f"--no-binary={pure}" for pure in ("nkeys", "srt")),  # no wheel for any machine, and nothing to compile
            "--require-hashes",
            f"--requirement=requirements/{name}.txt",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
