"""The index: built from tables, kept up to date, and correct for a damaged ledger."""

from typing import Any

import pytest

from cesar_mqtt.jobs import DeletedJob, JobState
from cesar_mqtt.ledger import tombstones as tombstones_module
from cesar_mqtt.ledger.index import WINDOWS_PER_JOB, Index, window_id
from cesar_mqtt.ledger.tombstones import Tombstones
from tests.factories import new_job


def row(job_id: str, state: str, revision: int = 1, **fields: Any) -> dict[str, Any]:
    return {"job_id": job_id, "fingerprint": job_id, "state": state, "revision": revision, **fields}


def index(jobs: dict[int, dict[str, Any]], **tables: dict[int, dict[str, Any]]) -> Index:
    """An index of tables with these documents, as a ledger has them."""
    named = {name: {str(key): value for key, value in rows.items()} for name, rows in tables.items()}
    counters = named.get("counters", {}).get("1", {})
    rows = {str(key): value for key, value in jobs.items()}
    return Index(rows, gone=named.get("gone", {}), windows=named.get("windows", {}), counters=counters)


JOBS = {
    10: row("d", "queued"),
    2: row("b", "completed", 9),
    1: row("a", "queued"),
    3: row("c", "error", 5, attempt=1),
    4: row("w", "processing"),
    5: row("x", "cancelled", 7),
}


def test_the_index_is_built_from_the_tables() -> None:
    made = index(JOBS, counters={1: {"completed": 30, "error": 2, "last_seq": 40}})
    assert list(made.queue) == [1, 10]
    assert made.processing == [4]
    assert list(made.finished) == [3, 5, 2], "in the order of their ends"
    assert list(made.retryable) == [3, 5], "in the same order"
    assert made.ended_total == {"completed": 30, "error": 2, "cancelled": 0}
    assert made.deduplication.seq("d") == 10
    assert made.last_seq == 40


@pytest.mark.parametrize(
    ("tables", "last_seq"),
    [
        ({}, 10),
        ({"counters": {1: {"last_seq": 11}}}, 11),
        ({"counters": {1: {"last_seq": 3}}}, 10),
        ({"gone": {12: {"job_id": "g"}}}, 12),
        ({"windows": {window_id(13, 4): {}}}, 13),
    ],
)
def test_no_sequence_number_is_used_again_whatever_table_was_lost(tables: dict[str, Any], last_seq: int) -> None:
    assert index(JOBS, **tables).last_seq == last_seq
    assert index({}).last_seq == 0


def test_windows_count_up_to_the_first_missing_one_and_the_rest_are_orphaned() -> None:
    ids = [window_id(1, 0), window_id(1, 1), window_id(4, 0), window_id(4, 2), window_id(4, 3), window_id(10, 1)]
    lost = [window_id(6, 0), window_id(99, 0)]
    made = index(JOBS, windows={doc_id: {} for doc_id in reversed([*ids, *lost])})
    assert made.windows == {1: 2, 4: 1}
    assert made.orphaned_windows == sorted([*ids[3:], *lost])
    assert list(made.window_ids(1)) == ids[:2]
    assert list(made.window_ids(1, start=1)) == ids[1:2]
    assert list(made.window_ids(2)) == list(made.window_ids(1, start=5)) == []
    made.set_window_count(4, 3)
    made.set_window_count(1, 0)
    made.set_window_count(2, 0)
    assert made.windows == {4: 3}


def test_window_ids_of_two_jobs_never_overlap() -> None:
    assert window_id(1, WINDOWS_PER_JOB - 1) + 1 == window_id(2, 0)
    with pytest.raises(ValueError, match="at most"):
        window_id(1, WINDOWS_PER_JOB)


def test_in_states_returns_the_jobs_in_these_states_ascending() -> None:
    made = index(JOBS)
    assert made.in_states(list(JobState)) == [1, 2, 3, 4, 5, 10]
    assert made.in_states([JobState.QUEUED]) == [1, 10]
    assert made.in_states([JobState.PROCESSING, JobState.QUEUED]) == [1, 4, 10]
    assert {5} <= set(made.in_states([JobState.CANCELLED])) <= {2, 3, 5}
    assert made.in_states([]) == []


def test_a_deleted_job_becomes_a_pending_tombstone_until_it_is_cleared() -> None:
    made = index(JOBS)
    made.delete(DeletedJob(2, "b", ("srt",)), JOBS[2])
    made.delete(DeletedJob(1, "a"), JOBS[1])
    assert (list(made.finished), list(made.queue)) == ([3, 5], [10])
    assert made.deduplication.seq("a") is None
    deleted = made.tombstones
    assert (list(deleted.pending), made.deleted_total) == ([2, 1], 2)
    assert deleted.status_owner("a") == DeletedJob(1, "a")
    assert deleted.mark_cleared(1) == []
    assert deleted.mark_cleared(1) is None
    assert list(deleted.pending) == [2]
    assert deleted.status_owner("a") == DeletedJob(1, "a"), "a broker may restore it"


