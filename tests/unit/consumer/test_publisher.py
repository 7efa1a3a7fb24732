import itertools
import json
import logging
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cesar_mqtt.consumer.publisher import MAX_IN_FLIGHT, Publisher
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import Job, JobState
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.outbox import HISTORY_LIMIT
from cesar_mqtt.mqtt.messages import CannotPublishError, PacketTooLargeError, Refusal
from cesar_mqtt.protocol.payloads import JobProgress, Rejection, status_of
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.transcript import Window
from tests.conftest import PATIENCE_S
from tests.factories import new_job, result, segment, window

QUEUE = "cesar/consumer/kitchen/queue"
STATE = "cesar/consumer/kitchen/state"
LAST = "cesar/consumer/kitchen/last"
LAST_ERROR = "cesar/consumer/kitchen/last_error"
REJECTED = "cesar/rejected"
DENIED = Refusal(0x87, "Not authorized")
TOO_LARGE = Refusal(0x95, "Packet too large")
OVERHEAD_BYTES = 16  # what MQTT adds to topic and payload, at most


@dataclass(frozen=True)
class Message:
    """A message that was passed to the connection."""

    ticket: int
    topic: str
    payload: bytes
    retain: bool
    correlation_data: bytes | None = None
    alone: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.payload)
        return fields


class FakeConnection:
    """Records what is published while `up`; `limit_bytes`, `refused` and `goes_down_after` make it fail."""

    def __init__(self) -> None:
        self.up = False
        self.limit_bytes: int | None = None
        self.refused: set[str] = set()
        self.goes_down_after: int | None = None
        self.sent: list[Message] = []
        self.attempts = 0
        self.threads: set[str] = set()
        self.on_sent: Callable[[Message], None] = lambda _message: None
        self._tickets = itertools.count(1)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        correlation_data: bytes | None = None,
        alone: bool = False,
    ) -> int | None:
        self.attempts += 1
        self.threads.add(threading.current_thread().name)
        if self.goes_down_after == 0:
            self.up = False
        if not self.up:
            return None
        size_bytes = len(topic.encode()) + len(payload) + OVERHEAD_BYTES
        if self.limit_bytes is not None and size_bytes > self.limit_bytes:
            raise PacketTooLargeError(size_bytes, self.limit_bytes)
        if topic in self.refused:
            raise CannotPublishError("Nothing can be published there.")
        if self.goes_down_after is not None:
            self.goes_down_after -= 1
        self.sent.append(Message(next(self._tickets), topic, payload, retain, correlation_data, alone))
        self.on_sent(self.sent[-1])
        return self.sent[-1].ticket


def left_by(bench: "Bench", **counts: int) -> bytes:
    """The last queue message of the process before."""
    totals = bench.ledger.totals()
    return json.dumps(
        {
            "activity": "draining",
            "queued": totals.queued,
            "completed_total": totals.completed_total,
            "error_total": totals.error_total,
            "cancelled_total": totals.cancelled_total,
            "deleted_total": totals.deleted_total,
            **counts,
        }
    ).encode()


class Bench:
    """A publisher between a real ledger and a fake connection; `turn` runs it once."""

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self.now = 1000.0
        self.ledger = Ledger(folder / "ledger.json", clock=lambda: self.now, disk=disk)
        self.connection = FakeConnection()
        self.publisher = Publisher(
            self.connection,
            self.ledger,
            Topics("cesar", "kitchen"),
            clock=lambda: self.now,
            monotonic=lambda: self.now,
        )
        self._seen = 0
        self.left = left_by(self)
        """The last queue message of the process before, until the broker has sent it."""

    # -- the ledger --

    def add(self, *job_ids: str, **fields: Any) -> None:
        self.ledger.append([new_job(job_id, **fields) for job_id in job_ids])

    def claim(self) -> Job:
        job = self.ledger.claim()
        assert job is not None
        return job

    def complete(self, job: Job, text: str = "Hello.", windows: tuple[Window, ...] = ()) -> Job:
        self.ledger.complete(job.seq, result(text, windows=windows))
        return self.job(job.job_id)

    def fail(self, job: Job, code: ErrorCode, message: str) -> Job:
        self.ledger.fail(job.seq, code, message)
        return self.job(job.job_id)

    def job(self, job_id: str) -> Job:
        job = self.ledger.get(job_id)
        assert job is not None
        return job

    # -- the connection --

    def connect(self, *, session_present: bool = True, limit_bytes: int | None = None) -> list[Message]:
        self.connection.up = True
        self.connection.limit_bytes = limit_bytes
        self.publisher.on_connected(session_present=session_present, max_packet_bytes=limit_bytes)
        if session_present and self.left:
            self.publisher.on_queue_message_received(self.left)
        self.left = b""
        return self.turn()

    def disconnect(self) -> None:
        self.connection.up = False
        self.publisher.on_disconnected()
        assert self.turn() == []

    def acknowledge(self, *messages: Message) -> list[Message]:
        for message in messages:
            self.publisher.on_published(message.ticket)
        return self.turn()

    def settle(self) -> list[Message]:
        """Acknowledge and run until nothing more is published; return all that was."""
        published = self.turn()
        fresh = published or self.connection.sent
        while fresh:
            fresh = self.acknowledge(*fresh)
            published += fresh
        return published

    def turn(self) -> list[Message]:
        """Run the publisher once; return what it has published since the last call."""
        self.publisher.run_once()
        fresh = self.connection.sent[self._seen :]
        self._seen += len(fresh)
        return fresh

    def quiet(self, **connection: Any) -> None:
        """Connect, and have everything published and acknowledged, long ago."""
        self.connect(**connection)
        self.settle()
        self.now += 100
        self.settle()


