"""What `deploy/` is run with: its own files with the paths of a test in them, a broker, consumers and clients."""

import getpass
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.conftest import serve
from tests.conftest import PATIENCE_S, Mosquitto, need, run

__all__ = ["serve"]  # consumers, as in the acceptance tests

DEPLOY = Path(__file__).parents[2] / "deploy"
USERS = ("cesar", "producer", "homeassistant")


class DeployedMosquitto(Mosquitto):
    """mosquitto as `deploy/mosquitto` configures it, on a free port of loopback, with a folder of its own."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        super().__init__(folder, ())
        self.passwords = folder / "config" / "passwords"
        text = (DEPLOY / "mosquitto" / name).read_text()
        listening = next(line for line in text.splitlines() if line.startswith("listener "))
        text = text.replace(listening, f"listener {self.port} 127.0.0.1")
        text = text.replace("/mosquitto/", f"{folder}/").replace("log_dest stdout", "log_dest stderr")
        more = ["log_type all", f"user {getpass.getuser()}", *options]
        self._config.write_text("\n".join([text, *more]) + "\n")

    def password(self, user: str) -> str:
        return (self.folder / "config" / f"{user}.password").read_text().strip()


@dataclass(frozen=True)
class Client:
    """mosquitto's own clients as one user of the broker."""

    broker: DeployedMosquitto
    user: str
    password: str
    flags: tuple[str, ...] = ()

    def pub(self, topic: str, message: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = ("-V", "5", "-q", "1", "-t", topic, "-m", message, *flags)
        return run(need("mosquitto_pub"), *self._flags(), *command)

    def sub(self, topic: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return run(need("mosquitto_sub"), *self._flags(), "-V", "5", "-t", topic, *flags, timeout_s=PATIENCE_S)

    def _flags(self) -> tuple[str, ...]:
        return ("-h", "127.0.0.1", "-p", str(self.broker.port), "-u", self.user, "-P", self.password, *self.flags)


StartDeployed = Callable[..., DeployedMosquitto]


@pytest.fixture
def start_deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDeployed]:
    """Start mosquitto with one of the configurations of `deploy/mosquitto`, passwords made as its script makes them."""
    started: list[DeployedMosquitto] = []

    def start(name: str, *options: str, client: str | None = None) -> DeployedMosquitto:
        folder = tmp_path_factory.mktemp("deployed")
        (folder / "data").mkdir()
        script("make-passwords.sh", str(folder / "config"))
        (folder / "config" / "acl").write_text((DEPLOY / "mosquitto" / "acl").read_text())
        (folder / "config" / "acl").chmod(0o600)
        if "tls" in name:
            clients = () if client is None else (client,)
            script("make-certificates.sh", str(folder / "config" / "certificates"), "mosquitto,127.0.0.1", *clients)
        broker = DeployedMosquitto(folder, name, *options)
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.kill()


def script(name: str, *arguments: str) -> str:
    """Run a script of `deploy/mosquitto`; what it printed."""
    need("openssl")
    need("mosquitto_passwd")
    done = run(str(DEPLOY / "mosquitto" / name), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
