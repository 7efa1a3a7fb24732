from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.loudness import Loudness
from cesar_mqtt.audio.vad import speech_probabilities
from tests.recordings import decode, write_wav

DATA = Path(__file__).parents[2] / "data"
SPEECH, _ = decode(DATA / "speech.wav")
BLOCK = 10 * SAMPLE_RATE
RANDOM = np.random.default_rng(1)


def down(samples: NDArray[np.float32], decibels: float) -> Samples:
    return (samples * 10 ** (-decibels / 20)).astype(np.float32)


def dithered(samples: Samples) -> Samples:
    """As 16 bits have it."""
    drawn = RANDOM.uniform(-0.5, 0.5, len(samples))
    return (np.round(samples * 32_767 + drawn) / 32_768).astype(np.float32)


def leveled(samples: Samples) -> tuple[Samples, bool]:
    loudness = Loudness()
    blocks = [loudness.level(samples[start : start + BLOCK]) for start in range(0, len(samples), BLOCK)]
    return np.concatenate(blocks), loudness.amplified


def speech_share(samples: Samples) -> float:
    return float(np.mean(np.asarray(speech_probabilities(samples)) > 0.5))


@pytest.mark.parametrize("decibels", [0, 10, 20, 30])
def test_speech_that_the_vad_hears_is_left_as_it_is(decibels: float) -> None:
    samples = down(SPEECH, decibels)
    result, amplified = leveled(samples)
    assert np.array_equal(result, samples)
    assert not amplified


@pytest.mark.parametrize("decibels", [45, 50, 60, 70])
def test_quiet_speech_is_heard(decibels: float) -> None:
    samples = dithered(down(SPEECH, decibels))
    result, amplified = leveled(samples)
    assert speech_share(result) > 0.75 * speech_share(SPEECH)
    assert amplified
    assert np.abs(result).max() <= 1.0


def test_quiet_speech_after_loud_speech_is_heard_and_the_loud_one_left_alone() -> None:
    pause = np.zeros(SAMPLE_RATE, np.float32)
    loud = np.concatenate((SPEECH, SPEECH[: 2 * SAMPLE_RATE]))
    samples = np.concatenate((loud, pause, down(SPEECH, 55), pause, down(SPEECH, 55)))
    result, amplified = leveled(samples)
    assert np.array_equal(result[: 4 * SAMPLE_RATE], samples[: 4 * SAMPLE_RATE])
    assert speech_share(result[8 * SAMPLE_RATE :]) > 0.4
    assert amplified


NOISES = {
    "white": RANDOM.standard_normal(BLOCK),
    "brown": np.cumsum(RANDOM.standard_normal(BLOCK)),
    "hum": np.sin(2 * np.pi * 50 * np.arange(BLOCK) / SAMPLE_RATE) + 0.2 * RANDOM.standard_normal(BLOCK),
    "waves": RANDOM.standard_normal(BLOCK) * (1 + np.sin(2 * np.pi * 0.3 * np.arange(BLOCK) / SAMPLE_RATE)),
    "clicks": (RANDOM.random(BLOCK) < 1e-4).astype(np.float64),
}


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("decibels", [40, 60, 80])
def test_noise_does_not_become_speech(kind: str, decibels: float) -> None:
    noise = NOISES[kind] - NOISES[kind].mean()
    samples = dithered(down((noise / np.abs(noise).max()).astype(np.float32), decibels))
    assert speech_share(leveled(samples)[0]) == 0.0


@pytest.mark.parametrize("bits", [16, 8])
def test_silence_and_its_dither_stay_as_they_are(bits: int) -> None:
    dither = (np.round(RANDOM.uniform(-1, 1, BLOCK)) / 2 ** (bits - 1)).astype(np.float32)
    for samples in (np.zeros(BLOCK, np.float32), dither):
        result, amplified = leveled(samples)
        assert np.array_equal(result, samples)
        assert not amplified


@pytest.mark.parametrize("scale", [1.5, 4.0, 100.0, 32_768.0])
def test_floats_beyond_one_are_scaled_and_not_clipped(scale: float, tmp_path: Path) -> None:
    loud = (SPEECH / np.abs(SPEECH).max() * scale).astype(np.float32)
    samples, audio = decode(write_wav(tmp_path / "loud.wav", loud, SAMPLE_RATE))
    assert np.abs(samples).max() == pytest.approx(1.0)
    assert np.corrcoef(samples, loud)[0, 1] > 0.98
    assert audio.warnings == ()


def test_one_wild_value_among_floats_does_not_hide_the_speech(tmp_path: Path) -> None:
    wild = SPEECH.copy()
    wild[[5000, 20_000, 30_000]] = (1e30, np.nan, -np.inf)
    samples, _ = decode(write_wav(tmp_path / "wild.wav", wild, SAMPLE_RATE))
    assert np.isfinite(samples).all()
    assert np.corrcoef(np.delete(samples, 5000), np.delete(SPEECH, 5000))[0, 1] > 0.99


def test_speech_sixty_decibels_down_in_a_file_is_heard_and_reported(tmp_path: Path) -> None:
    quiet = (down(SPEECH, 50) * 32_767).round().astype(np.int16)
    samples, audio = decode(write_wav(tmp_path / "quiet.wav", quiet, SAMPLE_RATE))
    assert speech_share(samples) > 0.4
    assert audio.warnings == ("audio_quiet",)
