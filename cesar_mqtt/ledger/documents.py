"""How a job is written in the ledger's table, and read back; pure functions, any thread may call them.

A field that says nothing (None, an empty list or object) is not written, so that most documents are small.
Nothing that can be changed is shared between a document and the values outside.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import STATES, AudioSource, DeletedJob, Job, JobState, NewJob, Result, wants_audio
from cesar_mqtt.json_codec import encode
from cesar_mqtt.transcript import Segment, Window, Word


def needs_audio(document: Mapping[str, Any]) -> bool:
    """Whether the audio that came with this job may still be wanted; see `jobs.wants_audio`."""
    code = document.get("error_code")
    return wants_audio(STATES[document["state"]], None if code is None else ErrorCode(code))


def retry_refusal(document: Mapping[str, Any]) -> str | None:
    """Say why this job cannot be worked on once more; None: it can."""
    job_id, state = document["job_id"], document["state"]
    if state not in {JobState.ERROR, JobState.CANCELLED}:
        return f"Job {job_id} is {state}: only one that ended as error or cancelled can be retried."
    if state == JobState.ERROR and "attempt" not in document:  # refused, and never begun
        return f"Job {job_id} was refused for what it asked: submit it, mended, under a new id."
    if any(in_spool(document)) and not needs_audio(document):
        return f"The audio of job {job_id} is not kept, for a retry cannot help with {document['error_code']}."
    return None


def in_spool(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name in the spool folder of the audio that came with this job, if any did."""
    kind, name = document.get("audio", ("", ""))
    if kind == "spool":
        yield name


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
    if request.formats:
        document["formats"] = list(request.formats)
    if request.stream:
        document["stream"] = True
    if request.expires_at is not None:
        document["expires_at"] = request.expires_at
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


def keeps_windows(document: Mapping[str, Any]) -> bool:
    """Whether the windows of a completed job are needed for the formats asked for; `txt` has a line a segment, too."""
    return bool(document.get("formats"))


def window_document(window: Window) -> dict[str, Any]:
    """Return the document of a finished part of a recording.

    Its segments are one text, JSON of lists: as documents the words of an hour would take ten times the memory.
    """
    document: dict[str, Any] = {"until_s": window.until_s, "text": window.text}
    if window.language is not None:
        document["language"] = window.language
    if window.language_probability is not None:
        document["language_probability"] = window.language_probability
    if window.segments:
        document |= {
            "first_id": window.segments[0].id,
            "segments": encode([_plain(segment) for segment in window.segments]).decode(),
        }
    return document


def window_of(number: int, document: Mapping[str, Any]) -> Window:
    """Return the finished part that `window_document` wrote down."""
    plain = enumerate(json.loads(document.get("segments", "[]")), start=document.get("first_id", 1))
    return Window(
        number=number,
        until_s=document["until_s"],
        text=document["text"],
        language=document.get("language"),
        language_probability=document.get("language_probability"),
        segments=tuple(_segment(segment_id, *values) for segment_id, values in plain),
    )


def _plain(segment: Segment) -> list[Any]:
    values = [segment.start_s, segment.end_s, segment.text, segment.avg_logprob, segment.no_speech_prob]
    if segment.words is not None:
        values.append([[word.start_s, word.end_s, word.text, word.probability] for word in segment.words])
    return values


def _segment(segment_id: int, *values: Any) -> Segment:
    start_s, end_s, text, avg_logprob, no_speech_prob, *words = values
    spoken = tuple(Word(*word) for word in words[0]) if words else None
    return Segment(segment_id, start_s, end_s, text, avg_logprob, no_speech_prob, spoken)


def gone_with(seq: int, document: Mapping[str, Any]) -> DeletedJob:
    """Return what has to be known of a job once it is deleted."""
    fingerprint = document["fingerprint"] if "anonymous" in document else None
    return DeletedJob(seq, document["job_id"], tuple(document.get("formats", ())), fingerprint=fingerprint)


def gone_document(gone: DeletedJob) -> dict[str, Any]:
    """Return the document of a job that was just deleted."""
    document: dict[str, Any] = {"job_id": gone.job_id}
    if gone.formats:
        document["formats"] = list(gone.formats)
    if gone.fingerprint is not None:
        document["fingerprint"] = gone.fingerprint
    return document


def gone_of(seq: int, document: Mapping[str, Any]) -> DeletedJob:
    """Return the deleted job that `gone_document` wrote down; its status is another job's once that bears its id.

    Since the broker has forgotten it, it has the field `cleared`, false when it is to be forgotten once more.
    """
    return DeletedJob(
        seq,
        document["job_id"],
        tuple(document.get("formats", ())),
        status=document.get("status", True),
        fingerprint=document.get("fingerprint"),
        news="cleared" not in document,
    )


def job_of(seq: int, document: Mapping[str, Any], rank: int | None, since: float | None) -> Job:
    """Return the value that leaves the ledger, with its place in the queue and since when it has it."""
    get = document.get
    audio, code = get("audio"), get("error_code")
    options, metadata = get("options"), get("metadata")
    return Job(
        seq=seq,
        job_id=document["job_id"],
        state=STATES[document["state"]],
        revision=document["revision"],
        created_at=document["created_at"],
        updated_at=document["updated_at"] if since is None else max(document["updated_at"], since),
        fingerprint=document["fingerprint"],
        model_size=document["model_size"],
        audio=None if audio is None else AudioSource(*audio),
        options=_copy(options) if options else {},
        metadata=_copy(metadata) if metadata else {},
        formats=tuple(get("formats", ())),
        stream=get("stream", False),
        expires_at=get("expires_at"),
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
