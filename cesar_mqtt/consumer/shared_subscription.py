"""Shared subscriptions: the topic filters of a consumer with and without a group, and what a group needs of the broker.

The main thread calls `unwanted_filters`; all other functions are pure, and any thread may call them.
"""

from pathlib import Path

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import BrokerRefusedError, ConfigError, LedgerError
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.broker_url import BrokerUrl
from cesar_mqtt.mqtt.messages import Subscription
from cesar_mqtt.mqtt.reason_codes import UNSUPPORTED_VERSION
from cesar_mqtt.protocol.topics import Topics

log = get_logger(__name__)

_NEEDS = "consumer.group needs shared subscriptions, which are part of MQTT 5"


def input_filters(topics: Topics, group: str | None) -> tuple[str, ...]:
    """Return the topic filters for jobs: each message goes to every subscriber, or to one member of the group.

    Commands are not among them: they go to all members, because only the owner of a job can answer.
    """
    shared = "" if group is None else f"$share/{group}/"
    return tuple(f"{shared}{topic_filter}" for topic_filter in (topics.jobs, topics.audio_filter))


def subscriptions(topics: Topics, group: str | None, *, jobs: bool = True) -> tuple[Subscription, ...]:
    """Return the subscriptions to jobs, unless a shared queue has them, commands and the consumer's queue message."""
    return (
        *(Subscription(topic_filter) for topic_filter in input_filters(topics, group) if jobs),
        Subscription(topics.request_filter, may_go_ahead=True),
        Subscription(topics.own("queue"), wants_retained=True),  # for the publisher's retained check
    )


def unwanted_filters(topics: Topics, group: str | None, *, known: Path, jobs: bool = True) -> tuple[str, ...]:
    """Return the filters that this consumer has subscribed to at an earlier start and does not want now.

    The broker keeps a session with its subscriptions for ever: a consumer that joins a group would still receive every
    job, and one that leaves a group would still receive its share.

    Args:
        topics: its topics now.
        group: its group now.
        jobs: whether it subscribes to jobs now.
        known: the file with every filter that was ever subscribed to, one a line; on return the present ones are in it
            and on disk.

    Raises:
        LedgerError: the file cannot be read or written.
    """
    wanted = input_filters(topics, group) if jobs else ()
    try:
        before = known.read_text().splitlines() if known.exists() else list(input_filters(topics, None))
        if not set(wanted) <= set(before):
            Disk().put(known, [f"{line}\n".encode() for line in dict.fromkeys([*before, *wanted])])
    except (OSError, UnicodeDecodeError) as exc:
        raise LedgerError(f"{known} cannot be read or written: {exc}.") from exc
    return tuple(line for line in before if line and line not in wanted)


def broker_of(settings: Settings, address: BrokerUrl) -> BrokerSettings:
    """Return the broker settings: a member of a group speaks MQTT 5 only.

    Raises:
        ConfigError: the settings contradict that.
    """
    if settings.queue.engine == "jetstream":
        return _broker_of_jetstream(settings, address)
    if settings.consumer.group is None:
        return settings.broker
    if address.scheme == "embedded":
        raise ConfigError(
            f"{_NEEDS}, and the embedded broker speaks 3.1.1.", "Set broker.url to a broker that supports MQTT 5."
        )
    if settings.broker.protocol == "3.1.1":
        raise ConfigError(f"{_NEEDS}.", "Set broker.protocol to 'auto' or '5', or leave consumer.group out.")
    return settings.broker.model_copy(update={"protocol": "5"})


def _broker_of_jetstream(settings: Settings, address: BrokerUrl) -> BrokerSettings:
    """Return the settings for the NATS server, which closes the connection of a client that speaks MQTT 5."""
    needs = "queue.engine is 'jetstream', whose broker is the NATS server"
    if settings.consumer.group is not None:
        raise ConfigError(f"{needs}: it has no shared subscriptions.", "Leave consumer.group out: its queue is shared.")
    if address.scheme == "embedded":
        raise ConfigError(f"{needs}.", "Set broker.url to the MQTT port of that server.")
    if settings.broker.protocol == "5":
        raise ConfigError(f"{needs}: it speaks MQTT 3.1.1 only.", "Set broker.protocol to 'auto', or leave it out.")
    log.info("MQTT 3.1.1 is used: the NATS server speaks no MQTT 5", action="queue")
    return settings.broker.model_copy(update={"protocol": "3.1.1"})


def explain_refusal(error: BrokerRefusedError, group: str | None) -> BrokerRefusedError:
    """Return the broker's refusal, with what the group has to do with it if it does not support MQTT 5."""
    if group is None or error.reason_code != UNSUPPORTED_VERSION:
        return error
    return BrokerRefusedError(
        f"{error.problem} {_NEEDS}.", "Leave it out, or use another broker.", reason_code=error.reason_code
    )


def check_granted(refused_filters: tuple[str, ...], topics: Topics, group: str | None) -> BrokerRefusedError | None:
    """Return why a member would receive no jobs: the broker did not grant the shared subscriptions; None: it did."""
    refused = [topic_filter for topic_filter in input_filters(topics, group) if topic_filter in refused_filters]
    if group is None or not refused:
        return None
    return BrokerRefusedError(
        f"The broker did not grant '{refused[0]}', so this consumer would receive no jobs.",
        "Allow shared subscriptions to its user (consumer.group).",
    )
