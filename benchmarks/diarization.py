"""Who speaks when: error rates on recordings of people, beside sherpa-onnx with the same weights, and what it costs."""

import itertools
import os
import random
import subprocess
import sys
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.bus import _mosquitto
from benchmarks.corpus import ROOT, to_pcm, write_wav
from benchmarks.jobs import CANCELS, PATIENCE_S, _consumer, _idle, _listening, cancel_row
from benchmarks.memory import _Peak, _used_bytes
from benchmarks.table import Row
from benchmarks.transcription import _ours, _words
from benchmarks.voices import Recording, error_rate, mix, telephone_call, unused_voices, voices_of_packages
from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.threads import never_stop
from cesar_mqtt.transcript import Segment, TranscriptionOptions, Window, Word
from cesar_mqtt.whisper.diarization import Diarizer, Turn
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.speakers import SpeakerLabeller
from cesar_mqtt.whisper.transcriber import Transcriber
from tests.diarization import DIARIZATION, MODELS_DIRECTORY

SHERPA = ROOT / "build" / "sherpa"

_READERS = ("LibriVox", "two cities")
_SEEDS = (1, 2, 3)
_LONG_S = 3 * 3600.0
_TEN_MINUTES_S = 600.0
_SPOKEN_S = 0.4
"""A word of the transcript of three hours, with the pause behind it."""
_WINDOW_S = 60.0
_MIB = 1 << 20
_MODELS = ModelSettings(directory=MODELS_DIRECTORY, download=False)


def run(folder: Path) -> list[Row]:
    if not (DIARIZATION / "embedding.onnx").is_file():
        raise SystemExit("The models of the diarizer are not there: run `make diarization-models`.")
    diarizer = Diarizer.load(DIARIZATION)
    voices = voices_of_packages()
    readers = {name: voices[name] for name in _READERS if name in voices}
    rows = _chosen_with(diarizer, folder, voices, readers)
    with _three_hours(folder, voices) as memory:
        rows += _not_chosen_with(diarizer)
        if len(readers) == 2:
            rows.append(_words_of_two(folder, readers))
    rows += memory
    rows.append(_cancel(folder, mix("", voices, _TEN_MINUTES_S, 1)))
    return rows


# -- error rates ---------------------------------------------------------------------------------------------------


def _chosen_with(
    diarizer: Diarizer, folder: Path, voices: dict[str, Samples], readers: dict[str, Samples]
) -> list[Row]:
    """The voices that the configuration was chosen with, and the processor time that they take."""
    rows: list[Row] = []
    spent_s = heard_s = 0.0
    for bound, recordings in _recordings(voices, readers):
        started = time.process_time()
        rows += _errors(diarizer, recordings, bound, _beside_sherpa(folder, recordings[0]))
        spent_s += time.process_time() - started
        heard_s += sum(recording.length_s for recording in recordings)
    rows.append(Row("diarization, processor time a second", 1000 * spent_s / heard_s, "ms", at_most=50.0))
    return rows


def _recordings(
    voices: dict[str, Samples], readers: dict[str, Samples]
) -> Iterator[tuple[float | None, list[Recording]]]:
    yield 0.12, [telephone_call()]
    if len(readers) == 2:
        for noise_db, bound in ((None, 0.10), (15.0, 0.15)):
            title = "two readers in turn, 75 s" + ("" if noise_db is None else f", {noise_db:g} dB of noise")
            yield bound, [mix(title, readers, 75.0, seed, noise_db) for seed in _SEEDS]
    for name, samples in readers.items():
        yield 0.15, [mix(f"one reader ({name}), 10 minutes", {name: samples}, _TEN_MINUTES_S, 1)]
    yield 0.15, [mix(f"{len(voices)} voices, 10 minutes", voices, _TEN_MINUTES_S, 1)]


def _not_chosen_with(diarizer: Diarizer) -> list[Row]:
    """Voices that chose nothing, in other orders, lengths, shares and noises; one configuration for all."""
    voices = unused_voices()
    if not voices:
        print("left out: voices that the diarizer was not tuned with, because the prompts of Asterisk are not there")
        return []
    rows: list[Row] = []
    for bound, recordings in _unused_recordings(voices):
        rows += _errors(diarizer, recordings, bound, "")
    return rows


