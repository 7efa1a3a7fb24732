"""One connection to a broker, from CONNECT to its end; paho stops here.

The network thread makes it, runs it and throws it away. `acknowledge`, `publish`, `leave` and `wake` may be called from
any thread.
"""

import math
import select
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt import codec as packets
from cesar_mqtt.mqtt import reason_codes as reasons
from cesar_mqtt.mqtt.broker_url import Version
from cesar_mqtt.mqtt.buffered_socket import BufferedClient, BufferedSocket, WakeupPipe
from cesar_mqtt.mqtt.messages import (
    MAX_PACKET_BYTES,
    ConnectionInfo,
    ConnectOptions,
    Delivery,
    Publication,
    PublishTicket,
    Receipt,
    Subscription,
)
from cesar_mqtt.mqtt.send_queue import SendQueue

log = get_logger(__name__)

TURN_S = 1.0
"""How long a turn waits when nothing happens."""

_SESSION_NEVER_EXPIRES = 0xFFFFFFFF
_ANSWER_S = 15.0
_PING_AFTER = 0.25

_P = ParamSpec("_P")


def log_exceptions(function: Callable[_P, object]) -> Callable[_P, None]:
    """Let no exception out: it would end the network thread unseen.

    A message that meets one stays unacknowledged.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception:
            log.exception("The network thread goes on after an error", action="network_failed")

    return call


class Connection:
    """A paho client that is used once.

    paho makes and keeps the connection: TLS, WebSockets, CONNECT, SUBSCRIBE, pings, DISCONNECT. Messages and their
    acknowledgements go past it, and past its loop, in which each of them is two system calls and a turn: here they
    pile up, and a turn takes all there is. So paho has nothing in flight that it would send again under old packet ids;
    a packet id belongs to one connection, and an acknowledgement that is late ends nowhere. The callbacks only take
    notes; the owner reads them after the turn.

    Attributes:
        info: set when it stands.
        opened: whether the broker took the connection, below MQTT.
        answer: what the broker answered to CONNECT; None: nothing.
        unreadable: whether it ended over a packet that cannot be read.
        left: whether it was given up to be made anew at once.
        reason: why it ended, in words.
    """

    def __init__(
        self,
        number: int,
        profile: ConnectOptions,
        *,
        version: Version,
        lasts_s: float,
        before_s: float = math.inf,
        deliver: Callable[[Delivery], bool],
        on_new_session: Callable[[int], None] = lambda _number: None,
    ) -> None:
        """Prepare it; `open` connects.

        After `lasts_s` it is left. `before_s` is how long the one before had stood, if it was lost: of two that end
        soon, the second one is suspicious. `deliver` gets each message and says whether there was room for it; if not,
        it gets it again at every turn (see `wake`), and nothing is read until then. `on_new_session` gets the number of
        the connection before that, when the broker does not know this client.
        """
        self.info: ConnectionInfo | None = None
        self.opened = False
        self.answer: ReasonCode | None = None
        self.unreadable = False
        self.left = False
        self.reason = "it was closed without an answer"
        self._number = number
        self._profile = profile
        self._version: Version = version
        self._five = version == "5"
        self._lasts_s = lasts_s
        self._before_s = before_s
        self._deliver = deliver
        self._on_new_session = on_new_session
        self._held: Delivery | None = None
        self._session_present = False
        self._outgoing = SendQueue(number, five=self._five, limit_bytes=profile.max_packet_bytes)
        self._to_acknowledge: deque[Delivery] = deque()
        self._acknowledged = 0
        self._answer_by = self._stands_since = self._cut_at = self._ping_at = math.inf
        self._leaving = self._said_goodbye = False
        self._bell = WakeupPipe()
        self._cable: BufferedSocket
        self._paho = _make_paho_client(profile, version)
        self._paho.on_connect = log_exceptions(self._on_connect)
        self._paho.on_subscribe = log_exceptions(self._on_subscribe)
        self._paho.on_message = log_exceptions(self._on_message)
        self._paho.on_disconnect = log_exceptions(self._on_disconnect)

    @property
    def held_s(self) -> float:
        """For how many seconds it has stood; 0: it never did."""
        return max(0.0, time.monotonic() - self._stands_since)

    @property
    def unsupported(self) -> bool:
        """Whether the broker answered that it does not know this version of MQTT."""
        return reasons.is_unsupported(self.answer)

    @property
    def refused(self) -> bool:
        """Whether the broker said no in a way that trying again does not change."""
        return reasons.is_final(self.answer)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge those that came by this connection."""
        self._to_acknowledge.extend(deliveries)
        self._bell.ring()

    def publish(self, publication: Publication) -> PublishTicket | None:
        """Take a message to be sent; None: the connection is being left, or too many wait. For one thread at a time.

        Raises:
            PacketTooLargeError: it is over the broker's limit.
        """
        ticket = None if self._leaving else self._outgoing.publish(publication)
        self._bell.ring()
        return ticket

    def leave(self, timeout_s: float) -> None:
        """Send what waits, then DISCONNECT; if that takes longer, the connection is cut."""
        self._cut_at = time.monotonic() + timeout_s
        self._leaving = True
        self._bell.ring()

    def wake(self) -> None:
        """Try again to deliver what there was no room for."""
        self._bell.ring()

    # -- the network thread --------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Connect; CONNECT goes out with the first turn. False: it did not work."""
        profile, paho = self._profile, self._paho
        host, port = profile.address.host, profile.address.port
        try:
            if self._five:
                properties, clean = _connect_properties(profile), not profile.persistent
                paho.connect(host, port, profile.keepalive_s, clean_start=clean, properties=properties)
            else:
                paho.connect(host, port, profile.keepalive_s)
        except OSError as exc:
            self.reason = str(exc) if isinstance(exc, ssl.SSLError) else exc.strerror or str(exc)
            return False
        self._cable = paho.cable
        self.opened = True
        self._answer_by = time.monotonic() + _ANSWER_S
        self._ping_at = time.monotonic() + _PING_AFTER * profile.keepalive_s
        return True

    def turn(self) -> bool:
        """Send and take in what there is to send and take in; False: the connection has ended."""
        self._send()
        if self._paho.socket() is None:
            return False
        try:
            quiet = not self._receive()
        except packets.UnreadablePacketError as exc:
            self.unreadable, self.reason = True, f"the broker sent {exc}"
            return False
        now = time.monotonic()
        self._keep_alive(now, quiet=quiet)
        if self._paho.socket() is None:
            return False
        if self.held_s >= self._lasts_s and not self.left:
            self.left, self.reason = True, "it has served its purpose"
            self.leave(_ANSWER_S)
        if self.info is None and now >= self._answer_by:
            self.reason = f"the broker did not answer within {_ANSWER_S:.0f} s"
            return False
        return now < self._cut_at

    def take_published(self) -> list[tuple[PublishTicket, str | None]]:
        """Return what the broker has taken, or refused with a reason, since the last call."""
        return self._outgoing.take_published()

    @property
    def heard(self) -> int:
        """How many of our acknowledgements at QoS 1 the broker is known to have."""
        return self._outgoing.heard

    def dispose(self) -> None:
        """Close what is still open, and break the circle of references: paho's descriptors close with its last one."""
        paho = self._paho
        paho.on_connect = paho.on_subscribe = paho.on_message = paho.on_disconnect = None
        self._bell.close()
        still_open = paho.socket()
        if still_open is not None:
            still_open.close()

    # -- a turn --------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Write what may go now."""
        while self._to_acknowledge:
            self._acknowledge(self._to_acknowledge.popleft())
        self._outgoing.send(self._cable, behind=self._acknowledged)
        if self._leaving and not self._outgoing.waits and not self._said_goodbye:
            self._said_goodbye = True
            self._paho.disconnect()
        if self._paho.want_write():
            self._paho.loop_write()
        self._cable.flush()
        self._outgoing.note_written(self._cable)

    def _acknowledge(self, delivery: Delivery) -> None:
        if delivery.receipt.connection != self._number:
            return
        if delivery.qos == 1:
            self._cable.send(packets.write_puback(delivery.receipt.mid))
            self._acknowledged += 1
        else:
            self._paho.ack(delivery.receipt.mid, delivery.qos)

    def _receive(self) -> bool:
        """Wait until there is something to do, and read; False: there was nothing, and no reason not to look."""
        cable = self._cable
        if self._held is not None:
            self._take(self._held)
            self._route()
            if self._paho.socket() is None:  # a DISCONNECT stood behind it
                return True
        full = self._held is not None
        readable = self._wait(look=not full)
        if readable:
            cable.fill()
            self._route()
        if cable.ended:
            self._paho.loop_read()  # it learns so, and says why
        return readable or full

    def _wait(self, *, look: bool) -> bool:
        """Wait until there is something to do; whether there is something to read, if it was to `look` for that."""
        cable = self._cable
        pending = look and cable.pending
        timeout_s = 0.0 if pending else min(TURN_S, max(0.0, self._cut_at - time.monotonic()))
        writes = cable.unsent or self._paho.want_write()
        poll = select.poll()  # unlike `select.select` for any number of open files
        poll.register(self._bell, select.POLLIN)
        if look or writes:
            poll.register(cable, (select.POLLIN if look else 0) | (select.POLLOUT if writes else 0))
        ready = dict(poll.poll(timeout_s * 1000))
        if self._bell.fileno() in ready:
            self._bell.hush()
        return pending or (look and bool(ready.get(cable.fileno(), 0) & ~select.POLLOUT))

    def _route(self) -> None:
        """Take the packets that have come, as long as there is room for their messages."""
        while self._held is None and (packet := self._cable.next_packet()) is not None:
            first, body = packet
            kind = first & packets.KIND
            if kind == packets.PUBLISH and first & packets.QOS != packets.QOS_2:
                self._take(packets.read_publish(first, body, five=self._five, connection=self._number))
            elif kind == packets.PUBACK:
                self._outgoing.settle(*packets.read_puback(body))
            else:
                self._cable.give(first, body)
                self._paho.loop_read()

    @log_exceptions
    def _take(self, delivery: Delivery) -> None:
        self._held = None
        if not self._deliver(delivery):
            self._held = delivery

    def _keep_alive(self, now: float, *, quiet: bool) -> None:
        """Let the broker hear of this client.

        paho's part in it is to miss the answer to a ping. That is for quiet times only: the answer may stand behind
        many messages, or behind those that there is no room for. Then pings are sent all the same, and nobody waits.
        """
        if quiet:
            self._paho.loop_misc()
        elif now < self._ping_at:
            return
        else:
            self._cable.send(packets.PINGREQ)
        self._ping_at = now + _PING_AFTER * self._profile.keepalive_s

    # -- paho ----------------------------------------------------------------------------------------------------------

    def _on_connect(
        self, paho: Client, _userdata: object, flags: ConnectFlags, answer: ReasonCode, properties: Properties | None
    ) -> None:
        self.answer = answer
        if answer.is_failure:
            self.reason = reasons.refusal(answer, self._profile, self._version)
            return
        self.reason = "it was closed"
        self._session_present = flags.session_present
        if not flags.session_present:
            self._on_new_session(self._number)
        outgoing = self._outgoing
        outgoing.limit_bytes = min(outgoing.limit_bytes, getattr(properties, "MaximumPacketSize", MAX_PACKET_BYTES))
        outgoing.window = min(outgoing.window, getattr(properties, "ReceiveMaximum", outgoing.window))
        subscriptions = self._profile.subscriptions
        if not subscriptions:
            self._stand(())
        elif self._five:
            paho.subscribe([(wanted.topic_filter, _subscribe_options(wanted)) for wanted in subscriptions])
        else:
            paho.subscribe([(wanted.topic_filter, 1) for wanted in subscriptions])
        if self._profile.unwanted:  # only now, so that nothing falls between the two
            paho.unsubscribe(list(self._profile.unwanted))

    def _on_subscribe(
        self, _paho: Client, _userdata: object, _mid: int, granted: list[ReasonCode], _properties: Properties | None
    ) -> None:
        pairs = zip(self._profile.subscriptions, granted, strict=True)
        self._stand(tuple(wanted.topic_filter for wanted, code in pairs if code.is_failure or code.value < 1))

    def _stand(self, refused_filters: tuple[str, ...]) -> None:
        limit_bytes = self._outgoing.limit_bytes if self._outgoing.limit_bytes < MAX_PACKET_BYTES else None
        self._stands_since = time.monotonic()
        self.info = ConnectionInfo(self._session_present, self._version, limit_bytes, self._number, refused_filters)

    def _on_message(self, _paho: Client, _userdata: object, message: MQTTMessage) -> None:
        """Take a message of QoS 2, which only a subscription of somebody else in this client's session can bring."""
        receipt = Receipt(self._number, message.mid)
        payload = bytes(message.payload)
        self._take(Delivery(message.topic, payload, message.qos, message.retain, message.dup, receipt))

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
        self.unreadable = not said and self.answer is not None and reasons.is_unreadable(reason)
        held_s = self.held_s and max(self.held_s, self._before_s)
        self.reason = reasons.ending(reason, self._profile, said=said, held_s=held_s) or self.reason


