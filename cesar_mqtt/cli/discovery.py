"""The commands `discovery show` and `discovery remove`: what a consumer has the broker retain about itself.

For the main thread; they use the broker, not the consumer.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from cesar_mqtt import logs
from cesar_mqtt.cli.console import out, print_message
from cesar_mqtt.config import Settings
from cesar_mqtt.consumer import discovery as homeassistant
from cesar_mqtt.consumer.earlier_topics import FILE_NAME, EarlierTopics
from cesar_mqtt.errors import CesarError, ExitCode
from cesar_mqtt.gateway.session import NoAnswerError, Session
from cesar_mqtt.mqtt.messages import Subscription
from cesar_mqtt.protocol.topics import Topics, matches_filter

_TIMEOUT_S = 10.0
_POLL_S = 0.05
_QUIET_S = 1.0
"""Retained messages follow the subscription at once: after this long without one, all have arrived."""
_WITHDRAWAL_S = 3.0
"""The time Home Assistant needs to remove entities: while they exist, it warns of their topics' empty messages."""
_AT_ONCE = 100
"""How many messages are cleared before their acknowledgements are awaited."""


def show(settings: Settings) -> ExitCode:
    """Print the discovery messages of these settings: a JSON object with a message for each topic."""
    wanted = settings.homeassistant
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    messages = homeassistant.discovery_messages(topics, mode=wanted.discovery, prefix=wanted.prefix)
    out(json.dumps({topic: json.loads(payload) for topic, payload in messages.items()}, indent=2, ensure_ascii=False))
    return ExitCode.OK


def remove(settings: Settings, *, everything: bool, as_json: bool) -> ExitCode:
    """Clear what a consumer has the broker retain, and print the topics.

    Args:
        settings: name the consumer; their data directory has its earlier prefixes and names.
        everything: clear also its own topics, statuses and results, and those of earlier prefixes and names, but leave
            a consumer that is online alone; else clear every discovery message of the consumer, of either mode.
        as_json: whether to print JSON.

    Raises:
        CesarError: no broker answered, or it refused to clear one.
    """
    logs.configure(settings.log.format, "error")  # the command prints sentences of its own
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    earlier = EarlierTopics(settings.data_dir / FILE_NAME)
    consumers = [topics, *earlier.others(topics)] if everything else [topics]
    prefix = settings.homeassistant.prefix
    filters = {name for each in consumers for name in _filters(each, prefix, everything=everything)}
    wanted = [Subscription(name, wants_retained=True) for name in sorted(filters)]
    with Session(settings.broker, "discovery", wanted) as session:
        session.connect(_TIMEOUT_S)
        found = _find(session)
        online = [each for each in consumers if b"online" in found.get(each.own("state"), b"")]
        left = [each for each in consumers if not everything or each not in online]
        removed = sorted({name for each in left for name in _of(each, found, prefix, everything=everything)})
        announced = [name for name in removed if name.startswith(f"{prefix}/")]
        _clear(session, announced)
        if others := [name for name in removed if name not in announced]:
            _wait(session, _WITHDRAWAL_S if announced else 0.0)
            _clear(session, others)
    if everything:
        earlier.remove(left)
    if as_json:
        out(json.dumps({"removed": removed}))
        return ExitCode.OK
    for topic in removed:
        out(f"removed {topic}")
    _explain(topics, online, found_any=bool(removed), everything=everything, prefix=prefix)
    return ExitCode.OK


def _filters(topics: Topics, prefix: str, *, everything: bool) -> Iterator[str]:
    """Yield the subscriptions that match what is to be cleared, and the consumer's state."""
    yield from homeassistant.discovery_filters(topics.consumer, prefix=prefix)
    if everything:
        yield from (topics.own("#"), topics.status("+"), topics.result("+", "+"))
    else:
        yield topics.own("state")


def _of(topics: Topics, found: Mapping[str, bytes], prefix: str, *, everything: bool) -> Iterator[str]:
    """Yield which of the retained topics are those of one consumer."""
    announced = homeassistant.discovery_filters(topics.consumer, prefix=prefix)
    yield from (name for name in found if any(matches_filter(name, each) for each in announced))
    if not everything:
        return
    yield from (name for name in found if name.startswith(topics.own("")))
    # Several consumers may publish under one prefix: a status names its own, a result belongs to its status.
    ids = {name.rpartition("/")[2] for name, payload in found.items() if _is_status_of(topics, name, payload)}
    yield from (topics.status(job_id) for job_id in ids)
    for name in found:
        job_id, _, kind = name.removeprefix(topics.result("", "")[:-1]).partition("/")
        if job_id in ids and name == topics.result(job_id, kind):
            yield name


def _is_status_of(topics: Topics, topic: str, payload: bytes) -> bool:
    if topic != topics.status(topic.rpartition("/")[2]):
        return False
    try:
        status = json.loads(payload)
    except ValueError:
        return False
    return isinstance(status, dict) and status.get("consumer") == topics.consumer


def _explain(topics: Topics, online: list[Topics], *, found_any: bool, everything: bool, prefix: str) -> None:
    """Print what is not obvious from the topics that were removed."""
    if everything:
        for each in online:
            print_message(f"The consumer {each.consumer!r} below {each.prefix}/ is running: its topics stay.")
        if not found_any:
            out("The broker retains nothing else of this consumer: there is nothing to remove.")
    elif not found_any:
        out(f"Nothing of the consumer {topics.consumer!r} is announced below {prefix}/: there is nothing to remove.")
    elif online:
        print_message(
            f"The consumer {topics.consumer!r} is running, and announces itself again when it or Home Assistant "
            "connects the next time: set homeassistant.enabled to false, or stop it, and remove again."
        )


def _find(session: Session) -> Mapping[str, bytes]:
    """Return the retained payloads by topic; what is published meanwhile does not count."""
    found: dict[str, bytes] = {}
    quiet_at = time.monotonic() + _QUIET_S
    while (left_s := quiet_at - time.monotonic()) > 0:
        retained = {each.topic: each.payload for each in session.receive(left_s) if each.retain and each.payload}
        if retained:
            found |= retained
            quiet_at = time.monotonic() + _QUIET_S
    return found


def _wait(session: Session, seconds: float) -> None:
    """Wait, and drop what is received meanwhile."""
    until = time.monotonic() + seconds
    while (left_s := until - time.monotonic()) > 0:
        session.receive(left_s)


def _clear(session: Session, topics: Iterable[str]) -> None:
    """Clear the retained messages of these topics. Raises CesarError."""
    remaining = iter(topics)
    while some := list(islice(remaining, _AT_ONCE)):
        _clear_some(session, some)


def _clear_some(session: Session, topics: list[str]) -> None:
    tickets = {topic: session.publish(topic, b"", retain=True) for topic in topics}
    deadline = time.monotonic() + _TIMEOUT_S
    while missing := [topic for topic, ticket in tickets.items() if not session.is_published(ticket)]:
        if time.monotonic() >= deadline:
            raise NoAnswerError(f"The broker did not acknowledge the removal of {missing[0]}: try again.")
        session.receive(_POLL_S)
    for topic, ticket in tickets.items():
        if reason := session.refusal(ticket):
            raise CesarError(f"The broker refuses to remove {topic}: {reason}.")
