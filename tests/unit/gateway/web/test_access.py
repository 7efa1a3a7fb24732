"""Who may use the page: hosts, origins, passwords, proxies; and the headers of every response."""

from collections.abc import Callable
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from cesar_mqtt.errors import ConfigError
from cesar_mqtt.gateway.web.access import SESSION_S, AccessRules, Attempts, Sessions, access_rules
from cesar_mqtt.gateway.web.passwords import Password
from tests.unit.gateway.web.site import Site, status

FAST = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
PEER = "192.168.1.20"
PROXY = "172.30.32.2"


@pytest.fixture
def password(tmp_path: Path) -> Password:
    path = tmp_path / "password"
    path.write_text(FAST.hash("sesame"))
    return Password(path)


@pytest.fixture
def guarded(tmp_path: Path, password: Password) -> Site:
    """A page on all addresses, with a password and a proxy."""
    return Site(tmp_path, access_rules("0.0.0.0", password=password, proxies=[PROXY], hosts=["box.example"]))  # noqa: S104


@pytest.fixture
def local(tmp_path: Path) -> Site:
    return Site(tmp_path)


def rules(host: str, **options: object) -> AccessRules:
    return access_rules(host, **{"password": None, "proxies": (), "hosts": (), **options})  # type: ignore[arg-type]


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "box.example"])  # noqa: S104
def test_an_address_that_other_machines_reach_needs_a_password_or_a_proxy(host: str, password: Password) -> None:
    with pytest.raises(ConfigError, match="password"):
        rules(host)
    assert not rules(host, password=password).is_loopback
    assert not rules(host, proxies=[PROXY]).is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert rules(host).is_loopback


@pytest.mark.parametrize("proxy", ["nginx", "10.0.0.0/40", ""])
def test_a_proxy_is_an_address_or_a_network(proxy: str) -> None:
    with pytest.raises(ConfigError, match="trusted_proxies"):
        rules("127.0.0.1", proxies=[proxy])


# -- the Host header ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8188", "localhost:8188", "LOCALHOST", "localhost.", "[::1]:8188", "192.168.1.2"]
)
def test_addresses_and_names_of_this_machine_are_answered(local: Site, host: str) -> None:
    assert local.browser.get("/api/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8188",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "127.0.0.1@evil.example",
        "fe80::1%x/y?",
        "[fe80::1%/y?]",
        "fe80::1%25x#",
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/jobs", "/v1/models", "/healthz"])
def test_a_name_that_leads_here_by_dns_rebinding_is_not(local: Site, host: str, path: str) -> None:
    response = local.browser.get(path, headers={"Host": host})
    assert response.status_code == 403
    assert "unknown_host" in response.text


def test_names_can_be_added(guarded: Site) -> None:
    assert guarded.client(PEER).get("/", headers={"Host": "box.example:8188"}).status_code == 200


# -- the origin --------------------------------------------------------------------------------------------------------

FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:9999"},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "file://"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/jobs"),
        ("DELETE", "/api/jobs/a"),
        ("POST", "/api/jobs/a/cancel"),
        ("POST", "/api/consumers/cesar/pause"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/login"),
        ("GET", "/api/jobs"),
        ("GET", "/api/events"),
        ("GET", "/metrics"),
        ("POST", "/"),
    ],
)
def test_no_page_of_another_origin_may_do_or_read_anything(
    local: Site, headers: dict[str, str], method: str, path: str
) -> None:
    local.take("cesar/status/a", status("a"))
    response = local.browser.request(method, path, headers=headers)
    assert response.status_code == 403, response.text
    assert "foreign_origin" in response.text
    assert local.bus.asked == []
    assert local.bus.submitted == []


def test_the_page_itself_and_programs_may(local: Site) -> None:
    local.bus.answers["cancel"] = lambda fields: {"job_id": fields["job_id"], "status": "cancelled"}
    local.take("cesar/status/a", status("a"))
    own = {"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-origin"}
    for headers in (own, {"Origin": "http://127.0.0.1:8188"}, {}):
        assert local.browser.post("/api/jobs/a/cancel", headers=headers).status_code == 200


def test_a_link_on_another_page_may_lead_to_the_page(local: Site) -> None:
    assert local.browser.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_no_response_lets_other_origins_read_it(local: Site) -> None:
    for method in ("GET", "OPTIONS"):
        headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        response = local.browser.request(method, "/api/jobs", headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]


# -- passwords ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/jobs", "/api/events", "/api/about", "/v1/models", "/metrics", "/api/nothing"])
def test_without_the_password_nothing_is_shown(guarded: Site, path: str) -> None:
    response = guarded.client(PEER).get(path)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert guarded.client("127.0.0.1").get(path).status_code == 401


