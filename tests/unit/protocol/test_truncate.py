"""Payloads that are larger than a limit: cut and marked as such, or an error that names the limit, never nothing."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic_core import to_json

from cesar_mqtt.jobs import AudioSource, Job, JobState
from cesar_mqtt.protocol.commands import JobList, Model, Models, Paused, Response, ResultPage, summary_of
from cesar_mqtt.protocol.consumer_payloads import last_of
from cesar_mqtt.protocol.fields import Payload
from cesar_mqtt.protocol.formats import content_of, render
from cesar_mqtt.protocol.payloads import Rejection, Status, event_of, segment_of, status_of
from cesar_mqtt.protocol.schema import bundle, payload_schemas
from cesar_mqtt.protocol.truncate import (
    excerpt,
    is_inside_character,
    shorten,
    truncate_list,
    truncate_response,
    truncate_result,
    truncate_segment,
    truncate_status,
    truncate_text,
)
from cesar_mqtt.transcript import Segment
from tests import factories

TRICKY = st.text(st.sampled_from('aé€😀"\\\x01'), min_size=1, max_size=200)


def response(data: Payload | Status, transaction: Any = "t-1") -> bytes:
    fields = json.loads(data.encode() if isinstance(data, Payload) else to_json(data))
    return Response(status="ok", data=fields, error=None, transaction=transaction).encode()


def page(text: str, offset: int = 0) -> ResultPage:
    size = len(text.encode())
    return ResultPage(
        job_id="a", format="txt", offset=offset, length=size, total=size, text=text, more=False, consumer="porch"
    )


COMPLETED = factories.job("a", "completed", result_text="Hello.")


def job(**fields: Any) -> Job:
    return COMPLETED._replace(**fields)


def models(count: int = 30) -> Models:
    entry = Model(name="base", origin=None, size_bytes=1, multilingual=True, default=True, problem=None)
    return Models(
        default="base",
        default_language=None,
        loaded=None,
        device="cpu",
        compute_type="int8",
        cpu_threads=1,
        workers=1,
        models=[entry] * count,
        consumer="porch",
    )


def fitted(payload: bytes, size_bytes: int) -> dict[str, Any]:
    made = truncate_response(payload, size_bytes)
    assert len(made) <= size_bytes
    document: dict[str, Any] = json.loads(made)
    return document


def segment(text: str = "Good morning.", words: int = 20) -> Segment:
    return factories.segment(1, text, words=factories.words(words))


# -- every kind of payload -----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How a text becomes a payload of at most so many bytes, and what of it is left.

    Attributes:
        schema: the name of its schema.
        build: makes the payload with a text, in so many bytes (None: no limit).
        text: what is left of the text.
        is_marked: whether the payload says that it was cut.
        least: the limit that is always kept.
    """

    schema: str
    build: Callable[[str, int | None], bytes]
    text: Callable[[Any], str]
    is_marked: Callable[[Any], bool]
    least: int


def limited(payload: bytes, limit: int | None) -> bytes:
    return payload if limit is None else truncate_response(payload, limit)


KINDS = {
    "status": Kind(
        "Status",
        lambda text, limit: truncate_status(status_of(job(result_text=text), "porch"), limit),
        lambda status: str(status["result_text"]),
        lambda status: bool(status["result_truncated"]),
        800,
    ),
    "segment": Kind(
        "Segment",
        lambda text, limit: truncate_segment(segment_of("a", segment(text)), limit),
        lambda document: str(document["text"]),
        lambda document: "words" not in document,
        120,
    ),
    "get": Kind(
        "GetResponse",
        lambda text, limit: limited(response(status_of(job(result_text=text), "porch")), limit),
        lambda document: str(document["data"]["result_text"]),
        lambda document: bool(document["data"]["result_truncated"]),
        900,
    ),
    "result": Kind(
        "ResultResponse",
        lambda text, limit: limited(response(page(text)), limit),
        lambda document: str(document["data"]["text"]),
        lambda document: bool(document["data"]["more"]),
        450,
    ),
    "list": Kind(
        "ListResponse",
        lambda text, limit: limited(response(listed(text)), limit),
        lambda document: "".join(each["audio_source"] for each in document["data"]["jobs"]),
        lambda document: document["data"]["next"] is not None,
        900,
    ),
    "json": Kind(
        "TranscriptFile",
        lambda text, limit: render("json", content_of(job(result_text=text), spoken(text)), limit_bytes=limit)[0],
        lambda document: str(document["text"]),
        lambda document: bool(document["truncated"]),
        200,
    ),
}


