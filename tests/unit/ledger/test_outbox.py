"""The outbox: no state is lost or published in a wrong order, whatever happens in between."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.documents import job_from
from cesar_mqtt.ledger.outbox import HISTORY_LIMIT, Outbox, PendingStatus


def document(seq: int, revision: int) -> dict[str, Any]:
    fixed = {"state": "queued", "created_at": 0.0, "updated_at": 0.0, "fingerprint": "f", "model_size": "base"}
    return {"job_id": f"job-{seq}", "revision": revision, **fixed}


class Driver:
    """An outbox with the ledger's side of it (the newest change of each job) and the publisher's."""

    def __init__(self, start: dict[int, int] | None = None) -> None:
        self.revisions = dict(start or {})
        self.transaction = max(self.revisions.values(), default=0)
        self.outbox = Outbox((revision, seq) for seq, revision in self.revisions.items())
        self.unannounced = dict(self.revisions)
        """The jobs whose newest change is not acknowledged as new."""
        self.moment = 0
        self.since = dict.fromkeys(self.revisions, 0)
        """The jobs to publish, and since when: a state that was taken before that is not enough."""
        self.must_survive = set(self.revisions)
        """The jobs that a restart must publish."""
        self.in_flight: list[tuple[int, int, int]] = []
        """Sequence number, number and time of each taken state."""

    def change(self, *seqs: int) -> None:
        for seq in seqs:
            self.transaction += 1
            self.revisions[seq] = self.unannounced[seq] = self.transaction
            self.since[seq] = self.moment
            self.must_survive.add(seq)
            self.outbox.enqueue(seq, self.transaction, (seq, document(seq, self.transaction), None, None))

    def republish(self, seq: int) -> None:
        if seq in self.revisions:
            self.since[seq] = self.moment
            self.outbox.republish(seq)

    def render(self, seq: int) -> Job:
        return job_from(seq, document(seq, self.revisions[seq]), None, None)

    def take(self, limit: int = 1000) -> list[tuple[int, int]]:
        """Take states: of each the sequence number, and the revision if it is new, else a negative number."""
        items: list[PendingStatus] = self.outbox.take(limit, {seq for seq, *_ in self.in_flight}, self.render)
        assert len(items) <= limit
        assert all(number < 0 or number == job.revision for number, job in items)
        assert all(job.seq in self.revisions for _, job in items), "no deleted job is published"
        self.moment += 1
        self.in_flight += [(job.seq, number, self.moment) for number, job in items]
        return [(job.seq, number) for number, job in items]

    def acknowledge(self, count: int = 1000) -> None:
        """Acknowledge the first `count` states in flight."""
        acknowledged, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        for seq, number, taken in acknowledged:
            self.outbox.acknowledge(seq, number)
            if self.unannounced.get(seq) == number:
                del self.unannounced[seq]
            if self.since.get(seq, taken) < taken:
                del self.since[seq]
                self.must_survive.discard(seq)

    def lose_connection(self, _: int = 0) -> None:
        self.in_flight.clear()
        self.outbox.coalesce()

    def lose_retained(self, _: int = 0) -> None:
        self.outbox.enqueue_all((revision, seq) for seq, revision in self.revisions.items())
        self.must_survive = set(self.revisions)
        self.since = dict.fromkeys(self.revisions, self.moment)

    def delete(self, seq: int) -> None:
        self.must_survive.discard(seq)
        for known in (self.revisions, self.unannounced, self.since):
            known.pop(seq, None)
        self.outbox.drop([seq])

    @property
    def watermark(self) -> int:
        return self.outbox.watermark(self.transaction)


SEQS = st.integers(1, 2)
STEPS = st.lists(
    st.tuples(st.sampled_from(("change", "republish", "republish", "delete")), SEQS)
    | st.tuples(st.sampled_from(("take", "acknowledge")), st.integers(1, 4))
    | st.tuples(st.sampled_from(("lose_connection", "lose_retained")), st.just(0)),
    min_size=5,
    max_size=25,
)


@settings(max_examples=1000)
@given(start=st.sets(SEQS), steps=STEPS)
def test_a_change_is_pending_until_it_is_acknowledged_also_after_a_restart(
    start: set[int], steps: list[tuple[str, int]]
) -> None:
    driver = Driver({seq: revision for revision, seq in enumerate(sorted(start), start=1)})
    for name, number in steps:
        getattr(driver, name)(number)
        oldest = min(
            [driver.revisions[seq] for seq in driver.must_survive | driver.unannounced.keys()],
            default=driver.transaction + 1,
        )
        assert driver.watermark < oldest
        assert driver.outbox or not driver.since
    driver.lose_connection()
    taken = driver.take()
    assert {seq: number for seq, number in taken if number > 0} == driver.unannounced, "as new, and nothing else as new"
    assert len(taken) == len({seq for seq, _ in taken}), "only the newest state of each"
    assert driver.since.keys() <= {seq for seq, _ in taken}
    driver.acknowledge()
    assert not driver.outbox
    assert driver.take() == []
    assert driver.watermark == driver.transaction


def test_acknowledged_changes_are_below_the_watermark() -> None:
    driver = Driver()
    driver.change(1, 2, 3)
    driver.take()
    driver.acknowledge(1)
    assert driver.watermark == 1


def test_newest_states_are_taken_in_the_order_of_their_changes() -> None:
    driver = Driver({1: 2, 3: 1})
    assert driver.take(1) == [(3, 1)]
    driver.lose_connection()
    assert driver.take() == [(3, 1), (1, 2)]
    driver.change(2, 3)
    driver.lose_connection()
    assert driver.take() == [(1, 2), (2, 3), (3, 4)]


def test_take_respects_the_limit() -> None:
    driver = Driver({1: 1, 2: 2, 3: 3})
    driver.change(4, 5)
    assert driver.take(3) == [(4, 4), (5, 5), (1, 1)]
    assert driver.take(1) == [(2, 2)]


def test_a_republished_job_goes_to_the_end() -> None:
    driver = Driver()
    driver.change(1, 2)
    driver.take()
    driver.republish(1)
    driver.in_flight.clear()
    assert [seq for seq, _ in driver.take()] == [2, 1]


def test_every_state_is_taken_up_to_the_history_limit() -> None:
    driver = Driver()
    driver.change(*([1] * HISTORY_LIMIT))
    assert [number for _, number in driver.take()] == list(range(1, HISTORY_LIMIT + 1))
    driver = Driver()
    driver.change(*([1, 2] * HISTORY_LIMIT))
    taken = driver.take()
    assert [number for _, number in taken] == list(range(HISTORY_LIMIT + 1, 2 * HISTORY_LIMIT + 1)), (
        "the oldest are dropped"
    )
    driver.delete(1)
    driver.change(*([2] * (HISTORY_LIMIT + 5)))
    assert len(driver.take(2 * HISTORY_LIMIT)) == HISTORY_LIMIT
