"""One suite of TinyDB's public methods for stock TinyDB and for ours; what differs on purpose stands at the end."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tinydb import Query, TinyDB, where
from tinydb.operations import add, delete, increment
from tinydb.operations import set as set_field
from tinydb.table import Document

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.ledger.storage import JournalStorage
from cesar_mqtt.ledger.tables import JournalDB
from tests.unit.ledger.faults import FaultyDisk, QuickDisk, failing

Rows = dict[int, dict[str, Any]]


class Database:
    """A database that can be closed and opened again, cleanly or (ours) as after a crash."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path = path
        self._kind = kind
        self.db = self._open()

    def _open(self) -> TinyDB:
        if self._kind == "stock":
            return TinyDB(self._path)
        return JournalDB(self._path, QuickDisk(), storage=JournalStorage)

    def reopen(self) -> TinyDB:
        if isinstance(self.db, JournalDB) and self._kind == "crash":
            self.db.journal.abandon()
        else:
            self.db.close()
        self.db = self._open()
        return self.db

    def rows(self, table: str = "_default") -> Rows:
        """The rows as they are, which are those after opening it again."""
        rows = rows_of(self.db, table)
        assert rows_of(self.reopen(), table) == rows
        return rows


def rows_of(db: TinyDB, table: str) -> Rows:
    return {row.doc_id: dict(row) for row in db.table(table)}


@pytest.fixture(params=["stock", "clean stop", "crash"])
def database(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Database]:
    made = Database(tmp_path / "db.json", request.param)
    yield made
    made.db.close()


# -- insert -------------------------------------------------------------------------------------------------------


def test_inserted_documents_get_ids_in_order_and_are_there_after_reopening(database: Database) -> None:
    assert database.db.insert({"a": 1}) == 1
    assert database.db.insert_multiple([{"a": 2}, {"b": {"c": [1, None, "ü"]}}]) == [2, 3]
    assert database.rows() == {1: {"a": 1}, 2: {"a": 2}, 3: {"b": {"c": [1, None, "ü"]}}}
    assert database.db.insert({}) == 4
    assert len(database.db) == 4
    assert database.rows()[4] == {}


def test_a_document_with_an_id_keeps_it_and_a_taken_id_is_refused(database: Database) -> None:
    table = database.db.table("t")
    assert table.insert(Document({"a": 1}, doc_id=7)) == 7
    assert table.insert({"a": 2}) == 8
    for insert in (
        lambda: table.insert(Document({"a": 3}, doc_id=7)),
        lambda: table.insert_multiple([{"a": 4}, Document({"a": 3}, doc_id=8)]),
    ):
        with pytest.raises(ValueError, match="already exists"):
            insert()
    assert database.rows("t") == {7: {"a": 1}, 8: {"a": 2}}


def test_what_is_no_mapping_is_refused_and_nothing_of_the_batch_stays(database: Database) -> None:
    with pytest.raises(ValueError, match="Mapping"):
        database.db.insert_multiple([{"a": 1}, 5])
    with pytest.raises(ValueError, match="Mapping"):
        database.db.insert([1])
    assert database.rows() == {}


def test_an_iterator_that_fails_in_the_middle_inserts_nothing(database: Database) -> None:
    def documents() -> Iterator[Mapping[str, Any]]:
        yield {"a": 1}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        database.db.insert_multiple(documents())
    assert database.rows() == {}


def test_a_document_is_stored_as_json_says_it(database: Database) -> None:
    database.db.insert({"tuple": (1, (2,)), 3: "key", "float": 1.0, "true": True})
    assert repr(list(database.db)) == repr([{"tuple": [1, [2]], "3": "key", "float": 1.0, "true": True}])


def test_changing_what_was_inserted_changes_nothing_stored(database: Database) -> None:
    document = {"tags": ["a"]}
    database.db.insert(document)
    document["tags"].append("b")
    assert database.rows() == {1: {"tags": ["a"]}}


def test_changing_what_was_read_changes_nothing_stored(database: Database) -> None:
    database.db.insert({"deep": {"tags": ["a"]}})
    for read in (
        lambda: database.db.get(doc_id=1),
        lambda: database.db.get(where("deep").exists()),
        lambda: database.db.get(doc_ids=[1])[0],
        lambda: database.db.all()[0],
        lambda: database.db.search(where("deep").tags.any(["a"]))[0],
        lambda: next(iter(database.db)),
    ):
        read()["deep"]["tags"].append("b")
        assert rows_of(database.db, "_default") == {1: {"deep": {"tags": ["a"]}}}
    assert database.rows() == {1: {"deep": {"tags": ["a"]}}}


# -- update -------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(database: Database) -> Database:
    database.db.insert_multiple({"n": n, "odd": bool(n % 2), "tags": [n]} for n in range(1, 6))
    return database