def spoken(text: str) -> list[Segment]:
    return [factories.segment(number, character) for number, character in enumerate(text, start=1)]


def listed(text: str) -> JobList:
    jobs = [
        summary_of(status_of(job(job_id=f"job-{number}", audio=AudioSource("path", character)), "porch"))
        for number, character in enumerate(text)
    ]
    return JobList(jobs=jobs, next=None, total=len(jobs), consumer="porch")


SCHEMAS = {name: Draft202012Validator(bundle(name, payload_schemas())) for name in {k.schema for k in KINDS.values()}}


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(KINDS)),
    st.text('aé€😀"\\\x01', min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 6000),
)
@example("list", "ab", 30, 0)
@example("json", "a", 60, 0)
def test_a_payload_of_any_kind_keeps_its_limit_its_schema_and_the_longest_beginning(
    name: str, text: str, times: int, room: int
) -> None:
    kind, text = KINDS[name], text * times
    whole, limit = kind.build(text, None), kind.least + room
    payload = kind.build(text, limit)
    assert len(payload) <= limit
    SCHEMAS[kind.schema].validate(json.loads(payload))
    if len(whole) <= limit:
        assert payload == whole
        return
    left = kind.text(json.loads(payload))
    assert text.startswith(left)
    assert kind.is_marked(json.loads(payload))
    # A list page and a transcript hold whole jobs and segments; the others waste at most one character in JSON.
    spare = {"list": 450, "json": 250}.get(name, 12)
    assert len(payload) > limit - spare or len(left) == len(text)


@pytest.mark.parametrize("text", ["ab", "abc", "Good morning."])
def test_one_byte_too_many_costs_one_character(text: str) -> None:
    whole = segment_of("a", Segment(1, 0.0, 1.0, text, -0.1, 0.1))
    assert json.loads(truncate_segment(whole, len(to_json(whole)) - 1))["text"] == text[:-1]
    full = response(page(text))
    data = json.loads(truncate_response(full, len(full) - 1))["data"]
    assert (data["text"], data["length"], data["more"]) == (text[:-1], len(text) - 1, True)


@given(st.text(max_size=50), st.integers(-5, 250))
def test_a_truncated_text_is_the_longest_beginning_that_fits(text: str, size_bytes: int) -> None:
    beginning = truncate_text(text, size_bytes)
    assert text.startswith(beginning)
    assert len(beginning.encode()) <= max(0, size_bytes)
    following = text[len(beginning) : len(beginning) + 1]
    assert not following or len((beginning + following).encode()) > size_bytes


@given(st.text(max_size=50), st.integers(1, 60))
def test_a_shortened_text_ends_with_an_ellipsis(text: str, characters: int) -> None:
    short = shorten(text, characters)
    assert len(short) <= characters
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]) and len(text) > characters)


@given(text=TRICKY, start=st.integers(0, 60), length=st.integers(4, 60), limit=st.integers(6, 300))
def test_a_page_of_a_result_holds_whole_characters(text: str, start: int, length: int, limit: int) -> None:
    content = text.encode()
    begin = min(start, len(content))
    if is_inside_character(content, begin):
        return
    kept = truncate_result(content, begin, length, limit)
    assert content[begin:].startswith(kept.encode())
    assert len(kept.encode()) <= length
    assert len(to_json(kept)) - 2 <= limit
    assert kept or begin == len(content)
    following = content[begin:].decode()[len(kept) : len(kept) + 1]
    assert not following or len((kept + following).encode()) > length or len(to_json(kept + following)) - 2 > limit


def test_a_list_page_ends_with_the_last_job_that_fits() -> None:
    jobs = listed("abcdef").jobs
    size = len(jobs[0].encode()) + 1
    assert truncate_list(jobs, 3 * size + 5) == jobs[:3]
    assert truncate_list(iter(jobs), 100 * size) == jobs
    assert truncate_list(jobs, size - 1) == []


def test_the_texts_for_home_assistant_fit_into_its_attributes() -> None:
    long = job(result_text="ä" * 9_000)
    event, last = event_of(long, "porch")["text"], last_of(long).text
    assert event is not None
    assert last is not None
    assert (len(event.encode()), len(last.encode())) == (8_000, 12_000)


# -- excerpts ---------------------------------------------------------------------------------------------------


