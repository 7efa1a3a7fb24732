"""A queue on NATS JetStream that many consumers share; nats-py and its event loop stop here.

`JetStreamQueue` owns the thread "jetstream", in which the event loop runs. Any thread may call its methods: each waits
for the server, and raises `QueueUnavailableError` when that does not answer.

The server stores every request twice. What it acknowledges to an MQTT producer (PUBACK) is in its own stream
`$MQTT_msgs`, on as many servers as `mqtt.stream_replicas` says: a durable consumer there keeps it until it is admitted.
A stream that captured the same subjects would not do: the server does not wait for it before the PUBACK, so that a
message is lost when that stream has no leader. The queue itself is a work-queue stream with one message for each job,
under a subject of its own; a bucket of keys has a record for each job id.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    ConsumerInfo,
    DeliverPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, BucketNotFoundError, KeyNotFoundError, KeyWrongLastSequenceError, NotFoundError

from cesar_mqtt.engines.messages import Message, QueueState, QueueUnavailableError, Record
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import Backoff, StoppableThread

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue

    from cesar_mqtt.config import JetStreamSettings

log = get_logger(__name__)

T = TypeVar("T")

MQTT_STREAM = "$MQTT_msgs"
"""Where the server stores what MQTT clients publish at QoS 1, until every consumer with that subject has it."""
_MQTT_SUBJECTS = "$MQTT.msgs."
_RETAINED_STREAM, _RETAINED_SUBJECTS = "$MQTT_rmsgs", "$MQTT.rmsgs."

HEADER_BYTES = 4096
"""Room for subject and headers of a message in the queue."""
_FETCH_S = 1.0
"""How long a request for a message waits at the server: a stop waits for no more than that."""
_CALL_S = 5.0
"""How long a call waits for the server."""
_DUPLICATES_S = 3600.0
"""For how long the server recognises a request that is enqueued again."""
_SYNC_ADVICE = (
    "The NATS server needs jetstream { sync_interval: always }, which clients cannot see: without it a power cut loses "
    "the jobs of the last two minutes, though they were acknowledged"
)
_JOB_ID, _TOPIC, _RECEIVED = "Cesar-Job-Id", "Cesar-Topic", "Cesar-Received"

_ERRORS = (NatsError, OSError, TimeoutError, asyncio.TimeoutError)


class JetStreamQueue(StoppableThread):
    """The requests, the jobs and the records of a group of consumers.

    Attributes:
        refusal: why the queue cannot be used, which does not pass by itself; None: nothing is known.
        max_payload_bytes: the largest request; 0: not connected yet.
    """

    def __init__(
        self,
        settings: "JetStreamSettings",
        *,
        mode: Literal["strict", "parallel"],
        topics: tuple[str, ...],
        name: str,
        records_s: float,
    ) -> None:
        """Read the files that the settings name; `start` connects.

        Args:
            settings: how to reach the servers, and the queue's name and limits.
            mode: `strict`: the server delivers one job at a time to the whole group.
            topics: the MQTT topic filters of requests.
            name: the consumer's, for the server's lists of clients.
            records_s: how long the record of a job id is kept after its last change, in seconds.

        Raises:
            ConfigError: a file cannot be used.
        """
        super().__init__("jetstream")
        self._settings = settings
        self._mode = mode
        self._topics = topics
        self._name = name
        self._records_s = records_s
        self._options = _connect_options(settings)
        self.refusal: ConfigError | None = None
        self.max_payload_bytes = 0
        self._trouble = ""
        """Why the first connection failed last."""
        self._ready = threading.Event()
        self._connected = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._connection = Client()
        self._js: JetStreamContext
        self._records: KeyValue
        self._requests: JetStreamContext.PullSubscription
        self._jobs: JetStreamContext.PullSubscription
        self._fetches: dict[str, bool] = {}

    @property
    def requests_name(self) -> str:
        """The durable consumer of the requests that wait to be admitted."""
        return f"{self._settings.stream}-requests"

    @property
    def jobs_name(self) -> str:
        """The durable consumer of the queue."""
        return f"{self._settings.stream}-jobs"

    # -- the thread ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stopped.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._connected.clear()
            self._loop.close()

    async def _serve(self) -> None:
        backoff = Backoff(0.5, 5.0, jitter=0.5)
        while not self._stopping.is_set():
            try:
                if not await self._open_unless_stopped():
                    break
            except ConfigError as exc:
                self.refusal = exc
                break
            except _ERRORS as exc:
                log.warning("The queue on %s is not available: %s", self._where, exc, action="queue_unavailable")
                await self._close()
                self._connection = Client()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), backoff.next_s())
            else:
                self._ready.set()
                self._connected.set()
                log.info(_SYNC_ADVICE, action="queue")
                log.info(
                    "The queue %s on %s is open (%s)", self._settings.stream, self._where, self._mode, action="queue"
                )
                break
        await self._stopped.wait()
        await self._close()

    async def _close(self) -> None:
        with suppress(*_ERRORS, AssertionError):  # nats-py asserts that there was a connection
            await self._connection.close()

    async def _open_unless_stopped(self) -> bool:
        """Open the queue; the library tries to connect for as long as that takes. False: stopped meanwhile."""
        opening, stopped = asyncio.ensure_future(self._open()), asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((opening, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if opening.done():
            await opening
            return True
        opening.cancel()
        with suppress(asyncio.CancelledError, AssertionError):
            await opening
        return False

    @property
    def _where(self) -> str:
        return ", ".join(
            url.strip().rpartition("@")[2].removeprefix("nats://") for url in self._settings.url.split(",")
        )

    async def _open(self) -> None:
        await self._connection.connect(
            **self._options,
            name=f"cesar-mqtt {self._name}",
            connect_timeout=5,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
        )
        self._js = self._connection.jetstream(timeout=_CALL_S)
        self.max_payload_bytes = self._largest_payload(self._connection.max_payload)
        await self._open_stream()
        await self._open_records()
        await self._open_requests()
        self._requests = await self._js.pull_subscribe_bind(self.requests_name, MQTT_STREAM)
        self._jobs = await self._js.pull_subscribe_bind(self.jobs_name, self._settings.stream)

    async def _on_error(self, error: Exception) -> None:
        """Handle an error of the library. While the first connection is made, it hands every failed attempt over here.

        Raises:
            ConfigError: the server refuses the credentials; the attempt to connect ends with it.
        """
        if self._ready.is_set():
            log.debug("NATS: %s", error, action="queue_unavailable")
            return
        if "authorization" in str(error).lower():
            raise ConfigError(
                f"The queue's server at {self._where} refuses the user or the password.",
                "Set queue.jetstream.username and password_file, or credentials_file, to a user of its account.",
            )
        trouble = str(error) or type(error).__name__
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("The queue on %s is not available: %s", self._where, trouble, action="queue_unavailable")

    async def _on_disconnected(self) -> None:
        self._connected.clear()
        if self._ready.is_set() and not self._stopping.is_set():
            log.warning("The connection to the queue is lost; reconnecting", action="queue_unavailable")

    async def _on_reconnected(self) -> None:
        if self._ready.is_set():
            self._connected.set()
        log.info("The queue %s on %s is open again", self._settings.stream, self._where, action="queue")

    def _largest_payload(self, server_bytes: int) -> int:
        limit, most = self._settings.max_message_bytes, server_bytes - HEADER_BYTES
        if limit is not None and limit > most:
            raise ConfigError(
                f"queue.jetstream.max_message_bytes is {limit}, but the server accepts {server_bytes} bytes, of which "
                f"the queue needs {HEADER_BYTES} itself.",
                f"Set max_payload of the server to {limit + HEADER_BYTES} or more, or the setting to {most} or less.",
            )
        return most if limit is None else limit

    # -- the streams and the consumers -----------------------------------------------------------------------------

    async def _open_stream(self) -> None:
        settings = self._settings
        subjects = [f"{settings.stream}.job.>"]
        try:
            info = await self._js.stream_info(settings.stream)
        except NotFoundError:
            info = await self._js.add_stream(
                StreamConfig(
                    name=settings.stream,
                    description="Jobs of cesar-mqtt",
                    subjects=subjects,
                    retention=RetentionPolicy.WORK_QUEUE,
                    storage=StorageType.FILE,
                    num_replicas=settings.replicas,
                    duplicate_window=_DUPLICATES_S,
                )
            )
        self._check_stream(info, subjects)
        config = ConsumerConfig(
            durable_name=self.jobs_name,
            ack_policy=AckPolicy.EXPLICIT,
            deliver_policy=DeliverPolicy.ALL,
            ack_wait=settings.ack_wait,
            max_deliver=-1,
            max_ack_pending=1 if self._mode == "strict" else 1000,
        )
        await self._open_consumer(settings.stream, config)

    def _check_stream(self, info: StreamInfo, subjects: list[str]) -> None:
        config = info.config
        limits = (config.max_msgs or -1, config.max_bytes or -1, config.max_msg_size or -1, config.max_age or -1)
        problem = None
        if config.retention != RetentionPolicy.WORK_QUEUE:
            problem = f"its retention is '{config.retention}': a job would stay in it, or be removed, at another time"
        elif config.storage != StorageType.FILE:
            problem = f"its storage is '{config.storage}': jobs would be lost with the server's process"
        elif config.subjects != subjects:
            problem = f"its subjects are {config.subjects} instead of {subjects}"
        elif config.num_replicas != self._settings.replicas:
            problem = (
                f"it is stored on {config.num_replicas} servers, but queue.jetstream.replicas is "
                f"{self._settings.replicas}"
            )
        elif any(limit > 0 for limit in limits):
            problem = "it has a limit of messages, bytes or age: jobs beyond that would be lost or not admitted"
        elif config.sealed or config.no_ack or config.mirror or config.sources:
            problem = "it is sealed, a mirror, has sources, or does not acknowledge what it stores"
        if problem is not None:
            raise ConfigError(
                f"The stream {config.name} cannot be the queue: {problem}.",
                "Change it with the tools of NATS, or name another one (queue.jetstream.stream): "
                "the consumer neither changes nor deletes a stream.",
            )

    async def _open_requests(self) -> None:
        """Have the server keep the requests of MQTT clients; its own stream appears with its first MQTT client."""
        try:
            info = await self._js.stream_info(MQTT_STREAM)
        except NotFoundError as exc:
            raise OSError(f"it has no stream {MQTT_STREAM}: no MQTT client has connected to this account yet") from exc
        if (info.config.num_replicas or 1) < self._settings.replicas:
            raise ConfigError(
                f"The server stores MQTT messages on {info.config.num_replicas} servers, but queue.jetstream.replicas "
                f"is {self._settings.replicas}: acknowledged requests could be lost.",
                f"Set mqtt {{ stream_replicas: {self._settings.replicas} }} in the servers' configuration, and change "
                f"the existing streams ($MQTT_msgs, $MQTT_rmsgs, $MQTT_sess) with the tools of NATS.",
            )
        config = ConsumerConfig(
            durable_name=self.requests_name,
            ack_policy=AckPolicy.EXPLICIT,
            deliver_policy=DeliverPolicy.ALL,
            ack_wait=self._settings.ack_wait,
            max_deliver=-1,
            max_ack_pending=1,  # requests are admitted in their order, whichever consumer does it
            filter_subjects=[
                f"{_MQTT_SUBJECTS}{_subject(part)}" for topic in self._topics for part in _without_parent(topic)
            ],
        )
        await self._open_consumer(MQTT_STREAM, config)

    async def _open_consumer(self, stream: str, wanted: ConsumerConfig) -> None:
        name = wanted.durable_name or ""
        try:
            info = await self._js.consumer_info(stream, name)
        except NotFoundError:
            info = await self._js.add_consumer(stream, wanted)
        self._check_consumer(info, wanted)

    def _check_consumer(self, info: ConsumerInfo, wanted: ConsumerConfig) -> None:
        config = info.config
        advice = "Change it with `nats consumer edit`, or delete it there while no consumer of the group runs."
        if config.max_ack_pending != wanted.max_ack_pending:
            problem = (
                f"it delivers {config.max_ack_pending} jobs at once at most, as in queue.mode = "
                f"'{'strict' if config.max_ack_pending == 1 else 'parallel'}': all consumers of a group have one mode"
            )
        elif config.ack_wait != wanted.ack_wait:
            problem = f"its ack_wait is {config.ack_wait:g} s, but queue.jetstream.ack_wait is {wanted.ack_wait:g}"
        elif config.ack_policy != AckPolicy.EXPLICIT or config.deliver_subject:
            problem = "it pushes messages, or takes them for acknowledged without an acknowledgement"
        elif config.max_deliver not in (None, -1, 0):
            problem = f"it delivers a job at most {config.max_deliver} times, and would then forget it"
        elif sorted(config.filter_subjects or _one(config.filter_subject)) != sorted(wanted.filter_subjects or ()):
            problem = f"its subjects are {config.filter_subjects or config.filter_subject}, not those of topic_prefix"
        else:
            return
        raise ConfigError(
            f"The consumer {info.name} of the stream {info.stream_name} cannot be used: {problem}.", advice
        )

    async def _open_records(self) -> None:
        settings = self._settings
        try:
            self._records = await self._js.key_value(settings.stream)
        except BucketNotFoundError:
            self._records = await self._js.create_key_value(
                KeyValueConfig(
                    bucket=settings.stream,
                    description="Job ids of cesar-mqtt",
                    history=1,
                    ttl=self._records_s,
                    storage=StorageType.FILE,
                    replicas=settings.replicas,
                    direct=False,  # a replica may answer a direct get with an older value
                )
            )
        info = await self._js.stream_info(f"KV_{settings.stream}")
        if info.config.num_replicas != settings.replicas or info.config.storage != StorageType.FILE:
            raise ConfigError(
                f"The bucket {settings.stream} is stored in '{info.config.storage}' on {info.config.num_replicas} "
                f"servers, but queue.jetstream.replicas is {settings.replicas}.",
                "Change its stream with the tools of NATS, or the setting.",
            )

    # -- calls of other threads ------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the queue is open and connected; False: not in time."""
        return self._connected.wait(timeout_s)

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float = _CALL_S) -> T:
        if not self._connected.is_set():
            work.close()
            raise QueueUnavailableError("The queue's server is out of reach.")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self._loop)
        try:
            return future.result(timeout_s + 1.0)
        except _ERRORS as exc:
            future.cancel()
            raise QueueUnavailableError(f"The queue does not answer: {exc or type(exc).__name__}") from exc

    def next_request(self) -> Message | None:
        """Return the next request to admit; None: there was none for a second, or another consumer has it."""
        return self._next(self._fetch(self._requests, _request_of))

    def next_job(self) -> Message | None:
        """Return the next job for this consumer; None: there was none for a second."""
        return self._next(self._fetch(self._jobs, _job_of))

    def _next(self, fetch: Coroutine[Any, Any, Message | None]) -> Message | None:
        return self._call(fetch, _FETCH_S + _CALL_S)

    async def _fetch(self, subscription: Any, read: Any) -> Message | None:
        try:
            (message,) = await subscription.fetch(1, timeout=_FETCH_S)
        except TimeoutError:
            return None
        except APIError as exc:  # such as a change of leader among the servers
            log.debug("NATS: %s", exc, action="queue_unavailable")
            await asyncio.sleep(_FETCH_S / 4)
            return None
        return read(message)  # type: ignore[no-any-return]

    def acknowledge(self, message: Message) -> None:
        """Remove a message from its stream; on return that is on the server's disk."""
        self._call(self._connection.request(message.reply, b"+ACK", timeout=_CALL_S))

    def renew(self, message: Message, timeout_s: float) -> None:
        """Keep a delivered message for another `ack_wait`."""
        self._call(self._connection.request(message.reply, b"+WPI", timeout=timeout_s), timeout_s)

    def give_back(self, message: Message) -> None:
        """Have a message delivered again at once, ahead of the rest."""
        self._call(self._connection.request(message.reply, b"-NAK", timeout=_CALL_S))

    def enqueue(self, job_id: str, request: Message) -> None:
        """Put a job at the end of the queue, once for each request; on return that is on the server's disk."""
        headers = {
            _JOB_ID: job_id,
            _TOPIC: request.topic,
            _RECEIVED: repr(request.received_at),
            "Nats-Msg-Id": f"{job_id}-{request.seq}",
        }
        self._call(self._js.publish(self._job_subject(job_id), request.payload, headers=headers))

    def job(self, job_id: str) -> Message | None:
        """Return the message of a job in the queue, waiting or delivered; None: there is none."""
        message = self._call(self._last(self._settings.stream, self._job_subject(job_id)))
        return None if message is None else _stored_job_of(message)

    def job_behind(self, seq: int) -> Message | None:
        """Return the first message in the queue whose number is greater than `seq`; None: there is none."""
        message = self._call(self._behind(seq))
        return None if message is None else _stored_job_of(message)

    async def _behind(self, seq: int) -> Any:
        try:
            return await self._js.get_msg(
                self._settings.stream, seq=seq + 1, subject=f"{self._settings.stream}.job.>", next=True
            )
        except NotFoundError:
            return None

    def is_enqueued(self, job_id: str) -> bool:
        """Whether the queue has a message of this job, waiting or delivered."""
        return self.job(job_id) is not None

    def remove(self, job_id: str) -> None:
        """Remove the message of a job from the queue."""
        self._call(self._js.purge_stream(self._settings.stream, subject=self._job_subject(job_id)))

    def waiting(self) -> int:
        """Return how many jobs wait to be delivered."""
        info = self._call(self._js.consumer_info(self._settings.stream, self.jobs_name))
        return info.num_pending or 0

    def retained(self, topic: str) -> bytes | None:
        """Return the retained message on a topic; None: there is none."""
        message = self._call(self._last(_RETAINED_STREAM, f"{_RETAINED_SUBJECTS}{_subject(topic)}"))
        return None if message is None else message.data or b""

    async def _last(self, stream: str, subject: str) -> Any:
        try:
            return await self._js.get_last_msg(stream, subject)
        except NotFoundError:
            return None

    def _job_subject(self, job_id: str) -> str:
        return f"{self._settings.stream}.job.{job_id}"

    # -- records ---------------------------------------------------------------------------------------------------

    def record(self, key: str) -> Record | None:
        """Return a record as it is on the server's disk; None: there is none."""
        return self._call(self._record(key))

    async def _record(self, key: str) -> Record | None:
        try:
            entry = await self._records.get(key)
        except KeyNotFoundError:
            return None
        return Record(entry.revision or 0, json.loads(entry.value or b"{}"))

    def create_record(self, key: str, values: Mapping[str, Any]) -> Record | None:
        """Write a record if there is none; None: there is one."""
        try:
            return Record(self._call(self._records.create(key, json.dumps(values).encode())), values)
        except QueueUnavailableError as exc:
            if isinstance(exc.__cause__, KeyWrongLastSequenceError):
                return None
            raise

    def update_record(self, key: str, record: Record, values: Mapping[str, Any]) -> Record | None:
        """Replace a record that has not changed since it was read; None: it has."""
        try:
            revision = self._call(self._records.update(key, json.dumps(values).encode(), last=record.revision))
        except QueueUnavailableError as exc:
            if isinstance(exc.__cause__, KeyWrongLastSequenceError):
                return None
            raise
        return Record(revision, values)

    def put_record(self, key: str, values: Mapping[str, Any]) -> None:
        """Write a record, whether there is one or not."""
        self._call(self._records.put(key, json.dumps(values).encode()))

    def delete_record(self, key: str) -> None:
        """Delete a record, if there is one."""
        self._call(self._records.purge(key))


