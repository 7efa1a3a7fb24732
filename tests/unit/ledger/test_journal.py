"""The ledger's files: cut or flipped at every byte, a disk that fails at every call, a power cut at every moment."""

import copy
import errno
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tinydb import Query, TinyDB
from tinydb.operations import delete

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.ledger import checkpoint, journal
from cesar_mqtt.ledger.checkpoint import Image
from cesar_mqtt.ledger.storage import Change, JournalStorage
from tests.unit.ledger.faults import FaultyDisk, Killed, PoweredDisk, QuickDisk, failing, killing

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into Linux's /proc")

TRANSACTIONS: tuple[tuple[Change, ...], ...] = (
    (Change("jobs", 1, {"job_id": "porch-1", "state": "queued", "n": 1}),),
    (Change("jobs", 2, {"job_id": "Küche", "text": "a\nb\u2028c\0d\ud800", "deep": {"a": [1, {"b": None}]}}),),
    (Change("jobs", 1, {"state": "processing"}, ("n",)), Change("counters", 1, {"completed": 1})),
    (),
    (Change("jobs", 3, {"text": "x" * 600}), Change("jobs", 4, {})),
    (Change("jobs", 2, None), Change("jobs", 9, None)),
    (Change("other", 1, {"a": 1}),),
    (Change("other", None), Change("jobs", 1, {"n": True})),
    (Change("jobs", 5, {"last": 0.5}),),
)


def apply(image: Image, changes: tuple[Change, ...]) -> Image:
    """Apply the changes in the simplest way, as the expectation."""
    image = copy.deepcopy(image)
    for change in changes:
        if change.doc_id is None:
            image.pop(change.table, None)
        elif change.fields is None:
            image.setdefault(change.table, {}).pop(str(change.doc_id), None)
        else:
            document = image.setdefault(change.table, {}).setdefault(str(change.doc_id), {})
            document.update(copy.deepcopy(dict(change.fields)))
            for name in change.dropped:
                document.pop(name, None)
    return image


def images_after_each() -> list[Image]:
    """The tables before the first transaction and after each one."""
    states: list[Image] = [{}]
    for changes in TRANSACTIONS:
        states.append(apply(states[-1], changes))
    return states


IMAGES = images_after_each()
STEP_BYTES = 4096
"""Small, so that the journal grows often and the files stay small."""


def image_of(storage: JournalStorage) -> Image:
    return {name: dict(rows) for name, rows in (storage.read() or {}).items()}


@dataclass
class Folder:
    """A ledger's folder whose content can be replaced."""

    path: Path
    opened: list[JournalStorage] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.json"

    @property
    def journal(self) -> Path:
        return self.path / "ledger.json.journal"

    def open(self, disk: QuickDisk | None = None) -> JournalStorage:
        for storage in self.opened:
            storage.abandon()
        self.opened = [JournalStorage(self.ledger, disk or QuickDisk())]
        return self.opened[0]

    def filled(self, disk: QuickDisk | None = None, *, first: int = 0, last: int = len(TRANSACTIONS)) -> JournalStorage:
        storage = self.open(disk)
        for changes in TRANSACTIONS[first:last]:
            storage.commit(changes)
        return storage

    def put(self, media: dict[str, bytes]) -> None:
        for old in self.path.iterdir():
            old.unlink()
        for name, content in media.items():
            (self.path / name).write_bytes(content)

    def media(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.path.iterdir()}

    def check_still_works(self) -> None:
        """Commit one more transaction and find it after the next opening."""
        storage = self.opened[0]
        expected = apply(image_of(storage), (Change("after", 1, {"a": 1}),))
        storage.commit([Change("after", 1, {"a": 1})])
        assert image_of(self.open()) == expected


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.setattr(journal, "_STEP_BYTES", STEP_BYTES)
    path = tmp_path / "data"
    path.mkdir()
    made = Folder(path)
    yield made
    for storage in made.opened:
        storage.abandon()


def line_ends(content: bytes) -> list[int]:
    return [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]


# -- without faults ---------------------------------------------------------------------------------------------


def test_committed_changes_survive_a_crash(folder: Folder) -> None:
    assert image_of(folder.filled()) == IMAGES[-1]
    again = folder.open()
    assert (image_of(again), again.transaction) == (IMAGES[-1], len(TRANSACTIONS))
    folder.check_still_works()


def test_committed_changes_survive_a_clean_stop_which_removes_the_journal(folder: Folder) -> None:
    storage = folder.filled()
    storage.close()
    storage.close()
    assert sorted(file.name for file in folder.path.iterdir()) == ["ledger.json", "ledger.reserve"]
    assert image_of(folder.open()) == IMAGES[-1]
    folder.check_still_works()


def test_a_second_close_does_not_touch_the_files(folder: Folder) -> None:
    storage = folder.filled()
    storage.close()
    folder.ledger.write_bytes(b"what another process has written since")
    folder.journal.write_bytes(b"as well")
    before = folder.media()
    storage.close()
    assert folder.media() == before


def test_the_transaction_number_and_the_watermark_survive_crashes_stops_and_checkpoints(folder: Folder) -> None:
    storage = folder.open()
    storage.commit([], watermark=7)
    storage = folder.open()
    assert (storage.transaction, storage.watermark) == (1, 7)
    storage.commit([Change("t", 1, {})])
    storage.checkpoint()
    storage = folder.open()
    assert (storage.transaction, storage.watermark) == (2, 7)
    storage.commit([], watermark=3)
    storage.close()
    storage = folder.open()
    assert (storage.transaction, storage.watermark) == (3, 3)


