import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import faster_whisper.vad
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cesar_mqtt.audio import vad as vad_module
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, Samples, open_audio
from cesar_mqtt.audio.vad import find_cut, speech_probabilities, speech_ranges, split

DATA = Path(__file__).resolve().parents[2] / "data"
CHUNK = 512
PAUSE = 0.25
MINUTE = 60 * SAMPLE_RATE
LIMITS = AudioLimits(max_bytes=50_000_000, max_duration_s=600.0)


def decode(name: str) -> Samples:
    with open_audio(DATA / name, LIMITS) as audio:
        return np.concatenate(list(audio.blocks()))


class FakeVad:
    """Detects speech everywhere but where all samples are `PAUSE`, and notes how many samples it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    @property
    def session(self) -> "FakeVad":
        return self

    def run(self, _: None, inputs: dict[str, NDArray[np.float32]]) -> tuple[NDArray[np.float32], ...]:
        frames = inputs["input"][:, -CHUNK:]
        self.given.append(frames.size)
        return np.where((frames == PAUSE).all(axis=1), 0.0, 1.0).astype(np.float32), inputs["h"], inputs["c"]


@pytest.fixture
def vad(monkeypatch: pytest.MonkeyPatch) -> FakeVad:
    fake = FakeVad()
    monkeypatch.setattr(vad_module, "get_vad_model", lambda: fake)
    return fake


def speech(duration_s: float, *, pauses: Sequence[tuple[float, float]] = ()) -> Samples:
    """Samples that the fake takes for speech, but for pauses of (start, end) in seconds."""
    samples = np.full(int(duration_s * SAMPLE_RATE), 0.5, np.float32)
    for start_s, end_s in pauses:
        samples[int(start_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)] = PAUSE
    return samples


def cut(samples: Samples) -> int:
    return find_cut(samples, speech_probabilities(samples), search_window=MINUTE)


def cut_s(samples: Samples) -> float:
    return cut(samples) / SAMPLE_RATE


def test_a_cut_falls_between_two_sentences_of_real_speech() -> None:
    sentence = decode("speech.wav")
    pause = np.zeros(SAMPLE_RATE, np.float32)
    samples = np.concatenate([sentence, pause] * 6)
    for length in range(10 * SAMPLE_RATE, len(samples), 3 * SAMPLE_RATE + 777):
        found = cut(samples[:length])
        place = found % (len(sentence) + len(pause))
        assert length // 2 <= found <= length
        assert len(sentence) - 0.2 * SAMPLE_RATE < place < len(sentence) + len(pause)


def test_what_is_listened_to_stays_as_it_is() -> None:
    samples = decode("long.ogg")[: 20 * SAMPLE_RATE]
    before = samples.copy()
    speech_probabilities(samples)
    assert np.array_equal(samples, before)


def test_the_longest_pause_of_the_last_minute_is_cut_in_its_middle(vad: FakeVad) -> None:
    samples = speech(300.0, pauses=[(200.0, 220.0), (250.0, 250.5), (260.0, 262.0), (290.0, 291.0)])
    assert cut_s(samples) == pytest.approx(261.0, abs=0.05)
    assert vad.given


def test_of_pauses_of_the_same_length_the_last_is_taken(vad: FakeVad) -> None:
    chunk_s = CHUNK / SAMPLE_RATE
    pauses = [(start_s, start_s + 20 * chunk_s) for start_s in (1800 * chunk_s, 2800 * chunk_s)]
    assert cut_s(speech(100.0, pauses=pauses)) == pytest.approx(2810 * chunk_s, abs=0.05)
    assert vad.given


def test_the_search_goes_back_minute_by_minute_where_there_is_no_pause(vad: FakeVad) -> None:
    assert cut_s(speech(600.0, pauses=[(390.0, 391.0), (430.0, 431.0)])) == pytest.approx(430.5, abs=0.05)
    assert vad.given


def test_a_pause_in_the_first_half_does_not_count(vad: FakeVad) -> None:
    samples = speech(120.0, pauses=[(50.0, 55.0)])
    assert cut_s(samples) >= 60.0
    assert vad.given


def test_a_hard_consonant_is_no_pause(vad: FakeVad) -> None:
    samples = speech(60.0, pauses=[(40.0, 40.1), (50.0, 50.2)])
    samples[int(55.0 * SAMPLE_RATE) : int(55.3 * SAMPLE_RATE)] *= 0.1
    assert cut_s(samples) == pytest.approx(55.15, abs=0.15)  # the quietest spot, for there is no pause
    assert vad.given


def test_where_there_is_no_pause_the_quietest_spot_of_the_last_minute_is_taken(vad: FakeVad) -> None:
    samples = speech(400.0)
    for start_s, loudness in ((250.0, 0.01), (345.0, 0.1), (370.0, 0.2)):
        samples[int(start_s * SAMPLE_RATE) : int((start_s + 0.4) * SAMPLE_RATE)] *= loudness
    assert cut_s(samples) == pytest.approx(345.2, abs=0.2)
    assert vad.given


@pytest.mark.parametrize("make", [speech, lambda s: speech(s, pauses=[(0.0, s)])], ids=["loud", "silent"])
@pytest.mark.parametrize("duration_s", [0.01, 0.1, 0.5, 1.0, 7.777, 61.5])
def test_a_cut_is_always_in_the_second_half(make: Callable[[float], Samples], duration_s: float, vad: FakeVad) -> None:
    samples = make(duration_s)
    assert len(samples) // 2 <= cut(samples) <= len(samples)
    assert vad.given


def test_a_cut_is_at_a_whole_millisecond(vad: FakeVad) -> None:
    assert cut(speech(100.0007, pauses=[(80.0123, 81.0456)])) % 16 == 0
    assert cut(speech(100.0007)) % 16 == 0
    assert vad.given


def test_a_piece_is_as_long_as_its_pauses_allow(vad: FakeVad) -> None:
    samples = speech(58.0, pauses=[(16.0, 19.0), (26.0, 26.5), (45.0, 47.0)])
    assert [round(end / SAMPLE_RATE) for _, end in split(samples, 30 * SAMPLE_RATE)] == [26, 46, 58]
    assert vad.given


def test_pieces_follow_each_other_and_none_is_too_long() -> None:
    samples = decode("long.ogg")
    pieces = split(samples, 10 * SAMPLE_RATE)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == len(samples)
    assert [end for _, end in pieces[:-1]] == [start for start, _ in pieces[1:]]
    assert all(0 < end - start <= 10 * SAMPLE_RATE for start, end in pieces)
    assert split(samples, len(samples)) == [(0, len(samples))]


# --- speech


def test_blocks_give_what_all_samples_at_once_give() -> None:
    long = decode("long.ogg")
    for samples in (long, long[: 256 * CHUNK], long[: 256 * CHUNK + 1], long[:700], long[:1], long[:0]):
        padded = np.pad(samples, (0, 2 * CHUNK - len(samples) % CHUNK))
        expected = faster_whisper.vad.get_vad_model()(padded).reshape(-1)[: -(-len(samples) // CHUNK)]
        found = speech_probabilities(samples)
        assert found.shape == expected.shape
        assert np.allclose(found, expected, atol=1e-5)


def test_a_minute_of_nothing_is_not_given_to_the_vad(vad: FakeVad) -> None:
    silence = np.zeros(MINUTE, np.float32)
    probabilities = speech_probabilities(silence)
    assert vad.given == []
    assert probabilities.shape == (MINUTE // CHUNK,)
    assert not probabilities.any()
    silence[-1] = 0.1
    assert speech_probabilities(silence).any()


def faster_whispers(samples: Samples) -> list[tuple[int, int]]:
    return [(part["start"], part["end"]) for part in faster_whisper.vad.get_speech_timestamps(samples)]


def test_speech_is_where_faster_whisper_finds_it() -> None:
    long, sentence = decode("long.ogg"), decode("speech.wav")
    parts = [long[: 20 * SAMPLE_RATE], np.zeros(3 * SAMPLE_RATE, np.float32), sentence, np.zeros(99_999, np.float32)]
    for samples in (np.concatenate(parts), np.concatenate(parts[1:]), sentence, parts[1], sentence[:100]):
        found = speech_ranges(speech_probabilities(samples), len(samples))
        assert list(found) == faster_whispers(samples)
    assert len(speech_ranges(speech_probabilities(np.concatenate(parts)), sum(map(len, parts)))) == 2


@given(
    runs=st.lists(st.tuples(st.sampled_from((0.0, 0.34, 0.36, 0.49, 0.5, 1.0)), st.integers(1, 90)), max_size=12),
    last=st.integers(1, CHUNK - 1),
)
def test_the_rules_are_those_of_faster_whisper(runs: Sequence[tuple[float, int]], last: int) -> None:
    probabilities = np.array(list(itertools.chain(*([value] * times for value, times in runs), [0.4])), np.float32)
    samples = np.zeros((len(probabilities) - 1) * CHUNK + last, np.float32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(faster_whisper.vad, "get_vad_model", lambda: lambda _: probabilities)
        assert list(speech_ranges(probabilities, len(samples))) == faster_whispers(samples)


def test_speech_before_a_cut_ends_there_at_the_latest() -> None:
    probabilities = np.ones(100, np.float32)
    assert speech_ranges(probabilities, 1000) == ((0, 1000),)
    assert speech_ranges(np.concatenate((np.zeros(2, np.float32), probabilities)), 1000) == ()
    assert speech_ranges(probabilities, 0) == ()