def test_an_excerpt_shows_no_password_of_a_url() -> None:
    document = excerpt(b'{"audio_ulr": "https://user:se:cr@et@cam.example/a.mp3", "by": "me@home"}')
    assert document == '{"audio_ulr": "https://***@cam.example/a.mp3", "by": "me@home"}'


@given(st.binary(max_size=300))
@example(b"x" * 199 + "äää".encode())
def test_an_excerpt_of_any_payload_is_short_text(payload: bytes) -> None:
    text = excerpt(payload)
    assert len(text) <= 200
    assert json.loads(json.dumps(text)) == text
    assert text.encode().decode() == text


# -- a status -----------------------------------------------------------------------------------------------------


def test_a_status_within_the_limit_goes_out_as_it_is() -> None:
    status = status_of(job(), "porch")
    assert truncate_status(status) == truncate_status(status, len(to_json(status))) == to_json(status)


def test_a_status_that_fits_keeps_the_mark_of_a_result_that_did_not() -> None:
    status = status_of(job(), "porch", result_truncated=True)
    assert json.loads(truncate_status(status))["result_truncated"] is True
    assert json.loads(truncate_status(status, 500))["result_truncated"] is True


def test_a_text_that_does_not_fit_is_cut_and_marked() -> None:
    status = status_of(job(result_text="word " * 1000, metadata={"room": "porch"}), "porch")
    payload = truncate_status(status, 2000)
    shorter = json.loads(payload)
    assert 1990 <= len(payload) <= 2000
    assert shorter["result_truncated"] is True
    assert ("word " * 1000).startswith(shorter["result_text"])
    assert shorter["metadata"] == {"room": "porch"}


def test_metadata_goes_only_when_no_text_is_left_to_cut() -> None:
    status = status_of(job(metadata={"k": "x" * 4000}), "porch")
    shorter = json.loads(truncate_status(status, 2000))
    assert shorter["metadata"] == {}
    assert shorter["result_text"] == "Hello."
    assert shorter["result_truncated"] is True


def test_metadata_of_a_job_without_a_text_can_be_cut_too() -> None:
    payload = truncate_status(
        status_of(job(state=JobState.QUEUED, result_text=None, metadata={"k": "x" * 4000}), "porch"), 2000
    )
    assert len(payload) <= 2000
    assert json.loads(payload)["metadata"] == {}
    assert json.loads(payload)["result_text"] is None


def test_a_limit_that_nothing_can_fit_ends_in_the_least_there_is() -> None:
    shorter = json.loads(truncate_status(status_of(job(metadata={"k": "x"}), "porch"), 1))
    assert (shorter["result_text"], shorter["metadata"], shorter["result_truncated"]) == ("", {}, True)


LEAST_BYTES = len(truncate_status(status_of(job(result_text="x", metadata={"k": "x"}), "porch"), 1))
"""What the fields that are never cut take."""
texts = (
    st.text(max_size=300) | st.text(st.sampled_from('"\\\n\r\t\0\x1f a'), max_size=300) | st.text("ä日😀", max_size=300)
)


@settings(deadline=None, max_examples=300)
@given(texts, st.integers(1, 40), st.dictionaries(st.text(max_size=10), texts, max_size=2), st.integers(0, 20_000))
@example('"' * 300, 40, {}, 5_000)
@example("\0" * 300, 10, {}, 3_000)
def test_what_is_cut_fits_and_wastes_nothing(text: str, times: int, metadata: dict[str, str], room: int) -> None:
    text *= times
    status = status_of(job(result_text=text, metadata=metadata), "porch")
    limit = LEAST_BYTES + room
    payload = truncate_status(status, limit)
    shorter = json.loads(payload)
    assert len(payload) <= limit
    assert text.startswith(shorter["result_text"])
    assert shorter["result_truncated"] is (len(to_json(status)) > limit)
    assert shorter["metadata"] in ({}, metadata)
    kept = len(shorter["result_text"])
    if kept < len(text):  # one character more would have been too much
        more = {**status, "result_text": text[: kept + 1], "result_truncated": True, "metadata": shorter["metadata"]}
        assert len(to_json(more)) > limit


# -- responses ----------------------------------------------------------------------------------------------------


