"""What `watch` knows and how it looks: no broker, no terminal."""

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from cesar_mqtt.cli.watch import JsonLines, Lines, Screen
from cesar_mqtt.cli.watch_model import MOST_JOBS, Board, JobRow
from cesar_mqtt.cli.watch_view import View, line_of
from tests.factories import delivery

NOW = datetime(2026, 1, 23, 21, 45, 12, tzinfo=UTC)


def status(state: str = "completed", **fields: Any) -> bytes:
    return json.dumps({"status": state, "attempt": 1, **fields}).encode()


def ended(second: int, **fields: Any) -> bytes:
    return status(completed_at=f"2026-01-23T21:{second // 60:02}:{second % 60:02}.000Z", **fields)


def drawn(board: Board, width: int, height: int, trouble: str | None = None, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None, **options)
    with console.capture() as capture:
        console.print(View(board, "cesar at mqtt://127.0.0.1:1883", trouble, NOW))
    return capture.get().splitlines()


def busy(jobs: int) -> Board:
    board = Board("cesar")
    board.take("cesar/consumer/cesar/state", b'{"state": "online"}')
    queue = {"activity": "processing", "queued": 3, "oldest_age": 75.0, "completed_total": 12, "error_total": 1}
    board.take("cesar/consumer/cesar/queue", json.dumps(queue).encode())
    board.take("cesar/status/now", status("processing", progress=0.42, audio_duration=60.0, speed=6.5, eta=5.4))
    for n in range(1, 4):
        board.take(f"cesar/status/waits-{n}", status("queued", queue_position=n))
    for n in range(jobs - 4):
        board.take(f"cesar/status/done-{n}", ended(n, result_text="Word " * 40))
    return board


def test_work_comes_first_then_the_queue_in_its_order_then_what_ended_last() -> None:
    board = Board("cesar")
    board.take("cesar/status/old", ended(1))
    board.take("cesar/status/new", ended(2))
    board.take("cesar/status/a-second", status("queued", queue_position=2))
    board.take("cesar/status/b-first", status("queued", queue_position=1))
    board.take("cesar/status/now", status("processing"))
    assert [row.job_id for row in board.jobs(10)] == ["now", "b-first", "a-second", "new", "old"]
    assert [row.job_id for row in board.jobs(4)] == ["now", "b-first", "a-second", "new"]
    assert board.counts()["queued"] == 2


def test_a_cleared_status_takes_the_job_off_the_board() -> None:
    board = Board("cesar")
    board.take("cesar/status/a", status())
    assert board.take("cesar/status/a", b"") is None
    assert board.jobs(10) == []


def test_of_very_many_jobs_those_are_kept_that_are_shown_first() -> None:
    board = busy(MOST_JOBS * 2)
    counts = board.counts()
    assert sum(counts.values()) <= MOST_JOBS * 1.1
    assert (counts["processing"], counts["queued"]) == (1, 3)
    assert board.jobs(5)[4].job_id == f"done-{MOST_JOBS * 2 - 5}"


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"[]",
        b"3",
        b"[" * 100_000,
        b'{"status": "unheard of"}',
        b'{"status": ["queued"]}',
        b'{"status": "queued", "queue_position": "first", "progress": {}, "audio_duration": true, "eta": 1e999}',
    ],
)
def test_junk_on_a_topic_stops_nothing(payload: bytes) -> None:
    board = Board("cesar")
    for topic in ("cesar/status/a", "cesar/consumer/a/state", "cesar/consumer/a/queue", "cesar/consumer/state", "x"):
        board.take(topic, payload)
    assert drawn(board, 80, 24)


def test_what_others_write_gives_the_terminal_no_orders() -> None:
    board = Board("cesar")
    board.take("cesar/status/a\x1b[2Jb", ended(1, result_text="red \x1b[31m \x9b2J text\nnext [bold]line"))
    board.take("cesar/consumer/c\x1b]0;t\x07/state", b'{"state": "online"}')
    board.take("cesar/consumer/c\x1b]0;t\x07/queue", b'{"activity": "\\u001b[2J", "job_id": "\\u001b[2J"}')
    text = "\n".join(drawn(board, 120, 24))
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "next [bold]line" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 10), (20, 5)])
def test_hundreds_of_jobs_fit_every_terminal(width: int, height: int) -> None:
    lines = drawn(busy(500), width, height)
    assert len(lines) <= max(height, 7)
    assert all(len(line) <= width for line in lines)


