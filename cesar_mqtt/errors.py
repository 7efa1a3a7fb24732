"""The errors of the package: one root, few leaves, data as attributes.

A message names what happened, the value, and what to do. Users see it as it is, so it never holds a secret, a traceback
or a path outside the allowed directories.
"""

import difflib
import re
from collections.abc import Iterable
from enum import IntEnum, StrEnum

_COMPARED_CHARACTERS = 64
_SEPARATORS = re.compile(r"[\W_]+")


class ExitCode(IntEnum):
    """The exit codes of the commands (the high ones are those of sysexits.h)."""

    OK = 0
    FAILED = 1
    """`submit`: at least one job did not complete; the commands that ask a consumer: it refused."""
    USAGE = 2
    TIMEOUT = 3
    """`submit`: the time ran out before every job was final; all that ask: no broker there, or no answer in time."""
    UNACKNOWLEDGED = 69
    """`serve` stopped in order, but the broker did not acknowledge every status in time; the next start goes on."""
    LEDGER_FAILED = 74
    LEDGER_IN_USE = 75
    CONFIG = 78
    """Wrong configuration, or the broker refused the credentials."""
    INTERRUPTED = 130
    TERMINATED = 143


class ErrorCode(StrEnum):
    """Why a job ended without a transcript; the `error_code` of its status."""

    INVALID_REQUEST = "invalid_request"
    AUDIO_NOT_FOUND = "audio_not_found"
    AUDIO_NOT_ALLOWED = "audio_not_allowed"
    AUDIO_IO_ERROR = "audio_io_error"
    AUDIO_UNREADABLE = "audio_unreadable"
    AUDIO_NO_STREAM = "audio_no_stream"
    AUDIO_EMPTY = "audio_empty"
    AUDIO_TOO_LARGE = "audio_too_large"
    AUDIO_TOO_LONG = "audio_too_long"
    DOWNLOAD_FAILED = "download_failed"
    MODEL_UNAVAILABLE = "model_unavailable"
    TIMEOUT = "timeout"
    EXPIRED = "expired"
    CRASHED = "crashed"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later without being changed."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        ErrorCode.AUDIO_IO_ERROR,
        ErrorCode.DOWNLOAD_FAILED,
        ErrorCode.MODEL_UNAVAILABLE,
        ErrorCode.TIMEOUT,
        ErrorCode.EXPIRED,
        ErrorCode.CRASHED,
        ErrorCode.INTERNAL,
    }
)


class CesarError(Exception):
    """The root of every error that this package raises on purpose; as text it is the problem, then the advice.

    Attributes:
        problem: what happened, with the value, as sentences.
        advice: what to do; "" where the problem includes it, or where there is nothing to do.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem} {advice}" if advice else problem)
        self.problem = problem
        self.advice = advice


class ConfigError(CesarError):
    """A setting is wrong, unknown or contradicts another; the message names it."""

    exit_code = ExitCode.CONFIG


def lacks(error: ModuleNotFoundError, *libraries: str) -> bool:
    """Whether an import has failed because one of these libraries, which an extra brings, is not installed."""
    return (error.name or "").partition(".")[0] in libraries


class BrokerRefusedError(CesarError):
    """The broker refuses the connection (credentials, client id, protocol): trying again cannot help.

    Attributes:
        reason_code: that of CONNACK, DISCONNECT or SUBACK, as MQTT 5 numbers them; None where there is none.
    """

    exit_code = ExitCode.CONFIG

    def __init__(self, problem: str, advice: str = "", *, reason_code: int | None = None) -> None:
        super().__init__(problem, advice)
        self.reason_code = reason_code


class ThreadDiedError(CesarError):
    """A thread of the consumer has ended by itself: the process has to be started again."""


class LedgerError(CesarError):
    """The ledger cannot be read or written."""

    exit_code = ExitCode.LEDGER_FAILED


class SpoolFullError(LedgerError):
    """The spool has no room for uploaded audio until a job has ended, or the disk has more room.

    Attributes:
        needed_bytes: the size of the audio.
    """

    def __init__(self, problem: str, advice: str = "", *, needed_bytes: int) -> None:
        super().__init__(problem, advice)
        self.needed_bytes = needed_bytes


class UploadRefusedError(LedgerError):
    """The file system does not take a file, whose size it does not allow, or which is over a quota with others.

    Attributes:
        index: the number of the file among those that were to be stored; if it is 0, the file never fits.
    """

    def __init__(self, problem: str, advice: str = "", *, index: int) -> None:
        super().__init__(problem, advice)
        self.index = index


class LedgerInUseError(CesarError):
    """Another consumer holds the ledger's lock."""

    exit_code = ExitCode.LEDGER_IN_USE


class JobFailedError(CesarError):
    """A job cannot be completed; the worker records it as `error` and goes on.

    Attributes:
        code: the `error_code` of the job's status.
        message: one sentence for the producer, with what to do.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """The work was ended because its result is no longer wanted; what it had is dropped."""


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """The work was ended at a window boundary for a more urgent job; its finished windows are kept."""


def bare_name(name: str) -> str:
    """Return a name without what is written differently by different programs: case and separators."""
    return _SEPARATORS.sub("", name[:_COMPARED_CHARACTERS]).casefold()


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that a mistyped name most probably means; None: none is near."""
    by_bare_name = {bare_name(each): each for each in reversed(tuple(names))}
    found = difflib.get_close_matches(bare_name(name), by_bare_name, n=1)
    return by_bare_name[found[0]] if found else None