def test_a_commit_is_one_write_and_one_sync_however_much_it_changes(folder: Folder) -> None:
    disk = FaultyDisk()
    storage = folder.filled(disk, last=1)
    disk.calls.clear()
    storage.commit([Change("jobs", number, {"text": "x" * 20}) for number in range(50)])
    assert disk.calls == ["write", "sync_data"]


def test_the_journal_grows_in_steps_ahead_of_its_use(folder: Folder) -> None:
    disk = FaultyDisk()
    storage = folder.filled(disk)
    for number in range(100):
        storage.commit([Change("jobs", number, {"text": "x" * 50})])
    content = folder.journal.read_bytes()
    assert len(content) % STEP_BYTES == 0
    assert content[storage.journal_bytes - 1 :].rstrip(b"\0") == b"\n"
    assert disk.calls.count("reserve") == len(content) / STEP_BYTES
    disk.fault = failing(only="sync_data")
    with pytest.raises(LedgerError):
        storage.commit([])
    storage.commit([])
    assert len(folder.journal.read_bytes()) % STEP_BYTES == 0, "also after an append was undone"
    expected = image_of(storage)
    assert image_of(folder.open()) == expected


def test_a_closed_storage_refuses_to_commit(folder: Folder) -> None:
    storage = folder.filled()
    storage.abandon()
    with pytest.raises(LedgerError, match="closed"):
        storage.commit([])


def test_values_that_are_not_json_raise_and_change_nothing(folder: Folder) -> None:
    storage = folder.filled()
    for value in (float("nan"), float("-inf"), object(), [{"deep": float("nan")}]):
        with pytest.raises((TypeError, ValueError)):
            storage.commit([Change("jobs", 1, {"ok": 1}), Change("jobs", 1, {"bad": value})])
    assert image_of(storage) == IMAGES[-1]
    folder.check_still_works()


@needs_proc
@pytest.mark.parametrize("reason", ["damage", "disk"])
def test_a_failed_opening_leaves_no_file_open(folder: Folder, reason: str) -> None:
    folder.filled().abandon()
    disk = FaultyDisk()
    if reason == "damage":
        folder.journal.write_bytes(b"no journal\n" + folder.journal.read_bytes())
    else:
        disk.fault = failing(times=float("inf"))
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for _ in range(5):
        with pytest.raises(LedgerError):
            JournalStorage(folder.ledger, disk)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


@needs_proc
def test_a_close_that_the_disk_refuses_leaves_no_file_open(folder: Folder) -> None:
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    disk = FaultyDisk()
    storage = folder.filled(disk)
    disk.fault = failing(times=float("inf"))
    with pytest.raises(LedgerError, match="The journal is complete"):
        storage.close()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before
    assert image_of(folder.open()) == IMAGES[-1]


@needs_proc
def test_a_checkpoint_leaves_no_more_files_open_than_there_were(folder: Folder) -> None:
    """A consumer that runs for months writes thousands of them."""
    storage = folder.filled()
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for _ in range(5):
        storage.checkpoint()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("refused", [False, True])
def test_after_a_checkpoint_any_thread_may_write_the_next(folder: Folder, *, refused: bool) -> None:
    """The committing thread writes one to repair the journal, another thread writes those that are due."""
    disk = FaultyDisk()
    storage = folder.filled(disk)
    if refused:
        disk.fault = failing()
        with pytest.raises(OSError, match="error"):
            storage.checkpoint()
    else:
        storage.checkpoint()
    with ThreadPoolExecutor(1) as other:
        other.submit(storage.checkpoint).result(10)


# -- stock TinyDB -------------------------------------------------------------------------------------------------


def test_stock_tinydb_opens_the_checkpoint_at_any_time(folder: Folder) -> None:
    storage = folder.open()
    with TinyDB(folder.ledger, access_mode="r") as stock:
        assert stock.table("jobs").all() == []
    for changes in TRANSACTIONS[:5]:
        storage.commit(changes)
        with TinyDB(folder.ledger, access_mode="r") as stock:
            assert stock.table("jobs").all() == []
    storage.checkpoint()
    storage.commit(TRANSACTIONS[5])
    with TinyDB(folder.ledger, access_mode="r") as stock:
        assert {str(row.doc_id): dict(row) for row in stock.table("jobs")} == IMAGES[5]["jobs"]
    storage.close()
    with TinyDB(folder.ledger, access_mode="r") as stock:
        assert stock.table("jobs").get(Query().text == "x" * 600).doc_id == 3
        assert {str(row.doc_id): dict(row) for row in stock.table("jobs")} == IMAGES[6]["jobs"]


def test_a_ledger_that_stock_tinydb_has_written_to_is_refused(folder: Folder) -> None:
    folder.filled().close()
    with TinyDB(folder.ledger) as stock:
        stock.table("jobs").insert({"job_id": "smuggled"})
    with pytest.raises(LedgerError, match="changed by another program"):
        folder.open()


def storage_of(db: TinyDB) -> JournalStorage:
    assert isinstance(db.storage, JournalStorage)
    return db.storage