@contextmanager
def opened(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.publisher.stop()
        bench.ledger.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with opened(tmp_path) as bench:
        yield bench


def on(topic: str, messages: list[Message]) -> list[dict[str, Any]]:
    return [message.fields for message in messages if message.topic == topic]


def statuses(messages: list[Message]) -> list[tuple[str, str]]:
    """Return the jobs whose statuses were published, with their states, in order."""
    found = (message.fields for message in messages if message.topic.startswith("cesar/status/"))
    return [(fields["job_id"], fields["status"]) for fields in found]


def fields_of(message: Message) -> dict[str, Any]:
    """Return the fields of a status; of any other message none."""
    return message.fields if message.topic.startswith("cesar/status/") else {}


def rejection(detail: str = "It is wrong.") -> Rejection:
    return Rejection(
        reason="malformed_json",
        detail=detail,
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt="{",
        received_at="2026-01-23T21:45:00.120Z",
    )


def live(progress: float) -> JobProgress:
    return JobProgress(
        progress=progress,
        processed_duration=progress * 60,
        audio_duration=60.0,
        speed=6.5,
        eta=5.4,
        updated_at=1000.0,
    )


# -- statuses ------------------------------------------------------------------------------------------------------


def test_nothing_is_published_while_there_is_no_connection(bench: Bench) -> None:
    bench.add("a")
    bench.publisher.publish_state("online")
    bench.publisher.on_rejected(rejection())
    assert bench.publisher.run_once() is None
    assert bench.connection.threads == set()


def test_a_status_is_retained_on_the_topic_of_its_job(bench: Bench) -> None:
    bench.add("a", metadata={"room": "porch"})
    [message] = [message for message in bench.connect() if message.topic == "cesar/status/a"]
    assert message.retain
    assert message.fields == status_of(bench.job("a"), "kitchen")


def test_while_connected_every_state_of_a_job_is_published_in_order(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    bench.complete(bench.claim())
    assert statuses(bench.turn()) == [("a", "queued"), ("a", "processing"), ("a", "completed")]


def test_states_passed_through_while_offline_are_never_published(bench: Bench) -> None:
    bench.quiet()
    bench.disconnect()
    bench.add("a", "b")
    bench.complete(bench.claim())
    assert sorted(statuses(bench.connect())) == [("a", "completed"), ("b", "queued")]


def test_a_status_counts_as_published_only_at_its_acknowledgement(bench: Bench, tmp_path: Path) -> None:
    bench.quiet()
    bench.add("a")
    published = bench.turn()
    assert statuses(published) == [("a", "queued")]
    assert bench.ledger.has_unpublished
    crashed = tmp_path / "crashed"
    shutil.copytree(tmp_path, crashed, ignore=shutil.ignore_patterns("*.lock", "crashed"))
    with Ledger(crashed / "ledger.json") as ledger:
        assert [job.job_id for _, job in ledger.unpublished(10)] == ["a"]
    bench.acknowledge(*published)
    assert not bench.ledger.has_unpublished


def test_a_status_in_flight_is_not_published_again(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    assert statuses(bench.turn()) == [("a", "queued")]
    assert statuses(bench.turn()) == []


def test_an_older_acknowledgement_does_not_count_for_a_newer_state(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    older = bench.turn()
    job = bench.claim()
    newer = bench.turn()
    assert statuses(newer) == [("a", "processing")]
    bench.acknowledge(*older)
    assert bench.ledger.has_unpublished
    bench.disconnect()
    assert statuses(bench.connect()) == [("a", "processing")]
    bench.complete(job)


def test_an_acknowledgement_of_an_older_connection_or_an_unknown_ticket_is_ignored(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    lost = bench.turn()
    bench.disconnect()
    again = bench.connect()
    assert statuses(again) == [("a", "queued")]
    bench.acknowledge(*lost, Message(10_000, "", b"", retain=False))
    assert bench.ledger.has_unpublished
    bench.acknowledge(*again)
    assert not bench.ledger.has_unpublished


def test_an_acknowledgement_that_arrives_before_publish_has_returned_counts(bench: Bench) -> None:
    bench.connection.on_sent = lambda message: bench.publisher.on_published(message.ticket)
    bench.add("a")
    bench.connect()
    bench.turn()
    assert not bench.ledger.has_unpublished


def test_about_two_hundred_messages_are_in_flight_at_most(bench: Bench) -> None:
    bench.quiet()
    for number in range(450):
        bench.add(f"job-{number}")
    published = bench.turn()
    assert MAX_IN_FLIGHT == 200
    assert len(published) in {MAX_IN_FLIGHT, MAX_IN_FLIGHT + 1}, "an event and its status go together"
    assert bench.turn() == []
    more = bench.acknowledge(*published[:10])
    assert len(more) == 10
    bench.now += 10
    everything = published + more + bench.acknowledge(*published[10:], *more)
    while bench.ledger.has_unpublished:
        everything += bench.acknowledge(*everything)
    assert [job_id for job_id, _ in dict.fromkeys(statuses(everything))] == [f"job-{number}" for number in range(450)]


def test_a_connection_that_breaks_in_the_middle_of_a_burst_loses_nothing(bench: Bench) -> None:
    bench.quiet()
    bench.add(*(f"job-{number}" for number in range(20)))
    bench.connection.goes_down_after = 7
    assert len(statuses(bench.turn())) <= 7
    assert bench.turn() == []
    bench.connection.goes_down_after = None
    bench.disconnect()
    bench.connect()
    bench.settle()
    assert not bench.ledger.has_unpublished
    assert {job_id for job_id, _ in statuses(bench.connection.sent)} == {f"job-{number}" for number in range(20)}


def test_after_a_failed_publish_no_other_is_tried_before_the_next_connection(bench: Bench) -> None:
    bench.quiet()
    bench.connection.up = False
    bench.add("a", "b")
    bench.publisher.on_rejected(rejection())
    bench.turn()
    attempts = bench.connection.attempts
    bench.add("c")
    bench.now += 10
    bench.turn()
    assert bench.connection.attempts == attempts
    assert len(statuses(bench.connect())) == 3


def test_after_a_reconnect_only_unacknowledged_statuses_are_published_again(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", "b")
    published = bench.turn()
    assert statuses(published) == [("a", "queued"), ("b", "queued")]
    bench.acknowledge(*(message for message in published if message.topic != "cesar/status/b"))
    bench.disconnect()
    assert statuses(bench.connect()) == [("b", "queued")]


def test_after_the_broker_lost_the_session_everything_is_published_again(bench: Bench) -> None:
    bench.add("a", "b")
    bench.publisher.publish_state("online")
    bench.publisher.on_finished(bench.complete(bench.claim()))
    bench.quiet()
    bench.disconnect()
    published = bench.connect(session_present=False)
    assert sorted(statuses(published)) == [("a", "completed"), ("b", "queued")]
    assert {message.topic for message in published} >= {STATE, QUEUE, LAST}


def test_a_start_publishes_only_what_the_broker_has_not_acknowledged(bench: Bench, tmp_path: Path) -> None:
    bench.quiet()
    bench.add("a")
    bench.settle()
    bench.add("b")
    bench.publisher.stop()
    bench.ledger.close()
    with opened(tmp_path) as restarted:
        assert ("b", "queued") in statuses(restarted.connect())
        assert restarted.job("a").state is JobState.QUEUED


def test_a_repeated_request_has_its_status_published_again(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    bench.settle()
    bench.add("a")
    assert statuses(bench.turn()) == [("a", "queued")]


def test_statuses_are_published_when_jobs_move_up_in_the_queue(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", "b", "c")
    bench.settle()
    bench.complete(bench.claim())
    positions = {
        message.fields["job_id"]: message.fields["queue_position"]
        for message in bench.settle()
        if message.topic.startswith("cesar/status/")
    }
    assert positions == {"a": None, "b": 1, "c": 2}


def test_positions_of_short_jobs_cost_one_status_for_each_finished_job(bench: Bench) -> None:
    bench.quiet()
    bench.add(*(f"job-{number}" for number in range(200)))
    bench.settle()
    published: list[Message] = []
    for _ in range(100):
        bench.now += 0.1
        bench.complete(bench.claim())
        published += bench.settle()
    assert 290 <= len(statuses(published)) <= 310, "two of the job itself, and one of another"
    bench.now += 2
    bench.settle()
    newest = {fields["job_id"]: fields["queue_position"] for fields in map(fields_of, bench.connection.sent) if fields}
    assert [newest[f"job-{100 + n}"] for n in range(10)] == [n + 1 for n in range(10)]


def test_positions_are_published_at_each_end_of_longer_jobs(bench: Bench) -> None:
    bench.quiet()
    bench.add(*(f"job-{number}" for number in range(20)))
    bench.settle()
    for number in range(5):
        bench.now += 3
        bench.complete(bench.claim())
        moved = {fields["job_id"]: fields["queue_position"] for fields in map(fields_of, bench.settle()) if fields}
        assert [moved[f"job-{number + 1 + n}"] for n in range(10)] == [n + 1 for n in range(10)]


# -- what cannot be published --------------------------------------------------------------------------------------


def test_a_status_over_the_packet_limit_is_truncated(bench: Bench) -> None:
    bench.quiet(limit_bytes=2000)
    bench.add("a", metadata={"k": "x" * 1000})
    bench.complete(bench.claim(), 'He said "Grüße".\n' * 1000)
    fields = on("cesar/status/a", bench.turn())[-1]
    assert fields["result_truncated"] is True
    assert fields["status"] == "completed"
    assert 100 < len(fields["result_text"]) < 1000


@pytest.mark.parametrize("topic", ["cesar/status/a", "cesar/consumer/kitchen/queue", REJECTED])
def test_a_refused_status_is_published_again_at_the_next_connection(bench: Bench, topic: str) -> None:
    """An access list may change; until the next connection the status is not tried again."""
    bench.quiet()
    bench.add("a")
    bench.publisher.on_rejected(rejection())
    for message in bench.turn():
        bench.publisher.on_published(message.ticket, DENIED if message.topic == topic else None)
    assert bench.settle() == []
    bench.publisher.publish_response("cesar/response/get", b"{}")  # the broker goes on after the refusal
    bench.settle()
    for again in (topic == "cesar/status/a", False):
        bench.disconnect()
        published = bench.connect()
        assert [job_id for job_id, _ in statuses(published + bench.acknowledge(*published))] == ["a"] * again


def test_a_message_that_no_broker_accepts_is_skipped_and_the_others_are_published(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.connection.refused = {"cesar/status/a", REJECTED, LAST}
    bench.add("a", "b")
    bench.publisher.on_rejected(rejection())
    bench.publisher.on_finished(bench.complete(bench.claim()))
    bench.publisher.publish_state("online")
    bench.quiet()
    assert ("b", "queued") in statuses(bench.connection.sent)
    assert {STATE, QUEUE} <= {message.topic for message in bench.connection.sent}
    assert not bench.ledger.has_unpublished
    given_up = [record for record in caplog.records if record.levelno == logging.ERROR]
    bench.quiet()
    assert [record for record in caplog.records if record.levelno == logging.ERROR] == given_up


def test_a_status_that_cannot_be_serialised_does_not_stop_the_others(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.add("a", "b")
    bench.complete(bench.claim(), "half a pair: \ud800")
    bench.quiet()
    assert set(statuses(bench.connection.sent)) == {("b", "queued")}
    assert not bench.ledger.has_unpublished
    assert "of job a cannot be serialised" in caplog.text


# -- progress ------------------------------------------------------------------------------------------------------


def test_progress_is_published_at_most_once_a_second_and_then_the_newest(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    bench.settle()
    bench.now += 1
    published = []
    for step in range(32):
        bench.publisher.on_progress(job, live(step / 100))
        published += [(bench.now, fields["progress"]) for fields in on("cesar/status/a", bench.settle())]
        bench.now += 0.125
    assert [progress for _, progress in published] == [0.0, 0.08, 0.16, 0.24]
    assert [later - earlier for (earlier, _), (later, _) in itertools.pairwise(published)] == [1.0, 1.0, 1.0]


def test_delayed_progress_gives_the_time_until_it_is_due(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    bench.publisher.on_progress(job, live(0.1))
    bench.settle()
    bench.now += 1.5
    bench.settle()
    bench.publisher.on_progress(job, live(0.2))
    bench.settle()
    bench.now += 0.25
    bench.publisher.on_progress(job, live(0.3))
    assert bench.publisher.run_once() == pytest.approx(0.75)


def test_the_first_progress_is_published_a_second_after_the_start(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    assert [fields["progress"] for fields in on("cesar/status/a", bench.settle())] == [None, 0.0]
    bench.now += 0.5
    bench.publisher.on_progress(job, live(0.1))
    assert on("cesar/status/a", bench.settle()) == []
    bench.now += 0.5
    assert [fields["progress"] for fields in on("cesar/status/a", bench.settle())] == [0.1]


def test_progress_has_all_fields_of_the_running_job(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", metadata={"room": "porch"})
    job = bench.claim()
    bench.settle()
    bench.now += 1
    bench.publisher.on_progress(job, live(0.42))
    [fields] = on("cesar/status/a", bench.turn())
    assert fields == status_of(job, "kitchen", live(0.42))
    assert (fields["progress"], fields["speed"], fields["eta"]) == (0.42, 6.5, 5.4)


def test_progress_is_never_published_after_the_end_of_the_job(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    bench.settle()
    bench.publisher.on_progress(job, live(0.1))
    bench.settle()
    bench.publisher.on_progress(job, live(0.9))
    bench.complete(job)
    bench.publisher.on_progress(job, live(0.95))
    published = bench.settle()
    bench.now += 5
    published += bench.settle()
    assert statuses(published) == [("a", "completed")]
    assert on("cesar/status/a", published)[-1]["progress"] == 1


def test_progress_of_an_earlier_attempt_is_not_published_for_the_next_one(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    bench.settle()
    bench.publisher.on_progress(job, live(0.1))
    bench.settle()
    bench.publisher.on_progress(job, live(0.9))
    bench.ledger.requeue(job.seq)
    bench.claim()
    published = bench.settle()
    bench.now += 5
    published += bench.settle()
    assert [(fields["attempt"], fields["progress"]) for fields in on("cesar/status/a", published)] == [
        (1, None),
        (2, 0.0),
    ]


def test_progress_does_not_count_as_the_status_that_the_ledger_waits_for(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    queued, processing = (message for message in bench.turn() if message.topic == "cesar/status/a")
    bench.now += 1
    bench.publisher.on_progress(job, live(0.1))
    bench.acknowledge(queued)
    statuses = [message for message in bench.connection.sent if message.topic == "cesar/status/a"]
    [progress] = [message for message in statuses if message.fields["progress"] == 0.1]
    bench.acknowledge(progress)
    assert bench.ledger.has_unpublished
    bench.acknowledge(processing)
    assert not bench.ledger.has_unpublished


def test_progress_waits_without_spinning_while_nothing_more_may_be_in_flight(bench: Bench) -> None:
    bench.quiet()
    for number in range(MAX_IN_FLIGHT + 1):
        bench.add(f"job-{number}")
    job = bench.claim()
    published = bench.turn()
    bench.now += 10
    bench.turn()
    bench.publisher.on_progress(job, live(0.5))
    assert bench.publisher.run_once() is None  # an acknowledgement will wake it
    for _ in range(3):
        published = bench.acknowledge(*published)
    assert 0.5 in [fields["progress"] for fields in on("cesar/status/job-0", bench.connection.sent)]


# -- the consumer's own topics -------------------------------------------------------------------------------------


def test_the_state_is_published_at_every_connect(bench: Bench) -> None:
    bench.publisher.publish_state("online")
    for session_present in (False, True, True):
        published = bench.connect(session_present=session_present)
        [message] = [message for message in published if message.topic == STATE]
        assert message.retain
        assert message.fields == {"state": "online"}
        bench.settle()
        bench.disconnect()


def test_the_other_own_topics_are_published_again_only_when_changed(bench: Bench) -> None:
    bench.publisher.publish_state("online")
    bench.add("a")
    bench.publisher.on_finished(bench.complete(bench.claim()))
    bench.quiet()
    bench.disconnect()
    assert [message.topic for message in bench.connect()] == [STATE]


def test_offline_is_the_last_state(bench: Bench) -> None:
    bench.publisher.publish_state("online")
    bench.quiet()
    bench.publisher.publish_state("offline")
    assert [(message.topic, message.fields) for message in bench.settle()] == [(STATE, {"state": "offline"})]


def test_the_last_finished_job_is_retained_and_only_the_newest(bench: Bench) -> None:
    bench.add("a", "b")
    bench.publisher.on_finished(bench.complete(bench.claim()))
    bench.publisher.on_finished(bench.complete(bench.claim(), "Bye."))
    bench.connect()
    [fields] = on(LAST, bench.settle())
    assert (fields["job_id"], fields["text"]) == ("b", "Bye.")


def test_the_last_job_is_published_once_the_broker_has_its_event_and_its_status(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", "b")
    published = bench.turn()
    ended = [bench.complete(bench.claim()), bench.fail(bench.claim(), ErrorCode.AUDIO_EMPTY, "There is no sound.")]
    for job in ended:
        bench.publisher.on_finished(job)
    for topic, state in ((LAST, "completed"), (LAST_ERROR, "error")):
        while not (status := [message for message in published if fields_of(message).get("status") == state]):
            published += bench.turn()
        assert topic not in {message.topic for message in published}
        assert topic in {message.topic for message in bench.acknowledge(*status)}


@pytest.mark.parametrize("then", ["newest", "first"])
def test_jobs_that_end_faster_than_the_broker_acknowledges_are_the_last_one_by_one(bench: Bench, then: str) -> None:
    bench.quiet()
    bench.add("a", "b", "c")
    for _ in range(3):
        bench.publisher.on_finished(bench.complete(bench.claim()))
    statuses = {
        message.topic.rpartition("/")[2]: message
        for _ in range(3)
        for message in bench.turn()
        if fields_of(message).get("status") == "completed"
    }
    if then == "first":
        assert [fields["job_id"] for fields in on(LAST, bench.acknowledge(statuses["a"]))] == ["a"]
    assert on(LAST, bench.acknowledge(statuses["b"])) == []
    assert [fields["job_id"] for fields in on(LAST, bench.acknowledge(statuses["c"]))] == ["c"]
    assert on(LAST, bench.settle()) == []


def test_a_job_that_is_deleted_before_the_broker_has_its_status_is_never_the_last(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    bench.publisher.on_finished(bench.complete(bench.claim(), "It rains."))
    bench.turn()
    bench.ledger.delete("a")
    assert on(LAST, bench.settle()) == []


def test_the_queue_is_published_at_most_once_a_second_however_much_changes(bench: Bench) -> None:
    bench.quiet()
    published = []
    for number in range(32):
        bench.add(f"job-{number}")
        published += [(bench.now, fields["queued"]) for fields in on(QUEUE, bench.settle())]
        bench.now += 0.125
    assert [queued for _, queued in published] == [1, 9, 17, 25]
    bench.now += 1
    assert on(QUEUE, bench.settle())[0]["queued"] == 32


def test_a_delayed_queue_message_gives_the_time_until_it_is_due(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    bench.settle()
    bench.now += 0.25
    bench.add("b")
    assert bench.publisher.run_once() == pytest.approx(0.75)


def test_when_nothing_happens_nothing_is_due(bench: Bench) -> None:
    bench.add("a")
    bench.quiet()
    bench.now += 1000
    assert bench.publisher.run_once() is None
    assert bench.turn() == []


def test_an_unchanged_queue_is_not_published_again(bench: Bench) -> None:
    bench.quiet()
    for on_or_off in (True, False):
        bench.publisher.on_degraded("intake", on=on_or_off)
    assert bench.settle() == []


def test_the_activity_is_what_the_worker_does_unless_the_disk_refuses_or_a_stop_is_on(bench: Bench) -> None:
    def activity() -> str:
        bench.now += 1
        bench.settle()
        return str(on(QUEUE, bench.connection.sent)[-1]["activity"])

    bench.quiet()
    assert activity() == "starting"
    bench.publisher.on_activity_changed("loading")
    assert activity() == "loading"
    bench.publisher.on_activity_changed("idle")
    bench.publisher.on_degraded("intake", on=True)
    bench.publisher.on_degraded("worker", on=True)
    assert activity() == "degraded"
    bench.publisher.on_degraded("intake", on=False)
    assert activity() == "degraded"
    bench.publisher.on_degraded("worker", on=False)
    assert activity() == "idle"
    bench.publisher.set_draining()
    bench.publisher.on_degraded("worker", on=True)
    assert activity() == "draining"


def test_a_disk_that_recovers_before_the_next_queue_message_is_not_reported(bench: Bench) -> None:
    bench.publisher.on_activity_changed("idle")
    bench.publisher.on_degraded("intake", on=True)
    bench.publisher.on_degraded("intake", on=False)
    assert on(QUEUE, bench.connect())[-1]["activity"] == "idle"


def test_the_queue_counts_rejections(bench: Bench) -> None:
    bench.publisher.on_rejected(rejection())
    bench.publisher.on_rejected(rejection())
    assert on(QUEUE, bench.connect())[-1]["rejected_total"] == 2


# -- rejections ----------------------------------------------------------------------------------------------------


def test_rejections_are_published_in_order_and_not_retained(bench: Bench) -> None:
    bench.quiet()
    for number in range(3):
        bench.publisher.on_rejected(rejection(f"{number}"))
    published = bench.turn()
    assert [fields["detail"] for fields in on(REJECTED, published)] == ["0", "1", "2"]
    assert not any(message.retain for message in published if message.topic == REJECTED)


def test_rejections_wait_for_a_connection_and_those_in_flight_for_the_next_one(bench: Bench) -> None:
    for number in range(3):
        bench.publisher.on_rejected(rejection(f"{number}"))
    first, second, third = (message for message in bench.connect() if message.topic == REJECTED)
    bench.acknowledge(second)
    bench.connection.up = False
    bench.publisher.on_rejected(rejection("3"))
    bench.disconnect()
    bench.publisher.on_rejected(rejection("4"))
    again = bench.connect()
    assert [fields["detail"] for fields in on(REJECTED, again)] == ["0", "2", "3", "4"]
    assert (first.fields["detail"], third.fields["detail"]) == ("0", "2")
    bench.settle()
    bench.disconnect()
    assert on(REJECTED, bench.connect(session_present=False)) == []


def test_of_too_many_rejections_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.job_messages.MAX_TRANSIENT_MESSAGES", 5)
    with opened(tmp_path) as bench:
        for number in range(8):
            bench.publisher.on_rejected(rejection(f"{number}"))
        bench.turn()
        assert len(bench.publisher._transient_messages) == 5
        assert [fields["detail"] for fields in on(REJECTED, bench.connect())] == ["3", "4", "5", "6", "7"]
        bench.publisher.on_rejected(rejection("8"))
        bench.turn()
        bench.disconnect()
        assert [fields["detail"] for fields in on(REJECTED, bench.connect())] == ["4", "5", "6", "7", "8"]


def test_waiting_responses_are_bounded_in_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """10,000 responses with a page of jobs in each were once kept for a slow broker: 1.2 GB."""
    monkeypatch.setattr("cesar_mqtt.consumer.job_messages.MAX_TRANSIENT_BYTES", 1000)
    asked = "cesar/response/list"

    def answer(size_bytes: int, *numbers: int) -> None:
        for number in numbers:
            bench.publisher.publish_response(asked, bytes([number]) * size_bytes, correlation_data=bytes(100))

    def answers(messages: list[Message]) -> list[int]:
        return [message.payload[0] for message in messages if message.topic == asked]

    answer(200, *range(8))
    bench.turn()
    assert [record.message.count("the 5 oldest") for record in caplog.records] == [1]
    assert answers(bench.connect()) == [5, 6, 7]
    answer(5000, 8)
    bench.turn()
    bench.disconnect()
    assert "the 3 oldest" not in caplog.text, "at most one warning in 10 s"
    answer(200, 9)
    bench.now += 10.0
    bench.turn()
    assert "the 4 oldest" in caplog.text
    answer(5000, 10)
    assert answers(bench.connect()) == [10], "one always fits"


# -- the thread ----------------------------------------------------------------------------------------------------


def acknowledging_at_once(bench: Bench) -> None:
    bench.connection.on_sent = lambda message: bench.publisher.on_published(message.ticket)


def connect_in_the_background(bench: Bench) -> None:
    bench.connection.up = True
    bench.publisher.on_connected(session_present=True, max_packet_bytes=None)


def test_a_drain_returns_when_everything_is_acknowledged_even_the_newest_event(bench: Bench) -> None:
    acknowledging_at_once(bench)
    bench.publisher.publish_state("online")
    bench.publisher.start()
    connect_in_the_background(bench)
    for number in range(3):
        bench.add(f"job-{number}")
        job = bench.claim()
        bench.publisher.on_progress(job, live(0.5))
        bench.publisher.on_finished(bench.complete(job, f"text {number}"))
        bench.publisher.on_rejected(rejection(f"{number}"))
        bench.publisher.set_draining()
        assert bench.publisher.drain(PATIENCE_S)
        sent = list(bench.connection.sent)
        assert statuses(sent)[-1] == (f"job-{number}", "completed")
        assert on(LAST, sent)[-1]["text"] == f"text {number}"
        assert on(REJECTED, sent)[-1]["detail"] == f"{number}"
        queue = on(QUEUE, sent)[-1]
        assert (queue["activity"], queue["completed_total"]) == ("draining", number + 1)
        assert not bench.ledger.has_unpublished
    bench.publisher.publish_state("offline")
    assert bench.publisher.drain(PATIENCE_S)
    assert bench.connection.sent[-1].fields == {"state": "offline"}


@pytest.mark.parametrize("topic", ["cesar/status/a", REJECTED, STATE, QUEUE, LAST])
def test_a_drain_waits_for_the_last_acknowledgement(bench: Bench, topic: str) -> None:
    held: list[Message] = []
    was_sent = threading.Event()

    def on_sent(message: Message) -> None:
        if message.topic == topic and not held:
            held.append(message)
            was_sent.set()
        else:
            bench.publisher.on_published(message.ticket)

    bench.connection.on_sent = on_sent
    bench.publisher.start()
    connect_in_the_background(bench)
    bench.publisher.publish_state("online")
    bench.add("a")
    bench.publisher.on_finished(bench.complete(bench.claim()))
    bench.publisher.on_rejected(rejection())
    assert was_sent.wait(PATIENCE_S)
    bench.now += 100  # nothing else has to wait
    assert not bench.publisher.drain(0.05)
    bench.publisher.on_published(held[0].ticket)
    assert bench.publisher.drain(PATIENCE_S)


def test_a_drain_without_a_connection_ends_when_its_time_is_over(bench: Bench) -> None:
    bench.publisher.start()
    bench.add("a")
    assert not bench.publisher.drain(0.05)
    assert bench.connection.sent == []


def test_a_drain_does_not_take_a_failed_publish_for_an_acknowledgement(bench: Bench) -> None:
    acknowledging_at_once(bench)
    bench.publisher.start()
    connect_in_the_background(bench)
    assert bench.publisher.drain(PATIENCE_S)
    bench.connection.up = False  # and the publisher has not noticed
    bench.publisher.publish_state("offline")
    assert not bench.publisher.drain(0.05)


def test_an_event_that_arrives_after_the_last_look_is_not_drained(bench: Bench) -> None:
    bench.quiet()

    class Late(deque[Callable[[], None]]):
        """Adds an event and a drain just after the publisher has found no more events."""

        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found and bench.publisher._drains_requested == 0:
                bench.publisher.publish_state("offline")
                bench.publisher._drains_requested += 1
            return found

    bench.publisher._events = Late()
    assert bench.turn() == []
    assert bench.publisher._drains_completed < bench.publisher._drains_requested
    assert on(STATE, bench.settle()) == [{"state": "offline"}]
    assert bench.publisher._drains_completed == bench.publisher._drains_requested


def test_a_drain_that_ran_out_of_time_does_not_satisfy_a_later_one(bench: Bench) -> None:
    bench.publisher.start()
    assert not bench.publisher.drain(0.01)
    acknowledging_at_once(bench)
    connect_in_the_background(bench)
    assert bench.publisher.drain(PATIENCE_S)
    bench.connection.on_sent = lambda _message: None
    bench.publisher.publish_state("offline")
    assert not bench.publisher.drain(0.05)


def test_many_drains_do_not_cause_many_queue_messages(bench: Bench) -> None:
    bench.quiet()
    bench.add(*(f"job-{number}" for number in range(50)))
    waiting = bench.turn()
    assert on(QUEUE, waiting)
    meanwhile: list[Message] = []
    for message in waiting[:20]:
        assert not bench.publisher.drain(0)
        bench.publisher.on_activity_changed("processing")
        bench.now += 0.04  # enough to change `oldest_age`
        meanwhile += bench.acknowledge(message)
    assert on(QUEUE, meanwhile) == []
    assert len(on(QUEUE, bench.acknowledge(*waiting[20:]))) == 1


def test_only_the_publishers_own_thread_publishes(bench: Bench) -> None:
    acknowledging_at_once(bench)
    bench.publisher.start()
    connect_in_the_background(bench)
    bench.add("a")
    bench.publisher.on_rejected(rejection())
    bench.publisher.on_finished(bench.complete(bench.claim()))
    assert bench.publisher.drain(PATIENCE_S)
    assert bench.connection.threads == {"publisher"}


def test_a_stop_ends_the_thread_and_can_come_twice_or_before_the_start(tmp_path: Path, bench: Bench) -> None:
    bench.publisher.start()
    bench.publisher.stop()
    bench.publisher.stop()
    assert not bench.publisher._thread.is_alive()
    (tmp_path / "other").mkdir()
    with opened(tmp_path / "other") as other:
        other.publisher.stop()


def test_a_stop_just_before_the_thread_waits_is_not_lost(bench: Bench) -> None:
    class StopComesFirst(threading.Event):
        """Stops the publisher after the thread has woken up and before it clears the event."""

        def clear(self) -> None:
            bench.publisher._stopping.set()
            self.set()
            super().clear()

    bench.publisher._has_work = StopComesFirst()
    bench.publisher.start()
    bench.publisher._thread.join(PATIENCE_S)
    assert not bench.publisher._thread.is_alive()


# -- any order of events -------------------------------------------------------------------------------------------


class QuickDisk(Disk):
    """A disk whose syncs take no time."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_data(self, descriptor: int) -> None:
        pass


class AgreementMachine(RuleBasedStateMachine):
    """In any order of events the broker's retained messages come to agree with the ledger.

    The fake broker holds what reaches it; what is on its way when the connection breaks may or may not have reached it.
    """

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.bench = Bench(Path(self.folder.name), QuickDisk())
        self.bench.publisher.publish_state("online")
        self.retained: dict[str, bytes] = {}
        self.session = False
        self.in_flight: list[Message] = []
        self.number = 0

    def _take_turn(self) -> None:
        self.in_flight += self.bench.turn()

    def _arrive(self, count: int) -> list[Message]:
        arrived, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        self.retained |= {message.topic: message.payload for message in arrived if message.retain}
        return arrived

    @rule(count=st.integers(1, 12))
    def accept(self, count: int) -> None:
        self.bench.add(*(f"job-{self.number + offset}" for offset in range(count)))
        self.number += count
        self._take_turn()

    @rule()
    def claim(self) -> None:
        if not self.bench.ledger.processing():
            self.bench.ledger.claim()
            self._take_turn()

    @rule(end=st.sampled_from(["completed", "error", "queued"]))
    def end(self, end: str) -> None:
        for seq in self.bench.ledger.processing():
            if end == "completed":
                self.bench.ledger.complete(seq, result())
            elif end == "error":
                self.bench.ledger.fail(seq, ErrorCode.INTERNAL, "It failed.")
            else:
                self.bench.ledger.requeue(seq)
        for state in (JobState.COMPLETED, JobState.ERROR):
            last = self.bench.ledger.last_finished(state)
            if last is not None:
                self.bench.publisher.on_finished(last)
        self._take_turn()

    @rule(progress=st.floats(0, 0.999))
    def make_progress(self, progress: float) -> None:
        for number in range(self.number):
            job = self.bench.job(f"job-{number}")
            if job.state is JobState.PROCESSING:
                self.bench.publisher.on_progress(job, live(progress))
        self._take_turn()

    @rule(number=st.integers(0, 30))
    def submit_again(self, number: int) -> None:
        if number < self.number:
            self.bench.add(f"job-{number}")
            self._take_turn()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.bench.now += seconds
        self._take_turn()

    @rule()
    def connect(self) -> None:
        if not self.bench.connection.up:
            self.in_flight += self.bench.connect(session_present=self.session)
            self.session = True

    @rule(count=st.integers(1, 100))
    def acknowledge(self, count: int) -> None:
        arrived = self._arrive(count)
        self.in_flight += self.bench.acknowledge(*arrived)

    @rule(arriving=st.integers(0, 100), notice=st.booleans())
    def disconnect(self, arriving: int, *, notice: bool) -> None:
        """Lose the connection; some messages in flight have arrived, but no acknowledgement returns."""
        if self.bench.connection.up:
            self._arrive(arriving)
            self.in_flight = []
            self.bench.connection.up = False
            if not notice:
                self._take_turn()
            self.bench.disconnect()

    @rule()
    def lose_everything(self) -> None:
        """Restart a broker without persistence."""
        self.disconnect(0, notice=True)
        self.retained = {}
        self.session = False

    @invariant()
    def not_too_much_is_on_its_way(self) -> None:
        if hasattr(self, "bench"):
            assert len([m for m in self.in_flight if not m.topic.startswith("cesar/consumer/")]) <= MAX_IN_FLIGHT

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        try:
            self.connect()
            for _ in range(100):
                self.bench.now += 1
                self.acknowledge(1000)
            self._compare()
        finally:
            self.bench.ledger.close()
            self.folder.cleanup()

    def _compare(self) -> None:
        assert not self.bench.ledger.has_unpublished
        assert json.loads(self.retained[STATE]) == {"state": "online"}
        assert json.loads(self.retained[QUEUE])["queued"] == self.bench.ledger.totals().queued
        for number in range(self.number):
            job = self.bench.job(f"job-{number}")
            expected = dict(status_of(job, "kitchen"))
            found = json.loads(self.retained[f"cesar/status/job-{number}"])
            if job.state is JobState.PROCESSING:
                for status in (expected, found):
                    for name in ("progress", "processed_duration", "audio_duration", "speed", "eta", "updated_at"):
                        del status[name]
            assert found == expected


TestAgreement = AgreementMachine.TestCase
TestAgreement.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


# -- what is deleted, and a broker that lost its newest messages ---------------------------------------------------


def test_the_status_of_a_deleted_job_is_cleared_and_not_cleared_again(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    bench.complete(bench.claim())
    bench.settle()
    bench.ledger.delete_finished(before=0.0, keep=0)

    published = [message for message in bench.turn() if message.topic == "cesar/status/a"]
    assert [(message.payload, message.retain) for message in published] == [(b"", True)]
    assert bench.ledger.has_unpublished, "it counts only when it is acknowledged"
    bench.disconnect()
    again = [message for message in bench.connect() if message.topic == "cesar/status/a"]
    assert [message.payload for message in again] == [b""]
    bench.acknowledge(*again)
    bench.settle()
    assert not bench.ledger.has_unpublished
    assert [message for message in bench.turn() if message.topic == "cesar/status/a"] == []


def test_if_the_broker_retains_the_newest_message_only_what_it_got_behind_it_is_published_again(bench: Bench) -> None:
    """A broker was killed between two queue messages, right after it had saved: two statuses stayed as they were."""
    bench.quiet()
    bench.add("a", "b", "c")
    bench.settle()
    bench.ledger.delete("c")
    bench.settle()
    bench.add("d")
    bench.now += 100
    published = bench.settle()
    bench.complete(bench.claim())
    bench.ledger.delete("b")
    bench.settle()
    queue = [message.payload for message in published if message.topic.endswith("/queue")]
    bench.disconnect()
    assert statuses(bench.connect()) == []
    bench.settle()
    for _ in range(2):
        bench.publisher.on_queue_message_received(queue[-1])
        again = {message.topic: message.payload for message in bench.settle() if "/status/" in message.topic}
        if not again:
            break
        assert again["cesar/status/b"] == b""
        assert b"completed" in again["cesar/status/a"]
        assert "cesar/status/c" not in again
    assert not again, "once for each connection"


def test_if_the_broker_restored_older_messages_everything_is_published_again(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    bench.settle()
    bench.disconnect()
    bench.connect(session_present=True)
    bench.settle()

    bench.publisher.on_queue_message_received(b'{"activity":"idle","queued":17}')

    published = {message.topic for message in bench.turn()}
    assert {"cesar/status/a", "cesar/consumer/kitchen/queue"} <= published


def restarted(bench: Bench, folder: Path) -> Bench:
    bench.publisher.stop()
    bench.ledger.close()
    return Bench(folder)


@pytest.mark.parametrize("published_first", [True, False])
def test_the_last_message_of_an_earlier_process_is_no_loss(
    bench: Bench, tmp_path: Path, *, published_first: bool
) -> None:
    bench.add("a", "b")
    bench.complete(bench.claim())
    bench.quiet()
    again = restarted(bench, tmp_path)
    found = left_by(again)
    if published_first:  # its own queue message is in flight before the intake has received the old one
        again.connect()
        again.publisher.on_queue_message_received(found)
    else:
        again.publisher.on_queue_message_received(found)
        again.connect()
    assert [job_id for job_id, _ in statuses(again.settle())] in ([], ["b"]), "b only for its position in the queue"
    again.publisher.stop()
    again.ledger.close()


@pytest.mark.parametrize(
    "found", [{"completed_total": 0}, {"queued": 7}, {"cancelled_total": None}, {"deleted_total": 3}]
)
def test_if_the_broker_restored_older_messages_while_the_consumer_was_away_everything_is_published_again(
    bench: Bench, tmp_path: Path, found: dict[str, int]
) -> None:
    bench.add("a", "b")
    bench.complete(bench.claim())
    bench.quiet()
    again = restarted(bench, tmp_path)
    published = again.connect()
    again.publisher.on_queue_message_received(left_by(again, **found))
    published += again.settle()
    assert ("a", "completed") in statuses(published)
    again.publisher.stop()
    again.ledger.close()


def test_if_the_broker_restored_older_messages_deleted_jobs_are_cleared_again_without_an_event(bench: Bench) -> None:
    completed_with(bench, "srt")
    bench.quiet()
    bench.ledger.delete("a")
    bench.quiet()
    old = left_by(bench, deleted_total=0)
    bench.disconnect()
    published = bench.connect()
    bench.publisher.on_queue_message_received(old)
    published += bench.settle()
    assert [message.topic for message in published if message.payload == b""] == [
        "cesar/result/a/srt",
        "cesar/status/a",
    ]
    assert [message for message in published if message.topic == "cesar/events"] == []


def test_if_the_broker_retained_nothing_everything_is_published_although_it_knows_the_session(
    bench: Bench, tmp_path: Path
) -> None:
    """The process before had begun a new session, and died before it could record that."""
    bench.add("a", "b")
    bench.complete(bench.claim())
    bench.quiet()
    again = restarted(bench, tmp_path)
    again.left = b""
    assert statuses(again.connect()) == [("b", "queued")]
    again.publisher.on_queue_message_received(None)
    assert ("a", "completed") in statuses(again.settle())
    for session_present in (True, False):
        again.disconnect()
        again.connect(session_present=session_present)
        again.settle()
        again.publisher.on_queue_message_received(None)
        assert again.settle() == [], "its own messages are delivered to it, too"
    again.publisher.stop()
    again.ledger.close()


def test_if_the_broker_loses_retained_messages_but_no_session_everything_is_published_again(bench: Bench) -> None:
    bench.add("a")
    bench.complete(bench.claim())
    bench.quiet()
    bench.disconnect()
    bench.now += 100
    bench.add("b")
    published = bench.connect()
    assert on(QUEUE, published)
    assert statuses(published + bench.acknowledge(*published)) == [("b", "queued")]
    bench.publisher.on_queue_message_received(None)
    assert ("a", "completed") in statuses(bench.settle())
    bench.publisher.on_queue_message_received(None)
    assert bench.settle() == []


def test_a_connection_that_was_lost_before_the_check_counts_as_a_loss(bench: Bench, tmp_path: Path) -> None:
    bench.add("a")
    bench.complete(bench.claim())
    bench.quiet()
    again = restarted(bench, tmp_path)
    again.left = b""
    assert statuses(again.connect()) == []
    again.disconnect()
    assert statuses(again.connect()) == [("a", "completed")]
    again.settle()
    again.disconnect()
    assert statuses(again.connect()) == []
    again.publisher.stop()
    again.ledger.close()


def test_the_retained_message_may_be_checked_late(bench: Bench) -> None:
    """The intake handles it only after the batch before it is on disk."""
    bench.add("a")
    bench.quiet()
    bench.ledger.pause(on=True)
    bench.settle()
    bench.now += 100
    (shown,) = bench.publisher._own_topics.retained("queue")
    bench.disconnect()
    bench.add("b")
    assert on(QUEUE, bench.connect())
    bench.settle()
    bench.publisher.on_queue_message_received(shown)
    assert bench.settle() == []


@pytest.mark.parametrize("shows", [True, False])
def test_a_connection_lost_before_the_check_republishes_everything_if_the_broker_ever_sends_the_message(
    bench: Bench, *, shows: bool
) -> None:
    """It may have restored an older state, and retain what was published since."""
    bench.left = bench.left if shows else b""
    bench.add("a")
    bench.quiet()
    bench.disconnect()
    assert (bench.connect() == []) is shows, "if it was never sent, that counts as a loss once"
    bench.settle()
    bench.disconnect()
    bench.now += 100
    bench.add("b")
    assert on(QUEUE, bench.connect())
    bench.settle()
    bench.disconnect()
    published = bench.connect()
    bench.publisher.on_queue_message_received(bench.publisher._own_topics.retained("queue")[-1])
    assert (("a", "queued") in statuses(published + bench.settle())) is shows
    bench.disconnect()
    assert statuses(bench.connect()) == []


# -- results, segments, answers ------------------------------------------------------------------------------------

SEGMENTS = [segment(n, f"Sentence {n}.") for n in range(1, 101)]
WINDOW = window(0, *SEGMENTS, text=" ".join(segment.text for segment in SEGMENTS), until_s=100.0)


def completed_with(bench: Bench, *formats: str) -> None:
    bench.add("a", formats=formats)
    bench.complete(bench.claim(), WINDOW.text, (WINDOW,))


def test_results_are_published_before_the_status(bench: Bench) -> None:
    completed_with(bench, "srt", "txt")
    published = [message for message in bench.connect() if message.topic.startswith(("cesar/status", "cesar/result"))]
    assert [message.topic for message in published] == ["cesar/result/a/srt", "cesar/result/a/txt", "cesar/status/a"]
    assert all(message.retain for message in published)
    assert published[0].payload.startswith(b"1\n00:00:00,000 --> 00:00:01,000\nSentence 1.\n")
    assert (published[2].fields["formats"], published[2].fields["result_truncated"]) == (["srt", "txt"], False)


def test_results_whose_status_was_not_acknowledged_are_published_again(bench: Bench) -> None:
    completed_with(bench, "json")
    results = [message for message in bench.connect() if message.topic == "cesar/result/a/json"]
    bench.acknowledge(*results)
    bench.disconnect()
    published = [message.topic for message in bench.connect()]
    assert published.index("cesar/result/a/json") < published.index("cesar/status/a")


def test_if_the_broker_has_lost_everything_results_are_published_again(bench: Bench) -> None:
    completed_with(bench, "tsv")
    bench.quiet()
    bench.disconnect()
    assert "cesar/result/a/tsv" not in [message.topic for message in bench.connect()]
    bench.settle()
    bench.disconnect()
    assert "cesar/result/a/tsv" in [message.topic for message in bench.connect(session_present=False)]


@pytest.mark.parametrize("name", ["txt", "srt", "vtt", "tsv", "json"])
def test_a_result_over_the_brokers_limit_is_truncated_and_the_status_says_so(bench: Bench, name: str) -> None:
    completed_with(bench, name)
    published = {message.topic: message for message in bench.connect(limit_bytes=1300)}
    assert len(published[f"cesar/result/a/{name}"].payload) > 1000
    assert published["cesar/status/a"].fields["result_truncated"] is True


def test_a_job_that_has_not_completed_has_no_results(bench: Bench) -> None:
    bench.add("a", formats=("srt",))
    job = bench.claim()
    bench.ledger.fail(job.seq, ErrorCode.AUDIO_EMPTY, "It is empty.")
    assert [message.topic for message in bench.connect() if message.topic.startswith("cesar/result")] == []


def test_deleting_a_job_clears_its_results_and_then_its_status(bench: Bench) -> None:
    completed_with(bench, "srt", "json")
    bench.quiet()
    bench.ledger.delete("a")
    published = [message for message in bench.turn() if message.payload == b""]
    assert [message.topic for message in published] == ["cesar/result/a/srt", "cesar/result/a/json", "cesar/status/a"]
    assert all(message.retain for message in published)
    bench.acknowledge(*published)
    assert bench.ledger.pending_clears(10) == []


def test_an_id_that_is_used_again_loses_the_old_results_and_keeps_the_new_status(bench: Bench) -> None:
    completed_with(bench, "srt")
    bench.quiet()
    bench.disconnect()
    bench.ledger.delete("a")
    bench.add("a")
    published = bench.connect()
    published += bench.settle()
    mine = [message for message in published if message.topic.endswith(("/a", "/srt"))]
    assert [(message.topic, message.payload == b"") for message in mine] == [
        ("cesar/result/a/srt", True),
        ("cesar/status/a", False),
    ]
    assert bench.ledger.pending_clears(10) == []


def test_segments_are_published_while_connected_and_dropped_while_offline(bench: Bench) -> None:
    bench.add("a", stream=True)
    job = bench.claim()
    bench.publisher.on_segment(job, SEGMENTS[0])
    bench.quiet()
    bench.publisher.on_segment(job, SEGMENTS[1])
    (published,) = bench.turn()
    assert (published.topic, published.retain, published.fields["id"]) == ("cesar/segments/a", False, 2)
    bench.disconnect()
    assert "cesar/segments/a" not in [message.topic for message in bench.connect()], "not again, either"


def test_segments_are_published_before_the_final_status(bench: Bench) -> None:
    bench.add("a", stream=True)
    job = bench.claim()
    bench.quiet()
    bench.publisher.on_segment(job, SEGMENTS[0])
    bench.complete(job)
    topics = [message.topic for message in bench.turn()]
    assert topics.index("cesar/segments/a") < topics.index("cesar/status/a")


def test_a_response_waits_for_a_connection_and_has_its_correlation_data(bench: Bench) -> None:
    bench.publisher.publish_response("reply/here", b"{}", correlation_data=b"42")
    (published,) = [message for message in bench.connect() if message.topic == "reply/here"]
    assert (published.payload, published.retain, published.correlation_data) == (b"{}", False, b"42")
    bench.disconnect()
    assert "reply/here" in [message.topic for message in bench.connect()], "it was not acknowledged"
    bench.settle()
    bench.disconnect()
    assert "reply/here" not in [message.topic for message in bench.connect()]


def test_a_paused_consumer_reports_it_when_it_is_idle(bench: Bench) -> None:
    bench.publisher.on_activity_changed("idle")
    bench.ledger.pause(on=True)
    (queue,) = on("cesar/consumer/kitchen/queue", bench.connect())
    assert (queue["activity"], queue["paused"]) == ("paused", True)
    bench.settle()
    bench.now += 10
    bench.publisher.on_activity_changed("loading")
    (queue,) = on("cesar/consumer/kitchen/queue", bench.turn())
    assert (queue["activity"], queue["paused"]) == ("loading", True)


# -- events --------------------------------------------------------------------------------------------------------


def events(messages: list[Message]) -> list[tuple[str, str]]:
    return [(fields["job_id"], fields["event_type"]) for fields in on("cesar/events", messages)]


def test_each_change_of_a_job_is_one_event_before_its_status(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    bench.complete(job, "It rains.")
    published = bench.turn()
    assert events(published) == [("a", "queued"), ("a", "processing"), ("a", "completed")]
    topics = [message.topic for message in published if message.topic in {"cesar/events", "cesar/status/a"}]
    assert topics == ["cesar/events", "cesar/status/a"] * 3
    assert not any(message.retain for message in published if message.topic == "cesar/events")
    last = on("cesar/events", published)[-1]
    assert (last["text"], last["text_truncated"], last["consumer"], last["attempt"]) == (
        "It rains.",
        False,
        "kitchen",
        1,
    )
    assert events(bench.settle()) == []


def test_in_a_burst_no_event_is_lost_for_jobs_that_move_up_meanwhile(bench: Bench) -> None:
    bench.quiet()
    names = [f"job-{number}" for number in range(HISTORY_LIMIT + 20)]
    bench.add(*names)
    bench.claim()
    published = events(bench.settle())
    assert sorted(published) == sorted([(names[0], "processing"), *((name, "queued") for name in names[1:])])


def test_a_status_that_is_published_again_has_no_event(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", "b")
    bench.settle()
    bench.claim()
    assert events(bench.settle()) == [("a", "processing")], "b has moved up, which is no change of its state"
    bench.add("b")
    bench.publisher.on_disconnected()
    assert events(bench.connect(session_present=False) + bench.settle()) == []


def test_a_repeated_request_is_answered_with_the_status_and_no_event(bench: Bench) -> None:
    bench.quiet()
    for turn in (lambda: bench.add("a"), lambda: bench.complete(bench.claim())):
        turn()
        bench.settle()
        bench.add("a")
        published = bench.settle()
        assert [job_id for job_id, _ in statuses(published)] == ["a"]
        assert events(published) == []


def test_a_start_publishes_positions_in_the_queue_without_an_event(tmp_path: Path) -> None:
    with opened(tmp_path) as bench:
        bench.quiet()
        bench.add("a")
        assert events(bench.settle()) == [("a", "queued")]
    with opened(tmp_path) as bench:
        published = bench.connect() + bench.settle()
    assert statuses(published) == [("a", "queued")]
    assert events(published) == []


def test_a_change_that_was_unpublished_at_a_crash_is_an_event_after_it(tmp_path: Path) -> None:
    with opened(tmp_path) as bench:
        bench.add("a", "b")
    with opened(tmp_path) as bench:
        assert events(bench.connect() + bench.settle()) == [("a", "queued"), ("b", "queued")]


@pytest.mark.parametrize("times", [1, 2])
def test_statuses_republished_after_a_loss_have_no_event_after_a_crash_either(tmp_path: Path, times: int) -> None:
    with opened(tmp_path) as bench:
        bench.add("a", "b")
        bench.complete(bench.claim())
        bench.quiet()
        bench.disconnect()
        for _ in range(times):
            bench.connect(session_present=False)
            bench.add("c")
            bench.disconnect()
    with opened(tmp_path) as bench:
        published = bench.connect() + bench.settle()
    assert sorted(statuses(published)) == [("a", "completed"), ("b", "queued"), ("c", "queued")]
    assert events(published) == [("c", "queued")]


def test_changes_while_offline_are_published_afterwards_as_the_newest_state(bench: Bench) -> None:
    bench.quiet()
    bench.disconnect()
    bench.add("a")
    bench.complete(bench.claim())
    assert events(bench.connect() + bench.settle()) == [("a", "completed")]


def test_a_job_that_moved_up_while_offline_has_its_event_published_afterwards(bench: Bench) -> None:
    bench.quiet()
    bench.disconnect()
    bench.add("a", "b")
    bench.claim()
    assert sorted(events(bench.connect() + bench.settle())) == [("a", "processing"), ("b", "queued")]


def test_a_status_is_not_skipped_for_the_limit_of_a_new_connection(bench: Bench) -> None:
    bench.quiet()
    bench.disconnect()
    bench.add("a", "b")
    bench.complete(bench.claim())
    bench.complete(bench.claim(), "word " * 4000)

    def reconnect(message: Message) -> None:  # during `run_once`, to a broker with a lower limit
        if message.topic == "cesar/status/a" and bench.connection.limit_bytes is None:
            bench.connection.limit_bytes = 8000
            bench.publisher.on_disconnected()
            bench.publisher.on_connected(session_present=True, max_packet_bytes=8000)

    bench.connection.on_sent = reconnect
    assert ("b", "completed") in statuses(bench.connect() + bench.settle())


@pytest.mark.parametrize("session_present", [True, False])
def test_an_event_is_published_again_also_when_its_job_was_published_otherwise_meanwhile(
    bench: Bench, *, session_present: bool
) -> None:
    bench.add("a", "b")
    bench.quiet()
    bench.add("c")
    lost = bench.turn()
    assert events(lost) == [("c", "queued")]
    bench.ledger.delete("a")  # so that b and c move up
    bench.turn()
    bench.disconnect()
    assert events(bench.connect(session_present=session_present)) == [("a", "deleted"), ("c", "queued")]
    bench.settle()
    bench.disconnect()
    assert events(bench.connect(session_present=session_present)) == []


def test_an_acknowledged_event_is_not_published_again_with_a_new_position(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", "b")
    published = bench.turn()
    bench.ledger.delete("a")
    bench.turn()
    bench.acknowledge(*published)
    bench.disconnect()
    assert events(bench.connect()) == [("a", "deleted")]


def test_an_event_whose_status_was_not_acknowledged_is_published_again(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    assert events(bench.turn()) == [("a", "queued")]
    bench.disconnect()
    assert events(bench.connect()) == [("a", "queued")]


def test_the_end_of_a_job_that_is_deleted_is_an_event(bench: Bench) -> None:
    bench.add("a")
    bench.quiet()
    bench.ledger.delete("a")
    assert events(bench.settle()) == [("a", "deleted")]


def test_the_text_of_a_deleted_job_is_cleared_from_every_topic(bench: Bench) -> None:
    bench.quiet()
    for job_id in ("a", "b"):
        bench.add(job_id)
        bench.publisher.on_finished(bench.complete(bench.claim(), "It rains."))
        bench.settle()
    bench.ledger.delete("a")
    assert on("cesar/consumer/kitchen/last", bench.settle()) == []
    bench.ledger.delete("b")
    [last] = on("cesar/consumer/kitchen/last", bench.settle())
    assert (last["job_id"], last["status"], last["text"], last["text_truncated"]) == ("b", "completed", None, False)


def test_the_last_error_is_retained_until_its_job_is_deleted(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", "b", "c")
    bench.publisher.on_finished(bench.complete(bench.claim()))
    bench.publisher.on_finished(bench.fail(bench.claim(), ErrorCode.AUDIO_EMPTY, "There is no sound."))
    published = bench.settle()
    [last_error] = on(LAST_ERROR, published)
    assert (last_error["job_id"], last_error["error_code"], last_error["error_message"]) == (
        "b",
        "audio_empty",
        "There is no sound.",
    )
    assert [fields["job_id"] for fields in on(LAST, published)] == ["a"]
    bench.publisher.on_finished(bench.complete(bench.claim()))
    assert on(LAST_ERROR, bench.settle()) == []
    bench.ledger.delete("b")
    assert [message.payload for message in bench.settle() if message.topic == LAST_ERROR] == [b""]


def test_the_queue_tells_how_far_the_running_job_is(bench: Bench) -> None:
    bench.quiet()
    bench.add("a")
    job = bench.claim()
    bench.now += 2
    [fields] = on(QUEUE, bench.settle())[-1:]
    assert (fields["progress"], fields["eta"], fields["audio_source"]) == (0.0, None, "a.wav")
    bench.publisher.on_progress(job, live(0.5))
    bench.now += 2
    [fields] = on(QUEUE, bench.settle())[-1:]
    assert (fields["progress"], fields["eta"]) == (0.5, live(0.5).eta)
    revision = fields["revision"]
    bench.publisher.on_finished(bench.complete(job))
    bench.now += 2
    [fields] = on(QUEUE, bench.settle())[-1:]
    assert (fields["progress"], fields["eta"], fields["audio_source"]) == (None, None, None)
    assert fields["revision"] > revision


def test_the_state_is_published_after_the_queue_of_this_start(bench: Bench) -> None:
    bench.publisher.publish_state("online")
    topics = [message.topic for message in bench.connect()]
    assert topics.index(QUEUE) < topics.index(STATE)


def test_the_text_of_an_event_leaves_room_for_the_metadata(bench: Bench) -> None:
    bench.quiet()
    bench.add("a", metadata={"note": "x" * 4000})
    bench.complete(bench.claim(), "Grüße. " * 5000)
    last = on("cesar/events", bench.turn())[-1]
    assert last["text_truncated"] is True
    assert "Grüße. Grüße. " * 100 in last["text"]
    assert len(json.dumps(last, ensure_ascii=False).encode()) < 14_000


@pytest.mark.parametrize("formats", [(), ("srt",)])
def test_the_deletion_of_a_job_is_an_event_also_when_its_id_is_used_again_at_once(
    tmp_path: Path, formats: tuple[str, ...]
) -> None:
    with opened(tmp_path) as bench:
        bench.add("a", formats=formats)
        bench.quiet()
        bench.disconnect()
        bench.ledger.delete("a")
        bench.add("a")
        bench.publisher.on_finished(bench.complete(bench.claim(), "It rains."))
    with opened(tmp_path) as bench:
        last = bench.ledger.last_finished(JobState.COMPLETED)
        assert last is not None
        bench.publisher.on_finished(last)
        published = bench.connect()
        assert events(published) == [("a", "deleted"), ("a", "completed")]
        published += bench.acknowledge(*published) + bench.settle()
        assert [fields["text"] for fields in on(LAST, published)] == ["It rains."], "which is the new one's"
        assert [message.topic for message in published if not message.payload] == [
            f"cesar/result/a/{n}" for n in formats
        ]
        bench.disconnect()
        bench.connect()
        bench.publisher.on_queue_message_received(b"{}")
        published = bench.settle()
        assert events(published) == []
        assert [message.topic for message in published if not message.payload] == [
            f"cesar/result/a/{n}" for n in formats
        ]
