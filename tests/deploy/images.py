"""The images of `deploy/`, built by podman and run as Compose runs them. `make test-images` installs podman.

Where the base images cannot be pulled, a stand-in of Debian's packages takes their place, which the report says.
"""

import json
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import SPEECH, SPOKEN, wait_until, words
from tests.conftest import Process, need, run
from tests.deploy.conftest import DEPLOY
from tests.deploy.test_files import ADDON, SetUp, read

ROOT = DEPLOY.parent
FOLDER = ROOT / "build" / "images"
IMAGE = "cesar-mqtt:1.1.0"
BUILD_S = 900.0
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
MOSQUITTO = re.findall(r"eclipse-mosquitto:\S+", (DEPLOY / "docker" / "compose.mosquitto.yaml").read_text())[0]
PYTHON = re.findall(r"^ARG PYTHON=(\S+)", (DEPLOY / "docker" / "Dockerfile").read_text(), re.MULTILINE)[0]

pytestmark = [
    pytest.mark.timeout(2 * BUILD_S),
    pytest.mark.filterwarnings("default::tests.deploy.images.BaseIsMissing"),
]


class BaseIsMissing(UserWarning):
    """Shown at the end of the report."""


@dataclass(frozen=True)
class Runtime:
    """podman with a store of its own in `build/`, and the base images that it has."""

    options: tuple[str, ...]
    python: str
    """The tag of the image `python`."""
    mosquitto: str

    def __call__(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *self.options, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, (arguments, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout + ("" if check else done.stderr)

    def run(self, *arguments: str) -> str:
        """Run a container, with limits that every machine can set: podman's own are not allowed everywhere."""
        return self("run", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096", *arguments).strip()

    def log(self, container: str) -> str:
        return self("logs", container, check=False)


def _build_flags() -> tuple[str, ...]:
    return ("--isolation", "chroot", "--network", "host", "--format", "docker", "--layers=false")


@pytest.fixture(scope="session")
def podman() -> Runtime:
    need("podman")
    if os.geteuid() != 0:
        pytest.skip("the containers of this test are root's")
    store = ("--root", f"{FOLDER}/store", "--runroot", f"{FOLDER}/run", "--cgroup-manager", "cgroupfs")
    runtime = ("--runtime", shutil.which("runc") or "crun")
    options = (*store, *runtime, "--storage-driver", "overlay")
    if Runtime(options, "", "")("info", check=False).startswith("Error"):
        options = (*store, *runtime, "--storage-driver", "vfs")
    bare = Runtime(options, PYTHON, MOSQUITTO)
    pulled = [f"python:{PYTHON}", MOSQUITTO]
    if all("Error" not in bare("pull", "--quiet", name, check=False, timeout_s=BUILD_S) for name in pulled):
        return bare
    warnings.warn("the base images cannot be pulled: Debian's packages stand in for them", BaseIsMissing, stacklevel=1)
    if "stand-in" not in bare("images", "--format", "{{.Tag}}"):
        _make_stand_in(bare)
    return Runtime(options, "stand-in", "eclipse-mosquitto:stand-in")


def _make_stand_in(podman: Runtime) -> None:
    """Python, pip and mosquitto of Debian, and the authorities that this machine trusts."""
    base = FOLDER / "base"
    shutil.rmtree(base, ignore_errors=True)
    base.parent.mkdir(parents=True, exist_ok=True)
    packages = "python3-pip,python3-venv,python-is-python3,ca-certificates,mosquitto"
    command = [need("debootstrap"), "--variant=minbase", f"--include={packages}", "bookworm", str(base)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    if made.returncode != 0:
        pytest.skip(f"no base image can be pulled or made: {made.stdout[-300:]}")
    for file in base.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        file.unlink()  # python's image has none
    shutil.copy(AUTHORITIES, base / AUTHORITIES[1:])
    packed = FOLDER / "base.tar"
    subprocess.run(["tar", "-C", str(base), "-cf", str(packed), "."], check=True)
    shutil.rmtree(base)
    variables = [f"--change=ENV {name}={AUTHORITIES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
    for name in ("python:stand-in", "eclipse-mosquitto:stand-in"):
        podman("import", "--quiet", *variables, str(packed), name)
    packed.unlink()


@pytest.fixture(scope="session")
def image(podman: Runtime) -> str:
    podman(
        "build",
        *_build_flags(),
        f"--build-arg=PYTHON={podman.python}",
        "--file=deploy/docker/Dockerfile",
        "--ignorefile=deploy/docker/Dockerfile.dockerignore",
        f"--tag={IMAGE}",
        ".",
        timeout_s=BUILD_S,
    )
    return IMAGE


class Compose:
    """Containers as a service of the compose files describes them, on podman's own network."""

    def __init__(self, podman: Runtime, set_up: SetUp) -> None:
        self._podman = podman
        self._set_up = set_up
        self.started: list[str] = []

    def up(self, name: str, image: str, *more: str) -> str:
        services = [document["services"].get(name, {}) for document in self._set_up.documents]
        service: dict[str, Any] = {}
        for each in services:
            service |= each
        environ = {key: self._set_up.filled(value) for key, value in service.get("environment", {}).items()}
        secrets = {
            key: value["file"] for each in self._set_up.documents for key, value in each.get("secrets", {}).items()
        }
        volumes = [
            *service["volumes"],
            *(f"{secrets[key]}:/run/secrets/{key}:ro" for key in service.get("secrets", [])),
        ]
        container = self._podman.run(
            "--detach",
            f"--user={self._set_up.filled(service['user'])}",
            f"--memory={self._default(service['mem_limit'])}",
            f"--cpus={self._default(service.get('cpus', '0'))}",
            *(f"--env={key}={value}" for key, value in environ.items()),
            *(f"--volume={self._set_up.folder / volume}" for volume in volumes),
            *(f"--tmpfs={folder}" for folder in service.get("tmpfs", [])),
            *(f"--security-opt={option}" for option in service["security_opt"]),
            *(f"--cap-drop={right}" for right in service["cap_drop"]),
            *(["--read-only"] if service["read_only"] else []),
            *more,
            image,
            *service.get("command", []),
        )
        self.started.append(container)
        return container

    def _default(self, text: str) -> str:
        """The value of `${NAME:-default}`, where .env does not say otherwise."""
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: self._set_up.variables.get(found[1], found[2]), text)

    def address(self, container: str) -> str:
        return self._podman("inspect", "--format", "{{.NetworkSettings.IPAddress}}", container).strip()


@pytest.fixture
def compose(podman: Runtime, tmp_path: Path) -> Iterator[Callable[..., tuple[Compose, SetUp]]]:
    """A copy of `deploy/docker`, set up; its containers are removed in the end."""
    begun: list[Compose] = []

    def begin(*arguments: str) -> tuple[Compose, SetUp]:
        set_up = SetUp(tmp_path)
        done = set_up.run(*arguments)
        assert done.returncode == 0, done.stderr
        begun.append(Compose(podman, set_up))
        return begun[-1], set_up

    tmp_path.chmod(0o755)
    yield begin
    for each in begun:
        for container in reversed(each.started):
            podman("rm", "--force", "--time", "0", container, check=False)


def test_the_image_has_the_model_and_all_front_doors_and_is_nobody_special(podman: Runtime, image: str) -> None:
    (described,) = json.loads(podman("inspect", "--type", "image", image))
    assert described["User"] == "10001:10001"
    assert described["Healthcheck"]["Test"] == ["CMD", "cesar-mqtt", "health"]
    listed = podman.run("--rm", image, "models", "list")
    assert re.search(r"^base +package", listed, re.MULTILINE)
    libraries = "import prometheus_client, starlette, watchfiles, wyoming"
    podman.run("--rm", "--entrypoint", "python", image, "-c", libraries)


def test_a_recording_is_transcribed_beside_a_broker_with_passwords(
    podman: Runtime, image: str, compose: Callable[..., tuple[Compose, SetUp]]
) -> None:
    need("mosquitto_passwd")
    files, set_up = compose()
    broker = files.up("mosquitto", podman.mosquitto)
    address = files.address(broker)
    with (set_up.folder / ".env").open("a") as file:
        file.write("CESAR_CPUS=1\n")
    shutil.copy(SPEECH, set_up.folder / "audio" / "porch.wav")
    (set_up.folder / "audio" / "porch.wav").chmod(0o644)
    consumer = files.up("cesar-mqtt", image, f"--add-host=mosquitto:{address}")
    wait_until(lambda: "Connected to" in podman.log(consumer) or not _is_running(podman, consumer))
    assert _is_running(podman, consumer), podman.log(consumer)

    password = (set_up.folder / "state/config/producer.password").read_text().strip()
    client = ("-h", address, "-u", "producer", "-P", password, "-q", "1")
    job = {"job_id": "porch", "audio_path": "porch.wav"}
    subprocess.run([need("mosquitto_pub"), *client, "-t", "cesar/jobs", "-m", json.dumps(job)], check=True, timeout=60)
    status = _retained(client, "cesar/status/porch", lambda status: status["completed_at"] is not None)
    info = _retained(client, "cesar/consumer/cesar/info", lambda _: True)

    assert words(status["result_text"]) == SPOKEN
    assert info["workers"] * info["cpu_threads"] == 1, "one core"
    assert podman("healthcheck", "run", consumer, check=False) == ""
    limit = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
    assert podman("exec", consumer, "sh", "-c", limit).strip() == str(2 << 30)
    podman("stop", "--time", "60", consumer)
    assert podman("inspect", "--format", "{{.State.ExitCode}}", consumer).strip() == "0", podman.log(consumer)
    assert (set_up.folder / "state/data/ledger.json").is_file()

    password = (set_up.folder / "state/config/cesar.password").read_text()
    done = set_up.run("--broker", f"mqtt://cesar@{address}", typed=password)
    assert done.returncode == 0, done.stderr
    again = files.up("cesar-mqtt", image)
    wait_until(lambda: "Connected to" in podman.log(again) or not _is_running(podman, again))
    assert _is_running(podman, again), "for the broker that is there"


def _is_running(podman: Runtime, container: str) -> bool:
    return podman("inspect", "--format", "{{.State.Running}}", container).strip() == "true"


def _retained(client: tuple[str, ...], topic: str, when: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first message on a topic that satisfies `when`."""
    command = [need("mosquitto_sub"), *client, "-t", topic, "-W", "100"]
    with Process(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found: dict[str, Any] = json.loads(line)
            if when(found):
                process.kill()
                return found
    pytest.fail(f"what was expected did not come on {topic}")


def test_the_image_of_the_add_on_starts_with_a_broker_from_its_options(
    podman: Runtime, compose: Callable[..., tuple[Compose, SetUp]], tmp_path: Path
) -> None:
    need("mosquitto_passwd")
    files, set_up = compose()
    address = files.address(files.up("mosquitto", podman.mosquitto))
    prepared = run(str(ADDON / "prepare.sh"), timeout_s=300)
    assert prepared.returncode == 0, prepared.stderr
    addon = shutil.copytree(ADDON, tmp_path / "addon")
    for made in set((ADDON / "wheels").iterdir()) - {ADDON / "wheels" / ".gitignore"}:
        made.unlink()
    dockerfile = addon / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text().replace(f"python:{PYTHON}", f"python:{podman.python}"))
    podman("build", *_build_flags(), f"--file={dockerfile}", "--tag=add-on:test", str(addon), timeout_s=BUILD_S)
    data = tmp_path / "data"
    data.mkdir()
    options = {
        **read(ADDON / "config.yaml")["options"],
        "broker_url": f"mqtt://cesar@{address}",
        "broker_password": (set_up.folder / "state/config/cesar.password").read_text().strip(),
    }
    (data / "options.json").write_text(json.dumps(options))

    container = podman.run("--detach", f"--volume={data}:/data", "add-on:test")
    files.started.append(container)
    expected = ("Connected to", "The page is on")
    wait_until(lambda: all(text in podman.log(container) for text in expected) or not _is_running(podman, container))
    assert _is_running(podman, container), podman.log(container)


def test_everything_that_the_image_installs_has_wheels_for_arm64() -> None:
    done = subprocess.run(
        [
            need("uv"),
            "pip",
            "install",
            "--dry-run",
            "--quiet",
            f"--target={FOLDER}/arm64",
            "--python-platform=aarch64-unknown-linux-gnu",
            "--python-version=3.13",
            "--only-binary=:all:",
            "--require-hashes",
            "--requirement=requirements/run.txt",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
