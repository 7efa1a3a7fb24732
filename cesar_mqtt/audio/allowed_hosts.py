"""Which hosts audio may be fetched from: URLs taken apart once, and checked against `audio.allowed_hosts`.

Everything here is untrusted but the settings. What was checked is what is connected to: nobody reads a URL a second
time, in another way. Values and pure functions; any thread may call them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

import httpx2

from cesar_mqtt.errors import ConfigError, ErrorCode, JobFailedError

Address: TypeAlias = IPv4Address | IPv6Address

_DEFAULT_PORTS = {"http": 80, "https": 443}
_ANY_PORT = "*"
_MOST_PORT = 65_535
# Underscores are in no host name by the book, but in those that Docker gives.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
# As in the URL standard of the WHATWG (section 3.5, "ends in a number"): resolvers take 2130706433, 0x7f.1 and 0177.1
# for addresses.
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.DOTALL)
_ENTRY = re.compile(r"(?P<host>\[[^\[\]]+\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}|\*))?")

_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")

_HOW = "write NAME, NAME:PORT, *.DOMAIN, an address, or a network such as 192.168.1.0/24"

_OFF = "Audio is not fetched from URLs here: name the host in `audio.allowed_hosts`, or submit the file itself."
_MALFORMED = "The audio URL cannot be used: write it as http://HOST/FILE or https://HOST/FILE."
_NOT_LISTED = "The host {host!r} is not in `audio.allowed_hosts`: add {host!r} there, or submit the file itself."
_NOT_PUBLIC = (
    "The host {host!r} leads to {address}, which is no public address: add {entry!r} to `audio.allowed_hosts` as well."
)
_NO_DOWNGRADE = "The server {host!r} leads from https on to http, which is not followed: submit the URL of the file."


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, taken apart: what to connect to, and what to ask for.

    Attributes:
        scheme: `http` or `https`.
        host: a name in lower case, in ASCII (IDNA), without a dot at its end; or an address as Python writes it.
        port: from 1 to 65535; the scheme's own when the URL has none.
        request: path and query, percent-encoded; may hold a secret.
        credentials: user and password of the URL.
    """

    scheme: str
    host: str
    port: int
    request: str = field(repr=False)
    credentials: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def address(self) -> Address | None:
        """The address that stands in the URL in place of a name."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def authority(self) -> str:
        """Host, and the port unless it is the scheme's own: what the Host header says, and what messages show."""
        return _entry_for(self.host, self)

    @property
    def shown(self) -> str:
        """The URL as it may be shown: without user, password and query."""
        return f"{self.scheme}://{self.authority}{self.request.partition('?')[0]}"

    def redirected(self, location: str) -> "Target":
        """Return where an answer from here leads; credentials go along to the same server, and nowhere else.

        Raises:
            JobFailedError: `audio_not_allowed` when it leads to no http or https URL, or from https to http.
        """
        base = f"{self.scheme}://{self.authority}{self.request}"
        try:
            target = parse_url(str(httpx2.URL(base).join(location)))
        except (httpx2.InvalidURL, ValueError):
            raise _not_allowed(_MALFORMED) from None
        if (self.scheme, target.scheme) == ("https", "http"):
            raise _not_allowed(_NO_DOWNGRADE, host=self.authority)
        if target.credentials is not None or not self._is_server_of(target):
            return target
        return Target(target.scheme, target.host, target.port, target.request, self.credentials)

    def _is_server_of(self, other: "Target") -> bool:
        if self.host != other.host:
            return False
        upgraded = (self.scheme, self.port, other.scheme, other.port) == ("http", 80, "https", 443)
        return upgraded or (self.scheme, self.port) == (other.scheme, other.port)


class AllowedHosts:
    """The setting `audio.allowed_hosts`, checked and ready to be asked.

    An entry is `name`, `*.domain` (every name below it, not the domain itself), an address, or a network such as
    `192.168.1.0/24`; IPv6 with a port stands in brackets (`[fd00::5]:8080`, `[fd00::/8]:*`). Without a port it stands
    for the scheme's own, 80 or 443; `:8080` for that one, `:*` for every one. A name's entry opens public addresses
    only: one that leads into the home network needs an entry for the address as well.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        """Read the entries. Raises ConfigError that names the first wrong one."""
        self._entries = tuple(_parse_entry(entry) for entry in entries)

    def admit(self, target: Target) -> None:
        """Say whether the host in the URL is listed; nothing is resolved.

        Raises:
            JobFailedError: `audio_not_allowed`.
        """
        if not self._entries:
            raise _not_allowed(_OFF)
        address = target.address
        listed = self._names(target) if address is None else self._covers(address, target)
        if not listed:
            raise _not_allowed(_NOT_LISTED, host=target.authority)

    def admit_address(self, address: Address, target: Target) -> None:
        """Say whether a name that is listed may lead to this address.

        Raises:
            JobFailedError: `audio_not_allowed`.
        """
        if not (is_public(address) or self._covers(address, target)):
            entry = _entry_for(str(plain(address)), target)
            raise _not_allowed(_NOT_PUBLIC, host=target.host, address=address, entry=entry)

    def _names(self, target: Target) -> bool:
        return any(entry.names(target.host) and entry.opens(target) for entry in self._entries)

    def _covers(self, address: Address, target: Target) -> bool:
        return any(entry.covers(plain(address)) and entry.opens(target) for entry in self._entries)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry: a name (`below`: the names below it) or a network, of which an address is the smallest."""

    port: str
    name: str = ""
    below: bool = False
    network: IPv4Network | IPv6Network | None = None

    def names(self, host: str) -> bool:
        return host.endswith(f".{self.name}") if self.below else host == self.name

    def covers(self, address: Address) -> bool:
        return self.network is not None and address in self.network

    def opens(self, target: Target) -> bool:
        """Whether the port is one that the entry is for."""
        default = str(_DEFAULT_PORTS[target.scheme])
        return self.port == _ANY_PORT or (self.port or default) == str(target.port)


