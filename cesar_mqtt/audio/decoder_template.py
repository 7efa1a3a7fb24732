"""The process that decoders are forked from: it has loaded FFmpeg and numpy, and holds nothing of the consumer's.

Started by `decoder_process` as `python -m cesar_mqtt.audio.decoder_template FD`. It is single-threaded. On the socket
FD it gets requests, each with three descriptors: the recording, the pipe for the frames, and a socket of its own for
that decoder. Each goes to a child, which was forked ahead. The template writes on that socket first the child's process
id and, once it has ended, how. When the consumer closes the socket, the child is killed. When FD is closed, everything
ends.
"""

import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
import wave
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

# PyAV imports these for the first file with subtitles, which a decoder could not: it can open no file.
import av.subtitles.codeccontext
import av.subtitles.stream  # noqa: F401

from cesar_mqtt.audio.confinement import address_space_bytes, confine, end_with, extend_cpu, prepare
from cesar_mqtt.audio.decoder import AudioLimits, AudioReader, Samples, open_descriptor
from cesar_mqtt.audio.frames import HEADER, MAX_BYTES, FrameKind, encode
from cesar_mqtt.errors import JobFailedError

REQUEST = struct.Struct("=I")
"""The length of the JSON that follows; the descriptors come with it."""
DESCRIPTORS = 3

_SIGN_OF_LIFE_S = 0.5
_BYTES_PER_CPU_S = 1 << 20
"""How much of a file is read, at least, in a second of processor time."""
_MOST_TEXT = 4000


