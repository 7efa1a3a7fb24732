import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.response_topics import ResponseTopics
from cesar_mqtt.protocol.topics import Topics

TOPICS = Topics("house/cesar", "kitchen")
DEFAULT = ResponseTopics(TOPICS, discovery_prefix="homeassistant")
EVERYTHING = ResponseTopics(TOPICS, allowed=("#",), discovery_prefix="ha/discovery")
OWN = [
    *("house/cesar/jobs", "house/cesar/audio", "house/cesar/audio/a", "house/cesar/request/delete"),
    *("house/cesar/status/a", "house/cesar/result/a/txt", "house/cesar/segments/a", "house/cesar/events"),
    *("house/cesar/rejected", "house/cesar/consumer/kitchen/state", "house/cesar/consumer/porch/pause/set"),
    *map(TOPICS.response, COMMANDS),
]


@pytest.mark.parametrize("topic", ["house/cesar/response/me", "house/cesar/replies/me/1", "house/cesar/replies"])
def test_by_default_responses_and_replies_below_the_prefix_are_allowed(topic: str) -> None:
    assert DEFAULT.problem(topic) is None


@pytest.mark.parametrize(
    "topic", ["homeassistant/tag/evil/config", "zigbee2mqtt/lock/set", "cesar/replies/me", "house/cesar/repliesx", "/"]
)
def test_by_default_nothing_else_is(topic: str) -> None:
    assert DEFAULT.problem(topic) is not None


@pytest.mark.parametrize(
    "topic",
    [
        *OWN,
        *("$SYS/broker", "$share/g/x", "", "a/+", "#", "a\0b"),
        *("ha/discovery", "ha/discovery/tag/evil/config", "ha/discovery/status"),
    ],
)
def test_no_setting_allows_the_consumers_own_topics_the_brokers_or_the_discovery_prefix(topic: str) -> None:
    assert EVERYTHING.problem(topic) is not None


@pytest.mark.parametrize("topic", ["ha/discoveryx", "ha", "zigbee2mqtt/lock/set", "house/cesarx/jobs"])
def test_everything_else_is_up_to_the_setting(topic: str) -> None:
    assert EVERYTHING.problem(topic) is None


level = st.sampled_from(["a", "b", ""])


@given(
    st.lists(st.one_of(level, st.just("+")), min_size=1, max_size=4).flatmap(
        lambda levels: st.sampled_from(["/".join(levels), "/".join([*levels, "#"])])
    ),
    st.lists(level, min_size=1, max_size=5).map("/".join).filter(bool),
)
def test_filters_match_as_in_mqtt(topic_filter: str, topic: str) -> None:
    allowed = ResponseTopics(TOPICS, allowed=(topic_filter,), discovery_prefix="homeassistant").problem(topic) is None
    assert allowed == topic_matches_sub(topic_filter, topic)