@pytest.mark.parametrize("path", ["/", "/page.js", "/languages.json", "/healthz", "/openapi.json"])
def test_the_page_itself_needs_none(guarded: Site, path: str) -> None:
    assert guarded.client(PEER).get(path).status_code in {200, 503}


def test_a_browser_logs_in_and_out(guarded: Site) -> None:
    browser = guarded.client(PEER)
    assert browser.post("/login", json={"password": "wrong"}).status_code == 401
    entered = browser.post("/login", json={"password": "sesame"})
    cookie = entered.headers["Set-Cookie"]
    assert entered.status_code == 204
    assert all(flag in cookie for flag in ("HttpOnly", "SameSite=strict"))
    assert "Path" not in cookie  # the browser takes the folder of /login, which a proxy may have moved
    assert "sesame" not in cookie
    assert browser.get("/api/jobs").status_code == 200
    assert browser.get("/api/about").json()["has_session"] is True

    kept = browser.cookies["cesar_session"]
    assert browser.post("/logout").status_code == 204
    assert browser.get("/api/jobs").status_code == 401
    assert browser.get("/api/jobs", headers={"Cookie": f"cesar_session={kept}"}).status_code == 401


def test_the_cookie_is_for_https_only_where_the_page_is(guarded: Site) -> None:
    browser = guarded.client(PEER)
    assert "Secure" not in browser.post("/login", json={"password": "sesame"}).headers["Set-Cookie"]
    over_tls = browser.post("https://127.0.0.1:8188/login", json={"password": "sesame"})
    assert "Secure" in over_tls.headers["Set-Cookie"]


def test_programs_send_it_as_a_bearer_token_and_get_errors_in_their_own_shape(guarded: Site) -> None:
    program = guarded.client(PEER)
    assert program.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
    assert program.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200  # remembered
    wrong = program.get("/v1/models", headers={"Authorization": "Bearer sesamE"})
    assert wrong.status_code == 401
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    problem = program.get("/api/jobs", headers={"Authorization": "Basic c2VzYW1l"})
    assert problem.headers["Content-Type"] == "application/problem+json"
    assert problem.json()["status"] == 401


@pytest.mark.parametrize("token", ["", "x", "a" * 5000, "\u00e9", "../../etc/passwd"])
def test_an_invented_session_is_none(guarded: Site, token: str) -> None:
    headers = {"Cookie": b"cesar_session=" + token.encode()}
    assert guarded.client(PEER).get("/api/jobs", headers=headers).status_code == 401  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["login", "bearer"])
def test_after_five_wrong_passwords_an_address_waits_and_another_does_not(guarded: Site, way: str) -> None:
    def attempt(address: str, text: str) -> int:
        if way == "login":
            return guarded.client(address).post("/login", json={"password": text}).status_code
        return guarded.client(address).get("/api/jobs", headers={"Authorization": f"Bearer {text}"}).status_code

    assert [attempt(PEER, f"guess-{n}") for n in range(7)] == [401] * 5 + [429] * 2
    assert attempt(PEER, "sesame") == 429
    assert attempt("192.168.1.21", "sesame") in {200, 204}


def test_attempts_are_counted_over_all_addresses_too_and_forgotten_after_a_while() -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    for number in range(50):
        assert attempts.wait_s(f"10.0.0.{number}") == 0
        attempts.failed(f"10.0.0.{number}")
    assert 0 < attempts.wait_s("10.0.1.1") <= 300
    now[0] = 301.0
    assert attempts.wait_s("10.0.1.1") == 0


def test_sessions_end_by_themselves_and_are_bounded() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    first = sessions.create()
    assert sessions.is_valid(first)
    for _ in range(1000):
        last = sessions.create()
    assert not sessions.is_valid(first)
    now[0] = SESSION_S + 1
    assert not sessions.is_valid(last)


# -- proxies -----------------------------------------------------------------------------------------------------------


def test_a_trusted_proxy_has_authenticated_the_user(guarded: Site) -> None:
    proxy = guarded.client(PROXY, host="homeassistant.local:8123")
    assert proxy.get("/api/jobs", headers={"X-Ingress-Path": "/api/hassio_ingress/x"}).status_code == 200
    origin = {"Origin": "http://ha.example", "Sec-Fetch-Site": "same-origin"}
    guarded.bus.answers["pause"] = lambda _fields: {"paused": True}
    guarded.online()
    path = "/api/consumers/cesar/pause"
    assert proxy.post(path, headers={**origin, "X-Forwarded-Host": "ha.example"}).status_code == 200
    assert proxy.post(path, headers={**origin, "X-Forwarded-Host": "other.example"}).status_code == 403
    assert proxy.post(path, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": PROXY},
        {"X-Real-IP": PROXY},
        {"Forwarded": f"for={PROXY}"},
        {"X-Ingress-Path": "/api/hassio_ingress/x"},
        {"X-Remote-User-Id": "1"},
    ],
    ids=str,
)
def test_who_only_claims_to_be_a_proxy_is_none(guarded: Site, headers: dict[str, str]) -> None:
    assert guarded.client(PEER).get("/api/jobs", headers=headers).status_code == 401