def test_the_screen_tells_of_progress_the_queue_and_what_is_not_shown() -> None:
    lines = drawn(busy(500), 80, 24)
    assert "21:45:12" in lines[0]
    assert lines[2].split() == ["cesar", "processing", "3", "1:15", "12", "1"]
    assert lines[5].split()[:2] == ["now", "processing"]
    assert " 42% " in lines[5]
    assert lines[5].split()[-3:] == ["1:00", "6.5x", "0:05"]
    assert lines[6].split() == ["waits-1", "queued", "1"]
    assert lines[9].startswith("done-495 ")
    assert lines[-1] == "482 more; of all: 1 processing, 3 queued, 496 completed"


def test_a_terminal_without_unicode_gets_a_bar_as_well() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, height=24)
    with console.capture() as capture:
        console.print(View(busy(5), "cesar", None, NOW))
    assert "###" in capture.get()
    assert "━" not in capture.get()


def test_a_lost_connection_is_the_first_line() -> None:
    assert drawn(busy(5), 80, 24, "Connection refused")[0].startswith("No connection: Connection refused; reconnecting")


def test_a_new_connection_replaces_what_was_known() -> None:
    screen = Screen("cesar", "mqtt://x")
    screen.take([delivery("cesar/status/deleted-meanwhile", status()), delivery("cesar/status/stays", status())])
    screen.take([delivery("cesar/status/stays", status(), connection=2)])
    assert [row.job_id for row in screen.board.jobs(10)] == ["stays"]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line[9:] for line in capsys.readouterr().out.splitlines()]


def test_without_a_terminal_there_is_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("cesar")
    lines.take(delivery("cesar/status/before", ended(1), retain=True))
    lines.take(delivery("cesar/consumer/cesar/state", b'{"state": "online"}', retain=True))
    lines.take(delivery("cesar/status/a", status("queued", queue_position=2)))
    lines.take(delivery("cesar/status/a", status("queued", queue_position=1)))
    lines.take(delivery("cesar/status/a", status("processing", progress=0.5, speed=6.5, eta=61.0)))
    lines.take(delivery("cesar/status/a", ended(2, result_text="Good morning.")))
    lines.take(delivery("cesar/status/a", ended(2, result_text="Good morning.")))
    lines.take(delivery("cesar/consumer/cesar/queue", b'{"activity": "idle", "queued": 0, "oldest_age": 1.0}'))
    lines.take(delivery("cesar/consumer/cesar/queue", b'{"activity": "idle", "queued": 0, "oldest_age": 2.0}'))
    lines.trouble("Connection refused")
    lines.trouble(None)
    lines.take(delivery("cesar/status/a", b""))
    assert said(capsys) == [
        "consumer cesar online",
        "job a queued",
        "job a processing 50% 6.5x 1:01 left",
        "job a completed Good morning.",
        "consumer cesar idle 0 queued",
        "no connection: Connection refused; reconnecting",
        "connected again",
        "job a deleted",
    ]


