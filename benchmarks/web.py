"""The web page: its weight, how soon it shows the queue, its events, uploads, and what OpenAI's API adds to a job."""

import asyncio
import gzip
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import Page as Tab
from playwright.sync_api import sync_playwright

from benchmarks.bus import _mosquitto
from benchmarks.corpus import write_wav
from benchmarks.jobs import _consumer, _finished, _idle, _listening, _pcm
from benchmarks.memory import _Peak, _used_bytes
from benchmarks.table import Row, median
from cesar_mqtt.gateway.web.pages import page_files
from tests.acceptance.harness import LONG, Bus, Consumer
from tests.acceptance.web_page import Page
from tests.conftest import find_free_port, need

JOBS = 1000
LOADS = 7
STATUSES = 40
CLIENTS = 100
UPLOAD_BYTES = 200_000_000
ROUNDS = 15
CLIP_S = 5.0
PATIENCE_S = 120.0
_MIB = 1 << 20
_RATE = 16_000

# Notes when the first job is in the page, and when each name of a job appears, in milliseconds since the epoch.
_OBSERVE = """
window.seen = {};
new MutationObserver(() => {
    for (const name of document.querySelectorAll("#jobs button.name"))
        window.seen[name.textContent] ??= performance.timeOrigin + performance.now();
}).observe(document, { childList: true, subtree: true, characterData: true });
"""


def _status(job_id: str, name: str = "", state: str = "completed") -> dict[str, Any]:
    return {
        "job_id": job_id,
        "status": state,
        "attempt": 1,
        "created_at": "2026-01-23T21:45:00.120Z",
        "completed_at": "2026-01-23T21:46:00.120Z",
        "audio_source": "a.wav",
        "model_size": "base",
        "result_text": "A sentence that is about as long as those that people say. " * 5,
        "metadata": {"file": name or f"{job_id}.wav"},
        "consumer": "cesar",
        "formats": ["json"],
    }


@contextmanager
def _serving(folder: Path, broker_port: int) -> Iterator[tuple[Page, Consumer]]:
    page = Page(find_free_port())
    with _consumer(folder / "consumer", broker_port, "--web", f"127.0.0.1:{page.port}") as consumer, closing(page):
        page.wait_ready()
        yield page, consumer


def _weight() -> Row:
    files = page_files()
    largest = max(len(file.compressed) for name, file in files.items() if name.startswith("languages/"))
    weight = largest + sum(len(file.compressed) for name, file in files.items() if not name.startswith("languages/"))
    whole = gzip.compress(b"".join(file.content for file in files.values()))
    beside = f"with its largest language; all languages together {len(whole) / 1000:.0f} KB"
    return Row("page weight, gzipped, without transcripts", weight / 1000, "KB", at_most=60.0, beside=beside)


def _browser_rows(folder: Path) -> list[Row]:
    with (
        _mosquitto(folder) as port,
        _listening(port) as bus,
        _serving(folder, port) as (page, _),
        sync_playwright() as playwright,
    ):
        for number in range(JOBS):
            bus.publish(f"cesar/status/job-{number}", _status(f"job-{number}"), retain=True)
        browser = playwright.chromium.launch(executable_path=need("chromium"), args=["--no-sandbox"])
        loads = [_load(browser.new_page(), page) for _ in range(LOADS)]
        tab = browser.new_page()
        _load(tab, page)
        delays = [_delay_s(tab, bus, number) for number in range(STATUSES)]
        browser.close()
        bus.messages.clear()  # they are our own
    return [
        Row(
            f"first paint to live queue, {JOBS} jobs",
            median([live - paint for paint, live in loads]),
            "ms",
            at_most=500.0,
            beside=f"median of {LOADS}; from the start of the navigation {median([live for _, live in loads]):.0f} ms",
        ),
        Row(
            "status on the bus to the page",
            median(delays) * 1000,
            "ms",
            at_most=100.0,
            beside=f"median of {STATUSES}, worst {max(delays) * 1000:.0f} ms, {JOBS} jobs in the page",
        ),
    ]


def _load(tab: Tab, page: Page) -> tuple[float, float]:
    """Return when the first paint and the queue were there, in milliseconds from the start of the navigation."""
    tab.add_init_script(_OBSERVE)
    tab.goto(page.url)
    tab.wait_for_selector("#jobs > li")
    live = tab.evaluate("Math.min(...Object.values(window.seen)) - performance.timeOrigin")
    paint = tab.evaluate("performance.getEntriesByName('first-paint')[0]?.startTime ?? 0")
    return float(paint), float(live)


def _delay_s(tab: Tab, bus: Bus, number: int) -> float:
    name = f"new-{number}.wav"
    started = time.time()
    bus.publish(f"cesar/status/a-new-one-{number}", _status(f"a-new-one-{number}", name, "queued"), retain=True)
    tab.locator("#jobs button.name", has_text=name).wait_for()
    return float(tab.evaluate("(name) => window.seen[name]", name)) / 1000 - started


