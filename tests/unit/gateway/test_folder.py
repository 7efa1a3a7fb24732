"""Which files are recordings, and when one is complete."""

from pathlib import Path

import pytest

from cesar_mqtt.gateway.folder import FileState, Settling, is_open_for_writing, is_recording, scan


@pytest.mark.parametrize("name", ["talk.wav", "Talk.MP3", "a b.m4a", "x.tar.opus", "ünï.ogg", "clip.mp4"])
def test_a_recording_is_known_by_its_suffix(name: str) -> None:
    assert is_recording(name)


@pytest.mark.parametrize(
    "name",
    [
        *("talk.wav.part", "talk.part.wav", "talk.tmp.mp3", "talk.mp3.crdownload", ".talk.wav.Xy12", "._talk.wav"),
        *("~talk.wav", "~$talk.wav", "talk.wav~", ".syncthing.talk.wav.tmp", "~syncthing~talk.wav.tmp"),
        *("talk.txt", "talk.srt", "talk", "Thumbs.db"),
    ],
)
def test_what_a_program_is_still_writing_and_all_else_is_none(name: str) -> None:
    assert not is_recording(name)


def test_a_scan_finds_recordings_in_sub_folders_and_follows_no_link(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in ("a.wav", "sub/b.wav", "sub/deep/c.wav", "@eaDir/d.wav", ".stversions/e.wav", "done/f.wav"):
        (inside / path).parent.mkdir(parents=True, exist_ok=True)
        (inside / path).write_bytes(b"x")
    outside.mkdir()
    (outside / "g.wav").write_bytes(b"x")
    (inside / "link").symlink_to(outside)
    (inside / "h.wav").symlink_to(outside / "g.wav")

    assert {file.name for file in scan(inside, [inside / "done"])} == {"a.wav", "sub/b.wav", "sub/deep/c.wav"}


def test_a_folder_that_is_not_there_is_an_error_and_not_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(scan(tmp_path / "absent"))


def test_a_file_that_is_being_written_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with path.open("wb"):
        assert is_open_for_writing(path) is not False
    assert is_open_for_writing(path) is not True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _file(size_bytes: int = 10, mtime_ns: int = 1) -> FileState:
    return FileState(Path("/in/a.wav"), "a.wav", size_bytes, mtime_ns, inode=1)


def _steps(settling: Settling, clock: Clock, *steps: tuple[float, FileState]) -> list[bool]:
    found = []
    for now, file in steps:
        clock.now = now
        found.append(bool(settling.complete({file.path: file})))
    return found


def test_a_file_is_complete_when_it_has_not_changed_for_a_while() -> None:
    clock = Clock()
    settling = Settling(2.0, is_open=lambda _: False, clock=clock)
    steps = (
        (0.0, _file()),
        (1.9, _file()),
        (2.0, _file(20)),
        (3.9, _file(20)),
        (4.0, _file(20, 2)),
        (6.0, _file(20, 2)),
    )
    assert _steps(settling, clock, *steps) == [False, False, False, False, False, True]


def test_a_file_that_is_open_or_empty_is_not_complete() -> None:
    clock = Clock()
    is_open: list[bool | None] = [True]
    settling = Settling(2.0, is_open=lambda _: is_open[0], clock=clock)
    assert _steps(settling, clock, (0.0, _file()), (50.0, _file())) == [False, False]
    is_open[0] = False
    assert _steps(settling, clock, (51.0, _file())) == [True]
    assert _steps(settling, clock, (60.0, _file(0)), (99.0, _file(0))) == [False, False]


def test_where_the_system_cannot_tell_whether_it_is_open_it_has_to_be_unchanged_for_longer() -> None:
    clock = Clock()
    settling = Settling(2.0, is_open=lambda _: None, clock=clock)
    assert _steps(settling, clock, (0.0, _file()), (9.9, _file()), (10.0, _file())) == [False, False, True]


def test_the_next_look_is_when_a_file_may_be_complete() -> None:
    clock = Clock()
    settling = Settling(2.0, is_open=lambda _: None, clock=clock)
    looks = []
    for now in (0.0, 2.0, 10.0):
        clock.now = now
        settling.complete({_file().path: _file()})
        looks.append(settling.next_look)
    assert looks == [2.0, 10.0, float("inf")]
