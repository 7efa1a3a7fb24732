"""Work on several items at once, with the results in the order of the items, as if it were done one after the other."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Generic, TypeVar

from cesar_mqtt.threads import Task

Item = TypeVar("Item")
Result = TypeVar("Result")


class OrderedWork(Generic[Item, Result]):
    """Several threads, each of which takes the next item and works on it; one other thread takes the results.

    Owns the threads "transcriber-1" and so on. Only the thread that made it may iterate over it, once, and close it.
    """

    def __init__(
        self,
        items: Iterator[Item],
        work: Callable[[Item], Generator[Result, None, None]],
        *,
        threads: int,
        limit: Callable[[], int],
    ) -> None:
        """Start the threads.

        Args:
            items: taken by all threads, one at a time.
            work: yields the results of an item; called by all threads at once.
            threads: how many there are.
            limit: how many items may be worked on at once now, those included whose results have not been taken. Asked
                by all threads, one at a time, when an item could be taken, and again after each result.
        """
        self._items = items
        self._work = work
        self._limit = limit
        self._turn = threading.Lock()
        """Held by the thread that takes an item: items come in order, and iterators are not thread-safe."""
        self._changed = threading.Condition()
        """Guards the next three, and the outputs."""
        self._outputs: deque[_Output[Item, Result]] = deque()
        self._in_work = 0
        self._ended = False
        self._tasks = [Task(f"transcriber-{number}", self._run) for number in range(1, threads + 1)]

    def __iter__(self) -> Iterator[tuple[Item, Iterator[Result]]]:
        """Yield each item, when its turn comes, with its results, which are yielded as soon as they are there.

        All results have to be taken before the next item. An exception of `items` or `work` is raised in its place
        among the results; no further item is taken once there was one.
        """
        while (output := self._next_output()) is not None:
            if output.item is None:
                raise output.error or RuntimeError("an item is missing")
            yield output.item, self._results(output)
            with self._changed:
                self._in_work -= 1
                self._changed.notify_all()

    def finish(self) -> None:
        """Take no further item; those that were begun are finished."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take no further item, and wait for the threads; may be called twice.

        A caller that wants to wait less makes `items` and `work` raise something first.
        """
        self.finish()
        for task in self._tasks:
            task.join()

    def _next_output(self) -> "_Output[Item, Result] | None":
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self._ended)
            return self._outputs.popleft() if self._outputs else None

    def _results(self, output: "_Output[Item, Result]") -> Iterator[Result]:
        while True:
            with self._changed:
                self._changed.notify_all()  # the result before may have changed the limit
                self._changed.wait_for(lambda: output.results or output.ended)
                if not output.results:
                    break
                result = output.results.popleft()
            yield result
        if output.error is not None:
            raise output.error

    # -- the threads

    def _run(self) -> None:
        while (output := self._take_item()) is not None:
            self._work_on(output)

    def _take_item(self) -> "_Output[Item, Result] | None":
        with self._turn:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._in_work < self._limit())
                if self._ended:
                    return None
            output: _Output[Item, Result] = _Output()
            try:
                output.item = next(self._items, None)
            except BaseException as exc:  # noqa: BLE001 - the thread that takes the results gets it
                output.error = exc
            with self._changed:
                if self._ended or (output.item is None and output.error is None):
                    self._ended = True
                else:
                    self._outputs.append(output)
                    self._in_work += 1
                    self._ended = output.error is not None
                self._changed.notify_all()
                return None if self._ended else output

    def _work_on(self, output: "_Output[Item, Result]") -> None:
        error: BaseException | None = None
        try:
            if output.item is not None:
                with closing(self._work(output.item)) as results:
                    for result in results:
                        with self._changed:
                            output.results.append(result)
                            self._changed.notify_all()
        except BaseException as exc:  # noqa: BLE001 - as above
            error = exc
        with self._changed:
            output.error, output.ended = error, True
            self._ended = self._ended or error is not None
            self._changed.notify_all()


class _Output(Generic[Item, Result]):
    """One item that was begun.

    Attributes:
        item: None: it could not be taken, because of `error`.
        results: those that have not been taken yet.
        ended: whether there will be no further ones.
        error: what ended the work, or the attempt to take the item.
    """

    def __init__(self) -> None:
        self.item: Item | None = None
        self.results: deque[Result] = deque()
        self.ended = False
        self.error: BaseException | None = None
