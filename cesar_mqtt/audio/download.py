"""Downloads: the audio of a URL, fetched into a file, from allowed hosts only and never more of it than is allowed.

Any thread may call a `Downloader`, several at once. Each call does all its network work in the calling thread, over
sockets that never block for longer than a moment, so it ends soon after it is told to, whatever the server does.
"""

import base64
import email.utils
import hashlib
import logging
import os
import random
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpcore2
import httpx2

from cesar_mqtt import __version__
from cesar_mqtt.audio.allowed_hosts import AllowedHosts, Target, parse_url
from cesar_mqtt.audio.network_backend import GetAddrInfo, Network, PassingError, Patience, failed, resolve
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_RETRY_AFTER_S = 60.0
"""The longest wait that a server may ask for; the job has its own retries for longer ones."""
_MOST_REDIRECTS = 5
_MOST_SHOWN = 120
_MOST_DIGITS = 9
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

    The allow-list holds for the URL, for every redirect, and for the address that a name leads to; the connection goes
    to exactly the address that was checked, while certificate and Host header are about the name. Nothing is taken
    from the environment but the authorities (`SSL_CERT_FILE`): no proxy, no netrc; and no cookie is kept.
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
            folder: where the files go; it has to be there.
            getaddrinfo: what resolves names.
            tls: what is trusted; None: this system's authorities.
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
        # At DEBUG it writes every header of an answer: the URL in a redirect's may hold a token.
        logging.getLogger("httpcore2").setLevel(logging.INFO)

    def fetch(self, url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        """Fetch a URL into a new file, which belongs to the caller; after a failure nothing is left of it.

        The file is a cache and not synced. Failures that may pass are met with `audio.download_retries` further tries
        within `audio.download_timeout`.

        Args:
            url: http or https; user and password in it are sent (as Basic) to its own server only.
            should_stop: asked several times a second, in this thread.

        Raises:
            JobFailedError: `audio_not_allowed`, `audio_not_found`, `audio_too_large`, `download_failed`.
            Cancelled: `should_stop` said so.
        """
        target = parse_url(url)
        self._hosts.admit(target)
        path = self._folder / uuid.uuid4().hex
        patience = Patience(self._settings.download_timeout, should_stop)
        with ExitStack() as undo:
            undo.callback(_remove, path)
            fetched = self._persist(target, path, patience)
            undo.pop_all()
        return fetched

    def _persist(self, target: Target, path: Path, patience: Patience) -> DownloadedFile:
        delay_s, left = self._retry_delay_s, self._settings.download_retries
        while True:
            try:
                return self._follow(target, path, patience)
            except PassingError as exc:
                wait_s = max(exc.after_s, delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - it spreads attempts
                if not left or wait_s > min(_RETRY_AFTER_S, patience.left_s):
                    raise failed(str(exc)) from exc
                log.warning("%s Next try in %.1f s.", exc, wait_s, action="download_retry")
                patience.pause(wait_s)
                delay_s *= 3
                left -= 1

    def _follow(self, target: Target, path: Path, patience: Patience) -> DownloadedFile:
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._get(target, path, patience)
            if isinstance(answer, DownloadedFile):
                return answer
            try:
                target = target.redirected(answer)
                self._hosts.admit(target)
            except JobFailedError as exc:
                message = f"The server of the audio URL redirects, and that is not followed. {exc.message}"
                raise JobFailedError(exc.code, message) from exc
        raise failed(f"There are more than {_MOST_REDIRECTS} redirects from the audio URL: submit the file's own URL.")

    def _get(self, target: Target, path: Path, patience: Patience) -> DownloadedFile | str:
        """Ask once; a file is stored, and of a redirect the location is returned."""
        network = Network(target, self._addresses(target, patience), patience)
        port, scheme, host = target.port, target.scheme.encode(), target.host.encode()
        url = httpcore2.URL(scheme=scheme, host=host, port=port, target=target.request.encode())
        connection = httpcore2.HTTPConnection(url.origin, ssl_context=self._tls, network_backend=network)
        try:
            with connection, connection.stream("GET", url, headers=_headers(target)) as response:
                answer = httpx2.Headers(response.headers)
                if response.status in _REDIRECTS and "location" in answer:
                    return answer["location"]
                self._check(target, response.status, answer)
                return DownloadedFile(path, self._store(path, response.iter_stream()))
        except httpcore2.ProtocolError as exc:
            sentence = f"The answer of the server {target.authority!r} was cut short, or is not HTTP: check the URL."
            raise PassingError(sentence) from exc

    def _addresses(self, target: Target, patience: Patience) -> list[tuple[int, Any]]:
        """Resolve the name, once, and keep what may be connected to, as family and socket address."""
        literal = target.address
        if literal is not None:
            return [(socket.AF_INET if literal.version == 4 else socket.AF_INET6, (target.host, target.port))]  # noqa: PLR2004
        found, refusal = [], None
        for family, _, _, _, address in resolve(self._getaddrinfo, target, patience):
            try:
                self._hosts.admit_address(ip_address(address[0]), target)
            except JobFailedError as exc:
                refusal = refusal or exc
            else:
                found.append((family, address))
        if not found and refusal is not None:
            raise refusal
        return found

    def _check(self, target: Target, status: int, answer: httpx2.Headers) -> None:
        """Look at the head of an answer before anything of its body is read."""
        server = f"The server {target.authority!r}"
        if status == 429 or status >= 500:  # noqa: PLR2004 - too many requests; the server's own failures
            after_s = _retry_after_s(answer.get("retry-after", ""))
            asks = f" and asks to come back in {after_s:.0f} s" if after_s else ""
            raise PassingError(f"{server} answered with HTTP status {status}{asks}: try again later.", after_s)
        if status not in (200, 203):
            code, why = _STATUSES.get(status, (ErrorCode.DOWNLOAD_FAILED, "did not send the file: check the URL"))
            raise JobFailedError(code, f"{server} {why} (HTTP status {status}, {target.shown[:_MOST_SHOWN]}).")
        if answer.get("content-encoding", "").strip().lower() in _COMPRESSIONS:
            raise failed(f"{server} compressed the file although asked not to: let it send audio as it is.")
        self._check_size(int(answer.get("content-length", "0")))

    def _check_size(self, size_bytes: int) -> None:
        most = self._settings.max_bytes
        if size_bytes > most:
            sentence = (
                "The audio file is larger than `audio.max_bytes`, {most}: submit a smaller one, or raise the limit."
            )
            raise JobFailedError(ErrorCode.AUDIO_TOO_LARGE, sentence.format(most=most))

    def _store(self, path: Path, chunks: Iterable[bytes]) -> str:
        """Write a file anew, and return the digest of what is in it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        size_bytes, digest = 0, hashlib.sha256()
        try:
            with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
                for chunk in chunks:
                    size_bytes += len(chunk)
                    self._check_size(size_bytes)
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as exc:
            raise failed(
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
        return float(text[:_MOST_DIGITS])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
