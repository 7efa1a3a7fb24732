from cesar_mqtt.consumer.events import JobEvents, JobObserver
from cesar_mqtt.jobs import Job
from cesar_mqtt.protocol.payloads import JobProgress, Rejection
from cesar_mqtt.transcript import Segment
from tests import factories

JOB = factories.job()
PROGRESS = JobProgress(
    progress=0.5, processed_duration=30.0, audio_duration=60.0, speed=None, eta=None, updated_at=factories.AT
)
SEGMENT = factories.segment()
REJECTION = Rejection(
    reason="queue_full",
    detail="Full.",
    topic="cesar/jobs",
    job_id=None,
    payload_excerpt="",
    received_at="2026-01-23T21:45:00.120Z",
)


class Recorder(JobObserver):
    def __init__(self, received: list[object]) -> None:
        self.received = received

    def on_activity_changed(self, activity: str) -> None:
        self.received.append(activity)

    def on_degraded(self, thread: str, *, on: bool) -> None:
        self.received.append((thread, on))

    def on_progress(self, job: Job, progress: JobProgress) -> None:
        self.received.append((job, progress))

    def on_segment(self, job: Job, segment: Segment) -> None:
        self.received.append((job, segment))

    def on_finished(self, job: Job) -> None:
        self.received.append(job)

    def on_rejected(self, rejection: Rejection) -> None:
        self.received.append(rejection)


def test_the_observer_receives_every_event() -> None:
    received: list[object] = []
    events = JobEvents(Recorder(received))
    events.activity("idle")
    events.degraded("worker", on=True)
    events.progress(JOB, PROGRESS)
    events.segment(JOB, SEGMENT)
    events.finished(JOB)
    events.rejected(REJECTION)
    assert received == ["idle", ("worker", True), (JOB, PROGRESS), (JOB, SEGMENT), JOB, REJECTION]


def test_further_functions_receive_the_ends_of_jobs_and_the_rejections_after_the_observer() -> None:
    received: list[object] = []
    events = JobEvents(Recorder(received))
    events.on_finished.append(lambda job: received.append(("counted", job)))
    events.on_rejected.append(lambda rejection: received.append(("counted", rejection)))
    events.finished(JOB)
    events.rejected(REJECTION)
    assert received == [JOB, ("counted", JOB), REJECTION, ("counted", REJECTION)]


def test_an_observer_ignores_what_it_does_not_override() -> None:
    events = JobEvents(JobObserver())
    events.activity("idle")
    events.finished(JOB)
    events.rejected(REJECTION)
