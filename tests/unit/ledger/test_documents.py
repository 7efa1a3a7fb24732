"""Documents: jobs, windows and results are unchanged after the disk."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, JobState, NewJob, Result
from cesar_mqtt.json_codec import encode
from cesar_mqtt.ledger.documents import (
    document_may_need_audio,
    job_document,
    job_from,
    needs_windows,
    result_fields,
    spool_files,
    window_document,
    window_from,
)
from cesar_mqtt.transcript import Segment, Window, Word
from tests.factories import new_job

LONE = st.text(st.characters(exclude_categories=())).filter(lambda text: not _has_pair(text))
numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.builds(Word, start_s=numbers, end_s=numbers, text=LONE, probability=numbers)
segments = st.builds(
    Segment,
    id=st.just(0),
    start_s=numbers,
    end_s=numbers,
    text=LONE,
    avg_logprob=numbers,
    no_speech_prob=numbers,
    words=st.none() | st.lists(words, max_size=4).map(tuple),
)


def _has_pair(text: str) -> bool:
    return any("\ud800" <= a <= "\udbff" and "\udc00" <= b <= "\udfff" for a, b in pairwise(text))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    first_id = draw(st.integers(1, 10**6))
    drawn = draw(st.lists(segments, max_size=4))
    return Window(
        number=draw(st.integers(0, 10**5)),
        until_s=draw(numbers),
        text=draw(LONE),
        language=draw(st.none() | st.just("en")),
        language_probability=draw(st.none() | numbers),
        segments=tuple(replace(segment, id=n) for n, segment in enumerate(drawn, start=first_id)),
    )


def after_the_disk(document: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(encode(document))
    return read


@given(windows())
def test_a_window_is_unchanged_after_memory_and_disk(window: Window) -> None:
    document = window_document(window)
    assert window_from(window.number, document) == window
    assert window_from(window.number, after_the_disk(document)) == window


def test_two_surrogate_halves_come_back_as_one_character() -> None:
    window = Window(0, 1.0, "\ud83d\ude00", None, None, (Segment(1, 0.0, 1.0, "\ud83d\ude00", 0.0, 0.0),))
    back = window_from(0, after_the_disk(window_document(window)))
    assert (back.text, back.segments[0].text) == ("\U0001f600", "\U0001f600")


def test_a_window_of_silence_takes_a_few_bytes() -> None:
    silence = Window(3, 1800.0, "", None, None, ())
    assert window_document(silence) == {"until_s": 1800.0, "text": ""}
    assert window_from(3, window_document(silence)) == silence


def test_an_empty_word_list_and_no_word_list_are_different() -> None:
    for asked in (None, ()):
        window = Window(0, 1.0, "x", "en", 1.0, (Segment(9, 0.0, 1.0, "x", -0.1, 0.2, words=asked),))
        assert window_from(0, window_document(window)).segments[0].words == asked


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_number_that_is_not_json_raises_before_anything_is_written(wrong: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        window_document(Window(0, 1.0, "x", "en", 1.0, (Segment(1, 0.0, wrong, "x", -0.1, 0.2),)))


def test_a_new_job_is_unchanged_after_the_disk() -> None:
    asked = NewJob(
        "a",
        "print",
        AudioSource("url", "http://host/a.wav"),
        "base",
        options={"language": "de", "clip_timestamps": [[0.0, 1.5]]},
        metadata={"tags": ["x", None], "n": 1.5},
        formats=("srt", "json"),
        stream=True,
        priority=7,
        expires_at=90.0,
    )
    job = job_from(7, after_the_disk(job_document(asked, 12.5, 3)), 4, None)
    assert (job.seq, job.job_id, job.fingerprint, job.state) == (7, "a", "print", JobState.QUEUED)
    assert (job.audio, job.model_size, job.formats, job.stream) == (asked.audio, "base", ("srt", "json"), True)
    assert (job.priority, job.expires_at) == (7, 90.0)
    assert (job.options, job.metadata) == (asked.options, asked.metadata)
    assert (job.created_at, job.updated_at, job.revision, job.queue_position) == (12.5, 12.5, 3, 4)
    assert job_from(7, job_document(asked, 12.5, 3), 4, 20.0).updated_at == 20.0
    assert job_from(7, job_document(asked, 12.5, 3), 4, 2.0).updated_at == 12.5, "the clock was set back"


def test_a_result_is_unchanged_after_the_disk() -> None:
    asked = job_document(new_job("a", None), 1.0, 1)
    spoken = Result("text", 2.5, "en", 0.0, no_speech=False, warnings=("audio_damaged",))
    job = job_from(1, after_the_disk({**asked, **result_fields(spoken), "completed_at": 9.0}), None, None)
    assert (job.result_text, job.audio_duration, job.detected_language) == ("text", 2.5, "en")
    assert (job.language_probability, job.no_speech, job.warnings) == (0.0, False, ("audio_damaged",))
    assert job.completed_at == 9.0
    silent = Result("", 2.5, None, None, no_speech=True)
    job = job_from(1, after_the_disk({**asked, **result_fields(silent), "completed_at": 9.0}), None, None)
    assert (job.result_text, job.detected_language, job.language_probability) == ("", None, None)
    assert (job.no_speech, job.warnings) == (True, ())


def test_empty_fields_are_not_written() -> None:
    document = job_document(new_job("a", None), 1.0, 1)
    needed = {"job_id", "state", "revision", "created_at", "updated_at", "fingerprint", "model_size"}
    assert document.keys() == needed


def test_documents_share_nothing_mutable() -> None:
    metadata = {"tags": ["a"]}
    document = job_document(new_job("a", None, metadata=metadata), 1.0, 1)
    metadata["tags"].append("b")
    job = job_from(1, document, None, None)
    job.metadata["tags"].append("c")
    assert document["metadata"] == {"tags": ["a"]}


@pytest.mark.parametrize(
    ("state", "code", "needed"),
    [
        ("queued", None, True),
        ("processing", None, True),
        ("completed", None, False),
        ("cancelled", None, True),
        ("cancelled", "expired", True),
        *(("error", code.value, code.retryable) for code in ErrorCode),
    ],
)
def test_audio_is_kept_while_the_job_or_a_retry_may_need_it(state: str, code: str | None, needed: bool) -> None:  # noqa: FBT001
    assert document_may_need_audio({"state": state, **({} if code is None else {"error_code": code})}) is needed


@pytest.mark.parametrize(("formats", "kept"), [((), False), (("txt",), True), (("json",), True)])
def test_windows_are_kept_for_every_format(formats: tuple[str, ...], *, kept: bool) -> None:
    document = job_document(new_job("a", None, formats=formats), 1.0, 1)
    assert needs_windows(document) is kept


def test_only_uploaded_audio_is_a_spool_file() -> None:
    named = {"spool": ["x"], "path": [], "url": []}
    for kind, names in named.items():
        document = job_document(new_job("a", "x", kind=kind), 1.0, 1)
        assert list(spool_files(document)) == names
    assert list(spool_files({"job_id": "a"})) == []
