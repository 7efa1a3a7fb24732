"""Decoding in a process of its own, so that a recording can end no more than its own decoder.

The decoder's process is forked from a template (`decoder_template`), which starts once, ahead of the first file, and
again should it end. The consumer opens the recording, and the decoder gets the open file. Any thread may call
`open_audio`, `start` and `stop`; the readers belong to the thread that opened them.
"""

import atexit
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioInfo, AudioLimits, Samples, TrackChoice
from cesar_mqtt.audio.decoder_template import REQUEST
from cesar_mqtt.audio.frames import HEADER, MAX_BYTES, FrameKind
from cesar_mqtt.audio.growth import GrowthWatch
from cesar_mqtt.audio.paths import io_failed, open_regular
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import never_stop, wait

log = get_logger(__name__)

_ENVIRONMENT = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME"}
)
"""The variables that the template gets: what an interpreter may need, and none that may hold a secret."""
# Fewer threads, fewer arenas of memory: the limit on the address space counts what is reserved, too.
_OWN_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}

_START_S = 60.0
"""How long a template may take to load its libraries, from a slow card, and to fork."""
_STATUS_S = 10.0
"""How long the template may take to report how a decoder ended; one that reads from a dead share ends when it can."""
_STOP_S = 2.0
_STARTS = 2
"""How often a request is sent: the template may have ended since it was used last."""
_PIPE_BYTES = 1 << 20
_IDLE_SHARE = 0.1
"""A decoder without progress that used less of the time than this was waiting for the disk, not computing."""

_CONVERT = "convert the file with another program, to WAV or FLAC, and submit that"
_CRASHED = f"The decoder crashed on this recording ({{signal}}): {_CONVERT}."
_KILLED = f"The decoder of this recording was killed, most often for lack of memory: free some, or {_CONVERT}."
_OUT_OF_MEMORY = (
    f"Decoding this recording needs more memory than `audio.decoder_memory`, {{bytes}} bytes: {_CONVERT}, or raise it."
)
_OUT_OF_TIME = f"Decoding this recording takes more processor time than its length warrants: {_CONVERT}."
_STUCK = f"The decoder made no progress in this recording for {{seconds:g}} s, `audio.decoder_timeout`: {_CONVERT}."
_NO_ANSWER = "no answer for {seconds:g} s, `audio.decoder_timeout`"
_LOST = "The decoder ended without a reason that concerns the recording; the consumer's log may have more: retry."


@dataclass(frozen=True, slots=True)
class _Opened:
    info: AudioInfo
    protections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _State:
    decoded_s: float
    warnings: tuple[str, ...]
    cpu_s: float


@dataclass(frozen=True, slots=True)
class _Failed:
    code: ErrorCode
    message: str


_UNFINISHED = frozenset({ErrorCode.AUDIO_UNREADABLE, ErrorCode.AUDIO_EMPTY, ErrorCode.AUDIO_NO_STREAM})
"""What a file may be while its index, or its first sample, has yet to be written."""
_OPENED, _STATE, _FAILED = TypeAdapter(_Opened), TypeAdapter(_State), TypeAdapter(_Failed)
_KINDS = frozenset(FrameKind)
_MOST_TEXT = 1000


def limits_of(settings: AudioSettings) -> AudioLimits:
    """Return the limits that the settings set."""
    return AudioLimits(
        max_bytes=settings.max_bytes,
        max_duration_s=settings.max_duration,
        decoder_memory_bytes=settings.decoder_memory,
        decoder_timeout_s=settings.decoder_timeout,
        growing_timeout_s=settings.growing_timeout,
    )


@contextmanager
def open_audio(
    path: Path,
    limits: AudioLimits,
    *,
    track: TrackChoice = None,
    channel: int | None = None,
    should_stop: Callable[[], bool] = never_stop,
) -> Iterator["GrowingReader"]:
    """Open a file as `decoder.open_audio` does, in a process of its own. One that is still being written is waited for.

    Args:
        path: absolute and without symbolic links in any part of it.
        limits: on its size and duration, and on the memory and the time of its decoder.
        track: which of its audio tracks.
        channel: the only one of the track's channels that is heard; None: all, mixed.
        should_stop: asked while the file is being opened.

    Raises:
        JobFailedError: as `decoder.open_audio`; `audio_unreadable` also if the decoder crashed or went over a limit.
        Cancelled: `should_stop` returned True.
    """
    with open_regular(path) as descriptor:
        reader = GrowingReader(descriptor, limits, track, channel)
        try:
            reader.open(should_stop)
            yield reader
        finally:
            reader.close()


