"""A producer of jobs, for `submit` and `demo`: publish recordings, follow their statuses.

One thread uses a `Producer`.
"""

import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
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

_FINAL = frozenset({"completed", "error", "cancelled"})
_POLL_S = 0.25
_SHORT_S = 0.01
_RESULT_S = 5.0
"""The longest wait for a result after the status `completed`; it should arrive before."""


_NAME_CHARACTERS = 200


def new_job_id() -> str:
    return str(uuid.uuid4())


def submission(
    path: Path | str,
    *,
    job_id: str | None,
    by_path: bool,
    options: Mapping[str, Any],
    max_bytes: int = MAX_PACKET_BYTES,
) -> Submission:
    """Prepare a recording; reads the file, `-` being stdin, unless only its path is sent.

    The file's name goes with a job whose id is generated here. With an id of the caller's the name is left out: the
    same recording under another name must stay the same request.

    Raises:
        CesarError: the file cannot be read, is empty or larger than `max_bytes`.
    """
    if by_path:
        return Submission(job_id or new_job_id(), None, str(path), options)
    shown = "stdin" if str(path) == "-" else str(path)
    try:
        with sys.stdin.buffer if shown != str(path) else Path(path).open("rb") as file:
            audio = file.read(max_bytes + 1)
    except OSError as exc:
        raise CesarError(f"{shown} cannot be read: {exc.strerror}.") from exc
    if not audio:
        raise CesarError(f"{shown} is empty: there is nothing to transcribe.")
    if len(audio) > max_bytes:
        raise CesarError(f"{shown} is larger than a message may be, {size(max_bytes)}: send its path with --by-path.")
    name = None if job_id or shown == "stdin" else printable(Path(path).name)[:_NAME_CHARACTERS]
    return Submission(job_id or new_job_id(), audio, shown, options, name)


