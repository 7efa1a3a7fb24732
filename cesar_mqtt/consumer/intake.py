"""The intake: receives messages in batches, puts their jobs on disk in one transaction, and only then acknowledges.

Commands are executed in their turn, between the jobs before and behind them. It owns the thread "intake", the only
caller of `run_once`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic_core import to_json

from cesar_mqtt.consumer.events import JobEvents
from cesar_mqtt.consumer.incoming import IncomingMessage, MessageParser, ModelNames
from cesar_mqtt.consumer.redelivery import RedeliveryTracker
from cesar_mqtt.errors import Cancelled, LedgerError, SpoolFullError, UploadRefusedError
from cesar_mqtt.jobs import Admission, AudioSource, NewJob
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds
from cesar_mqtt.protocol.fields import timestamp
from cesar_mqtt.protocol.parsing import Refusal
from cesar_mqtt.protocol.payloads import Answer, Rejection
from cesar_mqtt.protocol.requests import MAX_PRIORITY
from cesar_mqtt.protocol.response_topics import ResponseTopics
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.protocol.truncate import excerpt, shorten
from cesar_mqtt.redaction import redact_value
from cesar_mqtt.threads import Backoff, StoppableThread

if TYPE_CHECKING:
    from cesar_mqtt.consumer.commands import CommandHandlers
    from cesar_mqtt.consumer.publisher import Publisher

log = get_logger(__name__)

T = TypeVar("T")

_RECEIVE_S = 1.0
"""How long `receive` waits; a stop does not depend on it, as the client wakes the intake."""
_POLL_S = 0.05
_HELD_BYTES = 64 << 20
"""While the disk refuses, no more than this is held in memory."""
_RETRY_FIRST_S = 0.5
_RETRY_MOST_S = 30.0
"""After a refusal of the disk: short at first, for a passing fault, then at the pace of an operator who frees space."""


class Source(Protocol):
    """Where messages come from: an MQTT subscription, or another queue that delivers and takes acknowledgements."""

    def receive(self, timeout_s: float | None = None) -> list[Delivery]:
        """Return all messages that have arrived, in order; none after the timeout, or when the source is closed."""

    def take_redelivery_bounds(self) -> RedeliveryBounds:
        """Return which of the messages that `receive` returned before this call cannot be delivered again."""

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge messages, in this order."""

    def let_go_ahead(self, *, on: bool) -> None:
        """Have commands delivered although messages before them are not acknowledged, or in their turn again."""

    def reconnect(self) -> None:
        """Have all messages delivered again that are not acknowledged, in their order."""


