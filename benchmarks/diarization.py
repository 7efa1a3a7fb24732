"""Who speaks when: error rates on recordings of people, beside sherpa-onnx with the same weights, and what it costs.

The diarization error rate (DER) is strict: no collar, overlap counts. But for the telephone call, whose turns people
wrote down, the recordings are made of single voices; the reference is the speech that the VAD finds in each clean voice
before mixing, with its defaults (silence under 2 s belongs to the speech, 0.4 s on each side).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.corpus import CALL, READER, ROOT, SPEECH, decode, to_pcm, write_wav
from benchmarks.memory import _Peak, _used_bytes
from benchmarks.table import Row
from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import speech_probabilities, speech_ranges
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper.diarization import Diarizer, Turn
from tests.diarization import DIARIZATION

LIBRIVOX = SPEECH / "usr" / "share" / "pocketsphinx" / "test" / "data" / "librivox"
CLONE = SPEECH / "moonshine_voice" / "assets" / "clone-test.wav"
SHERPA = ROOT / "build" / "sherpa"

_READERS: tuple[str, ...] = ("LibriVox", "two cities")
_FRAME = SAMPLE_RATE // 100
_SEEDS = (1, 2, 3)
_TURN_S = (2.0, 20.0)
_GAIN_DB = (-6.0, 6.0)
_PAUSE_S = (0.1, 0.8)
_LEVEL = 0.06
_CLEAN_S = {"speaker90": ((8.35, 9.85), (11.1, 14.4), (18.7, 21.4)), "speaker91": ((14.8, 17.85), (21.9, 27.8))}
"""Where one of the call speaks alone, by its reference."""
_LONG_S = 1800.0
_MIB = 1 << 20

Frames = NDArray[np.bool_]
"""Who speaks in each 10 ms; shape (frames, speakers)."""


@dataclass(frozen=True)
class Recording:
    """Samples, and who speaks when."""

    name: str
    samples: Samples
    reference: Frames


def run(folder: Path) -> list[Row]:
    if not (DIARIZATION / "embedding.onnx").is_file():
        raise SystemExit("The models of the diarizer are not there: run `make diarization-models`.")
    diarizer = Diarizer.load(DIARIZATION)
    rows = []
    spent_s = heard_s = 0.0
    for bound, recordings in _recordings():
        errors, found, theirs, cpu_s, length_s = [], [], [], 0.0, 0.0
        for recording in recordings:
            started = time.process_time()
            turns = _turns_of(diarizer, recording.samples)
            cpu_s += time.process_time() - started
            length_s += len(recording.samples) / SAMPLE_RATE
            errors.append(error_rate(recording.reference, _frames(turns, len(recording.reference))))
            found.append(len({turn.speaker for turn in turns}))
            theirs.append(_sherpa(folder, recording))
        spent_s += cpu_s
        heard_s += length_s
        wanted = recordings[0].reference.shape[1]
        name = recordings[0].name
        beside = f"{found} of {wanted} speakers; each {', '.join(f'{error:.3f}' for error in errors)}{_beside(theirs)}"
        if bound is not None:
            rows.append(Row(f"diarization, {name}: DER", max(errors), at_most=bound, beside=beside))
        wrong = max(abs(count - wanted) for count in found)
        rows.append(Row(f"diarization, {name}: speakers too many or few", wrong, "", None, 0, beside))
    rows.append(Row("diarization, processor time a second", 1000 * spent_s / heard_s, "ms", None, 50.0))
    return [*rows, _memory()]


def _recordings() -> Iterator[tuple[float | None, list[Recording]]]:
    voices = voices_of_packages()
    call = decode(CALL)
    yield 0.12, [Recording("a telephone call", call, _call_reference(len(call)))]
    readers: dict[str, Samples] = {name: voices[name] for name in _READERS if name in voices}
    if len(readers) == 2:
        for noise_db, bound in ((None, 0.10), (15.0, 0.15)):
            title = "two readers in turn, 75 s" + ("" if noise_db is None else f", {noise_db:g} dB of noise")
            yield bound, [mix(title, readers, 75.0, seed, noise_db) for seed in _SEEDS]
    for name, samples in readers.items():
        yield None, [mix(f"one reader ({name}), 10 minutes", {name: samples}, 600.0, 1, None)]
    yield 0.15, [mix(f"{len(voices)} voices, 10 minutes", voices, 600.0, 1, None)]


def voices_of_packages() -> dict[str, Samples]:
    """The single voices that packages have: two or three readers, and the two of the call where they speak alone.

    Raises:
        SystemExit: they are not there.
    """
    if not (READER.exists() and CALL.exists()):
        raise SystemExit("The recordings of people are not there: run `make build/speech`.")
    voices = {"two cities": decode(READER), "clone": decode(CLONE)}
    call = decode(CALL)
    for speaker, ranges in _CLEAN_S.items():
        parts = [call[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] for start, end in ranges]
        voices[speaker] = np.concatenate(parts)
    if LIBRIVOX.is_dir():
        voices["LibriVox"] = np.concatenate([decode(path) for path in sorted(LIBRIVOX.glob("*.wav"))])
    return voices


def mix(
    name: str,
    voices: dict[str, Samples],
    length_s: float,
    seed: int,
    noise_db: float | None,
    *,
    turn_s: tuple[float, float] = _TURN_S,
    shares: Sequence[float] | None = None,
) -> Recording:
    """Let voices speak in turn, each from where it was, again from its start at its end, at changing gains.

    `shares`: how often each of the voices speaks next; None: one as often as another.
    """
    rng = np.random.default_rng(seed)
    weights = dict(zip(voices, shares or [1.0] * len(voices), strict=True))
    speech = {speaker: _speech(samples) for speaker, samples in voices.items()}
    position = {speaker: int(rng.integers(len(samples))) for speaker, samples in voices.items()}
    names = list(voices)
    parts: list[Samples] = []
    marks: list[Frames] = []
    speaker, total = "", 0
    while total < length_s * SAMPLE_RATE:
        others = [other for other in names if other != speaker] or names
        if shares is None:
            speaker = others[int(rng.integers(len(others)))]
        else:
            chances = np.array([weights[other] for other in others])
            speaker = others[int(rng.choice(len(others), p=chances / chances.sum()))]
        samples = voices[speaker]
        count = min(int(rng.uniform(*turn_s) * SAMPLE_RATE), len(samples)) // _FRAME * _FRAME
        places = (position[speaker] + np.arange(count)) % len(samples)
        position[speaker] = (position[speaker] + count) % len(samples)
        turn = samples[places]
        turn = turn * (_LEVEL / np.sqrt(np.mean(turn**2) + 1e-9) * 10 ** (rng.uniform(*_GAIN_DB) / 20))
        pause = int(rng.uniform(*_PAUSE_S) * SAMPLE_RATE) // _FRAME * _FRAME
        parts += [turn.astype(np.float32), np.zeros(pause, np.float32)]
        mark = np.zeros(((count + pause) // _FRAME, len(names)), np.bool_)
        mark[: count // _FRAME, names.index(speaker)] = speech[speaker][places[_FRAME // 2 :: _FRAME]]
        marks.append(mark)
        total += count + pause
    mixed = np.concatenate(parts)
    if noise_db is not None:
        noise = rng.standard_normal(len(mixed)).astype(np.float32)
        mixed = mixed + noise * np.sqrt(np.mean(mixed**2)) * 10 ** (-noise_db / 20)
    mixed = (mixed * min(1.0, 0.95 / np.abs(mixed).max())).astype(np.float32)
    reference = np.concatenate(marks)
    return Recording(name, mixed, reference[:, reference.any(axis=0)])


def error_rate(reference: Frames, found: Frames) -> float:
    """Missed, false and confused speech over all speech, with the assignment of speakers that gives the least."""
    both = reference.T.astype(float) @ found.astype(float)
    most = {0: 0.0}  # what is right at most, by the speakers of the reference that are assigned, as bits
    for column in both.T:
        for taken, right in list(most.items()):
            for row, overlap in enumerate(column.tolist()):
                if not taken >> row & 1:
                    more = taken | 1 << row
                    most[more] = max(most.get(more, 0.0), right + overlap)
    right = max(most.values())
    spoken, heard = reference.sum(axis=1), found.sum(axis=1)
    return float((np.maximum(spoken, heard).sum() - right) / spoken.sum())


def _speech(samples: Samples) -> NDArray[np.bool_]:
    found = np.zeros(len(samples), np.bool_)
    for start, end in speech_ranges(speech_probabilities(samples), len(samples)):
        found[start:end] = True
    return found


def _call_reference(length: int) -> Frames:
    frames = np.zeros((length // _FRAME, 2), np.bool_)
    # A line of the file: SPEAKER sample 1 6.690 0.430 <NA> <NA> speaker90 <NA> <NA>
    for line in CALL.with_suffix(".rttm").read_text().splitlines():
        fields = line.split()
        start, duration = float(fields[3]), float(fields[4])
        frames[round(100 * start) : round(100 * (start + duration)), sorted(_CLEAN_S).index(fields[7])] = True
    return frames


def _turns_of(diarizer: Diarizer, samples: Samples) -> list[Turn]:
    return diarizer.diarize([samples], on_progress=lambda _: None, should_stop=never_stop).turns


def _frames(turns: Sequence[Turn], length: int) -> Frames:
    frames = np.zeros((length, max((turn.speaker for turn in turns), default=1)), np.bool_)
    for turn in turns:
        frames[round(100 * turn.start) : round(100 * turn.end), turn.speaker - 1] = True
    return frames


_SHERPA_PROGRAM = """
import sys, wave, numpy, sherpa_onnx as sherpa
wav, segmentation, embedding = sys.argv[1:]
with wave.open(wav) as file:
    samples = numpy.frombuffer(file.readframes(file.getnframes()), numpy.int16).astype(numpy.float32) / 32768
