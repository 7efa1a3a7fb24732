"""The model of `watch`: jobs and consumers from their retained topics, bounded in number; for one thread.

Any client may publish on these topics: a payload that cannot be read is ignored.
"""

import heapq
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cesar_mqtt.cli.text import number, printable

MOST_JOBS = 2000
"""Beyond this, the jobs that would be shown last are dropped."""
MOST_CONSUMERS = 64

_NOTE_CHARACTERS = 200
_NAME_CHARACTERS = 64
_LAST = 1 << 60
_UPLOAD = "upload"
"""The audio source of a recording that came with its job."""
_STATES = ("processing", "queued", "completed", "error", "cancelled")


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job; None: not known yet. Durations are in seconds, times in RFC 3339."""

    job_id: str
    consumer: str
    state: str
    attempt: int
    position: int | None
    """As the consumer published it: up to date for the first ten only."""
    progress: float | None
    """Of the transcription, then of the diarization."""
    duration_s: float | None
    speed: float | None
    eta_s: float | None
    created_at: str
    ended_at: str
    name: str
    """The file's name or what the job names as its audio; empty: neither is known."""
    note: str
    """The priority of an open job, whether its speakers are told apart now; the beginning of the text, or the error."""

    @property
    def is_final(self) -> bool:
        return self.state not in ("processing", "queued")


@dataclass(frozen=True, slots=True)
class ConsumerRow:
    """One consumer; `queue` holds the fields of its retained `queue` message, which came at `received_at`."""

    name: str
    online: bool
    queue: Mapping[str, Any]
    received_at: float = 0.0

    @property
    def activity(self) -> str:
        return printable(str(self.queue.get("activity") or "online")) if self.online else "offline"

    def count(self, name: str) -> str:
        """Return a number of its `queue` message as text; empty if it is missing."""
        value = number(self.queue.get(name))
        return "" if value is None else f"{value:.0f}"

    def oldest_s(self, now: float) -> float | None:
        """Return how long the oldest job has been queued, `now` being on the board's clock; None: none is."""
        age_s = number(self.queue.get("oldest_age"))
        return None if age_s is None else age_s + (max(0.0, now - self.received_at) if self.online else 0.0)


@dataclass(frozen=True, slots=True)
class Rejection:
    """One message that was rejected, with its time in RFC 3339."""

    received_at: str
    text: str


class Board:
    """The newest state of each job and each consumer, and the newest rejection."""

    def __init__(self, prefix: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.rejected = 0
        """How many rejections were received."""
        self.rejection: Rejection | None = None
        self._rejections = f"{prefix}/rejected"
        self._statuses = f"{prefix}/status/"
        self._consumer_topics = f"{prefix}/consumer/"
        self._jobs: dict[str, JobRow] = {}
        self._consumers: dict[str, ConsumerRow] = {}

    def clear(self) -> None:
        """Remove everything: a new connection delivers it again, without what was deleted meanwhile."""
        self._jobs.clear()
        self._consumers.clear()

    def take(self, topic: str, payload: bytes) -> JobRow | ConsumerRow | Rejection | None:
        """Update from a message; return what it is about, None if that is nothing or no longer."""
        if topic == self._rejections:
            return self._take_rejection(_document(payload))
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
        rows = self._jobs.values()
        found = heapq.nsmallest(limit, (row for row in rows if row.state == "processing"), key=_display_order)
        found += self._queued(limit - len(found))
        ended = (row for row in rows if row.is_final)
        return found + heapq.nlargest(limit - len(found), ended, key=lambda row: (row.ended_at, row.job_id))

    def _queued(self, limit: int) -> list[JobRow]:
        """Return the first queued jobs, each with its place in the queue of its consumer.

        The places are counted here: behind the first ten, a status has the position at its last change.
        """
        queued = sorted((row for row in self._jobs.values() if row.state == "queued"), key=_display_order)
        places: dict[str, int] = {}
        placed = []
        for row in queued:
            places[row.consumer] = place = places.get(row.consumer, 0) + 1
            placed.append((place, row))
        return [replace(row, position=place) for place, row in heapq.nsmallest(limit, placed, key=lambda pair: pair[0])]

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
            row = replace(before, online=document.get("state") == "online")
        elif what == "queue":
            row = replace(before, queue=document, received_at=self.clock())
        else:
            return None
        self._consumers[name] = row
        return row

    def _take_rejection(self, document: Mapping[str, Any] | None) -> Rejection | None:
        if document is None:
            return None
        parts = (document.get("reason"), document.get("job_id") or document.get("topic"), document.get("detail"))
        text = printable(": ".join(str(part) for part in parts if part)[:_NOTE_CHARACTERS])
        self.rejected += 1
        self.rejection = Rejection(str(document.get("received_at") or ""), text)
        return self.rejection


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
    progress = number(status.get("diarization_progress" if _is_diarized(status) else "progress"))
    return JobRow(
        job_id=job_id,
        consumer=str(status.get("consumer") or ""),
        state=status["status"],
        attempt=int(number(status.get("attempt")) or 0),
        position=None if position is None else int(position),
        progress=None if progress is None else min(1.0, max(0.0, progress)),
        duration_s=number(status.get("audio_duration")),
        speed=number(status.get("speed")),
        eta_s=number(status.get("eta")),
        created_at=str(status.get("created_at") or ""),
        ended_at=str(status.get("completed_at") or ""),
        name=printable(_name(status)[:_NOTE_CHARACTERS]),
        note=_note(status),
    )


def _is_diarized(status: Mapping[str, Any]) -> bool:
    """Whether the text of a running job is known, and its speakers are told apart now."""
    return status["status"] == "processing" and number(status.get("diarization_progress")) is not None


def _name(status: Mapping[str, Any]) -> str:
    """Return the last part of the file's name, which came with the job, or of its path or URL."""
    metadata = status.get("metadata")
    file = metadata.get("file") if isinstance(metadata, Mapping) else None
    source = file if isinstance(file, str) else status.get("audio_source")
    if not isinstance(source, str) or source == _UPLOAD:
        return ""
    return source.rstrip("/").rpartition("/")[2] or source


def _note(status: Mapping[str, Any]) -> str:
    parts = (_priority(status), _outcome(status))
    return printable(": ".join(part for part in parts if part)[:_NOTE_CHARACTERS])


def _priority(status: Mapping[str, Any]) -> str:
    priority = number(status.get("priority"))
    return f"priority {priority:.0f}" if priority and status["status"] in ("processing", "queued") else ""


def _outcome(status: Mapping[str, Any]) -> str:
    if status["status"] in ("processing", "queued"):
        return "telling speakers apart" if _is_diarized(status) else ""
    code, message = status.get("error_code"), status.get("error_message")
    if code:
        return f"{code}: {message}"
    if status.get("no_speech"):
        return "(no speech)"
    return str(status.get("result_text") or "")
