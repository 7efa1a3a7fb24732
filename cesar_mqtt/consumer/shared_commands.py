"""Commands about jobs that wait in a queue that consumers share, and that no consumer's ledger holds.

Every consumer receives every command over MQTT and answers for the jobs in its ledger. For the others the thread
"admission" of one consumer answers: it gets each command in its turn, between the requests before and behind it.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

from pydantic_core import from_json

from cesar_mqtt.consumer.commands import RESPONSE_BYTES
from cesar_mqtt.consumer.incoming import IncomingMessage
from cesar_mqtt.consumer.publisher import Publisher
from cesar_mqtt.engines.messages import Message, Record
from cesar_mqtt.jobs import AudioSource, Claim, Job, JobState, NewJob
from cesar_mqtt.ledger.documents import job_document, job_from
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.commands import CURRENT, CancelledJobs, CommandResult, JobCommand, Response
from cesar_mqtt.protocol.parsing import parse_command
from cesar_mqtt.protocol.payloads import status_of
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.protocol.truncate import truncate_status

log = get_logger(__name__)

PAUSED_KEY = "group.paused"
"""The record that tells a consumer that joins whether the group is paused."""


class WaitingJobs(Protocol):
    """The jobs of the queue and their records. Each method may raise QueueUnavailableError."""

    def record(self, key: str) -> Record | None:
        """Return the record of a key."""

    def put_record(self, key: str, values: Mapping[str, Any]) -> None:
        """Write a record, whether there is one or not."""

    def update_record(self, key: str, record: Record, values: Mapping[str, Any]) -> Record | None:
        """Replace a record that has not changed; None: it has."""

    def delete_record(self, key: str) -> None:
        """Delete a record."""

    def job(self, job_id: str) -> Message | None:
        """Return the message of a job in the queue; None: there is none."""

    def job_behind(self, seq: int) -> Message | None:
        """Return the first message of the queue whose number is greater; None: there is none."""

    def remove(self, job_id: str) -> None:
        """Remove the message of a job."""

    def waiting(self) -> int:
        """Return how many jobs wait."""


def record_key(job_id: str) -> str:
    """Return the key of a job's record."""
    return f"job.{job_id}"


def waiting_job(job: NewJob, received_at: float, position: int | None, since: float | None = None) -> Job:
    """Return a job that waits in the queue as a ledger would have it, since when with this position."""
    return job_from(0, job_document(job, received_at, 0), position, since)


def request_payload(job: Job, audio: bytes | None) -> bytes:
    """Return a request that is read as this job, whose `audio` was uploaded, or is a path or URL."""
    request: dict[str, Any] = {
        **job.options,
        "job_id": job.job_id,
        "model_size": job.model_size,
        "metadata": dict(job.metadata),
        "formats": list(job.formats),
        "stream": job.stream,
    }
    if audio is not None:
        request["audio_base64"] = base64.b64encode(audio).decode()
    elif job.audio is not None:
        request["audio_url" if job.audio.kind == "url" else "audio_path"] = job.audio.name
    return json.dumps(request).encode()


class WaitingList:
    """What `list` shows of the queue. Any thread may call it; each method may raise QueueUnavailableError."""

    def __init__(self, queue: WaitingJobs, read: Callable[[Message], IncomingMessage]) -> None:
        self._queue = queue
        self._read = read

    def count(self) -> int:
        """Return how many jobs wait."""
        return self._queue.waiting()

    def jobs(self, after: str | None, limit: int) -> list[Job] | None:
        """Return the jobs behind one, at most so many, in their order; None: that one is not in the queue."""
        first = None if after is None else self._queue.job(after)
        if after is not None and first is None:
            return None
        found: list[Job] = []
        message = self._queue.job_behind(0 if first is None else first.seq)
        while message is not None and len(found) < limit:
            record, job = self._queue.record(record_key(message.job_id or "")), self._read(message).job
            if job is not None and record is not None and record.values.get("state") == JobState.QUEUED:
                found.append(waiting_job(job, message.received_at, record.values.get("position")))
            message = self._queue.job_behind(message.seq)
        return found


