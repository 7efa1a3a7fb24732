"""The publisher: makes the broker's retained messages agree with the ledger, however long that takes.

Its thread is the only one that publishes. All other methods may be called from any thread, and never wait for the
network; those called `on_...`, for paho's network thread, not for the disk either.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Protocol

from cesar_mqtt.consumer.activity import ActivityTracker
from cesar_mqtt.consumer.discovery_schedule import DiscoverySchedule
from cesar_mqtt.consumer.in_flight import InFlight, PendingAck
from cesar_mqtt.consumer.job_messages import JobMessage, JobMessages
from cesar_mqtt.consumer.own_topics import OwnTopics
from cesar_mqtt.consumer.retained_check import Loss, RetainedCheck
from cesar_mqtt.consumer.transient_messages import TransientMessage, TransientMessages
from cesar_mqtt.jobs import Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, CannotPublishError, PacketTooLargeError
from cesar_mqtt.protocol.consumer_payloads import Activity, ConsumerState, last_of, queue_of, standing_of
from cesar_mqtt.protocol.payloads import JobProgress, Payload, Rejection
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.transcript import Segment

log = get_logger(__name__)

_ACKNOWLEDGED_AT_ONCE = 20
_EVERY_S = 1.0


class Connection(Protocol):
    """What the publisher needs of an MQTT client."""

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, correlation_data: bytes | None = None
    ) -> Hashable | None:
        """Send a message at QoS 1 and return its ticket; None when not connected. Raises CannotPublishError."""


class Publisher:
    """An outbox over the ledger.

    For each job it publishes the newest status that the broker has not acknowledged; states that were passed through
    while offline are never sent. The ledger is told at the PUBACK. After a reconnect, everything unacknowledged is
    published again; when the broker has lost the session, everything is.
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
        """Wire it; nothing starts here."""
        self._connection = connection
        self._ledger = ledger
        self._topics = topics
        self._clock = clock
        self._monotonic = monotonic
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._events: deque[Callable[[], None]] = deque()
        self._connected = False
        self._in_flight = InFlight()
        self._acknowledged: deque[tuple[Hashable, bool]] = deque()
        self._refused = False
        """Whether the broker has refused the status of a job: later it may take it."""
        self._tellings = JobMessages(ledger, topics, clock=clock)
        self._own = OwnTopics()
        self._witness = RetainedCheck(standing_of(ledger.totals()))
        self._announcer = DiscoverySchedule(self._own, monotonic=monotonic)
        self._notes = TransientMessages(monotonic=monotonic)
        self._doing = ActivityTracker()
        self._last: Job | None = None
        self._live: tuple[Job, JobProgress] | None = None
        self._live_stale = False
        self._live_due = 0.0
        self._queue_stale = True
        self._queue_due = 0.0
        self._settling = threading.Condition()
        self._asked = self._settled = 0
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        ledger.observe(self._queue_changed)

    # -- told by others -------------------------------------------------------------------------------------------

    def on_connected(self, *, session_present: bool, max_packet_bytes: int | None) -> None:
        """Take note that the client is connected (network thread)."""
        self._tell(lambda: self._begin(session_present=session_present, max_packet_bytes=max_packet_bytes))

    def on_disconnected(self) -> None:
        """Take note that nothing that is on its way will be acknowledged (network thread)."""
        self._tell(self._interrupt)

    def on_published(self, ticket: Hashable, *, refused: bool = False) -> None:
        """Take note of a PUBACK, which may say no (network thread)."""
        self._acknowledged.append((ticket, refused))
        # In a burst the thread is not woken for each: that costs more than all the rest of this.
        if len(self._acknowledged) >= min(_ACKNOWLEDGED_AT_ONCE, len(self._in_flight)) and not self._wake.is_set():
            self._wake.set()

    def reject(self, rejection: Rejection) -> None:
        """Report a refused message when connected; the newest are kept until then, in memory: see `TransientMessages`.

        May wait for whoever is writing to the ledger, so not for the network thread.
        """
        self._ledger.count_rejected()
        self._say(TransientMessage(self._topics.rejected, rejection.encode()))

    def answer(self, topic: str, payload: bytes, *, correlation_data: bytes | None = None) -> None:
        """Answer a request; kept like a refused message until there is a connection."""
        self._say(TransientMessage(topic, payload, correlation_data=correlation_data))

    def segment(self, job: Job, segment: Segment) -> None:
        """Tell a segment to whoever listens now; it is not kept for later."""
        self._say(self._tellings.of_segment(job, segment))

    def _say(self, note: TransientMessage) -> None:
        self._tell(lambda: self._notes.add(note) if note.keep or self._connected else None)

    def online(self) -> None:
        """Let the consumer's state be `online` at this and every later connection."""
        self._tell(lambda: self._own.retain("state", ConsumerState(state="online").encode()))

    def offline(self) -> None:
        """Let the consumer's state be `offline`."""
        self._tell(lambda: self._own.retain("state", ConsumerState(state="offline").encode()))

    def tell(self, name: str, message: Payload) -> None:
        """Let the consumer's own topic `name` retain a message, such as its health."""
        self._tell(lambda: self._own.retain(name, message.encode()))

    def announce(self, messages: Mapping[str, bytes], *, stale: Iterable[str] = ()) -> None:
        """Let the broker retain discovery messages, by topic, at this and every later connection; and not the stale."""
        self._tell(lambda: self._announcer.announce(messages, stale=stale))

    def announce_again(self) -> None:
        """Take note that Home Assistant has started."""
        self._tell(self._announcer.born)

    def activity(self, activity: Activity) -> None:
        """Take note of what the worker is doing."""
        self._tell(lambda: self._set(activity))

    def degraded(self, who: str, *, on: bool) -> None:
        """Take note of whether the disk refuses `who`; while it refuses anybody, the activity is `degraded`.

        One thread speaks for each `who`.
        """
        if self._doing.refuse(who, on=on):
            self._queue_changed()

    def draining(self) -> None:
        """Take note that no further job is started."""
        self._tell(self._set_draining)

    def progress(self, job: Job, live: JobProgress) -> None:
        """Take note of how far a job is; published at most once a second."""
        self._tell(lambda: self._note(job, live))

    def live_of(self, job: Job) -> JobProgress | None:
        """Return how far a job in work is, as far as is known; None: nothing is."""
        of, live = self._live or (None, None)
        return live if of is not None and (of.seq, of.attempt) == (job.seq, job.attempt) else None

    def found_retained(self, payload: bytes | None) -> None:
        """Take note of what the broker retains as this consumer's queue, right after a connection was made.

        None: what came first was our own, newest message, so it retained nothing before. See `RetainedCheck`.
        """
        self._tell(lambda: self._look(payload))

    def finished(self, job: Job) -> None:
        """Take note of the job that ended last."""
        self._tell(lambda: self._set_last(job))

    def _tell(self, event: Callable[[], None]) -> None:
        self._events.append(event)
        self._wake.set()

    def _queue_changed(self) -> None:
        self._queue_stale = True
        self._wake.set()

    @property
    def in_flight(self) -> int:
        """How many messages wait for the broker's acknowledgement."""
        return len(self._in_flight)

    # -- lifecycle ------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged all that there is to say; False when the time ran out first."""
        with self._settling:
            self._asked += 1
            mine = self._asked
            self._wake.set()
            return self._settling.wait_for(lambda: self._settled >= mine, timeout_s)

    def stop(self) -> None:
        """End the thread; what is not acknowledged stays in the ledger's outbox."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._stop.is_set():  # asked after clearing, so that the call of a stop is never cleared away unheard
                return
            self._wake.wait(self.run_once())

    def run_once(self) -> float | None:
        """Do all that can be done now.

        Returns:
            Seconds after which there will be something to do even if nobody says so; None: nothing is due.
        """
        asked = self._asked
        self._take_acknowledgements()
        while self._events:
            self._events.popleft()()
        self._notes.warn()
        if not self._connected:
            return None
        self._publish_own()
        self._publish_notes()
        self._publish_gone()
        self._publish_statuses()
        due = self._publish_live()
        if self._is_settled():
            with self._settling:
                self._settled = asked
                self._settling.notify_all()
        return due

    def _is_settled(self) -> bool:
        stale = self._queue_stale or not self._own.settled
        return not (self._in_flight or stale or self._notes or self._ledger.has_unpublished)

    # -- events, in the publisher's thread ------------------------------------------------------------------------

    def _begin(self, *, session_present: bool, max_packet_bytes: int | None) -> None:
        self._interrupt()
        self._connected = True
        self._ledger.coalesce()
        self._tellings.max_packet_bytes = max_packet_bytes
        unknown = self._witness.connected(self._own.retained("queue"), session_present=session_present)
        self._own.say_again("state")
        self._announcer.connected()
        if not session_present:
            self._own.say_again()
        if unknown or self._refused or not session_present:
            self._ledger.republish_all(restored=self._refused)
            self._refused = False

    def _look(self, payload: bytes | None) -> None:
        loss = self._witness.look(payload, self._own.retained("queue"))
        if loss is None:
            return
        message = "The broker does not have the newest messages: all are sent again"
        log.warning(message, action="broker_went_back")
        self._own.say_again()
        if loss is Loss.NEWEST:
            self._own.forget_retained()
        self._ledger.republish_all(restored=loss is Loss.NEWEST)

    def _interrupt(self) -> None:
        self._connected = False
        self._notes.interrupt(self._in_flight.interrupt())
        self._own.interrupt()

    def _take_acknowledgements(self) -> None:
        published: list[tuple[int, int]] = []
        while self._acknowledged:
            ticket, refused = self._acknowledged.popleft()
            sent = self._in_flight.acknowledge(ticket)
            if sent is None:
                continue
            self._refused |= refused and sent.seq is not None
            if sent.seq is not None and sent.number:
                published.append((sent.seq, sent.number))
            else:
                self._settle(sent)
        if published:
            self._ledger.mark_published(published)

    def _settle(self, sent: PendingAck) -> None:
        if sent.seq is not None and sent.gone:
            self._ledger.mark_cleared(sent.seq)
        elif sent.seq is not None and sent.number:
            self._ledger.mark_published([(sent.seq, sent.number)])
        elif sent.topic is not None:
            self._own.acknowledge(sent.topic, sent.number)

    def _set(self, activity: Activity) -> None:
        self._doing.worker = activity
        self._queue_stale = True

    def _set_last(self, job: Job) -> None:
        self._last = job
        self._own.retain("last", last_of(job).encode())

    def _set_draining(self) -> None:
        self._doing.draining = True
        self._queue_stale = True

    def _note(self, job: Job, live: JobProgress) -> None:
        self._live = (job, live)
        self._live_stale = True

    # -- publishing -----------------------------------------------------------------------------------------------

    def _send(
        self,
        topic: str,
        payload: bytes,
        sent: PendingAck,
        *,
        retain: bool = True,
        correlation_data: bytes | None = None,
    ) -> bool:
        """Hand a message to the client; False: there is no connection. What no broker takes is given up."""
        try:
            ticket = self._connection.publish(topic, payload, retain=retain, correlation_data=correlation_data)
        except CannotPublishError as exc:
            known_bytes = self._tellings.max_packet_bytes or MAX_PACKET_BYTES
            if isinstance(exc, PacketTooLargeError) and exc.limit_bytes < known_bytes:
                return False  # the limit of a connection that we are just being told of
            log.error("A message on %s is given up: %s", topic, exc, action="unpublished")
            self._settle(sent)
            return True
        if ticket is None:
            self._connected = False
            return False
        self._in_flight.add(ticket, sent)
        return True

    @property
    def _room(self) -> int:
        return self._in_flight.room if self._connected else 0

    def _publish_own(self) -> None:
        if self._queue_stale and (self._monotonic() >= self._queue_due or self._waits_for_the_queue()):
            self._queue_stale = False
            self._queue_due = self._monotonic() + _EVERY_S
            self._own.retain("queue", self._queue())
        self._announcer.run_once()
        for name, payload, version in self._own.due():
            topic = name if "/" in name else self._topics.own(name)
            self._send(topic, payload, PendingAck(topic=name, number=version))

    def _waits_for_the_queue(self) -> bool:
        """Whether somebody drains and everything else is said: that is then the last word, and need not wait."""
        return self._asked > self._settled and not (self._in_flight or self._notes or self._ledger.has_unpublished)

    def _queue(self) -> bytes:
        totals = self._ledger.totals()
        return queue_of(totals, self._doing.among(totals), self._clock()).encode()

    def _publish_notes(self) -> None:
        while self._notes and self._room > 0:
            note = self._notes.first
            payload, sent = self._tellings.of_note(note), PendingAck(note=note)
            if not self._send(note.topic, payload, sent, retain=False, correlation_data=note.correlation_data):
                return
            self._notes.drop_first()

    def _publish_statuses(self) -> None:
        if self._room <= 0:
            return
        # Most of them are two messages, for a change is told as an event, too.
        for number, job in self._ledger.unpublished((self._room + 1) // 2, exclude=self._in_flight.telling):
            if not self._publish_status(job, number):
                return

    def _publish_gone(self) -> None:
        """Let the broker forget deleted jobs."""
        for gone in self._ledger.pending_clears(self._room, exclude=self._in_flight.clearing) if self._room > 0 else ():
            if self._last is not None and self._last.seq == gone.seq:
                self._set_last(self._last._replace(result_text=None))
            if not self._send_all(self._tellings.of_deletion(gone), PendingAck(seq=gone.seq, gone=True)):
                return

    def _publish_live(self) -> float | None:
        """Publish the progress if it is time; return the seconds until something of what is limited in rate is due."""
        now = self._monotonic()
        if self._live is not None and self._live_stale and now >= self._live_due and self._room > 0:
            self._live_stale = False
            of, _ = self._live
            job = self._ledger.get(of.job_id)
            if job is not None and job.state is JobState.PROCESSING and job.attempt == of.attempt:
                self._publish_status(job, 0)
        waits = [self._queue_due - now] if self._queue_stale else []
        waits += [self._live_due - now] if self._live_stale and self._room > 0 else []  # else a PUBACK makes room
        waits += self._announcer.waits_s()
        return max(0.0, min(waits)) if waits else None

    def _publish_status(self, job: Job, number: int) -> bool:
        if job.state is JobState.PROCESSING:
            self._live_due = self._monotonic() + _EVERY_S
        sent = PendingAck(seq=job.seq, number=number)
        try:
            # Else it is said again, or only its place in the queue has changed.
            told = self._tellings.of_job(job, self.live_of(job), news=number == job.revision)
        except ValueError as exc:
            message = "What there is to tell of job %s cannot be put into words: %s"
            log.error(message, job.job_id, exc, action="unpublished", job_id=job.job_id)
            self._settle(sent)
            return True
        return self._send_all(told, sent)

    def _send_all(self, told: Iterable[JobMessage], sent: PendingAck) -> bool:
        """Send messages that belong together; the last one stands for all."""
        *others, last = told
        for topic, payload, retain in others:
            if not self._send(topic, payload, PendingAck(), retain=retain):
                return False
        return self._send(last.topic, last.payload, sent, retain=last.retain)
