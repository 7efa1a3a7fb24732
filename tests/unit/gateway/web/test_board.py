"""What the page knows of the bus, and the events that its clients get."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.gateway.web import board as module
from cesar_mqtt.gateway.web.board import Board
from cesar_mqtt.protocol.payloads import Status
from tests.unit.gateway.web.site import TOPICS, message, status

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def board() -> Board:
    return Board(TOPICS)


def take(board: Board, job_id: str = "a", state: str = "queued", **fields: Any) -> None:
    board.take(message(f"cesar/status/{job_id}", status(job_id, state, **fields)))


def parsed(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream: kind and data."""
    events = []
    for block in stream.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append((fields["event"], json.loads(fields["data"])))
    return events


def ids(board: Board, **query: Any) -> list[str]:
    return [job["job_id"] for job in board.jobs(**query)[0]]


def test_jobs_are_listed_running_first_then_the_queue_then_the_newest(board: Board) -> None:
    take(board, "old", "completed", completed_at="2026-01-01T00:00:00.000Z")
    take(board, "second", queue_position=2)
    take(board, "new", "error", completed_at="2026-01-02T00:00:00.000Z")
    take(board, "first", queue_position=1)
    take(board, "urgent", queue_position=3, priority=9)
    take(board, "running", "processing")
    assert ids(board) == ["running", "urgent", "first", "second", "new", "old"]
    assert ids(board, state="queued") == ["urgent", "first", "second"]
    assert board.jobs(limit=2, after="first") == ([board.jobs()[0][3], board.jobs()[0][4]], 6)


@pytest.mark.parametrize("value", [7, True, "x", ["x", 7], {"x": 1}, None], ids=str)
def test_a_field_of_another_kind_than_the_contract_has_is_shown_as_missing(board: Board, value: Any) -> None:
    names = {*Status.__annotations__, "speakers"} - {"job_id", "status", "result_text", "metadata"}
    take(board, **dict.fromkeys(names, value), metadata=value)
    (job,) = board.jobs()[0]
    for name in (
        "created_at",
        "completed_at",
        "audio_source",
        "file",
        "error_message",
        "detected_language",
        "diarization_error",
    ):
        assert job[name] is None or isinstance(job[name], str), name
    for name in ("progress", "eta", "audio_duration", "queue_position", "priority", "speakers", "diarization_progress"):
        assert job[name] is None or type(job[name]) in (int, float), name
    for name in ("warnings", "formats"):
        assert all(isinstance(each, str) for each in job[name]), name


def test_a_search_takes_a_few_words_however_many_are_given(board: Board) -> None:
    take(board, "a", "completed", result_text="Hello there.")
    many = " ".join(f"e{n}" for n in range(30))
    assert ids(board, words=f"{'hello ' * 10_000}there") == ["a"]
    assert ids(board, words=f"{'hello there ' * 10}{many}") == []
    assert ids(board, words=f"{' '.join('hello there'[:n] for n in range(1, 12))} {'there ' * 30}") == ["a"]


def test_clients_that_come_together_share_a_snapshot_and_get_what_followed() -> None:
    now = [0.0]
    board = Board(TOPICS, clock=lambda: now[0])
    take(board, "a")
    first, last = board.events_after(None)
    take(board, "b")
    shared, again = board.events_after(None)
    assert (shared is first, again) == (True, last)
    assert [data["job_id"] for _, data in parsed(board.events_after(again)[0])] == ["b"]
    now[0] = 1.0
    assert len(parsed(board.events_after(None)[0])[0][1]["jobs"]) == 2


def test_a_slow_client_gets_a_burst_in_parts(board: Board) -> None:
    _, last = board.events_after(None)
    for number in range(1234):
        take(board, f"job-{number}")
    seen: list[str] = []
    sizes = []
    while True:
        events, last = board.events_after(last)
        if not events:
            break
        sizes.append(len(parsed(events)))
        seen += [data["job_id"] for _, data in parsed(events)]
    assert seen == [f"job-{number}" for number in range(1234)]
    assert max(sizes) == 500


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("plumber", ["a"]),
        ("PLUMBER monday", ["a"]),
        ("straße", ["b"]),
        ("STRASSE", ["b"]),
        ("note.wav", ["b"]),
        ("lamp plumber", []),
        ("", ["b", "a"]),
    ],
)
def test_the_search_looks_into_transcripts_files_and_ids(board: Board, words: str, found: list[str]) -> None:
    take(board, "a", "completed", result_text="Call the plumber on Monday.")
    take(board, "b", "completed", result_text="Die Straße ist lang.", metadata={"file": "note.wav"})
    assert ids(board, words=words) == found