def start() -> None:
    """Start the template, and return before it has loaded its libraries: the first file need not wait for them."""
    with suppress(OSError):  # `open_audio` meets it again and reports it
        _template.start()


def stop() -> None:
    """End the template, and with it every decoder; may be called twice. A later `open_audio` starts another."""
    _template.stop()


class GrowingReader:
    """A file that may be written while it is decoded: it then is decoded again, and what is new goes on from there.

    For the thread that opened it; `close` ends its process.
    """

    def __init__(self, descriptor: int, limits: AudioLimits, track: TrackChoice, channel: int | None = None) -> None:
        self._descriptor = descriptor
        self._limits = limits
        self._choice = {"track": track, "channel": channel}
        try:
            self._watch = GrowthWatch(descriptor, limits.growing_timeout_s)
        except OSError as exc:
            raise io_failed(exc) from exc
        self._decoder: _Decoder | None = None
        self._reader: RemoteReader | None = None
        self._samples = 0

    def open(self, should_stop: Callable[[], bool]) -> None:
        """Open the file, or the file as it is now. Raises JobFailedError and Cancelled, as `open_audio` does."""
        while True:
            self.close()
            self._decoder = _request(self._descriptor, self._limits, self._choice, should_stop)
            try:
                self._reader = RemoteReader(self._decoder, self._limits, should_stop)
            except JobFailedError as exc:
                if exc.code not in _UNFINISHED or not self._has_grown(should_stop):
                    raise
            else:
                return

    def close(self) -> None:
        """End the process; may be called twice."""
        if self._decoder is not None:
            self._decoder.close()

    @property
    def info(self) -> AudioInfo:
        """What the file declared when it was opened."""
        return self._opened.info

    @property
    def protections(self) -> tuple[str, ...]:
        """The protections that are in force in the process (`confinement.confine`)."""
        return self._opened.protections

    @property
    def decoded_s(self) -> float:
        """Seconds decoded so far."""
        return max(self._opened.decoded_s, self._samples / SAMPLE_RATE)

    @property
    def warnings(self) -> tuple[str, ...]:
        """As in `decoder.AudioReader`, and `audio_changed`: the file grew for too long, or was changed meanwhile."""
        return self._opened.warnings + (("audio_changed",) if self._watch.changed else ())

    def blocks(self, should_stop: Callable[[], bool] = never_stop) -> Iterator[Samples]:
        """Yield the samples, as `RemoteReader.blocks` does, until the file grows no more."""
        while True:
            known = self._samples
            try:
                for block in self._opened.blocks(should_stop):
                    new = block[known:]
                    known -= len(block) - len(new)
                    self._samples += len(new)
                    if len(new):
                        yield new
            except JobFailedError as exc:
                if exc.code not in _UNFINISHED or not self._has_grown(should_stop):
                    raise
            else:
                if not self._has_grown(should_stop):
                    return
            self.open(should_stop)

    @property
    def _opened(self) -> "RemoteReader":
        if self._reader is None:
            raise JobFailedError(ErrorCode.INTERNAL, _LOST)
        return self._reader

    def _has_grown(self, should_stop: Callable[[], bool]) -> bool:
        reader = self._reader
        is_complete = reader is not None and reader.info.duration_s is not None
        is_complete = is_complete and reader is not None and "audio_truncated" not in reader.warnings
        try:
            return self._watch.has_grown(should_stop, is_complete=is_complete)
        except OSError as exc:
            raise io_failed(exc) from exc


