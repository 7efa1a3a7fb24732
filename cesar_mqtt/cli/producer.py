"""A producer of jobs, for `submit` and `demo`: publish recordings, follow their statuses.

One thread uses a `Producer`.
"""

import json
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cesar_mqtt.cli.text import printable, size
from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError, CesarError
from cesar_mqtt.gateway.session import NoAnswerError, Session
from cesar_mqtt.gateway.submission import Submission, request_of
from cesar_mqtt.mqtt.messages import (
    MAX_PACKET_BYTES,
    CannotPublishError,
    ConnectionFailure,
    Delivery,
    PublishTicket,
    Subscription,
)
from cesar_mqtt.protocol.topics import Topics

UNSENT = "unsent"
"""The status of a recording that could not be read or sent; `rejected` is that of one that the consumer rejected."""
STDIN = "-"
_FINAL = frozenset({"completed", "error", "cancelled", "rejected", UNSENT})
_POLL_S = 0.25
_SHORT_S = 0.01
_LARGE_BYTES, _LOSSES = 64 << 10, 4
"""A larger message at which so many connections are lost is the reason: NATS announces no limit."""
_TAKEN_S = 0.5
"""The longest wait for a sign that some consumer takes jobs."""
_RESULT_S = 5.0
"""The longest wait for results after the status `completed`; they should arrive before."""
_NAME_CHARACTERS = 200
_ID_CHARACTERS = 40
_SUFFIX_CHARACTERS = 5
_SUFFIX_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
"""Without what looks alike."""


def new_job_id(name: str) -> str:
    """Return a readable id for a recording: its name without the suffix, and a few random characters.

    The characters are of 28 million: an id that is taken all the same is rejected as `job_id_conflict`.
    """
    plain = unicodedata.normalize("NFKD", Path(name).stem).encode("ascii", "ignore").decode()
    words = "".join(char if char.isalnum() or char == "_" else " " for char in plain).split()
    suffix = "".join(secrets.choice(_SUFFIX_ALPHABET) for _ in range(_SUFFIX_CHARACTERS))
    return f"{'-'.join(words)[:_ID_CHARACTERS].rstrip('-') or 'recording'}-{suffix}"


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording to be submitted, which is read when its turn comes.

    Attributes:
        job_id: its job.
        path: as messages show it; with `by_path` as the consumer is to look it up; `-`: stdin.
        by_path: whether only the path is sent.
        options: further fields of the request.
        folder: where it lies below the folder that was searched; empty for one that was named.
        max_bytes: the most that is read.
    """

    job_id: str
    path: str
    by_path: bool
    options: Mapping[str, Any]
    folder: Path = Path()
    max_bytes: int = MAX_PACKET_BYTES

    @property
    def shown(self) -> str:
        """What messages call it."""
        return "stdin" if self.path == STDIN and not self.by_path else printable(self.path)

    @property
    def name(self) -> str:
        """The file's name."""
        return "stdin" if self.path == STDIN else Path(self.path).name

    def read(self) -> Submission:
        """Read the file, unless only its path is sent.

        Raises:
            CesarError: it cannot be read, is empty or larger than a message may be.
        """
        if self.by_path:
            return Submission(self.job_id, None, self.path, self.options)
        try:
            with sys.stdin.buffer if self.path == STDIN else Path(self.path).open("rb") as file:
                audio = file.read(self.max_bytes + 1)
        except OSError as exc:
            raise CesarError(f"{self.shown} cannot be read: {exc.strerror}.") from exc
        if not audio:
            raise CesarError(f"{self.shown} is empty: there is nothing to transcribe.")
        if len(audio) > self.max_bytes:
            raise CesarError(
                f"{self.shown} is larger than a message may be, {size(self.max_bytes)}.",
                "Send its path with --by-path.",
            )
        name = None if self.path == STDIN else printable(self.name)[:_NAME_CHARACTERS]
        return Submission(self.job_id, audio, self.shown, self.options, name)


