"""The ledger compared with sqlite3, stock TinyDB, and the limit of the disk."""

import json
import os
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Callable
from itertools import count
from pathlib import Path

from tinydb import TinyDB

from benchmarks.table import Row, median
from cesar_mqtt.jobs import AudioSource, NewJob, Result
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger

CYCLES = 500
ROUNDS = 9
FINISHED = 100_000
_ids = count()


def _request() -> NewJob:
    return NewJob(
        f"job-{next(_ids)}", "f" * 32, AudioSource("path", "porch.wav"), "tiny.en", metadata={"room": "porch"}
    )


_RESULT = Result("It is raining again.", 4.0, "en", 0.98, no_speech=False)


class _UnsyncedDisk(Disk):
    """For filling a ledger quickly."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_data(self, descriptor: int) -> None:
        pass


def fill(folder: Path, finished: int) -> Path:
    """Create a ledger with `finished` completed jobs that have empty transcripts."""
    folder.mkdir()
    path = folder / "ledger.json"
    result = Result("", 4.0, None, None, no_speech=True)
    with Ledger(path, max_queued=finished + 1, disk=_UnsyncedDisk()) as ledger:
        ledger.append([_request() for _ in range(finished)])
        while (job := ledger.claim()) is not None:
            ledger.complete(job.seq, result)
            _publish(ledger, 100)
        _publish_all(ledger)
    return path


def _cycle(ledger: Ledger) -> Callable[[], None]:
    def once() -> None:
        ledger.append([_request()])
        job = ledger.claim()
        assert job is not None
        ledger.complete(job.seq, _RESULT)

    return once


def _publish(ledger: Ledger, limit: int) -> bool:
    """Acknowledge up to `limit` statuses; return whether there were any."""
    published = ledger.unpublished(limit)
    ledger.mark_published([(job.seq, number) for number, job in published])
    return bool(published)


def _publish_all(ledger: Ledger) -> None:
    """Acknowledge every status. Never timed, since the other contenders publish nothing."""
    while _publish(ledger, 1000):
        pass


def _sqlite_cycle(path: Path) -> Callable[[], None]:
    """The same three transactions in sqlite3."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute(
        "CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT UNIQUE, state TEXT, request TEXT,"
        " created_at REAL, updated_at REAL, started_at REAL, completed_at REAL, attempt INTEGER, result TEXT)"
    )
    database.execute("CREATE INDEX queued ON jobs (seq) WHERE state = 'queued'")

    def once() -> None:
        request = _request()
        body = json.dumps({"audio": "porch.wav", "model_size": request.model_size, "metadata": dict(request.metadata)})
        now = time.time()
        database.execute(
            "INSERT INTO jobs (job_id, state, request, created_at, updated_at, attempt)"
            " VALUES (?, 'queued', ?, ?, ?, 0)",
            (request.job_id, body, now, now),
        )
        (seq,) = database.execute(
            "UPDATE jobs SET state = 'processing', attempt = attempt + 1, started_at = ?, updated_at = ? WHERE seq ="
            " (SELECT seq FROM jobs WHERE state = 'queued' ORDER BY seq LIMIT 1) RETURNING seq",
            (time.time(), time.time()),
        ).fetchone()
        result = json.dumps({"text": _RESULT.text, "language": "en", "language_probability": 0.98})
        database.execute(
            "UPDATE jobs SET state = 'completed', completed_at = ?, updated_at = ?, result = ? WHERE seq = ?",
            (time.time(), time.time(), result, seq),
        )

    return once


def _stock_cycle(path: Path, documents: int) -> Callable[[], None]:
    """The same three changes in stock TinyDB with its own storage."""
    table = TinyDB(path).table("jobs")
    table.insert_multiple({"job_id": f"old-{n}", "state": "completed", "created_at": 1.0} for n in range(documents))

    def once() -> None:
        doc_id = table.insert({"job_id": _request().job_id, "state": "queued", "created_at": time.time()})
        table.update({"state": "processing", "started_at": time.time()}, doc_ids=[doc_id])
        table.update({"state": "completed", "result_text": _RESULT.text}, doc_ids=[doc_id])

    return once


