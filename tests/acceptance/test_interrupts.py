"""Ctrl-C at any moment: exit code 130 and no traceback, also in the middle of an import."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.harness import SMALL, SPEECH, Bus
from tests.conftest import PATIENCE_S, Mosquitto

# Interrupts the command at its n-th import.
_INTERRUPTED_AT = """
import signal, sys
number, seen = int(sys.argv.pop(1)), 0
def count(event, _):
    global seen
    if event == "import":
        seen += 1
        if seen == number:
            signal.raise_signal(signal.SIGINT)
from cesar_mqtt.__main__ import main
sys.addaudithook(count)
main()
"""
_NO_BROKER = ("--broker", "mqtt://127.0.0.1:1")


def interrupted_at(number: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _INTERRUPTED_AT, str(number), *arguments],
        cwd=folder,
        env={**os.environ, **SMALL, "CESAR_DATA_DIR": str(folder / "data")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        *((("submit", *_NO_BROKER, str(SPEECH)), number) for number in (1, 60, 250, 380)),
        *((("serve", *_NO_BROKER), number) for number in (1, 120, 500, 850)),
        *((("jobs", *_NO_BROKER), number) for number in (1, 200)),
        *((("models", "list"), number) for number in (1, 400)),
        *((("doctor", *_NO_BROKER, "--timeout", "0.1"), number) for number in (1, 450, 600, 750, 900)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_an_interrupted_import_shows_no_traceback_and_is_no_finding(
    arguments: tuple[str, ...], number: int, tmp_path: Path
) -> None:
    """numpy raises an ImportError then, which looked like a wrong version."""
    ended = interrupted_at(number, tmp_path, *arguments)
    for told in (ended.stdout, ended.stderr):
        assert not [word for word in ("Traceback", "KeyboardInterrupt", "ImportError") if word in told], told
    if number == 1 or arguments[0] != "serve":  # `serve` stops in order as soon as it handles the signal itself
        assert ended.returncode == 130


@pytest.mark.mosquitto
@pytest.mark.parametrize(
    "arguments", [("watch",), ("submit", str(SPEECH)), ("doctor",)], ids=lambda arguments: arguments[0]
)
def test_ctrl_c_reaches_the_children_too_and_the_second_one_ends_the_command_at_once(
    arguments: tuple[str, ...], mosquitto: Mosquitto, join: Callable[..., Bus], tmp_path: Path
) -> None:
    join(mosquitto.port).publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "cesar_mqtt", *arguments, "--broker", mosquitto.url],
        cwd=tmp_path,
        env={**os.environ, **SMALL, "CESAR_DATA_DIR": str(tmp_path / "data")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        assert mosquitto.wait_logged(" as cesar-")
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
        told, _ = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in told, told
    # Ctrl-C is how `watch` ends. The second one may find an interpreter that has just removed its handlers: a shell
    # reports 130 for that as well.
    assert process.returncode in ({0} if arguments[0] == "watch" else {130, -signal.SIGINT}), told


@pytest.mark.model
def test_ctrl_c_ends_the_demo_without_a_failure() -> None:
    """It printed `failed  None: None`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cesar_mqtt", "demo"],
        env={**os.environ, **SMALL},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process:
        told = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in {0, 130}, told + rest  # 0: the transcript was there before the signal
    assert "failed" not in rest


@pytest.mark.mosquitto
def test_where_interrupts_are_ignored_they_stay_ignored(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """As in the background of a script."""
    ended = subprocess.run(
        [
            *("sh", "-c", 'trap "" INT; exec "$@"', "sh"),
            *(sys.executable, "-c", _INTERRUPTED_AT, "100", "jobs", "--broker", mosquitto.url),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
