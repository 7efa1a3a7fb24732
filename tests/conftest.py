"""Brokers for the tests: Debian's mosquitto as its own process, and the embedded one. All of them on loopback."""

import atexit
import functools
import getpass
import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import pytest
from hypothesis import settings

from cesar_mqtt.mqtt.embedded import EmbeddedBroker

PATIENCE_S = 120.0
"""How long a test waits for what has to happen; only a failure, or a machine with far too much to do, takes it."""

# What a shell starts in the background ignores SIGINT, and what nohup starts SIGHUP; so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

IN_CI = os.environ.get("CI") == "true"

# In CI a property is tried on the same examples every time; on a laptop on others each time, which finds more.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("laptop", deadline=None)
settings.load_profile("ci" if IN_CI else "laptop")


def pytest_configure() -> None:
    """Keep idle threads of OpenMP and OpenBLAS from spinning on cores that other tests need.

    Before numpy and the first model are loaded, here or in a process of a test.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """What sets logging up, or quietens a library, does so for good: right for a process, wrong for the next test."""
    loggers = [logging.getLogger(name) for name in ("", "cesar_mqtt", "amqtt", "transitions", "huggingface_hub")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    logging.captureWarnings(capture=False)
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Report captured output also where a test logged half a surrogate pair, which no worker process can send."""
    return _encodable((yield))


