"""Which statuses were dealt with, on disk: retained ones arrive again at each connection and after each restart."""

from pathlib import Path

from cesar_mqtt.gateway.database import Database


class StatusRecords:
    """For each job the version of its status that was dealt with last, and a text about it.

    Attributes:
        since: when the records were begun, as RFC 3339; what happened before is of no concern.
    """

    def __init__(self, path: Path, *, now: str) -> None:
        """Open or create them. Raises LedgerError."""
        self._database = Database(
            path,
            "CREATE TABLE IF NOT EXISTS jobs (job_id PRIMARY KEY, version NOT NULL, note NOT NULL)",
            "CREATE TABLE IF NOT EXISTS began (since NOT NULL)",
        )
        self._database.execute("INSERT INTO began SELECT ? WHERE NOT EXISTS (SELECT 1 FROM began)", (now,))
        self.since = str(self._database.execute("SELECT since FROM began")[0][0])

    def get(self, job_id: str) -> tuple[str, str] | None:
        """Return version and note; None: nothing was done for this job."""
        rows = self._database.execute("SELECT version, note FROM jobs WHERE job_id = ?", (job_id,))
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    def put(self, job_id: str, version: str, note: str = "") -> None:
        """Record what was done; on return it is on disk. Raises LedgerError."""
        self._database.execute("REPLACE INTO jobs VALUES (?, ?, ?)", (job_id, version, note))

    def remove(self, job_id: str) -> None:
        """Forget a job that was deleted. Raises LedgerError."""
        self._database.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def close(self) -> None:
        self._database.close()
