"""The service: the only module that knows all the others; it wires them, starts them in order and stops them in order.

The main thread builds it and calls `run`.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cesar_mqtt.audio.download import Downloader
from cesar_mqtt.audio.paths import check_directories
from cesar_mqtt.config import Settings
from cesar_mqtt.consumer import shared_subscription as group
from cesar_mqtt.consumer.command_handlers import CommandHandlers
from cesar_mqtt.consumer.discovery import PAUSE_SWITCH, birth_topics, discovery_messages
from cesar_mqtt.consumer.discovery_topics import AnnouncedTopics
from cesar_mqtt.consumer.intake import Intake
from cesar_mqtt.consumer.maintenance import Maintenance
from cesar_mqtt.consumer.prefetch import Prefetcher
from cesar_mqtt.consumer.publisher import Publisher
from cesar_mqtt.consumer.worker import Worker, options_of
from cesar_mqtt.errors import BrokerRefusedError, CesarError, ConfigError, ExitCode, LedgerError, ThreadDiedError
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.monitoring.health import HealthProbe
from cesar_mqtt.monitoring.metrics import Metrics, MetricSources, metrics_of
from cesar_mqtt.monitoring.signals import StopSignals
from cesar_mqtt.monitoring.systemd import Notifier
from cesar_mqtt.mqtt.broker_url import BrokerUrl, parse_broker_url
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import ConnectionInfo, Subscription, Will
from cesar_mqtt.protocol.consumer_payloads import ConsumerState, Info, info_of
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.whisper.transcriber import Transcriber

if TYPE_CHECKING:
    from cesar_mqtt.mqtt.embedded import EmbeddedBroker

log = get_logger(__name__)

_DEFAULT_PORT = 1883  # of mosquitto_pub
_TICK_S = 1.0
_HEALTH_S = 60.0
_LOOK_S = 0.05
_DRAIN_S = 10.0
_FORCED_DRAIN_S = 2.0


class Service:
    """One consumer: a ledger, a worker, and a connection to a broker (or a broker of its own)."""

    def __init__(self, settings: Settings, *, directory: Path) -> None:
        """Open and check everything that can be wrong before anybody is promised anything.

        Args:
            settings: all of them.
            directory: the folder that `serve` was started in, absolute.

        Raises:
            ConfigError: a setting is wrong, or the embedded broker's port is taken.
            LedgerInUseError: another consumer has the ledger.
            LedgerError: the ledger cannot be read, or the data directory not be written.
        """
        self._settings = settings
        self._notifier = Notifier()
        self._topics = Topics(settings.topic_prefix, settings.consumer.name)
        self._metrics = metrics_of(settings.metrics, consumer=settings.consumer.name)
        self._models = self._metrics.models(settings.models, folder=settings.data_dir / "models")
        address = parse_broker_url(settings.broker.url)
        check_directories(settings.audio.directories)
        settings = settings.model_copy(update={"broker": group.broker_of(settings, address)})
        self._ledger = _open_ledger(settings, self._metrics)
        self._broker: EmbeddedBroker | None = None
        try:
            self._spool = Spool(settings.data_dir / "spool", self._metrics.disk("spool"))
            self._spool.sweep(self._ledger.needed_spool_files())
            self._broker = _start_broker(settings, address, self._topics)
            if self._broker is not None:
                settings = _inside(settings, self._broker)
            self._wire(settings, settings.audio.directories or (directory,))
        except BaseException:
            self._close_files()
            raise

    def _wire(self, settings: Settings, directories: tuple[Path, ...]) -> None:
        self.url = settings.broker.url
        self._refused: BrokerRefusedError | None = None
        self._upkeep = Maintenance(settings.retention, self._ledger, self._spool, on_ended=self._ended)
        self._client = MqttClient(
            settings.broker,
            client_id=settings.consumer.name,
            persistent=True,
            will=Will(self._topics.own("state"), ConsumerState(state="offline").encode()),
            subscriptions=(
                *group.subscriptions(self._topics, settings.consumer.group),
                Subscription(self._topics.own(PAUSE_SWITCH)),
                *(
                    Subscription(topic)
                    for topic in birth_topics(settings.homeassistant.prefix)
                    if settings.homeassistant.enabled
                ),
            ),
            unwanted_filters=group.unwanted_filters(
                self._topics, settings.consumer.group, known=settings.data_dir / "subscriptions"
            ),
        )
        self._pulse = HealthProbe(
            settings.data_dir,
            worker_alive=lambda: self._worker.alive,
            network_alive=lambda: self._client.connected is not None,
        )
        self._publisher = Publisher(self._client, self._ledger, self._topics)
        self._announced = AnnouncedTopics(settings.data_dir / "homeassistant.json")
        self._reports = self._metrics.reports(self._publisher)
        self._client.on_connected = self._on_connected
        self._client.on_disconnected = lambda _reason: self._publisher.on_disconnected()
        self._client.on_published = lambda ticket, reason: self._publisher.on_published(ticket, refused=bool(reason))
        self._client.on_refused = self._on_refused
        self._intake = Intake(
            self._client,
            self._ledger,
            spool=self._spool,
            topics=self._topics,
            models=self._models,
            controls=CommandHandlers(
                self._ledger,
                models=self._models,
                consumer=settings.consumer.name,
                on_cancelled=self._ended,
                live=self._publisher.live_of,
                on_deleted=lambda _job, names: self._spool.remove(names),
                health=self._pulse.fields,
                grouped=settings.consumer.group is not None,
            ),
            max_payload_bytes=settings.queue.max_payload_bytes,
            reports=self._reports,
            on_born=self._publisher.announce_again,
        )
        transcriber = Transcriber(self._models, settings.audio, window_s=settings.transcriber.window)
        self._preparer = Prefetcher(
            self._ledger,
            open_recording=lambda path, job: transcriber.open(
                path, options_of(job), from_s=self._ledger.resume_position_s(job.seq)
            ),
            spool=self._spool,
            directories=directories,
            downloader=self._metrics.downloader(Downloader(settings.audio, settings.data_dir / "spool")),
            ahead=settings.audio.downloads_ahead,
        )
        self._worker = Worker(
            self._ledger,
            transcriber,
            preparer=self._preparer,
            spool=self._spool,
            reports=self._reports,
            warm_up=self._models.default_name(),
            retries=settings.worker.retries,
            retry_delay_s=settings.worker.retry_delay,
            timeout_s=settings.worker.job_timeout,
            idle_s=settings.models.idle_timeout,
            on_idle=self._models.unload_if_idle,
        )
        readings = MetricSources(
            ledger=self._ledger.path,
            totals=self._ledger.totals,
            health=self._pulse.take,
            in_flight=lambda: self._publisher.in_flight,
            behind=lambda: self._ledger.has_unpublished,
        )
        self._metrics.serve(readings)

    def _on_connected(self, info: ConnectionInfo) -> None:
        self._refused = group.check_granted(info.refused_filters, self._topics, self._settings.consumer.group)
        self._publisher.on_connected(session_present=info.session_present, max_packet_bytes=info.max_packet_bytes)

    def _announce(self) -> None:
        """Announce the consumer to Home Assistant, and withdraw what it announced when its settings were others."""
        wanted = self._settings.homeassistant
        if not wanted.enabled:
            return
        messages = discovery_messages(self._topics, mode=wanted.discovery, prefix=wanted.prefix)
        self._publisher.announce(messages, stale=self._announced.begin(messages))

    def _ended(self, job: Job) -> None:
        """Tell of a job that has ended without having been in work."""
        self._reports.finished(job)

    def _on_refused(self, error: BrokerRefusedError) -> None:
        self._refused = group.explain_refusal(error, self._settings.consumer.group)

    def run(self, stop: StopSignals) -> ExitCode:
        """Serve until a signal asks for a stop, then stop in order.

        Returns:
            OK after a graceful stop; INTERRUPTED or TERMINATED after a forced one. The worker's thread may then still
            be inside the model, so the process has to end without waiting for it.

        Raises:
            BrokerRefusedError: the broker refused the credentials or the client id at the first connection.
            ThreadDiedError: one of the threads has ended by itself.
        """
        self._start()
        try:
            self._watch(stop)
        except CesarError as exc:
            self._abandon()
            # Whom the broker refused has nobody to wait for.
            self._end(stop, 0.0 if isinstance(exc, BrokerRefusedError) else _FORCED_DRAIN_S)
            raise
        return self._stop(stop)

    def _start(self) -> None:
        last = self._ledger.last_finished()
        if last is not None:
            self._publisher.finished(last)
        self._publisher.online()
        self._announce()
        self._publisher.tell("info", self._info())
        self._publisher.start()
        self._preparer.start()
        self._worker.start()
        self._intake.start()
        self._client.start()
        self._notifier.ready()
        waiting = self._ledger.totals().queued
        log.info(
            "Serving %s on %s, %d jobs wait",
            self._topics.prefix,
            parse_broker_url(self.url).redacted,
            waiting,
            action="serving",
        )

    def _info(self) -> Info:
        models = self._models.describe()
        return info_of(
            self._settings.redacted(),
            models=[model.name for model in models.models if model.origin is not None and model.problem is None],
            default_model=models.default,
            device=models.device,
            compute_type=models.compute_type,
            started=time.time(),
        )

    def _watch(self, stop: StopSignals) -> None:
        """Do the upkeep until a stop is asked for."""
        health_due = time.monotonic()
        while not stop.requested.wait(_TICK_S):
            if self._refused is not None:
                raise self._refused
            self._check_threads()
            self._notifier.alive()
            if time.monotonic() >= health_due:
                health_due += _HEALTH_S
                self._publisher.tell("health", self._pulse.take())
            self._upkeep.run_once(stop.requested)

    def _check_threads(self) -> None:
        """See that everybody still works: a thread that has died would leave jobs waiting without a word."""
        alive = {
            "network": self._client.alive,
            "intake": self._intake.alive,
            "worker": self._worker.alive,
            "prepare": self._preparer.alive,
            "publisher": self._publisher.alive,
        }
        dead = [name for name, is_alive in alive.items() if not is_alive]
        if dead:
            raise ThreadDiedError(
                f"The {dead[0]} thread has ended by itself; the log says why. Start the consumer again."
            )

    def _stop(self, stop: StopSignals) -> ExitCode:
        """Stop in the order that the contract promises (section 6).

        1. No further job is started; the current one is finished, however long that takes.
        2. The intake ends after the batch in hand: what it took is on disk and acknowledged, the rest stays with the
           broker.
        3. Every status is acknowledged by the broker, so that nobody waits for a transcript that is there.
        4. `offline` is published and acknowledged: after it nothing more comes from here.
        5. The client disconnects, so that the last will is not sent.
        6. The ledger is checkpointed: `ledger.json` alone is complete.
        7. The embedded broker closes last, for all of the above goes through it.
        """
        self._notifier.stopping()
        self._publisher.draining()
        self._worker.stop()
        forced = not self._current_job_ended(stop)
        if forced:
            self._abandon()
        self._end(stop, _FORCED_DRAIN_S if forced else _DRAIN_S)
        return stop.exit_code if forced or stop.forced.is_set() else ExitCode.OK

    def _current_job_ended(self, stop: StopSignals) -> bool:
        limit_s = self._settings.worker.drain_timeout
        deadline = None if limit_s is None else time.monotonic() + limit_s
        alive_again = 0.0
        if self._ledger.processing():
            log.info("Stopping after the current job; a second signal stops at once", action="draining")
        while not self._worker.join(_LOOK_S):
            if time.monotonic() >= alive_again:
                self._notifier.alive()
                alive_again = time.monotonic() + _TICK_S
            if stop.forced.is_set() or (deadline is not None and time.monotonic() >= deadline):
                return False
        return True

    def _abandon(self) -> None:
        try:
            self._worker.abandon()
        except LedgerError as exc:
            log.error("%s The next start puts the current job back.", exc, action="requeued")

    def _end(self, stop: StopSignals, drain_s: float) -> None:
        self._worker.stop()
        self._preparer.stop()
        self._client.stop_receiving()
        self._intake.stop()
        if not self._drain(stop, drain_s) and drain_s:
            log.warning("The broker has not acknowledged everything; the next start tells it", action="drain")
        self._publisher.offline()
        if self._drain(stop, min(drain_s, _FORCED_DRAIN_S)):
            self._announced.settle()
        self._publisher.stop()
        self._client.close()
        self._close_files()
        log.info("Stopped, %d jobs wait", self._ledger.totals().queued, action="stopped")

    def _drain(self, stop: StopSignals, limit_s: float) -> bool:
        """Wait for the broker's acknowledgements; a forced stop waits for less, and for no connection."""
        started = time.monotonic()
        while not self._publisher.drain(_LOOK_S):
            connected, forced = self._client.connected, stop.forced.is_set()
            most_s = limit_s if connected and not forced else min(limit_s, _FORCED_DRAIN_S)
            if time.monotonic() - started >= most_s or (forced and not connected):
                return False
        return True

    def _close_files(self) -> None:
        self._metrics.close()
        try:
            self._ledger.close()
        except LedgerError as exc:
            log.error("%s", exc, action="checkpoint")
        if self._broker is not None:
            self._broker.close()


