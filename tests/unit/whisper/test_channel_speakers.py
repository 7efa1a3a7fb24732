import threading
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio.decoder import AudioLimits, Samples
from cesar_mqtt.audio.windows import Recording
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import Cancelled
from cesar_mqtt.threads import never_stop
from cesar_mqtt.transcript import TranscriptionOptions, Word
from cesar_mqtt.whisper import speakers
from cesar_mqtt.whisper.channel_speakers import Levels, turns_of
from cesar_mqtt.whisper.diarization import DiarizationError, Turn
from cesar_mqtt.whisper.speakers import LabelledWindows, SpeakerLabeller
from tests import factories
from tests.recordings import decode

SPEECH = Path(__file__).parents[2] / "data" / "speech.wav"
OPTIONS = TranscriptionOptions("tiny.en", diarize="channels")


def write(path: Path, *channels: Samples) -> Path:
    length = max(map(len, channels))
    together = np.stack([np.pad(each, (0, length - len(each))) for each in channels], axis=1)
    with wave.open(str(path), "wb") as file:
        file.setparams((len(channels), 2, 16_000, 0, "NONE", ""))
        file.writeframes((together * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    return path


def label(path: Path, *, until_s: float, should_stop: Callable[[], bool] = never_stop) -> LabelledWindows:
    """Label a transcript with a word in each half second."""
    words = tuple(Word(n / 2, (n + 1) / 2, f" {n}", 0.9) for n in range(int(until_s * 2)))
    text = " ".join(word.text.strip() for word in words)
    window = factories.window(0, factories.segment(1, text, end_s=until_s, words=words), until_s=until_s)
    recording = Recording(path, limits=AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0), window_s=60.0)
    recording.close()
    done: list[float] = []
    found = SpeakerLabeller(ModelSettings()).label(
        recording, OPTIONS, [window], on_progress=done.append, should_stop=should_stop
    )
    assert done == sorted(done)
    return found


def by_time(found: LabelledWindows) -> list[tuple[float, float, str | None]]:
    return [(each.start_s, each.end_s, each.speaker) for window in found.windows for each in window.segments]


@pytest.fixture(scope="module")
def voice() -> Samples:
    return decode(SPEECH)[0]


def test_each_channel_is_a_speaker_also_where_one_leaks_into_the_other(voice: Samples, tmp_path: Path) -> None:
    silence = np.zeros(len(voice), np.float32)
    left = (np.concatenate((voice, 0.1 * voice)) * 0.3).astype(np.float32)
    right = (np.concatenate((0.1 * voice, voice)) * 0.9).astype(np.float32)
    for path in (
        write(tmp_path / "apart.wav", np.concatenate((voice, silence)), np.concatenate((silence, voice))),
        write(tmp_path / "leaking.wav", left, right),
    ):
        found = label(path, until_s=2 * len(voice) / 16_000)
        first, second = by_time(found)
        assert (first[2], second[2], found.speakers, found.problem) == ("Speaker 1", "Speaker 2", 2, None)
        assert second[0] == pytest.approx(len(voice) / 16_000, abs=0.8)


def test_a_silent_first_channel_leaves_its_number_free(voice: Samples, tmp_path: Path) -> None:
    found = label(write(tmp_path / "right.wav", np.zeros(len(voice), np.float32), voice), until_s=4.0)
    assert {speaker for _, _, speaker in by_time(found)} == {"Speaker 2"}
    assert found.speakers == 1


def test_one_channel_is_one_speaker_and_that_is_said(voice: Samples, tmp_path: Path) -> None:
    found = label(write(tmp_path / "mono.wav", voice), until_s=4.0)
    assert by_time(found) == [(0.0, 4.0, "Speaker 1")]
    assert found.speakers == 1
    assert (found.problem or "").startswith("The recording has only one channel")


def test_the_same_voice_on_both_channels_is_one_speaker(voice: Samples, tmp_path: Path) -> None:
    found = label(write(tmp_path / "same.wav", voice, voice), until_s=4.0)
    assert {speaker for _, _, speaker in by_time(found)} == {"Speaker 1"}


def test_more_channels_than_speakers_can_be_is_an_error(voice: Samples, tmp_path: Path) -> None:
    path = write(tmp_path / "many.wav", *[voice[:16_000]] * 21)
    with pytest.raises(DiarizationError, match="21 channels, and at most 20"):
        label(path, until_s=1.0)


def test_a_stop_is_noticed(voice: Samples, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        label(write(tmp_path / "apart.wav", voice, voice), until_s=4.0, should_stop=lambda: True)


def test_a_stop_is_noticed_while_the_words_are_labelled(
    voice: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = threading.Event()

    def stop_then(levels: list[Levels]) -> list[Turn]:
        stopping.set()
        return turns_of(levels)

    monkeypatch.setattr(speakers, "turns_of", stop_then)
    with pytest.raises(Cancelled):
        label(write(tmp_path / "apart.wav", voice, voice), until_s=4.0, should_stop=stopping.is_set)


def test_nothing_is_decoded_where_nobody_speaks(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "none", limits=AudioLimits(max_bytes=1, max_duration_s=1.0), window_s=60.0)
    recording.close()
    found = SpeakerLabeller(ModelSettings()).label(
        recording, OPTIONS, [factories.window(0)], on_progress=lambda _: None, should_stop=never_stop
    )
    assert (found.speakers, found.problem) == (0, None)
