import numpy as np

from cesar_mqtt.whisper.known_voices import match
from cesar_mqtt.whisper.speaker_clustering import Embedding


def _voice(*values: float) -> Embedding:
    vector = np.array([*values, *[0.0] * (192 - len(values))], np.float32)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def test_a_voice_gets_the_name_that_it_is_most_like() -> None:
    known = {"ada": _voice(1, 0.2), "ben": _voice(0, 1)}
    assert match({1: _voice(0.1, 1), 2: _voice(1, 0)}, known, 0.6) == {1: "ben", 2: "ada"}


def test_a_voice_below_the_threshold_stays_unknown() -> None:
    assert match({1: _voice(1, 1)}, {"ada": _voice(1, 0)}, 0.75) == {}
    assert match({1: _voice(1, 1)}, {"ada": _voice(1, 0)}, 0.7) == {1: "ada"}


def test_a_name_goes_to_one_voice_only_the_surest() -> None:
    known = {"ada": _voice(1, 0)}
    assert match({1: _voice(1, 0.5), 2: _voice(1, 0.1), 3: _voice(0, 1)}, known, 0.6) == {2: "ada"}
