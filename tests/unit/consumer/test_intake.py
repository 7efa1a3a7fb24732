import base64
import errno
import json
import logging
import os
import queue
import resource
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cesar_mqtt.consumer.commands import CommandResponse
from cesar_mqtt.consumer.events import JobEvents, JobObserver
from cesar_mqtt.consumer.intake import Intake
from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.jobs import AudioSource, IllegalTransitionError, Job, JobState, Result
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import TextFormatter
from cesar_mqtt.mqtt.messages import Delivery, Receipt
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds
from cesar_mqtt.protocol.parsing import Refusal
from cesar_mqtt.protocol.payloads import Rejection, status_of
from cesar_mqtt.protocol.response_topics import ResponseTopics
from cesar_mqtt.protocol.topics import Topics
from tests import factories
from tests.conftest import PATIENCE_S

if TYPE_CHECKING:
    from cesar_mqtt.consumer.commands import CommandHandlers
    from cesar_mqtt.consumer.publisher import Publisher

WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
MAX_PAYLOAD_BYTES = 4096
MAX_QUEUED = 20
TOPICS = Topics("cesar", "kitchen")
RESPONSE_TOPICS = ResponseTopics(TOPICS, discovery_prefix="homeassistant")


class FakeSource:
    """Delivers batches, and records what is acknowledged."""

    def __init__(self, trace: list[str]) -> None:
        self._trace = trace
        self._batches: queue.Queue[list[Delivery]] = queue.Queue()
        self.brought: list[Delivery] = []
        self.acknowledged: list[Delivery] = []
        self.settled = RedeliveryBounds()
        self.on_acknowledge: Callable[[], object] = lambda: None
        self.ahead: list[bool] = []
        self.reconnects = 0

    def bring(self, *deliveries: Delivery) -> None:
        self.brought += deliveries
        self._batches.put(list(deliveries))

    def receive(self, timeout_s: float | None = None) -> list[Delivery]:
        try:
            return self._batches.get(timeout=timeout_s)
        except queue.Empty:
            return []

    def take_redelivery_bounds(self) -> RedeliveryBounds:
        settled, self.settled = self.settled, RedeliveryBounds(self.settled.session)
        return settled

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._trace.append("acknowledged")
        self.on_acknowledge()
        self.acknowledged += deliveries

    def let_go_ahead(self, *, on: bool) -> None:
        self.ahead.append(on)

    def reconnect(self) -> None:
        self.reconnects += 1
        unacknowledged = [each for each in self.brought if each.qos and each not in self.acknowledged]
        self.brought.clear()
        again = [
            replace(each, dup=True, receipt=replace(each.receipt, connection=each.receipt.connection + 1))
            for each in unacknowledged
        ]
        if again:
            self.bring(*again)


class FakeModels:
    def __init__(self) -> None:
        self.default = "base"
        self.languages: dict[str, str] = {}

    def default_name(self) -> str:
        return self.default

    def language_for(self, name: str) -> str | None:
        return self.languages.get(name)

    def is_allowed(self, name: str) -> bool:
        return name in {"base", "tiny.en", "turbo", "large-v3-turbo", "distil-large-v3", "distil-small.en"}

    def explain_unknown(self, name: str) -> str:
        return f"there is no model {name!r} (did you mean 'base'?): use one of base, tiny.en"