# -- memory of an upload -----------------------------------------------------------------------------------------------


def _upload(folder: Path) -> Row:
    with _mosquitto(folder) as port, _serving(folder, port) as (page, consumer):
        page.http.post("/api/consumers/cesar/pause")
        for _ in range(3):  # the first request imports what all need
            _send(page, 100_000)
        before = _used_bytes(consumer.process.pid)
        peak = _Peak(partial(_used_bytes, consumer.process.pid))
        started = time.perf_counter()
        _send(page, UPLOAD_BYTES)
        took_s = time.perf_counter() - started
        growth = (peak.stop() - before) / _MIB
    beside = f"{before / _MIB:.0f} MiB before; {took_s:.1f} s"
    return Row(
        "a 200 MB upload to `serve --web`: memory of the process tree", growth, "MiB", at_most=20.0, beside=beside
    )


def _send(page: Page, size: int) -> None:
    """Upload so many bytes, made as they are sent."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    tail = b"\r\n--x--\r\n"
    block = bytes(64 << 10)

    def body() -> Iterator[bytes]:
        yield head
        left = size
        while left:
            yield block[:left]
            left -= len(block[:left])
        yield tail

    headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(len(head) + size + len(tail))}
    assert page.http.post("/api/jobs", content=body(), headers=headers).status_code == 201


# -- event streams -----------------------------------------------------------------------------------------------------


def _streams(folder: Path) -> Row:
    with _mosquitto(folder) as port, _listening(port) as bus, _serving(folder, port) as (page, _):
        lost, took_s = asyncio.run(_burst(page.port, bus))
        bus.messages.clear()  # they are our own
    return Row(
        f"{CLIENTS} event-stream clients, a burst of {JOBS} statuses: lost updates",
        lost,
        "updates",
        at_most=0.0,
        beside=f"all {CLIENTS * JOBS} received {took_s:.1f} s after the first was published",
    )


async def _burst(port: int, bus: Bus) -> tuple[int, float]:
    connections = [await asyncio.open_connection("127.0.0.1", port, limit=1 << 24) for _ in range(CLIENTS)]
    for reader, writer in connections:
        writer.write(f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        await reader.readuntil(b"event: snapshot")
    clients = [asyncio.create_task(_received(reader)) for reader, _ in connections]
    started = time.perf_counter()
    loop = asyncio.get_running_loop()

    def publish() -> None:
        for number in range(JOBS):
            payload = json.dumps(_status(f"burst-{number}"))
            bus._client.publish(f"cesar/status/burst-{number}", payload, qos=1, retain=True)  # noqa: SLF001 - no waiting

    await loop.run_in_executor(None, publish)
    received = await asyncio.gather(*clients)
    took_s = time.perf_counter() - started
    for _, writer in connections:
        writer.close()
    return sum(JOBS - len(names) for names in received), took_s


async def _received(reader: asyncio.StreamReader) -> set[str]:
    """Return the jobs of the burst whose status a client received; waits for all of them, or until none comes."""
    names: set[str] = set()
    while len(names) < JOBS:
        try:
            line = await asyncio.wait_for(reader.readline(), 20.0)
        except TimeoutError:
            break
        if line.startswith(b'data: {"job_id": "burst-'):
            names.add(json.loads(line[6:])["job_id"])
    return names


# -- OpenAI's API ------------------------------------------------------------------------------------------------------


def _openai(folder: Path) -> Row:
    clip = write_wav(folder / "clip.wav", _pcm(LONG)[: int(CLIP_S * _RATE)])
    content = clip.read_bytes()
    times: dict[str, list[float]] = {"openai": [], "bus": []}
    with _mosquitto(folder) as port, _listening(port) as bus, _serving(folder, port) as (page, _):
        _idle(bus)
        for number in range(ROUNDS + 2):
            started = time.perf_counter()
            answer = page.openai.audio.transcriptions.create(model="whisper-1", file=("clip.wav", content))
            asked_s = time.perf_counter() - started
            started = time.perf_counter()
            bus.publish(f"cesar/audio/clip-{number}", content)
            end = _finished(bus, f"clip-{number}")
            if number >= 2:
                times["openai"].append(asked_s)
                times["bus"].append(time.perf_counter() - started)
            assert answer.text == end["result_text"]
    return Row(
        "OpenAI client, 5 s clip: request to answer over publish to `completed`",
        (median(times["openai"]) - median(times["bus"])) * 1000,
        "ms",
        at_most=50.0,
        beside=f"medians of {ROUNDS}: {median(times['openai']) * 1000:.0f} and {median(times['bus']) * 1000:.0f} ms",
    )


def run(folder: Path) -> list[Row]:
    rows = [_weight()]
    for measure in (_browser_rows, _upload, _streams, _openai):
        part = folder / measure.__name__
        part.mkdir()
        found = measure(part)
        rows += [found] if isinstance(found, Row) else found
    return rows
