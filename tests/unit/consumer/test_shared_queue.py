import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cesar_mqtt.consumer import shared_queue
from cesar_mqtt.consumer.publisher import Permit, Publisher
from cesar_mqtt.consumer.shared_commands import record_key, request_payload
from cesar_mqtt.consumer.shared_queue import Claims, Lease, RequestReader
from cesar_mqtt.engines.messages import Message, QueueUnavailableError, Record
from cesar_mqtt.jobs import AudioSource, Claim, IllegalTransitionError, Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.protocol.payloads import status_of
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.protocol.truncate import truncate_status
from tests import factories

ACK_WAIT_S = 10.0
TOPICS = Topics("cesar", "one")
REQUEST = Message("cesar/jobs", b'{"audio_path": "a.wav", "priority": 3}', 7, 1, 1234.5, None, "reply")


class FakeModels:
    def default_name(self) -> str:
        return "base"

    def language_for(self, _name: str) -> str | None:
        return None

    def is_allowed(self, name: str) -> bool:
        return name == "base"

    def explain_unknown(self, name: str) -> str:
        return f"{name} is unknown"


class FakeQueue:
    """Records and deliveries in memory; `works` as long as the server answers."""

    max_payload_bytes = 1000

    def __init__(self) -> None:
        self.works = True
        self.records: dict[str, Record] = {}
        self.jobs: dict[str, Message] = {}
        self.acknowledged: list[Message] = []
        self.given_back: list[Message] = []
        self.deliver: list[Message] = []
        self.on_renewed: Callable[[], None] = lambda: None
        self.broker: dict[str, bytes] = {}
        """What is retained, by topic."""
        self.on_read: Callable[[], None] = lambda: None

    def _check(self) -> None:
        if not self.works:
            raise QueueUnavailableError("away")

    def wait_ready(self, _timeout_s: float) -> bool:
        return self.works

    def next_request(self) -> Message | None:
        return None

    def next_job(self) -> Message | None:
        self._check()
        return self.deliver.pop(0) if self.deliver else None

    def acknowledge(self, message: Message) -> None:
        self._check()
        self.acknowledged.append(message)

    def renew(self, _message: Message, _timeout_s: float) -> None:
        self._check()
        self.on_renewed()

    def give_back(self, message: Message) -> None:
        self.given_back.append(message)

    def enqueue(self, job_id: str, request: Message) -> None:
        self.jobs[job_id] = request

    def is_enqueued(self, job_id: str) -> bool:
        return job_id in self.jobs

    def job_behind(self, _seq: int) -> Message | None:
        return None

    def waiting(self) -> int:
        return 0

    def retained(self, topic: str) -> bytes | None:
        self._check()
        self.on_read()
        return self.broker.get(topic)

    def record(self, key: str) -> Record | None:
        self._check()
        return self.records.get(key)

    def create_record(self, key: str, values: Mapping[str, Any]) -> Record | None:
        if key in self.records:
            return None
        return self.put(key, values)

    def update_record(self, key: str, record: Record, values: Mapping[str, Any]) -> Record | None:
        self._check()
        if self.records.get(key) != record:
            return None
        return self.put(key, values)

    def delete_record(self, key: str) -> None:
        self.records.pop(key, None)

    def put(self, key: str, values: Mapping[str, Any]) -> Record:
        before = self.records.get(key)
        self.records[key] = Record(1 if before is None else before.revision + 1, dict(values))
        return self.records[key]