def test_what_is_found_has_the_passage_around_it(board: Board) -> None:
    take(board, "a", "completed", result_text="word " * 1000 + "needle " + "word " * 1000)
    (job,), _ = board.jobs(words="needle")
    assert "needle" in job["passage"]
    assert len(job["passage"]) <= 201


def test_a_client_gets_everything_first_and_then_each_change(board: Board) -> None:
    take(board, "a")
    events, last = board.events_after(None)
    assert [kind for kind, _ in parsed(events)] == ["snapshot"]
    take(board, "a", "processing")
    take(board, "b")
    board.take(message("cesar/status/a", b""))
    board.take(message("cesar/consumer/kitchen/state", {"state": "online"}))
    board.take(message("cesar/rejected", {"reason": "queue_full", "job_id": "c", "detail": "Full."}))
    board.set_broker(connected=True)
    events, newest = board.events_after(last)
    assert [kind for kind, _ in parsed(events)] == ["job", "job", "job_deleted", "consumer", "rejected", "broker"]
    assert board.events_after(newest) == (b"", newest)


def test_what_changes_nothing_is_no_event(board: Board) -> None:
    document = status("a", "completed")
    board.take(message("cesar/status/a", document))
    _, last = board.events_after(None)
    board.take(message("cesar/status/a", document, retain=True))
    assert board.events_after(last)[0] == b""


@pytest.mark.parametrize(
    "last_id",
    [None, "", "x", "deadbeef-1", "-1", "{epoch}-99999", "{epoch}--1", "{epoch}-\u0661", "{epoch}-1e3", "{epoch}-0"],
)
def test_a_client_that_is_too_far_behind_gets_everything_anew(
    board: Board, last_id: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_LENGTH", 3)
    board = Board(TOPICS)
    for number in range(5):
        take(board, f"job-{number}")
    epoch = board.events_after(None)[1].partition("-")[0]
    (event,) = parsed(board.events_after(last_id and last_id.replace("{epoch}", epoch))[0])
    assert event[0] == "snapshot"
    assert len(event[1]["jobs"]) == 5
    assert [kind for kind, _ in parsed(board.events_after(f"{epoch}-2")[0])] == ["job"] * 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.sampled_from(["queued", "processing", "completed", "deleted"]), st.booleans()
        ),
        max_size=30,
    )
)
def test_however_a_client_is_interrupted_it_ends_with_what_the_bus_has(steps: list[tuple[str, str, bool]]) -> None:
    board, seen, last = Board(TOPICS), {}, None
    for job_id, state, reads in [*steps, ("a", "queued", True)]:
        board.take(message(f"cesar/status/{job_id}", b"" if state == "deleted" else status(job_id, state)))
        if not reads:
            continue
        events, last = board.events_after(last)
        for kind, data in parsed(events):
            if kind == "snapshot":
                seen = {job["job_id"]: job for job in data["jobs"]}
            elif kind == "job":
                seen[data["job_id"]] = data
            else:
                del seen[data["job_id"]]
    assert seen == {job["job_id"]: job for job in board.jobs()[0]}


def test_a_wait_ends_with_a_change_and_with_a_wake() -> None:
    async def scenario() -> None:
        board = Board(TOPICS)
        _, last = board.events_after(None)
        changes: list[Callable[[], None]] = [lambda: take(board), board.wake]
        for change in changes:
            waiting = asyncio.create_task(board.wait_changed(last))
            await asyncio.sleep(0)
            assert not waiting.done()
            change()
            await asyncio.wait_for(waiting, 5)
            last = board.events_after(last)[1]
        take(board, "b")
        await asyncio.wait_for(board.wait_changed(last), 5)

    asyncio.run(scenario())


def test_after_a_new_connection_what_did_not_come_again_is_removed(board: Board) -> None:
    for job_id in ("kept", "deleted"):
        board.take(message(f"cesar/status/{job_id}", status(job_id), connection=1))
    for name in ("here", "gone"):
        board.take(message(f"cesar/consumer/{name}/state", {"state": "online"}, connection=1))
    board.take(message("cesar/status/kept", status("kept"), connection=2))
    board.take(message("cesar/consumer/here/state", {"state": "online"}, connection=2))
    board.remove_stale(2)
    assert ids(board) == ["kept"]
    assert list(board.consumers) == ["here"]


