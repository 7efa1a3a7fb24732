import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

import pytest

from cesar_mqtt.whisper.ordered_work import OrderedWork
from tests.conftest import PATIENCE_S


class Steps:
    """Work of which each step waits until the test lets it go on; notes what was begun and closed."""

    def __init__(self, count: int) -> None:
        self.gates = [threading.Semaphore(0) for _ in range(count)]
        self.begun = [threading.Event() for _ in range(count)]
        self.closed: list[int] = []
        self.errors: dict[int, BaseException] = {}

    def __call__(self, item: int) -> Generator[str, None, None]:
        self.begun[item].set()
        try:
            for part in "ab":
                assert self.gates[item].acquire(timeout=PATIENCE_S)
                if item in self.errors:
                    raise self.errors[item]
                yield f"{item}{part}"
        finally:
            self.closed.append(item)

    def go_on(self, *items: int, steps: int = 2) -> None:
        for item in items:
            self.gates[item].release(steps)


@contextmanager
def working(
    steps: Steps, items: Iterator[int], *, threads: int = 2, limit: Callable[[], int] = lambda: 2
) -> Iterator[OrderedWork[int, str]]:
    work = OrderedWork(items, steps, threads=threads, limit=limit)
    try:
        yield work
    finally:
        steps.go_on(*range(len(steps.gates)), steps=9)
        work.close()
        work.close()
        assert not any(thread.name.startswith("transcriber") for thread in threading.enumerate())


def take_all(work: OrderedWork[int, str], taken: list[str]) -> None:
    for _, results in work:
        taken += results


def is_begun(steps: Steps, item: int) -> bool:
    """Whether it is begun, now that everything that could begin it has had some time."""
    return steps.begun[item].wait(0.05)


def test_results_come_in_the_order_of_the_items_whichever_is_finished_first() -> None:
    steps = Steps(3)
    with working(steps, iter(range(3))) as work:
        steps.go_on(1)
        taken = []
        for item, results in work:
            if item == 0:
                assert steps.begun[1].wait(PATIENCE_S)
                steps.go_on(0, 2)
            taken.append((item, list(results)))
    assert taken == [(0, ["0a", "0b"]), (1, ["1a", "1b"]), (2, ["2a", "2b"])]
    assert sorted(steps.closed) == [0, 1, 2]


def test_a_result_is_there_before_the_item_is_finished() -> None:
    steps = Steps(1)
    with working(steps, iter([0])) as work:
        ((_, results),) = [next(iter(work))]
        steps.go_on(0, steps=1)
        assert next(results) == "0a"
        assert steps.closed == []


def test_no_more_are_in_work_than_the_limit_allows_however_many_are_finished() -> None:
    steps = Steps(4)
    with working(steps, iter(range(4)), threads=4) as work:
        each = iter(work)
        _, results = next(each)
        steps.go_on(1)
        assert is_begun(steps, 1)
        assert not is_begun(steps, 2)
        steps.go_on(0)
        list(results)
        assert not is_begun(steps, 2)
        next(each)
        assert steps.begun[2].wait(PATIENCE_S)
        assert not is_begun(steps, 3)


def test_the_limit_may_grow_with_a_result() -> None:
    steps = Steps(2)
    limit = [1]
    with working(steps, iter(range(2)), limit=lambda: limit[0]) as work:
        _, results = next(iter(work))
        assert not is_begun(steps, 1)
        steps.go_on(0, steps=1)
        next(results)
        limit[0] = 2
        taker = threading.Thread(target=lambda: next(results))
        taker.start()
        assert steps.begun[1].wait(PATIENCE_S)
        steps.go_on(0)
        taker.join(PATIENCE_S)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_comes_in_its_place_and_nothing_is_begun_after_it(error: BaseException) -> None:
    steps = Steps(4)
    steps.errors[1] = error
    taken: list[str] = []
    with working(steps, iter(range(4))) as work:
        steps.go_on(0, 1, 2, 3)
        with pytest.raises(type(error)) as caught:
            take_all(work, taken)
        assert caught.value is error
    assert taken == ["0a", "0b"]
    assert not steps.begun[3].is_set()


def test_an_error_of_the_items_comes_after_the_results_of_those_before() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    steps = Steps(1)
    taken: list[str] = []
    with working(steps, items()) as work:
        steps.go_on(0)
        with pytest.raises(OSError, match="the disk is gone"):
            take_all(work, taken)
    assert taken == ["0a", "0b"]


def test_those_in_work_are_finished_and_no_other_is_begun() -> None:
    steps = Steps(4)
    taken = []
    with working(steps, iter(range(4))) as work:
        assert steps.begun[1].wait(PATIENCE_S)
        steps.go_on(0, 1)
        for item, results in work:
            taken.append((item, list(results)))
            work.finish()
    assert taken == [(0, ["0a", "0b"]), (1, ["1a", "1b"])]
    assert not steps.begun[2].is_set()


def test_an_item_that_comes_after_the_end_is_dropped() -> None:
    asked, late = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        asked.set()
        late.wait(PATIENCE_S)
        yield 0

    steps = Steps(1)
    with working(steps, items()) as work:
        assert asked.wait(PATIENCE_S)
        work.finish()
        assert list(work) == []
        late.set()
    assert not steps.begun[0].is_set()


def test_nothing_is_no_work() -> None:
    with working(Steps(0), iter(())) as work, closing(work):
        assert list(work) == []
