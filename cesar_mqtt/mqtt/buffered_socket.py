"""What stands between paho and its socket, so that much is read and written at once, and what wakes its reader.

A `BufferedSocket` belongs to the network thread; a `WakeupPipe` may be rung from any thread.
"""

import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from paho.mqtt.client import Client

from cesar_mqtt.mqtt.codec import frame, read_number

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

_READ_BYTES = 1 << 16
_WRITE_BYTES = 1 << 16
_LINGER_S = 0.5
_DISCONNECT = 0xE0
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class BufferedSocket:
    """A socket for paho, and the packets behind it.

    What is sent is kept until `flush`; what comes in is cut into packets, and paho receives those that it is `give`n. A
    socket of its own would read three times and write once for each packet, and each of these calls lets another
    thread have the interpreter.

    Attributes:
        ended: whether the other side has closed, or the connection broke.
    """

    def __init__(self, opened: "SocketLike") -> None:
        self.ended = False
        self._socket = opened
        self._came = bytearray()
        self._at = 0
        self._for_paho = bytearray()
        self._out = bytearray()
        self._said_goodbye = False
        _send_at_once(opened)

    # -- as paho sees it -----------------------------------------------------------------------------------------------

    def recv(self, buffer_size: int) -> bytes:
        """Return what paho was given; nothing when the connection has ended."""
        if not self._for_paho and not self.ended:
            raise BlockingIOError
        data = bytes(self._for_paho[:buffer_size])
        del self._for_paho[:buffer_size]
        return data

    def send(self, buffer: bytes | bytearray) -> int:
        """Keep it for `flush`. Not so a DISCONNECT: paho closes as soon as that is sent, so it waits for all else."""
        if buffer[0] == _DISCONNECT:
            self.flush()
            if self._out:
                raise BlockingIOError
            self._said_goodbye = True
            return self._socket.send(buffer)
        self._out += buffer
        return len(buffer)

    def close(self) -> None:
        """Close the socket; after a DISCONNECT, when the broker has closed its end, which takes it no time."""
        if self._said_goodbye:
            self._linger()
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:  # noqa: FBT001 - as sockets have it
        """Do as a socket does."""
        self._socket.setblocking(flag)

    # -- the packets ---------------------------------------------------------------------------------------------------

    @property
    def unsent(self) -> bool:
        """Whether `flush` has more to do."""
        return bool(self._out)

    @property
    def pending(self) -> bool:
        """Whether TLS has taken in what no select will tell of."""
        pending = getattr(self._socket, "pending", None)
        return pending is not None and pending() > 0

    def flush(self) -> None:
        """Write as much of what was sent as the network takes."""
        try:
            while self._out and (written := self._socket.send(self._out[:_WRITE_BYTES])):
                del self._out[:written]
        except _NOT_NOW:
            pass
        except OSError:
            self._out.clear()
            self.fill()  # perhaps the broker said why
            self.ended = True

    def fill(self) -> None:
        """Read what is there, up to a limit."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except _NOT_NOW:
            return
        except OSError:
            data = b""
        del self._came[: self._at]
        self._at = 0
        self._came += data
        self.ended = not data

    def next_packet(self) -> tuple[int, bytes] | None:
        """Return the first byte of the next packet, and what follows its header; None: none is complete.

        Raises:
            UnreadablePacketError: what came is no packet.
        """
        found = read_number(self._came, self._at + 1)
        if found is None:
            return None
        length, start = found
        end = start + length
        if end > len(self._came):
            return None
        first = self._came[self._at]
        self._at = end
        return first, bytes(self._came[start:end])

    def give(self, first: int, body: bytes) -> None:
        """Let paho receive this packet."""
        self._for_paho += frame(first, body)

    def _linger(self) -> None:
        """Let the broker read to the end.

        To close a socket in which something is unread resets the connection; mosquitto then does not read what we had
        sent last [ran].
        """
        until = time.monotonic() + _LINGER_S
        with _twin(self._socket) as twin, suppress(OSError):
            twin.shutdown(socket.SHUT_WR)
            while (left_s := until - time.monotonic()) > 0:
                twin.settimeout(left_s)
                if not twin.recv(_READ_BYTES):
                    return


class BufferedClient(Client):
    """paho on a cable.

    Attributes:
        cable: there once it has connected.
    """

    cable: BufferedSocket

    def _create_socket(self) -> "SocketLike":
        # Private, but the only place where paho takes a socket that it has not made itself. If a later paho no longer
        # asks here, there is no cable and no connection: every test against a broker would tell.
        self.cable = BufferedSocket(super()._create_socket())
        return self.cable


class WakeupPipe:
    """Ends a select from another thread, once for however much there is to do by then."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.settimeout(0)
        self._far.settimeout(0)
        self._rung = self._closed = False
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Return what to select for reading."""
        return self._near.fileno()

    def ring(self) -> None:
        """Wake the reader; what it is to find has to be there before."""
        if self._rung:
            return
        with self._lock:  # else the descriptor might be closed, and already be another's
            if not self._rung and not self._closed:
                self._rung = True
                self._far.send(b"\0")

    def hush(self) -> None:
        """Take note that it rang; to be called before looking for what there is to do."""
        self._near.recv(1)
        self._rung = False

    def close(self) -> None:
        """Let it never ring again."""
        with self._lock:
            self._closed = True
            self._near.close()
            self._far.close()


def _twin(opened: "SocketLike") -> socket.socket:
    """Return the same socket once more, by a descriptor of its own: paho's WebSockets hide theirs."""
    return socket.socket(fileno=os.dup(opened.fileno()))


def _send_at_once(opened: "SocketLike") -> None:
    """Switch off Nagle's algorithm, which holds a small packet back until the one before is acknowledged."""
    with _twin(opened) as twin:
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