def test_a_program_gets_topics_and_payloads(capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines()
    lines.take(delivery("cesar/status/a", b'{"status": "queued"}'))
    lines.take(delivery("cesar/status/a", b""))
    lines.take(delivery("cesar/status/a", b"junk"))
    lines.trouble("gone")
    told = capsys.readouterr()
    assert [json.loads(line) for line in told.out.splitlines()] == [
        {"topic": "cesar/status/a", "payload": {"status": "queued"}},
        {"topic": "cesar/status/a", "payload": None},
    ]
    assert "gone" in told.err


def test_a_row_says_why_a_job_has_no_text() -> None:
    board = Board("cesar")
    failed = board.take("cesar/status/a", status("error", error_code="audio_empty", error_message="Nothing in it."))
    silent = board.take("cesar/status/b", status(no_speech=True, result_text=""))
    assert isinstance(failed, JobRow)
    assert isinstance(silent, JobRow)
    assert (failed.note, silent.note) == ("audio_empty: Nothing in it.", "(no speech)")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_what_has_no_room_goes_and_names_stay(width: int) -> None:
    board = Board("cesar")
    long_id = "9b810e76-6ec9-d286-63ca-828dd5f4b3b2"
    board.take("cesar/consumer/cesar/state", b'{"state": "online"}')
    board.take(f"cesar/status/{long_id}", status("processing", progress=0.42, eta=5.0, metadata={"file": "porch.wav"}))
    lines = drawn(board, width, 24)
    assert lines[5].startswith("porch.wav ")
    assert "42%" in lines[5]
    assert "processing" in lines[5]
    assert (long_id in lines[5], "SPEED" in lines[4], "ETA" in lines[4]) == (width > 80, width > 80, width > 40)
    assert ("CANCELLED" in lines[1]) == (width > 60)


def test_the_progress_of_the_diarization_follows_that_of_the_transcription() -> None:
    board = Board("cesar")
    heard = board.take("cesar/status/a", status("processing", progress=0.25))
    fields: dict[str, Any] = {"progress": 0.999, "diarization_progress": 0.5, "eta": 61.0}
    labelled = board.take("cesar/status/a", status("processing", **fields))
    assert isinstance(heard, JobRow)
    assert isinstance(labelled, JobRow)
    assert line_of(heard) == "job a processing 25%"
    assert line_of(labelled) == "job a processing 50% 1:01 left telling speakers apart"
    (line,) = [line for line in drawn(board, 100, 24) if line.startswith("a ")]
    assert " 50% telling speakers apart" in line
    board.take("cesar/status/a", status("processing", progress=0.5, diarization_progress="half"))
    assert board.jobs(1)[0].progress == 0.5


def test_the_priority_of_an_open_job_is_shown() -> None:
    board = Board("cesar")
    waits = board.take("cesar/status/a", status("queued", queue_position=1, priority=9, metadata={"file": "porch.wav"}))
    works = board.take("cesar/status/b", status("processing", priority=1))
    done = board.take("cesar/status/c", ended(1, result_text="Hello.", priority=9))
    junk = board.take("cesar/status/d", status("queued", priority="high"))
    rows = [row for row in (waits, works, done, junk) if isinstance(row, JobRow)]
    assert [row.note for row in rows] == ["priority 9", "priority 1", "Hello.", ""]
    assert line_of(rows[0]) == "job a queued porch.wav: priority 9"
    assert any(
        line.split()[:3] == ["porch.wav", "queued", "1"] and "priority 9" in line for line in drawn(board, 100, 24)
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"metadata": {"file": "porch.wav"}, "audio_source": "upload"}, "porch.wav"),
        ({"audio_source": "calls/porch.wav"}, "porch.wav"),
        ({"audio_source": "upload"}, ""),
        ({"metadata": {"file": ["x"]}, "audio_source": 3}, ""),
    ],
)
def test_the_name_of_the_recording_comes_first_and_the_id_last(fields: dict[str, Any], name: str) -> None:
    board = Board("cesar")
    row = board.take("cesar/status/a-job", ended(1, result_text="Hello.", **fields))
    assert isinstance(row, JobRow)
    assert (row.name, row.note) == (name, "Hello.")
    line = drawn(board, 80, 24)[4]
    assert line.split() == [name or "a-job", "completed", "Hello.", *(["21:00:01"]), *(["a-job"] if name else [])]
    assert line_of(row) == f"job a-job completed {name + ': ' if name else ''}Hello."


def test_queued_jobs_are_numbered_by_their_place_in_the_queue_of_their_consumer() -> None:
    """Only the first ten positions are kept up to date: `queued 10` was followed by `queued 25`."""
    board = Board("cesar")
    stale = [*range(1, 11), *range(25, 33)]
    for position in stale:
        board.take(f"cesar/status/job-{position}", status("queued", queue_position=position, consumer="cesar"))
    board.take("cesar/status/other", status("queued", queue_position=1, consumer="attic"))
    rows = board.jobs(30)
    assert [row.position for row in rows if row.consumer == "cesar"] == list(range(1, 19))
    assert [(row.job_id, row.position) for row in rows[:3]] == [("job-1", 1), ("other", 1), ("job-2", 2)]


