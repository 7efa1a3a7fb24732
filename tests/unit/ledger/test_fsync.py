"""The real disk: what is synced and when, and that no file stays open or half written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.storage import Change, JournalStorage

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into Linux's /proc")


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names, no paths


class Medium:
    """Records which files and folders were synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked_for: list[str] = []
        real = os.fsync

        def sync(descriptor: int) -> None:
            self.asked_for.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            real(descriptor)

        for name in ("os.fsync", "cesar_mqtt.ledger.fsync._fdatasync"):
            monkeypatch.setattr(name, sync)

    def take(self) -> list[str]:
        asked_for, self.asked_for = self.asked_for, []
        return asked_for


def test_a_transaction_and_a_checkpoint_are_synced_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, folder = Medium(monkeypatch), tmp_path.name
    storage = JournalStorage(tmp_path / "ledger.json")
    medium.take()
    storage.commit([Change("jobs", 1, {"job_id": "a"})])
    assert medium.take() == ["ledger.json.journal"]
    storage.checkpoint()
    assert medium.take() == ["ledger.json.tmp", folder, "ledger.json.journal.tmp", folder]
    storage.close()


def test_only_the_owner_may_read_the_files(tmp_path: Path) -> None:
    storage = JournalStorage(tmp_path / "ledger.json")
    storage.commit([Change("jobs", 1, {"text": "secret"})])
    for _ in range(2):
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
        assert modes == dict.fromkeys(["ledger.json", "ledger.json.journal"], "0o600")
        storage.checkpoint()
    storage.close()


def test_a_file_is_closed_whatever_happens(tmp_path: Path) -> None:
    def torn() -> Iterator[bytes]:
        yield b"begun"
        raise OSError

    disk, before = Disk(), open_files()
    assert disk.create(tmp_path / "file", [b"one", b"two"]) == 6
    with pytest.raises(OSError, match=r"^$"):
        disk.create(tmp_path / "torn", torn())
    disk.sync_folder(tmp_path)
    with pytest.raises(NotADirectoryError):
        disk.sync_folder(tmp_path / "file")
    assert open_files() == before
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "an unfinished file does not fill the disk"


def test_removing_a_missing_file_is_no_error(tmp_path: Path) -> None:
    Disk().remove(tmp_path / "missing")