class FakeCommands:
    """Responds with the command and its payload, and records the jobs that the ledger has then."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.rejection: Refusal | None = None
        self.seen: list[list[str]] = []

    def handle(self, command: str, payload: bytes) -> CommandResponse | None:
        self.seen.append([job.job_id for job in self._ledger.jobs()])
        if payload == b"elsewhere":
            return None
        return CommandResponse(f"{command}: ".encode() + payload, self.rejection)


class FakePublisher(JobObserver):
    """Records what the intake reports and publishes; `refused` is set when the disk has refused."""

    def __init__(self, trace: list[str]) -> None:
        self._trace = trace
        self.rejections: list[Rejection] = []
        self.responses: list[tuple[str, bytes, bytes | None]] = []
        self.found: list[bytes | None] = []
        self.degradations: list[tuple[str, bool]] = []
        self.refused = threading.Event()

    def on_rejected(self, rejection: Rejection) -> None:
        self._trace.append("reported")
        self.rejections.append(rejection)

    def publish_response(self, topic: str, payload: bytes, *, correlation_data: bytes | None = None) -> None:
        self._trace.append("answered")
        self.responses.append((topic, payload, correlation_data))

    def on_queue_message_received(self, payload: bytes | None) -> None:
        self.found.append(payload)

    def on_degraded(self, thread: str, *, on: bool) -> None:
        self.degradations.append((thread, on))
        if on:
            self.refused.set()


class TestDisk(Disk):
    """A real disk that records its syncs, and can refuse some writes."""

    __test__ = False

    def __init__(self, name: str, trace: list[str]) -> None:
        self._name = name
        self._trace = trace
        self.refusals = 0.0

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self._trace.append(f"{self._name} synced")

    def sync_data(self, descriptor: int) -> None:
        super().sync_data(descriptor)
        self._trace.append(f"{self._name} synced")


@dataclass
class Bench:
    """An intake between a fake source and a real ledger and spool, all in one folder."""

    folder: Path
    trace: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = FakeSource(self.trace)
        self.publisher = FakePublisher(self.trace)
        self.ledger_disk = TestDisk("ledger", self.trace)
        self.spool_disk = TestDisk("spool", self.trace)
        self.folder.mkdir(exist_ok=True)
        self.ledger = Ledger(self.folder / "ledger.json", max_queued=MAX_QUEUED, disk=self.ledger_disk)
        self.models = FakeModels()
        self.commands = FakeCommands(self.ledger)
        self.spool_folder = self.folder / "spool"
        self.spool = Spool(self.spool_folder, self.spool_disk)
        self.intake = Intake(
            self.source,
            self.ledger,
            spool=self.spool,
            topics=TOPICS,
            models=self.models,
            commands=cast("CommandHandlers", self.commands),
            response_topics=RESPONSE_TOPICS,
            max_payload_bytes=MAX_PAYLOAD_BYTES,
            events=JobEvents(self.publisher),
            publisher=cast("Publisher", self.publisher),
            **self.settings,
        )
        self.trace.clear()

    def take(self, *deliveries: Delivery) -> list[str]:
        """Deliver these in one batch; return the reasons of their rejections."""
        before = len(self.publisher.rejections)
        self.source.bring(*deliveries)
        assert self.intake.run_once(timeout_s=0) == len(deliveries)
        assert self.source.acknowledged[-len(deliveries) :] == list(deliveries)
        return [rejection.reason for rejection in self.publisher.rejections[before:]]

    def job(self, job_id: str) -> Job:
        job = self.ledger.get(job_id)
        assert job is not None
        return job

    def jobs(self) -> list[Job]:
        """Return all jobs, oldest first."""
        self.ledger.republish_all()
        self.ledger.coalesce()
        known = (job for _, job in self.ledger.unpublished(1000) if isinstance(job, Job))
        return sorted(known, key=lambda job: job.seq)

    def spooled(self) -> list[bytes]:
        return sorted(path.read_bytes() for path in self.spool_folder.iterdir())


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[Bench]:
    bench = Bench(folder, settings=settings)
    try:
        yield bench
    finally:
        bench.ledger_disk.refusals = 0
        bench.ledger.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with opened(tmp_path) as bench:
        yield bench


@pytest.fixture
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_FIRST_S", 0.001)
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_MOST_S", 0.004)


def message(payload: bytes, topic: str = "cesar/jobs", **fields: Any) -> Delivery:
    return factories.delivery(topic, payload, **fields)


def request(**fields: Any) -> Delivery:
    return message(json.dumps({"audio_path": "porch.wav", **fields}).encode())


def upload(job_id: str, audio: bytes = WAV, **fields: Any) -> Delivery:
    return message(audio, f"cesar/audio/{job_id}", **fields)


# -- the order of events -------------------------------------------------------------------------------------------


def test_audio_is_on_disk_before_the_job_before_the_report_before_the_acknowledgement(bench: Bench) -> None:
    assert bench.take(upload("a"), message(b"{"), request(job_id="b")) == ["malformed_json"]
    assert bench.trace == [
        "spool synced",  # the file
        "spool synced",  # its name
        "ledger synced",
        "reported",
        "acknowledged",
    ]


def test_a_whole_batch_is_one_synced_transaction(bench: Bench) -> None:
    bench.take(*(request(job_id=f"job-{number}") for number in range(MAX_QUEUED)))
    assert bench.trace == ["ledger synced", "acknowledged"]
    assert bench.ledger.totals().queued == MAX_QUEUED


def test_a_batch_of_rejections_writes_nothing_to_disk(bench: Bench) -> None:
    bench.take(message(b"{"), message(b"\xff"))
    assert bench.trace == ["reported", "reported", "acknowledged"]


def test_a_batch_is_acknowledged_in_the_order_of_arrival_whatever_its_outcomes(bench: Bench) -> None:
    batch = [
        request(job_id="a"),
        message(b"{"),
        message(b""),
        upload("b"),
        request(job_id="a", beam_size=1),
        upload("/"),
    ]
    bench.take(*batch)
    assert bench.source.acknowledged == batch


def test_jobs_are_queued_in_the_order_of_arrival(bench: Bench) -> None:
    bench.take(request(job_id="c"), upload("a"), message(b"{"), request(job_id="b"))
    bench.take(request(job_id="0"))
    assert [job.job_id for job in bench.jobs()] == ["c", "a", "b", "0"]
    assert [job.queue_position for job in bench.jobs()] == [1, 2, 3, 4]


def test_at_the_moment_of_the_acknowledgement_a_crash_loses_neither_job_nor_audio(bench: Bench, tmp_path: Path) -> None:
    crashed = tmp_path / "crashed"
    bench.source.on_acknowledge = lambda: shutil.copytree(
        bench.folder, crashed, ignore=shutil.ignore_patterns("*.lock", "crashed")
    )
    bench.take(upload("a", WAV * 3), request(job_id="b"))
    with Ledger(crashed / "ledger.json") as ledger:
        first, second = ledger.get("a"), ledger.get("b")
        assert first is not None
        assert first.audio is not None
        assert (crashed / "spool" / first.audio.name).read_bytes() == WAV * 3
        assert second is not None
        assert second.state is JobState.QUEUED


def test_a_receive_that_times_out_does_nothing(bench: Bench) -> None:
    assert bench.intake.run_once(timeout_s=0) == 0
    assert bench.trace == []


# -- from request to job -------------------------------------------------------------------------------------------


def test_a_request_becomes_a_job_with_its_fields(bench: Bench) -> None:
    fields = {"model_size": "turbo", "language": "German", "beam_size": 2, "metadata": {"room": "porch"}}
    bench.take(request(job_id="porch-17", **fields))
    job = bench.job("porch-17")
    assert job.state is JobState.QUEUED
    assert job.audio == AudioSource("path", "porch.wav")
    assert job.model_size == "turbo"
    assert job.options == {"language": "de", "beam_size": 2}
    assert job.metadata == {"room": "porch"}


def test_every_transcription_option_reaches_the_job(bench: Bench) -> None:
    options = {
        "task": "translate",
        "hotwords": "Wächter",
        "temperature": [0.0, 0.4],
        "word_timestamps": True,
        "clip_timestamps": [[0.0, 30.0]],
        "batch_size": 8,
        "beam_size": 3,
        "multilingual": True,
    }
    bench.take(request(job_id="a", **options))
    assert bench.job("a").options == options


def test_formats_and_stream_reach_the_job_and_are_no_transcription_options(bench: Bench) -> None:
    bench.take(request(job_id="a", formats=["vtt", "srt", "vtt"], stream=True), request(job_id="b"))
    assert (bench.job("a").formats, bench.job("a").stream) == (("srt", "vtt"), True)
    assert (bench.job("b").formats, bench.job("b").stream) == ((), False)
    assert bench.job("a").options == {"beam_size": "auto"}


@pytest.mark.parametrize(("highest", "got"), [(9, [0, 4, 9]), (5, [0, 4, 5]), (0, [0, 0, 0])])
def test_a_priority_reaches_the_job_as_far_as_it_is_allowed(tmp_path: Path, highest: int, got: list[int]) -> None:
    with opened(tmp_path, max_priority=highest) as bench:
        bench.take(
            request(job_id="a"),
            upload("b", user_properties=(("priority", "4"), ("room", "porch"))),
            request(job_id="c", priority=9),
        )
        assert [bench.job(name).priority for name in "abc"] == got
        assert (bench.job("b").metadata, bench.job("b").options) == ({"room": "porch"}, {"beam_size": "auto"})


def test_the_same_id_with_another_priority_is_another_request(bench: Bench) -> None:
    assert bench.take(request(job_id="a", priority=0), request(job_id="a"), request(job_id="b", priority=3)) == []
    assert bench.take(request(job_id="b", priority=3), request(job_id="b", priority=4)) == ["job_id_conflict"]
    assert bench.take(request(job_id="b")) == ["job_id_conflict"]
    assert [bench.job(name).priority for name in "ab"] == [0, 3]


@pytest.mark.parametrize("payload", [b"https://nas.local/a.wav", b'{"audio_url": "https://nas.local/a.wav"}'])
def test_audio_behind_a_url_is_accepted_whatever_its_host_and_downloaded_later(bench: Bench, payload: bytes) -> None:
    assert bench.take(message(payload)) == []
    assert [job.audio for job in bench.jobs()] == [AudioSource("url", "https://nas.local/a.wav")]
    assert bench.spooled() == []


def test_a_request_that_names_no_model_gets_the_default_one(bench: Bench) -> None:
    bench.take(request(job_id="a"), upload("b"))
    assert bench.job("a").model_size == bench.job("b").model_size == "base"


def test_a_request_without_an_id_gets_a_uuid(bench: Bench) -> None:
    bench.take(message(b"porch.wav"), message(b"porch.wav"))
    first, second = bench.jobs()
    assert uuid.UUID(first.job_id).version == 4
    assert first.job_id != second.job_id


def test_an_upload_is_in_the_spool_under_a_name_that_does_not_come_from_outside(bench: Bench) -> None:
    encoded = base64.b64encode(b"other bytes").decode()
    bench.take(upload("a", b"some bytes"), message(json.dumps({"job_id": "b", "audio_base64": encoded}).encode()))
    for job_id, content in (("a", b"some bytes"), ("b", b"other bytes")):
        audio = bench.job(job_id).audio
        assert audio is not None
        assert audio.kind == "spool"
        assert job_id not in {audio.name, Path(audio.name).stem}
        assert bench.spool.path(audio.name).read_bytes() == content
    assert len(bench.spooled()) == 2


def test_user_properties_of_an_upload_reach_the_job(bench: Bench) -> None:
    bench.take(upload("a", user_properties=(("language", "de"), ("room", "porch"), ("formats", "srt,vtt"))))
    assert bench.job("a").options == {"language": "de", "beam_size": "auto"}
    assert bench.job("a").formats == ("srt", "vtt")
    assert bench.job("a").metadata == {"room": "porch"}


# -- what is ignored or rejected -----------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", ["cesar/jobs", "cesar/audio/note-1", "cesar/audio", "cesar/audio/a/b"])
@pytest.mark.parametrize("retain", [False, True])
def test_an_empty_payload_is_ignored_and_acknowledged(bench: Bench, topic: str, *, retain: bool) -> None:
    assert bench.take(message(b"", topic, retain=retain)) == []
    assert bench.jobs() == []


@pytest.mark.parametrize(
    ("delivery", "reason"),
    [
        (message(b"{"), "malformed_json"),
        (message(b"[]"), "invalid_request"),
        (message(b'{"job_id": "a b", "audio_path": "a"}'), "invalid_job_id"),
        (message(WAV, "cesar/audio"), "invalid_job_id"),
        (message(WAV, "cesar/audio/"), "invalid_job_id"),
        (message(WAV, "cesar/audio/a/b"), "invalid_job_id"),
        (message(WAV, f"cesar/audio/{'x' * 65}"), "invalid_job_id"),
        (message(b"x" * (MAX_PAYLOAD_BYTES + 1)), "payload_too_large"),
        (message(b"x" * (MAX_PAYLOAD_BYTES + 1), "cesar/audio/a/b"), "payload_too_large"),
    ],
)
def test_a_bad_message_is_rejected_and_acknowledged_and_the_next_one_is_accepted(
    bench: Bench, delivery: Delivery, reason: str
) -> None:
    assert bench.take(delivery, request(job_id="good")) == [reason]
    assert [job.job_id for job in bench.jobs()] == ["good"]


def test_a_rejection_identifies_its_message(bench: Bench) -> None:
    bench.take(message(b"\xff\xfe" + b"x" * 1000, "cesar/audio/a/b", received_at=factories.AT + 0.12))
    assert bench.publisher.rejections == [
        Rejection(
            reason="invalid_job_id",
            detail="'a/b' is no job id: use text of 1 to 64 of A-Z, a-z, 0-9, _ and -.",
            topic="cesar/audio/a/b",
            job_id=None,
            payload_excerpt="\ufffd\ufffd" + "x" * 194,
            received_at="2026-01-23T21:45:00.120Z",
        )
    ]


def test_no_secret_of_a_rejected_message_is_published_or_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    url = "http://user:hunter2@cam/a.wav?token=hunter2"
    bench.take(
        request(job_id="a", audio_url=url, beam_size=11),
        request(job_id="b", audio_path="a.wav", model_size=url),
        request(job_id=url, audio_path="a.wav"),
        request(**{"audio_path": "a.wav", url: 1, "language": url}),
        request(job_id="c", audio_path="file://user:hunter2@nas/a.wav"),
        request(job_id="d", audio_path="rtsp://user:hunter2@cam/stream?x=hunter2", beam_size=11),
        message(b'{"audio_url": "http:\\/\\/user:hunter2@cam"', response_topic=f"cesar/replies/{url}"),
        message(b"x", f"cesar/audio/{url}", response_topic=url),
        command(url),
    )
    published = [rejection.encode() for rejection in bench.publisher.rejections]
    published += [payload for _, payload, _ in bench.publisher.responses]
    published += [json.dumps(status_of(job, "kitchen")).encode() for job in bench.jobs()]
    assert len(bench.publisher.rejections) == 8
    assert not [payload for payload in published if b"hunter2" in payload and b"hunter2: " not in payload]
    formatter = TextFormatter()
    assert not [line for line in map(formatter.format, caplog.records) if "hunter2" in line]


def test_a_payload_of_the_maximum_size_is_accepted(bench: Bench) -> None:
    assert bench.take(upload("a", b"x" * MAX_PAYLOAD_BYTES)) == []
    assert bench.job("a").state is JobState.QUEUED


@pytest.mark.parametrize(
    "delivery",
    [
        request(job_id="a", beam_size=11),
        request(job_id="a", langauge="de"),
        request(job_id="a", formats=["doc"]),
        message(b'{"job_id": "a", "audio_url": "ftp://nas.local/a.wav"}'),
        request(job_id="a", model_size="large-v3"),
        upload("a", user_properties=(("task", "sing"),)),
        upload("a", user_properties=(("model_size", "large-v3"),)),
        message(b'{"job_id": "a"}'),
        message(b'{"job_id": "a", "audio_base64": "?"}'),
    ],
)
def test_a_rejected_request_with_a_new_id_is_recorded_as_a_failed_job(bench: Bench, delivery: Delivery) -> None:
    assert bench.take(delivery) == ["invalid_request"]
    job = bench.job("a")
    assert job.state is JobState.ERROR
    assert job.error_code is ErrorCode.INVALID_REQUEST
    assert job.error_message == bench.publisher.rejections[0].detail
    assert bench.publisher.rejections[0].job_id == "a"
    assert bench.ledger.totals().error_total == 1
    assert bench.ledger.claim() is None
    assert bench.spooled() == []


def test_an_upload_that_is_too_large_is_recorded_as_a_failed_job(bench: Bench) -> None:
    assert bench.take(upload("a", b"x" * (MAX_PAYLOAD_BYTES + 1))) == ["payload_too_large"]
    assert bench.job("a").state is JobState.ERROR
    assert bench.job("a").error_message == (
        "The message has 4097 bytes: at most 4096 are accepted (queue.max_payload_bytes)."
    )


def test_a_rejected_request_with_a_known_id_leaves_that_job_unchanged(bench: Bench) -> None:
    bench.take(request(job_id="a"))
    before = bench.job("a")
    assert bench.take(request(job_id="a", beam_size=11)) == ["invalid_request"]
    assert bench.job("a") == before
    assert len(bench.jobs()) == 1


@pytest.mark.parametrize(
    ("delivery", "source"),
    [
        (request(job_id="a", beam_size=11, metadata={"room": "porch"}), "porch.wav"),
        (request(job_id="a", model_size="large-v3", metadata={"room": "porch"}), "porch.wav"),
        (
            message(
                b'{"job_id": "a", "audio_url": "https://me:secret@nas/a.wav?key=1", "beam_size": 11,'
                b'"metadata": {"room": "porch"}}'
            ),
            "https://nas/a.wav",
        ),
        (message(b'{"job_id": "a", "audio_base64": "?", "metadata": {"room": "porch"}}'), "upload"),
        (message(b'{"job_id": "a", "metadata": {"room": "porch"}}'), None),
        (message(b'{"job_id": "a", "audio_path": 7, "metadata": {"room": "porch"}}'), None),
        (upload("a", user_properties=(("task", "sing"), ("room", "porch"))), "upload"),
        (upload("a", user_properties=(("job_id", "b"), ("room", "porch"))), "upload"),
        (upload("a", user_properties=(("model_size", "large-v3"), ("room", "porch"))), "upload"),
        (upload("a", b"x" * (MAX_PAYLOAD_BYTES + 1), user_properties=(("room", "porch"),)), "upload"),
    ],
)
def test_the_status_of_a_rejected_request_has_its_metadata_and_audio_source(
    bench: Bench, delivery: Delivery, source: str | None
) -> None:
    bench.take(delivery)
    status = status_of(bench.job("a"), "kitchen")
    assert (status["error_code"], status["metadata"], status["audio_source"]) == (
        "invalid_request",
        {"room": "porch"},
        source,
    )
    assert bench.spooled() == []
    assert not bench.ledger.needed_spool_files()


@pytest.mark.parametrize("wrong", [request(job_id="a", beam_size=11), upload("a", user_properties=(("task", "x"),))])
def test_a_rejected_request_cannot_be_retried(bench: Bench, wrong: Delivery) -> None:
    bench.take(wrong)
    with pytest.raises(IllegalTransitionError, match=r"was rejected as invalid"):
        bench.ledger.retry("a")
    assert bench.ledger.delete("a") is not None


def test_an_upload_whose_user_property_names_another_id_is_recorded_under_its_own(bench: Bench) -> None:
    assert bench.take(upload("u1", user_properties=(("job_id", "other"),))) == ["invalid_request"]
    assert bench.job("u1").error_code is ErrorCode.INVALID_REQUEST
    assert bench.publisher.rejections[0].job_id == "u1"
    assert bench.ledger.get("other") is None


@pytest.mark.parametrize("delivery", [request(job_id="current"), upload("current")])
def test_current_is_rejected_as_a_job_id(bench: Bench, delivery: Delivery) -> None:
    assert bench.take(delivery) == ["invalid_job_id"]
    assert bench.publisher.rejections[0].job_id is None
    assert bench.jobs() == []


def test_a_too_large_upload_without_a_usable_id_is_recorded_nowhere(bench: Bench) -> None:
    for job_id in ("current", "a/b"):
        assert bench.take(upload(job_id, b"x" * (MAX_PAYLOAD_BYTES + 1))) == ["payload_too_large"]
        assert bench.publisher.rejections[-1].job_id is None
    assert bench.jobs() == []


def test_an_empty_upload_is_logged_with_its_id_and_an_empty_request_is_not(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        bench.take(message(b"", "cesar/audio/note-1"), message(b""), upload("note-2"))
    [record] = caplog.records
    assert (record.levelno, getattr(record, "job_id", None)) == (logging.INFO, "note-1")
    assert record.getMessage() == "Empty upload ignored: no job is created"


@pytest.mark.parametrize("topic", ["cesar/audio/", "cesar/request/"])
def test_a_very_long_topic_is_shortened(bench: Bench, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    bench.commands.rejection = Refusal("unknown_command", "There is none.")
    with caplog.at_level(logging.INFO):
        bench.take(message(WAV, topic + "x" * 60_000, response_topic="cesar/audio/" + "y" * 60_000))
        bench.take(message(b"", topic + "x" * 60_000))
    assert bench.publisher.rejections[0].topic == topic + "x" * (199 - len(topic)) + "…"
    assert all(len(record.getMessage()) < 500 for record in caplog.records)
    assert all(len(getattr(record, "job_id", None) or "") < 500 for record in caplog.records)


def test_a_repeated_bad_request_is_rejected_again_and_makes_no_second_job(bench: Bench) -> None:
    assert bench.take(request(job_id="a", beam_size=11), request(job_id="a", beam_size=11)) == ["invalid_request"] * 2
    assert bench.take(request(job_id="a", beam_size=11)) == ["invalid_request"]
    assert len(bench.jobs()) == 1
    assert bench.ledger.totals().error_total == 1


def test_the_rejection_of_a_request_without_an_id_has_none(bench: Bench) -> None:
    bench.take(*(request(job_id=f"job-{number}") for number in range(MAX_QUEUED)))
    no_id = (message(b"porch.wav"), message(b"porch.wav", retain=True))
    assert bench.take(request(job_id="a"), *no_id) == ["queue_full"] * 3
    assert [rejection.job_id for rejection in bench.publisher.rejections] == ["a", None, None]


@pytest.mark.parametrize(
    ("fields", "language"),
    [
        ({}, "de"),
        ({"model_size": "tiny.en"}, None),
        ({"language": None}, "de"),
        ({"language": "fr"}, "fr"),
        ({"language": "auto"}, None),
        ({"multilingual": True}, None),
        ({"task": "translate"}, "de"),
    ],
)
def test_a_request_that_names_no_language_gets_the_default_one_of_its_model(
    bench: Bench, fields: dict[str, Any], language: str | None
) -> None:
    bench.models.languages["base"] = "de"
    bench.take(request(job_id="a", **fields))
    assert bench.job("a").options.get("language") == language


def test_a_model_that_is_not_allowed_is_named_in_the_rejection(bench: Bench) -> None:
    assert bench.take(request(model_size="large-v3")) == ["invalid_request"]
    detail = "model_size: there is no model 'large-v3' (did you mean 'base'?): use one of base, tiny.en."
    assert bench.publisher.rejections[0].detail == detail
    assert bench.jobs() == []


@pytest.mark.parametrize(
    ("model", "fields", "detail"),
    [
        (
            "tiny.en",
            {"language": "de"},
            "language: the model 'tiny.en' is English-only and knows no 'de'. Choose one that does not end in '.en'.",
        ),
        (
            "tiny.en",
            {"task": "translate"},
            "task: the model 'tiny.en' is English-only and cannot translate. Choose one that does not end in '.en'.",
        ),
        (
            "distil-small.en",
            {"task": "translate", "language": "de"},
            (
                "task: the model 'distil-small.en' is English-only and cannot translate. "
                "Choose one that does not end in '.en'."
            ),
        ),
        *(
            (
                model,
                {"task": "translate"},
                f"task: the model {model!r} cannot translate. Choose another one, such as 'large-v3'.",
            )
            for model in ("turbo", "large-v3-turbo", "distil-large-v3")
        ),
    ],
)
def test_what_a_model_cannot_do_is_rejected_at_once_whether_named_or_default(
    bench: Bench, model: str, fields: dict[str, str], detail: str
) -> None:
    assert bench.take(request(job_id="a", model_size=model, **fields)) == ["invalid_request"]
    assert bench.publisher.rejections[-1].detail == bench.job("a").error_message == detail
    bench.models.default = model
    assert bench.take(upload("b", user_properties=tuple(fields.items()))) == ["invalid_request"]
    assert bench.publisher.rejections[-1].detail == bench.job("b").error_message == detail
    assert bench.spooled() == []


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("tiny.en", {}),
        ("tiny.en", {"language": "en-GB", "task": "transcribe"}),
        ("turbo", {"language": "de"}),
        ("distil-large-v3", {"language": "de"}),
        ("base", {"language": "de", "task": "translate"}),
    ],
)
def test_what_a_model_can_do_is_accepted(bench: Bench, model: str, fields: dict[str, str]) -> None:
    bench.models.default = "tiny.en"
    assert bench.take(request(job_id="a", model_size=model, **fields)) == []
    assert bench.job("a").state is JobState.QUEUED


def test_more_jobs_than_may_be_queued_are_rejected_and_leave_no_file(bench: Bench) -> None:
    bench.take(*(request(job_id=f"job-{number}") for number in range(MAX_QUEUED - 1)))
    assert bench.take(request(job_id="last"), request(job_id="over"), upload("upload")) == ["queue_full"] * 2
    assert [rejection.job_id for rejection in bench.publisher.rejections] == ["over", "upload"]
    assert bench.ledger.get("over") is bench.ledger.get("upload") is None
    assert bench.spooled() == []
    bench.ledger.claim()
    assert bench.take(request(job_id="over")) == []


def test_a_known_job_is_a_duplicate_even_when_the_queue_is_full(bench: Bench) -> None:
    bench.take(*(request(job_id=f"job-{number}") for number in range(MAX_QUEUED)))
    assert bench.take(request(job_id="job-3")) == []


# -- repeated requests ---------------------------------------------------------------------------------------------


def test_a_repeated_request_is_the_same_job_and_its_status_is_published_again(bench: Bench) -> None:
    bench.take(request(job_id="a", metadata={"x": 1, "y": 2}))
    [(number, job)] = bench.ledger.unpublished(10)
    bench.ledger.mark_published([(job.seq, number)])
    assert bench.take(request(job_id="a", metadata={"y": 2, "x": 1}, beam_size=5, language=None)) == []
    assert [known.job_id for _, known in bench.ledger.unpublished(10)] == ["a"]
    assert bench.ledger.totals().queued == 1


@pytest.mark.parametrize(
    ("fields", "again"),
    [
        ({"formats": ["srt", "vtt"]}, {"formats": ["vtt", "srt", "vtt"]}),
        ({"temperature": 0, "clip_timestamps": [[0, 30]]}, {"temperature": 0.0, "clip_timestamps": [[0.0, 30.0]]}),
        ({}, {"formats": [], "stream": False, "batch_size": 1, "word_timestamps": False, "temperature": None}),
        (
            {"audio_path": None, "audio_url": "http://a/b"},
            {"audio_path": None, "audio_url": "http://a/b", "hotwords": None},
        ),
    ],
)
def test_requests_with_equal_values_in_another_form_are_the_same(
    bench: Bench, fields: dict[str, Any], again: dict[str, Any]
) -> None:
    assert bench.take(request(job_id="a", **fields), request(job_id="a", **again)) == []
    assert len(bench.jobs()) == 1


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        ({"formats": ["srt"]}, {"formats": ["vtt"]}),
        ({"temperature": 0.2}, {"temperature": 0.4}),
        ({"clip_timestamps": [[0, 30]]}, {"clip_timestamps": [[0, 31]]}),
        ({"hotwords": "a"}, {"hotwords": "b"}),
        ({"hotwords": "a"}, {"initial_prompt": "a"}),
        ({"audio_path": None, "audio_url": "http://a/b"}, {"audio_path": None, "audio_url": "http://a/b?c"}),
    ],
)
def test_requests_that_differ_in_one_field_are_different(
    bench: Bench, fields: dict[str, Any], other: dict[str, Any]
) -> None:
    assert bench.take(request(job_id="a", **fields), request(job_id="a", **other)) == ["job_id_conflict"]


def test_a_repeated_request_does_not_run_a_completed_job_again(bench: Bench) -> None:
    bench.take(request(job_id="a"))
    job = bench.ledger.claim()
    assert job is not None
    bench.ledger.complete(job.seq, Result("Hello.", 1.0, "en", 0.9, no_speech=False))
    assert bench.take(request(job_id="a")) == []
    assert bench.ledger.claim() is None
    assert bench.job("a").result_text == "Hello."


@pytest.mark.parametrize(
    "other",
    [
        request(job_id="a", audio_path="other.wav"),
        request(job_id="a", language="de"),
        request(job_id="a", model_size="base"),
        request(job_id="a", metadata={"room": "porch"}),
        request(job_id="a", hotwords="x"),
        request(job_id="a", temperature=0),
        request(job_id="a", word_timestamps=True),
        request(job_id="a", clip_timestamps=[[0, 1]]),
        request(job_id="a", batch_size=2),
        request(job_id="a", formats=["srt"]),
        request(job_id="a", stream=True),
        message(b'{"job_id": "a", "audio_url": "http://porch.wav"}'),
        upload("a"),
    ],
)
def test_the_same_id_for_a_different_request_is_a_conflict_and_the_job_stays_unchanged(
    bench: Bench, other: Delivery
) -> None:
    bench.take(request(job_id="a"))
    before = bench.job("a")
    assert bench.take(other) == ["job_id_conflict"]
    assert bench.publisher.rejections[0].job_id == "a"
    assert bench.publisher.rejections[0].detail.endswith("Use a new id, or delete the job first.")
    assert bench.job("a") == before
    assert bench.spooled() == []


def test_two_requests_with_one_id_in_one_batch_are_admitted_in_order(bench: Bench) -> None:
    assert bench.take(request(job_id="a"), request(job_id="a"), upload("a"), request(job_id="b")) == ["job_id_conflict"]
    assert [job.job_id for job in bench.jobs()] == ["a", "b"]


def test_a_repeated_upload_leaves_one_file(bench: Bench) -> None:
    bench.take(upload("a"), upload("a"))
    bench.take(upload("a", dup=True))
    assert bench.spooled() == [WAV]
    assert bench.take(upload("a", b"other bytes")) == ["job_id_conflict"]
    assert bench.spooled() == [WAV]


def test_an_upload_and_the_same_bytes_in_base64_are_the_same_request(bench: Bench) -> None:
    encoded = base64.b64encode(WAV).decode()
    assert bench.take(upload("a"), message(json.dumps({"job_id": "a", "audio_base64": encoded}).encode())) == []
    assert bench.spooled() == [WAV]


def test_a_retained_request_without_an_id_runs_once_however_often_it_arrives(bench: Bench) -> None:
    for _ in range(3):
        assert bench.take(message(b"porch.wav", retain=True)) == []
    assert bench.take(message(b'{"audio_path": "porch.wav"}', retain=True)) == []
    [job] = bench.jobs()
    assert job.job_id.startswith("retained-")
    bench.take(message(b"hall.wav", retain=True), message(b"porch.wav", retain=True, user_properties=(("a", "b"),)))
    assert len(bench.jobs()) == 3


def test_a_retained_request_with_an_id_keeps_it(bench: Bench) -> None:
    bench.take(replace(request(job_id="a"), retain=True))
    assert [job.job_id for job in bench.jobs()] == ["a"]


def test_a_redelivery_of_a_request_without_an_id_makes_no_second_job(bench: Bench, tmp_path: Path) -> None:
    first = message(b"porch.wav", receipt=Receipt(1, 9))
    again = replace(first, dup=True, receipt=Receipt(2, 9))
    bench.take(first)
    assert bench.take(again) == []
    assert bench.take(again, again) == []
    assert len(bench.jobs()) == 1
    bench.ledger.close()
    with opened(tmp_path) as restarted:
        assert restarted.take(again) == []
        assert len(restarted.jobs()) == 1


def test_a_packet_id_that_another_request_has_now_proves_no_redelivery(bench: Bench, tmp_path: Path) -> None:
    """Some brokers use the lowest free packet id, so each message has the same; and a doorbell repeats its request."""
    ring = message(b"porch.wav", receipt=Receipt(1, 1))
    bench.take(ring)
    bench.source.settled = RedeliveryBounds(
        acks_received={1: 1}
    )  # the broker has our acknowledgement: the packet id is free
    bench.intake.run_once(timeout_s=0)
    lost_at_first = replace(ring, dup=True, receipt=Receipt(2, 1))
    bench.take(lost_at_first)
    assert len(bench.jobs()) == 2
    bench.take(replace(lost_at_first, receipt=Receipt(3, 1)))
    assert len(bench.jobs()) == 2, "this is the second one again"
    bench.source.settled = RedeliveryBounds(acks_received={3: 1})
    bench.take(message(b"hall.wav", receipt=Receipt(3, 2)))  # brings to disk that the second one cannot come again
    bench.ledger.close()
    with opened(tmp_path) as restarted:
        restarted.take(replace(ring, dup=True, receipt=Receipt(1, 1)))
        assert len(restarted.jobs()) == 4


def test_a_released_packet_id_stays_released_after_a_crash(bench: Bench, tmp_path: Path) -> None:
    ring = message(b"porch.wav", receipt=Receipt(1, 1))
    bench.take(ring)
    bench.source.settled = RedeliveryBounds(acks_received={1: 1})
    bench.intake.run_once(timeout_s=0)
    synced = len(bench.trace)
    bench.intake.run_once(timeout_s=0)
    assert len(bench.trace) == synced, "what is on disk is not written again"
    bench.ledger._storage.abandon()  # killed, with the second one received and not yet on disk
    bench.ledger._file_lock.release()
    with opened(tmp_path) as restarted:
        restarted.take(replace(ring, dup=True))
        assert len(restarted.jobs()) == 2


def test_a_redelivery_from_before_a_new_session_is_recognised(bench: Bench) -> None:
    """While the disk refused, the message was delivered again and the broker began a new session."""
    ring = message(b"porch.wav", receipt=Receipt(1, 1))
    bench.take(ring)
    bench.source.settled = RedeliveryBounds(session=3)
    bench.take(replace(ring, dup=True, receipt=Receipt(2, 1)), replace(ring, receipt=Receipt(3, 1)))
    assert len(bench.jobs()) == 2
    bench.take(replace(ring, dup=True, receipt=Receipt(4, 1)))
    assert len(bench.jobs()) == 2


def test_a_packet_id_of_a_former_session_means_nothing_in_the_next(bench: Bench) -> None:
    ring = message(b"porch.wav", receipt=Receipt(1, 1))
    bench.source.settled = RedeliveryBounds(session=2)  # it began while this one waited to be fetched
    bench.take(ring)
    bench.take(replace(ring, dup=True, receipt=Receipt(3, 1)))
    assert len(bench.jobs()) == 2
    bench.take(replace(ring, dup=True, receipt=Receipt(4, 1)))
    assert len(bench.jobs()) == 2


def test_the_retained_queue_message_is_reported_for_this_connection_only(bench: Bench) -> None:
    """Messages of an earlier connection, and unacknowledged ones, are delivered first and once more."""
    topic = Topics("cesar", "kitchen").own("queue")
    bench.take(message(b"old", topic, dup=True, retain=True), message(b"ours", topic, dup=True))
    assert bench.publisher.found == []
    bench.take(message(b"new", topic, retain=True), message(b"ours", topic))
    assert bench.publisher.found == [b"new", None]


def test_a_redelivery_of_an_upload_without_an_id_leaves_one_file(bench: Bench) -> None:
    encoded = base64.b64encode(WAV).decode()
    first = message(json.dumps({"audio_base64": encoded}).encode())
    bench.take(first, replace(first, dup=True))
    assert len(bench.jobs()) == 1
    assert bench.spooled() == [WAV]


def test_a_redelivery_whose_first_delivery_was_lost_is_a_new_job(bench: Bench) -> None:
    bench.take(message(b"porch.wav", dup=True))
    assert len(bench.jobs()) == 1


def test_two_equal_requests_without_an_id_are_two_jobs(bench: Bench) -> None:
    bench.take(message(b"porch.wav", receipt=Receipt(1, 1)), message(b"porch.wav", receipt=Receipt(1, 2)))
    bench.take(message(b"porch.wav", receipt=Receipt(1, 1)))  # the packet id is free again, and this is no redelivery
    bench.take(message(b"hall.wav", receipt=Receipt(2, 2), dup=True))  # a redelivery of something else
    assert len(bench.jobs()) == 4


def test_messages_of_qos_0_are_never_redeliveries(bench: Bench) -> None:
    bench.take(*(message(b"porch.wav", qos=0, receipt=Receipt(1, 0), dup=dup) for dup in (False, True)))
    assert len(bench.jobs()) == 2


# -- a disk that refuses -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick_retries")
@pytest.mark.parametrize("place", ["ledger_disk", "spool_disk"])
def test_a_batch_that_the_disk_refuses_is_repeated_and_acknowledged_once_it_is_stored(bench: Bench, place: str) -> None:
    disk = getattr(bench, place)
    disk.refusals = 3
    acknowledged_with = []
    bench.source.on_acknowledge = lambda: acknowledged_with.append(disk.refusals)
    assert bench.take(upload("a"), message(b"{"), request(job_id="b")) == ["malformed_json"]
    assert acknowledged_with == [0]
    assert [job.job_id for job in bench.jobs()] == ["a", "b"]
    assert bench.spooled() == [WAV]
    assert bench.publisher.degradations[0] == ("intake", True)
    assert bench.publisher.degradations[-1] == ("intake", False)
    assert bench.publisher.degradations.count(("intake", False)) == 1


def test_a_recording_that_never_fits_is_rejected_and_holds_up_nothing(bench: Bench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        bench.intake._parser._max_payload_bytes = 4 << 20
        assert bench.take(upload("big", b"x" * (2 << 20)), upload("small")) == ["storage_full"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [job.job_id for job in bench.jobs()] == ["small"]
    assert bench.publisher.rejections[0].job_id == "big"
    assert bench.publisher.degradations == [("intake", False)]


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EDQUOT])
def test_a_recording_that_the_file_system_never_takes_is_rejected_and_holds_up_nothing(bench: Bench, code: int) -> None:
    """Neither the largest size of a file nor a quota shows in the free room."""
    bench.intake._parser._max_payload_bytes = 4 << 20
    create, limit = bench.spool_disk.create, 1 << 20

    def limited(path: Path, chunks: Iterable[bytes]) -> int:
        data = b"".join(chunks)
        used = sum(file.stat().st_size for file in bench.spool_folder.iterdir()) if code == errno.EDQUOT else 0
        if used + len(data) > limit:
            raise OSError(code, os.strerror(code))
        return create(path, (data,))

    bench.spool_disk.create = limited  # type: ignore[method-assign]
    big, half = b"x" * (2 << 20), b"y" * (limit // 3)
    batch = [upload("big", big), upload("one", half), upload("two", half), upload("huge", big + b"x")]
    if code == errno.EFBIG:
        assert bench.take(*batch, upload("last")) == ["storage_full"] * 2
        assert [job.job_id for job in bench.jobs()] == ["one", "two", "last"]
    else:  # behind two recordings that fit, `huge` waits for these: only an empty spool shows that it never fits
        assert bench.take(*batch[:3]) == ["storage_full"]
        assert [job.job_id for job in bench.jobs()] == ["one", "two"]
    assert "does not allow that much" in bench.publisher.rejections[0].detail
    assert bench.publisher.rejections[0].job_id == "big"


def test_a_recording_over_a_quota_waits_while_others_are_stored(bench: Bench) -> None:
    bench.take(upload("first"))
    create = bench.spool_disk.create
    refusals = iter([True, False])

    def limited(path: Path, chunks: Iterable[bytes]) -> int:
        if next(refusals):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return create(path, chunks)

    bench.spool_disk.create = limited  # type: ignore[method-assign]
    assert bench.take(upload("second")) == []
    assert [job.job_id for job in bench.jobs()] == ["first", "second"]
    assert ("intake", True) in bench.publisher.degradations


def test_the_oldest_uploads_that_only_a_retry_needs_make_room_for_new_ones(bench: Bench) -> None:
    bench.spool._max_bytes = 4 * len(WAV)
    bench.take(*(upload(f"job-{number}") for number in range(4)))
    for number in (1, 0, 2):  # in the order in which they end
        bench.ledger.cancel(f"job-{number}")
    left = {job.job_id: bench.spool.path(job.audio.name) for job in bench.jobs() if job.audio is not None}
    bench.take(upload("new"))
    assert [job_id for job_id, path in left.items() if not path.exists()] == ["job-1"]
    bench.take(upload("more", WAV * 2))
    assert [job_id for job_id, path in left.items() if path.exists()] == ["job-3"]
    assert bench.publisher.degradations.count(("intake", True)) == 0


def test_uploads_that_would_not_make_room_enough_are_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_FIRST_S", 3600.0)
    bench.spool._max_bytes = 3 * len(WAV)
    bench.take(upload("ended"), upload("waits"), upload("queued"))
    bench.ledger.cancel("ended")
    bench.intake.start()
    new = [request(job_id="first"), upload("large", WAV * 2), request(job_id="last")]
    bench.source.bring(*new)
    assert bench.publisher.refused.wait(PATIENCE_S)
    assert bench.source.acknowledged[-1] == new[0], "what is before it and has room is accepted"
    assert len(bench.spooled()) == 3
    _, files = bench.ledger.delete("waits") or (None, [])
    bench.spool.remove(files)  # it does not wait for the next attempt then
    deadline = time.monotonic() + PATIENCE_S
    while bench.source.acknowledged[-1] != new[-1] and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    bench.intake.stop(PATIENCE_S)
    assert [delivery.receipt for delivery in bench.source.acknowledged[-3:]] == [each.receipt for each in new]
    assert "2 of 3" not in caplog.text
    assert f"{3 * len(WAV)} of {3 * len(WAV)} bytes" in caplog.text
    assert bench.source.ahead == [True, False]


def test_a_batch_that_is_larger_than_the_spool_is_stored_in_parts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_FIRST_S", 3600.0)
    bench.spool._max_bytes = 2 * len(WAV)
    bench.intake.start()
    bench.source.bring(*(upload(f"job-{number}") for number in range(5)))
    for number in range(5):
        deadline = time.monotonic() + PATIENCE_S
        while bench.ledger.get(f"job-{number}") is None and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        _, files = bench.ledger.delete(f"job-{number}") or (None, [])
        bench.spool.remove(files)
    bench.intake.stop(PATIENCE_S)
    assert len(bench.source.acknowledged) == 5


def test_what_does_not_fit_into_memory_is_received_again_after_the_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_FIRST_S", 0.2)
    monkeypatch.setattr("cesar_mqtt.consumer.intake._HELD_BYTES", 1000)
    bench.spool_disk.refusals = float("inf")
    bench.intake.start()
    held = [upload("first"), upload("held", WAV * 100)]
    forgotten = [message(b"porch.wav"), upload("later"), command("health")]
    bench.source.bring(held[0])
    assert bench.publisher.refused.wait(PATIENCE_S)
    for each in (held[1], *forgotten, command("list", qos=0), message(b"late.wav", qos=0)):
        bench.source.bring(each)

    def wait_until(true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true() and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert true()

    wait_until(lambda: bench.publisher.responses)
    assert [topic for topic, _, _ in bench.publisher.responses] == ["cesar/response/list"]
    assert bench.source.ahead == [True]
    bench.spool_disk.refusals = 0
    wait_until(lambda: len(bench.publisher.responses) == 2)
    bench.source.bring(upload("late"))  # by the old connection: the new one brings it again, too
    pause = threading.Event()
    pause.wait(0.1)
    bench.intake.stop(PATIENCE_S)
    again = [replace(each, dup=True, receipt=replace(each.receipt, connection=2)) for each in forgotten]
    acknowledged = [delivery.receipt for delivery in bench.source.acknowledged if delivery.qos]
    assert acknowledged == [each.receipt for each in (*held, *again)]
    names = [job.job_id for job in bench.jobs()]
    assert (names[:2], names[-1], len(names)) == (["first", "held"], "later", 5)
    assert bench.source.ahead == [True, False]
    assert bench.source.reconnects == 1


def test_a_forgotten_request_is_no_redelivery_of_an_earlier_one_with_its_packet_id(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.intake._HELD_BYTES", 0)
    receipt = Receipt(1, 77)
    bench.take(message(b"porch.wav", receipt=receipt))
    bench.intake._arrived.append(message(b"held.wav"))
    assert bench.intake._hold([message(b"porch.wav", receipt=receipt)]) == []
    assert bench.intake.run_once(timeout_s=0) == 1
    bench.take(message(b"porch.wav", receipt=Receipt(2, 77), dup=True))
    assert len(bench.jobs()) == 3


def test_commands_are_answered_once_while_the_disk_refuses_and_one_of_them_may_free_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind an upload that had no room no command was answered, so that nothing could be deleted."""
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_FIRST_S", 0.2)
    bench.spool_disk.refusals = float("inf")
    handle = bench.commands.handle

    def free(name: str, payload: bytes) -> CommandResponse | None:
        if name == "delete":
            bench.spool_disk.refusals = 0
        return handle(name, payload)

    monkeypatch.setattr(bench.commands, "handle", free)
    first = [upload("big"), command("list"), message(b"ON", "cesar/consumer/kitchen/pause/set")]
    second = [request(job_id="next"), command("delete", b"old"), command("health")]
    bench.intake.start()
    bench.source.bring(*first)
    assert bench.publisher.refused.wait(PATIENCE_S)
    assert bench.source.acknowledged == []
    bench.source.bring(*second)
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while len(bench.source.acknowledged) < len(first) + len(second) and time.monotonic() < deadline:
        pause.wait(0.01)
    bench.intake.stop(PATIENCE_S)
    in_order = [delivery.receipt for delivery in (*first, *second)]
    assert [delivery.receipt for delivery in bench.source.acknowledged] == in_order
    assert [topic.rpartition("/")[2] for topic, _, _ in bench.publisher.responses] == [
        *("list", "pause", "delete", "health")
    ]
    assert [job.job_id for job in bench.jobs()] == ["big", "next"]