def test_the_oldest_age_ticks_between_the_messages() -> None:
    now = [100.0]
    board = Board("cesar", clock=lambda: now[0])
    board.take("cesar/consumer/cesar/state", b'{"state": "online"}')
    board.take("cesar/consumer/cesar/queue", b'{"activity": "processing", "queued": 1, "oldest_age": 75.0}')
    assert "1:15" in drawn(board, 80, 24)[2]
    now[0] += 5
    assert "1:20" in drawn(board, 80, 24)[2]
    board.take("cesar/consumer/cesar/state", b'{"state": "offline"}')
    assert "1:15" in drawn(board, 80, 24)[2]


def test_a_rejection_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    board, lines = Board("cesar"), Lines("cesar")
    document = {
        "reason": "invalid_request",
        "detail": "langauge: there is no such field\x1b[2J",
        "topic": "cesar/jobs",
        "job_id": None,
        "received_at": "2026-01-23T21:45:00.000Z",
    }
    for _ in range(2):
        board.take("cesar/rejected", json.dumps(document).encode())
    board.take("cesar/rejected", b"junk")
    (line,) = [line for line in drawn(board, 120, 24) if "rejected" in line]
    assert "rejected (2 since the start): invalid_request: cesar/jobs: langauge: there is no such field" in line
    lines.take(delivery("cesar/rejected", json.dumps(document).encode()))
    assert said(capsys)[0].startswith("rejected invalid_request: cesar/jobs: langauge")


class Keys:
    """A screen with a running, three queued and some finished jobs, and what its keys ask for."""

    def __init__(self) -> None:
        self.screen = Screen("cesar", "mqtt://x")
        self.screen.board = busy(40)

    def press(self, *keys: str) -> list[tuple[str, str]]:
        commands = [self.screen.press(key) for key in keys]
        return [
            (topic.removeprefix("cesar/request/"), json.loads(asked)["job_id"])
            for topic, asked in filter(None, commands)
        ]

    def lines(self, height: int = 12) -> list[str]:
        console = Console(file=io.StringIO(), width=80, height=height, force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(self.screen.view(None, has_keys=True))
        return capture.get().splitlines()


def test_keys_select_a_job_scroll_and_change_it() -> None:
    keys = Keys()
    assert keys.lines()[-1] == "up/down select, c cancel, r retry, q quit"
    assert keys.press("\x1b[B", "j", "c", "\x1b[A", "c", "x") == [("cancel", "waits-2"), ("cancel", "waits-1")]
    assert keys.press("G", "r") == [("retry", "done-0")]
    lines = keys.lines()
    assert len(lines) <= 12
    assert any(line.startswith("done-0 ") for line in lines)
    assert not any(line.startswith("now ") for line in lines), "it has scrolled out"
    assert keys.press("k", "\x1b[5~", "\x1b[H", "k", "c") == [("cancel", "now")]
    assert any(line.startswith("now ") for line in keys.lines())


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"status": "ok", "data": {"job_id": "now", "status": "processing"}}, "Job now is processing."),
        ({"status": "error", "error": "There is no job now.\x1b[2J"}, "There is no job now."),
    ],
)
def test_the_response_to_a_key_is_shown_until_the_next_one(response: dict[str, Any], message: str) -> None:
    keys = Keys()
    command = keys.screen.press("c")
    assert command is not None
    transaction = json.loads(command[1])["transaction"]
    for other in (b"junk", json.dumps({**response, "transaction": "another"}).encode()):
        keys.screen.take([delivery("cesar/response/cancel", other)])
        assert keys.lines()[-1] == "cancel: now ..."
    keys.screen._connection = 1
    keys.screen.take([delivery("cesar/response/cancel", json.dumps({**response, "transaction": transaction}).encode())])
    assert keys.lines()[-1].startswith(message)
    keys.press("j")
    assert keys.lines()[-1].startswith("up/down")


def test_without_jobs_a_key_does_nothing() -> None:
    screen = Screen("cesar", "mqtt://x")
    assert [screen.press(key) for key in ("c", "G", "r", "\x1b[6~")] == [None] * 4
