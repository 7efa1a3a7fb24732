"""The MQTT client: a connection to a broker that is made again whenever it is lost.

Its thread, `mqtt-network`, makes and runs each connection; any thread may call the methods of `MqttClient`.
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
from cesar_mqtt.mqtt.broker_url import VersionChoice, parse_broker_url, read_credentials, tls_context
from cesar_mqtt.mqtt.connection import MAX_WAIT_S, Connection, log_exceptions
from cesar_mqtt.mqtt.messages import (
    ConnectionFailure,
    ConnectionInfo,
    ConnectOptions,
    Delivery,
    Publication,
    PublishTicket,
    Refusal,
    Subscription,
    Will,
)
from cesar_mqtt.mqtt.receive_buffer import ReceiveBuffer, RedeliveryBounds
from cesar_mqtt.threads import Backoff, StoppableThread

log = get_logger(__name__)

_FIRST_RETRY_S = 1.0
"""The delay after the first failed attempt, or a lost connection; it doubles with each further one."""
_MAX_RETRY_S = 60.0
"""The longest delay where trying again soon cannot help: after a refusal, and after short connections in a row, as two
clients of one client id have them. A connection that was ready for this long resets the delay."""
_MAX_AWAY_S = 5.0
"""The longest delay otherwise: a broker that is restarted is there again within seconds, and attempts cost little."""
_RETRY_JITTER = 0.5
"""Clients that lost the same broker should not reconnect at the same moment."""
_NO_SOCKET_S = 5.0
"""The delay before the next attempt when the system has no descriptors left."""

_TEMPORARY_S = 30.0
"""How long a connection in 3.1.1 lasts that is to fetch a message which is malformed in MQTT 5."""
_MAX_RECEIVE_MAXIMUM = 65_535


class MqttClient(StoppableThread):
    """Sends and receives messages, and reconnects when the connection is lost.

    Incoming messages wait in a bounded buffer until `receive` takes them, in order. While it is full, messages of QoS 0
    are dropped and those of QoS 1 stay with the broker, for any length of time: the connection is kept alive. But then
    no PUBACK is read either, so the thread that calls `receive` must not wait for `on_published`.

    Outgoing messages are not stored: `publish` works while connected, and messages that `on_published` has not
    reported are forgotten when the connection is lost. Publish them again after the next `on_connected`.

    The callbacks run on the network thread and without a lock: they may call every method, and must not block.
    `on_published` may come before `publish` has returned; to prevent that, hold a lock of your own around `publish`
    and the bookkeeping, and take it in the callbacks, too. That is safe, as `publish` never waits for the network
    thread. `on_disconnected` comes after the last `publish` that returned a ticket of that connection.

    Attributes:
        on_connected: the client is connected and subscribed.
        on_disconnected: the connection is lost; its tickets are void. Not called for `close`.
        on_published: the broker has the message (QoS 1: PUBACK received; QoS 0: written). With a refusal: the broker
            did not accept it, and would refuse the same message again.
        on_unrouted: no subscription matched these messages, so that the broker has dropped them (MQTT 5); called before
            `on_published`.
        on_refused: the broker refused the first attempt in a way that another attempt does not change; the client
            ends.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        client_id: str,
        persistent: bool,
        will: Will | None = None,
        subscriptions: Sequence[Subscription] = (),
        unwanted_filters: Sequence[str] = (),
        buffer_max_messages: int = 2000,
        buffer_max_bytes: int = 64 << 20,
        on_connected: Callable[[ConnectionInfo], None] | None = None,
        on_disconnected: Callable[[ConnectionFailure], None] | None = None,
        on_published: Callable[[PublishTicket, Refusal | None], None] | None = None,
        on_unrouted: Callable[[Sequence[PublishTicket]], None] | None = None,
        on_refused: Callable[[BrokerRefusedError], None] | None = None,
    ) -> None:
        """Read the files that the settings name; `start` connects.

        Args:
            settings: how to reach the broker.
            client_id: must be unique at the broker.
            persistent: whether the broker keeps subscriptions and messages while the client is away.
            will: published by the broker when the client disappears.
            subscriptions: made at each connection.
            unwanted_filters: topic filters that an earlier client of this id may have left in the session; they are
                unsubscribed at each connection, after the subscriptions are made.
            buffer_max_messages: how many received messages may wait.
            buffer_max_bytes: how much memory they may use; one message always fits.
            on_connected: see the attributes.
            on_disconnected: see the attributes.
            on_published: see the attributes.
            on_unrouted: see the attributes.
            on_refused: see the attributes.

        Raises:
            ConfigError: the URL, the password file or a TLS file cannot be used.
        """
        super().__init__("mqtt-network")
        address = parse_broker_url(settings.url)
        if address.port == 0:
            raise ConfigError(f"broker.url '{address.redacted}' cannot be used by a client: it has no port.")
        self._where = address.redacted
        self._options = ConnectOptions(
            address=address,
            credentials=read_credentials(settings, address),
            tls=tls_context(settings) if address.encrypted else None,
            client_id=client_id,
            persistent=persistent,
            will=will,
            subscriptions=tuple(subscriptions),
            unwanted=tuple(unwanted_filters),
            keepalive_s=settings.keepalive,
            receive_maximum=min(buffer_max_messages, _MAX_RECEIVE_MAXIMUM),
            max_packet_bytes=settings.max_packet_bytes,
        )
        self.on_connected = on_connected
        self.on_disconnected = on_disconnected
        self.on_published = on_published
        self.on_unrouted = on_unrouted
        self.on_refused = on_refused
        self._buffer = ReceiveBuffer(buffer_max_messages, buffer_max_bytes, on_room=self._wake_connection)
        self._version = VersionChoice(settings.protocol)
        self._backoff = Backoff(_FIRST_RETRY_S, _MAX_RETRY_S, jitter=_RETRY_JITTER)
        self._away_backoff = Backoff(_FIRST_RETRY_S, _MAX_AWAY_S, jitter=_RETRY_JITTER)
        self._previous_s = math.inf
        self._close_timeout_s = 5.0
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._info: ConnectionInfo | None = None
        self._failure: ConnectionFailure | None = None
        self._refusal: BrokerRefusedError | None = None
        self._ever_connected = self._session_is_new = False
        self._ahead = False

    # -- any thread ----------------------------------------------------------------------------------------------------

    def wait_connected(self, timeout_s: float | None = None) -> ConnectionInfo | None:
        """Wait until the client is connected; None: not in time (`failure` has the reason), or closed.

        Raises:
            BrokerRefusedError: see `on_refused`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._info or self._refusal or self._stopping.is_set(), timeout_s)
            if self._refusal is not None:
                raise self._refusal
            return self._info

    @property
    def connected(self) -> ConnectionInfo | None:
        """The present connection; None: not connected."""
        return self._info

    @property
    def is_accepted(self) -> bool:
        """Whether the broker has accepted the present connection, which may not be subscribed yet."""
        connection = self._connection
        return connection is not None and connection.is_accepted

    @property
    def failure(self) -> ConnectionFailure | None:
        """Why the client is not connected; None: it is, or nothing has failed yet."""
        return self._failure

    @property
    def trouble(self) -> str | None:
        """Why there is no connection, as a clause; None: there is one."""
        if self._info is not None:
            return None
        failure = self._failure
        return failure.problem if failure else "the connection is being made"

    def receive(self, timeout_s: float | None = None) -> list[Delivery]:
        """Take all received messages, in order; empty: none arrived in time, or closed. For one thread."""
        return self._buffer.take(timeout_s)

    def take_redelivery_bounds(self) -> RedeliveryBounds:
        """Return what the broker cannot deliver again, of all that `receive` has returned before this call."""
        return self._buffer.take_redelivery_bounds()

    def stop_receiving(self) -> None:
        """Make `receive` return at once and nothing; unacknowledged messages stay with the broker."""
        self._buffer.close()

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge messages in this order.

        Those of an earlier connection are skipped: the broker sends them again if it still has them.
        """
        connection = self._connection
        if connection is not None:
            connection.acknowledge(deliveries)

    def let_go_ahead(self, *, on: bool) -> None:
        """Have the broker deliver some messages although others before them are not acknowledged, until told otherwise.

        A broker delivers only so many unacknowledged messages at QoS 1 (mosquitto: 20), and any number at QoS 0. So the
        subscriptions that `may_go_ahead` are made at QoS 0 meanwhile: a message on them is lost when the connection is.
        """
        with self._changed:
            self._ahead = on
            connection = self._connection
        if connection is not None:
            connection.let_go_ahead(on=on)

    def reconnect(self) -> None:
        """Make a new connection at once, so that the broker delivers again what is not acknowledged."""
        connection = self._connection
        if connection is not None:
            connection.expire("receiving unacknowledged messages again")

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: Literal[0, 1] = 1,
        retain: bool = False,
        correlation_data: bytes | None = None,
        user_properties: Sequence[tuple[str, str]] = (),
        alone: bool = False,
    ) -> PublishTicket | None:
        """Enqueue a message for the broker; None: not connected, or 60,000 messages wait, and it was not enqueued.

        In MQTT 3.1.1 correlation data and user properties are left out. A message that is to be `alone` is sent when no
        other is in flight, and those behind it after its PUBACK.

        Raises:
            PacketTooLargeError: the packet exceeds the broker's limit.
            CannotPublishError: brokers close the connection because of such a topic or property.
        """
        publication = Publication(topic, payload, qos, retain, correlation_data, user_properties, alone)
        # The lock makes every ticket precede the end of its connection, and so `on_disconnected`.
        with self._changed:
            if self._connection is None or self._info is None:
                return None
            return self._connection.publish(publication)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Disconnect, so that the will is not published, and end the thread; `receive` returns nothing any more.

        Enqueued messages are sent before, but their acknowledgements are not awaited. If the broker does not read them
        in time, the connection is cut. May be called twice, before `start` and from a callback.
        """
        self._close_timeout_s = timeout_s
        self.stop(timeout_s + 2 * MAX_WAIT_S)

    def _wake(self) -> None:
        self._buffer.close()
        with self._changed:
            self._changed.notify_all()
            connection = self._connection
        if connection is not None:
            connection.disconnect_gracefully(self._close_timeout_s)

    def _wake_connection(self) -> None:
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
            log_exceptions(self._run_connection)(connection)
            self._close_connection(connection)
            delay_s = self._next_delay_s(connection)

    def _make_connection(self, number: int) -> Connection:
        connection = Connection(
            number,
            self._options,
            version=self._version.next,
            max_age_s=_TEMPORARY_S if self._version.is_temporary else math.inf,
            previous_s=self._previous_s,
            deliver=self._buffer.put,
            on_session_started=self._on_session_started,
        )
        with self._changed:
            connection.let_go_ahead(on=self._ahead)
            self._connection = connection
        return connection

    def _on_session_started(self, number: int) -> None:
        self._session_is_new = True
        self._buffer.start_session(number)

    def _run_connection(self, connection: Connection) -> None:
        # `close` may have been called while this connected: its call of `disconnect_gracefully` then came too early.
        if not connection.open() or self._stopping.is_set():
            return
        while connection.run_once():
            self._report(connection)
        self._report(connection)

    def _report(self, connection: Connection) -> None:
        """Call the owner's callbacks for what the last `run_once` brought."""
        info = connection.info
        if info is None:
            return
        if self._info is None:
            # The connection at which the session began may have ended before it was ready: the session is still new.
            self._report_connected(replace(info, session_present=not self._session_is_new))
            self._session_is_new = False
        unrouted = connection.take_unrouted()
        if unrouted and self.on_unrouted is not None:
            log_exceptions(self.on_unrouted)(unrouted)
        published = connection.take_published()
        if published:
            self._buffer.set_acks_received(info.number, connection.acks_received)
        if published and self.on_published is not None:
            report = log_exceptions(self.on_published)
            for ticket, reason in published:
                report(ticket, reason)

    def _report_connected(self, info: ConnectionInfo) -> None:
        self._version.on_connected()
        self._ever_connected = True
        with self._changed:
            self._info, self._failure = info, None
            self._changed.notify_all()
        session = "session resumed" if info.session_present else "new session"
        log.info("Connected to %s, MQTT %s, %s", self._where, info.protocol, session, action="connected")
        for topic_filter in info.refused_filters:
            message = "The broker did not grant '%s' at QoS 1: messages on it may not be received"
            log.warning(message, topic_filter, action="subscription_refused")
        if self.on_connected is not None:
            log_exceptions(self.on_connected)(info)

    def _close_connection(self, connection: Connection) -> None:
        with self._changed:
            was_ready = self._info is not None
            self._connection = self._info = None
        connection.close()
        if was_ready and not self._stopping.is_set() and self.on_disconnected is not None:
            failure = connection.failure
            if not failure.is_timeout:  # then no message is the reason
                failure = replace(failure, unacknowledged=connection.unacknowledged)
            log_exceptions(self.on_disconnected)(failure)

    def _next_delay_s(self, connection: Connection) -> float | None:
        """Return the seconds until the next connection, given the one that has ended; None: there is none."""
        if self._stopping.is_set():
            return None
        switched = self._version.on_ended(
            unsupported=connection.unsupported,
            unanswered=connection.tcp_connected and connection.connack is None,
            malformed=connection.malformed,
        )
        if switched or connection.expired:
            log.debug("Reconnecting to %s: %s", self._where, connection.failure, action="reconnecting")
            return 0.0
        if connection.refused and not self._ever_connected:
            self._report_refused(connection.failure)
            return None
        self._previous_s = connection.ready_s or math.inf  # inf: it was never ready, so the broker was away
        was_ready = connection.info is not None
        if connection.ready_s >= self._backoff.most_s:
            self._backoff.reset()
        if was_ready:
            self._away_backoff.reset()
        if connection.refused:
            self._backoff.jump_to_most()
        # Two consumers of one client id disconnect each other for ever; since each connection is short, the delay grows
        # and they do it ever more slowly. They have no message in flight most of the time.
        contested = was_ready and not connection.is_suspicious and not connection.failure.is_broker_away
        delay_s = (self._backoff if connection.refused or contested else self._away_backoff).next_s()
        self._log_failure(connection, delay_s)
        return delay_s

    def _report_refused(self, failure: ConnectionFailure) -> None:
        error = BrokerRefusedError(f"{failure.problem}.", failure.advice, reason_code=failure.reason_code)
        log.error("%s", error, action="refused")
        with self._changed:
            self._refusal, self._failure = error, failure
            self._changed.notify_all()
        if self.on_refused is not None:
            log_exceptions(self.on_refused)(error)

    def _log_failure(self, connection: Connection, delay_s: float) -> None:
        """Warn of each lost connection, and of the first of several attempts that fail for the same reason."""
        lost = connection.info is not None
        level = logging.WARNING if lost or connection.failure != self._failure else logging.DEBUG
        self._failure = connection.failure
        action, what = ("disconnected", "Lost the connection") if lost else ("not_connected", "No connection")
        message = "%s to %s: %s Next attempt in %.1f s."
        log.log(level, message, what, self._where, connection.failure, delay_s, action=action)