@pytest.fixture(params=["stock storage", "clean stop", "crash"])
def reopen(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], TinyDB]]:
    """Opens a database, and each time it is called again closes it and opens it once more."""
    opened: list[TinyDB] = []

    def make() -> TinyDB:
        for db in opened:
            storage_of(db).abandon() if request.param == "crash" else db.close()
        path = tmp_path / "db.json"
        stock = request.param == "stock storage"
        opened[:] = [TinyDB(path) if stock else TinyDB(path, QuickDisk(), storage=JournalStorage)]
        return opened[0]

    yield make
    opened[0].close()


def rows_of(db: TinyDB, table: str = "_default") -> dict[int, dict[str, Any]]:
    return {row.doc_id: dict(row) for row in db.table(table)}


def test_the_public_methods_of_tinydb_do_the_same_on_either_storage(reopen: Callable[[], TinyDB]) -> None:
    db = reopen()
    assert db.insert_multiple({"n": n, "tags": [n]} for n in range(1, 5)) == [1, 2, 3, 4]
    assert db.insert({"deep": {"c": [1, None, "ü"]}}) == 5
    assert db.update({"n": 10, "extra": None}, doc_ids=[1]) == [1]
    assert db.update(delete("tags"), Query().n == 2) == [2]
    assert db.upsert({"n": 30}, Query().n == 3) == [3]
    assert db.remove(doc_ids=[4]) == [4]
    db.table("other").insert({"a": 1})
    db.table("dropped").insert({"a": 1})
    db.drop_table("dropped")
    for _ in range(2):
        assert rows_of(db) == {
            1: {"n": 10, "tags": [1], "extra": None},
            2: {"n": 2},
            3: {"n": 30, "tags": [3]},
            5: {"deep": {"c": [1, None, "ü"]}},
        }
        assert db.tables() == {"_default", "other"}
        assert db.get(doc_id=2) == {"n": 2}
        db = reopen()
    db.truncate()
    assert rows_of(reopen()) == {}
    db = reopen()
    db.drop_tables()
    assert reopen().tables() == set()


@pytest.mark.parametrize(("before", "after"), [(1, True), (1, 1.0), (0, False), (True, 1), ([1], [True]), ({}, [])])
def test_values_that_are_equal_in_python_are_different_in_the_file(
    reopen: Callable[[], TinyDB], before: object, after: object
) -> None:
    db = reopen()
    db.insert({"a": before})
    db.update({"a": after})
    assert repr(rows_of(reopen())) == repr({1: {"a": after}})


def test_a_failed_update_and_a_changed_copy_leave_the_stored_documents_alone(reopen: Callable[[], TinyDB]) -> None:
    db = reopen()
    db.insert_multiple({"n": n, "tags": [n]} for n in range(3))
    before = rows_of(db)

    def fail_halfway(document: Any) -> None:
        document["tags"].append("changed")
        if document["n"] == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        db.update(fail_halfway)
    db.all()[0]["tags"].append("changed")
    assert rows_of(db) == before
    assert rows_of(reopen()) == before


def test_a_tinydb_write_is_one_transaction_of_the_documents_that_differ(folder: Folder) -> None:
    disk = FaultyDisk()
    db = TinyDB(folder.ledger, disk, storage=JournalStorage)
    db.insert_multiple({"n": n, "text": "x" * 30} for n in range(100))
    disk.calls.clear()
    before = storage_of(db).journal_bytes
    db.update({"seen": True}, doc_ids=[3, 4])
    assert disk.calls == ["write", "sync_data"]
    assert storage_of(db).journal_bytes - before < 200
    storage_of(db).abandon()


@pytest.mark.parametrize("write", [TinyDB.drop_tables, lambda db: db.truncate(), lambda db: db.insert({"n": 2})])
def test_a_tinydb_write_that_the_disk_refuses_changes_nothing(
    folder: Folder, write: Callable[[TinyDB], object]
) -> None:
    """Dropping tables once took effect in memory only, and left a gap in the journal: the next start failed."""
    disk = FaultyDisk()
    db = TinyDB(folder.ledger, disk, storage=JournalStorage)
    db.insert({"n": 1})
    disk.fault = failing(only="sync_data")
    with pytest.raises(LedgerError):
        write(db)
    disk.heal()
    assert rows_of(db) == {1: {"n": 1}}
    db.table("other").insert({"a": 1})
    storage_of(db).abandon()
    assert image_of(folder.open()) == {"_default": {"1": {"n": 1}}, "other": {"1": {"a": 1}}}


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", Path(), object()])
def test_tinydb_cannot_store_what_json_would_not_give_back(folder: Folder, value: object) -> None:
    with TinyDB(folder.ledger, QuickDisk(), storage=JournalStorage) as db:
        db.insert({"ok": 1})
        with pytest.raises((TypeError, ValueError)):
            db.insert({"bad": [value]})
        assert db.all() == [{"ok": 1}]


@pytest.mark.parametrize("name", ["checkpoint", "checksum"])
def test_the_file_s_own_table_names_are_taken(folder: Folder, name: str) -> None:
    with TinyDB(folder.ledger, QuickDisk(), storage=JournalStorage) as db, pytest.raises(ValueError, match="uses that"):
        db.table(name).insert({"a": 1})


# -- cut and flipped bytes ----------------------------------------------------------------------------------------


