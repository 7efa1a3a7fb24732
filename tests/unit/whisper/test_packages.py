import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper.packages import PACKAGES, Package, PackagedModels
from tests.conftest import PATIENCE_S

PART_1, PART_2 = b"one" * 1_000_000, b"two" * 1_000_000
BESIDE = {"config.json": b"{}", "tokenizer.json": b"{}", "vocabulary.txt": b"word\n"}
WHOLE = BESIDE | {"model.bin": PART_1 + PART_2}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in WHOLE.items()}
DIGEST = DIGESTS["model.bin"]
KNOWN = {
    "whole": Package("whole_model", "model", DIGESTS),
    "parted": Package(
        "parted_one",
        "data",
        DIGESTS,
        parts=(("parted_one", "data/model.bin.part1"), ("parted_two", "data/model.bin.part2")),
        size_bytes=len(PART_1 + PART_2),
    ),
    "missing": Package("no_such_package_anywhere", "model", DIGESTS),
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, with a model in two parts and one that is whole."""
    site = tmp_path / "site"
    (site / "whole_model" / "model").mkdir(parents=True)
    for name, content in WHOLE.items():
        (site / "whole_model" / "model" / name).write_bytes(content)
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


def join(models: PackagedModels, *, should_stop: Callable[[], bool] = never_stop) -> Path:
    return models.join("parted", should_stop=should_stop, on_progress=lambda *_: None)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def left(folder: Path) -> set[str]:
    """What is in the folder besides the lock."""
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
    reported: list[tuple[int, int]] = []
    path = models.join("parted", should_stop=never_stop, on_progress=lambda *progress: reported.append(progress))
    assert content(path) == WHOLE
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}
    assert path.parent == folder
    size = sum(map(len, WHOLE.values()))
    assert reported[-1] == (size, size)
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


def test_a_damaged_package_is_reported_and_nothing_of_it_is_left(folder: Path, site: Path) -> None:
    (site / "parted_two" / "data" / "model.bin.part2").write_bytes(b"owt" * 1_000_000)
    message = refusal(PackagedModels(folder, packages=KNOWN))
    assert "parted_one" in message
    assert "install" in message
    assert left(folder) == set()


@pytest.mark.parametrize("name", BESIDE)
def test_a_damaged_file_beside_the_parts_is_reported_as_well(name: str, folder: Path, site: Path) -> None:
    (site / "parted_one" / "data" / name).write_bytes(b"other")
    assert "damaged" in refusal(PackagedModels(folder, packages=KNOWN))
    assert left(folder) == set()


# --- packaged whole


def read_by(check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files that a check reads in pieces."""
    opened: set[str] = set()
    real = Path.open

    def noted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.add(path.name)
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", noted)
        check()
    return opened & WHOLE.keys()


def test_a_whole_model_is_compared_with_its_digests_once_for_each_state_of_its_files(
    folder: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir()
    path = site / "whole_model" / "model"

    def check() -> None:
        models = PackagedModels(folder, packages=KNOWN)
        assert models.find("whole") == path
        models.check("whole", path, should_stop=never_stop)

    assert read_by(check, monkeypatch) == WHOLE.keys()
    assert read_by(check, monkeypatch) == set()
    (path / "model.bin").write_bytes(WHOLE["model.bin"])
    assert read_by(check, monkeypatch) == WHOLE.keys()
    (path / "model.bin").write_bytes(PART_2 + PART_1)
    for _ in range(2):
        with pytest.raises(JobFailedError, match="'whole_model'") as caught:
            check()
        assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


def test_without_a_data_directory_nothing_is_recorded(folder: Path, site: Path) -> None:
    models = PackagedModels(folder, packages=KNOWN)
    models.check("whole", site / "whole_model" / "model", should_stop=never_stop)
    assert not folder.parent.exists()
    with pytest.raises(Cancelled):
        models.check("whole", site / "whole_model" / "model", should_stop=lambda: True)


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_missing_is_a_damaged_package(name: str, folder: Path, site: Path) -> None:
    (site / "whole_model" / "model" / name).unlink()
    models = PackagedModels(folder, packages=KNOWN)
    with pytest.raises(JobFailedError, match="damaged"):
        models.check("whole", site / "whole_model" / "model", should_stop=never_stop)


def test_the_digests_are_of_every_file_that_is_loaded() -> None:
    assert {package.release for package in PACKAGES.values()} == {"d01c3014881c", "1a5afae06a4d"}
    for package in PACKAGES.values():
        assert [*package.sha256] == [*WHOLE], "model.bin comes last"
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in package.sha256.values())


@pytest.mark.usefixtures("site")
def test_each_file_is_synced_before_it_gets_its_name_and_the_model_comes_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append("sync")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> Path:
        steps.append(target.name)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    join(PackagedModels(folder, packages=KNOWN))
    assert steps[::2] == ["sync"] * len(WHOLE)
    assert steps[1::2] == [*BESIDE, "model.bin"]


REFUSED = {
    "full": ("fsync", errno.ENOSPC, "room on the disk"),
    "over quota": ("fsync", errno.EDQUOT, "room on the disk"),
    "read-only": ("replace", errno.EROFS, "joined"),
}


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("after", [0, len(BESIDE)])
@pytest.mark.usefixtures("site")
def test_a_disk_that_refuses_is_reported_and_left_as_it_was(
    refused: str, after: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, number, words = REFUSED[refused]
    owner: Any = os if call == "fsync" else Path
    real, calls = getattr(owner, call), itertools.count()

    def refuse(*arguments: object) -> object:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(owner, call, refuse)
    message = refusal(PackagedModels(folder, packages=KNOWN))
    assert words in message
    assert str(folder) not in message
    assert left(folder) == set()


@pytest.mark.usefixtures("site")
def test_a_disk_without_room_for_it_is_not_filled_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(PART_1 + PART_2)))
    assert "room on the disk" in refusal(PackagedModels(folder, packages=KNOWN))
    assert left(folder) == set()


