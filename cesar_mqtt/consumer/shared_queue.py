"""A queue that consumers share: requests are admitted to it, and its jobs are claimed for this consumer's ledger.

`Admissions` owns the thread "admission": it takes the next request of the whole group, decides whether it is a new job,
publishes its status `queued` and puts it at the end of the queue. `Claims` owns the thread "claims": it takes a job
from the queue when the ledger has none, appends it there, renews the delivery while the worker runs it, and
acknowledges it once the broker has its final status.

A consumer that hangs or loses its network may come back when its job is another one's. So a job is this consumer's only
while its `Lease` is current, which a clock of this machine decides, and its end is written only after the record of the
job id was changed, which fails if another consumer has changed it since.
"""

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from cesar_mqtt.consumer.events import JobEvents
from cesar_mqtt.consumer.incoming import IncomingMessage, MessageParser, ModelNames
from cesar_mqtt.consumer.intake import refusal_of, reject
from cesar_mqtt.consumer.publisher import Permit, Publisher
from cesar_mqtt.consumer.shared_commands import PAUSED_KEY, SharedCommands, record_key, request_payload, waiting_job
from cesar_mqtt.engines.messages import Message, QueueUnavailableError, Record
from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import STATES, Admission, AudioSource, Claim, IllegalTransitionError, Job, JobState, NewJob
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.queue import POSITIONS_TRACKED
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery, Receipt
from cesar_mqtt.protocol.payloads import status_of
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.threads import StoppableThread

log = get_logger(__name__)

_RETRY_S = 0.5
"""Between two attempts while the server or the disk refuses."""
_POLL_S = 0.5
"""How often a wait looks at what no event reports."""
_POSITIONS_S = 2.0
"""After so long a job is no short one: the positions of those behind it are published."""
_ANNOUNCE_S = 5.0
"""How long a retry waits for the PUBACK of `queued` before the job is in the queue, where others publish it."""
_PROOF_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""After each publication of a final status that the broker does not retain, the delay before the next look."""
_RENEWALS = 3
"""How often a delivery is renewed within the time after which another consumer gets it."""
_QUEUE_LIMIT = (
    "queue.jetstream.max_message_bytes, or max_payload of the NATS server; a larger recording can be published as "
    "audio_path on a shared folder, or as audio_url"
)
_IDS = uuid.UUID("a1f0a4d3-5f4c-4d5e-9a51-0f5b2c6f3f0e")
"""The name space of the ids of requests without one: a redelivery yields the same id."""


class SharedQueue(Protocol):
    """What both threads need of the queue. Each method may raise QueueUnavailableError."""

    @property
    def max_payload_bytes(self) -> int:
        """The largest request."""

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the queue is open."""

    def next_request(self) -> Message | None:
        """Return the next request to admit, after a second None; until its acknowledgement there is no other."""

    def next_job(self) -> Message | None:
        """Return the next job for this consumer, after a second None."""

    def acknowledge(self, message: Message) -> None:
        """Remove a message."""

    def renew(self, message: Message, timeout_s: float) -> None:
        """Keep a message from going to another consumer."""

    def give_back(self, message: Message) -> None:
        """Have a message delivered again at once."""

    def enqueue(self, job_id: str, request: Message) -> None:
        """Put a job at the end of the queue."""

    def is_enqueued(self, job_id: str) -> bool:
        """Whether the queue has the job."""

    def job_behind(self, seq: int) -> Message | None:
        """Return the first message of the queue whose number is greater."""

    def waiting(self) -> int:
        """Return how many jobs wait."""

    def retained(self, topic: str) -> bytes | None:
        """Return the retained message on a topic."""

    def record(self, key: str) -> Record | None:
        """Return the record of a key."""

    def create_record(self, key: str, values: Mapping[str, Any]) -> Record | None:
        """Write a record if there is none; None: there is one."""

    def update_record(self, key: str, record: Record, values: Mapping[str, Any]) -> Record | None:
        """Replace a record that has not changed; None: it has."""

    def delete_record(self, key: str) -> None:
        """Delete a record."""


