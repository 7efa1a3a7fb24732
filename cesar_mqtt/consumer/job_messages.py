"""The messages of one job in order (results, event, status), and the transient messages that wait to be sent.

For the publisher's thread; `JobMessages.segment` for the worker's.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pydantic_core import to_json

from cesar_mqtt.jobs import DeletedJob, Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol import formats
from cesar_mqtt.protocol.payloads import JobProgress, deletion_of, event_of, segment_of, status_of
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.protocol.truncate import truncate_response, truncate_segment, truncate_status
from cesar_mqtt.transcript import Segment

log = get_logger(__name__)

MAX_TRANSIENT_MESSAGES = 10_000
MAX_TRANSIENT_BYTES = 16 << 20
"""The memory of the messages that wait while the broker is slow or away."""
_WARN_EVERY_S = 10.0
"""Between two warnings of dropped messages."""

_PACKET_OVERHEAD_BYTES = 64
"""Room for the fixed header, the packet id and the lengths of topic and properties."""


class JobMessage(NamedTuple):
    """A message about a job, to be published at QoS 1."""

    topic: str
    payload: bytes
    retain: bool = True


@dataclass(frozen=True, slots=True)
class TransientMessage:
    """A message that is not retained: only present subscribers receive it.

    Attributes:
        keep: whether it waits for a connection, and is sent again if the connection is lost before its PUBACK.
        retain: whether it is a status that is not in the ledger, which the broker retains after all.
        is_wanted: asked just before it is sent; if it returns False, the message is dropped.
        on_acknowledged: called at its PUBACK, by the publisher's thread.
    """

    topic: str
    payload: bytes
    keep: bool = True
    correlation_data: bytes | None = None
    retain: bool = False
    is_wanted: Callable[[], bool] | None = None
    on_acknowledged: Callable[[], None] | None = None

    @property
    def size_bytes(self) -> int:
        """About how much memory it uses."""
        return len(self.topic) + len(self.payload) + len(self.correlation_data or b"")


class JobMessages:
    """Builds the messages of jobs. The status is the last message of a job: its PUBACK stands for all of them.

    Attributes:
        max_packet_bytes: the largest packet that the broker accepts; None: no limit is known.
    """

    def __init__(
        self,
        ledger: Ledger,
        topics: Topics,
        *,
        clock: Callable[[], float],
        limit_bytes: Callable[[str], int | None] = lambda _topic: None,
    ) -> None:
        """Windows come from the ledger.

        Args:
            ledger: of the jobs.
            topics: of the consumer.
            clock: gives seconds since the epoch.
            limit_bytes: gives the limit of messages on a topic that the broker has not announced; None: none is known.
        """
        self._limit_bytes = limit_bytes
        self.max_packet_bytes: int | None = None
        self._truncated_job: int | None = None
        self._ledger = ledger
        self._topics = topics
        self._clock = clock

    def of_job(self, job: Job, progress: JobProgress | None, *, is_new: bool) -> list[JobMessage]:
        """Return the messages of a job; `is_new`: the state has just been entered, so there is an event, too.

        The results of a completed job come first, so that they are there when the status appears. The event precedes
        the status: until that is acknowledged, both are published again.

        Raises:
            ValueError: the job cannot be serialised, for example because the ledger was edited by hand.
        """
        messages: list[JobMessage] = []
        truncated = False
        if job.formats and job.state is JobState.COMPLETED:
            messages, truncated = self._results(job)
        if is_new:
            event = event_of(job, self._topics.consumer)
            messages.append(JobMessage(self._topics.events, to_json(event), retain=False))
        topic = self._topics.status(job.job_id)
        status = status_of(job, self._topics.consumer, progress, result_truncated=truncated)
        messages.append(JobMessage(topic, truncate_status(status, self._payload_limit(topic))))
        return messages

    def _results(self, job: Job) -> tuple[list[JobMessage], bool]:
        segments = [segment for window in self._ledger.windows(job.seq) for segment in window.segments]
        content = formats.content_of(job, segments)
        results, truncated = [], False
        for name in job.formats:
            topic = self._topics.result(job.job_id, name)
            payload, cut = formats.render(name, content, limit_bytes=self._payload_limit(topic))
            truncated |= cut
            results.append(JobMessage(topic, payload))
        return results, truncated

    def of_deletion(self, deleted: DeletedJob) -> Iterator[JobMessage]:
        """Yield the event of a deletion, if it is new, and the empty retained messages that clear the job's topics."""
        if deleted.event_pending:
            event = deletion_of(deleted.job_id, self._topics.consumer, self._clock())
            yield JobMessage(self._topics.events, to_json(event), retain=False)
        yield from (JobMessage(self._topics.result(deleted.job_id, name), b"") for name in deleted.formats)
        if deleted.owns_status:
            yield JobMessage(self._topics.status(deleted.job_id), b"")

    def segment(self, job: Job, segment: Segment) -> TransientMessage:
        """Return the message of one segment, for the worker's thread."""
        if not job.options.get("word_timestamps"):  # they were computed for subtitles only
            segment = replace(segment, words=None)
        topic, message = self._topics.segments(job.job_id), segment_of(job.job_id, segment)
        payload, limit = truncate_segment(message), self._payload_limit(topic)
        if limit is not None and len(payload) > limit:
            payload = truncate_segment(message, limit)
            if self._truncated_job != job.seq:
                self._truncated_job = job.seq
                warning = "Segments are published without words, or truncated: the broker accepts packets of %d bytes"
                log.warning(warning, limit + len(topic), action="segment_cut", job_id=job.job_id)
        return TransientMessage(topic, payload, keep=False)

    def fit(self, message: TransientMessage) -> bytes:
        """Return the payload of a transient message, truncated to the broker's limit."""
        limit = self._payload_limit(message.topic, len(message.correlation_data or b""))
        return message.payload if limit is None else truncate_response(message.payload, limit)

    def _payload_limit(self, topic: str, properties_bytes: int = 0) -> int | None:
        announced, other = self.max_packet_bytes, self._limit_bytes(topic)
        limit = announced if other is None else other if announced is None else min(announced, other)
        return None if limit is None else limit - len(topic.encode()) - properties_bytes - _PACKET_OVERHEAD_BYTES


