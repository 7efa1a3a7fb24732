"""What the consumer tells of itself and of each change, as frozen models; any thread may make them."""

from typing import Any, Literal

from pydantic_core import from_json

from cesar_mqtt import __version__
from cesar_mqtt.jobs import Job, JobState, Totals
from cesar_mqtt.protocol.payloads import Payload, cut, timestamp

LAST_TEXT_BYTES = 12_000
"""Home Assistant records at most 16 KiB of attributes with a state; this leaves room for the others."""


class ConsumerState(Payload):
    """Whether the consumer is there; `offline` is also its last will."""

    state: Literal["online", "offline"]


Activity = Literal["starting", "loading", "idle", "processing", "paused", "draining", "degraded"]


class Queue(Payload):
    """What the consumer is doing and what waits. `oldest_age` in seconds, None when nothing waits."""

    activity: Activity
    job_id: str | None
    queued: int
    oldest_age: float | None
    paused: bool
    completed_total: int
    error_total: int
    cancelled_total: int
    rejected_total: int
    deleted_total: int


def queue_of(totals: Totals, activity: Activity, now: float) -> Queue:
    """Return the consumer's queue as it is at `now`, in seconds since the epoch."""
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
    )


def standing_of(totals: Totals) -> tuple[int, ...]:
    """Return what a queue message tells of all jobs, whatever the consumer was doing."""
    return totals.queued, totals.completed_total, totals.error_total, totals.cancelled_total, totals.deleted_total


def standing_in(payload: bytes) -> tuple[Any, ...] | None:
    """Return the same of a queue message as it came from the broker; None: it is none."""
    try:
        document = from_json(payload)
        known = (document[name] for name in ("queued", "completed_total", "error_total", "cancelled_total"))
        return *known, document.get("deleted_total", 0)  # the first versions did not tell
    except (ValueError, TypeError, KeyError):
        return None


class Last(Payload):
    """The job that ended last."""

    job_id: str
    status: JobState
    text: str | None
    text_truncated: bool
    language: str | None
    audio_duration: float | None
    completed_at: str


def last_of(job: Job) -> Last:
    """Return what is told of the last job, with its text cut to `LAST_TEXT_BYTES` of UTF-8."""
    text = None if job.result_text is None else cut(job.result_text, LAST_TEXT_BYTES)
    return Last(
        job_id=job.job_id,
        status=job.state,
        text=text,
        text_truncated=text != job.result_text,
        language=job.detected_language,
        audio_duration=job.audio_duration,
        completed_at=timestamp(job.completed_at or job.updated_at),
    )


class HealthMessage(Payload):
    """How the consumer is, once a minute; seconds and bytes. None: it cannot be measured there."""

    uptime: float
    worker_alive: bool
    network_alive: bool
    ledger_bytes: int
    rss_bytes: int
    spool_bytes: int
    disk_free_bytes: int | None


class Limits(Payload):
    """The most that a request may bring."""

    max_payload_bytes: int
    max_queued: int
    max_audio_bytes: int
    max_audio_duration: float
    job_timeout: float | None


class Info(Payload):
    """What the consumer is, at each start: the settings hold no secret."""

    version: str
    models: list[str]
    default_model: str
    device: str
    compute_type: str
    limits: Limits
    broker: str
    started_at: str
    settings: dict[str, Any]


def info_of(
    settings: dict[str, Any], *, models: list[str], default_model: str, device: str, compute_type: str, started: float
) -> Info:
    """Return what the consumer is.

    Args:
        settings: as `Settings.redacted` gives them.
        models: those that a job may name and that are on this machine.
        default_model: that of jobs which name none.
        device: `cpu` or `cuda`.
        compute_type: the precision, as CTranslate2 calls it.
        started: seconds since the epoch.
    """
    return Info(
        version=__version__,
        models=models,
        default_model=default_model,
        device=device,
        compute_type=compute_type,
        limits=Limits(
            max_payload_bytes=settings["queue"]["max_payload_bytes"],
            max_queued=settings["queue"]["max_queued"],
            max_audio_bytes=settings["audio"]["max_bytes"],
            max_audio_duration=settings["audio"]["max_duration"],
            job_timeout=settings["worker"]["job_timeout"],
        ),
        broker=settings["broker"]["url"],
        started_at=timestamp(started),
        settings=settings,
    )
