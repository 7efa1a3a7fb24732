"""Messages at which the broker closes the connection, on a publisher with a real ledger and a broker made of a rule."""

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from cesar_mqtt.consumer.quarantine import Quarantine, Sent
from tests.unit.consumer.test_publisher import (
    DENIED,
    LAST,
    QUEUE,
    REJECTED,
    STATE,
    TOO_LARGE,
    Bench,
    Message,
    opened,
    rejection,
)

MOST_CONNECTIONS = 40
WINDOW = 20
"""How many messages the client has in flight at most."""
TEXT = "There is a parcel at the door. " * 20_000


class Broker:
    """Retains what it accepts, and closes the connection at any other message, or acknowledges nothing any more.

    Attributes:
        accepts: decides about each message.
        retained: the newest payload on each topic.
        losses: how often it has closed the connection.
    """

    def __init__(self, bench: Bench, accepts: Callable[[Message], bool], *, stalls: bool = False) -> None:
        self.bench = bench
        self._stalls = stalls
        self.accepts = accepts
        self.retained: dict[str, bytes] = {}
        self.received: list[Message] = []
        self.losses = 0

    def serve(self, connections: int = MOST_CONNECTIONS) -> None:
        """Play connections, until one has nothing more to do."""
        for _ in range(connections):
            sent = self.bench.connect()
            while sent:
                if not self._receive(sent):
                    break
                self.bench.now += 1
                sent = self.bench.turn()
            else:
                return
            self.bench.now += 1
        pytest.fail(f"the broker has closed {self.losses} connections")

    def _receive(self, sent: list[Message]) -> bool:
        """Read what the client sends: a window of messages, or one alone; False: the connection is closed."""
        while sent:
            window = (
                1 if sent[0].alone else next((n for n, m in enumerate(sent[:WINDOW]) if m.alone), len(sent[:WINDOW]))
            )
            in_flight, sent = sent[:window], sent[window:]
            for message in in_flight:
                if not self.accepts(message):
                    # What was received before is not acknowledged any more.
                    self.losses += 1
                    self.bench.connection.up = False
                    unacknowledged = [each.ticket for each in in_flight]
                    self.bench.publisher.on_disconnected(unacknowledged, is_stalled=self._stalls)
                    self.bench.turn()
                    return False
                self.received.append(message)
                if message.retain:
                    self.retained[message.topic] = message.payload
            sent += self.bench.acknowledge(*in_flight)
        return True


def accepts_up_to(limit_bytes: int) -> Callable[[Message], bool]:
    return lambda message: len(message.topic) + len(message.payload) <= limit_bytes


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with opened(tmp_path) as bench:
        bench.publisher.publish_state("online")
        yield bench


def complete(bench: Bench, job_id: str, text: str = "Hello.") -> None:
    bench.add(job_id)
    bench.complete(bench.claim(), text)


@pytest.mark.parametrize("limit_bytes", [1_000_000, 100_000, 4_000])
def test_a_status_over_an_unannounced_limit_is_cut_to_what_passes(bench: Bench, limit_bytes: int) -> None:
    complete(bench, "long", TEXT * 3)
    for number in range(50):
        complete(bench, f"short-{number}")
    broker = Broker(bench, accepts_up_to(limit_bytes))
    broker.serve()
    assert {f"cesar/status/short-{number}" for number in range(50)} <= broker.retained.keys()
    cut = broker.retained["cesar/status/long"]
    assert limit_bytes / 3 < len(cut) <= limit_bytes
    assert b'"result_truncated":true' in cut
    assert not bench.ledger.has_unpublished
    assert broker.losses <= 2 + 9 + 7, "it is cut to half each time, and its event is skipped"


@pytest.mark.parametrize("limit_bytes", [1_000_000, 4_000])
def test_a_message_that_is_never_acknowledged_is_cut_and_holds_up_nothing_else(bench: Bench, limit_bytes: int) -> None:
    complete(bench, "long", TEXT * 3)
    for number in range(50):
        complete(bench, f"short-{number}")
    broker = Broker(bench, accepts_up_to(limit_bytes), stalls=True)
    broker.serve()
    assert {f"cesar/status/short-{number}" for number in range(50)} <= broker.retained.keys()
    assert limit_bytes / 3 < len(broker.retained["cesar/status/long"]) <= limit_bytes
    assert not bench.ledger.has_unpublished
    assert broker.losses <= 2 + 9 + 2


@pytest.mark.parametrize("limit_bytes", [10_000_000, 100_000])
def test_a_restart_forgets_what_did_not_pass_and_finds_it_again(tmp_path: Path, limit_bytes: int) -> None:
    """A limit that was raised meanwhile counts at once; one that was not costs as much as at the first time."""
    with opened(tmp_path) as bench:
        complete(bench, "first", TEXT * 3)
        before = Broker(bench, accepts_up_to(100_000))
        before.serve()
    with opened(tmp_path) as bench:
        complete(bench, "second", TEXT * 3)
        complete(bench, "short")
        after = Broker(bench, accepts_up_to(limit_bytes))
        after.serve()
    assert "cesar/status/short" in after.retained
    cut = b'"result_truncated":true' in after.retained["cesar/status/second"]
    if limit_bytes > 1_000_000:
        assert (cut, after.losses) == (False, 0)
    else:  # in a new session the first one is published again, too
        assert cut
        assert after.losses <= 2 * before.losses


