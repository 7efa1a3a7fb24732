"""From an MQTT message to what the intake does with it: a job, a refusal, a command. Pure; any thread may call it."""

import hashlib
import uuid
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cesar_mqtt.consumer.discovery import BIRTH_PAYLOAD, PAUSE_SWITCH
from cesar_mqtt.jobs import NewJob
from cesar_mqtt.mqtt.messages import Delivery
from cesar_mqtt.protocol.parsing import (
    UPLOAD,
    Accepted,
    Parsed,
    Refusal,
    fingerprint,
    is_usable_id,
    parse_audio,
    parse_submission,
    reject_upload,
    source_of,
)
from cesar_mqtt.protocol.requests import MAX_PRIORITY, JobRequest
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.redaction import redact_value


class ModelNames(Protocol):
    """The models that requests may name."""

    def default_name(self) -> str:
        """Return the model of a request that names none."""

    def language_for(self, name: str) -> str | None:
        """Return the language of a request for a model that names none; None: it is detected."""

    def is_allowed(self, name: str) -> bool:
        """Whether a request may name this model."""

    def explain_unknown(self, name: str) -> str:
        """Return why a request may not name this model, and which it may, as a part of a sentence."""


@dataclass(slots=True)  # frozen it would take three times as long to make
class IncomingMessage:
    """One message: a job, a refusal, both (a refusal that is recorded), a command, or none of them (empty payload).

    Attributes:
        delivery: the message.
        job: for the ledger.
        audio: for the spool.
        refusal: for the producer.
        command: the name of the command to execute.
        queue_message: the consumer's own `queue` message, as the broker returned it.
        is_birth: whether Home Assistant announces its start.
    """

    delivery: Delivery
    job: NewJob | None = None
    audio: bytes | None = None
    refusal: Refusal | None = None
    command: str | None = None
    queue_message: bytes | None = None
    is_birth: bool = False


