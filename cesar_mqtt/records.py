"""How a job is written in the ledger's table, and read back; pure functions, any thread may call them.

A field that says nothing (None, an empty list or object) is not written, so that most documents are small.
Nothing that can be changed is shared between a document and the values outside.
"""

import copy
from collections.abc import Mapping
from typing import Any

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, Job, JobState, NewJob, Result


def needs_audio(document: Mapping[str, Any]) -> bool:
    """Whether the audio that came with this job may still be wanted: it is not final, or a retry may help."""
    if not JobState(document["state"]).final:
        return True
    code = document.get("error_code")
    return code is not None and ErrorCode(code).retryable


def document_of(request: NewJob, now: float, revision: int) -> dict[str, Any]:
    """Return the document of a job that is new in transaction `revision`."""
    document: dict[str, Any] = {
        "job_id": request.job_id,
        "state": (JobState.QUEUED if request.failure is None else JobState.ERROR).value,
        "revision": revision,
        "created_at": now,
        "updated_at": now,
        "fingerprint": request.fingerprint,
        "model_size": request.model_size,
    }
    if request.audio is not None:
        document["audio"] = [request.audio.kind, request.audio.name]
    if request.options:
        document["options"] = _copy(request.options)
    if request.metadata:
        document["metadata"] = _copy(request.metadata)
    if request.packet_id is not None:
        document["packet_id"] = request.packet_id
    if request.anonymous:
        document["anonymous"] = True
    if request.failure is not None:
        failure = {"error_code": ErrorCode.INVALID_REQUEST.value, "error_message": request.failure}
        document |= {"completed_at": now, **failure}
    return document


def result_of(result: Result, now: float) -> dict[str, Any]:
    """Return the fields that a transcript adds to its job's document."""
    fields: dict[str, Any] = {
        "completed_at": now,
        "result_text": result.text,
        "no_speech": result.no_speech,
        "audio_duration": result.audio_duration,
    }
    if result.detected_language is not None:
        fields["detected_language"] = result.detected_language
    if result.language_probability is not None:
        fields["language_probability"] = result.language_probability
    if result.warnings:
        fields["warnings"] = list(result.warnings)
    return fields


def job_of(seq: int, document: Mapping[str, Any], rank: int | None, since: float | None) -> Job:
    """Return the value that leaves the ledger, with its place in the queue and since when it has it."""
    get = document.get
    audio, code = get("audio"), get("error_code")
    options, metadata = get("options"), get("metadata")
    return Job(
        seq=seq,
        job_id=document["job_id"],
        state=_STATES[document["state"]],
        revision=document["revision"],
        created_at=document["created_at"],
        updated_at=document["updated_at"] if since is None else max(document["updated_at"], since),
        fingerprint=document["fingerprint"],
        model_size=document["model_size"],
        audio=None if audio is None else AudioSource(*audio),
        options=_copy(options) if options else {},
        metadata=_copy(metadata) if metadata else {},
        attempt=get("attempt", 0),
        crashes=get("crashes", 0),
        retries=get("retries", 0),
        started_at=get("started_at"),
        completed_at=get("completed_at"),
        result_text=get("result_text"),
        detected_language=get("detected_language"),
        language_probability=get("language_probability"),
        no_speech=get("no_speech"),
        audio_duration=get("audio_duration"),
        error_code=None if code is None else ErrorCode(code),
        error_message=get("error_message"),
        warnings=tuple(get("warnings", ())),
        queue_position=rank,
    )


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that shares nothing which could be changed."""
    flat = all(type(value) in _FLAT for value in values.values())
    return dict(values) if flat else copy.deepcopy(dict(values))


_FLAT = frozenset({str, int, float, bool, type(None)})
_STATES = {state.value: state for state in JobState}
