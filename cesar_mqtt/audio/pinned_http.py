"""HTTP requests to hosts of an allow-list: each goes to exactly the addresses that were checked, within a deadline.

Any thread may use a `PinnedClient`, several at once. The network work is done in the calling thread; only name
resolution has a thread of its own, because it cannot be ended.
"""

import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, TypeAlias

import httpcore2
import httpx2

from cesar_mqtt.audio.allowed_hosts import AllowedHosts, Target
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.threads import Task, wait_for

GetAddrInfo: TypeAlias = Callable[..., Sequence[tuple[Any, ...]]]
"""`socket.getaddrinfo`, or its replacement in a test."""

_CONNECT_S = 10.0
"""For resolving the name, for connecting to one address, and for the TLS handshake, each."""
_READ_S = 30.0
"""How long a server may send nothing."""
_STEP_S = 0.2
"""How often a silent read checks whether the request is cancelled or out of time."""


class TemporaryHttpError(Exception):
    """A failure that a retry may cure; `retry_after_s`: how long the server asks to wait."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Deadline:
    """When a request has to end: after some seconds, or as soon as it is cancelled."""

    def __init__(self, timeout_s: float, should_stop: Callable[[], bool], *, too_late: str) -> None:
        """Begin to count; `too_late` is the sentence of the error."""
        self.should_stop = should_stop
        self._too_late = too_late
        self._end = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise Cancelled, or JobFailedError when the time is up."""
        if self.should_stop():
            raise Cancelled
        if not self.left_s:
            raise _failed(self._too_late)


class PinnedClient:
    """Sends requests to the hosts of an allow-list.

    The list applies to the URL and to every address that its name resolves to. The connection goes to exactly the
    address that was checked, while certificate and Host header are checked by name. Nothing is read from the
    environment but the authorities (`SSL_CERT_FILE`): no proxy, no netrc. Redirects are not followed.
    """

    def __init__(
        self,
        hosts: AllowedHosts,
        *,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Take the hosts; `tls`: which certificates are trusted; None: this system's authorities."""
        self._hosts = hosts
        self._getaddrinfo = getaddrinfo
        self._tls = tls or httpx2.create_ssl_context()
        # At DEBUG it logs every header of a response: the URL in a redirect's may hold a token.
        logging.getLogger("httpcore2").setLevel(logging.INFO)

    @contextmanager
    def request(
        self,
        method: str,
        target: Target,
        deadline: Deadline,
        *,
        headers: Sequence[tuple[str, str]],
        content: bytes | None = None,
    ) -> Iterator[httpcore2.Response]:
        """Send a request and yield its response, whose body is not read yet.

        Raises:
            TemporaryHttpError: another attempt may succeed; also while the body is read.
            JobFailedError: `audio_not_allowed`, or `download_failed` for what will not pass.
            Cancelled: as `deadline` says.
        """
        self._hosts.admit(target)
        backend = _PinnedBackend(self._resolve(target, deadline), target, deadline)
        url = httpcore2.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.request.encode()
        )
        timeouts = {"connect": _CONNECT_S, "read": _READ_S, "write": _READ_S}
        connection = httpcore2.HTTPConnection(url.origin, ssl_context=self._tls, network_backend=backend)
        try:
            with (
                connection,
                connection.stream(
                    method, url, headers=list(headers), content=content, extensions={"timeout": timeouts}
                ) as response,
            ):
                yield response
        except (httpcore2.ProtocolError, httpcore2.TimeoutException, httpcore2.NetworkError) as exc:
            raise _translated(exc, target) from exc

    def _resolve(self, target: Target, deadline: "Deadline") -> list[str]:
        """Resolve the name, once, and return the addresses that may be connected to.

        In a thread of its own: a resolver without an answer blocks for as long as the system's configuration says.
        """
        if target.address is not None:
            return [target.host]
        lookup = Task("resolve", lambda: self._getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        try:
            found = wait_for(lookup.future, deadline.should_stop, timeout_s=min(_CONNECT_S, deadline.left_s))
        except (OSError, UnicodeError) as exc:  # TimeoutError is an OSError
            raise TemporaryHttpError(
                f"The host name {target.host!r} cannot be resolved: check it, and the name server."
            ) from exc
        addresses, refusal = [], None
        for _, _, _, _, (address, *_) in found:
            try:
                self._hosts.admit_address(ip_address(address), target)
            except JobFailedError as exc:
                refusal = refusal or exc
            else:
                addresses.append(str(address))
        if not addresses and refusal is not None:
            raise refusal
        return addresses


class _PinnedBackend(httpcore2.SyncBackend):
    """Connects to the addresses that were checked, in order, whatever host it is given."""

    def __init__(self, addresses: Sequence[str], target: Target, deadline: Deadline) -> None:
        self._addresses = addresses
        self._target = target
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - resolved and checked before
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failure = TemporaryHttpError(f"The host {self._target.host!r} has no address: check its name.")
        for address in self._addresses:
            self._deadline.check()
            limit_s = min(timeout or _CONNECT_S, self._deadline.left_s)
            try:
                stream = super().connect_tcp(address, port, limit_s, local_address, socket_options)
            except httpcore2.ConnectTimeout:
                failure = self._unreachable(f"no answer within {_CONNECT_S:.0f} s")
            except httpcore2.ConnectError as exc:
                failure = self._unreachable(_reason(exc) or "no connection")
            else:
                return _Stream(stream, self._deadline)
        raise failure

    def _unreachable(self, why: str) -> TemporaryHttpError:
        return TemporaryHttpError(
            f"The server {self._target.authority!r} cannot be reached ({why}): check that it runs."
        )


class _Stream(httpcore2.NetworkStream):
    """One connection. A read takes short steps and checks the deadline before each, whatever the server does."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        silent_until = time.monotonic() + (timeout or _READ_S)
        while True:
            self._deadline.check()
            try:
                return self._stream.read(max_bytes, _STEP_S)
            except httpcore2.ReadTimeout:
                if time.monotonic() >= silent_until:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        self._deadline.check()
        limit_s = min(timeout or _CONNECT_S, self._deadline.left_s)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, limit_s), self._deadline)


def _translated(exc: Exception, target: Target) -> Exception:
    """Turn an error of httpcore2 into a `TemporaryHttpError`, or into the JobFailedError of one that will not pass."""
    server = f"The server {target.authority!r}"
    if isinstance(exc, httpcore2.ProtocolError):
        return TemporaryHttpError(f"{server} sent an incomplete response, or one that is not HTTP: check the URL.")
    if isinstance(exc, httpcore2.TimeoutException):
        limit_s = _CONNECT_S if isinstance(exc, httpcore2.ConnectTimeout) else _READ_S
        return TemporaryHttpError(f"{server} sent nothing for {limit_s:.0f} s: check that it works.")
    cause = exc.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _failed(
            f"{server} cannot be trusted ({cause.verify_message}): give it a valid certificate for its name."
        )
    why = _reason(exc) or "no reason given"
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return _failed(f"{server} cannot be reached with TLS ({cause.reason or why}): check the URL.")
    return TemporaryHttpError(f"{server} closed the connection ({why}): check that it works.")


def _reason(exc: Exception) -> str | None:
    """The operating system's words for the socket error that an error of httpcore2 wraps."""
    return exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else None


def _failed(message: str) -> JobFailedError:
    return JobFailedError(ErrorCode.DOWNLOAD_FAILED, message)
