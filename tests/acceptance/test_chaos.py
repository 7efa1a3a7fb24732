"""What the whole project is for, tried in earnest: processes are really killed, the broker really restarts."""

from pathlib import Path

import pytest

from tests.acceptance.chaos import Plan, _overtaken, run
from tests.conftest import StartMosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]


@pytest.mark.timeout(400)
def test_no_job_is_lost_doubled_or_overtaken_whatever_is_killed(
    tmp_path: Path, start_mosquitto: StartMosquitto
) -> None:
    mosquitto = start_mosquitto("max_queued_messages 0", persistence=True)
    report = run(tmp_path, mosquitto, Plan(jobs=60, kills=6, broker_restarts=2, seed=20260123))
    assert report.wrong == 0, report


@pytest.mark.timeout(400)
def test_nor_when_the_disk_fails_now_and_then_and_connections_are_cut_and_the_broker_is_killed(
    tmp_path: Path, start_mosquitto: StartMosquitto
) -> None:
    mosquitto = start_mosquitto("max_queued_messages 0", persistence=True)
    report = run(tmp_path, mosquitto, Plan(jobs=40, kills=2, broker_kills=2, cuts=6, one_in=60, seed=20260124))
    assert report.wrong == 0, report


def test_only_a_job_that_was_deferred_may_be_overtaken() -> None:
    def row(job_id: str, started: float, ended: float, **fields: object) -> dict[str, object]:
        return {"job_id": job_id, "created_at": 0.0, "started_at": started, "completed_at": ended, **fields}

    in_order = [row("a", 1, 2), row("b", 2, 3), row("c", 3, 4)]
    assert _overtaken(in_order) == ()
    assert _overtaken([row("a", 4, 5), *in_order[1:]]) == ("b",)
    assert _overtaken([row("a", 4, 5, retries=1), *in_order[1:]]) == ()
    urgent = row("urgent", 4, 5, priority=9)
    assert _overtaken([*in_order, urgent]) == ("a", "b", "c")
    assert _overtaken([*in_order, urgent | {"retries": 1}]) == ()
