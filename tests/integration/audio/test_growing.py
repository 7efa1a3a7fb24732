"""Files that are written while they are decoded."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio import decoder_process
from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits
from cesar_mqtt.audio.growth import GrowthWatch
from tests.conftest import PATIENCE_S
from tests.recordings import frequencies, tone, write_wav

LIMITS = AudioLimits(max_bytes=50_000_000, max_duration_s=600.0)


@pytest.fixture(scope="module", autouse=True)
def template() -> Iterator[None]:
    yield
    decoder_process.stop()


def never() -> bool:
    return False


def streamed(path: Path, duration_s: float) -> Path:
    """A WAV of a program that does not know yet how long it will be."""
    samples = (tone(duration_s, SAMPLE_RATE) * 32_767).astype(np.int16)
    content = bytearray(write_wav(path, samples, SAMPLE_RATE).read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    return path


def more(duration_s: float) -> bytes:
    return (tone(duration_s, SAMPLE_RATE, 1200) * 32_767).astype(np.int16).tobytes()


def test_what_is_written_while_a_file_is_decoded_is_decoded_as_well(tmp_path: Path) -> None:
    path = streamed(tmp_path / "a.wav", 14.0)
    blocks = []
    with path.open("ab") as written, decoder_process.open_audio(path, LIMITS) as audio:
        for block in audio.blocks():
            blocks.append(block)
            if len(blocks) == 2:
                written.write(more(9.0))
                written.close()
        samples = np.concatenate(blocks)
        assert audio.decoded_s == pytest.approx(23.0)
        assert audio.warnings == ()
    assert len(samples) == 23 * SAMPLE_RATE
    assert frequencies(samples[: 14 * SAMPLE_RATE]) == [440.0]
    assert frequencies(samples[14 * SAMPLE_RATE :]) == [1200.0]


def test_a_file_is_waited_for_until_its_writer_closes_it(tmp_path: Path) -> None:
    path = streamed(tmp_path / "a.wav", 3.0)
    watch_asked = threading.Event()
    written = path.open("ab")

    def write_later() -> None:
        watch_asked.wait(PATIENCE_S)
        written.write(more(2.0))
        written.close()

    def asked() -> bool:
        watch_asked.set()
        return False

    writer = threading.Thread(target=write_later)
    writer.start()
    with path.open("rb") as file:
        assert GrowthWatch(file.fileno(), 30.0).has_grown(asked)
    writer.join()


def test_a_file_whose_index_is_still_to_be_written_is_opened_when_it_is_there(tmp_path: Path) -> None:
    whole = write_wav(tmp_path / "whole.wav", tone(3, SAMPLE_RATE), SAMPLE_RATE).read_bytes()
    path = tmp_path / "a.wav"
    path.write_bytes(whole[:20])
    written = path.open("ab")

    def write_rest() -> None:
        written.write(whole[20:])
        written.close()

    writer = threading.Timer(0.5, write_rest)
    writer.start()
    with decoder_process.open_audio(path, LIMITS) as audio:
        assert sum(map(len, audio.blocks())) == 3 * SAMPLE_RATE
        assert audio.warnings == ()
    writer.join()


def test_a_file_that_grows_on_after_the_time_is_taken_as_far_as_it_is_and_reported(tmp_path: Path) -> None:
    path = streamed(tmp_path / "a.wav", 3.0)
    with path.open("ab") as written, decoder_process.open_audio(path, replace(LIMITS, growing_timeout_s=0)) as audio:
        for _ in audio.blocks():
            written.write(more(1.0))
            written.flush()
        assert audio.decoded_s == pytest.approx(3.0)
        assert audio.warnings == ("audio_changed",)


def test_a_file_that_is_changed_in_place_is_reported(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(3, SAMPLE_RATE), SAMPLE_RATE)
    with decoder_process.open_audio(path, LIMITS) as audio:
        for _ in audio.blocks():
            with path.open("r+b") as other:
                other.seek(1000)
                other.write(b"x")
        assert audio.warnings == ("audio_changed",)


def test_a_file_that_nobody_writes_is_not_waited_for(tmp_path: Path) -> None:
    path = streamed(tmp_path / "a.wav", 1.0)
    asked = threading.Event()

    def ask() -> bool:
        asked.set()
        return False

    with path.open("rb") as file:
        watch = GrowthWatch(file.fileno(), 30.0)
        assert not watch.has_grown(ask)
        assert not asked.is_set()
        assert not watch.changed
        os.utime(path, ns=(0, 0))
        with path.open("ab"):  # open for writing, but last written long ago
            assert not GrowthWatch(file.fileno(), 30.0).has_grown(never)
