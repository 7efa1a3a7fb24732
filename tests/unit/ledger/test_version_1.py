"""A ledger that version 1 left behind after a power cut is opened and continued; and what is written is version 1."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import Admission, NewJob
from cesar_mqtt.ledger.ledger import Ledger
from tests.factories import new_job
from tests.golden import stored


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return stored.unpack(tmp_path / "data")


@pytest.fixture
def ledger(data_dir: Path) -> Iterator[Ledger]:
    with Ledger(data_dir / "ledger.json") as opened:
        yield opened


@pytest.fixture
def before() -> stored.Documents:
    return stored.documents(stored.FOLDER / "data")


def test_the_stored_directory_fills_every_table_and_every_field(before: stored.Documents) -> None:
    keys = {table: set().union(*rows.values()) for table, rows in before.items()}

    assert keys == {
        "jobs": {
            *(
                "job_id",
                "state",
                "revision",
                "created_at",
                "updated_at",
                "fingerprint",
                "model_size",
                "audio",
                "options",
            ),
            *("metadata", "formats", "stream", "expires_at", "packet_id", "anonymous", "attempt", "crashes", "retries"),
            *("started_at", "completed_at", "result_text", "detected_language", "language_probability", "no_speech"),
            *("audio_duration", "error_code", "error_message"),
        },
        "windows": {"until_s", "text", "language", "language_probability", "first_id", "segments"},
        "counters": {"completed", "error", "cancelled", "rejected", "deleted", "last_seq", "settled", "told", "paused"},
        "gone": {"job_id", "formats", "fingerprint", "cleared", "status"},
    }


def test_every_job_is_there_and_the_interrupted_one_waits_for_its_turn(ledger: Ledger) -> None:
    jobs = {job.metadata.get("name", job.job_id): job for job in ledger.jobs()}

    assert {name: job.state.value for name, job in jobs.items()} == {
        "completed": "completed",
        "files": "completed",
        "retained": "completed",
        "uploaded": "completed",
        "missing": "error",
        "refused": "error",
        "unreachable": "error",
        "cancelled": "cancelled",
        "interrupted": "queued",
        "replaced": "queued",
        "waiting-upload": "queued",
        "waiting": "queued",
    }
    interrupted, waiting = jobs["interrupted"], jobs["waiting"]
    assert (interrupted.attempt, interrupted.crashes, interrupted.queue_position) == (2, 2, 1)
    assert [window.number for window in ledger.windows(interrupted.seq)] == [0, 1]
    assert ledger.resume_position_s(interrupted.seq) == 53.088
    assert (waiting.formats, waiting.stream, waiting.metadata) == (("vtt",), True, {"number": 7})
    assert waiting.options == {
        "language": "en",
        "initial_prompt": "Plumber.",
        "temperature": [0, 0.4],
        "clip_timestamps": [[0, 3.5]],
    }
    assert waiting.expires_at is not None
    assert jobs["unreachable"].error_code is ErrorCode.DOWNLOAD_FAILED
    assert jobs["files"].result_text == "Please call the plumber on Monday morning and order a new lamp."
    words = ledger.windows(jobs["files"].seq)[0].segments[0].words
    assert words is not None
    assert words[-1].text == " lamp."


def test_counters_pause_and_spool_are_as_they_were(ledger: Ledger, data_dir: Path) -> None:
    totals = ledger.totals()

    assert (totals.completed_total, totals.error_total, totals.cancelled_total) == (7, 5, 1)
    assert (totals.rejected_total, totals.deleted_total, totals.queued, totals.paused) == (2, 4, 4, True)
    assert ledger.needed_spool_files() == {path.name for path in (data_dir / "spool").iterdir()}
    assert ledger.claim() is None, "it is paused"


def test_jobs_are_claimed_in_the_order_of_acceptance(ledger: Ledger) -> None:
    ledger.pause(on=False)

    claimed = []
    while job := ledger.claim():
        claimed.append(job.job_id)
        ledger.finish_cancelling(job.seq)

    assert claimed == ["interrupted", "replaced", "waiting-upload", "waiting"]


def test_a_request_that_comes_again_makes_no_second_job(ledger: Ledger, before: stored.Documents) -> None:
    rows = {row.get("metadata", {}).get("name", row["job_id"]): row for row in before["jobs"].values()}

    def again(name: str, **fields: Any) -> NewJob:
        row = rows[name]
        kind, audio = row["audio"]
        return new_job(row["job_id"], audio, kind=kind, fingerprint=row["fingerprint"], **fields)

    verdicts = ledger.append(
        [again("completed"), again("retained", has_generated_id=True, retained=True), again("waiting")]
    )

    assert verdicts == [
        (Admission.DUPLICATE, "completed"),
        (Admission.DUPLICATE, rows["retained"]["job_id"]),
        (Admission.DUPLICATE, "waiting"),
    ]


def test_a_new_job_gets_a_number_that_no_job_ever_had(ledger: Ledger) -> None:
    request = new_job("new")

    assert ledger.append([request]) == [(Admission.ACCEPTED, "new")]

    new = ledger.get("new")
    assert new is not None
    assert new.seq == 17


def test_what_is_written_is_read_by_stock_tinydb_with_nothing_changed_but_the_crash(
    data_dir: Path, before: stored.Documents
) -> None:
    with Ledger(data_dir / "ledger.json"):
        pass

    assert not (data_dir / "ledger.json.journal").exists()
    after = stored.documents(data_dir)
    (interrupted,) = [doc_id for doc_id, row in before["jobs"].items() if row["job_id"] == "interrupted"]
    assert after["jobs"][interrupted].items() >= {"state": "queued", "crashes": 2, "attempt": 2}.items()
    for documents in (before, after):
        del documents["jobs"][interrupted]
    assert after["jobs"] == before["jobs"]
    assert after["windows"] == before["windows"]
    assert after["gone"] == before["gone"]
    assert json.dumps(after["counters"]) == json.dumps(before["counters"])