@pytest.mark.usefixtures("site")
def test_a_folder_that_cannot_be_written_is_reported(folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where a folder has to be")
    assert "data directory" in refusal(PackagedModels(folder, packages=KNOWN))


@pytest.mark.usefixtures("site")
def test_a_cancelled_join_leaves_nothing(folder: Path) -> None:
    times = itertools.count()
    with pytest.raises(Cancelled):
        join(PackagedModels(folder, packages=KNOWN), should_stop=lambda: next(times) > 5)
    assert left(folder) == set()


CRASH = """
import os, sys
from pathlib import Path
from cesar_mqtt.whisper.packages import PackagedModels
from tests.unit.whisper.test_packages import KNOWN

steps = 0

def crashing(call):
    def step(*arguments):
        global steps
        for done in (False, True):
            steps += 1
            if steps > int(sys.argv[2]):
                os._exit(9)
            if not done:
                result = call(*arguments)
        return result
    return step

os.fsync, Path.replace = crashing(os.fsync), crashing(Path.replace)
PackagedModels(Path(sys.argv[1]), packages=KNOWN).join(
    "parted", should_stop=lambda: False, on_progress=lambda *_: None
)
"""


def test_a_crash_at_any_step_leaves_nothing_that_counts_as_a_model_until_it_is_one(folder: Path, site: Path) -> None:
    environ = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[3]}"}
    models = PackagedModels(folder, packages=KNOWN)
    for steps in (0, 3, 13, 14, 15, 16):  # four for each of the four files; the last two come after the last rename
        command = [sys.executable, "-c", CRASH, str(folder), str(steps)]
        ended = subprocess.run(command, env=environ, check=False, timeout=PATIENCE_S)
        found = models.find("parted")
        assert ended.returncode in {0, 9}
        assert (found is not None) == (steps >= 15)
        if found is not None:
            assert content(found) == WHOLE
    assert left(folder) == {join(models).name}


@pytest.mark.usefixtures("site")
def test_concurrent_joins_take_turns(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    threads = [threading.Thread(target=lambda: join(PackagedModels(folder, packages=KNOWN))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.text.count("from the parts in its packages") == 1
    assert content(join(PackagedModels(folder, packages=KNOWN))) == WHOLE


@pytest.mark.usefixtures("site")
def test_waiting_for_another_join_can_be_cancelled(folder: Path) -> None:
    folder.mkdir(parents=True)
    with FileLock(folder / f".parted-{DIGEST[:12]}.lock"), pytest.raises(Cancelled):
        join(PackagedModels(folder, packages=KNOWN), should_stop=lambda: True)
    assert left(folder) == set()