def _sync_cycle(path: Path) -> Callable[[], None]:
    """One append with fsync, as long as a journal line: the limit of the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def once() -> None:
        os.write(descriptor, b"x" * 300)
        os.fsync(descriptor)

    return once


def _rate(once: Callable[[], None], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        once()
    return times / (time.perf_counter() - started)


def _rates(folder: Path) -> dict[str, list[float]]:
    """Cycles per second of each contender, measured in turn, so that other load disturbs all of them."""
    full_path = fill(folder / "full", FINISHED)
    with Ledger(full_path) as full, Ledger(_new(folder / "empty")) as empty:
        contenders = {
            "empty": (_cycle(empty), CYCLES),
            "full": (_cycle(full), CYCLES),
            "sqlite": (_sqlite_cycle(folder / "jobs.sqlite"), CYCLES),
            "fsync": (_sync_cycle(folder / "line"), CYCLES),
            "stock": (_stock_cycle(folder / "stock.json", 10_000), 3),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, (once, times) in contenders.items():
                rates[name].append(_rate(once, times))
            _publish_all(full)
            _publish_all(empty)
    return rates


def _over(rates: dict[str, list[float]], other: str) -> tuple[float, str]:
    """The full ledger's rate over the other one's, as the median of the rounds; and both rates."""
    ratios = [ours / theirs for ours, theirs in zip(rates["full"], rates[other], strict=True)]
    return median(ratios), f"{median(rates['full']):.0f} against {median(rates[other]):.4g} cycles/s"


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder / "ledger.json"


def _open_ratio(path: Path) -> tuple[float, float]:
    """Seconds to open the ledger, and to `json.load` the same file."""
    opened, loaded = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ledger = Ledger(path)
        opened.append(time.perf_counter() - started)
        ledger.close()
        started = time.perf_counter()
        with path.open("rb") as file:
            document = json.load(file)
        loaded.append(time.perf_counter() - started)
        del ledger, document
    return median(opened), median(loaded)


def _bytes_per_job(path: Path, jobs: int) -> float:
    tracemalloc.start()
    ledger = Ledger(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ledger.close()
    return held / jobs


def _clearing(path: Path) -> tuple[float, float]:
    """Seconds to delete all finished jobs as the service does, and the longest cycle meanwhile."""
    pause, cleared = threading.Event(), threading.Event()
    with Ledger(path) as ledger:
        expired = time.time()

        def clear() -> None:
            while ledger.delete_finished(before=expired, keep=1 << 30)[0] and not pause.wait(0.01):
                pass
            cleared.set()

        once, longest = _cycle(ledger), 0.0
        thread = threading.Thread(target=clear)
        started = time.perf_counter()
        thread.start()
        while not cleared.wait(0.002):
            before = time.perf_counter()
            once()
            longest = max(longest, time.perf_counter() - before)
        took = time.perf_counter() - started
        thread.join()
    return took, longest


def run(folder: Path) -> list[Row]:
    rates = _rates(folder)
    path = folder / "full" / "ledger.json"
    opened_s, loaded_s = _open_ratio(path)
    memory = _bytes_per_job(path, FINISHED) / 1024
    clearing_s, longest_s = _clearing(path)
    over_empty, over_sqlite, over_stock = (_over(rates, other) for other in ("empty", "sqlite", "stock"))
    return [
        Row("fsyncs of 300 bytes, each on its own", median(rates["fsync"]), "/s"),
        Row(
            "append + claim + finish with 100,000 finished jobs, over none",
            over_empty[0],
            at_least=0.95,
            beside=over_empty[1],
        ),
        Row(
            "the same cycle over sqlite3 (WAL, synchronous=FULL)",
            over_sqlite[0],
            at_least=1.0,
            beside=over_sqlite[1],
        ),
        Row(
            "the same cycle over stock TinyDB at 10,000 documents",
            over_stock[0],
            at_least=100,
            beside=over_stock[1],
        ),
        Row(
            "opening a ledger of 100,000 jobs over json.load",
            opened_s / loaded_s,
            at_most=3.0,
            beside=f"{opened_s:.2f} s against {loaded_s:.2f} s",
        ),
        Row("memory of a finished job", memory, "KiB", at_most=2.0),
        Row(
            "clearing 100,000 expired jobs: longest append + claim + finish",
            longest_s * 1000,
            "ms",
            beside=f"{clearing_s:.1f} s in all",
        ),
    ]