def _encodable(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode(errors="backslashreplace").decode()
    if isinstance(data, dict):
        return {key: _encodable(value) for key, value in data.items()}
    return type(data)(_encodable(value) for value in data) if isinstance(data, list | tuple) else data


# A port that is free now is used a moment later, and again after a restart of what listens there. Below 32768 no system
# takes one for an outgoing connection or for port 0. Each process that runs tests has a range of its own, also beside
# other runs on this machine: it has the range whose first port it listens on.
_PORTS_EACH = 400
_RANGES = range(20_000, 32_400, _PORTS_EACH)


@functools.cache
def _own_ports() -> Iterator[int]:
    for first in _RANGES:
        with suppress(OSError):
            atexit.register(socket.create_server(("127.0.0.1", first)).close)
            return itertools.cycle(range(first + 1, first + _PORTS_EACH))
    pytest.fail("too many processes run tests on this machine")


def find_free_port() -> int:
    for port in itertools.islice(_own_ports(), _PORTS_EACH):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    pytest.fail("there is no free port")


def report_missing(reason: str) -> NoReturn:
    """A component is missing: the test is skipped on a laptop, and fails in CI."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


def need(program: str) -> str:
    """The program's path; without it: see `report_missing`."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    return path or report_missing(f"{program} is not installed")


def run(*command: str, timeout_s: float = PATIENCE_S, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s, check=False)


class Process(subprocess.Popen[Any]):
    """A process that its `with` block ends: a test that fails in the block must not wait for it for ever."""

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, exc, traceback)


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, a broker's certificate for 127.0.0.1 and localhost, a client's."""

    ca: Path
    broker: Path
    broker_key: Path
    client: Path
    client_key: Path
    other_ca: Path


class Mosquitto:
    """One mosquitto process, which may be stopped and started again on the same port with the same files."""

    def __init__(self, folder: Path, options: Sequence[str], *, users: dict[str, str] | None = None) -> None:
        self.port = find_free_port()
        self.folder = folder
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.log: list[str] = []
        self._program = need("mosquitto")
        self._logged = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._config = folder / "mosquitto.conf"
        lines = [f"user {getpass.getuser()}", f"listener {self.port} 127.0.0.1", *options]
        self.passwords = folder / "passwords"
        if users is None:
            lines.append("allow_anonymous true")
        else:
            self.set_users(users)
            lines += ["allow_anonymous false", f"password_file {self.passwords}"]
        self._config.write_text("\n".join(lines) + "\n")

    def set_users(self, users: dict[str, str]) -> None:
        self.passwords.write_text("")
        for user, password in users.items():
            run(need("mosquitto_passwd"), "-b", str(self.passwords), user, password)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self.log.clear()
        command = [self._program, "-v", "-c", str(self._config)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        if not self._is_serving(self._process):
            self.kill()
            pytest.fail("mosquitto did not start: " + "".join(self.log))

    def _is_serving(self, process: "subprocess.Popen[str]") -> bool:
        """Connect until the broker notices it: what it logs before it listens differs between its versions.

        It heeds SIGTERM only in its main loop, which logs connections.
        """
        pause = threading.Event()
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            with (
                suppress(ConnectionRefusedError),
                socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S),
            ):
                return self.wait_logged("New connection")
            pause.wait(0.01)
        return False

    def wait_logged(self, text: str, timeout_s: float = PATIENCE_S) -> bool:
        """Wait until a line with this text has been logged since the last start."""
        with self._logged:
            return self._logged.wait_for(lambda: any(text in line for line in self.log), timeout_s)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._logged:
                self.log.append(line)
                self._logged.notify_all()

    def stop(self) -> None:
        self._end(kill=False)

    def kill(self) -> None:
        self._end(kill=True)

    def restart(self, *, kill: bool = False) -> None:
        self._end(kill=kill)
        self.start()

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill() if kill else process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE_S)
        if self._reader is not None:
            self._reader.join(PATIENCE_S)
        if process.stderr is not None:
            process.stderr.close()


class StartMosquitto(Protocol):
    def __call__(self, *options: str, persistence: bool = False, users: dict[str, str] | None = None) -> Mosquitto: ...


@pytest.fixture(autouse=True)
def _mosquitto_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("mosquitto"):
        for program in ("mosquitto", "mosquitto_passwd", "mosquitto_pub", "mosquitto_sub"):
            need(program)


@pytest.fixture
def free_port() -> int:
    return find_free_port()


@pytest.fixture
def start_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartMosquitto]:
    """A function that starts a mosquitto with further lines of configuration; all of them are stopped in the end."""
    started: list[Mosquitto] = []

    def start(*options: str, persistence: bool = False, users: dict[str, str] | None = None) -> Mosquitto:
        folder = tmp_path_factory.mktemp("mosquitto")
        kept = ("persistence true", f"persistence_location {folder}/") if persistence else ()
        broker = Mosquitto(folder, [*kept, *options], users=users)
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.kill()  # nothing of it is needed any more


@pytest.fixture
def mosquitto(start_mosquitto: StartMosquitto) -> Mosquitto:
    """A mosquitto that keeps nothing over a restart and lets everybody in."""
    return start_mosquitto()


@pytest.fixture
def embedded_broker() -> Iterator[EmbeddedBroker]:
    broker = EmbeddedBroker(port=0)
    broker.start()
    yield broker
    broker.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    for authority in ("ca", "other"):
        _openssl(
            folder,
            "req",
            "-x509",
            "-subj",
            f"/CN={authority}",
            "-keyout",
            f"{authority}.key",
            "-out",
            f"{authority}.pem",
        )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("broker", "client"):
        _openssl(folder, "req", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
        signed = run(
            "openssl",
            "x509",
            "-req",
            "-in",
            f"{folder}/{name}.csr",
            "-out",
            f"{folder}/{name}.pem",
            *[f"{folder}/{part}" if (folder / part).exists() else part for part in signing],
        )
        assert signed.returncode == 0, signed.stderr
    pem = {name: folder / f"{name}.pem" for name in ("ca", "broker", "client", "other")}
    return Certificates(
        pem["ca"], pem["broker"], folder / "broker.key", pem["client"], folder / "client.key", pem["other"]
    )


def _openssl(folder: Path, *arguments: str) -> None:
    placed = [f"{folder}/{part}" if part.endswith((".key", ".pem", ".csr")) else part for part in arguments]
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    result = run(need("openssl"), *placed, *key)
    assert result.returncode == 0, result.stderr
