"""The log: the format of a line, the levels of the loggers, and the logger that every module uses.

The main thread calls `configure` before other threads start; any thread may log. The caller keeps secrets out of what
it logs. What looks like one in a URL is taken out here all the same: exceptions of other packages quote URLs.
"""

import json
import logging
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from cesar_mqtt.redaction import redact_sentence

_OURS = "cesar_mqtt"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


_MAX_WAITING_LINES = 10_000
_LOGGING_ARGUMENTS = frozenset({"exc_info", "stack_info", "stacklevel"})


def configure(
    format: Literal["text", "json"],  # noqa: A002 - it is called as the setting is
    level: Literal["debug", "info", "warning", "error"],
    stream: TextIO | None = None,
    *,
    queued: bool = False,
) -> None:
    """Send all loggers to one stream in one format; calling it again replaces what an earlier call set up.

    The loggers of other packages log from WARNING on, and with `debug` from DEBUG on.

    Args:
        format: `text` for people, `json` for programs (one object a line).
        level: the lowest level that this package's own loggers log.
        stream: where to write; None: standard error.
        queued: whether a thread writes, so that a stream that blocks does not block the thread that logs; `close` ends
            it.
    """
    handler = _QueuedHandler(stream or sys.stderr) if queued else _Handler(stream)
    handler.set_name(_OURS)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    # A library may give its own logger a level, which then no longer asks the root: the handler has the last word.
    handler.setLevel(_LEVELS[level])
    root = logging.getLogger()
    for former in [former for former in root.handlers if former.name == _OURS]:
        root.removeHandler(former)
        former.close()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if level == "debug" else max(_LEVELS[level], logging.WARNING))
    logging.getLogger(_OURS).setLevel(_LEVELS[level])
    # At DEBUG amqtt writes out every packet: passwords, and whole recordings.
    logging.getLogger("amqtt").setLevel(logging.INFO if level == "debug" else logging.NOTSET)
    logging.captureWarnings(capture=True)


def close(last_line: str = "", timeout_s: float = 2.0) -> None:
    """Write a last line, as it is, and what is queued; a stream that blocks is given so many seconds."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _QueuedHandler):
            handler.finish(last_line, timeout_s)
            return
    if last_line:
        with suppress(OSError):
            print(last_line, file=sys.stderr, flush=True)  # noqa: T201 - no log is set up


def adopt(name: str) -> None:
    """Take away the handlers and the level that a library gave its own logger when it was imported.

    huggingface_hub does so; without this its lines come out twice, once in a format that is not ours. Call it after
    the import that does it: of huggingface_hub.file_download, which that package puts off to the first download.
    """
    logger = logging.getLogger(name)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


class Log(logging.LoggerAdapter[logging.Logger]):
    """A module's logger, whose methods take a stable word for programs and the job that a line is about.

    `log.info("Job started, attempt %d", 2, action="started", job_id="porch-17")`. Any further keyword is a field of its
    own, written in the JSON format only. `%s` in the message takes the arguments when the line is written.
    """

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[object, MutableMapping[str, Any]]:
        """Move what `logging` does not know into the record's `action`, `job_id` and `fields`."""
        known = {name: kwargs.pop(name) for name in _LOGGING_ARGUMENTS & kwargs.keys()}
        extra = {"action": kwargs.pop("action", None), "job_id": kwargs.pop("job_id", None), "fields": dict(kwargs)}
        return msg, {**known, "extra": extra}


def get_logger(name: str) -> Log:
    """Return the logger of the module `name`."""
    return Log(logging.getLogger(name))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines; a line that cannot be written, to a closed pipe or a full disk, is dropped."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Let a line go that cannot be written; anything else is a mistake that should be seen."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _LogWriter:
    """Owns the thread `log`, which writes lines to a descriptor; any thread may call the methods, which never wait.

    A line that cannot be written, to a closed pipe or a full disk, is dropped. The thread is a daemon: blocked in a
    write, it does not hold up the end of the process.
    """

    def __init__(self, descriptor: int, *, max_waiting: int = _MAX_WAITING_LINES) -> None:
        """Start the thread; at most `max_waiting` lines wait to be written."""
        self._descriptor = descriptor
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> bool:
        """Enqueue a line; False: too many are waiting, and it is dropped."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append(f"{line}\n".encode(errors="backslashreplace"))
            self._changed.notify_all()
            return True

    @property
    def has_room(self) -> bool:
        """Whether a few more lines can be enqueued."""
        return len(self._waiting) < self._max_waiting - 1

    def close(self, timeout_s: float) -> None:
        """Write what is waiting, for at most so long; may be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while lines := self._take():
            for line in lines:
                self._write(line)

    def _take(self) -> list[bytes]:
        """Wait for lines and return them; none: the writer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            lines = list(self._waiting)
            self._waiting.clear()
            return lines

    def _write(self, line: bytes) -> None:
        # Not through `sys.stderr`: at its exit the interpreter would wait for the lock of that stream.
        with suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]


class _QueuedHandler(logging.Handler):
    """Hands lines to a thread that writes them, and logs how many were dropped meanwhile."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._writer = _LogWriter(stream.fileno())
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Format a line in the calling thread, and enqueue it."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - as in every handler of `logging`
            self.handleError(record)
            return
        if self._dropped and self._writer.has_room:
            dropped, self._dropped = self._dropped, 0
            message = "The log could not be written in time: dropped %d lines"
            get_logger(__name__).warning(message, dropped, action="log_dropped")  # comes back here
        self._dropped += not self._writer.add(line)

    def finish(self, last_line: str, timeout_s: float) -> None:
        """Write a last line and what is queued, for at most so long."""
        if last_line:
            self._writer.add(last_line)
        self._writer.close(timeout_s)

    def close(self) -> None:
        """End the thread once everything is written."""
        self._writer.close(0.0)
        super().close()


class TextFormatter(logging.Formatter):
    """One line for people: local time, level, message, job; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the line, without its end."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        job_id = getattr(record, "job_id", None)
        job = f" (job {job_id})" if job_id else ""
        message = redact_sentence(record.getMessage()).rstrip()
        line = _printable(f"{time} {record.levelname.lower():<7} {message}{job}")
        if not record.exc_info:
            return line
        traceback = redact_sentence(self.formatException(record.exc_info)).splitlines()
        return "\n".join([line, *(f"    {_printable(part)}" for part in traceback)])


class JsonFormatter(logging.Formatter):
    """One JSON object for programs: UTC time, level, logger, message; action, job_id and exception if there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the object, in ASCII and without a line end."""
        time = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact_sentence(record.getMessage()),
        }
        for name in ("action", "job_id"):
            if (value := getattr(record, name, None)) is not None:
                line[name] = str(value)
        if record.exc_info:
            line["exception"] = redact_sentence(self.formatException(record.exc_info))
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line |= {str(name): _plain(value) for name, value in fields.items() if name not in line}
        return json.dumps(line, allow_nan=False)


def _printable(text: str) -> str:
    """Escape what would break the line or steer a terminal: file names and payloads come from outside."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _plain(value: object) -> object:
    """Make any value one that JSON takes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else redact_sentence(str(value))