def test_only_the_newest_job_with_an_id_owns_the_status() -> None:
    gone: dict[int, dict[str, Any]] = {2: {"job_id": "b", "formats": ["srt"], "status": False}, 8: {"job_id": "b"}}
    made = index(JOBS, gone=gone)
    assert list(made.tombstones.pending.values()) == [
        DeletedJob(2, "b", ("srt",), owns_status=False),
        DeletedJob(8, "b"),
    ]
    assert made.tombstones.status_owner("b") == DeletedJob(8, "b")
    made.tombstones.mark_cleared(2)
    assert made.tombstones.status_owner("b") == DeletedJob(8, "b")
    del gone[8]
    assert index(JOBS, gone=gone).tombstones.status_owner("b") is None


def test_cleared_tombstones_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones_module, "CLEARED_KEPT", 2)
    deleted = Tombstones([])
    for seq, job_id in enumerate("abcd", start=1):
        deleted.add(DeletedJob(seq, job_id, request_key="same" if seq < 3 else None))
    assert [deleted.mark_cleared(seq) for seq in (2, 1)] == [[], []]
    assert deleted.newest_id("same") == "b"
    assert deleted.mark_cleared(3) == [2]
    assert deleted.status_owner("b") is None
    assert deleted.newest_id("same") == "a"
    assert deleted.clear_again() == [1, 3]
    assert [(job.job_id, job.event_pending) for job in deleted.pending.values()] == [
        ("d", True),
        ("a", False),
        ("c", False),
    ]
    assert deleted.clear_again() == []


def test_jobs_whose_requests_the_broker_retains_are_remembered_longer_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tombstones_module, "CLEARED_KEPT", 1)
    monkeypatch.setattr(tombstones_module, "RETAINED_KEPT", 2)
    documents = {seq: {"job_id": name, "request": "f", "cleared": True} for seq, name in enumerate("abcdef", start=1)}
    deleted = Tombstones(documents.items())
    for seq in (1, 3, 5):
        deleted.mark_retained(seq)
    deleted.add(DeletedJob(7, "g"))
    assert deleted.mark_cleared(7) == [2, 4, 6, 1], "the newest, and two that are retained"
    assert [deleted.newest_id(f"{name} f") for name in "abcdef"] == [None, None, "c", None, "e", None]
    assert deleted.clear_again() == [7], "older ones are not restored"
    deleted.mark_cleared(7)
    restarted = Tombstones([(3, documents[3] | {"retained": True}), (5, documents[5] | {"retained": True})])
    assert restarted.newest_id("c f") == "c"
    for seq in (8, 9, 10):
        restarted.add(DeletedJob(seq, "new"))
        restarted.mark_cleared(seq)
    assert (restarted.newest_id("c f"), restarted.newest_id("e f")) == ("c", "e")


def test_a_tombstone_whose_id_is_used_again_keeps_its_results_and_its_request() -> None:
    deleted = Tombstones(
        [(1, {"job_id": "a", "fingerprint": "f", "cleared": True}), (2, {"job_id": "b", "formats": ["srt"]})]
    )
    for job_id in "ab":
        owner = deleted.status_owner(job_id)
        assert owner is not None
        deleted.release_status(owner)
        assert deleted.status_owner(job_id) is None
    assert deleted.newest_id("f") == "a"
    assert (deleted.clear_again(), [*deleted.pending.values()]) == (
        [],
        [DeletedJob(2, "b", ("srt",), owns_status=False)],
    )


@pytest.mark.parametrize("odd", [{}, {"completed_at": None}, {"completed_at": "yesterday"}])
def test_a_finished_job_without_the_time_of_its_end_never_becomes_old(odd: dict[str, Any]) -> None:
    made = index({1: row("a", "completed", 1, **odd), 2: row("b", "completed", 2, completed_at=5.0)})
    assert list(made.finished) == [1, 2]
    assert made.finished.due(1e12, 10) == [2]


def test_jobs_move_between_states() -> None:
    made = index({1: row("a", "queued"), 2: row("b", "queued")})
    made.move(1, JobState.QUEUED, JobState.PROCESSING, {})
    assert (made.processing, list(made.queue)) == ([1], [2])
    made.move(1, JobState.PROCESSING, JobState.CANCELLED, row("a", "cancelled", completed_at=7.5))
    assert (made.processing, dict(made.finished), made.ended_total[JobState.CANCELLED]) == ([], {1: 7.5}, 1)
    made.move(1, JobState.CANCELLED, JobState.QUEUED, {})
    assert (list(made.finished), list(made.queue), made.ended_total[JobState.CANCELLED]) == ([], [1, 2], 1)
    made.add(3, new_job("c", None), 8.0)
    made.add(4, new_job("d", None, failure="wrong"), 9.0)
    assert (list(made.queue), dict(made.rejected), made.last_seq) == ([1, 2, 3], {4: 9.0}, 4)
    assert (dict(made.finished), made.ended_total[JobState.ERROR]) == ({}, 1)


def test_rejected_requests_are_not_among_the_finished_jobs() -> None:
    rejected = row("r", "error", 3, completed_at=9.0)
    made = index({**JOBS, 6: rejected})
    assert (list(made.finished), dict(made.rejected)) == ([3, 5, 2], {6: 9.0})
    assert 6 in made.in_states([JobState.ERROR])
    assert 6 not in made.in_states([JobState.COMPLETED])
    made.delete(DeletedJob(6, "r"), rejected)
    assert (list(made.finished), dict(made.rejected)) == ([3, 5, 2], {})
