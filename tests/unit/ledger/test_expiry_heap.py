"""Numbers by their times: as a plain dict would have it, in a bounded heap."""

from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.ledger.expiry_heap import ExpiryHeap

NUMBERS = st.integers(0, 12)
STEPS = st.lists(st.tuples(NUMBERS, st.none() | st.integers(0, 5).map(float)), max_size=200)


@given(start=st.dictionaries(NUMBERS, st.just(2.0)), steps=STEPS, time=st.integers(-1, 6), limit=st.integers(0, 15))
def test_due_returns_what_a_search_would_find(
    start: dict[int, float], steps: list[tuple[int, float | None]], time: int, limit: int
) -> None:
    times, plain = ExpiryHeap(start.items()), dict(start)
    for number, at in steps:
        for mapping in (times, plain):
            if at is None:
                mapping.pop(number, None)
            else:
                mapping[number] = at
    assert list(times.items()) == list(plain.items())
    assert list(reversed(times)) == list(reversed(plain))
    wanted = [number for at, number in sorted((at, number) for number, at in plain.items()) if at <= time]
    for _ in range(2):
        assert times.due(time, limit) == wanted[:limit]


def test_stale_entries_do_not_pile_up_behind_one_that_stays() -> None:
    times = ExpiryHeap({0: 0.0}.items())
    for number in range(1, 5000):
        times[number] = float(number)
        times[number % 10] = -1.0
        del times[number]
        assert len(times._heap) < 60
