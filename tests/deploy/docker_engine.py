"""Docker and Compose for the tests of `deploy/`: those of the machine, else Debian's, unpacked into `build/docker`.

A daemon of the tests has its own store in `build/images`, leaves the firewall alone and is stopped in the end.
"""

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.acceptance.harness import wait_until
from tests.conftest import Process, find_free_port, need, run
from tests.deploy.conftest import DEPLOY

ROOT = DEPLOY.parent
UNPACKED = ROOT / "build" / "docker"
STORE = ROOT / "build" / "images"
BUILD_S = 900.0
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
_MOSQUITTO = re.findall(r"eclipse-mosquitto:\S+", (DEPLOY / "docker" / "compose.mosquitto.yaml").read_text())[0]
_PYTHON = re.findall(r"^ARG PYTHON=(\S+)", (DEPLOY / "docker" / "Dockerfile").read_text(), re.MULTILINE)[0]
_PUBLISHED = re.compile(r'^( +- )"(\d+):(\d+)"$', re.MULTILINE)


class BaseIsMissing(UserWarning):
    """Shown at the end of the report."""


@dataclass(frozen=True)
class Docker:
    """A client of one daemon."""

    environ: Mapping[str, str]
    python: str = _PYTHON
    """The tag of the image `python`."""
    mosquitto: str = _MOSQUITTO

    def __call__(self, *arguments: str, timeout_s: float = BUILD_S, check: bool = True) -> str:
        done = subprocess.run(
            ["docker", *arguments],
            cwd=ROOT,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, (arguments, done.stdout[-3000:], done.stderr[-3000:])
        return (done.stdout + ("" if check else done.stderr)).strip()

    def is_running(self, container: str) -> bool:
        return self("inspect", "--format", "{{.State.Running}}", container, check=False) == "true"

    def wait_for_log(self, container: str, *texts: str) -> None:
        def logged() -> str:
            return self("logs", container, check=False)

        wait_until(lambda: all(text in logged() for text in texts) or not self.is_running(container))
        assert self.is_running(container), logged()


@dataclass
class Clone:
    """A copy of this repository, with the images that there are, and published ports that are free."""

    folder: Path
    docker: Docker
    ports: dict[str, int]
    """By the port that is written in the files."""

    @classmethod
    def make(cls, folder: Path, docker: Docker) -> "Clone":
        made = cls(folder, docker, {})
        for name in run("git", "-C", str(ROOT), "ls-files", "-z").stdout.split("\0"):
            if name and (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        for file in (folder / "deploy").rglob("*"):
            if file.suffix in (".yaml", ".sh") or file.name == "Dockerfile":
                file.write_text(made._placed(file.read_text()))
        return made

    def _placed(self, text: str) -> str:
        text = text.replace(_PYTHON, self.docker.python).replace(_MOSQUITTO, self.docker.mosquitto)
        text = re.sub(r"^( +)context: .*\n", r"\g<0>\1network: host\n", text, flags=re.MULTILINE)
        return _PUBLISHED.sub(self._published, text)

    def _published(self, found: re.Match[str]) -> str:
        port = self.ports.setdefault(found[2], find_free_port())
        return f'{found[1]}"127.0.0.1:{port}:{found[3]}"'

    def shell(self, script: str, *, text: str = "", environ: Mapping[str, str] | None = None) -> str:
        """Give commands to a shell, as they are typed in the root of the clone; what they print on stdout."""
        for written, port in self.ports.items():
            script = re.sub(rf"(localhost|127\.0\.0\.1):{written}\b", rf"\1:{port}", script)
        done = subprocess.run(
            ["/bin/sh", "-euc", script],
            cwd=self.folder,
            env={**self.docker.environ, **(environ or {})},
            input=text,
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
        assert done.returncode == 0, (script, done.stdout[-3000:], done.stderr[-5000:])
        return done.stdout


@contextmanager
def daemon() -> Iterator[Docker]:
    """The machine's Docker with Compose 2; else start the unpacked one."""
    if all(
        shutil.which("docker") and run("docker", *said).returncode == 0 for said in (["info"], ["compose", "version"])
    ):
        yield _with_images(Docker(os.environ))
        return
    if os.geteuid() != 0 or not (UNPACKED / ".unpacked").exists():
        pytest.skip("neither Docker with Compose 2 runs here, nor can it be started: that needs root, and Debian's")
    folder = Path(tempfile.mkdtemp(prefix="cesar-mqtt-docker-"))  # a short path, as sockets need
    path = f"{UNPACKED}/usr/bin:{UNPACKED}/usr/sbin:{os.environ['PATH']}:/usr/sbin:/sbin"
    environ = {
        **os.environ,
        "PATH": path,
        "DOCKER_HOST": f"unix://{folder}/docker.sock",
        "DOCKER_CONFIG": f"{UNPACKED}/config",
    }
    docker = Docker(environ)
    had_bridge = Path("/sys/class/net/docker0").exists()
    command = [
        f"{UNPACKED}/usr/sbin/dockerd",
        f"--data-root={STORE}/store",
        f"--exec-root={folder}/exec",
        f"--pidfile={folder}/docker.pid",
        f"--host={environ['DOCKER_HOST']}",
        "--iptables=false",
    ]
    STORE.mkdir(parents=True, exist_ok=True)
    log = (STORE / "dockerd.log").open("w")
    with log, Process(command, env=environ, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: process.poll() is not None or not docker("version", check=False).count("Cannot connect"))
            if process.poll() is not None:
                pytest.skip(f"Docker cannot run on this machine: see {log.name}")
            if left := docker("ps", "--all", "--quiet").split():
                docker("rm", "--force", *left)  # of a run that was killed
            docker("network", "prune", "--force")
            yield _with_images(docker)
        finally:
            process.terminate()
            process.wait(60)
            if not had_bridge:
                run(need("ip"), "link", "delete", "docker0")
            run("umount", f"{folder}/exec/netns/default")
            shutil.rmtree(folder)


def _with_images(docker: Docker) -> Docker:
    """The same, with the base images; where they cannot be pulled, with a stand-in of Debian's packages."""
    pulled = [f"python:{docker.python}", docker.mosquitto]
    if all("rror" not in docker("pull", "--quiet", name, check=False) for name in pulled):
        return docker
    warnings.warn("the base images cannot be pulled: Debian's packages stand in for them", BaseIsMissing, stacklevel=1)
    if "stand-in" not in docker("images", "--format", "{{.Tag}}"):
        _make_stand_in(docker)
    return replace(docker, python="stand-in", mosquitto="eclipse-mosquitto:stand-in")


def _make_stand_in(docker: Docker) -> None:
    """Python, pip and mosquitto of Debian, and the authorities that this machine trusts."""
    base = STORE / "base"
    shutil.rmtree(base, ignore_errors=True)
    packages = "python3-pip,python3-venv,python-is-python3,ca-certificates,mosquitto"
    command = [need("debootstrap"), "--variant=minbase", f"--include={packages}", "bookworm", str(base)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    if made.returncode != 0:
        pytest.skip(f"no base image can be pulled or made: {made.stdout[-300:]}")
    for file in base.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        file.unlink()  # python's image has none
    shutil.copy(_AUTHORITIES, base / _AUTHORITIES[1:])
    packed = STORE / "base.tar"
    subprocess.run(["tar", "-C", str(base), "-cf", str(packed), "."], check=True)
    shutil.rmtree(base)
    variables = [f"--change=ENV {name}={_AUTHORITIES}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
    for name in ("python:stand-in", "eclipse-mosquitto:stand-in"):
        docker("import", *variables, str(packed), name)
    packed.unlink()
