"""The producer's side of the contract, for `submit` and `demo`: send recordings, follow their statuses.

One thread uses a `Producer`; it knows nothing of ledgers and models.
"""

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cesar_mqtt.addresses import parse_broker_url
from cesar_mqtt.client import CannotPublishError, Delivery, MqttClient, PublishTicket, Subscription
from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import CesarError
from cesar_mqtt.topics import Topics

_FINAL = frozenset({"completed", "error", "cancelled"})
_LOOK_S = 0.25
_SHORT_S = 0.01
_RESULT_S = 5.0
"""How long a result may come after the status that says that the job is completed; it should come before."""


class UnreachableError(CesarError):
    """No broker answered in time."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One recording to be transcribed.

    Attributes:
        job_id: its id; the same id with the same recording again is the same job.
        audio: the recording's bytes, or None when `path` is to be sent instead.
        path: the path as the consumer is to look it up.
        options: further fields of the request.
    """

    job_id: str
    audio: bytes | None = field(repr=False)
    path: str
    options: Mapping[str, Any]


def new_job_id() -> str:
    """Return an id that nobody else has."""
    return str(uuid.uuid4())


def submission(path: Path | str, *, job_id: str | None, by_path: bool, options: Mapping[str, Any]) -> Submission:
    """Prepare a recording; reads the file unless only its path is to be sent.

    Raises:
        CesarError: the file cannot be read.
    """
    try:
        audio = None if by_path else Path(path).read_bytes()
    except OSError as exc:
        raise CesarError(f"{path} cannot be read: {exc.strerror}.") from exc
    if audio == b"":
        raise CesarError(f"{path} is empty: there is nothing to transcribe in it.")
    return Submission(job_id or new_job_id(), audio, str(path), options)


