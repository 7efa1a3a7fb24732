"""Short forms of `make soak-cluster`: consumers and servers are really killed, stopped and cut off."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.chaos import FAULTS, Plan, _judge, kill_servers_after_puback, run, take_over


@pytest.mark.parametrize("mode", ["strict", "parallel"])
def test_killed_and_stopped_consumers_lose_double_and_overwrite_nothing(tmp_path: Path, mode: Any) -> None:
    report = run(tmp_path, Plan(mode=mode, jobs=14, job_s=0.3, kills=1, stops=1, drains=1, seed=20261130))
    assert report.wrong == 0, report
    assert report.attempts >= 14


def test_connections_that_end_within_a_packet_lose_nothing(tmp_path: Path) -> None:
    report = run(tmp_path, Plan(mode="parallel", consumers=2, jobs=12, job_s=0.2, cuts=4, seed=20261202))
    assert report.wrong == 0, report


def test_a_server_that_is_killed_at_the_puback_has_the_job(tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert kill_servers_after_puback(tmp_path, stack, rounds=4) == []


def test_the_job_of_a_dead_consumer_is_another_ones(tmp_path: Path) -> None:
    with ExitStack() as stack:
        takeover = take_over(tmp_path, stack, job_s=1.0)
    assert takeover.consumer != takeover.killed
    assert takeover.attempt == 2


def status(job_id: str, state: str, attempt: int = 1, **more: Any) -> dict[str, Any]:
    return {"job_id": job_id, "status": state, "attempt": attempt, "started_at": attempt, "result_text": job_id, **more}


RIGHT = [
    status("a", "queued", 0),
    status("b", "queued", 0),
    status("a", "processing"),
    status("a", "processing", 2),
    status("a", "completed", 2),
    status("b", "processing"),
    status("b", "completed"),
]


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        (None, RIGHT),
        ("lost", RIGHT[:-1]),
        ("lost", [*RIGHT[:-1], status("b", "error")]),
        ("doubled", [*RIGHT, status("a", "completed", 3)]),
        ("doubled", [*RIGHT, status("b", "cancelled")]),
        ("out_of_order", [*RIGHT[:3], RIGHT[5], *RIGHT[3:]]),
        ("overwritten", [*RIGHT, status("a", "processing", 1)]),
        ("overwritten", [*RIGHT[:4], status("a", "processing", 1, progress=0.5), *RIGHT[4:]]),
        ("wrong_text", [*RIGHT[:-1], status("b", "completed", result_text="a")]),
    ],
)
def test_each_fault_is_counted(fault: str | None, statuses: list[dict[str, Any]]) -> None:
    retained = {status["job_id"]: status for status in statuses}
    report = _judge(statuses, retained, ["a", "b"], Plan())
    counted = [name for name in FAULTS if getattr(report, name)]
    assert (fault in counted) if fault else counted == []


def test_what_is_retained_must_be_the_final_status() -> None:
    retained = {"a": RIGHT[4], "b": RIGHT[5]}
    report = _judge(RIGHT, retained, ["a", "b"], Plan())
    assert len(report.overwritten) == 1
    assert len(report.lost) == 1


def test_a_job_that_runs_again_is_no_fault_where_servers_are_killed() -> None:
    again = [*RIGHT, status("b", "processing", 2), status("b", "completed", 2)]
    retained = {"a": RIGHT[4], "b": again[-1]}
    assert _judge(again, retained, ["a", "b"], Plan(server_kills=1)).wrong == 0
    assert len(_judge(again, retained, ["a", "b"], Plan()).doubled) == 1


def test_only_one_job_may_run_again_for_each_killed_server_and_with_its_next_attempt() -> None:
    both = [*RIGHT, *(status(job_id, state, 3) for job_id in "ab" for state in ("processing", "completed"))]
    retained = {"a": both[-3], "b": both[-1]}
    assert _judge(both, retained, ["a", "b"], Plan(server_kills=2)).wrong == 0
    assert len(_judge(both, retained, ["a", "b"], Plan(server_kills=1)).doubled) == 1
    same = [*RIGHT, status("b", "completed", 1, started_at=9)]
    assert len(_judge(same, {"a": RIGHT[4], "b": same[-1]}, ["a", "b"], Plan(server_kills=1)).doubled) == 1
