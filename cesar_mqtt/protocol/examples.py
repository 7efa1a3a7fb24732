"""Examples of every payload, built by the constructors of the real ones. Pure; any thread may call it."""

import json
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, Job, JobState, Totals
from cesar_mqtt.protocol import formats
from cesar_mqtt.protocol.commands import (
    COMMANDS,
    CURRENT,
    CancelledJobs,
    CommandResult,
    Defaults,
    HealthResponse,
    JobCommand,
    JobList,
    Model,
    Models,
    Paused,
    Rejections,
    Response,
    ResultPage,
    summary_of,
)
from cesar_mqtt.protocol.consumer_payloads import (
    ConsumerState,
    HealthMessage,
    Quarantined,
    info_of,
    last_error_of,
    last_of,
    queue_of,
)
from cesar_mqtt.protocol.fields import FORMATS, Payload, timestamp
from cesar_mqtt.protocol.payloads import (
    Answer,
    JobProgress,
    Rejection,
    deletion_of,
    event_of,
    segment_of,
    status_of,
)
from cesar_mqtt.protocol.schema import message_name
from cesar_mqtt.transcript import Segment

Examples = dict[str, list[Any]]

_STARTED = 1_769_204_700.0
_CONSUMER = "cesar"
_TEXT = "Please call the plumber on Monday morning."
_SEGMENT = Segment(id=1, start_s=0.0, end_s=2.6, text=_TEXT, avg_logprob=-0.212, no_speech_prob=0.013)

_QUEUED = Job(
    seq=1,
    job_id="porch-17",
    state=JobState.QUEUED,
    revision=1,
    created_at=_STARTED,
    updated_at=_STARTED,
    fingerprint="",
    model_size="base",
    audio=AudioSource("path", "porch.wav"),
    formats=("srt", "json"),
    metadata={"room": "porch"},
    queue_position=1,
)
_PROCESSING = _QUEUED._replace(
    state=JobState.PROCESSING, attempt=1, started_at=_STARTED + 0.011, queue_position=None, audio_duration=2.6
)
_COMPLETED = _PROCESSING._replace(
    state=JobState.COMPLETED,
    updated_at=_STARTED + 0.811,
    completed_at=_STARTED + 0.811,
    result_text=_TEXT,
    detected_language="en",
    language_probability=0.982,
    no_speech=False,
)
_FAILED = _PROCESSING._replace(
    state=JobState.ERROR,
    updated_at=_STARTED + 0.02,
    completed_at=_STARTED + 0.02,
    audio_duration=None,
    error_code=ErrorCode.AUDIO_NOT_FOUND,
    error_message="There is no audio file 'porch.wav': put it there and retry the job (command `retry`), or name "
    "another under a new id.",
)
_PROGRESS = JobProgress(
    progress=0.42, processed_duration=1.1, audio_duration=2.6, speed=6.5, eta=0.2, updated_at=_STARTED + 0.4
)


_REJECTION = Rejection(
    reason="invalid_request",
    detail="There is no field 'audio_pth' (did you mean audio_path?).",
    topic="cesar/jobs",
    job_id="porch-17",
    payload_excerpt='{"job_id": "porch-17", "audio_pth": "porch.wav"}',
    received_at=timestamp(_STARTED),
)
_HEALTH = HealthMessage(
    uptime=86_400.0,
    worker_alive=True,
    network_alive=True,
    ledger_bytes=48_211,
    rss_bytes=412_000_000,
    spool_bytes=0,
    disk_free_bytes=21_474_836_480,
    events_dropped=0,
    quarantined=[
        Quarantined(topic="cesar/events", size_bytes=412, cause="denied", skipped=True),
    ],
)


def examples() -> Examples:
    """Return examples of messages by the message's name in the AsyncAPI document."""
    messages = {
        **_requests(),
        **_about_jobs(),
        **_about_the_consumer(),
        **_responses(),
        "cleared": [""],
        "nothing": [""],
    }
    return {name: [_plain(payload) for payload in payloads] for name, payloads in messages.items()}


def _requests() -> Examples:
    about_a_job = [{"job_id": "porch-17"}, {"job_id": CURRENT, "transaction": 7}]
    without_fields: list[Any] = [{}, {"transaction": "a-1"}]
    return {
        "job": [
            {"audio_path": "porch.wav"},
            {
                "job_id": "porch-17",
                "audio_path": "porch.wav",
                "formats": ["srt", "json"],
                "metadata": {"room": "porch"},
            },
            {"audio_url": "http://192.168.1.5/clip.m4a", "language": "de", "priority": 5, "expires_in": 3600},
            {
                "audio_path": "talk.mp3",
                "clip_timestamps": [[0, 30.5], [60, 90]],
                "word_timestamps": True,
                "stream": True,
            },
        ],
        "line": ["porch.wav", "http://192.168.1.5/clip.m4a"],
        "named": ["porch-17", CURRENT],
        **{
            message_name(command, "Request"): about_a_job if issubclass(kind.request, JobCommand) else without_fields
            for command, kind in COMMANDS.items()
        },
        "resultRequest": [
            {"job_id": "porch-17"},
            {"job_id": "porch-17", "format": "srt", "offset": 65_536, "length": 65_536},
        ],
        "listRequest": [{}, {"status": "error", "limit": 10, "after": "porch-17"}],
        "rejectedRequest": [{}, {"limit": 10}],
        "setRequest": [{"default_language": "de"}, {"default_model": "auto", "default_language": "auto"}],
    }