class Producer:
    """A connection that publishes submissions and receives their statuses, and their results if these are wanted."""

    def __init__(
        self,
        settings: BrokerSettings,
        topics: Topics,
        submissions: Sequence[Submission],
        *,
        result_format: str | None = None,
    ) -> None:
        """Wire it; `connect` does the work. Raises ConfigError when a broker setting is wrong.

        `result_format` is what every submission asks for in its options, to be waited for; None: the status is enough.
        """
        self._topics = topics
        self._address = parse_broker_url(settings.url).redacted
        self._submissions = {submission.job_id: submission for submission in submissions}
        self._statuses: dict[str, dict[str, Any]] = {}
        self._statuses_before: dict[str, dict[str, Any]] = {}
        """What was retained before we published may be another job of the same id; ours is published afresh."""
        self._results: dict[str, bytes] = {}
        self._results_before: dict[str, bytes] = {}
        self._result_topics = (
            {topics.result(job_id, result_format): job_id for job_id in self._submissions} if result_format else {}
        )
        self._results_due: float | None = None
        self._first_connection = 0
        self._acknowledged: set[PublishTicket] = set()
        self._consumers: dict[str, bool] = {}
        watched = [*(topics.status(job_id) for job_id in self._submissions), *self._result_topics]
        states = f"{topics.prefix}/consumer/+/state"
        self._client = MqttClient(
            settings,
            client_id=f"cesar-submit-{uuid.uuid4().hex[:12]}",
            persistent=False,
            subscriptions=[
                *(Subscription(topic, wants_retained=True) for topic in (*watched, states)),
                Subscription(topics.rejected),
            ],
        )
        self._client.on_published = lambda ticket, _reason: self._acknowledged.add(ticket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def connect(self, timeout_s: float) -> None:
        """Connect and subscribe.

        Raises:
            UnreachableError: no broker answered within `timeout_s`.
            BrokerRefusedError: it answered and said no.
        """
        self._client.start()
        connection = self._client.wait_connected(timeout_s)
        if connection is None:
            trouble = self._client.trouble or "no answer"
            raise UnreachableError(
                f"No broker at {self._address}: {trouble}. Is it running? Name another one with --broker."
            )
        self._first_connection = connection.number

    @property
    def consumer_online(self) -> bool:
        """Whether any consumer has said that it is there."""
        return any(self._consumers.values())

    def wait_for_consumer(self, deadline: float) -> bool:
        """Wait until a consumer says that it is there; False at the deadline."""
        while not self.consumer_online and not _over(deadline):
            self._receive()
        return self.consumer_online

    def publish(self, deadline: float | None) -> bool:
        """Send every submission at QoS 1 and wait until the broker has taken them; False at the deadline.

        Raises:
            CesarError: a recording is larger than the broker takes.
        """
        for submission in self._submissions.values():
            topic, payload = self._message(submission)
            try:
                ticket = self._client.publish(topic, payload, qos=1)
            except CannotPublishError as exc:
                raise CesarError(f"{submission.path} cannot be sent: {exc} Send its path with --by-path.") from exc
            while ticket not in self._acknowledged:
                if _over(deadline):
                    return False
                # What comes in meanwhile is taken and acknowledged: amqtt answers nothing before that.
                self._receive(_SHORT_S)
                if ticket is None or self._client.connected is None:
                    self._client.wait_connected(_LOOK_S)
                    ticket = self._client.publish(topic, payload, qos=1)
        return True

    def follow(self, deadline: float | None, on_status: Callable[[str, Mapping[str, Any]], None]) -> bool:
        """Receive statuses until every submission is final; False at the deadline.

        Results that are wanted and do not come soon after the last status are not waited for any longer.

        Args:
            deadline: on the monotonic clock; None: as long as it takes.
            on_status: called with the id and the status whenever one comes; a refusal comes as status `rejected`.
        """
        reported: dict[str, Any] = {}
        while True:
            for job_id, status in self._statuses.items():
                if reported.get(job_id) is not status:
                    reported[job_id] = status
                    on_status(job_id, status)
            if self._is_over():
                return True
            if _over(deadline):
                return False
            self._receive()

    def results(self) -> Iterator[tuple[Submission, Mapping[str, Any] | None]]:
        """Yield each submission in order with its newest status; None when nothing was heard of it."""
        for job_id, submission in self._submissions.items():
            yield submission, self._statuses.get(job_id)

    def result(self, job_id: str) -> bytes | None:
        """Return the result of a completed job as it was published; None: it has not come."""
        if job_id in self._results:
            return self._results[job_id]
        before, now = self._statuses_before.get(job_id), self._statuses.get(job_id)
        # The same job again: its status is published anew, what is retained beside it need not be.
        same = before is not None and now is not None and all(before.get(name) == now.get(name) for name in _RUN)
        return self._results_before.get(job_id) if same else None

    def _is_over(self) -> bool:
        if not all(self._is_final(job_id) for job_id in self._submissions):
            return False
        completed = [job_id for job_id, status in self._statuses.items() if status["status"] == "completed"]
        if not self._result_topics or all(self.result(job_id) is not None for job_id in completed):
            return True
        self._results_due = self._results_due or time.monotonic() + _RESULT_S
        return _over(self._results_due)

    def _is_final(self, job_id: str) -> bool:
        status = self._statuses.get(job_id)
        return status is not None and (status["status"] in _FINAL or status["status"] == "rejected")

    def _message(self, submission: Submission) -> tuple[str, bytes]:
        if submission.audio is not None and not submission.options:
            return self._topics.audio(submission.job_id), submission.audio
        document: dict[str, Any] = {"job_id": submission.job_id, **submission.options}
        if submission.audio is None:
            document["audio_path"] = submission.path
        else:
            document["audio_base64"] = base64.b64encode(submission.audio).decode()
        return self._topics.jobs, json.dumps(document, ensure_ascii=False).encode()

    def _receive(self, timeout_s: float = _LOOK_S) -> None:
        deliveries = self._client.receive(timeout_s)
        for delivery in deliveries:
            self._take(delivery)
        self._client.acknowledge(deliveries)

    def _take(self, delivery: Delivery) -> None:
        before = delivery.retain and delivery.receipt.connection == self._first_connection
        if delivery.topic in self._result_topics:
            self._take_result(self._result_topics[delivery.topic], delivery.payload, before=before)
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
                self._statuses[job_id] = {"job_id": job_id, "status": "rejected", **_refusal(document)}
        elif job_id in self._submissions and delivery.topic == self._topics.status(job_id):
            (self._statuses_before if before else self._statuses)[job_id] = document
        elif "state" in document:
            self._consumers[delivery.topic] = document["state"] == "online"

    def _take_result(self, job_id: str, payload: bytes, *, before: bool) -> None:
        if payload:
            (self._results_before if before else self._results)[job_id] = payload
        else:  # taken back
            self._results.pop(job_id, None)
            self._results_before.pop(job_id, None)


_RUN = ("status", "created_at", "attempt", "completed_at")
"""Fields that are the same in two statuses if they tell of the same run of the same job."""


def _refusal(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"error_code": document.get("reason"), "error_message": document.get("detail")}


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