@given(text=TRICKY, size_bytes=st.integers(450, 1500))
def test_a_piece_becomes_the_longest_beginning_that_there_is_room_for_and_is_marked(text: str, size_bytes: int) -> None:
    document = fitted(response(page(text, 7)), size_bytes)
    data = document["data"]
    assert (document["status"], document["transaction"], data["offset"]) == ("ok", "t-1", 7)
    assert text.startswith(data["text"])
    assert data["length"] == len(data["text"].encode()) > 0
    assert data["more"] == (data["text"] != text)
    if data["more"]:
        longer = text[: len(data["text"]) + 1]
        assert len(response(page(longer, 7))) + 1 > size_bytes, "one more character would have had room"


def test_what_fits_to_the_byte_stays_as_it_is() -> None:
    for payload in (response(page("Good morning.")), response(models(1)), b'{"job_id":"a","status":"queued"}'):
        assert truncate_response(payload, len(payload)) == payload


def test_a_page_ends_sooner_and_names_the_next() -> None:
    jobs = [summary_of(status_of(job(job_id=f"job-{number}"), "porch")) for number in range(20)]
    document = fitted(response(JobList(jobs=jobs, next=None, total=20, consumer="porch")), 2000)
    listed_ids = [each["job_id"] for each in document["data"]["jobs"]]
    assert 3 < len(listed_ids) < 8
    assert listed_ids == [f"job-{number}" for number in range(len(listed_ids))]
    assert (document["status"], document["data"]["next"], document["data"]["total"]) == ("ok", listed_ids[-1], 20)


def test_a_status_is_cut_as_the_retained_one_is() -> None:
    long = status_of(job(result_text='é"' * 2000, metadata={"room": "x" * 500}), "porch")
    data = fitted(response(long), 2500)["data"]
    assert data["result_truncated"]
    assert len(data["result_text"]) > 100
    assert data["metadata"] == {"room": "x" * 500}
    bare = fitted(response(long), 1000)["data"]
    assert (bare["result_truncated"], bare["metadata"]) == (True, {})


LIST = JobList(jobs=[summary_of(status_of(job(), "porch"))], next=None, total=1, consumer="porch")


@pytest.mark.parametrize("depth", [150, 198, 199])
def test_metadata_nested_as_deep_as_we_take_them_are_answered_all_the_same(depth: int) -> None:
    nested = json.loads("[" * depth + "]" * depth)
    status = status_of(job(result_text="word " * 1000, metadata={"a": nested}), "porch")
    document = fitted(response(status), 2000)
    assert document["transaction"] == "t-1"
    assert len(json.dumps(document)) < 2500


@pytest.mark.parametrize("data", [models(), status_of(job(), "porch"), LIST], ids=["models", "status", "list"])
def test_what_cannot_be_cut_to_the_limit_becomes_an_error_that_names_it(data: Payload | Status) -> None:
    payload = response(data, {"id": ["ü"]})
    document = fitted(payload, 350)
    assert (document["status"], document["data"], document["transaction"]) == (
        "error",
        {"consumer": "porch"},
        {"id": ["ü"]},
    )
    assert f"has {len(payload)} bytes" in document["error"]
    assert "has room for 350: raise that limit" in document["error"]


def test_a_transaction_that_leaves_no_room_for_anything_else_is_the_last_to_go() -> None:
    payload = response(Paused(paused=True, consumer="porch"), "x" * 1000)
    document = fitted(payload, 1010)
    assert (document["status"], document["transaction"]) == ("error", None)
    assert document["error"].startswith("The command was executed, but its response has ")
    failed = Response(status="error", data={"consumer": "porch"}, error="There is no job.", transaction="x" * 1000)
    assert fitted(failed.encode(), 1010)["error"] == "There is no job."


def test_a_rejection_loses_its_excerpt_first() -> None:
    refusal = Rejection(
        reason="malformed_json",
        detail="No.",
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt="\0" * 200,
        received_at="1970-01-01T00:00:00.000Z",
    )
    assert fitted(refusal.encode(), 420) == {**json.loads(refusal.encode()), "payload_excerpt": ""}


# -- segments -----------------------------------------------------------------------------------------------------


@given(text=TRICKY, size_bytes=st.integers(120, 1500))
def test_a_segment_loses_its_words_and_then_the_end_of_its_text(text: str, size_bytes: int) -> None:
    whole = segment_of("a", segment(text))
    made = truncate_segment(whole, size_bytes)
    assert len(made) <= size_bytes
    document = json.loads(made)
    assert text.startswith(document["text"])
    if len(to_json(whole)) <= size_bytes:
        assert made == to_json(whole)
    else:
        assert "words" not in document
        if document["text"] != text:
            assert len(to_json({**document, "text": text[: len(document["text"]) + 1]})) > size_bytes
