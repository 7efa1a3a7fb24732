"""How a consumer announces itself to Home Assistant, as the broker sees it: the command as a process, mosquitto.

What Home Assistant makes of it is tested inside of one, by `make test-homeassistant`.
"""

import json
from collections.abc import Callable, Iterator

import pytest

from tests.acceptance.harness import PATIENCE_S, Bus, Consumer, command
from tests.conftest import Mosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]

DEVICE = "homeassistant/device/cesar-mqtt_cesar/config"
ENTITIES = 27
PREFIX = "CESAR_HOMEASSISTANT__PREFIX"
DISCOVERY = "CESAR_HOMEASSISTANT__DISCOVERY"


class Home(Bus):
    """Sees what is announced, too."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._client.subscribe([("homeassistant/#", 1), ("other/#", 1)])
        self.settle()

    def announced(self, topic: str, times: int = 1) -> None:
        """Wait until a topic was announced so often."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._count(topic) >= times, PATIENCE_S), f"{topic} was not announced"

    def _count(self, topic: str) -> int:
        return sum(message.topic == topic and bool(message.payload) for message in self.messages)


@pytest.fixture
def home(mosquitto: Mosquitto) -> Iterator[Home]:
    bus = Home(mosquitto.port)
    yield bus
    bus.close()


def retained(broker: Mosquitto) -> list[str]:
    """The discovery topics on which the broker retains something."""
    late = Home(broker.port)
    late.leave()
    return sorted(m.topic for m in late.messages if m.retain and not m.topic.startswith("cesar/"))


def test_a_consumer_is_announced_when_it_connects_and_after_each_birth(
    mosquitto: Mosquitto, serve: Serve, home: Home
) -> None:
    serve("--broker", mosquitto.url)
    home.announced(DEVICE)
    assert retained(mosquitto) == [DEVICE]
    (message,) = home.seen(DEVICE)
    assert len(message["components"]) == ENTITIES
    home.wait("cesar/consumer/cesar/state")
    states = len(home.seen("cesar/consumer/cesar/state"))
    home.publish("homeassistant/status", "offline")
    home.publish("homeassistant/status", "online")
    home.announced(DEVICE, 2)
    home.wait("cesar/consumer/cesar/state", lambda _: len(home.seen("cesar/consumer/cesar/state")) > states)
    home.settle()
    assert home.seen("cesar/consumer/cesar/state")[states:] == [{"state": "online"}]
    assert home.seen("cesar/rejected") == []
    assert home.every_status() == []


@pytest.mark.parametrize("topic", ["other/status", "homeassistant/status"])
def test_home_assistant_is_heard_on_its_own_birth_topic_whatever_the_discovery_prefix(
    mosquitto: Mosquitto, serve: Serve, home: Home, topic: str
) -> None:
    serve("--broker", mosquitto.url, environ={PREFIX: "other"})
    home.announced(DEVICE.replace("homeassistant", "other"))
    home.publish(topic, "online")
    home.announced(DEVICE.replace("homeassistant", "other"), 2)


def test_a_broker_that_has_lost_the_announcement_gets_it_again(mosquitto: Mosquitto, serve: Serve, home: Home) -> None:
    serve("--broker", mosquitto.url)
    home.announced(DEVICE)
    mosquitto.restart()
    assert retained(mosquitto) in ([], [DEVICE])
    after = Home(mosquitto.port)
    try:
        after.announced(DEVICE)
    finally:
        after.close()


def test_an_announcement_of_another_kind_or_place_takes_the_place_of_the_one_before(
    mosquitto: Mosquitto, serve: Serve, home: Home
) -> None:
    consumer = serve("--broker", mosquitto.url)
    home.announced(DEVICE)
    consumer.stop()
    serve("--broker", mosquitto.url, environ={DISCOVERY: "component", PREFIX: "other"})
    home.announced("other/button/cesar-mqtt_cesar/cancel/config")
    assert len(retained(mosquitto)) == ENTITIES
    assert DEVICE not in retained(mosquitto)


def test_the_consumer_s_switch_pauses_it_and_lets_it_go_on(mosquitto: Mosquitto, serve: Serve, home: Home) -> None:
    serve("--broker", mosquitto.url)
    home.publish("cesar/consumer/cesar/pause/set", "ON")
    home.wait("cesar/consumer/cesar/queue", lambda queue: queue["paused"])
    home.publish("cesar/consumer/cesar/pause/set", "OFF")
    home.wait("cesar/response/resume", lambda answer: answer["status"] == "ok")
    home.publish("cesar/consumer/cesar/pause/set", "maybe")
    assert home.wait("cesar/rejected")["reason"] == "invalid_request"


def test_remove_leaves_nothing_and_says_what_it_did(mosquitto: Mosquitto, serve: Serve, home: Home) -> None:
    consumer = serve("--broker", mosquitto.url, environ={DISCOVERY: "component", PREFIX: "other"})
    home.announced("other/button/cesar-mqtt_cesar/cancel/config")
    home.publish("homeassistant/device/cesar-mqtt_cesar/config", "{}", retain=True)  # of another time
    home.publish("homeassistant/device/cesar-mqtt_cesar2/config", "{}", retain=True)
    home.publish("other/sensor/cesar-mqtt_cesar/of_an_older_version/config", "{}", retain=True)
    first = command("discovery", "remove", "--broker", mosquitto.url, "--discovery-prefix", "other")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("removed other/") == ENTITIES + 1
    assert "is running, and announces itself again" in first.stderr
    consumer.stop()
    second = command("discovery", "remove", "--broker", mosquitto.url, "--json")
    assert json.loads(second.stdout) == {"removed": [DEVICE]}
    assert retained(mosquitto) == ["homeassistant/device/cesar-mqtt_cesar2/config"]
    third = command("discovery", "remove", "--broker", mosquitto.url)
    assert third.returncode == 0
    assert "nothing to remove" in third.stdout


def test_what_is_turned_off_announces_nothing_and_withdraws_nothing(
    mosquitto: Mosquitto, serve: Serve, home: Home
) -> None:
    home.publish(DEVICE, '{"by": "somebody"}', retain=True)
    consumer = serve("--broker", mosquitto.url, environ={"CESAR_HOMEASSISTANT__ENABLED": "false"})
    home.publish("homeassistant/status", "online")
    consumer.wait_for_log("is ready")
    assert consumer.stop() == 0
    home.wait("cesar/consumer/cesar/state", lambda told: told["state"] == "offline")
    assert home.seen(DEVICE) == [{"by": "somebody"}]
    assert retained(mosquitto) == [DEVICE]


def test_show_prints_what_would_be_announced(free_port: int) -> None:
    shown = command("discovery", "show", "--name", "kitchen", environ={PREFIX: "other"})
    assert list(json.loads(shown.stdout)) == ["other/device/cesar-mqtt_kitchen/config"]
    away = command("discovery", "remove", "--broker", f"mqtt://127.0.0.1:{free_port}")
    assert away.returncode == 3
    assert away.stderr.count("\n") == 1
    assert f"No broker at mqtt://127.0.0.1:{free_port}" in away.stderr
