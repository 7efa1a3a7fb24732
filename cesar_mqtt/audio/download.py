"""Downloads: the audio of a URL, fetched into a file, from allowed hosts only and within the limits.

Any thread may call a `Downloader`, several at once. Each call does its network work in the calling thread; only name
resolution has a thread of its own, because it cannot be ended. Within 10 s of a cancel (0.2 s once connected) the call
has ended and removed its file; a caller that cannot wait for that leaves the thread to itself.
"""

import base64
import email.utils
import hashlib
import logging
import os
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeAlias

import httpcore2
import httpx2

from cesar_mqtt import __version__
from cesar_mqtt.audio.allowed_hosts import AllowedHosts, Target, parse_url
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import Backoff, Task, pause, wait_for

log = get_logger(__name__)

GetAddrInfo: TypeAlias = Callable[..., Sequence[tuple[Any, ...]]]
"""`socket.getaddrinfo`, or its replacement in a test."""

_CONNECT_S = 10.0
"""For resolving the name, for connecting to one address, and for the TLS handshake, each."""
_READ_S = 30.0
"""How long a server may send nothing."""
_STEP_S = 0.2
"""How often a silent read checks whether the download is cancelled or out of time."""
_MAX_RETRY_AFTER_S = 60.0
"""The longest wait that a server may ask for; the job has its own retries for longer ones."""
_MAX_RETRY_AFTER_DIGITS = 9
_MAX_REDIRECTS = 5
_MAX_SHOWN_CHARACTERS = 120
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"})

_STATUSES: dict[int, tuple[ErrorCode, str]] = {
    401: (ErrorCode.DOWNLOAD_FAILED, "asks for a user and password: put the right ones into the URL"),
    403: (ErrorCode.DOWNLOAD_FAILED, "refuses access to the file: check its permissions, or the URL's user or token"),
    404: (ErrorCode.AUDIO_NOT_FOUND, "has no such file: check the URL"),
    410: (ErrorCode.AUDIO_NOT_FOUND, "no longer has the file: check the URL"),
}


@dataclass(frozen=True, slots=True)
class DownloadedFile:
    """A downloaded file; `digest` is the SHA-256 of its content in hexadecimal."""

    path: Path
    digest: str


