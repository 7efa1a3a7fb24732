"""The reserve: changes that free room are journalled when nothing else fits, and it is taken again afterwards."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cesar_mqtt.errors import ErrorCode, LedgerError
from cesar_mqtt.jobs import JobState
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.reserve import KEPT_FOR_COMMANDS, RESERVE_BYTES, Reserve
from tests.factories import new_job, result

BLOCK = 4096


class FullDisk(Disk):
    """Has room for what the reserve frees, and for no other byte, once it is full.

    Attributes:
        room: free bytes; None: any number.
        code: how a write without room fails.
    """

    def __init__(self) -> None:
        self.room: int | None = None
        self.code = errno.ENOSPC

    def _take(self, size: int) -> None:
        if self.room is not None and size > self.room:
            raise OSError(self.code, os.strerror(self.code))
        if self.room is not None:
            self.room -= size

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        self._take(len(data))
        return super().write(descriptor, data, offset)

    def reserve(self, descriptor: int, start: int, end: int) -> None:
        self._take(end - start)
        super().reserve(descriptor, start, end)

    def allocate(self, descriptor: int, start: int, end: int) -> None:
        self._take(end - start)
        super().allocate(descriptor, start, end)

    def truncate(self, descriptor: int, size: int) -> None:
        freed = os.fstat(descriptor).st_size - size
        super().truncate(descriptor, size)
        if self.room is not None and Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".reserve":
            self.room += freed


@pytest.fixture
def disk() -> FullDisk:
    return FullDisk()


@pytest.fixture
def ledger(tmp_path: Path, disk: FullDisk) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.json", disk=disk) as ledger:
        ledger.append([new_job(f"job-{number}") for number in range(10)])
        disk.room = 0
        yield ledger
        disk.room = None


def size_of(ledger: Ledger) -> int:
    return ledger.path.with_suffix(".reserve").stat().st_size


def fill_journal(ledger: Ledger) -> None:
    """Use the room that the journal has taken in advance."""
    ledger._storage._journal._reserved = ledger._storage._journal.size


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_jobs_end_and_are_deleted_and_none_is_accepted(
    ledger: Ledger, disk: FullDisk, code: int
) -> None:
    disk.code = code
    fill_journal(ledger)
    running = ledger.claim()
    assert running is not None
    ledger.complete(running.seq, result())
    second = ledger.claim()
    assert second is not None
    ledger.cancel(second.job_id)
    ledger.finish_cancelling(second.seq)
    ledger.cancel("job-2")
    ledger.delete("job-3")
    ledger.pause(on=True)
    disk.room = 0  # what the last change has left
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.append([new_job("more")])
    assert size_of(ledger) < RESERVE_BYTES
    states = {job.job_id: job.state for job in ledger.jobs()}
    assert [states[f"job-{n}"] for n in (0, 1, 2, 4)] == [
        *(JobState.COMPLETED, JobState.CANCELLED, JobState.CANCELLED, JobState.QUEUED)
    ]
    assert "job-3" not in states


def test_the_work_on_jobs_leaves_room_for_commands(ledger: Ledger, disk: FullDisk) -> None:
    fill_journal(ledger)
    job = ledger.claim()
    assert job is not None
    with pytest.raises(LedgerError):
        ledger.complete(job.seq, result("x" * (RESERVE_BYTES - KEPT_FOR_COMMANDS)))
    for _ in range(1000):
        try:
            ledger.fail(job.seq, ErrorCode.TIMEOUT, "x" * 10_000)
            ledger.retry(job.job_id)
            assert ledger.claim() is not None
        except LedgerError:
            break
    assert size_of(ledger) == KEPT_FOR_COMMANDS
    disk.room = 0
    assert ledger.delete("job-9") is not None
    assert size_of(ledger) < KEPT_FOR_COMMANDS


def test_it_is_taken_again_as_far_as_there_is_room_and_room_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = Reserve(tmp_path / "ledger.reserve", Disk())
    assert reserve.give_up(10 * BLOCK, keep_bytes=0)
    given_up = RESERVE_BYTES - (tmp_path / "ledger.reserve").stat().st_size
    assert given_up >= 10 * BLOCK
    for free_blocks, expected in ((0, given_up), (64, given_up), (66, given_up - 2 * BLOCK), (1000, 0)):
        few = SimpleNamespace(f_bavail=free_blocks, f_frsize=BLOCK)
        monkeypatch.setattr("os.fstatvfs", lambda _descriptor, few=few: few)
        reserve.restore()
        assert RESERVE_BYTES - (tmp_path / "ledger.reserve").stat().st_size == expected
    blocks = (tmp_path / "ledger.reserve").stat().st_blocks
    assert blocks * 512 >= RESERVE_BYTES, "its blocks exist"
    reserve.close()
    reserve.close()


def test_it_gives_up_no_more_than_it_has(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "ledger.reserve", Disk())
    assert reserve.give_up(RESERVE_BYTES, keep_bytes=KEPT_FOR_COMMANDS)
    assert not reserve.give_up(1, keep_bytes=KEPT_FOR_COMMANDS)
    assert reserve.give_up(RESERVE_BYTES, keep_bytes=0)
    assert not reserve.give_up(1, keep_bytes=0)
    reserve.close()


def test_without_the_file_everything_works_as_without_room(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"not ours")
    (tmp_path / "ledger.reserve").symlink_to(tmp_path / "target")
    reserve = Reserve(tmp_path / "ledger.reserve", Disk())
    assert not reserve.give_up(1, keep_bytes=0)
    reserve.restore()
    reserve.close()
    assert (tmp_path / "target").read_bytes() == b"not ours"


def test_a_ledger_that_was_closed_opens_on_a_full_disk(tmp_path: Path, disk: FullDisk) -> None:
    path = tmp_path / "ledger.json"
    with Ledger(path, disk=disk) as ledger:
        ledger.append([new_job("a")])
    disk.room = 0
    with Ledger(path, disk=disk) as ledger:
        assert ledger.delete("a") is not None
        disk.room = None
    with Ledger(path, disk=disk) as ledger:
        assert ledger.get("a") is None
        ledger.restore_reserve()
        assert size_of(ledger) == RESERVE_BYTES
    ledger.restore_reserve()


def test_a_journal_that_is_as_large_as_files_may_be_is_checkpointed(tmp_path: Path) -> None:
    class SmallFiles(Disk):
        def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
            if offset + len(data) > 4 * BLOCK:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            return super().write(descriptor, data, offset)

        def reserve(self, *_: int) -> None:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    with Ledger(tmp_path / "ledger.json", disk=SmallFiles()) as ledger:
        for number in range(100):
            ledger.append([new_job(f"job-{number}", metadata={"text": "x" * 900})])
            if number > 5:
                ledger.delete(f"job-{number - 5}")
        with pytest.raises(LedgerError, match="File too large"):
            ledger.append([new_job("large", metadata={"text": "x" * 5 * BLOCK})])
        ledger.append([new_job("last")])
        assert ledger.count([JobState.QUEUED]) == 7
