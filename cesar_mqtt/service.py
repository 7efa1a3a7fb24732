"""The service: builds every part of the consumer, starts them in order and stops them in the order of the contract.

The main thread builds it and calls `run`. No other module knows all parts.
"""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cesar_mqtt.audio import decoder_process
from cesar_mqtt.audio.download import Downloader
from cesar_mqtt.audio.paths import check_directories
from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.consumer import shared_subscription as group
from cesar_mqtt.consumer.commands import CommandHandlers
from cesar_mqtt.consumer.defaults import StoredDefaults
from cesar_mqtt.consumer.discovery import PAUSE_SWITCH, birth_topics, discovery_messages
from cesar_mqtt.consumer.discovery_schedule import AnnouncedTopics
from cesar_mqtt.consumer.earlier_topics import FILE_NAME as TOPICS_FILE
from cesar_mqtt.consumer.earlier_topics import EarlierTopics
from cesar_mqtt.consumer.events import JobEvents
from cesar_mqtt.consumer.intake import Intake
from cesar_mqtt.consumer.maintenance import Maintenance
from cesar_mqtt.consumer.prefetch import Prefetcher
from cesar_mqtt.consumer.publisher import Publisher
from cesar_mqtt.consumer.recent_rejections import RecentRejections
from cesar_mqtt.consumer.shared_commands import SharedCommands, WaitingList
from cesar_mqtt.consumer.shared_queue import Admissions, Claims, RequestReader
from cesar_mqtt.consumer.worker import Worker, options_of
from cesar_mqtt.errors import BrokerRefusedError, CesarError, ConfigError, ExitCode, LedgerError, ThreadDiedError, lacks
from cesar_mqtt.gateway import web
from cesar_mqtt.gateway.front_doors import audio_directories, create_front_doors, gateway_broker, webhook_health
from cesar_mqtt.jobs import Job, JobState
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger, data_dir_problem
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.monitoring.health import HealthProbe
from cesar_mqtt.monitoring.signals import StopSignals
from cesar_mqtt.monitoring.systemd import Notifier
from cesar_mqtt.mqtt.broker_url import BrokerUrl, parse_broker_url
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import ConnectionInfo, Subscription, Will
from cesar_mqtt.protocol.consumer_payloads import ConsumerState, Info, info_of
from cesar_mqtt.protocol.response_topics import ResponseTopics
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.whisper.catalogue import ENGLISH_ONLY_ADVICE
from cesar_mqtt.whisper.known_voices import KnownVoices
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.pipeline import uses_batches
from cesar_mqtt.whisper.speakers import SpeakerLabeller
from cesar_mqtt.whisper.transcriber import Transcriber

if TYPE_CHECKING:
    from cesar_mqtt.audio.windows import Recording
    from cesar_mqtt.engines.jetstream import JetStreamQueue
    from cesar_mqtt.gateway.web.server import WebServer
    from cesar_mqtt.monitoring.metrics import Metrics
    from cesar_mqtt.mqtt.embedded import EmbeddedBroker

log = get_logger(__name__)

_DAY_S = 24 * 3600.0
_DEFAULT_PORT = 1883  # mosquitto_pub's
_TICK_S = 1.0
"""How often the main thread checks the threads and does maintenance; a systemd watchdog is notified as often."""
_HEALTH_S = 60.0
"""How often `health` is published (docs/topics.md)."""
_POLL_S = 0.05
"""How often a stop looks for a second signal while it waits: a forced stop feels immediate."""
_DRAIN_S = 10.0
"""How long a stop waits for PUBACKs. The ledger keeps what is not acknowledged, so a silent broker must not hold it."""
_FORCED_DRAIN_S = 2.0
"""The same after a second signal, or without a connection."""


