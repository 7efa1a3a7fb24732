"""What the page shows: jobs, consumers and rejections as the bus has them, and the log of their changes.

Any client with rights at the broker may publish there: what cannot be read is ignored, and everything is bounded. Only
the thread of the event loop uses a `Board`.
"""

import asyncio
import heapq
import itertools
import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from cesar_mqtt.jobs import STATES
from cesar_mqtt.json_codec import check_json
from cesar_mqtt.mqtt.messages import Delivery
from cesar_mqtt.protocol.consumer_payloads import Queue
from cesar_mqtt.protocol.topics import Topics, is_job_id

MOST_JOBS = 5000
"""Beyond this, the jobs that would be shown last are dropped."""
MOST_CONSUMERS = 64
MOST_REJECTIONS = 100
MOST_TEXT = 32_000_000
"""Characters of all transcripts together; those of the jobs that would be shown last are dropped beyond it."""
LOG_LENGTH = 5000
"""Changes that a client may be behind; one that is further behind gets everything anew."""

_MOST_WORDS = 20
"""Of a search; each is looked for in all transcripts."""
_EVENTS_AT_ONCE = 500
"""For one client, which then gets the next ones: a slow one does not hold the whole log in memory."""
_SNAPSHOT_S = 1.0
"""So old a snapshot may be, so that clients that come together share one; the changes since then follow it."""
_EXCERPT_CHARACTERS = 200
_SHOWN_CHARACTERS = 1000
_LAST = 1 << 60
_FINAL = frozenset({"completed", "error", "cancelled"})
_KINDS: Mapping[type, tuple[str, ...]] = {
    str: (
        *("job_id", "status", "created_at", "started_at", "completed_at", "updated_at", "audio_source", "model_size"),
        *("language", "task", "detected_language", "error_code", "error_message", "diarization_error", "consumer"),
    ),
    float: (
        *("attempt", "queue_position", "priority", "progress", "processed_duration", "audio_duration", "speed", "eta"),
        *("speakers", "diarization_progress"),
    ),
    bool: ("no_speech", "retryable", "result_truncated"),
    list: ("warnings", "formats"),
}
_LISTED = {name: kind for kind, names in _KINDS.items() for name in names}
"""The fields of a status that lists and events have, and what each of them is."""

_LARGE_NUMBER = re.compile(rb"[0-9][eE]\+?[0-9]{3}")
"""May be read as infinity, which is not JSON."""

Document = Mapping[str, Any]


@dataclass(slots=True)
class _Entry:
    status: Document
    listed: dict[str, Any]
    text: str
    """The transcript as it is searched."""
    connection: int
    """The number of the connection that has delivered it."""


@dataclass(slots=True)
class Consumer:
    """One consumer; `queue` and `info` hold the fields of its retained messages."""

    name: str
    online: bool = False
    queue: Document = field(default_factory=dict)
    info: Document = field(default_factory=dict)
    connection: int = 0
    """The number of the connection that has delivered the last of it."""

    def listed(self) -> dict[str, Any]:
        """Return what lists and events have of it."""
        return {
            "name": self.name,
            "online": self.online,
            "queue": self.queue,
            "version": _of_kind(str, _shown(self.info.get("version"))),
            "models": _of_kind(list, _shown(self.info.get("models"))),
            "default_model": _of_kind(str, _shown(self.info.get("default_model"))),
        }

    def limit(self, name: str) -> int | None:
        """Return one of the limits of its `info`; None: it is not known."""
        limits = self.info.get("limits")
        value = limits.get(name) if isinstance(limits, Mapping) else None
        return value if isinstance(value, int) else None


