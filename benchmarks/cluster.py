"""Consumers that share a queue on a real NATS server: what the queue costs, how it scales, and what a death costs.

The transcriber sleeps (`tests.cluster.simulated`), so that a few cores can run many consumers.
"""

import asyncio
import json
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

from nats.aio.client import Client as NatsClient

from benchmarks.jobs import _resident_bytes
from benchmarks.table import Row, median
from tests.cluster.chaos import (
    ACK_WAIT_S,
    Group,
    Producer,
    Watcher,
    kill_servers_after_puback,
    start_servers,
    take_over,
)
from tests.cluster.servers import NatsServer, nats_url

CONSUMERS = (1, 2, 4, 8)
JOBS_EACH = 20
JOB_S = 1.0
OVERHEAD_JOBS = 200
TAKEOVERS = 5
KILLS = 50
LONG = 100_000
PATIENCE_S = 900.0
_FEW = 20
_MIB = 1 << 20


def _wait_for_all(watcher: Watcher, jobs: int) -> tuple[float, float]:
    """When the first of so many jobs began, and when the last was completed."""

    def completed() -> int:
        return len({status["job_id"] for status in watcher.statuses if status["status"] == "completed"})

    with watcher.changed:
        if not watcher.changed.wait_for(lambda: completed() >= jobs, PATIENCE_S):
            raise RuntimeError(f"{completed()} of {jobs} jobs are completed")
        times = list(zip(watcher.statuses, watcher.times, strict=True))
    began = min(when for status, when in times if status["status"] == "processing")
    return began, max(when for status, when in times if status["status"] == "completed")


def _jobs_a_second(folder: Path, consumers: int) -> float:
    folder.mkdir()
    jobs = JOBS_EACH * consumers
    with ExitStack() as stack:
        servers = start_servers(folder, 1, stack)
        watcher = stack.enter_context(closing(Watcher(servers[0].port)))
        group = stack.enter_context(closing(Group(folder, servers, mode="parallel", consumers=consumers, job_s=JOB_S)))
        group.wait_ready()
        producer = stack.enter_context(closing(Producer(servers[0].port)))
        for number in range(jobs):
            producer.publish(f"job-{number}")
        began, ended = _wait_for_all(watcher, jobs)
    return jobs / (ended - began)


def _throughput(folder: Path) -> list[Row]:
    one, *others = [(count, _jobs_a_second(folder / str(count), count)) for count in CONSUMERS]
    return [
        Row(
            f"{count} consumers over one, jobs of {JOB_S:g} s: share of linear",
            rate / (count * one[1]),
            at_least=0.95,
            beside=f"{rate:.2f} against {one[1]:.3f} jobs/s",
        )
        for count, rate in others
    ]


def _seconds_a_job(folder: Path, engine: str) -> float:
    """One consumer, jobs that take no time, all of them accepted before the first one starts."""
    folder.mkdir()
    with ExitStack() as stack:
        servers = start_servers(folder, 1, stack)
        watcher = stack.enter_context(closing(Watcher(servers[0].port)))
        group = stack.enter_context(closing(Group(folder, servers, consumers=1, job_s=0.0, engine=engine)))
        group.wait_ready()
        producer = stack.enter_context(closing(Producer(servers[0].port)))
        producer.command("pause")
        for number in range(OVERHEAD_JOBS):
            producer.publish(f"job-{number}")
        watcher.wait_for(f"job-{OVERHEAD_JOBS - 1}", "queued", attempt=0)
        producer.command("resume")
        began, ended = _wait_for_all(watcher, OVERHEAD_JOBS)
    return (ended - began) / OVERHEAD_JOBS


def _overhead(folder: Path) -> Row:
    took: dict[str, list[float]] = {"mqtt": [], "jetstream": []}
    for number in range(3):
        for engine, seconds in took.items():
            seconds.append(_seconds_a_job(folder / f"{engine}-{number}", engine))
    mqtt, shared = (median(seconds) * 1000 for seconds in took.values())
    return Row(
        "the shared queue over the engine mqtt, a job",
        shared - mqtt,
        "ms",
        at_most=10.0,
        beside=f"{shared:.1f} against {mqtt:.1f} ms, one consumer, jobs of 0 s, {OVERHEAD_JOBS} in each of 3 rounds",
    )


