"""The embedded broker: amqtt on loopback, for a first start without any set-up.

`EmbeddedBroker` runs it in a thread of its own, `embedded-broker`, which alone uses its event loop. The broker keeps
everything in memory and speaks MQTT 3.1.1 only.
"""

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType
from amqtt.errors import AMQTTError
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.session import IncomingApplicationMessage, OutgoingApplicationMessage, Session

from cesar_mqtt.errors import ConfigError
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_LISTENER = "default"
_BACKLOG = 128
"""Connections that may wait to be accepted."""
_CONNECT_S = 10.0
"""How long a client may take to send the beginning of CONNECT."""
_SHUTDOWN_S = 2.0
"""How long closing waits for clients that do not read."""
_SUBSCRIBER_S = 10
"""How long the publisher of a forwarded message waits until the subscriber has acknowledged it."""
# From Python 3.12 on `asyncio.wait_for` creates no task: amqtt's reader then handles the end of a connection before the
# tasks that it created for the packets before it.
_END_OVERTAKES_PACKETS = sys.version_info >= (3, 12)
_MAX_DELIVERY_TURNS = 1000
"""At DISCONNECT wait for as many messages; in a session that another client took over they are never taken."""
_JOIN_S = 5.0
"""How long `close` waits for the thread: longer than the shutdown of the broker and its connections."""

_CONNECT = 0x10
_PROTOCOL_NAME = b"\x00\x04MQTT"
_MAX_HEADER_BYTES = 5
# amqtt takes the properties of MQTT 5 for a client id, and waits for more of it. CONNACK, reason 0x84: unsupported
# version.
_UNSUPPORTED_VERSION_CONNACK = b"\x20\x03\x00\x84\x00"


