import errno
import os
import random
import socket
import struct
import tempfile
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import (
    SAMPLE_RATE,
    AudioLimits,
    AudioReader,
    Samples,
    open_audio,
)
from cesar_mqtt.audio.paths import check_directories, file_identity, resolve_audio_path
from cesar_mqtt.errors import Cancelled, ConfigError, ErrorCode, JobFailedError

LIMITS = AudioLimits(max_bytes=50_000_000, max_duration_s=600.0)
OUTSIDE = "The audio path does not lead to a file inside `audio.directories`: put the file into one of those."
NOBODY = 65534

Pcm = NDArray[np.int16]


def tone(duration_s: float, rate: int, frequency: float = 440.0) -> Pcm:
    times = np.arange(int(duration_s * rate)) / rate
    return (12_000 * np.sin(2 * np.pi * frequency * times)).astype(np.int16)


def silence(duration_s: float, rate: int) -> Pcm:
    return np.zeros(int(duration_s * rate), np.int16)


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def encode(
    path: Path,
    container: str,
    codec: str,
    pcm: Pcm,
    *,
    rate: int,
    layout: str = "mono",
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Write one channel of 16-bit sound, the same on every channel of the layout."""
    with av.open(path, "w", format=container, options=options) as written:
        stream = cast("AudioStream", written.add_stream(codec, rate=rate, options=codec_options))
        stream.layout = layout
        _encode_sound(written, stream, pcm, rate)
    return path


def _encode_sound(written: av.container.OutputContainer, stream: AudioStream, pcm: Pcm, rate: int) -> None:
    channels = stream.layout.nb_channels
    for start in range(0, len(pcm), 1024):
        part = np.repeat(pcm[start : start + 1024], channels)[np.newaxis, :]
        frame = av.AudioFrame.from_ndarray(part, format="s16", layout=stream.layout.name)
        frame.sample_rate = rate
        frame.pts = start
        written.mux(stream.encode(frame))
    written.mux(stream.encode(None))


def film(path: Path, *, picture_s: float, sound_s: float = 0.0) -> Path:
    with av.open(path, "w", format="mp4") as written:
        picture = written.add_stream("mpeg4", rate=5)
        picture.width = picture.height = 32
        sound = written.add_stream("aac", rate=16_000, layout="mono") if sound_s else None
        for number in range(int(picture_s * 5)):
            frame = av.VideoFrame(32, 32, "yuv420p")
            frame.pts = number
            written.mux(picture.encode(frame))
        written.mux(picture.encode(None))
        if sound is not None:
            _encode_sound(written, sound, tone(sound_s, 16_000), 16_000)
    return path


def wav_bytes(data: bytes, *, channels: int = 1, rate: int = 16_000, codec: int = 1, size: int | None = None) -> bytes:
    block = channels * 2
    body = struct.pack("<4sIHHIIHH", b"fmt ", 16, codec, channels, rate, (rate * block) & 0xFFFFFFFF, block, 16)
    stated = len(data) if size is None else size
    riff = 36 + len(data) if size is None else size
    return struct.pack("<4sI4s", b"RIFF", riff, b"WAVE") + body + struct.pack("<4sI", b"data", stated) + data


def decode(path: Path, limits: AudioLimits = LIMITS) -> tuple[Samples, AudioReader]:
    with open_audio(path, limits) as audio:
        return np.concatenate(list(audio.blocks())), audio


def error_of(path: Path, limits: AudioLimits = LIMITS) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        decode(path, limits)
    return caught.value


def refusal_of(name: str, *directories: Path) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        resolve_audio_path(name, directories)
    return caught.value


def strongest_frequency(samples: Samples) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * SAMPLE_RATE / len(samples))


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "note.wav").touch()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.wav").touch()
    return folder


# --- which files may be named


def test_a_directory_that_is_a_file_is_refused_and_one_that_is_missing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_directories([tmp_path])
    assert caplog.records == []
    check_directories([tmp_path / "later"])
    assert f"The folder {tmp_path / 'later'}" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="which is not a folder"):
        check_directories([tmp_path, tmp_path / "file"])


def test_a_relative_name_is_looked_up_in_the_directories_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "sub").mkdir(parents=True)
    (second / "sub" / "both.wav").touch()
    assert resolve_audio_path("sub/both.wav", [first, second]) == second / "sub" / "both.wav"
    (first / "sub" / "both.wav").touch()
    assert resolve_audio_path("sub/both.wav", [first, second]) == first / "sub" / "both.wav"


def test_an_absolute_name_inside_a_directory_is_found(inside: Path) -> None:
    assert resolve_audio_path(str(inside / "note.wav"), [inside]) == inside / "note.wav"


def test_a_directory_that_is_itself_a_link_may_be_given(inside: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inside)
    assert resolve_audio_path("note.wav", [tmp_path / "link"]) == inside / "note.wav"


def test_a_link_that_stays_inside_is_followed(inside: Path) -> None:
    (inside / "latest.wav").symlink_to("note.wav")
    assert resolve_audio_path("latest.wav", [inside]) == inside / "note.wav"


def test_a_link_may_lead_into_another_allowed_directory(inside: Path, outside: Path) -> None:
    (inside / "shared.wav").symlink_to(outside / "secret.wav")
    assert resolve_audio_path("shared.wav", [inside, outside]) == outside / "secret.wav"


NFC, NFD = (unicodedata.normalize(form, "Müller/Café é.wav") for form in ("NFC", "NFD"))
MIXED = unicodedata.normalize("NFC", "Müller/") + unicodedata.normalize("NFD", "Café é.wav")


@pytest.mark.parametrize("folder", ["NFC", "NFD"])
@pytest.mark.parametrize("file", ["NFC", "NFD"])
@pytest.mark.parametrize("named", [NFC, NFD, MIXED])
@pytest.mark.parametrize("top", ["", "{inside}/"])
def test_a_name_is_looked_up_in_both_unicode_forms_in_files_and_folders(
    folder: str, file: str, named: str, top: str, inside: Path
) -> None:
    forms = {"NFC": NFC.split("/"), "NFD": NFD.split("/")}
    path = inside / forms[folder][0] / forms[file][1]
    path.parent.mkdir()
    path.touch()
    assert resolve_audio_path(top.format(inside=inside) + named, [inside]) == path


def test_a_directory_may_be_named_in_the_other_unicode_form_and_be_a_link(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "Töne") for form in ("NFC", "NFD")]
    for there, named in (names, reversed(names)):
        (tmp_path / there).mkdir(exist_ok=True)
        (tmp_path / there / f"{there}.wav").touch()
        link = tmp_path / f"{there}-link"
        link.symlink_to(there)
        path = tmp_path / there / f"{there}.wav"
        assert resolve_audio_path(str(tmp_path / named / f"{named}.wav"), [tmp_path / there]) == path
        assert resolve_audio_path(str(tmp_path / f"{named}-link" / f"{named}.wav"), [link]) == path


def test_a_name_as_it_is_spelled_comes_before_its_other_forms(inside: Path) -> None:
    forms = [unicodedata.normalize(form, "ü.wav") for form in ("NFC", "NFD")]
    for name in forms:
        (inside / name).touch()
    assert [resolve_audio_path(name, [inside]).name for name in forms] == forms


def test_another_unicode_form_of_a_link_that_leads_out_does_not_show_what_is_there(inside: Path, outside: Path) -> None:
    (inside / "ü").symlink_to(outside)
    for name in ("secret.wav", "missing.wav"):
        assert refusal_of(unicodedata.normalize("NFD", f"ü/{name}"), inside).message == OUTSIDE


def test_another_unicode_form_of_a_link_into_an_allowed_directory_is_followed(inside: Path, outside: Path) -> None:
    (inside / "ü").symlink_to(outside)
    name = unicodedata.normalize("NFD", "ü/secret.wav")
    assert resolve_audio_path(name, [inside, outside]) == outside / "secret.wav"


def test_blanks_around_a_name_count_only_if_they_are_the_files(inside: Path) -> None:
    assert resolve_audio_path(" note.wav\t", [inside]) == inside / "note.wav"
    assert refusal_of("note .wav", inside).code is ErrorCode.AUDIO_NOT_FOUND
    (inside / " note.wav").touch()
    assert resolve_audio_path(" note.wav", [inside]) == inside / " note.wav"
    assert refusal_of(" ../outside/secret.wav", inside).message == OUTSIDE
    assert refusal_of(" ", inside).code is ErrorCode.AUDIO_NOT_FOUND


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret.wav",
        "../inside/note.wav",
        "sub/../../inside/note.wav",
        "links/../../outside/secret.wav",
        "..",
        "sub/../..",
        "/etc/passwd",
        "link.wav",
        "links/secret.wav",
        "",
        "\0",
        "note.wav\0",
        "\ud800.wav",
    ],
)
def test_what_leads_out_or_cannot_be_a_name_is_not_allowed(name: str, inside: Path, outside: Path) -> None:
    (inside / "link.wav").symlink_to(outside / "secret.wav")
    (inside / "links").symlink_to(outside)
    refusal = refusal_of(name, inside)
    assert refusal.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert refusal.message == OUTSIDE


@pytest.mark.parametrize(
    "name",
    [
        "sub/../note.wav",
        "missing/../note.wav",
        "./sub/.//../note.wav",
        "links/../note.wav",
        "{inside}/sub/../note.wav",
        "{inside}/../inside/note.wav",
        "{inside}/links/../note.wav",
        "{outside}/../inside/note.wav",
        "{outside}/maybe/../../inside/note.wav",
        "/no/such/folder/../../..{inside}/note.wav",
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_two_dots_count_by_the_letters_and_never_ask_what_stands_outside(
    name: str, inside: Path, outside: Path, *, exists: bool
) -> None:
    (inside / "sub").mkdir()
    (inside / "links").symlink_to(outside / "maybe")
    if exists:
        (outside / "maybe").mkdir()
    assert resolve_audio_path(name.format(inside=inside, outside=outside), [inside]) == inside / "note.wav"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sub/../missing.wav", "missing.wav"),
        ("{inside}/missing.wav", "{inside}/missing.wav"),
        ("{outside}/../inside/missing.wav", "{inside}/missing.wav"),
        ("{outside}/back/missing.wav", "missing.wav"),
        ("{outside}/back/folder", "folder"),
        ("{outside}/back", "back"),
    ],
)
def test_a_file_inside_is_named_without_the_way_there_from_outside(
    name: str, shown: str, inside: Path, outside: Path
) -> None:
    (outside / "back").symlink_to(inside)
    (inside / "folder").mkdir()
    message = refusal_of(name.format(inside=inside, outside=outside), inside).message
    assert repr(shown.format(inside=inside)) in message
    assert str(outside) not in message


def test_a_missing_file_is_to_be_retried_because_the_same_id_would_only_repeat_the_error(inside: Path) -> None:
    assert refusal_of("missing.wav", inside).message == (
        "There is no audio file 'missing.wav': put it there and retry the job (command `retry`), "
        "or name another under a new id."
    )


def test_a_rejection_does_not_reveal_the_target_of_a_link(inside: Path, outside: Path) -> None:
    (inside / "link.wav").symlink_to(outside / "secret.wav")
    assert refusal_of("link.wav", inside).message == OUTSIDE


@pytest.mark.parametrize(
    "name",
    [
        "{outside}/maybe.wav",
        "{outside}/maybe/x.wav",
        "{outside}/maybe/../maybe.wav",
        "{inside}/../outside/maybe.wav",
        "../outside/maybe.wav",
        "../outside/maybe/../../inside/note.wav",
        "link.wav",
        "links/maybe.wav",
        "links/maybe/../maybe.wav",
    ],
)
def test_the_answer_does_not_reveal_whether_something_exists_outside(name: str, inside: Path, outside: Path) -> None:
    (inside / "link.wav").symlink_to(outside / "maybe.wav")
    (inside / "links").symlink_to(outside)
    name = name.format(inside=inside, outside=outside)
    absent = refusal_of(name, inside)
    (outside / "maybe.wav").touch()
    (outside / "maybe").mkdir()
    present = refusal_of(name, inside)
    assert (absent.code, absent.message) == (present.code, present.message)
    assert absent.code is ErrorCode.AUDIO_NOT_ALLOWED


@pytest.mark.parametrize("name", ["missing.wav", "note.wav/x.wav", "n" * 300, "d/" * 3000 + "x.wav", "~/note.wav"])
def test_a_name_of_nothing_inside_is_not_found(name: str, inside: Path) -> None:
    refusal = refusal_of(name, inside)
    assert refusal.code is ErrorCode.AUDIO_NOT_FOUND
    assert repr(name)[:100] in refusal.message
    assert len(refusal.message) < 300


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/note.wav", "concat:note.wav|note.wav", "subfile:note.wav"])
def test_the_name_of_a_protocol_is_nothing_but_a_file_name(name: str, inside: Path) -> None:
    assert refusal_of(name, inside).code is ErrorCode.AUDIO_NOT_FOUND


def test_without_directories_nothing_is_allowed(inside: Path) -> None:
    assert refusal_of(str(inside / "note.wav")).code is ErrorCode.AUDIO_NOT_ALLOWED


def test_a_directory_a_fifo_a_socket_and_a_device_are_not_allowed(inside: Path) -> None:
    (inside / "folder.wav").mkdir()
    os.mkfifo(inside / "fifo.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(inside / "socket.wav"))
    refusals = [refusal_of(name, inside) for name in ("folder.wav", "fifo.wav", "socket.wav", ".")]
    refusals.append(refusal_of("null", Path("/dev")))
    assert {refusal.code for refusal in refusals} == {ErrorCode.AUDIO_NOT_ALLOWED}
    assert all("regular file" in refusal.message for refusal in refusals)


def test_a_link_that_is_replaced_while_it_is_followed_is_not_found(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`realpath` reads a link after it has seen that it is one; the job ended as `internal`."""
    (inside / "link.wav").symlink_to(inside / "a.wav")

    def replaced(*_: object, **__: object) -> str:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "readlink", replaced)
    assert refusal_of("link.wav", inside).code is ErrorCode.AUDIO_NOT_FOUND


