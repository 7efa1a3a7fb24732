import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from cesar_mqtt import __version__
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, Job, JobState, Totals
from cesar_mqtt.json_codec import canonical
from cesar_mqtt.protocol.commands import summary_of
from cesar_mqtt.protocol.consumer_payloads import LAST_TEXT_BYTES, ConsumerState, last_error_of, last_of, queue_of
from cesar_mqtt.protocol.fields import timestamp
from cesar_mqtt.protocol.payloads import (
    Event,
    JobProgress,
    JobSegment,
    Rejection,
    Status,
    event_of,
    segment_of,
    status_of,
)
from cesar_mqtt.protocol.requests import JobRequest
from cesar_mqtt.protocol.truncate import truncate_segment, truncate_status
from cesar_mqtt.transcript import Segment, Word
from tests import factories

# The contract's section 2, typed by hand and in its order.
STATUS_FIELDS = [
    "job_id",
    "status",
    "attempt",
    "created_at",
    "started_at",
    "completed_at",
    "updated_at",
    "queue_position",
    "progress",
    "processed_duration",
    "audio_duration",
    "speed",
    "eta",
    "audio_source",
    "model_size",
    "language",
    "task",
    "result_text",
    "detected_language",
    "language_probability",
    "no_speech",
    "error_code",
    "error_message",
    "retryable",
    "warnings",
    "speakers",
    "diarization_error",
    "formats",
    "result_truncated",
    "metadata",
    "consumer",
    "version",
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ACCEPTED_AT = 1_769_204_700.12

QUEUED = factories.job(
    "porch-17",
    seq=7,
    revision=3,
    created_at=ACCEPTED_AT,
    updated_at=ACCEPTED_AT,
    audio=AudioSource("path", "porch.wav"),
    queue_position=4,
)
PROCESSING = QUEUED._replace(
    state=JobState.PROCESSING,
    attempt=1,
    started_at=ACCEPTED_AT + 1,
    updated_at=ACCEPTED_AT + 1,
    queue_position=None,
)
COMPLETED = PROCESSING._replace(
    state=JobState.COMPLETED,
    completed_at=ACCEPTED_AT + 11,
    updated_at=ACCEPTED_AT + 11,
    result_text="Hello.",
    detected_language="en",
    language_probability=0.98,
    no_speech=False,
    audio_duration=60.0,
    warnings=("audio_truncated",),
)
FAILED = PROCESSING._replace(
    state=JobState.ERROR,
    completed_at=ACCEPTED_AT + 2,
    updated_at=ACCEPTED_AT + 2,
    error_code=ErrorCode.AUDIO_NOT_FOUND,
    error_message="There is no such file.",
)
LIVE = JobProgress(
    progress=0.42, processed_duration=25.2, audio_duration=60.0, speed=6.5, eta=5.4, updated_at=ACCEPTED_AT + 4.001
)
NOTHING = dict.fromkeys(STATUS_FIELDS)


def published(job: Job, live: JobProgress | None = None) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(truncate_status(status_of(job, "kitchen", live)))
    return status


def test_a_job_whose_speakers_are_not_told_apart_has_a_warning_and_why() -> None:
    found = published(COMPLETED._replace(speakers=2))
    assert (found["speakers"], found["diarization_error"], found["warnings"]) == (2, None, ["audio_truncated"])
    failed = published(COMPLETED._replace(diarization_error="A model is missing."))
    assert (failed["speakers"], failed["diarization_error"]) == (None, "A model is missing.")
    assert failed["warnings"] == ["audio_truncated", "diarization_failed"]
    assert failed["status"] == "completed"


def test_the_progress_of_the_diarization_is_a_field_of_its_own() -> None:
    live = replace(LIVE, progress=0.999, diarization=0.25)
    assert published(PROCESSING, live)["diarization_progress"] == 0.25
    assert "diarization_progress" not in published(PROCESSING, LIVE)
    assert "diarization_progress" not in published(COMPLETED, live)


# -- the status ----------------------------------------------------------------------------------------------------


def test_only_the_status_of_a_job_with_a_priority_has_that_field() -> None:
    urgent = published(QUEUED._replace(priority=9))
    assert urgent == {**published(QUEUED), "priority": 9}
    assert summary_of(status_of(QUEUED._replace(priority=9), "kitchen")).model_dump()["priority"] == 9
    assert "priority" not in summary_of(status_of(QUEUED, "kitchen")).model_dump()


@pytest.mark.parametrize("job", [QUEUED, PROCESSING, COMPLETED, FAILED], ids=lambda job: job.state)
def test_a_status_has_exactly_the_fields_of_the_contract_in_every_state(job: Job) -> None:
    assert list(published(job)) == STATUS_FIELDS


def test_a_queued_job_has_its_position_and_its_options() -> None:
    asked = QUEUED._replace(options={"language": "de", "task": "translate"}, metadata={"room": "porch"})
    assert published(asked) == NOTHING | {
        "job_id": "porch-17",
        "status": "queued",
        "attempt": 0,
        "created_at": "2026-01-23T21:45:00.120Z",
        "updated_at": "2026-01-23T21:45:00.120Z",
        "queue_position": 4,
        "audio_source": "porch.wav",
        "model_size": "base",
        "language": "de",
        "task": "translate",
        "warnings": [],
        "formats": [],
        "result_truncated": False,
        "metadata": {"room": "porch"},
        "consumer": "kitchen",
        "version": __version__,
    }


def test_a_running_job_has_its_progress() -> None:
    status = published(PROCESSING, LIVE)
    assert status["status"] == "processing"
    assert status["attempt"] == 1
    assert status["started_at"] == "2026-01-23T21:45:01.120Z"
    assert status["updated_at"] == "2026-01-23T21:45:04.121Z"
    assert status["progress"] == 0.42
    assert status["processed_duration"] == 25.2
    assert status["audio_duration"] == 60.0
    assert status["speed"] == 6.5
    assert status["eta"] == 5.4
    assert status["queue_position"] is None


def test_a_running_job_without_news_is_at_the_beginning() -> None:
    assert published(PROCESSING)["progress"] == 0.0


def test_a_completed_job_has_the_whole_transcript_and_progress_one() -> None:
    status = published(COMPLETED)
    assert status["status"] == "completed"
    assert status["completed_at"] == "2026-01-23T21:45:11.120Z"
    assert status["progress"] == 1
    assert status["processed_duration"] == status["audio_duration"] == 60.0
    assert status["speed"] == 6.0
    assert status["result_text"] == "Hello."
    assert status["detected_language"] == "en"
    assert status["language_probability"] == 0.98
    assert status["no_speech"] is False
    assert status["warnings"] == ["audio_truncated"]
    assert status["error_code"] is status["retryable"] is None


def test_no_speech_is_an_empty_text_and_not_a_missing_one() -> None:
    silent = COMPLETED._replace(result_text="", detected_language=None, language_probability=None, no_speech=True)
    status = published(silent)
    assert status["result_text"] == ""
    assert status["no_speech"] is True
    assert status["detected_language"] is status["language_probability"] is None


@pytest.mark.parametrize("code", ErrorCode)
def test_an_error_has_its_sentence_and_whether_a_retry_may_help(code: ErrorCode) -> None:
    retryable = {"audio_io_error", "download_failed", "model_unavailable", "timeout", "expired", "crashed", "internal"}
    status = published(FAILED._replace(error_code=code))
    assert status["error_code"] == code.value
    assert status["error_message"] == "There is no such file."
    assert status["retryable"] is (code.value in retryable)
    assert status["result_text"] is status["progress"] is None


def test_audio_that_came_with_the_job_is_called_an_upload_and_never_by_its_file_name() -> None:
    assert published(QUEUED._replace(audio=AudioSource("spool", "0123abcd")))["audio_source"] == "upload"
    assert published(QUEUED._replace(audio=None))["audio_source"] is None


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("https://nas.local/in/porch.wav", "https://nas.local/in/porch.wav"),
        ("https://nas.local", "https://nas.local"),
        ("http://[::1]:8080/a%20b.wav", "http://[::1]:8080/a%20b.wav"),
        ("https://me:s3cret@nas.local:444/porch.wav?key=s3cret#s3cret", "https://nas.local:444/porch.wav"),
        ("https://s3cret@nas.local?s3cret", "https://nas.local"),
        ("https://me:s3cret%40@nas.local/@home", "https://nas.local/@home"),
        ("https://a@s3cret@nas.local/x", "https://nas.local/x"),
    ],
)
def test_a_url_is_published_without_what_may_be_a_secret_in_it(url: str, source: str) -> None:
    payload = truncate_status(status_of(QUEUED._replace(audio=AudioSource("url", url)), "kitchen"))
    assert json.loads(payload)["audio_source"] == source
    assert b"s3cret" not in payload


