"""The application: every route, the errors, and what they share. Everything runs on the thread of the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.gateway.web import pages
from cesar_mqtt.gateway.web.access import AccessRules, Guard
from cesar_mqtt.gateway.web.api import Api
from cesar_mqtt.gateway.web.board import Board
from cesar_mqtt.gateway.web.bus_link import BusLink
from cesar_mqtt.gateway.web.openai_api import OpenAiApi
from cesar_mqtt.gateway.web.openapi import openapi_document
from cesar_mqtt.gateway.web.problems import ProblemError, response_to
from cesar_mqtt.gateway.web.results import Results
from cesar_mqtt.gateway.web.submitter import Submitter
from cesar_mqtt.gateway.web.upload_store import UploadStore
from cesar_mqtt.protocol.topics import Topics

_SWEEP_S = 5.0


class WebApp:
    """The application and its connection to the bus.

    Attributes:
        asgi: what a server runs.
        board: what is known of the bus.
        loop: the event loop, while the application runs.
    """

    def __init__(
        self,
        topics: Topics,
        broker: BrokerSettings,
        rules: AccessRules,
        *,
        folder: Path,
        store: UploadStore | None,
        max_payload_bytes: int,
        metrics: Callable[[], bytes] = bytes,
        connect: Callable[[BrokerSettings, Topics, Board], BusLink] = BusLink,
    ) -> None:
        """Build it; it connects when a server starts it.

        Args:
            topics: of the bus.
            broker: how to reach the broker.
            rules: who may use it.
            folder: where uploads are received.
            store: where they stay, for the consumer in this process; None: they are sent as messages.
            max_payload_bytes: `queue.max_payload_bytes`.
            metrics: what `/metrics` returns before the page's own numbers.
            connect: for tests.

        Raises:
            ConfigError: a broker setting is wrong.
        """
        self.board = Board(topics)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.bus = connect(broker, topics, self.board)
        self._store = store
        self._metrics = metrics
        submitter = Submitter(self.board, self.bus, folder=folder, store=store, max_payload_bytes=max_payload_bytes)
        results = Results(self.board, self.bus, topics, broker)
        self._api = Api(self.board, self.bus, submitter, results)
        self._openai = OpenAiApi(self.board, self.bus, submitter, results)
        self.asgi = Starlette(
            routes=[
                *pages.routes(),
                *self._api.routes(),
                *self._openai.routes(),
                Route("/openapi.json", self._send_openapi),
                Route("/healthz", self._send_health),
                Route("/metrics", self._send_metrics),
            ],
            middleware=[Middleware(Guard, rules=rules)],
            exception_handlers={
                ProblemError: _on_problem,
                ClientDisconnect: _on_disconnect,
                404: _on_not_found,
                405: _on_wrong_method,
                Exception: _on_error,
            },
            lifespan=self._live,
        )

    def close_streams(self) -> None:
        """End what would hold up the end of the server: event streams, and requests that wait for a job."""
        self._api.close()
        self._openai.close()

    @asynccontextmanager
    async def _live(self, _app: Starlette) -> AsyncIterator[None]:
        """Connect to the bus for as long as the application runs."""
        self.loop = asyncio.get_running_loop()
        self.bus.start_on(self.loop)
        sweeping = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            await run_sync(self.bus.close)

    async def _sweep(self) -> None:
        while self._store is not None:
            await run_sync(self._store.sweep)
            await asyncio.sleep(_SWEEP_S)

    async def _send_openapi(self, _request: Request) -> Response:
        return JSONResponse(openapi_document())

    async def _send_health(self, _request: Request) -> Response:
        online = sum(consumer.online for consumer in self.board.consumers.values())
        fine = self.board.is_connected and online > 0
        body = {"status": "ok" if fine else "degraded", "broker": self.board.is_connected, "consumers_online": online}
        return JSONResponse(body, 200 if fine else 503)

    async def _send_metrics(self, _request: Request) -> Response:
        online = sum(consumer.online for consumer in self.board.consumers.values())
        own = (
            ("cesar_web_connected", "1: the page is connected to the broker.", int(self.board.is_connected)),
            ("cesar_web_consumers_online", "Consumers that are online.", online),
            ("cesar_web_event_streams", "Clients that read events.", self._api.streams),
        )
        text = "".join(f"# HELP {name} {what}\n# TYPE {name} gauge\n{name} {value}\n" for name, what, value in own)
        content = await run_sync(self._metrics) + text.encode()
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _on_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise error
    return response_to(request.url.path, error)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # no client reads it


async def _on_not_found(request: Request, _error: Exception) -> Response:
    return response_to(request.url.path, ProblemError(404, "There is nothing at this address.", "not_found"))


async def _on_wrong_method(request: Request, error: Exception) -> Response:
    problem = ProblemError(
        405, f"{request.method} is not possible here.", "method_not_allowed", headers=getattr(error, "headers", None)
    )
    return response_to(request.url.path, problem)


async def _on_error(request: Request, _error: Exception) -> Response:
    problem = ProblemError(500, "The server failed; its log has the reason.", "internal")
    return response_to(request.url.path, problem)