def test_a_journal_cut_at_any_byte_keeps_all_complete_lines_and_can_be_continued(folder: Folder) -> None:
    storage = folder.filled()
    used = storage.journal_bytes
    media = folder.media()
    content = media["ledger.json.journal"]
    ends = line_ends(content)
    for cut in [*range(used + 1), used + 1, used + 5000]:
        folder.put({**media, "ledger.json.journal": content[:cut]})
        if cut < ends[0] - 1:  # a header is written and synced aside
            with pytest.raises(LedgerError, match="missing or empty"):
                folder.open()
            continue
        storage = folder.open()
        whole = max(0, sum(end <= cut for end in ends) - 1)
        without_line_feed = cut + 1 in ends and cut + 1 != ends[0]
        assert storage.transaction == whole + without_line_feed, cut
        assert image_of(storage) == IMAGES[storage.transaction], cut
        folder.check_still_works()


@pytest.mark.parametrize("pattern", [0x01, 0x80, 0xFF, "to NUL", "to line feed"])
def test_a_flipped_byte_of_the_journal_is_always_noticed(folder: Folder, pattern: int | str) -> None:
    """Nothing acknowledged is lost or changed silently, not even in the last line, which might be torn."""
    targets = {"to NUL": 0, "to line feed": ord("\n")}
    storage = folder.filled()
    used = storage.journal_bytes
    media = folder.media()
    refused = 0
    for at in [*range(used + 1), used + 1, used + 700, len(media["ledger.json.journal"]) - 1]:
        content = bytearray(media["ledger.json.journal"])
        content[at] = content[at] ^ pattern if isinstance(pattern, int) else targets[pattern]
        if content == media["ledger.json.journal"]:
            continue
        folder.put({**media, "ledger.json.journal": bytes(content)})
        try:
            storage = folder.open()
        except LedgerError:
            refused += 1
            assert folder.journal.read_bytes() == content, "a rejected file is not changed"
            continue
        assert image_of(storage) == IMAGES[-1], at
        folder.check_still_works()
    assert refused >= used - line_ends(media["ledger.json.journal"])[-1] // 2


def test_a_flipped_or_missing_byte_of_the_checkpoint_is_always_noticed(folder: Folder) -> None:
    folder.filled().close()
    good = folder.ledger.read_bytes()
    for at in range(len(good)):
        for content in (
            good[:at],
            *(good[:at] + bytes((good[at] ^ pattern,)) + good[at + 1 :] for pattern in (0x01, 0x20, 0x80, 0xFF)),
        ):
            folder.put({"ledger.json": content})
            with pytest.raises(LedgerError, match=r"damaged|missing or empty"):
                folder.open()
            assert folder.ledger.read_bytes() == content


def test_a_line_whose_sectors_never_reached_the_medium_is_dropped(folder: Folder) -> None:
    """A power cut may leave the end of a long line on the medium, with its line feed, but not its middle."""
    storage = folder.filled()
    start = storage.journal_bytes
    storage.commit([Change("jobs", 6, {"text": "y" * 9000})])
    content = bytearray(folder.journal.read_bytes())
    content[4096:8192] = bytes(4096)
    folder.journal.write_bytes(content)
    assert image_of(folder.open()) == IMAGES[-1]
    assert folder.opened[0].journal_bytes == start
    folder.check_still_works()


def test_a_dropped_line_leaves_nothing_behind_the_next_one(folder: Folder) -> None:
    """The rest of a torn line ends in a line feed, and looks complete once the next line overwrites its start."""
    storage = folder.filled()
    start = storage.journal_bytes
    storage.commit([Change("jobs", 6, {"text": "y" * 3000})])
    content = bytearray(folder.journal.read_bytes())
    hole = start - start % 512 + 512
    content[hole : hole + 512] = bytes(512)
    folder.journal.write_bytes(content)
    storage = folder.open()
    assert image_of(storage) == IMAGES[-1]
    storage.commit([Change("jobs", 6, {"text": "z" * 1400})])
    assert image_of(folder.open())["jobs"]["6"] == {"text": "z" * 1400}


def test_one_lost_byte_is_damage_even_if_it_is_alone_in_its_sector(folder: Folder) -> None:
    storage = folder.filled()
    room = (511 - storage.journal_bytes) % 512 + 512
    storage.commit(
        [Change("jobs", 6, {"text": "y" * (room - len(journal._line([10, 0, [["jobs", 6, {"text": ""}]]])))})]
    )
    start = storage.journal_bytes
    assert start % 512 == 511
    storage.commit([Change("jobs", 7, {})])
    content = bytearray(folder.journal.read_bytes())
    content[start] = 0
    folder.journal.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged in line"):
        folder.open()


def test_a_lost_sector_before_another_line_is_damage(folder: Folder) -> None:
    storage = folder.filled()
    storage.commit([Change("jobs", 6, {"text": "y" * 9000})])
    storage.commit([Change("jobs", 7, {})])
    content = bytearray(folder.journal.read_bytes())
    content[4096:8192] = bytes(4096)
    folder.journal.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged in line"):
        folder.open()


# -- files that do not belong together ----------------------------------------------------------------------------


