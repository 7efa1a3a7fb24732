import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tinydb import TinyDB
from tinydb.operations import delete

from cesar_mqtt.cli import ledger as ledgercommands
from cesar_mqtt.errors import ErrorCode, ExitCode, LedgerError, LedgerInUseError
from cesar_mqtt.jobs import DeletedJob, JobState, NewJob
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger.index import window_id
from cesar_mqtt.ledger.journal import _line
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.repair import examine
from cesar_mqtt.transcript import Window
from tests import factories
from tests.conftest import PATIENCE_S

RESULT = factories.result("spoken")


def new_job(job_id: str) -> NewJob:
    return factories.new_job(job_id, metadata={"n": [1, "é\n"]})


def kill(ledger: Ledger) -> None:
    ledger._storage.abandon()
    ledger._file_lock.release()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger left by a crash: a, b, c in the checkpoint, d and e in the journal; a done, b failed, c running."""
    path = tmp_path / "ledger.json"
    with Ledger(path) as ledger:
        ledger.append([new_job("a"), new_job("b"), new_job("c")])
        first = ledger.claim()
        assert first is not None
        ledger.complete(first.seq, RESULT)
    ledger = Ledger(path)
    ledger.append([new_job("d")])
    second = ledger.claim()
    assert second is not None
    ledger.fail(second.seq, ErrorCode.AUDIO_EMPTY, "It is empty.")
    ledger.append([new_job("e")])
    ledger.claim()
    kill(ledger)
    return path


ALL = {"a": "completed", "b": "error", "c": "processing", "d": "queued", "e": "queued"}


def states(path: Path) -> dict[str, str]:
    return {row["job_id"]: row["state"] for row in examine(path).jobs.values()}


def journal(path: Path) -> Path:
    return path.with_name("ledger.json.journal")


def damage(file: Path, text: bytes) -> None:
    """Change one byte of the first line that holds `text`."""
    raw = bytearray(file.read_bytes())
    raw[raw.index(text)] ^= 0x01
    file.write_bytes(raw)


def test_an_undamaged_ledger_is_reported_and_not_changed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes(), journal(path).read_bytes()
    assert ledgercommands.check(path) is ExitCode.OK
    assert ledgercommands.repair(path, yes=True) is ExitCode.OK
    assert (path.read_bytes(), journal(path).read_bytes()) == before
    output = capsys.readouterr().out
    assert "5 jobs (1 completed, 1 error, 1 processing, 2 queued)" in output
    assert "Nothing to repair." in output
    assert states(path) == ALL


def test_a_torn_last_line_is_a_note_and_no_damage(path: Path) -> None:
    raw = journal(path).read_bytes().rstrip(b"\0")
    journal(path).write_bytes(raw[:-5])
    found = examine(path)
    assert not found.damaged
    assert found.notes
    assert {row["job_id"]: row["state"] for row in found.jobs.values()} == {**ALL, "c": "queued"}


def repeat(number: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [*lines[: number + 1], *lines[number:]]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (None, "abc"),
        (lambda _: [], "abc"),
        (lambda lines: lines[1:], "abcde"),
        (lambda lines: [lines[0][:20]], "abc"),
        (lambda lines: [_line(["cesar_journal"]), *lines[1:]], "abcde"),
        (lambda lines: [_line({"of": "another program"}), *lines[1:]], "abcde"),
        (lambda lines: [*lines, _line(["x"])], "abcde"),
        (repeat(0), "abcde"),
        (repeat(1), "abcde"),
        (lambda lines: [*lines, lines[0]], "abcde"),
        (lambda lines: [*lines, lines[1]], "abcde"),
        (lambda lines: [lines[0], *lines[2:]], "abce"),
    ],
    ids=[
        "no journal",
        "empty",
        "no header",
        "torn",
        "a list first",
        "a foreign header",
        "a list last",
        "two headers",
        "a line twice",
        "header last",
        "old line last",
        "no line",
    ],
)
def test_start_check_and_repair_agree_on_what_is_damaged(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[bytes]], list[bytes]] | None,
    kept: str,
) -> None:
    """The start lost jobs without a word, or refused what `check` called whole and `repair` did not change."""
    file = journal(path)
    if change is None:
        file.unlink()
    else:
        file.write_bytes(b"".join(change(file.read_bytes().rstrip(b"\0").splitlines(keepends=True))))
    with pytest.raises(LedgerError, match="cesar-mqtt ledger repair"):
        Ledger(path)
    assert ledgercommands.check(path) == 74
    told = capsys.readouterr().out
    assert ("lost: " in told) is (kept != "abcde")
    assert ledgercommands.repair(path, yes=True) == 0
    assert set(states(path)) == set(kept)
    assert ledgercommands.check(path) == 0


def test_a_ledger_that_was_closed_in_order_needs_no_journal_and_one_that_is_open_does(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    for _ in range(2):
        Ledger(path).close()
        assert not journal(path).exists()
        assert json.loads(path.read_text())["checkpoint"], "stock TinyDB reads it"
    kill(Ledger(path))
    journal(path).unlink()
    with pytest.raises(LedgerError, match="missing or empty"):
        Ledger(path)
    assert not journal(path).exists(), "nothing was changed"


def test_a_checkpoint_of_version_1_needs_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    with Ledger(path) as ledger:
        ledger.append([new_job("a")])
    raw = path.read_bytes()
    old = raw[: raw.rfind(checkpoint._CHECKSUM)].replace(b',"journal":true', b"")
    path.write_bytes(old + checkpoint._checksum(zlib.crc32(old)))
    assert states(path) == {"a": "queued"}


def test_the_jobs_in_a_damaged_line_are_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(journal(path), b'"fingerprint":"d"')
    ledgercommands.check(path)
    assert "(jobs named in it: " in capsys.readouterr().out


def test_a_damaged_journal_line_loses_only_its_own_changes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(journal(path), b'"It is empty."')
    with pytest.raises(LedgerError, match="ledger repair"):
        Ledger(path)
    assert ledgercommands.check(path) is ExitCode.LEDGER_FAILED
    assert "is damaged" in capsys.readouterr().out

    assert ledgercommands.repair(path, yes=True) is ExitCode.OK

    with Ledger(path) as ledger:
        after = {name: job.state for name in ALL if (job := ledger.get(name)) is not None}
        assert after == {**ALL, "b": JobState.QUEUED, "c": JobState.QUEUED}, "b and c were running"
        assert {job.job_id for _, job in ledger.unpublished(100)} == set(ALL), "every status is published again"
        ledger.append([new_job("f")])
        appended = ledger.get("f")
        assert appended is not None
        assert appended.seq == 6


def test_a_job_whose_first_line_is_lost_is_named_and_dropped(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(journal(path), b'"job_id":"d"')
    assert ledgercommands.repair(path, yes=True) is ExitCode.OK
    output = capsys.readouterr().out
    assert "Line 2 of ledger.json.journal is damaged" in output
    with Ledger(path) as ledger:
        assert ledger.get("d") is None
        assert ledger.get("e") is not None


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A ledger left by a crash that has something in every table.

    The checkpoint has the windows of job 1 (completed) and two of job 2 (processing), deleted job 3 with results, and a
    pause. In the journal, a line each: a new job 4 with the id of job 3, and the third window of job 2.
    """
    path = tmp_path / "ledger.json"
    with Ledger(path) as ledger:
        ledger.append([replace(new_job(name), formats=("srt",)) for name in "abc"])
        first, second = ledger.claim(), ledger.claim()
        assert first is not None
        assert second is not None
        ledger.complete(first.seq, replace(RESULT, windows=(window(0), window(1))))
        ledger.add_window(second.seq, window(0))
        ledger.add_window(second.seq, window(1))
        ledger.delete("c")
        ledger.pause(on=True)
        ledger._storage.checkpoint()
        ledger.append([new_job("c")])
        ledger.add_window(second.seq, window(2))
        kill(ledger)
    return path


