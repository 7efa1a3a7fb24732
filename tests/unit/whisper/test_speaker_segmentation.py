import numpy as np
import pytest

from cesar_mqtt.whisper.diarization import Turn, _turns
from cesar_mqtt.whisper.speaker_features import log_mel_banks
from cesar_mqtt.whisper.speaker_segmentation import HOP_SAMPLES, WINDOW_SAMPLES, windows


@pytest.mark.parametrize("length", [0, 1, 159_999, 160_000, 160_001, 239_920, 400_000])
@pytest.mark.parametrize("block", [7_000, 160_000, 1_000_000])
def test_windows_hold_every_sample_where_it_is(length: int, block: int) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)
    blocks = [samples[start : start + block] for start in range(0, length, block)]
    found = list(windows(blocks))
    assert [window.number for window in found] == list(range(len(found)))
    assert [window.is_last for window in found] == [False] * (len(found) - 1) + [True]
    covered = 0
    for window in found:
        start = window.number * HOP_SAMPLES
        assert len(window.samples) == WINDOW_SAMPLES
        assert start <= covered
        np.testing.assert_array_equal(window.samples[: window.length], samples[start : start + window.length])
        assert not window.samples[window.length :].any()
        covered = start + window.length
    assert covered == length


def test_a_pause_of_everybody_belongs_to_the_turn_and_an_interruption_does_not() -> None:
    speaks = np.zeros((400, 2), np.bool_)
    speaks[0:100, 0] = speaks[130:200, 0] = True  # a pause of 0.5 s
    speaks[210:240, 1] = True
    speaks[245:300, 0] = True  # 0.76 s without the first, but not without anybody
    speaks[398:400, 1] = True  # 0.03 s are no turn
    turns = _turns(speaks, 6.0)
    assert turns == [
        Turn(0.022, 3.397, 0),
        Turn(3.566, 4.073, 1),
        Turn(4.157, 5.085, 0),
    ]


def test_the_features_of_a_tone_peak_in_its_band_whatever_the_gain() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    features = log_mel_banks(tone)
    assert features.shape == (98, 80)
    assert set(features.argmax(axis=1).tolist()) == {27}
    noise = np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    np.testing.assert_allclose(log_mel_banks(noise * 0.1) - log_mel_banks(noise), np.log(0.01), atol=1e-3)
    assert log_mel_banks(tone[:399]).shape == (0, 80)
