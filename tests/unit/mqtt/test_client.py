"""The delay before the client reconnects, and what it reports of a failure, without a network."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.connection import Connection
from cesar_mqtt.mqtt.messages import ConnectionFailure

REFUSED = ConnectionFailure("mqtt://b:1883 refused this client: Not authorized", "Check broker.username.", 135)


def client(**options: Any) -> MqttClient:
    settings = BrokerSettings(url="mqtt://b", protocol="3.1.1")
    return MqttClient(settings, client_id="edge", persistent=True, **options)


def ended(**fields: Any) -> Connection:
    """A connection that was closed, as far as the client looks at it."""
    defaults: dict[str, Any] = {
        "unsupported": False,
        "tcp_connected": True,
        "connack": None,
        "malformed": False,
        "expired": False,
        "refused": False,
        "ready_s": 0.0,
        "info": None,
        "failure": ConnectionFailure("Connection refused"),
        "is_suspicious": False,
    }
    return cast("Connection", SimpleNamespace(**{**defaults, **fields}))


def delay_s(of: MqttClient, **fields: Any) -> float:
    delay = of._next_delay_s(ended(**fields))
    assert delay is not None
    return delay


def test_after_short_idle_connections_the_delay_grows_and_starts_again_after_a_long_one() -> None:
    """Two clients of one client id disconnect each other."""
    reconnecting = client()
    for ceiling in (1, 2, 4, 8, 16, 32, 60, 60):
        assert ceiling / 2 <= delay_s(reconnecting, ready_s=3.0, info=object()) <= ceiling
    assert delay_s(reconnecting, ready_s=59.9, info=object()) >= 30.0
    assert delay_s(reconnecting, ready_s=60.0, info=object()) <= 1.0


def test_while_the_broker_is_away_the_delay_is_seconds() -> None:
    reconnecting = client()
    for ceiling in (1, 2, 4, 5, 5, 5):
        assert ceiling / 2 <= delay_s(reconnecting) <= ceiling
    assert delay_s(reconnecting, ready_s=3.0, info=object()) <= 1.0
    assert delay_s(reconnecting) <= 1.0, "it was there in between"


@pytest.mark.parametrize(
    "end",
    [
        {"is_suspicious": True},
        {"failure": ConnectionFailure("the broker closed the connection", reason_code=139, is_broker_away=True)},
    ],
    ids=["a message in flight", "the broker shuts down"],
)
def test_a_short_connection_that_has_another_reason_is_made_again_soon(end: dict[str, Any]) -> None:
    reconnecting = client()
    assert [delay_s(reconnecting, ready_s=3.0, info=object(), **end) <= 1.0 for _ in range(8)] == [True] * 8


def test_a_refusal_after_a_connection_is_followed_by_the_longest_delay() -> None:
    reconnecting = client()
    reconnecting._ever_connected = True
    assert delay_s(reconnecting, refused=True, failure=REFUSED) >= 30.0
    assert reconnecting.failure == REFUSED


def test_a_refusal_of_the_first_connection_ends_the_client() -> None:
    refusals: list[BrokerRefusedError] = []
    refused = client(on_refused=refusals.append)
    assert refused._next_delay_s(ended(refused=True, failure=REFUSED)) is None
    with pytest.raises(BrokerRefusedError) as caught:
        refused.wait_connected(0)
    assert refusals == [caught.value]
    error = caught.value
    assert (error.problem, error.advice, error.reason_code) == (f"{REFUSED.problem}.", REFUSED.advice, 135)


def test_a_connection_that_has_served_its_time_is_replaced_at_once() -> None:
    assert delay_s(client(), expired=True) == 0.0


def test_a_stopped_client_makes_no_further_connection() -> None:
    stopped = client()
    stopped.close()
    assert stopped._next_delay_s(ended()) is None


def test_a_lost_connection_is_always_logged_and_a_failed_attempt_when_its_reason_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reconnecting = client()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            delay_s(reconnecting)
        delay_s(reconnecting, failure=ConnectionFailure("No route to host", "Look at the cable."))
        for _ in range(2):
            delay_s(reconnecting, ready_s=1.0, info=object())
    lines = [
        (record.__dict__["action"], record.getMessage().partition(" Next attempt in ")[0]) for record in caplog.records
    ]
    assert lines == [
        ("not_connected", "No connection to mqtt://b:1883: Connection refused."),
        ("not_connected", "No connection to mqtt://b:1883: No route to host. Look at the cable."),
        ("disconnected", "Lost the connection to mqtt://b:1883: Connection refused."),
        ("disconnected", "Lost the connection to mqtt://b:1883: Connection refused."),
    ]
