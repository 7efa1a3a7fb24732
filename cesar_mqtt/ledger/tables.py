"""TinyDB's tables on the journal: every write of TinyDB's public methods becomes one transaction of what it changed.

Not locked: the ledger, their owner, calls from one thread at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, cast

from tinydb import TinyDB
from tinydb.table import Table

from cesar_mqtt.json_codec import check_json, encode
from cesar_mqtt.ledger.checkpoint import RESERVED, Document
from cesar_mqtt.ledger.storage import Change, JournalStorage


class JournalTable(Table):
    """A TinyDB table whose writes go to the journal as changes; TinyDB's public methods work unchanged.

    Documents go in and come out as copies, as they do where TinyDB itself reads and writes its file each time.
    """

    @property
    def _journal(self) -> JournalStorage:
        return cast("JournalStorage", self._storage)

    def _read_table(self) -> dict[str, Mapping[str, Any]]:
        return cast("dict[str, Mapping[str, Any]]", _Copies(self._journal.rows(self.name)))

    def _update_table(self, updater: Callable[[dict[int, Mapping[str, Any]]], Any]) -> None:
        """Run TinyDB's updater on a view that notes what it touches, and commit that: the one funnel of writes."""
        view = _View(self._journal.rows(self.name))
        updater(cast("dict[int, Mapping[str, Any]]", view))
        self._journal.commit(view.changes(self.name))
        self.clear_cache()


class JournalDB(TinyDB):
    """TinyDB with journal tables, and transactions that span tables."""

    table_class = JournalTable

    @property
    def journal(self) -> JournalStorage:
        """The storage under all tables."""
        return cast("JournalStorage", self.storage)

    def table(self, name: str, **kwargs: Any) -> Table:
        """As TinyDB's; raises ValueError for a name that the file needs for itself."""
        if name in RESERVED:
            raise ValueError(f"No table can be called {name!r}: the checkpoint uses that name itself.")
        return super().table(name, **kwargs)


class _Copies(Mapping[str, Document]):
    """The rows of a table for TinyDB's reading methods, each document copied when it is looked at."""

    def __init__(self, rows: Mapping[str, Document]) -> None:
        self._rows = rows

    def __getitem__(self, key: str) -> Document:
        return _copy(self._rows[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class _View(MutableMapping[int, Document]):
    """The rows of a table as an updater sees them: changes stay here until they are committed."""

    def __init__(self, rows: Mapping[str, Document]) -> None:
        self._rows = rows
        self._touched: dict[int, Document | None] = {}

    def __getitem__(self, doc_id: int) -> Document:
        if doc_id not in self._touched:
            self._touched[doc_id] = _copy(self._rows[str(doc_id)])
        document = self._touched[doc_id]
        if document is None:
            raise KeyError(doc_id)
        return document

    def __setitem__(self, doc_id: int, document: Document) -> None:
        self._touched[int(doc_id)] = dict(document)

    def __delitem__(self, doc_id: int) -> None:
        if doc_id not in self:
            raise KeyError(doc_id)
        self._touched[doc_id] = None

    def __contains__(self, doc_id: object) -> bool:
        if isinstance(doc_id, int) and doc_id in self._touched:
            return self._touched[doc_id] is not None
        return str(doc_id) in self._rows

    def __iter__(self) -> Iterator[int]:
        for key in self._rows:
            if int(key) in self:
                yield int(key)
        for doc_id, document in self._touched.items():
            if document is not None and str(doc_id) not in self._rows:
                yield doc_id

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Delete all; what `MutableMapping` offers looks for the first one anew for each."""
        self._touched = dict.fromkeys(map(int, self._rows))

    def changes(self, table: str) -> Iterator[Change]:
        """Compare what was touched with what was there, as JSON: to Python, 1 and True and 1.0 are equal."""
        for doc_id, touched in self._touched.items():
            before = self._rows.get(str(doc_id))
            if touched is None:
                if before is not None:
                    yield Change(table, doc_id, None)
                continue
            check_json(touched)  # it comes from outside; the ledger's own documents are of a few known types
            after = _copy(touched)
            kept = {} if before is None else {name: encode(value) for name, value in before.items()}
            fields = {name: value for name, value in after.items() if kept.get(name) != encode(value)}
            dropped = tuple(name for name in kept if name not in after)
            if fields or dropped or before is None:
                yield Change(table, doc_id, fields, dropped)


def _copy(document: Mapping[str, Any]) -> Document:
    """Return the document as it would come back from the file, nothing of it shared."""
    return cast("Document", json.loads(encode(document)))