class Template:
    """Forks decoders, one for each request, and buries them. Only for the main thread.

    Attributes:
        channel: the socket for requests.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._pid = os.getpid()
        self._has_bytes = address_space_bytes()
        self._protections = prepare()
        self._children: dict[int, socket.socket] = {}
        self._spare: tuple[int, socket.socket] | None = None
        """A decoder that is ready for the next file: forking one takes as long as decoding a short clip."""
        # What `set_wakeup_fd` writes to, for every signal, so that the end of a child ends the wait.
        self._wakeup, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup, self._wakeup_writer):
            end.settimeout(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the consumer decides when it ends
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the consumer closes the channel."""
        self._fork_spare()
        while self._run_once():
            pass
        for pid in (*self._children, *([self._spare[0]] if self._spare else [])):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # a stop leaves no process behind
            while True:
                os.wait()

    def _run_once(self) -> bool:
        poll = select.poll()
        for readable in (self.channel, self._wakeup, *self._children.values()):
            poll.register(readable, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        for pid, control in self._children.items():
            if control.fileno() in ready:  # the consumer never writes there, so it has closed it
                os.kill(pid, signal.SIGKILL)
        self._reap()
        return self.channel.fileno() not in ready or self._accept()

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            self._wakeup.recv(4096)
        with suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return
                number, cpu_s = max(0, -os.waitstatus_to_exitcode(status)), usage.ru_utime + usage.ru_stime
                if self._spare is not None and pid == self._spare[0]:
                    self._spare[1].close()
                    self._spare = None
                elif pid in self._children:  # else it ended just before it was to get its file
                    _answer(self._children[pid], signal=number, cpu_s=cpu_s)
                    self._children.pop(pid).close()
                    self._fork_spare()

    def _accept(self) -> bool:
        """Receive a request and hand it to a decoder; False: the channel is closed."""
        received = _receive(self.channel, DESCRIPTORS)
        if received is None:
            return False
        text, (audio, frames, control) = received
        connection = socket.socket(fileno=control)
        try:
            pid = self._hand_over(text, audio, frames)
        except OSError as exc:
            _answer(connection, error=exc.errno)
            connection.close()
        else:
            self._children[pid] = connection
            _answer(connection, pid=pid)
        os.close(audio)
        os.close(frames)
        return True

    def _hand_over(self, text: bytes, audio: int, frames: int) -> int:
        """Give a file to the spare decoder, or to a new one; return its process id. Raises OSError."""
        spare, self._spare = self._spare, None
        pid, connection = spare or self._fork()
        with connection:
            try:
                socket.send_fds(connection, [REQUEST.pack(len(text)) + text], [audio, frames])
            except (BrokenPipeError, ConnectionResetError):
                if spare is None:
                    raise
                return self._hand_over(text, audio, frames)  # the spare one was killed meanwhile
        return pid

    def _fork_spare(self) -> None:
        """Fork a decoder for the next file: now, since none of its memory has to be copied while a file waits."""
        if self._spare is None:
            with suppress(OSError):
                self._spare = self._fork()

    def _fork(self) -> tuple[int, socket.socket]:
        """Fork a decoder that waits for its file; return its process id, and the socket to it. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                self._become_decoder(theirs)
        return pid, ours

    def _become_decoder(self, connection: socket.socket) -> None:
        try:
            end_with(self._pid)
            signal.set_wakeup_fd(-1)
            os.dup2(1, 2)  # what a crashing library prints belongs into no log
            _close_all_but(connection.fileno())
            warm_up()  # the memory that decoding writes to is copied before there is a file to wait for it
            received = _receive(connection, 2)
            connection.close()
            if received is not None:
                text, (audio, frames) = received
                decoder = Decoder(audio, frames, has_bytes=self._has_bytes, protections=self._protections)
                decoder.run(json.loads(text))
        finally:
            os._exit(0)


class Decoder:
    """Decodes one file in a process of its own."""

    def __init__(self, audio: int, frames: int, *, has_bytes: int | None, protections: tuple[str, ...]) -> None:
        """Nothing is read before `run`.

        Args:
            audio: the descriptor of the recording.
            frames: that of the pipe.
            has_bytes: `address_space_bytes` of this process.
            protections: those that the template has prepared.
        """
        self._audio = audio
        self._frames = frames
        self._has_bytes = has_bytes
        self._protections = protections
        self._alive_at = 0.0

    def run(self, request: Mapping[str, Any]) -> None:
        """Write the frames of the file. Raises OSError when the consumer has closed the pipe."""
        try:
            self._decode(request)
        except JobFailedError as exc:
            self._send(encode(FrameKind.FAILED, {"code": exc.code, "message": exc.message}))
        except MemoryError:
            gc.collect()
            self._send(encode(FrameKind.FAILED, {"code": "audio_unreadable", "message": request["out_of_memory"]}))
        except BrokenPipeError:
            raise
        except Exception as exc:  # noqa: BLE001 - the consumer logs it
            text = "".join(traceback.format_exception(exc))[-_MOST_TEXT:]
            self._send(encode(FrameKind.BROKEN, {"text": text}))

    def _decode(self, request: Mapping[str, Any]) -> None:
        limits = AudioLimits(**request["limits"])
        base_s = limits.decoder_timeout_s + os.fstat(self._audio).st_size / _BYTES_PER_CPU_S
        protections = self._protections + confine(
            has_bytes=self._has_bytes,
            memory_bytes=limits.decoder_memory_bytes,
            cpu_s=base_s,
            most_cpu_s=base_s + limits.max_duration_s,
        )
        with open_descriptor(self._audio, limits, track=request["track"], channel=request["channel"]) as audio:
            opened = {"info": asdict(audio.info), "protections": protections}
            self._send(encode(FrameKind.OPENED, opened))
            for block in audio.blocks(self._sign_of_life(audio)):
                extend_cpu(base_s + audio.decoded_s)
                self._send_state(audio)
                self._send_samples(block)
            self._send_state(audio)
        self._send(encode(FrameKind.END))

    def _sign_of_life(self, audio: AudioReader) -> Callable[[], bool]:
        """Return a `should_stop` that reports progress: of the samples, or of the bytes read."""
        farthest = (0.0, 0)

        def report() -> bool:
            nonlocal farthest
            if time.monotonic() >= self._alive_at:
                reached = (audio.decoded_s, audio.read_bytes)
                if reached > farthest:  # packets alone are no progress: a broken index may repeat them for ever
                    farthest = reached
                    self._send_state(audio)
            return False

        return report

    def _send_state(self, audio: AudioReader) -> None:
        self._alive_at = time.monotonic() + _SIGN_OF_LIFE_S
        self._send(
            encode(
                FrameKind.STATE,
                {"decoded_s": audio.decoded_s, "warnings": audio.warnings, "cpu_s": time.process_time()},
            )
        )

    def _send_samples(self, block: Samples) -> None:
        data = block.data.cast("B")
        for start in range(0, len(data), MAX_BYTES):
            part = data[start : start + MAX_BYTES]
            self._send(HEADER.pack(FrameKind.SAMPLES, len(part)))
            self._send(part)

    def _send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._frames, view) :]


def _receive(connection: socket.socket, count: int) -> tuple[bytes, list[int]] | None:
    """Receive a request with its descriptors; None: the connection is closed."""
    head, descriptors, _flags, _address = socket.recv_fds(connection, REQUEST.size, count)
    if len(head) < REQUEST.size or len(descriptors) < count:
        return None
    return connection.recv(REQUEST.unpack(head)[0], socket.MSG_WAITALL), descriptors


def _answer(connection: socket.socket, **values: object) -> None:
    with suppress(OSError):  # the consumer is no longer interested
        connection.sendall(json.dumps(values).encode() + b"\n")


def _close_all_but(*kept: int) -> None:
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def warm_up() -> None:
    """Decode a little, so that FFmpeg and numpy have loaded and initialised what every child needs."""
    with suppress(AttributeError, OSError, JobFailedError):
        descriptor = os.memfd_create("warm-up")
        try:
            with wave.open(open(descriptor, "wb", closefd=False)) as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes(bytes(3200))
            with open_descriptor(descriptor, AudioLimits(max_bytes=1 << 20, max_duration_s=1.0)) as audio:
                for _ in audio.blocks():
                    pass
        finally:
            os.close(descriptor)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    warm_up()
    template = Template(channel)
    gc.collect()
    gc.freeze()  # what is there now is shared with all children: no collection may touch it
    template.run()


if __name__ == "__main__":
    main()
