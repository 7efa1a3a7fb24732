"""What the commands of the control topics print: consumers that are plain functions, no broker."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from rich.console import Console

from cesar_mqtt.cli import jobs as shell
from cesar_mqtt.cli import text as wording
from cesar_mqtt.cli.console import new_table, print_table
from cesar_mqtt.config import Settings, load_settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError

Ask = Callable[[str, Mapping[str, Any], str | None], dict[str, Any]]


@pytest.fixture
def settings() -> Settings:
    return load_settings(flags={}, config_file=None, environ={}, cwd=Path("/"))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let consumers answer with a function of command, fields and name."""

    def install(ask: Ask, online: Sequence[str] = ("cesar",)) -> None:
        class FakeRequester:
            def __init__(self, _settings: Settings, commands: Sequence[str], *, timeout_s: float) -> None:
                self._commands = commands
                self.online = list(online)
                assert timeout_s

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def targets(self, consumer: str | None) -> Sequence[str | None]:
                return [consumer] if consumer else online if len(online) > 1 else [None]

            def ask(
                self, command: str, fields: Mapping[str, Any] | None = None, *, consumer: str | None = None
            ) -> dict[str, Any]:
                assert command in self._commands, "its answers have to be subscribed to"
                return ask(command, fields or {}, consumer)

        monkeypatch.setattr(shell, "ControlClient", FakeRequester)

    return install


def job(number: int, **fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "job_id": f"job-{number}",
        "status": "completed",
        "created_at": f"2026-01-23T21:45:{number:02}.000Z",
        "queue_position": None,
        "audio_duration": 60.0,
        "model_size": "base",
        "audio_source": "a.wav",
        "error_code": None,
    }
    return {**plain, **fields}


def pages(jobs: list[dict[str, Any]], page: int = 3) -> Ask:
    def ask(_command: str, fields: Mapping[str, Any], _consumer: str | None) -> dict[str, Any]:
        begin = 0
        if fields["after"] is not None:
            begin = 1 + next(n for n, each in enumerate(jobs) if each["job_id"] == fields["after"])
        found = jobs[begin : begin + page]
        following = found[-1]["job_id"] if begin + page < len(jobs) else None
        return {"jobs": found, "next": following, "total": len(jobs), "consumer": "cesar"}

    return ask


def show(settings: Settings, job_id: str, *, result_format: str | None = None, as_json: bool = False) -> ExitCode:
    return shell.show(settings, job_id, result_format=result_format, consumer=None, as_json=as_json, timeout_s=1)


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [json.loads(line)["job_id"] for line in capsys.readouterr().out.splitlines()]


