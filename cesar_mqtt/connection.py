"""One connection to a broker, from CONNECT to its end; paho stops here.

The network thread makes it, runs it and throws it away. `acknowledge`, `publish` and `leave` may be called from any
thread.
"""

import logging
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Literal, ParamSpec

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from cesar_mqtt.addresses import BrokerAddress, Credentials, Version
from cesar_mqtt.handoff import Delivery, Receipt
from cesar_mqtt.logs import event
from cesar_mqtt.publications import MOST_PACKET_BYTES, PacketTooLargeError, Publication, PublishTicket

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

logger = logging.getLogger(__name__)

TURN_S = 1.0
"""How long a turn waits when nothing happens."""
IN_FLIGHT = 20
"""Published and not yet acknowledged, at most: what mosquitto asks for. paho holds the others back."""

_ANSWER_S = 15.0
_SOON_S = 60.0
_SESSION_NEVER_EXPIRES = 0xFFFFFFFF
_MOST_16_BITS = 65_535

# Reason codes of MQTT 5, section 2.4; paho translates the return codes of 3.1.1 into them.
_PROTOCOL_ERROR = 130
_UNSUPPORTED_VERSION = 132
_CLIENT_ID_NOT_VALID = 133
_BAD_CREDENTIALS = 134
_NOT_AUTHORIZED = 135
_BANNED = 138
_KEEP_ALIVE_TIMEOUT = 141
_TAKEN_OVER = 142

_P = ParamSpec("_P")