def test_a_circle_of_links_is_not_found(inside: Path) -> None:
    (inside / "a.wav").symlink_to("b.wav")
    (inside / "b.wav").symlink_to("a.wav")
    assert refusal_of("a.wav", inside).code in {ErrorCode.AUDIO_NOT_FOUND, ErrorCode.AUDIO_NOT_ALLOWED}


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Drop root's right to read everything, where the tests have it."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_that_may_not_be_read_is_named_as_such(inside: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for folder in (inside, *inside.parents):
        if (
            folder.is_relative_to(tmp_path_factory.getbasetemp().parent)
            or Path(tempfile.gettempdir()) in folder.parents
        ):
            folder.chmod(0o755)
    (inside / "note.wav").chmod(0)
    with as_somebody_else():
        error = error_of(resolve_audio_path("note.wav", [inside]))
    assert error.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert "permission" in error.message


# --- opening what was named


def test_a_link_that_has_taken_the_files_place_is_not_followed(inside: Path, outside: Path) -> None:
    path = resolve_audio_path("note.wav", [inside])
    path.unlink()
    path.symlink_to(outside / "secret.wav")
    assert error_of(path).code is ErrorCode.AUDIO_NOT_ALLOWED


def test_a_link_that_has_taken_a_folders_place_is_not_followed(inside: Path, outside: Path) -> None:
    encode(outside / "secret.wav", "wav", "pcm_s16le", tone(1, 16_000), rate=16_000)
    (inside / "sub").mkdir()
    (inside / "sub" / "secret.wav").touch()
    path = resolve_audio_path("sub/secret.wav", [inside])
    (inside / "sub").rename(inside / "was")
    (inside / "sub").symlink_to(outside)
    assert error_of(path).code is ErrorCode.AUDIO_NOT_ALLOWED


