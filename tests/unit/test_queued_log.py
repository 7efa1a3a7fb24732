"""The log of `serve`: lines go through a thread, and a reader that does not read blocks nothing."""

import fcntl
import functools
import os
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from cesar_mqtt import logs
from tests.conftest import PATIENCE_S

OURS = logs.get_logger("cesar_mqtt.consumer.worker")


class Pipe:
    """A pipe that holds 4 KiB, and is read only when `read` is called."""

    def __init__(self) -> None:
        self._reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        self.stream: TextIO = os.fdopen(writing, "w")
        self._read: list[bytes] = []
        self._reader = threading.Thread(target=self._run)

    def read(self) -> None:
        self._reader.start()

    def _run(self) -> None:
        while data := os.read(self._reading, 65_536):
            self._read.append(data)

    @property
    def text(self) -> str:
        return b"".join(self._read).decode()

    def close(self) -> None:
        if self.stream.closed:
            return
        self.stream.close()
        if self._reader.ident is not None:
            self._reader.join()
        os.close(self._reading)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    logs.configure("text", "info")
    pipe.close()


def test_what_is_logged_is_written_until_the_log_is_closed(pipe: Pipe) -> None:
    logs.configure("text", "info", pipe.stream, queued=True)
    OURS.info("first")
    OURS.warning("odd \udc80")
    pipe.read()
    logs.close("the last line")
    pipe.close()
    first, second, last = pipe.text.splitlines()
    assert first.endswith(" first")
    assert second.endswith(" odd \\udc80")
    assert last == "the last line"


def test_a_pipe_that_is_not_read_blocks_no_thread_and_what_is_dropped_is_counted(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_LogWriter", functools.partial(logs._LogWriter, max_waiting=10))
    logs.configure("text", "info", pipe.stream, queued=True)
    for number in range(100):
        OURS.info("%d %s", number, "x" * 1000)

    pipe.read()
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while "dropped" not in pipe.text and time.monotonic() < deadline:
        OURS.info("again")
        pause.wait(0.01)
    assert "The log could not be written in time: dropped " in pipe.text
