"""The command handlers on a real ledger: every command gets one response, and that is JSON."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cesar_mqtt.consumer.commands import RESPONSE_BYTES, CommandHandlers, CommandResponse
from cesar_mqtt.consumer.defaults import StoredDefaults
from cesar_mqtt.consumer.recent_rejections import RecentRejections
from cesar_mqtt.engines.messages import QueueUnavailableError
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, Job, JobState, NewJob, Result
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.protocol.commands import COMMANDS, MAX_RESULT_BYTES
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.formats import content_of, render
from cesar_mqtt.protocol.payloads import JobProgress, Rejection, status_of
from cesar_mqtt.whisper.catalogue import ModelEntry
from cesar_mqtt.whisper.model_store import StoreDescription
from tests import factories
from tests.unit.ledger.faults import FaultyDisk, failing

if TYPE_CHECKING:
    from cesar_mqtt.ledger.spool import Spool

RESULT = factories.result("Good morning. Goodbye.", audio_duration=60.0)
MODELS = StoreDescription(
    allowed=("base", "tiny.en"),
    default="tiny.en",
    default_language=None,
    loaded=None,
    device="cpu",
    compute_type="int8",
    cpu_threads=2,
    workers=2,
    models=(
        ModelEntry("base", None, None, None, multilingual=True, default=False, problem=None),
        ModelEntry("tiny.en", "package", Path("/secret/model"), 75_000_000, False, default=True, problem="damaged"),  # noqa: FBT003
    ),
)


class FakeModels:
    """Has two models, or a folder that cannot be read."""

    broken = False

    def __init__(self) -> None:
        self.model, self.language = MODELS.default, MODELS.default_language

    def describe(self) -> StoreDescription:
        if self.broken:
            raise PermissionError(13, "Permission denied", "/secret/folder")
        return replace(MODELS, default=self.model, default_language=self.language)

    def set_defaults(self, model: str | None, language: str | None) -> None:
        if model not in (None, *MODELS.allowed):
            raise ValueError(f"there is no model {model!r}: use one of base, tiny.en")
        self.model, self.language = model or MODELS.default, language or None


class FakeSpool:
    """Records which files are removed; the ledger must not need them any more."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.removed: list[list[str]] = []
        self.evicted: set[str] = set()

    def path(self, name: str) -> Path:
        return Path(__file__) if name not in self.evicted else Path("/missing")

    def remove(self, names: list[str]) -> None:
        assert not self._ledger.needed_spool_files() & set(names), "the deletion is on disk before the files go"
        self.removed.append(names)