pyannote = sherpa.OfflineSpeakerSegmentationPyannoteModelConfig(model=segmentation)
config = sherpa.OfflineSpeakerDiarizationConfig(
    segmentation=sherpa.OfflineSpeakerSegmentationModelConfig(pyannote=pyannote),
    embedding=sherpa.SpeakerEmbeddingExtractorConfig(model=embedding),
    clustering=sherpa.FastClusteringConfig(num_clusters=-1, threshold=0.5),
)
for turn in sherpa.OfflineSpeakerDiarization(config).process(samples).sort_by_start_time():
    print(turn.start, turn.end, turn.speaker)
"""


def _sherpa(folder: Path, recording: Recording) -> tuple[float, int, float] | None:
    """The error rate, the speakers and the processor milliseconds a second of sherpa-onnx; None: it is not there."""
    if not SHERPA.is_dir():
        return None
    wav = write_wav(folder / "recording.wav", to_pcm(recording.samples))
    models = [str(DIARIZATION / name) for name in ("segmentation.onnx", "embedding.onnx")]
    before = os.times()
    program = [sys.executable, "-c", _SHERPA_PROGRAM, str(wav), *models]
    printed = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": str(SHERPA)}, capture_output=True, text=True, check=True
    ).stdout
    after = os.times()
    spent_s = after.children_user - before.children_user + after.children_system - before.children_system
    lines = [line.split() for line in printed.splitlines()]
    turns = [Turn(float(start), float(end), int(speaker) + 1) for start, end, speaker in lines]
    error = error_rate(recording.reference, _frames(turns, len(recording.reference)))
    return error, len({turn.speaker for turn in turns}), 1000 * spent_s / (len(recording.samples) / SAMPLE_RATE)


def _beside(theirs: Sequence[tuple[float, int, float] | None]) -> str:
    known = [one for one in theirs if one is not None]
    if not known:
        return ""
    errors = ", ".join(f"{error:.3f}" for error, _, _ in known)
    spent = sum(milliseconds for _, _, milliseconds in known) / len(known)
    return f"; sherpa-onnx {errors}, {[count for _, count, _ in known]} speakers, {spent:.0f} ms a second"


def _memory() -> Row:
    """What half an hour takes over the loaded models. More takes 5 KB for each further second of speech at most."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_memory, args=(theirs,))
    process.start()
    loaded, peak = ours.recv()
    process.join()
    beside = f"{loaded / _MIB:.0f} MB with the models loaded"
    minutes = round(_LONG_S / 60)
    return Row(f"diarization, memory of {minutes} minutes", (peak - loaded) / _MIB, "MB", None, 150.0, beside)


def _measure_memory(pipe: Connection) -> None:
    voices = voices_of_packages()
    samples = mix("", voices, 120.0, 1, None).samples
    diarizer = Diarizer.load(DIARIZATION)
    loaded, peak = _used_bytes(os.getpid()), _Peak(os.getpid())
    times = round(_LONG_S * SAMPLE_RATE / len(samples))
    blocks = (samples for _ in range(times))
    diarizer.diarize(blocks, on_progress=lambda _: None, should_stop=never_stop)
    pipe.send((loaded, peak.stop()))