def test_the_formats_that_were_asked_for_are_published_and_whether_one_was_cut() -> None:
    asked = COMPLETED._replace(formats=("srt", "json"))
    assert published(asked)["formats"] == ["srt", "json"]
    assert published(asked)["result_truncated"] is False
    assert status_of(asked, "kitchen", result_truncated=True)["result_truncated"] is True


@pytest.mark.parametrize("job", [QUEUED, COMPLETED, FAILED], ids=lambda job: job.state)
def test_progress_that_comes_late_changes_nothing_for_a_job_that_is_not_running(job: Job) -> None:
    assert published(job, LIVE) == published(job)


def test_a_job_whose_clock_went_back_while_it_ran_has_no_speed() -> None:
    assert published(COMPLETED._replace(completed_at=ACCEPTED_AT))["speed"] is None


@pytest.mark.parametrize("job", [QUEUED, PROCESSING, COMPLETED, FAILED], ids=lambda job: job.state)
def test_every_time_is_rfc_3339_in_utc_with_milliseconds(job: Job) -> None:
    status = published(job)
    for name in ("created_at", "started_at", "completed_at", "updated_at"):
        assert status[name] is None or TIME.fullmatch(status[name])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_769_204_700.0, "2026-01-23T21:45:00.000Z"),
        (1_769_204_700.9999, "2026-01-23T21:45:00.999Z"),
        (1_709_164_800.5, "2024-02-29T00:00:00.500Z"),
    ],
)
def test_a_timestamp_is_in_utc_whatever_the_time_zone(
    seconds: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        assert timestamp(seconds) == text
    finally:
        monkeypatch.undo()
        time.tzset()


# -- segments ------------------------------------------------------------------------------------------------------

SEGMENT = Segment(id=3, start_s=1.5, end_s=2.25, text="Hello.", avg_logprob=-0.25, no_speech_prob=0.01)


def test_a_segment_has_its_job_and_without_words_that_were_not_requested() -> None:
    assert segment_of("porch-17", SEGMENT) == {
        "job_id": "porch-17",
        "id": 3,
        "start": 1.5,
        "end": 2.25,
        "text": "Hello.",
        "avg_logprob": -0.25,
        "no_speech_prob": 0.01,
    }


def test_words_that_were_asked_for_stand_in_their_segment_with_their_blanks() -> None:
    word = Word(start_s=1.5, end_s=2.0, text=" Hello.", probability=0.9)
    message = segment_of("porch-17", replace(SEGMENT, words=(word,)))
    assert message["words"] == [{"word": " Hello.", "start": 1.5, "end": 2.0, "probability": 0.9}]
    assert segment_of("porch-17", replace(SEGMENT, words=()))["words"] == []
    assert TypeAdapter(JobSegment).validate_json(truncate_segment(message)) == message


# -- the consumer's own topics -------------------------------------------------------------------------------------


def test_the_consumers_state_is_one_field() -> None:
    assert json.loads(ConsumerState(state="online").encode()) == {"state": "online"}
    assert json.loads(ConsumerState(state="offline").encode()) == {"state": "offline"}


def test_the_queue_has_the_fields_of_the_contract_and_two_more() -> None:
    totals = Totals(
        queued=3,
        completed_total=10,
        error_total=2,
        cancelled_total=1,
        rejected_total=4,
        oldest_queued_at=1000.0,
        processing="porch-17",
        deleted_total=5,
    )
    assert json.loads(queue_of(totals, "processing", 1012.34).encode()) == {
        "activity": "processing",
        "job_id": "porch-17",
        "queued": 3,
        "oldest_age": 12.3,
        "paused": False,
        "completed_total": 10,
        "error_total": 2,
        "cancelled_total": 1,
        "rejected_total": 4,
        "deleted_total": 5,
        "revision": 0,
        "retryable": 0,
        "progress": None,
        "eta": None,
        "audio_source": None,
    }
    assert queue_of(totals, "idle", 900.0).oldest_age == 0.0  # the clock was set back
    assert queue_of(replace(totals, oldest_queued_at=None), "idle", 900.0).oldest_age is None


def test_the_last_job_has_exactly_the_fields_of_the_contract() -> None:
    assert json.loads(last_of(COMPLETED).encode()) == {
        "job_id": "porch-17",
        "status": "completed",
        "audio_source": "porch.wav",
        "no_speech": False,
        "text": "Hello.",
        "text_truncated": False,
        "language": "en",
        "audio_duration": 60.0,
        "completed_at": "2026-01-23T21:45:11.120Z",
    }


def test_the_last_error_has_exactly_the_fields_of_the_contract() -> None:
    assert json.loads(last_error_of(FAILED).encode()) == {
        "job_id": "porch-17",
        "error_code": FAILED.error_code,
        "error_message": FAILED.error_message,
        "audio_source": "porch.wav",
        "completed_at": timestamp(FAILED.completed_at or FAILED.updated_at),
    }


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x" * 12_000, 12_000),
        ("x" * 12_001, 12_000),
        ("ä" * 6_000, 6_000),
        ("x" + "ä" * 6_000, 6_000),
        ("日" * 4_001, 4_000),
        ("xx" + "😀" * 3_000, 3_001),
        ("", 0),
    ],
)
def test_the_last_text_is_cut_at_a_whole_character_within_12000_bytes(text: str, kept: int) -> None:
    last = last_of(COMPLETED._replace(result_text=text))
    assert last.text == text[:kept]
    assert len(last.text.encode()) <= LAST_TEXT_BYTES == 12_000
    assert last.text_truncated is (kept < len(text))


