"""The outbox by itself: what is owed to the broker is not lost, nor told in a wrong order, whatever comes between."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.documents import job_from
from cesar_mqtt.ledger.outbox import HISTORY_LIMIT, Item, Outbox


def document(seq: int, revision: int) -> dict[str, Any]:
    fixed = {"state": "queued", "created_at": 0.0, "updated_at": 0.0, "fingerprint": "f", "model_size": "base"}
    return {"job_id": f"job-{seq}", "revision": revision, **fixed}


class Desk:
    """An outbox, with the ledger's side of it (which change of each job is the newest) and the publisher's."""

    def __init__(self, start: dict[int, int] | None = None) -> None:
        self.revisions = dict(start or {})
        self.transaction = max(self.revisions.values(), default=0)
        self.outbox = Outbox((revision, seq) for seq, revision in self.revisions.items())
        self.event_pending = dict(self.revisions)
        """The jobs whose newest change nobody has acknowledged as such."""
        self.moment = 0
        self.since = dict.fromkeys(self.revisions, 0)
        """The jobs of which the broker is to be told, and since when: what was taken before that is not enough."""
        self.owed = set(self.revisions)
        """Those of them of which a restart has to know."""
        self.on_the_way: list[tuple[int, int, int]] = []
        """Of what: its number, and when it was taken."""

    def change(self, *seqs: int) -> None:
        for seq in seqs:
            self.transaction += 1
            self.revisions[seq] = self.event_pending[seq] = self.transaction
            self.since[seq] = self.moment
            self.owed.add(seq)
            self.outbox.enqueue(seq, self.transaction, (seq, document(seq, self.transaction), None, None))

    def tell(self, seq: int) -> None:
        if seq in self.revisions:
            self.since[seq] = self.moment
            self.outbox.republish(seq)

    def render(self, seq: int) -> Job:
        return job_from(seq, document(seq, self.revisions[seq]), None, None)

    def take(self, limit: int = 1000) -> list[tuple[int, int]]:
        """What is told next: of each the job's number, and the revision if that is news, else a negative number."""
        items: list[Item] = self.outbox.take(limit, {seq for seq, *_ in self.on_the_way}, self.render)
        assert len(items) <= limit
        assert all(number < 0 or number == job.revision for number, job in items)
        assert all(job.seq in self.revisions for _, job in items), "nothing is said of one that is deleted"
        self.moment += 1
        self.on_the_way += [(job.seq, number, self.moment) for number, job in items]
        return [(job.seq, number) for number, job in items]

    def hear(self, count: int = 1000) -> None:
        """The broker acknowledges the first of what is on its way."""
        heard, self.on_the_way = self.on_the_way[:count], self.on_the_way[count:]
        for seq, number, taken in heard:
            self.outbox.acknowledge(seq, number)
            if self.event_pending.get(seq) == number:
                del self.event_pending[seq]
            if self.since.get(seq, taken) < taken:
                del self.since[seq]
                self.owed.discard(seq)

    def lose_connection(self, _: int = 0) -> None:
        self.on_the_way.clear()
        self.outbox.coalesce()

    def lose_all(self, _: int = 0) -> None:
        self.outbox.enqueue_all((revision, seq) for seq, revision in self.revisions.items())
        self.owed = set(self.revisions)
        self.since = dict.fromkeys(self.revisions, self.moment)

    def forget(self, seq: int) -> None:
        self.owed.discard(seq)
        for known in (self.revisions, self.event_pending, self.since):
            known.pop(seq, None)
        self.outbox.drop([seq])

    @property
    def watermark(self) -> int:
        return self.outbox.watermark(self.transaction)


SEQS = st.integers(1, 2)
STEPS = st.lists(
    st.tuples(st.sampled_from(("change", "tell", "tell", "forget")), SEQS)
    | st.tuples(st.sampled_from(("take", "hear")), st.integers(1, 4))
    | st.tuples(st.sampled_from(("lose_connection", "lose_all")), st.just(0)),
    min_size=5,
    max_size=25,
)


@settings(max_examples=1000)
@given(start=st.sets(SEQS), steps=STEPS)
def test_a_change_is_news_until_it_is_acknowledged_and_a_restart_knows_of_it(
    start: set[int], steps: list[tuple[str, int]]
) -> None:
    desk = Desk({seq: revision for revision, seq in enumerate(sorted(start), start=1)})
    for name, number in steps:
        getattr(desk, name)(number)
        oldest = min(
            [desk.revisions[seq] for seq in desk.owed | desk.event_pending.keys()], default=desk.transaction + 1
        )
        assert desk.watermark < oldest
        assert desk.outbox or not desk.since
    desk.lose_connection()
    told = desk.take()
    assert {seq: number for seq, number in told if number > 0} == desk.event_pending, "as news, and as nothing else"
    assert len(told) == len({seq for seq, _ in told}), "only the newest state of each"
    assert desk.since.keys() <= {seq for seq, _ in told}
    desk.hear()
    assert not desk.outbox
    assert desk.take() == []
    assert desk.watermark == desk.transaction


def test_nothing_that_was_acknowledged_is_told_again_after_a_restart() -> None:
    desk = Desk()
    desk.change(1, 2, 3)
    desk.take()
    desk.hear(1)
    assert desk.watermark == 1


def test_what_changed_first_is_told_first_also_of_the_newest_states_alone() -> None:
    desk = Desk({1: 2, 3: 1})
    assert desk.take(1) == [(3, 1)]
    desk.lose_connection()
    assert desk.take() == [(3, 1), (1, 2)]
    desk.change(2, 3)
    desk.lose_connection()
    assert desk.take() == [(1, 2), (2, 3), (3, 4)]


def test_no_more_is_taken_than_there_is_room_for_on_the_way() -> None:
    desk = Desk({1: 1, 2: 2, 3: 3})
    desk.change(4, 5)
    assert desk.take(3) == [(4, 4), (5, 5), (1, 1)]
    assert desk.take(1) == [(2, 2)]


def test_one_that_is_told_again_waits_behind_those_that_were_before_it() -> None:
    desk = Desk()
    desk.change(1, 2)
    desk.take()
    desk.tell(1)
    desk.on_the_way.clear()
    assert [seq for seq, _ in desk.take()] == [2, 1]


def test_every_state_of_a_job_is_told_as_long_as_there_are_not_too_many() -> None:
    desk = Desk()
    desk.change(*([1] * HISTORY_LIMIT))
    assert [number for _, number in desk.take()] == list(range(1, HISTORY_LIMIT + 1))
    desk = Desk()
    desk.change(*([1, 2] * HISTORY_LIMIT))
    told = desk.take()
    assert [number for _, number in told] == list(range(HISTORY_LIMIT + 1, 2 * HISTORY_LIMIT + 1)), (
        "the oldest give way"
    )
    desk.forget(1)
    desk.change(*([2] * (HISTORY_LIMIT + 5)))
    assert len(desk.take(2 * HISTORY_LIMIT)) == HISTORY_LIMIT