@dataclass(frozen=True, slots=True)
class Subscription:
    """What to be told of, at QoS 1."""

    topic_filter: str
    wants_retained: bool = False
    """Whether to be sent what is retained, at each connect; in 3.1.1 it is sent in any case."""


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes for a client that is gone without a word."""

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = True


@dataclass(frozen=True, slots=True)
class Profile:
    """What is the same for every connection of a client."""

    address: BrokerAddress
    credentials: Credentials
    tls: ssl.SSLContext | None
    client_id: str
    persistent: bool
    will: Will | None
    subscriptions: tuple[Subscription, ...]
    keepalive_s: int
    receive_maximum: int
    """Unacknowledged messages that the broker may send, if it speaks MQTT 5."""
    max_packet_bytes: int | None


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


class Connection:
    """A paho client that is used once.

    So paho's own reconnecting, which resends what it has in flight under its old packet ids, never runs: a packet id
    belongs to one connection, and an acknowledgement that is late ends nowhere. paho's callbacks only take notes, since
    paho calls them while it holds locks that `publish` needs; the owner reads the notes after the turn.

    Attributes:
        info: set when it stands.
        opened: whether the broker took the connection, below MQTT.
        answer: what the broker answered to CONNECT; None: nothing.
        unreadable: whether it ended over a packet that paho cannot read.
        left: whether it was given up to be made anew at once.
        in_flight: how many messages the broker takes at once, as far as is known.
        reason: why it ended, in words.
    """

    def __init__(
        self,
        number: int,
        profile: Profile,
        *,
        version: Version,
        in_flight: int,
        lasts_s: float,
        deliver: Callable[[Delivery], None],
    ) -> None:
        """Prepare it; `open` connects. After `lasts_s` it is left; `deliver` gets each message and may block."""
        self.info: ConnectionInfo | None = None
        self.opened = False
        self.answer: ReasonCode | None = None
        self.unreadable = False
        self.left = False
        self.in_flight = in_flight
        self.reason = "it was closed without an answer"
        self._number = number
        self._profile = profile
        self._version: Version = version
        self._lasts_s = lasts_s
        self._deliver = deliver
        self._session_present = False
        self._limit_bytes = profile.max_packet_bytes or MOST_PACKET_BYTES
        self._published: list[tuple[PublishTicket, str | None]] = []
        self._answer_by = self._stands_since = self._cut_at = math.inf
        self._paho = self._make_paho()

    @property
    def held_s(self) -> float:
        """For how many seconds it has stood; 0: it never did."""
        return max(0.0, time.monotonic() - self._stands_since)

    @property
    def unsupported(self) -> bool:
        """Whether the broker answered that it does not know this version of MQTT."""
        return self.answer is not None and self.answer.value == _UNSUPPORTED_VERSION

    @property
    def refused(self) -> bool:
        """Whether the broker said no in a way that trying again does not change."""
        final = (_UNSUPPORTED_VERSION, _CLIENT_ID_NOT_VALID, _BAD_CREDENTIALS, _NOT_AUTHORIZED, _BANNED)
        return self.answer is not None and self.answer.value in final

    # -- any thread ----------------------------------------------------------------------------------------------------

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge those that came by this connection."""
        for delivery in deliveries:
            if delivery.receipt.connection == self._number:
                self._paho.ack(delivery.receipt.mid, delivery.qos)

    def publish(self, publication: Publication) -> PublishTicket | None:
        """Hand a message to paho; None: the connection is gone.

        Raises:
            PacketTooLargeError: it is over the broker's limit.
        """
        if publication.packet_bytes > self._limit_bytes:
            raise PacketTooLargeError(publication.packet_bytes, self._limit_bytes)
        properties = _publish_properties(publication) if self._version == "5" else None
        sent = self._paho.publish(
            publication.topic, publication.payload, publication.qos, publication.retain, properties
        )
        return PublishTicket(self._number, sent.mid) if sent.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def leave(self, timeout_s: float) -> None:
        """Send what is queued, then DISCONNECT; if that takes longer, the connection is cut."""
        self._cut_at = time.monotonic() + timeout_s
        self._paho.disconnect()

    # -- the network thread --------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Connect; CONNECT goes out with the first turn. False: it did not work."""
        profile = self._profile
        host, port = profile.address.host, profile.address.port
        try:
            if self._version == "5":
                properties = _connect_properties(profile)
                self._paho.connect(
                    host, port, profile.keepalive_s, clean_start=not profile.persistent, properties=properties
                )
            else:
                self._paho.connect(host, port, profile.keepalive_s)
        except OSError as exc:
            self.reason = str(exc) if isinstance(exc, ssl.SSLError) else exc.strerror or str(exc)
            return False
        self.opened = True
        self._answer_by = time.monotonic() + _ANSWER_S
        return True

    def turn(self) -> bool:
        """Send and take in what there is to send and take in; False: the connection has ended."""
        if self._paho.loop(TURN_S) != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        if self.held_s >= self._lasts_s and not self.left:
            self._leave_for_now("it has served its purpose")
        now = time.monotonic()
        if self.info is None and now >= self._answer_by:
            self.reason = f"the broker did not answer within {_ANSWER_S:.0f} s"
            return False
        return now < self._cut_at

    def take_published(self) -> list[tuple[PublishTicket, str | None]]:
        """Return what the broker has taken, or refused with a reason, since the last call."""
        published, self._published = self._published, []
        return published

    def dispose(self) -> None:
        """Close what is still open, and break the circle of references: paho's descriptors close with its last one."""
        paho = self._paho
        paho.on_connect = paho.on_subscribe = paho.on_message = paho.on_publish = paho.on_disconnect = None
        still_open = paho.socket()
        if still_open is not None:
            still_open.close()

    def _leave_for_now(self, reason: str) -> None:
        self.left, self.reason = True, reason
        self.leave(_ANSWER_S)

    def _make_paho(self) -> Client:
        profile = self._profile
        five = self._version == "5"
        paho = Client(
            CallbackAPIVersion.VERSION2,
            profile.client_id,
            clean_session=None if five else not profile.persistent,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            transport="websockets" if profile.address.websockets else "tcp",
            reconnect_on_failure=False,
            manual_ack=True,
        )
        paho.max_inflight_messages = self.in_flight
        paho.username_pw_set(profile.credentials.username, profile.credentials.password)
        if profile.tls is not None:
            paho.tls_set_context(profile.tls)
        if profile.address.websockets:
            paho.ws_set_options(profile.address.path)
        if profile.will is not None:
            paho.will_set(profile.will.topic, profile.will.payload, profile.will.qos, profile.will.retain)
        paho.on_connect = contained(self._on_connect)
        paho.on_subscribe = contained(self._on_subscribe)
        paho.on_message = contained(self._on_message)
        paho.on_publish = contained(self._on_publish)
        paho.on_disconnect = contained(self._on_disconnect)
        paho.on_socket_open = contained(_send_at_once)
        # Without this one, `publish` and `ack` would write to the socket from their caller's thread, into the midst of
        # what the network thread is writing.
        paho.on_socket_register_write = _do_nothing
        return paho

    # -- paho's callbacks ----------------------------------------------------------------------------------------------

    def _on_connect(
        self, paho: Client, _userdata: object, flags: ConnectFlags, answer: ReasonCode, properties: Properties | None
    ) -> None:
        self.answer = answer
        if answer.is_failure:
            self.reason = self._refusal(answer)
            return
        self.reason = "it was closed"
        self._session_present = flags.session_present
        self._limit_bytes = min(self._limit_bytes, getattr(properties, "MaximumPacketSize", MOST_PACKET_BYTES))
        receive_maximum = getattr(properties, "ReceiveMaximum", _MOST_16_BITS)
        subscriptions = self._profile.subscriptions
        if receive_maximum < self.in_flight:
            self.in_flight = receive_maximum  # paho can be told only before it connects
            self._leave_for_now(f"the broker takes only {receive_maximum} messages at once")
        elif not subscriptions:
            self._stand(())
        elif self._version == "5":
            paho.subscribe([(wanted.topic_filter, _options(wanted)) for wanted in subscriptions])
        else:
            paho.subscribe([(wanted.topic_filter, 1) for wanted in subscriptions])

    def _on_subscribe(
        self, _paho: Client, _userdata: object, _mid: int, granted: list[ReasonCode], _properties: Properties | None
    ) -> None:
        pairs = zip(self._profile.subscriptions, granted, strict=True)
        self._stand(tuple(wanted.topic_filter for wanted, code in pairs if code.is_failure or code.value < 1))

    def _stand(self, refused_filters: tuple[str, ...]) -> None:
        limit_bytes = self._limit_bytes if self._limit_bytes < MOST_PACKET_BYTES else None
        self._stands_since = time.monotonic()
        self.info = ConnectionInfo(self._session_present, self._version, limit_bytes, self._number, refused_filters)

    def _on_message(self, _paho: Client, _userdata: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError as exc:
            topic = exc.object.decode(errors="replace")
        # paho keeps those that came as attributes; asking it for one that did not takes a microsecond.
        properties = vars(message.properties) if message.properties is not None else {}
        self._deliver(
            Delivery(
                topic=topic,
                payload=bytes(message.payload),
                qos=message.qos,
                retain=message.retain,
                dup=message.dup,
                receipt=Receipt(self._number, message.mid),
                user_properties=tuple(properties.get("UserProperty", ())),
                response_topic=properties.get("ResponseTopic"),
                correlation_data=properties.get("CorrelationData"),
                expires_in_s=properties.get("MessageExpiryInterval"),
                received_at=time.time(),
            )
        )

    def _on_publish(
        self, _paho: Client, _userdata: object, mid: int, answer: ReasonCode, _properties: Properties
    ) -> None:
        reason = str(answer) if answer.is_failure else None
        if reason is not None:
            event(logger, logging.WARNING, "publish_refused", "The broker refused a message: %s", reason)
        self._published.append((PublishTicket(self._number, mid), reason))

    def _on_disconnect(
        self,
        _paho: Client,
        _userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if self.left or (self.answer is not None and self.answer.is_failure):
            return
        said = flags.is_disconnect_packet_from_server
        name = self._profile.client_id
        if said and reason.value == _TAKEN_OVER:
            self.reason = f"another client took the name '{name}'; no two may have the same (consumer.name)"
        elif said:
            self.reason = f"the broker closed it ({reason})"
        elif reason.value == _KEEP_ALIVE_TIMEOUT:
            self.reason = "the broker was not heard for too long"
        elif reason.value == _PROTOCOL_ERROR and self.answer is not None:
            self.unreadable = True
            self.reason = "the broker sent something that paho cannot read"
        elif 0.0 < self.held_s < _SOON_S:
            # Mosquitto 2.0.11 does not say that another client took over.
            self.reason = f"it was closed soon; if that goes on, another client may have the name '{name}'"

    def _refusal(self, answer: ReasonCode) -> str:
        where = self._profile.address.redacted
        if answer.value == _UNSUPPORTED_VERSION:
            return f"{where} does not speak MQTT {self._version} (broker.protocol)"
        if answer.value == _CLIENT_ID_NOT_VALID:
            return f"{where} does not take '{self._profile.client_id}' for a client id (consumer.name)"
        advice = "; check broker.username and broker.password_file" if self.refused else ""
        return f"{where} refused this client: {answer}{advice}"


def contained(function: Callable[_P, object]) -> Callable[_P, None]:
    """Let no exception out: it would end the network thread unseen, while paho goes on to look connected.

    A message that meets one stays unacknowledged.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception:  # noqa: BLE001 - of all that the network thread runs, this is the one place
            event(logger, logging.ERROR, "network_failed", "The network thread goes on after an error", exc_info=True)

    return call


def _do_nothing(*_: object) -> None:
    pass


def _send_at_once(_paho: Client, _userdata: object, opened: "SocketLike") -> None:
    """Switch off Nagle's algorithm, which holds a small packet back until the one before is acknowledged.

    It is switched off through a duplicate of the descriptor, since paho's WebSockets hide their socket.
    """
    with socket.socket(fileno=os.dup(opened.fileno())) as twin:
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _options(wanted: Subscription) -> SubscribeOptions:
    never, always = SubscribeOptions.RETAIN_DO_NOT_SEND, SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
    return SubscribeOptions(qos=1, retainHandling=always if wanted.wants_retained else never)


def _connect_properties(profile: Profile) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.ReceiveMaximum = profile.receive_maximum
    if profile.persistent:
        properties.SessionExpiryInterval = _SESSION_NEVER_EXPIRES
    return properties


def _publish_properties(publication: Publication) -> Properties | None:
    if publication.correlation_data is None and not publication.user_properties:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if publication.correlation_data is not None:
        properties.CorrelationData = publication.correlation_data
    if publication.user_properties:
        properties.UserProperty = list(publication.user_properties)
    return properties
