"""What happens to jobs: the events that intake, commands, worker and maintenance report, and who receives them.

Any thread may report. Every call returns at once.
"""

from typing import TYPE_CHECKING

from cesar_mqtt.jobs import Job
from cesar_mqtt.protocol.consumer_payloads import Activity
from cesar_mqtt.protocol.payloads import JobProgress, Rejection
from cesar_mqtt.transcript import Segment

if TYPE_CHECKING:
    from collections.abc import Callable


class JobObserver:
    """Receives every event and ignores it: a subclass, such as the publisher, overrides what it needs."""

    def on_activity_changed(self, activity: Activity) -> None:
        """The worker does something else now."""

    def on_degraded(self, thread: str, *, on: bool) -> None:
        """The disk refuses the writes of the thread, or takes them again."""

    def on_progress(self, job: Job, progress: JobProgress) -> None:
        """The running job has come so far."""

    def on_segment(self, job: Job, segment: Segment) -> None:
        """The running job, which asked for `stream`, has a further segment."""

    def on_finished(self, job: Job) -> None:
        """The job is final, and that is on disk."""

    def on_rejected(self, rejection: Rejection) -> None:
        """A message was rejected."""


class JobEvents:
    """Passes every event to one observer, and the ends of jobs and the rejections to further functions.

    Attributes:
        on_finished: called in this order for each job that is final; add to it before the threads start.
        on_rejected: the same for each rejected message.
    """

    def __init__(self, observer: JobObserver) -> None:
        self.activity = observer.on_activity_changed
        self.degraded = observer.on_degraded
        self.progress = observer.on_progress
        self.segment = observer.on_segment
        self.on_finished: list[Callable[[Job], None]] = [observer.on_finished]
        self.on_rejected: list[Callable[[Rejection], None]] = [observer.on_rejected]

    def finished(self, job: Job) -> None:
        for receive in self.on_finished:
            receive(job)

    def rejected(self, rejection: Rejection) -> None:
        for receive in self.on_rejected:
            receive(rejection)
