"""The network as downloads need it: no call blocks for longer than a moment, and none outlives the wish for it.

httpcore2 speaks HTTP over a `Network`, which connects to addresses that were checked and to nothing else. Everything
here belongs to the thread that downloads; only resolving a name has a thread of its own, for it cannot be ended.
"""

import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

import httpcore2

from cesar_mqtt.audio.allowed_hosts import Target
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError

T = TypeVar("T")
GetAddrInfo = Callable[..., Sequence[tuple[Any, ...]]]
"""`socket.getaddrinfo`, or what takes its place in a test."""

_GLANCE_S = 0.25
"""How often a silent wait looks up to see whether it is still wanted."""
_CONNECT_S = 10.0
"""For resolving the name, for connecting to one address, and for the TLS handshake, each."""
_SILENCE_S = 30.0
"""How long a server may send nothing."""
_READ, _WRITE = select.POLLIN, select.POLLOUT


class PassingError(Exception):
    """A failure that may be over when the download is tried again; `after_s`: what the server asks to wait."""

    def __init__(self, sentence: str, after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.after_s = after_s


class Patience:
    """How long one download may go on: the time it has left, and the wish of whoever asked for it."""

    def __init__(self, timeout_s: float, should_stop: Callable[[], bool]) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._should_stop = should_stop
        self._nothing = threading.Event()

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raise Stopped, or JobFailedError when the time is up."""
        if self._should_stop():
            raise Cancelled
        if self.left_s <= 0:
            sentence = f"The download took longer than `audio.download_timeout`, {self._timeout_s:g} s: "
            raise failed(sentence + "check the server and the network, or raise the limit.")

    def until(self, ready: Callable[[float], object], limit_s: float, otherwise: Exception) -> None:
        """Call `ready`, which may wait as many seconds as it is given, until it is; then raise `otherwise`."""
        end = time.monotonic() + limit_s
        self.check()
        while not ready(max(0.0, min(_GLANCE_S, self.left_s, end - time.monotonic()))):
            self.check()
            if time.monotonic() >= end:
                raise otherwise

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        end = time.monotonic() + seconds
        while (wait_s := min(_GLANCE_S, end - time.monotonic())) > 0:
            self.check()
            self._nothing.wait(wait_s)


class Network(httpcore2.NetworkBackend):
    """Connects to addresses that were checked, whatever name it is called with."""

    def __init__(self, target: Target, addresses: Sequence[tuple[int, Any]], patience: Patience) -> None:
        self._target = target
        self._addresses = addresses
        self._patience = patience

    def connect_tcp(self, *_: object, **__: object) -> "_Stream":
        """Try the addresses in order."""
        refused = PassingError(f"The host {self._target.host!r} has no address: check its name.")
        for family, address in self._addresses:
            with ExitStack() as undo:
                try:
                    connection = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    self._connect(connection, address)
                except PassingError as exc:
                    refused = exc
                except OSError as exc:  # a family that this machine does not speak
                    refused = self._unreachable(exc.strerror or "no connection")
                else:
                    undo.pop_all()
                    return _Stream(connection, self._target, self._patience)
        raise refused

    def _connect(self, connection: socket.socket, address: Any) -> None:
        connection.settimeout(0.0)
        code = connection.connect_ex(address)
        if code == errno.EINPROGRESS:
            silent = self._unreachable(f"no answer within {_CONNECT_S:.0f} s")
            self._patience.until(partial(_is_ready, connection, _WRITE), _CONNECT_S, silent)
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise self._unreachable(os.strerror(code))

    def _unreachable(self, why: str) -> PassingError:
        return PassingError(f"The server {self._target.authority!r} cannot be reached ({why}): check that it runs.")


class _Stream(httpcore2.NetworkStream):
    """One connection that never blocks for longer than a moment. The timeouts of the seam are not used; ours hold."""

    def __init__(self, connection: socket.socket, target: Target, patience: Patience) -> None:
        self._connection = connection
        self._server = f"The server {target.authority!r}"
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """Return some bytes; none at the end."""
        return self._patiently(lambda: self._connection.recv(max_bytes), _READ, _SILENCE_S)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """Send all of it."""
        view = memoryview(buffer)
        while view:
            view = view[self._patiently(partial(self._connection.send, view), _WRITE, _SILENCE_S) :]

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> "_Stream":
        """Agree on TLS with a server that has a certificate for the name."""
        with ExitStack() as undo:
            undo.callback(self.close)
            wrapped = ssl_context.wrap_socket(
                self._connection, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            self._connection = wrapped
            self._patiently(wrapped.do_handshake, _READ, _CONNECT_S)
            undo.pop_all()
        return self

    def _patiently(self, call: Callable[[], T], usually: int, limit_s: float) -> T:
        while True:
            self._patience.check()
            events = usually
            try:
                return call()
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except ssl.SSLWantWriteError:
                events = _WRITE
            except OSError as exc:
                raise self._ended(exc) from exc
            silent = PassingError(f"{self._server} was silent for {limit_s:.0f} s: check that it works.")
            self._patience.until(partial(_is_ready, self._connection, events), limit_s, silent)

    def _ended(self, exc: OSError) -> Exception:
        if isinstance(exc, ssl.SSLCertVerificationError):
            why = f"cannot be trusted ({exc.verify_message}): give it a valid certificate for its name."
            return failed(f"{self._server} {why}")
        why = exc.strerror or "no reason given"
        if isinstance(exc, ssl.SSLError) and not isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return failed(f"{self._server} cannot be spoken to with TLS ({exc.reason or why}): check the URL.")
        return PassingError(f"{self._server} broke the connection off ({why}): check that it works.")


def _is_ready(connection: socket.socket, events: int, wait_s: float) -> bool:
    """Wait until there is something to read, or room to write; unlike `select.select`, for any number of files."""
    poll = select.poll()
    poll.register(connection, events)
    return bool(poll.poll(wait_s * 1000))


def resolve(getaddrinfo: GetAddrInfo, target: Target, patience: Patience) -> Sequence[tuple[Any, ...]]:
    """Ask in a thread: a resolver that gets no answer blocks for as long as its own configuration says."""
    unknown = PassingError(f"The host name {target.host!r} cannot be resolved: check it, and the name server.")
    found: list[Sequence[tuple[Any, ...]]] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            found.append(getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=ask, name="resolve", daemon=True)
    thread.start()

    def ready(wait_s: float) -> bool:
        thread.join(wait_s)
        return not thread.is_alive()

    patience.until(ready, _CONNECT_S, unknown)
    if not found:
        raise unknown
    return found[0]


def failed(sentence: str) -> JobFailedError:
    """Make the failure that ends a download at once."""
    return JobFailedError(ErrorCode.DOWNLOAD_FAILED, sentence)
