"""The queue on a real server: what is in order, what is not, and what survives the server."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from cesar_mqtt.config import JetStreamSettings
from cesar_mqtt.engines.jetstream import JetStreamQueue, look
from cesar_mqtt.engines.messages import Message, QueueState, QueueUnavailableError
from tests.conftest import PATIENCE_S
from tests.nats_server import NatsServer

TOPICS = ("cesar/jobs", "cesar/audio/#", "cesar/request/#")

Open = Callable[..., JetStreamQueue]


class Producer:
    """An MQTT client that waits for its PUBACKs."""

    def __init__(self, port: int) -> None:
        self.client = Client(CallbackAPIVersion.VERSION2, client_id="producer", protocol=MQTTProtocolVersion.MQTTv311)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def publish(self, topic: str, payload: bytes = b"{}", *, retain: bool = False) -> None:
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(PATIENCE_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with closing(NatsServer(tmp_path / "nats")) as started:
        yield started


@pytest.fixture
def producer(server: NatsServer) -> Iterator[Producer]:
    with closing(Producer(server.mqtt_port)) as client:
        yield client


@pytest.fixture
def open_queue(server: NatsServer, producer: Producer) -> Iterator[Open]:
    assert producer
    queues: list[JetStreamQueue] = []

    def start(mode: Any = "strict", *, topics: tuple[str, ...] = TOPICS, **settings: Any) -> JetStreamQueue:
        values = {"url": server.url, "ack_wait": 1.0, **settings}
        queue = JetStreamQueue(JetStreamSettings(**values), mode=mode, topics=topics, name="test", records_s=3600)
        queues.append(queue)
        queue.start()
        return queue

    yield start
    for queue in queues:
        queue.stop(PATIENCE_S)


def opened(queue: JetStreamQueue) -> JetStreamQueue:
    assert queue.wait_ready(PATIENCE_S)
    return queue


def refused(queue: JetStreamQueue) -> str:
    queue.join(0.01)
    for _ in range(int(PATIENCE_S * 20)):
        if queue.refusal is not None or queue.wait_ready(0.05):
            break
    assert queue.refusal is not None
    return str(queue.refusal)


def received(fetch: Callable[[], Message | None]) -> Message:
    for _ in range(int(PATIENCE_S)):
        message = fetch()
        if message is not None:
            return message
    pytest.fail("nothing was delivered")


def enqueue(queue: JetStreamQueue, job_id: str, seq: int = 1) -> None:
    queue.enqueue(job_id, Message("cesar/jobs", b"{}", seq, 1, 1234.5, None, ""))


def test_requests_of_mqtt_clients_arrive_in_order_with_their_topics(open_queue: Open, producer: Producer) -> None:
    queue = opened(open_queue(ack_wait=30.0))
    topics = ["cesar/jobs", "cesar/audio/one", "cesar/audio/with.dot", "cesar/audio/two/levels", "cesar/request/get"]
    for number, topic in enumerate(topics):
        producer.publish(topic, str(number).encode())
    for number, topic in enumerate(topics):
        message = received(queue.next_request)
        assert (message.topic, message.payload, message.deliveries) == (topic, str(number).encode(), 1)
        assert queue.next_request() is None  # one at a time in the whole group
        queue.acknowledge(message)


def test_an_unacknowledged_job_is_delivered_again_before_the_others(open_queue: Open) -> None:
    first, second = opened(open_queue("parallel")), opened(open_queue("parallel"))
    for job_id in ("a", "b", "c"):
        enqueue(first, job_id)
    lost = received(first.next_job)
    assert (lost.job_id, lost.received_at) == ("a", 1234.5)
    kept = received(first.next_job)
    again = None
    for _ in range(int(PATIENCE_S)):
        first.renew(kept, 1.0)
        again = again or second.next_job()
        if again is not None and again.job_id == "a":
            break
        if again is not None:
            second.acknowledge(again)
            again = None
    assert again is not None
    assert (again.job_id, again.deliveries) == ("a", 2)
    first.acknowledge(kept)  # on a slow machine it would expire, too
    second.give_back(again)
    assert received(second.next_job).deliveries == 3


def test_strict_delivers_nothing_while_a_job_is_renewed(open_queue: Open) -> None:
    first, second = opened(open_queue(ack_wait=5.0)), opened(open_queue(ack_wait=5.0))
    enqueue(first, "a")
    enqueue(first, "b")
    running = received(first.next_job)
    for _ in range(3):
        first.renew(running, 1.0)
        assert second.next_job() is None
    assert second.waiting() == 1
    first.acknowledge(running)
    assert received(second.next_job).job_id == "b"


def test_a_request_is_enqueued_once_and_a_job_can_be_found_and_removed(open_queue: Open) -> None:
    queue = opened(open_queue())
    for _ in range(2):
        enqueue(queue, "a")
    enqueue(queue, "b")
    assert queue.waiting() == 2
    first = queue.job_behind(0)
    assert first is not None
    second = queue.job_behind(first.seq)
    assert second is not None
    assert (first.job_id, second.job_id, queue.job_behind(second.seq)) == ("a", "b", None)
    queue.remove("a")
    assert (queue.is_enqueued("a"), queue.is_enqueued("b")) == (False, True)


def test_a_retried_job_is_no_copy_of_a_request_with_the_same_number(open_queue: Open) -> None:
    queue = opened(open_queue())
    enqueue(queue, "a", seq=5)
    queue.acknowledge(received(queue.next_job))
    enqueue(queue, "a", seq=5)
    assert queue.waiting() == 0  # a copy of the request
    enqueue(queue, "a", seq=-5)
    assert received(queue.next_job).job_id == "a"


def test_the_state_of_a_queue_can_be_looked_at(open_queue: Open, server: NatsServer, producer: Producer) -> None:
    settings = JetStreamSettings(url=server.url)
    assert look(settings, 5.0) is None
    queue = opened(open_queue(ack_wait=30.0))
    producer.publish("cesar/jobs")
    for job_id in ("a", "b", "c"):
        enqueue(queue, job_id)
    received(queue.next_job)
    assert look(settings, 5.0) == QueueState(requests=1, waiting=2, delivered=1, replicas=1, absent=())
    server.kill()
    with pytest.raises(QueueUnavailableError):
        look(settings, 5.0)
    server.start()


def test_a_record_is_created_once_and_changed_only_by_who_has_read_it(open_queue: Open) -> None:
    queue = opened(open_queue())
    record = queue.create_record("job.a", {"state": "queued"})
    assert record is not None
    assert queue.create_record("job.a", {"state": "other"}) is None
    newer = queue.update_record("job.a", record, {"state": "processing"})
    assert newer is not None
    assert queue.update_record("job.a", record, {"state": "completed"}) is None
    assert queue.record("job.a") == newer
    queue.delete_record("job.a")
    assert queue.record("job.a") is None
    assert queue.create_record("job.a", {}) is not None


def test_retained_messages_can_be_read(open_queue: Open, producer: Producer) -> None:
    queue = opened(open_queue())
    assert queue.retained("cesar/status/a") is None
    producer.publish("cesar/status/a", b"done", retain=True)
    assert queue.retained("cesar/status/a") == b"done"


def test_what_is_acknowledged_survives_a_killed_server_and_the_queue_opens_again(
    open_queue: Open, server: NatsServer
) -> None:
    queue = opened(open_queue())
    for number in range(5):
        with closing(Producer(server.mqtt_port)) as producer:
            producer.publish("cesar/jobs", f"{number}".encode())
            server.kill()
        with pytest.raises(QueueUnavailableError):
            queue.record("any")
        server.start()
        message = received(lambda: _patiently(queue))
        assert message.payload == f"{number}".encode()
        queue.acknowledge(message)


def _patiently(queue: JetStreamQueue) -> Message | None:
    queue.wait_ready(PATIENCE_S)
    try:
        return queue.next_request()
    except QueueUnavailableError:
        return None


def test_contradicting_settings_are_named_and_nothing_is_changed(open_queue: Open) -> None:
    opened(open_queue())
    assert "one mode" in refused(open_queue("parallel"))
    assert "ack_wait is 1 s" in refused(open_queue(ack_wait=5.0))
    assert "topic_prefix" in refused(open_queue(topics=("other/jobs",)))
    assert "stored on 1 servers" in refused(open_queue(replicas=3))
    assert "max_payload" in refused(open_queue(max_message_bytes=2 << 20))
    assert "its retention is 'limits'" in refused(open_queue(stream="KV_CESAR"))
    opened(open_queue())


def test_wrong_credentials_end_the_start(tmp_path: Path) -> None:
    users = "authorization { users: [ { user: a, password: a } ] }"
    with closing(NatsServer(tmp_path / "guarded", more=users)) as guarded:
        settings = JetStreamSettings(url=guarded.url, username="a", password_file=tmp_path / "password")
        (tmp_path / "password").write_text("wrong\n")
        queue = JetStreamQueue(settings, mode="strict", topics=TOPICS, name="test", records_s=60)
        queue.start()
        assert "refuses the user or the password" in refused(queue)
        queue.stop(PATIENCE_S)


def test_a_server_that_is_away_is_waited_for_and_does_not_hold_up_a_stop() -> None:
    queue = JetStreamQueue(
        JetStreamSettings(url="nats://127.0.0.1:1"), mode="strict", topics=TOPICS, name="test", records_s=60
    )
    queue.start()
    assert not queue.wait_ready(0.1)
    queue.stop(PATIENCE_S)
    assert not queue.alive
