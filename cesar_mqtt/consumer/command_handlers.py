"""The control: does what is asked for on `cesar/request/<command>`, and says what came of it; knows nothing of MQTT.

For the intake's thread; any other may call it as well, for the ledger serialises what is done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic_core import from_json

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import IllegalTransitionError, Job, JobState
from cesar_mqtt.json_codec import encode
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol import formats
from cesar_mqtt.protocol.commands import (
    COMMANDS,
    CURRENT,
    Command,
    CommandResult,
    JobCommand,
    JobList,
    ListCommand,
    Model,
    Models,
    Paused,
    Response,
    ResultCommand,
    ResultPage,
    summary_of,
)
from cesar_mqtt.protocol.fields import Payload
from cesar_mqtt.protocol.parsing import Refusal, parse_command
from cesar_mqtt.protocol.payloads import JobProgress, status_of
from cesar_mqtt.protocol.truncate import is_inside_character, truncate_list, truncate_result, truncate_status

if TYPE_CHECKING:
    from cesar_mqtt.whisper.model_store import StoreDescription

log = get_logger(__name__)

ANSWER_BYTES = 120_000
"""An answer has about so many bytes at most: of the brokers that limit packets, the strictest takes 128 KB."""

Outcome = Payload | Mapping[str, Any] | str
"""The answer's data, or a sentence that says why there are none."""


class DescribesModels(Protocol):
    """What has to be known of models."""

    def describe(self) -> "StoreDescription":
        """Describe the models and how they are run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What to say.

    Attributes:
        payload: for the response topic, and for the topic that the request itself names.
        rejection: to be reported as a refused message as well; None: that is not called for.
    """

    payload: bytes
    rejection: Refusal | None = None


