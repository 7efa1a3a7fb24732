"""What the broker is told of a job: its files, an event, its status, in this order; for the publisher's thread.

Segments are for the worker's thread.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cesar_mqtt.consumer.transient_messages import TransientMessage
from cesar_mqtt.jobs import DeletedJob, Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol import formats
from cesar_mqtt.protocol.payloads import JobProgress, deletion_of, event_payload, segment_of, status_payload
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.protocol.truncate import truncate_response, truncate_segment
from cesar_mqtt.transcript import Segment

log = get_logger(__name__)

_PACKET_OVERHEAD = 64


class JobMessage(NamedTuple):
    """One message."""

    topic: str
    payload: bytes
    retain: bool = True


class JobMessages:
    """Puts jobs into messages. The last message of a job is its status: when that is acknowledged, all of them are.

    Attributes:
        max_packet_bytes: the largest packet that the broker takes; None: no limit is known.
    """

    def __init__(self, ledger: Ledger, topics: Topics, *, clock: Callable[[], float]) -> None:
        """Take where windows come from, where messages go, and seconds since the epoch."""
        self.max_packet_bytes: int | None = None
        self._cut_job: int | None = None
        self._ledger = ledger
        self._topics = topics
        self._clock = clock

    def of_job(self, job: Job, live: JobProgress | None, *, news: bool) -> list[JobMessage]:
        """Return what is told of a job: with `news`, the state is one that it has just come to.

        A completed job's files come first, so that they are there when its status says so; the event stands before the
        status that shows the same, for while that is not acknowledged both are said again.

        Raises:
            ValueError: it cannot be put into words, as from a ledger that was edited by hand.
        """
        told: list[JobMessage] = []
        truncated = False
        if job.formats and job.state is JobState.COMPLETED:
            told, truncated = self._files(job)
        if news:
            told.append(JobMessage(self._topics.events, event_payload(job, self._topics.consumer), retain=False))
        topic = self._topics.status(job.job_id)
        limit = self._limit_of(topic)
        payload = status_payload(job, self._topics.consumer, live, result_truncated=truncated, limit_bytes=limit)
        told.append(JobMessage(topic, payload))
        return told

    def _files(self, job: Job) -> tuple[list[JobMessage], bool]:
        segments = [segment for window in self._ledger.windows(job.seq) for segment in window.segments]
        content = formats.content_of(job, segments)
        files, truncated = [], False
        for name in job.formats:
            topic = self._topics.result(job.job_id, name)
            payload, cut = formats.render(name, content, limit_bytes=self._limit_of(topic))
            truncated |= cut
            files.append(JobMessage(topic, payload))
        return files, truncated

    def of_deletion(self, gone: DeletedJob) -> Iterator[JobMessage]:
        """Yield what makes the broker forget a deleted job: an empty retained message clears a topic."""
        if gone.event_pending:
            event = deletion_of(gone.job_id, self._topics.consumer, self._clock())
            yield JobMessage(self._topics.events, event.encode(), retain=False)
        yield from (JobMessage(self._topics.result(gone.job_id, name), b"") for name in gone.formats)
        if gone.owns_status:
            yield JobMessage(self._topics.status(gone.job_id), b"")

    def of_segment(self, job: Job, segment: Segment) -> TransientMessage:
        """Return what is told of a segment; for the worker's thread."""
        topic, message = self._topics.segments(job.job_id), segment_of(job.job_id, segment)
        payload, limit = message.encode(), self._limit_of(topic)
        if limit is not None and len(payload) > limit:
            payload = truncate_segment(message, limit)
            if self._cut_job != job.seq:
                self._cut_job = job.seq
                said = "Segments are told without their words, or cut: the broker takes %d bytes in a packet"
                log.warning(said, self.max_packet_bytes, action="segment_cut", job_id=job.job_id)
        return TransientMessage(topic, payload, keep=False)

    def of_note(self, note: TransientMessage) -> bytes:
        """Return what can be said of it in one message."""
        limit = self._limit_of(note.topic, len(note.correlation_data or b""))
        return note.payload if limit is None else truncate_response(note.payload, limit)

    def _limit_of(self, topic: str, more_bytes: int = 0) -> int | None:
        """Return how large a payload on this topic may be, with so many bytes of properties beside it."""
        limit = self.max_packet_bytes
        return None if limit is None else limit - len(topic.encode()) - more_bytes - _PACKET_OVERHEAD
