"""The real disk: what is synced and when, and that no file stays open or half written."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger, data_dir_problem
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
        assert modes == dict.fromkeys(["ledger.json", "ledger.json.journal", "ledger.reserve"], "0o600")
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


@pytest.mark.parametrize("name", ["ledger.json.tmp", "ledger.json.journal.tmp"])
def test_a_link_in_place_of_a_temporary_file_is_not_written_through(tmp_path: Path, name: str) -> None:
    """Who may write the folder could have any file of the consumer's user overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    storage = JournalStorage(tmp_path / "ledger.json")
    storage.commit([Change("jobs", 1, {"a": 1})])
    storage.close()
    assert victim.read_text() == "precious"


def test_a_journal_that_is_a_link_is_not_opened(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    (tmp_path / "ledger.json.journal").symlink_to(victim)
    with pytest.raises(LedgerError, match="cannot be opened"):
        JournalStorage(tmp_path / "ledger.json")
    assert victim.read_text() == ""


def test_the_lock_is_readable_to_its_owner_only(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.json"):
        assert stat.S_IMODE((tmp_path / "ledger.json.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("mode", "told"), [(0o700, None), (0o755, None), (0o775, "by its group"), (0o777, "by every user")]
)
def test_a_data_directory_that_others_may_write_is_a_problem(tmp_path: Path, mode: int, told: str | None) -> None:
    tmp_path.chmod(mode)
    problem = data_dir_problem(tmp_path)
    assert (problem is None) if told is None else (problem is not None and told in problem[0])


def test_a_data_directory_of_another_user_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    problem = data_dir_problem(tmp_path)
    assert (problem is None) if tmp_path.stat().st_uid == 0 else (problem is not None)
    assert data_dir_problem(tmp_path / "missing") is None