def test_the_newest_jobs_of_all_pages_come_first(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(pages([job(n) for n in range(8)]))
    shell.print_jobs(settings, status=None, limit=4, consumer=None, as_json=True, timeout_s=1)
    assert listed(capsys) == ["job-7", "job-6", "job-5", "job-4"]
    shell.print_jobs(settings, status=None, limit=0, consumer=None, as_json=True, timeout_s=1)
    assert len(listed(capsys)) == 8


def test_a_job_that_is_deleted_between_two_pages_does_not_end_the_list(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(n) for n in range(8)]
    refusals = ["There is no job job-2 to go on behind."]

    def ask(command: str, fields: Mapping[str, Any], consumer: str | None) -> dict[str, Any]:
        if fields["after"] is not None and refusals:
            raise RequestRefusedError(refusals.pop())
        return pages(jobs)(command, fields, consumer)

    answering(ask)
    shell.print_jobs(settings, status=None, limit=0, consumer=None, as_json=True, timeout_s=1)
    assert len(listed(capsys)) == 8


def test_the_jobs_of_several_consumers_are_merged(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    ledgers = {"attic": [job(1), job(3)], "cesar": [job(0), job(2)]}
    answering(
        lambda command, fields, consumer: pages(ledgers[str(consumer)])(command, fields, consumer),
        online=tuple(ledgers),
    )
    shell.print_jobs(settings, status=None, limit=3, consumer=None, as_json=True, timeout_s=1)
    assert listed(capsys) == ["job-3", "job-2", "job-1"]


def test_a_consumer_that_does_not_answer_hides_no_jobs_of_the_others(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(command: str, fields: Mapping[str, Any], consumer: str | None) -> dict[str, Any]:
        if consumer == "attic":
            raise NoAnswerError("attic is online but did not answer within 1 s.", "Wait longer.")
        return pages([job(0), job(2)])(command, fields, consumer)

    answering(ask, online=("attic", "cesar"))
    with pytest.raises(NoAnswerError, match="attic"):
        shell.print_jobs(settings, status=None, limit=3, consumer=None, as_json=True, timeout_s=1)
    assert listed(capsys) == ["job-2", "job-0"]


def test_a_job_that_waits_for_all_consumers_is_shown_once(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = job(4, status="queued", shared=True)
    ledgers = {"attic": [job(1), job(3), waiting], "cellar": [job(1, status="queued"), waiting]}

    def ask(command: str, fields: Mapping[str, Any], consumer: str | None) -> dict[str, Any]:
        return {**pages(ledgers[str(consumer)])(command, fields, consumer), "consumer": consumer}

    answering(ask, online=tuple(ledgers))
    shell.print_jobs(settings, status=None, limit=0, consumer=None, as_json=True, timeout_s=1)
    assert listed(capsys) == ["job-4", "job-3", "job-1", "job-1"]


def test_the_priority_of_an_open_job_is_shown_beside_its_state(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        job(1, priority=9),
        job(2, status="processing", priority=3),
        job(3, status="queued", queue_position=2),
        job(4, status="queued", queue_position=1, priority=5),
    ]
    answering(pages(jobs, page=4))
    shell.print_jobs(settings, status=None, limit=0, consumer=None, as_json=False, timeout_s=1)
    lines = capsys.readouterr().out.splitlines()[1:]
    shown = ("queued (1, priority 5)", "queued (2)", "processing (priority 3)", "completed")
    assert [state in line for state, line in zip(shown, lines, strict=True)] == [True] * 4
    assert "priority" not in lines[3]


def test_without_a_terminal_jobs_are_aligned_lines(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    failed = job(2, status="error", error_code="audio_empty", audio_source="a\x1b[2J.wav", audio_duration=None)
    answering(pages([job(1, job_id="a-longer-id"), failed, job(3, status="queued", queue_position=1)]))
    shell.print_jobs(settings, status=None, limit=2, consumer=None, as_json=False, timeout_s=1)
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.split()[0] for line in lines] == ["JOB", "job-3", "job-2"]
    assert len({line.index(word) for line, word in zip(lines, ("STATUS", "queued", "error"), strict=True)}) == 1
    assert "error (audio_empty)" in lines[2]
    assert "\x1b" not in told.out
    assert "2 of 3 jobs shown" in told.err


def test_a_long_transcript_is_fetched_in_pieces(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    text = b"A long transcript."

    def ask(command: str, fields: Mapping[str, Any], _consumer: str | None) -> dict[str, Any]:
        if command == "get":
            return {**job(1), "result_text": "A lo", "result_truncated": True}
        start = fields["offset"]
        piece = text[start : start + 7]
        return {"offset": start, "length": len(piece), "text": piece.decode(), "more": start + 7 < len(text)}

    answering(ask)
    assert show(settings, "job-1") is ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["", "A long transcript."]
    assert any(line.split() == ["audio_duration", "1:00"] for line in lines)
    assert not any(line.startswith("error_code") for line in lines), "what is not known is not shown"


class Ledger:
    """A consumer's jobs: knows exact ids only, as a consumer does."""

    def __init__(self, **jobs: str) -> None:
        self.jobs = {job_id.replace("_", "-"): status for job_id, status in jobs.items()}
        self.asked: list[tuple[str, str]] = []

    def ask(self, command: str, fields: Mapping[str, Any], _consumer: str | None) -> dict[str, Any]:
        if command == "list":
            wanted = [
                job(1, job_id=job_id, status=status)
                for job_id, status in self.jobs.items()
                if fields["status"] in (None, status)
            ]
            return pages(wanted, page=2)(command, fields, None)
        job_id = fields["job_id"]
        if job_id not in self.jobs:
            raise RequestRefusedError(f"There is no job {job_id}.")
        self.asked.append((command, job_id))
        if command == "result":
            return {"offset": 0, "length": 3, "text": f"{fields['format']} of {job_id}", "more": False}
        if self.jobs[job_id] == "processing" and command == "delete":
            raise RequestRefusedError(f"Job {job_id} is running.")
        return {"job_id": job_id, "status": "deleted" if command == "delete" else self.jobs[job_id]}


def change(settings: Settings, command: str, *job_ids: str, status: str | None = None) -> ExitCode:
    return shell.change(settings, command, job_ids, status=status, consumer=None, as_json=False, timeout_s=1)


@pytest.mark.parametrize("online", [("cesar",), ("attic", "cesar")])
def test_an_id_may_be_shortened_and_an_exact_one_wins(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str], online: tuple[str, ...]
) -> None:
    ledger = Ledger(porch="completed", porch_k7f3q="queued", garden_2="queued", garden_3="error")
    answering(ledger.ask, online)
    assert change(settings, "delete", "porch", "porch-") is ExitCode.OK
    assert ledger.asked == [("delete", "porch"), ("delete", "porch-k7f3q")]
    assert capsys.readouterr().out.splitlines()[1] == "Job porch-k7f3q is deleted."
    assert change(settings, "delete", "ga", "shed", "porch") is ExitCode.FAILED
    told = capsys.readouterr()
    assert told.out == "Job porch is deleted.\n", "the others are changed all the same"
    assert "2 job ids begin with ga: garden-2, garden-3." in told.err
    assert "There is no job shed." in told.err


def test_all_jobs_in_a_state_are_changed(
    settings: Settings, answering: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(a="completed", b="queued", c="completed", d="processing", e="completed")
    answering(ledger.ask)
    assert change(settings, "delete", status="completed") is ExitCode.OK
    assert [job_id for _, job_id in ledger.asked] == ["a", "c", "e"]
    assert change(settings, "delete", status="processing") is ExitCode.FAILED
    assert change(settings, "retry", status="error") is ExitCode.OK
    assert capsys.readouterr().err.splitlines() == ["cesar-mqtt: Job d is running.", "cesar-mqtt: No job is error."]


def test_one_result_is_printed_as_it_is(
    settings: Settings, answering: Callable[..., None], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    answering(Ledger(porch_k7f3q="completed").ask)
    assert show(settings, "porch", result_format="srt") is ExitCode.OK
    assert capsysbinary.readouterr() == (b"srt of porch-k7f3q", b"")


def test_a_shell_completes_ids_and_models(settings: Settings, answering: Callable[..., None]) -> None:
    answering(Ledger(porch_1="completed", garden="queued", porch_2="queued").ask)
    assert shell.job_ids_that_begin(settings, "po", timeout_s=1) == ["porch-2", "porch-1"]
    answering(lambda *_: {"models": [{"name": "tiny.en"}, {"name": "base"}]}, online=("attic", "cesar"))
    assert shell.model_names(settings, timeout_s=1) == ["base", "tiny.en"]


@pytest.mark.parametrize(
    ("measured", "code"),
    [
        ({"worker_alive": True, "network_alive": True}, 0),
        ({"worker_alive": False, "network_alive": True}, 1),
        ({"worker_alive": True, "network_alive": False}, 1),
        ({}, 1),
    ],
)
def test_health_is_good_only_if_worker_and_network_are_alive(
    settings: Settings, answering: Callable[..., None], measured: dict[str, bool], code: int
) -> None:
    answering(lambda *_: measured)
    assert shell.health(settings, consumer=None, as_json=False, timeout_s=1) == code


def test_one_ill_consumer_of_several_is_an_ill_answer(settings: Settings, answering: Callable[..., None]) -> None:
    answering(
        lambda _command, _fields, name: {"worker_alive": name == "cesar", "network_alive": True},
        online=("attic", "cesar"),
    )
    assert shell.health(settings, consumer=None, as_json=True, timeout_s=1) == 1
    assert shell.health(settings, consumer="cesar", as_json=True, timeout_s=1) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (90_061, "1 d 01:01"), (-5, "0:00")],
)
def test_durations_are_written_as_clocks_show_them(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (79e9, "79 GB"), (2e18, "2000000 TB")],
)
def test_sizes_have_a_unit(bytes_: float, text: str) -> None:
    assert wording.size(bytes_) == text


def test_wide_characters_are_counted_by_the_cells_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table(show_header=False)
    table.add_row("日本", "x")
    table.add_row("abcd", "y" * 300)
    print_table(table)
    assert capsys.readouterr().out.splitlines() == ["日本  x", "abcd  " + "y" * 300]


def test_times_that_are_none_are_left_out() -> None:
    assert [wording.local_time(text) for text in (None, "", "yesterday", 3)] == ["", "", "", ""]


IDS = tuple(f"9b810e76-6ec9-d286-63ca-828dd5f4b3b{n}" for n in range(3))


def drawn(found: list[dict[str, Any]], width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(shell._table(found, width))
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_an_id_is_never_cut_for_it_is_what_the_other_commands_need(width: int) -> None:
    failed = {"status": "error", "error_code": "audio_not_allowed"}
    found = [
        job(0, job_id=IDS[0], metadata={"file": "a" * 100}),
        job(1, job_id=IDS[1], **failed),
        job(2, job_id=IDS[2]),
    ]
    lines = drawn(found, width)
    assert all(len(line) <= width for line in lines)
    text = "".join(line.partition(" ")[0] if width > 36 else line for line in lines)
    assert all(job_id in text for job_id in IDS)


@pytest.mark.usefixtures("_clock_as_before")
def test_columns_are_shortened_and_dropped_before_they_are_squeezed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    found = [job(1, job_id=IDS[0], audio_source="upload", metadata={"file": "the long interview.wav"})]
    heads = {width: drawn(found, width)[0].split() for width in (120, 80, 60, 40)}
    assert heads[120] == ["JOB", "STATUS", "ACCEPTED", "LENGTH", "MODEL", "AUDIO"]
    assert heads[80] == ["JOB", "STATUS", "ACCEPTED", "UTC", "AUDIO"]
    assert heads[60] == ["JOB", "STATUS"]
    assert heads[40] == ["JOB"]
    assert "  2026-01-23 21:45:01 UTC  " in drawn(found, 120)[1]
    assert drawn(found, 120)[1].endswith("  the long interview.wav")
    assert re.search("  01-23 21:45   +the long interv[a-z]*…$", drawn(found, 80)[1])


@pytest.mark.usefixtures("_clock_as_before")
def test_times_are_shown_as_in_the_list_with_their_zone(
    settings: Settings,
    answering: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    answering(lambda *_: job(1))
    show(settings, "job-1")
    assert "2026-01-24 03:15:01 IST\n" in capsys.readouterr().out
    show(settings, "job-1", as_json=True)
    assert "2026-01-23T21:45:01.000Z" in capsys.readouterr().out


@pytest.fixture
def _clock_as_before() -> Iterator[None]:
    before = os.environ.get("TZ")
    yield
    os.environ.pop("TZ", None)
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()