class Intake(StoppableThread):
    """Messages in, jobs in the ledger.

    Order of events, which is a promise: audio in the spool, jobs in the ledger (one transaction for the batch),
    rejections and responses handed to the publisher, acknowledgement. When the disk refuses, nothing is acknowledged
    and the same batch is tried again: the broker keeps every message that has not been acknowledged. Commands are
    answered meanwhile, ahead of their turn: only a `delete` may free the disk. The broker delivers them at QoS 0 then,
    since it delivers only so many unacknowledged messages. What arrives beyond `_HELD_BYTES` is forgotten, and received
    again by a new connection once the disk has taken the rest.

    `stop` ends it after the current batch; the owner of the source wakes a waiting `receive`.
    """

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        *,
        spool: Spool,
        topics: Topics,
        models: ModelNames,
        commands: "CommandHandlers",
        response_topics: ResponseTopics,
        max_payload_bytes: int,
        max_priority: int = MAX_PRIORITY,
        events: JobEvents,
        publisher: "Publisher",
        on_birth: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            source: delivers the messages.
            ledger: stores the jobs.
            spool: stores uploaded audio.
            topics: tells submissions from commands.
            models: the models that a request may name.
            commands: executes commands.
            response_topics: where responses may be published.
            max_payload_bytes: a larger message is rejected.
            max_priority: a request with a higher priority gets this one.
            events: receives rejections, and whether the disk refuses.
            publisher: publishes the responses.
            on_birth: called when Home Assistant announces its start.
        """
        super().__init__("intake")
        self._source = source
        self._ledger = ledger
        self._spool = spool
        self._topics = topics
        self._parser = MessageParser(topics, models, max_payload_bytes=max_payload_bytes, max_priority=max_priority)
        self._commands = commands
        self._response_topics = response_topics
        self._events = events
        self._publisher = publisher
        self._on_birth = on_birth
        self._redelivery = RedeliveryTracker(ledger)
        self._behind: Sequence[IncomingMessage] = []
        """The messages of the batch that are not processed yet."""
        self._arrived: list[Delivery] = []
        """What arrived while the disk refused; the next batch."""
        self._executed: set[int] = set()
        """The commands that were executed ahead of their turn, by the identities of their receipts."""
        self._goes_ahead = False
        """Whether the source delivers commands ahead of their turn."""
        self._forgotten = 0
        """The newest connection of which a message was forgotten: what arrived by it behind that is forgotten, too."""
        self._fetched = 0
        """The newest connection that was replaced by another, which delivers the forgotten messages."""

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.run_once(timeout_s=_RECEIVE_S)

    def run_once(self, timeout_s: float | None = None) -> int:
        """Process the messages that have arrived; return their number."""
        deliveries, self._arrived = self._arrived or self._receive(timeout_s), []
        bounds = self._source.take_redelivery_bounds()
        # A message that arrived before the broker began a new session may be a redelivery of the former session.
        former = sum(delivery.receipt.connection < bounds.session for delivery in deliveries)
        with suppress(Cancelled):
            if former:
                self._redelivery.update(replace(bounds, session=0))
                self._process(deliveries[:former])
            self._redelivery.update(bounds)
            self._process(deliveries[former:])
        if self._stopping.is_set() or not self._arrived:
            self._end_refusal()
        if not deliveries:  # idle: after a crash, too, a packet id has to mean the newest message
            self._ledger.persist_released_packet_ids()
        return len(deliveries)

    def _receive(self, timeout_s: float | None) -> list[Delivery]:
        received = self._source.receive(timeout_s)
        if not self._forgotten:
            return received
        for delivery in filter(self._is_forgotten, received):
            self._forget(delivery)
        return [delivery for delivery in received if not self._is_forgotten(delivery)]

    def _is_forgotten(self, delivery: Delivery) -> bool:
        """Whether the message will be delivered again, by a later connection than the one that it arrived by."""
        return delivery.qos > 0 and delivery.receipt.connection <= self._forgotten

    def _process(self, deliveries: Sequence[Delivery]) -> None:
        """Process and acknowledge a batch, in order. Raises Cancelled when the intake is stopped first."""
        parsed = self._reject_what_never_fits([self._parser.parse(delivery) for delivery in deliveries])
        done = 0
        for are_commands, group in groupby(parsed, key=lambda message: message.command is not None):
            messages = list(group)
            done += len(messages)
            self._behind = parsed[done:]
            if are_commands:
                self._execute_commands(messages)
                self._acknowledge(messages)
                continue
            most = len(messages)
            while messages:
                count = min(most, self._count_fitting(messages))
                try:
                    job_ids = self._persist_jobs(messages[:count])
                except UploadRefusedError as exc:
                    refused = [place for place, message in enumerate(messages) if message.audio is not None][exc.index]
                    if exc.index == 0:
                        messages[refused] = _never_fits(messages[refused])
                    else:  # alone it may fit
                        most = refused
                    continue
                fitting, messages = messages[:count], messages[count:]
                most = len(messages)
                self._acknowledge(fitting, job_ids)

    def _acknowledge(self, messages: Sequence[IncomingMessage], job_ids: Sequence[str] = ()) -> None:
        self._source.acknowledge([message.delivery for message in messages])
        self._redelivery.on_acknowledged(messages, job_ids)

    # -- commands ---------------------------------------------------------------------------------------------------

    def _execute_commands(self, messages: Sequence[IncomingMessage]) -> None:
        for message in messages:
            delivery, command = message.delivery, message.command or ""
            if id(delivery.receipt) in self._executed:
                self._executed.discard(id(delivery.receipt))
                continue
            if delivery.retain:  # it would be executed again at each connection
                detail = "A retained command is not executed: publish it without the retain flag."
                self._reject(delivery, Refusal("invalid_request", detail))
                continue
            response = self._commands.handle(command, delivery.payload)
            if response is None:
                continue
            self._publisher.publish_response(self._topics.response(command), response.payload)
            self._respond(delivery, response.payload)
            if response.rejection is not None:
                self._reject(delivery, response.rejection)

    def _answer_commands(self, wait_s: float, *, is_over: Callable[[], bool]) -> None:
        """Wait, and meanwhile execute the commands behind the batch that the disk refuses: one of them may free room.

        They are acknowledged in their turn, as MQTT requires, and not executed again then.

        Args:
            wait_s: the longest wait.
            is_over: whether there is room before that.

        Raises:
            Cancelled: the intake is stopped.
        """
        self._set_ahead(on=True)
        until = time.monotonic() + wait_s
        self._execute_ahead(self._behind)
        self._behind = []
        while not self._stopping.is_set() and (left_s := until - time.monotonic()) > 0 and not is_over():
            arrived = self._source.receive(min(left_s, _RECEIVE_S))
            self._execute_ahead([self._parser.parse(delivery) for delivery in self._hold(arrived)])
            if not arrived:
                self._stopping.wait(min(left_s, _POLL_S))  # the source may be closed
        if self._stopping.is_set():
            raise Cancelled

    def _set_ahead(self, *, on: bool) -> None:
        if on != self._goes_ahead:
            self._goes_ahead = on
            self._source.let_go_ahead(on=on)

    def _hold(self, arrived: Sequence[Delivery]) -> list[Delivery]:
        """Keep messages for their turn, as far as they fit into memory; return those that are not forgotten."""
        held_bytes = sum(delivery.size_bytes for delivery in self._arrived)
        known = []
        for delivery in arrived:
            if delivery.qos and (held_bytes > _HELD_BYTES or self._is_forgotten(delivery)):
                self._forget(delivery)
                continue
            known.append(delivery)
            if delivery.qos or self._topics.is_submission(delivery.topic):
                self._arrived.append(delivery)
                held_bytes += delivery.size_bytes
        return known

    def _forget(self, delivery: Delivery) -> None:
        self._forgotten = max(self._forgotten, delivery.receipt.connection)
        if not delivery.dup:  # when it comes again it is marked as a redelivery, but not of an earlier message
            self._ledger.release_packet_id(delivery.receipt.mid)

    def _execute_ahead(self, messages: Sequence[IncomingMessage]) -> None:
        commands = [message for message in messages if message.command is not None]
        self._execute_commands(commands)
        self._executed.update(id(message.delivery.receipt) for message in commands if message.delivery.qos)

    def _end_refusal(self) -> None:
        """Return to the normal order: everything that was held is processed."""
        self._set_ahead(on=False)
        if self._forgotten > self._fetched:
            self._fetched = self._forgotten
            self._source.reconnect()

    def _respond(self, delivery: Delivery, payload: bytes) -> None:
        """Publish on the Response Topic that the message names, if that is allowed."""
        topic = delivery.response_topic
        if topic is None:
            return
        problem = self._response_topics.problem(topic)
        if problem is not None:
            log.warning("No response on %s: %s", shorten(redact_value(topic)), problem, action="not_answered")
            return
        self._publisher.publish_response(topic, payload, correlation_data=delivery.correlation_data)

    # -- jobs -------------------------------------------------------------------------------------------------------

    def _persist_jobs(self, messages: Sequence[IncomingMessage]) -> list[str]:
        """Put the jobs of a batch on disk, report them, and return their ids.

        The audio is stored once and stays there while the ledger refuses: after a crash a refused change may be on disk
        all the same (see `JournalStorage.commit`), and its job needs its audio. The next start sweeps the spool.

        Raises:
            Cancelled: the intake was stopped before the disk took the batch.
            UploadRefusedError: one recording never fits, or not with those before it; nothing is stored.
        """
        jobs = self._until_stored(lambda: self._store_audio(messages))
        admissions = self._until_stored(lambda: self._ledger.append(jobs))
        self._events.degraded("intake", on=False)
        known = (
            job.audio
            for job, (admission, _) in zip(jobs, admissions, strict=True)
            if admission is not Admission.ACCEPTED
        )
        self._spool.remove([audio.name for audio in known if audio is not None and audio.kind == "spool"])
        self._report(messages, iter(admissions))
        return [job_id for _, job_id in admissions]

    def _reject_what_never_fits(self, messages: Sequence[IncomingMessage]) -> Sequence[IncomingMessage]:
        """Return the messages, audio that is larger than the file system as a refusal: else all others would wait."""
        largest = max((len(message.audio) for message in messages if message.audio is not None), default=0)
        capacity = self._spool.capacity_bytes if largest else 0
        if largest <= capacity:
            return messages
        return [
            _never_fits(message, capacity) if len(message.audio or b"") > capacity else message for message in messages
        ]

    def _count_fitting(self, messages: Sequence[IncomingMessage]) -> int:
        """Return how many messages, from the first on, the spool has room for now; at least one."""
        sizes = [len(message.audio or b"") for message in messages]
        if not any(sizes):
            return len(messages)
        evictable = 0 if sum(sizes) <= self._spool.room_bytes else self._evictable_bytes()
        return self._spool.fitting(sizes, evictable)

    def _evictable_bytes(self) -> int:
        return self._spool.size_bytes(name for _, name in self._ledger.retryable_uploads())

    def _evict(self, needed_bytes: int) -> None:
        """Remove the oldest uploads of ended jobs, which only a retry would need, if that makes enough room."""
        if not needed_bytes or needed_bytes <= self._spool.room_bytes:
            return
        if self._spool.room_bytes + self._evictable_bytes() < needed_bytes:
            return
        for job_id, name in self._ledger.retryable_uploads():
            if needed_bytes <= self._spool.room_bytes:
                return
            if self._spool.size_bytes([name]):
                self._spool.remove([name])
                log.warning("Upload removed to make room: no retry is possible", action="evicted", job_id=job_id)

    def _store_audio(self, messages: Sequence[IncomingMessage]) -> list[NewJob]:
        """Write uploaded audio into the spool; return the jobs with the names of their files."""
        files = [message.audio for message in messages if message.audio is not None]
        self._evict(sum(map(len, files)))
        names = iter(self._spool.store(files))
        jobs = []
        for message in messages:
            job = message.job
            if job is None:
                continue
            if message.audio is not None:
                job = replace(job, audio=AudioSource("spool", next(names)))
            jobs.append(job)
        return jobs

    def _until_stored(self, store: Callable[[], T]) -> T:
        """Return the result of `store`, which is tried until the disk takes it.

        Raises Cancelled on a stop, and UploadRefusedError, since trying again does not help.
        """
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_MOST_S)
        while True:
            try:
                return store()
            except UploadRefusedError:
                raise
            except LedgerError as exc:
                delay_s = backoff.next_s()
                self._events.degraded("intake", on=True)
                message = "%s Nothing is acknowledged; next attempt in %.1f s."
                log.error(message, exc, delay_s, action="intake_degraded")
                self._answer_commands(delay_s, is_over=self._room_for(exc))

    def _room_for(self, error: LedgerError) -> Callable[[], bool]:
        """Return whether what had no room has it now; after other errors only another attempt tells."""
        if not isinstance(error, SpoolFullError):
            return lambda: False
        needed_bytes = error.needed_bytes
        return lambda: self._spool.room_bytes + self._evictable_bytes() >= needed_bytes

    def _report(self, messages: Sequence[IncomingMessage], admissions: Iterator[tuple[Admission, str]]) -> None:
        """Publish the outcome of each message; `admissions` are those of the messages with a job, in order."""
        for message in messages:
            refusal, job_id = message.refusal, ""
            if message.job is not None:
                admission, job_id = next(admissions)
                log.debug("Request %s", admission, action="taken_in", job_id=job_id)
                refusal = refusal or refusal_of(None if message.job.has_generated_id else job_id, admission)
            if message.is_birth:
                self._on_birth()
            audio_id = None if message.delivery.payload else self._topics.audio_job_id(message.delivery.topic)
            if audio_id is not None:
                log.info("Empty upload ignored: no job is created", action="empty_ignored", job_id=shorten(audio_id))
            if message.queue_message is not None:
                self._publisher.on_queue_message_received(message.queue_message if message.delivery.retain else None)
            elif refusal is not None:
                rejection = self._reject(message.delivery, refusal)
                self._respond(message.delivery, rejection.encode())
            elif message.job is not None and message.delivery.response_topic is not None:
                job = self._ledger.get(job_id)
                answer = Answer(job_id=job_id, status=None if job is None else job.state)
                self._respond(message.delivery, to_json(answer))

    def _reject(self, delivery: Delivery, refusal: Refusal) -> Rejection:
        return reject(self._events, delivery, refusal)


def reject(events: JobEvents, delivery: Delivery, refusal: Refusal) -> Rejection:
    """Report a rejected message, and return its rejection."""
    rejection = Rejection(
        reason=refusal.reason,
        detail=refusal.detail,
        topic=shorten(redact_value(delivery.topic)),
        job_id=refusal.job_id,
        payload_excerpt=excerpt(delivery.payload),
        received_at=timestamp(delivery.received_at),
    )
    details = (rejection.topic, rejection.reason, rejection.detail)
    log.warning("Rejected on %s: %s: %s", *details, action="rejected", job_id=refusal.job_id)
    events.rejected(rejection)
    return rejection


def _never_fits(message: IncomingMessage, capacity_bytes: int | None = None) -> IncomingMessage:
    """Return a recording as a refusal; None: the file system does not tell how much it takes."""
    job = message.job
    job_id = None if job is None or job.has_generated_id else job.job_id
    limit = "the consumer's file system, or a quota there, does not allow that much"
    if capacity_bytes is not None:
        limit = f"the consumer can store at most {capacity_bytes} (queue.max_spool_bytes, or its disk)"
    detail = f"The recording has {len(message.audio or b'')} bytes; {limit}: submit its path or URL."
    return replace(message, job=None, audio=None, refusal=Refusal("storage_full", detail, job_id))


def refusal_of(job_id: str | None, admission: Admission) -> Refusal | None:
    if admission is Admission.CONFLICT:
        detail = (
            f"The job id {job_id} belongs to a different request, whose job stays unchanged. "
            "Use a new id, or delete the job first."
        )
        return Refusal("job_id_conflict", detail, job_id)
    if admission is Admission.FULL:
        return Refusal("queue_full", "The queue is full (queue.max_queued). Submit the job again later.", job_id)
    return None
