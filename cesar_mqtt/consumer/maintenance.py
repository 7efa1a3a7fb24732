"""Maintenance of ledger and spool while the consumer runs: checkpoints, expired jobs, retention.

The main thread calls it between its other duties.
"""

import time
from collections.abc import Callable
from contextlib import suppress

from cesar_mqtt.config import RetentionSettings
from cesar_mqtt.errors import Cancelled, LedgerError
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import Backoff, pause

log = get_logger(__name__)

_DAY_S = 86_400.0
_BATCH = 200
"""How many jobs one transaction deletes: other threads wait a few milliseconds for it."""
_GAP_S = 0.01
"""Between two batches, so that other threads get the ledger's lock."""
_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 300.0
"""After a refusal of the disk: nothing is urgent here, and each attempt to write a checkpoint may be large."""


class Maintenance:
    """Does what is due; after the disk has refused, it waits longer before each further attempt."""

    def __init__(
        self,
        retention: RetentionSettings,
        ledger: Ledger,
        spool: Spool,
        *,
        on_expired: Callable[[Job], None] = lambda _job: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_expired` is called with each job that expired in the queue."""
        self._retention = retention
        self._ledger = ledger
        self._spool = spool
        self._on_expired = on_expired
        self._clock = clock
        self._monotonic = monotonic
        self._started_at = clock() - monotonic()
        self._backoff = Backoff(_RETRY_FIRST_S, _RETRY_MOST_S)
        self._not_before = 0.0

    def run_once(self, should_stop: Callable[[], bool]) -> None:
        """Do what is due now; return early when `should_stop` returns True."""
        if self._monotonic() < self._not_before:
            return
        try:
            self._ledger.restore_reserve()
            self._ledger.checkpoint_if_due()
            for job in self._ledger.expire():
                self._on_expired(job)
            self._delete_old_jobs(should_stop)
        except LedgerError as exc:
            delay_s = self._backoff.next_s()
            self._not_before = self._monotonic() + delay_s
            log.warning("%s Next attempt in %.0f s.", exc, delay_s, action="upkeep")
        else:
            self._backoff.reset()

    def _delete_old_jobs(self, should_stop: Callable[[], bool]) -> None:
        # On a machine without a battery the clock may be set years ahead after the start: that makes no job old.
        now = min(self._clock(), self._started_at + self._monotonic())
        before = now - self._retention.days * _DAY_S
        deleted = _BATCH
        with suppress(Cancelled):
            while deleted == _BATCH:
                pause(_GAP_S, should_stop)
                deleted, spooled = self._ledger.delete_finished(
                    before=before,
                    keep=self._retention.max_finished,
                    keep_rejected=self._retention.max_rejected,
                    limit=_BATCH,
                )
                self._spool.remove(spooled)
                if deleted:
                    log.debug("Deleted %d finished jobs", deleted, action="retired")
