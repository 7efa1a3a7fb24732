"""The documents of the ledger: how jobs, windows and tombstones are written and read. Pure functions, for any thread.

The names of tables and keys are the file format: they never change. A key without information (None, an empty list or
object) is not written, so that most documents are small. A document shares nothing mutable with the values outside.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import (
    STATES,
    AudioSource,
    Claim,
    DeletedJob,
    Job,
    JobState,
    NewJob,
    Result,
    may_need_audio,
    request_key,
)
from cesar_mqtt.json_codec import encode
from cesar_mqtt.transcript import Segment, Window, Word

JOBS = "jobs"
WINDOWS = "windows"
"""Finished windows of recordings; documents of their own, so that a job's document stays small."""
COUNTERS = "counters"
"""One document, with id 1."""
GONE = "gone"
"""Tombstones: deleted jobs of which the broker may still retain messages, and those cleared recently."""


# -- jobs ---------------------------------------------------------------------------------------------------------


def job_document(request: NewJob, now: float, revision: int) -> dict[str, Any]:
    """Return the document of a job that is created by transaction `revision`."""
    document: dict[str, Any] = {
        "job_id": request.job_id,
        "state": (JobState.QUEUED if request.failure is None else JobState.ERROR).value,
        "revision": revision,
        "created_at": now if request.received_at is None else request.received_at,
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
    if request.expires_at is not None:
        document["expires_at"] = request.expires_at
    _add_rare_fields(document, request)
    if request.failure is not None:
        failure = {"error_code": ErrorCode.INVALID_REQUEST.value, "error_message": request.failure}
        document |= {"completed_at": now, **failure}
    return document


def _add_rare_fields(document: dict[str, Any], request: NewJob) -> None:
    # Field by field: a loop over their names took a tenth of the time of an append.
    if request.stream:
        document["stream"] = True
    if request.priority:
        document["priority"] = request.priority
    if request.packet_id is not None:
        document["packet_id"] = request.packet_id
    if request.has_generated_id:
        document["anonymous"] = True
    if request.retained:
        document["retained"] = True
    if request.warnings:
        document["warnings"] = list(request.warnings)
    if request.claim is not None:
        document["claim"] = list(request.claim)
        if request.failure is None:
            document["attempt"] = max(0, request.claim.delivery - 1)


def result_fields(result: Result) -> dict[str, Any]:
    """Return the fields that a transcript adds to its job's document."""
    fields: dict[str, Any] = {
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
    if result.speakers is not None:
        fields["speakers"] = result.speakers
    if result.diarization_error is not None:
        fields["diarization_error"] = result.diarization_error
    return fields


def job_from(seq: int, document: Mapping[str, Any], position: int | None, since: float | None) -> Job:
    """Return the job of a document, with its position in the queue and since when it has it."""
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
        priority=get("priority", 0),
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
        queue_position=position,
        speakers=get("speakers"),
        diarization_error=get("diarization_error"),
        claim=Claim(*document["claim"]) if "claim" in document else None,
    )


def spool_files(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the name in the spool folder of the job's uploaded audio, if it has any."""
    kind, name = document.get("audio", ("", ""))
    if kind == "spool":
        yield name


def document_may_need_audio(document: Mapping[str, Any]) -> bool:
    """Whether the job's uploaded audio has to be kept; see `jobs.may_need_audio`."""
    code = document.get("error_code")
    return may_need_audio(
        STATES[document["state"]],
        None if code is None else ErrorCode(code),
        diarization_failed="diarization_error" in document,
    )


def needs_windows(document: Mapping[str, Any]) -> bool:
    """Whether a completed job keeps its windows; every format needs them, even `txt`, which has a line per segment.

    Of a job with `diarize` they have the speakers, or are needed to tell them apart in a retry.
    """
    return bool(document.get("formats")) or bool(document.get("options", {}).get("diarize"))


def has_text(document: Mapping[str, Any]) -> bool:
    """Whether the job is transcribed, so that only its speakers are to be told apart."""
    return "result_text" in document


def is_rejection(document: Mapping[str, Any]) -> bool:
    """Whether the job was rejected on arrival, and so never started."""
    return document["state"] == JobState.ERROR and "attempt" not in document


def retry_rejection(document: Mapping[str, Any]) -> str | None:
    """Return why this job cannot be retried, as a sentence for the user; None: it can."""
    job_id, state = document["job_id"], document["state"]
    if state == JobState.COMPLETED and "diarization_error" in document:
        return None
    if state not in {JobState.ERROR, JobState.CANCELLED}:
        return f"Job {job_id} is {state}: only a job that ended as error or cancelled can be retried."
    if is_rejection(document):
        return f"Job {job_id} was rejected as invalid: correct the request and submit it under a new id."
    if any(spool_files(document)) and not document_may_need_audio(document):
        return f"The audio of job {job_id} was not kept, since a retry cannot fix {document.get('error_code')}."
    return None


# -- windows ------------------------------------------------------------------------------------------------------


def window_document(window: Window) -> dict[str, Any]:
    """Return the document of a finished window.

    Its segments are one string, JSON of lists: as objects the words of an hour would take ten times the memory.
    """
    document: dict[str, Any] = {"until_s": window.until_s, "text": window.text}
    if window.language is not None:
        document["language"] = window.language
    if window.language_probability is not None:
        document["language_probability"] = window.language_probability
    if window.segments:
        document |= {
            "first_id": window.segments[0].id,
            "segments": encode([_segment_values(segment) for segment in window.segments]).decode(),
        }
    return document


def window_from(number: int, document: Mapping[str, Any]) -> Window:
    """Return the window of a document."""
    segments = enumerate(json.loads(document.get("segments", "[]")), start=document.get("first_id", 1))
    return Window(
        number=number,
        until_s=document["until_s"],
        text=document["text"],
        language=document.get("language"),
        language_probability=document.get("language_probability"),
        segments=tuple(_segment_from(segment_id, *values) for segment_id, values in segments),
    )


def _segment_values(segment: Segment) -> list[Any]:
    values = [segment.start_s, segment.end_s, segment.text, segment.avg_logprob, segment.no_speech_prob]
    if segment.words is not None:
        values.append([[word.start_s, word.end_s, word.text, word.probability] for word in segment.words])
    elif segment.speaker is not None:
        values.append(None)
    if segment.speaker is not None:
        values.append(segment.speaker)
    return values


def _segment_from(segment_id: int, *values: Any) -> Segment:
    start_s, end_s, text, avg_logprob, no_speech_prob, *rest = values
    words = rest[0] if rest else None
    return Segment(
        segment_id,
        start_s,
        end_s,
        text,
        avg_logprob,
        no_speech_prob,
        words=None if words is None else tuple(Word(*word) for word in words),
        speaker=rest[1] if len(rest) > 1 else None,
    )


# -- tombstones ---------------------------------------------------------------------------------------------------


def deleted_job(seq: int, document: Mapping[str, Any]) -> DeletedJob:
    """Return what is remembered of a job when it is deleted, from the job's document."""
    job_id = document["job_id"]
    return DeletedJob(
        seq,
        job_id,
        tuple(document.get("formats", ())),
        request_key=request_key(None if "anonymous" in document else job_id, document["fingerprint"]),
        retained="retained" in document,
    )


def tombstone_document(deleted: DeletedJob) -> dict[str, Any]:
    """Return the document of a job that was just deleted.

    Later changes: `status` is false once a newer job owns the status; `cleared` is true when the broker has cleared its
    messages, and false when they have to be cleared again; `retained` is true once the broker was seen to retain the
    request. The fingerprint of the request is `fingerprint` if it had no id, and `request` if it had one.
    """
    document: dict[str, Any] = {"job_id": deleted.job_id}
    if deleted.formats:
        document["formats"] = list(deleted.formats)
    if deleted.request_key is not None:
        named = request_key(deleted.job_id, "")
        name = "request" if deleted.request_key.startswith(named) else "fingerprint"
        document[name] = deleted.request_key.removeprefix(named)
    if deleted.retained:
        document["retained"] = True
    return document


def tombstone_from(seq: int, document: Mapping[str, Any]) -> DeletedJob:
    """Return the deleted job of a tombstone's document."""
    job_id, fingerprint = document["job_id"], document.get("request")
    key = document.get("fingerprint") if fingerprint is None else request_key(job_id, fingerprint)
    return DeletedJob(
        seq,
        job_id,
        tuple(document.get("formats", ())),
        owns_status=document.get("status", True),
        request_key=key,
        retained="retained" in document,
        event_pending="cleared" not in document,
    )


_FLAT = frozenset({str, int, float, bool, type(None)})


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that shares nothing mutable."""
    return dict(values) if _FLAT.issuperset(map(type, values.values())) else copy.deepcopy(dict(values))