def look(settings: "JetStreamSettings", timeout_s: float) -> QueueState | None:
    """Return the state of a queue without changing anything; None: no consumer has made it yet.

    Raises:
        ConfigError: a file cannot be used, or the server refuses the credentials.
        QueueUnavailableError: the server does not answer.
    """
    return asyncio.run(_look(settings, timeout_s))


async def _look(settings: "JetStreamSettings", timeout_s: float) -> QueueState | None:
    client, trouble = Client(), []

    async def on_error(error: Exception) -> None:
        trouble.append(str(error) or type(error).__name__)

    try:
        async with asyncio.timeout(timeout_s):
            await client.connect(
                **_connect_options(settings), error_cb=on_error, max_reconnect_attempts=0, connect_timeout=5
            )
            js = client.jetstream(timeout=timeout_s)
            stream = await js.stream_info(settings.stream)
            jobs = await js.consumer_info(settings.stream, f"{settings.stream}-jobs")
            requests = await js.consumer_info(MQTT_STREAM, f"{settings.stream}-requests")
    except NotFoundError:
        return None
    except _ERRORS as exc:
        raise QueueUnavailableError(
            f"The queue does not answer: {trouble[0] if trouble else str(exc) or type(exc).__name__}."
        ) from exc
    finally:
        with suppress(*_ERRORS, AssertionError):
            await client.close()
    others = stream.cluster.replicas or [] if stream.cluster else []
    return QueueState(
        requests=(requests.num_pending or 0) + (requests.num_ack_pending or 0),
        waiting=jobs.num_pending or 0,
        delivered=jobs.num_ack_pending or 0,
        replicas=stream.config.num_replicas or 1,
        absent=tuple(peer.name or "?" for peer in others if peer.offline or not peer.current),
    )


