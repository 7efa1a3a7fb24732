"""A disk that is really full: a small tmpfs under the data directory; needs the right to mount one."""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cesar_mqtt.ledger.reserve import RESERVE_BYTES
from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, command, wait_until, words
from tests.conftest import Mosquitto, need

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

MIB = 1 << 20
DISK_BYTES = 8 * MIB
UPLOADS = 60
WINDOW = 20
"""mosquitto delivers so many unacknowledged messages over MQTT 3.1.1."""

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB for the consumer's data directory."""
    data_dir = tmp_path / "consumer" / "data"
    data_dir.mkdir(parents=True, mode=0o700)
    options = f"size={DISK_BYTES},mode=700"
    mounted = subprocess.run(
        [need("mount"), "-t", "tmpfs", "-o", options, "tmpfs", str(data_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield data_dir
    subprocess.run([need("umount"), "--lazy", str(data_dir)], check=True)


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(folder: Path) -> Path:
    """Take the last block of the file system."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            assert free_bytes(folder) == 0
    return ballast


def ask(bus: Bus, name: str, payload: str = "") -> dict[str, object]:
    """Send a command as any client does, and return its response."""
    before = len(bus.seen(f"cesar/response/{name}"))
    bus.publish(f"cesar/request/{name}", payload)
    wait_until(lambda: len(bus.seen(f"cesar/response/{name}")) > before)
    return bus.seen(f"cesar/response/{name}")[-1]


def is_refused(bus: Bus, job_id: str) -> bool:
    """Wait until a job is accepted, or refused by the disk."""

    def degraded() -> bool:
        return bool(bus.seen("cesar/consumer/cesar/queue")[-1]["activity"] == "degraded")

    wait_until(lambda: bool(bus.seen(f"cesar/status/{job_id}")) or degraded())
    return not bus.seen(f"cesar/status/{job_id}")


def degraded(bus: Bus) -> None:
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["activity"] == "degraded")


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
def test_behind_a_full_disk_commands_are_answered_and_a_delete_lets_jobs_in(
    small_disk: Path, mosquitto: Mosquitto, serve: Serve, join: Join, protocol: str
) -> None:
    environ = {"CESAR_BROKER__PROTOCOL": protocol}
    consumer = serve("--broker", mosquitto.url, environ=environ)
    bus = join(mosquitto.port)
    ask(bus, "pause")
    upload = SPEECH.read_bytes().ljust(MIB // 4, b"\0")
    for number in range(UPLOADS):
        bus.publish(f"cesar/audio/note-{number:02}", upload)
    degraded(bus)

    def accepted() -> int:
        return sum(1 for _ in (small_disk / "spool").iterdir())

    stored = accepted()
    assert UPLOADS - stored > WINDOW, "so many wait that the broker delivers nothing more at QoS 1"
    health = command("health", "--broker", mosquitto.url)
    assert health.returncode == 0, health.stderr
    assert ask(bus, "delete", "note-00")["status"] == "ok"
    bus.status(f"note-{stored:02}", "queued")

    consumer.kill()
    consumer.start()
    degraded(bus)
    health = command("health", "--broker", mosquitto.url)
    assert health.returncode == 0, health.stderr
    for number in range(1, UPLOADS - 4):
        assert ask(bus, "delete", f"note-{number:02}")["status"] == "ok"
        bus.status(f"note-{min(stored + number, UPLOADS - 1):02}", "queued")
    bus.publish("cesar/audio/huge", bytes(DISK_BYTES - MIB))
    rejection = bus.wait("cesar/rejected")
    assert (rejection["reason"], rejection["job_id"]) == ("storage_full", "huge")
    assert ask(bus, "resume")["status"] == "ok"

    for number in range(UPLOADS - 4, UPLOADS):
        ended = bus.status(f"note-{number:02}")
        assert (ended["status"], words(ended["result_text"])) == ("completed", SPOKEN)
    wait_until(lambda: accepted() == 0)
    assert consumer.stop() == 0


def test_on_a_disk_without_a_free_byte_jobs_are_deleted_and_end_and_the_reserve_is_taken_again(
    small_disk: Path, mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    ask(bus, "pause")
    for number in range(4):
        bus.publish(f"cesar/audio/note-{number}", SPEECH.read_bytes())
        bus.status(f"note-{number}", "queued")
    ballast = fill(small_disk)
    metadata = {"text": "x" * 4000}
    for number in range(70):  # until the journal has used the room that it took in advance
        bus.publish("cesar/jobs", {"job_id": f"small-{number}", "audio_path": "speech.wav", "metadata": metadata})
        if is_refused(bus, f"small-{number}"):
            break
    degraded(bus)
    reserve = small_disk / "ledger.reserve"
    assert reserve.stat().st_size == RESERVE_BYTES

    assert ask(bus, "cancel", "note-0")["status"] == "ok"
    for number in range(40):  # more than what is left of the journal's last block
        assert ask(bus, "delete", f"small-{number}")["status"] == "ok"
    assert reserve.stat().st_size < RESERVE_BYTES
    fill(small_disk)
    assert ask(bus, "resume")["status"] == "ok"
    assert words(bus.status("note-1")["result_text"]) == SPOKEN

    consumer.kill()
    fill(small_disk)
    consumer.start()
    assert ask(bus, "delete", "note-0")["status"] == "ok"
    ballast.unlink()
    for job_id in ("note-3", "small-50"):
        assert bus.status(job_id)["status"] == "completed"
    wait_until(lambda: reserve.stat().st_size == RESERVE_BYTES)
    assert consumer.stop() == 0


def test_a_journal_that_may_grow_no_further_is_checkpointed(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    resource.prlimit(consumer.process.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))
    ask(bus, "pause")
    metadata = {"text": "x" * 4000}
    for number in range(100):
        bus.publish("cesar/jobs", {"job_id": f"job-{number}", "audio_path": "speech.wav", "metadata": metadata})
    for number in range(100):
        bus.status(f"job-{number}", "queued")
        if number > 5:
            assert ask(bus, "delete", f"job-{number}")["status"] == "ok"
    bus.publish("cesar/audio/huge", bytes(700_000))
    assert bus.wait("cesar/rejected")["reason"] == "storage_full"
    assert ask(bus, "resume")["status"] == "ok"
    assert bus.status("job-5")["status"] == "completed"
    consumer.signal(signal.SIGTERM)
    assert consumer.wait() == 0
