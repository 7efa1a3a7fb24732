"""Recorded speech and its text: the recordings of tests/data, and what `make build/speech` fetches.

That is nine languages, spoken by synthetic voices, and two recordings of people: a reader, and two who telephone.
"""

import unicodedata
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, Samples, open_audio
from cesar_mqtt.audio.vad import split

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SPEECH = ROOT / "build" / "speech"
LANGUAGES = SPEECH / "pytest_audioeval" / "samples" / "audio"
READER = SPEECH / "moonshine_voice" / "assets" / "two_cities.wav"
CALL = SPEECH / "pyannote" / "audio" / "sample" / "sample.wav"

_SHORTEST_S = 2.0
_PAUSE_S = 0.5
_SEED = 8
_TELEPHONE_HZ = (300, 3400)
_READ = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way - in short, the period was so far like the present
period, that some of its noisiest authorities insisted on its being received, for good or for evil, in the superlative
degree of comparison only."""

Symbol = TypeVar("Symbol")
Pcm = NDArray[np.int16]


@dataclass(frozen=True)
class Clip:
    """A short recording.

    Attributes:
        name: also of its file.
        samples: at `SAMPLE_RATE`.
        language: that is spoken.
        whole: the clips of one recording that was cut have the same; their texts are judged joined, in order.
        text: of the whole.
    """

    name: str
    samples: Samples
    language: str
    whole: str
    text: str


def decode(path: Path) -> Samples:
    with open_audio(path.resolve(), AudioLimits(max_bytes=1 << 30, max_duration_s=86_400.0)) as audio:
        return np.concatenate(list(audio.blocks()))


def english(limit_s: float) -> list[Clip]:
    """A minute of English, cut at pauses into clips of at most so many seconds."""
    whole = Clip(f"en-{limit_s:g}", decode(DATA / "long.ogg"), "en", f"en-{limit_s:g}", (DATA / "long.txt").read_text())
    return cut(whole, limit_s)


def cut(clip: Clip, limit_s: float) -> list[Clip]:
    """Cut a recording at pauses into clips of at most so many seconds."""
    pieces = split(clip.samples, round(limit_s * SAMPLE_RATE))
    return [
        replace(clip, name=f"{clip.name}-{number}", samples=clip.samples[start:end])
        for number, (start, end) in enumerate(pieces)
    ]


def people() -> list[Clip]:
    """A man who reads for 44 s (from moonshine-voice), and two women on the telephone for 30 s (from pyannote-audio).

    Raises:
        SystemExit: they are not there.
    """
    if not (READER.exists() and CALL.exists()):
        raise SystemExit("The recordings of people are not there: run `make build/speech`.")
    # A line of the file: sample 1 Diane 6.68 7.16 Hello?
    said = " ".join(line.split(maxsplit=5)[5] for line in CALL.with_suffix(".stm").read_text().splitlines())
    return [Clip("reader", decode(READER), "en", "reader", _READ), Clip("call", decode(CALL), "en", "call", said)]


def nine_languages() -> list[Clip]:
    """The clips of pytest-audioeval, which are synthetic voices; those under two seconds joined with the next.

    Raises:
        SystemExit: it is not there.
    """
    if not LANGUAGES.is_dir():
        raise SystemExit("The clips of nine languages are not there: run `make build/speech`.")
    clips = []
    for language, paths in groupby(sorted(LANGUAGES.glob("*/*.wav")), lambda path: path.parent.name):
        parts: list[Samples] = []
        texts: list[str] = []
        for path in paths:
            parts += [decode(path), np.zeros(int(_PAUSE_S * SAMPLE_RATE), np.float32)]
            texts.append(path.with_suffix(".txt").read_text())
            if sum(part.size for part in parts) >= _SHORTEST_S * SAMPLE_RATE:
                name = f"{language}-{path.stem}"
                clips.append(Clip(name, np.concatenate(parts), language, name, " ".join(texts)))
                parts, texts = [], []
    return clips


def noisy(clips: Sequence[Clip], snr_db: float) -> list[Clip]:
    """The same clips with white noise."""
    rng = np.random.default_rng(_SEED)
    suffix = f"-{snr_db:g}dB"
    noised = []
    for clip in clips:
        noise = rng.standard_normal(clip.samples.size).astype(np.float32)
        level = np.sqrt(np.mean(clip.samples**2)) * 10 ** (-snr_db / 20)
        mixed = (clip.samples + noise * level).astype(np.float32)
        noised.append(replace(clip, name=clip.name + suffix, whole=clip.whole + suffix, samples=mixed))
    return noised


def telephone(clips: Sequence[Clip]) -> list[Clip]:
    """What a telephone leaves of the clips: 300 to 3,400 Hz."""
    suffix = "-telephone"
    return [
        replace(clip, name=clip.name + suffix, whole=clip.whole + suffix, samples=telephone_band(clip.samples))
        for clip in clips
    ]


def telephone_band(samples: Samples) -> Samples:
    """What a telephone leaves: 300 to 3,400 Hz."""
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(hertz < _TELEPHONE_HZ[0]) | (hertz > _TELEPHONE_HZ[1])] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


def write(folder: Path, clip: Clip) -> Path:
    return write_wav(folder / f"{clip.name}.wav", to_pcm(np.clip(clip.samples, -1, 1)))


def to_pcm(samples: Samples) -> Pcm:
    return (samples * 32767).astype(np.int16)


def write_wav(path: Path, pcm: Pcm) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(pcm.tobytes())
    return path


def character_error_rate(clips: Sequence[Clip], texts: Sequence[str]) -> float:
    """Substitutions, insertions and deletions over the characters that were spoken, letters and digits only."""
    wrong = spoken = 0
    for expected, found in _wholes(clips, texts):
        wrong += edits(found, expected)
        spoken += len(expected)
    return wrong / spoken


def _wholes(clips: Sequence[Clip], texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for _, group in groupby(zip(clips, texts, strict=True), lambda pair: pair[0].whole):
        pairs = list(group)
        yield _letters(pairs[0][0].text), _letters("".join(text for _, text in pairs))


def _letters(text: str) -> str:
    return "".join(character for character in unicodedata.normalize("NFKC", text).casefold() if character.isalnum())


def edits(found: Sequence[Symbol], expected: Sequence[Symbol]) -> int:
    """The fewest substitutions, insertions and deletions that make the one of the other (Levenshtein)."""
    codes = {symbol: number for number, symbol in enumerate({*found, *expected})}
    wanted = np.array([codes[symbol] for symbol in expected])
    steps = np.arange(len(expected) + 1)
    costs = steps.copy()
    for number, symbol in enumerate(found, start=1):
        changed = costs[:-1] + (wanted != codes[symbol])
        best = np.minimum(np.concatenate(([number], changed)), costs + 1)
        costs = np.minimum.accumulate(best - steps) + steps
    return int(costs[-1])
