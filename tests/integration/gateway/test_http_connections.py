"""The server of the page and clients that hold connections: real sockets, small limits."""

import asyncio
import resource
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from cesar_mqtt.gateway.address import open_port
from cesar_mqtt.gateway.web import http_protocol
from cesar_mqtt.gateway.web.access import Guard, access_rules
from cesar_mqtt.gateway.web.http_protocol import BoundedProtocol
from tests.conftest import PATIENCE_S


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once; `/late` when the body is there."""
    if scope["path"] == "/late":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http_protocol, "_MOST_CONNECTIONS", 8)
    for name in ("_REQUEST_S", "_SILENT_S", "_LOOK_S"):
        monkeypatch.setattr(http_protocol, name, 0.3)
    opened = open_port("127.0.0.1", 0, setting="web.listen")
    config = uvicorn.Config(app, http=BoundedProtocol, ws="none", lifespan="off", log_config=None, loop="asyncio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[opened]))
    thread.start()
    yield opened.getsockname()[1]
    server.should_exit = True
    thread.join(PATIENCE_S)
    opened.close()
    assert not thread.is_alive()


async def talk(port: int, *pieces: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    return reader, writer


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What a connection still brings until its end."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    except ConnectionError:
        return b""


HEAD = b"POST /late HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"GET / HT",),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ",),
        (HEAD, b"12345"),
        (HEAD.replace(b"/late", b"/"), b"1"),
    ],
    ids=["silent", "half a line", "half a head", "half a body", "half a body that is not read"],
)
def test_a_client_that_does_not_go_on_is_disconnected(port: int, pieces: tuple[bytes, ...]) -> None:
    async def wait() -> bytes:
        reader, writer = await talk(port, *pieces)
        received = await ended(reader)
        writer.close()
        return received

    assert b"500" not in asyncio.run(wait())


def test_a_head_that_comes_letter_by_letter_has_no_more_time(port: int) -> None:
    async def trickle() -> bytes:
        reader, writer = await talk(port, b"GET / HTTP/1.1\r\nX: ")
        reading = asyncio.create_task(ended(reader))
        while not reading.done():
            writer.write(b"x")
            await asyncio.wait([reading], timeout=0.05)
        writer.close()
        return await reading

    assert asyncio.run(trickle()) == b""


def test_many_silent_connections_do_not_keep_a_client_out(port: int) -> None:
    async def crowd() -> bytes:
        silent = [await talk(port) for _ in range(30)]
        reader, writer = await talk(port, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        received = await ended(reader)
        for _, each in (*silent, (reader, writer)):
            each.close()
        return received

    assert asyncio.run(crowd()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("count", [12, 40])
def test_a_crowd_that_comes_at_once_is_answered_as_far_as_there_is_room(port: int, count: int) -> None:
    """Twelve fit for a moment, where eight may stay: their requests are answered. Of forty the newest twelve are."""

    async def ask() -> bytes:
        try:
            reader, writer = await talk(port, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        except ConnectionError:
            return b""
        received = await ended(reader)
        writer.close()
        return received

    async def crowd() -> list[bytes]:
        return await asyncio.gather(*(ask() for _ in range(count)))

    answered = sum(each.startswith(b"HTTP/1.1 200") for each in asyncio.run(crowd()))
    assert answered >= 12
    if count == 12:
        assert answered == count


def test_a_request_that_declares_its_length_twice_is_the_last_of_its_connection() -> None:
    rules = access_rules("127.0.0.1", password=None, proxies=(), hosts=())

    async def smuggle() -> bytes:
        config = uvicorn.Config(Guard(app, rules), http=BoundedProtocol, ws="none", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        opened = open_port("127.0.0.1", 0, setting="web.listen")
        serving = asyncio.create_task(server.serve(sockets=[opened]))
        hidden = b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        head = b"POST /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Length: "
        reader, writer = await talk(opened.getsockname()[1], head, b"%d\r\n\r\n" % len(hidden), hidden)
        received = await ended(reader)
        writer.close()
        server.should_exit = True
        await serving
        opened.close()
        return received

    received = asyncio.run(smuggle())
    assert received.startswith(b"HTTP/1.1 400")
    assert (received.count(b"HTTP/1.1"), b"ambiguous_length" in received) == (1, True)


def test_there_are_fewer_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert http_protocol.most_connections() == 128
