"""The socket under paho, which reads and writes many packets at once, and the pipe that wakes its reader.

A `BufferedSocket` belongs to the network thread; any thread may call `WakeupPipe.wake`.
"""

import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from paho.mqtt.client import Client

from cesar_mqtt.mqtt.codec import PINGREQ, decode_number, frame

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

_READ_BYTES = 1 << 16
_WRITE_BYTES = 1 << 16
_LINGER_S = 0.5
"""How long `close` waits for the broker to close its end."""
_DISCONNECT = 0xE0
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class BufferedSocket:
    """A socket for paho, with a buffer for each direction.

    Written data waits for `flush`. Received data is cut into packets: `next_packet` returns them, and paho receives
    those that are passed to `forward_to_paho`. On a bare socket paho would read three times and write once for each
    packet, and each of these calls releases the interpreter to another thread.

    Attributes:
        ended: whether the other side has closed, or the connection broke.
        pings_sent: how many pings were written or wait for `flush`; paho sends some of its own.
    """

    def __init__(self, inner: "SocketLike") -> None:
        self.ended = False
        self.pings_sent = 0
        self._socket = inner
        self._received = bytearray()
        self._read_up_to = 0
        self._for_paho = bytearray()
        self._unsent = bytearray()
        self._disconnect_sent = False
        _disable_nagle(inner)

    # -- the socket interface that paho uses ---------------------------------------------------------------------------

    def recv(self, buffer_size: int) -> bytes:
        """Return what was passed to `forward_to_paho`; nothing when the connection has ended."""
        if not self._for_paho and not self.ended:
            raise BlockingIOError
        data = bytes(self._for_paho[:buffer_size])
        del self._for_paho[:buffer_size]
        return data

    def send(self, buffer: bytes | bytearray) -> int:
        """Buffer data for `flush`; a DISCONNECT is sent at once, but after everything else: paho closes after it."""
        if buffer[0] == _DISCONNECT:
            self.flush()
            if self._unsent:
                raise BlockingIOError
            self._disconnect_sent = True
            return self._socket.send(buffer)
        self.pings_sent += buffer == PINGREQ
        self._unsent += buffer
        return len(buffer)

    def close(self) -> None:
        """Close the socket; after a DISCONNECT wait until the broker has closed its end, at most 0.5 s."""
        if self._disconnect_sent:
            self._wait_for_peer_close()
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:  # noqa: FBT001 - the signature of sockets
        self._socket.setblocking(flag)

    # -- packets -------------------------------------------------------------------------------------------------------

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def has_pending(self) -> bool:
        """Whether the TLS layer holds received data, which polling the descriptor does not show."""
        pending = getattr(self._socket, "pending", None)
        return pending is not None and pending() > 0

    def flush(self) -> None:
        """Write as much buffered data as the network accepts."""
        try:
            while self._unsent and (written := self._socket.send(self._unsent[:_WRITE_BYTES])):
                del self._unsent[:written]
        except _WOULD_BLOCK:
            pass
        except OSError:
            self._unsent.clear()
            self.fill()  # the broker may have sent a reason
            self.ended = True

    def fill(self) -> None:
        """Read once, up to 64 KiB."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except _WOULD_BLOCK:
            return
        except OSError:
            data = b""
        del self._received[: self._read_up_to]
        self._read_up_to = 0
        self._received += data
        self.ended = not data

    def next_packet(self) -> tuple[int, bytes] | None:
        """Return the first byte of the next packet, and the bytes behind its header; None: none is complete.

        Raises:
            MalformedPacketError: the received bytes are not a packet.
        """
        found = decode_number(self._received, self._read_up_to + 1)
        if found is None:
            return None
        length, start = found
        end = start + length
        if end > len(self._received):
            return None
        first = self._received[self._read_up_to]
        self._read_up_to = end
        return first, bytes(self._received[start:end])

    def has_received(self, beginning: bytes) -> bool:
        """Whether what is received and not read yet begins with these bytes."""
        return self._received.startswith(beginning, self._read_up_to)

    def forward_to_paho(self, first: int, body: bytes) -> None:
        self._for_paho += frame(first, body)

    def _wait_for_peer_close(self) -> None:
        """Let the broker read everything.

        Closing a socket that holds unread data resets the connection; mosquitto then does not read what was sent
        last [tried].
        """
        deadline = time.monotonic() + _LINGER_S
        with _duplicate(self._socket) as duplicate, suppress(OSError):
            duplicate.shutdown(socket.SHUT_WR)
            while (left_s := deadline - time.monotonic()) > 0:
                duplicate.settimeout(left_s)
                if not duplicate.recv(_READ_BYTES):
                    return


class BufferedClient(Client):
    """A paho client on a `BufferedSocket`.

    Attributes:
        buffered_socket: set once the client has connected.
    """

    buffered_socket: BufferedSocket

    def _create_socket(self) -> "SocketLike":
        # Private, but the only place where paho accepts a socket from outside. If a later paho does not call it, every
        # test against a broker fails.
        self.buffered_socket = BufferedSocket(super()._create_socket())
        return self.buffered_socket


class WakeupPipe:
    """Wakes a thread that polls sockets; several calls of `wake` before the next `drain` count as one."""

    def __init__(self) -> None:
        self._read_end, self._write_end = socket.socketpair()
        self._read_end.settimeout(0)
        self._write_end.settimeout(0)
        self._is_set = self._is_closed = False
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._read_end.fileno()

    def wake(self) -> None:
        """Wake the reader; what it is to find has to be there before. Any thread may call it, also after `close`."""
        if self._is_set:
            return
        with self._lock:  # without it the descriptor might be closed, and already belong to another socket
            if not self._is_set and not self._is_closed:
                self._is_set = True
                self._write_end.send(b"\0")

    def drain(self) -> None:
        """Reset the pipe; call it before looking for what there is to do."""
        self._read_end.recv(1)
        self._is_set = False

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._read_end.close()
            self._write_end.close()


def _duplicate(opened: "SocketLike") -> socket.socket:
    """Return the same socket with a descriptor of its own: paho's WebSockets hide theirs."""
    return socket.socket(fileno=os.dup(opened.fileno()))


def _disable_nagle(opened: "SocketLike") -> None:
    """Switch off Nagle's algorithm, which delays a small packet until the one before is acknowledged."""
    with _duplicate(opened) as duplicate:
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