def parse_url(text: str) -> Target:
    """Take a URL apart; a fragment is dropped.

    Raises:
        JobFailedError: `audio_not_allowed` for what is no http or https URL with a host that is one: a name, or an
            address in its usual spelling. The message does not repeat the URL.
    """
    try:
        url = httpx2.URL(text)
        port = url.port or _DEFAULT_PORTS.get(url.scheme, 0)
        host = _host(url.raw_host.decode())
    except (httpx2.InvalidURL, ValueError):
        raise _not_allowed(_MALFORMED) from None
    if url.scheme not in _DEFAULT_PORTS or url.port == 0 or not 1 <= port <= _MOST_PORT:
        raise _not_allowed(_MALFORMED)
    credentials = (url.username, url.password) if url.userinfo else None
    return Target(url.scheme, host, port, url.raw_path.decode(), credentials)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet at large; one that wraps an IPv4 address is what it wraps.

    Wrapped are: IPv4-mapped (RFC 4291, section 2.5.5.2), NAT64 (RFC 6052, section 2.1) and 6to4 (RFC 3056).
    """
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    wrapped = address.ipv4_mapped or address.sixtofour
    if wrapped is None and address in _NAT64:
        wrapped = IPv4Address(int(address) & 0xFFFF_FFFF)
    if wrapped is not None:
        return is_public(wrapped)
    # Python's versions differ in what they take for global outside of what has been given out.
    return address in _GLOBAL_UNICAST and address.is_global


def _host(text: str) -> str:
    """Bring a host to the one form in which it is compared; ValueError for what is none."""
    if ":" in text:
        address = IPv6Address(text)
        if address.scope_id is not None:
            raise ValueError("a zone means something on one machine only")
        return str(address.ipv4_mapped or address)
    name = text.removesuffix(".")
    if _ENDS_IN_A_NUMBER.fullmatch(name):
        return str(IPv4Address(name))
    if not _NAME.fullmatch(name):
        raise ValueError("no host name")
    return name


def _parse_entry(entry: str) -> _Entry:
    text = entry.strip().lower()
    if (network := _network(entry, text)) is not None:  # before the port: fd00::1 has no port 1
        return _Entry("", network=network)
    parts = _ENTRY.fullmatch(text)
    if parts is None:
        raise _wrong(entry, _HOW)
    host, port = parts["host"], parts["port"] or ""
    if port not in ("", _ANY_PORT):
        port = str(int(port))
        if not 1 <= int(port) <= _MOST_PORT:
            raise _wrong(entry, f"its port must be from 1 to {_MOST_PORT}, or * for every one")
    if (network := _network(entry, host.strip("[]"))) is not None:
        return _Entry(port, network=network)
    try:
        name = _host(httpx2.URL(scheme="http", host=host.removeprefix("*.")).raw_host.decode())
    except (httpx2.InvalidURL, ValueError):
        raise _wrong(entry, _HOW) from None
    below = host.startswith("*.")
    if below and _ENDS_IN_A_NUMBER.fullmatch(name):
        raise _wrong(entry, _HOW)
    return _Entry(port, name=name, below=below)


def _network(entry: str, text: str) -> IPv4Network | IPv6Network | None:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None
    if "%" in text:
        raise _wrong(entry, "leave the zone out; such an address is reached by a name that leads to it")
    if network != _strictly(text):
        raise _wrong(entry, f"as a network it is {network}, and as an address it is without the /{network.prefixlen}")
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        raise _wrong(entry, "write the IPv4 address itself")
    return network


def _strictly(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text)
    except ValueError:
        return None


def plain(address: Address) -> Address:
    """Return the address as entries have it: without zone, and IPv4 where it is only mapped into IPv6."""
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or IPv6Address(int(address))


def _entry_for(host: str, target: Target) -> str:
    shown = f"[{host}]" if ":" in host else host
    return shown if target.port == _DEFAULT_PORTS[target.scheme] else f"{shown}:{target.port}"


def _wrong(entry: str, why: str) -> ConfigError:
    return ConfigError(f"audio.allowed_hosts: {entry!r} cannot be used: {why}")


def _not_allowed(sentence: str, **values: object) -> JobFailedError:
    return JobFailedError(ErrorCode.AUDIO_NOT_ALLOWED, sentence.format(**values))