def _unused_recordings(voices: dict[str, Samples]) -> Iterator[tuple[float | None, list[Recording]]]:
    """Kinds of recordings, each with the most that its error rate may be; None: it only informs."""
    pairs = [{first: voices[first], second: voices[second]} for first, second in itertools.combinations(voices, 2)]
    yield 0.10, [mix("other pairs, 75 s", pair, 75.0, 11) for pair in pairs]
    yield 0.15, [mix("other pairs, 75 s, 15 dB of noise", pair, 75.0, 12, 15.0) for pair in pairs]
    yield None, [mix("other pairs, 75 s, 5 dB of noise", pair, 75.0, 13, 5.0) for pair in pairs]
    yield None, [mix("other pairs, 75 s, telephone, 15 dB", pair, 75.0, 15, 15.0).over_a_telephone() for pair in pairs]
    yield None, [mix("other pairs, 75 s, turns of 0.6 to 3 s", pair, 75.0, 16, turn_s=(0.6, 3.0)) for pair in pairs]
    threes = [{name: voices[name] for name in names} for names in itertools.combinations(voices, 3)]
    shares = (0.7, 0.2, 0.1)
    title = "three others, 70, 20 and 10 %, 5 minutes"
    yield 0.15, [mix(title, three, 300.0, seed, shares=shares) for seed, three in enumerate(threes, start=17)]
    orders = ({name: voices[name] for name in names} for names in (list(voices), list(reversed(voices))))
    unequal = (0.55, 0.25, 0.12, 0.08)
    yield 0.15, [mix("four others, 55 to 8 %, 5 minutes", order, 300.0, 31, shares=unequal) for order in orders]
    for name, samples in voices.items():
        yield None, [mix(f"one other ({name}), 3 minutes, telephone", {name: samples}, 180.0, 3).over_a_telephone()]


def _errors(diarizer: Diarizer, recordings: Sequence[Recording], bound: float | None, theirs: str) -> list[Row]:
    """The worst error rate of several recordings of a kind, and the worst count of speakers.

    `bound`: the most that the error rate may be, and the count has to be right; None: neither has a bound. Of one
    speaker only the count is given.
    """
    errors, found = [], []
    for recording in recordings:
        turns = diarizer.diarize([recording.samples], on_progress=lambda _: None, should_stop=never_stop).turns
        errors.append(error_rate(recording, turns))
        found.append(len({turn.speaker for turn in turns}))
    wanted, title = recordings[0].speakers, f"diarization, {recordings[0].name}"
    beside = f"{', '.join(f'{error:.3f}' for error in errors)}{theirs}"
    wrong = max(abs(count - recording.speakers) for count, recording in zip(found, recordings, strict=True))
    exact = None if bound is None else 0
    count = Row(f"{title}: speakers too many or few", wrong, "", at_most=exact, beside=f"{found}, {wanted} in each")
    if wanted == 1:
        return [count]
    return [Row(f"{title}: DER", max(errors), at_most=bound, beside=beside), count]


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
_SHERPA_LONGEST_S = 100.0


def _beside_sherpa(folder: Path, recording: Recording) -> str:
    """What sherpa-onnx makes of a recording; empty: it is not there, or would take minutes."""
    if not SHERPA.is_dir() or recording.length_s > _SHERPA_LONGEST_S:
        return ""
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
    found = len({turn.speaker for turn in turns})
    cost = f"{1000 * spent_s / recording.length_s:.0f} ms a second"
    return f"; sherpa-onnx in the first: {error_rate(recording, turns):.3f}, {found} speakers, {cost}"


# -- words ---------------------------------------------------------------------------------------------------------


def _words_of_two(folder: Path, readers: dict[str, Samples]) -> Row:
    """The words that get their speaker, by the transcripts of each turn by itself, clean and before mixing."""
    store = ModelStore(ModelSettings(download=False))
    transcriber = Transcriber(store, AudioSettings())
    options = TranscriptionOptions("base", language="en", word_timestamps=True, diarize=True)
    shares, compared, spoken = [], 0, 0
    for seed in _SEEDS:
        recording = mix("", readers, 75.0, seed)
        expected = []
        for number, (speaker, samples) in enumerate(recording.spoken):
            path = write_wav(folder / f"turn-{number}.wav", to_pcm(samples))
            expected += [(word, speaker) for word in _words(_ours(transcriber, path, options))]
        path = write_wav(folder / "conversation.wav", to_pcm(recording.samples))
        both = _of_both(expected, _labelled_words(transcriber, path, options))
        pairs = Counter(both)
        assignments = (dict(zip(readers, names, strict=True)) for names in itertools.permutations(_names(both), 2))
        right = max(
            sum(count for (speaker, name), count in pairs.items() if assigned[speaker] == name)
            for assigned in assignments
        )
        shares.append(right / len(both))
        compared += len(both)
        spoken += len(expected)
    return Row(
        "words with the right speaker, two readers, 75 s, base",
        100 * min(shares),
        "%",
        at_least=97.0,
        beside=f"{', '.join(f'{100 * share:.1f}' for share in shares)} % of the {compared} of {spoken} words that both "
        "transcripts have",
    )


def _names(both: Sequence[tuple[str, str]]) -> list[str]:
    """The labels that were given; at least two, so that there is an assignment."""
    return [*sorted({name for _, name in both}), "no other"]


def _labelled_words(transcriber: Transcriber, path: Path, options: TranscriptionOptions) -> list[tuple[str, str]]:
    recording = transcriber.open(path, options)
    transcript = transcriber.transcribe(
        recording,
        options,
        on_progress=lambda _: None,
        on_segment=lambda _: None,
        on_window=lambda _: None,
        should_stop=never_stop,
    )
    recording.close()
    found = SpeakerLabeller(_MODELS).label(
        recording, options, transcript.windows, on_progress=lambda _: None, should_stop=never_stop
    )
    return [
        (word, segment.speaker or "")
        for window in found.windows
        for segment in window.segments
        for word in _words(segment.text)
    ]


