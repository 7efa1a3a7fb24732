"""The watch folder: each recording in it becomes a job once it is complete, and its transcript a file.

The thread `inbox` scans the folders, submits and writes; the thread `inbox-watch` wakes it when the system reports a
change, and the thread of its bus brings it what is published.

A recording is a path, a size and a modification time. The id of its job is made of these, of its content and of the
options, and is on disk before the request is published: after a crash the same request is published again, which is the
same job; another inbox with other options has a job of its own. A
recording that was renamed or moved is recognised by its inode, or by its content where its earlier path is gone.
"""

import errno
import hashlib
import json
import os
import queue
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cesar_mqtt.config import BrokerSettings, InboxSettings, OutputSettings
from cesar_mqtt.errors import BrokerRefusedError, CesarError, ConfigError, LedgerError
from cesar_mqtt.gateway.bus import Bus, json_object
from cesar_mqtt.gateway.bus_client import BusClient
from cesar_mqtt.gateway.folder import FileState, FolderWatch, Settling, scan
from cesar_mqtt.gateway.records import InboxRecords, Record, RecordState
from cesar_mqtt.gateway.results import fetch_result
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.gateway.transcript_files import write_transcripts
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, Delivery, Subscription
from cesar_mqtt.protocol.topics import Topics

if TYPE_CHECKING:
    from concurrent.futures import Future

log = get_logger(__name__)

SOURCE = "inbox"
"""The `source` in the metadata of its jobs."""

_OPEN_JOBS = 16
"""How many jobs may be unfinished at once: enough to keep a consumer busy, and no second copy of a large backlog."""
_SENT_AT_ONCE = 2
"""How many recordings that are sent may be in memory at once."""
_STEP_S = 0.5
"""The shortest time between two scans."""
_RETRY_S = 60.0
"""When what failed for now is tried again."""
_FIRST_LOOK_S = 3.0
"""How long the retained statuses of a new connection may take; a job without one is published again."""
_BLOCK_BYTES = 1 << 20
_ERROR_SUFFIX = ".error.txt"
_ID_NAME = re.compile(r"[^A-Za-z0-9_-]+")
_ID_NAME_CHARACTERS = 40
_ID_DIGEST_CHARACTERS = 16
_LATER = frozenset({"queue_full", "storage_full"})
"""The reasons of rejections that pass."""


@dataclass(slots=True)
class _Job:
    """An unfinished job."""

    record: Record
    publish_at: float
    """When its request is published next, on the monotonic clock, unless a status arrives before."""
    is_known: bool = False
    """Whether the consumer has published a status of it since the last connection."""
    sent: "Future[bool] | None" = None
    """The outcome of the request that was published last."""
    completed: Mapping[str, Any] | None = None
    """The status `completed`; its transcript is not written yet."""
    finish_at: float = 0.0
    """When it is written, on the monotonic clock."""


