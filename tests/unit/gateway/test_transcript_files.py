"""Transcripts as files: their names, and what they never replace."""

import stat
from pathlib import Path

import pytest

from cesar_mqtt.gateway.transcript_files import file_name, write_transcripts


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_transcript_has_the_name_of_its_recording(tmp_path: Path) -> None:
    written = write_transcripts(tmp_path / "new", "talk.wav", {"txt": b"Hello.\n", "srt": b"1\n"})
    assert _names(written) == ["talk.txt", "talk.srt"]
    assert written[0].read_bytes() == b"Hello.\n"
    assert stat.S_IMODE(written[0].stat().st_mode) == 0o644
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["talk.srt", "talk.txt"]


def test_a_file_of_somebody_else_stays_and_no_format_is_torn_from_the_others(tmp_path: Path) -> None:
    (tmp_path / "talk.srt").write_bytes(b"of a person")
    written = write_transcripts(tmp_path, "talk.wav", {"txt": b"a", "srt": b"b"})
    assert _names(written) == ["talk.wav.txt", "talk.wav.srt"]
    assert (tmp_path / "talk.srt").read_bytes() == b"of a person"
    assert not (tmp_path / "talk.txt").exists()

    assert _names(write_transcripts(tmp_path, "talk.wav", {"txt": b"c"})) == ["talk.txt"]
    assert _names(write_transcripts(tmp_path, "talk.wav", {"txt": b"d"})) == ["talk.wav (2).txt"]


def test_a_transcript_that_is_written_again_replaces_its_own_file_or_equal_ones(tmp_path: Path) -> None:
    first = write_transcripts(tmp_path, "talk.wav", {"txt": b"a"})
    assert write_transcripts(tmp_path, "talk.wav", {"txt": b"a"}) == first
    assert write_transcripts(tmp_path, "talk.wav", {"txt": b"b"}, own=first) == first
    assert first[0].read_bytes() == b"b"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("porch/talk.wav", "talk.wav"),
        ("C:\\rec\\talk.wav", "talk.wav"),
        ("../../etc/passwd", "passwd"),
        ("..", "recording"),
        (".hidden.wav", "hidden.wav"),
        ('a:b*c?"<>|.wav', "a_b_c_____.wav"),
        ("line\nbreak\x00.wav", "line_break_.wav"),
        ("", "recording"),
    ],
)
def test_the_name_that_a_producer_gives_becomes_a_safe_one(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_a_long_name_is_cut_to_what_a_file_system_takes(tmp_path: Path) -> None:
    name = file_name("ü" * 500 + ".wav")
    write_transcripts(tmp_path, name, {"json": b"{}"})
    assert len(name.encode()) <= 200