def test_a_learned_limit_never_grows_by_a_message_that_was_cut_further(bench: Bench) -> None:
    """A second large message was cut less when the first one had passed: the next ones were cut to what had not."""
    for job_id in ("one", "two", "three"):
        complete(bench, job_id, TEXT * 3)
    broker = Broker(bench, accepts_up_to(100_000))
    broker.serve()
    losses = broker.losses
    complete(bench, "four", TEXT * 3)
    broker.serve()
    assert broker.losses == losses


def test_what_is_never_acknowledged_at_any_size_is_skipped_at_the_second_time(bench: Bench) -> None:
    complete(bench, "one")
    broker = Broker(bench, lambda message: message.topic != "cesar/events", stalls=True)
    broker.serve()
    assert broker.losses == 2
    assert b'"completed"' in broker.retained["cesar/status/one"]


def test_what_was_learned_from_one_message_holds_for_all(bench: Bench) -> None:
    complete(bench, "long", TEXT * 3)
    broker = Broker(bench, accepts_up_to(1_000_000))
    broker.serve()
    losses = broker.losses
    complete(bench, "next", TEXT * 3)
    broker.serve()
    assert broker.losses == losses
    assert b'"result_truncated":true' in broker.retained["cesar/status/next"]


@pytest.mark.parametrize(
    "denied",
    ["cesar/status/no", "cesar/events", "cesar/result/no/srt", STATE, LAST, REJECTED, "homeassistant/x/config"],
)
def test_a_denied_topic_holds_up_nothing_else(bench: Bench, denied: str, caplog: pytest.LogCaptureFixture) -> None:
    bench.publisher.announce({"homeassistant/x/config": b"{}", "homeassistant/y/config": b"{}"})
    bench.publisher.on_rejected(rejection())
    bench.publisher.publish_response("cesar/response/get", b'{"status": "ok"}')
    bench.add("no", formats=("srt", "txt"))
    bench.complete(bench.claim())
    for number in range(30):
        complete(bench, f"job-{number}")
    bench.publisher.on_finished(bench.job("no"))
    broker = Broker(bench, lambda message: message.topic != denied)
    with caplog.at_level(logging.WARNING):
        broker.serve()
    assert broker.losses <= 3
    everything = {message.topic for message in broker.received}
    assert {f"cesar/status/job-{number}" for number in range(30)} <= everything
    wanted = {
        "cesar/events",
        "cesar/status/no",
        "cesar/result/no/srt",
        "cesar/result/no/txt",
        "cesar/response/get",
        "homeassistant/x/config",
        "homeassistant/y/config",
        STATE,
        LAST,
        REJECTED,
    }
    assert wanted - everything == {denied}
    assert [(q.topic, q.cause, q.skipped) for q in bench.publisher.quarantined()] == [(denied, "denied", True)]
    assert f"bytes on {denied}: it is skipped" in caplog.text
    assert bench.publisher._is_drained(), "a stop does not wait for what is skipped"
    assert bench.ledger.has_unpublished is (denied == "cesar/status/no"), "the next start publishes it"


def test_a_skipped_status_is_published_again_later_and_ever_less_often(bench: Bench) -> None:
    complete(bench, "a")
    broker = Broker(bench, lambda message: message.topic != "cesar/status/a")
    broker.serve()
    at = []
    for _ in range(8 * 60):
        before = broker.losses
        bench.now += 15
        broker.serve() if not bench.connection.up else broker._receive(bench.turn())
        if broker.losses > before:
            at.append(bench.now)
    waits = [round(later - earlier) for earlier, later in pairwise(at)]
    assert min(waits) >= 120
    assert waits[-1] > waits[0]
    broker.accepts = lambda _message: True
    bench.now += 3700
    broker.serve()
    assert "cesar/status/a" in broker.retained
    assert bench.publisher.quarantined() == []
    assert not bench.ledger.has_unpublished


def test_two_losses_for_other_reasons_skip_nothing(bench: Bench) -> None:
    """The network fails, whatever is in flight."""
    for number in range(30):
        complete(bench, f"job-{number}")
    fails_after = iter([7, 0, 12, 3, 25])
    budget = next(fails_after)

    def accepts(_message: Message) -> bool:
        nonlocal budget
        budget -= 1
        if budget == -1:
            budget = next(fails_after, 10_000)
            return False
        return True

    broker = Broker(bench, accepts)
    broker.serve()
    assert broker.losses == 5
    assert not [each for each in bench.publisher.quarantined() if each.skipped]
    assert not bench.ledger.has_unpublished


