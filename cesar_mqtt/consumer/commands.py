"""The command handlers: execute what arrives on `cesar/request/<command>` and return the response; no MQTT in here.

The intake's thread calls them; any other may, too: the ledger serialises the changes.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic_core import from_json

from cesar_mqtt.consumer.defaults import StoredDefaults
from cesar_mqtt.consumer.recent_rejections import RecentRejections
from cesar_mqtt.engines.messages import QueueUnavailableError
from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import IllegalTransitionError, Job, JobState
from cesar_mqtt.json_codec import encode
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol import formats
from cesar_mqtt.protocol.commands import (
    COMMANDS,
    CURRENT,
    CancelledJobs,
    Command,
    CommandResult,
    Defaults,
    JobCommand,
    JobList,
    ListCommand,
    Model,
    Models,
    Paused,
    RejectedCommand,
    Rejections,
    Response,
    ResultCommand,
    ResultPage,
    SetCommand,
    summary_of,
)
from cesar_mqtt.protocol.fields import Payload
from cesar_mqtt.protocol.parsing import Refusal, parse_command
from cesar_mqtt.protocol.payloads import JobProgress, status_of
from cesar_mqtt.protocol.truncate import is_inside_character, truncate_list, truncate_result, truncate_status

if TYPE_CHECKING:
    from cesar_mqtt.whisper.model_store import StoreDescription

log = get_logger(__name__)

RESPONSE_BYTES = 120_000
"""The size of the largest response, roughly: the strictest of the brokers that limit packets takes 128 KB."""
_CANCELLED_AT_ONCE = 1000
"""How many jobs `cancel_all` cancels in one transaction: other threads wait for no more than that."""
_RESULT_BYTES = RESPONSE_BYTES - 1000
"""The share of the text in a page of a result."""


@dataclass(frozen=True, slots=True)
class CommandResponse:
    """The response to one command.

    Attributes:
        payload: for the response topic of the command, and for the one that the message names.
        rejection: the message has to be rejected as well; None: it need not.
    """

    payload: bytes
    rejection: Refusal | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a command failed, as a sentence for its sender.

    Attributes:
        is_elsewhere: the job is not in this ledger; in a group it may be in that of another consumer.
    """

    problem: str
    is_elsewhere: bool = False


_Outcome = Payload | Mapping[str, Any] | _Failure
_NOTHING_TO_RETRY = _Failure("No job that can be retried has ended as error or cancelled.")
_NOTHING_RUNS = _Failure("No job is running: name one by its id.")
_WHICH_CURRENT = "Several consumers share the jobs: name one with `consumer`, or the job by its id."


class DescribesModels(Protocol):
    """What the handlers need of the models."""

    def describe(self) -> "StoreDescription":
        """Describe the models and how they are run."""


class WaitingList(Protocol):
    """The jobs that wait in a queue that consumers share. Each method may raise QueueUnavailableError."""

    def count(self) -> int:
        """Return how many there are."""

    def jobs(self, after: str | None, limit: int) -> list[Job] | None:
        """Return the jobs behind one, at most so many in their order, with `seq` 0; None: that one is not there."""


