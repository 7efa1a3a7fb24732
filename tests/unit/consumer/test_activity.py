import pytest

from cesar_mqtt.consumer.activity import ActivityTracker
from cesar_mqtt.jobs import Totals
from cesar_mqtt.protocol.consumer_payloads import Activity


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
        ("idle", totals(working="a"), "processing"),  # claimed, and the worker has not yet said so
        ("idle", totals(working="a", paused=True), "processing"),
        ("idle", totals(paused=True, queued=3), "paused"),
        ("processing", totals(working="a"), "processing"),
        ("processing", totals(), "idle"),  # ended, and the worker has not yet said so
        ("processing", totals(queued=3), "processing"),  # between two jobs
        ("processing", totals(queued=3, paused=True), "paused"),
    ],
)
def test_the_word_agrees_with_the_job_that_the_ledger_has_in_work(worker: Activity, jobs: Totals, word: str) -> None:
    doing = ActivityTracker()
    doing.worker = worker
    assert doing.among(jobs) == word


def test_a_stop_weighs_more_than_a_disk_that_refuses_and_that_more_than_work() -> None:
    doing = ActivityTracker()
    assert doing.refuse("intake", on=True)
    assert not doing.refuse("intake", on=True)
    assert doing.among(totals(working="a")) == "degraded"
    doing.draining = True
    assert doing.among(totals(working="a")) == "draining"
    assert doing.refuse("intake", on=False)
