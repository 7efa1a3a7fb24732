import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.threads import Backoff, StoppableThread, Task, never_stop, pause, until_stopped, wait, wait_for
from tests.conftest import PATIENCE_S


class Sleeper(StoppableThread):
    """Waits for its wake-up, as a loop body that has nothing to do."""

    def __init__(self) -> None:
        super().__init__("sleeper")
        self.woken = threading.Event()

    def _wake(self) -> None:
        self.woken.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.woken.wait()


def test_a_stop_wakes_the_thread_and_waits_for_its_end() -> None:
    sleeper = Sleeper()
    sleeper.start()
    assert sleeper.alive
    sleeper.stop()
    assert not sleeper.alive
    sleeper.stop()


def test_a_stop_can_be_requested_without_waiting_for_the_end() -> None:
    release = threading.Event()

    class Busy(StoppableThread):
        def _run(self) -> None:
            release.wait()

    busy = Busy("busy")
    assert busy.join(0), "it was never started"
    busy.start()
    busy.request_stop()
    assert not busy.join(0)
    release.set()
    assert busy.join(PATIENCE_S)


def test_the_outcome_of_a_task_is_in_its_future() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert Task("task", lambda: 7).future.result(10.0) == 7
    with pytest.raises(KeyError, match="x"):
        Task("task", fail).future.result(10.0)


def test_the_callbacks_of_a_task_have_run_when_it_is_joined() -> None:
    release, done = threading.Event(), []
    task = Task("task", release.wait)
    task.future.add_done_callback(lambda future: done.append((future.result(), threading.current_thread().name)))
    release.set()
    task.join(PATIENCE_S)
    assert done == [(True, "task")]


def test_a_task_that_is_stuck_does_not_hold_up_the_end_of_the_process() -> None:
    script = "import threading; from cesar_mqtt.threads import Task; Task('stuck', threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=PATIENCE_S).returncode == 0


def test_a_thread_that_is_stopped_before_its_start_ends_at_once() -> None:
    sleeper = Sleeper()
    sleeper.stop()
    sleeper.start()
    sleeper.stop(timeout_s=PATIENCE_S)
    assert not sleeper.alive


def test_delays_grow_to_the_longest_and_begin_anew_after_a_reset() -> None:
    backoff = Backoff(1.0, 5.0)
    assert [backoff.next_s() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.next_s() == 1.0
    backoff.jump_to_most()
    assert backoff.next_s() == 5.0


def test_jitter_shortens_a_delay_by_at_most_its_part() -> None:
    delays = [Backoff(8.0, 8.0, jitter=0.5).next_s() for _ in range(200)]
    assert all(4.0 <= delay <= 8.0 for delay in delays)
    assert len(set(delays)) > 1


def test_items_are_yielded_until_a_stop() -> None:
    answers = iter([False, False, True])
    taken: list[int] = []
    with pytest.raises(Cancelled):
        taken.extend(until_stopped(range(5), lambda: next(answers)))
    assert list(until_stopped(range(2), never_stop)) == [0, 1]
    assert next(answers, None) is None


def test_a_wait_ends_when_it_is_ready_or_is_cancelled() -> None:
    ready = threading.Event()
    ready.set()
    wait(ready.wait, lambda: False)
    with pytest.raises(Cancelled):
        wait(ready.wait, lambda: True)
    asked = iter([False, False, True])
    with pytest.raises(Cancelled):
        wait(lambda _: False, lambda: next(asked))


def test_a_wait_for_a_future_gives_its_result_or_its_exception() -> None:
    future: Future[int] = Future()
    with pytest.raises(Cancelled):
        wait_for(future, iter([False, True]).__next__, poll_s=0.001)
    future.set_result(7)
    assert wait_for(future, lambda: False) == 7
    failed: Future[int] = Future()
    failed.set_exception(OSError("no"))
    with pytest.raises(OSError, match="no"):
        wait_for(failed, lambda: False)


def test_a_wait_that_is_never_over_ends_with_its_timeout() -> None:
    with pytest.raises(TimeoutError):
        wait(threading.Event().wait, never_stop, timeout_s=0.05, poll_s=0.01)
    with pytest.raises(TimeoutError):
        wait_for(Future[None](), never_stop, timeout_s=0.0)


def test_what_is_ready_when_the_time_is_up_counts() -> None:
    ready = threading.Event()
    ready.set()
    wait(ready.wait, never_stop, timeout_s=0.0)


def test_a_pause_lasts_as_long_as_it_is_told_and_can_be_cancelled() -> None:
    before = time.monotonic()
    pause(0.05, never_stop)
    assert time.monotonic() - before >= 0.05
    with pytest.raises(Cancelled):
        pause(60.0, lambda: True)
