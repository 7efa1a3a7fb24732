"""The spool: audio is on disk before its name is returned, and deleted when no job needs it."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cesar_mqtt.errors import LedgerError, SpoolFullError
from cesar_mqtt.ledger.reserve import RESERVE_BYTES
from cesar_mqtt.ledger.spool import Spool
from tests.unit.ledger.faults import FaultyDisk, Killed, PoweredDisk, QuickDisk, failing, killing

MIB = 1 << 20

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into Linux's /proc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "spool"


@pytest.fixture
def spool(folder: Path) -> Spool:
    return Spool(folder, QuickDisk())


def test_stored_files_can_be_read_under_generated_names(spool: Spool) -> None:
    first = spool.store([b"one", b"two", b""])
    second = spool.store([b"one"])
    names = [*first, *second]
    assert [spool.path(name).read_bytes() for name in names] == [b"one", b"two", b"", b"one"]
    assert len(set(names)) == 4
    assert all(name.isalnum() for name in names)


def test_storing_no_files_does_not_touch_the_disk(folder: Path) -> None:
    disk = FaultyDisk()
    spool = Spool(folder, disk)
    disk.calls.clear()
    assert spool.store([]) == []
    assert disk.calls == []


def test_each_file_and_then_the_folder_is_synced_before_the_names_are_returned(folder: Path) -> None:
    disk = FaultyDisk()
    spool = Spool(folder, disk)
    disk.calls.clear()
    spool.store([b"one", b"two"])
    assert disk.calls == ["write", "sync", "write", "sync", "sync"]


def test_the_folder_is_durable_before_any_file_in_it(folder: Path) -> None:
    disk = FaultyDisk()
    Spool(folder, disk)
    assert disk.calls == ["sync"]


@needs_proc
def test_files_whose_names_were_returned_survive_a_power_cut(folder: Path) -> None:
    disk = PoweredDisk()
    spool = Spool(folder, disk)
    stored: dict[str, bytes] = {}
    media: list[tuple[dict[str, bytes], dict[str, bytes]]] = []
    disk.on_step = lambda: media.append((dict(stored), disk.media()))
    for number in range(20):
        contents = [bytes([number]) * (400 * number), b"x"]
        stored.update(zip(spool.store(contents), contents, strict=True))
    assert len(media) > 60
    for promised, found in media:
        assert promised.items() <= found.items()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_failure_leaves_no_file_of_the_batch(folder: Path, code: int) -> None:
    disk = FaultyDisk()
    spool = Spool(folder, disk)
    (kept,) = spool.store([b"kept"])
    for skip in range(20):
        disk.calls.clear()
        disk.fault = failing(skip=skip, code=code)
        try:
            names = spool.store([b"one", b"two"])
        except LedgerError as exc:
            assert str(folder) in str(exc)  # noqa: PT017
            assert [file.name for file in folder.iterdir()] == [kept]
        else:
            break
    assert skip == 5
    disk.heal()
    assert sorted(file.name for file in folder.iterdir()) == sorted([kept, *names])


def test_files_of_a_process_that_died_are_swept_at_the_next_start(folder: Path) -> None:
    disk = FaultyDisk()
    spool = Spool(folder, disk)
    (kept,) = spool.store([b"kept"])
    for skip in range(5):
        disk.fault = killing(skip=skip)
        with pytest.raises(Killed):
            spool.store([b"one", b"two"])
        disk.heal()
        spool = Spool(folder, disk)
        assert spool.sweep({kept}) in (1, 2)
        assert [file.name for file in folder.iterdir()] == [kept]


def test_files_beyond_the_limit_are_refused_until_others_are_removed(folder: Path) -> None:
    spool = Spool(folder, QuickDisk(), max_bytes=100)
    one, _ = spool.store([b"x" * 60, b"y" * 30])
    assert (spool.room_bytes, spool.capacity_bytes) == (10, 100)
    with pytest.raises(SpoolFullError, match=r"90 of 100 bytes \(queue.max_spool_bytes\): 20 more") as full:
        spool.store([b"z" * 5, b"z" * 15])
    assert full.value.needed_bytes == 20
    assert len(list(folder.iterdir())) == 2
    spool.remove([one, one, "never there"])
    assert spool.room_bytes == 70
    spool.store([b"z" * 70])
    assert spool.room_bytes == 0


def test_what_is_there_at_the_start_counts_until_it_is_swept(folder: Path) -> None:
    names = Spool(folder, QuickDisk()).store([b"x" * 60, b"y" * 30])
    spool = Spool(folder, QuickDisk(), max_bytes=100)
    assert (spool.room_bytes, spool.size_bytes(names), spool.size_bytes(["other"])) == (10, 90, 0)
    spool.sweep(names[:1])
    assert (spool.room_bytes, spool.size_bytes(names)) == (40, 60)


def test_as_many_files_fit_as_there_is_room_for_and_at_least_one(folder: Path) -> None:
    spool = Spool(folder, QuickDisk(), max_bytes=100)
    assert [spool.fitting(sizes) for sizes in ([100], [60, 40, 1], [0, 0, 200, 0], [200, 1])] == [1, 2, 2, 1]
    spool.store([b"x" * 90])
    assert spool.fitting([10, 1]) == 1
    assert spool.fitting([10, 1, 89, 1], evictable_bytes=90) == 3


def test_nothing_is_written_where_the_disk_has_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FaultyDisk()
    spool = Spool(folder, disk)
    real = os.statvfs(folder)
    free = 2 * MIB
    few = SimpleNamespace(
        f_bavail=free // 4096, f_bfree=free // 4096 + 10, f_frsize=4096, f_blocks=real.f_blocks and 10 * MIB // 4096
    )
    monkeypatch.setattr("os.statvfs", lambda _path: few)
    disk.calls.clear()
    with pytest.raises(SpoolFullError, match="has too little room: 2000000 more"):
        spool.store([bytes(2_000_000)])
    assert disk.calls == []
    assert spool.room_bytes == free - MIB // 2
    assert spool.capacity_bytes == 10 * MIB - 10 * 4096 - RESERVE_BYTES - MIB // 2
    spool.store([bytes(1_000_000)])


def test_removing_missing_files_is_no_error(spool: Spool) -> None:
    one, two = spool.store([b"one", b"two"])
    spool.remove([one, "never there", one])
    assert not spool.path(one).exists()
    assert spool.path(two).read_bytes() == b"two"


def test_a_sweep_deletes_and_counts_unneeded_files(spool: Spool, folder: Path) -> None:
    names = spool.store([b"one", b"two", b"three"])
    (folder / "lost+found").mkdir()
    assert spool.sweep({names[0], "already deleted"}) == 2
    assert sorted(file.name for file in folder.iterdir()) == sorted([names[0], "lost+found"])
    assert spool.sweep({names[0]}) == 0


def test_a_sweep_deletes_foreign_files_too(spool: Spool) -> None:
    (spool.folder / "download").write_bytes(b"half a file")
    assert spool.path("download") == spool.folder / "download"
    assert spool.folder.is_absolute()
    assert spool.sweep(()) == 1
    assert list(spool.folder.iterdir()) == []


def test_a_spool_that_cannot_be_created_or_read_is_named_in_the_error(
    tmp_path: Path, spool: Spool, folder: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"file/spool cannot be created: Not a directory"):
        Spool(tmp_path / "file" / "spool")
    folder.rmdir()
    with pytest.raises(LedgerError, match=r"spool cannot be read: No such file"):
        spool.sweep(())
    folder.parent.rmdir()
    with pytest.raises(LedgerError, match=r"spool cannot be written: No such file"):
        spool.store([b"one"])


def test_a_folder_that_was_removed_is_made_again(folder: Path) -> None:
    spool = Spool(folder, QuickDisk())
    folder.rmdir()
    (name,) = spool.store([b"one"])
    assert spool.path(name).read_bytes() == b"one"
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder.parent)
    with pytest.raises(LedgerError, match="No such file or directory"):
        spool.store([b"two"])