def test_a_fifo_that_has_taken_the_files_place_does_not_block(inside: Path) -> None:
    path = resolve_audio_path("note.wav", [inside])
    path.unlink()
    os.mkfifo(path)
    assert error_of(path).code is ErrorCode.AUDIO_NOT_ALLOWED


def test_a_file_that_was_deleted_is_not_found(inside: Path) -> None:
    path = resolve_audio_path("note.wav", [inside])
    path.unlink()
    assert error_of(path).code is ErrorCode.AUDIO_NOT_FOUND


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = encode(tmp_path / "good", "wav", "pcm_s16le", tone(1, 16_000), rate=16_000)
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 1000)
    before = len([*Path("/dev/fd").iterdir()])
    for _ in range(5):
        decode(good)
        error_of(junk)
        error_of(tmp_path / "missing" / "x")
        error_of(tmp_path)
    assert len([*Path("/dev/fd").iterdir()]) == before


# --- decoding

FORMATS = [
    ("wav", "pcm_s16le", 16_000),
    ("wav", "pcm_f32le", 44_100),
    ("flac", "flac", 44_100),
    ("mp3", "libmp3lame", 44_100),
    ("ogg", "libopus", 48_000),
    ("ipod", "aac", 44_100),
    ("webm", "libopus", 48_000),
    ("matroska", "flac", 16_000),
    ("adts", "aac", 44_100),
    ("mpegts", "mp2", 48_000),
    ("aiff", "pcm_s16be", 22_050),
    ("caf", "pcm_s16le", 8_000),
    ("avi", "libmp3lame", 44_100),
    ("amr", "libopencore_amrnb", 8_000),
    ("mov", "aac", 44_100),
    ("3gp", "aac", 44_100),
    ("opus", "libopus", 48_000),
    ("ac3", "ac3", 48_000),
    ("au", "pcm_s16be", 22_050),
    ("mp2", "mp2", 48_000),
]