def test_update_with_fields(filled: Database) -> None:
    assert filled.db.update({"seen": True}) == [1, 2, 3, 4, 5]
    assert filled.db.update({"n": 10, "extra": None}, where("odd") == True) == [1, 3, 5]  # noqa: E712
    assert filled.db.update({"n": 20}, doc_ids=[5, 99, 2]) == [5, 2]
    assert {row["n"] for row in filled.rows().values()} == {10, 20, 4}
    assert filled.rows()[3] == {"n": 10, "odd": True, "tags": [3], "seen": True, "extra": None}


def test_update_with_a_callable_that_sets_deletes_and_changes_in_place(filled: Database) -> None:
    def change(document: Any) -> None:
        document["tags"].append("more")
        del document["odd"]

    assert filled.db.update(change, doc_ids=[2]) == [2]
    assert filled.db.update(delete("tags"), Query().n == 3) == [3]
    assert filled.db.update(increment("n"), doc_ids=[4]) == [4]
    assert filled.db.update(add("n", 2), doc_ids=[5]) == [5]
    assert filled.db.update(set_field("odd", "no"), doc_ids=[5]) == [5]
    assert filled.rows() == {
        1: {"n": 1, "odd": True, "tags": [1]},
        2: {"n": 2, "tags": [2, "more"]},
        3: {"n": 3, "odd": True},
        4: {"n": 5, "odd": False, "tags": [4]},
        5: {"n": 7, "odd": "no", "tags": [5]},
    }


@pytest.mark.parametrize(("before", "after"), [(1, True), (1, 1.0), (0, False), (True, 1), ([1], [True]), ({}, [])])
def test_update_tells_values_apart_that_python_calls_equal(database: Database, before: Any, after: Any) -> None:
    database.db.insert({"a": before})
    database.db.update({"a": after})
    assert repr(database.rows()) == repr({1: {"a": after}})


def test_an_update_that_fails_in_the_middle_changes_nothing(filled: Database) -> None:
    before = filled.rows()

    def change(document: Any) -> None:
        document["n"] = "changed"
        document["tags"].append("changed")
        if document["odd"] is False:
            raise RuntimeError("no")

    updates: list[Callable[[], object]] = [
        lambda: filled.db.update(change),
        lambda: filled.db.update(change, where("n") <= 2),
        lambda: filled.db.update(change, doc_ids=[1, 2]),
        lambda: filled.db.update_multiple([(change, where("n") == 1), (change, where("n") == 2)]),
        lambda: filled.db.update({"n": {1, 2}}),
        lambda: filled.db.insert({"n": object()}),
    ]
    for update in updates:
        with pytest.raises((RuntimeError, TypeError)):
            update()
        assert rows_of(filled.db, "_default") == before
    assert filled.rows() == before


def test_update_multiple(filled: Database) -> None:
    updated = filled.db.update_multiple([({"n": 0}, where("n") == 2), (delete("odd"), where("n") == 3)])
    assert updated == [2, 3]
    assert filled.rows()[2]["n"] == 0
    assert "odd" not in filled.rows()[3]


def test_upsert_updates_what_matches_and_else_inserts(filled: Database) -> None:
    assert filled.db.upsert({"n": 2, "new": 1}, where("n") == 2) == [2]
    assert filled.db.upsert({"n": 9}, where("n") == 9) == [6]
    assert filled.db.upsert(Document({"n": 30}, doc_id=3)) == [3]
    assert filled.db.upsert(Document({"n": 40}, doc_id=40)) == [40]
    rows = filled.rows()
    assert rows[2] == {"n": 2, "new": 1, "odd": False, "tags": [2]}
    assert (rows[6], rows[3]["n"], rows[40]) == ({"n": 9}, 30, {"n": 40})


# -- remove -------------------------------------------------------------------------------------------------------


def test_remove_by_condition_and_by_id(filled: Database) -> None:
    assert filled.db.remove(where("odd") == True) == [1, 3, 5]  # noqa: E712
    assert filled.db.remove(doc_ids=[2, 99]) == [2]
    assert filled.rows() == {4: {"n": 4, "odd": False, "tags": [4]}}
    with pytest.raises(KeyError):
        filled.db.remove(doc_ids=[4, 4])
    assert list(filled.rows()) == [4]


def test_truncate_empties_a_table_and_starts_its_ids_anew(filled: Database) -> None:
    filled.db.table("other").insert({"a": 1})
    filled.db.truncate()
    assert filled.rows() == {}
    assert filled.db.insert({"a": 1}) == 1
    assert filled.rows("other") == {1: {"a": 1}}


@pytest.mark.timeout(20)
def test_a_large_table_is_truncated_in_no_time(database: Database) -> None:
    """Python's own way to empty a mutable mapping looks for the first entry anew for each: hours for a large table."""
    database.db.insert_multiple({"n": n} for n in range(30_000))
    database.db.truncate()
    assert database.rows() == {}


def test_dropped_tables_are_gone_after_reopening(filled: Database) -> None:
    filled.db.table("other").insert({"a": 1})
    filled.db.drop_table("other")
    filled.db.drop_table("never there")
    assert filled.db.tables() == {"_default"}
    assert filled.reopen().tables() == {"_default"}
    assert filled.db.table("other").insert({"a": 2}) == 1
    filled.db.drop_tables()
    assert filled.db.tables() == set()
    assert filled.reopen().tables() == set()
    filled.db.insert({"a": 3})
    assert filled.rows() == {1: {"a": 3}}