class Service:
    """One consumer: a ledger, a worker, and a connection to a broker, which may be its own."""

    def __init__(self, settings: Settings, *, directory: Path) -> None:
        """Open and check everything that can be wrong, before any message is acknowledged.

        Args:
            settings: all of them.
            directory: the folder that `serve` was started in, absolute.

        Raises:
            ConfigError: a setting is wrong, or a port is taken.
            LedgerInUseError: another consumer uses the ledger.
            LedgerError: the ledger cannot be read, or the data directory not be written.
        """
        self._settings = settings
        self._notifier = Notifier()
        self._topics = Topics(settings.topic_prefix, settings.consumer.name)
        self._metrics = _create_metrics(settings)
        self._models = ModelStore(settings.models, folder=settings.data_dir / "models")
        address = parse_broker_url(settings.broker.url)
        check_directories(settings.audio.directories)
        broker_settings = group.broker_of(settings, address)
        self._ledger = _open_ledger(settings, self._disk("ledger"))
        self._broker: EmbeddedBroker | None = None
        self._web: WebServer | None = None
        try:
            decoder_process.start()  # it loads its libraries meanwhile
            self._spool = Spool(
                settings.data_dir / "spool",
                self._disk("spool"),
                max_bytes=settings.queue.max_spool_bytes,
                beside=lambda: 0 if self._web is None else self._web.stored_bytes,
            )
            self._spool.sweep(self._ledger.needed_spool_files())
            if address.scheme == "embedded":
                self._broker = _start_broker(settings, address, self._topics)
                broker_settings = broker_settings.model_copy(update={"url": self._broker.url, "protocol": "3.1.1"})
            self._build(settings, broker_settings, audio_directories(settings, default=directory))
        except BaseException:
            self._close_files()
            raise

    def _disk(self, part: str) -> Disk:
        disk = Disk()
        if self._metrics is not None:
            disk.timed = self._metrics.sync_timer(part)
        return disk

    def _build(self, settings: Settings, broker: BrokerSettings, directories: tuple[Path, ...]) -> None:
        self.url = broker.url
        if settings.web.listen is not None:
            uploads = settings.data_dir / "uploads"
            directories = (*directories, uploads)
            self._web = web.create_server(
                settings,
                gateway_broker(settings, broker),
                uploads=uploads,
                is_needed=self._needs_upload,
                has_ended=self._has_ended,
                check_room=self._spool.check_room,
                metrics=self._render_metrics,
            )
        self._refused: BrokerRefusedError | None = None
        self.refusal_is_logged = False
        self._queue = _create_queue(settings, self._topics)
        limit, waiting = settings.queue.max_payload_bytes, None
        if self._queue is not None:
            self._reader = RequestReader(self._queue, self._topics, self._models, max_payload_bytes=limit)
            waiting = WaitingList(self._queue, self._reader.read)
        self._client = self._create_client(settings, broker)
        self._publisher = Publisher(self._client, self._ledger, self._topics)
        self._events = JobEvents(self._publisher)
        rejections = RecentRejections()
        self._events.on_rejected.append(rejections.add)
        defaults = StoredDefaults(self._ledger, self._models.catalogue)
        self._announced_topics = AnnouncedTopics(settings.data_dir / "homeassistant.json")
        self._client.on_connected = self._on_connected
        self._client.on_disconnected = lambda failure: self._publisher.on_disconnected(
            failure.unacknowledged, is_stalled=failure.is_stalled
        )
        self._client.on_published = self._publisher.on_published
        self._client.on_refused = self._on_refused
        self._transcriber = Transcriber(
            self._models,
            settings.audio,
            window_s=settings.transcriber.window,
            short_encoder_input=settings.transcriber.short_encoder_input,
        )
        self._prefetcher = Prefetcher(
            self._ledger,
            open_recording=self._open_recording,
            spool=self._spool,
            directories=directories,
            downloader=Downloader(settings.audio, settings.data_dir / "spool"),
            ahead=settings.audio.downloads_ahead,
        )
        self._worker = Worker(
            self._ledger,
            self._transcriber,
            prefetcher=self._prefetcher,
            labeller=_create_labeller(settings),
            spool=self._spool,
            events=self._events,
            warm_up=self._models.default_name(),
            retries=settings.worker.retries,
            retry_delay_s=settings.worker.retry_delay,
            timeout_s=settings.worker.job_timeout,
            idle_s=settings.models.idle_timeout,
            on_idle=self._models.unload_if_idle,
            may_end=lambda job: self._claims is None or self._claims.may_end(job),
        )
        self._health = HealthProbe(
            settings.data_dir,
            worker_alive=lambda: self._worker.alive,
            network_alive=lambda: self._client.connected is not None,
            events_dropped=lambda: self._ledger.events_dropped,
            quarantined=self._publisher.quarantined,
            webhook=lambda: webhook_health(self._front_doors),
        )
        self._intake = Intake(
            self._client,
            self._ledger,
            spool=self._spool,
            topics=self._topics,
            models=self._models,
            commands=CommandHandlers(
                self._ledger,
                spool=self._spool,
                models=self._models,
                consumer=settings.consumer.name,
                on_cancelled=self._events.finished,
                progress_of=self._publisher.progress_of,
                health=self._health.fields,
                rejections=rejections,
                defaults=defaults,
                on_defaults_set=self._publish_info,
                on_deleted=lambda job_id: None if self._claims is None else self._claims.release(job_id),
                resubmit=None if self._queue is None else self._resubmit,
                waiting=waiting,
                grouped=settings.consumer.group is not None or self._queue is not None,
            ),
            response_topics=ResponseTopics(
                self._topics,
                allowed=settings.security.response_topics,
                discovery_prefix=settings.homeassistant.prefix,
            ),
            max_payload_bytes=limit,
            max_priority=settings.queue.max_priority,
            events=self._events,
            publisher=self._publisher,
            on_birth=self._publisher.on_home_assistant_started,
        )
        self._admissions, self._claims = self._share_queue(settings)
        self._maintenance = Maintenance(settings.retention, self._ledger, self._spool, on_expired=self._events.finished)
        self._front_doors = create_front_doors(settings, broker, self._topics)
        if self._web is not None:
            self._front_doors.append(("web", self._web))
        if self._metrics is not None:
            self._observe(self._metrics)

    def _share_queue(self, settings: Settings) -> tuple[Admissions | None, Claims | None]:
        queue = self._queue
        if queue is None:
            return None, None
        ack_wait_s, reader = settings.queue.jetstream.ack_wait, self._reader
        admissions = Admissions(
            queue,
            reader,
            commands=SharedCommands(
                queue,
                reader.read,
                ledger=self._ledger,
                spool=self._spool,
                publisher=self._publisher,
                topics=self._topics,
            ),
            ledger=self._ledger,
            publisher=self._publisher,
            events=self._events,
            consumer=settings.consumer.name,
            ack_wait_s=ack_wait_s,
        )
        claims = Claims(
            queue,
            reader,
            ledger=self._ledger,
            spool=self._spool,
            publisher=self._publisher,
            topics=self._topics,
            ack_wait_s=ack_wait_s,
            is_strict=settings.queue.mode == "strict",
            is_working=lambda: self._worker.may_run_jobs,
        )
        return admissions, claims

    def _resubmit(self, job: Job) -> None:
        if self._claims is not None:
            self._claims.resubmit(job)

    def _create_client(self, settings: Settings, broker: BrokerSettings) -> MqttClient:
        births = birth_topics(settings.homeassistant.prefix) if settings.homeassistant.enabled else ()
        return MqttClient(
            broker,
            client_id=settings.consumer.name,
            persistent=True,
            will=Will(self._topics.own("state"), ConsumerState(state="offline").encode()),
            subscriptions=(
                *group.subscriptions(self._topics, settings.consumer.group, jobs=self._queue is None),
                Subscription(self._topics.own(PAUSE_SWITCH), may_go_ahead=True),
                *map(Subscription, births),
            ),
            unwanted_filters=group.unwanted_filters(
                self._topics,
                settings.consumer.group,
                known=settings.data_dir / "subscriptions",
                jobs=self._queue is None,
            ),
        )

    def _open_recording(self, path: Path, job: Job) -> "Recording":
        return self._transcriber.open(path, options_of(job), from_s=self._ledger.resume_position_s(job.seq))

    def _needs_upload(self, job_id: str) -> bool | None:
        job = self._ledger.get(job_id)
        return None if job is None else job.may_need_audio

    def _has_ended(self, job_id: str) -> bool:
        job = self._ledger.get(job_id)
        return job is not None and job.state.final

    def _render_metrics(self) -> bytes:
        return b"" if self._metrics is None else self._metrics.render()

    def _observe(self, metrics: "Metrics") -> None:
        """Have everything counted and timed that the metrics are about, and open their port."""
        from cesar_mqtt.monitoring.metrics import MetricSources  # noqa: PLC0415 - see `_create_metrics`

        self._events.on_finished.append(metrics.count_job)
        self._events.on_rejected.append(metrics.count_rejection)
        self._models.on_loaded = metrics.count_load
        self._models.on_unloaded = metrics.count_unload
        self._prefetcher.on_downloaded = metrics.count_download
        metrics.serve(
            MetricSources(
                ledger=self._ledger.path,
                totals=self._ledger.totals,
                health=self._health.measure,
                in_flight=lambda: self._publisher.in_flight,
                has_unpublished=lambda: self._ledger.has_unpublished,
                shared_queue=None if self._queue is None else self._shared_queue,
            )
        )

    def _shared_queue(self) -> tuple[bool, int]:
        return self._queue is not None and self._queue.wait_ready(0.0), self._publisher.waiting()

    # -- callbacks of the network thread ---------------------------------------------------------------------------

    def _on_connected(self, info: ConnectionInfo) -> None:
        self._refused = group.check_granted(info.refused_filters, self._topics, self._settings.consumer.group)
        self._publisher.on_connected(session_present=info.session_present, max_packet_bytes=info.max_packet_bytes)

    def _on_refused(self, error: BrokerRefusedError) -> None:
        self._refused = group.explain_refusal(error, self._settings.consumer.group)
        self.refusal_is_logged = self._refused is error

    # -- running, in the main thread -------------------------------------------------------------------------------

    def run(self, stop: StopSignals) -> ExitCode:
        """Serve until a signal requests a stop, then stop in order.

        Returns:
            OK after a graceful stop, UNACKNOWLEDGED if the broker has not acknowledged every status; INTERRUPTED or
            TERMINATED after a forced one. The worker's thread may then still
            be inside the model, so the process has to end without waiting for it.

        Raises:
            BrokerRefusedError: the broker refused the credentials or the client id at the first connection.
            ThreadDiedError: one of the threads ended unexpectedly.
        """
        self._start()
        try:
            self._watch(stop)
        except CesarError as exc:
            self._abandon_job()
            # A broker that refuses the connection acknowledges nothing.
            self._shut_down(stop, 0.0 if isinstance(exc, BrokerRefusedError) else _FORCED_DRAIN_S)
            raise
        return self._stop(stop)

    def _start(self) -> None:
        for state in (JobState.COMPLETED, JobState.ERROR):
            last = self._ledger.last_finished(state)
            if last is not None:
                self._publisher.on_finished(last)
        EarlierTopics(self._settings.data_dir / TOPICS_FILE).record(
            self._topics, embedded=self._broker is not None, jobs=self._ledger.count(())
        )
        self._publisher.publish_state("online")
        self._announce()
        self._publish_info()
        self._publisher.start()
        self._prefetcher.start()
        self._worker.start()
        self._intake.start()
        self._client.start()
        for thread in (self._queue, self._admissions, self._claims):
            if thread is not None:
                thread.start()
        for _, door in self._front_doors:
            door.start()
        self._notifier.ready()
        broker, queued = parse_broker_url(self.url).redacted, self._ledger.totals().queued
        message = "Connecting to %s as '%s', with the prefix '%s'; jobs in the queue: %d"
        log.info(message, broker, self._topics.consumer, self._topics.prefix, queued, action="serving")
        model = self._models.default_name()
        if self._models.catalogue.assumes_english:
            message = "The default model %s knows English only. %s"
            log.warning(message, model, ENGLISH_ONLY_ADVICE, action="english_only")

    def _announce(self) -> None:
        """Announce the consumer to Home Assistant, if wanted, and withdraw what earlier settings announced."""
        wanted = self._settings.homeassistant
        messages: dict[str, bytes] = {}
        if wanted.enabled:
            info = self._info()
            messages = discovery_messages(
                self._topics,
                mode=wanted.discovery,
                prefix=wanted.prefix,
                models=sorted({*info.models, info.default_model}),
                page=info.web,
            )
        self._publisher.announce(messages, stale=self._announced_topics.record(messages))

    def _publish_info(self) -> None:
        self._publisher.publish_own_topic("info", self._info())

    def _info(self) -> Info:
        models = self._models.describe()
        return info_of(
            self._settings.redacted(),
            models=[model.name for model in models.models if model.origin is not None and model.problem is None],
            default_model=models.default,
            default_language=models.default_language,
            device=models.device,
            compute_type=models.compute_type,
            cpu_threads=models.cpu_threads,
            workers=models.workers,
            batching=uses_batches(models.device),
            started=time.time(),
            web=None if self._web is None else self._web.url,
        )

    def _watch(self, stop: StopSignals) -> None:
        """Check the threads, publish health and do maintenance until a stop is requested."""
        health_due = time.monotonic()
        while not stop.wait(_TICK_S):
            queue_refusal = None if self._queue is None else self._queue.refusal
            refusals = (self._refused, queue_refusal, *(door.refusal for _, door in self._front_doors))
            for refusal in refusals:
                if refusal is not None:
                    raise refusal
            self._check_threads()
            self._notifier.alive()
            if time.monotonic() >= health_due:
                health_due += _HEALTH_S
                self._publisher.publish_own_topic("health", self._health.measure())
            self._maintenance.run_once(stop.is_requested)

    def _check_threads(self) -> None:
        """Raise ThreadDiedError when a thread has died: without it jobs would wait, and no status would show why."""
        alive = {
            "network": self._client.alive,
            "intake": self._intake.alive,
            "worker": self._worker.alive,
            "prefetch": self._prefetcher.alive,
            "publisher": self._publisher.alive,
            **{name: door.alive for name, door in self._front_doors},
        }
        if self._admissions is not None and self._claims is not None:
            alive |= {"admission": self._admissions.alive, "claims": self._claims.alive}
        dead = [name for name, is_alive in alive.items() if not is_alive]
        if dead:
            raise ThreadDiedError(
                f"The {dead[0]} thread ended unexpectedly.", "See the log for the reason, and start the consumer again."
            )

    # -- stopping, in the main thread ------------------------------------------------------------------------------

    def _stop(self, stop: StopSignals) -> ExitCode:
        """Stop in the order of the contract (section 6).

        1. No further job is started; the running one is finished, however long that takes.
        2. The intake ends after its batch: what it received is on disk and acknowledged, the broker keeps the rest.
        3. The broker acknowledges every status, so that no producer waits for a transcript that exists.
        4. The front doors close: until then they take what is finished. What they submit meanwhile stays at the broker.
        5. `offline` is published and acknowledged: no message follows it.
        6. The client disconnects, so that the broker does not publish the will.
        7. The ledger is checkpointed: `ledger.json` alone is complete.
        8. The embedded broker closes last: all of the above needs it.
        """
        self._notifier.stopping()
        self._publisher.set_draining()
        self._worker.request_stop()
        for thread in (self._admissions, self._claims):
            if thread is not None:
                thread.request_stop()
        forced = not self._wait_for_job(stop)
        if forced:
            self._abandon_job()
        acknowledged = self._shut_down(stop, _FORCED_DRAIN_S if forced else _DRAIN_S)
        if forced or stop.is_forced():
            return stop.exit_code
        return ExitCode.OK if acknowledged else ExitCode.UNACKNOWLEDGED

    def _wait_for_job(self, stop: StopSignals) -> bool:
        """Wait for the worker to end; False: a second signal or `worker.drain_timeout` came first."""
        limit_s = self._settings.worker.drain_timeout
        deadline = math.inf if limit_s is None else time.monotonic() + limit_s
        notify_at = 0.0
        if self._ledger.processing():
            log.info("Stopping after the current job; a second signal stops at once", action="draining")
        while not self._worker.join(_POLL_S):
            if time.monotonic() >= notify_at:
                self._notifier.alive()
                notify_at = time.monotonic() + _TICK_S
            if stop.is_forced() or time.monotonic() >= deadline:
                return False
        return True

    def _abandon_job(self) -> None:
        try:
            self._worker.abandon()
        except LedgerError as exc:
            log.error("%s The next start requeues the running job.", exc, action="requeued")

    def _shut_down(self, stop: StopSignals, drain_s: float) -> bool:
        """Do steps 2 to 8 of `_stop`; return whether the broker has acknowledged every status."""
        self._worker.request_stop()
        for thread in (self._admissions, self._claims):
            if thread is not None:
                thread.request_stop()
        if self._web is not None:
            self._web.request_stop()
        self._prefetcher.stop()
        self._client.stop_receiving()
        self._intake.stop()
        if not self._drain(stop, drain_s) and drain_s:
            log.warning("The broker has not acknowledged everything; the next start publishes the rest", action="drain")
        if self._claims is not None:
            self._claims.join(_FORCED_DRAIN_S)
        for _, door in self._front_doors:
            door.close()
        self._publisher.publish_state("offline")
        if self._drain(stop, min(drain_s, _FORCED_DRAIN_S)):
            self._announced_topics.remove_stale()
        self._publisher.stop()
        self._client.close()
        if self._queue is not None:
            self._queue.stop(_FORCED_DRAIN_S)
        acknowledged = not self._ledger.has_unpublished
        self._close_files()
        log.info("Stopped; jobs in the queue: %d", self._ledger.totals().queued, action="stopped")
        return acknowledged

    def _drain(self, stop: StopSignals, limit_s: float) -> bool:
        """Wait for the broker's acknowledgements, after a second signal or without a connection for a shorter time."""
        started = time.monotonic()
        while not self._publisher.drain(_POLL_S):
            connected, forced = self._client.connected, stop.is_forced()
            if forced and not connected:
                return False
            most_s = limit_s if connected and not forced else min(limit_s, _FORCED_DRAIN_S)
            if time.monotonic() - started >= most_s:
                return False
        return True

    def _close_files(self) -> None:
        decoder_process.stop()
        if self._web is not None:
            self._web.close()
        if self._metrics is not None:
            self._metrics.close()
        try:
            self._ledger.close()
        except LedgerError as exc:
            log.error("%s", exc, action="checkpoint")
        if self._broker is not None:
            self._broker.close()


