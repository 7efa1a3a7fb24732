from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cesar_mqtt.audio.channels import ChannelMixer
from tests.recordings import Sound, decode, frequencies, spans, tone, write, write_wav

RATE = 16_000


def columns(*channels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack(channels, axis=1)


def noise(duration_s: float, peak: float, seed: int = 1) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).uniform(-peak, peak, int(duration_s * RATE))
    return drawn.astype(np.float32)


@pytest.mark.parametrize("container", ["wav", "flac", "matroska"])
def test_stereo_with_one_side_inverted_does_not_cancel(container: str, tmp_path: Path) -> None:
    sound = tone(3, 48_000)
    codec = "pcm_f32le" if container == "wav" else "flac"
    track = Sound(codec, 48_000, [(0.0, columns(sound, -sound))], layout="stereo")
    samples, audio = decode(write(tmp_path / "inverted", container, track))
    assert np.abs(samples).max() == pytest.approx(0.4, abs=0.02)
    assert frequencies(samples) == [440.0]
    assert audio.warnings == ("audio_out_of_phase",)


def test_of_channels_that_cancel_in_part_all_is_kept(tmp_path: Path) -> None:
    voice, other = tone(3, RATE, 440), tone(3, RATE, 1200, peak=0.2)
    path = write_wav(tmp_path / "a.wav", columns(voice, -0.8 * voice, other), RATE)
    samples, audio = decode(path)
    assert frequencies(samples, count=2) == [440.0, 1200.0]
    assert audio.warnings == ("audio_out_of_phase",)


def test_a_voice_in_the_middle_is_not_cancelled_together_with_a_louder_hum_in_antiphase(tmp_path: Path) -> None:
    voice, hum = tone(3, RATE, 440, peak=0.1), tone(3, RATE, 120, peak=0.3)
    samples, audio = decode(write_wav(tmp_path / "a.wav", columns(voice + hum, voice - hum), RATE))
    assert frequencies(samples, count=2) == [120.0, 440.0]
    power = np.abs(np.fft.rfft(samples[RATE : 2 * RATE]))
    assert power[440] > 0.9 / 3 * power[120]
    assert audio.warnings == ("audio_out_of_phase",)


def test_what_only_the_quieter_of_two_opposite_channels_has_is_kept(tmp_path: Path) -> None:
    voice, other = tone(3, RATE, 440, peak=0.3), tone(3, RATE, 1200, peak=0.1)
    samples, audio = decode(write_wav(tmp_path / "a.wav", columns(voice, other - 0.9 * voice), RATE))
    assert frequencies(samples, count=2) == [440.0, 1200.0]
    assert audio.warnings == ("audio_out_of_phase",)


def test_a_change_of_the_weights_makes_no_click(tmp_path: Path) -> None:
    voice = tone(6, RATE, 200)
    half = len(voice) // 2
    right = np.concatenate((voice[:half], -voice[half:]))
    samples, _ = decode(write_wav(tmp_path / "a.wav", columns(voice, right), RATE))
    assert np.abs(np.diff(samples)).max() < 0.1


@pytest.mark.parametrize("second", [tone(3, RATE), 0.5 * tone(3, RATE), tone(3, RATE, 700), noise(3, 0.3)], ids=str)
def test_ordinary_stereo_is_not_called_out_of_phase(second: NDArray[np.float32], tmp_path: Path) -> None:
    samples, audio = decode(write_wav(tmp_path / "a.wav", columns(tone(3, RATE), second), RATE))
    assert 440.0 in frequencies(samples, count=2)
    assert audio.warnings == ()


def test_an_inverted_hiss_below_the_speech_does_not_matter(tmp_path: Path) -> None:
    voice, hiss = tone(3, RATE), noise(3, 0.01)
    assert decode(write_wav(tmp_path / "a.wav", columns(voice + hiss, voice - hiss), RATE))[1].warnings == ()


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_speech_on_any_one_channel_is_as_loud_as_it_is(channels: int, dtype: str, tmp_path: Path) -> None:
    for speaking in {0, 2 % channels, 3 % channels, channels - 1}:
        block = np.zeros((2 * RATE, channels), np.float32)
        block[:, speaking] = tone(2, RATE)
        written = (block * 32_767).astype(np.int16) if dtype == "int16" else block
        samples, audio = decode(write_wav(tmp_path / "a.wav", written, RATE))
        assert np.abs(samples[RATE:]).max() == pytest.approx(0.4, rel=0.05)
        assert frequencies(samples) == [440.0]
        assert audio.warnings == ()


@pytest.mark.parametrize("layout", ["2.1", "3.0", "quad", "5.1", "5.1(side)", "7.1", "hexadecagonal"])
def test_no_named_channel_is_left_out(layout: str, tmp_path: Path) -> None:
    channels = {"2.1": 3, "3.0": 3, "quad": 4, "5.1": 6, "5.1(side)": 6, "7.1": 8, "hexadecagonal": 16}[layout]
    for speaking in range(channels):
        block = np.zeros((48_000, channels), np.float32)
        block[:, speaking] = tone(1, 48_000)
        path = write(tmp_path / "a.wav", "wav", Sound("pcm_f32le", 48_000, [(0.0, block)], layout=layout))
        assert frequencies(decode(path)[0]) == [440.0], speaking


def test_two_people_on_a_channel_each_are_both_heard(tmp_path: Path) -> None:
    silent = np.zeros(2 * RATE, np.float32)
    left = np.concatenate((tone(2, RATE, 440), silent))
    right = np.concatenate((silent, tone(2, RATE, 900, peak=0.1)))
    samples, _ = decode(write_wav(tmp_path / "call.wav", columns(left, right), RATE))
    assert spans(samples) == [pytest.approx((0.0, 4.0), abs=0.1)]
    assert np.abs(samples[3 * RATE :]).max() == pytest.approx(0.1, rel=0.2)


def test_what_is_no_number_is_silence_and_not_spread(tmp_path: Path) -> None:
    block = columns(tone(2, RATE), tone(2, RATE))
    block[100] = (np.nan, np.inf)
    samples = ChannelMixer(2).mix(block)
    assert np.isfinite(samples).all()
    assert frequencies(samples) == [440.0]
    assert np.isfinite(decode(write_wav(tmp_path / "a.wav", block, RATE))[0]).all()


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, float("nan"), float("inf")])
def test_one_wild_value_does_not_silence_the_rest(value: float, tmp_path: Path) -> None:
    block = columns(tone(3, RATE), tone(3, RATE))
    block[20_000, 1] = value
    samples, _ = decode(write_wav(tmp_path / "a.wav", block, RATE))
    assert np.isfinite(samples).all()
    assert frequencies(samples[2 * RATE :]) == [440.0]
    assert np.abs(samples[2 * RATE + RATE // 10 :]).max() == pytest.approx(0.4, rel=0.1)


def test_silence_stays_silence() -> None:
    mixer = ChannelMixer(2)
    assert not mixer.mix(np.zeros((RATE, 2), np.float32)).any()
    assert not mixer.out_of_phase