# -- search -------------------------------------------------------------------------------------------------------


def test_search_get_count_and_contains(filled: Database) -> None:
    assert [row.doc_id for row in filled.db.search(where("n") > 3)] == [4, 5]
    assert filled.db.get(where("n") == 2).doc_id == 2
    assert filled.db.get(doc_id=3)["n"] == 3
    assert filled.db.get(doc_id=9) is None
    assert [row.doc_id for row in filled.db.get(doc_ids=[5, 1, 9])] == [1, 5]
    assert filled.db.count(where("odd") == True) == 3  # noqa: E712
    assert filled.db.contains(doc_id=5)
    assert not filled.db.contains(where("n") == 6)
    assert [row["n"] for row in filled.db] == [1, 2, 3, 4, 5]


WRITES: list[Callable[[TinyDB], object]] = [
    lambda db: db.insert({"n": 5}),
    lambda db: db.insert_multiple([{"n": 5}]),
    lambda db: db.update({"n": 5}, doc_ids=[1]),
    lambda db: db.update_multiple([({"n": 5}, where("n") == 1)]),
    lambda db: db.upsert({"n": 5}, where("n") == 6),
    lambda db: db.remove(doc_ids=[5]),
    lambda db: db.truncate(),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_search_sees_what_was_written_after_the_last_one(filled: Database, write: Callable[[TinyDB], object]) -> None:
    assert len(filled.db.search(where("n") == 5)) == 1
    write(filled.db)
    found = [row.doc_id for row in filled.db.search(where("n") == 5)]
    assert found == [number for number, row in rows_of(filled.db, "_default").items() if row["n"] == 5]
    assert len(found) != 1 or 5 not in found


def test_tables_are_apart_from_each_other(database: Database) -> None:
    database.db.table("a").insert({"in": "a"})
    database.db.table("b").insert_multiple([{"in": "b"}, {"in": "b"}])
    assert database.db.tables() == {"a", "b"}
    assert database.rows("a") == {1: {"in": "a"}}
    assert database.rows("b") == {1: {"in": "b"}, 2: {"in": "b"}}
    assert database.db.table("c").all() == []


# -- ours alone ---------------------------------------------------------------------------------------------------


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def ours(tmp_path: Path, disk: FaultyDisk) -> Iterator[JournalDB]:
    db = JournalDB(tmp_path / "db.json", disk, storage=JournalStorage)
    yield db
    db.journal.abandon()


@pytest.mark.parametrize("write", [*WRITES, lambda db: db.drop_tables(), lambda db: db.drop_table("_default")])
def test_a_write_that_the_disk_refuses_changes_nothing(
    ours: JournalDB, disk: FaultyDisk, tmp_path: Path, write: Callable[[TinyDB], object]
) -> None:
    """Dropping tables once took effect in memory only, and left a gap in the journal that no start got over."""
    ours.insert_multiple({"n": n} for n in range(1, 6))
    before = rows_of(ours, "_default")
    disk.fault = failing(only="sync_data")
    with pytest.raises(LedgerError):
        write(ours)
    disk.heal()
    assert ours.tables() == {"_default"}
    assert rows_of(ours, "_default") == before
    ours.table("other").insert({"a": 1})
    ours.journal.abandon()
    again = JournalDB(tmp_path / "db.json", QuickDisk(), storage=JournalStorage)
    assert rows_of(again, "_default") == before
    assert rows_of(again, "other") == {1: {"a": 1}}
    again.close()


def test_each_write_is_one_transaction_of_what_it_changed(ours: JournalDB, disk: FaultyDisk) -> None:
    ours.insert_multiple({"n": n, "text": "x" * 1000} for n in range(100))
    disk.calls.clear()
    before = ours.journal.journal_bytes
    ours.update({"seen": True}, doc_ids=[3, 4])
    assert disk.calls == ["write", "sync_data"]
    assert ours.journal.journal_bytes - before < 120


@pytest.mark.parametrize("name", ["checkpoint", "checksum"])
def test_the_names_of_the_file_s_own_tables_are_taken(ours: JournalDB, name: str) -> None:
    with pytest.raises(ValueError, match="uses that name itself"):
        ours.table(name)


def test_a_number_that_is_no_json_is_refused(ours: JournalDB) -> None:
    with pytest.raises(ValueError, match="JSON"):
        ours.insert({"n": float("nan")})
    assert ours.all() == []


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", Path(), object()])
def test_what_would_not_come_back_as_it_was_is_refused(tmp_path: Path, value: object) -> None:
    with JournalDB(tmp_path / "db.json", storage=JournalStorage) as db:
        db.table("jobs").insert({"ok": 1})
        with pytest.raises((TypeError, ValueError)):
            db.table("jobs").insert({"bad": [value]})
        assert db.table("jobs").all() == [{"ok": 1}]
