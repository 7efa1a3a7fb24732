"""How a broker is reached: address, credentials, what TLS trusts, which MQTT to speak, when to try again.

Settings are read and checked once at start, so that a wrong one is a sentence and not a failing connection; any
thread may do so. `VersionChoice` and `Backoff` belong to the network thread.
"""

import random
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast
from urllib.parse import SplitResult, unquote, urlsplit

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import ConfigError

Scheme = Literal["mqtt", "mqtts", "ws", "wss", "embedded"]
Version = Literal["5", "3.1.1"]

DEFAULT_PORTS: dict[str, int] = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443, "embedded": 1883}
_ENCRYPTED = ("mqtts", "wss")
_WEBSOCKETS = ("ws", "wss")
_USER_INFO = re.compile(r"(?<=://).*@", re.DOTALL)


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """Where a broker listens, and who the URL says is asking."""

    scheme: Scheme
    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = "/mqtt"
    """For `ws` and `wss` only; begins with a slash and may end with a query."""

    @property
    def redacted(self) -> str:
        """The address as it may be shown and logged: without the password, and without what a query may hide."""
        user = f"{self.username}@" if self.username else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{user}{host}:{self.port}"

    @property
    def encrypted(self) -> bool:
        """Whether the connection is TLS."""
        return self.scheme in _ENCRYPTED

    @property
    def websockets(self) -> bool:
        """Whether MQTT is spoken inside WebSockets."""
        return self.scheme in _WEBSOCKETS


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client says of itself; both None: nothing."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


class VersionChoice:
    """Which MQTT the next connection speaks: 5 if the broker does, else 3.1.1.

    A broker that answers that it does not know 5 is spoken to in 3.1.1 from then on. One that just closes the
    connection may be as old as that, or it may be starting, or broken: 3.1.1 is tried once, and 5 the next time, until
    5 has been accepted.

    Attributes:
        next: what to speak next.
        passing: whether `next` is 3.1.1 only to get past a message, and 5 should be spoken again soon.
    """

    def __init__(self, wanted: Literal["auto", "5", "3.1.1"]) -> None:
        self._fixed = wanted != "auto"
        self._usual: Version = "3.1.1" if wanted == "3.1.1" else "5"
        self._five_was_accepted = False
        self.next: Version = self._usual
        self.passing = False

    def accepted(self) -> None:
        """Learn that the broker took `next`."""
        self._five_was_accepted |= self.next == "5"

    def ended(self, *, unsupported: bool = False, unanswered: bool = False, unreadable: bool = False) -> bool:
        """Learn how the connection ended that spoke `next`; True: try again at once, with the new `next`.

        Args:
            unsupported: the broker answered that it does not know this version.
            unanswered: it took the connection and closed it without an answer.
            unreadable: it sent a malformed packet. In 3.1.1 the same message comes without its properties, which are
                the likeliest place for the mistake, and so does not come for ever.
        """
        spoken, self.next, self.passing = self.next, self._usual, False
        if self._fixed or spoken == "3.1.1":
            return False
        if unsupported:
            self._usual = self.next = "3.1.1"
        elif unreadable or (unanswered and not self._five_was_accepted):
            self.next, self.passing = "3.1.1", unreadable
        return self.next != spoken


