"""Who may use the page: Host, Origin, password, trusted proxies, and the headers of every response.

Owns the sessions and the counters of failed attempts. Everything runs on the thread of the event loop.
"""

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cesar_mqtt.errors import ConfigError
from cesar_mqtt.gateway.web.passwords import Password
from cesar_mqtt.gateway.web.problems import ProblemError, response_to
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

COOKIE = "cesar_session"
SESSION_S = 30 * 24 * 3600.0

_MOST_SESSIONS = 1000
_MOST_PEERS = 1000
_FREE_TRIES = 5
"""So many failed attempts of one address within `_WINDOW_S`; then it has to wait."""
_ALL_TRIES = 50
"""The same of all addresses together."""
_WINDOW_S = 300.0
_OWN_PREFIX = 64
"""So many bits of an IPv6 address name a network: its owner has all addresses in it."""
_READING = frozenset({"GET", "HEAD"})
_OWN_SITE = frozenset({"same-origin", "none"})
_PROTECTED = ("/api/", "/v1/", "/metrics", "/login", "/logout")
"""What no page of another origin may use, not even to read."""
_NEEDS_PASSWORD = ("/api/", "/v1/", "/metrics")
_LOCAL_NAMES = frozenset({"localhost", "ip6-localhost"})

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; media-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class AccessRules:
    """What the settings of the page say about access."""

    is_loopback: bool
    """Whether only this machine reaches the page: then no password is needed."""
    hosts: frozenset[str]
    """The names by which it may be called, beside addresses: a name that an attacker controls could lead here (DNS
    rebinding)."""
    proxies: tuple[Network, ...]
    """Addresses of proxies, whose `X-Forwarded-...` headers are believed."""
    password: Password | None
    proxies_authenticate: bool = True
    """Whether these have authenticated the user; else the password is asked for."""

    def is_proxy(self, peer: Address | None) -> bool:
        return peer is not None and any(peer in network for network in self.proxies)

    def is_known_host(self, host: str) -> bool:
        """Whether the name in a Host header, without its port, may be ours."""
        return _address(host.strip("[]")) is not None or host.lower().rstrip(".") in self.hosts


def access_rules(
    host: str,
    *,
    password: Password | None,
    proxies: Sequence[str],
    hosts: Sequence[str],
    proxies_authenticate: bool = True,
) -> AccessRules:
    """Return the rules for a page on the address `host`.

    Raises:
        ConfigError: the address is not loopback, and there is neither a password nor a proxy that authenticates.
    """
    try:
        networks = tuple(ipaddress.ip_network(proxy, strict=False) for proxy in proxies)
    except ValueError as exc:
        raise ConfigError(
            f"web.trusted_proxies: {exc}: it must be an address or a network such as 172.30.32.2"
        ) from exc
    address = _address(host)
    is_loopback = host.lower() in _LOCAL_NAMES or (address is not None and address.is_loopback)
    if not proxies_authenticate and password is None:
        raise ConfigError("web.trusted_proxies_authenticate is false: then web.password_file is needed")
    if not is_loopback and password is None and not networks:
        raise ConfigError(
            f"web.listen {host}: an address that other machines reach needs web.password_file "
            "(`cesar-mqtt web --set-password FILE` makes one) or web.trusted_proxies"
        )
    own = {host.lower(), *_LOCAL_NAMES} if is_loopback else {host.lower(), *_LOCAL_NAMES, *_own_names()}
    known = frozenset(own | {each.lower() for each in hosts})
    return AccessRules(is_loopback, known, networks, password, proxies_authenticate)


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return {name, short, f"{short}.local", f"{short}.lan", f"{short}.home", f"{short}.fritz.box"}


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.scope_id is not None and not address.scope_id.isalnum():  # Python takes any text: `fe80::1%x/y?`
        return None
    return address.ipv4_mapped or address


