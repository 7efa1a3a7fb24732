"""The HTTP API below `/api`: jobs, consumers, rejections, events. Everything runs on the thread of the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cesar_mqtt import __version__
from cesar_mqtt.gateway.web.access import COOKIE, SESSION_S, Guard
from cesar_mqtt.gateway.web.board import MOST_JOBS, Board, document_of
from cesar_mqtt.gateway.web.bus_link import BusLink
from cesar_mqtt.gateway.web.problems import ProblemError
from cesar_mqtt.gateway.web.results import Results, owner
from cesar_mqtt.gateway.web.submitter import Submitter
from cesar_mqtt.jobs import STATES
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.languages import LANGUAGE_CODES
from cesar_mqtt.protocol.requests import JobRequest

MEDIA_TYPES: Mapping[str, str] = {
    "txt": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "tsv": "text/tab-separated-values; charset=utf-8",
    "json": "application/json",
    "md": "text/markdown; charset=utf-8",
}

_BODY_BYTES = 300_000
"""Of a request without a file: two prompts of 65,536 characters fit."""
_BODY_S = 30.0
"""How long such a request may take: a login is read before the password is known."""
_MOST_STREAMS = 400
_PING_S = 15
_GATHER_S = 0.05
"""What changes so soon after an event is sent with the next one: a hundred clients may read a burst of a thousand."""
_DEFAULT_LIMIT = 100
_PIECE_BYTES = 64 << 10
"""So much is handed to the connection at once: what a client does not read stays in the one copy for all."""
_STALLED_S = 60.0
"""A client that reads nothing for so long is disconnected."""


class Api:
    """The handlers of `/api`, and the session of a browser."""

    def __init__(self, board: Board, bus: BusLink, submitter: Submitter, results: Results) -> None:
        self._board = board
        self._bus = bus
        self._submitter = submitter
        self._results = results
        self._streams = 0
        self._closing = False

    def routes(self) -> list[Route]:
        return [
            Route("/api/about", self.about),
            Route("/api/jobs", self.jobs),
            Route("/api/jobs", self.submit, methods=["POST"]),
            Route("/api/jobs/{job_id}", self.job),
            Route("/api/jobs/{job_id}", self.delete, methods=["DELETE"]),
            Route("/api/jobs/{job_id}/cancel", self.cancel, methods=["POST"]),
            Route("/api/jobs/{job_id}/retry", self.retry, methods=["POST"]),
            Route("/api/jobs/{job_id}/result.{format}", self.result),
            Route("/api/consumers", self.consumers),
            Route("/api/consumers/{name}/pause", self.pause, methods=["POST"]),
            Route("/api/consumers/{name}/resume", self.resume, methods=["POST"]),
            Route("/api/rejected", self.rejected),
            Route("/api/events", self.events),
            Route("/login", self.log_in, methods=["POST"]),
            Route("/logout", self.log_out, methods=["POST"]),
        ]

    def close(self) -> None:
        """End the event streams, so that the server can stop."""
        self._closing = True
        self._board.wake()

    @property
    def streams(self) -> int:
        """How many clients read events."""
        return self._streams

    # -- jobs ----------------------------------------------------------------------------------------------------------

    async def about(self, request: Request) -> Response:
        """What a client has to know to offer the options of a job."""
        return JSONResponse(
            {
                "version": __version__,
                "formats": list(FORMATS),
                "fields": list(JobRequest.model_fields),
                "languages": list(LANGUAGE_CODES),
                "max_upload_bytes": self._submitter.max_upload_bytes,
                "stores_uploads": self._submitter.stores_uploads,
                "has_session": COOKIE in request.cookies and _guard(request).needs_password,
            }
        )

    async def jobs(self, request: Request) -> Response:
        query = request.query_params
        state = query.get("status")
        if state is not None and state not in STATES:
            raise ProblemError(422, f"status must be one of {', '.join(STATES)}.", "invalid_request", field="status")
        limit = _number(query.get("limit"), "limit", default=_DEFAULT_LIMIT, most=MOST_JOBS)
        found, total = self._board.jobs(state=state, words=query.get("q", ""), limit=limit, after=query.get("after"))
        following = found[-1]["job_id"] if len(found) == limit and total > limit else None
        return JSONResponse({"jobs": found, "next": following, "total": total})

    async def submit(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            status = await self._submitter.submit_document(await body_of(request))
        else:
            async with self._submitter.receive(request) as form:
                if form.file is None:
                    raise ProblemError(
                        422, "The field `file` with the recording is missing.", "invalid_request", field="file"
                    )
                status = await self._submitter.submit_file(form.fields, form.file)
        code = 202 if status["status"] is None else 201
        return JSONResponse(_public(status), code, headers={"Location": f"jobs/{status['job_id']}"})

    async def job(self, request: Request) -> Response:
        return JSONResponse(_public(await self._results.whole_status(request.path_params["job_id"])))

    async def delete(self, request: Request) -> Response:
        return await self._change("delete", request)

    async def cancel(self, request: Request) -> Response:
        return await self._change("cancel", request)

    async def retry(self, request: Request) -> Response:
        return await self._change("retry", request)

    async def _change(self, command: str, request: Request) -> Response:
        job_id = request.path_params["job_id"]
        status = self._results.status(job_id)
        return JSONResponse(await self._bus.ask(command, {"job_id": job_id}, consumer=owner(status)))

    async def result(self, request: Request) -> Response:
        job_id, name = request.path_params["job_id"], request.path_params["format"]
        if name not in FORMATS:
            raise ProblemError(404, f"There is no format {name[:20]!r}: use one of {', '.join(FORMATS)}.", "not_found")
        content = await self._results.file(job_id, name)
        disposition = f'attachment; filename="{job_id}.{name}"'
        return Response(content, media_type=MEDIA_TYPES[name], headers={"Content-Disposition": disposition})

    # -- consumers and rejections --------------------------------------------------------------------------------------

    async def consumers(self, _request: Request) -> Response:
        listed = [consumer.listed() for consumer in self._board.consumers.values()]
        return JSONResponse({"consumers": sorted(listed, key=lambda consumer: str(consumer["name"]))})

    async def pause(self, request: Request) -> Response:
        return await self._set_paused("pause", request)

    async def resume(self, request: Request) -> Response:
        return await self._set_paused("resume", request)

    async def _set_paused(self, command: str, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._board.consumers:
            raise ProblemError(404, f"There is no consumer {name[:80]!r}.", "not_found")
        return JSONResponse(await self._bus.ask(command, {}, consumer=name))

    async def rejected(self, request: Request) -> Response:
        limit = _number(request.query_params.get("limit"), "limit", default=_DEFAULT_LIMIT, most=_DEFAULT_LIMIT)
        return JSONResponse({"rejected": list(self._board.rejected)[:limit]})

    # -- events --------------------------------------------------------------------------------------------------------

    async def events(self, request: Request) -> Response:
        """Send a snapshot and then each change; after a lost connection the client goes on behind its last event."""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._streams >= _MOST_STREAMS:
            detail = f"{_MOST_STREAMS} clients read events already: close one, or try again later."
            raise ProblemError(503, detail, "too_many_streams", headers={"Retry-After": "5", "Connection": "close"})
        last_id = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        self._streams += 1  # here, for many clients may ask before the first of them is sent anything
        return _EventStream(self._events(last_id), self._count_down, ping=_PING_S, send_timeout=_STALLED_S)

    def _count_down(self) -> None:
        self._streams -= 1

    async def _events(self, last_id: str | None) -> AsyncIterator[bytes]:
        yield b"retry: 1000\n\n"
        while not self._closing:
            events, last_id = self._board.events_after(last_id)
            for start in range(0, len(events), _PIECE_BYTES):
                yield events[start : start + _PIECE_BYTES]
            if events:
                await asyncio.sleep(_GATHER_S)
            await self._board.wait_changed(last_id)

    # -- the session of a browser --------------------------------------------------------------------------------------

    async def log_in(self, request: Request) -> Response:
        guard = _guard(request)
        password = _text_of(await body_of(request), "password")
        if not await guard.is_password(request, password):
            raise ProblemError(401, "That is not the password.", "wrong_password")
        response = Response(status_code=204)
        response.set_cookie(
            COOKIE,
            guard.sessions.create(),
            max_age=int(SESSION_S),
            path=None,  # the browser takes the folder of this address: behind a proxy, that of the page
            httponly=True,
            samesite="strict",
            secure=guard.is_secure(request),
        )
        return response

    async def log_out(self, request: Request) -> Response:
        _guard(request).sessions.end(request.cookies.get(COOKIE, ""))
        response = Response(status_code=204)
        response.set_cookie(COOKIE, "", max_age=0, path=None, httponly=True, samesite="strict")
        return response


class _EventStream(EventSourceResponse):
    """An event stream that calls `on_end` in the end, even if the client has left before it began."""

    def __init__(self, content: AsyncIterator[bytes], on_end: Callable[[], None], **options: Any) -> None:
        super().__init__(content, **options)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def body_of(request: Request) -> bytes:
    """Return the body of a request without a file. Raises ProblemError: it is too long, or does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _BODY_BYTES:
                    raise ProblemError(413, f"At most {_BODY_BYTES:,} bytes are read here.", "payload_too_large")
    except TimeoutError as exc:
        raise ProblemError(408, f"The request was not complete after {_BODY_S:g} s.", "timeout") from exc
    return bytes(body)


def _text_of(body: bytes, name: str) -> str:
    value = (document_of(body) or {}).get(name)
    if not isinstance(value, str):
        raise ProblemError(422, f"Send a JSON object with the text `{name}`.", "invalid_request", field=name)
    return value


def _number(text: str | None, name: str, *, default: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
        raise ProblemError(422, f"{name} must be a whole number from 1 to {most}.", "invalid_request", field=name)
    return int(text[:9])


def _public(status: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in status.items() if name != "is_dropped"}


def _guard(request: Request) -> Guard:
    guard: Guard = request.scope["state"]["guard"]
    return guard