class Producer:
    """A session that publishes recordings and receives their statuses, and their results if these are wanted."""

    def __init__(
        self,
        settings: BrokerSettings,
        topics: Topics,
        recordings: Sequence[Recording],
        *,
        formats: Sequence[str] = (),
        on_status: Callable[[Recording, Mapping[str, Any]], None] = lambda _recording, _status: None,
        on_done: Callable[[Recording, Mapping[str, Any]], None] = lambda _recording, _status: None,
        on_lost: Callable[[ConnectionFailure], None] | None = None,
    ) -> None:
        """Prepare the session; `connect` connects.

        Args:
            settings: of the broker.
            topics: of the consumer.
            recordings: in the order in which they are published.
            formats: the results that every recording asks for in its options, to wait for.
            on_status: called with each new status of a recording.
            on_done: called once for each recording, with its final status, when its results have arrived or are late.
            on_lost: called on the network thread when the connection is lost; the others are called by `run`.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self._topics = topics
        self._recordings = {recording.job_id: recording for recording in recordings}
        self._on_status = on_status
        self._on_done = on_done
        self._formats = formats
        self._statuses: dict[str, dict[str, Any]] = {}
        self._statuses_before: dict[str, dict[str, Any]] = {}
        """A status retained before the request may be of an earlier job with this id; ours is published again."""
        self._results: dict[tuple[str, str], bytes] = {}
        self._results_before: dict[tuple[str, str], bytes] = {}
        self._result_topics = {
            topics.result(job_id, name): (job_id, name) for job_id in self._recordings for name in formats
        }
        self._open = dict.fromkeys(self._recordings)
        """The recordings that are not done, in their order."""
        self._reported: dict[str, Mapping[str, Any]] = {}
        self._completed_at: dict[str, float] = {}
        self._unsent = list(self._recordings.values())
        self._first_connection = 0
        self._is_taken = False
        self._consumers: dict[str, dict[str, Any]] = {}
        own_topics = f"{topics.prefix}/consumer/+"
        watched = [*map(topics.status, self._recordings), *self._result_topics, f"{own_topics}/state"]
        watched.append(f"{own_topics}/queue")
        wanted = [Subscription(topic, wants_retained=True) for topic in watched]
        wanted.append(Subscription(topics.rejected))
        self._session = Session(settings, "submit", wanted, on_disconnected=on_lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def connect(self, timeout_s: float, subscribe_s: float = 0.0) -> None:
        """Connect and subscribe; a broker that refuses connections may be starting. See `Session.connect`."""
        info = self._session.connect(timeout_s, retry_s=timeout_s, subscribe_s=subscribe_s)
        self._first_connection = info.number

    @property
    def trouble(self) -> str | None:
        """Why there is no connection; None: there is one."""
        return self._session.trouble

    @property
    def consumer_online(self) -> bool:
        """Whether any consumer is known to be online."""
        return any(self._online())

    @property
    def is_paused(self) -> bool:
        """Whether every consumer that is online starts no job."""
        online = [*self._online()]
        return bool(online) and all(consumer.get("paused") is True for consumer in online)

    @property
    def unsent(self) -> Sequence[Recording]:
        """The recordings that the broker has not acknowledged."""
        return self._unsent

    @property
    def open(self) -> Sequence[Recording]:
        """The recordings that are not done, in their order."""
        return [self._recordings[job_id] for job_id in self._open]

    def _online(self) -> Iterator[Mapping[str, Any]]:
        return (consumer for consumer in self._consumers.values() if consumer.get("state") == "online")

    def wait_for_consumer(self, deadline: float) -> bool:
        """Wait until a consumer is online; False at the deadline."""
        while not self.consumer_online and not _is_past(deadline):
            self._receive()
        return self.consumer_online

    def publish(self, deadline: float | None) -> bool:
        """Publish every recording at QoS 1 and wait for the acknowledgements; False at the deadline.

        One that cannot be read or sent is `UNSENT`; the others go on.

        Raises:
            BrokerRefusedError: the broker does not let this client publish there.
            NoAnswerError: no consumer takes jobs there.
        """
        while self._unsent:
            recording = self._unsent[0]
            try:
                if not self._publish(recording.read(), deadline):
                    return False
            except CesarError as exc:
                if isinstance(exc, BrokerRefusedError | NoAnswerError):
                    raise
                self._statuses[recording.job_id] = {
                    "job_id": recording.job_id,
                    "status": UNSENT,
                    "error_code": None,
                    "error_message": str(exc),
                }
            del self._unsent[0]
            self._report()
        return True

    def _publish(self, item: Submission, deadline: float | None) -> bool:
        topic, ticket, size_bytes = self._send(item)
        losses = 0
        while not self._session.is_published(ticket):
            if _is_past(deadline):
                return False
            # Incoming messages are acknowledged meanwhile: amqtt sends no PUBACK before that.
            self._receive(_SHORT_S)
            self._report()
            if ticket is None or self._session.connection is None:
                losses += ticket is not None
                if losses == _LOSSES and size_bytes > _LARGE_BYTES:
                    raise CesarError(
                        f"{item.path} cannot be sent: the broker closes the connection at its {size_bytes} bytes.",
                        "Raise its limit (NATS: max_payload, 1 MB by default), or send the path with --by-path.",
                    )
                self._session.wait_connected(_POLL_S)
                topic, ticket, size_bytes = self._send(item)
        reason = self._session.refusal(ticket)
        if reason is not None:
            raise BrokerRefusedError(f"{self._session.address} does not let this client publish on {topic}: {reason}.")
        self._check_taken(is_unrouted=self._session.is_unrouted(ticket))
        return True

    def _check_taken(self, *, is_unrouted: bool) -> None:
        """Wait, after the first message, until a consumer is known that takes the jobs, online or not.

        A consumer that is offline has a session, for which the broker keeps the jobs.

        Raises:
            NoAnswerError: there is none: the broker has dropped a job (MQTT 5), or nothing is known of any consumer.
        """
        deadline = time.monotonic() + _TAKEN_S
        while not (is_unrouted or self._is_taken or self._consumers or self._statuses) and not _is_past(deadline):
            self._receive(_SHORT_S)
        if is_unrouted or not (self._is_taken or self._consumers or self._statuses):
            dropped = " The broker has dropped what was sent." if is_unrouted else ""
            raise NoAnswerError(
                f"No consumer takes jobs at {self._session.address} under '{self._topics.prefix}'.{dropped}",
                "Start one with `cesar-mqtt serve`, or name its --topic-prefix, and submit again.",
            )
        self._is_taken = True

    def _send(self, item: Submission) -> tuple[str, PublishTicket | None, int]:
        """Publish a recording, and return its topic, the ticket (None: not connected) and the size of the payload."""
        connection = self._session.connection
        # Options go as JSON, which every subscriber of the topic can read, although that is a third larger.
        bare = not item.options and (connection is None or connection.protocol == "5")
        request = request_of(item, self._topics, has_properties=bare)
        try:
            ticket = self._session.publish(request.topic, request.payload, user_properties=request.user_properties)
        except CannotPublishError as exc:
            raise CesarError(f"{item.path} cannot be sent: {exc}", "Send its path with --by-path.") from exc
        return request.topic, ticket, len(request.payload)

    def follow(self, deadline: float | None) -> bool:
        """Receive statuses and results until every recording is done; False at the deadline."""
        while self._open:
            if _is_past(deadline):
                return False
            self._receive()
            self._report()
        return True

    def status(self, recording: Recording) -> Mapping[str, Any] | None:
        """Return the newest status of a recording; None: none arrived."""
        return self._statuses.get(recording.job_id)

    def results(self, recording: Recording) -> dict[str, bytes]:
        """Return the results of a completed job, by format, as they were published; those that did not arrive lack."""
        found = {name: self._result(recording.job_id, name) for name in self._formats}
        return {name: result for name, result in found.items() if result is not None}

    def _result(self, job_id: str, name: str) -> bytes | None:
        if (job_id, name) in self._results:
            return self._results[job_id, name]
        before, now = self._statuses_before.get(job_id), self._statuses.get(job_id)
        # Where the id named the same job before, its status is published again, but not its retained results.
        same = before is not None and now is not None and all(before.get(name) == now.get(name) for name in _RUN)
        return self._results_before.get((job_id, name)) if same else None

    def _report(self) -> None:
        """Call the callbacks for what is new."""
        for job_id in list(self._open):
            status = self._statuses.get(job_id)
            if status is None:
                continue
            recording = self._recordings[job_id]
            if self._reported.get(job_id) is not status:
                self._reported[job_id] = status
                self._on_status(recording, status)
            if self._is_done(job_id, status):
                del self._open[job_id]
                self._on_done(recording, status)

    def _is_done(self, job_id: str, status: Mapping[str, Any]) -> bool:
        if status["status"] not in _FINAL:
            return False
        if status["status"] != "completed" or len(self.results(self._recordings[job_id])) == len(self._formats):
            return True
        return _is_past(self._completed_at.setdefault(job_id, time.monotonic()) + _RESULT_S)

    def _receive(self, timeout_s: float = _POLL_S) -> None:
        for delivery in self._session.receive(timeout_s):
            self._process(delivery)

    def _process(self, delivery: Delivery) -> None:
        before = delivery.retain and delivery.receipt.connection == self._first_connection
        if delivery.topic in self._result_topics:
            self._process_result(self._result_topics[delivery.topic], delivery.payload, before=before)
            return
        document: object = None
        with suppress(ValueError, RecursionError):
            document = json.loads(delivery.payload or b"null")
        if not isinstance(document, dict):
            return
        job_id = document.get("job_id")
        _, _, own_topic = delivery.topic.partition(f"{self._topics.prefix}/consumer/")
        if own_topic:
            self._consumers.setdefault(own_topic.rpartition("/")[0], {}).update(document)
        elif delivery.topic == self._topics.rejected and job_id in self._recordings:
            if self._statuses.get(job_id, {}).get("status") not in _FINAL:
                self._statuses[job_id] = {"job_id": job_id, "status": "rejected", **_rejection_fields(document)}
        elif job_id in self._recordings and delivery.topic == self._topics.status(job_id):
            (self._statuses_before if before else self._statuses)[job_id] = document

    def _process_result(self, key: tuple[str, str], payload: bytes, *, before: bool) -> None:
        if payload:
            (self._results_before if before else self._results)[key] = payload
        else:  # cleared
            self._results.pop(key, None)
            self._results_before.pop(key, None)


_RUN = ("status", "created_at", "attempt", "completed_at")
"""Fields that are equal in two statuses of the same attempt of the same job."""


def _rejection_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"error_code": document.get("reason"), "error_message": document.get("detail")}


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
