"""Exit codes and noise where stdout or stderr cannot be written: readers that leave, full disks, closed descriptors."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cesar_mqtt.ledger.ledger import Ledger
from tests.acceptance.harness import SMALL, Bus
from tests.conftest import PATIENCE_S, Mosquitto, StartMosquitto
from tests.factories import new_job

CESAR = f"{sys.executable} -m cesar_mqtt"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, whose code is that of the first command of a pipe."""
    script = f"{line}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize("gone", ["2>/dev/full", "2>&-", "2> >(true)", "2>&- >&- <&-"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [("jobs --broker x://y", 78), ("ledger check --data-dir data", 74), ("submit", 2)],
)
def test_a_code_is_not_lost_with_the_sentence_that_nobody_can_read(
    gone: str, arguments: str, code: int, tmp_path: Path
) -> None:
    ended = shell(f"{CESAR} {arguments} {gone}", tmp_path)
    assert (ended.returncode, ended.stdout) == (code, "")


@pytest.mark.mosquitto
@pytest.mark.parametrize("gone", ["2>/dev/full", "2>&-"])
def test_a_consumer_ends_with_its_code_when_its_log_cannot_be_written(
    start_mosquitto: StartMosquitto, gone: str, tmp_path: Path
) -> None:
    broker = start_mosquitto(users={"cesar": "right"})
    ended = shell(f"{CESAR} serve --data-dir data --broker mqtt://cesar:no@127.0.0.1:{broker.port} {gone}", tmp_path)
    assert (ended.returncode, ended.stdout) == (78, "")


def test_a_reader_that_has_enough_is_no_failure(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json") as ledger:
        ledger.append([new_job(f"job-{n}", "a" * 500) for n in range(500)])
    for arguments in ("schema json", "schema asyncapi", f"ledger export --data-dir {tmp_path}", "--help"):
        for reader in ("head -c 20", "true"):
            ended = shell(f"{CESAR} {arguments} | {reader}", tmp_path)
            assert (ended.returncode, ended.stderr) == (0, ""), (arguments, reader)


@pytest.mark.parametrize("arguments", ["schema json", "models list", "--version", "--help"])
def test_a_full_disk_under_stdout_is_a_sentence(arguments: str, tmp_path: Path) -> None:
    ended = shell(f"{CESAR} {arguments} >/dev/full", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("cesar-mqtt: ")
    assert "be written: No space left on device." in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.mosquitto
def test_a_pipe_at_stderr_that_is_not_read_freezes_neither_jobs_nor_the_stop(
    mosquitto: Mosquitto, join: Callable[..., Bus], tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    bus = join(mosquitto.port)
    process = subprocess.Popen(
        [sys.executable, "-m", "cesar_mqtt", "serve", "--broker", mosquitto.url, "--data-dir", str(tmp_path / "data")],
        cwd=tmp_path,
        env={**os.environ, **SMALL},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=writing,
    )
    try:
        bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")
        for number in range(200):  # each is a line of the log
            bus.publish("cesar/jobs", {"job_id": f"wrong-{number}", "x": "x" * 40})
        assert bus.status("wrong-199")["status"] == "error"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
