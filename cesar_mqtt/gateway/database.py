"""What a front door remembers over a restart: a small SQLite database in the data directory. Any thread may use it."""

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cesar_mqtt.errors import LedgerError


class Database:
    """Executes statements, each of them a transaction: on return its change is on disk."""

    def __init__(self, path: Path, *schema: str) -> None:
        """Open or create it; `schema` are statements that may run again. Raises LedgerError."""
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as exc:
            raise self._failed(exc) from exc
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *schema):
            self.execute(statement)

    def execute(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Execute a statement and return its rows. Raises LedgerError."""
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as exc:
            raise self._failed(exc) from exc

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._connection.close()

    def _failed(self, exc: Exception) -> LedgerError:
        return LedgerError(f"{self._path} cannot be used: {exc}.", "Check the data directory.")
