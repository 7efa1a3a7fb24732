"""Which hosts audio may be downloaded from: URLs are parsed once and checked against `audio.allowed_hosts`.

URLs are untrusted. The connection goes to what was checked: no URL is parsed a second time, by another parser. Values
and pure functions; any thread may call them.
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
_MAX_PORT = 65_535
# Underscores are not allowed in host names (RFC 952), but Docker uses them.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
# As in the URL standard of the WHATWG (section 3.5, "ends in a number"): resolvers accept 2130706433, 0x7f.1 and
# 0177.1 as addresses.
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.DOTALL)
_ENTRY = re.compile(r"(?P<host>\[[^\[\]]+\]|[^:\[\]]+)(?::(?P<port>[0-9]{1,5}|\*))?")

_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")

_HOW = "write NAME, NAME:PORT, *.DOMAIN, an address, or a network such as 192.168.1.0/24"

_SETTING = "audio.allowed_hosts"
_OFF = "Audio is not fetched from URLs here: name the host in `audio.allowed_hosts`, or submit the file itself."
_NO_HOSTS = "No host is allowed: name {host!r} in `{setting}`."
_MALFORMED = "The audio URL cannot be used: write it as http://HOST/FILE or https://HOST/FILE."
_NOT_LISTED = "The host {host!r} is not in `{setting}`: add {host!r} there{otherwise}."
_OTHERWISE = ", or submit the file itself"
_NOT_PUBLIC = (
    "The host {host!r} resolves to {address}, which is not a public address: add {entry!r} to `{setting}` as well."
)
_NO_DOWNGRADE = "The server {host!r} redirects from https to http, which is not followed: submit the URL of the file."


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL: what to connect to, and what to request.

    Attributes:
        scheme: `http` or `https`.
        host: a name in lower case, in ASCII (IDNA), without a dot at its end; or an address as Python writes it.
        port: from 1 to 65535; the default of the scheme if the URL has none.
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
        """The address, if the URL has one in place of a name."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def authority(self) -> str:
        """Host, and the port unless it is the default of the scheme: for the Host header and for messages."""
        return _entry_for(self.host, self)

    @property
    def shown(self) -> str:
        """The URL for messages: without user, password and query."""
        return f"{self.scheme}://{self.authority}{self.request.partition('?')[0]}"

    def redirected(self, location: str) -> "Target":
        """Return the target of a redirect; the credentials are kept only for the same server.

        Raises:
            JobFailedError: `audio_not_allowed` if it is no http or https URL, or leads from https to http.
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
    """The allow-list of the setting `audio.allowed_hosts`.

    An entry is `name`, `*.domain` (every name below it, not the domain itself), an address, or a network such as
    `192.168.1.0/24`; IPv6 with a port needs brackets (`[fd00::5]:8080`, `[fd00::/8]:*`). Without a port an entry allows
    the default of the scheme, 80 or 443; `:8080` allows that one, `:*` every port. The entry of a name allows public
    addresses only: a name in the home network needs an entry for its address as well.
    """

    def __init__(self, entries: Sequence[str], *, setting: str = _SETTING) -> None:
        """Parse the entries of a setting. Raises ConfigError that names the first wrong one."""
        self._setting = setting
        self._entries = tuple(_parse_entry(entry) for entry in entries)

    def admit(self, target: Target) -> None:
        """Check that the host in the URL is listed; nothing is resolved.

        Raises:
            JobFailedError: `audio_not_allowed`.
        """
        if not self._entries:
            if self._setting == _SETTING:
                raise _not_allowed(_OFF)
            raise _not_allowed(_NO_HOSTS, host=target.authority, setting=self._setting)
        address = target.address
        listed = self._lists_name(target) if address is None else self._lists_address(address, target)
        if not listed:
            otherwise = _OTHERWISE if self._setting == _SETTING else ""
            raise _not_allowed(_NOT_LISTED, host=target.authority, setting=self._setting, otherwise=otherwise)

    def admit_address(self, address: Address, target: Target) -> None:
        """Check that a listed name may resolve to this address.

        Raises:
            JobFailedError: `audio_not_allowed`.
        """
        if not (is_public(address) or self._lists_address(address, target)):
            entry = _entry_for(str(unwrapped(address)), target)
            raise _not_allowed(_NOT_PUBLIC, host=target.host, address=address, entry=entry, setting=self._setting)

    def _lists_name(self, target: Target) -> bool:
        return any(entry.matches_name(target.host) and entry.allows_port(target) for entry in self._entries)

    def _lists_address(self, address: Address, target: Target) -> bool:
        return any(entry.contains(unwrapped(address)) and entry.allows_port(target) for entry in self._entries)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry: a name (`below`: the names below it) or a network; an address is a network of one."""

    port: str
    name: str = ""
    below: bool = False
    network: IPv4Network | IPv6Network | None = None

    def matches_name(self, host: str) -> bool:
        return host.endswith(f".{self.name}") if self.below else host == self.name

    def contains(self, address: Address) -> bool:
        return self.network is not None and address in self.network

    def allows_port(self, target: Target) -> bool:
        default = str(_DEFAULT_PORTS[target.scheme])
        return self.port == _ANY_PORT or (self.port or default) == str(target.port)