class TransientMessages:
    """Transient messages in their order: at most 10,000 and 16 MiB, except that one always fits. The oldest go."""

    def __init__(self, *, monotonic: Callable[[], float]) -> None:
        """Start empty; `monotonic` is the clock, in seconds."""
        self._monotonic = monotonic
        self._waiting: deque[TransientMessage] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._warn_at = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> TransientMessage:
        """The next message to send; there has to be one."""
        return self._waiting[0]

    def add(self, message: TransientMessage) -> None:
        self._waiting.append(message)
        self._waiting_bytes += message.size_bytes
        while len(self) > MAX_TRANSIENT_MESSAGES or (self._waiting_bytes > MAX_TRANSIENT_BYTES and len(self) > 1):
            self.remove_first()
            self._dropped += 1

    def remove_first(self) -> None:
        self._waiting_bytes -= self._waiting.popleft().size_bytes

    def move_to_end(self) -> None:
        """Enqueue the next message behind all others."""
        self._waiting.rotate(-1)

    def on_disconnected(self, lost: Iterable[TransientMessage]) -> None:
        """Enqueue the lost messages, which were in flight, before all others; drop those that are not to be kept."""
        messages = (*lost, *self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        for message in messages:
            if message.keep:
                self.add(message)

    def warn_of_drops(self) -> None:
        """Log how many messages were dropped, at most once in 10 s."""
        if self._dropped and self._monotonic() >= self._warn_at:
            warning = "Send buffer full: dropped the %d oldest responses, rejections and segments"
            log.warning(warning, self._dropped, action="notes_dropped")
            self._dropped = 0
            self._warn_at = self._monotonic() + _WARN_EVERY_S