class Group:
    """One consumer's claims, with a clock that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.queue = FakeQueue()
        self.ledger = Ledger(folder / "ledger.json", max_attempts=2)
        self.spool = Spool(folder / "spool")
        self.reader = RequestReader(self.queue, TOPICS, FakeModels(), max_payload_bytes=1 << 20)
        self.published: list[tuple[str, bytes]] = []
        self.claims = self.start()

    def start(self) -> Claims:
        def publish_again(
            topic: str, payload: bytes, *, is_wanted: Callable[[], bool], on_acknowledged: Callable[[], None]
        ) -> None:
            assert is_wanted()
            self.published.append((topic, payload))
            on_acknowledged()

        publisher = SimpleNamespace(
            publish_again=publish_again,
            refresh_queue=lambda: None,
            publish_status_of=lambda _job, *, is_wanted, on_acknowledged: on_acknowledged() if is_wanted() else None,
        )
        return Claims(
            self.queue,
            self.reader,
            ledger=self.ledger,
            spool=self.spool,
            publisher=cast("Publisher", publisher),
            topics=TOPICS,
            ack_wait_s=ACK_WAIT_S,
            is_strict=False,
            is_working=lambda: False,
            monotonic=lambda: self.now,
        )

    def claim(self, *, delivery: int = 1) -> Job:
        """Claim a job without attending to it."""
        message = replace(REQUEST, job_id="a", deliveries=delivery)
        lease = Lease(message, ACK_WAIT_S, lambda: self.now, since=self.now)
        assert self.claims._claim(lease)
        job = self.ledger.get("a")
        assert job is not None
        return job

    def values(self) -> Mapping[str, Any]:
        return self.queue.records[record_key("a")].values


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path)
    yield made
    made.ledger.close()


def test_a_lease_ends_for_ever_when_it_was_not_renewed_in_time() -> None:
    queue, now = FakeQueue(), [0.0]
    lease = Lease(REQUEST, ACK_WAIT_S, lambda: now[0], since=0.0)
    now[0] = 9.0
    lease.renew(queue)
    now[0] = 18.9
    assert lease.is_current
    now[0] = 19.0
    assert not lease.is_current
    now[0] = 10.0
    assert not lease.is_current


def test_a_lease_counts_from_before_the_server_was_asked() -> None:
    queue, now = FakeQueue(), [0.0]
    lease = Lease(REQUEST, ACK_WAIT_S, lambda: now[0], since=0.0)
    now[0] = 5.0
    queue.on_renewed = lambda: now.__setitem__(0, 9.0)
    lease.renew(queue)
    now[0] = 14.9
    assert lease.is_current
    now[0] = 15.0
    assert not lease.is_current


def test_a_request_without_an_id_has_the_same_one_at_each_delivery(group: Group) -> None:
    first, again = group.reader.read(REQUEST).job, group.reader.read(replace(REQUEST, deliveries=2)).job
    other = group.reader.read(replace(REQUEST, seq=8)).job
    assert first is not None
    assert again is not None
    assert other is not None
    assert first == again
    assert first.job_id != other.job_id
    assert (first.priority, first.warnings, first.received_at) == (0, ("priority_ignored",), 1234.5)


def test_a_request_over_the_limit_of_the_queue_is_rejected(group: Group) -> None:
    upload = Message("cesar/audio/a", bytes(1001), 1, 1, 0.0, None, "")
    refusal = group.reader.read(upload).refusal
    assert refusal is not None
    assert refusal.reason == "payload_too_large"
    assert "1000 are accepted (queue.jetstream.max_message_bytes" in refusal.detail
    assert "audio_path" in refusal.detail
    assert group.reader.read(replace(upload, payload=bytes(1000))).refusal is None


def test_the_record_names_the_claim_before_the_job_may_run(group: Group) -> None:
    job = group.claim()
    assert (job.claim, job.state, job.created_at) == (Claim(7, 1), JobState.QUEUED, 1234.5)
    assert (group.values()["claim"], group.values()["consumer"]) == ([7, 1], "one")
    assert group.claims.permit_of(job) is Permit.SKIP
    running = group.ledger.claim()
    assert running is not None
    assert running.attempt == 1
    assert group.claims.permit_of(running) is Permit.PUBLISH


def test_nothing_ends_or_is_published_after_the_lease(group: Group) -> None:
    group.claim()
    running = group.ledger.claim()
    assert running is not None
    group.now += ACK_WAIT_S
    assert group.claims.permit_of(running) is Permit.HOLD
    assert not group.claims.may_end(running)
    assert group.values()["state"] == "processing"


def test_nothing_ends_once_another_consumer_has_claimed(group: Group) -> None:
    group.claim()
    running = group.ledger.claim()
    assert running is not None
    group.queue.put(record_key("a"), {**group.values(), "claim": [7, 2], "consumer": "two"})
    assert not group.claims.may_end(running)
    assert group.claims.permit_of(running) is Permit.HOLD
    assert group.values()["consumer"] == "two"


def test_a_change_by_others_that_leaves_the_claim_does_not_keep_a_job_from_ending(group: Group) -> None:
    group.claim()
    running = group.ledger.claim()
    assert running is not None
    group.queue.put(record_key("a"), {**group.values(), "cancelling": True})
    assert group.claims.may_end(running)
    assert (group.values()["state"], group.values()["cancelling"]) == ("finished", True)


def test_an_older_delivery_is_ignored(group: Group) -> None:
    group.queue.put(record_key("a"), {"state": "processing", "claim": [7, 3], "consumer": "two"})
    lease = Lease(replace(REQUEST, job_id="a", deliveries=2), ACK_WAIT_S, lambda: group.now, since=group.now)
    assert not group.claims._claim(lease)
    assert (group.ledger.get("a"), group.queue.acknowledged) == (None, [])


@pytest.mark.parametrize(("returned", "state"), [(False, JobState.ERROR), (True, JobState.QUEUED)])
def test_deaths_are_counted_and_jobs_that_were_given_back_are_not(
    group: Group, *, returned: bool, state: JobState
) -> None:
    values = {"state": "processing", "claim": [7, 2], "crashes": 1, "returned": returned}
    group.queue.put(record_key("a"), values)
    job = group.claim(delivery=3)
    assert (job.state, group.values()["crashes"]) == (state, 1 if returned else 2)
    assert job.error_code == (None if returned else "crashed")


def test_a_job_that_is_to_be_cancelled_is_not_run_by_the_next_consumer(group: Group) -> None:
    group.queue.put(record_key("a"), {"state": "processing", "claim": [7, 1], "cancelling": True})
    assert group.claim(delivery=2).state is JobState.CANCELLED


def test_a_restart_forgets_what_was_running_and_holds_what_had_ended(group: Group) -> None:
    group.claim()
    assert group.start()
    assert group.ledger.get("a") is None
    group.claims = group.start()
    group.claim(delivery=2)
    running = group.ledger.claim()
    assert running is not None
    group.ledger.complete(running.seq, factories.result())
    ended = group.ledger.get("a")
    assert ended is not None
    restarted = group.start()
    assert restarted.permit_of(ended) is Permit.HOLD
    restarted._prove_earlier()
    assert restarted.permit_of(ended) is Permit.PUBLISH
    group.queue.jobs["a"] = REQUEST
    restarted = group.start()
    restarted._prove_earlier()
    assert restarted.permit_of(ended) is Permit.HOLD
    group.queue.put(record_key("a"), {**group.values(), "claim": [7, 3]})
    restarted._prove_earlier()
    assert group.ledger.get("a") is None


def test_an_end_without_an_acknowledgement_in_the_queue_is_held_until_the_queue_has_none(group: Group) -> None:
    group.claim()
    running = group.ledger.claim()
    assert running is not None
    group.ledger.complete(running.seq, factories.result())
    group.queue.jobs["a"] = REQUEST
    group.now += ACK_WAIT_S
    attend(group)
    job = group.ledger.get("a")
    assert job is not None
    assert group.claims.permit_of(job) is Permit.HOLD
    group.claims._prove_earlier()
    assert group.claims.permit_of(job) is Permit.HOLD
    del group.queue.jobs["a"]  # acknowledged by another consumer
    group.claims._prove_earlier()
    assert group.claims.permit_of(job) is Permit.PUBLISH


def test_an_end_that_only_newcomers_may_have_seen_is_published_again_by_the_next_consumer(group: Group) -> None:
    retain(group, factories.job("a", state=JobState.COMPLETED, attempt=1))
    group.queue.put(record_key("a"), {"state": "finished", "claim": [7, 1], "consumer": "two"})
    lease = Lease(replace(REQUEST, job_id="a", deliveries=2), ACK_WAIT_S, lambda: group.now, since=group.now)
    assert not group.claims._claim(lease)
    assert group.published == [(TOPICS.status("a"), group.queue.broker[TOPICS.status("a")])]
    assert (group.ledger.get("a"), len(group.queue.acknowledged)) == (None, 1)


def test_an_end_that_is_not_retained_makes_the_job_run_again(group: Group) -> None:
    retain(group, factories.job("a", state=JobState.COMPLETED, attempt=1))
    group.queue.put(record_key("a"), {"state": "finished", "claim": [7, 2], "consumer": "two"})
    assert group.claim(delivery=3).state is JobState.QUEUED
    assert (group.published, group.queue.acknowledged) == ([], [])


def test_a_retried_job_is_read_as_the_same_one(group: Group) -> None:
    options = {"language": "en", "beam_size": "auto"}
    job = factories.job("a", model_size="base", options=options, metadata={"n": 1}, formats=("srt",))
    parsed = group.reader.read(replace(REQUEST, payload=request_payload(job, b"RIFF")))
    assert parsed.job is not None
    read = parsed.job
    assert (read.job_id, read.model_size, read.options, read.metadata, read.formats, parsed.audio) == (
        "a",
        "base",
        options,
        {"n": 1},
        ("srt",),
        b"RIFF",
    )
    (name,) = group.spool.store([bytes(900)])
    upload = replace(group.reader.read(Message("cesar/audio/a", bytes(900), 1, 1, 0.0, None, "")).job or read)
    ended = factories.job("a", audio=AudioSource("spool", name), model_size="base", options=upload.options)
    assert group.claims._request_of(ended).topic == "cesar/audio/a"
    with pytest.raises(IllegalTransitionError, match="too large"):
        group.claims._request_of(ended._replace(metadata={"n": 1}))
    assert "audio_path" in json.loads(request_payload(factories.job("a"), None))


def ended(group: Group) -> Job:
    """A job of this consumer whose final status has its PUBACK."""
    group.claim()
    running = group.ledger.claim()
    assert running is not None
    group.ledger.complete(running.seq, factories.result())
    acknowledge_statuses(group)
    job = group.ledger.get("a")
    assert job is not None
    return job


def acknowledge_statuses(group: Group) -> list[Job]:
    pending = list(group.ledger.unpublished(10))
    group.ledger.mark_published([(job.seq, number) for number, job in pending])
    return [job for _, job in pending]


def attend(group: Group) -> None:
    assert group.claims._lease is not None
    group.claims._attend(group.claims._lease)


def retain(group: Group, job: Job) -> None:
    group.queue.broker[TOPICS.status("a")] = truncate_status(status_of(job, "one"))


def test_a_final_status_that_is_retained_is_acknowledged_at_once(group: Group) -> None:
    retain(group, ended(group))
    attend(group)
    assert [message.job_id for message in group.queue.acknowledged] == ["a"]


def publish_at_each_renewal(group: Group, retains: Job | None) -> list[Job]:
    """Let a renewal be due at each look, and have the publisher publish at it; the broker stores it or does not."""
    published: list[Job] = []

    def on_read() -> None:
        group.now += ACK_WAIT_S / 2

    def on_renewed() -> None:
        published.extend(acknowledge_statuses(group))
        if published and retains is not None:
            retain(group, retains)
        group.now += 1.0

    group.queue.on_read, group.queue.on_renewed = on_read, on_renewed
    return published


@pytest.mark.parametrize("older", [None, b"[]", JobState.PROCESSING])
def test_an_acknowledged_end_that_is_not_retained_is_published_again(
    group: Group, older: bytes | JobState | None
) -> None:
    job = ended(group)
    if isinstance(older, JobState):
        retain(group, job._replace(state=older))
    elif older is not None:
        group.queue.broker[TOPICS.status("a")] = older
    published = publish_at_each_renewal(group, job)
    attend(group)
    assert [(again.state, again.attempt) for again in published] == [(JobState.COMPLETED, 1)]
    assert [message.job_id for message in group.queue.acknowledged] == ["a"]


def test_an_end_that_is_never_retained_holds_up_nothing_for_ever(
    group: Group, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_queue, "_PROOF_DELAYS_S", (0.5,) * 5)
    ended(group)
    published = publish_at_each_renewal(group, None)
    attend(group)
    assert len(published) == 5
    assert "does not retain it" in caplog.text
    assert [message.job_id for message in group.queue.acknowledged] == ["a"]


def test_a_result_that_is_not_retained_is_published_again(group: Group) -> None:
    job = ended(group)
    retain(group, job)
    assert group.claims._is_retained(job)
    with_result = job._replace(formats=("srt",))
    assert not group.claims._is_retained(with_result)
    group.queue.broker[TOPICS.result("a", "srt")] = b"1"
    assert group.claims._is_retained(with_result)


def test_nothing_is_acknowledged_while_the_broker_cannot_be_asked(group: Group) -> None:
    job = ended(group)
    retain(group, job)
    publish_at_each_renewal(group, None)
    looks: list[bool] = []

    def on_read() -> None:
        looks.append(bool(group.queue.acknowledged))
        group.now += ACK_WAIT_S / 2
        if len(looks) < 3:
            raise QueueUnavailableError("no leader")

    group.queue.on_read = on_read
    attend(group)
    assert looks == [False] * 3
    assert len(group.queue.acknowledged) == 1


def test_a_retry_never_has_the_number_of_a_request(group: Group) -> None:
    """The server takes a message with the id and the number of another one for its copy, and drops it."""
    job = ended(group)
    group.queue.put(record_key("a"), {**group.values(), "request": 7})
    group.claims.resubmit(job)
    enqueued = group.queue.jobs["a"]
    assert enqueued.seq == -group.queue.records[record_key("a")].revision < 0
    assert (group.values()["state"], group.values()["request"], group.ledger.get("a")) == ("queued", 7, None)