def parse_url(text: str) -> Target:
    """Parse a URL; the fragment is dropped.

    Raises:
        JobFailedError: `audio_not_allowed` for what is no http or https URL with a valid host: a name, or an address in
            its usual notation. The message does not quote the URL.
    """
    try:
        url = httpx2.URL(text)
        port = url.port or _DEFAULT_PORTS.get(url.scheme, 0)
        host = _host(url.raw_host.decode())
    except (httpx2.InvalidURL, ValueError):
        raise _not_allowed(_MALFORMED) from None
    if url.scheme not in _DEFAULT_PORTS or url.port == 0 or not 1 <= port <= _MAX_PORT:
        raise _not_allowed(_MALFORMED)
    credentials = (url.username, url.password) if url.userinfo else None
    return Target(url.scheme, host, port, url.raw_path.decode(), credentials)


def is_public(address: Address) -> bool:
    """Whether an address is public; of an IPv6 address that embeds an IPv4 address, whether the latter is.

    Embedding are: IPv4-mapped (RFC 4291, section 2.5.5.2), NAT64 (RFC 6052, section 2.1) and 6to4 (RFC 3056).
    """
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and address in _NAT64:
        embedded = IPv4Address(int(address) & 0xFFFF_FFFF)
    if embedded is not None:
        return is_public(embedded)
    # Python versions differ in what they call global outside of the allocated range.
    return address in _GLOBAL_UNICAST and address.is_global


def _host(text: str) -> str:
    """Normalise a host for comparison. Raises ValueError for what is none."""
    if ":" in text:
        address = IPv6Address(text)
        if address.scope_id is not None:
            raise ValueError("a zone is only valid on one machine")
        return str(address.ipv4_mapped or address)
    name = text.removesuffix(".")
    if _ENDS_IN_A_NUMBER.fullmatch(name):
        return str(IPv4Address(name))
    if not _NAME.fullmatch(name):
        raise ValueError("no host name")
    return name


def _parse_entry(entry: str) -> _Entry:
    text = entry.strip().lower()
    if (network := _network(entry, text)) is not None:  # before the port is split off: fd00::1 has no port 1
        return _Entry("", network=network)
    parts = _ENTRY.fullmatch(text)
    if parts is None:
        raise _wrong(entry, _HOW)
    host, port = parts["host"], parts["port"] or ""
    if port not in ("", _ANY_PORT):
        port = str(int(port))
        if not 1 <= int(port) <= _MAX_PORT:
            raise _wrong(entry, f"its port must be from 1 to {_MAX_PORT}, or * for every one")
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


def unwrapped(address: Address) -> Address:
    """The address as entries have it: without zone, and as IPv4 if it is IPv4-mapped."""
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
