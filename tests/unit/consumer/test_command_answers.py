"""Responses and segments that are larger than the packets of the connected broker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.protocol.commands import Response, ResultPage
from cesar_mqtt.transcript import Segment, Word
from tests.unit.consumer.test_publisher import Bench, on


def response(text: str) -> bytes:
    size = len(text)
    page = ResultPage(
        job_id="a", format="txt", offset=0, length=size, total=size, text=text, more=False, consumer="porch"
    )
    return Response(status="ok", data=page.model_dump(), error=None, transaction="t-1").encode()


def segment(text: str) -> Segment:
    return Segment(1, 0.0, 1.0, text, -0.1, 0.1, words=tuple(Word(0.0, 0.1, " word", 0.9) for _ in range(20)))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.publisher.stop()
    made.ledger.close()


def test_an_answer_is_cut_for_the_topic_that_it_goes_to_and_the_broker_that_is_there_then(bench: Bench) -> None:
    payload = response("x" * 5000)
    bench.publisher.publish_response("cesar/response/result", payload)
    bench.publisher.publish_response("replies/" + "x" * 400, payload, correlation_data=b"c" * 300)
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
    bench.connect(limit_bytes=760)
    for text in ("Good morning.", '"' * 2000):
        bench.publisher.on_segment(working, segment(text))
    told = on("cesar/segments/a", bench.turn())
    assert [each.keys() & {"words"} for each in told] == [set(), set()]
    assert told[0]["text"] == "Good morning."
    assert 200 < len(told[1]["text"]) < 380, "a quote is two bytes in JSON"
    (record,) = [record for record in caplog.records if record.__dict__.get("action") == "segment_cut"]
    assert (record.levelname, record.__dict__["job_id"]) == ("WARNING", "a")
    assert "is skipped" not in caplog.text.replace("consumer/kitchen", "")
