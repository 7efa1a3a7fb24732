"""Recovery of a damaged ledger: find what can be read without changing anything, and write it as a new ledger.

For one thread, on files that no consumer has open: the caller holds the ledger's lock.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger.checkpoint import RESERVED, Document, Image, Snapshot
from cesar_mqtt.ledger.documents import COUNTERS, GONE, JOBS, WINDOWS, job_from, tombstone_from, window_from
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.journal import body_of, check_format, is_torn, lines_of
from cesar_mqtt.ledger.storage import apply, change_from, is_transaction

_TABLE_LINE = re.compile(rb'^(?:\{)?"([^"]+)": \{$')
_DOCUMENT_LINE = re.compile(rb'^"(\d+)": (\{.*\}),?\}?,?$')
_JOB_ID = re.compile(rb'"job_id":"([A-Za-z0-9_-]{1,64})"')
_SENTENCES_SHOWN = 10


@dataclass(slots=True)
class RecoveredLedger:
    """What can be recovered of a ledger."""

    image: Image = field(default_factory=dict)
    """The recovered tables."""
    transaction: int = 0
    """The newest transaction that was found."""
    lost: list[str] = field(default_factory=list)
    """One sentence for each thing that cannot be recovered."""
    notes: list[str] = field(default_factory=list)
    """What is unusual and loses nothing."""
    damaged: bool = False
    needs_journal: bool = False
    """Whether the checkpoint is complete with its journal only."""

    @property
    def jobs(self) -> dict[str, Document]:
        """The recovered documents of jobs, by sequence number."""
        return self.image.get(JOBS, {})

    def drop(self, table: str, key: str, sentence: str) -> None:
        """Leave out a document, for the reason in `sentence`."""
        self.damaged = True
        self.lost.append(sentence)
        del self.image[table][key]


def examine(path: Path) -> RecoveredLedger:
    """Read the ledger at `path` as far as possible; changes nothing.

    Raises:
        LedgerError: a file cannot be opened, or a newer version wrote it.
    """
    found = RecoveredLedger()
    try:
        _read_checkpoint(path, found)
        _read_journal(path.with_name(path.name + ".journal"), found)
    except OSError as exc:
        raise LedgerError(f"The ledger {path} cannot be read: {exc.strerror}.") from exc
    _drop_unreadable(found)
    return found


def write_repaired(path: Path, found: RecoveredLedger) -> list[Path]:
    """Write the recovered tables as a new ledger; the old files stay beside it under other names.

    Every status is published again at the next start.

    Returns:
        The new paths of the old files.

    Raises:
        LedgerError: the disk failed; the old files are still there.
    """
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    journal, disk = path.with_name(path.name + ".journal"), Disk()
    kept = []
    try:
        # At every moment either the old or the new ledger is there under the names that a consumer opens.
        for old in (path, journal):
            if old.exists():
                kept.append(old.with_name(f"{old.name}.damaged-{stamp}"))
                kept[-1].hardlink_to(old)
        disk.sync_folder(path.parent)
        checkpoint.save(Snapshot(found.image, found.transaction, is_complete=True), path, disk=disk)
        disk.remove(journal)
        disk.sync_folder(path.parent)
    except OSError as exc:
        raise LedgerError(f"The ledger {path} could not be repaired: {exc.strerror}.") from exc
    return kept


def first_sentences(sentences: list[str]) -> list[str]:
    """Return the first ten sentences, and how many more there are."""
    more = len(sentences) - _SENTENCES_SHOWN
    return sentences[:_SENTENCES_SHOWN] + ([f"... and {more} more."] if more > 0 else [])


# -- the checkpoint -----------------------------------------------------------------------------------------------


def _read_checkpoint(path: Path, found: RecoveredLedger) -> None:
    try:
        loaded = checkpoint.load(path)
    except (LedgerError, ValueError, KeyError, TypeError):
        found.damaged = True
        _recover_checkpoint(path, found)
        return
    if loaded is not None:
        found.image, found.transaction = loaded[0].image, loaded[0].transaction
        found.needs_journal = not loaded[0].is_complete


def _recover_checkpoint(path: Path, found: RecoveredLedger) -> None:
    """Read a checkpoint with a wrong checksum: as a whole if it is still valid JSON, else line by line."""
    raw = path.read_bytes()
    try:
        tables = json.loads(raw)
        header = tables["checkpoint"]["1"]
        check_format(path, header["format"])
        found.transaction = int(header["transaction"])
        found.image = {name: rows for name, rows in tables.items() if name not in RESERVED}
    except (ValueError, KeyError, TypeError, AttributeError):
        found.image = _read_document_lines(raw, found)
        found.transaction = max((row.get("revision", 0) for row in found.jobs.values()), default=0)
        return
    found.notes.append(f"{path.name} was changed by another program or damaged, but it can be read completely.")


def _read_document_lines(raw: bytes, found: RecoveredLedger) -> Image:
    image: Image = {}
    table = ""
    unreadable, damaged = 0, b""
    for line in raw.splitlines():
        header = _TABLE_LINE.match(line)
        if header:
            table = header[1].decode(errors="replace")
            continue
        document = _parse_document_line(line)
        if document is not None and table not in RESERVED:
            image.setdefault(table, {})[document[0]] = document[1]
        elif line.strip() and not any(f'"{name}"'.encode() in line for name in RESERVED):
            unreadable += 1
            damaged += line
    if unreadable:
        lines = "line" if unreadable == 1 else "lines"
        found.lost.append(f"{unreadable} {lines} of the checkpoint cannot be read{_jobs_in(damaged)}.")
    return image


def _parse_document_line(line: bytes) -> tuple[str, Document] | None:
    parts = _DOCUMENT_LINE.match(line.strip())
    if parts is None:
        return None
    for text in (parts[2], parts[2][:-1]):  # the last document of a table is followed by the table's own bracket
        try:
            content = json.loads(text)
        except ValueError:
            continue
        return (parts[1].decode(), content) if isinstance(content, dict) else None
    return None


# -- the journal --------------------------------------------------------------------------------------------------


def _read_journal(path: Path, found: RecoveredLedger) -> None:
    try:
        used = path.read_bytes().rstrip(b"\0")
    except FileNotFoundError:
        used = b""
    if not used or (body_of(first := next(lines_of(used))) is None and is_torn(first, 0)):  # a header is never torn
        if found.needs_journal:
            found.damaged = True
            found.lost.append(f"{path.name} is missing or empty: every change after transaction {found.transaction}.")
        return
    expected: int | None = None
    for number, entry in _read_entries(used, path, found):
        if number == 1 and isinstance(entry, dict) and "cesar_journal" in entry:
            check_format(path, entry["cesar_journal"])
            expected = _read_header(entry, path, found)
        elif is_transaction(entry):
            if number == 1:
                found.damaged = True
                found.notes.append(f"{path.name} has no header; it is written again.")
            expected = _apply_entry(entry, expected, found, f"Line {number} of {path.name}")
        elif entry is None:  # damaged: the transaction that it held is the one that is missing
            expected = None if expected is None else expected + (number > 1)
        else:
            found.damaged = True
            found.notes.append(f"Line {number} of {path.name} is no transaction; it is left out.")


def _read_entries(used: bytes, path: Path, found: RecoveredLedger) -> Iterator[tuple[int, Any]]:
    """Yield each line's number and entry; None: it is damaged."""
    end = 0
    for number, line in enumerate(lines_of(used), start=1):
        body = body_of(line)
        if body is not None:
            yield number, json.loads(body)
        elif end + len(line) == len(used) and is_torn(line, end):
            found.notes.append(f"The last line of {path.name} was cut by a crash; it was never acknowledged.")
        else:
            found.damaged = True
            found.lost.append(
                f"Line {number} of {path.name} is damaged: the changes of that transaction{_jobs_in(line)} are lost."
            )
            yield number, None
        end += len(line)


