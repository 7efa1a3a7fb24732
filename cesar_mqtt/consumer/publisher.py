"""The publisher: brings the broker's retained messages into agreement with the ledger, however long that takes.

Its thread, `publisher`, is the only one that publishes. Any thread may call the other methods; they never wait for the
network. The callbacks of the client, `on_connected`, `on_disconnected` and `on_published`, do not wait for the disk
either.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from cesar_mqtt.consumer.discovery_schedule import DiscoverySchedule
from cesar_mqtt.consumer.events import JobObserver
from cesar_mqtt.consumer.job_messages import JobMessage, JobMessages, TransientMessage, TransientMessages
from cesar_mqtt.consumer.own_topics import ActivityTracker, OwnTopics
from cesar_mqtt.consumer.quarantine import Quarantine, Sent, Unit
from cesar_mqtt.consumer.retained_check import Loss, RetainedCheck, UnprovenJobs
from cesar_mqtt.jobs import Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.queue import POSITIONS_TRACKED
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, CannotPublishError, PacketTooLargeError, Refusal
from cesar_mqtt.protocol.consumer_payloads import (
    Activity,
    ConsumerState,
    Quarantined,
    last_error_of,
    last_of,
    queue_of,
    totals_of,
)
from cesar_mqtt.protocol.fields import Payload
from cesar_mqtt.protocol.payloads import JobProgress, Rejection
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.threads import StoppableThread
from cesar_mqtt.transcript import Segment

log = get_logger(__name__)

MAX_IN_FLIGHT = 200
"""No further message is taken while so many are unacknowledged, which keeps the client's own queue short.

A batch of jobs with results in several formats may exceed it by the results.
"""

_WAKE_AFTER_ACKS = 20
"""In a burst the thread handles this many acknowledgements at once: waking it for each costs more than all the rest."""
_MIN_INTERVAL_S = 1.0
"""Between two queue messages, and between two progress statuses of a job."""
_POSITIONS_QUIET_S = 2.0
_MOVES = 10
"""Each finished job moves the first ten of the queue. In a longer queue their statuses are published if it has not
moved for 2 s, at each end of a longer job; else at every tenth move, which is one status for each finished job."""


class StatusAck(NamedTuple):
    """Awaited for the status of a job."""

    seq: int
    number: int
    """For `Ledger.mark_published`; 0: the status shows progress only, which the ledger does not wait for."""

    @property
    def unit(self) -> Unit:
        return "status", self.seq


class ClearAck(NamedTuple):
    """Awaited for the last retained topic of a deleted job that is cleared."""

    seq: int

    @property
    def unit(self) -> Unit:
        return "clear", self.seq


class OwnTopicAck(NamedTuple):
    """Awaited for one of the consumer's own topics."""

    name: str
    version: int

    @property
    def unit(self) -> Unit:
        return "own", self.name


class TransientAck(NamedTuple):
    """Awaited for a transient message."""

    message: TransientMessage

    @property
    def unit(self) -> Unit:
        return "transient", self.message.topic


PendingAck = StatusAck | ClearAck | OwnTopicAck | TransientAck
"""What the PUBACK of a unit's last message stands for: of the messages of one state or deletion of a job, or of another
message. Brokers acknowledge in the order in which they receive (MQTT 5, section 4.6), so it stands for all of them."""


class Permit(Enum):
    """Whether the status of a job may be published."""

    PUBLISH = "publish"
    SKIP = "skip"
    """It need not be: it counts as published."""
    HOLD = "hold"
    """Not now, and perhaps never: another consumer may have the job."""


class _InFlight(NamedTuple):
    """A message in flight; `ack` is that of its unit."""

    ack: PendingAck
    topic: str
    size_bytes: int
    is_last: bool


class Connection(Protocol):
    """The part of the MQTT client that the publisher uses."""

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        correlation_data: bytes | None = None,
        alone: bool = False,
    ) -> Hashable | None:
        """Send a message at QoS 1 and return its ticket; None when not connected. Raises CannotPublishError.

        `alone`: not while another message is in flight.
        """


