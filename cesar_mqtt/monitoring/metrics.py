"""What is measured of a consumer, and where: the parts that the service asks for, plain when nobody wants numbers.

Without `metrics.port` every part is handed out as it is, so that nothing is spent; `instruments` has the others. The
main thread wires it; what is handed out may be called by whoever may call the plain part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cesar_mqtt.config import MetricsSettings, ModelSettings
from cesar_mqtt.consumer import intake, worker
from cesar_mqtt.consumer.prefetched import Fetches
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.jobs import Totals
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.protocol.consumer_payloads import HealthMessage
from cesar_mqtt.whisper.model_store import ModelStore


class Reports(worker.Reports, intake.Reports, Protocol):
    """Whom worker and intake tell."""


@dataclass(frozen=True, slots=True)
class MetricSources:
    """What can be asked of a consumer at any moment, from any thread.

    Attributes:
        ledger: `ledger.json`; the journal stands beside it.
        totals: how many jobs stand where.
        health: the measurements of process and files.
        in_flight: how many messages wait for the broker's acknowledgement.
        behind: whether there is a status that the broker has not acknowledged.
    """

    ledger: Path
    totals: Callable[[], Totals]
    health: Callable[[], HealthMessage]
    in_flight: Callable[[], int]
    behind: Callable[[], bool]


class Metrics:
    """Measures nothing, and hands out every part as it is."""

    def disk(self, _of: str) -> Disk:
        """Return the durable writes of one part of the consumer, such as `ledger`."""
        return Disk()

    def models(self, settings: ModelSettings, *, folder: Path) -> ModelStore:
        """Return the models. Raises ConfigError as `ModelStore` does."""
        return ModelStore(settings, folder=folder)

    def reports(self, to: Reports) -> Reports:
        """Return whom to tell, so that `to` is told."""
        return to

    def downloader(self, downloader: Fetches) -> Fetches:
        """Return what fetches as `downloader` does."""
        return downloader

    def serve(self, readings: MetricSources) -> None:
        """Begin to answer whoever asks for the numbers. Raises ConfigError when the port cannot be had."""

    def close(self) -> None:
        """End that; may be called twice, and without `serve`."""


def metrics_of(settings: MetricsSettings, *, consumer: str) -> Metrics:
    """Return what measures a consumer of this name, as the settings want it.

    Raises:
        ConfigError: numbers are wanted, but what makes them is not installed.
    """
    if settings.port is None:
        return Metrics()
    try:
        from cesar_mqtt.monitoring.prometheus import Instruments  # noqa: PLC0415 - an extra, which most consumers do without
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise ConfigError(
            "metrics.port is set, but prometheus-client is not installed: "
            "install it with pip install 'cesar-mqtt[metrics]', or leave metrics.port out"
        ) from exc
    return Instruments(settings.host, settings.port, consumer=consumer)
