"""The ledger: the only truth about jobs, durable before anybody is told.

Every method may be called from any thread; one lock serialises them. What a method says is done is on disk when it
returns.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cesar_mqtt.errors import ErrorCode, LedgerError
from cesar_mqtt.jobs import STATES, Admission, IllegalTransitionError, Job, JobState, NewJob, Result
from cesar_mqtt.ledger.base import COUNTERS, GONE, JOBS, WINDOWS
from cesar_mqtt.ledger.deletion import Retirement
from cesar_mqtt.ledger.documents import (
    document_of,
    keeps_windows,
    result_of,
    retry_refusal,
    window_document,
)
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.index import window_id
from cesar_mqtt.ledger.storage import Change
from cesar_mqtt.logs import get_logger
from cesar_mqtt.transcript import Window

log = get_logger(__name__)

_OF_AN_END = ("started_at", "completed_at", "error_code", "error_message", "cancelling", "expires_at")
_EXPIRED = {
    "error_code": ErrorCode.EXPIRED.value,
    "error_message": "The job could not be started within its `expires_in`. Retry it, or submit it with more time.",
}
_OF_AN_ATTEMPT = ("started_at",)


class Ledger(Retirement):
    """Jobs in the order of their acceptance, their states, and which of them the broker has not been told of.

    The order is by an own sequence number that is never used again; clocks only decorate.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_attempts: int = 3,
        max_queued: int = 100_000,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        disk: Disk | None = None,
    ) -> None:
        """Open or create the ledger at `path`, and put back into the queue what a crash left in `processing`.

        Args:
            path: `ledger.json`; its folder must exist. The journal and the lock stand beside it.
            max_attempts: after so many crashes in mid-work a job becomes `error` `crashed`.
            max_queued: how many jobs may wait.
            clock: seconds since the epoch, for what is told.
            monotonic: seconds since whenever, for delays.
            disk: the durable writes; for tests.

        Raises:
            LedgerInUseError: another process has it open.
            LedgerError: it cannot be read, or is damaged.
        """
        super().__init__(path, clock=clock, disk=disk)
        self._max_attempts = max_attempts
        self._max_queued = max_queued
        self._monotonic = monotonic
        try:
            with self._changed:
                self._recover()
        except BaseException:
            self._give_up()
            raise

    def _recover(self) -> None:
        """Count a crash against each job that was in `processing`, and let it wait for its turn again or end.

        Windows that belong to nobody are dropped: the next attempt at their job, or a later job, would find them.
        """
        if self._index.orphans:
            self._commit([Change(WINDOWS, doc_id, None) for doc_id in self._index.orphans])
            self._index.orphans.clear()
        for seq in tuple(self._index.processing):
            row = self._rows[str(seq)]
            crashes = row.get("crashes", 0) + 1
            if row.get("cancelling"):
                self._cancel(seq)
            elif crashes < self._max_attempts:
                self._move(seq, JobState.QUEUED, {"crashes": crashes}, dropped=_OF_AN_ATTEMPT)
                log.warning("Job was in work at the last crash: queued again", action="recovered", job_id=row["job_id"])
            else:
                self._fail(
                    seq,
                    ErrorCode.CRASHED,
                    f"The process died {crashes} times while working on this job. Check the audio, then retry.",
                    {"crashes": crashes},
                )

    # -- accepting ------------------------------------------------------------------------------------------------

    def append(self, requests: Sequence[NewJob]) -> list[tuple[Admission, str]]:
        """Accept what can be accepted, all in one transaction with one fsync.

        Returns:
            For each request, in order, the verdict and the id of the job that it is: that of an earlier one, where it
            was a redelivery.

        Raises:
            LedgerError: the disk refused; nothing of all this has happened.
        """
        with self._changed:
            room = self._max_queued - len(self._index.queue)
            verdicts, new = self._index.register.judge(requests, room=room)
            if new:
                self._insert(new)
            for verdict, job_id in verdicts:
                seq = self._index.register.seq(job_id)
                if verdict is Admission.SAME and seq is not None:
                    self._outbox.tell(seq)
            if verdicts:
                self._notify()
            return verdicts

    def _insert(self, new: Mapping[str, NewJob]) -> None:
        now, revision = self._clock(), self._journal.transaction + 1
        first = self._index.last_seq + 1
        numbered = list(enumerate(new.values(), start=first))
        changes = [Change(JOBS, seq, document_of(request, now, revision)) for seq, request in numbered]
        failed = sum(request.failure is not None for _, request in numbered)
        if failed:
            changes.append(Change(COUNTERS, 1, {JobState.ERROR.value: self._index.ended[JobState.ERROR] + failed}))
        deleted = self._index.deleted
        revived = [gone for gone in map(deleted.bearer, new) if gone is not None]
        changes += [Change(GONE, gone.seq, {"status": False} if deleted.outlasts(gone) else None) for gone in revived]
        self._commit(changes)
        for gone in revived:  # the new job's status takes the place of the old one's at the broker
            deleted.keep_status(gone)
        for seq, request in numbered:
            self._index.add(seq, request, now)
        rows = self._rows
        for seq, _ in numbered:
            self._pass(seq, rows[str(seq)])

    def settle_deliveries(self, job_ids: Collection[str]) -> None:
        """Take nothing for a redelivery of these jobs any more; reaches the disk with the next transaction.

        Their packet ids may be given to other messages, which may ask for the same.
        """
        with self._changed:
            self._index.register.settle(job_ids)

    def forget_deliveries(self, *, but: Collection[str] = ()) -> None:
        """Take nothing for a redelivery any more, except of these; on disk on return, unless the disk refuses."""
        with self._changed:
            register = self._index.register
            register.settle([job_id for job_id in register.repeatable if job_id not in but])
            self.write_settled()

    def write_settled(self) -> None:
        """Have on disk what cannot come again, unless the disk refuses: then that goes with the next transaction."""
        with self._changed, contextlib.suppress(LedgerError):
            if self._index.register.settled != self._settled_on_disk:
                self._commit([])

    # -- working --------------------------------------------------------------------------------------------------

    def claim(self) -> Job | None:
        """Take the oldest job that is ready into `processing`, with its attempt counted; None when none is.

        Raises:
            LedgerError: the disk refused; the job still waits.
        """
        with self._changed:
            seq = self._ready()
            if seq is None:
                return None
            attempt = self._rows[str(seq)].get("attempt", 0) + 1
            self._move(seq, JobState.PROCESSING, {"attempt": attempt, "started_at": self._clock()})
            return self._job(seq)

    def _ready(self) -> int | None:
        return None if self._paused else next(self._all_ready(), None)

    def _all_ready(self) -> Iterator[int]:
        return self._index.queue.all_ready(self._monotonic(), self._clock())

    def add_window(self, seq: int, window: Window, *, identity: str | None = None) -> None:
        """Record a finished part of a job in `processing`, from whose end a later attempt goes on.

        With it goes what its audio is, where that may become another one: see `keep_windows_of`.

        Raises:
            LedgerError: the disk refused; the work may go on, and a later call may bring this window again.
            IllegalTransitionError: the job is not in work, or a window before this one is missing.
        """
        document = window_document(window) | ({} if identity is None else {"identity": identity})
        with self._changed:
            known = self._index.windows.get(seq, 0)
            if seq not in self._index.processing or window.number != known:
                raise IllegalTransitionError(f"Job number {seq} is not at its window {window.number}.")
            self._commit([Change(WINDOWS, window_id(seq, known), document)])
            self._index.keep_windows(seq, known + 1)

    def keep_windows_of(self, seq: int, identity: str) -> bool:
        """Drop a job's windows unless they are known to be of this audio; whether they are kept. Raises LedgerError."""
        with self._changed:
            first = self._journal.rows(WINDOWS).get(str(window_id(seq, 0)))
            if first is None or first.get("identity") == identity:
                return True
            self._commit(self._without_windows(seq))
            self._index.keep_windows(seq, 0)
            return False

    def complete(self, seq: int, result: Result) -> None:
        """Record the transcript of a job in `processing`. Raises LedgerError, IllegalTransitionError."""
        with self._changed:
            known = self._index.windows.get(seq, 0)
            kept = result.windows if keeps_windows(self._rows.get(str(seq), {})) else ()
            missing = list(enumerate(kept))[known:]
            also = [Change(WINDOWS, window_id(seq, number), window_document(window)) for number, window in missing]
            also += self._without_windows(seq, start=len(kept))
            fields = result_of(result, self._clock())
            self._move(seq, JobState.COMPLETED, fields, dropped=("cancelling",), also=also)
            self._index.keep_windows(seq, len(kept))

    def fail(self, seq: int, code: ErrorCode, message: str) -> None:
        """Record that a job in `processing` ended without a transcript. Raises as `complete`."""
        with self._changed:
            self._fail(seq, code, message, {})

    def _fail(self, seq: int, code: ErrorCode, message: str, fields: Mapping[str, Any]) -> None:
        failure = {"completed_at": self._clock(), "error_code": code.value, "error_message": message}
        also = [] if code.retryable else self._without_windows(seq)
        self._move(seq, JobState.ERROR, {**failure, **fields}, dropped=("cancelling",), also=also)
        if not code.retryable:
            self._index.keep_windows(seq, 0)

    def requeue(self, seq: int) -> Job:
        """Put a job in `processing` back to the front of the queue, as a forced stop does, and return it as it is then.

        One whose end was asked for ends instead. Raises as `complete`.
        """
        with self._changed:
            self._put_back(seq, {})
            return self._job(seq)

    def _put_back(self, seq: int, fields: Mapping[str, Any]) -> bool:
        if seq not in self._index.processing:  # an error may become queued, too, but that is a retry
            raise IllegalTransitionError(f"Job number {seq} is not in work, so it cannot be put back.")
        if self.is_cancelling(seq):  # it would only be taken up to be ended
            self._cancel(seq)
            return False
        self._move(seq, JobState.QUEUED, fields, dropped=_OF_AN_ATTEMPT)
        return True

    def defer(self, seq: int, delay_s: float) -> None:
        """Put a job in `processing` back, not to be claimed for `delay_s`; those behind it go first.

        The delay is by the monotonic clock and not on disk: after a restart the job is ready at once. One whose end
        was asked for ends as `cancelled` instead. Raises as `complete`.
        """
        with self._changed:
            retries = self._rows.get(str(seq), {}).get("retries", 0) + 1
            if self._put_back(seq, {"retries": retries}):
                self._index.queue.delay(seq, self._monotonic() + delay_s)

    def wait_for_work(self, stopped: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Sleep until a job is ready (True), or `stopped` is true or the time is out (False).

        `wake` makes it look again.
        """
        deadline = None if timeout_s is None else self._monotonic() + timeout_s
        with self._changed:
            while not stopped() and self._ready() is None:
                now = self._monotonic()
                if deadline is not None and now >= deadline:
                    return False
                until_ready = None if self._paused else self._index.queue.next_ready_in(now, self._clock())
                waits = [until_ready, None if deadline is None else deadline - now]
                self._waiting += 1
                self._changed.wait(min((wait for wait in waits if wait is not None), default=None))
                self._waiting -= 1
            return not stopped()

    def upcoming(self, limit: int) -> list[Job]:
        """Return the jobs whose turn comes next, in order; those that are put off are left out."""
        with self._changed:
            return [self._job(seq) for seq in islice(self._all_ready(), limit)]

    # -- what people ask for --------------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Job | None:
        """End a job that waits, or let the worker end the one in work: see `is_cancelling`.

        Returns:
            The job as it is then: `cancelled`, or still `processing`; None: there is no such job.

        Raises:
            IllegalTransitionError: it has ended.
            LedgerError: the disk refused; the job goes on.
        """
        with self._changed:
            seq = self._index.register.seq(job_id)
            if seq is None:
                return None
            state = STATES[self._rows[str(seq)]["state"]]
            if state.final:
                raise IllegalTransitionError(f"Job {job_id} has ended as {state}: there is nothing to cancel.")
            if state is JobState.QUEUED:
                self._cancel(seq)
            elif not self.is_cancelling(seq):
                self._commit([Change(JOBS, seq, {"cancelling": True})])
                self._notify()
            return self._job(seq)

    def cancelled(self, seq: int) -> None:
        """Record that a job in `processing` was ended because somebody asked for it. Raises as `complete`."""
        with self._changed:
            self._cancel(seq)

    def _cancel(self, seq: int) -> None:
        self._move(seq, JobState.CANCELLED, {"completed_at": self._clock()}, dropped=("cancelling",))

    def expire(self, limit: int = 200) -> list[Job]:
        """End jobs that wait and are no longer worth starting, at most so many, as `cancelled`; return them.

        Raises:
            LedgerError: the disk refused; those that are left are returned by a later call.
        """
        ended: list[Job] = []
        for _ in range(limit):
            with self._changed:  # let go each time, so that nobody waits for more than one sync
                seq = next(iter(self._index.queue.expired(self._clock(), 1)), None)
                if seq is None:
                    break
                self._move(seq, JobState.CANCELLED, {"completed_at": self._clock(), **_EXPIRED})
                ended.append(self._job(seq))
        return ended

    def retry(self, job_id: str) -> Job | None:
        """Queue a job that ended as `error` or `cancelled` once more, with the options that it came with.

        Its place in the queue is the one that its number gives it. Of audio that came with the job, what was finished
        is not done again; a file or URL may be another one by now.

        Returns:
            The job as it is then; None: there is no such job.

        Raises:
            IllegalTransitionError: it has not ended that way, or there is no audio to work on; a sentence for the user.
            LedgerError: the disk refused; the job stays as it is.
        """
        with self._changed:
            seq = self._index.register.seq(job_id)
            if seq is None:
                return None
            row = self._rows[str(seq)]
            if refusal := retry_refusal(row):
                raise IllegalTransitionError(refusal)
            spooled = row["audio"][0] == "spool"
            also = [] if spooled else self._without_windows(seq)
            self._move(seq, JobState.QUEUED, {"crashes": 0, "retries": 0}, dropped=_OF_AN_END, also=also)
            if not spooled:
                self._index.keep_windows(seq, 0)
            return self._job(seq)

    def pause(self, *, on: bool) -> None:
        """Let no job be started, or jobs be started again; kept over restarts. Raises LedgerError."""
        with self._changed:
            if on != self._paused:
                self._commit([Change(COUNTERS, 1, {"paused": on})])
                self._paused = on
                self._notify()
