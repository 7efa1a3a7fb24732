"""The consumer's own topics: what is due, what the broker may retain of them, and the activity."""

import pytest

from cesar_mqtt.consumer.own_topics import ActivityTracker, OwnTopics
from cesar_mqtt.jobs import Totals
from cesar_mqtt.protocol.consumer_payloads import Activity


def test_the_broker_may_retain_what_it_acknowledged_last_and_what_was_sent_since() -> None:
    own = OwnTopics()
    assert own.retained("queue") == ()
    for number in range(4):
        own.retain("queue", b"%d" % number)
        assert [(payload, version) for _, payload, version in own.take_due()] == [(b"%d" % number, number)]
    assert own.retained("queue") == (b"0", b"1", b"2", b"3")
    own.acknowledge("queue", 1)
    assert own.retained("queue") == (b"1", b"2", b"3"), "however slow it is, this does not grow"
    own.acknowledge("queue", 3)
    assert own.retained("queue") == (b"3",)
    assert own.is_acknowledged()


def test_a_republished_topic_is_retained_once_it_is_acknowledged() -> None:
    own = OwnTopics()
    own.retain("queue", b"x")
    list(own.take_due())
    own.acknowledge("queue", 0)
    own.republish()
    assert [payload for _, payload, _ in own.take_due()] == [b"x"]
    own.acknowledge("queue", 0)
    assert set(own.retained("queue")) == {b"x"}
    own.forget_retained()
    assert own.retained("queue") == ()


def totals(*, working: str | None = None, queued: int = 0, paused: bool = False) -> Totals:
    return Totals(
        queued=queued,
        completed_total=0,
        error_total=0,
        cancelled_total=0,
        rejected_total=0,
        oldest_queued_at=None,
        processing=working,
        paused=paused,
    )


@pytest.mark.parametrize(
    ("worker", "jobs", "word"),
    [
        ("starting", totals(), "starting"),
        ("loading", totals(working="a"), "loading"),
        ("idle", totals(), "idle"),
        ("idle", totals(working="a"), "processing"),  # claimed, and the worker has not yet reported it
        ("idle", totals(working="a", paused=True), "processing"),
        ("idle", totals(paused=True, queued=3), "paused"),
        ("processing", totals(working="a"), "processing"),
        ("processing", totals(), "idle"),  # ended, and the worker has not yet reported it
        ("processing", totals(queued=3), "processing"),  # between two jobs
        ("processing", totals(queued=3, paused=True), "paused"),
    ],
)
def test_the_activity_agrees_with_the_running_job_of_the_ledger(worker: Activity, jobs: Totals, word: str) -> None:
    activity = ActivityTracker()
    activity.worker = worker
    assert activity.current(jobs) == word


def test_a_stop_takes_precedence_over_a_failing_disk_and_that_over_the_worker() -> None:
    activity = ActivityTracker()
    assert activity.set_degraded("intake", on=True)
    assert not activity.set_degraded("intake", on=True)
    assert activity.current(totals(working="a")) == "degraded"
    activity.draining = True
    assert activity.current(totals(working="a")) == "draining"
    assert activity.set_degraded("intake", on=False)
