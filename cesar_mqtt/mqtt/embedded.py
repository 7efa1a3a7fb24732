"""The embedded broker: amqtt on loopback, for a first start without any set-up.

`EmbeddedBroker` runs it in a thread of its own, `embedded-broker`, whose event loop nobody else touches. It keeps
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
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.session import IncomingApplicationMessage, OutgoingApplicationMessage, Session

from cesar_mqtt.errors import ConfigError
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_LISTENER = "default"
_BACKLOG = 128
_OPENING_S = 10.0
_SHUTDOWN_S = 2.0
_KEEP_S = 10
# From Python 3.12 on `asyncio.wait_for` makes no task: amqtt's reader then sees the end of a connection before the
# tasks have run that it made for what came by it.
_OUT_OF_TURN = sys.version_info >= (3, 12)
_TURNS = 1000  # as many messages are waited for; a session that another client took over has nobody to take them
_JOIN_S = 5.0

_CONNECT = 0x10
_NAME = b"\x00\x04MQTT"
_LONGEST_HEADER = 5
# amqtt takes the properties of MQTT 5 for a client id, and waits for more of it. CONNACK, reason 0x84: the version is
# not supported.
_REFUSAL_OF_MQTT_5 = b"\x20\x03\x00\x84\x00"


class EmbeddedBroker:
    """A broker for this machine, open to everybody on it.

    The methods are for one thread at a time.

    Attributes:
        port: where it listens; with 0 asked for, known after `start`.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 1883, *, keeper: str = "", kept: Callable[[str], bool] | None = None
    ) -> None:
        """Take note of where to listen; port 0 is any free one.

        Args:
            host: one of this machine's own addresses.
            port: where to listen.
            keeper: the client id of a subscriber that keeps what others publish on some topics.
            kept: whether a topic is one of these. A message of QoS 1 on it is acknowledged to its publisher only after
                the keeper has acknowledged it; without a keeper not at all.

        Raises:
            ConfigError: other machines could reach that host: there are no passwords here.
        """
        self._host = "127.0.0.1" if host == "localhost" else host
        if not _is_loopback(self._host):
            raise ConfigError(
                f"The embedded broker cannot listen on {host}: it asks nobody for a password, so it is for this "
                f"machine only (127.0.0.1 or ::1). Run a broker such as mosquitto and name it: --broker mqtt://{host}"
            )
        self.port = port
        self._keeper = keeper
        self._kept = kept or _nothing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """The URL for clients; known after `start`."""
        return f"mqtt://{_shown(self._host)}:{self.port}"

    def start(self) -> None:
        """Return when clients can connect.

        Raises:
            ConfigError: the port is taken, or may not be used.
        """
        listening = self._listen()
        self.port = listening.getsockname()[1]
        _quieten_amqtt()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="embedded-broker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._stop is None:
            raise ConfigError("The embedded broker did not start; run a broker such as mosquitto and name it: --broker")

    def close(self) -> None:
        """Disconnect everybody and forget everything; takes some seconds at most. May be called twice."""
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
                raise ConfigError(self._taken()) from exc
            raise ConfigError(
                f"The embedded broker cannot listen on {_shown(self._host)}:{self.port}: {os.strerror(exc.errno or 0)}"
            ) from exc

    def _taken(self) -> str:
        host = _shown(self._host)
        return (
            f"Port {self.port} on {host} is taken, so the embedded broker cannot listen there; say "
            f"--broker {self.url} to use the broker that is there, or --broker embedded://{host}:PORT"
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
        loop.set_exception_handler(_log_quietly)
        broker = _Amqtt(_config(), keeper=self._keeper, kept=self._kept)
        await broker.start()
        server = await asyncio.start_server(partial(self._meet, broker), sock=listening)
        self._loop, self._stop = loop, asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        server.close()
        # amqtt waits for each client to read what was written to it, however long that takes.
        with suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_S):
                await broker.shutdown()
        for writer in self._writers:
            writer.transport.abort()

    async def _meet(self, broker: Broker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let amqtt talk to one client, and close the connection in any case: amqtt forgets to when CONNECT is junk."""
        # asyncio does so itself only for sockets that name their protocol, and those of create_server do not: each
        # message then took 40 ms.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers.add(writer)
        try:
            with suppress(OSError, EOFError, TimeoutError):
                opening = await _read_opening(reader)
                if _speaks_mqtt_5(opening):
                    writer.write(_REFUSAL_OF_MQTT_5)
                    await writer.drain()
                else:
                    resumed = _ResumedReader(opening, reader)
                    await broker.external_connected(resumed, StreamWriterAdapter(writer), _LISTENER)
        finally:
            await self._part(writer)

    async def _part(self, writer: asyncio.StreamWriter) -> None:
        """Close a connection; a client that does not read what was written to it is not waited for."""
        writer.close()
        try:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_S):
                    await writer.wait_closed()
        finally:
            writer.transport.abort()  # does nothing to a connection that is closed
            self._writers.discard(writer)


class _ResumedReader(StreamReaderAdapter):  # type: ignore[misc]
    """A stream of which the first bytes were read already."""

    def __init__(self, opening: bytes, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._opening = opening

    async def read(self, n: int = -1) -> bytes:
        """Read `n` bytes."""
        first, self._opening = self._opening[:n], self._opening[n:]
        return first + await super().read(n - len(first)) if len(first) < n else first


_answering_subscribe: ContextVar[bool] = ContextVar("answering_subscribe", default=False)


class _Amqtt(Broker):  # type: ignore[misc]
    """amqtt 0.12.1, except that retained messages answer a SUBSCRIBE and nothing else [MQTT-3.3.1-6].

    It would also send them when a client connects, and for the filters of all other clients. And it would acknowledge
    a message as soon as it has read it, while all that it keeps is in memory: see `_Handler`.
    """

    def __init__(self, config: BrokerConfig, *, keeper: str, kept: Callable[[str], bool]) -> None:
        super().__init__(config)
        self._keeping = _Keeping(keeper, kept)

    async def _initialize_client_session(self, *args: Any) -> tuple[BrokerProtocolHandler, Session]:
        handler, session = await super()._initialize_client_session(*args)
        handler.__class__ = _Handler  # amqtt has no other way to choose the class
        handler.keeping = self._keeping
        return handler, session

    async def _handle_subscription(self, *args: Any) -> None:
        token = _answering_subscribe.set(True)
        try:
            await super()._handle_subscription(*args)
        finally:
            _answering_subscribe.reset(token)

    async def _publish_retained_messages_for_subscription(self, *args: Any) -> None:
        if _answering_subscribe.get():
            await super()._publish_retained_messages_for_subscription(*args)


class _Keeping:
    """Messages that were not yet acknowledged to their publishers, because the keeper has not acknowledged them.

    They are told apart by their payload's identity, which amqtt hands on from publisher to subscriber unchanged.
    """

    def __init__(self, keeper: str, kept: Callable[[str], bool]) -> None:
        self.keeper = keeper
        self.kept = kept
        self._waiting: dict[int, tuple[object, asyncio.Future[None]]] = {}

    def expect(self, data: object) -> asyncio.Future[None]:
        """Return what is done when the keeper has acknowledged the message with this payload."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[id(data)] = (data, future)  # with the payload itself: its identity must not be used again
        future.add_done_callback(lambda _: self._waiting.pop(id(data), None))
        return future

    def done(self, data: object) -> None:
        """Take note of the keeper's acknowledgement."""
        _, future = self._waiting.get(id(data), (None, None))
        if future is not None and not future.done():
            future.set_result(None)


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """amqtt's side of one connection, except that a PUBACK for a kept topic means that the keeper has the message.

    When the keeper does not have it in time, the publisher's connection is closed: a client of QoS 1 then connects
    again and sends the message again, which is what the keeper's way of counting expects.
    """

    keeping: _Keeping
    farewell: Any = None
    """The client's DISCONNECT, once it came: whoever takes note of the end first takes note of that, too."""

    async def _handle_qos1_message_flow(self, message: Any) -> None:
        if not isinstance(message, IncomingApplicationMessage) or not self.keeping.kept(message.topic):
            await super()._handle_qos1_message_flow(message)
            return
        kept = self.keeping.expect(message.data)
        await self.session.delivered_message_queue.put(message)
        try:
            async with asyncio.timeout(_KEEP_S):
                await kept
        except TimeoutError:
            log.debug("The consumer has not taken a message in %d s: its publisher is let go", _KEEP_S)
            await self.handle_connection_closed()
            return
        message.puback_packet = PubackPacket.build(message.packet_id)
        await self._send_packet(message.puback_packet)

    async def handle_connection_closed(self) -> None:
        """Take note that the connection is gone, after what came by it: a DISCONNECT in there keeps the will unsent."""
        if _OUT_OF_TURN and self._is_reading():
            await asyncio.sleep(0)
        await super().handle_connection_closed()

    def _is_reading(self) -> bool:
        """Whether this runs for the client itself, and not for another one that takes its session over."""
        return asyncio.current_task() is self._reader_task

    async def handle_disconnect(self, packet: Any) -> None:
        """Take note that the client leaves, after what it has sent before is on its way.

        amqtt would drop what a client of QoS 0 sends right before it leaves.
        """
        if not _OUT_OF_TURN:
            await super().handle_disconnect(packet)
            return
        self.farewell = self.farewell or packet
        for _ in range(_TURNS if packet is not None or self._is_reading() else 0):
            if self.session is None or self.session.delivered_message_queue.empty():
                break
            await asyncio.sleep(0)  # the broker's loop takes one message at each turn
        await super().handle_disconnect(self.farewell)

    async def mqtt_publish(self, topic: str, data: bytes, *args: Any, **options: Any) -> OutgoingApplicationMessage:
        """Send a message, and return when it is acknowledged."""
        sent = await super().mqtt_publish(topic, data, *args, **options)
        if self.session is not None and self.session.client_id == self.keeping.keeper:
            self.keeping.done(data)
        return sent


def _nothing(_topic: str) -> bool:
    return False


class _ToDebug(logging.Handler):
    """Passes what amqtt says on at DEBUG.

    To amqtt a client that leaves without a word is a warning, and a port scan an error with a traceback.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on, without its traceback."""
        log.debug("%s: %s", record.name, record.getMessage())


async def _read_opening(reader: asyncio.StreamReader) -> bytes:
    """Read CONNECT up to the protocol version: type, remaining length (1 to 4 bytes), protocol name, version."""
    async with asyncio.timeout(_OPENING_S):
        opening = await reader.readexactly(2)
        while opening[-1] & 0x80 and len(opening) < _LONGEST_HEADER:
            opening += await reader.readexactly(1)
        return opening + await reader.readexactly(len(_NAME) + 1)


def _speaks_mqtt_5(opening: bytes) -> bool:
    return opening[0] == _CONNECT and opening[-len(_NAME) - 1 :] == _NAME + b"\x05"


def _quieten_amqtt() -> None:
    for name in ("amqtt", "transitions"):
        noisy = logging.getLogger(name)
        noisy.setLevel(logging.WARNING)
        noisy.propagate = False
        noisy.handlers = [_ToDebug()]


def _log_quietly(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Take what amqtt's tasks did not handle: always one client's broken connection, never the broker."""
    log.debug("amqtt: %s", context.get("exception") or context["message"])


def _config() -> BrokerConfig:
    # The listener is ours: a bound socket is how a taken port, port 0 and every connection stay in our hands.
    return BrokerConfig(
        listeners={_LISTENER: ListenerConfig(type=ListenerType.EXTERNAL)},
        plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
