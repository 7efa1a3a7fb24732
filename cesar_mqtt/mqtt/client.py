"""The MQTT client: a connection to a broker that comes back for as long as it takes.

One thread, `mqtt-network`, makes and runs each connection; the methods of `MqttClient` may be called from any thread.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError, ConfigError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.broker_url import Backoff, VersionChoice, parse_broker_url, read_credentials, tls_context
from cesar_mqtt.mqtt.connection import TURN_S, Connection, log_exceptions
from cesar_mqtt.mqtt.messages import (
    ConnectionInfo,
    ConnectOptions,
    Delivery,
    Publication,
    PublishTicket,
    Subscription,
    Will,
)
from cesar_mqtt.mqtt.receive_buffer import ReceiveBuffer, Settled

log = get_logger(__name__)

_NO_SOCKET_S = 5.0
"""How long until the next try when the system has no descriptors left."""

_PASSING_S = 30.0
_MOST_UNACKNOWLEDGED = 65_535


class MqttClient:
    """Messages in, messages out, whatever happens to the connection.

    What comes in is fetched with `receive`, in order. While nobody fetches, QoS 0 is dropped and QoS 1 held back at the
    broker, for however long: the connection is kept. But then no PUBACK is read either, so who fetches must not wait
    for `on_published`.

    On the way out nothing is kept: `publish` works while connected, and what was published but not reported by
    `on_published` is forgotten when the connection is lost. Publish it again after the next `on_connected`.

    The callbacks run on the network thread, between two turns of its loop and without a lock: they may call every
    method, and must not block. `on_published` may come before `publish` has returned; who minds holds a lock of his own
    around `publish` and his bookkeeping and takes it in the callbacks, too. That is safe, as `publish` never waits for
    the network thread. `on_disconnected` comes after the last `publish` that returned a ticket of that connection.

    Attributes:
        on_connected: a connection stands, its subscriptions are made.
        on_disconnected: it is lost, with the reason; its tickets are void. Not called for `close`.
        on_published: the broker has the message (QoS 1: its PUBACK came; QoS 0: it is written). With a reason: the
            broker refused it, and would again.
        on_refused: the broker refused the first attempt in a way that trying again does not change; nothing more comes.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        client_id: str,
        persistent: bool,
        will: Will | None = None,
        subscriptions: Sequence[Subscription] = (),
        unwanted: Sequence[str] = (),
        hand_off_max_messages: int = 2000,
        hand_off_max_bytes: int = 64 << 20,
        on_connected: Callable[[ConnectionInfo], None] | None = None,
        on_disconnected: Callable[[str], None] | None = None,
        on_published: Callable[[PublishTicket, str | None], None] | None = None,
        on_refused: Callable[[BrokerRefusedError], None] | None = None,
    ) -> None:
        """Read what the settings name; nothing is connected yet.

        Persistent: the broker keeps subscriptions and messages while the client is away. The hand-off is what may wait
        to be fetched; one message always fits. Unwanted are topic filters that an earlier client of this name may have
        left in the session; they are given up at each connection, after the subscriptions are made.

        Raises:
            ConfigError: the URL, the password file or a TLS file cannot be used.
        """
        address = parse_broker_url(settings.url)
        if address.port == 0:
            raise ConfigError(f"broker.url '{address.redacted}' cannot be used by a client: it names no port")
        self._where = address.redacted
        self._profile = ConnectOptions(
            address=address,
            credentials=read_credentials(settings, address),
            tls=tls_context(settings) if address.encrypted else None,
            client_id=client_id,
            persistent=persistent,
            will=will,
            subscriptions=tuple(subscriptions),
            unwanted=tuple(unwanted),
            keepalive_s=settings.keepalive,
            receive_maximum=min(hand_off_max_messages, _MOST_UNACKNOWLEDGED),
            max_packet_bytes=settings.max_packet_bytes,
        )
        self.on_connected = on_connected
        self.on_disconnected = on_disconnected
        self.on_published = on_published
        self.on_refused = on_refused
        self._hand_off = ReceiveBuffer(hand_off_max_messages, hand_off_max_bytes, on_room=self._wake)
        self._version = VersionChoice(settings.protocol)
        self._backoff = Backoff()
        self._held_s = math.inf
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._info: ConnectionInfo | None = None
        self._trouble: str | None = None
        self._refusal: str | None = None
        self._ever_connected = self._is_new = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt-network", daemon=True)

    def start(self) -> None:
        """Start the network thread and return; it connects, and reconnects, until `close`."""
        self._thread.start()

    def wait_connected(self, timeout_s: float | None = None) -> ConnectionInfo | None:
        """Wait until a connection stands; None: not in that time (`trouble` says why), or closed.

        Raises:
            BrokerRefusedError: see `on_refused`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._info or self._refusal or self._stopping.is_set(), timeout_s)
            if self._refusal is not None:
                raise BrokerRefusedError(self._refusal)
            return self._info

    @property
    def alive(self) -> bool:
        """Whether the network thread runs; once it has been started, it does so until `close` or a refusal."""
        return self._thread.is_alive()

    def stop_receiving(self) -> None:
        """Let `receive` return at once, and nothing any more; what has not been acknowledged stays with the broker."""
        self._hand_off.close()

    @property
    def connected(self) -> ConnectionInfo | None:
        """The connection that stands; None: none does."""
        return self._info

    @property
    def trouble(self) -> str | None:
        """Why there is no connection; None: there is one, or nothing has gone wrong yet."""
        return self._trouble

    def receive(self, timeout_s: float | None = None) -> list[Delivery]:
        """Fetch all that has come in, in order; empty: nothing did in that time, or closed. For one thread."""
        return self._hand_off.take(timeout_s)

    def take_settled(self) -> Settled:
        """Return what the broker need not send again, of all that `receive` has returned before this call."""
        return self._hand_off.take_settled()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker, in this order, that these need not come again.

        Those that came by an earlier connection are passed over: the broker sends them again if it still has them.
        """
        connection = self._connection
        if connection is not None:
            connection.acknowledge(deliveries)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: Literal[0, 1] = 1,
        retain: bool = False,
        correlation_data: bytes | None = None,
        user_properties: Sequence[tuple[str, str]] = (),
    ) -> PublishTicket | None:
        """Hand a message to the broker; None: not connected, or 60,000 wait already, and nothing was kept of it.

        Where the broker speaks 3.1.1 only, correlation data and user properties are left out.

        Raises:
            PacketTooLargeError: it is over the broker's limit.
            CannotPublishError: its topic or properties are such that brokers close the connection.
        """
        publication = Publication(topic, payload, qos, retain, correlation_data, user_properties)
        # The lock puts each ticket before the burial of its connection, and so before on_disconnected.
        with self._changed:
            if self._connection is None or self._info is None:
                return None
            return self._connection.publish(publication)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Disconnect, so that the will is not sent, and end the thread; nothing more comes out of `receive`.

        What was published is sent before, but its acknowledgements are not waited for. If the broker does not take it
        all in time, the connection is cut. May be called twice, before `start` and from a callback.
        """
        self._stopping.set()
        self._hand_off.close()
        with self._changed:
            self._changed.notify_all()
            connection = self._connection
        if connection is not None:
            connection.leave(timeout_s)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s + 2 * TURN_S)

    def _wake(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.wake()

    # -- the network thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        number = 0
        delay_s: float | None = 0.0
        while delay_s is not None and not self._stopping.wait(delay_s):
            number += 1
            try:
                connection = self._make_connection(number)
            except OSError as exc:
                log.warning("No connection to %s: %s", self._where, exc.strerror, action="not_connected")
                delay_s = _NO_SOCKET_S
                continue
            log_exceptions(self._live)(connection)
            self._bury(connection)
            delay_s = self._conclude(connection)

    def _make_connection(self, number: int) -> Connection:
        connection = Connection(
            number,
            self._profile,
            version=self._version.next,
            lasts_s=_PASSING_S if self._version.passing else math.inf,
            before_s=self._held_s,
            deliver=self._hand_off.put,
            on_new_session=self._begin_session,
        )
        with self._changed:
            self._connection = connection
        return connection

    def _begin_session(self, number: int) -> None:
        self._is_new = True
        self._hand_off.begin_session(number)

    def _live(self, connection: Connection) -> None:
        # `close` may have come while this connected: what it asked for was then too early.
        if not connection.open() or self._stopping.is_set():
            return
        while connection.turn():
            self._report(connection)
        self._report(connection)

    def _report(self, connection: Connection) -> None:
        """Tell the owner what the last turn brought."""
        info = connection.info
        if info is None:
            return
        if self._info is None:
            # A session that is new stays news if the connection at which it began did not live to stand.
            self._announce(replace(info, session_present=not self._is_new))
            self._is_new = False
        published = connection.take_published()
        if published:
            self._hand_off.hear(info.number, connection.heard)
        if published and self.on_published is not None:
            report = log_exceptions(self.on_published)
            for ticket, reason in published:
                report(ticket, reason)

    def _announce(self, info: ConnectionInfo) -> None:
        self._version.accepted()
        self._ever_connected = True
        with self._changed:
            self._info, self._trouble = info, None
            self._changed.notify_all()
        session = "the session was kept" if info.session_present else "a new session"
        log.info("Connected to %s, MQTT %s, %s", self._where, info.protocol, session, action="connected")
        for topic_filter in info.refused_filters:
            message = "The broker did not grant '%s' at QoS 1: what is published there may not arrive"
            log.warning(message, topic_filter, action="subscription_refused")
        if self.on_connected is not None:
            log_exceptions(self.on_connected)(info)

    def _bury(self, connection: Connection) -> None:
        with self._changed:
            stood = self._info is not None
            self._connection = self._info = None
        connection.dispose()
        if stood and not self._stopping.is_set() and self.on_disconnected is not None:
            log_exceptions(self.on_disconnected)(connection.reason)

    def _conclude(self, connection: Connection) -> float | None:
        """Learn from a connection that has ended; return the seconds until the next one, None: there is to be none."""
        if self._stopping.is_set():
            return None
        switched = self._version.ended(
            unsupported=connection.unsupported,
            unanswered=connection.opened and connection.answer is None,
            unreadable=connection.unreadable,
        )
        if switched or connection.left:
            log.debug("Connecting anew to %s: %s", self._where, connection.reason, action="reconnecting")
            return 0.0
        if connection.refused and not self._ever_connected:
            self._give_up(connection.reason)
            return None
        self._held_s = connection.held_s or math.inf  # inf: it never stood, so the broker was away
        delay_s = self._backoff.delay_s(held_s=connection.held_s, refused=connection.refused)
        self._log_trouble(connection, delay_s)
        return delay_s

    def _give_up(self, reason: str) -> None:
        log.error("%s", reason, action="refused")
        with self._changed:
            self._refusal = self._trouble = reason
            self._changed.notify_all()
        if self.on_refused is not None:
            log_exceptions(self.on_refused)(BrokerRefusedError(reason))

    def _log_trouble(self, connection: Connection, delay_s: float) -> None:
        """Warn of each lost connection, and of attempts that fail in a row of the first, until the reason changes."""
        lost = connection.info is not None
        level = logging.WARNING if lost or connection.reason != self._trouble else logging.DEBUG
        self._trouble = connection.reason
        action, what = ("disconnected", "Lost the connection") if lost else ("not_connected", "No connection")
        message = "%s to %s: %s; the next attempt is in %.1f s"
        log.log(level, message, what, self._where, connection.reason, delay_s, action=action)
