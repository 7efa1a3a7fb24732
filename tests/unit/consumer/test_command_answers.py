"""Answers, refusals and segments that are larger than the broker's packets: cut, or an error, and never silence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.jobs import AudioSource, Job, JobState
from cesar_mqtt.protocol.commands import JobList, Model, Models, Paused, Response, ResultPage, summary_of
from cesar_mqtt.protocol.payloads import Payload, Rejection, segment_of, status_of
from cesar_mqtt.protocol.truncate import truncate_response, truncate_segment
from cesar_mqtt.transcript import Segment, Word
from tests.unit.consumer.test_publisher import Bench, on

TRICKY = st.text(st.sampled_from('aé€😀"\\\x01'), min_size=1, max_size=200)


def answer(data: Payload, transaction: Any = "t-1") -> bytes:
    fields = json.loads(data.encode())
    return Response(status="ok", data=fields, error=None, transaction=transaction).encode()


def piece(text: str, offset: int = 0) -> ResultPage:
    size = len(text.encode())
    return ResultPage(
        job_id="a", format="txt", offset=offset, length=size, total=size, text=text, more=False, consumer="porch"
    )


def job(job_id: str = "a", **fields: Any) -> Job:
    return Job(
        seq=1,
        job_id=job_id,
        state=JobState.COMPLETED,
        revision=1,
        created_at=0.0,
        updated_at=0.0,
        fingerprint="",
        model_size="base",
        audio=AudioSource("path", "a.wav"),
        **fields,
    )


def models(count: int = 30) -> Models:
    entry = Model(name="base", origin=None, size_bytes=1, multilingual=True, default=True, problem=None)
    return Models(
        default="base",
        loaded=None,
        device="cpu",
        compute_type="int8",
        cpu_threads=1,
        models=[entry] * count,
        consumer="porch",
    )


def fitted(payload: bytes, size_bytes: int) -> dict[str, Any]:
    made = truncate_response(payload, size_bytes)
    assert len(made) <= size_bytes
    said: dict[str, Any] = json.loads(made)
    return said


@given(text=TRICKY, size_bytes=st.integers(450, 1500))
def test_a_piece_becomes_the_longest_beginning_that_there_is_room_for_and_says_so(text: str, size_bytes: int) -> None:
    said = fitted(answer(piece(text, 7)), size_bytes)
    data = said["data"]
    assert (said["status"], said["transaction"], data["offset"]) == ("ok", "t-1", 7)
    assert text.startswith(data["text"])
    assert data["length"] == len(data["text"].encode()) > 0
    assert data["more"] == (data["text"] != text)
    if data["more"]:
        longer = text[: len(data["text"]) + 1]
        assert len(answer(piece(longer, 7))) + 1 > size_bytes, "one more character would have had room"


def test_what_fits_to_the_byte_stays_as_it_is() -> None:
    for payload in (answer(piece("Good morning.")), answer(models(1)), b'{"job_id":"a","status":"queued"}'):
        assert truncate_response(payload, len(payload)) == payload


def test_a_page_ends_sooner_and_says_where_to_go_on() -> None:
    jobs = [summary_of(status_of(job(f"job-{number}"), "porch")) for number in range(20)]
    said = fitted(answer(JobList(jobs=jobs, next=None, total=20, consumer="porch")), 2000)
    told = [each["job_id"] for each in said["data"]["jobs"]]
    assert 3 < len(told) < 8
    assert told == [f"job-{number}" for number in range(len(told))]
    assert (said["status"], said["data"]["next"], said["data"]["total"]) == ("ok", told[-1], 20)


def test_a_status_is_cut_as_the_retained_one_is() -> None:
    long = status_of(job(result_text='é"' * 2000, metadata={"room": "x" * 500}), "porch")
    data = fitted(answer(long), 2500)["data"]
    assert data["result_truncated"]
    assert len(data["result_text"]) > 100
    assert data["metadata"] == {"room": "x" * 500}
    bare = fitted(answer(long), 1000)["data"]
    assert (bare["result_truncated"], bare["metadata"]) == (True, {})


PAGE = JobList(jobs=[summary_of(status_of(job(), "porch"))], next=None, total=1, consumer="porch")


@pytest.mark.parametrize("depth", [150, 198, 199])
def test_metadata_nested_as_deep_as_we_take_them_are_answered_all_the_same(depth: int) -> None:
    nested = json.loads("[" * depth + "]" * depth)
    status = status_of(job(result_text="word " * 1000, metadata={"a": nested}), "porch")
    told = fitted(answer(status), 2000)
    assert told["transaction"] == "t-1"
    assert len(json.dumps(told)) < 2500


@pytest.mark.parametrize("data", [models(), status_of(job(), "porch"), PAGE], ids=["models", "status", "page"])
def test_what_cannot_be_cut_to_the_limit_becomes_an_error_that_names_it(data: Payload) -> None:
    payload = answer(data, {"id": ["ü"]})
    said = fitted(payload, 350)
    assert (said["status"], said["data"], said["transaction"]) == ("error", {"consumer": "porch"}, {"id": ["ü"]})
    assert f"has {len(payload)} bytes" in said["error"]
    assert "has room for 350: raise that limit" in said["error"]


def test_a_transaction_that_leaves_no_room_for_anything_else_is_the_last_to_go() -> None:
    payload = answer(Paused(paused=True, consumer="porch"), "x" * 1000)
    said = fitted(payload, 1010)
    assert (said["status"], said["transaction"]) == ("error", None)
    assert said["error"].startswith("It is done, but the answer has ")
    failed = Response(status="error", data={"consumer": "porch"}, error="There is no job.", transaction="x" * 1000)
    assert fitted(failed.encode(), 1010)["error"] == "There is no job."


def test_a_refusal_loses_its_excerpt_first() -> None:
    refusal = Rejection(
        reason="malformed_json",
        detail="No.",
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt="\0" * 200,
        received_at="",
    )
    assert fitted(refusal.encode(), 400) == {**json.loads(refusal.encode()), "payload_excerpt": ""}


def segment(text: str = "Good morning.", words: int = 20) -> Segment:
    return Segment(1, 0.0, 1.0, text, -0.1, 0.1, words=tuple(Word(0.0, 0.1, " word", 0.9) for _ in range(words)))


@given(text=TRICKY, size_bytes=st.integers(120, 1500))
def test_a_segment_loses_its_words_and_then_the_end_of_its_text(text: str, size_bytes: int) -> None:
    whole = segment_of("a", segment(text))
    made = truncate_segment(whole, size_bytes)
    assert len(made) <= size_bytes
    told = json.loads(made)
    assert text.startswith(told["text"])
    if len(whole.encode()) <= size_bytes:
        assert made == whole.encode()
    else:
        assert "words" not in told
        if told["text"] != text:
            longer = segment_of("a", segment(text[: len(told["text"]) + 1], words=0))
            assert len(longer.model_copy(update={"words": None}).encode()) > size_bytes


# -- on their way -------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.publisher.stop()
    made.ledger.close()


def test_an_answer_is_cut_for_the_topic_that_it_goes_to_and_the_broker_that_is_there_then(bench: Bench) -> None:
    payload = answer(piece("x" * 5000))
    bench.publisher.answer("cesar/response/result", payload)
    bench.publisher.answer("replies/" + "x" * 400, payload, correlation_data=b"c" * 300)
    bench.connect(limit_bytes=3000)
    notes = [message for message in bench.connection.sent if b'"text"' in message.payload]
    lengths = [message.fields["data"]["length"] for message in notes]
    assert 2500 < lengths[0] < 3000
    assert 1800 < lengths[1] < lengths[0] - 600
    assert all(message.fields["data"]["more"] for message in notes)


def test_segments_that_are_cut_are_not_dropped_and_that_is_logged_once_for_a_job(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.add("a", stream=True)
    working = bench.claim()
    bench.connect(limit_bytes=700)
    for text in ("Good morning.", '"' * 2000):
        bench.publisher.segment(working, segment(text))
    told = on("cesar/segments/a", bench.turn())
    assert [each.keys() & {"words"} for each in told] == [set(), set()]
    assert told[0]["text"] == "Good morning."
    assert 200 < len(told[1]["text"]) < 350, "a quote is two bytes in JSON"
    (record,) = [record for record in caplog.records if record.__dict__.get("action") == "segment_cut"]
    assert (record.levelname, record.__dict__["job_id"]) == ("WARNING", "a")
    assert "is skipped" not in caplog.text.replace("consumer/kitchen", "")