@pytest.mark.usefixtures("_quick_retries")
def test_the_delays_between_attempts_grow_up_to_a_limit(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.ledger_disk.refusals = 5
    with caplog.at_level(logging.ERROR):
        bench.take(request(job_id="a"))
    pauses = [record.args[-1] for record in caplog.records if isinstance(record.args, tuple)]
    assert pauses == [0.001, 0.002, 0.004, 0.004, 0.004]
    assert all("Nothing is acknowledged" in record.getMessage() for record in caplog.records)


def test_a_stop_while_the_disk_refuses_ends_at_once_and_acknowledges_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.intake._RETRY_FIRST_S", 3600.0)
    bench.ledger_disk.refusals = float("inf")
    bench.intake.start()
    bench.source.bring(upload("a"))
    assert bench.publisher.refused.wait(PATIENCE_S)
    assert bench.source.acknowledged == []
    bench.intake.stop(PATIENCE_S)
    assert not bench.intake._thread.is_alive()
    assert bench.source.acknowledged == []
    assert bench.ledger.get("a") is None
    assert bench.spooled() == [WAV], "the change may be there after a crash, so its audio stays for the next start"


@pytest.mark.usefixtures("_quick_retries")
def test_rejections_are_reported_once_when_the_disk_refuses_their_batch(bench: Bench) -> None:
    bench.ledger_disk.refusals = 1
    assert bench.take(message(b"{"), request(job_id="a", beam_size=11)) == ["malformed_json", "invalid_request"]


# -- the thread ----------------------------------------------------------------------------------------------------


def test_the_thread_processes_messages_until_it_is_stopped(bench: Bench) -> None:
    acknowledged = threading.Event()
    bench.source.on_acknowledge = acknowledged.set
    bench.intake.start()
    for job_id in ("a", "b"):
        acknowledged.clear()
        bench.source.bring(request(job_id=job_id))
        assert acknowledged.wait(PATIENCE_S)
    bench.source.bring()  # nothing, as a source that is woken does
    bench.intake.stop(PATIENCE_S)
    assert not bench.intake._thread.is_alive()
    assert [job.job_id for job in bench.jobs()] == ["a", "b"]


def test_an_intake_that_was_never_started_can_be_stopped(bench: Bench) -> None:
    bench.intake.stop()


# -- any message ---------------------------------------------------------------------------------------------------

topics = st.sampled_from(
    [
        "cesar/jobs",
        "cesar/audio",
        "cesar/audio/",
        "cesar/audio/a",
        "cesar/audio/b",
        "cesar/audio/a/b",
        "cesar/audio/\ufffd",
    ]
)
payloads = st.binary(max_size=60) | st.sampled_from(
    [
        b"",
        b"{}",
        b"null",
        b"porch.wav",
        b"http://example.org/a.wav",
        b'{"audio_path": "a"}',
        b'{"audio_path": "a", "job_id": "a"}',
        b'{"audio_path": "b", "job_id": "a"}',
        b'{"audio_base64": "YQ==", "job_id": "a"}',
        b'{"audio_path": "a", "job_id": "b", "metadata": {"a": 1e999}}',
        b'{"audio_path": "a", "model_size": "\\u0000"}',
        b'{"audio_path": "a", "job_id": "b", "formats": ["srt"], "clip_timestamps": [[0, 1]]}',
        b"[" * MAX_PAYLOAD_BYTES,
        b"x" * (MAX_PAYLOAD_BYTES + 1),
    ]
)
deliveries = st.builds(
    Delivery,
    topic=topics,
    payload=payloads,
    qos=st.sampled_from([0, 1]),
    retain=st.booleans(),
    dup=st.booleans(),
    receipt=st.builds(Receipt, st.just(1), st.integers(1, 3)),
    user_properties=st.sampled_from(
        [(), (("metadata", "["),), (("job_id", "a"),), (("room", "\x00"),), (("task", "x"),)]
    ),
    received_at=st.just(0.0),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(deliveries, min_size=1, max_size=6), min_size=1, max_size=3))
