"""The page behind nginx, below a path of its own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.acceptance.harness import PATIENCE_S, Bus
from tests.acceptance.reverse_proxy import reverse_proxy
from tests.acceptance.web_page import Page, alone
from tests.conftest import Mosquitto

pytestmark = [pytest.mark.mosquitto]

Join = Callable[..., Bus]
ENVIRON = {"CESAR_WEB__TRUSTED_PROXIES": '["127.0.0.1"]', "CESAR_WEB__TRUSTED_PROXIES_AUTHENTICATE": "false"}


@pytest.fixture
def page(mosquitto: Mosquitto, tmp_path: Path) -> Iterator[Page]:
    """A page with a password, which trusts this machine's proxies to forward only."""
    file = tmp_path / "password"
    file.write_text("sesame")
    file.chmod(0o600)
    environ = {**ENVIRON, "CESAR_WEB__PASSWORD_FILE": str(file)}
    with alone(mosquitto, tmp_path, needs_consumer=False, environ=environ) as page:
        yield page


def test_the_page_works_below_a_path_with_cookies_events_and_uploads(
    page: Page, mosquitto: Mosquitto, join: Join, tmp_path: Path
) -> None:
    bus = join(mosquitto.port)
    with reverse_proxy(page.port, tmp_path) as url, httpx2.Client(base_url=url, timeout=PATIENCE_S) as browser:
        assert "page.js" in browser.get("").text
        assert browser.get("page.js").headers["Content-Type"].startswith("text/javascript")
        assert browser.get("api/jobs").status_code == 401
        own = {"Origin": url.removesuffix("/cesar/"), "Sec-Fetch-Site": "same-origin"}
        entered = browser.post("login", json={"password": "sesame"}, headers=own)
        assert entered.status_code == 204
        assert "Secure" not in entered.headers["Set-Cookie"]
        assert [(cookie.path, cookie.domain) for cookie in browser.cookies.jar] == [("/cesar", "127.0.0.1")]
        assert browser.get("api/jobs").json()["jobs"] == []

        with browser.stream("GET", "api/events") as events:
            lines = events.iter_lines()
            assert next(line for line in lines if line.startswith("event")) == "event: snapshot"
            bus.publish("cesar/status/a", {"job_id": "a", "status": "queued"}, retain=True)
            seen = (json.loads(line[6:]) for line in lines if line.startswith("data: "))
            assert next(data for data in seen if data.get("job_id") == "a")["status"] == "queued"

        foreign = browser.post("api/jobs/a/cancel", headers={"Origin": "http://evil.example"})
        assert (foreign.status_code, foreign.json()["code"]) == (403, "foreign_origin")
        upload = browser.post("api/jobs", files={"file": ("a.wav", bytes(3 << 20))}, headers=own)
        assert upload.status_code == 202  # the broker has it; there is no consumer
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        assert browser.get("api/events/socket", headers={**upgrade, "Sec-WebSocket-Key": "eA=="}).status_code == 404
        assert browser.post("logout", headers=own).status_code == 204
        assert browser.get("api/jobs").status_code == 401
    bus.leave()
    bus.messages.clear()  # they are the test's own


def test_who_sits_behind_the_proxy_counts_and_what_it_speaks(page: Page, tmp_path: Path) -> None:
    other = httpx2.HTTPTransport(local_address="127.0.0.2")
    password, wrong = {"password": "sesame"}, {"password": "x"}
    with (
        reverse_proxy(page.port, tmp_path, scheme="https") as url,
        httpx2.Client(base_url=url, transport=other) as guesser,
        httpx2.Client(base_url=url) as neighbour,
    ):
        for number in range(6):  # what it claims itself makes no difference
            claimed = {"X-Forwarded-For": f"203.0.113.{number}", "X-Forwarded-Proto": "http"}
            last = guesser.post("login", json=wrong, headers=claimed)
        assert last.status_code == 429
        assert guesser.post("login", json=password).status_code == 429
        entered = neighbour.post("login", json=password)
        assert entered.status_code == 204
        assert "Secure" in entered.headers["Set-Cookie"]
