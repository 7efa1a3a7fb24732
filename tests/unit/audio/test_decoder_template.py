from types import SimpleNamespace
from typing import Any

import pytest

from cesar_mqtt.audio import decoder_template
from cesar_mqtt.audio.decoder_template import Decoder


def test_only_progress_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken index may lead FFmpeg to the same packets for ever: `audio.decoder_timeout` ends that."""
    monkeypatch.setattr(decoder_template, "_SIGN_OF_LIFE_S", 0.0)
    frames: list[bytes] = []
    decoder = Decoder(-1, -1, has_bytes=None, protections=())
    monkeypatch.setattr(decoder, "_send", frames.append)
    audio: Any = SimpleNamespace(decoded_s=0.0, read_bytes=0, warnings=())
    should_stop = decoder._sign_of_life(audio)
    assert not should_stop()
    assert frames == []
    audio.read_bytes = 100
    assert [should_stop() for _ in range(3)] == [False] * 3
    assert len(frames) == 1
    audio.decoded_s = 1.0
    assert [should_stop() for _ in range(3)] == [False] * 3
    assert len(frames) == 2