@pytest.mark.parametrize(("container", "codec", "rate"), FORMATS, ids=str)
def test_a_format_is_known_by_its_content(container: str, codec: str, rate: int, tmp_path: Path) -> None:
    path = encode(tmp_path / "recording", container, codec, tone(3, rate), rate=rate)
    samples, audio = decode(path)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) / SAMPLE_RATE == pytest.approx(3.0, abs=0.1)
    assert strongest_frequency(samples) == pytest.approx(440.0, abs=2.0)
    assert np.std(samples) == pytest.approx(12_000 / 32_768 / np.sqrt(2), rel=0.2)
    assert audio.warnings == ()
    assert audio.info.size_bytes == path.stat().st_size


def test_long_audio_comes_in_blocks_of_about_ten_seconds(tmp_path: Path) -> None:
    path = encode(tmp_path / "long", "flac", "flac", tone(25, 16_000), rate=16_000)
    with open_audio(path, LIMITS) as audio:
        sizes = [len(block) / SAMPLE_RATE for block in audio.blocks()]
    assert len(sizes) == 3
    assert sizes[:2] == pytest.approx([10.0, 10.0], abs=0.5)
    assert sum(sizes) == pytest.approx(25.0)


@pytest.mark.parametrize("layout", ["stereo", "3.0", "5.1"])
def test_channels_are_mixed_without_overflow(layout: str, tmp_path: Path) -> None:
    loud = (tone(1, 48_000).astype(np.int32) * 32_000 // 12_000).astype(np.int16)
    samples, audio = decode(encode(tmp_path / "many", "flac", "flac", loud, rate=48_000, layout=layout))
    assert np.abs(samples).max() <= 1.0
    assert strongest_frequency(samples) == pytest.approx(440.0, abs=2.0)
    assert audio.warnings == ()


def test_sound_that_changes_its_rate_on_the_way_is_decoded_to_the_end(tmp_path: Path) -> None:
    first = encode(tmp_path / "a", "adts", "aac", tone(2, 44_100), rate=44_100, layout="stereo").read_bytes()
    second = encode(tmp_path / "b", "adts", "aac", tone(2, 16_000), rate=16_000).read_bytes()
    (tmp_path / "joined").write_bytes(first + second)
    samples, audio = decode(tmp_path / "joined")
    assert len(samples) / SAMPLE_RATE == pytest.approx(4.0, abs=0.2)
    assert strongest_frequency(samples) == pytest.approx(440.0, abs=2.0)
    assert audio.warnings == ()


def test_not_a_sample_is_lost_at_the_end(tmp_path: Path) -> None:
    samples, _ = decode(encode(tmp_path / "exact", "flac", "flac", tone(1, 48_000), rate=48_000))
    assert len(samples) == SAMPLE_RATE


def test_a_container_damaged_at_its_end_keeps_what_came_before(tmp_path: Path) -> None:
    path = encode(tmp_path / "damaged", "wv", "wavpack", tone(10, 16_000), rate=16_000)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + noise(len(content) - middle, seed=4))
    samples, audio = decode(path)
    assert strongest_frequency(samples[: 3 * SAMPLE_RATE]) == pytest.approx(440.0, abs=2.0)
    assert audio.warnings == ("audio_truncated", "audio_damaged")


