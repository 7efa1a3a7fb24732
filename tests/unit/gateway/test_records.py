"""What the inbox and the other front doors remember."""

from dataclasses import replace
from pathlib import Path

import pytest

from cesar_mqtt.errors import LedgerError, LedgerInUseError
from cesar_mqtt.gateway.records import InboxRecords, Record, RecordState
from cesar_mqtt.gateway.status_records import StatusRecords

RECORD = Record("a-1", "/in/a.wav", "a.wav", "/in/a.wav", 10, 20, 30, "digest")


def test_records_survive_and_the_one_that_was_put_last_comes_last(tmp_path: Path) -> None:
    records = InboxRecords(tmp_path / "data")
    other = replace(RECORD, job_id="b-1", path="/in/b.wav")
    done = replace(RECORD, state=RecordState.DONE, results=("/in/a.txt",))
    for record in (RECORD, other, done):
        records.put(record)
    records.close()
    records.close()

    again = InboxRecords(tmp_path / "data")
    assert list(again) == [other, done]
    with pytest.raises(LedgerInUseError):
        InboxRecords(tmp_path / "data")
    again.close()


def test_records_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "inbox.sqlite").write_bytes(b"something else, and long enough" * 100)
    with pytest.raises(LedgerError, match=r"inbox\.sqlite cannot be used: .* Check the data directory"):
        InboxRecords(tmp_path)


def test_the_beginning_is_kept_and_a_status_is_known_by_its_version(tmp_path: Path) -> None:
    first = StatusRecords(tmp_path / "x.sqlite", now="2026-01-01T00:00:00.000Z")
    first.put("a", "1", "note")
    first.put("a", "2")
    first.put("b", "1")
    first.remove("b")
    first.close()
    second = StatusRecords(tmp_path / "x.sqlite", now="2027-01-01T00:00:00.000Z")
    assert second.since == "2026-01-01T00:00:00.000Z"
    assert (second.get("a"), second.get("b")) == (("2", ""), None)
    second.close()
