"""What a connection is to be, what it turned out to be, and how paho is told; frozen values, for any thread."""

import ssl
from dataclasses import dataclass
from typing import Literal

from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from cesar_mqtt.mqtt.broker_url import BrokerUrl, Credentials, Version
from cesar_mqtt.mqtt.buffered_socket import BufferedClient

_SESSION_NEVER_EXPIRES = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Subscription:
    """What to be told of, at QoS 1."""

    topic_filter: str
    wants_retained: bool = False
    """Whether to be sent what is retained, at each connect; in 3.1.1 it is sent in any case."""

    @property
    def options(self) -> SubscribeOptions:
        """What MQTT 5 is told."""
        never, always = SubscribeOptions.RETAIN_DO_NOT_SEND, SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
        return SubscribeOptions(qos=1, retainHandling=always if self.wants_retained else never)


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for a client that is gone without a word."""

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = True


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """What is the same for every connection of a client."""

    address: BrokerUrl
    credentials: Credentials
    tls: ssl.SSLContext | None
    client_id: str
    persistent: bool
    will: Will | None
    subscriptions: tuple[Subscription, ...]
    unwanted: tuple[str, ...]
    """Topic filters that the session may still have from earlier, and that are to go."""
    keepalive_s: int
    receive_maximum: int
    """Unacknowledged messages that the broker may send, if it speaks MQTT 5."""
    max_packet_bytes: int | None

    @property
    def connect_properties(self) -> Properties:
        """What MQTT 5 is told with CONNECT."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = self.receive_maximum
        if self.persistent:
            properties.SessionExpiryInterval = _SESSION_NEVER_EXPIRES
        return properties

    def client(self, version: Version) -> BufferedClient:
        """Return a new paho that knows all this; for one connection."""
        five = version == "5"
        paho = BufferedClient(
            CallbackAPIVersion.VERSION2,
            self.client_id,
            clean_session=None if five else not self.persistent,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            transport="websockets" if self.address.websockets else "tcp",
            reconnect_on_failure=False,
            manual_ack=True,
        )
        paho.username_pw_set(self.credentials.username, self.credentials.password)
        if self.tls is not None:
            paho.tls_set_context(self.tls)
        if self.address.websockets:
            paho.ws_set_options(self.address.path)
        if self.will is not None:
            paho.will_set(self.will.topic, self.will.payload, self.will.qos, self.will.retain)
        return paho


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """A connection that stands, with its subscriptions made."""

    session_present: bool
    """Whether the broker still knew this client; if not, what it held for it is gone."""
    protocol: Version
    max_packet_bytes: int | None
    """The largest packet that the broker takes; None: no limit is known."""
    number: int
    """Greater for each further connection."""
    refused_filters: tuple[str, ...] = ()
    """Subscriptions that the broker refused, or granted below QoS 1."""