def test_any_message_is_acknowledged_and_a_good_job_after_it_is_accepted(batches: list[list[Delivery]]) -> None:
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as bench:
        for batch in batches:
            bench.take(*batch)
        assert bench.take(request(job_id="good")) == []
        needed = {bench.spool.path(name).name for name in bench.ledger.needed_spool_files()}
        assert needed == {path.name for path in bench.spool_folder.iterdir()}
        assert len({job.job_id for job in bench.jobs()}) == len(bench.jobs())
        for rejection in bench.publisher.rejections:
            assert json.loads(rejection.encode())["detail"].endswith(".")


# -- commands and responses ----------------------------------------------------------------------------------------


def command(name: str, payload: bytes = b"", **fields: Any) -> Delivery:
    return message(payload, f"cesar/request/{name}", **fields)


def test_a_command_gets_its_response_on_its_topic_and_is_then_acknowledged(bench: Bench) -> None:
    assert bench.take(command("cancel", b"a")) == []
    assert bench.publisher.responses == [("cesar/response/cancel", b"cancel: a", None)]
    assert bench.trace[-2:] == ["answered", "acknowledged"]


def test_a_command_sees_the_jobs_before_it_and_none_behind_it(bench: Bench) -> None:
    bench.take(request(job_id="a"), command("list"), request(job_id="b"), request(job_id="c"), command("list"))
    assert bench.commands.seen == [["a"], ["a", "b", "c"]]
    assert bench.trace.count("acknowledged") == 4, "each run of jobs or commands in its turn"