class CommandHandlers:
    """Executes commands; each gets one response, whatever its payload is.

    There is no response to a command for another consumer by name, and in a group none about a job of another consumer:
    the owner of the job responds.

    When the disk refuses a change, the response is an error and nothing has changed: the sender can repeat the command,
    while a command that waited for the disk would hold up every message behind it.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        spool: Spool,
        models: DescribesModels,
        consumer: str,
        on_cancelled: Callable[[Job], None],
        progress_of: Callable[[Job], JobProgress | None],
        health: Callable[[], Mapping[str, Any]],
        rejections: RecentRejections,
        defaults: StoredDefaults,
        on_defaults_set: Callable[[], None] = lambda: None,
        on_deleted: Callable[[str], None] = lambda _job_id: None,
        resubmit: Callable[[Job], None] | None = None,
        waiting: WaitingList | None = None,
        grouped: bool = False,
    ) -> None:
        """Build the table of commands.

        Args:
            ledger: the jobs.
            spool: loses the files of deleted jobs.
            models: described by `models`.
            consumer: the name of this consumer.
            on_cancelled: called with a job that was cancelled in the queue.
            progress_of: returns the progress of a running job.
            health: returns the fields of `health`.
            rejections: those that `rejected` returns.
            defaults: what `set` changes.
            on_defaults_set: called when it has.
            on_deleted: called with the id of a job that was deleted.
            resubmit: returns a job to the queue that consumers share, for a retry; None: the ledger is the queue.
            waiting: the jobs of the queue that consumers share; None: the ledger is the queue.
            grouped: whether other consumers receive the same commands and share the jobs.
        """
        self._ledger = ledger
        self._spool = spool
        self._models = models
        self._consumer = consumer
        self._on_cancelled = on_cancelled
        self._progress_of = progress_of
        self._health = health
        self._rejections = rejections
        self._defaults = defaults
        self._on_defaults_set = on_defaults_set
        self._on_deleted = on_deleted
        self._resubmit = resubmit
        self._waiting = waiting
        self._grouped = grouped
        self._handlers: dict[str, Callable[[Any], _Outcome]] = {
            "cancel": lambda command: self._for_job(command, self._cancel),
            "retry": lambda command: self._for_job(command, self._retry),
            "delete": lambda command: self._for_job(command, self._delete),
            "get": lambda command: self._for_job(command, self._get),
            "result": lambda command: self._for_job(command, lambda job_id: self._result(job_id, command)),
            "list": self._list,
            "rejected": self._rejected,
            "retry_last": lambda _: self._retry_last(),
            "cancel_all": lambda _: self._cancel_all(),
            "set": self._set,
            "pause": lambda _: self._pause(on=True),
            "resume": lambda _: self._pause(on=False),
            "health": lambda _: {**self._health(), "consumer": consumer},
            "models": lambda _: self._describe_models(),
        }

    def handle(self, command: str, payload: bytes) -> CommandResponse | None:
        """Execute a command; on return its change is on disk. Raises nothing, whatever command and payload are.

        Args:
            command: the last part of the topic.
            payload: a JSON object, a line of text that is a job id, or nothing.

        Returns:
            None: another consumer responds.
        """
        parsed = parse_command(command, payload)
        if parsed.consumer not in (None, self._consumer):
            return None
        if parsed.command is None:
            rejection = None if command in COMMANDS else Refusal("unknown_command", parsed.mistakes)
            return CommandResponse(self._error(parsed.mistakes, parsed.transaction), rejection)
        payload_or_none = self._execute(command, parsed.command)
        return None if payload_or_none is None else CommandResponse(payload_or_none)

    def _execute(self, command: str, request: Command) -> bytes | None:
        to_all = self._grouped and request.consumer is None
        if to_all and (command == "retry_last" or (isinstance(request, JobCommand) and request.job_id == CURRENT)):
            return self._error(_WHICH_CURRENT, request.transaction)
        try:
            outcome = self._handlers[command](request)
            if not isinstance(outcome, _Failure):
                _log_change(command, outcome)
                return _ok(outcome, request.transaction)
            if to_all and outcome.is_elsewhere:
                return None
            problem = outcome.problem
        except IllegalTransitionError as exc:
            problem = str(exc)
        except LedgerError as exc:  # its message has a path in it
            log.error("Command %s failed: %s", command, exc, action="control_failed")
            problem = "The consumer's disk refuses to write, so nothing was changed. See its log, then try again."
        except QueueUnavailableError as exc:
            log.error("Command %s failed: %s", command, exc, action="control_failed")
            problem = "The queue's server does not answer, so this may not have been done. Try again."
        except OSError as exc:
            log.error("Command %s failed: %s", command, exc, action="control_failed")
            problem = "The consumer cannot read the files that this needs. See its log, then try again."
        except ValueError:  # a ledger that was edited by hand may hold what JSON cannot
            log.exception("The response to %s cannot be serialised", command, action="control_failed")
            problem = "The response cannot be serialised; see the consumer's log."
        return self._error(problem, request.transaction)

    def _error(self, problem: str, transaction: Any) -> bytes:
        """Encode an error; in a group several members may respond, so it names this one."""
        data = {"consumer": self._consumer}
        return Response(status="error", data=data, error=problem, transaction=transaction).encode()

    # -- one job ------------------------------------------------------------------------------------------------------

    def _for_job(self, command: JobCommand, handle: Callable[[str], _Outcome]) -> _Outcome:
        job_id = self._ledger.totals().processing if command.job_id == CURRENT else command.job_id
        return _NOTHING_RUNS if job_id is None else handle(job_id)

    def _cancel(self, job_id: str) -> _Outcome:
        try:
            job = self._ledger.cancel(job_id)
        except IllegalTransitionError:
            job = self._ledger.get(job_id)
            if job is None or job.state is not JobState.CANCELLED:
                raise
        else:
            if job is not None and job.state.final:
                self._on_cancelled(job)
        return self._state_of(job, job_id)

    def _retry(self, job_id: str) -> _Outcome:
        job = self._ledger.get(job_id)
        if job is not None and self._was_evicted(job):
            return _Failure(
                f"The recording that came with job {job_id} was removed to make room for newer ones "
                "(queue.max_spool_bytes, or a full disk): submit it again under a new id."
            )
        if job is None or job.claim is None or self._resubmit is None:
            return self._state_of(self._ledger.retry(job_id), job_id)
        self._ledger.check_retry(job_id)
        self._resubmit(job)
        return CommandResult(job_id=job_id, status=JobState.QUEUED.value, consumer=self._consumer)

    def _was_evicted(self, job: Job) -> bool:
        """Whether only the missing upload keeps a job from being retried."""
        if job.audio is None or job.audio.kind != "spool" or not job.state.final:
            return False
        return job.may_need_audio and not self._spool.path(job.audio.name).exists()

    def _delete(self, job_id: str) -> _Outcome:
        deleted = self._ledger.delete(job_id)
        if deleted is None:
            return _unknown(job_id)
        _, spool_files = deleted
        self._spool.remove(spool_files)
        self._on_deleted(job_id)
        return CommandResult(job_id=job_id, status="deleted", consumer=self._consumer)

    def _get(self, job_id: str) -> _Outcome:
        job = self._ledger.get(job_id)
        if job is None:
            return _unknown(job_id)
        status = status_of(job, self._consumer, self._progress_of(job))
        return cast("dict[str, Any]", from_json(truncate_status(status, RESPONSE_BYTES)))

    def _result(self, job_id: str, command: ResultCommand) -> _Outcome:
        job = self._ledger.get(job_id)
        if job is None:
            return _unknown(job_id)
        if job.state is not JobState.COMPLETED:
            return _Failure(f"Job {job_id} is {job.state}: only a completed one has a result.")
        windows = self._ledger.windows(job.seq)
        if not windows and not job.formats and command.format != "txt":
            return _Failure(
                f"There is no {command.format} of job {job_id}: without `formats` in the request the times were not "
                "stored. Ask for txt, or submit it again with `formats`."
            )
        segments = [segment for window in windows for segment in window.segments]
        content, _ = formats.render(command.format, formats.content_of(job, segments))
        return self._result_page(job_id, command, content)

    def _result_page(self, job_id: str, command: ResultCommand, content: bytes) -> _Outcome:
        """Return a page of a file; it ends between characters, so that each page can be read by itself."""
        start = min(command.offset, len(content))
        if is_inside_character(content, start):
            problem = f"offset {start} is inside of a character: send the offset + length of the previous response."
            return _Failure(problem)
        text = truncate_result(content, start, command.length, _RESULT_BYTES)
        length = len(text.encode())
        return ResultPage(
            job_id=job_id,
            format=command.format,
            offset=start,
            length=length,
            total=len(content),
            text=text,
            more=start + length < len(content),
            consumer=self._consumer,
        )

    def _state_of(self, job: Job | None, job_id: str) -> _Outcome:
        if job is None:
            return _unknown(job_id)
        return CommandResult(job_id=job.job_id, status=job.state.value, consumer=self._consumer)

    def _retry_last(self) -> _Outcome:
        job_id = self._ledger.last_retryable()
        return _NOTHING_TO_RETRY if job_id is None else self._retry(job_id)

    # -- all jobs -----------------------------------------------------------------------------------------------------

    def _list(self, command: ListCommand) -> _Outcome:
        """List the jobs of the ledger, and behind them those that wait in the shared queue."""
        states = () if command.status is None else (JobState(command.status),)
        previous = None if command.after is None else self._ledger.get(command.after)
        waiting = self._waiting if command.status in (None, JobState.QUEUED) else None
        found: list[Job] | None = None
        if command.after is None or previous is not None:
            after = 0 if previous is None else previous.seq
            found = self._ledger.jobs(states=states, after=after, limit=command.limit + 1)
        try:
            total = self._ledger.count(states) + (0 if waiting is None else waiting.count())
            if waiting is not None and (found is None or len(found) <= command.limit):
                behind = waiting.jobs(
                    None if found is not None else command.after, command.limit + 1 - len(found or ())
                )
                found = behind if found is None else [*found, *(behind or ())]
        except QueueUnavailableError as exc:
            return _Failure(exc.problem)
        if found is None:
            problem = f"Unknown job id in `after`: {command.after}. It may have been deleted; start without `after`."
            return _Failure(problem, is_elsewhere=True)
        listed = found[: command.limit]
        summaries = (summary_of(status_of(job, self._consumer), shared=not job.seq) for job in listed)
        jobs = truncate_list(summaries, RESPONSE_BYTES)
        following = jobs[-1].job_id if len(found) > len(jobs) else None
        return JobList(jobs=jobs, next=following, total=total, consumer=self._consumer)

    def _cancel_all(self) -> _Outcome:
        """Cancel the running job first: the worker would otherwise start the next one, only to have it cancelled."""
        running = self._ledger.totals().processing
        if running is not None:
            with suppress(IllegalTransitionError):  # it has just ended
                self._ledger.cancel(running)
        count = 0
        while cancelled := self._ledger.cancel_queued(_CANCELLED_AT_ONCE):
            count += len(cancelled)
            for job in cancelled:
                self._on_cancelled(job)
        return CancelledJobs(cancelled=count, processing=self._ledger.totals().processing, consumer=self._consumer)

    def _pause(self, *, on: bool) -> _Outcome:
        self._ledger.pause(on=on)
        return Paused(paused=on, consumer=self._consumer)

    # -- the consumer -------------------------------------------------------------------------------------------------

    def _rejected(self, command: RejectedCommand) -> _Outcome:
        shown = truncate_list(self._rejections.newest(command.limit), RESPONSE_BYTES)
        return Rejections(rejected=shown, total=self._ledger.totals().rejected_total, consumer=self._consumer)

    def _set(self, command: SetCommand) -> _Outcome:
        try:
            self._defaults.change(command.default_model, command.default_language)
        except ValueError as exc:
            return _Failure(f"Nothing was set: {exc}.")
        self._on_defaults_set()
        store = self._models.describe()
        return Defaults(default_model=store.default, default_language=store.default_language, consumer=self._consumer)

    def _describe_models(self) -> _Outcome:
        store = self._models.describe()
        return Models(
            default=store.default,
            default_language=store.default_language,
            loaded=store.loaded,
            device=store.device,
            compute_type=store.compute_type,
            cpu_threads=store.cpu_threads,
            workers=store.workers,
            models=[Model(**{name: getattr(entry, name) for name in Model.model_fields}) for entry in store.models],
            consumer=self._consumer,
        )


def _unknown(job_id: str) -> _Failure:
    return _Failure(f"There is no job {job_id}: it never existed, or it was deleted.", is_elsewhere=True)


def _log_change(command: str, outcome: Payload | Mapping[str, Any]) -> None:
    if isinstance(outcome, CommandResult) and outcome.status == JobState.PROCESSING:
        log.info("Cancelling the running job", action=command, job_id=outcome.job_id)
    elif isinstance(outcome, CommandResult):
        log.info("Job %s by command", outcome.status, action=command, job_id=outcome.job_id)
    elif isinstance(outcome, CancelledJobs):
        log.info("Cancelled %d queued jobs and the running one by command", outcome.cancelled, action=command)
    elif isinstance(outcome, Defaults):
        named = outcome.default_language or "detected"
        log.info("Default model %s, language %s by command", outcome.default_model, named, action=command)
    elif isinstance(outcome, Paused):
        log.info("Queue %s by command", "paused" if outcome.paused else "resumed", action=command)


def _ok(outcome: Payload | Mapping[str, Any], transaction: Any) -> bytes:
    """Encode a response. Raises ValueError for what JSON cannot hold."""
    data = outcome.model_dump() if isinstance(outcome, Payload) else dict(outcome)
    return encode(Response(status="ok", data=data, error=None, transaction=transaction).model_dump())
