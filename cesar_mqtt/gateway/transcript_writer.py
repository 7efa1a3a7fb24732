"""`serve --output-dir`: each finished transcript as a file, written once, also over restarts.

The thread `transcript-writer` fetches and writes; the thread of its bus brings it the statuses. A job that ended before
the folder was named for the first time is left out.
"""

import json
import queue
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cesar_mqtt.config import BrokerSettings, OutputSettings
from cesar_mqtt.errors import ConfigError, LedgerError
from cesar_mqtt.gateway.bus import Bus, json_object
from cesar_mqtt.gateway.bus_client import BusClient
from cesar_mqtt.gateway.inbox import SOURCE
from cesar_mqtt.gateway.results import fetch_result
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError
from cesar_mqtt.gateway.status_records import StatusRecords
from cesar_mqtt.gateway.transcript_files import file_name, write_transcripts
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery, Subscription
from cesar_mqtt.protocol.fields import FORMATS, timestamp
from cesar_mqtt.protocol.topics import Topics

log = get_logger(__name__)

_RETRY_S = 5.0
"""When what could not be fetched or written is tried again."""


class TranscriptWriter(BusClient):
    """Writes the transcript of each job that completes."""

    def __init__(
        self, settings: OutputSettings, broker: BrokerSettings, topics: Topics, *, data_dir: Path, has_inbox: bool
    ) -> None:
        """Open the records; nothing is written before `start`.

        Args:
            settings: the folder, which is created if it is missing, and the formats.
            broker: how to reach the broker.
            topics: the prefix.
            data_dir: for the records.
            has_inbox: whether the watch folder of this process writes the transcripts of its own jobs there.

        Raises:
            ConfigError: there is no folder, or a broker setting is wrong.
            LedgerError: the records cannot be used.
        """
        super().__init__("transcript-writer")
        if settings.directory is None:
            raise ConfigError("output.directory is not set")
        self._folder = settings.directory
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"output.directory '{self._folder}' cannot be used: {exc.strerror}.") from exc
        self._formats = settings.formats
        self._has_inbox = has_inbox
        self._status_level = topics.status("")
        self._arrived: queue.SimpleQueue[_Arrived | None] = queue.SimpleQueue()
        self._waiting: dict[str, _Completed] = {}
        """The jobs whose transcripts are not written yet."""
        self._tried: set[str] = set()
        """Those of them that wait for the next attempt."""
        self._retry_at = 0.0
        self._records = StatusRecords(data_dir / "output.sqlite", now=timestamp(time.time()))
        self._bus = Bus(
            broker,
            topics,
            role="output",
            subscriptions=[Subscription(topics.status("+"), wants_retained=True)],
            sends_commands=True,
            on_message=self._on_message,
        )

    def _release(self) -> None:
        self._records.close()

    def _wake(self) -> None:
        self._arrived.put(None)

    def _on_message(self, delivery: Delivery) -> None:
        if delivery.topic.startswith(self._status_level):
            job_id = delivery.topic.removeprefix(self._status_level)
            status = json_object(delivery.payload)
            self._arrived.put(_Arrived(job_id, _completed(job_id, status), is_cleared=not delivery.payload))

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.run_once(_RETRY_S)
            except LedgerError as exc:
                log.error("%s", exc, action="output_failed")
                self._stopping.wait(_RETRY_S)

    def run_once(self, timeout_s: float) -> None:
        """Wait for a status, at most so long, and write what is completed."""
        with suppress(queue.Empty):
            self._take(self._arrived.get(timeout=timeout_s))
            while True:
                self._take(self._arrived.get_nowait())
        now = time.monotonic()
        if now >= self._retry_at:
            self._retry_at = now + _RETRY_S
            self._tried.clear()
        for job_id, job in list(self._waiting.items()):
            if self._stopping.is_set():
                return
            if job_id not in self._tried:
                self._tried.add(job_id)
                self._write(job_id, job)

    def _take(self, arrived: "_Arrived | None") -> None:
        if arrived is None:
            return
        job_id, job, is_cleared = arrived
        self._tried.discard(job_id)
        if is_cleared:
            self._records.remove(job_id)
        if job is not None and self._is_wanted(job_id, job):
            self._waiting[job_id] = job
        else:
            self._waiting.pop(job_id, None)

    def _is_wanted(self, job_id: str, job: "_Completed") -> bool:
        if (self._has_inbox and job.is_from_inbox) or job.completed_at < self._records.since:
            return False
        known = self._records.get(job_id)
        return known is None or known[0] != job.completed_at

    def _write(self, job_id: str, job: "_Completed") -> None:
        # The consumer has stored the times of a job that asked for formats, of every other one the text alone.
        formats = dict.fromkeys((*self._formats, *job.formats) if job.formats else ("txt",))
        known = self._records.get(job_id)
        own = [Path(path) for path in json.loads(known[1])] if known else []
        try:
            results = {name: fetch_result(self._bus, job_id, name, consumer=job.consumer) for name in formats}
            written = write_transcripts(self._folder, job.name, results, own=own)
            self._records.put(job_id, job.completed_at, json.dumps([str(path) for path in written]))
        except RequestRefusedError as exc:
            log.warning("No transcript is written: %s", exc, action="output_failed", job_id=job_id)
            self._waiting.pop(job_id)
        except (NoAnswerError, LedgerError) as exc:
            log.warning("The transcript waits: %s", exc, action="output_failed", job_id=job_id)
        except OSError as exc:
            message = "The transcript cannot be written to %s: %s. It is tried again."
            log.error(message, self._folder, exc.strerror, action="output_failed", job_id=job_id)
        else:
            self._waiting.pop(job_id)
            log.info("Wrote %s", ", ".join(map(str, written)), action="output_written", job_id=job_id)


class _Arrived(NamedTuple):
    """A status that was published."""

    job_id: str
    job: "_Completed | None"
    is_cleared: bool


@dataclass(frozen=True, slots=True)
class _Completed:
    """What a status says of a completed job; any client may have published it."""

    completed_at: str
    name: str
    """The name of the recording, as a file name; of an upload without a name the job's id."""
    formats: tuple[str, ...]
    """Those that the job asked for."""
    consumer: str | None
    is_from_inbox: bool


def _completed(job_id: str, status: Mapping[str, Any]) -> _Completed | None:
    """Read a status; None: the job is not completed."""
    if status.get("status") != "completed":
        return None
    metadata, formats, consumer = (status.get(name) for name in ("metadata", "formats", "consumer"))
    metadata = metadata if isinstance(metadata, dict) else {}
    named, source = metadata.get("file"), str(status.get("audio_source") or "upload")
    if not isinstance(named, str):
        named = job_id if source == "upload" else source
    return _Completed(
        completed_at=str(status.get("completed_at")),
        name=file_name(named),
        formats=tuple(name for name in FORMATS if name in formats) if isinstance(formats, list) else (),
        consumer=consumer if isinstance(consumer, str) else None,
        is_from_inbox=metadata.get("source") == SOURCE,
    )
