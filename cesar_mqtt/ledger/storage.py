"""A TinyDB `Storage` on a checkpoint with a journal: writes cost what they change, and survive a crash anywhere.

`ledger.json` is a checkpoint that stock TinyDB opens. Beside it `ledger.json.journal` holds a line for each transaction
since. Not locked: the ledger calls from one thread at a time, except `write_checkpoint`, which works on a snapshot and
may run beside commits.
"""

import errno
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinydb.storages import Storage

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.ledger import checkpoint
from cesar_mqtt.ledger.checkpoint import Document, Image, Snapshot
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.journal import FORMAT, Journal, check_format


class Change(NamedTuple):
    """What one transaction does to one document, or to a whole table.

    A named tuple, for there are some in every transaction: a frozen dataclass takes twice as long to make.

    Attributes:
        table: the table's name.
        doc_id: the document's id; None drops the table.
        fields: the fields to set; a document that does not exist is made. None deletes the document.
        dropped: the fields to remove.
    """

    table: str
    doc_id: int | None
    fields: Mapping[str, Any] | None = None
    dropped: tuple[str, ...] = ()


def change_of(operation: Sequence[Any]) -> Change:
    """Read one change as a journal line has it."""
    table, doc_id, fields, *dropped = operation
    named = fields and {sys.intern(name): value for name, value in fields.items()}
    return Change(table, doc_id, named, tuple(dropped[0]) if dropped else ())


def apply(image: Image, change: Change) -> None:
    """Bring tables in memory up to date; a changed document is replaced by another."""
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

    Attributes:
        transaction: number of the last transaction; grows by one for each, over restarts.
        mark: a number that the owner hands in with each transaction and gets back after a restart.
        checkpoint_bytes: size of `ledger.json`.
        checkpointing: held while a checkpoint is written and the journal cut after it; taken before any other lock.
    """

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        """Load the checkpoint and replay the journal; make both when there are none.

        Raises:
            LedgerError: the files cannot be read, are damaged, or were written by a newer version.
        """
        self.path = path
        self.checkpointing = threading.RLock()
        self._disk = disk or Disk()
        self._journal = Journal(path.with_name(path.name + ".journal"), self._disk)
        try:
            self._open()
        except OSError as exc:
            self.abandon()
            raise LedgerError(
                f"The ledger {path} cannot be opened: {exc.strerror}. Check the folder's owner and disk."
            ) from exc
        except BaseException:
            self.abandon()
            raise

    def _open(self) -> None:
        loaded = checkpoint.load(self.path)
        start, self.checkpoint_bytes = loaded or (Snapshot({}), 0)
        self._image, self.transaction, self.mark = start.image, start.transaction, start.mark
        self._expected: int | None = None
        self._journal.open(self._replay)
        if loaded is None:
            self.checkpoint()
        elif self._expected is None or self._expected <= self.transaction:  # the checkpoint holds all of it
            self._restart_journal(start.transaction, self._journal.size)

    # -- TinyDB's two methods -------------------------------------------------------------------------------------

    def read(self) -> Image | None:
        """Return the live tables: callers must not change them or their documents. None when there is none yet."""
        return dict(self._image) or None

    def write(self, data: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> None:
        """Replace all tables, as one transaction of what differs; TinyDB itself calls this only to drop tables."""
        old = [name for name, rows in self._image.items() if data.get(name) is not rows]
        new = [name for name, rows in data.items() if self._image.get(name) is not rows]
        changes = [Change(name, None) for name in old]
        changes += [Change(name, int(key), document) for name in new for key, document in data[name].items()]
        self.commit(changes)

    def rows(self, table: str) -> Mapping[str, Document]:
        """Return the live documents of one table by id, for reading; empty when there is no such table."""
        return self._image.get(table, {})

    # -- transactions ---------------------------------------------------------------------------------------------

    @property
    def journal_bytes(self) -> int:
        """Size of the journal, in bytes."""
        return self._journal.size

    def commit(self, changes: Iterable[Change], *, mark: int | None = None) -> None:
        """Apply the changes together: on return they are on disk; after an error none has happened.

        A crash right after an error may still bring the changes back: a disk that refused to write may also have
        refused to take back. So the caller treats an error as not done and not undone, and says nothing of it.

        Raises:
            LedgerError: the disk refused; the next commit tries again.
        """
        changes = tuple(changes)
        number = self.transaction + 1
        mark = self.mark if mark is None else mark
        operations = [[c.table, c.doc_id, c.fields, *((c.dropped,) if c.dropped else ())] for c in changes]
        try:
            if self._journal.suspect:
                self.checkpoint()
            self._journal.append([number, mark, operations])
        except OSError as exc:
            raise LedgerError(f"The ledger {self.path} cannot be written: {exc.strerror}.") from exc
        self.transaction, self.mark = number, mark
        for change in changes:
            apply(self._image, change)

    def _replay(self, line: int, entry: Any) -> None:
        """Take one entry of the journal at opening; those that the checkpoint holds already are only counted."""
        if self._expected is None:
            self._expected = self._read_header(entry) + 1
            return
        number, mark, operations = entry
        if number != self._expected:
            raise LedgerError(
                f"{self._journal.path} misses transaction {self._expected} before line {line}. Nothing was changed. "
                "`cesar-mqtt ledger check` tells what can be kept, `ledger repair` keeps it."
            )
        if number > self.transaction:
            for operation in operations:
                apply(self._image, change_of(operation))
            self.transaction, self.mark = number, mark
        self._expected += 1

    def _read_header(self, entry: Any) -> int:
        path = self._journal.path
        if not isinstance(entry, dict) or "cesar_journal" not in entry:
            raise LedgerError(f"{path} is not a journal of cesar-mqtt. Move it away to start without it.")
        check_format(path, entry["cesar_journal"])
        after: int = entry["after"]
        if after > self.transaction:
            raise LedgerError(
                f"{path} goes on after transaction {after}, but {self.path.name} is missing or an older copy that ends "
                f"at {self.transaction}. Put the newer {self.path.name} back."
            )
        return after

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write everything to `ledger.json` and start an empty journal; blocks the caller meanwhile.

        Raises:
            OSError: the disk refused, or another thread is writing a checkpoint; the old files still hold everything.
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
        """Return what `write_checkpoint` needs; takes no time worth naming (a shallow copy of the tables)."""
        tables = {name: dict(rows) for name, rows in self._image.items()}
        return Snapshot(tables, self.transaction, self.mark, self._journal.size)

    def write_checkpoint(self, snapshot: Snapshot) -> None:
        """Write `snapshot` as the new `ledger.json`; on return it is on disk under its name.

        May run in another thread beside `commit`, under `checkpointing`. Raises OSError.
        """
        self.checkpoint_bytes = checkpoint.save(snapshot, self.path, disk=self._disk)

    def cut_journal(self, snapshot: Snapshot) -> None:
        """Drop from the journal what the checkpoint of `snapshot` holds, keeping what came after. Raises OSError.

        A crash before this leaves lines that the checkpoint holds already; opening skips them by their number.
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
            self.write_checkpoint(self.snapshot())
            self._journal.remove()
        except OSError as exc:
            raise LedgerError(
                f"The ledger {self.path} could not be checkpointed: {exc.strerror}. Its journal holds everything."
            ) from exc
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files as they are, as a crash would."""
        self._journal.close()