def window(number: int) -> Window:
    return factories.window(
        number, factories.segment(number, "part", start_s=0.0, end_s=1.0), text=f" part-{number}", until_s=number + 1.0
    )


def windows(ledger: Ledger) -> list[int]:
    return [len(ledger.windows(seq)) for seq in range(1, 9)]


def test_windows_tombstones_and_a_pause_are_neither_damage_nor_jobs(
    rich: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ledgercommands.check(rich) is ExitCode.OK
    assert "3 jobs (1 completed, 1 processing, 1 queued), 10 transactions" in capsys.readouterr().out
    assert ledgercommands.export(rich) is ExitCode.OK
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["seq"], row["job_id"]) for row in rows] == [(1, "a"), (2, "b"), (4, "c")]
    assert ledgercommands.compact(rich) is ExitCode.OK
    with Ledger(rich) as ledger:
        assert windows(ledger)[:3] == [2, 3, 0]
        assert ledger.totals().paused
        assert ledger.pending_clears(9) == [DeletedJob(3, "c", ("srt",), owns_status=False, request_key="c c")]


def test_windows_after_a_lost_one_are_transcribed_again(rich: Path) -> None:
    damage(rich, f'"{window_id(2, 1)}": '.encode())
    assert ledgercommands.repair(rich, yes=True) is ExitCode.OK
    with Ledger(rich) as ledger:
        assert windows(ledger)[:2] == [2, 1]
        assert len(ledger._storage.rows("windows")) == 3
        ledger.pause(on=False)
        job = ledger.claim()
        assert job is not None
        assert job.seq == 2
        ledger.add_window(2, Window(1, 2.0, "", None, None, ()))
        ledger.add_window(2, window(2))
    with Ledger(rich) as again:
        assert [window.text for window in again.windows(2)] == [" part-0", "", " part-2"]


