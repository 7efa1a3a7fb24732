"""How much padding the encoder needs after a clip: errors and time by the number of frames, for worse and worse sound.

`python -m benchmarks.encoder_input base` prints what docs/performance.md has; `make build/speech` fetches the clips. A
folder after the name of the model adds its recordings: English, as WAV, each with its text beside it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel

from benchmarks.corpus import Clip, character_error_rate, cut, decode, english, nine_languages, noisy, people, telephone
from cesar_mqtt.audio.decoder import SAMPLE_RATE
from cesar_mqtt.audio.vad import speech_probabilities, speech_ranges
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.transcript import TranscriptionOptions
from cesar_mqtt.whisper.encoder_input import FULL_FRAMES, PADDING_FRAMES
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.pipeline import Pipeline

PADDINGS = (50, 100, 200, 300, 500, FULL_FRAMES)
_CHORD_HZ = (220.0, 277.2, 329.6, 440.0)
_MUSIC_DB = 10.0


def _with_music(clips: Sequence[Clip]) -> list[Clip]:
    """The clips with a chord that swells twice a second behind them, 10 dB below the voice."""
    mixed = []
    for clip in clips:
        seconds = np.arange(len(clip.samples)) / SAMPLE_RATE
        chord = sum(np.sin(2 * np.pi * hertz * seconds) for hertz in _CHORD_HZ) * (1 + np.sin(4 * np.pi * seconds))
        level = np.sqrt(np.mean(clip.samples**2) / np.mean(chord**2)) * 10 ** (-_MUSIC_DB / 20)
        mixed.append(replace(clip, samples=(clip.samples + level * chord).astype(np.float32)))
    return mixed


CONDITIONS: dict[str, Callable[[Sequence[Clip]], Sequence[Clip]]] = {
    "clean": lambda clips: clips,
    "noise, 10 dB": lambda clips: noisy(clips, 10.0),
    "noise, 0 dB": lambda clips: noisy(clips, 0.0),
    "telephone": telephone,
    "music": _with_music,
}


def _recordings(folder: Path) -> list[Clip]:
    return [
        Clip(path.stem, decode(path), "en", path.stem, path.with_suffix(".txt").read_text())
        for path in sorted(folder.glob("*.wav"))
    ]


def _transcribe(model: WhisperModel, name: str, clips: Sequence[Clip], padding: int) -> tuple[float, list[str]]:
    PADDING_FRAMES.update(dict.fromkeys(PADDING_FRAMES, padding))
    options = TranscriptionOptions(name, beam_size=5)
    started = time.perf_counter()
    texts = []
    for clip in clips:
        speech = speech_ranges(speech_probabilities(clip.samples), len(clip.samples))
        transcription = Pipeline(model, options, device="cpu", should_stop=lambda: False)
        segments, _ = transcription.transcribe(clip.samples, speech, None)
        texts.append("".join(segment.text for segment in segments))
    return time.perf_counter() - started, texts


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.encoder_input")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--paddings", nargs="*", type=int, default=list(PADDINGS))
    parser.add_argument("--languages-only", action="store_true", help="leave out the English recordings")
    asked = parser.parse_args()
    model = ModelStore(ModelSettings(download=False)).load(asked.model)
    clips = [] if asked.languages_only else english(4.0) + english(6.0)
    clips += nine_languages() if model.model.is_multilingual else []
    clips += [] if asked.languages_only else [part for clip in people() for part in cut(clip, 6.0)]
    clips += _recordings(asked.folder) if asked.folder else []
    print(f"{asked.model}, {len(clips)} clips, {sum(clip.samples.size for clip in clips) / SAMPLE_RATE:.0f} s")
    for condition in asked.conditions:
        heard = CONDITIONS[condition](clips)
        for padding in asked.paddings:
            seconds, texts = _transcribe(model, asked.model, heard, padding)
            rate = 100 * character_error_rate(heard, texts)
            print(f"{condition:<14} {padding:>5} frames {rate:6.2f} % {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