# --- what cannot be decoded


def test_text_and_noise_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is not audio\n" * 500)
    (tmp_path / "noise.mp3").write_bytes(noise(100_000, seed=1))
    for name in ("text.wav", "noise.mp3"):
        error = error_of(tmp_path / name)
        assert error.code is ErrorCode.AUDIO_UNREADABLE
        assert str(tmp_path) not in error.message


def test_an_m4a_cut_before_its_index_is_unreadable(tmp_path: Path) -> None:
    path = encode(tmp_path / "cut.m4a", "ipod", "aac", tone(3, 44_100), rate=44_100)
    path.write_bytes(path.read_bytes()[:10_000])
    assert error_of(path).code is ErrorCode.AUDIO_UNREADABLE


@pytest.mark.parametrize(("codec", "channels"), [(0x1234, 1), (1, 200)])
def test_an_unknown_codec_or_layout_is_unreadable(codec: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "odd.wav"
    path.write_bytes(wav_bytes(bytes(50_400), codec=codec, channels=channels))
    assert error_of(path).code is ErrorCode.AUDIO_UNREADABLE


def test_a_film_without_sound_has_no_stream(tmp_path: Path) -> None:
    error = error_of(film(tmp_path / "film.mp4", picture_s=2))
    assert error.code is ErrorCode.AUDIO_NO_STREAM


@pytest.mark.parametrize("content", [b"", wav_bytes(b"")], ids=["no bytes", "only a header"])
def test_a_file_without_samples_is_empty(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.wav"
    path.write_bytes(content)
    assert error_of(path).code is ErrorCode.AUDIO_EMPTY


def test_a_kind_of_file_that_holds_no_sound_is_not_even_tried(tmp_path: Path) -> None:
    (tmp_path / "subtitles.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n\n" * 20)
    assert error_of(tmp_path / "subtitles.srt").code is ErrorCode.AUDIO_NOT_ALLOWED


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nreal.ts\n#EXT-X-ENDLIST\n",
    "absolute.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{folder}/real.ts\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile real.ts\n",
    "unsafe.ffconcat": "ffconcat version 1.0\nfile {folder}/real.ts\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1" mimeType="audio/mp2t"><BaseURL>real.ts</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
    "call.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_pulls_in_no_other_file(name: str, tmp_path: Path) -> None:
    encode(tmp_path / "real.ts", "mpegts", "mp2", tone(2, 48_000), rate=48_000)
    (tmp_path / name).write_text(PLAYLISTS[name].replace("{folder}", str(tmp_path)))
    assert error_of(tmp_path / name).code is ErrorCode.AUDIO_NOT_ALLOWED


@pytest.mark.parametrize("name", ["concat:a.wav|b.wav", "http:", "fd:", "pipe:0", "-", "%d.wav"])
def test_a_file_whose_name_looks_like_a_protocol_is_read_as_itself(name: str, tmp_path: Path) -> None:
    encode(tmp_path / name, "wav", "pcm_s16le", tone(1, 16_000), rate=16_000)
    samples, _ = decode(resolve_audio_path(name, [tmp_path]))
    assert len(samples) == SAMPLE_RATE


# --- limits


def test_a_file_that_is_too_large_is_refused_before_it_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"not even audio" * 100)
    error = error_of(tmp_path / "large", AudioLimits(max_bytes=1399, max_duration_s=1.0))
    assert error.code is ErrorCode.AUDIO_TOO_LARGE
    assert "1400" in error.message
    assert "1399" in error.message


def test_a_file_that_declares_too_much_is_refused_before_the_work(tmp_path: Path) -> None:
    path = encode(tmp_path / "long", "flac", "flac", tone(5, 16_000), rate=16_000)
    with (
        pytest.raises(JobFailedError) as caught,
        open_audio(path, AudioLimits(max_bytes=10**6, max_duration_s=4.5)),
    ):
        pytest.fail("it was opened")
    assert caught.value.code is ErrorCode.AUDIO_TOO_LONG
    assert "4.5 s" in caught.value.message


def test_a_file_that_declares_nothing_is_stopped_at_the_limit(tmp_path: Path) -> None:
    path = encode(tmp_path / "stream.aac", "adts", "aac", tone(60, 16_000), rate=16_000)
    heard_s = 0.0
    with open_audio(path, AudioLimits(max_bytes=10**7, max_duration_s=25.0)) as audio:
        blocks = audio.blocks()
        heard_s += len(next(blocks)) / SAMPLE_RATE
        heard_s += len(next(blocks)) / SAMPLE_RATE
        with pytest.raises(JobFailedError) as caught:
            next(blocks)
    assert caught.value.code is ErrorCode.AUDIO_TOO_LONG
    assert 20.0 <= heard_s <= 25.0


def test_a_header_of_one_sample_a_second_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "slow.wav"
    path.write_bytes(wav_bytes(bytes(20_000_000), rate=1, size=0xFFFF_FFFF))
    assert error_of(path).code is ErrorCode.AUDIO_TOO_LONG


# --- damage and cuts


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 16_000),
        ("flac", "flac", 16_000),
        ("mp3", "libmp3lame", 44_100),
        ("webm", "libopus", 48_000),
    ],
)
def test_a_file_cut_in_half_is_decoded_and_called_truncated(
    container: str, codec: str, rate: int, tmp_path: Path
) -> None:
    path = encode(tmp_path / "cut", container, codec, tone(12, rate), rate=rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    samples, audio = decode(path)
    assert 4.0 < len(samples) / SAMPLE_RATE < 7.0
    assert "audio_truncated" in audio.warnings


def test_a_few_lost_milliseconds_are_no_truncation(tmp_path: Path) -> None:
    path = encode(tmp_path / "cut.wav", "wav", "pcm_s16le", tone(12, 16_000), rate=16_000)
    path.write_bytes(path.read_bytes()[:-16_000])
    assert decode(path)[1].warnings == ()


@pytest.mark.parametrize("size", [0, 0x7FFF_FFFF, 0x8000_0024, 0xFFFF_FFFF])
def test_a_wav_written_to_a_pipe_is_not_called_truncated(size: int, tmp_path: Path) -> None:
    path = tmp_path / "piped.wav"
    path.write_bytes(wav_bytes(tone(3, 16_000).tobytes(), size=size))
    samples, audio = decode(path)
    assert len(samples) / SAMPLE_RATE == pytest.approx(3.0, abs=0.01)
    assert audio.warnings == ()


def test_a_damaged_part_costs_no_more_than_itself(tmp_path: Path) -> None:
    path = encode(tmp_path / "damaged.m4a", "ipod", "aac", tone(10, 44_100), rate=44_100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = noise(3000, seed=2)
    path.write_bytes(content)
    samples, audio = decode(path)
    assert len(samples) / SAMPLE_RATE > 9.0
    assert audio.warnings == ("audio_damaged",)


def test_a_guessed_duration_is_not_taken_for_a_declared_one(tmp_path: Path) -> None:
    # FFmpeg guesses 590 s and 73 s for these 60 s, from the bit rate of the silence at the start
    pcm = np.concatenate([silence(50, 44_100), np.random.default_rng(1).integers(-8000, 8000, 441_000, np.int16)])
    quality = {"flags": "+qscale", "global_quality": str(3 * 118)}
    raw = encode(tmp_path / "raw.aac", "adts", "aac", pcm, rate=44_100, codec_options=quality)
    untagged = encode(
        tmp_path / "untagged.mp3",
        "mp3",
        "libmp3lame",
        pcm,
        rate=44_100,
        options={"write_xing": "0"},
        codec_options=quality,
    )
    for path in (raw, untagged):
        samples, audio = decode(path, AudioLimits(max_bytes=10**7, max_duration_s=61.0))
        assert len(samples) / SAMPLE_RATE == pytest.approx(60.0, abs=0.1)
        assert audio.info.duration_s is None
        assert audio.warnings == ()


def test_a_tag_before_the_sound_does_not_hide_the_declared_duration(tmp_path: Path) -> None:
    sound = encode(
        tmp_path / "plain.mp3",
        "mp3",
        "libmp3lame",
        tone(12, 44_100),
        rate=44_100,
        options={"id3v2_version": "0"},
    ).read_bytes()
    picture_bytes = 20_000
    size = bytes((picture_bytes >> shift) & 0x7F for shift in (21, 14, 7, 0))
    (tmp_path / "tagged.mp3").write_bytes(b"ID3\x04\0\0" + size + bytes(picture_bytes) + sound[: len(sound) // 2])
    _, audio = decode(tmp_path / "tagged.mp3")
    assert audio.info.duration_s == pytest.approx(12.0, abs=0.1)
    assert audio.warnings == ("audio_truncated",)


def test_a_count_of_frames_that_cannot_be_in_the_file_is_no_declaration(tmp_path: Path) -> None:
    path = encode(tmp_path / "count.mp3", "mp3", "libmp3lame", tone(12, 44_100), rate=44_100)
    content = path.read_bytes()
    at = max(content.find(b"Xing"), content.find(b"Info")) + 8
    frames = int.from_bytes(content[at : at + 4], "big")
    path.write_bytes(content[:at] + (10 * frames).to_bytes(4, "big") + content[at + 4 :])
    samples, audio = decode(path)
    assert len(samples) / SAMPLE_RATE == pytest.approx(12.0, abs=0.1)
    assert audio.warnings == ()


def test_a_picture_that_lasts_longer_than_the_sound_is_no_truncation(tmp_path: Path) -> None:
    samples, audio = decode(film(tmp_path / "film.mp4", picture_s=10, sound_s=3))
    assert len(samples) / SAMPLE_RATE == pytest.approx(3.0, abs=0.1)
    assert audio.warnings == ()


def test_a_stop_is_heeded_between_two_packets(tmp_path: Path) -> None:
    path = encode(tmp_path / "note.flac", "flac", "flac", tone(9, 16_000), rate=16_000)
    asked: list[bool] = []

    def at_the_third_packet() -> bool:
        asked.append(True)
        return len(asked) == 3

    with open_audio(path, LIMITS) as audio, pytest.raises(Cancelled):
        list(audio.blocks(at_the_third_packet))


def give_ffmpeg(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in ("containers", "tracks"):
        monkeypatch.setattr(f"cesar_mqtt.audio.{module}.FFMPEG_TIMEOUT_S", seconds)


def test_a_file_that_ffmpeg_gets_lost_in_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a WAV it looks for a further chunk behind the sound, here in millions of empty ones.
    give_ffmpeg(monkeypatch, 2.0)
    path = tmp_path / "lost.wav"
    path.write_bytes(wav_bytes(tone(1, 16_000).tobytes()))
    os.truncate(path, 3_900_000_000)
    samples, audio = decode(path, AudioLimits(max_bytes=10**10, max_duration_s=1e6))
    assert len(samples) == SAMPLE_RATE
    assert audio.info.size_bytes == 3_900_000_000


def test_the_timeout_of_ffmpeg_does_not_count_the_time_of_the_consumer_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_ffmpeg(monkeypatch, 1.0)
    pcm = np.random.default_rng(1).integers(-8000, 8000, 30 * 16_000, np.int16)
    path = encode(tmp_path / "note.flac", "flac", "flac", pcm, rate=16_000)
    heard = 0
    with open_audio(path, LIMITS) as audio:
        for block in audio.blocks():
            heard += len(block)
            threading.Event().wait(1.2)
        assert audio.warnings == ()
    assert heard == 30 * SAMPLE_RATE


def test_a_file_is_distinguished_from_one_that_replaces_it(tmp_path: Path) -> None:
    path = encode(tmp_path / "note.wav", "wav", "pcm_s16le", tone(1, 16_000), rate=16_000)
    with open_audio(path, LIMITS) as audio:
        assert audio.info.identity == file_identity(path.stat())
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))
    assert audio.info.identity != file_identity(path.stat())


def test_no_damage_whatever_raises_anything_but_a_job_failure(tmp_path: Path) -> None:
    chance = random.Random(3)  # noqa: S311 - the same damage in every run
    whole = [
        encode(tmp_path / container, container, codec, tone(1, rate), rate=rate).read_bytes()
        for container, codec, rate in FORMATS
        if codec != "pcm_f32le"
    ]
    for _ in range(300):
        content = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 3, 20))):
            place = chance.randrange(min(len(content), chance.choice((64, 512, 1 << 20))))
            content[place : place + chance.choice((1, 1, 400))] = chance.randbytes(chance.choice((0, 1, 300)))
        (tmp_path / "damaged").write_bytes(content)
        try:
            samples, _ = decode(tmp_path / "damaged")
        except JobFailedError:
            continue
        assert np.isfinite(samples).all()