def test_windows_of_a_lost_job_never_belong_to_a_new_job(rich: Path) -> None:
    raw = rich.read_bytes()
    at = raw.index(b'"2": {"job_id"')  # the last sequence number is lost, too: only the windows have it
    damage_all(rich, raw[at : raw.index(b"\n", at)])
    damage(rich, b'"last_seq"')
    journal(rich).unlink()
    assert ledgercommands.repair(rich, yes=True) is ExitCode.OK
    with Ledger(rich) as ledger:
        assert windows(ledger) == [2, 0, 0, 0, 0, 0, 0, 0]
        ledger.append([new_job("x"), new_job("y")])
        added = [ledger.get(name) for name in "xy"]
        assert [job.seq for job in added if job is not None] == [4, 5]
        assert windows(ledger) == [2, 0, 0, 0, 0, 0, 0, 0]


def damage_all(file: Path, text: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(text, text[:-2] + b"\xff\xff"))


def test_a_ledger_opens_despite_a_tombstone_without_an_id(rich: Path) -> None:
    """Its change in the journal was there, its document in the checkpoint was not."""
    damage(rich, b'{"job_id":"c","formats"')
    assert ledgercommands.repair(rich, yes=True) is ExitCode.OK
    with Ledger(rich) as ledger:
        assert ledger.pending_clears(9) == []
        assert ledger.get("c") is not None


def test_a_damaged_checkpoint_is_read_line_by_line(path: Path) -> None:
    raw = path.read_bytes()
    at = raw.index(b'"job_id":"b"')
    path.write_bytes(raw[: at + 3] + b"\xff\xff" + raw[at + 5 :])
    found = examine(path)
    assert found.damaged
    assert found.lost
    kept = {row["job_id"] for row in found.jobs.values()}
    assert {"a", "c", "d", "e"} <= kept
    assert ledgercommands.repair(path, yes=True) is ExitCode.OK
    with Ledger(path) as ledger:
        assert (job := ledger.get("a")) is not None
        assert job.result_text == "spoken"


def test_a_checkpoint_written_by_another_program_loses_nothing(path: Path) -> None:
    with Ledger(path):
        pass
    with TinyDB(path) as stock:
        stock.table("jobs").update({"metadata": {"edited": True}}, doc_ids=[1])
    with pytest.raises(LedgerError, match="changed by another program"):
        Ledger(path)
    assert ledgercommands.repair(path, yes=True) is ExitCode.OK
    with Ledger(path) as ledger:
        assert (job := ledger.get("a")) is not None
        assert job.metadata == {"edited": True}
        assert {name for name in ALL if ledger.get(name) is not None} == set(ALL)


@pytest.mark.parametrize("file", [lambda path: path, journal])
def test_every_cut_of_either_file_can_be_repaired_and_opened(path: Path, file: Callable[[Path], Path]) -> None:
    whole = {name: name.read_bytes().rstrip(b"\0") for name in (path, journal(path))}
    target = file(path)
    for cut in range(0, len(whole[target]), 7):
        for name, raw in whole.items():
            name.write_bytes(raw)
        target.write_bytes(whole[target][:cut])
        found = examine(path)
        if found.damaged:
            ledgercommands.repair(path, yes=True)
        with Ledger(path) as ledger:
            assert all(ledger.get(row["job_id"]) is not None for row in found.jobs.values())


