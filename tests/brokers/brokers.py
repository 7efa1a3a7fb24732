"""Brokers of several makes, each as its own process on loopback, with an access list and a limit where asked for.

The consumer connects with the user name `cesar` where the broker has users; other clients are anonymous if they may.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from tests.conftest import find_free_port, run

START_S = 60.0
DENIED = "homeassistant"
"""The first level of the topics that the access list denies to the consumer: discovery messages."""
LIMIT_BYTES = 3000
PASSWORD = "secret"  # noqa: S105 - of a broker on loopback, for one test
AEDES = Path(__file__).parents[2] / "build" / "aedes"


class Broker(ABC):
    """A broker that may be restarted on the same port with the same files.

    Attributes:
        name: as the table of docs/brokers.md has it.
        tried: the version that the table is about.
        url: where the consumer connects to.
        port: where anonymous clients connect to.
    """

    name: ClassVar[str]
    tried: ClassVar[str]
    has_users: ClassVar[bool] = True
    watcher: ClassVar[tuple[str, str] | None] = None
    """User and password of the other clients; None: they are anonymous."""
    keeps: ClassVar[bool] = True
    """Whether sessions and retained messages outlive a restart."""

    def __init__(self, folder: Path, *, denies: bool = False, limits: bool = False) -> None:
        """Prepare its files.

        Args:
            folder: for them.
            denies: whether the consumer may not publish on topics that begin with `DENIED`.
            limits: whether messages, or packets, may not have more than `LIMIT_BYTES`.
        """
        self.folder = folder
        self.port = find_free_port()
        user = f"cesar:{PASSWORD}@" if self.has_users else ""
        self.url = f"mqtt://{user}127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.prepare(denies=denies, limits=limits)

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be started here; None: it can."""

    @abstractmethod
    def prepare(self, *, denies: bool, limits: bool) -> None:
        """Write its configuration."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command that runs it in the foreground."""

    def environ(self) -> Mapping[str, str]:
        """What its environment has beyond that of the tests."""
        return {}

    def start(self) -> None:
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**os.environ, **self.environ()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        pause = threading.Event()
        deadline = time.monotonic() + START_S
        while not self._is_serving():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start:\n{self.logged()[-3000:]}")
            pause.wait(0.1)

    def _is_serving(self) -> bool:
        """Whether it answers a ping of a client: some listen before they are ready."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2.0) as probe:
            probe.sendall(b"\x10\x10\0\4MQTT\4\2\0\x3c\0\4ping")
            return probe.recv(4)[:1] == b"\x20"
        return False

    def stop(self) -> None:
        """End it, and every process that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(START_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(START_S)

    def restart(self) -> None:
        self.stop()
        self.start()

    def logged(self) -> str:
        return (self.folder / "broker.log").read_text(errors="replace")


def _without(program: str) -> str | None:
    return None if shutil.which(program, path=_PATH) else f"{program} is not installed"


_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/sbin"])


def _found(program: str) -> str:
    path = shutil.which(program, path=_PATH)
    if path is None:
        raise FileNotFoundError(program)
    return path


class Mosquitto(Broker):
    """Without a limit on queued messages version 2.0.11 closes the connection at a denied publish."""

    name, tried = "mosquitto", "2.0.11"

    @classmethod
    def missing(cls) -> str | None:
        return _without("mosquitto") or _without("mosquitto_passwd")

    def prepare(self, *, denies: bool, limits: bool) -> None:
        passwords, access = self.folder / "passwords", self.folder / "acl"
        passwords.touch(mode=0o600)
        run(_found("mosquitto_passwd"), "-b", str(passwords), "cesar", PASSWORD)
        allowed = "cesar/#" if denies else "#"
        access.write_text(f"topic readwrite #\nuser cesar\ntopic readwrite {allowed}\ntopic read #\n")
        lines = [
            "user root",
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            f"password_file {passwords}",
            f"acl_file {access}",
            "max_queued_messages 0",
            "persistence true",
            f"persistence_location {self.folder}/",
            *([f"message_size_limit {LIMIT_BYTES}"] if limits else []),
        ]
        (self.folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        return [_found("mosquitto"), "-c", str(self.folder / "mosquitto.conf")]


class Nats(Broker):
    """The NATS server: MQTT 3.1.1 over JetStream."""

    name, tried = "NATS", "2.15.1"

    @classmethod
    def missing(cls) -> str | None:
        return _without("nats-server")

    def prepare(self, *, denies: bool, limits: bool) -> None:
        permissions = f', permissions: {{publish: {{deny: ["{DENIED}.>"]}}}}' if denies else ""
        text = f"""
            server_name: tests
            host: 127.0.0.1
            port: {find_free_port()}
            jetstream {{store_dir: "{self.folder}/jetstream", max_mem: 64MB, max_file: 256MB}}
            mqtt {{host: 127.0.0.1, port: {self.port}, no_auth_user: other}}
            {f"max_payload: {LIMIT_BYTES}" if limits else ""}
            authorization {{users: [
                {{user: cesar, password: {PASSWORD}{permissions}}}
                {{user: other, password: other}}
            ]}}
        """
        (self.folder / "nats.conf").write_text(text)

    def command(self) -> list[str]:
        return [_found("nats-server"), "-c", str(self.folder / "nats.conf")]


class RabbitMq(Broker):
    """RabbitMQ with its MQTT plugin, of Debian."""

    name, tried = "RabbitMQ", "3.10.8"
    _BIN = Path("/usr/lib/rabbitmq/bin")

    @classmethod
    def missing(cls) -> str | None:
        return None if (cls._BIN / "rabbitmq-server").exists() else "rabbitmq-server is not installed"

    def prepare(self, *, denies: bool, limits: bool) -> None:
        self._epmd_port, self._dist_port, amqp_port = find_free_port(), find_free_port(), find_free_port()
        (self.folder / "plugins").write_text("[rabbitmq_mqtt].\n")
        everything = {"vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
        topics = {"user": "cesar", "vhost": "/", "exchange": "amq.topic", "read": ".*", "write": f"^(?!{DENIED}).*"}
        users = [
            {"name": name, "password": password, "tags": ""}
            for name, password in (("cesar", PASSWORD), ("guest", "guest"))
        ]
        definitions = {
            "users": users,
            "vhosts": [{"name": "/"}],
            "permissions": [{"user": user["name"], **everything} for user in users],
            "topic_permissions": [topics] if denies else [],
        }
        (self.folder / "definitions.json").write_text(json.dumps(definitions))
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{amqp_port}",
            f"mqtt.listeners.tcp.1 = 127.0.0.1:{self.port}",
            "mqtt.allow_anonymous = true",
            "mqtt.subscription_ttl = 86400000",
            f"load_definitions = {self.folder}/definitions.json",
            *([f"max_message_size = {LIMIT_BYTES}"] if limits else []),
        ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")

    def command(self) -> list[str]:
        return [str(self._BIN / "rabbitmq-server")]

    def environ(self) -> Mapping[str, str]:
        return {
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": f"cesar{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def stop(self) -> None:
        super().stop()
        run("epmd", "-port", str(self._epmd_port), "-kill")


class Aedes(Broker):
    """aedes, in memory."""

    name, tried = "aedes", "1.2.0"
    has_users = False
    keeps = False

    @classmethod
    def missing(cls) -> str | None:
        installed = (AEDES / "node_modules" / "aedes").exists()
        return _without("node") or (None if installed else "aedes is not installed")

    def prepare(self, *, denies: bool, limits: bool) -> None:
        self._arguments = [DENIED if denies else "", str(LIMIT_BYTES if limits else 0)]

    def command(self) -> list[str]:
        return [_found("node"), str(AEDES / "aedes.mjs"), str(self.port), *self._arguments]


class Ejabberd(Broker):
    """ejabberd with its MQTT module, of Debian."""

    name, tried = "ejabberd", "23.01"
    watcher = ("watcher@localhost", PASSWORD)

    @classmethod
    def missing(cls) -> str | None:
        return _without("ejabberdctl") or _without("erl")

    def prepare(self, *, denies: bool, limits: bool) -> None:
        self.url = f"mqtt://cesar%40localhost:{PASSWORD}@127.0.0.1:{self.port}"
        access = {f"{DENIED}/#": "deny", "cesar/#": "allow"} if denies else {}
        publish = "access_publish:" if denies else ""
        publish += "".join(f'\n      "{topics}":\n        - {rule}' for topics, rule in access.items())
        limit = f"max_payload_size: {LIMIT_BYTES}" if limits else ""
        (self.folder / "ejabberd.yml").write_text(
            f"""
hosts: [localhost]
loglevel: info
auth_method: [mnesia, anonymous]
anonymous_protocol: login_anon
allow_multiple_connections: true
listen:
  - port: {self.port}
    ip: "127.0.0.1"
    module: mod_mqtt
    backlog: 100
    {limit}
modules:
  mod_mqtt:
    session_expiry: 86400
    {publish}
"""
        )

    def command(self) -> list[str]:
        code = next(Path("/usr/lib").glob("*/ejabberd-*/ebin/ejabberd.app")).parent
        folder = f'"{self.folder}/mnesia"'
        return [_found("erl"), "-noinput", "-pa", str(code), "-mnesia", "dir", folder, "-s", "ejabberd"]

    def environ(self) -> Mapping[str, str]:
        return {
            "EJABBERD_CONFIG_PATH": str(self.folder / "ejabberd.yml"),
            "EJABBERD_LOG_PATH": str(self.folder / "e.log"),
        }


BROKERS: tuple[type[Broker], ...] = (Mosquitto, Nats, RabbitMq, Aedes, Ejabberd)
