"""The asking side of the control topics, at a real broker, with consumers that answer what the test wants."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from cesar_mqtt.cli.control_client import ControlClient
from cesar_mqtt.config import Settings, load_settings
from cesar_mqtt.errors import BrokerRefusedError
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError, UnreachableError
from tests.conftest import PATIENCE_S, Mosquitto, StartMosquitto

Answer = Callable[[dict[str, Any]], list[dict[str, Any]]]


def settings(url: str) -> Settings:
    return load_settings(flags={"broker": {"url": url}}, config_file=None, environ={}, cwd=Path("/"))


def ok(request: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {"status": "ok", "data": data, "error": None, "transaction": request["transaction"]}


class FakeConsumer:
    """It says that it is online or offline, notes what it is asked, and answers as it is told to."""

    def __init__(self, port: int, name: str, answer: Answer, *, state: str = "online") -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.noted = threading.Condition()
        self._answer = answer
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe("cesar/request/#", qos=1)
        assert self._subscribed.wait(PATIENCE_S)
        said = self._client.publish(f"cesar/consumer/{name}/state", json.dumps({"state": state}), qos=1, retain=True)
        said.wait_for_publish(PATIENCE_S)

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        command, request = message.topic.rpartition("/")[2], json.loads(message.payload)
        with self.noted:
            self.asked.append((command, request))
            self.noted.notify_all()
        for answer in self._answer(request):
            self._client.publish(f"cesar/response/{command}", json.dumps(answer), qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def consumer() -> Iterator[Callable[..., FakeConsumer]]:
    started: list[FakeConsumer] = []

    def start(broker: Mosquitto, name: str = "cesar", answer: Answer = lambda _: [], **options: Any) -> FakeConsumer:
        started.append(FakeConsumer(broker.port, name, answer, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


Start = Callable[..., FakeConsumer]


@pytest.mark.mosquitto
def test_the_answer_of_the_own_transaction_is_returned_and_others_are_passed_over(
    mosquitto: Mosquitto, consumer: Start
) -> None:
    def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
        return [ok({"transaction": "of another client"}, n=1), ok(request, n=3), ok({"transaction": None}, n=2)]

    asked = consumer(mosquitto, answer=answers).asked
    with ControlClient(settings(mosquitto.url), ["get"], timeout_s=PATIENCE_S) as requester:
        assert requester.ask("get", {"job_id": "a"}) == {"n": 3}
        assert requester.ask("get", {"job_id": "b"}) == {"n": 3}
    assert [request["job_id"] for _, request in asked] == ["a", "b"]
    assert asked[0][1]["transaction"] != asked[1][1]["transaction"]


@pytest.mark.mosquitto
def test_a_refusal_is_the_consumers_own_sentence(mosquitto: Mosquitto, consumer: Start) -> None:
    def refuse(request: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**ok(request), "status": "error", "error": "There is no job a."}]

    consumer(mosquitto, answer=refuse)
    with (
        ControlClient(settings(mosquitto.url), ["get"], timeout_s=PATIENCE_S) as requester,
        pytest.raises(RequestRefusedError, match=r"^There is no job a\.$"),
    ):
        requester.ask("get", {"job_id": "a"})


@pytest.mark.mosquitto
def test_a_consumer_that_is_away_is_not_asked_so_that_nothing_is_done_when_it_is_back(
    mosquitto: Mosquitto, consumer: Start
) -> None:
    away = consumer(mosquitto, state="offline", answer=lambda request: [ok(request)])
    with (
        ControlClient(settings(mosquitto.url), ["delete"], timeout_s=PATIENCE_S) as requester,
        pytest.raises(NoAnswerError, match="offline") as failed,
    ):
        requester.ask("delete", {"job_id": "a"})
    assert failed.value.exit_code == 3
    assert away.asked == []


@pytest.mark.mosquitto
def test_where_nobody_ever_was_that_is_said(mosquitto: Mosquitto) -> None:
    with (
        ControlClient(settings(mosquitto.url), ["health"], timeout_s=5) as requester,
        pytest.raises(NoAnswerError, match="cesar-mqtt serve"),
    ):
        requester.ask("health")


@pytest.mark.mosquitto
def test_a_consumer_that_is_online_and_silent_is_named(mosquitto: Mosquitto, consumer: Start) -> None:
    consumer(mosquitto, "attic")
    with (
        ControlClient(settings(mosquitto.url), ["health"], timeout_s=5) as requester,
        pytest.raises(NoAnswerError, match="attic is online but did not answer"),
    ):
        requester.ask("health")


@pytest.mark.mosquitto
def test_of_several_consumers_each_can_be_asked_by_name(mosquitto: Mosquitto, consumer: Start) -> None:
    for name in ("cesar", "attic"):

        def answer(request: dict[str, Any], name: str = name) -> list[dict[str, Any]]:
            return [ok(request, consumer=name)] if request.get("consumer") == name else []

        consumer(mosquitto, name, answer)
    with ControlClient(settings(mosquitto.url), ["health"], timeout_s=PATIENCE_S) as requester:
        everyone = requester.targets(None)
        assert everyone == ["attic", "cesar"]
        assert [requester.ask("health", consumer=name)["consumer"] for name in everyone] == everyone
        assert requester.targets("attic") == ["attic"]


@pytest.mark.mosquitto
def test_a_single_consumer_is_asked_without_a_name(mosquitto: Mosquitto, consumer: Start) -> None:
    consumer(mosquitto)
    with ControlClient(settings(mosquitto.url), ["health"], timeout_s=PATIENCE_S) as requester:
        assert requester.targets(None) == [None]


@pytest.mark.mosquitto
def test_a_broker_that_forbids_to_ask_is_quoted(start_mosquitto: StartMosquitto, tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read cesar/#\n")
    broker = start_mosquitto(f"acl_file {tmp_path / 'acl'}")
    with ControlClient(settings(broker.url), ["cancel"], timeout_s=PATIENCE_S) as requester:
        requester.consumers["cesar"] = True
        with pytest.raises(BrokerRefusedError, match="cesar/request/cancel") as failed:
            requester.ask("cancel", {"job_id": "a"})
        assert "ot authorized" in (requester.try_to_publish("cesar/jobs", b"") or "")
    assert failed.value.exit_code == 78


@pytest.mark.mosquitto
def test_a_wrong_password_and_a_broker_that_is_not_there_are_told_apart(
    start_mosquitto: StartMosquitto, free_port: int
) -> None:
    broker = start_mosquitto(users={"me": "right"})
    with pytest.raises(BrokerRefusedError) as refused:
        ControlClient(settings(f"mqtt://me:wr0ng@127.0.0.1:{broker.port}"), ["get"], timeout_s=PATIENCE_S).connect()
    assert "wr0ng" not in str(refused.value)
    with pytest.raises(UnreachableError, match="--broker"):
        ControlClient(settings(f"mqtt://127.0.0.1:{free_port}"), ["get"], timeout_s=0.5).connect()


@pytest.mark.mosquitto
def test_a_connection_that_is_lost_while_waiting_is_told(mosquitto: Mosquitto, consumer: Start) -> None:
    def stop(_request: dict[str, Any]) -> list[dict[str, Any]]:
        threading.Thread(target=mosquitto.kill).start()
        return []

    consumer(mosquitto, answer=stop)
    with (
        ControlClient(settings(mosquitto.url), ["get"], timeout_s=600) as requester,  # longer than a test may take
        pytest.raises(NoAnswerError, match="lost before an answer"),
    ):
        requester.ask("get", {"job_id": "a"})


def test_a_broker_that_says_nothing_is_not_one_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"mqtt://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(NoAnswerError, match="Nothing at") as failed:
            ControlClient(settings(url), ["get"], timeout_s=0.3).connect()
    assert failed.value.exit_code == 3
