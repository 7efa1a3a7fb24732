import errno
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.whisper.packages import Package, PackagedModels

PART_1, PART_2 = b"one" * 1_000_000, b"two" * 1_000_000
BESIDE = {"config.json": b"{}", "tokenizer.json": b"{}", "vocabulary.txt": b"word\n"}
WHOLE = BESIDE | {"model.bin": PART_1 + PART_2}
DIGEST = hashlib.sha256(PART_1 + PART_2).hexdigest()
KNOWN = {
    "parted": Package(
        "parted_one",
        "data",
        parts=(("parted_one", "data/model.bin.part1"), ("parted_two", "data/model.bin.part2")),
        sha256=DIGEST,
        size_bytes=len(PART_1 + PART_2),
    ),
    "missing": Package("no_such_package_anywhere", "model"),
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, with a model in two parts."""
    site = tmp_path / "site"
    for package, files in (
        ("parted_one", BESIDE | {"model.bin.part1": PART_1}),
        ("parted_two", {"model.bin.part2": PART_2}),
    ):
        (site / package / "data").mkdir(parents=True)
        for name, content in files.items():
            (site / package / "data" / name).write_bytes(content)
    monkeypatch.syspath_prepend(site)
    return site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "models"


def join(models: PackagedModels, *, should_stop: Callable[[], bool] = lambda: False, anew: bool = False) -> Path:
    return models.join("parted", should_stop=should_stop, on_progress=lambda *_: None, anew=anew)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def left(folder: Path) -> set[str]:
    """What lies in the folder, save the lock."""
    return {entry.name for entry in folder.iterdir() if entry.suffix != ".lock"} if folder.is_dir() else set()


def refusal(models: PackagedModels) -> str:
    with pytest.raises(JobFailedError) as caught:
        join(models)
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert "'parted'" in caught.value.message
    return caught.value.message


@pytest.mark.usefixtures("site")
def test_a_model_in_parts_is_joined_once(folder: Path) -> None:
    models = PackagedModels(folder, packages=KNOWN)
    assert models.can_join("parted")
    assert models.find("parted") is None
    told: list[tuple[int, int]] = []
    path = models.join("parted", should_stop=lambda: False, on_progress=lambda *way: told.append(way))
    assert content(path) == WHOLE
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}
    assert path.parent == folder
    assert models.is_joined(path)
    size = sum(map(len, WHOLE.values()))
    assert told[-1] == (size, size)
    assert models.size_bytes("parted") == size

    before = (path / "model.bin").stat()
    assert join(models) == path
    assert (path / "model.bin").stat() == before
    assert PackagedModels(folder, packages=KNOWN).find("parted") == path, "another start finds it"


def test_a_package_that_is_not_installed_is_not_there(folder: Path) -> None:
    models = PackagedModels(folder, packages=KNOWN)
    assert models.find("missing") is None
    assert models.find("unheard-of") is None
    assert not models.can_join("parted")
    assert not models.can_join("missing")


def test_a_joined_model_outlives_its_packages(folder: Path, site: Path) -> None:
    models = PackagedModels(folder, packages=KNOWN)
    path = join(models)
    shutil.rmtree(site / "parted_two" / "data")
    assert models.find("parted") == path
    assert not models.can_join("parted")


@pytest.mark.parametrize("damage", ["cut model", "no model", "cut tokenizer", "no vocabulary"])
@pytest.mark.usefixtures("site")
def test_a_joined_model_of_another_size_is_joined_again(damage: str, folder: Path) -> None:
    models = PackagedModels(folder, packages=KNOWN)
    path = join(models)
    match damage:
        case "cut model":
            os.truncate(path / "model.bin", len(PART_1))
        case "no model":
            (path / "model.bin").unlink()
        case "cut tokenizer":
            os.truncate(path / "tokenizer.json", 1)
        case _:
            (path / "vocabulary.txt").unlink()
    assert models.find("parted") is None
    assert models.can_join("parted")
    assert content(join(models)) == WHOLE


@pytest.mark.usefixtures("site")
def test_a_model_that_looks_whole_is_replaced_when_asked_for(folder: Path) -> None:
    models = PackagedModels(folder, packages=KNOWN)
    path = join(models)
    (path / "model.bin").write_bytes(b"x" * len(PART_1 + PART_2))
    assert join(models) == path
    assert content(path) != WHOLE
    assert content(join(models, anew=True)) == WHOLE


def test_a_damaged_package_is_told_and_nothing_is_kept_of_it(folder: Path, site: Path) -> None:
    (site / "parted_two" / "data" / "model.bin.part2").write_bytes(b"owt" * 1_000_000)
    message = refusal(PackagedModels(folder, packages=KNOWN))
    assert "parted_one" in message
    assert "install" in message
    assert left(folder) == set()


class FailingDisk(Disk):
    """Runs full, or denies a step; notes what was synced before the rename."""

    def __init__(self, *, full_after: int | None = None, no: str = "") -> None:
        self.room = full_after
        self.no = no
        self.steps: list[str] = []

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        if self.room is not None:
            if not self.room:
                raise OSError(errno.ENOSPC, "full")
            data = data[: self.room]
            self.room -= len(data)
        return super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self.steps.append("sync")
        super().sync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self.steps.append("replace")
        if self.no == "replace":
            raise OSError(errno.EROFS, "read-only")
        super().replace(source, target)


@pytest.mark.usefixtures("site")
def test_everything_is_synced_before_it_gets_its_name_and_the_name_after(folder: Path) -> None:
    disk = FailingDisk()
    join(PackagedModels(folder, packages=KNOWN, disk=disk))
    assert disk.steps == ["sync"] + ["sync"] * (len(WHOLE) + 1) + ["replace", "sync"]


@pytest.mark.parametrize("room", [0, 1, 2_000_000, len(PART_1 + PART_2)])
@pytest.mark.usefixtures("site")
def test_a_disk_that_runs_full_is_told_and_left_as_it_was(room: int, folder: Path) -> None:
    message = refusal(PackagedModels(folder, packages=KNOWN, disk=FailingDisk(full_after=room)))
    assert "room on the disk" in message
    assert str(folder) not in message
    assert left(folder) == set()


@pytest.mark.usefixtures("site")
def test_a_disk_without_room_for_it_is_not_filled_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(PART_1 + PART_2)))
    assert "room on the disk" in refusal(PackagedModels(folder, packages=KNOWN, disk=disk))
    assert "replace" not in disk.steps
    assert left(folder) == set()


@pytest.mark.usefixtures("site")
def test_a_folder_that_cannot_be_written_is_told(folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where a folder has to be")
    assert "data directory" in refusal(PackagedModels(folder, packages=KNOWN))


@pytest.mark.usefixtures("site")
def test_a_failure_in_the_last_step_leaves_nothing_that_counts(folder: Path) -> None:
    assert "joined" in refusal(PackagedModels(folder, packages=KNOWN, disk=FailingDisk(no="replace")))
    assert left(folder) == set()


@pytest.mark.usefixtures("site")
def test_joining_can_be_stopped_and_leaves_nothing(folder: Path) -> None:
    times = itertools.count()
    with pytest.raises(Cancelled):
        join(PackagedModels(folder, packages=KNOWN), should_stop=lambda: next(times) > 5)
    assert left(folder) == set()


CRASH = """
import os, sys
from pathlib import Path
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.whisper.packages import PackagedModels
from tests.unit.whisper.test_packages import KNOWN

class Crash(Disk):
    steps = 0
    def step(self):
        Crash.steps += 1
        if Crash.steps > int(sys.argv[2]):
            os._exit(9)
    def sync(self, descriptor):
        self.step(); super().sync(descriptor); self.step()
    def replace(self, source, target):
        self.step(); super().replace(source, target); self.step()

PackagedModels(Path(sys.argv[1]), packages=KNOWN, disk=Crash()).join(
    "parted", should_stop=lambda: False, on_progress=lambda *_: None
)
"""


def test_a_crash_at_any_step_leaves_nothing_that_counts_as_a_model_until_it_is_one(folder: Path, site: Path) -> None:
    environ = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[3]}"}
    models = PackagedModels(folder, packages=KNOWN)
    joined_after = None
    for steps in (3, 10, 12, 13, 14, 15, 16):
        command = [sys.executable, "-c", CRASH, str(folder), str(steps)]
        ended = subprocess.run(command, env=environ, check=False, timeout=60)
        found = models.find("parted")
        assert ended.returncode in {0, 9}
        if found is not None:
            assert content(found) == WHOLE
            joined_after = steps
            break
    assert joined_after is not None
    assert joined_after > 10
    assert left(folder) == {models.find("parted").name}  # type: ignore[union-attr]


@pytest.mark.usefixtures("site")
def test_those_who_join_at_once_take_turns(folder: Path) -> None:
    disks = [FailingDisk() for _ in range(4)]
    threads = [
        threading.Thread(target=lambda disk=disk: join(PackagedModels(folder, packages=KNOWN, disk=disk)))
        for disk in disks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [disk.steps.count("replace") for disk in disks].count(1) == 1
    assert content(join(PackagedModels(folder, packages=KNOWN))) == WHOLE


@pytest.mark.usefixtures("site")
def test_waiting_for_ones_turn_can_be_stopped(folder: Path) -> None:
    folder.mkdir(parents=True)
    with FileLock(folder / f".parted-{DIGEST[:12]}.lock"), pytest.raises(Cancelled):
        join(PackagedModels(folder, packages=KNOWN), should_stop=lambda: True)
    assert left(folder) == set()
