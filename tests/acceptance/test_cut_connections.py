"""A burst of jobs over a network that fails again and again; afterwards everything must be as if it had not."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tinydb import TinyDB

from tests.acceptance.harness import Bus, Consumer
from tests.conftest import PATIENCE_S, Mosquitto, StartMosquitto
from tests.proxy import Proxy

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

SEED = 20260123
CUTS = 16
FEWEST, MOST = 300, 5_000
FINAL = {"completed", "error", "cancelled"}

# Else the consumer would wait longer after each of them, for minutes.
IMPATIENT = "from cesar_mqtt.mqtt import client\nclient._FIRST_RETRY_S, client._MAX_RETRY_S = 0.05, 0.1\n"

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


@pytest.fixture
def mosquitto(start_mosquitto: StartMosquitto) -> Mosquitto:
    return start_mosquitto("max_queued_messages 0")


@pytest.fixture
def proxy(mosquitto: Mosquitto) -> Iterator[Proxy]:
    proxy = Proxy(mosquitto.port, random.Random(SEED), cuts=CUTS)  # noqa: S311 - chance, no secret
    yield proxy
    proxy.close()


def publish_while_it_fails(bus: Bus, proxy: Proxy) -> list[str]:
    """Submit jobs that end as soon as they begin, until the last connection has failed; their ids, in order."""
    job_ids: list[str] = []
    while len(job_ids) < FEWEST or not (proxy.spent.wait(0.01) or len(job_ids) >= MOST):
        job_ids.append(f"cut-{len(job_ids):04}")
        bus.publish("cesar/jobs", {"job_id": job_ids[-1], "audio_path": "missing.wav"})
    return job_ids


@pytest.fixture
def impatient(tmp_path: Path) -> dict[str, str]:
    """The environment of a consumer that tries again soon, and keeps all its jobs."""
    (tmp_path / "sitecustomize.py").write_text(IMPATIENT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "CESAR_RETENTION__MAX_FINISHED": str(MOST)}


def test_no_job_is_lost_doubled_or_overtaken_whatever_the_network_does(
    mosquitto: Mosquitto, proxy: Proxy, serve: Serve, join: Join, impatient: dict[str, str]
) -> None:
    consumer = serve("--broker", proxy.url, environ=impatient, ready=None)
    bus = join(mosquitto.port)
    bus.wait("cesar/consumer/cesar/queue")  # its session is there, from now on nothing is published in vain

    job_ids = publish_while_it_fails(bus, proxy)
    assert proxy.spent.wait(PATIENCE_S), f"too few bytes went by for {CUTS} cuts (seed {SEED})"
    for job_id in job_ids:
        bus.status(job_id)
    assert consumer.stop() == 0

    late = join(mosquitto.port)
    late.settle()
    retained = [(s["job_id"], s["status"], s["error_code"], s["attempt"]) for s in late.every_status()]
    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        rows = [dict(row) for row in sorted(stock.table("jobs"), key=lambda row: row.doc_id)]
    right = [(job_id, "error", "audio_not_found", 1) for job_id in job_ids]
    assert [(r["job_id"], r["state"], r["error_code"], r["attempt"]) for r in rows] == right, f"seed {SEED}"
    assert sorted(retained) == right, f"seed {SEED}"
    assert all(one["completed_at"] <= other["started_at"] for one, other in pairwise(rows)), f"seed {SEED}"
    assert not [job_id for job_id in job_ids if went_back(bus, job_id)], f"seed {SEED}"
    assert consumer.logged().count("Lost the connection") >= CUTS // 4, (
        f"too few of them stood before they were cut (seed {SEED})"
    )


@pytest.mark.parametrize("persistence", [True, False], ids=["persistence", "no persistence"])
def test_what_is_retained_agrees_with_the_ledger_also_when_the_broker_restarts_in_the_middle(
    start_mosquitto: StartMosquitto, serve: Serve, join: Join, impatient: dict[str, str], *, persistence: bool
) -> None:
    mosquitto = start_mosquitto("max_queued_messages 0", persistence=persistence)
    with contextlib.closing(Proxy(mosquitto.port, random.Random(SEED), cuts=6)) as proxy:  # noqa: S311
        consumer = serve("--broker", proxy.url, environ=impatient, ready=None)
        sent: list[str] = []
        for part in range(3):
            if part:
                mosquitto.restart()
            bus = join(mosquitto.port)
            bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")
            for number in range(100):
                sent.append(f"part-{part}-{number:03}")
                bus.publish("cesar/jobs", {"job_id": sent[-1], "audio_path": "missing.wav"})
            bus.status(sent[-50])
        end = join(mosquitto.port)
        end.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")
        end.publish("cesar/jobs", {"job_id": "end", "audio_path": "missing.wav"})
        end.status("end")
        assert consumer.stop() == 0

    late = join(mosquitto.port)
    late.settle()
    retained = [(s["job_id"], s["status"], s["attempt"]) for s in late.every_status()]
    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        rows = [dict(row) for row in sorted(stock.table("jobs"), key=lambda row: row.doc_id)]
    assert sorted(retained) == sorted((r["job_id"], r["state"], r["attempt"]) for r in rows), f"seed {SEED}"
    assert {(state, attempt) for _, state, attempt in retained} == {("error", 1)}, f"seed {SEED}"
    done = [row["job_id"] for row in rows]
    assert done == [job_id for job_id in [*sent, "end"] if job_id in set(done)], f"seed {SEED}"
    if persistence:  # else what came without a subscriber is lost
        assert done == [*sent, "end"], f"seed {SEED}"
    assert len(done) > 150, f"too few were accepted for the restarts to matter (seed {SEED})"
    assert consumer.logged().count("Lost the connection") >= 2, f"two restarts, and who noticed? (seed {SEED})"


def went_back(bus: Bus, job_id: str) -> bool:
    """Whether a job was seen in a state that it had left before."""
    states = bus.states(job_id)
    return len(states) != len(set(states)) or states[-1] not in FINAL