# -- rejections and requests ----------------------------------------------------------------------------------------


def test_a_rejection_has_exactly_the_fields_of_the_contract() -> None:
    rejection = Rejection(
        reason="queue_full",
        detail="Later.",
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt="porch.wav",
        received_at=timestamp(0),
    )
    assert json.loads(rejection.encode()) == {
        "reason": "queue_full",
        "detail": "Later.",
        "topic": "cesar/jobs",
        "job_id": None,
        "payload_excerpt": "porch.wav",
        "received_at": "1970-01-01T00:00:00.000Z",
    }


def test_a_request_cannot_be_changed_once_it_was_checked() -> None:
    request = JobRequest(audio_path="a")
    with pytest.raises(ValidationError, match="frozen"):
        request.audio_path = "b"  # type: ignore[misc]


def test_canonical_json_is_the_same_whatever_the_order_of_keys() -> None:
    assert canonical({"a": 1, "b": {"d": [1, 2], "c": "ä"}}) == canonical({"b": {"c": "ä", "d": [1, 2]}, "a": 1})
    assert canonical({"a": [1, 2]}) != canonical({"a": [2, 1]})


@pytest.mark.parametrize("job", [QUEUED, PROCESSING, COMPLETED, FAILED], ids=lambda job: job.state)
def test_statuses_and_events_have_the_types_that_their_schemas_name(job: Job) -> None:
    for kind, payload in ((Status, status_of(job, "porch")), (Event, event_of(job, "porch"))):
        TypeAdapter(kind).validate_json(to_json(payload), strict=True)
    event = event_of(job, "porch")
    assert (event["event_type"], event["job_id"], event["consumer"]) == (job.state, job.job_id, "porch")
