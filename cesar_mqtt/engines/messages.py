"""The values of a shared queue, without the library that it is made with. Any thread may use them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cesar_mqtt.errors import CesarError


class QueueUnavailableError(CesarError):
    """The server did not answer; whether it has done what it was asked is unknown."""


@dataclass(frozen=True, slots=True)
class Message:
    """A request that waits to be admitted, or a job that was delivered to this consumer."""

    topic: str
    """The MQTT topic of the request."""
    payload: bytes
    seq: int
    """Its number in its stream, ascending; never used again."""
    deliveries: int
    """How often it was delivered, this time included."""
    received_at: float
    """When the server received the request, in seconds since the epoch."""
    job_id: str | None
    """The id of the job; None: the request was not admitted yet."""
    reply: str
    """Where it is acknowledged."""


@dataclass(frozen=True, slots=True)
class Record:
    """What the group knows of a job id."""

    revision: int
    """Of the record: an update names it, and fails if another consumer was first."""
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QueueState:
    """How much is in the queue, and who keeps it."""

    requests: int
    """Requests that wait to be admitted; those of commands count."""
    waiting: int
    """Jobs that wait to be delivered."""
    delivered: int
    """Jobs that consumers have."""
    replicas: int
    """On how many servers it is stored."""
    absent: tuple[str, ...]
    """Of these, the names of those that are away or behind."""
