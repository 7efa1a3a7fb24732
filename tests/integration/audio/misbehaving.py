"""An HTTP server on loopback that sends exactly what a test specifies, right or wrong, byte by byte."""

import contextlib
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence

from tests.conftest import PATIENCE_S


class ClientLeft(Exception):  # noqa: N818 - no error
    """The other side has left, or the server is closing."""


class Exchange:
    """One connection: the head of its request, and the means to respond."""

    def __init__(self, connection: socket.socket, closing: threading.Event) -> None:
        self.requests = b""
        self._connection = connection
        self._closing = closing

    def read(self) -> None:
        """Read the head of the request."""
        while b"\r\n\r\n" not in self.requests:
            data = self._connection.recv(65536)
            if not data:
                raise ClientLeft
            self.requests += data

    def send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError as exc:
            raise ClientLeft from exc

    def drip(self, chunks: Iterator[bytes], every_s: float = 0.0) -> None:
        """Send until the chunks end or the other side leaves."""
        for chunk in chunks:
            self.send(chunk)
            if self._closing.wait(every_s):
                raise ClientLeft

    def hang(self) -> None:
        """Send nothing until the other side leaves."""
        with contextlib.suppress(OSError):
            while self._connection.recv(65536):
                pass
        raise ClientLeft

    def reset(self) -> None:
        """End with a RST rather than in good order."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


Answer = Callable[[Exchange], None]


class MisbehavingServer:
    """Sends the answers in order, one to each connection; the last one again and again.

    Attributes:
        requests: their heads.
        names: the server names of the TLS handshakes.
        reached: a request was received.
        left: gets an item when a client has left in the middle of a response.
    """

    def __init__(self, answers: Sequence[Answer], tls: ssl.SSLContext | None = None, *, hasty: bool = False) -> None:
        self.requests: list[bytes] = []
        self.names: list[str | None] = []
        self.left: queue.Queue[None] = queue.Queue()
        self.reached = threading.Event()
        self._answers = list(answers)
        self._tls = tls
        self._hasty = hasty  # responds before there is a request
        self._closing = threading.Event()
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="misbehaving")
        if tls is not None:
            tls.sni_callback = lambda _connection, name, _context: self.names.append(name)
        self._acceptor.start()

    def url(self, path: str = "/clip.wav", *, host: str = "127.0.0.1", userinfo: str = "") -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{userinfo}{host}:{self.port}{path}"

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._closing.is_set():
                connection.close()
                return
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection, answer), name="misbehaving-answer")
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, answer: Answer) -> None:
        connection.settimeout(PATIENCE_S * 3)
        with contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            try:
                if self._tls is not None:
                    connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
                    self._connections.append(connection)
                exchange = Exchange(connection, self._closing)
                if not self._hasty:
                    exchange.read()
                self.requests.append(exchange.requests)
                self.reached.set()
                answer(exchange)
            except (ClientLeft, OSError):
                self.left.put(None)

    def close(self) -> None:
        """End every thread."""
        self._closing.set()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            pass  # wakes the acceptor
        self._acceptor.join(PATIENCE_S)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in [self._acceptor, *self._threads])


def head(status: str = "200 OK", /, **headers: object) -> bytes:
    """The first lines of an answer; underscores in names are hyphens."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def says(data: bytes) -> Answer:
    """An answer that sends this and closes."""
    return lambda exchange: exchange.send(data)


def gives(body: bytes, /, **headers: object) -> Answer:
    """A good answer."""
    return says(head(Content_Length=len(body), **headers) + body)


def redirects(location: str, status: str = "302 Found") -> Answer:
    return says(head(status, Location=location, Content_Length=0))


def fails(status: str, /, **headers: object) -> Answer:
    return says(head(status, Content_Length=0, **headers))
