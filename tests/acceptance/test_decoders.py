"""Recordings that crash, hang or bloat what decodes them, and failing disks: the command, mosquitto, the real model."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import broken_disk, pictures
from tests.acceptance.harness import DATA, SPEECH, SPOKEN, Bus, Consumer, wait_until, words
from tests.conftest import Mosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

CRASHES = 20


def begin_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): the peak begins anew


def peak_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def pids_beside(consumer: Consumer) -> set[int]:
    """The processes that decode for a consumer: the template, and its children."""
    found = {consumer.process.pid}
    for _generation in range(2):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent in found:
                found.add(int(stat.parent.name))
    return found - {consumer.process.pid}


def test_recordings_that_end_their_decoders_end_no_other_job(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    crash = Path(shutil.copy(SPEECH, tmp_path / "crash.wav"))
    hang = Path(shutil.copy(SPEECH, tmp_path / "hang.wav"))
    broken_disk.break_reads(crash, broken_disk.CRASH)
    broken_disk.break_reads(hang, broken_disk.HANG)
    silence = np.zeros(16_000, np.int16)
    for name, codec in (("bomb.mp3", "libmp3lame"), ("bomb.flac", "flac")):
        pictures.with_cover(pictures.encode(tmp_path / name, codec, silence), pictures.png(16_000))
    environ = {"LD_PRELOAD": str(broken_disk.build(tmp_path)), "CESAR_AUDIO__DECODER_TIMEOUT": "6"}
    consumer = serve("--broker", mosquitto.url, "--audio-dir", str(tmp_path), environ=environ)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "first", "audio_path": str(SPEECH)})
    bus.status("first")
    begin_peak(consumer.process.pid)
    before = peak_kib(consumer.process.pid)

    for number in range(CRASHES):
        bus.publish("cesar/jobs", {"job_id": f"crash-{number}", "audio_path": "crash.wav"})
        if number % 5 == 0:
            bus.publish("cesar/jobs", {"job_id": f"good-{number}", "audio_path": str(SPEECH)})
    for job_id, name in (("hang", "hang.wav"), ("mp3", "bomb.mp3"), ("flac", "bomb.flac")):
        bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": name})
    bus.publish("cesar/jobs", {"job_id": "last", "audio_path": str(SPEECH)})
    assert words(bus.status("last")["result_text"]) == SPOKEN

    for number in range(CRASHES):
        ended = bus.status(f"crash-{number}")
        assert (ended["status"], ended["error_code"], ended["attempt"]) == ("error", "audio_unreadable", 1)
        assert "SIGSEGV" in ended["error_message"]
        if number % 5 == 0:
            assert bus.states(f"good-{number}") == ["queued", "processing", "completed"]
    assert bus.status("hang")["error_code"] == "audio_unreadable"
    assert "audio.decoder_timeout" in bus.status("hang")["error_message"]
    assert (bus.status("mp3")["no_speech"], bus.status("flac")["no_speech"]) == (True, True)
    assert peak_kib(consumer.process.pid) - before < 60 * 1024
    assert consumer.logged().count("jobs in the queue: ") == 1
    beside = pids_beside(consumer)
    assert beside
    assert consumer.stop() == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in beside))


def test_an_upload_on_a_failing_disk_is_kept_and_transcribed_once_the_disk_answers(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    environ = {"LD_PRELOAD": str(broken_disk.build(tmp_path)), "CESAR_WORKER__RETRY_DELAY": "0.5"}
    consumer = serve("--broker", mosquitto.url, environ=environ)
    bus = join(mosquitto.port)
    bus.publish("cesar/request/pause", "")
    bus.wait("cesar/response/pause")
    bus.publish("cesar/audio/note", (DATA / "speech.wav").read_bytes())
    bus.status("note", "queued")
    (stored,) = [path for path in (consumer.data_dir / "spool").iterdir() if path.is_file()]
    broken_disk.break_reads(stored, errno.ESTALE)
    bus.publish("cesar/request/resume", "")

    consumer.wait_for_log("deferred")
    assert stored.exists()
    os.utime(stored)
    end = bus.status("note")

    assert (end["status"], words(end["result_text"])) == ("completed", SPOKEN)
    assert "audio_unreadable" not in consumer.logged()
    assert consumer.stop() == 0
