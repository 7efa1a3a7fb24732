"""What a message on the bus asks for: a job, a refusal, an answer; any thread may call it."""

import hashlib
import uuid
from dataclasses import dataclass, replace
from typing import Protocol

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
from cesar_mqtt.protocol.requests import JobRequest
from cesar_mqtt.protocol.topics import Topics


class ModelNames(Protocol):
    """What has to be known of models."""

    def default_name(self) -> str:
        """Return the model of a request that names none."""

    def is_allowed(self, name: str) -> bool:
        """Whether a request may name this model."""


@dataclass(frozen=True, slots=True)
class IncomingMessage:
    """What one message asks for: a job, a refusal, both (a refusal that is recorded), or nothing (an empty payload).

    Attributes:
        delivery: the message.
        job: what goes into the ledger.
        audio: what goes into the spool.
        refusal: what the producer is told.
        command: the request that is to be answered.
        found: what the consumer has said as its queue; what the broker retains of that, if it came retained.
        born: whether Home Assistant says that it has started.
    """

    delivery: Delivery
    job: NewJob | None = None
    audio: bytes | None = None
    refusal: Refusal | None = None
    command: str | None = None
    found: bytes | None = None
    born: bool = False


class MessageParser:
    """Reads messages; keeps nothing."""

    def __init__(self, topics: Topics, models: ModelNames, *, max_payload_bytes: int) -> None:
        """Take what tells jobs from audio, the models that may be asked for, and the size of the largest message."""
        self._topics = topics
        self._models = models
        self._max_payload_bytes = max_payload_bytes

    def plan(self, delivery: Delivery) -> IncomingMessage:
        """Read one message; a bad one is a plan, too."""
        if delivery.topic == self._topics.own("queue"):
            # What comes once more tells how it was at an earlier connection.
            return IncomingMessage(delivery, found=None if delivery.dup else delivery.payload)
        command = self._topics.request_command(delivery.topic)
        if command is not None:
            return IncomingMessage(delivery, command=command)
        if delivery.topic == self._topics.own(PAUSE_SWITCH):
            return _switched(delivery)
        if not self._topics.is_submission(delivery.topic):  # a birth topic, or what an earlier setting subscribed to
            return IncomingMessage(delivery, born=delivery.payload == BIRTH_PAYLOAD and not delivery.retain)
        return (
            self._submitted(delivery) if delivery.payload else IncomingMessage(delivery)
        )  # empty: what clears a retained one

    def _submitted(self, delivery: Delivery) -> IncomingMessage:
        parsed = self._parse(delivery)
        if isinstance(parsed, Accepted):
            parsed = self._with_model(parsed)
        if isinstance(parsed, Refusal):
            return IncomingMessage(delivery, self._recorded(parsed), refusal=parsed)
        return IncomingMessage(delivery, self._job(delivery, parsed), parsed.audio)

    def _parse(self, delivery: Delivery) -> Parsed:
        audio_id = self._topics.audio_job_id(delivery.topic)
        if len(delivery.payload) > self._max_payload_bytes:
            return self._too_large(delivery, audio_id)
        if audio_id is not None:
            return parse_audio(audio_id, delivery.payload, delivery.user_properties)
        return parse_submission(delivery.payload, delivery.user_properties)

    def _too_large(self, delivery: Delivery, audio_id: str | None) -> Refusal:
        """Refuse without a look inside: only a topic can tell whose job it would have been."""
        size, limit = len(delivery.payload), self._max_payload_bytes
        detail = f"The message has {size} bytes, at most {limit} are taken (queue.max_payload_bytes)."
        if audio_id is None or not is_usable_id(audio_id):
            return Refusal("payload_too_large", detail)
        return reject_upload("payload_too_large", detail, audio_id, delivery.user_properties)

    def _with_model(self, parsed: Accepted) -> Parsed:
        request = parsed.request
        name, job_id = request.model_size, request.job_id
        if name is None or self._models.is_allowed(name):
            detail = _beyond(name or self._models.default_name(), request)
        else:
            detail = f"model_size: {name!r} is not among the models that this consumer may use (models.allowed)."
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

    def _recorded(self, refusal: Refusal) -> NewJob | None:
        if not refusal.recordable or refusal.job_id is None:
            return None
        return NewJob(
            job_id=refusal.job_id,
            fingerprint=hashlib.sha256(refusal.detail.encode()).hexdigest()[:32],
            audio=refusal.audio,
            model_size=self._models.default_name(),
            metadata=refusal.metadata,
            failure=refusal.detail,
        )

    def _job(self, delivery: Delivery, parsed: Accepted) -> NewJob:
        request, same = parsed.request, fingerprint(parsed)
        job_id, packet_id = request.job_id, None
        if job_id is None and delivery.retain:
            job_id = f"retained-{same}"
        elif job_id is None:
            job_id = str(uuid.uuid4())
            packet_id = delivery.receipt.mid if delivery.qos else None
        return NewJob(
            job_id=job_id,
            fingerprint=same,
            audio=source_of(request),
            model_size=request.model_size or self._models.default_name(),
            options=request.options(),
            metadata=request.metadata,
            formats=tuple(request.formats),
            stream=request.stream,
            expires_at=_expires_at(delivery, request),
            packet_id=packet_id,
            redelivered=delivery.dup,
            has_generated_id=request.job_id is None,
            retained=delivery.retain,
        )


def _switched(delivery: Delivery) -> IncomingMessage:
    """Return what a switch asks for, as if it had been asked for on the control topics."""
    command = _SWITCH.get(delivery.payload)
    if command is None:
        return IncomingMessage(delivery, refusal=Refusal("invalid_request", "A switch takes ON or OFF."))
    return IncomingMessage(replace(delivery, payload=b""), command=command)


_SWITCH = {b"ON": "pause", b"OFF": "resume"}


def _expires_at(delivery: Delivery, request: JobRequest) -> float | None:
    """Return from when on the job is not worth starting: what the request says and what MQTT 5 says mean the same."""
    limits = [limit_s for limit_s in (request.expires_in, delivery.expires_in_s) if limit_s is not None]
    return delivery.received_at + min(limits) if limits else None


def _beyond(model: str, request: JobRequest) -> str | None:
    """Say what a model cannot do of what is asked for, as far as its name tells; None: nothing."""
    translates = request.task == "translate"
    if model.endswith(_ENGLISH_ONLY) and (translates or request.language not in {None, "en"}):
        field, lack = ("task", "cannot translate") if translates else ("language", f"knows no {request.language!r}")
        return f"{field}: the model {model!r} is English-only and {lack}. Choose one that does not end in '.en'."
    if translates and (model in _TURBO or model.startswith(_DISTILLED)):
        return f"task: the model {model!r} cannot translate. Choose another one, such as 'large-v3'."
    return None


_ENGLISH_ONLY = ".en"
_DISTILLED = "distil-"
_TURBO = frozenset({"turbo", "large-v3-turbo"})
"""Of these and the distilled ones translation was left out in training: asked to translate, they transcribe."""
