"""Finds the message at which the broker closes the connection, and keeps it from holding up all others.

Some brokers close the connection when they do not accept a message: RabbitMQ, aedes, and mosquitto 2.0.11 with
`max_queued_messages 0`, if the access list denies the topic; NATS and rumqttd, if the packet exceeds a limit that they
have not announced. Such a message would be published again at every connection, and what follows it never.

RabbitMQ 3.10 keeps the connection, and never acknowledges a message over its limit, nor those around it; there the
client ends the connection (`ConnectionFailure.is_stalled`).

For the publisher's thread, except `limit_bytes`, which any thread may call.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.consumer_payloads import QUARANTINE_ADVICE, Cause, Quarantined
from cesar_mqtt.threads import Backoff

log = get_logger(__name__)

_SMALL_BYTES = 2048
"""A message that is not cut further: a status without a text, and with few metadata, is as large."""
_FIRST_RETRY_S, _MAX_RETRY_S = 60.0, 3600.0
"""Between two attempts of a skipped message, each of which may cost the connection."""
_CLOSES_WITHIN_S = 5.0
"""A broker that closes the connection because of a message that it has refused does so at once."""

Unit = tuple[Literal["status", "clear", "own", "transient"], Any]
"""Messages that belong together: a job's results, event and status or their clearing (the job's number), one of the
consumer's own topics (its name), or a transient message (its topic)."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that was sent.

    Attributes:
        topic: its topic.
        size_bytes: of topic and payload.
        unit: what it belongs to.
        is_last: whether its PUBACK stands for the whole unit.
        can_be_cut: whether it gets shorter with a lower limit.
    """

    topic: str
    size_bytes: int
    unit: Unit
    is_last: bool = True
    can_be_cut: bool = True


@dataclass(slots=True)
class _Entry:
    sent: Sent
    """As it was sent last."""
    limit_bytes: int | None = None
    """What it is cut to; None: it is not cut."""
    skipped_until: float | None = None
    """When a skipped message is published again; None: it is not skipped, but published after all others."""
    passing_bytes: int = -1
    """The largest shorter message on the topic that the broker has accepted since; -1: none."""
    retry: Backoff = field(default_factory=lambda: Backoff(_FIRST_RETRY_S, _MAX_RETRY_S))


class Quarantine:
    """The messages that were in flight at two lost connections in a row.

    1. What is in flight when a connection is lost is suspect. At the next connection each of these messages is sent
       while nothing else is in flight.
    2. If the connection is lost again, with only such a message in flight, that one is cut to half its size, and
       published after all others from then on.
    3. If the connection is lost once more at it, it is cut further. What cannot be cut is skipped for a while.

    A message that the broker refuses just before it closes the connection is cut or skipped at once.
    """

    def __init__(self, *, monotonic: Callable[[], float]) -> None:
        """Start empty; `monotonic` is the clock, in seconds."""
        self._monotonic = monotonic
        self._suspects: set[str] = set()
        self._refused: list[Sent] = []
        """What the broker has refused since it accepted a message."""
        self._refused_at = -math.inf
        self._entries: dict[str, _Entry] = {}
        self._accepted_bytes = 0
        """The largest message that the broker has accepted."""
        self._learned_bytes: int | None = None
        """A size that the broker accepts, where it does not accept a larger one; None: no such limit is known."""

    # -- what becomes of messages --------------------------------------------------------------------------------------

    def on_disconnected(self, in_flight: Iterable[Sent], *, is_stalled: bool = False) -> None:
        """Record what was sent and not acknowledged when the connection was lost.

        `is_stalled`: the broker kept the connection and acknowledged nothing any more; it takes long to notice that.
        """
        refused, self._refused = self._refused, []
        # mosquitto 2.0.11 refuses a message, and closes the connection then.
        if refused and self._monotonic() < self._refused_at + _CLOSES_WITHIN_S:
            for each in refused:
                if each.topic not in self._entries:
                    self._convict(each, can_wait=False)
            return
        sent = tuple(in_flight)
        if not sent:
            return
        if len(sent) == 1 and self.is_sent_alone(sent[0].topic):
            self._convict(sent[0], can_wait=not is_stalled)
        self._suspects = {each.topic for each in sent}

    def on_refused(self, sent: Sent, *, is_too_large: bool) -> bool:
        """Record that the broker has refused a message; True: publish it again, it is cut further now."""
        if is_too_large:
            self._convict(sent, can_wait=False)
        self._refused.append(sent)
        self._refused_at = self._monotonic()
        return is_too_large and not self.is_skipped(sent.topic, sent.size_bytes)

    def on_accepted(self, topic: str, size_bytes: int) -> None:
        """Record that the broker has accepted a message."""
        self._accepted_bytes = max(self._accepted_bytes, size_bytes)
        self._refused.clear()
        if not self._suspects and not self._entries:
            return
        self._suspects.discard(topic)
        entry = self._entries.get(topic)
        if entry is None:
            return
        if entry.limit_bytes is None and size_bytes < entry.sent.size_bytes:
            entry.passing_bytes = max(size_bytes, entry.passing_bytes)
            return
        del self._entries[topic]
        for other in self._entries.values():
            if other.skipped_until is not None:  # the broker may accept more than before
                other.skipped_until = self._monotonic()
        # It may have been cut further, to a size that was learned from another message meanwhile.
        if entry.limit_bytes is not None and entry.limit_bytes < (self._learned_bytes or math.inf):
            self._learned_bytes = entry.limit_bytes
            message = "The broker accepts the message on %s after it was cut: all are cut to %d bytes from now on. %s"
            log.warning(message, topic, entry.limit_bytes, QUARANTINE_ADVICE["too_large"], action="quarantined")

    def _convict(self, sent: Sent, *, can_wait: bool) -> None:
        before = self._entries.get(sent.topic)
        entry = self._entries.setdefault(sent.topic, _Entry(sent))
        could_be_cut = sent.can_be_cut and (before is None or sent.size_bytes < before.sent.size_bytes)
        entry.sent, entry.skipped_until = sent, None
        if could_be_cut and sent.size_bytes > max(_SMALL_BYTES, self._accepted_bytes):
            entry.limit_bytes, outcome = sent.size_bytes // 2, "it is cut to half its size"
        elif before is None and can_wait:
            outcome = "it is published after all others"
        else:
            retry_s = entry.retry.next_s()
            entry.limit_bytes, entry.skipped_until = None, self._monotonic() + retry_s
            outcome = f"it is skipped, and published again in {retry_s:.0f} s"
            for other in self._entries.values():  # else each of them would cost the connection
                if other.skipped_until is not None:
                    other.skipped_until = max(other.skipped_until, entry.skipped_until)
        message = "The broker does not accept the message of %d bytes on %s: %s. %s"
        advice = QUARANTINE_ADVICE[self._cause(sent)]
        log.warning(message, sent.size_bytes, sent.topic, outcome, advice, action="quarantined")

    def _cause(self, sent: Sent) -> Cause:
        """Return the likely reason: a size that the broker has accepted is not over its limit."""
        return "denied" if sent.size_bytes <= max(_SMALL_BYTES, self._accepted_bytes) else "too_large"

    # -- what to do with them ------------------------------------------------------------------------------------------

    def limit_bytes(self, topic: str) -> int | None:
        """Return the size that a message has to be cut to; None: none is known. Any thread may call it."""
        if not self._entries:
            return self._learned_bytes
        entry = self._entries.get(topic)
        limits = (self._learned_bytes, entry.limit_bytes if entry is not None else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def is_sent_alone(self, topic: str) -> bool:
        """Whether nothing else may be in flight together with a message on this topic."""
        return topic in self._suspects or topic in self._entries

    def is_skipped(self, topic: str, size_bytes: int) -> bool:
        """Whether a message on this topic is not published at present; shorter ones may be."""
        entry = self._entries.get(topic)
        return entry is not None and self._is_skipped(entry) and size_bytes > entry.passing_bytes

    def _is_skipped(self, entry: _Entry) -> bool:
        return entry.skipped_until is not None and self._monotonic() < entry.skipped_until

    def last_units(self) -> set[Unit]:
        """Return the units that are published after all others: each waits for a message that is kept apart."""
        return {
            entry.sent.unit for entry in self._entries.values() if entry.sent.is_last or not self._is_skipped(entry)
        }

    def skipped_units(self) -> set[Unit]:
        """Return those of them that are not published at present."""
        return {entry.sent.unit for entry in self._entries.values() if entry.sent.is_last and self._is_skipped(entry)}

    def waits_s(self) -> list[float]:
        """Return the seconds until skipped messages are published again."""
        due = (entry.skipped_until for entry in self._entries.values() if entry.skipped_until is not None)
        return [until - self._monotonic() for until in due if until > self._monotonic()]

    def report(self) -> list[Quarantined]:
        """Return the messages that the broker does not accept, for `health`. Any thread may call it."""
        return [
            Quarantined(
                topic=entry.sent.topic,
                size_bytes=entry.sent.size_bytes,
                cause=self._cause(entry.sent),
                skipped=entry.skipped_until is not None,
            )
            for entry in tuple(self._entries.values())
        ]
