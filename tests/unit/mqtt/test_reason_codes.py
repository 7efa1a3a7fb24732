"""What is said of a connection that ended."""

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from cesar_mqtt.mqtt import reason_codes as reasons
from cesar_mqtt.mqtt.broker_url import Credentials, parse_broker_url
from cesar_mqtt.mqtt.messages import ConnectOptions


def ending(*, persistent: bool) -> str | None:
    profile = ConnectOptions(
        address=parse_broker_url("mqtt://127.0.0.1"),
        credentials=Credentials(),
        tls=None,
        client_id="cesar-submit-0123",
        persistent=persistent,
        will=None,
        subscriptions=(),
        unwanted=(),
        keepalive_s=30,
        receive_maximum=10,
        max_packet_bytes=None,
    )
    closed = ReasonCode(PacketTypes.DISCONNECT, "Unspecified error")
    return reasons.ending(closed, profile, said=False, held_s=1.0)


def test_only_a_lasting_name_can_be_somebody_elses_too() -> None:
    assert "another client may have the name" in (ending(persistent=True) or "")
    assert ending(persistent=False) is None