class SharedCommands:
    """Executes commands about waiting jobs; for the thread "admission". Repeated, a command changes nothing more."""

    def __init__(
        self,
        queue: WaitingJobs,
        read: Callable[[Message], IncomingMessage],
        *,
        ledger: Ledger,
        spool: Spool,
        publisher: Publisher,
        topics: Topics,
    ) -> None:
        """Jobs that are cancelled here become jobs of this consumer's ledger."""
        self._queue = queue
        self._read = read
        self._ledger = ledger
        self._spool = spool
        self._publisher = publisher
        self._topics = topics

    def handle(self, command: str, payload: bytes) -> None:
        """Execute a command, unless it is for a ledger, and publish the response.

        Raises:
            QueueUnavailableError: the server does not answer.
            LedgerError: the disk refuses.
        """
        parsed = parse_command(command, payload)
        request = parsed.command
        if request is None or parsed.consumer is not None:
            return
        outcome: Mapping[str, Any] | str | None = None
        if command in ("pause", "resume"):
            self._queue.put_record(PAUSED_KEY, {"paused": command == "pause"})
        elif command == "cancel_all":
            cancelled = sum(self._cancel(message) is not None for message in self._waiting())
            if cancelled:
                all_cancelled = CancelledJobs(cancelled=cancelled, processing=None, consumer=self._topics.consumer)
                outcome = all_cancelled.model_dump()
        elif isinstance(request, JobCommand) and request.job_id != CURRENT:
            outcome = self._about_job(command, request.job_id)
        if outcome is None:
            return
        if isinstance(outcome, str):
            data: dict[str, Any] = {"consumer": self._topics.consumer}
            response = Response(status="error", data=data, error=outcome, transaction=request.transaction)
        else:
            response = Response(status="ok", data=dict(outcome), error=None, transaction=request.transaction)
        self._publisher.publish_response(self._topics.response(command), response.encode())

    def _waiting(self) -> Iterator[Message]:
        message = self._queue.job_behind(0)
        while message is not None:
            yield message
            message = self._queue.job_behind(message.seq)

    def _about_job(self, command: str, job_id: str) -> Mapping[str, Any] | str | None:
        """Return the outcome; None: the consumer that has the job answers."""
        if self._ledger.get(job_id) is not None:
            return None
        record, message = self._queue.record(record_key(job_id)), self._queue.job(job_id)
        if record is None:
            return f"There is no job {job_id}: it never existed, or it was deleted."
        if message is None or "claim" in record.values:
            if message is not None and command == "cancel":
                self._mark_cancelling(record_key(job_id))
            return None
        if command == "get":
            return self._status(message)
        if command in ("cancel", "delete"):
            return self._end(command, message)
        return f"Job {job_id} is queued."

    def _mark_cancelling(self, key: str) -> None:
        """Have a claimed job cancelled by the consumer that takes it over, if the one that has it does not answer."""
        written = None
        while written is None:
            record = self._queue.record(key)
            if record is None or record.values.get("state") != JobState.PROCESSING:
                return
            written = self._queue.update_record(key, record, {**record.values, "cancelling": True})

    def _end(self, command: str, message: Message) -> Mapping[str, Any] | None:
        cancelled = self._cancel(message)
        if cancelled is None:
            return None
        if command == "cancel":
            return self._result(cancelled.job_id, JobState.CANCELLED.value)
        deleted = self._ledger.delete(cancelled.job_id)
        self._spool.remove(deleted[1] if deleted is not None else [])
        self._queue.delete_record(record_key(cancelled.job_id))
        return self._result(cancelled.job_id, "deleted")

    def _result(self, job_id: str, status: str) -> Mapping[str, Any]:
        return CommandResult(job_id=job_id, status=status, consumer=self._topics.consumer).model_dump()

    def _status(self, message: Message) -> Mapping[str, Any] | str:
        job = self._read(message).job
        if job is None:
            return f"Job {message.job_id} cannot be read: its request does not fit the settings any more."
        status = status_of(waiting_job(job, message.received_at, None), self._topics.consumer)
        return cast("dict[str, Any]", from_json(truncate_status(status, RESPONSE_BYTES)))

    def _cancel(self, message: Message) -> Job | None:
        """Cancel a waiting job; None: a consumer has claimed it."""
        job_id = message.job_id or ""
        key = record_key(job_id)
        written = None
        while written is None:
            record = self._queue.record(key)
            if record is None:
                return None
            if "claim" in record.values:
                self._mark_cancelling(key)
                return None
            values = {**record.values, "state": JobState.CANCELLED.value, "consumer": self._topics.consumer}
            written = self._queue.update_record(key, record, values)
        parsed = self._read(message)
        job = parsed.job or NewJob(job_id, "", None, "")
        if parsed.audio is not None:
            (name,) = self._spool.store([parsed.audio])
            job = replace(job, audio=AudioSource("spool", name))
        cancelled = self._ledger.append_cancelled(replace(job, failure=None, claim=Claim(message.seq, 0)))
        self._queue.remove(job_id)
        log.info("Job cancelled in the queue", action="cancel", job_id=job_id)
        return cancelled