def _takeover(folder: Path) -> Row:
    took = []
    for number in range(TAKEOVERS):
        part = folder / str(number)
        part.mkdir()
        with ExitStack() as stack:
            took.append(take_over(part, stack, job_s=1.5).after_s)
    return Row(
        f"a consumer dies: seconds until another one runs its job, worst (ack_wait {ACK_WAIT_S:g} s)",
        max(took),
        "s",
        at_most=ACK_WAIT_S + 2.0,
        beside=f"of {TAKEOVERS}, median {median(took):.2f} s",
    )


def _killed_at_puback(folder: Path) -> Row:
    with ExitStack() as stack:
        lost = kill_servers_after_puback(folder, stack, rounds=KILLS)
    return Row(
        f"the server is killed at a PUBACK, {KILLS} times: acknowledged jobs that are lost",
        len(lost),
        "jobs",
        at_most=0.0,
        beside=", ".join(lost[:5]),
    )


async def _fill(server: NatsServer, numbers: range) -> None:
    """Put jobs into the queue that a consumer has made, as if they had been admitted."""
    client = NatsClient()
    await client.connect(nats_url([server]))
    js = client.jetstream(publish_async_max_pending=2000)
    for number in numbers:
        job_id = f"long-{number:06}"
        request = {"job_id": job_id, "audio_path": "noise.wav", "initial_prompt": job_id}
        headers = {"Cesar-Job-Id": job_id, "Cesar-Topic": "cesar/jobs", "Cesar-Received": repr(time.time())}
        await js.publish_async(f"CESAR.job.{job_id}", json.dumps(request).encode(), headers=headers)
    await js.publish_async_completed()
    await client.close()


def _first_job(group: Group, watcher: Watcher, job_id: str) -> tuple[float, int]:
    """Start the consumer: seconds until it is ready and has its first job running, and its memory then."""
    consumer = group.members[0]
    read = len(consumer.logged())
    group.start(0)
    consumer.wait_for_log(" is open (", read)
    ready = time.monotonic()
    _, seen = watcher.wait_for(job_id, "processing")
    threading.Event().wait(2.0)  # it has run some more by then
    return max(seen - ready, 0.0), _resident_bytes(consumer.process.pid)


def _long_queue(folder: Path) -> list[Row]:
    with ExitStack() as stack:
        servers = start_servers(folder, 1, stack)
        watcher = stack.enter_context(closing(Watcher(servers[0].port)))
        group = stack.enter_context(closing(Group(folder, servers, consumers=1, job_s=0.2)))
        group.wait_ready()
        measured = []
        for numbers in (range(_FEW), range(_FEW, _FEW + LONG)):
            group.drain(0)
            began = time.monotonic()
            asyncio.run(_fill(servers[0], numbers))
            filled_s = time.monotonic() - began
            measured.append((*_first_job(group, watcher, f"long-{numbers.start:06}"), filled_s))
            if numbers.stop == _FEW:
                watcher.wait_for(f"long-{_FEW - 1:06}", "completed")
        group.kill(0)
    (short_s, short_bytes, _), (long_s, long_bytes, filled_s) = measured
    return [
        Row(
            f"{LONG} jobs in the queue: memory of a consumer over {_FEW} jobs",
            (long_bytes - short_bytes) / _MIB,
            "MiB",
            at_most=50.0,
            beside=f"{long_bytes / _MIB:.0f} against {short_bytes / _MIB:.0f} MiB; filled in {filled_s:.0f} s",
        ),
        Row(
            f"{LONG} jobs in the queue: from the open queue to the first running job",
            long_s,
            "s",
            at_most=2.0,
            beside=f"with {_FEW} jobs {short_s:.2f} s",
        ),
    ]


def run(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for measure in (_killed_at_puback, _takeover, _overhead, _long_queue, _throughput):
        part = folder / measure.__name__
        part.mkdir()
        found = measure(part)
        rows += found if isinstance(found, list) else [found]
    return rows