class Producer:
    """A session that publishes submissions and receives their statuses, and their results if these are wanted."""

    def __init__(
        self,
        settings: BrokerSettings,
        topics: Topics,
        submissions: Sequence[Submission],
        *,
        result_format: str | None = None,
        on_lost: Callable[[ConnectionFailure], None] | None = None,
    ) -> None:
        """Prepare the session; `connect` connects.

        Args:
            settings: of the broker.
            topics: of the consumer.
            submissions: the recordings.
            result_format: the format that every submission asks for in its options, to wait for; None: none.
            on_lost: called on the network thread when the connection is lost.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self._topics = topics
        self._submissions = {submission.job_id: submission for submission in submissions}
        self._statuses: dict[str, dict[str, Any]] = {}
        self._statuses_before: dict[str, dict[str, Any]] = {}
        """A status retained before the request may be of an earlier job with this id; ours is published again."""
        self._results: dict[str, bytes] = {}
        self._results_before: dict[str, bytes] = {}
        self._result_topics = (
            {topics.result(job_id, result_format): job_id for job_id in self._submissions} if result_format else {}
        )
        self._results_due: float | None = None
        self._first_connection = 0
        self._is_unrouted = False
        self._consumers: dict[str, bool] = {}
        watched = [*(topics.status(job_id) for job_id in self._submissions), *self._result_topics]
        states = f"{topics.prefix}/consumer/+/state"
        wanted = [Subscription(topic, wants_retained=True) for topic in (*watched, states)]
        wanted.append(Subscription(topics.rejected))
        self._session = Session(settings, "submit", wanted, on_disconnected=on_lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def connect(self, timeout_s: float) -> None:
        """Connect and subscribe; a broker that refuses connections may be starting. Raises as `Session.connect`."""
        self._first_connection = self._session.connect(timeout_s, retry_s=timeout_s).number

    @property
    def trouble(self) -> str | None:
        """Why there is no connection; None: there is one."""
        return self._session.trouble

    @property
    def consumer_online(self) -> bool:
        """Whether any consumer is known to be online."""
        return any(self._consumers.values())

    def wait_for_consumer(self, deadline: float) -> bool:
        """Wait until a consumer is online; False at the deadline."""
        while not self.consumer_online and not _is_past(deadline):
            self._receive()
        return self.consumer_online

    def publish(self, deadline: float | None) -> bool:
        """Publish every submission at QoS 1 and wait for the acknowledgements; False at the deadline.

        Raises:
            BrokerRefusedError: the broker does not let this client publish there.
            CesarError: a recording is larger than the broker's packet limit.
        """
        for item in self._submissions.values():
            topic, ticket = self._send(item)
            while not self._session.is_published(ticket):
                if _is_past(deadline):
                    return False
                # Incoming messages are acknowledged meanwhile: amqtt sends no PUBACK before that.
                self._receive(_SHORT_S)
                if ticket is None or self._session.connection is None:
                    self._session.wait_connected(_POLL_S)
                    topic, ticket = self._send(item)
            reason = self._session.refusal(ticket)
            if reason is not None:
                raise BrokerRefusedError(
                    f"{self._session.address} does not let this client publish on {topic}: {reason}."
                )
            self._is_unrouted |= self._session.is_unrouted(ticket)
        return True

    def check_taken(self, deadline: float) -> None:
        """Wait until a consumer is known that takes the published jobs, online or not.

        A consumer that is offline has a session, for which the broker keeps the jobs.

        Raises:
            NoAnswerError: there is none: the broker has dropped a job (MQTT 5), or nothing is known of any consumer.
        """
        while not (self._is_unrouted or self._consumers or self._statuses) and not _is_past(deadline):
            self._receive(_SHORT_S)
        if self._is_unrouted or not (self._consumers or self._statuses):
            dropped = " The broker has dropped what was sent." if self._is_unrouted else ""
            raise NoAnswerError(
                f"No consumer takes jobs at {self._session.address} under '{self._topics.prefix}'.{dropped}",
                "Start one with `cesar-mqtt serve`, or name its --topic-prefix, and submit again.",
            )

    def _send(self, item: Submission) -> tuple[str, PublishTicket | None]:
        connection = self._session.connection
        # Options go as JSON, which every subscriber of the topic can read, although that is a third larger.
        bare = not item.options and (connection is None or connection.protocol == "5")
        request = request_of(item, self._topics, has_properties=bare)
        try:
            return request.topic, self._session.publish(
                request.topic, request.payload, user_properties=request.user_properties
            )
        except CannotPublishError as exc:
            raise CesarError(f"{item.path} cannot be sent: {exc} Send its path with --by-path.") from exc

    def follow(self, deadline: float | None, on_status: Callable[[str, Mapping[str, Any]], None]) -> bool:
        """Receive statuses until every submission is final; False at the deadline.

        A result that does not arrive soon after the last status is not waited for any longer.

        Args:
            deadline: on the monotonic clock; None: no limit.
            on_status: called with the id and each new status; a rejection comes as status `rejected`.
        """
        reported: dict[str, Any] = {}
        while True:
            for job_id, status in self._statuses.items():
                if reported.get(job_id) is not status:
                    reported[job_id] = status
                    on_status(job_id, status)
            if self._is_complete():
                return True
            if _is_past(deadline):
                return False
            self._receive()

    def results(self) -> Iterator[tuple[Submission, Mapping[str, Any] | None]]:
        """Yield each submission in order with its newest status; None when none arrived."""
        for job_id, submission in self._submissions.items():
            yield submission, self._statuses.get(job_id)

    def result(self, job_id: str) -> bytes | None:
        """Return the result of a completed job as it was published; None: it did not arrive."""
        if job_id in self._results:
            return self._results[job_id]
        before, now = self._statuses_before.get(job_id), self._statuses.get(job_id)
        # Where the id named the same job before, its status is published again, but not its retained results.
        same = before is not None and now is not None and all(before.get(name) == now.get(name) for name in _RUN)
        return self._results_before.get(job_id) if same else None

    def _is_complete(self) -> bool:
        if not all(self._is_final(job_id) for job_id in self._submissions):
            return False
        completed = [job_id for job_id, status in self._statuses.items() if status["status"] == "completed"]
        if not self._result_topics or all(self.result(job_id) is not None for job_id in completed):
            return True
        self._results_due = self._results_due or time.monotonic() + _RESULT_S
        return _is_past(self._results_due)

    def _is_final(self, job_id: str) -> bool:
        status = self._statuses.get(job_id)
        return status is not None and (status["status"] in _FINAL or status["status"] == "rejected")

    def _receive(self, timeout_s: float = _POLL_S) -> None:
        for delivery in self._session.receive(timeout_s):
            self._process(delivery)

    def _process(self, delivery: Delivery) -> None:
        before = delivery.retain and delivery.receipt.connection == self._first_connection
        if delivery.topic in self._result_topics:
            self._process_result(self._result_topics[delivery.topic], delivery.payload, before=before)
            return
        try:
            document = json.loads(delivery.payload or b"null")
        except ValueError:
            return
        if not isinstance(document, dict):
            return
        job_id = document.get("job_id")
        if delivery.topic == self._topics.rejected and job_id in self._submissions:
            if not self._is_final(job_id):
                self._statuses[job_id] = {"job_id": job_id, "status": "rejected", **_rejection_fields(document)}
        elif job_id in self._submissions and delivery.topic == self._topics.status(job_id):
            (self._statuses_before if before else self._statuses)[job_id] = document
        elif "state" in document:
            self._consumers[delivery.topic] = document["state"] == "online"

    def _process_result(self, job_id: str, payload: bytes, *, before: bool) -> None:
        if payload:
            (self._results_before if before else self._results)[job_id] = payload
        else:  # cleared
            self._results.pop(job_id, None)
            self._results_before.pop(job_id, None)


_RUN = ("status", "created_at", "attempt", "completed_at")
"""Fields that are equal in two statuses of the same attempt of the same job."""


def _rejection_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"error_code": document.get("reason"), "error_message": document.get("detail")}


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
