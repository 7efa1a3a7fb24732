"""How to reach a broker: its URL, the credentials, the TLS context, and which version of MQTT to speak.

Settings are read and checked once at start, so that a wrong one is reported as such and not as a failed connection; any
thread may do so. `VersionChoice` belongs to the network thread.
"""

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
_READABLE = "Let this user read it, or name another one."
_USER_INFO = re.compile(r"(?<=://).*@", re.DOTALL)


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """The parts of a broker URL."""

    scheme: Scheme
    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = "/mqtt"
    """`ws` and `wss` only: begins with a slash and may end with a query."""

    @property
    def redacted(self) -> str:
        """The URL as it may be shown and logged: without password, path and query."""
        user = f"{self.username}@" if self.username else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{user}{host}:{self.port}"

    @property
    def encrypted(self) -> bool:
        return self.scheme in _ENCRYPTED

    @property
    def websockets(self) -> bool:
        return self.scheme in _WEBSOCKETS


@dataclass(frozen=True, slots=True)
class Credentials:
    """User name and password of CONNECT; both None: an anonymous client."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


class VersionChoice:
    """Which version of MQTT the next connection speaks: 5 if the broker supports it, else 3.1.1.

    After a broker has answered that it does not support 5, every further connection speaks 3.1.1. A broker that closes
    the connection without an answer may be that old, or it may be starting or broken: until it has accepted 5 once,
    3.1.1 and 5 are tried in turn.

    Attributes:
        next: the version of the next connection.
        is_temporary: whether `next` is 3.1.1 only to get past a malformed message; soon 5 is to be spoken again.
    """

    def __init__(self, wanted: Literal["auto", "5", "3.1.1"]) -> None:
        self._fixed = wanted != "auto"
        self._usual: Version = "3.1.1" if wanted == "3.1.1" else "5"
        self._five_was_accepted = False
        self.next: Version = self._usual
        self.is_temporary = False

    def on_connected(self) -> None:
        self._five_was_accepted |= self.next == "5"

    def on_ended(self, *, unsupported: bool = False, unanswered: bool = False, malformed: bool = False) -> bool:
        """Choose `next` after a connection has ended; True: reconnect at once, with another version.

        Args:
            unsupported: the broker answered that it does not support the version.
            unanswered: the broker accepted the TCP connection and closed it without a CONNACK.
            malformed: the broker sent a malformed packet. In 3.1.1 the same message has no properties, which are the
                likeliest place of the mistake, so that the broker does not send it for ever.
        """
        used, self.next, self.is_temporary = self.next, self._usual, False
        if self._fixed or used == "3.1.1":
            return False
        if unsupported:
            self._usual = self.next = "3.1.1"
        elif malformed or (unanswered and not self._five_was_accepted):
            self.next, self.is_temporary = "3.1.1", malformed
        return self.next != used


def parse_broker_url(url: str) -> BrokerUrl:
    """Parse `mqtt://[user[:password]@]host[:port]`, the same with mqtts, ws and wss, `embedded`, `embedded://host:port`.

    User name and password may be percent-encoded. Port 0 is any free port, for the embedded broker only.

    Raises:
        ConfigError: the URL is invalid; the message shows it without user name and password.
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
        raise _invalid_url(text, "it has a password but no user name; write mqtt://USER:PASSWORD@HOST")
    if address.username is not None and scheme == "embedded":
        raise _invalid_url(text, "the embedded broker has no users; leave the user name out")
    return address


def read_credentials(settings: BrokerSettings, address: BrokerUrl) -> Credentials:
    """Return user name and password.

    The user name in the URL takes precedence over `broker.username`, `broker.password_file` over the password in the
    URL.

    Raises:
        ConfigError: the password file cannot be read or is empty, or there is a password without a user name.
    """
    username = address.username or settings.username
    password = address.password
    if settings.password_file is not None:
        password = _first_line(settings.password_file)
        if username is None:
            raise ConfigError("broker.password_file is set, but there is no user name.", "Set broker.username as well.")
    return Credentials(username, password)


