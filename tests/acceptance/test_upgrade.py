"""The present version goes on with what version 1 left behind, and writes what version 1 can read."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.harness import SPOKEN, Bus, Consumer, words
from tests.conftest import Mosquitto, StartMosquitto
from tests.golden import stored, version_1

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

_LANGUAGE = frozenset({"language", "detected_language", "language_probability"})
_CHANGED = {
    "windows": _LANGUAGE,  # an English-only model detects none
    "jobs": _LANGUAGE | {"options", "warnings"},  # the beam size is `auto`, and the language was assumed
    "gone": frozenset({"request", "status"}),  # so that a retained request is not run again
}
_WAITING = ("interrupted", "replaced", "waiting-upload", "waiting")


def _restore(bus: Bus) -> None:
    """Have a broker retain what it did."""
    for topic, payload in stored.retained().items():
        bus.publish(topic, payload, retain=True)


def test_a_data_directory_of_version_1_is_continued_and_the_broker_comes_to_agree(
    mosquitto: Mosquitto, serve: Callable[..., Consumer], join: Callable[..., Bus], tmp_path: Path
) -> None:
    bus = join(mosquitto.port)
    _restore(bus)
    (tmp_path / "consumer").mkdir()
    data_dir = stored.unpack(tmp_path / "consumer" / "data")
    before = stored.documents(data_dir)

    consumer = serve("--broker", mosquitto.url, environ=stored.SETTINGS)
    assert bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["queued"] == 4)["paused"] is True
    bus.publish("cesar/request/resume", {})
    ended = {job_id: bus.status(job_id) for job_id in _WAITING}
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["completed_total"] == 7 + len(_WAITING))
    assert consumer.stop() == 0

    assert {job_id: status["status"] for job_id, status in ended.items()} == dict.fromkeys(_WAITING, "completed")
    assert words(ended["replaced"]["result_text"]) == words(ended["waiting-upload"]["result_text"]) == SPOKEN
    assert ended["interrupted"]["attempt"] == 3
    first = bus.wait("cesar/status/interrupted", lambda status: status["attempt"] == 3 and status["processed_duration"])
    assert first["processed_duration"] >= 53.088, "it goes on behind its last window"
    kept = "".join(row["text"] for doc_id, row in sorted(before["windows"].items()) if doc_id // 100_000 == 13)
    assert ended["interrupted"]["result_text"].startswith(kept.strip())
    events = Counter((event["event_type"], event["job_id"]) for event in bus.seen("cesar/events"))
    started = {("processing", job_id) for job_id in _WAITING}
    completed = {("completed", job_id) for job_id in _WAITING}
    assert {event for event in events if event[0] in {"processing", "completed"}} == started | completed
    assert all(events[event] == 1 for event in completed), "what was published before is not published as news again"
    assert events["deleted", "deleted"] == 1

    after = stored.documents(data_dir)
    assert after["jobs"].keys() == before["jobs"].keys()
    assert [path.name for path in (data_dir / "spool").iterdir()] == []
    _agree(after, version_1.retained(mosquitto.port))


def _agree(documents: stored.Documents, messages: list[dict[str, str]]) -> None:
    """Every job has its status, every result its job, and nothing is left of what was deleted."""
    topics = {message["topic"] for message in messages}
    jobs = documents["jobs"].values()
    results = {f"cesar/result/{job['job_id']}/{name}" for job in jobs for name in job.get("formats", ())}
    assert {topic for topic in topics if topic.startswith("cesar/status/")} == {
        f"cesar/status/{job['job_id']}" for job in jobs
    }
    assert {topic for topic in topics if topic.startswith("cesar/result/")} == results
    announced = {topic for topic in stored.retained() if topic.startswith("homeassistant/")}
    assert {topic for topic in topics if topic.startswith("homeassistant/")} >= announced


def test_what_is_written_has_the_documents_of_version_1(start_mosquitto: StartMosquitto, tmp_path: Path) -> None:
    version_1.make(tmp_path, sys.executable, start_mosquitto(persistence=True))

    old, new = stored.documents(stored.FOLDER / "data"), stored.documents(tmp_path / "data")
    assert {table: _keys(table, rows) for table, rows in new.items()} == {
        table: _keys(table, rows) for table, rows in old.items()
    }
    assert (tmp_path / "data" / "subscriptions").read_text() == (stored.FOLDER / "data" / "subscriptions").read_text()
    announced, before = (
        json.loads((folder / "homeassistant.json").read_text())
        for folder in (tmp_path / "data", stored.FOLDER / "data")
    )
    assert announced.keys() == before.keys()
    assert set(announced["topics"]) > set(before["topics"]), "later versions have more entities"


def _keys(table: str, rows: dict[int, dict[str, object]]) -> dict[int, dict[str, str]]:
    """The types of the fields of each document, less those that 1.1 may write or leave out; of windows, one a job."""
    other = _CHANGED.get(table, frozenset())
    return {
        doc_id // (100_000 if table == "windows" else 1): {
            key: type(value).__name__ for key, value in row.items() if key not in other
        }
        for doc_id, row in rows.items()
    }
