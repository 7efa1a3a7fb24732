"""The webhook of a consumer that is restarted, at a receiver that is away for a while."""

from collections.abc import Callable

import pytest

from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, command, words
from tests.conftest import Mosquitto
from tests.integration.gateway.test_webhook import Receiver

pytestmark = [pytest.mark.mosquitto, pytest.mark.model]


def test_each_end_is_delivered_although_the_receiver_fails_and_the_consumer_is_killed(
    mosquitto: Mosquitto, serve: Callable[..., Consumer], join: Callable[..., Bus]
) -> None:
    receiver = Receiver()
    receiver.answers = [503]
    receiver.is_willing.clear()
    try:
        environ = {
            "CESAR_WEBHOOK__URL": f"http://127.0.0.1:{receiver.port}/cesar?token=secret",
            "CESAR_AUDIO__ALLOWED_HOSTS": f"127.0.0.1:{receiver.port}",
        }
        consumer = serve("--broker", mosquitto.url, environ=environ)
        bus = join(mosquitto.port)
        assert command("submit", "--job-id", "a", str(SPEECH), "--broker", mosquitto.url).returncode == 0
        consumer.wait_for_log("The webhook was not delivered")
        consumer.kill()
        consumer.start()
        health = bus.wait("cesar/consumer/cesar/health", lambda health: (health["webhook"] or {}).get("pending") == 1)
        receiver.is_willing.set()
        bus.publish("cesar/jobs", {"job_id": "b", "audio_path": "absent.wav"})
        bus.status("b")
        consumer.wait_for_log("Delivered ")
        read = consumer.logged().index("Delivered ")
        consumer.wait_for_log("Delivered ", read + 1)
        assert consumer.stop() == 0
    finally:
        receiver.is_willing.set()
        receiver.close()

    ends = {event["job_id"]: event for event in receiver.events}
    assert set(ends) == {"a", "b"}
    sent = [event["job_id"] for event in receiver.events]
    assert sent.count("a") >= 2, "one of them failed; the kill may have cut off another one"
    assert sent.count("b") == 1
    assert words(ends["a"]["text"]) == SPOKEN
    assert (ends["b"]["event_type"], ends["b"]["error_code"]) == ("error", "audio_not_found")
    assert health["webhook"]["given_up"] == 0
    assert "secret" not in consumer.logged().replace("webhook.secret", "").replace("The webhook's secret", "")
    info = bus.seen("cesar/consumer/cesar/info")[-1]
    assert info["settings"]["webhook"]["url"] == "***"
