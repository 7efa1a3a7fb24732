"""The model of `watch`: jobs and consumers from their retained topics, bounded in number; for one thread.

Any client may publish on these topics: a payload that cannot be read is ignored.
"""

import heapq
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cesar_mqtt.cli.text import number, printable

MOST_JOBS = 2000
"""Beyond this, the jobs that would be shown last are dropped."""
MOST_CONSUMERS = 64

_NOTE_CHARACTERS = 200
_NAME_CHARACTERS = 64
_LAST = 1 << 60
_STATES = ("processing", "queued", "completed", "error", "cancelled")


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job; None: not known yet. Durations are in seconds, times in RFC 3339."""

    job_id: str
    state: str
    attempt: int
    position: int | None
    progress: float | None
    duration_s: float | None
    speed: float | None
    eta_s: float | None
    created_at: str
    ended_at: str
    note: str
    """The priority of an open job, the file's name if there is one, then the beginning of the transcript or the error.
    """

    @property
    def is_final(self) -> bool:
        return self.state not in ("processing", "queued")


@dataclass(frozen=True, slots=True)
class ConsumerRow:
    """One consumer; `queue` holds the fields of its retained `queue` message."""

    name: str
    online: bool
    queue: Mapping[str, Any]

    @property
    def activity(self) -> str:
        return printable(str(self.queue.get("activity") or "online")) if self.online else "offline"

    def count(self, name: str) -> str:
        """Return a number of its `queue` message as text; empty if it is missing."""
        value = number(self.queue.get(name))
        return "" if value is None else f"{value:.0f}"


class Board:
    """The newest state of each job and each consumer."""

    def __init__(self, prefix: str) -> None:
        self._statuses = f"{prefix}/status/"
        self._consumer_topics = f"{prefix}/consumer/"
        self._jobs: dict[str, JobRow] = {}
        self._consumers: dict[str, ConsumerRow] = {}

    def clear(self) -> None:
        """Remove everything: a new connection delivers it again, without what was deleted meanwhile."""
        self._jobs.clear()
        self._consumers.clear()

    def take(self, topic: str, payload: bytes) -> JobRow | ConsumerRow | None:
        """Update from a message; return the row of its job or consumer, None if it has none or no longer."""
        if topic.startswith(self._statuses):
            return self._take_status(topic.removeprefix(self._statuses), _document(payload))
        if topic.startswith(self._consumer_topics):
            name, _, what = topic.removeprefix(self._consumer_topics).rpartition("/")
            return self._take_consumer(name, what, _document(payload))
        return None

    @property
    def consumers(self) -> list[ConsumerRow]:
        """All consumers, the online ones first, then by name."""
        return sorted(self._consumers.values(), key=lambda row: (not row.online, row.name))

    def jobs(self, limit: int) -> list[JobRow]:
        """Return the first `limit` jobs: running, then queued in their order, then final, the newest first."""
        ended = [row for row in self._jobs.values() if row.is_final]
        open_ones = [row for row in self._jobs.values() if not row.is_final]
        found = heapq.nsmallest(limit, open_ones, key=_display_order)
        return found + heapq.nlargest(limit - len(found), ended, key=lambda row: (row.ended_at, row.job_id))

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        counts = dict.fromkeys(_STATES, 0)
        for row in self._jobs.values():
            counts[row.state] += 1
        return counts

    def _take_status(self, job_id: str, document: Mapping[str, Any] | None) -> JobRow | None:
        if document is None or document.get("status") not in _STATES or len(job_id) > _NAME_CHARACTERS:
            self._jobs.pop(job_id, None)
            return None
        row = self._jobs[job_id] = _row(printable(job_id), document)
        if len(self._jobs) > MOST_JOBS + MOST_JOBS // 10:  # a tenth of slack, so that not every message sorts
            self._jobs = {kept.job_id: kept for kept in self.jobs(MOST_JOBS)}
        return row

    def _take_consumer(self, name: str, what: str, document: Mapping[str, Any] | None) -> ConsumerRow | None:
        if document is None:
            if what == "state":
                self._consumers.pop(name, None)
            return None
        before = self._consumers.get(name)
        if before is None:
            if len(self._consumers) >= MOST_CONSUMERS or len(name) > _NAME_CHARACTERS:
                return None
            before = ConsumerRow(printable(name), online=False, queue={})
        if what == "state":
            row = ConsumerRow(before.name, online=document.get("state") == "online", queue=before.queue)
        elif what == "queue":
            row = ConsumerRow(before.name, online=before.online, queue=document)
        else:
            return None
        self._consumers[name] = row
        return row


def _display_order(row: JobRow) -> tuple[bool, int, str, str]:
    return row.state != "processing", row.position or _LAST, row.created_at, row.job_id


def _document(payload: bytes) -> Mapping[str, Any] | None:
    try:
        document = json.loads(payload or b"null")
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _row(job_id: str, status: Mapping[str, Any]) -> JobRow:
    position = number(status.get("queue_position"))
    progress = number(status.get("progress"))
    return JobRow(
        job_id=job_id,
        state=status["status"],
        attempt=int(number(status.get("attempt")) or 0),
        position=None if position is None else int(position),
        progress=None if progress is None else min(1.0, max(0.0, progress)),
        duration_s=number(status.get("audio_duration")),
        speed=number(status.get("speed")),
        eta_s=number(status.get("eta")),
        created_at=str(status.get("created_at") or ""),
        ended_at=str(status.get("completed_at") or ""),
        note=_note(status),
    )


def _note(status: Mapping[str, Any]) -> str:
    metadata = status.get("metadata")
    file = metadata.get("file") if isinstance(metadata, Mapping) else None
    parts = (_priority(status), file if isinstance(file, str) else "", _outcome(status))
    return printable(": ".join(part for part in parts if part)[:_NOTE_CHARACTERS])


def _priority(status: Mapping[str, Any]) -> str:
    priority = number(status.get("priority"))
    return f"priority {priority:.0f}" if priority and status["status"] in ("processing", "queued") else ""


def _outcome(status: Mapping[str, Any]) -> str:
    if status["status"] in ("processing", "queued"):
        return ""
    code, message = status.get("error_code"), status.get("error_message")
    if code:
        return f"{code}: {message}"
    if status.get("no_speech"):
        return "(no speech)"
    return str(status.get("result_text") or "")