class RemoteReader:
    """One file that is decoded in a process of its own, once, from start to end; as `decoder.AudioReader`.

    Attributes:
        info: what the file declares.
        protections: the protections that are in force in the process (`confinement.confine`).
        decoded_s: seconds decoded so far.
        warnings: as in `decoder.AudioReader`.
    """

    def __init__(self, decoder: "_Decoder", limits: AudioLimits, should_stop: Callable[[], bool]) -> None:
        """Wait until the file is open. Raises JobFailedError and Cancelled, as `open_audio` does."""
        self._decoder = decoder
        self._limits = limits
        self.decoded_s = 0.0
        self.warnings: tuple[str, ...] = ()
        self._cpu_s = 0.0
        kind, payload = self._next_frame(should_stop)
        if kind is not FrameKind.OPENED:
            raise self._protocol_error()
        opened: _Opened = self._parse(_OPENED, payload)
        self.info, self.protections = opened.info, opened.protections

    def blocks(self, should_stop: Callable[[], bool] = never_stop) -> Iterator[Samples]:
        """Yield the samples, about ten seconds at a time. The decoder works no more than a block ahead.

        Args:
            should_stop: asked ten times a second while the decoder has nothing ready.

        Raises:
            Cancelled: `should_stop` returned True.
            JobFailedError: as `decoder.AudioReader.blocks`, and if the decoder crashed or went over a limit.
        """
        while True:
            kind, payload = self._next_frame(should_stop)
            if kind is FrameKind.END:
                return
            if kind is FrameKind.SAMPLES:
                yield np.frombuffer(payload, np.float32)
            elif kind is FrameKind.STATE:
                state = self._parse(_STATE, payload)
                self.decoded_s, self.warnings, self._cpu_s = state.decoded_s, state.warnings, state.cpu_s
            else:
                raise self._protocol_error()

    def _next_frame(self, should_stop: Callable[[], bool]) -> tuple[FrameKind, bytearray]:
        deadline = time.monotonic() + self._limits.decoder_timeout_s
        try:
            code, length = HEADER.unpack(self._decoder.read(HEADER.size, deadline, should_stop))
            if length > MAX_BYTES or code not in _KINDS:
                raise self._protocol_error()
            payload = self._decoder.read(length, deadline, should_stop)
        except EOFError:
            raise self._why_ended(self._decoder.wait_status()) from None
        except TimeoutError:
            raise self._why_stuck(self._decoder.kill()) from None
        kind = FrameKind(code)
        if kind is FrameKind.FAILED:
            failed = self._parse(_FAILED, payload)
            raise JobFailedError(failed.code, failed.message[:_MOST_TEXT])
        if kind is FrameKind.BROKEN:
            log.error("Decoding failed: %s", bytes(payload).decode(errors="replace"), action="decoder_failed")
            raise JobFailedError(ErrorCode.INTERNAL, _LOST)
        return kind, payload

    def _parse(self, adapter: TypeAdapter[Any], payload: bytearray) -> Any:
        try:
            return adapter.validate_json(bytes(payload), strict=False)
        except ValidationError:
            raise self._protocol_error() from None

    def _protocol_error(self) -> JobFailedError:
        """A decoder that writes what it never writes has been damaged by the recording, which makes it a crash."""
        self._decoder.kill()
        return self._failed(_CRASHED, signal="it sent nonsense")

    def _why_ended(self, status: "_Status | None") -> JobFailedError:
        if status is None:
            log.warning("The decoder was lost with the process that it comes from", action="decoder_ended")
            return JobFailedError(ErrorCode.INTERNAL, _LOST)
        if status.signal == signal.SIGXCPU:
            return self._failed(_OUT_OF_TIME)
        if status.signal == signal.SIGKILL:
            return self._failed(_KILLED)
        return self._failed(_CRASHED, signal=_signal_name(status.signal))

    def _why_stuck(self, status: "_Status | None") -> JobFailedError:
        timeout_s = self._limits.decoder_timeout_s
        if status is None or status.cpu_s - self._cpu_s < _IDLE_SHARE * timeout_s:
            return io_failed(TimeoutError(0, _NO_ANSWER.format(seconds=timeout_s)))
        return self._failed(_STUCK, seconds=timeout_s)

    def _failed(self, sentence: str, **values: Any) -> JobFailedError:
        message = sentence.format(**values)
        log.warning("%s", message, action="decoder_ended")
        return JobFailedError(ErrorCode.AUDIO_UNREADABLE, message)


@dataclass(frozen=True, slots=True)
class _Status:
    """How a decoder ended.

    Attributes:
        signal: the signal that ended it; 0: none.
        cpu_s: seconds of processor time that it used.
    """

    signal: int
    cpu_s: float