def _of_both(expected: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Who says each word that both have, and whom it is given to."""
    matcher = SequenceMatcher(None, [word for word, _ in expected], [word for word, _ in found], autojunk=False)
    return [
        (expected[block.a + number][1], found[block.b + number][1])
        for block in matcher.get_matching_blocks()
        for number in range(block.size)
    ]


# -- three hours ---------------------------------------------------------------------------------------------------


@contextmanager
def _three_hours(folder: Path, voices: dict[str, Samples]) -> Iterator[list[Row]]:
    """Label three hours in a process of its own while something else runs; the rows are there at the end."""
    path = folder / "three-hours.wav"
    pcm = to_pcm(mix("", voices, _TEN_MINUTES_S, 1).samples).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        for _ in range(round(_LONG_S / _TEN_MINUTES_S)):
            file.writeframes(pcm)
    rows: list[Row] = []
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_label_three_hours, args=(str(path), theirs))
    process.start()
    yield rows
    loaded, peak, pause_s, speakers = ours.recv()
    process.join()
    path.unlink()
    rows.append(
        Row(
            "diarization of 3 hours, memory over the loaded model tiny.en",
            (peak - loaded) / _MIB,
            "MiB",
            at_most=150.0,
            beside=f"{loaded / _MIB:.0f} MiB, then {peak / _MIB:.0f} MiB",
        )
    )
    rows.append(
        Row(
            "diarization of 3 hours: speakers too many or few",
            abs(speakers - len(voices)),
            "",
            at_most=0,
            beside=f"{speakers} of {len(voices)}",
        )
    )
    rows.append(Row("diarization of 3 hours, longest time in which no cancel is noticed", pause_s, "s", at_most=1.0))


def _label_three_hours(path: str, pipe: Connection) -> None:
    """As the consumer does it, with a Whisper model loaded; its transcript counts as memory of the diarization."""
    store, options = ModelStore(ModelSettings(download=False)), TranscriptionOptions("tiny.en", diarize=True)
    store.load("tiny.en")
    recording = Transcriber(store, AudioSettings()).open(Path(path), options)
    next(recording.chunks(never_stop))
    recording.close()
    loaded, peak = _used_bytes(os.getpid()), _Peak(partial(_used_bytes, os.getpid()))
    windows = [_window(number) for number in range(round(_LONG_S / _WINDOW_S))]
    asked = [time.perf_counter(), 0.0]

    def should_stop() -> bool:
        now = time.perf_counter()
        asked[:] = now, max(asked[1], now - asked[0])
        return False

    found = SpeakerLabeller(_MODELS).label(
        recording, options, windows, on_progress=lambda _: None, should_stop=should_stop
    )
    should_stop()
    pipe.send((loaded, peak.stop(), asked[1], found.speakers))


def _window(number: int) -> Window:
    """A window full of words."""
    start_s = number * _WINDOW_S
    words = tuple(
        Word(start_s + place * _SPOKEN_S, start_s + (place + 0.8) * _SPOKEN_S, f" word{place}", 0.9)
        for place in range(round(_WINDOW_S / _SPOKEN_S))
    )
    text = "".join(word.text for word in words)
    segment = Segment(number + 1, start_s, start_s + _WINDOW_S, text.strip(), -0.2, 0.01, words)
    return Window(number, start_s + _WINDOW_S, text, "en", 1.0, (segment,))


# -- cancel --------------------------------------------------------------------------------------------------------


def _cancel(folder: Path, recording: Recording) -> Row:
    chance = random.Random(7)  # noqa: S311 - the same moments in every run
    path = write_wav(folder / "ten-minutes.wav", to_pcm(recording.samples))
    topic, pause, took = "cesar/status/long", threading.Event(), []
    environ = {"CESAR_MODELS__DIRECTORY": str(MODELS_DIRECTORY)}
    with _mosquitto(folder) as port, _listening(port) as bus, _consumer(folder / "c", port, environ=environ):
        _idle(bus)
        bus.publish("cesar/jobs", {"job_id": "long", "audio_path": str(path), "diarize": True})
        for attempt in range(1, CANCELS + 1):
            if attempt > 1:
                bus.publish("cesar/request/retry", "long")
            bus.wait(
                topic,
                lambda status: status["attempt"] == attempt and "diarization_progress" in status,  # noqa: B023 - at once
                PATIENCE_S,
            )
            pause.wait(chance.uniform(0.0, 4.0))
            started = time.perf_counter()
            bus.publish("cesar/request/cancel", "long")
            bus.wait(
                topic,
                lambda status: status["attempt"] == attempt and status["status"] == "cancelled",  # noqa: B023
                PATIENCE_S,
            )
            took.append(time.perf_counter() - started)
    return cancel_row("cancel in the diarization", took)