class Inbox(BusClient):
    """Watches folders, submits what is complete in them, and writes the transcripts."""

    def __init__(
        self,
        settings: InboxSettings,
        output: OutputSettings,
        broker: BrokerSettings,
        topics: Topics,
        *,
        data_dir: Path,
        by_path: bool,
        max_bytes: int = MAX_PACKET_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the records; nothing is submitted before `start`.

        Args:
            settings: the folders, and what is done with the recordings.
            output: where transcripts are written, and as what.
            broker: how to reach the broker.
            topics: the prefix.
            data_dir: for the records.
            by_path: whether the consumer reads the recordings from the same paths; else they are sent.
            max_bytes: the largest recording that is sent.
            clock: monotonic, in seconds.

        Raises:
            ConfigError: a folder is none, a broker setting is wrong, or watchfiles is not installed.
            LedgerError: the records cannot be used, or another inbox uses them.
        """
        super().__init__("inbox")
        self._settings = settings
        self._folders = [Path(os.path.realpath(folder)) for folder in settings.directories]
        for folder in self._folders:
            if not folder.is_dir():
                raise ConfigError(f"inbox.directories names {folder}, which is no folder: create it, or name another")
        self._output = output
        self._excluded = [Path(os.path.realpath(path)) for path in (output.directory, settings.move_to) if path]
        self._by_path = by_path
        self._max_bytes = max_bytes
        self._clock = clock
        self._topics = topics
        self._settling = Settling(settings.settle, clock=clock)
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scan_at = self._scanned_at = clock() - _STEP_S
        self._unreadable: set[FileState] = set()
        self._absent: set[Path] = set()
        self._watch = FolderWatch(self._folders, on_changed=lambda: self._events.put(self._scan_soon))
        self._bus = Bus(
            broker,
            topics,
            role="inbox",
            subscriptions=[
                Subscription(topics.status("+"), wants_retained=True),
                Subscription(f"{topics.prefix}/consumer/+/state", wants_retained=True),
                Subscription(topics.rejected),
            ],
            sends_commands=True,
            on_message=lambda delivery: self._events.put(partial(self._on_message, delivery)),
            on_connected=lambda: self._events.put(self._on_connected),
        )
        self._store = InboxRecords(data_dir)
        self._records: dict[str, Record] = {}
        """The newest record of each path."""
        self._jobs: dict[str, _Job] = {}
        self._failed: dict[str, Record] = {}
        """By the id of the job, which may be retried."""
        self._ids: set[str] = set()
        """Of all jobs there ever were."""
        for record in self._store:
            self._ids.add(record.job_id)
            self._records[record.path] = record
            if record.state is RecordState.SUBMITTED:
                self._jobs[record.job_id] = _Job(record, clock() + _FIRST_LOOK_S)
            elif record.state is RecordState.FAILED:
                self._failed[record.job_id] = record

    def start(self) -> None:
        self._watch.start()
        super().start()
        log.info("Watching %s, %d jobs open", ", ".join(map(str, self._folders)), len(self._jobs), action="inbox")

    def _release(self) -> None:
        self._watch.join()
        self._store.close()

    def _wake(self) -> None:
        self._watch.request_stop()
        self._events.put(lambda: None)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.run_once()
            except LedgerError as exc:
                log.error("%s The next attempt is in %.0f s.", exc, _RETRY_S, action="inbox_failed")
                self._stopping.wait(_RETRY_S)

    def run_once(self) -> None:
        """Wait for what happens next, and do everything that is due. Raises LedgerError."""
        with suppress(queue.Empty):
            self._events.get(timeout=max(0.0, self._next_due() - self._clock()))()
            while not self._stopping.is_set():
                self._events.get_nowait()()
        if self._stopping.is_set():
            return
        if self._scan_at <= self._clock():
            self._scan()
        self._publish_due()
        self._write_due()

    def _next_due(self) -> float:
        unsent = (job.publish_at for job in self._jobs.values() if not job.is_known and job.completed is None)
        unwritten = (job.finish_at for job in self._jobs.values() if job.completed is not None)
        soon = self._clock() + _STEP_S
        return min(self._scan_at, *(max(soon, due) for due in (*unsent, *unwritten)), soon + _RETRY_S)

    # -- from the folders to jobs --------------------------------------------------------------------------------------

    def _scan_soon(self) -> None:
        self._scan_at = min(self._scan_at, max(self._clock(), self._scanned_at + _STEP_S))

    def _scan(self) -> None:
        """Look for recordings that are complete and have no job, and submit as many as may be open at once."""
        now = self._scanned_at = self._clock()
        files: dict[Path, FileState] = {}
        read = []
        for folder in self._folders:
            try:
                found = {file.path: file for file in scan(folder, self._excluded)}
            except OSError as exc:
                self._report_absent(folder, exc)
                continue
            self._absent.discard(folder)
            read.append(folder)
            files |= found
        self._unreadable &= set(files.values())
        new = {path: file for path, file in files.items() if not self._has_record(file)}
        complete = sorted(self._settling.complete(new), key=lambda file: file.mtime_ns)
        missing = [record for record in self._records.values() if self._is_missing(record, files, read)] if new else []
        for file in complete:
            if len(self._jobs) >= _OPEN_JOBS:
                break
            self._take(file, missing)
        self._scan_at = min(now + self._settings.rescan, max(self._settling.next_look, now + _STEP_S))

    def _report_absent(self, folder: Path, exc: OSError) -> None:
        if folder not in self._absent:
            self._absent.add(folder)
            log.warning(
                "The folder %s cannot be read: %s. It is tried again.", folder, exc.strerror, action="inbox_absent"
            )

    def _has_record(self, file: FileState) -> bool:
        if file in self._unreadable:
            return True
        record = self._records.get(str(file.path))
        if record is None or record.state is RecordState.LOST:
            return False
        return (record.size_bytes, record.mtime_ns) == (file.size_bytes, file.mtime_ns)

    def _is_missing(self, record: Record, files: Mapping[Path, FileState], read: Sequence[Path]) -> bool:
        """Whether a recording is not where it was; it may be elsewhere. A share that is not mounted tells nothing."""
        path = Path(record.path)
        return path not in files and any(path.is_relative_to(folder) for folder in read)

    def _take(self, file: FileState, missing: list[Record]) -> None:
        """Submit a complete file, unless it is a recording that is known."""
        moved = next((record for record in missing if _is_same_file(record, file)), None)
        if not _is_text(file.name):
            self._unreadable.add(file)
            log.warning("%r is not UTF-8: rename it", file.name, action="inbox_unreadable")
            return
        digest = moved.digest if moved is not None else self._digest(file)
        if digest is None:
            return
        earlier = self._records.get(str(file.path))
        again = (RecordState.FAILED, RecordState.LOST)
        if earlier is not None and earlier.digest == digest and earlier.state not in again:  # only touched
            self._save(replace(earlier, size_bytes=file.size_bytes, mtime_ns=file.mtime_ns, inode=file.inode))
            return
        if moved is None:
            moved = next((record for record in missing if record.digest == digest), None)
        if moved is not None:
            missing.remove(moved)
            if moved.state is not RecordState.LOST:
                self._move(moved, file)
                return
        self._submit(file, digest, earlier)

    def _move(self, record: Record, file: FileState) -> None:
        log.info("%s is now %s", record.path, file.path, action="inbox_moved", job_id=record.job_id)
        self._save(
            replace(
                record,
                path=str(file.path),
                size_bytes=file.size_bytes,
                mtime_ns=file.mtime_ns,
                inode=file.inode,
            ),
            instead_of=record.path,
        )

    def _submit(self, file: FileState, digest: str, earlier: Record | None) -> None:
        """Record a job for a file; the request is published next."""
        if (
            earlier is not None and earlier.job_id in self._jobs
        ):  # the recording has changed: its transcript is obsolete
            self._jobs.pop(earlier.job_id)
            self._save(replace(earlier, state=RecordState.DROPPED))
        submitted_path = str(file.path) if self._by_path else ""
        request = (file.name, file.size_bytes, file.mtime_ns, digest, submitted_path, self._options())
        job_id = next(job_id for job_id in _job_ids(file.name, request) if job_id not in self._ids)
        self._ids.add(job_id)
        record = Record(
            job_id=job_id,
            path=str(file.path),
            name=file.name,
            submitted_path=submitted_path,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            inode=file.inode,
            digest=digest,
            results=() if earlier is None else earlier.results,
        )
        self._jobs[record.job_id] = _Job(record, publish_at=self._clock())
        self._save(record)

    def _digest(self, file: FileState) -> str | None:
        """Return the digest of the content; None: it cannot be read, or is being changed."""
        digest = hashlib.sha256()
        try:
            with _open(file.path) as content:
                while block := content.read(_BLOCK_BYTES):
                    digest.update(block)
                found = os.fstat(content.fileno())
        except FileNotFoundError:
            return None
        except OSError as exc:
            self._unreadable.add(file)
            log.warning("%s cannot be read: %s", file.path, exc.strerror, action="inbox_unreadable")
            return None
        is_same = (found.st_size, found.st_mtime_ns) == (file.size_bytes, file.mtime_ns)
        return digest.hexdigest() if is_same else None

    def _save(self, record: Record, *, instead_of: str | None = None) -> None:
        """Put a record on disk, then into memory."""
        self._store.put(record)
        if instead_of is not None and self._records.get(instead_of, record).job_id == record.job_id:
            self._records.pop(instead_of, None)
        self._records[record.path] = record
        if record.job_id in self._jobs:
            self._jobs[record.job_id].record = record
        if record.state is RecordState.FAILED:
            self._failed[record.job_id] = record
        else:
            self._failed.pop(record.job_id, None)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _publish_due(self) -> None:
        now = self._clock()
        for job in list(self._jobs.values()):
            if job.sent is not None and job.sent.done():
                self._check_sent(job, job.sent)
        sending = sum(job.sent is not None for job in self._jobs.values())
        for job in list(self._jobs.values()):
            if job.is_known or job.sent is not None or job.publish_at > now or self._bus.connection is None:
                continue
            if job.record.submitted_path or sending < _SENT_AT_ONCE:
                self._publish(job)
                sending += not job.record.submitted_path

    def _publish(self, job: _Job) -> None:
        record = job.record
        audio = None
        if not record.submitted_path:
            try:
                audio = self._content(record)
            except OSError as exc:
                self._lose(job, f"it cannot be read any more ({exc.strerror})")
                return
            if audio is None:
                self._lose(job, "it was changed, moved or removed")
                return
            if len(audio) > self._max_bytes:
                self._fail(
                    job,
                    "payload_too_large",
                    "The recording is larger than a message may be: have the consumer read the folder itself "
                    "(`serve --inbox`, or `inbox --by-path`).",
                )
                return
        options = {**self._options(), "metadata": {"file": _printable(record.name), "source": SOURCE}}
        job.publish_at = self._clock() + _RETRY_S
        job.sent = self._bus.submit(Submission(record.job_id, audio, record.submitted_path, options))
        job.sent.add_done_callback(lambda _: self._events.put(lambda: None))
        log.info("Submitted %s", record.name, action="inbox_submitted", job_id=record.job_id)

    def _options(self) -> dict[str, Any]:
        """Return the fields that every request has."""
        fields = {
            "language": self._settings.language,
            "model_size": self._settings.model,
            "priority": self._settings.priority or None,
            "diarize": self._settings.diarize or None,
            # Without it the consumer stores the text alone.
            "formats": None if self._output.formats == ("txt",) else list(self._output.formats),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _content(self, record: Record) -> bytes | None:
        """Return the recording; None: it is another one now, or gone. Raises OSError."""
        try:
            with _open(Path(record.path)) as file:
                content = file.read(self._max_bytes + 1)
        except FileNotFoundError:
            return None
        if len(content) > self._max_bytes:
            return content
        return content if hashlib.sha256(content).hexdigest() == record.digest else None

    def _check_sent(self, job: _Job, sent: "Future[bool]") -> None:
        job.sent = None
        if sent.cancelled():
            return
        error = sent.exception()
        if isinstance(error, BrokerRefusedError):
            log.error("%s", error, action="inbox_failed", job_id=job.record.job_id)
        elif isinstance(error, CesarError):
            advice = "Have the consumer read the folder itself (`serve --inbox`, or `inbox --by-path`)."
            self._fail(job, "payload_too_large", f"{error} {advice}")
        elif not sent.result():
            log.warning("No consumer takes jobs at %s", self._bus.address, action="inbox_failed")

    # -- what is published ---------------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        for job in self._jobs.values():
            job.is_known = False
            job.publish_at = self._clock() + _FIRST_LOOK_S

    def _on_message(self, delivery: Delivery) -> None:
        document = json_object(delivery.payload)
        if delivery.topic == self._topics.rejected:
            self._on_rejected(document)
        elif delivery.topic.startswith(self._topics.status("")):
            self._on_status(delivery.topic.removeprefix(self._topics.status("")), document)
        elif document.get("state") == "online":
            self._on_consumer_online()

    def _on_consumer_online(self) -> None:
        """Publish again what no consumer has accepted, and write what could not be fetched."""
        for job in self._jobs.values():
            job.publish_at = min(job.publish_at, self._clock() + _FIRST_LOOK_S)
            job.finish_at = min(job.finish_at, self._clock())

    def _on_status(self, job_id: str, status: Mapping[str, Any]) -> None:
        state = status.get("status")
        if job_id in self._failed and state in ("queued", "processing", "completed"):  # the job was retried
            record = replace(self._failed[job_id], state=RecordState.SUBMITTED)
            self._jobs[job_id] = _Job(record, publish_at=self._clock() + _RETRY_S)
            self._save(record)
        job = self._jobs.get(job_id)
        if job is None:
            return
        if not status:
            if job.is_known:
                self._drop(job, "its job was deleted")
            return
        job.is_known = True
        if state == "completed":
            job.completed, job.finish_at = status, self._clock()
        elif state in ("error", "cancelled"):
            self._on_failed(job, str(status.get("error_code") or state), str(status.get("error_message") or ""))

    def _on_failed(self, job: _Job, code: str, message: str) -> None:
        path = job.record.submitted_path
        if code == "audio_not_found" and path and not Path(path).exists():
            self._lose(job, "it was moved or removed before it was transcribed")
        else:
            self._fail(job, code, message)

    def _on_rejected(self, document: Mapping[str, Any]) -> None:
        job = self._jobs.get(str(document.get("job_id")))
        if job is None or job.is_known:
            return
        reason = str(document.get("reason"))
        if reason in _LATER:
            log.warning("%s is submitted again later: %s", job.record.name, reason, action="inbox_failed")
        elif reason == "job_id_conflict":  # the same recording, submitted with other options before: it is known
            job.is_known = True
        else:
            self._fail(job, reason, str(document.get("detail")))

    # -- from jobs to files --------------------------------------------------------------------------------------------

    def _write_due(self) -> None:
        now = self._clock()
        for job in list(self._jobs.values()):
            if job.completed is not None and job.finish_at <= now and not self._stopping.is_set():
                job.finish_at = now + _RETRY_S
                self._finish(job, job.completed)

    def _finish(self, job: _Job, status: Mapping[str, Any]) -> None:
        """Write the transcript, and move the recording if it is to be moved."""
        record = job.record
        consumer = status.get("consumer")
        try:
            results: dict[str, bytes] = {
                name: fetch_result(self._bus, record.job_id, name, consumer=str(consumer) if consumer else None)
                for name in self._output.formats
            }
        except NoAnswerError as exc:
            log.warning("The transcript of %s waits: %s", record.name, exc.problem, action="inbox_waits")
            return
        except RequestRefusedError as exc:
            self._fail(job, "result_unavailable", str(exc))
            return
        try:
            written = self._write(record, results)
            path = self._moved(record)
        except OSError as exc:
            message = "The transcript of %s cannot be written: %s. The next attempt is in %.0f s."
            log.error(message, record.name, exc.strerror, _RETRY_S, action="inbox_failed", job_id=record.job_id)
            return
        self._jobs.pop(record.job_id)
        self._save(
            replace(record, path=str(path), state=RecordState.DONE, results=tuple(map(str, written))),
            instead_of=record.path,
        )
        self._scan_soon()
        log.info("Wrote %s", ", ".join(map(str, written)), action="inbox_written", job_id=record.job_id)

    def _write(self, record: Record, results: Mapping[str, bytes]) -> list[Path]:
        own = [Path(each) for each in record.results]
        path = Path(record.path)
        written = write_transcripts(self._folder_for(path), path.name, results, own=own)
        for old in own:
            if old not in written and old.name.endswith(_ERROR_SUFFIX) and _ERROR_SUFFIX[1:] not in results:
                old.unlink(missing_ok=True)
        return written

    def _folder_for(self, path: Path) -> Path:
        """Return where the transcript of a recording goes: beside it, or to the same sub-folder elsewhere."""
        elsewhere = self._output.directory or self._settings.move_to
        return path.parent if elsewhere is None else elsewhere / self._below(path).parent

    def _below(self, path: Path) -> Path:
        for folder in self._folders:
            if path.is_relative_to(folder):
                return path.relative_to(folder)
        return Path(path.name)

    def _moved(self, record: Record) -> Path:
        """Move a finished recording, if it is to be moved and still there; return where it is. Raises OSError."""
        path = Path(record.path)
        if self._settings.move_to is None or not path.exists():
            return path
        folder = self._settings.move_to / self._below(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        return move_file(path, folder)

    def _fail(self, job: _Job, code: str, message: str) -> None:
        """Record that there will be no transcript, and say why beside the recording."""
        record = job.record
        log.warning("%s: %s: %s", record.name, code, message, action="inbox_job_failed", job_id=record.job_id)
        text = (
            f"{record.name} was not transcribed ({code}).\n{message}\nTo try again: cesar-mqtt retry {record.job_id}\n"
        )
        written: list[Path] = []
        try:
            if Path(record.path).exists():
                written = self._write(record, {_ERROR_SUFFIX[1:]: text.encode()})
        except OSError as exc:
            log.error("%s cannot be written: %s", record.name, exc.strerror, action="inbox_failed")
        self._jobs.pop(record.job_id)
        results = dict.fromkeys((*record.results, *map(str, written)))
        self._save(replace(record, state=RecordState.FAILED, results=tuple(results)))
        self._scan_soon()

    def _lose(self, job: _Job, why: str) -> None:
        """Skip a job whose recording is not where it was; it is submitted from where it turns up."""
        self._end(job, RecordState.LOST, why)

    def _drop(self, job: _Job, why: str) -> None:
        self._end(job, RecordState.DROPPED, why)

    def _end(self, job: _Job, state: RecordState, why: str) -> None:
        log.info("%s: %s", job.record.name, why, action="inbox_dropped", job_id=job.record.job_id)
        self._jobs.pop(job.record.job_id)
        self._save(replace(job.record, state=state))
        self._scan_soon()


def move_file(path: Path, folder: Path) -> Path:
    """Move a file into a folder, also on another disk, and never over another file; return where it is.

    A copy that an earlier call has finished before it was killed is taken for the file.

    Raises:
        OSError: it cannot be moved; it is where it was.
    """
    status = path.stat()
    for name in chain((path.name,), (f"{path.stem} ({number}){path.suffix}" for number in count(2))):
        target = folder / name
        if not target.exists():
            break
        found = target.stat()
        if (found.st_size, found.st_mtime_ns) == (status.st_size, status.st_mtime_ns) and not path.samefile(target):
            path.unlink()
            return target
    try:
        path.rename(target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        aside = folder / f".{name}.part"
        shutil.copy2(path, aside)
        aside.rename(target)
        path.unlink()
    return target


def _open(path: Path) -> BinaryIO:
    """Open a regular file. Raises OSError; FileNotFoundError for everything else that has the name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "it is no file", str(path))
    return file


def _is_same_file(record: Record, file: FileState) -> bool:
    return (record.inode, record.size_bytes, record.mtime_ns) == (file.inode, file.size_bytes, file.mtime_ns)


def _job_ids(file_name: str, request: Sequence[Any]) -> Iterator[str]:
    """Yield ids for a request: readable, the same after a crash, and another for each time it is submitted."""
    name = _ID_NAME.sub("-", Path(file_name).stem).strip("-")[:_ID_NAME_CHARACTERS] or "recording"
    for number in count():
        what = json.dumps([*request, number]).encode()
        yield f"{name}-{hashlib.sha256(what).hexdigest()[:_ID_DIGEST_CHARACTERS]}"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
