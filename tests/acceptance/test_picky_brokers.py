"""The consumer with brokers that close the connection at a message: everything else has to arrive."""

import json
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.acceptance.harness import SPEECH, Bus, Consumer, command
from tests.conftest import Mosquitto, StartMosquitto
from tests.proxy import PickyProxy

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

LIMIT_BYTES = 3000
NOTE = "x" * 2700
"""In the metadata, it makes a status that is larger than the limit, and a request that is not."""

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


def submit(bus: Bus, job_id: str, note: str = "short") -> None:
    bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": str(SPEECH), "metadata": {"note": note}})


def test_a_status_over_a_limit_that_is_not_announced_is_cut_and_the_others_pass(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    """As NATS does; the log and `doctor` name what does not pass in any length, the discovery message."""
    with closing(PickyProxy(mosquitto.port, lambda _topic, size_bytes: size_bytes <= LIMIT_BYTES)) as proxy:
        bus = join(mosquitto.port)
        consumer = serve("--broker", proxy.url)
        submit(bus, "large", NOTE)
        submit(bus, "small")
        assert bus.status("small", "completed")["metadata"] == {"note": "short"}
        large = bus.status("large", "completed")
        assert (large["metadata"], large["result_truncated"]) == ({}, True)
        assert "homeassistant/device/cesar-mqtt_cesar/config" in proxy.ended
        assert len(proxy.ended) <= 20, proxy.ended
        assert "cesar/status/large: it is cut to half its size" in consumer.logged()
        health = json.loads(command("health", "--json", "--broker", mosquitto.url).stdout)
        found = command("doctor", "--broker", mosquitto.url).stdout
        for message in health["quarantined"]:
            assert f"The broker does not accept the consumer's message on {message['topic']}" in found


def test_denied_topics_hold_up_nothing_with_mosquitto_that_closes_the_connection(
    start_mosquitto: StartMosquitto, serve: Serve, join: Join, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """2.0.11 does so with `max_queued_messages 0`; later versions only refuse the message."""
    access = tmp_path_factory.mktemp("access") / "acl"
    access.write_text("topic readwrite cesar/#\n")
    broker = start_mosquitto("max_queued_messages 0", f"acl_file {access}")
    bus = join(broker.port)
    consumer = serve("--broker", broker.url)
    submit(bus, "one")
    bus.status("one", "completed")
    bus.wait("cesar/consumer/cesar/last", lambda last: last["job_id"] == "one")
    consumer.wait_for_log("homeassistant/device/cesar-mqtt_cesar/config")
    assert consumer.stop() == 0