class EmbeddedBroker:
    """A broker without passwords for clients on this machine.

    The methods are for one thread at a time.

    Attributes:
        port: where it listens; if it was 0, known after `start`.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 1883,
        *,
        subscriber: str = "",
        is_forwarded: Callable[[str], bool] | None = None,
    ) -> None:
        """Prepare the broker; `start` listens.

        Args:
            host: a loopback address.
            port: where to listen; 0: any free port.
            subscriber: the client id of the consumer, which stores the messages on some topics.
            is_forwarded: whether a topic is one of these. A message of QoS 1 on it is acknowledged to its publisher
                only after the subscriber has acknowledged it; without the subscriber not at all.

        Raises:
            ConfigError: other machines could reach that host.
        """
        self._host = "127.0.0.1" if host == "localhost" else host
        if not _is_loopback(self._host):
            raise ConfigError(
                f"The embedded broker cannot listen on {host}: it has no passwords, so it is for this machine only "
                "(127.0.0.1 or ::1).",
                f"Run a broker such as mosquitto and name it: --broker mqtt://{host}",
            )
        self.port = port
        self._subscriber = subscriber
        self._is_forwarded = is_forwarded or _none_is_forwarded
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """The URL for clients; final after `start`."""
        return f"mqtt://{_bracketed(self._host)}:{self.port}"

    def start(self) -> None:
        """Listen, and return when clients can connect.

        Raises:
            ConfigError: the port is in use, or not permitted.
        """
        listening = self._listen()
        self.port = listening.getsockname()[1]
        _log_amqtt_at_debug()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="embedded-broker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._stop is None:
            raise ConfigError(
                "The embedded broker did not start.", "Run a broker such as mosquitto and name it: --broker"
            )

    def close(self) -> None:
        """Disconnect all clients and drop all messages; takes some seconds at most. May be called twice."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_JOIN_S)

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self.port), family=family, backlog=_BACKLOG)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise self._port_in_use() from exc
            raise ConfigError(
                f"The embedded broker cannot listen on {_bracketed(self._host)}:{self.port}: "
                f"{os.strerror(exc.errno or 0)}."
            ) from exc

    def _port_in_use(self) -> ConfigError:
        host = _bracketed(self._host)
        return ConfigError(
            f"Port {self.port} on {host} is in use, so the embedded broker cannot listen there.",
            f"Use the broker that listens there, --broker {self.url}, or another port: --broker embedded://{host}:PORT",
        )

    # -- the embedded-broker thread ------------------------------------------------------------------------------------

    def _run(self, listening: socket.socket) -> None:
        try:
            asyncio.run(self._serve(listening))
        finally:
            listening.close()
            self._ready.set()

    async def _serve(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_task_error)
        broker = _Amqtt(_config(), subscriber=self._subscriber, is_forwarded=self._is_forwarded)
        await broker.start()
        server = await asyncio.start_server(partial(self._serve_client, broker), sock=listening)
        self._loop, self._stop = loop, asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        server.close()
        # amqtt waits without a limit until each client has read what was written to it.
        with suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_S):
                await broker.shutdown()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve_client(self, broker: Broker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let amqtt serve one client, and close the connection in any case: amqtt does not after an invalid CONNECT."""
        # asyncio sets TCP_NODELAY only for sockets with a protocol number, and those of create_server have none: each
        # message then took 40 ms.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers.add(writer)
        try:
            with suppress(OSError, EOFError, TimeoutError):
                opening = await _read_opening(reader)
                if _speaks_mqtt_5(opening):
                    writer.write(_UNSUPPORTED_VERSION_CONNACK)
                    await writer.drain()
                else:
                    resumed = _ResumedReader(opening, reader)
                    await broker.external_connected(resumed, StreamWriterAdapter(writer), _LISTENER)
        finally:
            await self._close(writer)

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        """Close a connection, without waiting for a client that does not read."""
        writer.close()
        try:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_S):
                    await writer.wait_closed()
        finally:
            writer.transport.abort()  # has no effect on a closed connection
            self._writers.discard(writer)


class _ResumedReader(StreamReaderAdapter):  # type: ignore[misc]
    """A stream whose first bytes have already been read."""

    def __init__(self, opening: bytes, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._opening = opening

    async def read(self, n: int = -1) -> bytes:
        first, self._opening = self._opening[:n], self._opening[n:]
        return first + await super().read(n - len(first)) if len(first) < n else first


_answering_subscribe: ContextVar[bool] = ContextVar("answering_subscribe", default=False)


class _Amqtt(Broker):  # type: ignore[misc]
    """amqtt 0.12.1 with two corrections.

    Retained messages answer a SUBSCRIBE and nothing else [MQTT-3.3.1-6]: amqtt also sends them when a client connects,
    and for the filters of all other clients. Messages that the subscriber stores are acknowledged late, see `_Handler`:
    amqtt acknowledges a message as soon as it has read it, and holds it in memory only.
    """

    def __init__(self, config: BrokerConfig, *, subscriber: str, is_forwarded: Callable[[str], bool]) -> None:
        super().__init__(config)
        self._forwarding = _Forwarding(subscriber, is_forwarded)

    async def _initialize_client_session(self, *args: Any) -> tuple[BrokerProtocolHandler, Session]:
        handler, session = await super()._initialize_client_session(*args)
        await self._forwarding.wait_until_ready(session.client_id)
        handler.__class__ = _Handler  # amqtt offers no other way to choose the class
        handler.forwarding = self._forwarding
        return handler, session

    async def _handle_subscription(self, *args: Any) -> None:
        token = _answering_subscribe.set(True)
        try:
            await super()._handle_subscription(*args)
        finally:
            _answering_subscribe.reset(token)
        self._forwarding.on_subscribed(args[0].client_id)

    async def _publish_retained_messages_for_subscription(self, *args: Any) -> None:
        if _answering_subscribe.get():
            await super()._publish_retained_messages_for_subscription(*args)


class _Forwarding:
    """Messages whose PUBACK waits until the subscriber has acknowledged them.

    They are identified by the identity of their payload object, which amqtt passes unchanged from publisher to
    subscriber.
    """

    def __init__(self, subscriber: str, is_forwarded: Callable[[str], bool]) -> None:
        self.subscriber = subscriber
        self.is_forwarded = is_forwarded
        self._waiting: dict[int, tuple[object, asyncio.Future[None]]] = {}
        self._ready = asyncio.Event()
        if not subscriber:
            self._ready.set()

    async def wait_until_ready(self, client_id: str) -> None:
        """Let other clients wait for their CONNACK until the subscriber has subscribed: it would miss their messages.

        Raises AMQTTError after some seconds: a client that tries again then finds it subscribed.
        """
        if client_id != self.subscriber:
            try:
                async with asyncio.timeout(_SUBSCRIBER_S):
                    await self._ready.wait()
            except TimeoutError as exc:
                raise AMQTTError("The consumer has not subscribed") from exc

    def on_subscribed(self, client_id: str) -> None:
        if client_id == self.subscriber:
            self._ready.set()

    def expect(self, data: object) -> asyncio.Future[None]:
        """Return a future that is done when the subscriber has acknowledged the message with this payload."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[id(data)] = (data, future)  # the reference keeps the identity from being used again
        future.add_done_callback(lambda _: self._waiting.pop(id(data), None))
        return future

    def acknowledge(self, data: object) -> None:
        _, future = self._waiting.get(id(data), (None, None))
        if future is not None and not future.done():
            future.set_result(None)


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """amqtt's side of one connection, except that PUBACK for a forwarded topic waits for the subscriber.

    If the subscriber does not acknowledge in time, the publisher's connection is closed: a client then reconnects and
    sends its message of QoS 1 again, marked DUP, as the consumer's deduplication expects.
    """

    forwarding: _Forwarding
    received_disconnect: Any = None
    """The client's DISCONNECT; the end of the connection may be handled before it."""

    async def _handle_qos1_message_flow(self, message: Any) -> None:
        if not isinstance(message, IncomingApplicationMessage) or not self.forwarding.is_forwarded(message.topic):
            await super()._handle_qos1_message_flow(message)
            return
        acknowledged = self.forwarding.expect(message.data)
        await self.session.delivered_message_queue.put(message)
        try:
            async with asyncio.timeout(_SUBSCRIBER_S):
                await acknowledged
        except TimeoutError:
            log.debug(
                "The consumer has not acknowledged a message in %d s: its publisher is disconnected", _SUBSCRIBER_S
            )
            await self.handle_connection_closed()
            return
        message.puback_packet = PubackPacket.build(message.packet_id)
        await self._send_packet(message.puback_packet)

    async def handle_connection_closed(self) -> None:
        """Handle the end of the connection after the packets before it: a DISCONNECT among them discards the will."""
        if _END_OVERTAKES_PACKETS and self._is_reading():
            await asyncio.sleep(0)
        await super().handle_connection_closed()

    def _is_reading(self) -> bool:
        """Whether this runs for the client itself, and not for another one that takes over its session."""
        return asyncio.current_task() is self._reader_task

    async def handle_disconnect(self, packet: Any) -> None:
        """Handle DISCONNECT after the messages before it have been forwarded.

        amqtt would drop the messages of QoS 0 that a client sends right before DISCONNECT.
        """
        if not _END_OVERTAKES_PACKETS:
            await super().handle_disconnect(packet)
            return
        self.received_disconnect = self.received_disconnect or packet
        for _ in range(_MAX_DELIVERY_TURNS if packet is not None or self._is_reading() else 0):
            if self.session is None or self.session.delivered_message_queue.empty():
                break
            await asyncio.sleep(0)  # the broker takes one message at each turn of the loop
        await super().handle_disconnect(self.received_disconnect)

    async def mqtt_publish(self, topic: str, data: bytes, *args: Any, **options: Any) -> OutgoingApplicationMessage:
        sent = await super().mqtt_publish(topic, data, *args, **options)
        if self.session is not None and self.session.client_id == self.forwarding.subscriber:
            self.forwarding.acknowledge(data)
        return sent


def _none_is_forwarded(_topic: str) -> bool:
    return False


class _ToDebug(logging.Handler):
    """Logs amqtt's lines at DEBUG, without tracebacks.

    amqtt warns of a client that disappears, and logs a port scan as an error with a traceback.
    """

    def emit(self, record: logging.LogRecord) -> None:
        log.debug("%s: %s", record.name, record.getMessage())


async def _read_opening(reader: asyncio.StreamReader) -> bytes:
    """Read CONNECT up to the version: type, remaining length (1 to 4 bytes), protocol name, version."""
    async with asyncio.timeout(_CONNECT_S):
        opening = await reader.readexactly(2)
        while opening[-1] & 0x80 and len(opening) < _MAX_HEADER_BYTES:
            opening += await reader.readexactly(1)
        return opening + await reader.readexactly(len(_PROTOCOL_NAME) + 1)


def _speaks_mqtt_5(opening: bytes) -> bool:
    return opening[0] == _CONNECT and opening[-len(_PROTOCOL_NAME) - 1 :] == _PROTOCOL_NAME + b"\x05"


def _log_amqtt_at_debug() -> None:
    for name in ("amqtt", "transitions"):
        noisy = logging.getLogger(name)
        noisy.setLevel(logging.WARNING)
        noisy.propagate = False
        noisy.handlers = [_ToDebug()]


def _log_task_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an exception that amqtt's tasks did not handle: it concerns one broken connection, never the broker."""
    log.debug("amqtt: %s", context.get("exception") or context["message"])


def _config() -> BrokerConfig:
    # `EmbeddedBroker` listens itself: so it knows when the port is in use, which one 0 became, and every connection.
    return BrokerConfig(
        listeners={_LISTENER: ListenerConfig(type=ListenerType.EXTERNAL)},
        plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
