"""What the inbox knows of each recording, on disk: over a restart none is submitted twice, and none is forgotten.

One thread uses an `InboxRecords`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from cesar_mqtt.errors import LedgerError, LedgerInUseError
from cesar_mqtt.gateway.database import Database


class RecordState(StrEnum):
    """The life of a recording in the inbox."""

    SUBMITTED = "submitted"
    """Its job is not final, as far as is known."""
    DONE = "done"
    """Its transcript is written."""
    FAILED = "failed"
    """Its job has failed; a retry of the job leads on."""
    LOST = "lost"
    """It was not where its job looked for it; it is submitted again where it turns up."""
    DROPPED = "dropped"
    """Nothing more is done: its job was deleted, or the recording was replaced."""


@dataclass(frozen=True, slots=True)
class Record:
    """One version of one recording."""

    job_id: str
    path: str
    """Where it is now, absolute."""
    name: str
    """Relative to the watched folder, as it was submitted: a repeated request must be the same request."""
    submitted_path: str
    """The path in the request; "": the recording itself was sent."""
    size_bytes: int
    mtime_ns: int
    inode: int
    digest: str
    """SHA-256 of the content."""
    state: RecordState = RecordState.SUBMITTED
    results: tuple[str, ...] = ()
    """The files that were written for it, absolute."""


_COLUMNS = tuple(field.name for field in fields(Record))


class InboxRecords:
    """The records of one inbox; no other process has them open."""

    def __init__(self, data_dir: Path) -> None:
        """Open or create them.

        Raises:
            LedgerInUseError: another inbox uses the data directory.
            LedgerError: they cannot be read or written.
        """
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(data_dir / "inbox.lock", mode=0o600)
            self._lock.acquire(timeout=0)
        except Timeout as exc:
            raise LedgerInUseError(
                f"Another inbox uses the data directory {data_dir}.", "Stop it, or choose another one with --data-dir."
            ) from exc
        except OSError as exc:
            raise LedgerError(f"The data directory {data_dir} cannot be used: {exc.strerror}.") from exc
        columns = ", ".join(f"{name} NOT NULL" for name in _COLUMNS)
        schema = f"CREATE TABLE IF NOT EXISTS recordings ({columns}, PRIMARY KEY (job_id))"
        try:
            self._database = Database(data_dir / "inbox.sqlite", schema)
        except LedgerError:
            self._lock.release()
            raise

    def __iter__(self) -> Iterator[Record]:
        """Yield all records, in the order in which they were put last. Raises LedgerError."""
        names = ", ".join(_COLUMNS)
        for row in self._database.execute(f"SELECT {names} FROM recordings ORDER BY rowid"):  # noqa: S608 - constants
            values = dict(zip(_COLUMNS, row, strict=True))
            values |= {"state": RecordState(values["state"]), "results": tuple(json.loads(values["results"]))}
            yield Record(**values)

    def put(self, record: Record) -> None:
        """Add a record, or replace the one of the same job; on return it is on disk. Raises LedgerError."""
        values = asdict(record) | {"state": str(record.state), "results": json.dumps(record.results)}
        places = ", ".join(f":{name}" for name in _COLUMNS)
        columns = ", ".join(_COLUMNS)
        statement = f"REPLACE INTO recordings ({columns}) VALUES ({places})"  # noqa: S608 - constants
        self._database.execute(statement, values)

    def close(self) -> None:
        """May be called twice."""
        self._database.close()
        self._lock.release()
