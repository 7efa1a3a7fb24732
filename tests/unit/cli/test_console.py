"""What is written where stdout and stderr are not what they should be."""

import errno
import io
import sys

import pytest

from cesar_mqtt.cli import console as terminal


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Left(io.StringIO):
    """A pipe without a reader."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError


def test_what_the_person_cannot_be_told_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    terminal.print_message("hello")
    terminal.flush()


def test_a_product_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(terminal.OutputError, match="No space left"):
        terminal.out("hello")
    with pytest.raises(terminal.OutputError, match="No space left"):
        terminal.flush()


def test_a_reader_that_has_left_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Left())
    with pytest.raises(BrokenPipeError):
        terminal.out("hello")
