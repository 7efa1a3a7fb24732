"""The intake: takes what has piled up, puts it on disk in one transaction, and only then acknowledges it.

What is no job but a request of the control topics is answered in its turn, between the jobs before and behind it.

It runs in a thread of its own, the only caller of `run_once`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Protocol, TypeVar

from pydantic_core import to_json

from cesar_mqtt.consumer.command_handlers import Answer
from cesar_mqtt.consumer.events import JobEvents
from cesar_mqtt.consumer.incoming import IncomingMessage, MessageParser, ModelNames
from cesar_mqtt.consumer.redelivery import RedeliveryTracker
from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import Admission, AudioSource, NewJob
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds
from cesar_mqtt.protocol.fields import timestamp
from cesar_mqtt.protocol.parsing import Refusal
from cesar_mqtt.protocol.payloads import Rejection
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.protocol.truncate import excerpt, shorten

log = get_logger(__name__)

Done = TypeVar("Done")

_RETRY_FIRST_S = 0.5
_RETRY_MOST_S = 30.0


class Source(Protocol):
    """Where messages come from: an MQTT subscription, or whatever else hands them out and takes acknowledgements."""

    def receive(self, timeout_s: float | None = None) -> list[Delivery]:
        """Return everything that has piled up, in order; empty after the time-out or when it is closed."""

    def take_redelivery_bounds(self) -> RedeliveryBounds:
        """Return what cannot come again, of all that `receive` has returned before this call."""

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Say, in this order, that the messages need not come again."""


class Controls(Protocol):
    """Who answers the requests of the control topics."""

    def answer(self, command: str, payload: bytes) -> Answer | None:
        """Do what is asked for, and return what to say; whatever the payload is, nothing is raised.

        None: another consumer is asked, and answers.
        """


class Responder(Protocol):
    """What the intake needs of the publisher; every call returns at once."""

    def publish_response(self, topic: str, payload: bytes, *, correlation_data: bytes | None = None) -> None:
        """Publish a response."""

    def on_queue_message_received(self, payload: bytes | None) -> None:
        """Compare what the broker retains as the consumer's `queue` with what was published; None: nothing."""