def test_a_message_that_is_refused_for_its_size_is_cut_and_published_in_the_same_connection(bench: Bench) -> None:
    bench.quiet()
    bench.add("long", formats=("txt",))
    bench.complete(bench.claim(), TEXT)
    accepts = accepts_up_to(100_000)
    retained: dict[str, bytes] = {}
    sent = bench.turn()
    for _ in range(20):
        for message in sent:
            if accepts(message):
                retained[message.topic] = message.payload
            bench.publisher.on_published(message.ticket, None if accepts(message) else TOO_LARGE)
        sent = bench.turn()
    assert not bench.ledger.has_unpublished
    assert 50_000 < len(retained["cesar/status/long"]) <= 100_000
    assert 50_000 < len(retained["cesar/result/long/txt"]) <= 100_000
    assert b'"result_truncated":true' in retained["cesar/status/long"]


def test_a_connection_that_is_lost_behind_a_refusal_was_lost_because_of_that(bench: Bench) -> None:
    """mosquitto 2.0.11 with `max_queued_messages 0`: what is in flight behind the refused message is innocent."""
    bench.quiet()
    bench.publisher.on_rejected(rejection())
    complete(bench, "a")
    queue, refused, *others = bench.turn()
    assert (queue.topic, refused.topic) == (QUEUE, REJECTED)
    bench.publisher.on_published(queue.ticket)
    bench.publisher.on_published(refused.ticket, DENIED)
    bench.connection.up = False
    bench.publisher.on_disconnected([each.ticket for each in others])
    bench.turn()
    assert not any(each.alone for each in bench.connect())
    bench.settle()
    assert [(each.topic, each.skipped) for each in bench.publisher.quarantined()] == [(REJECTED, True)]
    bench.publisher.on_rejected(rejection())
    assert bench.turn() == [], "it would be refused, too"
    assert not bench.ledger.has_unpublished


def test_a_response_that_is_refused_for_its_size_is_cut(bench: Bench) -> None:
    bench.quiet()
    response = (
        b'{"status":"ok","data":{"text":"%s","offset":0,"length":90000,"more":false},"error":null,"transaction":"t"}'
    )
    bench.publisher.publish_response("cesar/response/result", response % (b"x" * 90_000))
    (sent,) = bench.turn()
    bench.publisher.on_published(sent.ticket, TOO_LARGE)
    (again,) = bench.turn()
    assert len(again.payload) < 50_000
    assert again.fields["data"]["more"] is True


def test_an_event_that_is_too_large_is_skipped_and_the_events_of_other_jobs_are_published(bench: Bench) -> None:
    bench.add("long", metadata={"k": "x" * 3000})
    for number in range(20):
        complete(bench, f"job-{number}")
    events: list[str] = []

    def accepts(message: Message) -> bool:
        if message.topic != "cesar/events" or len(message.payload) < 3000:
            return True
        complete(bench, f"more-{len(events)}")  # there is always another event
        events.append(message.topic)
        return False

    broker = Broker(bench, accepts)
    broker.serve()
    assert broker.losses <= 5
    jobs = [message.fields["job_id"] for message in broker.received if message.topic == "cesar/events"]
    assert "long" not in jobs
    assert {f"job-{number}" for number in range(20)} <= set(jobs)
    assert "cesar/status/long" in broker.retained


def test_a_size_that_the_broker_has_accepted_is_not_cut() -> None:
    quarantine = Quarantine(monotonic=lambda: 0.0)
    quarantine.on_accepted("a", 500_000)
    denied = Sent("b", 400_000, ("status", 1))
    quarantine.on_disconnected([denied])
    quarantine.on_disconnected([denied])
    assert quarantine.limit_bytes("b") is None
    assert quarantine.last_units() == {("status", 1)}
    quarantine.on_disconnected([denied])
    assert quarantine.is_skipped("b", 400_000)
    assert [each.cause for each in quarantine.report()] == ["denied"]


def test_of_many_skipped_messages_one_at_a_time_is_tried_again() -> None:
    now = 0.0
    quarantine = Quarantine(monotonic=lambda: now)
    for number in range(5):
        for _ in range(3):
            quarantine.on_disconnected([Sent(f"status/{number}", 500, ("status", number))])
    now = 70.0
    assert len(quarantine.skipped_units()) < 5
    quarantine.on_disconnected([Sent("status/0", 500, ("status", 0))])
    assert len(quarantine.skipped_units()) == 5
    now = 200.0
    quarantine.on_accepted("status/0", 500)
    assert quarantine.skipped_units() == set()
    assert len(quarantine.last_units()) == 4


def test_of_several_in_flight_none_is_convicted() -> None:
    quarantine = Quarantine(monotonic=lambda: 0.0)
    both = [Sent("a", 100, ("status", 1)), Sent("b", 100, ("status", 2))]
    for _ in range(5):
        quarantine.on_disconnected(both)
    assert quarantine.report() == []
    assert quarantine.is_sent_alone("a")
    quarantine.on_accepted("a", 100)
    assert not quarantine.is_sent_alone("a")
