"""The memory that recordings of any length take: of the whole process tree, the processes of decoders included."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.bus import _mosquitto
from benchmarks.corpus import write_wav
from benchmarks.jobs import _consumer, _finished, _idle, _listening, _resident_bytes, _speech
from benchmarks.table import Row
from benchmarks.transcription import MODEL, THREE_HOURS_S, _make_speech, _ours

_HOUR_S = 3600.0
_HALF_AN_HOUR_S = 1800.0
_NOTES_S = (4.0, 10.0, 20.0, 47.0)
_MODELS = (MODEL, "base")
_LIMIT_BYTES = 700_000_000
_SAMPLE_S = 0.1
_READY_PROCESSES = 3
"""The one with the model, the template of the decoders, and the decoder that it keeps ready for the next file."""
_CGROUPS = Path("/sys/fs/cgroup")


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield from _tree(int(child))


def _used_bytes(pid: int, *, itself: bool = True) -> int:
    """The memory of a process and all below it that no file backs; what processes share is counted once."""
    total = 0
    for process in islice(_tree(pid), 0 if itself else 1, None):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total * 1024


def _forget_mark(pid: int) -> None:
    """Let the highest mark of a process be what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _highest_bytes(pid: int) -> int:
    """The highest memory of a process since the last call, files included, and what all below it have now."""
    highest = _resident_bytes(pid, "VmHWM")
    _forget_mark(pid)
    return highest + _used_bytes(pid, itself=False)


class _Peak:
    """Samples memory in a thread of its own."""

    def __init__(self, sample: Callable[[], int]) -> None:
        self.used_bytes = 0
        self._sample = sample
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self.used_bytes = max(self.used_bytes, self._sample())

    def stop(self) -> int:
        self._stopping.set()
        self._thread.join()
        return self.used_bytes


def _transcribe(path: str, short: str, pipe: Connection) -> None:
    """Load the model; transcribe, and end, each when the other end of the pipe says so."""
    from cesar_mqtt.config import AudioSettings, ModelSettings  # noqa: PLC0415 - in this process only
    from cesar_mqtt.transcript import TranscriptionOptions  # noqa: PLC0415
    from cesar_mqtt.whisper.model_store import ModelStore  # noqa: PLC0415
    from cesar_mqtt.whisper.transcriber import Transcriber  # noqa: PLC0415

    store, options = ModelStore(ModelSettings(download=False)), TranscriptionOptions(MODEL, beam_size=1, language="en")
    store.load(MODEL)
    transcriber = Transcriber(store, AudioSettings())
    with_decoder = transcriber.open(Path(short), options)  # as in the consumer, decoders are ready before the first job
    list(with_decoder.chunks(lambda: False))
    with_decoder.close()
    while len(list(_tree(os.getpid()))) > _READY_PROCESSES:
        time.sleep(_SAMPLE_S)
    pipe.send("loaded")
    pipe.recv()
    _ours(transcriber, Path(path), options)
    pipe.send("transcribed")
    pipe.recv()


def _three_hours(folder: Path) -> Row:
    path, short = folder / "three-hours.flac", folder / "short.flac"
    _make_speech(path, THREE_HOURS_S)
    _make_speech(short, 1.0)
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_transcribe, args=(str(path), str(short), there))
    process.start()
    there.close()
    here.recv()
    assert process.pid is not None
    _forget_mark(process.pid)
    loaded, sampled = _highest_bytes(process.pid), _Peak(partial(_highest_bytes, process.pid))
    here.send("transcribe")
    here.recv()
    peak = sampled.stop()
    here.send("end")
    process.join()
    return Row(
        f"peak memory of three hours of speech, over the loaded model {MODEL}",
        (peak - loaded) / 1e6,
        "MB",
        at_most=150.0,
        beside=f"{loaded / 1e6:.0f} MB, then {peak / 1e6:.0f} MB, decoders included",
    )


def _own_groups() -> Iterator[tuple[Path, str]]:
    """The memory cgroup of this process, of version 2 or 1, with the name of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if not controllers:
            yield _CGROUPS / inside.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            yield _CGROUPS / controllers / inside.lstrip("/"), "memory.limit_in_bytes"


@contextmanager
def _limited(limit_bytes: int) -> Iterator[Callable[[int], None] | None]:
    """Yield what moves a process into a memory cgroup with this limit, below our own; None: there can be none."""
    for own, limit in _own_groups():
        group = own / f"cesar-mqtt-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(limit_bytes))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            yield lambda pid, group=group: _move(pid, group)  # type: ignore[misc]
        finally:
            while (group / "cgroup.procs").read_text():
                time.sleep(_SAMPLE_S)
            group.rmdir()
        return
    yield None


def _move(pid: int, group: Path) -> None:
    for process in _tree(pid):
        (group / "cgroup.procs").write_text(str(process))


def _an_hour_of_base(folder: Path) -> Row:
    path = folder / "an-hour.flac"
    _make_speech(path, _HOUR_S)
    with (
        _limited(_LIMIT_BYTES) as limit,  # removed once the consumer has ended
        _mosquitto(folder) as port,
        _listening(port) as bus,
        _consumer(folder / "consumer", port, "--model", "base") as consumer,
    ):
        _idle(bus)
        if limit is not None:
            limit(consumer.process.pid)
        peak = _Peak(partial(_used_bytes, consumer.process.pid))
        bus.publish("cesar/jobs", {"job_id": "hour", "audio_path": str(path)})
        end = _finished(bus, "hour")
        used = peak.stop()
    assert (end["status"], end["attempt"]) == ("completed", 1), end
    return Row(
        "an hour of speech with base, the whole consumer",
        used / 1e6,
        "MB",
        at_most=700.0,
        beside="in a memory cgroup of 700 MB" if limit is not None else "without a cgroup: none can be made here",
    )


def _models(folder: Path) -> list[Row]:
    long = folder / "half-an-hour.flac"
    _make_speech(long, _HALF_AN_HOUR_S)
    notes = [write_wav(folder / f"note-{length_s:g}.wav", _speech(length_s)) for length_s in _NOTES_S]
    return [_consumer_with(model, folder, notes, long) for model in _MODELS]


def _consumer_with(model: str, folder: Path, notes: Sequence[Path], long: Path) -> Row:
    """The resident memory of the process with the model: loaded, and its peaks; and how fast it is."""
    with (
        _mosquitto(folder) as port,
        _listening(port) as bus,
        _consumer(folder / f"consumer-{model}", port, "--model", model) as consumer,
    ):
        pid = consumer.process.pid
        _idle(bus)
        marks = [_resident_bytes(pid)]
        for job_id, paths in (("note", notes), ("long", [long])):
            _forget_mark(pid)
            for number, path in enumerate(paths):
                started = time.perf_counter()
                bus.publish("cesar/jobs", {"job_id": f"{job_id}-{number}", "audio_path": str(path)})
                end = _finished(bus, f"{job_id}-{number}")
                took_s = time.perf_counter() - started
                assert end["status"] == "completed", end
            marks.append(_resident_bytes(pid, "VmHWM"))
    idle, voice_notes, half_an_hour = (mark / 1e6 for mark in marks)
    return Row(
        f"peak memory of the process with {model}, half an hour of speech",
        half_an_hour,
        "MB",
        beside=f"loaded {idle:.0f} MB, recordings of 4 to 47 s {voice_notes:.0f} MB; "
        f"{_HALF_AN_HOUR_S / took_s:.0f} s of speech in a second",
    )


def run(folder: Path) -> list[Row]:
    return [_three_hours(folder), _an_hour_of_base(folder), *_models(folder)]
