"""A TinyDB `Storage` with a journal: a transaction costs what it changes, and survives a crash at any point.

`ledger.json` is a checkpoint that stock TinyDB opens. `ledger.json.journal` beside it has one line for each transaction
since. Not locked: the ledger calls from one thread at a time, except `write_checkpoint`, which works on a snapshot and
may run in parallel with commits.
"""

import copy
import errno
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tinydb.storages import Storage

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.json_codec import check_json, encode
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger.checkpoint import RESERVED, Document, Image, Snapshot
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.journal import FORMAT, REPAIR_ADVICE, Journal, check_format
from cesar_mqtt.ledger.reserve import Reserve
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OPENING_BYTES = 64 << 10
"""What opening needs at most: a new journal and the names of its files."""
_HEADER_BYTES = 100
"""A journal of this size has no transaction yet."""


class Change(NamedTuple):
    """What a transaction does to one document, or to a whole table.

    A named tuple, since every transaction has some: a frozen dataclass takes twice as long to make.
    """

    table: str
    doc_id: int | None
    """None drops the table."""
    fields: Mapping[str, Any] | None = None
    """The fields to set; a missing document is created. None deletes the document."""
    dropped: tuple[str, ...] = ()
    """The fields to remove."""


def change_from(operation: Sequence[Any]) -> Change:
    """Read one change of a journal line."""
    table, doc_id, fields, *dropped = operation
    interned = fields and {sys.intern(name): value for name, value in fields.items()}
    return Change(table, doc_id, interned, tuple(dropped[0]) if dropped else ())


def is_transaction(entry: Any) -> bool:
    """Whether a journal entry is a transaction: its number, the watermark, and the changes."""
    return isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], int) and isinstance(entry[2], list)  # noqa: PLR2004


def apply(image: Image, change: Change) -> None:
    """Apply a change to tables in memory; a changed document is replaced by a new one."""
    if change.doc_id is None:
        image.pop(change.table, None)
        return
    rows = image.setdefault(change.table, {})
    key = str(change.doc_id)
    if change.fields is None:
        rows.pop(key, None)
        return
    known = rows.get(key)
    document = dict(change.fields) if known is None else {**known, **change.fields}
    for field in change.dropped:
        document.pop(field, None)
    rows[key] = document


