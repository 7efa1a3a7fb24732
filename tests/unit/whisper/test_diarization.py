"""The diarizer with models that are made up: what it asks between two steps, and how pieces become turns."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import diarization
from cesar_mqtt.whisper.diarization import Diarizer

_MINUTE = 60 * 16_000
_WINDOWS = 12


class _OneVoice:
    """Both models: the first speaker of each window speaks all the time, always with the same voice."""

    def __init__(self, path: Path) -> None:
        self._name = path.name

    def run(self, _values: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._name == "segmentation":
            scores = np.full((1, 589, 7), -20.0, np.float32)
            scores[..., 1] = 0.0
            return scores
        return np.eye(1, 192, dtype=np.float32)


@pytest.fixture
def diarizer(monkeypatch: pytest.MonkeyPatch) -> Diarizer:
    monkeypatch.setattr(diarization, "OnnxModel", _OneVoice)
    return Diarizer(Path("segmentation"), Path("embedding"))


def _recorded(steps: list[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    def record(*args: object, **options: object) -> object:
        steps.append(name)
        return function(*args, **options)

    return record


def test_one_voice_is_one_turn(diarizer: Diarizer) -> None:
    found = diarizer.diarize([np.ones(_MINUTE, np.float32)], on_progress=lambda _: None, should_stop=never_stop)
    (turn,) = found.turns
    assert (turn.start, turn.end) == pytest.approx((0.0, 60.0), abs=0.05)
    assert turn.speaker == 1


def test_a_stop_is_asked_for_before_each_window_of_each_step(
    diarizer: Diarizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("find_speakers", "best_path", "_turns"):
        monkeypatch.setattr(diarization, name, _recorded(steps, name, getattr(diarization, name)))
    asked = _recorded(steps, "asked", never_stop)
    diarizer.diarize([np.ones(_MINUTE, np.float32)], on_progress=lambda _: None, should_stop=lambda: bool(asked()))
    rounds = ["asked", "best_path"] * 4 * _WINDOWS
    found = steps.index("best_path") - 1
    last = steps.index("_turns")
    assert steps[found : found + len(rounds)] == rounds
    assert steps[found - _WINDOWS : found] == ["asked"] * _WINDOWS
    assert steps[last - _WINDOWS : last] == ["asked"] * _WINDOWS


def test_a_stop_is_noticed_at_any_time(diarizer: Diarizer) -> None:
    asked = 0

    def count(stops_at: float) -> bool:
        nonlocal asked
        asked += 1
        return asked >= stops_at

    samples = [np.ones(_MINUTE // 4, np.float32)]
    diarizer.diarize(samples, on_progress=lambda _: None, should_stop=lambda: count(np.inf))
    for stops_at in np.linspace(1, asked, 5).astype(int).tolist():
        asked = 0
        with pytest.raises(Cancelled):
            diarizer.diarize(samples, on_progress=lambda _: None, should_stop=lambda: count(stops_at))  # noqa: B023
        assert asked == stops_at