class Backoff:
    """How long to wait before the next attempt: twice as long each time, less a random part, until one has held."""

    def __init__(self, first_s: float = 1.0, most_s: float = 60.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def delay_s(self, *, held_s: float = 0.0, refused: bool = False) -> float:
        """Return the seconds to wait after a connection that held so long (0: none came about).

        Two consumers of one name throw each other out for ever; since each of their connections is short, they do it
        ever more slowly.
        """
        if held_s >= self._most_s:
            self._next_s = self._first_s
        if refused:
            self._next_s = self._most_s
        ceiling_s = self._next_s
        self._next_s = min(self._most_s, ceiling_s * 2)
        return ceiling_s * random.uniform(0.5, 1.0)  # noqa: S311 - it spreads attempts, it guards nothing


def parse_broker_url(url: str) -> BrokerUrl:
    """Read `mqtt://[user[:password]@]host[:port]`, the same with mqtts, ws and wss, `embedded` or `embedded://host:port`.

    User name and password may be percent-encoded. Port 0 is for the embedded broker only: any free port.

    Raises:
        ConfigError: it is none of these; the message shows the URL without its user and password.
    """
    text = url.strip()
    parts = _split("embedded://127.0.0.1" if text == "embedded" else text)
    scheme = cast("Scheme", parts.scheme)
    address = BrokerUrl(
        scheme=scheme,
        host=_host(parts, text),
        port=_port(parts, text),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        path=_path(parts, text),
    )
    if address.password is not None and address.username is None:
        raise _wrong(text, "there is a password but no user name in it; write mqtt://USER:PASSWORD@HOST")
    if address.username is not None and scheme == "embedded":
        raise _wrong(text, "the embedded broker knows no users; leave the user name out")
    return address


def read_credentials(settings: BrokerSettings, address: BrokerUrl) -> Credentials:
    """Choose user name and password: the URL's user before `broker.username`, `broker.password_file` before the URL's.

    Raises:
        ConfigError: the password file cannot be read or is empty, or there is a password without a user name.
    """
    username = address.username or settings.username
    password = address.password
    if settings.password_file is not None:
        password = _first_line(settings.password_file)
        if username is None:
            raise ConfigError("broker.password_file is set, but there is no user name: set broker.username as well")
    return Credentials(username, password)


def tls_context(settings: BrokerSettings) -> ssl.SSLContext:
    """Build what a TLS connection trusts: `broker.ca_file`, or else this system's authorities.

    Certificate and host name of the broker are always checked. `broker.cert_file` and `broker.key_file` are what the
    client shows of itself.

    Raises:
        ConfigError: a file cannot be read or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as exc:  # an SSLError is one
        raise _unusable("broker.ca_file", settings.ca_file, exc, "certificates in PEM format") from exc
    if settings.ca_file is not None:
        # From Python 3.13 on, authorities without a key usage are refused, and those are what mosquitto's own
        # instructions make. Chain and host name are checked all the same.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.cert_file is None:
        if settings.key_file is not None:
            raise ConfigError("broker.key_file is set, but broker.cert_file is not: the broker is shown both or none")
        return context
    try:
        # The empty password keeps OpenSSL from asking for one at the terminal when the key is encrypted.
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except OSError as exc:
        files = {"broker.cert_file": settings.cert_file, "broker.key_file": settings.key_file}
        named = {name: file for name, file in files.items() if file is not None}
        # OpenSSL does not say which of the two it means.
        guilty = {name: file for name, file in named.items() if not file.is_file()} or named
        wanted = "a certificate and its own key, not encrypted, in PEM format"
        raise _unusable(" or ".join(guilty), next(iter(guilty.values())), exc, wanted) from exc
    return context


def _split(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
    except ValueError as exc:
        raise _wrong(text, "its host is in brackets, but is no IPv6 address") from exc
    if parts.scheme not in DEFAULT_PORTS or not text.lower().startswith(f"{parts.scheme}://"):
        raise _wrong(
            text, "it must be embedded, or begin with mqtt://, mqtts://, ws:// or wss://, such as mqtt://127.0.0.1:1883"
        )
    if parts.fragment or (parts.query and parts.scheme not in _WEBSOCKETS):
        raise _wrong(text, "there is a '#' or '?' in it; in a user name or password write %23 and %3F")
    return parts


def _host(parts: SplitResult, text: str) -> str:
    host = parts.hostname or ""
    try:
        # The resolver would raise this as a UnicodeError out of the network thread.
        host.encode("idna")
    except UnicodeError as exc:
        raise _wrong(text, "its host name is not one") from exc
    if not host or any(char.isspace() or not char.isprintable() for char in host):
        raise _wrong(text, "there is no host name in it")
    return host


def _port(parts: SplitResult, text: str) -> int:
    try:
        port = parts.port
    except ValueError as exc:
        raise _wrong(
            text, "its port is not a number up to 65535; in a password write ':' as %3A and '/' as %2F"
        ) from exc
    if port is None:
        return DEFAULT_PORTS[parts.scheme]
    if port == 0 and parts.scheme != "embedded":
        raise _wrong(text, "its port is 0")
    return port


def _path(parts: SplitResult, text: str) -> str:
    if parts.scheme not in _WEBSOCKETS:
        if parts.path not in ("", "/"):
            raise _wrong(text, "only ws:// and wss:// addresses have a path; in a password write '/' as %2F")
        return "/mqtt"
    path = parts.path if parts.path not in ("", "/") else "/mqtt"
    if any(char.isspace() or not char.isascii() for char in path + parts.query):
        raise _wrong(text, "its path holds characters that must be percent-encoded")
    return f"{path}?{parts.query}" if parts.query else path


def _wrong(text: str, why: str) -> ConfigError:
    shown = _USER_INFO.sub("", text) if "://" in text else text.rpartition("@")[2]
    return ConfigError(f"broker.url '{shown.partition('?')[0]}' cannot be used: {why}")


def _first_line(path: Path) -> str:
    try:
        line = path.read_text(encoding="utf-8").partition("\n")[0].removesuffix("\r")
    except OSError as exc:
        raise ConfigError(f"broker.password_file '{path}' cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"broker.password_file '{path}' cannot be used: it is not UTF-8 text") from exc
    if not line:
        raise ConfigError(f"broker.password_file '{path}' cannot be used: its first line is empty")
    return line


def _unusable(name: str, path: Path | None, error: OSError, wanted: str) -> ConfigError:
    if isinstance(error, ssl.SSLError):
        return ConfigError(f"{name} '{path}' cannot be used: it must hold {wanted}")
    return ConfigError(f"{name} '{path}' cannot be read: {error.strerror}")
