import errno
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio.decoder import AudioLimits, open_audio
from cesar_mqtt.audio.file_reader import FileReader
from cesar_mqtt.audio.paths import resolve_audio_path
from cesar_mqtt.errors import ErrorCode, JobFailedError
from tests import pictures

DATA = Path(__file__).resolve().parents[2] / "data"
LIMITS = AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0)
TONE = (np.sin(np.arange(32_000) / 5) * 9000).astype(np.int16)
SIDE = 6000
PICTURE_KIB = 3 * SIDE * SIDE // 1024

OPEN_EACH = """
import resource, sys
from pathlib import Path
from cesar_mqtt.audio.decoder import AudioLimits, open_audio

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    with open_audio(Path(name), AudioLimits(max_bytes=1 << 30, max_duration_s=3600.0)) as audio:
        print(round(sum(len(block) for block in audio.blocks()) / 16_000, 1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_wav(path: Path, seconds: float = 60.0) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * int(seconds * 16_000)))
    return path


def test_it_reads_and_seeks_as_a_binary_file_does(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    with path.open("rb") as file:
        reader = FileReader(file.fileno())
        for name, args in [
            ("read", (10,)),
            ("seek", (150,)),
            ("tell", ()),
            ("read", (100,)),
            ("read", (1,)),
            ("seek", (-20, os.SEEK_CUR)),
            ("read", (5,)),
            ("seek", (-3, os.SEEK_END)),
            ("read", (9,)),
            ("seek", (500,)),
            ("read", (9,)),
        ]:
            with path.open("rb") as expected:
                expected.seek(reader.tell())
                assert getattr(reader, name)(*args) == getattr(expected, name)(*args), (name, args)
        assert (reader.error, reader.reached) == (None, 200)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT])
@pytest.mark.parametrize("healthy_bytes", [0, 1_000, 1_000_000])
def test_a_failing_disk_is_no_damage_wherever_it_fails(
    code: int, healthy_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread

    def failing(descriptor: int, size: int, position: int) -> bytes:
        if position + size > healthy_bytes:
            raise OSError(code, os.strerror(code))
        return pread(descriptor, size, position)

    path = write_wav(tmp_path / "note.wav")
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(JobFailedError) as caught, open_audio(path, LIMITS) as audio:
        for _ in audio.blocks():
            pass
    assert caught.value.code is ErrorCode.AUDIO_IO_ERROR
    assert caught.value.code.retryable
    assert os.strerror(code) in caught.value.message


@pytest.mark.parametrize("kind", ["joined.wav", "joined.flac", "tagged.wav", "note.m4a", "note.ogg", "note.mka"])
def test_whichever_read_fails_it_is_reported_and_never_taken_for_the_end(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for a second file behind the first took it for that: the second one was left out in silence."""
    path = tmp_path / kind
    once = path.with_stem("once")
    codec = {".wav": "pcm_s16le", ".flac": "flac", ".m4a": "aac", ".ogg": "libopus", ".mka": "aac"}[path.suffix]
    pictures.encode(once, codec, TONE)
    prefix = b"ID3\x04\0\0\0\0\x7f\x7f" + bytes(0x3FFF) if "tagged" in kind else b""
    path.write_bytes(prefix + once.read_bytes() * (2 if "joined" in kind else 1))
    calls, fails_at, pread = 0, -1, os.pread

    def counting(descriptor: int, size: int, position: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, position)

    def decoded() -> int:
        nonlocal calls
        calls = 0
        with open_audio(path, LIMITS) as audio:
            return sum(len(block) for block in audio.blocks())

    monkeypatch.setattr(os, "pread", counting)
    whole, total = decoded(), calls
    assert whole >= len(TONE) * (2 if "joined" in kind else 1)
    for fails_at in range(total):
        with pytest.raises(JobFailedError) as caught:
            pytest.fail(f"read {fails_at} of {total}: {decoded()} of {whole} samples")
        assert caught.value.code is ErrorCode.AUDIO_IO_ERROR, fails_at


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_file_that_cannot_be_opened_for_now_is_no_damage(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_args: object, **_kwargs: object) -> int:
        raise OSError(code, os.strerror(code))

    path = write_wav(tmp_path / "note.wav", 1.0)
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(JobFailedError) as caught, open_audio(path, LIMITS):
        pytest.fail("it was opened")
    assert caught.value.code is ErrorCode.AUDIO_IO_ERROR


def test_a_share_that_does_not_answer_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_path: Path) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    write_wav(tmp_path / "note.wav", 1.0)
    monkeypatch.setattr(Path, "lstat", failing)
    with pytest.raises(JobFailedError) as caught:
        resolve_audio_path("note.wav", [tmp_path])
    assert caught.value.code is ErrorCode.AUDIO_IO_ERROR


def test_cover_art_is_not_decoded(tmp_path: Path) -> None:
    picture = pictures.png(SIDE)
    files = [pictures.tagged(tmp_path / name, picture, TONE) for name in ("a.ogg", "a.m4a", "a.mka")]
    for name, codec in (("a.mp3", "libmp3lame"), ("a.flac", "flac")):
        files.append(pictures.with_cover(pictures.encode(tmp_path / name, codec, TONE), picture))

    printed = subprocess.run(
        [sys.executable, "-c", OPEN_EACH, *map(str, files)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert all(2.0 <= float(seconds) < 2.3 for seconds in printed[:-1])
    assert len(printed) == len(files) + 1
    assert int(printed[-1]) < PICTURE_KIB // 2
