"""Short forms of `make soak-cluster`: consumers and servers are really killed, stopped and cut off."""

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import Subscription
from tests.acceptance.harness import command
from tests.cluster.chaos import (
    FAULTS,
    PATIENCE_S,
    Group,
    Plan,
    _judge,
    kill_servers_after_puback,
    run,
    start_servers,
    take_over,
)


@pytest.mark.parametrize("mode", ["strict", "parallel"])
def test_killed_and_stopped_consumers_lose_double_and_overwrite_nothing(tmp_path: Path, mode: Any) -> None:
    report = run(tmp_path, Plan(mode=mode, jobs=14, job_s=0.3, kills=1, stops=1, drains=1, seed=20261130))
    assert report.wrong == 0, report
    assert report.attempts >= 14


def test_connections_that_end_within_a_packet_lose_nothing(tmp_path: Path) -> None:
    report = run(tmp_path, Plan(mode="parallel", consumers=2, jobs=12, job_s=0.2, cuts=4, seed=20261202))
    assert report.wrong == 0, report


def test_three_servers_of_which_one_after_the_other_is_killed_lose_double_and_overwrite_nothing(
    tmp_path: Path,
) -> None:
    report = run(tmp_path, Plan(servers=3, consumers=2, jobs=10, job_s=0.3, server_kills=2, seed=20261201))
    assert report.wrong == 0, report


def test_clients_that_come_while_one_of_three_servers_is_away_are_served(tmp_path: Path) -> None:
    """A cluster refuses many a subscription then (0x80), as a server refuses what it does not allow."""
    with ExitStack() as stack:
        servers = start_servers(tmp_path, 3, stack)
        group = stack.enter_context(closing(Group(tmp_path, servers, consumers=3, job_s=0.1)))
        group.wait_ready()
        servers[0].kill()
        group.kill(0)  # it knows no other server
        clients = []
        for number in range(6):
            settings = BrokerSettings(url=servers[1 + number % 2].url, protocol="3.1.1")
            filters = [Subscription(f"cesar/replies/{number}/{name}") for name in "ab"]
            client = MqttClient(settings, client_id=f"late-{number}", persistent=False, subscriptions=filters)
            stack.enter_context(closing(client))
            client.start()
            clients.append(client)
        assert all(client.wait_connected(PATIENCE_S) for client in clients)
        for number, client in enumerate(clients):
            wanted, deadline = {f"cesar/replies/{number}/{name}" for name in "ab"}, time.monotonic() + PATIENCE_S
            while wanted and time.monotonic() < deadline:
                for topic in wanted:  # again and again: one may be granted when the client is already connected
                    client.publish(topic, b"hello")
                wanted -= {delivery.topic for delivery in client.receive(1.0)}
            assert wanted == set()
        recording = str(tmp_path / "audio" / "noise.wav")
        submitted = command("submit", recording, "--broker", servers[1].url, "--timeout", str(PATIENCE_S))
        assert submitted.returncode == 0, submitted.stderr


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
