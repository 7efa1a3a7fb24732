"""Downloads: the audio of a URL, fetched into a file, from allowed hosts only and within the limits.

Any thread may call a `Downloader`, several at once. Each call does its network work in the calling thread; only name
resolution has a thread of its own, because it cannot be ended. Within 10 s of a cancel (0.2 s once connected) the call
has ended and removed its file; a caller that cannot wait for that leaves the thread to itself.
"""

import base64
import email.utils
import hashlib
import os
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from cesar_mqtt import __version__
from cesar_mqtt.audio.allowed_hosts import AllowedHosts, Target, parse_url
from cesar_mqtt.audio.pinned_http import Deadline, GetAddrInfo, PinnedClient, TemporaryHttpError
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import Backoff, pause

log = get_logger(__name__)

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
        self._client = PinnedClient(self._hosts, getaddrinfo=getaddrinfo, tls=tls)
        self._retry_delay_s = retry_delay_s

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
        limit_s = self._settings.download_timeout
        too_late = (
            f"The download took longer than `audio.download_timeout`, {limit_s:g} s: check the server and the network, "
            "or raise the limit."
        )
        deadline = Deadline(limit_s, should_stop, too_late=too_late)
        with ExitStack() as undo:
            undo.callback(_remove, path)
            downloaded = self._fetch_with_retries(target, path, deadline)
            undo.pop_all()
        return downloaded

    def _fetch_with_retries(self, target: Target, path: Path, deadline: Deadline) -> DownloadedFile:
        # Jittered, so that jobs that one outage has hit do not all return to the server at once.
        backoff = Backoff(self._retry_delay_s, _MAX_RETRY_AFTER_S, factor=3.0, jitter=0.5)
        retries = self._settings.download_retries
        while True:
            try:
                return self._follow_redirects(target, path, deadline)
            except TemporaryHttpError as exc:
                wait_s = max(exc.retry_after_s, backoff.next_s())
                if not retries or wait_s > min(_MAX_RETRY_AFTER_S, deadline.left_s):
                    raise _failed(str(exc)) from exc
                log.warning("%s Next try in %.1f s.", exc, wait_s, action="download_retry")
                pause(wait_s, deadline.should_stop)
                retries -= 1

    def _follow_redirects(self, target: Target, path: Path, deadline: Deadline) -> DownloadedFile:
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

    def _get(self, target: Target, path: Path, deadline: Deadline) -> DownloadedFile | str:
        """Send one request; store the file of a good response, and return the location of a redirect."""
        with self._client.request("GET", target, deadline, headers=_headers(target)) as response:
            headers = httpx2.Headers(response.headers)
            if response.status in _REDIRECTS and "location" in headers:
                return headers["location"]
            self._check_response(target, response.status, headers)
            return DownloadedFile(path, self._store(path, response.iter_stream()))

    def _check_response(self, target: Target, status: int, headers: httpx2.Headers) -> None:
        """Check status and headers before anything of the body is read."""
        server = f"The server {target.authority!r}"
        if status == 429 or status >= 500:  # noqa: PLR2004 - too many requests; the server's own failures
            after_s = _retry_after_s(headers.get("retry-after", ""))
            asks = f" and asks to wait {after_s:.0f} s" if after_s else ""
            raise TemporaryHttpError(f"{server} answered with HTTP status {status}{asks}: try again later.", after_s)
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