class FakeWaiting:
    """The jobs of a queue that consumers share, unless its server is away."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.works = True

    def count(self) -> int:
        if not self.works:
            raise QueueUnavailableError("The queue's server is out of reach.")
        return len(self.names)

    def jobs(self, after: str | None, limit: int) -> list[Job] | None:
        if after is not None and after not in self.names:
            return None
        first = 0 if after is None else self.names.index(after) + 1
        return [factories.job(name, seq=0, state=JobState.QUEUED) for name in self.names[first : first + limit]]


class Bench:
    """Command handlers over a real ledger, and what they reported."""

    def __init__(self, path: Path, *, grouped: bool = False, waiting: "FakeWaiting | None" = None) -> None:
        self.path = path
        self.disk = FaultyDisk()
        self.ledger = Ledger(path, clock=lambda: 1_700_000_000.0, disk=self.disk)
        self.models = FakeModels()
        self.rejections = RecentRejections()
        self.republished = 0
        self.health: dict[str, Any] = {"uptime": 12.5, "worker_alive": True}
        self.cancelled: list[str] = []
        self.progress: dict[str, JobProgress] = {}
        self.spool = FakeSpool(self.ledger)
        self.handlers = CommandHandlers(
            self.ledger,
            spool=cast("Spool", self.spool),
            models=self.models,
            consumer="porch",
            on_cancelled=lambda job: self.cancelled.append(job.job_id),
            progress_of=lambda job: self.progress.get(job.job_id),
            health=lambda: self.health,
            rejections=self.rejections,
            defaults=StoredDefaults(self.ledger, self.models),
            on_defaults_set=self._count,
            waiting=waiting,
            grouped=grouped,
        )

    def _count(self) -> None:
        self.republished += 1

    def answer(self, command: str, request: Any = b"") -> CommandResponse:
        payload = request if isinstance(request, bytes) else json.dumps(request).encode()
        answer = self.handlers.handle(command, payload)
        assert answer is not None, "there was no response"
        return answer

    def is_ignored(self, command: str, request: Any = b"") -> bool:
        payload = request if isinstance(request, bytes) else json.dumps(request).encode()
        return self.handlers.handle(command, payload) is None

    def ask(self, command: str, request: Any = b"") -> dict[str, Any]:
        answer = self.answer(command, request)
        response: dict[str, Any] = json.loads(answer.payload, parse_constant=pytest.fail)
        assert response.keys() == {"status", "data", "error", "transaction"}
        assert (response["status"] == "ok") == (response["error"] is None)
        assert (answer.rejection is not None) == (command not in COMMANDS)
        return response

    def ok(self, command: str, request: Any = b"") -> dict[str, Any]:
        response = self.ask(command, request)
        assert response["status"] == "ok", response
        data: dict[str, Any] = response["data"]
        return data

    def error(self, command: str, request: Any = b"") -> str:
        response = self.ask(command, request)
        assert response["status"] == "error", response
        assert response["data"] == {"consumer": "porch"}, "in a group, others may respond as well"
        problem: str = response["error"]
        assert problem[-1] in ".!", problem
        assert str(self.path.parent) not in problem
        return problem

    def submit(self, *names: str, kind: str = "path", **fields: Any) -> None:
        self.ledger.append([factories.new_job(name, f"{name}.wav", kind=kind, **fields) for name in names])

    def claim(self) -> Job:
        job = self.ledger.claim()
        assert job is not None
        return job

    def state(self, name: str) -> JobState:
        job = self.ledger.get(name)
        assert job is not None
        return job.state


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "ledger.json")
    yield made
    made.disk.heal()
    made.ledger.close()


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Bench]:
    """One of several consumers that share their jobs."""
    made = Bench(tmp_path / "member.json", grouped=True)
    yield made
    made.ledger.close()


# -- one job ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"a", b" a\n", b"a\r\n", b'{"job_id": "a"}', b'\xef\xbb\xbf{"job_id":"a"}'])
def test_a_queued_job_is_cancelled_at_once_however_it_is_named(bench: Bench, payload: bytes) -> None:
    bench.submit("a")
    assert bench.ok("cancel", payload) == {"job_id": "a", "status": "cancelled", "consumer": "porch"}
    assert bench.state("a") is JobState.CANCELLED
    assert bench.ok("cancel", payload) == {"job_id": "a", "status": "cancelled", "consumer": "porch"}, (
        "a second cancel is no mistake"
    )


def test_the_running_job_is_cancelled_by_its_id_or_as_current(bench: Bench) -> None:
    bench.submit("a", "b")
    job = bench.claim()
    assert not bench.ledger.is_cancelling(job.seq)
    for name in (b"current", b"a", b'{"job_id": "current"}'):
        assert bench.ok("cancel", name) == {"job_id": "a", "status": "processing", "consumer": "porch"}
    assert bench.ledger.is_cancelling(job.seq)
    bench.ledger.finish_cancelling(job.seq)
    assert bench.error("cancel", b"current") == "No job is running: name one by its id."
    assert bench.state("b") is JobState.QUEUED


def test_current_is_the_running_job_for_every_command_that_names_one(bench: Bench) -> None:
    bench.submit("a")
    for command in ("cancel", "retry", "delete", "get", "result"):
        assert "No job is running" in bench.error(command, b"current")
    bench.claim()
    assert bench.ok("get", b"current")["job_id"] == "a"
    assert bench.error("delete", b"current") == "Job a is processing: cancel it first."
    assert bench.error("retry", b"current").startswith("Job a is processing:")
    assert bench.error("result", b"current") == "Job a is processing: only a completed one has a result."


def test_a_final_job_cannot_be_cancelled(bench: Bench) -> None:
    bench.submit("a", "b")
    bench.ledger.complete(bench.claim().seq, RESULT)
    bench.ledger.fail(bench.claim().seq, ErrorCode.TIMEOUT, "Too slow.")
    assert bench.error("cancel", b"a") == "Job a has already ended as completed and cannot be cancelled."
    assert bench.error("cancel", b"b") == "Job b has already ended as error and cannot be cancelled."


def test_a_failed_job_is_retried_and_a_queued_one_is_not(bench: Bench) -> None:
    bench.submit("a")
    bench.ledger.fail(bench.claim().seq, ErrorCode.TIMEOUT, "Too slow.")
    assert bench.ok("retry", b"a") == {"job_id": "a", "status": "queued", "consumer": "porch"}
    problem = "Job a is queued: only a job that ended as error or cancelled can be retried."
    assert bench.error("retry", b"a") == problem


def test_a_retry_of_a_job_whose_upload_was_removed_says_so(bench: Bench) -> None:
    bench.submit("a", "b", kind="spool")
    bench.ledger.fail(bench.claim().seq, ErrorCode.TIMEOUT, "Too slow.")
    bench.ledger.cancel("b")
    bench.spool.evicted = {"a.wav"}
    problem = bench.error("retry", b"a")
    assert problem.startswith("The recording that came with job a was removed to make room for newer ones")
    assert bench.state("a") is JobState.ERROR
    assert bench.ok("retry", b"b")["status"] == "queued"
    bench.ledger.complete(bench.claim().seq, RESULT)
    bench.spool.evicted.add("b.wav")
    assert bench.error("retry", b"b").startswith("Job b is completed:")


def test_a_deleted_job_is_removed_with_its_audio(bench: Bench) -> None:
    bench.submit("a", kind="spool")
    bench.submit("b")
    assert bench.ok("delete", b"a") == {"job_id": "a", "status": "deleted", "consumer": "porch"}
    assert bench.ok("delete", {"job_id": "b"}) == {"job_id": "b", "status": "deleted", "consumer": "porch"}
    assert bench.spool.removed == [["a.wav"], []]
    assert bench.error("delete", b"a") == "There is no job a: it never existed, or it was deleted."
    assert bench.spool.removed[2:] == []


@pytest.mark.parametrize("command", ["cancel", "retry", "delete", "get", "result"])
def test_an_unknown_job_is_named_in_the_error(bench: Bench, command: str) -> None:
    assert bench.error(command, b"ghost") == "There is no job ghost: it never existed, or it was deleted."


def test_get_is_the_status_as_it_is_published(bench: Bench) -> None:
    bench.submit("a", metadata={"room": ["hall", 1.5]}, formats=("srt",))
    bench.ledger.complete(bench.claim().seq, RESULT)
    job = bench.ledger.get("a")
    assert job is not None
    data = bench.ok("get", b"a")
    assert data == status_of(job, "porch")
    assert (data["result_text"], data["consumer"], data["metadata"]) == (
        RESULT.text,
        "porch",
        {"room": ["hall", 1.5]},
    )


def test_the_status_of_a_long_job_is_truncated_as_on_a_broker_with_limits(bench: Bench) -> None:
    bench.submit("a")
    bench.ledger.complete(bench.claim().seq, replace(RESULT, text='é"' * 100_000))
    answer = bench.answer("get", b"a").payload
    data = json.loads(answer)["data"]
    assert data["result_truncated"]
    assert len(data["result_text"]) > 50_000
    assert len(answer) < RESPONSE_BYTES + 1000


# -- results ------------------------------------------------------------------------------------------------------


def complete(bench: Bench, name: str, text: str, asked: tuple[str, ...] = ()) -> None:
    """Complete a job with this text, a problem a segment."""
    bench.submit(name, formats=asked)
    parts = [f"{part}." for part in text.split(".") if part]
    segments = (factories.segment(n, part.strip()) for n, part in enumerate(parts, start=1))
    window = factories.window(0, *segments, text=text, until_s=60.0)
    bench.ledger.complete(bench.claim().seq, replace(RESULT, text=text, windows=(window,)))


def test_txt_is_always_available_and_formats_with_times_only_if_the_request_had_one(bench: Bench) -> None:
    complete(bench, "a", "Good morning. Goodbye.")
    text = "Good morning. Goodbye.\n"
    page = {"format": "txt", "offset": 0, "length": 23, "total": 23, "text": text, "more": False}
    assert bench.ok("result", b"a") == {"job_id": "a", **page, "consumer": "porch"}
    for name in ("srt", "vtt", "tsv", "json"):
        problem = bench.error("result", {"job_id": "a", "format": name})
        assert problem.startswith(
            f"There is no {name} of job a: without `formats` in the request the times were not stored"
        )
        assert problem.endswith("Ask for txt, or submit it again with `formats`.")


@pytest.mark.parametrize("name", FORMATS)
def test_a_job_that_asked_for_a_format_with_times_has_every_format(bench: Bench, name: str) -> None:
    complete(bench, "a", "Good morning. Goodbye.", ("srt",))
    job = bench.ledger.get("a")
    assert job is not None
    segments = [segment for window in bench.ledger.windows(job.seq) for segment in window.segments]
    expected, _ = render(name, content_of(job, segments))
    data = bench.ok("result", {"job_id": "a", "format": name})
    assert data["text"].encode() == expected, "byte for byte what is retained as the result"
    assert (data["total"], data["length"], data["more"]) == (len(expected), len(expected), False)


def test_silence_has_a_result_in_each_requested_format(bench: Bench) -> None:
    bench.submit("a", formats=("vtt",))
    bench.ledger.complete(bench.claim().seq, Result("", 1.0, None, None, no_speech=True))
    assert bench.ok("result", {"job_id": "a", "format": "vtt"})["text"] == "WEBVTT\n\n"
    assert bench.ok("result", b"a")["text"] == "\n"


def pages(bench: Bench, length: int | None, name: str = "txt") -> list[dict[str, Any]]:
    """Get a whole result, page by page."""
    asked = {"job_id": "a", "format": name, **({} if length is None else {"length": length})}
    got = [bench.ok("result", asked)]
    while got[-1]["more"]:
        got.append(bench.ok("result", {**asked, "offset": got[-1]["offset"] + got[-1]["length"]}))
    return got


@given(text=st.text(st.sampled_from('aé€😀"\\'), min_size=1, max_size=60), length=st.integers(4, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_the_pages_of_a_result_are_text_and_make_the_whole(bench: Bench, text: str, length: int) -> None:
    complete(bench, "a", text)
    try:
        whole = (text + "\n").encode()
        got = pages(bench, length)
        assert "".join(page["text"] for page in got).encode() == whole
        assert all(0 < page["length"] == len(page["text"].encode()) <= length for page in got)
        assert {page["total"] for page in got} == {len(whole)}
    finally:
        bench.ledger.delete("a")


@pytest.mark.parametrize("text", ["x" * 300_000, '"' * 300_000, "\x7f" * 300_000, "😀" * 80_000])
def test_no_page_of_a_long_result_is_too_large_for_any_broker(bench: Bench, text: str) -> None:
    complete(bench, "a", text, ("json",))
    for name in ("txt", "json"):
        whole = ""
        offset, more = 0, True
        while more:
            answer = bench.answer("result", {"job_id": "a", "format": name, "offset": offset})
            assert len(answer.payload) <= RESPONSE_BYTES
            data = json.loads(answer.payload)["data"]
            assert data["length"] > 10_000 or not data["more"]
            whole, offset, more = whole + data["text"], offset + data["length"], data["more"]
        assert len(whole.encode()) == offset == data["total"]
    assert json.loads(whole)["text"] == text


def test_an_offset_inside_of_a_character_fails_and_one_behind_the_end_is_empty(bench: Bench) -> None:
    complete(bench, "a", "é")
    problem = "offset 1 is inside of a character: send the offset + length of the previous response."
    assert bench.error("result", {"job_id": "a", "offset": 1}) == problem
    for offset in (3, 4, 2**53):
        data = bench.ok("result", {"job_id": "a", "offset": offset})
        assert (data["text"], data["length"], data["total"], data["more"]) == ("", 0, 3, False)


# -- lists --------------------------------------------------------------------------------------------------------


def test_a_list_is_oldest_first_and_continues_where_it_ended(bench: Bench) -> None:
    bench.submit(*(f"job-{number}" for number in range(5)))
    first = bench.ok("list", {"limit": 2})
    assert [job["job_id"] for job in first["jobs"]] == ["job-0", "job-1"]
    assert (first["next"], first["total"]) == ("job-1", 5)
    second = bench.ok("list", {"limit": 2, "after": "job-1"})
    assert ([job["job_id"] for job in second["jobs"]], second["next"]) == (["job-2", "job-3"], "job-3")
    last = bench.ok("list", {"limit": 2, "after": "job-3"})
    assert ([job["job_id"] for job in last["jobs"]], last["next"], last["total"]) == (["job-4"], None, 5)
    assert bench.ok("list", {"limit": 1, "after": "job-4"}) == {
        "jobs": [],
        "next": None,
        "total": 5,
        "consumer": "porch",
    }
    assert bench.ok("list", {"limit": 5})["next"] is None


def test_a_list_ends_with_the_jobs_that_wait_for_all_consumers(tmp_path: Path) -> None:
    waiting = FakeWaiting("w-0", "w-1", "w-2")
    bench = Bench(tmp_path / "ledger.json", waiting=waiting)
    bench.submit("own-0", "own-1", "own-2")
    seen, after = [], None
    for _ in range(4):
        page = bench.ok("list", {"limit": 2, "after": after})
        seen += [(job["job_id"], job.get("shared", False)) for job in page["jobs"]]
        assert page["total"] == 6
        after = page["next"]
        if after is None:
            break
    assert seen == [(f"own-{n}", False) for n in range(3)] + [(f"w-{n}", True) for n in range(3)]
    assert [job["job_id"] for job in bench.ok("list", {"limit": 3, "after": "own-2"})["jobs"]] == ["w-0", "w-1", "w-2"]
    assert bench.ok("list", {"status": "completed"})["jobs"] == []
    assert "Unknown job id" in bench.error("list", {"after": "unknown"})
    waiting.works = False
    assert "out of reach" in bench.error("list", {"status": "queued"})
    assert bench.ok("list", {"status": "completed"})["total"] == 0
    bench.ledger.close()


def test_a_list_has_the_fields_of_the_status_for_each_job(bench: Bench) -> None:
    bench.submit("a")
    bench.ledger.append([factories.new_job("b", "http://user:key@host/x.wav?token=1", kind="url")])
    (a, b) = bench.ok("list")["jobs"]
    status = bench.ok("get", b"a")
    assert a == {name: status[name] for name in a}
    assert (a["status"], a["queue_position"], a["audio_source"]) == ("queued", 1, "a.wav")
    assert b["audio_source"] == "http://host/x.wav"


def test_a_list_can_be_filtered_by_status(bench: Bench) -> None:
    bench.submit("a", "b", "c")
    bench.ledger.cancel("b")
    bench.claim()
    for status, name in (("queued", "c"), ("cancelled", "b"), ("processing", "a")):
        listed = bench.ok("list", {"status": status})
        assert ([job["job_id"] for job in listed["jobs"]], listed["total"]) == ([name], 1)
    assert bench.ok("list", {"status": "error"}) == {"jobs": [], "next": None, "total": 0, "consumer": "porch"}
    assert len(bench.ok("list", {"status": None, "after": None})["jobs"]) == 3


def test_a_list_of_a_thousand_jobs_has_pages_that_every_broker_takes(bench: Bench) -> None:
    path = AudioSource("path", "\x01" * 4096)
    bench.ledger.append([NewJob(f"{n:064d}", "x", path, "m" * 200) for n in range(300)])
    names: list[str] = []
    after: str | None = None
    while True:
        answer = bench.answer("list", {"limit": 1000, "after": after})
        assert len(answer.payload) < RESPONSE_BYTES + 1000
        data = json.loads(answer.payload)["data"]
        names += [job["job_id"] for job in data["jobs"]]
        assert all(len(job["audio_source"]) == 200 for job in data["jobs"])
        after = data["next"]
        if after is None:
            break
    assert names == [f"{n:064d}" for n in range(300)]


def test_a_list_cannot_continue_behind_a_deleted_job(bench: Bench) -> None:
    bench.submit("a", "b")
    bench.ledger.delete("a")
    for name in ("a", "ghost"):
        assert bench.error("list", {"after": name}) == (
            f"Unknown job id in `after`: {name}. It may have been deleted; start without `after`."
        )


# -- the consumer -------------------------------------------------------------------------------------------------


# -- rejections, retry_last, cancel_all, set -----------------------------------------------------------------------


def rejection(number: int, excerpt: str = "") -> Rejection:
    return Rejection(
        reason="invalid_request",
        detail=f"Mistake {number}.",
        topic="cesar/jobs",
        job_id=None,
        payload_excerpt=excerpt,
        received_at="2026-01-23T21:45:00.000Z",
    )


def test_the_newest_rejections_are_returned_newest_first_and_no_more_than_a_hundred_are_kept(bench: Bench) -> None:
    assert bench.ok("rejected") == {"rejected": [], "total": 0, "consumer": "porch"}
    for number in range(130):
        bench.ledger.count_rejected()
        bench.rejections.add(rejection(number))
    data = bench.ok("rejected")
    assert [one["detail"] for one in data["rejected"]] == [f"Mistake {number}." for number in range(129, 29, -1)]
    assert data["total"] == 130
    assert data["rejected"][0] == rejection(129).model_dump()
    assert [one["detail"] for one in bench.ok("rejected", {"limit": 2})["rejected"]] == ["Mistake 129.", "Mistake 128."]


def test_rejections_with_much_to_show_fit_into_the_packets_of_every_broker(bench: Bench) -> None:
    for number in range(100):
        bench.rejections.add(rejection(number, "\x01" * 2000))
    answer = bench.answer("rejected").payload
    assert len(answer) < RESPONSE_BYTES + 1000
    assert 5 < len(json.loads(answer)["data"]["rejected"]) < 100


def test_the_job_that_failed_last_is_retried_and_then_the_one_before(bench: Bench) -> None:
    assert bench.error("retry_last") == "No job that can be retried has ended as error or cancelled."
    bench.submit("a", "b", "c", "d")
    bench.ledger.fail(bench.claim().seq, ErrorCode.AUDIO_NOT_FOUND, "There is none.")
    bench.ledger.fail(bench.claim().seq, ErrorCode.INTERNAL, "Unexpected.")
    bench.ledger.complete(bench.claim().seq, RESULT)
    bench.ledger.append([factories.new_job("wrong", failure="No such field.")])
    assert bench.ok("retry_last") == {"job_id": "b", "status": "queued", "consumer": "porch"}
    bench.ok("cancel", b"d")
    assert bench.ok("retry_last")["job_id"] == "d"
    assert bench.ok("retry_last")["job_id"] == "a"
    assert bench.state("wrong") is JobState.ERROR
    bench.error("retry_last")


def test_an_upload_that_was_not_kept_is_not_the_one_to_retry(bench: Bench) -> None:
    bench.submit("a", "b", kind="spool")
    bench.ledger.fail(bench.claim().seq, ErrorCode.INTERNAL, "Unexpected.")
    bench.ledger.fail(bench.claim().seq, ErrorCode.AUDIO_UNREADABLE, "It cannot be decoded.")
    assert bench.ok("retry_last")["job_id"] == "a"


def test_all_jobs_are_cancelled_and_later_ones_are_not(bench: Bench) -> None:
    bench.submit("a", "b", "c", "d")
    bench.ledger.complete(bench.claim().seq, RESULT)
    running = bench.claim()
    assert bench.ok("cancel_all") == {"cancelled": 2, "processing": "b", "consumer": "porch"}
    assert bench.cancelled == ["c", "d"]
    assert bench.ledger.is_cancelling(running.seq)
    assert [bench.state(name).value for name in "abcd"] == ["completed", "processing", "cancelled", "cancelled"]
    assert (bench.ledger.totals().queued, bench.ledger.totals().cancelled_total) == (0, 2)
    bench.ledger.finish_cancelling(running.seq)
    bench.submit("e")
    assert bench.claim().job_id == "e"
    assert {job.job_id for _, job in bench.ledger.unpublished(100)} >= {"c", "d"}, "their statuses are published"


def test_more_jobs_than_one_transaction_holds_are_cancelled(bench: Bench) -> None:
    bench.submit(*(f"job-{number}" for number in range(2100)))
    bench.disk.calls.clear()
    assert bench.ok("cancel_all") == {"cancelled": 2100, "processing": None, "consumer": "porch"}
    assert len([call for call in bench.disk.calls if call.startswith("sync")]) <= 4
    assert bench.ok("cancel_all")["cancelled"] == 0


def test_cancelled_jobs_stay_cancelled_over_a_restart(bench: Bench) -> None:
    bench.submit("a", "b")
    bench.ledger.preempt(bench.claim().seq)
    bench.ok("cancel_all")
    bench.ledger.close()
    again = Bench(bench.path)
    assert [again.state(name) for name in "ab"] == [JobState.CANCELLED] * 2
    assert again.ledger.totals().cancelled_total == 2
    assert again.ledger.claim() is None
    again.ledger.close()


def test_defaults_are_set_alone_or_together_and_last_over_restarts(bench: Bench) -> None:
    assert bench.ok("set", {"default_language": "German"}) == {
        "default_model": "tiny.en",
        "default_language": "de",
        "consumer": "porch",
    }
    assert bench.ok("set", {"default_model": "base"})["default_language"] == "de"
    assert bench.republished == 2
    assert (bench.ok("models")["default"], bench.ok("models")["default_language"]) == ("base", "de")
    bench.ledger.close()
    again = Bench(bench.path)
    assert (again.models.model, again.models.language) == ("base", "de")
    assert again.ok("set")["default_language"] == "de"
    assert again.ok("set", {"default_model": "auto", "default_language": "auto"}) == {
        "default_model": "tiny.en",
        "default_language": None,
        "consumer": "porch",
    }
    again.ledger.close()


@pytest.mark.parametrize(
    ("request_fields", "problem"),
    [
        ({"default_model": "bas"}, "Nothing was set: there is no model 'bas': use one of base, tiny.en."),
        (
            {"default_language": "klingon"},
            "default_language 'klingon' is not a language that Whisper knows: use a code such as 'de', or 'auto'.",
        ),
        ({"model": "base"}, "There is no field 'model'."),
        ({"default_model": 7}, "default_model must be the name of a model, or 'auto', not 7."),
    ],
)
def test_defaults_that_cannot_be_set_change_nothing(bench: Bench, request_fields: dict[str, Any], problem: str) -> None:
    assert bench.error("set", request_fields) == problem
    assert (bench.models.model, bench.republished) == ("tiny.en", 0)
    assert bench.ledger.defaults == {}


def test_defaults_that_the_disk_refuses_are_not_in_force(bench: Bench) -> None:
    bench.disk.fault = failing(times=100)
    bench.error("set", {"default_model": "base"})
    assert bench.models.model == "tiny.en"


def test_stored_defaults_that_the_settings_no_longer_allow_are_ignored_with_a_warning(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.ledger.set_defaults({"model": "gone"})
    StoredDefaults(bench.ledger, bench.models)
    assert bench.models.model == "tiny.en"
    assert "there is no model 'gone'" in caplog.text


def test_the_queue_is_paused_and_resumed(bench: Bench) -> None:
    for _ in range(2):
        assert bench.ok("pause") == {"paused": True, "consumer": "porch"}
        assert bench.ledger.totals().paused
    for _ in range(2):
        assert bench.ok("resume", b"{}") == {"paused": False, "consumer": "porch"}
        assert not bench.ledger.totals().paused


def test_health_returns_the_measurements(bench: Bench) -> None:
    assert bench.ok("health") == {"uptime": 12.5, "worker_alive": True, "consumer": "porch"}


def test_models_are_described_without_their_paths(bench: Bench) -> None:
    fields = bench.ok("models")
    assert (fields["default"], fields["loaded"], fields["device"]) == ("tiny.en", None, "cpu")
    assert (fields["compute_type"], fields["cpu_threads"]) == ("int8", 2)
    base = {"name": "base", "origin": None, "size_bytes": None, "multilingual": True, "default": False}
    tiny = {"name": "tiny.en", "origin": "package", "size_bytes": 75_000_000, "multilingual": False, "default": True}
    assert fields["models"] == [{**base, "problem": None}, {**tiny, "problem": "damaged"}]


# -- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "cancle", "list/all", "Cancel", "x" * 1000, "\udcff\n", "current"])
def test_an_unknown_command_gets_an_error_and_is_rejected(bench: Bench, command: str) -> None:
    answer = bench.answer(command, {"job_id": "a", "transaction": 7})
    response = json.loads(answer.payload)
    assert response["error"].startswith("There is no command ")
    assert response["error"].endswith(f": use one of {', '.join(COMMANDS)}.")
    assert (response["status"], response["transaction"]) == ("error", 7)
    assert answer.rejection is not None
    assert (answer.rejection.reason, answer.rejection.detail) == ("unknown_command", response["error"])
    assert len(response["error"]) < 200
    assert json.loads(bench.answer(command, b"\xff").payload)["transaction"] is None


@pytest.mark.parametrize(
    ("command", "payload", "problem"),  # the mistakes themselves: tests/unit/protocol/test_parsing.py
    [
        ("cancel", {"job_id": "a", "reason": "x"}, "There is no field 'reason'."),
        ("get", b"a\nb", "The payload is neither a JSON object nor one line of text with a job's id."),
        ("result", {"job_id": "a", "length": 3}, f"length must be a whole number from 4 to {MAX_RESULT_BYTES}, not 3."),
    ],
)
def test_an_invalid_command_gets_its_mistakes_and_changes_nothing(
    bench: Bench, command: str, payload: Any, problem: str
) -> None:
    bench.submit("a")
    assert bench.error(command, payload) == problem
    assert bench.state("a") is JobState.QUEUED


@pytest.mark.parametrize("given", [{"transaction": "x" * 5000}, b'{"transaction": {"a": 1e999}}'])
def test_a_transaction_that_cannot_be_echoed_is_echoed_as_null(bench: Bench, given: Any) -> None:
    for command in ("pause", "dance"):
        response = bench.ask(command, given)
        assert (response["status"], response["transaction"]) == ("error", None)
    assert not bench.ledger.totals().paused


@pytest.mark.parametrize(
    "transaction",
    ["ü" * 2047, "", 0, -7, 1.5, 10**200, True, False, None, [], {}, [1, "a", None], {"id": {"n": [1.5, "ü"]}}],
)
def test_the_transaction_is_echoed_in_every_response(bench: Bench, transaction: Any) -> None:
    bench.submit("a")
    for command, payload in (
        ("get", {"job_id": "a"}),
        ("get", {"job_id": "ghost"}),
        ("get", {"job_id": 5}),
        ("get", {"unknown": 5}),
        ("pause", {"job_id": "a"}),
        ("pause", {}),
        ("nonsense", {}),
    ):
        echoed = bench.ask(command, {**payload, "transaction": transaction})["transaction"]
        assert (echoed, type(echoed)) == (transaction, type(transaction))


@pytest.mark.parametrize("command", ["cancel", "retry", "delete", "pause", "resume", "cancel_all"])
def test_a_disk_that_refuses_is_an_error_that_names_no_path_and_changes_nothing(bench: Bench, command: str) -> None:
    bench.submit("a", "b")
    if command == "retry":
        bench.ledger.cancel("a")
    if command == "resume":
        bench.ledger.pause(on=True)
    before = [bench.ledger.jobs(), bench.ledger.totals()]
    bench.disk.fault = failing(times=float("inf"))
    payload = (
        {"transaction": "x"} if command in {"pause", "resume", "cancel_all"} else {"job_id": "a", "transaction": "x"}
    )
    assert bench.ask(command, payload)["transaction"] == "x"
    problem = "The consumer's disk refuses to write, so nothing was changed. See its log, then try again."
    assert bench.error(command, payload) == problem
    assert [bench.ledger.jobs(), bench.ledger.totals()] == before
    assert bench.spool.removed == []
    bench.disk.heal()
    bench.ok(command, payload)


def test_what_cannot_be_read_or_serialised_is_an_error_that_names_no_path(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.models.broken = True
    assert bench.error("models") == "The consumer cannot read the files that this needs. See its log, then try again."
    bench.health = {"uptime": float("nan")}
    assert bench.error("health") == "The response cannot be serialised; see the consumer's log."
    assert "The response to health cannot be serialised" in caplog.text


def test_changes_are_logged_with_the_job_and_queries_are_not(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.submit("a")
    with caplog.at_level("INFO"):
        for command in ("get", "cancel", "delete"):
            bench.ok(command, b"a")
        for command in ("pause", "list", "health"):
            bench.ok(command)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["Job cancelled by command", "Job deleted by command", "Queue paused by command"]


def test_the_cancel_of_a_running_job_is_logged_as_what_it_is(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.submit("a")
    bench.claim()
    with caplog.at_level("INFO"):
        bench.ok("cancel", b"current")
    (record,) = caplog.records
    assert record.getMessage() == "Cancelling the running job"
    assert (record.__dict__["action"], record.__dict__["job_id"]) == ("cancel", "a")


# -- any command --------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "current", "ghost"])
scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=20) | names
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=5
)
fields = st.sampled_from(["job_id", "status", "limit", "after", "format", "offset", "length", "transaction", "x"])
objects = st.dictionaries(fields, values | scalars, max_size=5)
payloads = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(lambda text: text.encode(errors="surrogatepass")),
    names.map(str.encode),
    objects.map(lambda document: json.dumps(document).encode()),
    st.integers(1, 3000).map(lambda depth: b'{"job_id":' * depth),
)


@given(requests=st.lists(st.tuples(st.sampled_from([*COMMANDS, "x"]) | st.text(max_size=9), payloads), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_any_command_gets_one_response_and_it_is_json(bench: Bench, requests: list[tuple[str, bytes]]) -> None:
    bench.submit(*"abc")
    bench.ledger.claim()
    for command, payload in requests:
        response = bench.ask(command, payload)
        assert isinstance(response["data"], dict)
        assert len(json.dumps(response)) < RESPONSE_BYTES
        try:
            document = json.loads(payload)
        except (ValueError, RecursionError):
            continue
        transaction = document.get("transaction") if isinstance(document, dict) else None
        assert response["transaction"] in (transaction, None)
    for seq in bench.ledger.processing():
        bench.ledger.requeue(seq)
    for job in bench.ledger.jobs():
        bench.ledger.delete(job.job_id)
    bench.ledger.pause(on=False)


# -- several consumers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cancel", "retry", "delete", "get", "result"])
def test_a_member_of_a_group_does_not_respond_about_a_job_that_it_does_not_have(member: Bench, command: str) -> None:
    assert member.is_ignored(command, b"elsewhere"), "its owner answers"
    assert "There is no job elsewhere" in member.error(command, {"job_id": "elsewhere", "consumer": "porch"})


def test_a_member_of_a_group_responds_about_its_own_jobs(member: Bench) -> None:
    member.submit("a")
    assert member.ok("get", b"a")["consumer"] == "porch"
    assert member.ok("cancel", b"a") == {"job_id": "a", "status": "cancelled", "consumer": "porch"}


def test_a_list_behind_a_job_of_another_member_is_left_to_that_one(member: Bench) -> None:
    member.submit("a")
    assert member.is_ignored("list", {"after": "elsewhere"})
    assert member.ok("list")["total"] == 1


def test_in_a_group_retry_last_needs_the_name_of_a_consumer(member: Bench) -> None:
    member.submit("a")
    member.ledger.fail(member.claim().seq, ErrorCode.INTERNAL, "Unexpected.")
    assert "name one with `consumer`" in member.error("retry_last")
    assert member.ok("retry_last", {"consumer": "porch"})["job_id"] == "a"


@pytest.mark.parametrize("command", ["cancel", "get"])
def test_in_a_group_current_needs_the_name_of_a_consumer(member: Bench, command: str) -> None:
    member.submit("a")
    job = member.claim()
    assert "name one with `consumer`" in member.error(command, b"current")
    assert not member.ledger.is_cancelling(job.seq), "all members would have ended theirs"
    assert member.ok(command, {"job_id": "current", "consumer": "porch"})["job_id"] == "a"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in {"cancel", "retry", "delete", "get"}])
def test_a_command_to_another_consumer_by_name_is_left_to_it(bench: Bench, member: Bench, command: str) -> None:
    bench.submit("a")
    bench.ledger.complete(bench.claim().seq, RESULT)
    fields = {"job_id": "a"} if command == "result" else {}
    assert bench.is_ignored(command, {**fields, "consumer": "cellar"})
    assert member.is_ignored(command, {**fields, "consumer": "cellar"})
    assert not bench.ledger.totals().paused
    assert bench.ask(command, {**fields, "consumer": "porch"})["data"]["consumer"] == "porch"


@pytest.mark.parametrize("command", ["dance", "pause", "get", "list"])
def test_an_invalid_command_to_another_consumer_is_left_to_it(bench: Bench, command: str) -> None:
    assert bench.is_ignored(command, {"consumer": "attic", "limit": 0, "nonsense": 1})
    assert bench.ask(command, {"consumer": "porch", "limit": 0, "nonsense": 1})["data"] == {"consumer": "porch"}


def test_get_of_a_running_job_has_its_progress(bench: Bench) -> None:
    bench.submit("a")
    bench.claim()
    bench.progress["a"] = JobProgress(
        progress=0.4, processed_duration=24.0, audio_duration=60.0, speed=6.0, eta=6.0, updated_at=1_700_000_000.0
    )
    fields = bench.ok("get", b"a")
    assert (fields["progress"], fields["processed_duration"], fields["speed"], fields["eta"]) == (0.4, 24.0, 6.0, 6.0)


def test_only_a_job_that_is_cancelled_in_the_queue_is_reported(bench: Bench) -> None:
    bench.submit("a")
    bench.submit("b")
    bench.claim()
    bench.ok("cancel", b"a")
    bench.ok("cancel", b"b")
    bench.ok("cancel", b"b")
    assert bench.cancelled == ["b"], "the worker reports the running one"
