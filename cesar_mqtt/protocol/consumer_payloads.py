"""What the consumer publishes about itself, on `cesar/consumer/<name>/...`. Frozen models; any thread may make them."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from pydantic_core import from_json

from cesar_mqtt import __version__
from cesar_mqtt.jobs import Job, Totals
from cesar_mqtt.protocol.fields import (
    AudioDuration,
    AudioName,
    ComputeType,
    CpuThreads,
    DefaultLanguage,
    DefaultModel,
    DetectedLanguage,
    Device,
    FailureCode,
    FailureMessage,
    IsPaused,
    JobId,
    Payload,
    PublishedId,
    State,
    TextTruncated,
    Timestamp,
    Version,
    Workers,
    timestamp,
)
from cesar_mqtt.protocol.payloads import JobProgress, audio_source_of
from cesar_mqtt.protocol.truncate import truncate_text

LAST_TEXT_BYTES = 12_000
"""Home Assistant records at most 16 KiB of attributes with a state; this leaves room for the others."""

Activity = Literal["starting", "loading", "idle", "processing", "paused", "draining", "degraded"]

Cause = Literal["too_large", "denied"]
QUARANTINE_ADVICE: Mapping[str, str] = {
    "too_large": "If the broker has a limit on packets, raise it, or set broker.max_packet_bytes.",
    "denied": "If the broker's access list denies the topic, allow it to the consumer's user.",
}


class ConsumerState(Payload):
    """Whether the consumer is connected. `offline` is also its last will."""

    state: Literal["online", "offline"] = Field(description="Whether it is connected.")


class Queue(Payload):
    """What the consumer is doing, and how many jobs are queued."""

    activity: Activity = Field(description="What it is doing; `degraded`: its disk rejects writes.")
    job_id: PublishedId | None = Field(description="The running job; null if there is none.")
    queued: int = Field(description="How many jobs are queued.")
    oldest_age: float | None = Field(description="How many seconds the oldest of them has waited; null if none waits.")
    paused: IsPaused
    completed_total: int = Field(description="How many jobs have been completed since the ledger was created.")
    error_total: int = Field(description="How many jobs have ended in an error since then.")
    cancelled_total: int = Field(description="How many jobs have been cancelled since then.")
    rejected_total: int = Field(description="How many messages have been rejected since then.")
    deleted_total: int = Field(description="How many jobs have been deleted since then, also by retention.")
    revision: int = Field(description="The number of the ledger's newest transaction: it only grows.")
    retryable: int = Field(description="How many of the finished jobs can be retried.")
    progress: float | None = Field(description="How much of the running job is done, 0 to 1; null if there is none.")
    eta: float | None = Field(description="In how many seconds the running job will be done; null if not known.")
    audio_source: AudioName


def queue_of(
    totals: Totals, activity: Activity, now: float, running: Job | None = None, progress: JobProgress | None = None
) -> Queue:
    """Return the consumer's queue at `now`, in seconds since the epoch; `running` is the running job."""
    oldest = totals.oldest_queued_at
    return Queue(
        activity=activity,
        job_id=totals.processing,
        queued=totals.queued,
        oldest_age=None if oldest is None else round(max(0.0, now - oldest), 1),
        paused=totals.paused,
        completed_total=totals.completed_total,
        error_total=totals.error_total,
        cancelled_total=totals.cancelled_total,
        rejected_total=totals.rejected_total,
        deleted_total=totals.deleted_total,
        revision=totals.revision,
        retryable=totals.retryable,
        progress=None if running is None else (0.0 if progress is None else progress.progress),
        eta=None if running is None or progress is None else progress.eta,
        audio_source=None if running is None else audio_source_of(running),
    )


def totals_of(totals: Totals) -> tuple[int, ...]:
    """Return the totals in a queue message; they do not depend on what the consumer is doing."""
    return totals.queued, totals.completed_total, totals.error_total, totals.cancelled_total, totals.deleted_total


def totals_in(payload: bytes) -> tuple[Any, ...] | None:
    """Return the totals in a queue message from the broker; None if it is no queue message."""
    try:
        document = from_json(payload)
        known = (document[name] for name in ("queued", "completed_total", "error_total", "cancelled_total"))
        return *known, document.get("deleted_total", 0)  # the first versions did not have it
    except (ValueError, TypeError, KeyError):
        return None


class Last(Payload):
    """The job that was completed last."""

    job_id: JobId
    status: State = Field(description="`completed`.")
    audio_source: AudioName
    no_speech: bool | None = Field(description="Whether the recording has no speech.")
    text: str | None = Field(
        description=f"Its transcript, at most {LAST_TEXT_BYTES:,} bytes of it; null if the job was deleted."
    )
    text_truncated: TextTruncated
    language: DetectedLanguage
    audio_duration: AudioDuration
    completed_at: Timestamp = Field(description="When the job ended.")


class LastError(Payload):
    """The job that failed last."""

    job_id: JobId
    error_code: FailureCode
    error_message: FailureMessage
    audio_source: AudioName
    completed_at: Timestamp = Field(description="When the job ended.")


