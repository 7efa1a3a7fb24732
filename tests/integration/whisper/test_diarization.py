from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper.diarization import DiarizationError, Diarizer
from cesar_mqtt.whisper.known_voices import KnownVoices
from tests.diarization import DIARIZATION, needs_diarization
from tests.recordings import decode, write_wav

pytestmark = needs_diarization

_SPEECH = Path(__file__).parents[2] / "data" / "speech.wav"


def _ignore(_seconds: float) -> None:
    pass


@pytest.fixture(scope="module")
def diarizer() -> Diarizer:
    return Diarizer.load(DIARIZATION)


def test_one_voice_is_one_speaker_whatever_the_blocks_are(diarizer: Diarizer) -> None:
    samples = np.tile(decode(_SPEECH)[0], 4)
    done: list[float] = []
    whole = diarizer.diarize([samples], on_progress=done.append, should_stop=never_stop)
    parts = diarizer.diarize(np.array_split(samples, 17), on_progress=_ignore, should_stop=never_stop)
    assert {turn.speaker for turn in whole.turns} == {1}
    assert whole.turns == parts.turns
    assert done == sorted(done)
    assert done[-1] == pytest.approx(len(samples) / 16_000)
    assert whole.turns[-1].end <= len(samples) / 16_000


def test_silence_has_no_turns(diarizer: Diarizer) -> None:
    found = diarizer.diarize([np.zeros(300_000, np.float32)], on_progress=_ignore, should_stop=never_stop)
    assert (found.turns, found.voices) == ([], {})
    found = diarizer.diarize([], on_progress=_ignore, should_stop=never_stop)
    assert found.turns == []


def test_a_stop_is_noticed_before_the_first_window(diarizer: Diarizer) -> None:
    with pytest.raises(Cancelled):
        diarizer.diarize([np.zeros(16_000, np.float32)], on_progress=_ignore, should_stop=lambda: True)


def test_missing_and_damaged_models_are_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DiarizationError, match=r"'segmentation.onnx' is not on this machine\. Fetch it with"):
        Diarizer.load(tmp_path)
    for name in ("segmentation.onnx", "embedding.onnx"):
        content = (DIARIZATION / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    (tmp_path / "embedding.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(DiarizationError, match=r"'embedding.onnx' is damaged, or another one"):
        Diarizer.load(tmp_path)


def test_a_known_voice_is_found_again_and_another_one_is_not(
    diarizer: Diarizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    speech = decode(_SPEECH)[0]
    half = len(speech) // 2
    write_wav(tmp_path / "Ada Lovelace.wav", speech[:half], 16_000)
    (tmp_path / "notes.txt").write_text("no recording")
    voices = diarizer.diarize([np.tile(speech[half:], 3)], on_progress=_ignore, should_stop=never_stop).voices
    known = KnownVoices(tmp_path, threshold=0.6)
    assert known.names_of(voices, diarizer, should_stop=never_stop) == {1: "Ada Lovelace"}
    assert [record.action for record in caplog.records] == ["known_voice_unreadable"]  # type: ignore[attr-defined]
    german = decode(_SPEECH.with_name("german.ogg"))[0]
    others = diarizer.diarize([german], on_progress=_ignore, should_stop=never_stop).voices
    assert known.names_of(others, diarizer, should_stop=never_stop) == {}
    (tmp_path / "Ada Lovelace.wav").rename(tmp_path / "Ada.wav")
    assert known.names_of(voices, diarizer, should_stop=never_stop) == {1: "Ada"}
