"""The consumer with each broker that can be started here; the outcome is the table of docs/brokers.md.

`make test-brokers` installs what it can and runs this as tests; `python -m tests.brokers.matrix` prints the table. A
broker that is not installed is left out, with the reason.
"""

import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.acceptance.harness import CONNECTED, SPEECH, Bus, Consumer
from tests.brokers.brokers import BROKERS, Broker

PAGE = Path(__file__).parents[2] / "docs" / "brokers.md"
COLUMNS = ("online", "job", "delete", "restart", "will", "denied topic", "oversize")
STATE = "cesar/consumer/cesar/state"
METADATA = {"note": "x" * 2700}
"""Makes a status that is larger than the limit, from a request that is not; without it the status passes."""
QUIET_S = 3.0
"""A retained message arrives within this, or there is none."""
PATIENCE_S = 120.0
"""A message that is never acknowledged is found after 30 s, and there are several."""
LOST, REFUSED = "Lost the connection", "The broker refused a message"
UNANSWERED = "does not acknowledge a message"


class Trial:
    """A broker, a consumer, and a client that watches both."""

    def __init__(self, folder: Path, kind: type[Broker], *, denies: bool = False, limits: bool = False) -> None:
        self.broker = kind(folder, denies=denies, limits=limits)
        self._watchers: list[Bus] = []
        self._consumer: Consumer | None = None
        try:
            self.broker.start()
            self.bus = self.watch("cesar/#")
            self.consumer = self._consumer = Consumer(folder, "--broker", self.broker.url)
        except BaseException:
            self.end()
            raise

    def watch(self, topic_filter: str) -> Bus:
        self._watchers.append(Bus(self.broker.port, topic_filter=topic_filter, user=self.broker.watcher))
        return self._watchers[-1]

    def is_retained(self, topic: str, text: str) -> bool:
        """Whether a new subscriber of the topic receives this text. RabbitMQ retains nothing for wildcards."""
        bus = self.watch(topic)
        pause, deadline = threading.Event(), time.monotonic() + QUIET_S
        while not bus.messages and time.monotonic() < deadline:
            pause.wait(0.05)
        return any(message.retain and text in message.payload.decode() for message in bus.messages)

    def wait_for(self, topic: str, name: str, value: str) -> None:
        self.bus.wait(topic, lambda document: document[name] == value, PATIENCE_S)

    def complete(self, job_id: str, **fields: object) -> bool:
        """Submit a job; whether it completes, and its status is retained."""
        self.bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": str(SPEECH), **fields})
        self.wait_for(f"cesar/status/{job_id}", "status", "completed")
        return self.is_retained(f"cesar/status/{job_id}", '"completed"')

    def end(self) -> None:
        for bus in self._watchers:
            bus.leave()
        if self._consumer is not None:
            self._consumer.kill()
        self.broker.stop()


@contextmanager
def trial(kind: type[Broker], **options: bool) -> Iterator[Trial]:
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-brokers-") as folder:
        started = Trial(Path(folder), kind, **options)
        try:
            yield started
        finally:
            started.end()


# -- one column each: what stands in the table -------------------------------------------------------------------------


def online(its: Trial) -> str:
    its.wait_for(STATE, "state", "online")
    return _yes(its.is_retained(STATE, "online"))


def job(its: Trial) -> str:
    return _yes(its.complete("first"))


def delete(its: Trial) -> str:
    cleared = threading.Event()
    its.bus.on_cleared = cleared.set
    its.bus.publish("cesar/request/delete", {"job_id": "first"})
    return _yes(cleared.wait(PATIENCE_S) and not its.is_retained("cesar/status/first", "first"))


def restart(its: Trial) -> str:
    its.complete("before")
    read = len(its.consumer.logged())
    its.broker.restart()
    its.consumer.wait_for_log(CONNECTED, read)
    its.bus = its.watch("cesar/#")
    return _yes(its.complete("after") and its.is_retained("cesar/status/before", '"completed"'))


def will(its: Trial) -> str:
    its.consumer.kill()
    its.wait_for(STATE, "state", "offline")
    return _yes(its.is_retained(STATE, "offline"))


def denied_topic(its: Trial) -> str:
    """Discovery messages are denied; everything else has to arrive, and the consumer to stay connected in the end."""
    passes = its.complete("one") and its.complete("two")
    return _outcome(its, passes=passes and its.is_retained(STATE, "online"))


def oversize(its: Trial) -> str:
    """One status is larger than the limit; it has to arrive shorter, and the others as they are."""
    with suppress(pytest.fail.Exception):
        its.complete("large", metadata=METADATA)
    passes = its.complete("small", metadata={"note": "kept"})
    large, small = ({str(status["metadata"]) for status in _completed(its, job_id)} for job_id in ("large", "small"))
    passes &= any("kept" in metadata for metadata in small)
    return _outcome(its, passes=passes) if large == {"{}"} else f"does not answer{', others pass' * passes}"


def _completed(its: Trial, job_id: str) -> list[Mapping[str, object]]:
    return [status for status in its.bus.seen(f"cesar/status/{job_id}") if status["status"] == "completed"]


def _outcome(its: Trial, *, passes: bool) -> str:
    """What the broker does at such a message, and whether all others pass."""
    log = its.consumer.logged()
    signs = {UNANSWERED: "does not answer", LOST: "closes", REFUSED: "refuses"}
    does = next((what for sign, what in signs.items() if sign in log), "drops")
    return f"{does}, others pass" if passes else f"{does}, others do not pass"


def _yes(passes: bool) -> str:  # noqa: FBT001
    return "yes" if passes else "no"


def _try(column: Callable[[Trial], str], its: Trial) -> str:
    try:
        return column(its)
    except (pytest.fail.Exception, ValueError) as exc:
        sys.stderr.write(f"{its.broker.name}: {exc}\n{its.consumer.logged()[-3000:]}\n")
        return "no"


@functools.cache
def row(kind: type[Broker]) -> Mapping[str, str]:
    """Try everything with one broker; the cells of its row by their columns."""
    with trial(kind) as its:
        cells = {column.__name__: _try(column, its) for column in (online, job, delete, restart, will)}
    with trial(kind, denies=True) as its:
        cells["denied topic"] = _try(denied_topic, its)
    with trial(kind, limits=True) as its:
        cells["oversize"] = _try(oversize, its)
    return cells


# -- the table ---------------------------------------------------------------------------------------------------------


def table() -> dict[str, list[str]]:
    """The cells of the page's table, by the names of the brokers."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


@pytest.mark.parametrize("kind", BROKERS, ids=lambda kind: kind.name)
def test_the_row_of_the_table(kind: type[Broker]) -> None:
    reason = kind.missing()
    if reason is not None:
        pytest.skip(f"{kind.name} is left out: {reason}")
    cells = row(kind)
    assert table()[f"{kind.name} {kind.tried}"] == [cells[column] for column in COLUMNS]


def main() -> None:
    print(f"| broker | {' | '.join(COLUMNS)} |")
    print("| --- " * (1 + len(COLUMNS)) + "|")
    for kind in BROKERS:
        if len(sys.argv) > 1 and kind.name not in sys.argv[1:]:
            continue
        reason = kind.missing()
        if reason is not None:
            print(f"{kind.name} is left out: {reason}", file=sys.stderr)
            continue
        cells = row(kind)
        print(f"| {kind.name} {kind.tried} | {' | '.join(cells[column] for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
