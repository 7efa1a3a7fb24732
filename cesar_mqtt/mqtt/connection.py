"""One connection to a broker, from CONNECT to its end; nothing outside this package knows paho.

The network thread creates it, runs it and closes it. Any thread may call `acknowledge`, `publish`, `let_go_ahead`,
`expire`, `disconnect_gracefully` and `wake`.
"""

import logging
import math
import select
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
from cesar_mqtt.mqtt import codec, reason_codes
from cesar_mqtt.mqtt.broker_url import Version
from cesar_mqtt.mqtt.buffered_socket import BufferedClient, BufferedSocket, WakeupPipe
from cesar_mqtt.mqtt.messages import (
    MAX_PACKET_BYTES,
    ConnectionFailure,
    ConnectionInfo,
    ConnectOptions,
    Delivery,
    Publication,
    PublishTicket,
    Receipt,
    Refusal,
    Subscription,
)
from cesar_mqtt.mqtt.send_queue import SendQueue

log = get_logger(__name__)

MAX_WAIT_S = 1.0
"""How long `run_once` waits when nothing happens."""

_SESSION_NEVER_EXPIRES = 0xFFFFFFFF
_ANSWER_S = 15.0
"""How long the broker may take from the TCP connection to the SUBACK."""
_FILTER_S = 11.0
"""How long it may take for each topic filter: NATS waits for the leader of each, for as long as `js_api_timeout` says;
`deploy/nats` has 10 s."""
_PROBE_S = 5.0
"""When the oldest message has not been acknowledged for so long, the broker gets a ping."""
_STALLED_S = 10.0
"""RabbitMQ 3.10 never acknowledges a message over its `max_message_size`, nor those around it, and answers pings. The
PUBACK has so long after a ping: a broker that stores what it acknowledges may answer the ping before."""
_PING_AFTER = 0.25
"""The part of the keepalive time after which an idle connection sends a ping."""
_UNSPECIFIED = 0x80
"""The only refusal of a SUBSCRIBE in 3.1.1, and in MQTT 5 the one without a reason. It may pass by itself: a cluster of
NATS 2.15.1 refuses so while it elects a leader, and every third new subscription while one of three servers is away."""
_AGAIN_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""The delays before such a SUBSCRIBE is repeated; it may as well be the access list."""
_AGAIN_BEFORE_READY = 3
"""How many of these attempts a connection makes before it is ready: most commands need all their subscriptions."""

_P = ParamSpec("_P")


def log_exceptions(function: Callable[_P, object]) -> Callable[_P, None]:
    """Wrap a callback so that its exceptions are logged and do not end the network thread.

    A message whose processing raises stays unacknowledged.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except Exception:
            log.exception("The network thread continues after an error", action="network_failed")

    return call


class _HttpError(Exception):
    """The port answers in HTTP, as one for WebSockets does."""


