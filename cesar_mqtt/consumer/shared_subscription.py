"""Several consumers on one input: what a member of a group subscribes to, and what it needs of the broker.

The main thread calls `unwanted_filters`; all others are pure, and any thread may call them.
"""

from pathlib import Path

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import BrokerRefusedError, ConfigError, LedgerError
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.mqtt.broker_url import BrokerUrl
from cesar_mqtt.mqtt.messages import Subscription
from cesar_mqtt.protocol.topics import Topics

_NEEDS = "consumer.group needs shared subscriptions, which are part of MQTT 5"


def input_filters(topics: Topics, group: str | None) -> tuple[str, ...]:
    """Return the topic filters that bring jobs: each message to every subscriber, or to one member of the group.

    Requests are not among them: they go to all members, for only the owner of a job can answer.
    """
    shared = "" if group is None else f"$share/{group}/"
    return tuple(f"{shared}{topic_filter}" for topic_filter in (topics.jobs, topics.audio_filter))


def subscriptions(topics: Topics, group: str | None) -> tuple[Subscription, ...]:
    """Return everything that a consumer subscribes to."""
    return (
        *(Subscription(topic_filter) for topic_filter in input_filters(topics, group)),
        Subscription(topics.request_filter),
        Subscription(topics.own("queue"), wants_retained=True),  # to see whether the broker went back
    )


def unwanted_filters(topics: Topics, group: str | None, *, known: Path) -> tuple[str, ...]:
    """Return what this consumer has subscribed to before and does not want any more.

    The broker keeps a session with its subscriptions for ever: whoever joins a group would go on getting every job, and
    whoever leaves one would go on taking its turn.

    Args:
        topics: its topics now.
        group: its group now.
        known: the file that remembers every filter that was ever subscribed to, a line for each; on return, on disk,
            the present ones are in it.

    Raises:
        LedgerError: the file cannot be read or written.
    """
    wanted = input_filters(topics, group)
    try:
        before = known.read_text().splitlines() if known.exists() else list(input_filters(topics, None))
        if not set(wanted) <= set(before):
            Disk().put(known, [f"{line}\n".encode() for line in dict.fromkeys([*before, *wanted])])
    except (OSError, UnicodeDecodeError) as exc:
        raise LedgerError(f"{known} cannot be read or written: {exc}.") from exc
    return tuple(line for line in before if line and line not in wanted)


def broker_of(settings: Settings, address: BrokerUrl) -> BrokerSettings:
    """Return how to talk to the broker: a member of a group speaks MQTT 5, or not at all.

    Raises:
        ConfigError: the settings contradict that.
    """
    if settings.consumer.group is None:
        return settings.broker
    if address.scheme == "embedded":
        raise ConfigError(f"{_NEEDS}, and the embedded broker speaks 3.1.1: set broker.url to one that speaks MQTT 5")
    if settings.broker.protocol == "3.1.1":
        raise ConfigError(f"{_NEEDS}: set broker.protocol to 'auto' or '5', or leave consumer.group out")
    return settings.broker.model_copy(update={"protocol": "5"})


def explained(error: BrokerRefusedError, group: str | None) -> BrokerRefusedError:
    """Return a broker's refusal with what the group may have to do with it, where it may have something."""
    if group is None or "MQTT 5" not in str(error):
        return error
    return BrokerRefusedError(f"{error}. {_NEEDS}: leave it out, or use another broker.")


def not_granted(refused_filters: tuple[str, ...], topics: Topics, group: str | None) -> BrokerRefusedError | None:
    """Return why a member would get no jobs: the broker did not grant the shared subscriptions; None: it did."""
    refused = [topic_filter for topic_filter in input_filters(topics, group) if topic_filter in refused_filters]
    if group is None or not refused:
        return None
    return BrokerRefusedError(
        f"The broker did not grant '{refused[0]}', so no job would ever come: "
        "let it allow shared subscriptions to this user (consumer.group)."
    )