def _make_paho_client(options: ConnectOptions, version: Version) -> BufferedClient:
    """Return a new paho client with these options, for one connection."""
    five = version == "5"
    paho = BufferedClient(
        CallbackAPIVersion.VERSION2,
        options.client_id,
        clean_session=None if five else not options.persistent,
        protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
        transport="websockets" if options.address.websockets else "tcp",
        reconnect_on_failure=False,
        manual_ack=True,
    )
    paho.username_pw_set(options.credentials.username, options.credentials.password)
    if options.tls is not None:
        paho.tls_set_context(options.tls)
    if options.address.websockets:
        paho.ws_set_options(options.address.path)
    if options.will is not None:
        paho.will_set(options.will.topic, options.will.payload, options.will.qos, options.will.retain)
    return paho


def _connect_properties(options: ConnectOptions) -> Properties:
    """Return the properties of CONNECT in MQTT 5."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.ReceiveMaximum = options.receive_maximum
    if options.persistent:
        properties.SessionExpiryInterval = _SESSION_NEVER_EXPIRES
    return properties


def _subscribe_options(subscription: Subscription) -> SubscribeOptions:
    """Return the options of a SUBSCRIBE in MQTT 5."""
    never, always = SubscribeOptions.RETAIN_DO_NOT_SEND, SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
    return SubscribeOptions(qos=1, retainHandling=always if subscription.wants_retained else never)