def test_a_newer_format_is_refused_with_what_to_do(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(journal, "FORMAT", 2)
        newer.setattr("cesar_mqtt.ledger.storage.FORMAT", 2)
        folder.filled().abandon()
    with pytest.raises(LedgerError, match=r"ledger\.json\.journal has format 2.*newer version"):
        folder.open()
    with monkeypatch.context() as newer:
        newer.setattr(journal, "FORMAT", 2)
        newer.setattr("cesar_mqtt.ledger.checkpoint.FORMAT", 2)
        folder.open().close()
    with pytest.raises(LedgerError, match=r"ledger\.json has format 2.*newer version"):
        folder.open()


def test_a_journal_whose_checkpoint_is_missing_or_older_is_refused(folder: Folder) -> None:
    storage = folder.filled(last=3)
    older = folder.ledger.read_bytes()
    storage.checkpoint()
    storage.commit(TRANSACTIONS[3])
    media = folder.media()
    for wrong in ({}, {"ledger.json": older}):
        folder.put({"ledger.json.journal": media["ledger.json.journal"], **wrong})
        with pytest.raises(LedgerError, match="missing or an older copy"):
            folder.open()
        assert folder.journal.read_bytes() == media["ledger.json.journal"]


def test_the_first_journal_alone_is_enough_to_open(folder: Folder) -> None:
    folder.filled()
    folder.ledger.unlink()
    assert image_of(folder.open()) == IMAGES[-1]
    assert folder.ledger.exists()
    folder.check_still_works()


@pytest.mark.parametrize("junk", [b"{}\n", b"hello", b"\0" * 5000 + b"x\n", b"00000000 \n"])
def test_a_file_that_is_no_journal_is_refused_or_empty(folder: Folder, junk: bytes) -> None:
    folder.open().close()
    folder.journal.write_bytes(junk)
    try:
        assert image_of(folder.open()) == {}
    except LedgerError:
        assert folder.journal.read_bytes() == junk


@pytest.mark.parametrize("line", [[1, 0, []], ["cesar_journal"], {"of": "another program"}])
def test_a_first_line_that_is_no_header_is_rejected(folder: Folder, line: object) -> None:
    folder.open().close()
    folder.journal.write_bytes(journal._line(line))
    with pytest.raises(LedgerError, match="no header in line 1"):
        folder.open()


@pytest.mark.parametrize("at", [1, 3, len(TRANSACTIONS) + 1])
def test_a_header_that_comes_again_is_damage(folder: Folder, at: int) -> None:
    folder.filled()
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    folder.journal.write_bytes(b"".join([*lines[:at], lines[0], *lines[at:]]))
    with pytest.raises(LedgerError):
        folder.open()


def test_a_missing_line_is_noticed(folder: Folder) -> None:
    folder.filled()
    lines = folder.journal.read_bytes().splitlines(keepends=True)
    folder.journal.write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(LedgerError, match="misses transaction 3 before line 4"):
        folder.open()


@pytest.mark.parametrize("upto", [2, len(TRANSACTIONS) - 1, len(TRANSACTIONS)])
def test_transactions_that_the_checkpoint_has_already_are_skipped(folder: Folder, upto: int) -> None:
    storage = folder.filled(last=upto)
    stale = folder.journal.read_bytes()
    storage.checkpoint()
    for changes in TRANSACTIONS[upto:]:
        storage.commit(changes)
    storage.checkpoint()
    folder.put({**folder.media(), "ledger.json.journal": stale})
    assert image_of(folder.open()) == IMAGES[-1]
    folder.check_still_works()


def test_temporary_files_of_a_crash_are_ignored(folder: Folder) -> None:
    storage = folder.filled()
    for name in ("ledger.json.tmp", "ledger.json.journal.tmp"):
        (folder.path / name).write_bytes(b"half a file" * 1000)
    assert image_of(folder.open()) == IMAGES[-1]
    folder.opened[0].checkpoint()
    folder.check_still_works()
    storage = folder.opened[0]
    storage.close()
    assert sorted(file.name for file in folder.path.iterdir()) == ["ledger.json", "ledger.reserve"]


# -- checkpoints beside commits -----------------------------------------------------------------------------------


def test_commits_between_the_snapshot_and_the_cut_are_kept(folder: Folder) -> None:
    storage = folder.filled(last=4)
    snapshot = storage.snapshot()
    storage.commit(TRANSACTIONS[4])
    storage.write_checkpoint(snapshot)
    with TinyDB(folder.ledger, access_mode="r") as stock:
        assert {str(row.doc_id): dict(row) for row in stock.table("jobs")} == IMAGES[4]["jobs"]
    storage.commit(TRANSACTIONS[5])
    storage.cut_journal(snapshot)
    for changes in TRANSACTIONS[6:]:
        storage.commit(changes)
    assert image_of(folder.open()) == IMAGES[-1]
    folder.check_still_works()


def test_a_commit_that_fails_during_a_checkpoint_does_not_lose_other_commits(folder: Folder) -> None:
    """The cut once dropped transactions acknowledged since the snapshot, if the journal's end had become unknown."""
    disk = FaultyDisk()
    storage = folder.filled(disk, last=4)
    snapshot = storage.snapshot()
    storage.write_checkpoint(snapshot)
    storage.commit(TRANSACTIONS[4])
    disk.fault = failing(times=2, skip=1)
    with pytest.raises(LedgerError):
        storage.commit([Change("jobs", 8, {"ghost": True})])
    disk.heal()
    storage.cut_journal(snapshot)
    assert image_of(folder.open()) == IMAGES[5]
    for changes in TRANSACTIONS[5:]:
        folder.opened[0].commit(changes)
    assert image_of(folder.open()) == IMAGES[-1]


def test_no_commit_is_written_to_a_journal_without_a_name(folder: Folder) -> None:
    """After the rename of the new journal the folder's sync failed; later commits went to the old, unlinked file."""
    disk = FaultyDisk()
    storage = folder.filled(disk, last=4)
    syncs = 3  # of the checkpoint, of its folder, of the new journal
    disk.fault = failing(skip=syncs, only="sync")
    with pytest.raises(OSError, match="Input/output"):
        storage.checkpoint()
    disk.calls.clear()
    storage.commit(TRANSACTIONS[4])
    assert "replace" in disk.calls, "the name is made durable before the next commit"
    assert image_of(folder.open()) == IMAGES[5]


def test_a_journal_that_does_not_read_back_is_replaced_by_a_checkpoint(folder: Folder) -> None:
    storage = folder.filled(last=4)
    snapshot = storage.snapshot()
    storage.commit(TRANSACTIONS[4])
    content = bytearray(folder.journal.read_bytes())
    content[storage.journal_bytes - 20] ^= 1
    folder.journal.write_bytes(content)
    with pytest.raises(OSError, match="read back"):
        storage.cut_journal(snapshot)
    storage.commit(TRANSACTIONS[5])
    assert image_of(folder.open()) == IMAGES[6]


def test_a_commit_does_not_wait_for_a_checkpoint_that_another_thread_writes(folder: Folder) -> None:
    """If it needs one itself, it fails; it must neither deadlock nor append to an unknown state."""
    disk = FaultyDisk()
    storage = folder.filled(disk, last=4)
    disk.fault = failing(times=3, skip=1)
    with pytest.raises(LedgerError):
        storage.commit([])
    disk.heal()

    class HeldElsewhere:
        def acquire(self, *, blocking: bool) -> bool:
            return blocking

    held, storage.checkpointing = storage.checkpointing, HeldElsewhere()  # type: ignore[assignment]
    with pytest.raises(LedgerError, match="being written"):
        storage.commit(TRANSACTIONS[4])
    storage.checkpointing = held
    storage.commit(TRANSACTIONS[4])
    assert image_of(folder.open()) == IMAGES[5]


# -- a process that dies ------------------------------------------------------------------------------------------

Step = Callable[[JournalStorage], object]

STEPS: tuple[Step, ...] = (
    lambda storage: storage.checkpoint(),
    lambda storage: storage.close(),
    lambda storage: storage.commit(TRANSACTIONS[-1]),
    lambda storage: storage.commit([Change("jobs", 5, {"last": 0.5}), Change("big", 1, {"text": "z" * 70_000})]),
)


@pytest.mark.parametrize("step", STEPS, ids=["checkpoint", "close", "commit", "commit that needs more room"])
def test_a_process_that_dies_at_any_call_loses_nothing(folder: Folder, step: Step) -> None:
    for calls in range(100):
        folder.put({})
        disk = FaultyDisk()
        storage = folder.filled(disk, last=len(TRANSACTIONS) - 1)
        disk.fault = killing(skip=calls)
        died = False
        try:
            step(storage)
        except Killed:
            died = True
        storage = folder.open()
        assert storage.transaction >= len(TRANSACTIONS) - 1
        assert image_of(storage).get("jobs") == IMAGES[storage.transaction].get("jobs"), calls
        folder.check_still_works()
        if not died:
            break
    assert not died
    assert calls >= 2


def test_a_process_that_dies_while_opening_changes_nothing(folder: Folder) -> None:
    storage = folder.filled(last=6)
    storage.checkpoint()
    for changes in TRANSACTIONS[6:]:
        storage.commit(changes)
    torn = folder.journal.read_bytes()[: storage.journal_bytes] + b"12345678 [10,"
    for media in (
        {},
        {**folder.media(), "ledger.json.journal": torn},
        {**folder.media(), "ledger.json.journal": torn[: storage.journal_bytes - 1]},
        {"ledger.json": folder.ledger.read_bytes() + checkpoint._COMPLETE},
    ):
        for calls in range(100):
            folder.put(media)
            disk = FaultyDisk(killing(skip=calls))
            try:
                storage = folder.open(disk)
                break
            except Killed:
                opened = folder.open()
                assert image_of(opened) == IMAGES[opened.transaction]
        disk.heal()
        assert storage.transaction == opened.transaction
        folder.check_still_works()


# -- a disk that fails --------------------------------------------------------------------------------------------


class Workload:
    """Commits and checkpoints on a disk that may fail, and what must be there afterwards."""

    def __init__(self, folder: Folder, disk: FaultyDisk) -> None:
        self.disk = disk
        self.folder = folder
        self.acknowledged: Image = {}
        self.possible: list[Image] = [{}]
        """What a crash may leave: the acknowledged changes, perhaps with one failed change after them."""
        self.failures = 0
        self.storage = folder.open(disk)

    def commit(self, number: int) -> None:
        changes = (
            Change("jobs", number, {"n": number, "text": "x" * (37 * number % 1400)}),
            Change("jobs", number // 2, {"half": number}, ("n",)),
            Change("counters", 1, {"total": number}),
        )
        after = apply(self.acknowledged, changes)
        self.possible.append(after)
        try:
            self.storage.commit(changes)
        except LedgerError:
            self.failures += 1
        else:
            self.acknowledged = after
            self.possible = [after]
        assert image_of(self.storage) == self.acknowledged

    def checkpoint(self) -> None:
        try:
            self.storage.checkpoint()
        except OSError:
            self.failures += 1
        assert image_of(self.storage) == self.acknowledged

    def run(self, *, first: int = 1, length: int = 9) -> None:
        for number in range(first, first + length):
            self.commit(number)
            if number % 3 == 2:
                self.checkpoint()

    def reopen(self) -> None:
        self.storage = self.folder.open(self.disk)
        assert image_of(self.storage) in self.possible
        self.acknowledged = image_of(self.storage)
        self.possible = [self.acknowledged]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("times", [1, 2, 3, 5, float("inf")])
def test_a_disk_that_fails_at_any_call_loses_nothing_acknowledged(folder: Folder, times: float, code: int) -> None:
    """`times` calls fail from the n-th on, for every n; a failed commit changes nothing, and later ones work."""
    failures = 0
    for skip in range(200):
        folder.put({})
        workload = Workload(folder, FaultyDisk())
        workload.disk.calls.clear()
        workload.disk.fault = failing(skip=skip, times=times, code=code)
        workload.run()
        calls = len(workload.disk.calls)
        workload.disk.heal()
        workload.commit(50)
        assert "50" in workload.acknowledged["jobs"], "it continues without help"
        workload.reopen()
        workload.run(first=60, length=3)
        workload.reopen()
        failures += workload.failures
        if calls <= skip:
            break
    assert calls <= skip, "the loop went through all calls"
    assert failures > skip // 2


@pytest.mark.parametrize("primitive", ["write", "sync", "sync_data", "truncate", "replace", "reserve", "remove"])
def test_a_disk_that_always_fails_at_one_kind_of_call_loses_nothing_acknowledged(
    folder: Folder, primitive: str
) -> None:
    for times in (1, 2, float("inf")):
        for skip in range(4):
            folder.put({})
            workload = Workload(folder, FaultyDisk())
            workload.disk.fault = failing(skip=skip, times=times, only=primitive)
            workload.run()
            workload.disk.heal()
            workload.commit(50)
            workload.reopen()
            assert "50" in workload.acknowledged["jobs"]


def test_a_disk_that_fails_at_random_loses_nothing_acknowledged(folder: Folder) -> None:
    for seed in range(60):
        chance = random.Random(seed)  # noqa: S311
        folder.put({})
        workload = Workload(folder, FaultyDisk(short=chance.choice((None, 1, 7, 300))))

        def fault(_primitive: str, chance: random.Random = chance) -> None:
            if chance.random() < 0.15:
                raise OSError(errno.EIO, "bad luck")

        for first in (1, 20, 40):
            workload.disk.fault = fault
            workload.run(first=first)
            workload.disk.heal()
            workload.reopen()


def test_short_writes_are_continued(folder: Folder) -> None:
    assert image_of(folder.filled(FaultyDisk(short=3))) == IMAGES[-1]
    folder.opened[0].checkpoint()
    assert image_of(folder.open()) == IMAGES[-1]


def test_a_failed_change_that_could_not_be_undone_is_gone_after_the_next_commit(folder: Folder) -> None:
    disk = FaultyDisk()
    storage = folder.filled(disk, last=4)
    disk.fault = failing(times=3, skip=1)  # the line is written; its sync, the truncate and its sync fail
    with pytest.raises(LedgerError):
        storage.commit([Change("jobs", 8, {"ghost": True})])
    ghost = folder.media()
    disk.heal()
    storage.commit(TRANSACTIONS[4])
    assert image_of(folder.open()) == IMAGES[5]
    folder.put(ghost)  # a crash right then leaves it there, as the docstring of `commit` says
    assert image_of(folder.open()) == apply(IMAGES[4], (Change("jobs", 8, {"ghost": True}),))
    folder.check_still_works()


def test_a_line_is_written_if_the_disk_has_room_for_it_alone(folder: Folder) -> None:
    disk = FaultyDisk()
    storage = folder.open(disk)
    disk.fault = failing(times=float("inf"), only="reserve", code=errno.ENOSPC)
    for changes in TRANSACTIONS:
        storage.commit(changes)
    assert image_of(folder.open()) == IMAGES[-1]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_nothing_behind(folder: Folder) -> None:
    disk = FaultyDisk()
    storage = folder.filled(disk)
    for skip in range(100):
        disk.fault = failing(skip=skip, only="write", code=errno.ENOSPC)
        try:
            storage.checkpoint()
            break
        except OSError:
            assert not list(folder.path.glob("*.tmp"))
    assert 2 < skip < 99
    disk.heal()
    storage.commit([])
    assert image_of(folder.open()) == IMAGES[-1]


def test_an_interrupted_commit_is_removed_before_the_next_one(folder: Folder) -> None:
    """A KeyboardInterrupt in the middle of a write must not leave half a line in front of the next one."""
    disk = FaultyDisk()
    storage = folder.filled(disk, last=4)
    disk.fault = killing(skip=0)
    with pytest.raises(Killed):
        storage.commit([Change("jobs", 8, {"ghost": True})])
    disk.heal()
    storage.commit(TRANSACTIONS[4])
    assert image_of(folder.open()) == IMAGES[5]


def test_a_folder_that_cannot_be_read_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"file/ledger\.json cannot be opened: Not a directory"):
        JournalStorage(tmp_path / "file" / "ledger.json")


# -- power cuts --------------------------------------------------------------------------------------------------


class Moments:
    """What the medium may hold at every moment, and which tables are right then."""

    def __init__(self, disk: PoweredDisk, folder: Path) -> None:
        self.disk = disk
        self.possible: list[Image] = [{}]
        self._moments: list[tuple[list[Image], dict[str, bytes]]] = []
        self._after = Folder(folder)
        folder.mkdir(exist_ok=True)
        disk.on_step = self._remember

    def _remember(self) -> None:
        self._moments.append((self.possible, self.disk.media()))

    def check(self) -> int:
        """Open what a power cut at each moment leaves; return how many moments there were."""
        self.disk.on_step = lambda: None
        for possible, media in self._moments:
            self._after.put(media)
            assert image_of(self._after.open()) in possible
            self._after.check_still_works()
        self._after.opened[0].abandon()
        return len(self._moments)


@needs_proc
@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_at_any_moment_loses_nothing_acknowledged(folder: Folder, tmp_path: Path, seed: int) -> None:
    """Unsynced sectors and names are there or not; syncs fail and processes die in between."""
    disk = PoweredDisk(seed)
    moments = Moments(disk, tmp_path / "after")
    workload = Workload(folder, disk)
    moments.possible = workload.possible
    chance = disk.random
    for number in range(1, 40):
        workload.possible = moments.possible = list(moments.possible)
        if chance.random() < 0.2:
            disk.fault = failing(skip=chance.randint(0, 5), times=chance.randint(1, 4))
        workload.commit(number)
        moments.possible = workload.possible
        if chance.random() < 0.15:
            workload.checkpoint()
        disk.heal()
        if chance.random() < 0.1:
            workload.reopen()
            moments.possible = workload.possible
    assert moments.check() > 140


@needs_proc
def test_a_line_found_at_opening_survives_a_power_cut(folder: Folder, tmp_path: Path) -> None:
    """A process wrote a line, could neither sync nor undo it, and died; the next process finds it and acts on it.

    The line may be there only because the kernel remembers it, and the next sync would succeed and do nothing.
    """
    for seed in range(40):
        folder.put({})
        disk = PoweredDisk(seed)
        storage = folder.filled(disk, last=4)
        disk.fault = failing(times=2, skip=1)
        with pytest.raises(LedgerError):
            storage.commit(TRANSACTIONS[4])
        disk.heal()
        storage = folder.open(disk)
        moments = Moments(disk, tmp_path / "after")
        moments.possible = [image_of(storage)]
        assert storage.transaction == 5
        disk.on_step()
        moments.possible = [IMAGES[5], IMAGES[6]]
        storage.commit(TRANSACTIONS[5])
        moments.possible = [IMAGES[6]]
        disk.on_step()
        moments.check()


@needs_proc
@pytest.mark.parametrize("renames", [1, 2])
def test_file_names_found_at_opening_survive_a_power_cut(folder: Folder, tmp_path: Path, renames: int) -> None:
    """A checkpoint failed between one of its renames and the sync of their folder, and the process died."""
    for seed in range(20):
        folder.put({})
        disk = PoweredDisk(seed)
        storage = folder.filled(disk, last=4)
        disk.fault = failing(skip=2 * renames - 1, only="sync")
        with pytest.raises(OSError, match="Input/output"):
            storage.checkpoint()
        disk.heal()
        storage = folder.open(disk)
        moments = Moments(disk, tmp_path / "after")
        moments.possible = [IMAGES[4], IMAGES[5]]
        storage.commit(TRANSACTIONS[4])
        moments.possible = [IMAGES[5]]
        disk.on_step()
        moments.check()


@needs_proc
def test_a_failed_line_is_never_mixed_with_the_next_one(folder: Folder, tmp_path: Path) -> None:
    """It was on the medium and was undone; a power cut during the next line mixed the sectors of both."""
    for seed in range(40):
        folder.put({})
        disk = PoweredDisk(seed)
        storage = folder.filled(disk, last=4)
        disk.fault = failing(only="sync_data")
        with pytest.raises(LedgerError):
            storage.commit([Change("jobs", 8, {"text": "ghost" * 500})])
        disk.heal()
        moments = Moments(disk, tmp_path / "after")
        after = apply(IMAGES[4], (Change("jobs", 9, {"text": "real" * 600}),))
        moments.possible = [IMAGES[4], after]
        storage.commit([Change("jobs", 9, {"text": "real" * 600})])
        moments.check()


@pytest.mark.parametrize("names", [("ledger.json",), ("ledger.json.journal",), ("ledger.json", "ledger.json.journal")])
@pytest.mark.parametrize("how", ["removed", "moved away", "replaced"])
def test_files_that_lose_their_names_while_they_are_open_are_written_again(
    names: tuple[str, ...], how: str, tmp_path: Path
) -> None:
    """What was committed afterwards was only in files without a name: the next start did not know it."""
    path = tmp_path / "ledger.json"
    storage = JournalStorage(path, QuickDisk())
    for changes in TRANSACTIONS[:4]:
        storage.commit(changes)
    for name in names:
        if how == "removed":
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).rename(tmp_path / f"{name}.old")
        if how == "replaced" and name != "ledger.json":  # another checkpoint would be overwritten by the next one
            (tmp_path / name).write_bytes((tmp_path / f"{name}.old").read_bytes())
    storage.commit(TRANSACTIONS[4])
    storage.abandon()
    storage = JournalStorage(path, QuickDisk())
    assert storage.read() == images_after_each()[5]
    storage.abandon()


def test_without_its_folder_the_ledger_takes_no_transaction(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    storage = JournalStorage(folder / "ledger.json", QuickDisk())
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="No such file or directory"):
        storage.commit(TRANSACTIONS[0])
    (tmp_path / "elsewhere").rename(folder)
    storage.commit(TRANSACTIONS[0])
    storage.abandon()
    storage = JournalStorage(folder / "ledger.json", QuickDisk())
    assert storage.read() == images_after_each()[1]
    storage.abandon()