def _open_ledger(settings: Settings, metrics: Metrics) -> Ledger:
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        Disk().sync_folder(folder.parent)
    except OSError as exc:
        raise LedgerError(
            f"The data directory {folder} cannot be made: {exc.strerror}. Choose one with --data-dir."
        ) from exc
    return Ledger(
        folder / "ledger.json",
        max_attempts=settings.worker.max_attempts,
        max_queued=settings.queue.max_queued,
        disk=metrics.disk("ledger"),
    )


def _start_broker(settings: Settings, address: BrokerUrl, topics: Topics) -> "EmbeddedBroker | None":
    if address.scheme != "embedded":
        return None
    if settings.broker.protocol == "5":
        raise ConfigError(
            "broker.protocol is '5', but the embedded broker speaks MQTT 3.1.1: set 'auto', or broker.url"
        )
    from cesar_mqtt.mqtt.embedded import EmbeddedBroker  # noqa: PLC0415 - most consumers have no use for amqtt

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


def _inside(settings: Settings, broker: "EmbeddedBroker") -> Settings:
    """Return the settings for a client of the embedded broker, which speaks 3.1.1 only."""
    address = settings.broker.model_copy(update={"url": broker.url, "protocol": "3.1.1"})
    return settings.model_copy(update={"broker": address})