def test_a_ledger_with_contradictory_documents_can_be_repaired(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second job with the same id, and a finished one without the time of its end, on which retention would fail."""
    with Ledger(path):
        pass
    with TinyDB(path) as stock:
        table = stock.table("jobs")
        table.update({"job_id": "a"}, doc_ids=[4])
        table.update(delete("completed_at"), doc_ids=[2])
    assert ledgercommands.repair(path, yes=True) is ExitCode.OK
    output = capsys.readouterr().out
    assert "Job number 4 (a)" in output
    assert "Job number 2 (b)" in output
    with Ledger(path) as ledger:
        assert [job.job_id for job in ledger.jobs()] == ["a", "c", "e"]
        assert ledger.delete_finished(before=2e9, keep=0)[0] == 1


def test_the_damaged_files_are_kept_beside_the_repaired_one(path: Path) -> None:
    damage(journal(path), b'"job_id":"d"')
    raw = journal(path).read_bytes()
    ledgercommands.repair(path, yes=True)
    kept = [entry for entry in path.parent.iterdir() if ".damaged-" in entry.name]
    assert len(kept) == 2
    assert raw in [entry.read_bytes() for entry in kept]


def test_without_yes_and_without_a_terminal_nothing_is_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(journal(path), b'"job_id":"d"')
    before = journal(path).read_bytes()
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert ledgercommands.repair(path, yes=False) is ExitCode.FAILED
    assert journal(path).read_bytes() == before
    assert "--yes" in capsys.readouterr().out


def test_a_ledger_in_use_is_not_examined(path: Path) -> None:
    with Ledger(path):
        script = f"from cesar_mqtt.cli.ledger import check; from pathlib import Path; check(Path({str(path)!r}))"
        with pytest.raises(LedgerInUseError):
            _in_another_process(script)


def _in_another_process(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    if "LedgerInUseError" in ended.stderr:
        raise LedgerInUseError(ended.stderr)


def test_a_newer_format_is_rejected_and_not_repaired(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":9'))
    with pytest.raises(LedgerError, match="format 9"):
        ledgercommands.repair(path, yes=True)


def test_a_journal_of_a_newer_format_is_rejected_and_not_repaired(path: Path) -> None:
    header = b'{"cesar_journal":2,"after":4}'
    journal(path).write_bytes(b"%08x %b\n" % (zlib.crc32(header), header))
    with pytest.raises(LedgerError, match="Install the newer version"):
        examine(path)


def test_transactions_between_checkpoint_and_journal_that_are_missing_are_named(path: Path) -> None:
    path.unlink()
    found = examine(path)
    assert found.damaged
    assert "the transactions between them are missing" in found.lost[0]


def test_a_transaction_that_is_missing_in_the_journal_is_damage(path: Path) -> None:
    lines = journal(path).read_bytes().splitlines(keepends=True)
    journal(path).write_bytes(b"".join(lines[:2] + lines[3:]))
    assert examine(path).damaged


def test_a_folder_without_a_ledger_is_named_in_the_error(tmp_path: Path) -> None:
    for command in (ledgercommands.check, ledgercommands.compact, ledgercommands.export):
        with pytest.raises(LedgerError, match="--data-dir"):
            command(tmp_path / "ledger.json")


def test_compacting_leaves_one_complete_file(path: Path) -> None:
    assert ledgercommands.compact(path) is ExitCode.OK
    assert not journal(path).exists()
    with TinyDB(path, access_mode="r") as stock:
        assert len(stock.table("jobs")) == 5


def test_the_export_is_one_json_object_per_line_in_order(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ledgercommands.export(path) is ExitCode.OK
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["job_id"] for row in rows] == ["a", "b", "c", "d", "e"]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["result_text"] == "spoken"


@pytest.mark.parametrize("file", [lambda path: path, journal])
def test_whatever_is_damaged_a_repaired_ledger_opens_with_consecutive_windows(
    rich: Path, file: Callable[[Path], Path]
) -> None:
    whole = {name: name.read_bytes().rstrip(b"\0") for name in (rich, journal(rich))}
    target = file(rich)
    for at in range(29, len(whole[target]), 29):
        for name, raw in whole.items():
            name.write_bytes(raw)
        target.write_bytes(whole[target][:at] + bytes([whole[target][at] ^ 0x02]) + whole[target][at + 1 :])
        if examine(rich).damaged:
            ledgercommands.repair(rich, yes=True)
        with Ledger(rich) as ledger:
            for seq in range(1, 5):
                assert [part.number for part in ledger.windows(seq)] == list(range(len(ledger.windows(seq))))
            ledger.append([new_job("next")])
            appended = ledger.get("next")
            assert appended is not None
            assert ledger.windows(appended.seq) == ()


def test_an_unreadable_document_is_named_and_dropped(rich: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Repaired ledgers could not be opened: only the presence of the fields was checked."""
    journal(rich).unlink()
    raw = rich.read_bytes()
    for old, made in ((b'"completed"', b'"campleted"'), (b'"[[0.0', b'"[x0.0'), (b'"jobs": {', b'"jobs": {"x": {}, ')):
        raw = raw.replace(old, made, 1)
    rich.write_bytes(raw.replace(b'"counters": {', b'"mine": {"1": {}},\n"counters": {'))
    assert ledgercommands.repair(rich, yes=True) is ExitCode.OK
    output = capsys.readouterr().out
    assert "Job number 1 (a)" in output
    assert "Job number x (id unknown)" in output
    assert f"Window number {window_id(1, 0)}" in output
    assert "The table 'mine'" in output
    with Ledger(rich) as ledger:
        assert [job.job_id for job in ledger.jobs()] == ["b"]
        assert windows(ledger)[:3] == [0, 2, 0]
    with TinyDB(rich, access_mode="r") as stock:
        assert len(stock.table("mine")) == 1
