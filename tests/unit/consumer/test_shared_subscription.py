"""The topic filters of a group, and what it needs of the broker."""

from pathlib import Path

import pytest

from cesar_mqtt.config import BrokerSettings, ConsumerSettings, Settings
from cesar_mqtt.consumer import shared_subscription as group
from cesar_mqtt.errors import BrokerRefusedError, ConfigError, LedgerError
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.protocol.topics import Topics

TOPICS = Topics("home/cesar", "porch")


def settings(url: str, *, protocol: str = "auto", group_: str | None = "house") -> Settings:
    broker = BrokerSettings.model_validate({"url": url, "protocol": protocol})
    return Settings(broker=broker, consumer=ConsumerSettings(name="porch", group=group_))


def broker_of(wanted: Settings) -> BrokerSettings:
    return group.broker_of(wanted, parse_broker_url(wanted.broker.url))


def test_without_a_group_every_consumer_receives_every_job() -> None:
    filters = [wanted.topic_filter for wanted in group.subscriptions(TOPICS, None)]
    own = "home/cesar/consumer/porch/queue"
    assert filters == ["home/cesar/jobs", "home/cesar/audio/#", "home/cesar/request/#", own]


def test_a_group_shares_jobs_and_audio_but_not_commands() -> None:
    filters = [wanted.topic_filter for wanted in group.subscriptions(TOPICS, "house")]
    assert filters == [
        "$share/house/home/cesar/jobs",
        "$share/house/home/cesar/audio/#",
        "home/cesar/request/#",
        "home/cesar/consumer/porch/queue",
    ]


def test_earlier_filters_that_are_not_wanted_now_are_unsubscribed(tmp_path: Path) -> None:
    known = tmp_path / "subscriptions"

    def unwanted(group_: str | None) -> list[str]:
        return [line.removesuffix("/cesar/jobs") for line in group.unwanted_filters(TOPICS, group_, known=known)][::2]

    assert unwanted(None) == []
    assert unwanted("house") == ["home"], "also without a file"
    assert unwanted("house") == ["home"]
    assert unwanted("garden") == ["home", "$share/house/home"]
    assert unwanted(None) == ["$share/house/home", "$share/garden/home"]
    assert [path.name for path in tmp_path.iterdir()] == ["subscriptions"]


def test_a_file_of_filters_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be read or written"):
        group.unwanted_filters(TOPICS, "house", known=tmp_path)


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
def test_without_a_group_the_broker_settings_are_unchanged(protocol: str) -> None:
    wanted = settings("mqtt://127.0.0.1", protocol=protocol, group_=None)
    assert broker_of(wanted) is wanted.broker


@pytest.mark.parametrize("protocol", ["auto", "5"])
def test_a_member_speaks_mqtt_5_or_not_at_all(protocol: str) -> None:
    wanted = settings("mqtt://127.0.0.1", protocol=protocol)
    assert broker_of(wanted) == wanted.broker.model_copy(update={"protocol": "5"})


@pytest.mark.parametrize(
    ("url", "protocol", "named"),
    [
        ("embedded", "auto", r"embedded broker speaks 3\.1\.1\. Set broker\.url"),
        ("mqtt://127.0.0.1", "3.1.1", r"Set broker\.protocol"),
    ],
)
def test_a_group_without_mqtt_5_is_rejected(url: str, protocol: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"consumer\.group needs shared subscriptions.*{named}"):
        broker_of(settings(url, protocol=protocol))


def test_a_refusal_names_the_group_if_that_may_be_the_reason() -> None:
    old = BrokerRefusedError("mqtt://old does not support MQTT 5.", reason_code=132)
    other = BrokerRefusedError("mqtt://old refused this client: Not authorized.", reason_code=135)
    assert "consumer.group" in str(group.explain_refusal(old, "house"))
    assert group.explain_refusal(old, None) is old
    assert group.explain_refusal(other, "house") is other


def test_a_broker_that_does_not_grant_shared_subscriptions_is_an_error() -> None:
    refused = ("$share/house/home/cesar/audio/#", "home/cesar/request/#")
    assert "'$share/house/home/cesar/audio/#'" in str(group.check_granted(refused, TOPICS, "house"))
    assert group.check_granted(("home/cesar/request/#",), TOPICS, "house") is None
    assert group.check_granted(("home/cesar/jobs",), TOPICS, None) is None


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "a b", "x" * 65])
def test_the_name_of_a_group_is_one_level_of_a_topic(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        ConsumerSettings(group=name)