def tls_context(settings: BrokerSettings) -> ssl.SSLContext:
    """Return a context that trusts `broker.ca_file`, or else the authorities of this system.

    The broker's certificate and host name are always verified. `broker.cert_file` and `broker.key_file` are the
    client's own certificate.

    Raises:
        ConfigError: a file cannot be read, or does not contain what its setting asks for.
    """
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as exc:  # an SSLError is one
        raise _invalid_file("broker.ca_file", settings.ca_file, exc, "certificates in PEM format") from exc
    if settings.ca_file is not None:
        # From Python 3.13 on, certificate authorities without a key usage are rejected, but the instructions of
        # mosquitto create such. Chain and host name are verified all the same.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if settings.cert_file is None:
        if settings.key_file is not None:
            raise ConfigError("broker.key_file is set, but broker.cert_file is not.", "Set both or neither.")
        return context
    try:
        # With an empty password OpenSSL does not ask for one at the terminal when the key is encrypted.
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except OSError as exc:
        files = {"broker.cert_file": settings.cert_file, "broker.key_file": settings.key_file}
        named = {name: file for name, file in files.items() if file is not None}
        # OpenSSL does not report which of the two files is wrong.
        wrong = {name: file for name, file in named.items() if not file.is_file()} or named
        wanted = "a certificate and its own key, not encrypted, in PEM format"
        raise _invalid_file(" or ".join(wrong), next(iter(wrong.values())), exc, wanted) from exc
    return context


def _split(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
    except ValueError as exc:
        raise _invalid_url(text, "its host is in brackets, but is not an IPv6 address") from exc
    if parts.scheme not in DEFAULT_PORTS or not text.lower().startswith(f"{parts.scheme}://"):
        raise _invalid_url(
            text, "it must be embedded, or begin with mqtt://, mqtts://, ws:// or wss://, such as mqtt://127.0.0.1:1883"
        )
    if parts.fragment or (parts.query and parts.scheme not in _WEBSOCKETS):
        raise _invalid_url(text, "it has a '#' or '?'; in a user name or password write %23 and %3F")
    return parts


def _host(parts: SplitResult, text: str) -> str:
    host = parts.hostname or ""
    try:
        # The resolver would raise a UnicodeError in the network thread.
        host.encode("idna")
    except UnicodeError as exc:
        raise _invalid_url(text, "its host name is not valid") from exc
    if not host or any(char.isspace() or not char.isprintable() for char in host):
        raise _invalid_url(text, "it has no host name")
    return host


def _port(parts: SplitResult, text: str) -> int:
    try:
        port = parts.port
    except ValueError as exc:
        raise _invalid_url(
            text, "its port is not a number up to 65535; in a password write ':' as %3A and '/' as %2F"
        ) from exc
    if port is None:
        return DEFAULT_PORTS[parts.scheme]
    if port == 0 and parts.scheme != "embedded":
        raise _invalid_url(text, "its port is 0")
    return port


def _path(parts: SplitResult, text: str) -> str:
    if parts.scheme not in _WEBSOCKETS:
        if parts.path not in ("", "/"):
            raise _invalid_url(text, "only ws:// and wss:// addresses have a path; in a password write '/' as %2F")
        return "/mqtt"
    path = parts.path if parts.path not in ("", "/") else "/mqtt"
    if any(char.isspace() or not char.isascii() for char in path + parts.query):
        raise _invalid_url(text, "its path has characters that must be percent-encoded")
    return f"{path}?{parts.query}" if parts.query else path


def _invalid_url(text: str, why: str) -> ConfigError:
    shown = _USER_INFO.sub("", text) if "://" in text else text.rpartition("@")[2]
    return ConfigError(f"broker.url '{shown.partition('?')[0]}' cannot be used: {why}.")


def _first_line(path: Path) -> str:
    try:
        line = path.read_text(encoding="utf-8").partition("\n")[0].removesuffix("\r")
    except OSError as exc:
        raise ConfigError(f"broker.password_file '{path}' cannot be read: {exc.strerror}.", _READABLE) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"broker.password_file '{path}' cannot be used: it is not UTF-8 text.") from exc
    if not line:
        raise ConfigError(f"broker.password_file '{path}' cannot be used: its first line is empty.")
    return line


def _invalid_file(name: str, path: Path | None, error: OSError, wanted: str) -> ConfigError:
    if isinstance(error, ssl.SSLError):
        return ConfigError(f"{name} '{path}' cannot be used: it must contain {wanted}.")
    return ConfigError(f"{name} '{path}' cannot be read: {error.strerror}.", _READABLE)
