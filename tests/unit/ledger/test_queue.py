"""The queue: the order that priorities and preemption give, and positions, compared with a sorted list."""

from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.ledger.queue import POSITIONS_TRACKED, JobQueue, level_of


def test_a_higher_priority_comes_first_then_the_preempted_job_then_the_oldest() -> None:
    levels = {
        1: level_of(0, preempted=False),
        2: level_of(9, preempted=False),
        3: level_of(0, preempted=True),
        4: level_of(1, preempted=True),
        5: level_of(1, preempted=False),
        6: level_of(9, preempted=True),
        7: level_of(9, preempted=False),
        8: level_of(8, preempted=True),
    }
    order = [6, 2, 7, 8, 4, 5, 3, 1]
    assert list(JobQueue(levels.items())) == order
    added = JobQueue()
    for seq, level in levels.items():
        added.add(seq, level)
    assert list(added) == order
    assert (added.preempted, added.oldest(), len(added)) == ({3, 4, 6, 8}, 1, 8)


def test_a_job_that_is_pushed_out_of_the_first_ten_has_its_new_position_once() -> None:
    queue = JobQueue((seq, 0) for seq in range(1, 13))
    assert queue.update_positions(1.0) == list(range(1, POSITIONS_TRACKED + 1))
    queue.add(20, level_of(9, preempted=False))
    assert queue.update_positions(2.0) == list(range(1, POSITIONS_TRACKED + 1))
    assert [queue.position(seq) for seq in (20, 1, 9, 10)] == [(1, None), (2, 2.0), (10, 2.0), (11, 2.0)]
    queue.add(21, level_of(9, preempted=False))
    assert queue.update_positions(3.0) == list(range(1, POSITIONS_TRACKED))
    assert [queue.position(seq) for seq in (9, 10, 11)] == [(11, 3.0), (11, 2.0), (11, None)], "the first ten only"


def test_a_preempted_job_no_longer_expires_when_it_is_added_again() -> None:
    queue = JobQueue([(1, 0)])
    queue.set_expiry(1, 5.0)
    queue.remove(1)
    queue.drop_expiry(1)
    queue.add(1, level_of(0, preempted=True))
    assert (queue.expired(10.0, 1), list(queue.all_ready(0.0, 10.0))) == ([], [1])


steps = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 9), st.booleans()), max_size=60)


@given(steps)
def test_order_and_positions_are_those_of_a_sorted_list(steps: list[tuple[int, int, bool]]) -> None:
    queue, expected = JobQueue(), dict[int, tuple[int, bool, int]]()
    for number, (choice, priority, preempted) in enumerate(steps):
        if choice < 4 and expected:  # a job that was there leaves, and may come back
            seq = list(expected)[choice % len(expected)]
            queue.remove(seq)
            del expected[seq]
        else:
            seq = number + 1 if choice < 10 else (number * 7919) % 1000 + 1
            if seq in expected:
                continue
            queue.add(seq, level_of(priority, preempted=preempted))
            expected[seq] = (-priority, not preempted, seq)
        moved = set(queue.update_positions(float(number)))
        order = sorted(expected, key=expected.__getitem__)
        assert list(queue) == order
        assert queue.preempted == {seq for seq in expected if not expected[seq][1]}
        assert queue.oldest() == min(expected, default=None)
        for position, seq in enumerate(order[:POSITIONS_TRACKED], start=1):
            assert queue.position(seq)[0] == position
        for position, seq in enumerate(order, start=1):
            if seq in moved:
                assert queue.position(seq) == (position, float(number))
