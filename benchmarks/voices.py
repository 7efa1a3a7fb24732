"""Conversations made of single voices, all of people, with who speaks when; and the diarization error rate (DER).

The error rate is strict: no collar, overlap counts. The reference is the speech that the VAD finds in each clean voice
before mixing, with its defaults (silence under 2 s belongs to the speech, 0.4 s on each side).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from benchmarks.corpus import CALL, READER, SPEECH, decode, telephone_band
from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import speech_probabilities, speech_ranges
from cesar_mqtt.whisper.diarization import Turn

_LIBRIVOX = SPEECH / "usr" / "share" / "pocketsphinx" / "test" / "data" / "librivox"
_CLONE = SPEECH / "moonshine_voice" / "assets" / "clone-test.wav"
_PROMPTS = SPEECH / "usr" / "share" / "asterisk" / "sounds"

_FRAME = SAMPLE_RATE // 100
_TURN_S = (2.0, 20.0)
_GAIN_DB = (-6.0, 6.0)
_PAUSE_S = (0.1, 0.8)
_LEVEL = 0.06
_CLEAN_S = {"speaker90": ((8.35, 9.85), (11.1, 14.4), (18.7, 21.4)), "speaker91": ((14.8, 17.85), (21.9, 27.8))}
"""Where one of the call speaks alone, by its reference."""
_PROMPTS_S = 150.0
"""So much of each voice is read, of prompts that last 3 s or more: 24 KB."""
_PROMPT_BYTES = 24_000

Frames = NDArray[np.bool_]
"""Who speaks in each 10 ms; shape (frames, speakers)."""


@dataclass(frozen=True)
class Recording:
    """Samples, and who speaks when.

    Attributes:
        name: what it is made of.
        samples: at `SAMPLE_RATE`.
        reference: who speaks when.
        spoken: in order, each voice by its name and what it says, clean and at its own level; empty where unknown.
    """

    name: str
    samples: Samples
    reference: Frames
    spoken: list[tuple[str, Samples]] = field(default_factory=list)

    @property
    def length_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    @property
    def speakers(self) -> int:
        return int(self.reference.shape[1])

    def over_a_telephone(self) -> "Recording":
        return replace(self, samples=telephone_band(self.samples))


def voices_of_packages() -> dict[str, Samples]:
    """The single voices that packages have: two or three readers, and the two of the call where they speak alone.

    Raises:
        SystemExit: they are not there.
    """
    if not (READER.exists() and CALL.exists()):
        raise SystemExit("The recordings of people are not there: run `make build/speech`.")
    voices = {"two cities": decode(READER), "clone": decode(_CLONE)}
    call = decode(CALL)
    for speaker, ranges in _CLEAN_S.items():
        parts = [call[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] for start, end in ranges]
        voices[speaker] = np.concatenate(parts)
    if _LIBRIVOX.is_dir():
        voices["LibriVox"] = np.concatenate([decode(path) for path in sorted(_LIBRIVOX.glob("*.wav"))])
    return voices


def unused_voices() -> dict[str, Samples]:
    """Four people who speak the prompts of a telephone system, each in a language; empty: they are not there.

    No setting of the diarizer was chosen with them, but for how much more alike voices are on a telephone.
    """
    voices = {}
    for folder in sorted(_PROMPTS.glob("*")):
        if folder.name.startswith("es_"):  # the English voice once more
            continue
        paths = [path for path in sorted(folder.rglob("*.g722")) if path.stat().st_size > _PROMPT_BYTES]
        parts: list[Samples] = []
        for path in paths[::2]:
            if sum(map(len, parts)) < _PROMPTS_S * SAMPLE_RATE and not path.name.startswith("tt-"):  # not people
                parts.append(_decode_g722(path))
        voices[folder.name[:2]] = np.concatenate(parts)
    return voices


def _decode_g722(path: Path) -> Samples:
    """Decode what has no header, so that the product does not take it for audio."""
    with av.open(path, format="g722") as file:
        pcm = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    return (pcm / 32768.0).astype(np.float32)


def mix(
    name: str,
    voices: dict[str, Samples],
    length_s: float,
    seed: int,
    noise_db: float | None = None,
    *,
    turn_s: tuple[float, float] = _TURN_S,
    shares: Sequence[float] | None = None,
) -> Recording:
    """Let voices speak in turn, each from where it was, again from its start at its end, at changing gains.

    `shares`: how often each of the voices speaks next; None: one as often as another.
    """
    rng = np.random.default_rng(seed)
    speech = {speaker: _speech(samples) for speaker, samples in voices.items()}
    position = {speaker: int(rng.integers(len(samples))) for speaker, samples in voices.items()}
    names = list(voices)
    weights = dict(zip(names, shares or [1.0] * len(names), strict=True))
    parts: list[Samples] = []
    marks: list[Frames] = []
    spoken: list[tuple[str, Samples]] = []
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
        spoken.append((speaker, turn))
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
    return Recording(name, mixed, reference[:, reference.any(axis=0)], spoken)


def _speech(samples: Samples) -> NDArray[np.bool_]:
    found = np.zeros(len(samples), np.bool_)
    for start, end in speech_ranges(speech_probabilities(samples), len(samples)):
        found[start:end] = True
    return found


def telephone_call() -> Recording:
    """Two women on the telephone for 30 s, with the turns that people wrote down."""
    samples = decode(CALL)
    frames = np.zeros((len(samples) // _FRAME, 2), np.bool_)
    # A line of the file: SPEAKER sample 1 6.690 0.430 <NA> <NA> speaker90 <NA> <NA>
    for line in CALL.with_suffix(".rttm").read_text().splitlines():
        fields = line.split()
        start, duration = float(fields[3]), float(fields[4])
        frames[round(100 * start) : round(100 * (start + duration)), sorted(_CLEAN_S).index(fields[7])] = True
    return Recording("a telephone call", samples, frames)


def error_rate(recording: Recording, turns: Sequence[Turn]) -> float:
    """Missed, false and confused speech over all speech, with the assignment of speakers that gives the least."""
    reference = recording.reference
    found = np.zeros((len(reference), max((turn.speaker for turn in turns), default=1)), np.bool_)
    for turn in turns:
        found[round(100 * turn.start) : round(100 * turn.end), turn.speaker - 1] = True
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