class CommandHandlers:
    """Answers requests, each with one answer, whatever it holds.

    There is none to what another consumer is asked for by name, and in a group none about a job that is not here: its
    owner answers.

    When the disk refuses a change, the answer is an error: whoever asks is there and can ask again, while a request
    that waits for the disk would hold up all that came behind it. Nothing has changed then.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        models: DescribesModels,
        consumer: str,
        on_cancelled: Callable[[Job], None],
        live: Callable[[Job], JobProgress | None] = lambda _job: None,
        on_deleted: Callable[[Job, Sequence[str]], None],
        health: Callable[[], Mapping[str, Any]],
        grouped: bool = False,
    ) -> None:
        """Wire it.

        Args:
            ledger: the jobs.
            models: what `models` tells of.
            consumer: the name of the consumer, as it stands in every status.
            on_cancelled: called with a job that was just ended without having been in work.
            live: tells how far a job in work is.
            on_deleted: called with a job that was just deleted, and the names in the spool folder that it leaves.
            health: what `health` tells: values that JSON has.
            grouped: whether other consumers get the same requests, and share the jobs with this one.
        """
        self._ledger = ledger
        self._models = models
        self._consumer = consumer
        self._on_cancelled = on_cancelled
        self._live = live
        self._on_deleted = on_deleted
        self._health = health
        self._grouped = grouped
        of_a_job: dict[str, Callable[[str], Outcome]] = {
            "cancel": self._cancel,
            "retry": self._retry,
            "delete": self._delete,
            "get": self._get,
        }
        self._commands: dict[str, Callable[[Any], Outcome]] = {
            **{name: _for_one_job(self._named, do) for name, do in of_a_job.items()},
            "result": self._result,
            "list": self._list,
            "pause": lambda _: self._pause(on=True),
            "resume": lambda _: self._pause(on=False),
            "health": lambda _: {**self._health(), "consumer": consumer},
            "models": lambda _: self._describe_models(),
        }

    def answer(self, command: str, payload: bytes) -> Answer | None:
        """Do what is asked for, on disk, and return what to say; whatever command and payload are, nothing is raised.

        Args:
            command: what stands behind `cesar/request/`.
            payload: a JSON object, a line of text that names a job, or nothing.

        Returns:
            None: nothing is to be said, for it is another consumer's to answer.
        """
        parsed = parse_command(command, payload)
        if parsed.consumer not in (None, self._consumer):
            return None
        if parsed.command is None:
            rejection = None if command in COMMANDS else Refusal("unknown_command", parsed.mistakes)
            return Answer(self._error(parsed.mistakes, parsed.transaction), rejection)
        response = self._answer(command, parsed.command)
        return None if response is None else Answer(response)

    def _answer(self, command: str, request: Command) -> bytes | None:
        open_to_all = self._grouped and request.consumer is None
        if open_to_all and isinstance(request, JobCommand) and request.job_id == CURRENT:
            return self._error(_WHOSE, request.transaction)
        try:
            outcome = self._commands[command](request)
            if open_to_all and isinstance(outcome, _NotHere):
                return None
            if not isinstance(outcome, str):
                _note(command, outcome)
                return _ok(outcome, request.transaction)
            problem = outcome
        except IllegalTransitionError as exc:
            problem = str(exc)
        except LedgerError as exc:  # its message names a path
            log.error("Request %s was not done: %s", command, exc, action="control_failed")
            problem = "The consumer's disk refuses to write, so nothing was changed: see its log, then ask again."
        except OSError as exc:
            log.error("Request %s was not done: %s", command, exc, action="control_failed")
            problem = "The consumer cannot read what it needs for this: see its log, then ask again."
        except ValueError:  # from a ledger that was edited by hand, say
            log.exception("Request %s was not answered", command, action="control_failed")
            problem = "The consumer cannot put the answer into words: its log says why."
        return self._error(problem, request.transaction)

    def _error(self, sentence: str, transaction: Any) -> bytes:
        """Return the payload; in a group each member may send one, so it says who."""
        data = {"consumer": self._consumer}
        return Response(status="error", data=data, error=sentence, transaction=transaction).encode()

    def _named(self, job_id: str) -> str | None:
        """Return the id that is meant; None: the current job's, and there is none."""
        return self._ledger.totals().processing if job_id == CURRENT else job_id

    # -- one job ------------------------------------------------------------------------------------------------------

    def _cancel(self, job_id: str) -> Outcome:
        try:
            job = self._ledger.cancel(job_id)
        except IllegalTransitionError:
            job = self._ledger.get(job_id)
            if job is None or job.state is not JobState.CANCELLED:
                raise
        else:
            if job is not None and job.state is JobState.CANCELLED:
                self._on_cancelled(job)
        return self._status(job, job_id)

    def _retry(self, job_id: str) -> Outcome:
        return self._status(self._ledger.retry(job_id), job_id)

    def _delete(self, job_id: str) -> Outcome:
        deleted = self._ledger.delete(job_id)
        if deleted is None:
            return _unknown(job_id)
        self._on_deleted(*deleted)
        return CommandResult(job_id=job_id, status="deleted", consumer=self._consumer)

    def _get(self, job_id: str) -> Outcome:
        job = self._ledger.get(job_id)
        if job is None:
            return _unknown(job_id)
        return cast(
            "dict[str, Any]", from_json(truncate_status(status_of(job, self._consumer, self._live(job)), ANSWER_BYTES))
        )

    def _result(self, asked: ResultCommand) -> Outcome:
        job_id = self._named(asked.job_id)
        if job_id is None:
            return _NONE_RUNS
        job = self._ledger.get(job_id)
        if job is None:
            return _unknown(job_id)
        if job.state is not JobState.COMPLETED:
            return f"Job {job_id} is {job.state}: only a completed one has a result."
        windows = self._ledger.windows(job.seq)
        if not windows and not job.formats and asked.format != "txt":
            return (
                f"There is no {asked.format} of job {job_id}: its times were not kept, for no format was asked for. "
                "Ask for txt, or submit it again with `formats`."
            )
        segments = [segment for window in windows for segment in window.segments]
        content, _ = formats.render(asked.format, formats.content_of(job, segments))
        return _result_page(job_id, asked, content, self._consumer)

    def _status(self, job: Job | None, job_id: str) -> Outcome:
        if job is None:
            return _unknown(job_id)
        return CommandResult(job_id=job.job_id, status=job.state.value, consumer=self._consumer)

    # -- all jobs -----------------------------------------------------------------------------------------------------

    def _list(self, asked: ListCommand) -> Outcome:
        behind = None if asked.after is None else self._ledger.get(asked.after)
        if asked.after is not None and behind is None:
            return _NotHere(
                f"There is no job {asked.after} to go on behind: it never was here, or it was deleted. "
                "Start again without `after`."
            )
        states = () if asked.status is None else (JobState(asked.status),)
        after = 0 if behind is None else behind.seq
        found = self._ledger.jobs(states=states, after=after, limit=asked.limit + 1)
        summaries = (summary_of(status_of(job, self._consumer)) for job in found[: asked.limit])
        jobs = truncate_list(summaries, ANSWER_BYTES)
        rest = len(found) > len(jobs)
        following = jobs[-1].job_id if rest else None
        return JobList(jobs=jobs, next=following, total=self._ledger.count(states), consumer=self._consumer)

    def _pause(self, *, on: bool) -> Outcome:
        self._ledger.pause(on=on)
        return Paused(paused=on, consumer=self._consumer)

    # -- the consumer -------------------------------------------------------------------------------------------------

    def _describe_models(self) -> Outcome:
        told = self._models.describe()
        return Models(
            default=told.default,
            loaded=told.loaded,
            device=told.device,
            compute_type=told.compute_type,
            cpu_threads=told.cpu_threads,
            models=[Model(**{name: getattr(entry, name) for name in Model.model_fields}) for entry in told.models],
            consumer=self._consumer,
        )


