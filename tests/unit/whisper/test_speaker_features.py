from pathlib import Path

import numpy as np

from cesar_mqtt.audio.samples import SAMPLE_RATE, Samples
from cesar_mqtt.whisper.speaker_features import log_mel_banks, narrowness
from tests.recordings import decode

_DATA = Path(__file__).parents[2] / "data"


def _below(samples: Samples, limit_hz: float) -> Samples:
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE) > limit_hz] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


def test_only_what_a_telephone_lets_pass_is_narrow() -> None:
    for name in ("speech.wav", "german.ogg"):
        voice = decode(_DATA / name)[0]
        assert narrowness(log_mel_banks(voice)) == 0.0
        assert narrowness(log_mel_banks(0.01 * voice)) == 0.0
        assert narrowness(log_mel_banks(_below(voice, 3400.0))) == 1.0