def _about_jobs() -> Examples:
    content = formats.content_of(_COMPLETED, [_SEGMENT])
    files = {name: formats.render(name, content)[0].decode() for name in FORMATS}
    return {
        **{f"{name}Result": [json.loads(file) if name == "json" else file] for name, file in files.items()},
        "status": [
            status_of(_QUEUED, _CONSUMER),
            status_of(_PROCESSING, _CONSUMER, _PROGRESS),
            status_of(_COMPLETED, _CONSUMER),
            status_of(_FAILED, _CONSUMER),
            status_of(_QUEUED._replace(job_id="doorbell-3", priority=9), _CONSUMER),
        ],
        "segment": [segment_of(_QUEUED.job_id, _SEGMENT)],
        "event": [event_of(_COMPLETED, _CONSUMER), deletion_of("porch-17", _CONSUMER, _STARTED + 60)],
        "rejection": [_REJECTION],
        "accepted": [Answer(job_id="porch-17", status="queued")],
    }


def _about_the_consumer() -> Examples:
    totals = Totals(
        queued=2,
        completed_total=17,
        error_total=1,
        cancelled_total=0,
        rejected_total=0,
        deleted_total=0,
        oldest_queued_at=_STARTED - 12.5,
        processing="porch-17",
        revision=311,
    )
    settings = Settings(data_dir=Path("/var/lib/cesar-mqtt"), broker=BrokerSettings(url="mqtt://127.0.0.1:1883"))
    info = info_of(
        settings.redacted(),
        models=["base", "tiny.en"],
        default_model="base",
        default_language=None,
        device="cpu",
        compute_type="int8",
        cpu_threads=4,
        workers=4,
        batching=False,
        started=_STARTED - 86_400,
    )
    return {
        "state": [ConsumerState(state="online"), ConsumerState(state="offline")],
        "queue": [queue_of(totals, "processing", _STARTED, _PROCESSING, _PROGRESS)],
        "last": [last_of(_COMPLETED)],
        "last_error": [last_error_of(_FAILED)],
        "info": [info],
        "health": [_HEALTH],
    }


def _responses() -> Examples:
    text = f"1\n00:00:00,000 --> 00:00:02,600\n{_TEXT}\n\n"
    size = len(text.encode())
    base = Model(name="base", origin="cache", size_bytes=148_000_000, multilingual=True, default=True, problem=None)
    data: dict[str, Any] = {
        "cancel": CommandResult(job_id="porch-17", status="cancelled", consumer=_CONSUMER),
        "retry": CommandResult(job_id="porch-17", status="queued", consumer=_CONSUMER),
        "delete": CommandResult(job_id="porch-17", status="deleted", consumer=_CONSUMER),
        "get": status_of(_COMPLETED, _CONSUMER),
        "result": ResultPage(
            job_id="porch-17",
            format="srt",
            offset=0,
            length=size,
            total=size,
            text=text,
            more=False,
            consumer=_CONSUMER,
        ),
        "list": JobList(jobs=[summary_of(status_of(_COMPLETED, _CONSUMER))], next=None, total=1, consumer=_CONSUMER),
        "rejected": Rejections(rejected=[_REJECTION], total=1, consumer=_CONSUMER),
        "retry_last": CommandResult(job_id="porch-17", status="queued", consumer=_CONSUMER),
        "cancel_all": CancelledJobs(cancelled=12, processing="porch-17", consumer=_CONSUMER),
        "set": Defaults(default_model="base", default_language="de", consumer=_CONSUMER),
        "pause": Paused(paused=True, consumer=_CONSUMER),
        "resume": Paused(paused=False, consumer=_CONSUMER),
        "health": HealthResponse(**_HEALTH.model_dump(), consumer=_CONSUMER),
        "models": Models(
            default="base",
            default_language=None,
            loaded="base",
            device="cpu",
            compute_type="int8",
            cpu_threads=4,
            workers=4,
            models=[base],
            consumer=_CONSUMER,
        ),
    }
    responses: Examples = {
        message_name(command, "Response"): [
            Response(status="ok", data=_plain(data[command]), error=None, transaction="a-1")
        ]
        for command in COMMANDS
    }
    responses["cancelResponse"].append(_failure("There is no job porch-18: it never existed, or it was deleted.", 7))
    unknown = f"There is no command 'cancle': use one of {', '.join(COMMANDS)}."
    return {**responses, "failure": [_failure(unknown, None)]}


def _failure(error: str, transaction: Any) -> Response:
    return Response(status="error", data={"consumer": _CONSUMER}, error=error, transaction=transaction)


def _plain(payload: Any) -> Any:
    """Return a payload as it is read from the bus."""
    if isinstance(payload, str):
        return payload
    return json.loads(payload.encode() if isinstance(payload, Payload) else to_json(payload))
