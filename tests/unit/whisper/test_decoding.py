from typing import Any

import numpy as np
import pytest

from cesar_mqtt.whisper import decoding
from cesar_mqtt.whisper.decoding import DecodingOptions, PieceDecoder
from cesar_mqtt.whisper.encoder_input import FULL_FRAMES


def test_the_encoder_is_given_few_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "is_noisy", lambda _: False)
    options = DecodingOptions(
        task="transcribe",
        beam_size=1,
        temperatures=(0.0,),
        hotwords=None,
        word_timestamps=False,
        language_given=True,
        padding=300,
    )
    model: Any = None
    decoder = PieceDecoder(model, options, lambda: False)
    lengths = range(1, FULL_FRAMES + 1, 7)
    given = [decoder.frames_for(np.zeros((80, frames), np.float32)) for frames in lengths]
    assert all(min(FULL_FRAMES, frames + 300) <= one for frames, one in zip(lengths, given, strict=True))
    assert max(given) == FULL_FRAMES
    assert len(set(given)) <= 30
