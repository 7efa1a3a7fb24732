"""A network that fails: it stands between a client and a broker on loopback, and ends connections as chance has it."""

import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cesar_mqtt.mqtt.codec import PUBLISH, decode_number

_WAIT_S = 10.0
_HALF_OPEN_S = 0.3
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: what closes a connection without a word."""


@dataclass(frozen=True)
class _Doom:
    """How a connection is to end, and when."""

    fate: Literal["cut", "reset", "swallow", "forget"]
    upwards: bool
    """Whether the bytes to the broker count, or those to the client."""
    after_bytes: int


class _Door:
    """Accepts connections, and makes one to a port of 127.0.0.1 for each.

    Attributes:
        url: where to connect to.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._door.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """End every connection."""
        ends = [self._door, *self._ends]
        _shut(*ends)
        for thread in self._threads:
            thread.join(_WAIT_S)
        for end in ends:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._door.accept()
                try:
                    broker = socket.create_connection(("127.0.0.1", self._port))
                except ConnectionRefusedError:  # the broker is away, as the client is to notice
                    client.close()
                    continue
                self._ends += [client, broker]
                for carry in self._carriers(client, broker):
                    self._threads.append(threading.Thread(target=carry, daemon=True))
                    self._threads[-1].start()

    def _carriers(self, client: socket.socket, broker: socket.socket) -> Sequence[Callable[[], None]]:
        """What passes the bytes on between the two, each in a thread."""
        raise NotImplementedError


class Proxy(_Door):
    """Passes connections on to a port of 127.0.0.1; the first `cuts` of them end badly, often within a packet.

    `cut` closes both ends; `reset` does so without a word; `swallow` first takes for a while what comes, and passes
    nothing on; `forget` closes the client's end and leaves the broker's open.

    Attributes:
        spent: set when the last bad end has come; who connects after that is left alone.
    """

    def __init__(self, port: int, dice: random.Random, *, cuts: int) -> None:
        self.spent = threading.Event()
        self._dooms = [
            _Doom(
                fate=dice.choice(("cut", "reset", "swallow", "forget")),
                upwards=dice.random() < 0.5,
                after_bytes=int(10 ** dice.uniform(1.0, 4.5)),
            )
            for _ in range(cuts)
        ]
        super().__init__(port)

    def _carriers(self, client: socket.socket, broker: socket.socket) -> Sequence[Callable[[], None]]:
        doom = self._dooms.pop(0) if self._dooms else None
        return [partial(self._carry, client, broker, doom, last=doom is not None and not self._dooms)]

    def _carry(self, client: socket.socket, broker: socket.socket, doom: _Doom | None, *, last: bool) -> None:
        with broker:
            with client, suppress(OSError):
                _pass_on(client, broker, doom)
                if doom is not None:
                    _end(client, broker, doom)
            if last:
                self.spent.set()
            if doom is not None and doom.fate == "forget":
                _swallow(broker, for_s=_WAIT_S)


def _pass_on(client: socket.socket, broker: socket.socket, doom: _Doom | None) -> None:
    """Until one of them closes, or the connection meets its doom."""
    passed = 0
    while True:
        readable, _, _ = select.select([client, broker], [], [])
        for source in readable:
            data = source.recv(65_536)
            target = broker if source is client else client
            if doom is not None and doom.upwards == (source is client):
                data, passed = data[: doom.after_bytes - passed], passed + len(data)
            target.sendall(data)
            if not data or (doom is not None and passed >= doom.after_bytes):
                return


def _end(client: socket.socket, broker: socket.socket, doom: _Doom) -> None:
    if doom.fate == "swallow":
        _swallow(client, broker, for_s=_HALF_OPEN_S)
    elif doom.fate == "reset":
        for end in (client, broker):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _swallow(*ends: socket.socket, for_s: float) -> None:
    """Take what comes, until the time is over or one of them closes."""
    until = time.monotonic() + for_s
    with suppress(OSError):
        while (left_s := until - time.monotonic()) > 0:
            readable, _, _ = select.select(ends, [], [], left_s)
            if any(not end.recv(65_536) for end in readable):
                return


class PickyProxy(_Door):
    """Passes connections on to a port of 127.0.0.1, and ends one as soon as the client publishes what is not accepted.

    So do brokers that no package has, or only behind an account.

    Attributes:
        ended: the topics at which it has ended a connection, in order.
    """

    def __init__(self, port: int, accepts: Callable[[str, int], bool]) -> None:
        """`accepts` gets the topic and the size of the packet in bytes."""
        self.ended: list[str] = []
        self._accepts = accepts
        super().__init__(port)

    def _carriers(self, client: socket.socket, broker: socket.socket) -> Sequence[Callable[[], None]]:
        return [partial(self._upwards, client, broker), partial(self._downwards, client, broker)]

    def _upwards(self, client: socket.socket, broker: socket.socket) -> None:
        received = bytearray()
        with suppress(OSError):
            while data := client.recv(65_536):
                received += data
                while (packet := _first_packet(received)) is not None:
                    topic = _topic(packet)
                    if topic is not None and not self._accepts(topic, len(packet)):
                        self.ended.append(topic)
                        raise OSError
                    broker.sendall(packet)
                    del received[: len(packet)]
        _shut(client, broker)

    def _downwards(self, client: socket.socket, broker: socket.socket) -> None:
        with suppress(OSError):
            while data := broker.recv(65_536):
                client.sendall(data)
        _shut(client, broker)


def _first_packet(received: bytearray) -> bytes | None:
    """The packet that the bytes begin with; None: it is not whole yet."""
    found = decode_number(received, 1)
    if found is None or sum(found) > len(received):
        return None
    return bytes(received[: sum(found)])


def _topic(packet: bytes) -> str | None:
    """The topic of a PUBLISH; None: it is another packet."""
    if packet[0] & 0xF0 != PUBLISH:
        return None
    found = decode_number(packet, 1)
    assert found is not None
    start = found[1]
    return packet[start + 2 : start + 2 + int.from_bytes(packet[start : start + 2], "big")].decode()


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