def _jobs_in(text: bytes) -> str:
    """Name the jobs whose ids can be read in a damaged line."""
    ids = dict.fromkeys(found.decode() for found in _JOB_ID.findall(text))
    return f" (jobs named in it: {', '.join(ids)})" if ids else ""


def _read_header(header: Any, path: Path, found: RecoveredLedger) -> int:
    after = int(header.get("after", 0))
    if after > found.transaction:
        found.damaged = True
        found.lost.append(
            f"{path.name} continues after transaction {after}, the checkpoint ends at {found.transaction}: the "
            "transactions between them are missing."
        )
    return after + 1


def _apply_entry(entry: list[Any], expected: int | None, found: RecoveredLedger, where: str) -> int:
    number, _, operations = entry
    if expected is not None and number < expected:
        found.damaged = True
        found.notes.append(f"{where} repeats transaction {number}; it is left out.")
        return expected
    if expected is not None and number > max(expected, found.transaction + 1):
        found.damaged = True
        found.lost.append(f"The transactions before number {number} are missing ({where}).")
    if number > found.transaction:
        for operation in operations:
            apply(found.image, change_from(operation))
        found.transaction = number
    return int(number) + 1


# -- documents ----------------------------------------------------------------------------------------------------


def _drop_unreadable(found: RecoveredLedger) -> None:
    """Leave out the documents that the ledger could not read, since a repaired one has to open.

    Windows whose job is lost stay: the ledger deletes them when it opens.
    """
    seen: set[str] = set()
    for key, row in sorted(found.jobs.items(), key=lambda item: (len(item[0]), item[0])):
        if not _is_readable(_read_job, key, row) or row["job_id"] in seen:
            job_id = row.get("job_id", "id unknown")
            found.drop(JOBS, key, f"Job number {key} ({job_id}): its document is incomplete or damaged.")
        else:
            seen.add(row["job_id"])
    for key in [key for key, row in found.image.get(GONE, {}).items() if not _is_readable(tombstone_from, key, row)]:
        found.drop(GONE, key, f"Deleted job number {key}: its id, and which messages the broker may still retain.")
    for key in [key for key, row in found.image.get(WINDOWS, {}).items() if not _is_readable(window_from, key, row)]:
        found.drop(WINDOWS, key, f"Window number {key}: that part of the recording is transcribed again.")
    for name in found.image.keys() - {JOBS, GONE, WINDOWS, COUNTERS}:
        found.notes.append(f"The table {name!r} does not belong to a ledger; it is kept unchanged.")


def _is_readable(read: Callable[[int, Document], object], key: str, row: Document) -> bool:
    try:
        read(int(key), row)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _read_job(seq: int, row: Document) -> None:
    job = job_from(seq, row, None, None)
    if job.state.final and job.completed_at is None:
        raise ValueError("final without the time of its end")
