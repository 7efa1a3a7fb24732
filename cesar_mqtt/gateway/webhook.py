"""The webhook: each change of a job as a signed HTTP request, tried again over restarts until it is accepted.

The thread `webhook` records what is to be delivered, then delivers it, the oldest first; the thread of its bus brings
it the statuses. These are retained, so that no end of a job is missed, whatever was offline; a state between two that
passes while the consumer has no connection may be.

Requests are signed as Standard Webhooks says (`webhook-id`, `webhook-timestamp`, `webhook-signature`): HMAC-SHA256 of
id, time and body.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import queue
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cesar_mqtt import __version__
from cesar_mqtt.audio.allowed_hosts import AllowedHosts, parse_url
from cesar_mqtt.audio.pinned_http import Deadline, PinnedClient, TemporaryHttpError
from cesar_mqtt.config import BrokerSettings, WebhookSettings
from cesar_mqtt.errors import Cancelled, ConfigError, JobFailedError, LedgerError
from cesar_mqtt.gateway.bus import Bus, json_object
from cesar_mqtt.gateway.bus_client import BusClient
from cesar_mqtt.gateway.database import Database
from cesar_mqtt.gateway.status_records import StatusRecords
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery, Subscription
from cesar_mqtt.protocol.consumer_payloads import WebhookHealth
from cesar_mqtt.protocol.fields import timestamp
from cesar_mqtt.protocol.topics import Topics

log = get_logger(__name__)

_REQUEST_S = 20.0
"""The longest that one request may take."""
_IDLE_S = 30.0
_DELAYS_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)
"""The delays before the second and each further attempt; the last one is repeated."""
_SECRET_PREFIX = "whsec_"  # noqa: S105 - that of the standard
_SECRET_BYTES = 32
_GONE = 410
"""The receiver wants no more of this."""


class _Pending(NamedTuple):
    """A request that is not delivered yet."""

    number: int
    message_id: str
    job_id: str
    body: str
    created: float
    attempts: int


class Webhook(BusClient):
    """Delivers changes of jobs to one URL."""

    def __init__(
        self,
        settings: WebhookSettings,
        broker: BrokerSettings,
        topics: Topics,
        *,
        allowed_hosts: tuple[str, ...],
        data_dir: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the records and read the secret, or make one; nothing is delivered before `start`.

        Args:
            settings: the URL, which must be set, and what is delivered.
            broker: how to reach the broker.
            topics: the prefix.
            allowed_hosts: as `audio.allowed_hosts`; the host of the URL must be among them.
            data_dir: for the records, and for a secret that is made.
            clock: seconds since the epoch.

        Raises:
            ConfigError: the URL, its host, the secret's file or a broker setting is wrong.
            LedgerError: the records cannot be used.
        """
        super().__init__("webhook")
        self._settings = settings
        self._clock = clock
        self._status_level = topics.status("")
        hosts = AllowedHosts(allowed_hosts, setting="webhook.allowed_hosts")
        try:
            self._target = parse_url(settings.url or "")
            hosts.admit(self._target)
        except JobFailedError as exc:
            raise ConfigError(f"webhook.url cannot be used: {exc.message}") from exc
        self._client = PinnedClient(hosts)
        self._key = _key(settings.key_file or data_dir / "webhook.secret", make=settings.key_file is None)
        self._records = StatusRecords(data_dir / "webhook.sqlite", now=timestamp(clock()))
        self._deliveries = Database(
            data_dir / "webhook.sqlite",
            "CREATE TABLE IF NOT EXISTS deliveries (number INTEGER PRIMARY KEY, id NOT NULL UNIQUE, job_id NOT NULL, "
            "body NOT NULL, created REAL NOT NULL, attempts INTEGER NOT NULL, due REAL NOT NULL)",
        )
        self._given_up = 0
        self._problem: str | None = None
        self._versions: dict[str, str] = {}
        """The newest version of each status, on the thread of the bus: progress is no change."""
        self._arrived: queue.SimpleQueue[tuple[str, str, Mapping[str, Any]] | None] = queue.SimpleQueue()
        self._bus = Bus(
            broker,
            topics,
            role="webhook",
            subscriptions=[Subscription(topics.status("+"), wants_retained=True)],
            on_message=self._on_message,
        )

    def _release(self) -> None:
        self._records.close()
        self._deliveries.close()

    def health(self) -> WebhookHealth:
        """Return what `health` says of it; any thread may ask."""
        with suppress(LedgerError):
            return WebhookHealth(pending=self._pending(), given_up=self._given_up, problem=self._problem)
        return WebhookHealth(pending=0, given_up=self._given_up, problem="its records cannot be read")

    def _pending(self) -> int:
        return int(self._deliveries.execute("SELECT count(*) FROM deliveries")[0][0])

    def _wake(self) -> None:
        self._arrived.put(None)

    # -- the thread of the bus -----------------------------------------------------------------------------------------

    def _on_message(self, delivery: Delivery) -> None:
        if not delivery.topic.startswith(self._status_level):
            return
        job_id = delivery.topic.removeprefix(self._status_level)
        status = json_object(delivery.payload)
        version = ":".join(str(status.get(name)) for name in ("status", "attempt", "completed_at")) if status else ""
        if self._versions.get(job_id) != version:
            self._versions[job_id] = version
            self._arrived.put((job_id, version, status))
        if not status:
            self._versions.pop(job_id)

    # -- the thread `webhook` ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopping.is_set():
            try:
                wait_s = self.run_once(wait_s)
            except LedgerError as exc:
                log.error("%s", exc, action="webhook_failed")
                self._stopping.wait(_IDLE_S)

    def run_once(self, timeout_s: float) -> float:
        """Wait for a change, at most so long; record what arrived, and deliver what is due.

        Returns:
            The seconds until the next delivery is due.
        """
        with suppress(queue.Empty):
            self._record(self._arrived.get(timeout=timeout_s) if timeout_s > 0 else self._arrived.get_nowait())
            while True:
                self._record(self._arrived.get_nowait())
        due = (
            "SELECT number, id, job_id, body, created, attempts FROM deliveries WHERE due <= ? ORDER BY number LIMIT 1"
        )
        while not self._stopping.is_set() and (rows := self._deliveries.execute(due, (self._clock(),))):
            self._deliver(_Pending(*rows[0]))
            if not self._arrived.empty():
                return 0.0
        next_due = self._deliveries.execute("SELECT min(due) FROM deliveries")[0][0]
        return _IDLE_S if next_due is None else min(_IDLE_S, max(0.0, next_due - self._clock()))

    def _record(self, arrived: tuple[str, str, Mapping[str, Any]] | None) -> None:
        """Put a change on disk, once, if it is wanted."""
        if arrived is None:
            return
        job_id, version, status = arrived
        known = self._records.get(job_id)
        if not status:
            if known is not None:
                self._put(
                    job_id, "deleted", {"event_type": "deleted", "job_id": job_id, "time": timestamp(self._clock())}
                )
                self._records.remove(job_id)
            return
        if known is not None and known[0] == version:
            return
        if str(status.get("updated_at")) >= self._records.since:
            self._put(job_id, str(status.get("status")), _event(status))
        self._records.put(job_id, version)

    def _put(self, job_id: str, event_type: str, event: Mapping[str, Any]) -> None:
        if event_type not in self._settings.events:
            return
        now = self._clock()
        body = json.dumps(event, ensure_ascii=False)
        statement = "INSERT INTO deliveries (id, job_id, body, created, attempts, due) VALUES (?, ?, ?, ?, 0, ?)"
        self._deliveries.execute(statement, (f"msg_{uuid.uuid4().hex}", job_id, body, now, now))

    def _deliver(self, request: "_Pending") -> None:
        """Send one request; on a failure it is due later, or has failed for good."""
        problem, is_final = self._send(request.message_id, request.body.encode())
        if problem is None and not is_final:
            return  # stopped
        self._problem = problem
        attempts = request.attempts + 1
        if problem is not None and not is_final and self._clock() - request.created < self._settings.retry_for:
            delay_s = _DELAYS_S[min(attempts, len(_DELAYS_S)) - 1]
            message = "The webhook was not delivered: %s The next attempt is in %.0f s."
            log.warning(message, problem, delay_s, action="webhook_failed", job_id=request.job_id)
            statement = "UPDATE deliveries SET attempts = ?, due = ? WHERE number = ?"
            self._deliveries.execute(statement, (attempts, self._clock() + delay_s, request.number))
            return
        if problem is None:
            log.info("Delivered %s", request.message_id, action="webhook_delivered", job_id=request.job_id)
        else:
            self._given_up += 1
            message = "The webhook was not delivered, and is not tried again: %s (%d attempts)"
            log.error(message, problem, attempts, action="webhook_given_up", job_id=request.job_id)
        self._deliveries.execute("DELETE FROM deliveries WHERE number = ?", (request.number,))

    def _send(self, message_id: str, body: bytes) -> tuple[str | None, bool]:
        """Return what failed, and whether that is final; nothing and True: it is delivered; and False: stopped."""
        too_late = f"There was no response within {_REQUEST_S:g} s."
        deadline = Deadline(_REQUEST_S, self._stopping.is_set, too_late=too_late)
        try:
            headers = self._headers(message_id, body)
            with self._client.request("POST", self._target, deadline, headers=headers, content=body) as response:
                status = response.status
        except Cancelled:
            return None, False
        except (TemporaryHttpError, JobFailedError) as exc:
            return str(exc), False
        if 200 <= status < 300:  # noqa: PLR2004 - HTTP's successes
            return None, True
        return f"{self._target.shown} answered with HTTP status {status}.", status == _GONE

    def _headers(self, message_id: str, body: bytes) -> list[tuple[str, str]]:
        now = str(int(self._clock()))
        signature = hmac.new(self._key, b".".join((message_id.encode(), now.encode(), body)), hashlib.sha256)
        headers = [
            ("Host", self._target.authority),
            ("User-Agent", f"cesar-mqtt/{__version__}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            ("webhook-id", message_id),
            ("webhook-timestamp", now),
            ("webhook-signature", f"v1,{base64.b64encode(signature.digest()).decode()}"),
        ]
        if self._target.credentials is not None:
            token = base64.b64encode(":".join(self._target.credentials).encode()).decode()
            headers.append(("Authorization", f"Basic {token}"))
        return headers


def _event(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event of a status, as on `events`, with the whole transcript and the name of the recording."""
    names = ("job_id", "attempt", "audio_source", "audio_duration", "no_speech", "error_code", "error_message")
    return {
        "event_type": status.get("status"),
        **{name: status.get(name) for name in names},
        "text": status.get("result_text"),
        "text_truncated": bool(status.get("result_truncated")),
        "language": status.get("detected_language"),
        "metadata": status.get("metadata"),
        "consumer": status.get("consumer"),
        "time": status.get("updated_at"),
    }


def _key(path: Path, *, make: bool) -> bytes:
    """Return the key in a file; `make`: write a new one where there is none. Raises ConfigError."""
    try:
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(f"{made}\n")
            log.info("The webhook's secret is in %s", path, action="webhook_secret")
        text = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"The webhook's secret in '{path}' cannot be read: {exc}.") from exc
    if not text:
        raise ConfigError(f"The webhook's secret in '{path}' is empty.")
    if not text.startswith(_SECRET_PREFIX):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix(_SECRET_PREFIX), validate=True)
    except binascii.Error as exc:
        raise ConfigError(f"The webhook's secret in '{path}' is no base64 behind {_SECRET_PREFIX}.") from exc