class Guard:
    """Stands before the app: checks every request, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, rules: AccessRules, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._rules = rules
        self.sessions = Sessions(clock)
        self._attempts = Attempts(clock)
        self._checking = CapacityLimiter(1)  # argon2 takes 64 MiB of memory
        self._key = secrets.token_bytes(32)
        self._known_key: bytes | None = None
        """The digest of the API key that was checked last, so that not every request takes the time of argon2."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope)
        try:
            await self._check(request)
        except ProblemError as error:
            log.debug("Refused %s %s: %s", request.method, scope["path"], error.code, action="web_refused")
            await response_to(scope["path"], error)(scope, receive, send_with_headers)
            return
        scope.setdefault("state", {})["guard"] = self
        await self._app(scope, receive, send_with_headers)

    async def _check(self, request: Request) -> None:
        path = request.scope[
            "path"
        ]  # what the routes are compared with; a URL would be made of the Host header as well
        if "content-length" in request.headers and "transfer-encoding" in request.headers:
            # A proxy that goes by the other one would take what is behind this request for something else.
            raise ProblemError(
                400, "The request declares its length twice.", "ambiguous_length", headers={"Connection": "close"}
            )
        proxied = self._rules.is_proxy(_peer(request))
        if not proxied:
            self._check_host(request.headers)
        if path.startswith(_PROTECTED) or request.method not in _READING:
            _check_origin(request, proxied=proxied)
        if path.startswith(_NEEDS_PASSWORD) and not (proxied and self._rules.proxies_authenticate):
            await self._check_password(request)

    def _check_host(self, headers: Headers) -> None:
        host = _without_port(headers.get("host", ""))
        if not host or not self._rules.is_known_host(host):
            raise ProblemError(
                403,
                "This server is not known by that name: call it by its address, or add the name to web.hosts.",
                "unknown_host",
            )

    async def _check_password(self, request: Request) -> None:
        if self._rules.password is None:
            if not self._rules.is_loopback:
                raise ProblemError(403, "Only a trusted proxy may use this page.", "forbidden")
            return
        if self.sessions.is_valid(request.cookies.get(COOKIE, "")):
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise ProblemError(
                401,
                "Log in, or send the password as a bearer token.",
                "unauthorized",
                headers={"WWW-Authenticate": "Bearer"},
            )
        digest = hmac.digest(self._key, key.strip().encode(), "sha256")
        if self._known_key is not None and hmac.compare_digest(digest, self._known_key):
            return
        if not await self.is_password(request, key.strip()):
            raise ProblemError(401, "The API key is not the password of this page.", "invalid_api_key")
        self._known_key = digest

    @property
    def needs_password(self) -> bool:
        return self._rules.password is not None

    async def is_password(self, request: Request, text: str) -> bool:
        """Check a password, one at a time. Raises ProblemError after too many failed attempts."""
        password, peer = self._rules.password, self._client_of(request)
        if password is None:
            return False
        async with self._checking:
            wait_s = self._attempts.wait_s(peer)
            if wait_s > 0:
                raise ProblemError(
                    429,
                    f"Too many failed attempts: try again in {wait_s:.0f} s.",
                    "too_many_attempts",
                    headers={"Retry-After": f"{wait_s:.0f}"},
                )
            if await run_sync(password.matches, text):
                self._attempts.succeeded(peer)
                return True
            self._attempts.failed(peer)
            log.warning("A wrong password from %s", peer, action="wrong_password")
            return False

    def _client_of(self, request: Request) -> str:
        """Return whose attempts these are: an IPv4 address or an IPv6 network, behind trusted proxies if need be.

        Each proxy appends whom it has the request from: the last address that is no proxy's is the one to believe.
        """
        peer = _peer(request)
        if self._rules.is_proxy(peer):
            named = ",".join(request.headers.getlist("x-forwarded-for")).split(",")
            for text in reversed(named):
                address = _address(text.strip())
                if not self._rules.is_proxy(address):
                    peer = address or peer
                    break
        if isinstance(peer, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((int(peer), _OWN_PREFIX), strict=False))
        return str(peer)

    def is_secure(self, request: Request) -> bool:
        """Whether the browser speaks https, as far as this server or a trusted proxy sees."""
        if self._rules.is_proxy(_peer(request)):
            return _first(request.headers.get("x-forwarded-proto", request.scope["scheme"])) == "https"
        return bool(request.scope["scheme"] == "https")


def _first(header: str) -> str:
    """Return the first of the values that several proxies have put into a header: that of the browser."""
    return header.partition(",")[0].strip()


def _peer(request: Request) -> Address | None:
    return None if request.client is None else _address(request.client.host)


def _without_port(host: str) -> str:
    """Return the name in `name:port`; an IPv6 address stands in brackets."""
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() and not name.endswith(":") else host


def _check_origin(request: Request, *, proxied: bool) -> None:
    """Reject what a page of another origin sends. Programs send neither header."""
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    own = headers.get("host", "")
    if proxied:
        own = _first(headers.get("x-forwarded-host", own))
    foreign = (site is not None and site not in _OWN_SITE) or (
        origin is not None and urlsplit(origin).netloc.lower() != own.lower()
    )
    if foreign:
        raise ProblemError(403, "Pages of other origins may not use this server.", "foreign_origin")


class Sessions:
    """The browsers that are logged in, in memory: a restart logs them out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def create(self) -> str:
        """Return the token of a new session; the oldest ones end where there are too many."""
        token = secrets.token_urlsafe(32)
        self._ends[_digest(token)] = self._clock() + SESSION_S
        while len(self._ends) > _MOST_SESSIONS:
            self._ends.popitem(last=False)
        return token

    def is_valid(self, token: str) -> bool:
        return self._ends.get(_digest(token), 0.0) > self._clock()

    def end(self, token: str) -> None:
        self._ends.pop(_digest(token), None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


class Attempts:
    """Failed attempts to give the password, by address, bounded in number."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failed: OrderedDict[str, list[float]] = OrderedDict()
        self._all: list[float] = []

    def wait_s(self, peer: str) -> float:
        """Return the seconds until this address may try again; 0: it may."""
        since = self._clock() - _WINDOW_S
        self._all = [at for at in self._all if at > since]
        mine = [at for at in self._failed.get(peer, ()) if at > since]
        waits = [
            times[-limit] - since
            for times, limit in ((mine, _FREE_TRIES), (self._all, _ALL_TRIES))
            if len(times) >= limit
        ]
        return max(waits, default=0.0)

    def failed(self, peer: str) -> None:
        now = self._clock()
        self._all.append(now)
        self._failed.setdefault(peer, []).append(now)
        self._failed[peer] = self._failed[peer][-_FREE_TRIES:]
        self._failed.move_to_end(peer)
        while len(self._failed) > _MOST_PEERS:
            self._failed.popitem(last=False)

    def succeeded(self, peer: str) -> None:
        self._failed.pop(peer, None)