def _create_metrics(settings: Settings) -> "Metrics | None":
    """Create the metrics that `metrics.port` asks for; None: it asks for none, and nothing is counted.

    Raises:
        ConfigError: the extra `metrics` is not installed.
    """
    if settings.metrics.port is None:
        return None
    try:
        from cesar_mqtt.monitoring.metrics import Metrics  # noqa: PLC0415 - prometheus-client is an extra
    except ModuleNotFoundError as exc:
        if not lacks(exc, "prometheus_client"):
            raise
        raise ConfigError(
            "metrics.port is set, but prometheus-client is not installed: "
            "install it with pip install '.[metrics]' in the clone, or leave metrics.port out"
        ) from exc
    return Metrics(settings.metrics.host, settings.metrics.port, consumer=settings.consumer.name)


def _create_queue(settings: Settings, topics: Topics) -> "JetStreamQueue | None":
    """Create the queue that consumers share; None: the ledger is the queue.

    Raises:
        ConfigError: the extra `cluster` is not installed, or a file of the settings cannot be used.
    """
    if settings.queue.engine == "mqtt":
        return None
    try:
        from cesar_mqtt.engines.jetstream import JetStreamQueue  # noqa: PLC0415 - nats-py is an extra
    except ModuleNotFoundError as exc:
        if not lacks(exc, "nats"):
            raise
        raise ConfigError(
            "queue.engine is 'jetstream', but nats-py is not installed: "
            "install it with pip install '.[cluster]' in the clone, or leave queue.engine out"
        ) from exc
    return JetStreamQueue(
        settings.queue.jetstream,
        mode=settings.queue.mode,
        topics=(topics.jobs, topics.audio_filter, topics.request_filter),
        name=topics.consumer,
        records_s=settings.retention.days * _DAY_S,
    )


