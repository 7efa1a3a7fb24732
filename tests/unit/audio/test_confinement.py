"""Each protection alone, in a process of its own: what it forbids is forbidden, and what decoding needs still works."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, report_missing

ATTEMPTS = """
import os, resource, signal, socket, sys, threading
from cesar_mqtt.audio import confinement

readable = os.open(sys.argv[1], os.O_RDONLY)
def connect():
    with socket.socket() as client:
        client.settimeout(5)
        client.connect(("127.0.0.1", 9))
attempts = {
    "open": lambda: os.open(sys.argv[1], os.O_RDONLY),
    "create": lambda: os.open(sys.argv[1] + ".new", os.O_CREAT | os.O_WRONLY),
    "remove": lambda: os.unlink(sys.argv[1] + ".other"),
    "socket": socket.socket,
    "connect": connect,
    "fork": lambda: os.fork() or os._exit(0),
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "signal": lambda: os.kill(os.getppid(), 0),
    "limit": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (64, 64)),
    "read": lambda: os.pread(readable, 5, 0),
    "memory": lambda: bytearray(1 << 24),
    "own limit": lambda: confinement.extend_cpu(100),
}
if not eval(sys.argv[2]):
    print("missing")
    sys.exit()
for name in sys.argv[3:]:
    try:
        attempts[name]()
        print(name, "done", flush=True)
    except ConnectionRefusedError:
        print(name, "done", flush=True)
    except OSError as exc:
        print(name, "refused", flush=True)
os._exit(0)
"""

NEEDED = ("read", "memory", "own limit")


def outcomes(tmp_path: Path, protection: str, *attempts: str) -> dict[str, str]:
    for name in ("file", "file.other"):
        (tmp_path / name).write_bytes(b"sound")
    ran = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path / "file"), f"confinement.{protection}", *attempts],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    if ran.stdout == "missing\n":
        report_missing(f"this system does not offer {protection}")
    return {name: outcome for name, _, outcome in (line.rpartition(" ") for line in ran.stdout.splitlines())}


@pytest.mark.parametrize(
    ("protection", "forbidden"),
    [
        ("_forbid_descriptors()", ("open", "create", "socket")),
        ("_forbid_files_and_network()", ("open", "create", "remove", "execute")),
        (
            "_allow_few_system_calls()",
            ("open", "create", "remove", "socket", "fork", "execute", "signal", "limit"),
        ),
    ],
)
def test_a_protection_forbids_what_decoding_does_not_need(
    protection: str, forbidden: tuple[str, ...], tmp_path: Path
) -> None:
    found = outcomes(tmp_path, protection, *forbidden, *NEEDED)
    assert found == dict.fromkeys(forbidden, "refused") | dict.fromkeys(NEEDED, "done")
    assert (tmp_path / "file.other").exists()
    assert not (tmp_path / "file.new").exists()


def test_without_a_protection_all_of_it_is_possible(tmp_path: Path) -> None:
    attempts = ("open", "create", "remove", "socket", "fork", "signal", *NEEDED)
    assert set(outcomes(tmp_path, "address_space_bytes()", *attempts).values()) == {"done"}


def test_memory_beyond_the_limit_is_refused_and_memory_within_it_is_not() -> None:
    script = (
        "from cesar_mqtt.audio import confinement\n"
        "has_bytes = confinement.address_space_bytes()\n"
        "print(confinement.confine(has_bytes=has_bytes, memory_bytes=64 << 20, cpu_s=60, most_cpu_s=60))\n"
        "held = bytearray(32 << 20)\n"
        "try:\n    bytearray(64 << 20)\n"
        "except MemoryError:\n    print('refused')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert "memory" in ran.stdout
    assert ran.stdout.endswith("refused\n")


def test_an_endless_loop_ends_when_its_processor_time_is_used_up() -> None:
    script = (
        "from cesar_mqtt.audio import confinement\n"
        "confinement.confine(has_bytes=None, memory_bytes=0, cpu_s=1, most_cpu_s=3)\n"
        "while True: pass\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert -ran.returncode == signal.SIGXCPU
