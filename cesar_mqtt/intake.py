"""The intake: takes what has piled up, puts it on disk in one transaction, and only then acknowledges it.

It runs in a thread of its own, the only caller of `run_once`.
"""

import hashlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from cesar_mqtt.client import Delivery
from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import AudioSource, NewJob, Verdict
from cesar_mqtt.ledger import Ledger
from cesar_mqtt.logs import event
from cesar_mqtt.messages import JobRequest, Rejection, canonical, excerpt, timestamp
from cesar_mqtt.requests import Accepted, Parsed, Refusal, parse_audio, parse_job
from cesar_mqtt.spool import Spool
from cesar_mqtt.topics import Topics, is_job_id

logger = logging.getLogger(__name__)

Done = TypeVar("Done")

_RETRY_FIRST_S = 0.5
_RETRY_MOST_S = 30.0


class Source(Protocol):
    """Where messages come from: an MQTT subscription, or whatever else hands them out and takes acknowledgements."""

    def receive(self, timeout_s: float | None = None) -> list[Delivery]:
        """Return everything that has piled up, in order; empty after the time-out or when it is closed."""

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Say, in this order, that the messages need not come again."""


class ModelNames(Protocol):
    """What the intake has to know of models."""

    def default_name(self) -> str:
        """Return the model of a request that names none."""

    def is_allowed(self, name: str) -> bool:
        """Whether a request may name this model."""


class Reports(Protocol):
    """Whom the intake tells; every call returns at once."""

    def reject(self, rejection: Rejection) -> None:
        """Report a refused message."""

    def found_retained(self, payload: bytes) -> None:
        """Take note of what the broker retains as the consumer's queue."""

    def degraded(self, who: str, *, on: bool) -> None:
        """Take note of whether the disk refuses."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one message asks for: a job, a refusal, both (a refusal that is recorded), or nothing (an empty payload)."""

    delivery: Delivery
    job: NewJob | None = None
    audio: bytes | None = None
    refusal: Refusal | None = None


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
        max_payload_bytes: int,
        reports: Reports,
    ) -> None:
        """Wire it; nothing starts here.

        Args:
            source: where messages come from.
            ledger: where jobs go.
            spool: where audio that comes with a job goes.
            topics: tells jobs from audio.
            models: the models that may be asked for.
            max_payload_bytes: a larger message is refused.
            reports: whom to tell of refusals, and of a disk that refuses.
        """
        self._source = source
        self._ledger = ledger
        self._spool = spool
        self._topics = topics
        self._models = models
        self._max_payload_bytes = max_payload_bytes
        self._reports = reports
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
        if deliveries:
            plans = [self._plan(delivery) for delivery in deliveries]
            if self._persist(plans):
                self._source.acknowledge(deliveries)
        return len(deliveries)

    # -- what a message asks for ----------------------------------------------------------------------------------

    def _plan(self, delivery: Delivery) -> _Plan:
        if delivery.topic == self._topics.own("queue"):
            if delivery.retain:
                self._reports.found_retained(delivery.payload)
            return _Plan(delivery)
        if not delivery.payload:  # what clears a retained message
            return _Plan(delivery)
        parsed = self._parse(delivery)
        if isinstance(parsed, Accepted):
            parsed = self._with_model(parsed)
        if isinstance(parsed, Refusal):
            return _Plan(delivery, self._recorded(parsed), refusal=parsed)
        return _Plan(delivery, self._job(delivery, parsed), parsed.audio)

    def _parse(self, delivery: Delivery) -> Parsed:
        audio_id = self._topics.audio_job_id(delivery.topic)
        if len(delivery.payload) > self._max_payload_bytes:
            return self._too_large(delivery, audio_id)
        if audio_id is not None:
            return parse_audio(audio_id, delivery.payload, delivery.user_properties)
        return parse_job(delivery.payload, delivery.user_properties)

    def _too_large(self, delivery: Delivery, audio_id: str | None) -> Refusal:
        """Refuse without a look inside: only a topic can tell whose job it would have been."""
        size, limit = len(delivery.payload), self._max_payload_bytes
        detail = f"The message has {size} bytes, at most {limit} are taken (queue.max_payload_bytes)."
        job_id = audio_id if audio_id is not None and is_job_id(audio_id) else None
        return Refusal("payload_too_large", detail, job_id, recordable=job_id is not None)

    def _with_model(self, parsed: Accepted) -> Parsed:
        name = parsed.request.model_size
        if name is None or self._models.is_allowed(name):
            return parsed
        detail = f"model_size: {name!r} is not among the models that this consumer may use (models.allowed)."
        job_id = parsed.request.job_id
        return Refusal("invalid_request", detail, job_id, recordable=job_id is not None)

    def _recorded(self, refusal: Refusal) -> NewJob | None:
        if not refusal.recordable or refusal.job_id is None:
            return None
        fingerprint = hashlib.sha256(refusal.detail.encode()).hexdigest()[:32]
        model = self._models.default_name()
        return NewJob(refusal.job_id, fingerprint, None, model, failure=refusal.detail)

    def _job(self, delivery: Delivery, parsed: Accepted) -> NewJob:
        request = parsed.request
        fingerprint = _fingerprint(parsed)
        job_id, packet_id = request.job_id, None
        if job_id is None and delivery.retain:
            job_id = f"retained-{fingerprint}"
        elif job_id is None:
            job_id = str(uuid.uuid4())
            packet_id = delivery.receipt.mid if delivery.qos else None
        return NewJob(
            job_id=job_id,
            fingerprint=fingerprint,
            audio=None if request.audio_path is None else AudioSource("path", request.audio_path),
            model_size=request.model_size or self._models.default_name(),
            options=request.options(),
            metadata=request.metadata,
            packet_id=packet_id,
            redelivered=delivery.dup,
            anonymous=request.job_id is None,
            retained=delivery.retain,
        )

    # -- on disk --------------------------------------------------------------------------------------------------

    def _persist(self, plans: Sequence[_Plan]) -> bool:
        """Put a batch on disk, however often the disk refuses; False when the intake was stopped before it took.

        Audio is stored once and stays where it is while the ledger refuses: a refused change may be there all the
        same after a crash (see `JournalStorage.commit`), and its job must find its audio. The next start sweeps.
        """
        jobs = self._patiently(lambda: self._spooled(plans))
        if jobs is None:
            return False
        verdicts = self._patiently(lambda: [verdict for verdict, _ in self._ledger.append(jobs)])
        if verdicts is None:
            return False
        self._reports.degraded("intake", on=False)
        refused = (job.audio for job, verdict in zip(jobs, verdicts, strict=True) if verdict is not Verdict.ACCEPTED)
        self._spool.remove([audio.name for audio in refused if audio is not None and audio.kind == "spool"])
        self._report(plans, iter(verdicts))
        return True

    def _spooled(self, plans: Sequence[_Plan]) -> list[NewJob]:
        names = iter(self._spool.store([plan.audio for plan in plans if plan.audio is not None]))
        return [
            plan.job if plan.audio is None else replace(plan.job, audio=AudioSource("spool", next(names)))
            for plan in plans
            if plan.job is not None
        ]

    def _patiently(self, step: Callable[[], Done]) -> Done | None:
        """Return what `step` does, trying again until the disk takes it; None when the intake is stopped first."""
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                done = step()
            except LedgerError as exc:
                self._reports.degraded("intake", on=True)
                message = "%s Nothing is acknowledged; next try in %.1f s."
                event(logger, logging.ERROR, "intake_degraded", message, exc, delay_s)
                if self._stop.wait(delay_s):
                    return None
                delay_s = min(_RETRY_MOST_S, delay_s * 2)
            else:
                return done

    def _report(self, plans: Sequence[_Plan], verdicts: Iterator[Verdict]) -> None:
        """Log what became of each message, and hand on the refusals."""
        for plan in plans:
            refusal = plan.refusal
            if plan.job is not None:
                verdict = next(verdicts)
                logger.debug("Job %s: %s", plan.job.job_id, verdict)
                refusal = refusal or _refusal(plan.job.job_id, verdict)
            if refusal is not None:
                topic = plan.delivery.topic
                message = "Refused on %s: %s: %s"
                event(logger, logging.WARNING, "rejected", message, topic, refusal.reason, refusal.detail)
                self._reports.reject(_rejection(plan.delivery, refusal))


