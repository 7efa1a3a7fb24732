"""Examples of every payload, made by what makes the real ones; pure, any thread may call it."""

import json
from pathlib import Path
from typing import Any

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, Job, JobState, Totals
from cesar_mqtt.protocol import formats
from cesar_mqtt.protocol.commands import (
    CommandResult,
    HealthResponse,
    JobList,
    Model,
    Models,
    Paused,
    Response,
    ResultPage,
    summary_of,
)
from cesar_mqtt.protocol.consumer_payloads import ConsumerState, HealthMessage, info_of, last_of, queue_of
from cesar_mqtt.protocol.payloads import (
    JobProgress,
    Payload,
    Rejection,
    deletion_of,
    event_payload,
    segment_of,
    status_of,
    timestamp,
)
from cesar_mqtt.transcript import Segment

Examples = dict[str, list[Any]]

_BEGAN = 1_769_204_700.0
_CONSUMER = "cesar"
_TEXT = "Please call the plumber on Monday morning."
_SEGMENT = Segment(id=1, start_s=0.0, end_s=2.6, text=_TEXT, avg_logprob=-0.212, no_speech_prob=0.013)

_QUEUED = Job(
    seq=1,
    job_id="porch-17",
    state=JobState.QUEUED,
    revision=1,
    created_at=_BEGAN,
    updated_at=_BEGAN,
    fingerprint="",
    model_size="base",
    audio=AudioSource("path", "porch.wav"),
    formats=("srt", "json"),
    metadata={"room": "porch"},
    queue_position=1,
)
_PROCESSING = _QUEUED._replace(
    state=JobState.PROCESSING, attempt=1, started_at=_BEGAN + 0.011, queue_position=None, audio_duration=2.6
)
_COMPLETED = _PROCESSING._replace(
    state=JobState.COMPLETED,
    updated_at=_BEGAN + 0.811,
    completed_at=_BEGAN + 0.811,
    result_text=_TEXT,
    detected_language="en",
    language_probability=0.982,
    no_speech=False,
)
_FAILED = _PROCESSING._replace(
    state=JobState.ERROR,
    updated_at=_BEGAN + 0.02,
    completed_at=_BEGAN + 0.02,
    audio_duration=None,
    error_code=ErrorCode.AUDIO_NOT_FOUND,
    error_message="There is no audio file 'porch.wav': put it there and retry the job (command `retry`), or name "
    "another under a new id.",
)
_LIVE = JobProgress(
    progress=0.42, processed_duration=1.1, audio_duration=2.6, speed=6.5, eta=0.2, updated_at=_BEGAN + 0.4
)


def examples() -> Examples:
    """Return examples of messages by the message's name in the AsyncAPI document."""
    return {**_requests(), **_told_of_jobs(), **_told_of_the_consumer(), **_answers(), "cleared": [""], "nothing": [""]}


def _requests() -> Examples:
    of_a_job: list[Any] = [{"job_id": "porch-17"}, {"job_id": "current", "transaction": 7}]
    plain: list[Any] = [{}, {"transaction": "a-1"}]
    return {
        "job": [
            {"audio_path": "porch.wav"},
            {
                "job_id": "porch-17",
                "audio_path": "porch.wav",
                "formats": ["srt", "json"],
                "metadata": {"room": "porch"},
            },
            {"audio_url": "http://192.168.1.5/clip.m4a", "language": "de", "expires_in": 3600},
            {
                "audio_path": "talk.mp3",
                "clip_timestamps": [[0, 30.5], [60, 90]],
                "word_timestamps": True,
                "stream": True,
            },
        ],
        "line": ["porch.wav", "http://192.168.1.5/clip.m4a"],
        "named": ["porch-17", "current"],
        **{f"{command}Request": of_a_job for command in ("cancel", "retry", "delete", "get")},
        **{f"{command}Request": plain for command in ("pause", "resume", "health", "models")},
        "resultRequest": [
            {"job_id": "porch-17"},
            {"job_id": "porch-17", "format": "srt", "offset": 65_536, "length": 65_536},
        ],
        "listRequest": [{}, {"status": "error", "limit": 10, "after": "porch-17"}],
    }