class Downloader:
    """Fetches URLs within the rules of `audio.allowed_hosts`, `audio.max_bytes` and the download settings.

    The allow-list applies to the URL, to every redirect, and to every address that a name resolves to. The connection
    goes to exactly the address that was checked, while certificate and Host header are checked by name. Nothing is read
    from the environment but the authorities (`SSL_CERT_FILE`): no proxy, no netrc. Cookies are dropped.
    """

    def __init__(
        self,
        settings: AudioSettings,
        folder: Path,
        *,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
        tls: ssl.SSLContext | None = None,
        retry_delay_s: float = 1.0,
    ) -> None:
        """Read the settings; nothing is fetched.

        Args:
            settings: the limits.
            folder: an existing folder for the downloaded files.
            getaddrinfo: resolves names.
            tls: which certificates are trusted; None: this system's authorities.
            retry_delay_s: before the first retry; three times as long before each further one.

        Raises:
            ConfigError: an entry of `audio.allowed_hosts` is wrong; the message names it.
        """
        self._settings = settings
        self._folder = folder
        self._hosts = AllowedHosts(settings.allowed_hosts)
        self._getaddrinfo = getaddrinfo
        self._tls = tls or httpx2.create_ssl_context()
        self._retry_delay_s = retry_delay_s
        # At DEBUG it logs every header of a response: the URL in a redirect's may hold a token.
        logging.getLogger("httpcore2").setLevel(logging.INFO)

    def fetch(self, url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        """Fetch a URL into a new file, which belongs to the caller; after a failure nothing is left of it.

        The file is not synced. Temporary failures are retried `audio.download_retries` times within
        `audio.download_timeout`.

        Args:
            url: http or https; user and password in it are sent (as Basic) to its own server only.
            should_stop: asked several times a second, in this thread.

        Raises:
            JobFailedError: `audio_not_allowed`, `audio_not_found`, `audio_too_large`, `download_failed`.
            Cancelled: `should_stop` returned True.
        """
        target = parse_url(url)
        self._hosts.admit(target)
        path = self._folder / uuid.uuid4().hex
        deadline = _Deadline(self._settings.download_timeout, should_stop)
        with ExitStack() as undo:
            undo.callback(_remove, path)
            downloaded = self._fetch_with_retries(target, path, deadline)
            undo.pop_all()
        return downloaded

    def _fetch_with_retries(self, target: Target, path: Path, deadline: "_Deadline") -> DownloadedFile:
        # Jittered, so that jobs that one outage has hit do not all return to the server at once.
        backoff = Backoff(self._retry_delay_s, _MAX_RETRY_AFTER_S, factor=3.0, jitter=0.5)
        retries = self._settings.download_retries
        while True:
            try:
                return self._follow_redirects(target, path, deadline)
            except _TemporaryError as exc:
                wait_s = max(exc.retry_after_s, backoff.next_s())
                if not retries or wait_s > min(_MAX_RETRY_AFTER_S, deadline.left_s):
                    raise _failed(str(exc)) from exc
                log.warning("%s Next try in %.1f s.", exc, wait_s, action="download_retry")
                pause(wait_s, deadline.should_stop)
                retries -= 1

    def _follow_redirects(self, target: Target, path: Path, deadline: "_Deadline") -> DownloadedFile:
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._get(target, path, deadline)
            if isinstance(response, DownloadedFile):
                return response
            try:
                target = target.redirected(response)
                self._hosts.admit(target)
            except JobFailedError as exc:
                message = f"The server of the audio URL redirects, and that is not followed. {exc.message}"
                raise JobFailedError(exc.code, message) from exc
        raise _failed(f"There are more than {_MAX_REDIRECTS} redirects from the audio URL: submit the file's own URL.")

    def _get(self, target: Target, path: Path, deadline: "_Deadline") -> DownloadedFile | str:
        """Send one request; store the file of a good response, and return the location of a redirect."""
        backend = _PinnedBackend(self._resolve(target, deadline), target, deadline)
        url = httpcore2.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.request.encode()
        )
        timeouts = {"connect": _CONNECT_S, "read": _READ_S, "write": _READ_S}
        connection = httpcore2.HTTPConnection(url.origin, ssl_context=self._tls, network_backend=backend)
        try:
            with (
                connection,
                connection.stream("GET", url, headers=_headers(target), extensions={"timeout": timeouts}) as response,
            ):
                headers = httpx2.Headers(response.headers)
                if response.status in _REDIRECTS and "location" in headers:
                    return headers["location"]
                self._check_response(target, response.status, headers)
                return DownloadedFile(path, self._store(path, response.iter_stream()))
        except (httpcore2.ProtocolError, httpcore2.TimeoutException, httpcore2.NetworkError) as exc:
            raise _translated(exc, target) from exc

    def _resolve(self, target: Target, deadline: "_Deadline") -> list[str]:
        """Resolve the name, once, and return the addresses that may be connected to.

        In a thread of its own: a resolver without an answer blocks for as long as the system's configuration says.
        """
        if target.address is not None:
            return [target.host]
        lookup = Task("resolve", lambda: self._getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        try:
            found = wait_for(lookup.future, deadline.should_stop, timeout_s=min(_CONNECT_S, deadline.left_s))
        except (OSError, UnicodeError) as exc:  # TimeoutError is an OSError
            raise _TemporaryError(
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

    def _check_response(self, target: Target, status: int, headers: httpx2.Headers) -> None:
        """Check status and headers before anything of the body is read."""
        server = f"The server {target.authority!r}"
        if status == 429 or status >= 500:  # noqa: PLR2004 - too many requests; the server's own failures
            after_s = _retry_after_s(headers.get("retry-after", ""))
            asks = f" and asks to wait {after_s:.0f} s" if after_s else ""
            raise _TemporaryError(f"{server} answered with HTTP status {status}{asks}: try again later.", after_s)
        if status not in (200, 203):
            code, why = _STATUSES.get(status, (ErrorCode.DOWNLOAD_FAILED, "did not send the file: check the URL"))
            shown = target.shown[:_MAX_SHOWN_CHARACTERS]
            raise JobFailedError(code, f"{server} {why} (HTTP status {status}, {shown}).")
        if headers.get("content-encoding", "").strip().lower() in _COMPRESSIONS:
            raise _failed(f"{server} compressed the file although asked not to: let it send audio as it is.")
        self._check_size(int(headers.get("content-length", "0")))

    def _check_size(self, size_bytes: int) -> None:
        limit_bytes = self._settings.max_bytes
        if size_bytes > limit_bytes:
            raise JobFailedError(
                ErrorCode.AUDIO_TOO_LARGE,
                f"The audio file is larger than `audio.max_bytes`, {limit_bytes}: submit a smaller one, or raise the "
                "limit.",
            )

    def _store(self, path: Path, blocks: Iterable[bytes]) -> str:
        """Write a file anew, and return the digest of its content."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        size_bytes, digest = 0, hashlib.sha256()
        try:
            with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                for block in blocks:
                    size_bytes += len(block)
                    self._check_size(size_bytes)
                    digest.update(block)
                    file.write(block)
        except OSError as exc:
            raise _failed(
                f"The download cannot be written to the spool ({exc.strerror}): make room on the disk."
            ) from exc
        return digest.hexdigest()


class _TemporaryError(Exception):
    """A failure that a retry may cure; `retry_after_s`: how long the server asks to wait."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _Deadline:
    """When a download has to end: after `audio.download_timeout`, or as soon as it is cancelled."""

    def __init__(self, timeout_s: float, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise Cancelled, or JobFailedError when the time is up."""
        if self.should_stop():
            raise Cancelled
        if not self.left_s:
            raise _failed(
                f"The download took longer than `audio.download_timeout`, {self._timeout_s:g} s: check the server and "
                "the network, or raise the limit."
            )


class _PinnedBackend(httpcore2.SyncBackend):
    """Connects to the addresses that were checked, in order, whatever host it is given."""

    def __init__(self, addresses: Sequence[str], target: Target, deadline: _Deadline) -> None:
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
        failure = _TemporaryError(f"The host {self._target.host!r} has no address: check its name.")
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

    def _unreachable(self, why: str) -> _TemporaryError:
        return _TemporaryError(f"The server {self._target.authority!r} cannot be reached ({why}): check that it runs.")


class _Stream(httpcore2.NetworkStream):
    """One connection. A read takes short steps and checks the deadline before each, whatever the server does."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: _Deadline) -> None:
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
    """Turn an error of httpcore2 into a `_TemporaryError`, or into the JobFailedError of one that will not pass."""
    server = f"The server {target.authority!r}"
    if isinstance(exc, httpcore2.ProtocolError):
        return _TemporaryError(f"{server} sent an incomplete response, or one that is not HTTP: check the URL.")
    if isinstance(exc, httpcore2.TimeoutException):
        limit_s = _CONNECT_S if isinstance(exc, httpcore2.ConnectTimeout) else _READ_S
        return _TemporaryError(f"{server} sent nothing for {limit_s:.0f} s: check that it works.")
    cause = exc.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _failed(
            f"{server} cannot be trusted ({cause.verify_message}): give it a valid certificate for its name."
        )
    why = _reason(exc) or "no reason given"
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return _failed(f"{server} cannot be reached with TLS ({cause.reason or why}): check the URL.")
    return _TemporaryError(f"{server} closed the connection ({why}): check that it works.")


def _reason(exc: Exception) -> str | None:
    """The operating system's words for the socket error that an error of httpcore2 wraps."""
    return exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else None


def _headers(target: Target) -> list[tuple[str, str]]:
    headers = [
        ("Host", target.authority),
        ("User-Agent", f"cesar-mqtt/{__version__}"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    if target.credentials is not None:
        token = base64.b64encode(":".join(target.credentials).encode()).decode()
        headers.append(("Authorization", f"Basic {token}"))
    return headers


def _retry_after_s(text: str) -> float:
    """Read a Retry-After (RFC 9110, section 10.2.3): seconds, or a date; 0 for what is neither."""
    if text.isascii() and text.isdigit():
        return float(text[:_MAX_RETRY_AFTER_DIGITS])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _failed(message: str) -> JobFailedError:
    return JobFailedError(ErrorCode.DOWNLOAD_FAILED, message)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
