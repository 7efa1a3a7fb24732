"""What every thread of the consumer is made of: a thread that can be stopped, delays between attempts, one wait."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from typing import Generic, TypeVar

from cesar_mqtt.errors import Cancelled

T = TypeVar("T")

_POLL_S = 0.1
"""How often a wait asks whether it is to end: a cancel takes effect within this."""


class StoppableThread:
    """One named daemon thread. Any thread may call `start`, `stop` and `alive`.

    A subclass implements `_run`, which returns soon after `_stopping` is set; that event is never cleared.
    """

    def __init__(self, name: str) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the thread to end and return at once; may be called twice, and before `start`."""
        self._stopping.set()
        self._wake()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread to end, at most `timeout_s`; True: it has ended, or was never started.

        The thread itself may call it, and is not waited for.
        """
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self, timeout_s: float | None = None) -> None:
        """Ask the thread to end and wait for it, at most `timeout_s`; may be called twice, and before `start`."""
        self.request_stop()
        self.join(timeout_s)

    def _wake(self) -> None:
        """End whatever the thread waits for, so that it looks at `_stopping`."""

    def _run(self) -> None:
        raise NotImplementedError


class Task(Generic[T]):
    """One call in a daemon thread of its own, started at once. Any thread may use it.

    `ThreadPoolExecutor` would do, but the interpreter joins its threads at exit: one that is stuck in a name look-up or
    on a silent server would hold up the end of the process.

    Attributes:
        future: the outcome; its callbacks run in the task's thread.
    """

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; it outlives `future` by the callbacks."""
        return self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread to end, the callbacks of `future` included."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            result = self._work()
        except BaseException as exc:  # noqa: BLE001 - the caller gets it from `future`
            self.future.set_exception(exc)
        else:
            self.future.set_result(result)


class Backoff:
    """Delays between attempts: each `factor` times as long as the one before, up to `most_s`. For one thread.

    Attributes:
        most_s: the longest delay.
    """

    def __init__(self, first_s: float, most_s: float, *, factor: float = 2.0, jitter: float = 0.0) -> None:
        """Start with a delay of `first_s`; each is shortened by a random part of at most `jitter` (0 to 1) of it.

        Jitter keeps clients that were hit by one failure from trying again in step.
        """
        self.most_s = most_s
        self._first_s = first_s
        self._factor = factor
        self._jitter = jitter
        self._next_s = first_s

    def next_s(self) -> float:
        """Return the seconds to wait now, and lengthen the next delay."""
        delay_s = self._next_s
        self._next_s = min(self.most_s, delay_s * self._factor)
        return delay_s * random.uniform(1.0 - self._jitter, 1.0)  # noqa: S311 - it spreads attempts, it guards nothing

    def reset(self) -> None:
        """Begin with the first delay again: an attempt has succeeded."""
        self._next_s = self._first_s

    def jump_to_most(self) -> None:
        """Make the next delay the longest: trying again soon cannot help."""
        self._next_s = self.most_s


def never_stop() -> bool:
    """The `should_stop` of callers that always want the result."""
    return False


def until_stopped(items: Iterable[T], should_stop: Callable[[], bool]) -> Iterator[T]:
    """Yield the items. Raises Cancelled as soon as `should_stop`, asked before each of them, returns True."""
    for item in items:
        if should_stop():
            raise Cancelled
        yield item


def wait(
    ready: Callable[[float], bool],
    should_stop: Callable[[], bool],
    *,
    timeout_s: float = math.inf,
    poll_s: float = _POLL_S,
) -> None:
    """Wait until `ready` returns True.

    Args:
        ready: waits for at most the seconds it is given and returns whether the wait is over, as `Event.wait` does.
        should_stop: asked before each call of `ready`.
        timeout_s: the longest wait.
        poll_s: how often `should_stop` is asked.

    Raises:
        Cancelled: `should_stop` returned True first.
        TimeoutError: `timeout_s` has passed; `ready` was called at least once.
    """
    deadline = time.monotonic() + timeout_s
    while not should_stop():
        if ready(max(0.0, min(poll_s, deadline - time.monotonic()))):
            return
        if time.monotonic() >= deadline:
            raise TimeoutError
    raise Cancelled


def wait_for(
    future: "Future[T]",
    should_stop: Callable[[], bool],
    *,
    timeout_s: float = math.inf,
    poll_s: float = _POLL_S,
) -> T:
    """Wait as `wait` does for a future; return its result or raise its exception."""
    wait(lambda step_s: bool(wait_for_futures([future], step_s).done), should_stop, timeout_s=timeout_s, poll_s=poll_s)
    return future.result()


def pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    """Let time pass. Raises Cancelled as soon as `should_stop` returns True."""
    with suppress(TimeoutError):
        wait(threading.Event().wait, should_stop, timeout_s=seconds)