class _Decoder:
    """The process that decodes one file, as the consumer sees it. For one thread.

    Attributes:
        pid: of the process; it is never signalled by it, for the template may have reaped it.
        channel: to the template that was asked for it.
    """

    def __init__(self, control: socket.socket, frames: int, channel: socket.socket) -> None:
        self.pid = 0
        self.channel = channel
        self._control = control
        self._frames = frames
        self._buffered = b""

    def wait_forked(self, should_stop: Callable[[], bool]) -> None:
        """Wait until the template has forked it.

        Raises:
            EOFError: the template has ended.
            TimeoutError: it does not answer.
            OSError: the system has no room for another process.
            Cancelled: `should_stop` returned True.
        """
        answer = self._read_answer(time.monotonic() + _START_S, should_stop)
        if "error" in answer:
            raise OSError(answer["error"], os.strerror(answer["error"]))
        self.pid = answer["pid"]

    def read(self, size: int, deadline: float, should_stop: Callable[[], bool]) -> bytearray:
        """Read from the pipe. Raises EOFError, TimeoutError and Cancelled."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            _wait_readable(self._frames, deadline, should_stop)
            count = os.readv(self._frames, [view])
            if count == 0:
                raise EOFError
            view = view[count:]
        return buffer

    def kill(self) -> _Status | None:
        """Have the process killed; return how it ended, or None if that takes its time, or the template has ended."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        return self.wait_status()

    def wait_status(self) -> _Status | None:
        """Wait until the process has ended; None: see `kill`."""
        try:
            answer = self._read_answer(time.monotonic() + _STATUS_S, never_stop)
            return _Status(answer["signal"], answer["cpu_s"])
        except (EOFError, TimeoutError, OSError):
            return None

    def close(self) -> None:
        """Have the process killed if it still runs, and close the connection to it; may be called twice."""
        self._control.close()
        if self._frames >= 0:
            os.close(self._frames)
            self._frames = -1

    def _read_answer(self, deadline: float, should_stop: Callable[[], bool]) -> dict[str, Any]:
        while b"\n" not in self._buffered:
            _wait_readable(self._control.fileno(), deadline, should_stop)
            received = self._control.recv(4096)
            if not received:
                raise EOFError
            self._buffered += received
        line, _, self._buffered = self._buffered.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Template:
    """The process that decoders are forked from. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> None:
        """Start it unless it runs. Raises OSError."""
        with self._lock:
            self._start()

    def request(self, descriptor: int, request: bytes) -> _Decoder:
        """Have a decoder forked for an open file; the caller closes the descriptor, and the decoder. Raises OSError."""
        with self._lock:
            channel = self._start()
            ours, theirs = socket.socketpair()
            reader = writer = -1
            try:
                reader, writer = os.pipe()
                _enlarge(writer)
                message = REQUEST.pack(len(request)) + request
                sent = socket.send_fds(channel, [message], [descriptor, writer, theirs.fileno()])
                channel.sendall(message[sent:])
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has ended: `wait_forked` finds no decoder
            except BaseException:
                ours.close()
                _close(reader)
                raise
            finally:
                theirs.close()
                _close(writer)
            return _Decoder(ours, reader, channel)

    def discard(self, channel: socket.socket) -> None:
        """End the one that the channel leads to, whatever it is doing; the next request starts another."""
        with self._lock:
            if self._channel is channel and self._process is not None:
                self._process.kill()
                log.warning("The process that decoders are forked from has ended; starting it again", action="decoder")
                self._end()

    def stop(self) -> None:
        """End it, and with it every decoder."""
        with self._lock:
            self._end()

    def _start(self) -> socket.socket:
        if self._channel is not None and self._process is not None and self._process.poll() is None:
            return self._channel
        self._end()
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT}
        environment |= _OWN_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))}
        command = [sys.executable, "-P", "-m", "cesar_mqtt.audio.decoder_template", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the consumer, which finishes its job first
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = ours
        return ours

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _request(
    descriptor: int, limits: AudioLimits, choice: Mapping[str, TrackChoice], should_stop: Callable[[], bool]
) -> _Decoder:
    """Have a decoder forked. Raises JobFailedError and Cancelled."""
    out_of_memory = _OUT_OF_MEMORY.format(bytes=limits.decoder_memory_bytes)
    request = json.dumps({"limits": asdict(limits), **choice, "out_of_memory": out_of_memory}).encode()
    for _ in range(_STARTS):
        try:
            decoder = _template.request(descriptor, request)
        except OSError as exc:  # no descriptor, process or memory is left: nothing is known of the file
            raise io_failed(exc) from exc
        try:
            decoder.wait_forked(should_stop)
        except (EOFError, ConnectionResetError, TimeoutError):
            decoder.close()
            _template.discard(decoder.channel)
        except OSError as exc:
            decoder.close()
            raise io_failed(exc) from exc
        except BaseException:
            decoder.close()
            raise
        else:
            return decoder
    log.error("The process that decoders are forked from does not start; see standard error", action="decoder")
    raise JobFailedError(ErrorCode.INTERNAL, _LOST)


def _wait_readable(descriptor: int, deadline: float, should_stop: Callable[[], bool]) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    wait(lambda step_s: bool(poll.poll(step_s * 1000)), should_stop, timeout_s=deadline - time.monotonic())


def _enlarge(pipe: int) -> None:
    """Let the decoder write a whole block before it has to wait (Linux; otherwise it just waits more often)."""
    with suppress(AttributeError, OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_template = _Template()
atexit.register(stop)