class MessageParser:
    """Reads messages; holds no state."""

    def __init__(
        self,
        topics: Topics,
        models: ModelNames,
        *,
        max_payload_bytes: int,
        limited_by: str = "queue.max_payload_bytes",
        max_priority: int = MAX_PRIORITY,
    ) -> None:
        """Take the topics, the models that requests may name, and the limits of a message and of a priority.

        `limited_by` says which setting limits a message, and what to do with a larger one.
        """
        self._topics = topics
        self._models = models
        self._max_payload_bytes = max_payload_bytes
        self._limited_by = limited_by
        self._max_priority = max_priority

    def parse(self, delivery: Delivery) -> IncomingMessage:
        """Read one message; an invalid one yields a refusal."""
        if self._topics.is_submission(delivery.topic):
            # An empty payload clears a retained submission.
            return self._submission(delivery) if delivery.payload else IncomingMessage(delivery)
        if delivery.topic == self._topics.own("queue"):
            # A redelivery shows the queue at an earlier connection.
            return IncomingMessage(delivery, queue_message=None if delivery.dup else delivery.payload)
        command = self._topics.request_command(delivery.topic)
        if command is not None:
            return IncomingMessage(delivery, command=command)
        if delivery.topic == self._topics.own(PAUSE_SWITCH):
            return _pause_command(delivery)
        # A birth topic, or one of an earlier configuration.
        return IncomingMessage(delivery, is_birth=delivery.payload == BIRTH_PAYLOAD and not delivery.retain)

    def _submission(self, delivery: Delivery) -> IncomingMessage:
        parsed = self._parse_request(delivery)
        if isinstance(parsed, Accepted):
            parsed = self._check_model(parsed)
        if isinstance(parsed, Refusal):
            return IncomingMessage(delivery, self._failed_job(parsed, retained=delivery.retain), refusal=parsed)
        return IncomingMessage(delivery, self._job(delivery, parsed), parsed.audio)

    def _parse_request(self, delivery: Delivery) -> Parsed:
        audio_id = self._topics.audio_job_id(delivery.topic)
        if len(delivery.payload) > self._max_payload_bytes:
            return self._reject_too_large(delivery, audio_id)
        if audio_id is not None:
            return parse_audio(audio_id, delivery.payload, delivery.user_properties)
        return parse_submission(delivery.payload, delivery.user_properties)

    def _reject_too_large(self, delivery: Delivery, audio_id: str | None) -> Refusal:
        """Reject without reading the payload: only the topic can name the job."""
        size, limit = len(delivery.payload), self._max_payload_bytes
        detail = f"The message has {size} bytes: at most {limit} are accepted ({self._limited_by})."
        if audio_id is None or not is_usable_id(audio_id):
            return Refusal("payload_too_large", detail)
        return reject_upload("payload_too_large", detail, audio_id, delivery.user_properties)

    def _check_model(self, parsed: Accepted) -> Parsed:
        request = parsed.request
        name, job_id = request.model_size, request.job_id
        if name is None or self._models.is_allowed(name):
            detail = request.unsupported_by(name or self._models.default_name())
        else:
            detail = f"model_size: {self._models.explain_unknown(redact_value(name))}."
        if detail is None:
            return parsed
        return Refusal(
            "invalid_request",
            detail,
            job_id,
            recordable=job_id is not None,
            metadata=request.metadata,
            audio=source_of(request) or UPLOAD,
        )

    def _failed_job(self, refusal: Refusal, *, retained: bool) -> NewJob | None:
        """Return the job that is recorded as failed, so that subscribers of its status learn of the rejection."""
        if not refusal.recordable or refusal.job_id is None:
            return None
        return NewJob(
            job_id=refusal.job_id,
            fingerprint=hashlib.sha256(refusal.detail.encode()).hexdigest()[:32],
            audio=refusal.audio,
            model_size=self._models.default_name(),
            metadata=refusal.metadata,
            failure=refusal.detail,
            retained=retained,
        )

    def _job(self, delivery: Delivery, parsed: Accepted) -> NewJob:
        request, same = parsed.request, fingerprint(parsed)
        job_id, packet_id = request.job_id, None
        model = request.model_size or self._models.default_name()
        if job_id is None and delivery.retain:
            job_id = f"retained-{same}"
        elif job_id is None:
            job_id = str(uuid.uuid4())
            packet_id = delivery.receipt.mid if delivery.qos else None
        return NewJob(
            job_id=job_id,
            fingerprint=same,
            audio=source_of(request),
            model_size=model,
            options=self._options(request, model),
            metadata=request.metadata,
            formats=tuple(request.formats),
            stream=request.stream,
            priority=min(request.priority, self._max_priority),
            expires_at=_expires_at(delivery, request),
            packet_id=packet_id,
            redelivered=delivery.dup,
            has_generated_id=request.job_id is None,
            retained=delivery.retain,
        )

    def _options(self, request: JobRequest, model: str) -> dict[str, Any]:
        """Return the options of a job; its language may be the default one of its model."""
        options = request.options()
        if not request.leaves_language_open:
            return options
        language = self._models.language_for(model)
        return options if language is None else options | {"language": language}


def _pause_command(delivery: Delivery) -> IncomingMessage:
    """Return the command of Home Assistant's pause switch."""
    command = _SWITCH.get(delivery.payload)
    if command is None:
        return IncomingMessage(delivery, refusal=Refusal("invalid_request", "The pause switch takes ON or OFF."))
    return IncomingMessage(replace(delivery, payload=b""), command=command)


_SWITCH = {b"ON": "pause", b"OFF": "resume"}


def _expires_at(delivery: Delivery, request: JobRequest) -> float | None:
    """Return when the job expires: the earlier of `expires_in` and the Message Expiry of MQTT 5."""
    limits = [limit_s for limit_s in (request.expires_in, delivery.expires_in_s) if limit_s is not None]
    return delivery.received_at + min(limits) if limits else None
