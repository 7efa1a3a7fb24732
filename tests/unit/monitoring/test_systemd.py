import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.monitoring.systemd import Notifier


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """The service manager's end of the line; a receive has a deadline."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.settimeout(10.0)
        yield end


def test_each_state_arrives_as_one_datagram(manager: socket.socket, tmp_path: Path) -> None:
    manager.bind(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert notifier.ready()
    assert notifier.alive()
    assert notifier.stopping()
    assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_an_abstract_socket_is_reached(manager: socket.socket) -> None:
    name = f"cesar-mqtt-{uuid.uuid4()}"
    manager.bind(f"\0{name}")
    assert Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
    assert manager.recv(100) == b"READY=1"


def test_without_systemd_nothing_is_sent() -> None:
    assert not Notifier({}).ready()


def test_a_missing_service_manager_is_no_error(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).ready()
    assert not Notifier({"NOTIFY_SOCKET": "/" + "x" * 200}).ready()


def test_a_service_manager_that_does_not_read_holds_nothing_up(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.monitoring.systemd._TIMEOUT_S", 0.01)
    manager.bind(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert not all(notifier.alive() for _ in range(10_000))


def test_the_environment_of_the_process_is_the_default(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert Notifier().alive()
    assert manager.recv(100) == b"WATCHDOG=1"