def test_a_command_to_another_consumer_is_acknowledged_without_a_response(bench: Bench) -> None:
    assert bench.take(command("cancel", b"elsewhere", response_topic="cesar/replies/me"), command("list")) == []
    assert bench.publisher.responses == [("cesar/response/list", b"list: ", None)]
    assert len(bench.source.acknowledged) == 2


def test_a_command_with_a_response_topic_gets_its_response_there_as_well(bench: Bench) -> None:
    bench.take(command("health", response_topic="cesar/replies/me", correlation_data=b"7"))
    assert bench.publisher.responses == [
        ("cesar/response/health", b"health: ", None),
        ("cesar/replies/me", b"health: ", b"7"),
    ]


@pytest.mark.parametrize("topic", ["cesar/status/a", "homeassistant/tag/evil/config", "my/answers"])
def test_no_response_is_published_on_a_topic_that_is_not_allowed_and_the_log_says_why(
    bench: Bench, caplog: pytest.LogCaptureFixture, topic: str
) -> None:
    bench.take(
        command("health", response_topic=topic),
        message(b'{"audio_path": "a.wav"}', response_topic=topic),
        message(b"x", "cesar/audio/no!id", response_topic=topic),
    )
    assert [topic for topic, _, _ in bench.publisher.responses] == ["cesar/response/health"]
    problem = RESPONSE_TOPICS.problem(topic)
    assert [record.getMessage() for record in caplog.records if record.__dict__.get("action") == "not_answered"] == [
        f"No response on {topic}: {problem}"
    ] * 3


