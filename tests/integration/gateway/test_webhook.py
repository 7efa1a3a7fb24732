"""The webhook at a real HTTP server: what is delivered, how it is signed, and what becomes of failures."""

import base64
import hashlib
import hmac
import json
import stat
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.config import BrokerSettings, WebhookSettings
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.gateway.webhook import Webhook
from cesar_mqtt.protocol.topics import Topics
from tests.conftest import PATIENCE_S
from tests.factories import delivery

NOW = 1_800_000_000.0
SINCE = "2027-01-15T08:00:00.000Z"  # the same instant
KEY = b"0123456789abcdef"


class Receiver:
    """An HTTP server that notes its requests and answers with the next of `answers`, then with 204.

    Attributes:
        answers: the status codes.
        is_willing: while it is not set, requests beyond `answers` wait.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.is_willing = threading.Event()
        self.is_willing.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                answer = receiver.answers.pop(0) if receiver.answers else 204
                if answer == 204:
                    receiver.is_willing.wait(PATIENCE_S)
                self.send_response(answer)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(tmp_path: Path, receiver: Receiver) -> Iterator[Callable[..., Webhook]]:
    made: list[Webhook] = []

    def create(clock: Clock, **settings: Any) -> Webhook:
        port = receiver.port
        secret = tmp_path / "secret"
        secret.write_text(f"whsec_{base64.b64encode(KEY).decode()}\n")
        values = {"url": f"http://127.0.0.1:{port}/hook?token=1", "key_file": secret, **settings}
        made.append(
            Webhook(
                WebhookSettings(**values),
                BrokerSettings(url="mqtt://127.0.0.1:9"),
                Topics("cesar", "cesar"),
                allowed_hosts=(f"127.0.0.1:{port}",),
                data_dir=tmp_path / "data",
                clock=clock,
            )
        )
        return made[-1]

    yield create
    for each in made:
        each.close()


def status(job_id: str = "a", state: str = "completed", *, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    known = {"job_id": job_id, "status": state, "attempt": attempt, "updated_at": SINCE, "completed_at": None}
    return {**known, "result_text": "Hello.", "metadata": {"file": "a.wav"}, "consumer": "cesar", **fields}


def bring(webhook: Webhook, *statuses: dict[str, Any], job_id: str = "a") -> float:
    """Have statuses arrive from the bus, and deliver what is due."""
    for each in statuses:
        payload = json.dumps(each).encode() if each else b""
        webhook._on_message(delivery(f"cesar/status/{each.get('job_id', job_id)}", payload))
    return webhook.run_once(0.0)


def test_the_end_of_a_job_is_delivered_once_and_signed(make: Callable[..., Webhook], receiver: Receiver) -> None:
    webhook = make(Clock())
    bring(webhook, status(state="queued", attempt=0), status(state="processing"), status(), status())

    (event,) = receiver.events
    assert (event["event_type"], event["job_id"], event["text"]) == ("completed", "a", "Hello.")
    assert event["metadata"] == {"file": "a.wav"}
    headers, body = receiver.requests[0]
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body))
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["webhook-timestamp"] == str(int(NOW))
    assert headers["content-type"] == "application/json"

    webhook.close()
    again = make(Clock())
    bring(again, status(), status("b"))
    assert [event["job_id"] for event in receiver.events] == ["a", "b"]


def test_a_failure_is_tried_again_with_the_same_id_and_over_a_restart(
    make: Callable[..., Webhook], receiver: Receiver
) -> None:
    clock = Clock()
    receiver.answers = [500, 404]
    webhook = make(clock)
    assert bring(webhook, status()) == pytest.approx(5.0)
    assert webhook.health().pending == 1
    assert "HTTP status 500" in (webhook.health().problem or "")
    assert "token" not in (webhook.health().problem or "")
    webhook.close()

    again = make(clock)
    assert again.run_once(0.0) == pytest.approx(5.0)
    clock.now += 5.0
    assert again.run_once(0.0) == pytest.approx(30.0)
    clock.now += 30.0
    again.run_once(0.0)
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len(receiver.requests) == 3
    assert (again.health().pending, again.health().problem) == (0, None)


def test_what_fails_for_too_long_or_is_not_wanted_any_more_is_given_up_and_counted(
    make: Callable[..., Webhook], receiver: Receiver
) -> None:
    clock = Clock()
    receiver.answers = [500, 500, 410]
    webhook = make(clock, retry_for=10.0)
    bring(webhook, status())
    clock.now += 11.0
    webhook.run_once(0.0)
    assert (webhook.health().pending, webhook.health().given_up) == (0, 1)
    bring(webhook, status("b"))
    assert (webhook.health().pending, webhook.health().given_up) == (0, 2)


def test_only_the_events_that_are_wanted_and_nothing_from_before_the_webhook_is_delivered(
    make: Callable[..., Webhook], receiver: Receiver
) -> None:
    webhook = make(Clock(), events=("queued", "error", "deleted"))
    bring(webhook, status("old", "error", updated_at="2026-01-01T00:00:00.000Z"))
    bring(webhook, status(state="queued"), status(), status(state="error", attempt=2), {})
    assert [event["event_type"] for event in receiver.events] == ["queued", "error", "deleted"]
    assert receiver.events[2]["job_id"] == "a"


@pytest.mark.parametrize(
    ("url", "hosts", "said"),
    [
        ("http://example.org/hook", (), r"No host is allowed: name 'example\.org' in `webhook\.allowed_hosts`"),
        (
            "http://10.0.0.1/hook",
            ("10.0.0.2",),
            r"'10\.0\.0\.1' is not in `webhook\.allowed_hosts`: add '10\.0\.0\.1' there\.",
        ),
        ("http:///hook", ("x",), "URL cannot be used"),
    ],
)
def test_the_host_has_to_be_allowed(tmp_path: Path, url: str, hosts: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Webhook(
            WebhookSettings(url=url), BrokerSettings(), Topics("cesar", "cesar"), allowed_hosts=hosts, data_dir=tmp_path
        )


def test_a_secret_is_made_for_its_owner_only_and_kept(make: Callable[..., Webhook], tmp_path: Path) -> None:
    first = make(Clock(), key_file=None)
    path = tmp_path / "data" / "webhook.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("whsec_")
    first.close()
    second = make(Clock(), key_file=None)
    assert first._key == second._key != KEY
    assert len(first._key) == 32