def _rejection(delivery: Delivery, refusal: Refusal) -> Rejection:
    return Rejection(
        reason=refusal.reason,
        detail=refusal.detail,
        topic=delivery.topic,
        job_id=refusal.job_id,
        payload_excerpt=excerpt(delivery.payload),
        received_at=timestamp(delivery.received_at),
    )


def _refusal(job_id: str, verdict: Verdict) -> Refusal | None:
    if verdict is Verdict.CONFLICT:
        detail = f"The job id {job_id} belongs to another request, whose job stays as it is. Use a new id."
        return Refusal("job_id_conflict", detail, job_id)
    if verdict is Verdict.FULL:
        return Refusal("queue_full", "As many jobs wait as may wait (queue.max_queued). Send it again later.", job_id)
    return None


def _fingerprint(parsed: Accepted) -> str:
    """Return 128 bits that are equal for requests that ask for the same of the same audio."""
    request = parsed.request
    names = sorted(request.model_fields_set - _NOT_ASKED)
    digest = hashlib.sha256(canonical({name: getattr(request, name) for name in names if _differs(request, name)}))
    if parsed.audio is not None:
        digest.update(hashlib.sha256(parsed.audio).digest())
    return digest.hexdigest()[:32]


_NOT_ASKED = frozenset({"job_id", "audio_base64"})
"""Fields that say which job it is, or hold the audio, whose bytes are compared instead."""


def _differs(request: JobRequest, name: str) -> bool:
    return bool(getattr(request, name) != _DEFAULTS[name])


_DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in JobRequest.model_fields.items()}