def _request_of(message: Msg) -> Message:
    data = message.metadata
    return Message(
        topic=_topic(message.subject.removeprefix(_MQTT_SUBJECTS)),
        payload=message.data,
        seq=data.sequence.stream,
        deliveries=data.num_delivered,
        received_at=data.timestamp.timestamp(),
        job_id=None,
        reply=message.reply,
    )


def _job_of(message: Msg) -> Message:
    data, headers = message.metadata, message.headers or {}
    return Message(
        topic=headers.get(_TOPIC, ""),
        payload=message.data,
        seq=data.sequence.stream,
        deliveries=data.num_delivered,
        received_at=float(headers.get(_RECEIVED, data.timestamp.timestamp())),
        job_id=headers.get(_JOB_ID) or message.subject.rpartition(".")[2],
        reply=message.reply,
    )


def _stored_job_of(message: Any) -> Message:
    headers = message.headers or {}
    return Message(
        topic=headers.get(_TOPIC, ""),
        payload=message.data or b"",
        seq=message.seq,
        deliveries=0,
        received_at=float(headers.get(_RECEIVED, 0.0)),
        job_id=headers.get(_JOB_ID) or message.subject.rpartition(".")[2],
        reply="",
    )


def _subject(topic: str) -> str:
    """Return the subject of a topic or filter whose levels have no dots, as all of the contract's are."""
    return topic.replace("/", ".").replace("#", ">")