def test_a_client_may_use_a_topic_among_the_response_topics(bench: Bench) -> None:
    bench.take(command("health", response_topic="cesar/response/my-client"))
    assert [topic for topic, _, _ in bench.publisher.responses] == ["cesar/response/health", "cesar/response/my-client"]


def test_a_retained_command_is_rejected_as_it_would_be_executed_at_every_connection(bench: Bench) -> None:
    assert bench.take(command("delete", b"a", retain=True)) == ["invalid_request"]
    assert bench.commands.seen == []
    assert bench.publisher.responses == []


def test_a_command_that_the_handlers_reject_is_reported_as_well(bench: Bench) -> None:
    bench.commands.rejection = Refusal("unknown_command", "There is none.")
    assert bench.take(command("dance")) == ["unknown_command"]
    assert bench.publisher.responses == [("cesar/response/dance", b"dance: ", None)]


def test_a_submission_with_a_response_topic_gets_queued_as_its_response(bench: Bench) -> None:
    bench.take(
        message(
            b'{"job_id": "a", "audio_path": "porch.wav"}',
            response_topic="cesar/replies/me",
            correlation_data=b"\x00\xff",
        )
    )
    ((topic, payload, correlation),) = bench.publisher.responses
    assert (topic, json.loads(payload), correlation) == (
        "cesar/replies/me",
        {"job_id": "a", "status": "queued"},
        b"\x00\xff",
    )
    assert bench.trace.index("ledger synced") < bench.trace.index("answered"), "it is the promise"


def test_the_response_has_the_generated_id_and_a_redelivery_the_same(bench: Bench) -> None:
    first = message(b"porch.wav", response_topic="cesar/replies/me")
    bench.take(first)
    bench.take(replace(first, dup=True))
    ids = [json.loads(payload)["job_id"] for _, payload, _ in bench.publisher.responses]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert bench.ledger.get(ids[0]) is not None


def test_the_response_has_the_present_status_of_a_known_job(bench: Bench) -> None:
    bench.take(request(job_id="a"))
    bench.ledger.cancel("a")
    bench.take(replace(request(job_id="a"), response_topic="cesar/replies/me"))
    ((_, payload, _),) = bench.publisher.responses
    assert json.loads(payload) == {"job_id": "a", "status": "cancelled"}


def test_the_response_to_a_rejected_submission_is_the_rejection(bench: Bench) -> None:
    bench.take(message(b"{", response_topic="cesar/replies/me", correlation_data=b"1"))
    ((topic, payload, correlation),) = bench.publisher.responses
    assert (topic, correlation) == ("cesar/replies/me", b"1")
    assert json.loads(payload) == bench.publisher.rejections[0].model_dump()
