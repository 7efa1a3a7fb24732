from typing import Any

import numpy as np
import pytest

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import speaker_clustering
from cesar_mqtt.whisper.speaker_clustering import Voices, best_path, find_speakers, unit


def _voices(
    *counts: int, alike: float = 0.0, seconds: float = 1.0, narrow: float = 0.0, seed: int = 1
) -> tuple[Voices, np.ndarray]:
    """Pieces of several speakers, whose mean voices have the cosine `alike`, as noisy as a second of speech is."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((192, len(counts) + 1)))[0].T
    means = np.sqrt(alike) * axes[0] + np.sqrt(1 - alike) * axes[1:]
    truth = np.repeat(np.arange(len(counts)), counts)
    rng.shuffle(truth)
    pieces = means[truth] + rng.standard_normal((len(truth), 192)) * 0.8 / np.sqrt(192)
    alone = np.ones(len(truth))
    return Voices(unit(pieces.astype(np.float32)), seconds * alone, narrow * alone), truth


def _with_another(voices: Voices, spoken_s: float, *, seed: int = 9, alike: float = 0.0) -> Voices:
    """One voice more, which says so much in pieces of a second, here and there; `alike`: its cosine with the first."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal(192) * np.sqrt(1 - alike**2) + alike * np.sqrt(192) * voices.embeddings[0]
    pieces = own + rng.standard_normal((round(spoken_s), 192)) * 0.8
    embeddings = np.concatenate((voices.embeddings, unit(pieces.astype(np.float32))))
    order = rng.permutation(len(embeddings))
    seconds = np.concatenate((voices.seconds, np.full(len(pieces), spoken_s / len(pieces))))
    narrow = np.concatenate((voices.narrow, np.zeros(len(pieces))))
    return Voices(embeddings[order], seconds[order], narrow[order])


def _count(voices: Voices, least: int | None = None, most: int | None = None) -> int:
    return len(find_speakers(voices, min_speakers=least, max_speakers=most, should_stop=never_stop))


@pytest.mark.parametrize("speakers", [1, 2, 3, 6])
def test_as_many_speakers_are_found_as_there_are_voices(speakers: int) -> None:
    assert _count(_voices(*[40] * speakers)[0]) == speakers


def test_similar_voices_are_two_and_the_same_voice_is_one() -> None:
    assert _count(_voices(40, 40, alike=0.45)[0]) == 2
    assert _count(_voices(40, 40, alike=0.85)[0]) == 1


def test_on_a_telephone_two_voices_may_be_more_alike() -> None:
    assert _count(_voices(40, 40, alike=0.69, narrow=1.0)[0]) == 2
    assert _count(_voices(40, 40, alike=0.69, narrow=0.0)[0]) == 1
    assert _count(_voices(40, 40, alike=0.85, narrow=1.0)[0]) == 1


def test_each_piece_goes_to_the_speaker_that_it_sounds_like() -> None:
    voices, truth = _voices(60, 30, 30)
    centres = find_speakers(voices, min_speakers=None, max_speakers=None, should_stop=never_stop)
    labels = voices.likeness(centres).argmax(axis=1)
    assert len({(int(label), int(true)) for label, true in zip(labels, truth, strict=True)}) == 3


def test_limits_on_the_number_of_speakers_are_kept() -> None:
    voices = _voices(40, 40, 40)[0]
    assert _count(voices, most=2) == 2
    assert _count(voices, most=5) == 3
    assert _count(voices, least=5) == 5
    assert _count(voices, least=4, most=4) == 4
    assert _count(_voices(1)[0], least=3) == 1


def test_what_is_left_over_of_several_voices_is_no_speaker() -> None:
    voices, _ = _voices(60, 60)
    mixed = unit(np.random.default_rng(5).standard_normal((3, 192)).astype(np.float32))
    more = Voices(np.concatenate((voices.embeddings, mixed)), np.ones(123), np.zeros(123))
    assert _count(more) == 2


@pytest.mark.parametrize(("piece_s", "least_s"), [(1.0, 5.2), (3.0, 7.6), (30.0, 40.0)])
def test_a_speaker_of_a_longer_recording_needs_more_speech(piece_s: float, least_s: float) -> None:
    voices, _ = _voices(150, 150, seconds=piece_s)  # five minutes, a quarter of an hour, and two hours and a half
    assert _count(_with_another(voices, 0.8 * least_s)) == 2
    assert _count(_with_another(voices, 1.3 * least_s)) == 3


def test_one_minute_within_three_hours_is_a_speaker() -> None:
    voices, _ = _voices(*[72] * 5, seconds=30.0)
    assert _count(_with_another(voices, 60.0)) == 6
    assert _count(_with_another(voices, 12.0)) == 5


def test_odd_pieces_that_come_again_and_again_for_three_hours_are_no_speakers() -> None:
    voices, _ = _voices(*[72] * 5, seconds=30.0)
    for number in range(4):
        voices = _with_another(voices, 30.0, seed=number)
    assert _count(voices) == 5


def test_the_mood_of_a_voice_in_a_long_recording_is_no_speaker() -> None:
    voices = Voices(unit(np.eye(2, 192, dtype=np.float32)), np.array([5000.0, 4000.0]), np.zeros(2))
    assert _count(_with_another(voices, 200.0, alike=0.6)) == 2
    assert _count(_with_another(voices, 200.0, alike=0.4)) == 3
    assert _count(_with_another(voices, 400.0, alike=0.6)) == 3


def test_a_long_recording_is_condensed_before_all_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    agglomerate = speaker_clustering._agglomerate

    def recorded(clusters: Any, **limits: Any) -> Any:
        sizes.append(len(clusters))
        return agglomerate(clusters, **limits)

    monkeypatch.setattr(speaker_clustering, "_MOST_AT_ONCE", 100)
    monkeypatch.setattr(speaker_clustering, "_agglomerate", recorded)
    assert _count(_voices(300, 200, 100)[0]) == 3
    assert max(sizes) <= 100


def test_a_stop_ends_the_clustering() -> None:
    with pytest.raises(Cancelled):
        find_speakers(_voices(5, 5)[0], min_speakers=None, max_speakers=None, should_stop=lambda: True)


def test_a_stop_is_asked_for_before_each_row_of_the_table_and_each_join() -> None:
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    find_speakers(_voices(40, 40)[0], min_speakers=None, max_speakers=None, should_stop=count)
    assert asked >= 80 + 78


def test_a_change_of_speaker_needs_more_than_a_doubtful_piece() -> None:
    sure, doubtful = [5.0, 0.0], [2.0, 3.0]
    assert best_path(np.array([sure, doubtful, sure], np.float32)).tolist() == [0, 0, 0]
    assert best_path(np.array([sure, sure[::-1], sure[::-1]], np.float32)).tolist() == [0, 1, 1]