class Connection:
    """A paho client that is used for one connection.

    paho does what is rare: TLS, WebSockets, CONNECT, SUBSCRIBE, pings, DISCONNECT. Messages and their acknowledgements
    bypass it and its loop, in which each of them costs two system calls and one pass: here they accumulate, and one
    pass handles all. So paho has no message in flight that it would send again under an old packet id; a packet id
    belongs to one connection, and a late acknowledgement is dropped. The callbacks of paho only set attributes; the
    owner reads them after each `run_once`.

    Attributes:
        info: set when the connection is ready.
        tcp_connected: whether the broker accepted the TCP connection.
        connack: the reason code of CONNACK; None: there was none.
        malformed: whether the connection ended because of a malformed packet.
        expired: whether it ended because it reached `max_age_s`, or by `expire`.
        failure: why it ended.
    """

    def __init__(
        self,
        number: int,
        options: ConnectOptions,
        *,
        version: Version,
        max_age_s: float = math.inf,
        previous_s: float = math.inf,
        deliver: Callable[[Delivery], bool],
        on_session_started: Callable[[int], None] = lambda _number: None,
    ) -> None:
        """Prepare the connection; `open` connects.

        Args:
            number: identifies this connection among the client's.
            options: those of the client.
            version: the version of MQTT to speak.
            max_age_s: after that time it disconnects.
            previous_s: how long the connection before was ready until it was lost: two short ones in a row are
                suspicious.
            deliver: receives each message and returns whether there was room for it. If not, it receives it again at
                every `run_once` (see `wake`), and nothing is read until then.
            on_session_started: called with `number` before any message is delivered, if the broker has no session of
                this client.
        """
        self.info: ConnectionInfo | None = None
        self.tcp_connected = False
        self.connack: ReasonCode | None = None
        self.malformed = False
        self.expired = False
        self.failure = ConnectionFailure("the broker closed the connection without an answer", is_broker_away=True)
        self._number = number
        self._options = options
        self._version: Version = version
        self._five = version == "5"
        self._max_age_s = max_age_s
        self._previous_s = previous_s
        self._put = deliver
        self._on_session_started = on_session_started
        self._undelivered: Delivery | None = None
        self._session_present = False
        self._send_queue = SendQueue(number, five=self._five, limit_bytes=options.max_packet_bytes)
        self._to_acknowledge: deque[Delivery] = deque()
        self._acks_sent = 0
        self._answer_by = self._ready_since = self._cut_at = self._ping_at = math.inf
        self._disconnecting = self._disconnect_sent = False
        self._is_refused = False
        """Whether the broker answered the SUBSCRIBE with a DISCONNECT."""
        self._ahead = self._subscribed_ahead = False
        self._subscribing: dict[int, list[tuple[Subscription, int]]] = {}
        """What each SUBSCRIBE without a SUBACK asks for, with the QoS, by its packet id."""
        self._refused: dict[str, Subscription] = {}
        """By topic filter, what the broker refused, or granted at a lower QoS."""
        self._subscribe_again: dict[str, Subscription] = {}
        self._subscribe_again_at = math.inf
        self._subscribed_again = 0
        self._expire_as: str | None = None
        self._oldest: PublishTicket | None = None
        """The oldest message in flight, since `_oldest_at`; the answer to the ping `_probe` shows that it was read."""
        self._oldest_at = 0.0
        self._probe: int | None = None
        self._probed_at = 0.0
        """When that ping was answered, or sent."""
        self._pings_answered = 0
        self._wakeup = WakeupPipe()
        self._socket: BufferedSocket
        self._paho = _make_paho_client(options, version)
        self._paho.on_connect = log_exceptions(self._on_connect)
        self._paho.on_subscribe = log_exceptions(self._on_subscribe)
        self._paho.on_message = log_exceptions(self._on_message)
        self._paho.on_disconnect = log_exceptions(self._on_disconnect)

    @property
    def ready_s(self) -> float:
        """For how many seconds the connection has been ready; 0: it never was."""
        return max(0.0, time.monotonic() - self._ready_since)

    @property
    def is_accepted(self) -> bool:
        """Whether CONNACK has arrived, and is no refusal."""
        return self.connack is not None and not self.connack.is_failure

    @property
    def unsupported(self) -> bool:
        """Whether the broker answered that it does not support this version of MQTT."""
        return reason_codes.is_unsupported(self.connack)

    @property
    def refused(self) -> bool:
        """Whether the broker refused the client in a way that another attempt does not change."""
        return self._is_refused or reason_codes.is_final(self.connack)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge those messages that arrived by this connection, in this order."""
        self._to_acknowledge.extend(deliveries)
        self._wakeup.wake()

    def publish(self, publication: Publication) -> PublishTicket | None:
        """Enqueue a message; None: the connection is being closed, or the queue is full. For one thread at a time.

        Raises:
            PacketTooLargeError: the packet exceeds the broker's limit.
        """
        ticket = None if self._disconnecting else self._send_queue.publish(publication)
        self._wakeup.wake()
        return ticket

    def let_go_ahead(self, *, on: bool) -> None:
        """Subscribe at QoS 0 to what may go ahead, or at QoS 1 again; see `MqttClient.let_go_ahead`."""
        self._ahead = on
        self._wakeup.wake()

    def expire(self, reason: str) -> None:
        """End this connection in order, for a new one."""
        self._expire_as = reason
        self._wakeup.wake()

    def disconnect_gracefully(self, timeout_s: float) -> None:
        """Send all enqueued messages, then DISCONNECT; after `timeout_s` cut the connection."""
        self._cut_at = time.monotonic() + timeout_s
        self._disconnecting = True
        self._wakeup.wake()

    def wake(self) -> None:
        """Deliver again the message that there was no room for."""
        self._wakeup.wake()

    # -- the network thread --------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Connect; the first `run_once` sends CONNECT. False: it failed."""
        options, paho = self._options, self._paho
        host, port = options.address.host, options.address.port
        try:
            if self._five:
                properties, clean = _connect_properties(options), not options.persistent
                paho.connect(host, port, options.keepalive_s, clean_start=clean, properties=properties)
            else:
                paho.connect(host, port, options.keepalive_s)
        except OSError as exc:
            self.failure = reason_codes.failure_of_error(exc)
            return False
        self._socket = paho.buffered_socket
        self.tcp_connected = True
        self._answer_by = time.monotonic() + _ANSWER_S
        self._ping_at = time.monotonic() + _PING_AFTER * options.keepalive_s
        return True

    def run_once(self) -> bool:
        """Send and receive what there is, waiting for at most `MAX_WAIT_S`; False: the connection has ended."""
        self._send()
        if self._paho.socket() is None:
            return False
        try:
            idle = not self._receive()
        except _HttpError:
            self.failure = reason_codes.failure_of_http(self._options.address)
            return False
        except codec.MalformedPacketError as exc:
            self.malformed = True
            self.failure = ConnectionFailure(f"the broker sent a malformed packet: {exc}")
            return False
        now = time.monotonic()
        self._keep_alive(now, idle=idle)
        if self._paho.socket() is None:
            return False
        if self.ready_s >= self._max_age_s:
            self._expire_as = self._expire_as or "switching back to MQTT 5"
        if self._expire_as is not None and not self.expired:
            self.expired, self.failure = True, ConnectionFailure(self._expire_as)
            self.disconnect_gracefully(_ANSWER_S)
        if self.info is None and now >= self._answer_by:
            self.failure = ConnectionFailure(f"the broker did not answer within {_ANSWER_S:.0f} s", is_timeout=True)
            return False
        return now < self._cut_at and not self._is_stalled(now)

    def take_published(self) -> list[tuple[PublishTicket, Refusal | None]]:
        """Return the messages that the broker has accepted (None) or refused since the last call."""
        return self._send_queue.take_published()

    @property
    def unacknowledged(self) -> tuple[PublishTicket, ...]:
        """The messages that were sent and are not acknowledged yet."""
        return self._send_queue.unacknowledged

    def take_unrouted(self) -> list[PublishTicket]:
        """Return those of the accepted messages that no subscription matched (MQTT 5), since the last call."""
        return self._send_queue.take_unrouted()

    @property
    def is_suspicious(self) -> bool:
        """Whether it may have ended because of a message: one was in flight, or refused by the last PUBACK."""
        return self._send_queue.has_refused or bool(self._send_queue.unacknowledged)

    @property
    def acks_received(self) -> int:
        """How many of our acknowledgements at QoS 1 the broker has received for certain."""
        return self._send_queue.acks_received

    def close(self) -> None:
        """Close what is open, and break the reference cycle: paho's descriptors close with its last reference."""
        paho = self._paho
        paho.on_connect = paho.on_subscribe = paho.on_message = paho.on_disconnect = None
        self._wakeup.close()
        still_open = paho.socket()
        if still_open is not None:
            still_open.close()

    # -- sending and receiving -----------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._to_acknowledge:
            self._send_acknowledgement(self._to_acknowledge.popleft())
        if self.info is not None and self._ahead != self._subscribed_ahead:
            self._subscribed_ahead = self._ahead
            self._subscribe([wanted for wanted in self._options.subscriptions if wanted.may_go_ahead])
        if time.monotonic() >= self._subscribe_again_at:
            again, self._subscribe_again = self._subscribe_again, {}
            self._subscribe_again_at = math.inf
            self._subscribe(list(again.values()))
        self._send_queue.send(self._socket, acks_sent=self._acks_sent)
        if self._disconnecting and not self._send_queue.has_waiting and not self._disconnect_sent:
            self._disconnect_sent = True
            self._paho.disconnect()
        if self._paho.want_write():
            self._paho.loop_write()
        self._socket.flush()
        self._send_queue.on_flushed(self._socket)

    def _send_acknowledgement(self, delivery: Delivery) -> None:
        if delivery.receipt.connection != self._number:
            return
        if delivery.qos == 1:
            self._socket.send(codec.encode_puback(delivery.receipt.mid))
            self._acks_sent += 1
        else:
            self._paho.ack(delivery.receipt.mid, delivery.qos)

    def _receive(self) -> bool:
        """Wait until there is something to do, and read; False: nothing arrived although reading was possible."""
        if self._undelivered is not None:
            self._deliver(self._undelivered)
            self._dispatch()
            if self._paho.socket() is None:  # a DISCONNECT stood behind it
                return True
        full = self._undelivered is not None
        readable = self._wait(for_reading=not full)
        if readable:
            self._socket.fill()
            if self.connack is None and self._socket.has_received(b"HTTP/"):
                raise _HttpError
            self._dispatch()
        if self._socket.ended:
            self._paho.loop_read()  # paho finds the end, and calls `_on_disconnect` with the reason
        return readable or full

    def _wait(self, *, for_reading: bool) -> bool:
        """Wait until there is something to do; True: there is data to read, and that was asked for."""
        buffered = self._socket
        pending = for_reading and buffered.has_pending
        due_at = min(self._cut_at, self._subscribe_again_at)
        timeout_s = 0.0 if pending else min(MAX_WAIT_S, max(0.0, due_at - time.monotonic()))
        for_writing = buffered.has_unsent or self._paho.want_write()
        poll = select.poll()  # `select.select` fails for descriptors above 1023
        poll.register(self._wakeup, select.POLLIN)
        if for_reading or for_writing:
            poll.register(buffered, (select.POLLIN if for_reading else 0) | (select.POLLOUT if for_writing else 0))
        ready = dict(poll.poll(timeout_s * 1000))
        if self._wakeup.fileno() in ready:
            self._wakeup.drain()
        return pending or (for_reading and bool(ready.get(buffered.fileno(), 0) & ~select.POLLOUT))

    def _dispatch(self) -> None:
        """Handle the received packets, as long as there is room for their messages."""
        while self._undelivered is None and (packet := self._socket.next_packet()) is not None:
            first, body = packet
            packet_type = first & codec.TYPE_MASK
            self._pings_answered += packet_type == codec.PINGRESP
            if packet_type == codec.PUBLISH and first & codec.QOS_MASK != codec.QOS_2:
                self._deliver(codec.decode_publish(first, body, five=self._five, connection=self._number))
            elif packet_type == codec.PUBACK:
                self._send_queue.on_acknowledged(*codec.decode_puback(body), unrouted=codec.is_unrouted(body))
            else:
                self._socket.forward_to_paho(first, body)
                self._paho.loop_read()

    @log_exceptions
    def _deliver(self, delivery: Delivery) -> None:
        self._undelivered = None
        if not self._put(delivery):
            self._undelivered = delivery

    def _keep_alive(self, now: float, *, idle: bool) -> None:
        """Send pings.

        On an idle connection paho does it, and ends the connection when the answer does not arrive. On a busy one the
        answer may stand behind many messages, or behind those that there is no room for: then pings are sent all the
        same, and nothing waits for the answer.
        """
        if idle:
            self._paho.loop_misc()
        elif now < self._ping_at:
            return
        else:
            self._socket.send(codec.PINGREQ)
        self._ping_at = now + _PING_AFTER * self._options.keepalive_s

    def _is_stalled(self, now: float) -> bool:
        """Whether the broker answers, but does not acknowledge the message that is next."""
        oldest = self._send_queue.oldest_in_flight
        ticket = None if oldest is None else oldest[0]
        if ticket != self._oldest or self._undelivered is not None:  # behind a message without room nothing is read
            self._oldest, self._oldest_at, self._probe = ticket, now, None
        if oldest is None or now < self._oldest_at + _PROBE_S:
            return False
        if self._probe is None:
            self._socket.send(codec.PINGREQ)
            self._probe, self._probed_at = self._socket.pings_sent, now
        if self._pings_answered < self._probe:
            self._probed_at = now
        if now <= self._probed_at + _STALLED_S:
            return False
        problem = f"the broker answers, but does not acknowledge a message on {oldest[1]}, nor what follows it"
        self.failure = ConnectionFailure(problem, is_stalled=True)
        return True

    # -- callbacks of paho ---------------------------------------------------------------------------------------------

    def _on_connect(
        self, paho: Client, _userdata: object, flags: ConnectFlags, connack: ReasonCode, properties: Properties | None
    ) -> None:
        self.connack = connack
        if connack.is_failure:
            self.failure = reason_codes.failure_of_connack(connack, self._options, self._version)
            return
        self.failure = ConnectionFailure("the connection was closed")
        self._session_present = flags.session_present
        if not flags.session_present:
            self._on_session_started(self._number)
        queue = self._send_queue
        queue.limit_bytes = min(queue.limit_bytes, getattr(properties, "MaximumPacketSize", MAX_PACKET_BYTES))
        queue.max_in_flight = min(queue.max_in_flight, getattr(properties, "ReceiveMaximum", queue.max_in_flight))
        self._subscribed_ahead = self._ahead
        self._subscribe(self._options.subscriptions)
        if not self._options.subscriptions:
            self._on_ready(())
        if self._options.unwanted:  # after SUBSCRIBE, so that no message is missed in between
            paho.unsubscribe(list(self._options.unwanted))

    def _subscribe(self, subscriptions: Sequence[Subscription]) -> None:
        asked = [(wanted, self._qos_of(wanted)) for wanted in subscriptions]
        if not asked:
            return
        if self._five:
            options = [(wanted.topic_filter, _subscribe_options(wanted, qos)) for wanted, qos in asked]
            _, mid = self._paho.subscribe(options)
        else:
            _, mid = self._paho.subscribe([(wanted.topic_filter, qos) for wanted, qos in asked])
        if mid is not None:
            self._subscribing[mid] = asked
        self._answer_by = time.monotonic() + max(_ANSWER_S, _FILTER_S * len(asked))

    def _qos_of(self, subscription: Subscription) -> int:
        return 0 if subscription.may_go_ahead and self._subscribed_ahead else 1

    def _on_subscribe(
        self, _paho: Client, _userdata: object, mid: int, granted: list[ReasonCode], _properties: Properties | None
    ) -> None:
        asked, again = self._subscribing.pop(mid, []), []
        if len(asked) != len(granted):  # nobody has asked for that
            return
        for (wanted, qos), code in zip(asked, granted, strict=True):
            topic_filter = wanted.topic_filter
            if code.is_failure or code.value < qos:
                self._refused[topic_filter] = wanted
            elif self._refused.pop(topic_filter, None) is not None:
                log.info("The broker grants '%s' now", topic_filter, action="subscription_granted")
            if code.value == _UNSPECIFIED:
                again.append(wanted)
        if not self._refused:
            self._subscribed_again = 0
        waits = bool(again) and self._plan_to_subscribe_again(again)
        if self.info is None and not (waits and self._subscribed_again <= _AGAIN_BEFORE_READY):
            self._on_ready(tuple(self._refused))

    def _plan_to_subscribe_again(self, refused: Sequence[Subscription]) -> bool:
        """Return whether there is another attempt."""
        if self._subscribed_again == len(_AGAIN_S):
            return False
        delay_s = _AGAIN_S[self._subscribed_again]
        level = logging.DEBUG if self._subscribed_again else logging.WARNING
        self._subscribed_again += 1
        self._subscribe_again |= {wanted.topic_filter: wanted for wanted in refused}
        self._subscribe_again_at = time.monotonic() + delay_s
        names = ", ".join(f"'{wanted.topic_filter}'" for wanted in refused)
        message = "The broker refuses %s without a reason: subscribing again in %.1f s, %d attempts are left"
        left = len(_AGAIN_S) - self._subscribed_again
        log.log(level, message, names, delay_s, left, action="subscription_refused")
        return True

    def _on_ready(self, refused_filters: tuple[str, ...]) -> None:
        limit_bytes = self._send_queue.limit_bytes if self._send_queue.limit_bytes < MAX_PACKET_BYTES else None
        self._ready_since = time.monotonic()
        self.info = ConnectionInfo(self._session_present, self._version, limit_bytes, self._number, refused_filters)

    def _on_message(self, _paho: Client, _userdata: object, message: MQTTMessage) -> None:
        """Handle a message of QoS 2: only a subscription that another program made in this session can bring one."""
        receipt = Receipt(self._number, message.mid)
        payload = bytes(message.payload)
        self._deliver(Delivery(message.topic, payload, message.qos, message.retain, message.dup, receipt))

    def _on_disconnect(
        self,
        _paho: Client,
        _userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if self.expired or (self.connack is not None and self.connack.is_failure):
            return
        by_broker = flags.is_disconnect_packet_from_server
        self.malformed = not by_broker and self.connack is not None and reason_codes.is_malformed_packet(reason)
        self._is_refused = by_broker and self.info is None and reason_codes.is_missing_feature(reason)
        connected_s = self.ready_s and max(self.ready_s, self._previous_s)
        failure = reason_codes.failure_of_disconnect(
            reason, self._options, by_broker=by_broker, connected_s=connected_s
        )
        self.failure = failure or self.failure


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


def _subscribe_options(subscription: Subscription, qos: int) -> SubscribeOptions:
    """Return the options of a SUBSCRIBE in MQTT 5."""
    never, always = SubscribeOptions.RETAIN_DO_NOT_SEND, SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
    return SubscribeOptions(qos=qos, retainHandling=always if subscription.wants_retained else never)