def _create_labeller(settings: Settings) -> SpeakerLabeller:
    speakers = settings.speakers
    known = None if speakers.directory is None else KnownVoices(speakers.directory, speakers.threshold)
    return SpeakerLabeller(settings.models, known_voices=known)


def _open_ledger(settings: Settings, disk: Disk) -> Ledger:
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        Disk().sync_folder(folder.parent)
    except OSError as exc:
        raise LedgerError(
            f"The data directory {folder} cannot be created: {exc.strerror}. Choose one with --data-dir."
        ) from exc
    problem = data_dir_problem(folder)
    if problem is not None:
        log.warning("%s %s", *problem, action="data_dir_open")
    return Ledger(
        folder / "ledger.json",
        max_attempts=settings.worker.max_attempts,
        max_queued=settings.queue.max_queued,
        disk=disk,
    )


def _start_broker(settings: Settings, address: BrokerUrl, topics: Topics) -> "EmbeddedBroker":
    if settings.broker.protocol == "5":
        raise ConfigError(
            "broker.protocol is '5', but the embedded broker speaks MQTT 3.1.1: set 'auto', or broker.url"
        )
    from cesar_mqtt.mqtt.embedded import EmbeddedBroker  # noqa: PLC0415 - only the embedded broker needs amqtt

    broker = EmbeddedBroker(address.host, address.port, subscriber=topics.consumer, is_forwarded=topics.is_submission)
    broker.start()
    port = "" if broker.port == _DEFAULT_PORT else f" -p {broker.port}"
    log.info(
        "The embedded broker runs on %s:%d. Try: mosquitto_pub%s -q 1 -t cesar/audio/note-1 -f speech.wav",
        address.host,
        broker.port,
        port,
        action="broker",
    )
    return broker