def _topic(subject: str) -> str:
    """Return the MQTT topic of a subject: the server writes a dot as `//`, and an empty level as `/`."""
    return subject.replace("//", "\0").replace("/", "").replace(".", "/").replace("\0", ".")


def _without_parent(topic_filter: str) -> tuple[str, ...]:
    """Return a filter and, as `#` matches the level above it as well, that one."""
    return (topic_filter, topic_filter.removesuffix("/#")) if topic_filter.endswith("/#") else (topic_filter,)


def _one(subject: str | None) -> list[str]:
    return [subject] if subject else []


def _connect_options(settings: "JetStreamSettings") -> dict[str, Any]:
    """Return the servers, the credentials and the TLS context for nats-py.

    Raises:
        ConfigError: a file cannot be used.
    """
    options: dict[str, Any] = {"servers": [url.strip() for url in settings.url.split(",")]}
    if settings.username is not None:
        options["user"] = settings.username
        if settings.password_file is not None:
            options["password"] = _first_line("queue.jetstream.password_file", settings.password_file)
    elif settings.password_file is not None:
        raise ConfigError("queue.jetstream.password_file is set, but queue.jetstream.username is not.", "Set both.")
    if settings.credentials_file is not None:
        if not settings.credentials_file.is_file():
            raise ConfigError(f"queue.jetstream.credentials_file '{settings.credentials_file}' cannot be read.")
        options["user_credentials"] = str(settings.credentials_file)
    if settings.ca_file is not None or settings.cert_file is not None or "tls://" in settings.url:
        try:
            context = ssl.create_default_context(cafile=settings.ca_file)
            if settings.cert_file is not None:
                context.load_cert_chain(settings.cert_file, settings.key_file, password="")
        except OSError as exc:  # an SSLError is one
            raise ConfigError(
                f"queue.jetstream.ca_file, cert_file or key_file cannot be used: {exc.strerror or exc}.",
                "They are files in PEM format: certificates, and an unencrypted key.",
            ) from exc
        options["tls"] = context
    return options


def _first_line(name: str, path: Any) -> str:
    try:
        line = path.read_text(encoding="utf-8").partition("\n")[0].removesuffix("\r")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{name} '{path}' cannot be read: {exc}.") from exc
    if not line:
        raise ConfigError(f"{name} '{path}' cannot be used: its first line is empty.")
    return str(line)