class Publisher(StoppableThread, JobObserver):
    """Publishes what the ledger's outbox holds, and the consumer's own topics.

    For each job it publishes the newest status that the broker has not acknowledged; states that a job passed through
    while the client was offline are not published. At the PUBACK the ledger marks the status as published. After a
    reconnect everything unacknowledged is published again; when the broker has lost the session, everything is. A
    message at which the broker closes the connection is kept apart, see `Quarantine`.

    Attributes:
        permit_of: whether a job is this consumer's to publish; set it before the threads start, as the others.
        waiting: how many jobs wait in a queue that consumers share, beside those of the ledger.
        on_status_acknowledged: called when statuses of jobs were acknowledged.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: Ledger,
        topics: Topics,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("publisher")
        self._connection = connection
        self._ledger = ledger
        self._topics = topics
        self._clock = clock
        self._monotonic = monotonic
        self._has_work = threading.Event()
        self._events: deque[Callable[[], None]] = deque()
        self._connected = False
        self._in_flight: dict[Hashable, _InFlight] = {}
        """By the tickets of the client."""
        self._statuses_in_flight: dict[int, int] = {}
        self._clears_in_flight: dict[int, int] = {}
        """How many new states of each job are in flight, and whether its deletion is."""
        self._acknowledged: deque[tuple[Hashable, Refusal | None]] = deque()
        self._quarantine = Quarantine(monotonic=monotonic)
        self._repeated: set[Unit] = set()
        """Units of which a message was refused for its size: they are published again, cut further."""
        self._lost: list[tuple[int, int]] = []
        """The changes of jobs whose events were lost with the last connection."""
        self._status_refused = False
        """Whether the broker has refused the status of a job: at the next connection it may accept it."""
        self._job_messages = JobMessages(ledger, topics, clock=clock, limit_bytes=self._quarantine.limit_bytes)
        self._own_topics = OwnTopics()
        self._retained_check = RetainedCheck(totals_of(ledger.totals()))
        self._unproven = UnprovenJobs()
        self._discovery = DiscoverySchedule(self._own_topics, monotonic=monotonic)
        self._transient_messages = TransientMessages(monotonic=monotonic)
        self._activity = ActivityTracker()
        self._last: dict[JobState, Job] = {}
        """The last completed job, and the last one that failed."""
        self._finished: dict[JobState, list[Job]] = {}
        """Those that come after them: of each state the first and the newest whose status the broker does not have."""
        self._progress: tuple[Job, JobProgress] | None = None
        self._progress_is_stale = False
        self._progress_due = 0.0
        self._queue_is_stale = True
        self._queue_due = 0.0
        self.permit_of: Callable[[Job], Permit] = lambda _job: Permit.PUBLISH
        self.waiting: Callable[[], int] = lambda: 0
        self.on_status_acknowledged: Callable[[], None] = lambda: None
        self._moves = self._moves_published = 0
        self._moved_at = -math.inf
        self._drained = threading.Condition()
        self._drains_requested = self._drains_completed = 0
        ledger.observe(self._on_ledger_changed)

    # -- callbacks of the client, on the network thread ----------------------------------------------------------------

    def on_connected(self, *, session_present: bool, max_packet_bytes: int | None) -> None:
        self._post(lambda: self._start_connection(session_present=session_present, max_packet_bytes=max_packet_bytes))

    def on_disconnected(self, unacknowledged: Collection[Hashable] = (), *, is_stalled: bool = False) -> None:
        """Handle the loss of the connection; these tickets had been sent and not acknowledged.

        `is_stalled`: the client has ended it, because the broker acknowledged them no more.
        """
        self._post(lambda: self._end_connection(unacknowledged, is_stalled=is_stalled))

    def on_published(self, ticket: Hashable, refusal: Refusal | None = None) -> None:
        """Handle a PUBACK, which may be a refusal."""
        self._acknowledged.append((ticket, refusal))
        enough = len(self._acknowledged) >= min(_WAKE_AFTER_ACKS, len(self._in_flight))
        if enough and not self._has_work.is_set():
            self._has_work.set()

    # -- any thread ----------------------------------------------------------------------------------------------------

    def on_rejected(self, rejection: Rejection) -> None:
        """Publish a rejection; while offline the newest are kept in memory, see `TransientMessages`.

        May wait for a thread that is writing to the ledger, so not for the network thread.
        """
        self._ledger.count_rejected()
        self._enqueue(TransientMessage(self._topics.rejected, rejection.encode()))

    def publish_response(self, topic: str, payload: bytes, *, correlation_data: bytes | None = None) -> None:
        """Publish the response to a request; while offline it is kept like a rejection."""
        self._enqueue(TransientMessage(topic, payload, correlation_data=correlation_data))

    def publish_status_of(
        self, job: Job, *, is_wanted: Callable[[], bool], on_acknowledged: Callable[[], None], is_new: bool = True
    ) -> None:
        """Publish the status of a job that is not in the ledger, and if it `is_new` the event before it."""
        *others, status = self._job_messages.of_job(job, None, is_new=is_new)
        for topic, payload, retain in others:
            self._enqueue(TransientMessage(topic, payload, retain=retain, is_wanted=is_wanted))
        self._enqueue(
            TransientMessage(
                status.topic, status.payload, retain=True, is_wanted=is_wanted, on_acknowledged=on_acknowledged
            )
        )

    def publish_again(
        self, topic: str, payload: bytes, *, is_wanted: Callable[[], bool], on_acknowledged: Callable[[], None]
    ) -> None:
        """Publish a message again that the broker retains."""
        self._enqueue(
            TransientMessage(topic, payload, retain=True, is_wanted=is_wanted, on_acknowledged=on_acknowledged)
        )

    def refresh_queue(self) -> None:
        """Publish the consumer's queue message again: the shared queue has changed."""
        self._on_ledger_changed()

    def on_segment(self, job: Job, segment: Segment) -> None:
        """Publish a segment; it is dropped while offline."""
        self._enqueue(self._job_messages.segment(job, segment))

    def publish_state(self, state: Literal["online", "offline"]) -> None:
        """Publish the consumer's state at this and every later connection."""
        self._post(lambda: self._own_topics.retain("state", ConsumerState(state=state).encode()))

    def publish_own_topic(self, name: str, message: Payload) -> None:
        """Publish the consumer's own topic `name`, such as `health`."""
        self._post(lambda: self._own_topics.retain(name, message.encode()))

    def announce(self, messages: Mapping[str, bytes], *, stale: Iterable[str] = ()) -> None:
        """Publish discovery messages, by topic, at this and every later connection, and clear the stale topics."""
        self._post(lambda: self._discovery.announce(messages, stale=stale))

    def on_home_assistant_started(self) -> None:
        """Publish the discovery messages again: Home Assistant has started."""
        self._post(self._discovery.on_birth_message)

    def on_activity_changed(self, activity: Activity) -> None:
        """Publish what the worker is doing."""
        self._post(lambda: self._set_activity(activity))

    def on_degraded(self, thread: str, *, on: bool) -> None:
        """Record whether the disk refuses the writes of a thread; while it does, the activity is `degraded`.

        Each name is for one thread.
        """
        if self._activity.set_degraded(thread, on=on):
            self._on_ledger_changed()

    def set_draining(self) -> None:
        """Publish that no further job is started."""
        self._post(self._set_draining)

    def on_progress(self, job: Job, progress: JobProgress) -> None:
        """Publish the progress of a running job, at most once a second."""
        self._post(lambda: self._set_progress(job, progress))

    def progress_of(self, job: Job) -> JobProgress | None:
        """Return the progress of a running job; None: it is not known."""
        of, progress = self._progress or (None, None)
        return progress if of is not None and (of.seq, of.attempt) == (job.seq, job.attempt) else None

    def on_queue_message_received(self, payload: bytes | None) -> None:
        """Check the queue message that arrived from the broker after the connection was made.

        None: it was not retained, but our own, newest one; so the broker retained none before. See `RetainedCheck`.
        """
        self._post(lambda: self._check_retained(payload))

    def on_finished(self, job: Job) -> None:
        """Publish the job that was completed, or has failed, last, once the broker has its event and its status."""
        self._post(lambda: self._set_finished(job))

    @property
    def in_flight(self) -> int:
        """How many messages the broker has not acknowledged yet."""
        return len(self._in_flight)

    def quarantined(self) -> list[Quarantined]:
        """Return the messages that the broker does not accept."""
        return self._quarantine.report()

    def drain(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged everything; False: not in time."""
        with self._drained:
            self._drains_requested += 1
            mine = self._drains_requested
            self._has_work.set()
            return self._drained.wait_for(lambda: self._drains_completed >= mine, timeout_s)

    def _enqueue(self, message: TransientMessage) -> None:
        self._post(lambda: self._transient_messages.add(message) if message.keep or self._connected else None)

    def _post(self, event: Callable[[], None]) -> None:
        """Have the publisher's thread call `event`."""
        self._events.append(event)
        self._has_work.set()

    def _on_ledger_changed(self) -> None:
        self._queue_is_stale = True
        self._has_work.set()

    def _wake(self) -> None:
        self._has_work.set()

    # -- the publisher's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._has_work.clear()
            if self._stopping.is_set():  # read after `clear`, so that the wake-up of a stop is never lost
                return
            self._has_work.wait(self.run_once())

    def run_once(self) -> float | None:
        """Publish all that can be published now.

        Returns:
            Seconds after which something is due even if no event arrives; None: nothing is.
        """
        requested = self._drains_requested
        self._handle_acknowledgements()
        while self._events:
            self._events.popleft()()
        self._transient_messages.warn_of_drops()
        if not self._connected:
            return None
        self._set_last()
        self._republish_positions()
        self._publish_all(without=self._quarantine.last_units())
        if self._room > 0 and self._quarantine.last_units():
            self._publish_all(without=self._quarantine.skipped_units())
        if self._is_drained():
            with self._drained:
                self._drains_completed = requested
                self._drained.notify_all()
        return self._next_due_s()

    def _publish_all(self, *, without: Collection[Unit]) -> None:
        """Publish everything but these units."""
        self._publish_own_topics(without)
        self._publish_transient_messages(without)
        self._clear_deleted_jobs(without)
        self._publish_statuses(without)
        self._publish_progress(without)

    def _is_drained(self) -> bool:
        """Whether the broker has acknowledged everything but what is skipped."""
        skipped = _in_units("own", self._quarantine.skipped_units())
        return self._jobs_are_drained() and not self._queue_is_stale and self._own_topics.is_acknowledged(skipped)

    def _jobs_are_drained(self) -> bool:
        if self._in_flight or self._transient_messages:
            return False
        skipped = self._quarantine.skipped_units()
        return not self._ledger.has_unpublished_besides(_in_units("status", skipped), _in_units("clear", skipped))

    def _next_due_s(self) -> float | None:
        now = self._monotonic()
        waits = [self._queue_due - now] if self._queue_is_stale else []
        if self._moves != self._moves_published:
            waits.append(self._moved_at + _POSITIONS_QUIET_S - now)
        if self._progress_is_stale and self._room > 0:  # without room the next PUBACK wakes the thread
            waits.append(self._progress_due - now)
        waits += self._discovery.waits_s()
        waits += self._quarantine.waits_s()
        return max(0.0, min(waits)) if waits else None

    # -- events --------------------------------------------------------------------------------------------------------

    def _start_connection(self, *, session_present: bool, max_packet_bytes: int | None) -> None:
        self._end_connection()
        self._connected = True
        self._ledger.coalesce(self._lost)
        self._lost.clear()
        self._job_messages.max_packet_bytes = max_packet_bytes
        retained = self._own_topics.retained("queue")
        unknown = self._retained_check.on_connected(retained, session_present=session_present)
        self._unproven.on_connected()
        self._own_topics.republish("state")
        self._discovery.on_connected()
        if not session_present:
            self._own_topics.republish()
        if unknown or self._status_refused or not session_present:
            reason = (
                "new session" if not session_present else "a status was refused" if self._status_refused else "unknown"
            )
            log.debug("Every status is published again: %s", reason, action="republishing")
            self._ledger.republish_all(restored=self._status_refused)
            self._status_refused = False

    def _end_connection(self, unacknowledged: Collection[Hashable] = (), *, is_stalled: bool = False) -> None:
        self._connected = False
        sent = [self._sent(self._in_flight[ticket]) for ticket in unacknowledged if ticket in self._in_flight]
        self._quarantine.on_disconnected(sent, is_stalled=is_stalled)
        for message in self._in_flight.values():
            if isinstance(message.ack, StatusAck) and message.topic == self._topics.events:
                self._lost.append((message.ack.seq, message.ack.number))
        acks = [message.ack for message in self._in_flight.values()]
        lost = [ack.message for ack in acks if isinstance(ack, TransientAck)]
        self._in_flight.clear()
        self._statuses_in_flight.clear()
        self._clears_in_flight.clear()
        self._repeated.clear()
        self._transient_messages.on_disconnected(lost)
        self._own_topics.on_disconnected()

    def _check_retained(self, payload: bytes | None) -> None:
        loss = self._retained_check.compare(payload, self._own_topics.retained("queue"))
        if loss is None:
            if payload is not None:
                self._ledger.republish(self._unproven.take_doubtful())
            return
        message = "The broker has lost retained messages: all are published again"
        log.warning(message, action="broker_went_back")
        self._own_topics.republish()
        if loss is Loss.NEWEST:
            self._own_topics.forget_retained()
        self._ledger.republish_all(restored=loss is Loss.NEWEST)

    def _handle_acknowledgements(self) -> None:
        acks: list[PendingAck] = []
        while self._acknowledged:
            ticket, refusal = self._acknowledged.popleft()
            message = self._in_flight.pop(ticket, None)
            if message is None:  # of an earlier connection
                continue
            if refusal is None:
                self._quarantine.on_accepted(message.topic, message.size_bytes)
            else:
                self._handle_refusal(message, refusal)
            if message.is_last:
                self._count_in_flight(message.ack, -1)
                if not self._is_repeated(message.ack):
                    acks.append(message.ack)
        self._complete(acks)

    def _handle_refusal(self, message: _InFlight, refusal: Refusal) -> None:
        if self._quarantine.on_refused(self._sent(message), is_too_large=refusal.is_too_large):
            self._repeated.add(message.ack.unit)
        else:
            self._status_refused |= isinstance(message.ack, StatusAck | ClearAck)

    def _is_repeated(self, ack: PendingAck) -> bool:
        """Whether a message of a unit, whose last one is acknowledged now, was too large: it is published again."""
        if not self._repeated or ack.unit not in self._repeated:
            return False
        self._repeated.discard(ack.unit)
        if isinstance(ack, TransientAck):
            self._transient_messages.add(ack.message)
        return True

    def _complete(self, acks: Iterable[PendingAck]) -> None:
        """Record that the broker has these messages, or that they are given up."""
        published: list[tuple[int, int]] = []
        for ack in acks:
            match ack:
                case StatusAck(seq, number) if number:
                    published.append((seq, number))
                    self._unproven.add(seq)
                case ClearAck(seq):
                    self._ledger.mark_cleared(seq)
                    self._unproven.add(seq)
                case OwnTopicAck(name, version):
                    self._own_topics.acknowledge(name, version)
                    if name == "queue":
                        self._unproven.on_queue_acknowledged(version)
                case TransientAck(message) if message.on_acknowledged is not None:
                    message.on_acknowledged()
                case _:  # a status with progress, another transient message
                    pass
        if published:
            self._ledger.mark_published(published)
            self.on_status_acknowledged()

    def _set_activity(self, activity: Activity) -> None:
        self._activity.worker = activity
        self._queue_is_stale = True

    def _set_draining(self) -> None:
        self._activity.draining = True
        self._queue_is_stale = True

    def _set_finished(self, job: Job) -> None:
        if job.state in (JobState.COMPLETED, JobState.ERROR):
            self._finished.setdefault(job.state, [])[1:] = [job]

    def _set_last(self) -> None:
        """Have the newest finished jobs retained whose statuses the broker has, or does not accept."""
        for job in [job for jobs in self._finished.values() for job in jobs]:
            if self._ledger.is_unpublished(job.seq) and ("status", job.seq) not in self._quarantine.skipped_units():
                continue
            waiting = self._finished[job.state]
            del waiting[: waiting.index(job) + 1]
            kept = self._ledger.get(job.job_id)
            if kept is not None and kept.seq == job.seq:  # else it was deleted meanwhile
                self._last[job.state] = job
                self._retain_last(job)

    def _retain_last(self, job: Job) -> None:
        if job.state is JobState.COMPLETED:
            self._own_topics.retain("last", last_of(job).encode())
        else:
            self._own_topics.retain("last_error", last_error_of(job).encode())

    def _forget_last(self, seq: int) -> None:
        """Publish no text and no message of a job any more, which was deleted."""
        for job in self._last.values():
            if job.seq == seq and job.state is JobState.COMPLETED:
                self._retain_last(job._replace(result_text=None))
            elif job.seq == seq and job.state is JobState.ERROR:
                self._own_topics.retain("last_error", b"")

    def _set_progress(self, job: Job, progress: JobProgress) -> None:
        self._progress = (job, progress)
        self._progress_is_stale = self._queue_is_stale = True

    # -- publishing ----------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        """How many more messages may be in flight."""
        return MAX_IN_FLIGHT - len(self._in_flight) if self._connected else 0

    def _publish(
        self,
        topic: str,
        payload: bytes,
        ack: PendingAck,
        *,
        retain: bool = True,
        correlation_data: bytes | None = None,
        is_last: bool = True,
    ) -> bool:
        """Pass a message to the client; False: not connected. A message that the broker does not accept is given up."""
        size_bytes = len(topic) + len(payload)
        if self._quarantine.is_skipped(topic, size_bytes):
            if is_last:
                self._complete([ack])
            return True
        alone = self._quarantine.is_sent_alone(topic)
        try:
            ticket = self._connection.publish(
                topic, payload, retain=retain, correlation_data=correlation_data, alone=alone
            )
        except CannotPublishError as exc:
            known_bytes = self._job_messages.max_packet_bytes or MAX_PACKET_BYTES
            if isinstance(exc, PacketTooLargeError) and exc.limit_bytes < known_bytes:
                return False  # the limit of a new connection, whose `on_connected` is still to be handled
            log.error("The message on %s cannot be published and is skipped: %s", topic, exc, action="unpublished")
            if is_last:
                self._complete([ack])
            return True
        if ticket is None:
            self._connected = False
            return False
        self._in_flight[ticket] = _InFlight(ack, topic, size_bytes, is_last)
        if is_last:
            self._count_in_flight(ack, 1)
        return True

    def _sent(self, message: _InFlight) -> Sent:
        ack, topic = message.ack, message.topic
        can_be_cut = not isinstance(ack, OwnTopicAck) and topic != self._topics.events
        return Sent(topic, message.size_bytes, ack.unit, is_last=message.is_last, can_be_cut=can_be_cut)

    def _count_in_flight(self, ack: PendingAck, change: int) -> None:
        if isinstance(ack, StatusAck):
            if not ack.number:
                return
            counts = self._statuses_in_flight
        elif isinstance(ack, ClearAck):
            counts = self._clears_in_flight
        else:
            return
        count = counts.pop(ack.seq, 0) + change
        if count:
            counts[ack.seq] = count

    def _publish_in_order(self, messages: Iterable[JobMessage], ack: PendingAck) -> bool:
        """Publish messages that belong together; the PUBACK of the last one stands for all."""
        *others, last = messages
        for topic, payload, retain in others:
            if not self._publish(topic, payload, ack, retain=retain, is_last=False):
                return False
        return self._publish(last.topic, last.payload, ack, retain=last.retain)

    def _publish_own_topics(self, without: Collection[Unit]) -> None:
        if self._queue_is_stale and (self._monotonic() >= self._queue_due or self._only_queue_is_undrained()):
            self._queue_is_stale = False
            self._queue_due = self._monotonic() + _MIN_INTERVAL_S
            totals = self._ledger.totals()
            totals = replace(totals, queued=totals.queued + self.waiting())
            running = None if totals.processing is None else self._ledger.get(totals.processing)
            progress = None if running is None else self.progress_of(running)
            queue = queue_of(totals, self._activity.current(totals), self._clock(), running, progress)
            self._own_topics.retain("queue", queue.encode())
        self._discovery.run_once()
        for name, payload, version in self._own_topics.take_due(without=_in_units("own", without)):
            topic = name if "/" in name else self._topics.own(name)
            if name == "queue":
                self._unproven.on_queue_published(version)
            self._publish(topic, payload, OwnTopicAck(name, version))

    def _republish_positions(self) -> None:
        """Enqueue the statuses of the jobs that have moved in the queue, if it is time."""
        moves = self._ledger.moves
        if moves == self._moves_published:
            return
        now = self._monotonic()
        is_quiet = now >= self._moved_at + _POSITIONS_QUIET_S
        if moves != self._moves:
            self._moves, self._moved_at = moves, now
        is_short = self._ledger.totals().queued <= POSITIONS_TRACKED
        if is_short or is_quiet or moves - self._moves_published >= _MOVES or self._is_draining:
            self._ledger.republish_moved()
            self._moves_published = moves

    @property
    def _is_draining(self) -> bool:
        return self._drains_requested > self._drains_completed

    def _only_queue_is_undrained(self) -> bool:
        """Whether a drain waits for nothing else: the queue message is then the last one, and need not wait."""
        return self._is_draining and self._jobs_are_drained()

    def _publish_transient_messages(self, without: Collection[Unit]) -> None:
        for _ in range(len(self._transient_messages)):
            if self._room <= 0:
                return
            message = self._transient_messages.first
            if message.is_wanted is not None and not message.is_wanted():
                self._transient_messages.remove_first()
                continue
            payload, data = self._job_messages.fit(message), message.correlation_data
            size_bytes = len(message.topic) + len(payload)
            if ("transient", message.topic) in without and not self._quarantine.is_skipped(message.topic, size_bytes):
                self._transient_messages.move_to_end()
                continue
            ack, retain = TransientAck(message), message.retain
            if not self._publish(message.topic, payload, ack, retain=retain, correlation_data=data):
                return
            self._transient_messages.remove_first()

    def _clear_deleted_jobs(self, without: Collection[Unit]) -> None:
        """Clear the retained topics of deleted jobs."""
        if self._room <= 0:
            return
        exclude = self._clears_in_flight.keys() | _in_units("clear", without)
        for deleted in self._ledger.pending_clears(self._room, exclude=exclude):
            self._forget_last(deleted.seq)
            if not self._publish_in_order(self._job_messages.of_deletion(deleted), ClearAck(deleted.seq)):
                return

    def _publish_statuses(self, without: Collection[Unit]) -> None:
        if self._room <= 0:
            return
        # Most jobs take two messages, the event of the change and the status.
        exclude = self._statuses_in_flight.keys() | _in_units("status", without)
        for number, job in self._ledger.unpublished((self._room + 1) // 2, exclude=exclude):
            # A state that the job has passed through is returned although the job is excluded.
            only_event = ("status", job.seq) in without
            if not self._publish_status(job, number, only_event=only_event):
                return

    def _publish_progress(self, without: Collection[Unit]) -> None:
        if self._progress is None or not self._progress_is_stale or self._room <= 0:
            return
        if self._monotonic() < self._progress_due:
            return
        self._progress_is_stale = False
        of, _ = self._progress
        job = self._ledger.get(of.job_id)
        is_running = job is not None and job.state is JobState.PROCESSING and job.attempt == of.attempt
        if job is not None and is_running and ("status", job.seq) not in without:
            self._publish_status(job, 0)

    def _publish_status(self, job: Job, number: int, *, only_event: bool = False) -> bool:
        """Publish a job; False: not connected.

        Args:
            job: what to publish.
            number: for the acknowledgement; the job's revision if the state is new, else it is published again.
            only_event: whether the status is left out.
        """
        if job.state is JobState.PROCESSING:
            self._progress_due = self._monotonic() + _MIN_INTERVAL_S
        ack = StatusAck(job.seq, number)
        permit = self.permit_of(job)
        if permit is not Permit.PUBLISH:
            if permit is Permit.SKIP:
                self._complete([ack])
            return True
        try:
            messages = self._job_messages.of_job(job, self.progress_of(job), is_new=number == job.revision)
        except ValueError as exc:
            message = "The status of job %s cannot be serialised and is skipped: %s"
            log.error(message, job.job_id, exc, action="unpublished", job_id=job.job_id)
            self._complete([ack])
            return True
        if only_event:
            events = (message for message in messages if message.topic == self._topics.events)
            return all(self._publish(topic, payload, ack, retain=False, is_last=False) for topic, payload, _ in events)
        return self._publish_in_order(messages, ack)


def _in_units(kind: str, units: Collection[Unit]) -> set[Any]:
    """Return the numbers or names of the units of one kind."""
    return {name for each, name in units if each == kind} if units else set()