HOSTILE = [
    b"", b"{", b"[]", b"null", b'"x"', b'{"status": "nonsense"}', b'{"status": 5}', b'{"status": ["queued"]}',
    b"\xff\xfe",
    b'{"status": "queued", "progress": NaN}', b'{"status": "queued", "eta": 1e999}',
    b'{"status": "queued", "metadata": "x"}',
    b'{"status": "completed", "result_text": {"a": 1}, "error_message": ["x"], "completed_at": 7, "warnings": {}}',
    b'{"status": "queued", "queue_position": "x", "priority": [], "job_id": 5, "created_at": {}}',
    b'{"status": "queued", "metadata": {"file": ["x"]}}', b"[" * 100_000,
    b'{"status": "error", "error_message": "\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("payload", HOSTILE, ids=lambda payload: payload[:40].decode(errors="replace"))
@pytest.mark.parametrize(
    "topic",
    [
        "cesar/status/a",
        "cesar/status/../a",
        "cesar/status/",
        "cesar/consumer/x/state",
        "cesar/consumer/x/queue",
        "cesar/consumer/x/info",
        "cesar/consumer/x/y/state",
        "cesar/rejected",
        "cesar/segments/a",
    ],
)
def test_whatever_is_published_can_be_listed_searched_and_read_by_a_browser(
    board: Board, topic: str, payload: bytes
) -> None:
    take(board, "good", "completed")
    board.take(message(topic, payload))
    board.jobs(words="hello")
    events, _ = board.events_after(None)
    (snapshot,) = parsed(events)

    def no_constant(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    json.loads(json.dumps(snapshot[1]), parse_constant=no_constant)
    assert "good" in [job["job_id"] for job in snapshot[1]["jobs"]]


def test_lists_stay_short_whatever_the_texts_are(board: Board) -> None:
    take(
        board,
        "a",
        "completed",
        result_text="w" * 1_000_000,
        error_message="e" * 1_000_000,
        metadata={"file": "f" * 100_000},
        warnings=["w" * 5000] * 1000,
    )
    board.take(message("cesar/rejected", {"detail": "d" * 1_000_000, "payload_excerpt": ["x"] * 9999}))
    board.take(message("cesar/consumer/x/info", {"models": ["m" * 5000] * 5000}))
    assert len(json.dumps(board.jobs()[0])) < 300_000
    assert len(json.dumps(list(board.rejected))) < 10_000
    assert len(board.consumers["x"].listed()["models"]) <= 200


def test_jobs_and_texts_are_bounded(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_JOBS", 50)
    monkeypatch.setattr(module, "MOST_TEXT", 1000)
    for number in range(200):
        take(
            board,
            f"job-{number}",
            "completed",
            completed_at=f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}.000Z",
            result_text="x" * 100,
        )
    kept = ids(board)
    assert 50 <= len(kept) <= 55
    assert kept[0] == "job-199"
    newest, oldest = board.status(kept[0]), board.status(kept[-1])
    assert newest is not None
    assert newest["result_text"] == "x" * 100
    assert oldest is not None
    assert oldest["is_dropped"] is True


def test_the_rejections_that_a_consumer_remembers_are_added_once(board: Board) -> None:
    live = {"reason": "queue_full", "detail": "new", "received_at": "2026-01-02T00:00:00.000Z"}
    old = [
        {"reason": "queue_full", "detail": f"{n}", "received_at": f"2026-01-01T00:00:{n:02d}.000Z"} for n in range(3)
    ]
    board.take(message("cesar/rejected", live))
    _, last = board.events_after(None)
    for _ in range(2):
        board.add_rejections([*reversed(old), live])
    assert [each["detail"] for each in board.rejected] == ["new", "2", "1", "0"]
    assert [kind for kind, _ in parsed(board.events_after(last)[0])] == ["rejections"]


def test_a_follower_gets_what_arrives_about_its_job_only() -> None:
    async def scenario() -> list[str]:
        board = Board(TOPICS)
        with board.follow("a") as messages:
            take(board, "b")
            take(board, "a")
            board.take(message("cesar/segments/a", {"text": "Hello"}))
            board.take(message("cesar/rejected", {"job_id": "a", "reason": "queue_full"}))
            board.take(message("cesar/status/a", b""))
            kinds = [messages.get_nowait()[0] for _ in range(messages.qsize())]
        take(board, "a")
        assert messages.empty()
        return kinds

    assert asyncio.run(scenario()) == ["status", "segment", "rejected", "deleted"]