class Board:
    """The newest state of everything, and an event for each change.

    An event has a number that counts from 1; its id names the process as well, so that a client that comes back to
    another process gets everything anew.
    """

    def __init__(self, topics: Topics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._statuses = topics.status("")
        self._segments = topics.segments("")
        self._consumer_topics = f"{topics.prefix}/consumer/"
        self._rejected_topic = topics.rejected
        self._jobs: dict[str, _Entry] = {}
        self._text_size = 0
        self.consumers: dict[str, Consumer] = {}
        self.rejected: deque[Document] = deque(maxlen=MOST_REJECTIONS)
        self._broker: dict[str, Any] = {"connected": False, "problem": None}
        self._epoch = secrets.token_hex(4)
        self._log: deque[bytes] = deque(maxlen=LOG_LENGTH)
        self._number = 0
        self._snapshot: tuple[int, float, bytes] | None = None
        """The number of its last change, when it was made, and the event."""
        self._changed = asyncio.Event()
        self._followers: dict[str, set[asyncio.Queue[tuple[str, Document]]]] = {}

    # -- messages ------------------------------------------------------------------------------------------------------

    def take(self, delivery: Delivery) -> None:
        """Update from a message."""
        topic = delivery.topic
        if topic.startswith(self._statuses):
            self._take_status(topic.removeprefix(self._statuses), delivery)
        elif topic.startswith(self._consumer_topics):
            name, _, what = topic.removeprefix(self._consumer_topics).rpartition("/")
            self._take_consumer(name, what, delivery)
        elif topic == self._rejected_topic:
            self._take_rejection(delivery.payload)
        elif topic.startswith(self._segments):
            self._take_segment(topic.removeprefix(self._segments), delivery.payload)

    def _take_status(self, job_id: str, delivery: Delivery) -> None:
        if not is_job_id(job_id):
            return
        status = document_of(delivery.payload)
        state = None if status is None else status.get("status")
        if status is not None and isinstance(state, str) and state in STATES:
            self._store({**status, "job_id": job_id}, delivery.receipt.connection)
            self._notify(job_id, "status", status)
        elif not delivery.payload:
            self._remove_job(job_id)

    def _store(self, status: Document, connection: int) -> None:
        job_id = status["job_id"]
        before = self._jobs.get(job_id)
        text = status.get("result_text")
        entry = _Entry(status, _listed(status), text.casefold() if isinstance(text, str) else "", connection)
        self._jobs[job_id] = entry
        self._text_size += len(entry.text) - (len(before.text) if before else 0)
        if before is None or before.listed != entry.listed:
            self._append("job", entry.listed)
        if len(self._jobs) > MOST_JOBS + MOST_JOBS // 10 or self._text_size > MOST_TEXT + MOST_TEXT // 10:
            self._drop_last()

    def _drop_last(self) -> None:
        """Keep the bounds, with a tenth of slack, so that not every message sorts."""
        kept = self._ordered()
        for entry in kept[MOST_JOBS:]:
            self._remove_job(entry.listed["job_id"])
        for entry in reversed(kept[:MOST_JOBS]):
            if self._text_size <= MOST_TEXT:
                return
            self._text_size -= len(entry.text)
            entry.text = ""
            entry.status = {**entry.status, "result_text": None, "is_dropped": True}

    def _remove_job(self, job_id: str) -> None:
        entry = self._jobs.pop(job_id, None)
        if entry is not None:
            self._text_size -= len(entry.text)
            self._append("job_deleted", {"job_id": job_id})
        self._notify(job_id, "deleted", {})

    def _take_consumer(self, name: str, what: str, delivery: Delivery) -> None:
        if not is_job_id(name) or what not in {"state", "queue", "info"}:
            return
        document = document_of(delivery.payload)
        if document is None:
            if what == "state" and not delivery.payload and self.consumers.pop(name, None) is not None:
                self._append("consumer_removed", {"name": name})
            return
        consumer = self.consumers.get(name)
        if consumer is None:
            if len(self.consumers) >= MOST_CONSUMERS:
                return
            consumer = self.consumers[name] = Consumer(name)
        consumer.connection = delivery.receipt.connection
        if what == "state":
            consumer.online = document.get("state") == "online"
        elif what == "queue":
            consumer.queue = {name: _shown(value) for name, value in document.items() if name in Queue.model_fields}
        else:
            consumer.info = document
        self._append("consumer", consumer.listed())

    def _take_rejection(self, payload: bytes) -> None:
        document = document_of(payload)
        if document is None:
            return
        rejection = _rejection(document)
        self.rejected.appendleft(rejection)
        self._append("rejected", rejection)
        job_id = rejection["job_id"]
        if isinstance(job_id, str):
            self._notify(job_id, "rejected", rejection)

    def add_rejections(self, found: Sequence[Document]) -> None:
        """Add what a consumer remembers of the time before."""
        known = {json.dumps(each, sort_keys=True): each for each in (*self.rejected, *map(_rejection, found))}
        newest = sorted(known.values(), key=lambda each: str(each["received_at"]), reverse=True)[:MOST_REJECTIONS]
        if newest != list(self.rejected):
            self.rejected = deque(newest, maxlen=MOST_REJECTIONS)
            self._append("rejections", {"rejected": newest})

    def _take_segment(self, job_id: str, payload: bytes) -> None:
        if job_id in self._followers:
            document = document_of(payload)
            if document is not None:
                self._notify(job_id, "segment", document)

    # -- the connection to the broker ----------------------------------------------------------------------------------

    def set_broker(self, *, connected: bool, problem: str | None = None) -> None:
        """Show whether the bus can be reached."""
        state = {"connected": connected, "problem": problem}
        if state != self._broker:
            self._broker = state
            self._append("broker", state)

    @property
    def has_consumer(self) -> bool:
        """Whether any consumer is online."""
        return any(consumer.online for consumer in self.consumers.values())

    @property
    def is_connected(self) -> bool:
        return bool(self._broker["connected"])

    def remove_stale(self, connection: int) -> None:
        """Remove what this connection has not delivered: it was deleted while there was no connection."""
        for job_id in [job_id for job_id, entry in self._jobs.items() if entry.connection != connection]:
            self._remove_job(job_id)
        for name in [name for name, consumer in self.consumers.items() if consumer.connection != connection]:
            del self.consumers[name]
            self._append("consumer_removed", {"name": name})

    # -- queries -------------------------------------------------------------------------------------------------------

    def status(self, job_id: str) -> Document | None:
        """Return the status of a job as it was published; `is_dropped` marks one whose text is not kept here."""
        entry = self._jobs.get(job_id)
        return None if entry is None else entry.status

    def jobs(
        self, *, state: str | None = None, words: str = "", limit: int = MOST_JOBS, after: str | None = None
    ) -> tuple[list[dict[str, Any]], int]:
        """Return listed jobs, and how many match: the running, the queued in their order, then the newest.

        Args:
            state: only jobs in this state; None: all.
            words: only jobs whose transcript, file, source or id holds each of them; they get a `passage`.
            limit: how many at most.
            after: only those behind this job; None, or one that is unknown: from the first.
        """
        wanted = list(dict.fromkeys(words.casefold().split()))[:_MOST_WORDS]
        found = [
            entry
            for entry in self._ordered()
            if (state is None or entry.listed["status"] == state) and _has_words(entry, wanted)
        ]
        start = next((n + 1 for n, entry in enumerate(found) if entry.listed["job_id"] == after), 0)
        page = [
            {**entry.listed, "passage": _passage(entry, wanted)} if wanted else entry.listed
            for entry in found[start : start + limit]
        ]
        return page, len(found)

    def _ordered(self) -> list[_Entry]:
        ended = [entry for entry in self._jobs.values() if entry.listed["status"] in _FINAL]
        open_ones = [entry for entry in self._jobs.values() if entry.listed["status"] not in _FINAL]
        ended.sort(key=lambda entry: (str(entry.listed["completed_at"]), entry.listed["job_id"]), reverse=True)
        return heapq.nsmallest(len(open_ones), open_ones, key=_queue_order) + ended

    def snapshot(self) -> dict[str, Any]:
        """Return everything that a client shows."""
        return {
            "jobs": [entry.listed for entry in self._jobs.values()],
            "consumers": [consumer.listed() for consumer in self.consumers.values()],
            "rejected": list(self.rejected),
            "broker": self._broker,
        }

    # -- events --------------------------------------------------------------------------------------------------------

    def events_after(self, last_id: str | None) -> tuple[bytes, str]:
        """Return events that follow the one with this id, as a part of an event stream, and the id of the last of them.

        Where they are no longer known, that is one event `snapshot` with everything, a short while ago.
        """
        number = self._number_of(last_id)
        if number is None or number < self._number - len(self._log):
            number, made_at, snapshot = self._snapshot or (0, -_SNAPSHOT_S, b"")
            now = self._clock()
            if now - made_at >= _SNAPSHOT_S or self._number - number > len(self._log):
                number, snapshot = self._number, _event("snapshot", self._id(self._number), self.snapshot())
                self._snapshot = number, now, snapshot
            return snapshot, self._id(number)
        skipped = len(self._log) - (self._number - number)
        until = min(self._number, number + _EVENTS_AT_ONCE)
        return b"".join(itertools.islice(self._log, skipped, skipped + until - number)), self._id(until)

    async def wait_changed(self, last_id: str) -> None:
        """Wait for an event after the one with this id, or for `wake`."""
        if self._id(self._number) == last_id:
            await self._changed.wait()

    def wake(self) -> None:
        """End every `wait_changed`."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _append(self, kind: str, data: Document) -> None:
        self._number += 1
        self._log.append(_event(kind, self._id(self._number), data))
        self.wake()

    def _id(self, number: int) -> str:
        return f"{self._epoch}-{number}"

    def _number_of(self, event_id: str | None) -> int | None:
        epoch, _, number = (event_id or "").partition("-")
        if epoch != self._epoch or not (number.isascii() and number.isdigit()):
            return None
        return int(number) if int(number) <= self._number else None

    # -- following one job ---------------------------------------------------------------------------------------------

    @contextmanager
    def follow(self, job_id: str) -> Iterator[asyncio.Queue[tuple[str, Document]]]:
        """Yield a queue of what arrives about a job: `status`, `segment`, `rejected`, `deleted`, with the message."""
        messages: asyncio.Queue[tuple[str, Document]] = asyncio.Queue()
        self._followers.setdefault(job_id, set()).add(messages)
        try:
            yield messages
        finally:
            followers = self._followers[job_id]
            followers.discard(messages)
            if not followers:
                del self._followers[job_id]

    def _notify(self, job_id: str, kind: str, document: Document) -> None:
        for messages in self._followers.get(job_id, ()):
            messages.put_nowait((kind, document))


def document_of(payload: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a payload; None: there is none."""
    try:
        # Not `json`, which accepts NaN and lone surrogates, neither of which a browser reads.
        document = from_json(payload or b"null", allow_inf_nan=False)
        if _LARGE_NUMBER.search(payload):
            check_json(document)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _rejection(document: Document) -> dict[str, Any]:
    names = ("reason", "detail", "topic", "job_id", "payload_excerpt", "received_at")
    return {name: _shown(document.get(name)) for name in names}


def _listed(status: Document) -> dict[str, Any]:
    listed = {name: _of_kind(kind, _shown(status[name])) for name, kind in _LISTED.items() if name in status}
    listed.setdefault("completed_at", None)
    metadata = status.get("metadata")
    file = metadata.get("file") if isinstance(metadata, Mapping) else None
    listed["file"] = _shown(file) if isinstance(file, str) else None
    text = status.get("result_text")
    listed["excerpt"] = text[:_EXCERPT_CHARACTERS] if isinstance(text, str) else None
    return listed


def _of_kind(kind: type, value: Any) -> Any:
    """Return a value, or what stands for none: a page that reckons with another kind would stop at this one."""
    fits = type(value) in (int, float) if kind is float else isinstance(value, kind)
    return value if fits else [] if kind is list else None


def _shown(value: Any) -> Any:
    """Return a value without what would make a list long."""
    if isinstance(value, str):
        return value[:_SHOWN_CHARACTERS]
    if isinstance(value, list):
        return [_shown(each) for each in value[:_EXCERPT_CHARACTERS] if isinstance(each, str)]
    return value if value is None or isinstance(value, bool | int | float) else None


def _queue_order(entry: _Entry) -> tuple[bool, float, float, str, str]:
    listed = entry.listed
    position, priority = listed.get("queue_position"), listed.get("priority")
    return (
        listed["status"] != "processing",
        -priority if isinstance(priority, int | float) else 0,
        position if isinstance(position, int | float) else _LAST,
        str(listed.get("created_at")),
        listed["job_id"],
    )


def _has_words(entry: _Entry, words: Sequence[str]) -> bool:
    listed = entry.listed
    names = f"{listed['job_id']}\n{listed['file'] or ''}\n{listed.get('audio_source') or ''}".casefold()
    return all(word in names or word in entry.text for word in words)


def _passage(entry: _Entry, words: list[str]) -> str:
    """Return the part of the transcript around the first word that was searched for."""
    text = entry.status.get("result_text")
    if not isinstance(text, str):
        return ""
    at = min((place for place in map(entry.text.find, words) if place >= 0), default=0)
    start = max(0, at - _EXCERPT_CHARACTERS // 2)
    return ("…" if start else "") + text[start : start + _EXCERPT_CHARACTERS]


def _event(kind: str, event_id: str, data: Document) -> bytes:
    return f"event: {kind}\nid: {event_id}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode(errors="replace")