class _NotHere(str):
    """Says that a job is not in this ledger; in a group it may be in another one."""

    __slots__ = ()


_NONE_RUNS = "No job is processing just now: name one by its id."
_WHOSE = "Several consumers share the jobs: say with `consumer` whose current job is meant, or name one by its id."


def _for_one_job(named: Callable[[str], str | None], do: Callable[[str], Outcome]) -> Callable[[JobCommand], Outcome]:
    def done(asked: JobCommand) -> Outcome:
        job_id = named(asked.job_id)
        return _NONE_RUNS if job_id is None else do(job_id)

    return done


def _unknown(job_id: str) -> str:
    return _NotHere(f"There is no job {job_id}: it never was, or it was deleted.")


def _result_page(job_id: str, command: ResultCommand, content: bytes, consumer: str) -> Outcome:
    """Return a page of a file; it ends between characters, so that each page can be read by itself."""
    start = min(command.offset, len(content))
    if is_inside_character(content, start):
        return f"offset {start} is inside of a character: send the offset + length of the previous response."
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
        consumer=consumer,
    )


_RESULT_BYTES = ANSWER_BYTES - 1000


def _note(command: str, outcome: Payload | Mapping[str, Any]) -> None:
    """Log what was changed."""
    if isinstance(outcome, CommandResult) and outcome.status == JobState.PROCESSING:
        log.info("The job in work was asked to end", action=command, job_id=outcome.job_id)
    elif isinstance(outcome, CommandResult):
        log.info("Job is now %s on request", outcome.status, action=command, job_id=outcome.job_id)
    elif isinstance(outcome, Paused):
        log.info("Jobs are %s on request", "held back" if outcome.paused else "started", action=command)


def _ok(outcome: Payload | Mapping[str, Any], transaction: Any) -> bytes:
    """Return the payload. Raises ValueError for what JSON cannot say."""
    data = outcome.model_dump() if isinstance(outcome, Payload) else dict(outcome)
    return encode(Response(status="ok", data=data, error=None, transaction=transaction).model_dump())
