"""The log: how a line looks, which loggers are heard, and the one helper that modules log through.

The main thread calls `configure` before other threads start; any thread may call `event`. Nothing is filtered out
here: a secret is kept out of the log by whoever would have logged it.
"""

import json
import logging
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

_OURS = "cesar_mqtt"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(
    format: Literal["text", "json"],  # noqa: A002 - it is called as the setting is
    level: Literal["debug", "info", "warning", "error"],
    stream: TextIO | None = None,
) -> None:
    """Send all loggers to one stream in one format; calling it again replaces what an earlier call set up.

    Other packages' loggers are heard from WARNING on, and with `debug` from DEBUG on.

    Args:
        format: `text` for people, `json` for programs (one object a line).
        level: from which level on this package's own loggers are heard.
        stream: where to write; None: standard error.
    """
    handler = _Handler(stream)
    handler.set_name(_OURS)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    # A library may give its own logger a level, which then no longer asks the root: the handler has the last word.
    handler.setLevel(_LEVELS[level])
    root = logging.getLogger()
    for former in [former for former in root.handlers if former.name == _OURS]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if level == "debug" else max(_LEVELS[level], logging.WARNING))
    logging.getLogger(_OURS).setLevel(_LEVELS[level])
    # At DEBUG amqtt writes out every packet: passwords, and whole recordings.
    logging.getLogger("amqtt").setLevel(logging.INFO if level == "debug" else logging.NOTSET)
    logging.captureWarnings(capture=True)


def adopt(name: str) -> None:
    """Take away the handlers and the level that a library gave its own logger when it was imported.

    huggingface_hub does so; without this its lines come out twice, once in a format that is not ours. Call it after
    the import that does it: of huggingface_hub.file_download, which that package puts off to the first download.
    """
    logger = logging.getLogger(name)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def event(
    logger: logging.Logger,
    level: int,
    action: str,
    message: str,
    /,
    *args: object,
    job_id: str | None = None,
    exc_info: bool | BaseException | None = None,
    **fields: object,
) -> None:
    """Log one thing that happened.

    Args:
        logger: the module's own.
        level: as in `logging`.
        action: a stable word for programs, such as `job_started`.
        message: for people; `%s` in it takes `args`, and only when the line is written.
        args: what stands in the message.
        job_id: the job it is about.
        exc_info: the exception whose traceback belongs to it, or True for the current one.
        fields: further values, seen in the JSON format only.
    """
    extra = {"action": action, "job_id": job_id, "fields": fields}
    logger.log(level, message, *args, exc_info=exc_info, extra=extra, stacklevel=2)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines; where they cannot be written, as nobody reads them or the disk is full, the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Let a line go that cannot be written; anything else is a mistake that should be seen."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class TextFormatter(logging.Formatter):
    """One line for people: local time, level, message, job; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Write the line, without its end."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        job_id = getattr(record, "job_id", None)
        job = f" (job {job_id})" if job_id else ""
        line = _printable(f"{time} {record.levelname.lower():<7} {record.getMessage().rstrip()}{job}")
        if not record.exc_info:
            return line
        traceback = self.formatException(record.exc_info).splitlines()
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
            "message": record.getMessage(),
        }
        for name in ("action", "job_id"):
            if (value := getattr(record, name, None)) is not None:
                line[name] = str(value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
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
    return value if value is None or isinstance(value, str | int) else str(value)