def last_of(job: Job) -> Last:
    """Return what is published about the job that was completed last."""
    text = None if job.result_text is None else truncate_text(job.result_text, LAST_TEXT_BYTES)
    return Last(
        job_id=job.job_id,
        status=job.state,
        audio_source=audio_source_of(job),
        no_speech=job.no_speech,
        text=text,
        text_truncated=text != job.result_text,
        language=job.detected_language,
        audio_duration=job.audio_duration,
        completed_at=timestamp(job.completed_at or job.updated_at),
    )


class Quarantined(Payload):
    """A message that the broker does not accept."""

    topic: str = Field(description="Its topic.")
    size_bytes: int = Field(description="The size of its topic and payload.")
    cause: Cause = Field(
        description="The likely reason: `too_large`, over a limit of the broker; `denied`, by its access list."
    )
    skipped: bool = Field(description="Whether it is skipped for a while; false: it is cut, and published last.")


def last_error_of(job: Job) -> LastError:
    """Return what is published about the job that failed last."""
    return LastError(
        job_id=job.job_id,
        error_code=job.error_code,
        error_message=job.error_message,
        audio_source=audio_source_of(job),
        completed_at=timestamp(job.completed_at or job.updated_at),
    )


class WebhookHealth(Payload):
    """What becomes of the webhook's requests."""

    pending: int = Field(description="How many are not delivered yet.")
    given_up: int = Field(description="How many were given up since the start.")
    problem: str | None = Field(description="Why the last one failed; null: it did not.")


class HealthMessage(Payload):
    """The health of the consumer, once a minute."""

    uptime: float = Field(description="Seconds since the start.")
    worker_alive: bool = Field(description="Whether the worker thread runs.")
    network_alive: bool = Field(description="Whether the consumer is connected to the broker.")
    ledger_bytes: int = Field(description="The size of the ledger on disk.")
    rss_bytes: int = Field(description="The memory of the process.")
    spool_bytes: int = Field(description="The size on disk of the recordings that came with jobs.")
    disk_free_bytes: int | None = Field(description="The free space on that disk; null if it cannot be measured.")
    events_dropped: int = Field(
        description="How many changes of jobs have had no event since the start: a job changed again before the first "
        "change was published."
    )
    quarantined: list[Quarantined] = Field(description="The messages that the broker does not accept.")
    webhook: WebhookHealth | None = Field(
        default=None, description="What becomes of the webhook's requests; null: there is no webhook."
    )


class Limits(Payload):
    """The limits of a request."""

    max_payload_bytes: int = Field(description="The largest message that is accepted.")
    max_queued: int = Field(description="How many jobs may be queued.")
    max_audio_bytes: int = Field(description="The largest recording, in bytes.")
    max_audio_duration: float = Field(description="The longest recording, in seconds.")
    job_timeout: float | None = Field(description="How many seconds an attempt may take; null: no limit.")


class Info(Payload):
    """What the consumer is and how it is configured, published at each start and after `set`."""

    version: Version
    models: list[str] = Field(description="The models that a job may name and that are on this machine.")
    default_model: DefaultModel
    default_language: DefaultLanguage
    device: Device
    compute_type: ComputeType
    cpu_threads: CpuThreads
    workers: Workers
    batching: bool = Field(
        description="Whether the model decodes as many pieces at once as `batch_size` says. On a CPU it does not, for "
        "that is slower: `workers` transcribe windows at once."
    )
    limits: Limits = Field(description="The most that a request may hold.")
    broker: str = Field(description="The address of the broker.")
    started_at: Timestamp = Field(description="When the consumer was started.")
    web: str | None = Field(description="The address of its web page; null if it has none.")
    settings: dict[str, Any] = Field(description="All settings, without any secret.")


def info_of(
    settings: dict[str, Any],
    *,
    models: list[str],
    default_model: str,
    default_language: str | None,
    device: str,
    compute_type: str,
    cpu_threads: int,
    workers: int,
    batching: bool,
    started: float,
    web: str | None = None,
) -> Info:
    """Return what the consumer publishes at its start.

    Args:
        settings: as `Settings.redacted` returns them.
        models: those that a job may name and that are on this machine.
        default_model: that of jobs which name none.
        default_language: the same; None: it is detected.
        device: `cpu` or `cuda`.
        compute_type: the precision, as CTranslate2 names it.
        workers: how many windows are transcribed at once.
        cpu_threads: how many threads each of them uses.
        batching: whether `batch_size` makes the model decode several pieces at once.
        started: seconds since the epoch.
        web: the address of its web page; None: it has none.
    """
    return Info(
        version=__version__,
        models=models,
        default_model=default_model,
        default_language=default_language,
        device=device,
        compute_type=compute_type,
        cpu_threads=cpu_threads,
        workers=workers,
        batching=batching,
        limits=Limits(
            max_payload_bytes=settings["queue"]["max_payload_bytes"],
            max_queued=settings["queue"]["max_queued"],
            max_audio_bytes=settings["audio"]["max_bytes"],
            max_audio_duration=settings["audio"]["max_duration"],
            job_timeout=settings["worker"]["job_timeout"],
        ),
        broker=settings["broker"]["url"],
        started_at=timestamp(started),
        web=web,
        settings=settings,
    )