class Lease:
    """A delivered message that is this consumer's until the server may have given it to another one.

    Any thread may ask. Once lost, it stays lost.
    """

    def __init__(self, message: Message, ack_wait_s: float, monotonic: Callable[[], float], *, since: float) -> None:
        """Start at `since`, the monotonic time before the server was last asked for the message."""
        self.message = message
        self.claim = Claim(message.seq, message.deliveries)
        self.record: Record | None = None
        """Of the job, as this consumer wrote it."""
        self._ack_wait_s = ack_wait_s
        self._monotonic = monotonic
        self._renewed_at = since
        self._lost = False

    @property
    def is_current(self) -> bool:
        """Whether no other consumer can have the message."""
        if self._monotonic() - self._renewed_at >= self._ack_wait_s:
            self._lost = True
        return not self._lost

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew it."""
        return self._monotonic() - self._renewed_at >= self._ack_wait_s / _RENEWALS

    def renew(self, queue: SharedQueue) -> None:
        """Ask the server for more time; the lease may be lost in the meantime. Raises QueueUnavailableError."""
        started = self._monotonic()
        if not self.is_current:
            return
        queue.renew(self.message, self._ack_wait_s / _RENEWALS)
        self._renewed_at = started

    def lose(self) -> None:
        """Record that another consumer has the message."""
        self._lost = True

    def hold_until(self, accepted: threading.Event, queue: SharedQueue, stopping: threading.Event) -> bool:
        """Renew it until a PUBACK; False: it is lost, so that nothing of it may be published any more."""
        while not accepted.wait(self._ack_wait_s / _RENEWALS / 2):
            if stopping.is_set() or not self.is_current:
                self.lose()
                return False
            if self.is_due:
                with suppress(QueueUnavailableError):
                    self.renew(queue)
        return self.is_current


class RequestReader:
    """Reads requests and jobs of the queue as the intake reads messages of the broker."""

    def __init__(self, queue: SharedQueue, topics: Topics, models: ModelNames, *, max_payload_bytes: int) -> None:
        self._queue = queue
        self._topics = topics
        self._models = models
        self._max_payload_bytes = max_payload_bytes

    def read(self, message: Message) -> IncomingMessage:
        """Return the job of a message, under the id that it has in the whole group, or why there is none."""
        limit, limited_by = self._max_payload_bytes, "queue.max_payload_bytes"
        if self._queue.max_payload_bytes < limit:
            limit, limited_by = self._queue.max_payload_bytes, _QUEUE_LIMIT
        parser = MessageParser(self._topics, self._models, max_payload_bytes=limit, limited_by=limited_by)
        delivery = Delivery(
            topic=message.topic,
            payload=message.payload,
            qos=1,
            retain=False,
            dup=False,
            receipt=Receipt(0, 0),
            received_at=message.received_at,
        )
        parsed = parser.parse(delivery)
        job = parsed.job
        if job is None:
            return parsed
        if job.has_generated_id:
            job = replace(job, job_id=message.job_id or str(uuid.uuid5(_IDS, f"{message.seq} {message.received_at!r}")))
        if job.priority:
            job = replace(job, priority=0, warnings=("priority_ignored",))
        return replace(parsed, job=replace(job, packet_id=None, received_at=message.received_at))


class Admissions(StoppableThread):
    """Admits the requests of the group, one after the other, in their order.

    The server delivers one request at a time to all consumers, so that no other one is admitted meanwhile. Each step
    may be repeated: by this consumer, or by another one if this one dies.
    """

    def __init__(
        self,
        queue: SharedQueue,
        reader: RequestReader,
        *,
        commands: SharedCommands,
        ledger: Ledger,
        publisher: Publisher,
        events: JobEvents,
        consumer: str,
        ack_wait_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("admission")
        self._queue = queue
        self._reader = reader
        self._commands = commands
        self._ledger = ledger
        self._publisher = publisher
        self._events = events
        self._consumer = consumer
        self._ack_wait_s = ack_wait_s
        self._monotonic = monotonic

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._queue.wait_ready(_RETRY_S):
                    self.run_once()
            except (QueueUnavailableError, LedgerError) as exc:
                log.warning("%s The request stays in the queue's server.", exc, action="admission_failed")
                self._stopping.wait(_RETRY_S)

    def run_once(self) -> bool:
        """Admit the next request; False: there was none.

        Raises:
            QueueUnavailableError: the server does not answer; the request is delivered again.
            LedgerError: the same, as the disk refuses to record a rejected request.
        """
        since = self._monotonic()
        message = self._queue.next_request()
        if message is None:
            return False
        lease = Lease(message, self._ack_wait_s, self._monotonic, since=since)
        lease.renew(self._queue)
        if self._admit(lease):
            self._queue.acknowledge(message)
            self._publisher.refresh_queue()
        return True

    def _admit(self, lease: Lease) -> bool:
        """Return whether the request has been dealt with."""
        parsed = self._reader.read(lease.message)
        job = parsed.job
        if parsed.command is not None:
            self._commands.handle(parsed.command, lease.message.payload)
            return True
        if job is None:
            if parsed.refusal is not None:
                reject(self._events, parsed.delivery, parsed.refusal)
            return True
        values = {"request": lease.message.seq, "fingerprint": job.fingerprint, "consumer": self._consumer}
        values["state"] = JobState.QUEUED.value if parsed.refusal is None else JobState.ERROR.value
        record = self._queue.create_record(record_key(job.job_id), values)
        if record is None and not self._continue(lease, parsed, job):
            return True
        if parsed.refusal is not None:
            reject(self._events, parsed.delivery, parsed.refusal)
            self._ledger.append([job])
            return True
        if not self._announce(lease, job):
            return False
        self._queue.enqueue(job.job_id, lease.message)
        log.debug("Request admitted", action="taken_in", job_id=job.job_id)
        return True

    def _continue(self, lease: Lease, parsed: IncomingMessage, job: NewJob) -> bool:
        """Return whether the id is this request's, and an earlier delivery of it has not come to an end."""
        known = self._queue.record(record_key(job.job_id))
        if known is None:  # deleted in this moment: the next delivery finds none
            raise QueueUnavailableError("The record of the job id has just been deleted.")
        if known.values.get("request") == lease.message.seq:
            return "claim" not in known.values and not self._queue.is_enqueued(job.job_id)
        if known.values.get("fingerprint") != job.fingerprint:
            refusal = parsed.refusal or refusal_of(job.job_id, Admission.CONFLICT)
            if refusal is not None:
                reject(self._events, parsed.delivery, refusal)
        else:
            log.debug("Request is a duplicate", action="taken_in", job_id=job.job_id)
        return False

    def _announce(self, lease: Lease, job: NewJob) -> bool:
        """Publish `queued` and wait for its PUBACK: behind it another consumer may publish; False: not in time."""
        accepted = threading.Event()
        waiting = waiting_job(job, lease.message.received_at, self._queue.waiting() + 1)
        self._publisher.publish_status_of(waiting, is_wanted=lambda: lease.is_current, on_acknowledged=accepted.set)
        return lease.hold_until(accepted, self._queue, self._stopping)