def _told_of_jobs() -> Examples:
    content = formats.content_of(_COMPLETED, [_SEGMENT])
    files = {name: formats.render(name, content)[0].decode() for name in formats.FORMATS}
    return {
        **{f"{name}Result": [json.loads(file) if name == "json" else file] for name, file in files.items()},
        "status": [_status(_QUEUED), _status(_PROCESSING, _LIVE), _status(_COMPLETED), _status(_FAILED)],
        "segment": [_plain(segment_of(_QUEUED.job_id, _SEGMENT))],
        "event": [
            json.loads(event_payload(_COMPLETED, _CONSUMER)),
            _plain(deletion_of("porch-17", _CONSUMER, _BEGAN + 60)),
        ],
        "rejection": [_rejection()],
        "accepted": [{"job_id": "porch-17", "status": "queued"}],
    }


def _rejection() -> Any:
    return _plain(
        Rejection(
            reason="invalid_request",
            detail="There is no field 'audio_pth' (did you mean audio_path?).",
            topic="cesar/jobs",
            job_id="porch-17",
            payload_excerpt='{"job_id": "porch-17", "audio_pth": "porch.wav"}',
            received_at=timestamp(_BEGAN),
        )
    )


def _told_of_the_consumer() -> Examples:
    totals = Totals(
        queued=2,
        completed_total=17,
        error_total=1,
        cancelled_total=0,
        rejected_total=0,
        deleted_total=0,
        oldest_queued_at=_BEGAN - 12.5,
        processing="porch-17",
    )
    settings = Settings(data_dir=Path("/var/lib/cesar-mqtt"), broker=BrokerSettings(url="mqtt://127.0.0.1:1883"))
    info = info_of(
        settings.redacted(),
        models=["base", "tiny.en"],
        default_model="base",
        device="cpu",
        compute_type="int8",
        started=_BEGAN - 86_400,
    )
    return {
        "state": [_plain(ConsumerState(state="online")), _plain(ConsumerState(state="offline"))],
        "queue": [_plain(queue_of(totals, "processing", _BEGAN))],
        "last": [_plain(last_of(_COMPLETED))],
        "info": [_plain(info)],
        "health": [_plain(_health())],
    }


def _health() -> HealthMessage:
    return HealthMessage(
        uptime=86_400.0,
        worker_alive=True,
        network_alive=True,
        ledger_bytes=48_211,
        rss_bytes=412_000_000,
        spool_bytes=0,
        disk_free_bytes=21_474_836_480,
    )


def _answers() -> Examples:
    text = "1\n00:00:00,000 --> 00:00:02,600\n" + _TEXT + "\n\n"
    size = len(text.encode())
    piece = ResultPage(
        job_id="porch-17", format="srt", offset=0, length=size, total=size, text=text, more=False, consumer=_CONSUMER
    )
    page = JobList(jobs=[summary_of(status_of(_COMPLETED, _CONSUMER))], next=None, total=1, consumer=_CONSUMER)
    base = Model(name="base", origin="cache", size_bytes=148_000_000, multilingual=True, default=True, problem=None)
    models = Models(
        default="base",
        loaded="base",
        device="cpu",
        compute_type="int8",
        cpu_threads=4,
        models=[base],
        consumer=_CONSUMER,
    )
    done = {
        "cancel": CommandResult(job_id="porch-17", status="cancelled", consumer=_CONSUMER),
        "retry": CommandResult(job_id="porch-17", status="queued", consumer=_CONSUMER),
        "delete": CommandResult(job_id="porch-17", status="deleted", consumer=_CONSUMER),
        "get": status_of(_COMPLETED, _CONSUMER),
        "result": piece,
        "list": page,
        "pause": Paused(paused=True, consumer=_CONSUMER),
        "resume": Paused(paused=False, consumer=_CONSUMER),
        "health": HealthResponse(**_health().model_dump(), consumer=_CONSUMER),
        "models": models,
    }
    failure = Response(
        status="error",
        data={"consumer": "cesar"},
        error="There is no job porch-18: it never was, or it was deleted.",
        transaction=7,
    )
    told: Examples = {
        f"{command}Response": [
            _plain(Response(status="ok", data=json.loads(data.encode()), error=None, transaction="a-1"))
        ]
        for command, data in done.items()
    }
    told["cancelResponse"].append(_plain(failure))
    unknown = "There is no command 'cancle': use one of cancel, retry, delete, get."
    told["failure"] = [_plain(Response(status="error", data={"consumer": "cesar"}, error=unknown, transaction=None))]
    return told


def _status(job: Job, live: JobProgress | None = None) -> Any:
    return _plain(status_of(job, _CONSUMER, live))


def _plain(payload: Payload) -> Any:
    return json.loads(payload.encode())
