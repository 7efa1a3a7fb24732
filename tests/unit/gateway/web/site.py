"""The application without a network: a bus that records what is submitted, and answers commands as it is told."""

import asyncio
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.gateway.web.access import AccessRules, access_rules
from cesar_mqtt.gateway.web.app import WebApp
from cesar_mqtt.gateway.web.board import Board
from cesar_mqtt.gateway.web.problems import ProblemError
from cesar_mqtt.gateway.web.upload_store import UploadStore
from cesar_mqtt.mqtt.messages import ConnectionInfo, Delivery
from cesar_mqtt.protocol.topics import Topics
from tests.factories import delivery

TOPICS = Topics("cesar", "cesar")
AT = "2026-01-23T21:45:00.120Z"

_times = itertools.count(10)


def status(job_id: str = "a", state: str = "queued", **fields: Any) -> dict[str, Any]:
    """A status as the consumer `cesar` publishes it, as far as the page reads it."""
    document = {
        "job_id": job_id,
        "status": state,
        "attempt": 1,
        "created_at": AT,
        "completed_at": f"2026-01-23T21:{next(_times) // 60:02d}:00.000Z" if state in ("completed", "error") else None,
        "queue_position": None,
        "audio_source": f"{job_id}.wav",
        "model_size": "base",
        "result_text": "Hello there." if state == "completed" else None,
        "error_code": None,
        "error_message": None,
        "formats": [],
        "result_truncated": False,
        "metadata": {},
        "consumer": "cesar",
    }
    return {**document, **fields}


class FakeBusLink:
    """Takes the place of `BusLink`."""

    refusal = None

    def __init__(self, board: Board) -> None:
        self.board = board
        self.connection: ConnectionInfo | None = ConnectionInfo(
            session_present=False, protocol="5", max_packet_bytes=None, number=1
        )
        self.submitted: list[Submission] = []
        self.asked: list[tuple[str, dict[str, Any], str]] = []
        self.answers: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {}
        self.on_submit: Callable[[Submission], object] = self.accept

    def start_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing connects."""

    def close(self) -> None:
        """Nothing is connected."""

    def accept(self, item: Submission) -> None:
        """Publish `queued`, as a consumer does."""
        self.board.take(message(TOPICS.status(item.job_id), status(item.job_id)))

    async def submit(self, item: Submission) -> None:
        self.submitted.append(item)
        self.on_submit(item)

    async def ask(self, command: str, fields: Mapping[str, Any], *, consumer: str) -> dict[str, Any]:
        self.asked.append((command, dict(fields), consumer))
        if command not in self.answers:
            raise ProblemError(409, "It is not possible.", "not_possible")
        return self.answers[command](fields)


def message(topic: str, document: Mapping[str, Any] | bytes, **fields: Any) -> Delivery:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return delivery(topic, payload, **fields)


class Site:
    """The application, its bus, and a browser or program on the same machine."""

    def __init__(
        self,
        folder: Path,
        rules: AccessRules | None = None,
        *,
        stores: bool = False,
        most: int = 1 << 20,
        check_room: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        self.folder = folder / "uploads"
        self.folder.mkdir()
        self.needed: dict[str, bool] = {}
        self.ended: set[str] = set()
        self.store = (
            UploadStore(
                self.folder, is_needed=self.needed.get, has_ended=self.ended.__contains__, check_room=check_room
            )
            if stores
            else None
        )
        self.app = WebApp(
            TOPICS,
            BrokerSettings(url="mqtt://127.0.0.1:1"),
            rules or access_rules("127.0.0.1", password=None, proxies=(), hosts=()),
            folder=self.folder,
            store=self.store,
            max_payload_bytes=most,
            connect=lambda _settings, _topics, board: FakeBusLink(board),  # type: ignore[arg-type,return-value]
        )
        self.board = self.app.board
        bus = self.app.bus
        assert isinstance(bus, FakeBusLink)
        self.bus: FakeBusLink = bus
        self.browser = self.client("127.0.0.1")

    @property
    def stored_bytes(self) -> int:
        return 0 if self.store is None else self.store.used_bytes

    def client(self, address: str, *, host: str = "127.0.0.1:8188") -> TestClient:
        return TestClient(
            self.app.asgi, base_url=f"http://{host}", client=(address, 50_000), raise_server_exceptions=False
        )

    def take(self, topic: str, document: Mapping[str, Any] | bytes, **fields: Any) -> None:
        self.board.take(message(topic, document, **fields))

    def online(self, name: str = "cesar", **info: Any) -> None:
        self.take(f"cesar/consumer/{name}/state", {"state": "online"})
        self.take(f"cesar/consumer/{name}/info", {"models": ["base", "tiny.en"], "default_model": "base", **info})
