"""Recordings that end their decoders: the process that opens them is the only one to notice."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cesar_mqtt.audio import decoder, decoder_process
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, Samples
from cesar_mqtt.audio.decoder_process import GrowingReader
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from tests import broken_disk, fuzz, pictures
from tests.conftest import PATIENCE_S, report_missing

DATA = Path(__file__).resolve().parents[2] / "data"
LONG = (DATA / "long.ogg").resolve()
SPEECH = (DATA / "speech.wav").resolve()
SPEECH_SAMPLES = (SPEECH.stat().st_size - 44) // 2
LIMITS = AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0)
TONE = (np.sin(np.arange(3 * SAMPLE_RATE) / 5) * 9000).astype(np.int16)
TEMPLATE_KIB = 72 * 1024
"""53 MB with Python 3.11, 63 MB with 3.13."""


def samples_of(path: Path, limits: AudioLimits = LIMITS) -> Samples:
    with decoder_process.open_audio(path, limits) as audio:
        return np.concatenate(list(audio.blocks()))


def failure_of(path: Path, limits: AudioLimits = LIMITS) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        samples_of(path, limits)
    return caught.value


def wait_until(condition: Callable[[], object]) -> None:
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.005)


def is_alive(pid: int) -> bool:
    """Whether a process that is not our child exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def descriptors() -> list[int]:
    return [int(link.name) for link in Path("/proc/self/fd").iterdir()]


def template_pid() -> int:
    process = decoder_process._template._process
    assert process is not None
    return process.pid


def pid_of(audio: GrowingReader) -> int:
    assert audio._decoder is not None
    return audio._decoder.pid