def test_with_a_proxy_and_no_password_only_the_proxy_gets_in(tmp_path: Path) -> None:
    site = Site(tmp_path, rules("0.0.0.0", proxies=["10.0.0.0/8"]))  # noqa: S104
    assert site.client("10.1.2.3").get("/api/jobs").status_code == 200
    assert site.client("::ffff:10.1.2.3").get("/api/jobs").status_code == 200
    for other in (PEER, "127.0.0.1", "::1", "not-an-address"):
        assert site.client(other).get("/api/jobs").status_code == 403


@pytest.fixture
def behind(tmp_path: Path, password: Password) -> Site:
    """A page behind a proxy that only speaks TLS: the page asks for the password itself."""
    return Site(
        tmp_path,
        access_rules("127.0.0.1", password=password, proxies=[PROXY], hosts=(), proxies_authenticate=False),
    )


def test_a_proxy_that_does_not_authenticate_leaves_the_password_to_the_page(behind: Site) -> None:
    proxy = behind.client(PROXY, host="box.example")
    assert proxy.get("/api/jobs").status_code == 401
    for host in ("x/y?", "x#", "fe80::1%x/y?"):  # a URL that is made of it has another path
        assert proxy.get("/api/jobs", headers={"Host": host}).status_code == 401
    over_tls = {"X-Forwarded-Proto": "https", "X-Forwarded-For": PEER}
    entered = proxy.post("/login", json={"password": "sesame"}, headers=over_tls)
    assert "Secure" in entered.headers["Set-Cookie"]
    assert (
        proxy.get("/api/jobs", headers={"Cookie": entered.headers["Set-Cookie"].partition(";")[0]}).status_code == 200
    )
    with pytest.raises(ConfigError, match="password_file"):
        rules("127.0.0.1", proxies=[PROXY], proxies_authenticate=False)


@pytest.mark.parametrize(
    ("guesses", "victim", "waits"),
    [
        ([f"203.0.113.7, {PEER}"] * 5, PEER, True),
        ([PEER] * 5, "192.168.1.21", False),
        ([f"{PEER}, 203.0.113.{n}" for n in range(6)], PEER, False),  # what a client claims itself stands in front
        ([f"2001:db8::{n}" for n in range(5)], "2001:db8::ffff", True),  # one network, one owner
        ([f"2001:db8::{n}" for n in range(5)], "2001:db8:0:1::1", False),
    ],
)
def test_attempts_behind_a_proxy_count_for_whom_it_names(
    behind: Site,
    guesses: list[str],
    victim: str,
    waits: bool,  # noqa: FBT001
) -> None:
    proxy = behind.client(PROXY)
    for address in guesses:
        assert proxy.post("/login", json={"password": "x"}, headers={"X-Forwarded-For": address}).status_code in {
            401,
            429,
        }
    last = proxy.post("/login", json={"password": "sesame"}, headers={"X-Forwarded-For": victim})
    assert last.status_code == (429 if waits else 204)


def test_who_is_no_proxy_cannot_choose_whose_attempts_count(guarded: Site) -> None:
    direct = guarded.client(PEER)
    headers = [{"X-Forwarded-For": f"203.0.113.{n}", "X-Forwarded-Proto": "https"} for n in range(7)]
    answers = [direct.post("/login", json={"password": "x"}, headers=each).status_code for each in headers]
    assert answers == [401] * 5 + [429] * 2


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/api/jobs", "/api/nothing", "/nothing", "/openapi.json", "/v1/models"]
)
def test_every_response_has_the_security_headers(local: Site, path: str) -> None:
    headers = local.browser.get(path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


Make = Callable[..., Site]


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml", "/..%2f..%2fserver.py", "/static/../server.py", "/languages/..%2f..%2fserver.py",
        "/languages/../../server.py", "/%2e%2e/server.py", "//etc/passwd", "/index.html%00.js", "/languages/",
        "/api/jobs/..%2f..%2fsecret", "/api/jobs/a/result...%2f..%2fpasswd", "/api/jobs/a/result.exe", "/server.py",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file_that_is_not_the_pages(local: Site, path: str) -> None:
    local.take("cesar/status/a", status("a", "completed"))
    response = local.browser.get(path)
    assert response.status_code in {404, 405}, response.text
    assert "import" not in response.text
