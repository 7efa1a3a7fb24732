"""Discovery messages and their schedule; tests/homeassistant proves that Home Assistant accepts them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from cesar_mqtt.consumer.discovery import (
    Mode,
    birth_topics,
    discovery_filters,
    discovery_messages,
)
from cesar_mqtt.consumer.discovery_schedule import AnnouncedTopics, DiscoverySchedule
from cesar_mqtt.consumer.incoming import MessageParser
from cesar_mqtt.consumer.own_topics import OwnTopics
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.protocol.consumer_payloads import Activity
from cesar_mqtt.protocol.languages import language_code
from cesar_mqtt.protocol.parsing import parse_command
from cesar_mqtt.protocol.payloads import EVENT_TYPES
from cesar_mqtt.protocol.topics import Topics
from tests.factories import delivery

KITCHEN = Topics("cesar", "kitchen")
DEVICE = "homeassistant/device/cesar-mqtt_kitchen/config"
ROOT_KEYS = {"device", "origin", "components"}
"""Home Assistant knows some more, and drops a device whose message has any other."""
MODES: tuple[Mode, ...] = get_args(Mode)


def messages(topics: Topics = KITCHEN, *, mode: Mode = "device", prefix: str = "homeassistant") -> dict[str, Any]:
    found = discovery_messages(topics, mode=mode, prefix=prefix, models=["base", "tiny.en"])
    return {topic: json.loads(payload) for topic, payload in found.items()}


def entities(topics: Topics = KITCHEN) -> dict[str, dict[str, Any]]:
    (message,) = messages(topics).values()
    components: dict[str, dict[str, Any]] = message["components"]
    return components


def test_a_device_is_one_message_with_known_keys_only() -> None:
    (topic,) = messages()
    assert topic == DEVICE
    assert set(messages()[topic]) == ROOT_KEYS


def test_every_entity_has_an_id_a_quality_of_service_and_a_name() -> None:
    for key, entity in entities().items():
        assert entity["unique_id"] == f"cesar-mqtt.kitchen.{key}"
        assert entity["qos"] == 1
        assert entity["name"]


def test_the_contract_s_entities_are_there() -> None:
    platforms = {key: entity["platform"] for key, entity in entities().items()}
    assert platforms == {
        "connection": "binary_sensor",
        "activity": "sensor",
        "queued": "sensor",
        "completed_total": "sensor",
        "error_total": "sensor",
        "cancelled_total": "sensor",
        "rejected_total": "sensor",
        "last_transcript": "sensor",
        "last_error": "sensor",
        "last_rejection": "sensor",
        "progress": "sensor",
        "eta": "sensor",
        "current_recording": "sensor",
        "oldest_waiting": "sensor",
        "disk_free": "sensor",
        "memory": "sensor",
        "started": "sensor",
        "device": "sensor",
        "last_duration": "sensor",
        "job": "event",
        "submit": "notify",
        "paused": "switch",
        "default_language": "select",
        "default_model": "select",
        "cancel": "button",
        "cancel_all": "button",
        "retry_last": "button",
    }


def test_both_discovery_modes_have_the_same_entities() -> None:
    device = messages()[DEVICE]
    single = messages(mode="component")
    assert len(single) == len(device["components"])
    for key, entity in device["components"].items():
        platform = entity.pop("platform")
        topic = f"homeassistant/{platform}/cesar-mqtt_kitchen/{key}/config"
        assert single[topic] == {**entity, "device": device["device"], "origin": device["origin"]}


@pytest.mark.parametrize("mode", MODES)
def test_topics_and_ids_of_consumers_side_by_side_differ(mode: Mode) -> None:
    names = ["cesar", "Cesar", "kitchen", "kitchen_last", "kitchen-last", "kitchen_last_error"]
    announced = [messages(Topics("cesar", name), mode=mode) for name in names]
    topics = [topic for message in announced for topic in message]
    ids = re.findall(r'"unique_id": "([^"]+)"', json.dumps(announced))
    assert len(set(topics)) == len(topics)
    assert len(set(ids)) == len(ids)
    assert len({json.dumps(message["device"]) for one in announced for message in one.values()}) == len(names)


@pytest.mark.parametrize("mode", MODES)
def test_discovery_topics_are_those_that_home_assistant_subscribes_to(mode: Mode) -> None:
    pattern = re.compile(r"my/home/\w+/(?:[a-zA-Z0-9_-]+/)?[a-zA-Z0-9_-]+/config")
    assert all(pattern.fullmatch(topic) for topic in messages(mode=mode, prefix="my/home"))


@pytest.mark.parametrize("mode", MODES)
def test_all_discovery_topics_match_the_filters(mode: Mode) -> None:
    filters = discovery_filters("kitchen", prefix="homeassistant")
    patterns = [re.compile(re.escape(one).replace(r"\+", "[^/]+")) for one in filters]
    for topic in messages(mode=mode):
        assert any(pattern.fullmatch(topic) for pattern in patterns)
    for topic in messages(Topics("cesar", "kitchen2"), mode=mode):
        assert not any(pattern.fullmatch(topic) for pattern in patterns)


def test_everything_is_below_the_topic_prefix() -> None:
    text = json.dumps(entities(Topics("house/voice", "kitchen")))
    topics = re.findall(r'"(?:\w+_)?topic": "([^"]+)"', text)
    assert len(topics) > len(entities())
    assert all(topic.startswith("house/voice/") for topic in topics)


def test_the_choices_are_those_of_the_messages() -> None:
    assert entities()["activity"]["options"] == list(get_args(Activity))
    assert set(entities()["job"]["event_types"]) == set(EVENT_TYPES)


def test_no_attribute_has_a_name_that_home_assistant_omits() -> None:
    templates = [
        entity["json_attributes_template"] for entity in entities().values() if "json_attributes_topic" in entity
    ]
    assert len(templates) == 4
    assert not any(re.search(r"'(state|icon)':", template) for template in templates)


def test_submitting_stays_available_while_the_consumer_is_offline() -> None:
    assert "availability" not in entities()["submit"]
    assert entities()["paused"]["availability"][0]["topic"] == "cesar/consumer/kitchen/state"


@pytest.mark.parametrize(("key", "fields"), [("cancel", {"job_id": "current"}), ("cancel_all", {}), ("retry_last", {})])
def test_a_button_commands_only_its_own_consumer(key: str, fields: dict[str, str]) -> None:
    button = entities()[key]
    assert button["command_topic"] == f"cesar/request/{key}"
    assert json.loads(button["payload_press"]) == {**fields, "consumer": "kitchen"}
    assert parse_command(key, button["payload_press"].encode()).mistakes == ""


def test_the_default_model_can_be_chosen_only_if_models_are_known() -> None:
    assert entities()["default_model"]["options"] == ["base", "tiny.en"]
    (payload,) = discovery_messages(KITCHEN, mode="device", prefix="homeassistant").values()
    assert "default_model" not in json.loads(payload)["components"]
    languages = entities()["default_language"]["options"]
    assert languages[:2] == ["auto", "af"]
    assert all(language_code(code) == code for code in languages[1:])


# -- what comes in --


class AnyModel:
    def default_name(self) -> str:
        return "base"

    def language_for(self, name: str) -> str | None:
        raise AssertionError(name)

    def is_allowed(self, name: str) -> bool:
        return bool(name)

    def explain_unknown(self, name: str) -> str:
        raise AssertionError(name)


@pytest.fixture
def parser() -> MessageParser:
    return MessageParser(KITCHEN, AnyModel(), max_payload_bytes=1000)


def test_the_birth_topic_of_home_assistant_does_not_follow_the_discovery_prefix() -> None:
    assert birth_topics("homeassistant") == ("homeassistant/status",)
    assert birth_topics("home/discovery") == ("home/discovery/status", "homeassistant/status")


@pytest.mark.parametrize("topic", birth_topics("other"))
def test_a_birth_message_is_recognised_and_is_not_a_job(parser: MessageParser, topic: str) -> None:
    message = parser.parse(delivery(topic, b"online"))
    assert message.is_birth
    assert (message.job, message.refusal, message.command) == (None, None, None)


@pytest.mark.parametrize(("payload", "retain"), [(b"offline", False), (b"", False), (b"online", True)])
def test_other_messages_on_the_birth_topic_are_ignored(parser: MessageParser, payload: bytes, *, retain: bool) -> None:
    message = parser.parse(delivery("homeassistant/status", payload, retain=retain))
    assert not message.is_birth
    assert (message.job, message.refusal, message.command) == (None, None, None)


@pytest.mark.parametrize(("payload", "command"), [(b"ON", "pause"), (b"OFF", "resume")])
def test_a_switch_becomes_a_request(parser: MessageParser, payload: bytes, command: str) -> None:
    message = parser.parse(delivery("cesar/consumer/kitchen/pause/set", payload))
    assert message.command == command
    assert message.delivery.payload == b""


def test_a_switch_that_is_neither_on_nor_off_is_refused(parser: MessageParser) -> None:
    message = parser.parse(delivery("cesar/consumer/kitchen/pause/set", b"maybe"))
    assert message.refusal is not None
    assert message.refusal.reason == "invalid_request"


# -- when --


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def own_topics() -> OwnTopics:
    state = OwnTopics()
    state.retain("state", b"online")
    return state


@pytest.fixture
def schedule(own_topics: OwnTopics, clock: Clock) -> DiscoverySchedule:
    return DiscoverySchedule(own_topics, monotonic=clock, spread=lambda least, most: (least + most) / 2)


def sent(own_topics: OwnTopics) -> dict[str, bytes]:
    """What is sent now, all of it acknowledged."""
    due = list(own_topics.take_due())
    for name, _, version in due:
        own_topics.acknowledge(name, version)
    return {name: payload for name, payload, _ in due}


def test_a_connection_is_announced_at_once(schedule: DiscoverySchedule, own_topics: OwnTopics) -> None:
    schedule.announce({"ha/a/config": b"{}"})
    schedule.run_once()
    assert sent(own_topics) == {"state": b"online"}
    schedule.on_connected()
    schedule.run_once()
    assert sent(own_topics) == {"state": b"online", "ha/a/config": b"{}"}
    schedule.run_once()
    assert sent(own_topics) == {}


def test_a_birth_message_is_answered_a_little_later_with_all_messages(
    schedule: DiscoverySchedule, own_topics: OwnTopics, clock: Clock
) -> None:
    schedule.announce({"ha/a/config": b"{}"})
    schedule.on_connected()
    schedule.run_once()
    assert sent(own_topics)
    schedule.on_birth_message()
    (wait_s,) = schedule.waits_s()
    assert 0 < wait_s < 5
    schedule.run_once()
    assert sent(own_topics) == {}
    clock.now += wait_s
    schedule.run_once()
    assert sent(own_topics) == {"state": b"online", "ha/a/config": b"{}"}
    assert schedule.waits_s() == []


def test_stale_topics_are_cleared_first_and_once(
    schedule: DiscoverySchedule, own_topics: OwnTopics, clock: Clock
) -> None:
    schedule.announce({"ha/new/config": b"{}"}, stale=["ha/old/config"])
    schedule.on_connected()
    schedule.run_once()
    assert sent(own_topics) == {"state": b"online", "ha/old/config": b""}
    own_topics.republish()
    assert "ha/old/config" not in sent(own_topics)
    clock.now += schedule.waits_s()[0]
    schedule.run_once()
    assert sent(own_topics)["ha/new/config"] == b"{}"
    schedule.on_connected()
    schedule.run_once()
    assert sent(own_topics) == {"state": b"online", "ha/new/config": b"{}"}


def test_without_messages_those_of_an_earlier_start_are_withdrawn(
    schedule: DiscoverySchedule, own_topics: OwnTopics, tmp_path: Path
) -> None:
    AnnouncedTopics(tmp_path / "announced.json").record({DEVICE})
    announced = AnnouncedTopics(tmp_path / "announced.json")
    schedule.announce({}, stale=announced.record({}))
    schedule.on_connected()
    schedule.run_once()
    assert sent(own_topics)[DEVICE] == b""
    announced.remove_stale()
    assert AnnouncedTopics(tmp_path / "announced.json").record({}) == frozenset()


def test_a_withdrawal_that_was_interrupted_is_sent_again_but_not_twice(own_topics: OwnTopics) -> None:
    own_topics.retain("ha/old/config", b"")
    assert ("ha/old/config", b"", 0) in list(own_topics.take_due())
    own_topics.republish()
    assert "ha/old/config" not in {name for name, _, _ in own_topics.take_due()}
    own_topics.on_disconnected()
    assert "ha/old/config" in sent(own_topics)
    own_topics.acknowledge("ha/old/config", 0)  # of the first one
    assert own_topics.is_acknowledged()


def test_nothing_is_announced_when_there_is_nothing_to_announce(
    schedule: DiscoverySchedule, own_topics: OwnTopics
) -> None:
    schedule.on_connected()
    schedule.on_birth_message()
    schedule.run_once()
    assert schedule.waits_s() == []
    assert sent(own_topics) == {"state": b"online"}


# -- what was announced before --


def test_only_what_is_no_longer_used_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "homeassistant.json"
    assert AnnouncedTopics(path).record({"a", "b"}) == set()
    assert AnnouncedTopics(path).record({"b", "c"}) == {"a"}


def test_a_topic_stays_stale_until_it_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "homeassistant.json"
    AnnouncedTopics(path).record({"a"})
    AnnouncedTopics(path).record({"b"})
    again = AnnouncedTopics(path)
    assert again.record({"b"}) == {"a"}
    again.remove_stale()
    assert AnnouncedTopics(path).record({"b"}) == set()


def test_without_an_announcement_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "homeassistant.json"
    AnnouncedTopics(path).remove_stale()
    assert not path.exists()
    AnnouncedTopics(path).record({"a"})
    AnnouncedTopics(path).remove_stale()
    assert AnnouncedTopics(path).record({"b"}) == {"a"}


class FullDisk(Disk):
    def create(self, path: Path, chunks: Iterable[bytes]) -> int:  # noqa: ARG002 - the real one's
        raise OSError(28, "No space left on device")


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"topics": 1}', "\xff"])
def test_a_file_that_cannot_be_read_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    path = tmp_path / "homeassistant.json"
    path.write_bytes(content.encode("latin-1"))
    assert AnnouncedTopics(path).record({"a"}) == set()
    assert "homeassistant.json cannot be read" in logged(caplog)
    assert AnnouncedTopics(path).record({"b"}) == {"a"}


def test_a_disk_that_is_full_does_not_stop_the_consumer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    announced = AnnouncedTopics(tmp_path / "homeassistant.json", disk=FullDisk())
    assert announced.record({"a"}) == set()
    assert "cannot be written (No space left on device)" in logged(caplog)


def test_the_ids_of_entities_do_not_change() -> None:
    """A key or an id that changes leaves users with dead entities: only add here."""
    assert sorted(entity["unique_id"] for entity in entities().values()) == [
        "cesar-mqtt.kitchen.activity",
        "cesar-mqtt.kitchen.cancel",
        "cesar-mqtt.kitchen.cancel_all",
        "cesar-mqtt.kitchen.cancelled_total",
        "cesar-mqtt.kitchen.completed_total",
        "cesar-mqtt.kitchen.connection",
        "cesar-mqtt.kitchen.current_recording",
        "cesar-mqtt.kitchen.default_language",
        "cesar-mqtt.kitchen.default_model",
        "cesar-mqtt.kitchen.device",
        "cesar-mqtt.kitchen.disk_free",
        "cesar-mqtt.kitchen.error_total",
        "cesar-mqtt.kitchen.eta",
        "cesar-mqtt.kitchen.job",
        "cesar-mqtt.kitchen.last_duration",
        "cesar-mqtt.kitchen.last_error",
        "cesar-mqtt.kitchen.last_rejection",
        "cesar-mqtt.kitchen.last_transcript",
        "cesar-mqtt.kitchen.memory",
        "cesar-mqtt.kitchen.oldest_waiting",
        "cesar-mqtt.kitchen.paused",
        "cesar-mqtt.kitchen.progress",
        "cesar-mqtt.kitchen.queued",
        "cesar-mqtt.kitchen.rejected_total",
        "cesar-mqtt.kitchen.retry_last",
        "cesar-mqtt.kitchen.started",
        "cesar-mqtt.kitchen.submit",
    ]