def status_of(pid: int, field: str) -> int:
    """A number from /proc/PID/status; sizes in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


@contextmanager
def replaced_decoder(monkeypatch: pytest.MonkeyPatch, code: str) -> Iterator[None]:
    """Have the template run other Python code in place of decoding: what a file might make FFmpeg do."""
    script = (
        "import os, signal, sys, time; from cesar_mqtt.audio import decoder_template as module\n"
        f"def run(self, request):\n    {code}\n"
        "module.Decoder.run = run; module.main()"
    )
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        return real([command[0], "-P", "-c", script, command[-1]], **options)  # type: ignore[call-overload, no-any-return]

    decoder_process.stop()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        decoder_process.start()
    yield
    decoder_process.stop()


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = len(descriptors())
    yield
    pid = template_pid() if decoder_process._template._process is not None else None
    decoder_process.stop()
    assert pid is None or not is_alive(pid)
    assert len(descriptors()) <= before


# --- what it does for every recording


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.wav", "pcm_s16le"),
        ("a.flac", "flac"),
        ("a.mp3", "libmp3lame"),
        ("a.m4a", "aac"),
        ("b.m4a", "alac"),
        ("a.opus", "libopus"),
        ("a.wv", "wavpack"),
        ("a.tta", "tta"),
        ("a.mka", "ac3"),
        ("a.amr", "libopencore_amrnb"),
        ("a.aiff", "pcm_s16be"),
        ("a.ts", "mp2"),
    ],
)
def test_it_yields_what_the_decoder_yields_of_any_codec(name: str, codec: str, tmp_path: Path) -> None:
    rate = {"libopencore_amrnb": 8000, "ac3": 32_000}.get(codec, 16_000)
    compare_with_the_decoder(pictures.encode(tmp_path / name, codec, TONE, rate=rate))


def test_it_opens_a_film_with_subtitles(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    with av.open(path, "w") as file:
        picture = file.add_stream("mpeg4", rate=5)
        picture.width = picture.height = 32
        sound = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        titles = file.add_mux_stream("subrip")
        titles.time_base = Fraction(1, 1000)
        title: av.Packet[Any] = av.Packet(b"Hello")
        title.stream, title.pts, title.dts, title.duration, title.time_base = titles, 0, 0, 500, titles.time_base
        frame = av.AudioFrame.from_ndarray(TONE[np.newaxis], "s16", "mono")
        frame.sample_rate = SAMPLE_RATE
        black = av.VideoFrame(32, 32, "yuv420p")
        file.mux([*picture.encode(black), *picture.encode(None), title, *sound.encode(frame), *sound.encode(None)])
    with av.open(path) as file:
        assert {stream.type for stream in file.streams} == {"video", "audio", "subtitle"}
    compare_with_the_decoder(path)


def test_it_yields_what_the_decoder_yields_in_several_blocks() -> None:
    compare_with_the_decoder(LONG)


def compare_with_the_decoder(path: Path) -> None:
    with decoder.open_audio(path, LIMITS) as expected:
        blocks = list(expected.blocks())
    with decoder_process.open_audio(path, LIMITS) as audio:
        found = list(audio.blocks())
    assert [len(block) for block in found] == [len(block) for block in blocks]
    assert np.array_equal(np.concatenate(found), np.concatenate(blocks))
    assert (audio.info, audio.warnings, audio.decoded_s) == (expected.info, expected.warnings, expected.decoded_s)


def test_an_error_of_the_file_is_the_same_as_without_a_process(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"no sound at all" * 100)
    (tmp_path / "empty").touch()
    for name in ("junk", "empty", "missing"):
        with pytest.raises(JobFailedError) as expected, decoder.open_audio(tmp_path / name, LIMITS):
            pytest.fail("it was opened")
        found = failure_of(tmp_path / name)
        assert (found.code, found.message) == (expected.value.code, expected.value.message)


def test_the_process_holds_nothing_but_the_recording_and_its_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CESAR_BROKER__URL", "mqtt://user:secret@broker")
    decoder_process.stop()
    with decoder_process.open_audio(LONG, LIMITS) as audio:
        for pid in (template_pid(), pid_of(audio)):
            assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
            assert status_of(pid, "Threads") == 1
        held = {str(link.readlink()) for link in Path(f"/proc/{pid_of(audio)}/fd").iterdir()}
        assert {link for link in held if not link.startswith("pipe:")} == {"/dev/null", str(LONG)}
        assert len(held) == 3


def test_all_protections_are_in_force_where_the_system_offers_them(tmp_path: Path) -> None:
    path = pictures.encode(tmp_path / "long.flac", "flac", np.tile(TONE, 400))  # its decoder waits to be read from
    with decoder_process.open_audio(path, LIMITS) as audio:
        if set(audio.protections) != {"memory", "cpu", "files", "landlock", "seccomp"}:
            report_missing(f"this system offers only {audio.protections}")
        limits = Path(f"/proc/{pid_of(audio)}/limits").read_text()
    assert re.search(r"^Max open files +0 +0 ", limits, re.MULTILINE)
    assert not re.search(r"^Max (address space|cpu time) +unlimited", limits, re.MULTILINE)


def test_its_memory_is_small_beside_the_consumers() -> None:
    samples_of(SPEECH)
    assert status_of(template_pid(), "VmRSS") < TEMPLATE_KIB


def test_the_decoder_works_no_more_than_a_block_ahead(tmp_path: Path) -> None:
    path = pictures.encode(tmp_path / "long.flac", "flac", np.tile(TONE, 400))
    with decoder_process.open_audio(path, LIMITS) as audio:
        next(audio.blocks())
        wait_until(lambda: Path(f"/proc/{pid_of(audio)}/wchan").read_text().startswith(("pipe", "anon_pipe")))
        assert status_of(pid_of(audio), "VmHWM") < 80 * 1024


# --- the end of a decoder


def test_twenty_killed_decoders_are_twenty_errors_and_nothing_else(tmp_path: Path) -> None:
    path = pictures.encode(tmp_path / "note.flac", "flac", np.tile(TONE, 100))
    samples_of(SPEECH)
    template = template_pid()
    for _ in range(20):
        with decoder_process.open_audio(path, LIMITS) as audio, decoder_process.open_audio(SPEECH, LIMITS) as other:
            blocks = audio.blocks()
            next(blocks)
            os.kill(pid_of(audio), signal.SIGKILL)
            with pytest.raises(JobFailedError) as caught:
                list(blocks)
            assert sum(map(len, other.blocks())) == SPEECH_SAMPLES
        assert caught.value.code is ErrorCode.AUDIO_UNREADABLE
        assert "killed" in caught.value.message
    assert template_pid() == template


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "processor time"),
        ("os._exit(3)", "crashed"),
        ("os.write(self._frames, b'nonsense' * 100); time.sleep(60)", "nonsense"),
        ("self._send(module.encode(module.FrameKind.OPENED, {'info': 7})); time.sleep(60)", "nonsense"),
    ],
)
def test_whatever_ends_a_decoder_is_an_error_of_its_file(
    code: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replaced_decoder(monkeypatch, code):
        failure = failure_of(SPEECH)
    assert failure.code is ErrorCode.AUDIO_UNREADABLE
    assert named in failure.message
    assert len(samples_of(SPEECH)) == SPEECH_SAMPLES


def test_a_decoder_that_only_computes_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "_IDLE_SHARE", 0.02)  # other tests may leave it no more of the processor
    limits = AudioLimits(max_bytes=1 << 30, max_duration_s=60.0, decoder_timeout_s=2.0)
    with replaced_decoder(monkeypatch, "while True: pass"):
        failure = failure_of(SPEECH, limits)
    assert failure.code is ErrorCode.AUDIO_UNREADABLE
    assert "no progress" in failure.message
    assert len(samples_of(SPEECH)) == SPEECH_SAMPLES


def test_a_decoder_that_waits_for_the_disk_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = AudioLimits(max_bytes=1 << 30, max_duration_s=60.0, decoder_timeout_s=0.5)
    with replaced_decoder(monkeypatch, "time.sleep(60)"):
        failure = failure_of(SPEECH, limits)
    assert failure.code is ErrorCode.AUDIO_IO_ERROR


def test_an_unexpected_exception_is_logged_and_the_job_may_be_retried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = "self._send(module.encode(module.FrameKind.BROKEN, {'text': 'ZeroDivisionError'}))"
    with replaced_decoder(monkeypatch, script):
        failure = failure_of(SPEECH)
    assert failure.code is ErrorCode.INTERNAL
    assert "ZeroDivisionError" in caplog.text


def test_a_file_that_needs_too_much_memory_is_told_so() -> None:
    limits = AudioLimits(max_bytes=1 << 30, max_duration_s=60.0, decoder_memory_bytes=1 << 20)
    failure = failure_of(LONG, limits)
    assert failure.code is ErrorCode.AUDIO_UNREADABLE
    assert "audio.decoder_memory" in failure.message


@pytest.mark.parametrize("name", ["bomb.mp3", "bomb.flac"])
def test_a_memory_bomb_costs_neither_memory_nor_the_recording(name: str, tmp_path: Path) -> None:
    codec = {"mp3": "libmp3lame", "flac": "flac"}[name.partition(".")[2]]
    path = pictures.with_cover(pictures.encode(tmp_path / name, codec, TONE), pictures.png(16_000))
    assert path.stat().st_size < 2 << 20
    samples_of(SPEECH)
    before = status_of(os.getpid(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
    with decoder_process.open_audio(path, LIMITS) as audio:
        assert sum(map(len, audio.blocks())) >= len(TONE)
        assert status_of(template_pid(), "VmRSS") < TEMPLATE_KIB
    assert status_of(os.getpid(), "VmHWM") - before < 60 * 1024
    assert len(samples_of(SPEECH)) == SPEECH_SAMPLES


def test_damaged_recordings_of_every_container_end_as_samples_or_as_errors_of_theirs(tmp_path: Path) -> None:
    bad: list[str] = []
    ended = fuzz.decode_damaged(tmp_path, 150, 3, lambda path, outcome: bad.append(f"{path.name}: {outcome}"))
    assert bad == []
    assert ended["decoded"] > 20


# --- the template, the consumer, and a stop


def test_a_template_that_does_not_start_blames_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_process.stop()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        failure = failure_of(SPEECH)
    assert failure.code is ErrorCode.INTERNAL
    assert len(samples_of(SPEECH)) == SPEECH_SAMPLES


def test_a_template_that_has_ended_is_started_again() -> None:
    samples_of(SPEECH)
    for _ in range(3):
        os.kill(template_pid(), signal.SIGKILL)
        assert len(samples_of(SPEECH)) == SPEECH_SAMPLES


def test_a_decoder_that_ends_before_it_gets_a_file_is_replaced() -> None:
    samples_of(SPEECH)
    template = template_pid()
    for _ in range(3):
        wait_until(lambda: children_of(template))
        for pid in children_of(template):
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]
        assert len(samples_of(SPEECH)) == SPEECH_SAMPLES
    assert template_pid() == template


def test_a_template_that_ends_in_the_middle_blames_no_file(tmp_path: Path) -> None:
    path = pictures.encode(tmp_path / "note.flac", "flac", np.tile(TONE, 100))
    with decoder_process.open_audio(path, LIMITS) as audio:
        blocks, pid = audio.blocks(), pid_of(audio)
        next(blocks)
        os.kill(template_pid(), signal.SIGKILL)
        with pytest.raises(JobFailedError) as caught:
            list(blocks)
        wait_until(lambda: not is_alive(pid))
    assert caught.value.code is ErrorCode.INTERNAL
    assert len(samples_of(path)) == 100 * len(TONE)


def test_closing_kills_the_decoder_whatever_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with replaced_decoder(monkeypatch, "while True: pass"):
        wait_until(lambda: children_of(template_pid()))
        (pid,) = children_of(template_pid())  # it waits for the next file

        def loops() -> bool:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"

        wait_until(lambda: not loops())
        with pytest.raises(Cancelled), decoder_process.open_audio(SPEECH, LIMITS, should_stop=loops):
            pytest.fail("it was opened")
        wait_until(lambda: not is_alive(pid))
    with decoder_process.open_audio(SPEECH, LIMITS) as audio:
        pid = pid_of(audio)
    wait_until(lambda: not is_alive(pid))


def test_nothing_outlives_a_consumer_that_is_killed(tmp_path: Path) -> None:
    path = pictures.encode(tmp_path / "note.flac", "flac", np.tile(TONE, 100))
    script = (
        "import sys; from pathlib import Path; from cesar_mqtt.audio import decoder_process as p\n"
        "from cesar_mqtt.audio.decoder import AudioLimits\n"
        "with p.open_audio(Path(sys.argv[1]), AudioLimits(1 << 30, 1e6)) as audio:\n"
        "    next(audio.blocks())\n"
        "    print(p._template._process.pid, audio._decoder.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as consumer:
        assert consumer.stdout is not None
        pids = [int(pid) for pid in consumer.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        consumer.kill()
        wait_until(lambda: not any(map(is_alive, pids)))


# --- the disk


@pytest.fixture
def _failing_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    decoder_process.stop()
    monkeypatch.setenv("LD_PRELOAD", str(broken_disk.build(tmp_path)))
    yield
    decoder_process.stop()


@pytest.mark.usefixtures("_failing_reads")
@pytest.mark.parametrize(
    ("container", "code"),
    [("wav", errno.EIO), ("flac", errno.ESTALE), ("mka", errno.ENOMEM), ("ogg", errno.EIO), ("mp3", errno.ETIMEDOUT)],
)
def test_a_read_that_fails_in_the_middle_is_no_damage(container: str, code: int, tmp_path: Path) -> None:
    codec = {"wav": "pcm_s16le", "flac": "flac", "mka": "aac", "ogg": "libopus", "mp3": "libmp3lame"}[container]
    noise = np.random.default_rng(1).integers(-8000, 8000, 20 * SAMPLE_RATE, np.int16)
    path = pictures.encode(tmp_path / f"noise.{container}", codec, noise)
    healthy = tmp_path / f"healthy.{container}"
    shutil.copy(path, healthy)
    broken_disk.break_reads(path, code)
    failure = failure_of(path)
    assert failure.code is ErrorCode.AUDIO_IO_ERROR
    assert os.strerror(code) in failure.message
    assert len(samples_of(healthy)) >= len(noise) - 1000


def test_a_consumer_without_a_free_descriptor_blames_no_file() -> None:
    samples_of(SPEECH)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(descriptors())
    for room in range(6):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, hard))
        try:
            failure: JobFailedError | None = failure_of(SPEECH)
        except pytest.fail.Exception:
            failure = None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert failure is None or failure.code is ErrorCode.AUDIO_IO_ERROR
    assert len(samples_of(SPEECH)) == SPEECH_SAMPLES