class Intake:
    """Messages in, jobs in the ledger.

    Order of events, which is a promise: audio in the spool, job in the ledger (one transaction for the batch),
    refusals handed to the publisher, acknowledgement. When the disk refuses, nothing is acknowledged and the
    same batch is tried again: the broker keeps what it was not thanked for.
    """

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        *,
        spool: Spool,
        topics: Topics,
        models: ModelNames,
        controls: Controls,
        max_payload_bytes: int,
        events: JobEvents,
        responder: Responder,
        on_born: Callable[[], None] = lambda: None,
    ) -> None:
        """Wire it; nothing starts here.

        Args:
            source: where messages come from.
            ledger: where jobs go.
            spool: where audio that comes with a job goes.
            topics: tells jobs from audio.
            models: the models that may be asked for.
            controls: answers what is no job.
            max_payload_bytes: a larger message is refused.
            events: where it reports rejections, and a disk that refuses.
            responder: publishes the responses.
            on_born: called when Home Assistant says that it has started.
        """
        self._source = source
        self._ledger = ledger
        self._spool = spool
        self._topics = topics
        self._planner = MessageParser(topics, models, max_payload_bytes=max_payload_bytes)
        self._controls = controls
        self._events = events
        self._responder = responder
        self._on_born = on_born
        self._redelivery = RedeliveryTracker(ledger)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Finish the batch in hand and end the thread; the source has to be woken by its owner."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.run_once(timeout_s=1.0)

    def run_once(self, timeout_s: float | None = None) -> int:
        """Take in what has piled up; return how many messages that was."""
        deliveries = self._source.receive(timeout_s)
        bounds = self._source.take_redelivery_bounds()
        # What came before the broker began a new session may be a repetition of what it knew in the one before.
        before = sum(delivery.receipt.connection < bounds.session for delivery in deliveries)
        self._redelivery.update(replace(bounds, session=0))
        if self._take_in(deliveries[:before]):
            self._redelivery.update(bounds)
            self._take_in(deliveries[before:])
        if not deliveries:  # there is time for it: after a crash, too, a packet id has to mean the newest message
            self._ledger.persist_released_packet_ids()
        return len(deliveries)

    def _take_in(self, deliveries: Sequence[Delivery]) -> bool:
        """Do all that these ask for; False when the intake was stopped first."""
        plans = [self._planner.plan(delivery) for delivery in deliveries]
        for are_requests, group in groupby(plans, key=lambda plan: plan.command is not None):
            together, job_ids = list(group), []
            if are_requests:
                self._answer_all(together)
            elif (taken := self._persist(together)) is None:
                return False
            else:
                job_ids = taken
            self._source.acknowledge([plan.delivery for plan in together])
            self._redelivery.on_acknowledged(together, job_ids)
        return True

    # -- answers --------------------------------------------------------------------------------------------------

    def _answer_all(self, plans: Sequence[IncomingMessage]) -> None:
        for plan in plans:
            delivery, command = plan.delivery, plan.command or ""
            if delivery.retain:  # it would be done again at each connection
                self._reject(
                    delivery, Refusal("invalid_request", "A retained request is not done. Send it unretained.")
                )
                continue
            answer = self._controls.answer(command, delivery.payload)
            if answer is None:
                continue
            self._responder.publish_response(self._topics.response(command), answer.payload)
            self._respond(delivery, answer.payload)
            if answer.rejection is not None:
                self._reject(delivery, answer.rejection)

    def _respond(self, delivery: Delivery, payload: bytes) -> None:
        """Answer on the topic that the request names, unless there it would be taken for something else."""
        topic = delivery.response_topic
        if topic is None:
            return
        if self._topics.is_own(topic):
            message = "No answer on %s: a response topic must not be among the consumer's own"
            log.warning(message, shorten(topic), action="not_answered")
            return
        self._responder.publish_response(topic, payload, correlation_data=delivery.correlation_data)

    # -- on disk --------------------------------------------------------------------------------------------------

    def _persist(self, plans: Sequence[IncomingMessage]) -> list[str] | None:
        """Put a batch on disk, however often the disk refuses; None when the intake was stopped before it took.

        Returns the ids of the jobs.

        Audio is stored once and stays where it is while the ledger refuses: a refused change may be there all the
        same after a crash (see `JournalStorage.commit`), and its job must find its audio. The next start sweeps.
        """
        jobs = self._patiently(lambda: self._spooled(plans))
        if jobs is None:
            return None
        verdicts = self._patiently(lambda: self._ledger.append(jobs))
        if verdicts is None:
            return None
        self._events.degraded("intake", on=False)
        known = (
            job.audio for job, (verdict, _) in zip(jobs, verdicts, strict=True) if verdict is not Admission.ACCEPTED
        )
        self._spool.remove([audio.name for audio in known if audio is not None and audio.kind == "spool"])
        self._report(plans, iter(verdicts))
        return [job_id for _, job_id in verdicts]

    def _spooled(self, plans: Sequence[IncomingMessage]) -> list[NewJob]:
        names = iter(self._spool.store([plan.audio for plan in plans if plan.audio is not None]))
        jobs = []
        for plan in plans:
            job = plan.job
            if job is None:
                continue
            if plan.audio is not None:
                job = replace(job, audio=AudioSource("spool", next(names)))
            if job.packet_id is not None and not self._redelivery.can_be_redelivered(plan.delivery):
                job = replace(job, packet_id=None)
            jobs.append(job)
        return jobs

    def _patiently(self, step: Callable[[], Done]) -> Done | None:
        """Return what `step` does, trying again until the disk takes it; None when the intake is stopped first."""
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                done = step()
            except LedgerError as exc:
                self._events.degraded("intake", on=True)
                message = "%s Nothing is acknowledged; next try in %.1f s."
                log.error(message, exc, delay_s, action="intake_degraded")
                if self._stop.wait(delay_s):
                    return None
                delay_s = min(_RETRY_MOST_S, delay_s * 2)
            else:
                return done

    def _report(self, plans: Sequence[IncomingMessage], verdicts: Iterator[tuple[Admission, str]]) -> None:
        """Say what became of each message."""
        for plan in plans:
            refusal, job_id = plan.refusal, ""
            if plan.job is not None:
                verdict, job_id = next(verdicts)
                log.debug("Request is %s", verdict, action="taken_in", job_id=job_id)
                refusal = refusal or _refusal(None if plan.job.has_generated_id else job_id, verdict)
            if plan.born:
                self._on_born()
            audio_id = self._topics.audio_job_id(plan.delivery.topic)
            if audio_id is not None and not plan.delivery.payload:
                message = "An empty file is ignored: no job is made of it"
                log.info(message, action="empty_ignored", job_id=shorten(audio_id))
            if plan.found is not None:
                self._responder.on_queue_message_received(plan.found if plan.delivery.retain else None)
            elif refusal is not None:
                rejection = self._reject(plan.delivery, refusal)
                self._respond(plan.delivery, rejection.encode())
            elif plan.job is not None and plan.delivery.response_topic is not None:
                job = self._ledger.get(job_id)
                self._respond(plan.delivery, to_json({"job_id": job_id, "status": None if job is None else job.state}))

    def _reject(self, delivery: Delivery, refusal: Refusal) -> Rejection:
        message = "Refused on %s: %s: %s"
        details = (shorten(delivery.topic), refusal.reason, refusal.detail)
        log.warning(message, *details, action="rejected", job_id=refusal.job_id)
        rejection = _rejection(delivery, refusal)
        self._events.rejected(rejection)
        return rejection


def _rejection(delivery: Delivery, refusal: Refusal) -> Rejection:
    return Rejection(
        reason=refusal.reason,
        detail=refusal.detail,
        topic=shorten(delivery.topic),
        job_id=refusal.job_id,
        payload_excerpt=excerpt(delivery.payload),
        received_at=timestamp(delivery.received_at),
    )


def _refusal(job_id: str | None, verdict: Admission) -> Refusal | None:
    if verdict is Admission.CONFLICT:
        detail = (
            f"The job id {job_id} belongs to another request, whose job stays as it is. "
            "Use a new id, or delete the job first."
        )
        return Refusal("job_id_conflict", detail, job_id)
    if verdict is Admission.FULL:
        return Refusal("queue_full", "As many jobs wait as may wait (queue.max_queued). Send it again later.", job_id)
    return None