class JournalStorage(Storage):
    """Keeps all tables in memory, and on disk as a checkpoint with a journal.

    Documents in memory are replaced and never changed, so a shallow copy of the tables is a snapshot.
    """

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        """Load the checkpoint and replay the journal; create both if there are none.

        Raises:
            LedgerError: the files cannot be read, are damaged, or were written by a newer version.
        """
        self.path = path
        self.transaction: int
        """Number of the last transaction; increases by one for each, over restarts."""
        self.watermark: int
        """A number that the caller may pass with each transaction; on disk with it."""
        self.checkpoint_bytes: int
        self.checkpointing = threading.RLock()
        """Held while a checkpoint is written and the journal is cut; acquired before any other lock."""
        self._disk = disk or Disk()
        self._journal = Journal(path.with_name(path.name + ".journal"), self._disk)
        self._reserve = Reserve(path.with_suffix(".reserve"), self._disk)
        try:
            self._open_with_reserve()
        except OSError as exc:
            self.abandon()
            raise LedgerError(
                f"The ledger {path} cannot be opened: {exc.strerror}. Check the owner and the disk of its folder."
            ) from exc
        except BaseException:
            self.abandon()
            raise

    def _open_with_reserve(self) -> None:
        """Open the files; on a full disk with the room of the reserve: a consumer that does not start frees nothing."""
        try:
            self._open()
        except OSError as exc:
            if exc.errno not in _FULL or not self._reserve.give_up(_OPENING_BYTES, keep_bytes=0):
                raise
            self._journal.close()
            self._open()

    def _open(self) -> None:
        loaded = checkpoint.load(self.path)
        start, self.checkpoint_bytes = loaded or (Snapshot({}, is_complete=True), 0)
        self._image, self.transaction, self.watermark = start.image, start.transaction, start.watermark
        self._expected: int | None = None
        if not start.is_complete and not self._journal.has_begun:
            raise LedgerError(
                f"{self._journal.path} is missing or empty, and {self.path.name} was not closed in order: every change "
                f"after transaction {start.transaction} would be lost. Put the journal back. {REPAIR_ADVICE}"
            )
        self._journal.open(self._replay)
        if loaded is None:
            snapshot = replace(self.snapshot(), is_complete=True)  # until its journal is there
            self.write_checkpoint(snapshot)
            self.cut_journal(snapshot)
        elif self._expected is None or self._expected <= self.transaction:  # the checkpoint holds all of it
            self._restart_journal(start.transaction, self._journal.size)
        if start.is_complete:
            checkpoint.mark_incomplete(self.path, disk=self._disk)

    # -- TinyDB's two methods -------------------------------------------------------------------------------------

    def read(self) -> Image | None:
        """Return a copy of all tables; None if there are none yet."""
        return copy.deepcopy(self._image) or None

    def write(self, data: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> None:
        """Replace all tables, in one transaction of the documents that differ.

        The ledger never calls this, since it compares all documents: it is for TinyDB's own tables.
        """
        if taken := RESERVED & data.keys():
            raise ValueError(f"A table cannot be called {min(taken)!r}: the checkpoint uses that name itself.")
        changes = [Change(table, None) for table in self._image if table not in data]
        for table, rows in data.items():
            new = {str(key): document for key, document in rows.items()}
            old = self.rows(table)
            changes += [Change(table, int(key), None) for key in old if key not in new]
            for key, document in new.items():
                check_json(document)
                before = old.get(key)
                if before is None or encode(before) != encode(document):  # in Python 1, 1.0 and True are equal
                    dropped = () if before is None else tuple(name for name in before if name not in document)
                    changes.append(Change(table, int(key), document, dropped))
        self.commit(changes)

    def rows(self, table: str) -> Mapping[str, Document]:
        """Return the live documents of a table by id, for reading only; empty if there is no such table."""
        return self._image.get(table, {})

    # -- transactions ---------------------------------------------------------------------------------------------

    @property
    def journal_bytes(self) -> int:
        return self._journal.size

    def commit(
        self, changes: Iterable[Change], *, watermark: int | None = None, keep_reserve: int | None = None
    ) -> None:
        """Apply the changes together: on return they are on disk; after an error none of them is applied.

        A crash right after an error may still bring the changes back: the disk may have failed to undo the write, too.
        So the caller must publish neither the changes nor their failure as final.

        Args:
            changes: any number of them.
            watermark: None: as it was.
            keep_reserve: on a full disk the changes may use the reserve up to so many bytes; None: they may not.

        Raises:
            LedgerError: the disk failed; the next commit tries again.
        """
        changes = tuple(changes)
        number = self.transaction + 1
        watermark = self.watermark if watermark is None else watermark
        operations = [[c.table, c.doc_id, c.fields, *((c.dropped,) if c.dropped else ())] for c in changes]
        entry = [number, watermark, operations]
        try:
            if self._journal.suspect:
                self.checkpoint()
            elif not self._journal.is_in_place or not self._is_in_place():
                log.error("The ledger's files were removed or replaced: writing them again", action="ledger_rewritten")
                self.checkpoint()
            self._journal.append(entry)
        except OSError as exc:
            self._append_on_full_disk(entry, exc, keep_reserve)
        self.transaction, self.watermark = number, watermark
        for change in changes:
            apply(self._image, change)

    def _is_in_place(self) -> bool:
        """Whether the checkpoint is there: the journal alone is no ledger."""
        try:
            os.stat(self.path)  # noqa: PTH116 - asked for each transaction
        except FileNotFoundError:
            return False
        return True

    def _append_on_full_disk(self, entry: Any, error: OSError, keep_reserve: int | None) -> None:
        """Append an entry that could not be, if room can be made for it. Raises LedgerError."""
        try:
            while self._make_room(error, entry, keep_reserve):
                try:
                    if self._journal.suspect:
                        self.checkpoint()
                    self._journal.append(entry, exact=True)
                except OSError as exc:
                    error = exc
                else:
                    return
        except OSError as exc:
            error = exc
        raise LedgerError(f"The ledger {self.path} cannot be written: {error.strerror}.") from error

    def _make_room(self, error: OSError, entry: Any, keep_reserve: int | None) -> bool:
        """Do what lets the journal grow all the same; False: nothing does."""
        if error.errno == errno.EFBIG and self._journal.size > _HEADER_BYTES:  # RLIMIT_FSIZE, say
            self.checkpoint()
            return True
        if error.errno not in _FULL or keep_reserve is None:
            return False
        return self._reserve.give_up(len(encode(entry)), keep_bytes=keep_reserve)

    def restore_reserve(self) -> None:
        """Take again what changes on a full disk have used of the reserve, if there is room now."""
        self._reserve.restore()

    def _replay(self, line: int, entry: Any) -> None:
        """Apply an entry of the journal at opening, unless the checkpoint has it already."""
        if self._expected is None:
            self._expected = self._read_header(entry) + 1
            return
        if not is_transaction(entry):
            raise LedgerError(f"{self._journal.path} has no transaction in line {line}. {REPAIR_ADVICE}")
        number, watermark, operations = entry
        if number < self._expected:
            raise LedgerError(f"{self._journal.path} repeats transaction {number} in line {line}. {REPAIR_ADVICE}")
        if number != self._expected:
            raise LedgerError(
                f"{self._journal.path} misses transaction {self._expected} before line {line}. {REPAIR_ADVICE}"
            )
        if number > self.transaction:
            for operation in operations:
                apply(self._image, change_from(operation))
            self.transaction, self.watermark = number, watermark
        self._expected += 1

    def _read_header(self, entry: Any) -> int:
        path = self._journal.path
        if not isinstance(entry, dict) or "cesar_journal" not in entry:
            raise LedgerError(f"{path} has no header in line 1. {REPAIR_ADVICE}")
        check_format(path, entry["cesar_journal"])
        after: int = entry["after"]
        if after > self.transaction:
            raise LedgerError(
                f"{path} continues after transaction {after}, but {self.path.name} is missing or an older copy that "
                f"ends at {self.transaction}. Restore the newer {self.path.name}."
            )
        return after

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write everything to `ledger.json` and start an empty journal.

        Raises:
            OSError: the disk failed, or another thread is writing a checkpoint; the old files are still complete.
        """
        if not self.checkpointing.acquire(blocking=False):
            raise BlockingIOError(errno.EAGAIN, "a checkpoint is being written, try again")
        try:
            snapshot = self.snapshot()
            self.write_checkpoint(snapshot)
            self.cut_journal(snapshot)
        finally:
            self.checkpointing.release()

    def snapshot(self) -> Snapshot:
        """Return what `write_checkpoint` needs: a shallow copy of the tables."""
        tables = {name: dict(rows) for name, rows in self._image.items()}
        return Snapshot(tables, self.transaction, self.watermark, self._journal.size)

    def write_checkpoint(self, snapshot: Snapshot) -> None:
        """Write `snapshot` as the new `ledger.json`; on return it is on disk under its name.

        May run in another thread in parallel with `commit`, under `checkpointing`. Raises OSError.
        """
        self.checkpoint_bytes = checkpoint.save(snapshot, self.path, disk=self._disk)

    def cut_journal(self, snapshot: Snapshot) -> None:
        """Drop the transactions of `snapshot` from the journal and keep the later ones. Raises OSError.

        A crash before this leaves lines that the checkpoint has already; opening skips them by their number.
        """
        self._restart_journal(snapshot.transaction, snapshot.journal_size)

    def _restart_journal(self, after: int, keep_from: int) -> None:
        self._journal.restart({"cesar_journal": FORMAT, "after": after}, keep_from=keep_from)

    # -- closing --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Write a checkpoint and remove the journal: `ledger.json` alone is complete. A second call does nothing."""
        if self._journal.closed:
            return
        try:
            self.write_checkpoint(replace(self.snapshot(), is_complete=True))
            self._journal.remove()
        except OSError as exc:
            raise LedgerError(
                f"The checkpoint {self.path} could not be written: {exc.strerror}. The journal is complete."
            ) from exc
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files as they are, as a crash would."""
        self._journal.close()
        self._reserve.close()
