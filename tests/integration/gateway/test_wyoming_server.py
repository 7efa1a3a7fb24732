"""What the Wyoming server asks of the network: mDNS on loopback, and names from a Home Assistant."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest
from zeroconf import ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from cesar_mqtt.config import WyomingSettings
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.gateway.home_assistant import HomeAssistantNames
from cesar_mqtt.gateway.wyoming_server import announce
from tests.conftest import PATIENCE_S


def test_home_assistant_finds_the_server_by_mdns() -> None:
    found = threading.Event()
    seen: list[str] = []

    def note(*, name: str, state_change: ServiceStateChange, **_: object) -> None:
        if state_change is ServiceStateChange.Added and name.startswith("cesar-mqtt-test."):
            seen.append(name)
            found.set()

    async def announced() -> ServiceInfo | None:
        service = await announce("cesar-mqtt-test", "127.0.0.1", 10300)
        try:
            assert await asyncio.to_thread(found.wait, PATIENCE_S)
            patience_ms = int(PATIENCE_S * 1000)
            return await asyncio.to_thread(browsing.get_service_info, "_wyoming._tcp.local.", seen[0], patience_ms)
        finally:
            await service.async_close()

    browsing = Zeroconf(interfaces=["127.0.0.1"])
    try:
        ServiceBrowser(browsing, "_wyoming._tcp.local.", handlers=[note])
        info = asyncio.run(announced())
    finally:
        browsing.close()
    assert info is not None
    assert (info.port, info.parsed_addresses()) == (10300, ["127.0.0.1"])


class _HomeAssistant(BaseHTTPRequestHandler):
    """Answers as Home Assistant's REST API does."""

    states: ClassVar[list[dict[str, Any]]] = [
        {"entity_id": "light.lamp", "attributes": {"friendly_name": "Büro Hängelampe"}},
        {"entity_id": "sensor.power", "attributes": {"friendly_name": "Power"}},
        {"entity_id": "switch.nameless", "attributes": {}},
        {"entity_id": "scene.dinner", "attributes": {"friendly_name": "Dinner"}},
    ]
    administrator: ClassVar[str] = "Bearer administrator"

    def do_GET(self) -> None:
        self._answer(self.states if self.path == "/api/states" else None)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        is_administrator = self.headers["authorization"] == self.administrator
        self._answer(["Kitchen", "Büro Hängelampe"] if self.path == "/api/template" and is_administrator else None)

    def _answer(self, document: object) -> None:
        body = json.dumps(document).encode()
        known = self.headers["authorization"] in (self.administrator, "Bearer user")
        self.send_response(401 if not known else 403 if document is None else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def home() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _HomeAssistant) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def _names(url: str, folder: Path, token: str) -> HomeAssistantNames:
    (folder / "token").write_text(f"{token}\n")
    return HomeAssistantNames(WyomingSettings(home_assistant_url=f"{url}/", home_assistant_token_file=folder / "token"))


def test_names_of_areas_and_of_what_people_call_by_name_are_fetched(home: str, tmp_path: Path) -> None:
    assert _names(home, tmp_path, "administrator").fetch() == ("Kitchen", "Büro Hängelampe", "Dinner")
    assert _names(home, tmp_path, "user").fetch() == ("Büro Hängelampe", "Dinner")
    with pytest.raises(httpx2.HTTPError, match="401"):
        _names(home, tmp_path, "wrong").fetch()


def test_the_names_stay_when_home_assistant_is_away(home: str, tmp_path: Path) -> None:
    names = _names("http://127.0.0.1:9", tmp_path, "user")
    names.names = ("Lamp",)

    async def refresh(timeout_s: float) -> None:
        refreshing = asyncio.create_task(names.refresh_for_ever(60.0))
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while list(names.names) == ["Lamp"]:  # noqa: ASYNC110 - nobody is told of it
                    await asyncio.sleep(0.02)
        refreshing.cancel()

    asyncio.run(refresh(1.0))
    assert list(names.names) == ["Lamp"]
    names._url = home
    asyncio.run(refresh(PATIENCE_S))
    assert list(names.names) == ["Büro Hängelampe", "Dinner"]


def test_a_token_that_is_refused_is_not_used_again(home: str, tmp_path: Path) -> None:
    names = _names(home, tmp_path, "wrong")
    asyncio.run(asyncio.wait_for(names.refresh_for_ever(0.0), 60.0))
    assert names.names == ()


@pytest.mark.parametrize("file", [None, Path("/absent/token")])
def test_a_url_needs_a_token(file: Path | None) -> None:
    with pytest.raises(ConfigError, match=r"wyoming\.home_assistant_token_file"):
        HomeAssistantNames(WyomingSettings(home_assistant_url="http://ha:8123", home_assistant_token_file=file))