class Claims(StoppableThread):
    """Claims one job at a time from the queue.

    Its order of events is a promise: the claim in the job's record, the job in the ledger, the end in the record, the
    end in the ledger, the PUBACK of the final status, the proof that the broker retains it, the acknowledgement in the
    queue.
    """

    def __init__(
        self,
        queue: SharedQueue,
        reader: RequestReader,
        *,
        ledger: Ledger,
        spool: Spool,
        publisher: Publisher,
        topics: Topics,
        ack_wait_s: float,
        is_strict: bool,
        is_working: Callable[[], bool],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Forget what an earlier process was running: the queue delivers it again, to this consumer or another one.

        Args:
            queue: delivers the jobs.
            reader: reads them.
            ledger: holds the claimed job.
            spool: holds its audio.
            publisher: publishes what `permit_of` allows.
            topics: of the consumer.
            ack_wait_s: as the queue has it.
            is_strict: whether only one job of the group runs at a time, so that no other leaves the queue meanwhile.
            is_working: whether the worker may still run a job.
            monotonic: seconds that never go back.

        Raises:
            LedgerError: the disk refuses.
        """
        super().__init__("claims")
        self._queue = queue
        self._reader = reader
        self._ledger = ledger
        self._spool = spool
        self._publisher = publisher
        self._topics = topics
        self._ack_wait_s = ack_wait_s
        self._is_strict = is_strict
        self._is_working = is_working
        self._monotonic = monotonic
        self._lease: Lease | None = None
        self._changed = threading.Event()
        self._waiting = 0
        self._has_joined = False
        self._unproven: dict[int, Job] = {}
        """Jobs that have ended without an acknowledgement in the queue, in an earlier process or while the queue was
        out of reach: their last status may not be published, or another consumer may run them again."""
        for job in ledger.claimed():
            if job.state.final and job.claim is not None and not job.claim.delivery:
                continue  # it was cancelled in the queue
            if job.state.final:
                self._unproven[job.seq] = job
            else:
                self._forget(job.seq)
        ledger.observe(self._changed.set)
        publisher.on_status_acknowledged = self._changed.set
        publisher.permit_of = self.permit_of
        publisher.waiting = lambda: self._waiting

    # -- other threads ---------------------------------------------------------------------------------------------

    def permit_of(self, job: Job) -> Permit:
        """Return whether the publisher may publish a job; never waits."""
        lease = self._lease
        if job.claim is None:
            return Permit.PUBLISH
        if lease is not None and lease.claim == job.claim:
            if not lease.is_current:
                return Permit.HOLD
            is_announced = job.state is JobState.QUEUED and job.attempt < job.claim.delivery
            return Permit.SKIP if is_announced else Permit.PUBLISH
        return Permit.HOLD if job.seq in self._unproven or not job.state.final else Permit.PUBLISH

    def may_end(self, job: Job) -> bool:
        """Record that a job ends, for the worker's thread; False: another consumer has the job."""
        if job.claim is None:
            return True
        while True:
            lease = self._lease
            if lease is None or lease.claim != job.claim or lease.record is None or not lease.is_current:
                self._changed.set()
                return False
            key, values = record_key(job.job_id), {**lease.record.values, "state": "finished"}
            try:
                lease.record = self._queue.update_record(key, lease.record, values) or self._own_record(key, lease)
            except QueueUnavailableError as exc:
                log.warning("%s The end of the job is not recorded yet.", exc, action="queue_unavailable")
                threading.Event().wait(_RETRY_S)
                with suppress(QueueUnavailableError):
                    lease.record = self._own_record(key, lease)
                continue
            if lease.record is not None and lease.record.values.get("state") == "finished":
                return lease.is_current

    def _own_record(self, key: str, lease: Lease) -> Record | None:
        """Return the record if it still has this claim; None: another consumer has changed it."""
        record = self._queue.record(key)
        if record is not None and tuple(record.values.get("claim", ())) == lease.claim:
            return record
        lease.lose()
        return None

    def resubmit(self, job: Job) -> None:
        """Put a job that has ended, and may be retried, at the end of the queue: any consumer may run it.

        For the thread of commands. On return it is in the queue and no longer in this ledger.

        Raises:
            QueueUnavailableError: the server does not answer, or refuses the message; the job stays as it is, or is
                in the queue already.
            LedgerError: the disk refuses; the job is in the queue.
        """
        request = self._request_of(job)
        key = record_key(job.job_id)
        record = self._queue.record(key)
        kept = (
            {}
            if record is None
            else {name: value for name, value in record.values.items() if name in ("request", "fingerprint")}
        )
        values = {**kept, "state": JobState.QUEUED.value, "consumer": self._topics.consumer}
        queued = (
            self._queue.create_record(key, values) if record is None else self._queue.update_record(key, record, values)
        )
        if queued is None:
            raise QueueUnavailableError("Another consumer changes the job at this moment.")
        accepted, given_up = threading.Event(), threading.Event()
        position = self._queue.waiting() + 1
        waiting = job._replace(
            state=JobState.QUEUED,
            queue_position=position,
            updated_at=time.time(),
            started_at=None,
            completed_at=None,
            error_code=None,
            error_message=None,
        )
        self._publisher.publish_status_of(
            waiting, is_wanted=lambda: not given_up.is_set(), on_acknowledged=accepted.set
        )
        if not accepted.wait(_ANNOUNCE_S):
            given_up.set()  # it must not come behind what the next consumer publishes
        # The revision names this retry, for the server recognises what is enqueued twice. It is negative: it would
        # drop the retry as a copy of the request with that number otherwise.
        self._queue.enqueue(job.job_id, replace(request, seq=-queued.revision))
        self._forget(job.seq)

    def _request_of(self, job: Job) -> Message:
        """Return a request that becomes this job. Raises IllegalTransitionError if it is too large for the queue."""
        audio = None
        if job.audio is not None and job.audio.kind == "spool":
            audio = self._spool.path(job.audio.name).read_bytes()
        request = Message(self._topics.jobs, request_payload(job, audio), 0, 0, job.created_at, job.job_id, "")
        if audio is not None:
            upload = replace(request, topic=self._topics.audio(job.job_id), payload=audio)
            read = self._reader.read(upload).job
            if read is not None and _settings_of(read) == _settings_of(job):
                return upload
        if len(request.payload) > self._queue.max_payload_bytes:
            raise IllegalTransitionError(
                f"The recording of job {job.job_id} is too large to go back into the queue: submit it under a new id."
            )
        return request

    def release(self, job_id: str) -> None:
        """Make the id of a deleted job free for another request; if the server does not answer, it is so later."""
        with suppress(QueueUnavailableError):
            self._queue.delete_record(record_key(job_id))

    # -- the thread ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.run_once()
            except QueueUnavailableError as exc:
                log.warning("%s", exc, action="queue_unavailable")
                self._stopping.wait(_RETRY_S)

    def run_once(self) -> bool:
        """Claim the next job and attend to it until it has ended and is published; False: there was none to claim.

        Raises:
            QueueUnavailableError: the server does not answer.
        """
        if not self._queue.wait_ready(_RETRY_S):
            return False
        self._prove_earlier()
        self._join_pause()
        if self._ledger.is_paused or self._ledger.count((JobState.QUEUED, JobState.PROCESSING)):
            self._changed.wait(_POLL_S)
            self._changed.clear()
            return False
        since = self._monotonic()
        message = self._queue.next_job()
        self._update_waiting()
        if message is None:
            return False
        if self._stopping.is_set() or self._ledger.is_paused:
            self._queue.give_back(message)
            return False
        lease = Lease(message, self._ack_wait_s, self._monotonic, since=since)
        lease.renew(self._queue)
        if self._claim(lease):
            self._attend(lease)
        return True

    def _update_waiting(self) -> None:
        waiting = self._queue.waiting()
        if waiting != self._waiting:
            self._waiting = waiting
            self._publisher.refresh_queue()

    def _prove_earlier(self) -> None:
        """Publish the ends that the queue has acknowledged since; forget those of jobs that run again."""
        for seq, job in list(self._unproven.items()):
            record = self._queue.record(record_key(job.job_id))
            if record is None or tuple(record.values.get("claim", ())) != job.claim:
                self._forget(seq)
            elif self._queue.is_enqueued(job.job_id):
                continue  # whoever gets it decides
            del self._unproven[seq]
            self._publisher.refresh_queue()

    def _join_pause(self) -> None:
        """Pause at the start if the group is paused: the command may have come before this consumer was there."""
        if self._has_joined:
            return
        record = self._queue.record(PAUSED_KEY)
        if record is not None:
            with suppress(LedgerError):
                self._ledger.pause(on=bool(record.values.get("paused")))
        self._has_joined = True

    def _claim(self, lease: Lease) -> bool:
        """Write the claim into the job's record, and append the job; False: there is nothing to run."""
        message, job_id = lease.message, lease.message.job_id or ""
        key = record_key(job_id)
        while lease.record is None:
            record = self._queue.record(key)
            values: Mapping[str, Any] = {} if record is None else record.values
            earlier = Claim(*values["claim"]) if "claim" in values else None
            if values.get("state") in (JobState.CANCELLED, "deleted"):
                self._queue.acknowledge(message)
                return False
            if earlier is not None and earlier >= lease.claim:
                log.warning("Delivery ignored: another consumer has the job", action="claim_lost", job_id=job_id)
                return False
            repeats = earlier is not None and earlier.seq == message.seq
            if repeats and values.get("state") == "finished" and (end := self._retained_end(job_id, earlier)):
                if self._publish_again(lease, end):
                    self._queue.acknowledge(message)
                return False
            crashes = values.get("crashes", 0) + (1 if repeats and not values.get("returned") else 0)
            claimed = {
                **values,
                "state": JobState.PROCESSING.value,
                "claim": list(lease.claim),
                "consumer": self._topics.consumer,
                "crashes": crashes if repeats else 0,
                "returned": False,
            }
            if record is None:
                lease.record = self._queue.create_record(key, claimed)
            else:
                lease.record = self._queue.update_record(key, record, claimed)
        if message.deliveries > 1:
            log.warning("Job taken over, delivery %d", message.deliveries, action="taken_over", job_id=job_id)
        self._lease = lease
        try:
            return self._append(lease)
        except LedgerError as exc:
            log.error("%s The job goes back to the queue.", exc, action="intake_degraded", job_id=job_id)
            self._return(lease, None)
            self._stopping.wait(_RETRY_S)
            return False

    def _retained_end(self, job_id: str, earlier: Claim | None) -> bytes | None:
        """Return the final status of the attempt that an earlier claim was; None: the broker does not retain it."""
        payload = self._queue.retained(self._topics.status(job_id))
        status = _status_in(payload)
        state = STATES.get(status.get("status", ""))
        if state is None or not state.final or earlier is None or status.get("attempt", 0) < earlier.delivery:
            return None
        return payload

    def _publish_again(self, lease: Lease, end: bytes) -> bool:
        """Publish a retained status again; False: not in time.

        The server stores a message as retained before it stores it for subscribers: one that dies in between has
        shown it to none of them.
        """
        accepted = threading.Event()
        topic = self._topics.status(lease.message.job_id or "")
        self._publisher.publish_again(topic, end, is_wanted=lambda: lease.is_current, on_acknowledged=accepted.set)
        return lease.hold_until(accepted, self._queue, self._stopping)

    def _append(self, lease: Lease) -> bool:
        job_id = lease.message.job_id or ""
        existing = self._ledger.get(job_id)
        if existing is not None and existing.claim is None:  # of the time when the ledger was the queue
            self._queue.acknowledge(lease.message)
            self._lease = None
            return False
        if existing is not None:
            self._forget(existing.seq)
        parsed = self._reader.read(lease.message)
        job = parsed.job
        if job is None:
            problem = "The request is empty." if parsed.refusal is None else parsed.refusal.detail
            job = NewJob(job_id, "", None, "", failure=problem)
        if parsed.audio is not None:
            (name,) = self._spool.store([parsed.audio])
            job = replace(job, audio=AudioSource("spool", name))
        values: Mapping[str, Any] = {} if lease.record is None else lease.record.values
        self._ledger.append_claimed(replace(job, claim=lease.claim), crashes=values.get("crashes", 0))
        if values.get("cancelling"):
            with suppress(IllegalTransitionError):  # it has just crashed too often
                self._ledger.cancel(job_id)
        return True

    def _attend(self, lease: Lease) -> None:
        """Renew the delivery until the job has ended and is published, is given back, or is lost."""
        positions_due = self._monotonic() + _POSITIONS_S if self._is_strict else math.inf
        proof_delays_s, proof_due = iter(_PROOF_DELAYS_S), 0.0
        while True:
            self._changed.clear()
            job = self._ledger.get(lease.message.job_id or "")
            if job is None or job.claim != lease.claim or not lease.is_current:
                self._lose(lease, job)
                return
            if lease.is_due:
                try:
                    lease.renew(self._queue)
                except QueueUnavailableError as exc:
                    log.debug("%s", exc, action="queue_unavailable", job_id=job.job_id)
            if job.state.final and not self._ledger.is_unpublished(job.seq):
                if self._monotonic() >= proof_due:
                    delay_s = self._prove(job, proof_delays_s)
                    if delay_s is None and self._acknowledge(lease):
                        return
                    proof_due = self._monotonic() + (delay_s or 0.0)
            elif self._stopping.is_set() and job.state is JobState.QUEUED and not self._is_working():
                self._return(lease, job)
                return
            elif self._monotonic() >= positions_due and not self._stopping.is_set():
                positions_due = math.inf
                with suppress(QueueUnavailableError):
                    self._publish_positions(lease)
            self._changed.wait(min(_POLL_S, self._ack_wait_s / _RENEWALS / 2))

    def _prove(self, job: Job, delays_s: Iterator[float]) -> float | None:
        """Publish the end of a job again that the broker has acknowledged and does not retain.

        NATS sends the PUBACK also when it could not store the retained message, as without a leader of that stream
        (2.15.1, mqtt.go: "unable to store retained message").

        Returns:
            Seconds until the next look; None: the broker retains it, or does not after several publications.
        """
        try:
            if self._is_retained(job):
                return None
        except QueueUnavailableError as exc:
            log.debug("%s", exc, action="queue_unavailable", job_id=job.job_id)
            return _RETRY_S
        delay_s = next(delays_s, None)
        if delay_s is None:
            message = "The broker acknowledges the end of the job and does not retain it"
            log.error(message, action="not_retained", job_id=job.job_id)
            return None
        message = "The broker does not retain the end of the job, which it has acknowledged: publishing it again"
        log.warning(message, action="not_retained", job_id=job.job_id)
        self._ledger.republish([job.seq])
        return delay_s

    def _is_retained(self, job: Job) -> bool:
        expected = status_of(job, self._topics.consumer)
        status = _status_in(self._queue.retained(self._topics.status(job.job_id)))
        same = all(status.get(name) == expected[name] for name in ("status", "attempt", "completed_at", "consumer"))
        names = job.formats if job.state is JobState.COMPLETED else ()
        return same and all(self._queue.retained(self._topics.result(job.job_id, name)) is not None for name in names)

    def _publish_positions(self, lease: Lease) -> None:
        """Publish the positions of the first waiting jobs: none of them can be claimed while the lease is current.

        One may be cancelled by another consumer. Its record is written before either of them publishes.
        """
        behind = lease.message.seq
        for position in range(1, POSITIONS_TRACKED + 1):
            message = self._queue.job_behind(behind)
            if message is None or not lease.is_current or lease.is_due:
                return
            behind = message.seq
            key = record_key(message.job_id or "")
            record, job = self._queue.record(key), self._reader.read(message).job
            if job is None or record is None or record.values.get("state") != JobState.QUEUED:
                continue
            if self._queue.update_record(key, record, {**record.values, "position": position}) is not None:
                waiting = waiting_job(job, message.received_at, position, time.time())
                self._publisher.publish_status_of(
                    waiting, is_wanted=lambda: lease.is_current, on_acknowledged=lambda: None, is_new=False
                )

    def _acknowledge(self, lease: Lease) -> bool:
        try:
            if lease.is_current:
                self._queue.acknowledge(lease.message)
        except QueueUnavailableError as exc:
            log.warning("%s The job is not acknowledged yet.", exc, action="queue_unavailable")
            return False
        self._lease = None
        return True

    def _lose(self, lease: Lease, job: Job | None) -> None:
        """Give a job up that another consumer has, or may have."""
        lease.lose()
        if job is not None and job.claim == lease.claim and job.state.final:
            self._unproven[job.seq] = job
            message = "The queue was out of reach for longer than ack_wait: another consumer may run the job again"
            log.warning(message, action="claim_lost", job_id=job.job_id)
        elif job is not None and job.claim == lease.claim:
            message = (
                "Job given up: the queue was out of reach for longer than ack_wait, and another consumer may have it"
            )
            log.warning(message, action="claim_lost", job_id=job.job_id)
            while not self._forget(job.seq):
                self._stopping.wait(_RETRY_S)
        self._lease = None

    def _return(self, lease: Lease, job: Job | None) -> None:
        """Give a job back, to be delivered at once; that is no crash."""
        key = record_key(lease.message.job_id or "")
        try:
            if lease.record is not None:
                lease.record = self._queue.update_record(key, lease.record, {**lease.record.values, "returned": True})
            self._queue.give_back(lease.message)
        except QueueUnavailableError as exc:
            log.warning("%s The job goes to another consumer later.", exc, action="queue_unavailable")
        if job is not None:
            log.info("Job given back to the queue", action="given_back", job_id=job.job_id)
            self._forget(job.seq)
        self._lease = None

    def _forget(self, seq: int) -> bool:
        try:
            self._spool.remove(self._ledger.forget(seq))
        except LedgerError as exc:
            log.error("%s", exc, action="intake_degraded")
            return False
        return True


def _status_in(payload: bytes | None) -> dict[str, Any]:
    """Return the fields of a status; empty: there is none, or another program has published something else."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(payload or b"{}"))
    return {}


def _settings_of(job: Job | NewJob) -> tuple[Any, ...]:
    return job.model_size, dict(job.options), dict(job.metadata), tuple(job.formats), job.stream
