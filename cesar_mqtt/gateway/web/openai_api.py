"""OpenAI's API for transcriptions and translations, so that programs written for it work unchanged.

A request becomes a job like any other; the response is sent when the job is final. A client that disconnects before
cancels its job, unless it has sent `metadata` with `keep`. Everything runs on the thread of the event loop.
"""

import asyncio
import json
import math
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cesar_mqtt.errors import ErrorCode
from cesar_mqtt.gateway.web.board import Board, Document, document_of
from cesar_mqtt.gateway.web.bus_link import BusLink
from cesar_mqtt.gateway.web.forms import UploadedFile
from cesar_mqtt.gateway.web.problems import ProblemError, openai_error
from cesar_mqtt.gateway.web.results import Results, owner
from cesar_mqtt.gateway.web.submitter import Fields, Submitter
from cesar_mqtt.protocol.languages import language_name
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest

DEFAULT_MODEL = "whisper-1"
"""OpenAI's name; here it stands for the consumer's default model, as does every `gpt-...`."""

_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
_FINAL = frozenset({"completed", "error", "cancelled"})
_PING_S = 15
_STATUS_OF = {
    ErrorCode.AUDIO_TOO_LARGE: 413,
    ErrorCode.MODEL_UNAVAILABLE: 503,
    ErrorCode.DOWNLOAD_FAILED: 502,
    ErrorCode.AUDIO_IO_ERROR: 500,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.EXPIRED: 504,
    ErrorCode.CRASHED: 500,
    ErrorCode.INTERNAL: 500,
}
"""HTTP statuses of errors that are not the client's; of others: 400."""
_TAKEN = frozenset(JobRequest.model_fields) - {"job_id", "formats", "stream", "metadata", "task", *AUDIO_FIELDS}
"""Fields of a job that a request may have beside OpenAI's (`extra_body`)."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What a request asks for."""

    fields: Fields
    """The fields of the job."""
    response_format: str
    granularities: frozenset[str]
    is_streamed: bool
    is_kept: bool
    """Whether the job goes on when the client disconnects."""
    task: str


class OpenAiApi:
    """The handlers of `/v1`."""

    def __init__(self, board: Board, bus: BusLink, submitter: Submitter, results: Results) -> None:
        self._board = board
        self._bus = bus
        self._submitter = submitter
        self._results = results
        self._closing = asyncio.Event()
        self._cancelling: set[asyncio.Task[None]] = set()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/audio/transcriptions", self.transcribe, methods=["POST"]),
            Route("/v1/audio/translations", self.translate, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
        ]

    def close(self) -> None:
        """End the requests that wait; their jobs go on."""
        self._closing.set()

    # -- models --------------------------------------------------------------------------------------------------------

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(name) for name in self._model_names()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._model_names():
            raise ProblemError(404, f"The model {name[:80]!r} is on no consumer.", "model_not_found", field="model")
        return JSONResponse(_model(name))

    def _model_names(self) -> list[str]:
        found = {str(name) for consumer in self._board.consumers.values() for name in consumer.listed()["models"]}
        return [DEFAULT_MODEL, *sorted(found)]

    # -- transcripts ---------------------------------------------------------------------------------------------------

    async def transcribe(self, request: Request) -> Response:
        return await self._respond(request, "transcribe")

    async def translate(self, request: Request) -> Response:
        return await self._respond(request, "translate")

    async def _respond(self, request: Request, task: str) -> Response:
        if not self._board.has_consumer:
            raise ProblemError(503, "No consumer is online: start one with `cesar-mqtt serve`.", "consumer_offline")
        async with self._submitter.receive(request) as form:
            if form.file is None:
                raise ProblemError(400, "The field `file` with the recording is missing.", "missing_file", field="file")
            order = _order(form.fields, task)
            accepted = await self._submit(order, form.file)
        if order.is_streamed:
            return EventSourceResponse(self._stream(accepted, order), ping=_PING_S, sep="\n")
        status = await self._unless_gone(request, accepted, order)
        return await self._response(str(accepted["job_id"]), status, order)

    async def _submit(self, order: _Order, file: UploadedFile) -> Document:
        try:
            return await self._submitter.submit_file(order.fields, file)
        except ProblemError as error:
            if error.status == HTTPStatus.UNPROCESSABLE_ENTITY:
                raise ProblemError(400, error.detail, error.code, field=error.field) from error
            raise

    async def _unless_gone(self, request: Request, accepted: Document, order: _Order) -> Document:
        """Wait for the end of a job; a client that disconnects before cancels it.

        Raises:
            ProblemError: the job ended without a transcript, or the server stops.
        """
        waits = [
            asyncio.create_task(wait) for wait in (self._ended(accepted), _disconnected(request), self._closing.wait())
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            ended, disconnected, _ = waits
            if ended.done():
                return await self._ended(accepted)
            if disconnected.done():
                self._cancel(str(accepted["job_id"]), order)
            raise ProblemError(503, f"The server stops; job {accepted['job_id']} goes on.", "stopping")
        except asyncio.CancelledError:
            if not self._closing.is_set():
                self._cancel(str(accepted["job_id"]), order)
            raise
        finally:
            for wait in waits:
                wait.cancel()

    async def _ended(self, accepted: Document) -> Document:
        """Wait until a job is final; return its status. Raises ProblemError: it has no transcript."""
        job_id = str(accepted["job_id"])
        with self._board.follow(job_id) as messages:
            status = self._known(accepted)
            while status is None or status["status"] not in _FINAL:
                kind, document = await messages.get()
                if kind == "deleted":
                    raise ProblemError(400, f"Job {job_id} was deleted.", "deleted")
                if kind == "status":
                    status = document
        return _completed(status)

    def _known(self, accepted: Document) -> Document | None:
        """Return the present status of a job; None: no consumer has it yet. Raises ProblemError: it was deleted."""
        status = self._board.status(str(accepted["job_id"]))
        if status is None and accepted["status"] is not None:
            raise ProblemError(400, "The job was deleted.", "deleted")
        return status

    def _cancel(self, job_id: str, order: _Order) -> None:
        if not order.is_kept:
            task = asyncio.create_task(self._send_cancel(job_id))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def _send_cancel(self, job_id: str) -> None:
        status = self._board.status(job_id)
        if status is not None and status["status"] not in _FINAL:
            with suppress(ProblemError):  # the consumer is gone as well, or was faster
                await self._bus.ask("cancel", {"job_id": job_id}, consumer=owner(status))

    async def _response(self, job_id: str, status: Document, order: _Order) -> Response:
        if order.response_format in {"srt", "vtt"}:
            content = await self._results.file(job_id, order.response_format)
            return PlainTextResponse(content)
        text = (
            await self._results.text(job_id) if status.get("result_truncated") else str(status.get("result_text") or "")
        )
        if order.response_format == "text":
            return PlainTextResponse(f"{text}\n")
        if order.response_format == "json":
            seconds = math.ceil(float(status.get("audio_duration") or 0.0))
            return JSONResponse({"text": text, "usage": {"type": "duration", "seconds": seconds}})
        document = document_of(await self._results.file(job_id, "json")) or {}
        return JSONResponse(_verbose(document, status, text, order))

    async def _stream(self, accepted: Document, order: _Order) -> AsyncIterator[bytes]:
        """Yield the segments as they are known, then the whole text, as OpenAI's events."""
        job_id = str(accepted["job_id"])
        ended = False
        sent = 0
        try:
            with self._board.follow(job_id) as messages:
                status = self._known(accepted)
                while status is None or status["status"] not in _FINAL:
                    kind, document = await self._next(messages)
                    if kind == "status":
                        status = document
                    elif kind == "segment" and (text := str(document.get("text") or "")):
                        sent += 1
                        yield _event({"type": "transcript.text.delta", "delta": text if sent == 1 else f" {text}"})
            ended = True
            text = str(_completed(status).get("result_text") or "")
            if not sent and text:
                yield _event({"type": "transcript.text.delta", "delta": text})
            yield _event({"type": "transcript.text.done", "text": text})
            yield b"data: [DONE]\n\n"
        except ProblemError as error:
            ended = True
            yield _event({"error": openai_error(error)})
        finally:
            if not ended and not self._closing.is_set():
                self._cancel(job_id, order)

    async def _next(self, messages: "asyncio.Queue[tuple[str, Document]]") -> tuple[str, Document]:
        message, closing = asyncio.create_task(messages.get()), asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait([message, closing], return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                raise ProblemError(503, "The server stops; the job goes on.", "stopping")
            kind, document = message.result()
        finally:
            message.cancel()
            closing.cancel()
        if kind == "deleted":
            raise ProblemError(400, "The job was deleted.", "deleted")
        return kind, document


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _order(fields: Fields, task: str) -> _Order:
    """Translate the fields of a request. Raises ProblemError."""
    given: dict[str, list[str]] = {}
    for name, text in fields:
        if text.strip():
            given.setdefault(name.removesuffix("[]"), []).append(text.strip())
    response_format = given.get("response_format", ["json"])[-1]
    if response_format not in _FORMATS:
        detail = f"response_format must be one of {', '.join(_FORMATS)}."
        raise ProblemError(400, detail, "invalid_value", field="response_format")
    granularities = frozenset(given.get("timestamp_granularities", ["segment"]))
    if not granularities <= {"word", "segment"}:
        detail = "timestamp_granularities are word and segment."
        raise ProblemError(400, detail, "invalid_value", field="timestamp_granularities")
    metadata = _metadata(given)
    job = _job_fields(given) | {"task": task}
    job["formats"] = response_format if response_format in {"srt", "vtt"} else "json"
    is_streamed = given.get("stream", [""])[-1].lower() == "true"
    if is_streamed:
        job["stream"] = "true"
    if "word" in granularities and response_format == "verbose_json":
        job["word_timestamps"] = "true"
    if metadata:
        job["metadata"] = json.dumps(metadata)
    is_kept = str(metadata.get("keep", "")).lower() in {"true", "1"}
    return _Order(tuple(job.items()), response_format, granularities, is_streamed, is_kept, task)


def _job_fields(given: Mapping[str, list[str]]) -> dict[str, str]:
    """Return the fields of a job that a request has, under their own names or OpenAI's."""
    job = {name: texts[-1] for name, texts in given.items() if name in _TAKEN}
    model = _model_size(given.get("model", [DEFAULT_MODEL])[-1])
    if model is not None:
        job["model_size"] = model
    if "prompt" in given:
        job["initial_prompt"] = given["prompt"][-1]
    if "keywords" in given:
        job["hotwords"] = ", ".join(given["keywords"])
    if len(languages := given.get("languages", [])) == 1:
        job.setdefault("language", languages[0])
    if job.get("temperature") in {"0", "0.0"}:  # OpenAI's meaning: raise it where the result is doubtful
        del job["temperature"]
    return job


def _metadata(given: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the field `metadata`, as a JSON object or as the client writes nested fields: `metadata[keep]`."""
    metadata = document_of(given.get("metadata", [""])[-1].encode(errors="replace")) or {}
    for name, texts in given.items():
        if name.startswith("metadata[") and name.endswith("]"):
            metadata[name[len("metadata[") : -1]] = texts[-1]
    return metadata


def _model_size(name: str) -> str | None:
    """Return the consumer's name of a model; None: its default one."""
    if name == DEFAULT_MODEL or name.startswith("gpt-"):
        return None
    return name.rpartition("/")[2].removeprefix("faster-").removeprefix("whisper-")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cesar-mqtt"}


def _completed(status: Document) -> Document:
    """Return the status of a completed job. Raises ProblemError for another one."""
    if status["status"] == "completed":
        return status
    code = str(status.get("error_code") or status["status"])
    http_status = _STATUS_OF.get(ErrorCode(code), 400) if code in set(ErrorCode) else 400
    raise ProblemError(http_status, str(status.get("error_message") or f"The job was {status['status']}."), code)


def _verbose(document: Document, status: Document, text: str, order: _Order) -> dict[str, Any]:
    segments = [segment for segment in document.get("segments") or () if isinstance(segment, dict)]
    body: dict[str, Any] = {
        "task": order.task,
        "language": language_name(str(document.get("language") or status.get("language") or _assumed(status))).lower(),
        "duration": document.get("duration") or 0.0,
        "text": text,
        "usage": {"type": "duration", "seconds": math.ceil(document.get("duration") or 0.0)},
    }
    if "segment" in order.granularities:
        # The ledger keeps neither tokens nor temperature nor window: they are there since clients' models require them.
        body["segments"] = [
            {
                "id": segment["id"] - 1,
                "seek": 0,
                "start": segment["start"],
                "end": segment["end"],
                "text": segment["text"],
                "tokens": [],
                "temperature": 0.0,
                "avg_logprob": segment["avg_logprob"],
                "compression_ratio": _compression_ratio(str(segment["text"])),
                "no_speech_prob": segment["no_speech_prob"],
                **_speaker(segment),
            }
            for segment in segments
        ]
    if "word" in order.granularities:
        body["words"] = [
            {"word": word["word"].strip(), "start": word["start"], "end": word["end"], **_speaker(word)}
            for segment in segments
            for word in segment.get("words") or ()
        ]
    return body


def _speaker(spoken: Document) -> dict[str, Any]:
    """Return the speaker of a segment or word as a field, as in OpenAI's `diarized_json`; none without `diarize`."""
    return {"speaker": spoken["speaker"]} if "speaker" in spoken else {}


def _compression_ratio(text: str) -> float:
    """Return how many times shorter zlib makes a text, which is Whisper's measure of repetition."""
    encoded = text.encode(errors="replace")
    return len(encoded) / len(zlib.compress(encoded))


def _assumed(status: Document) -> str:
    return "en" if str(status.get("model_size")).endswith(".en") else ""


def _event(data: Document) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode(errors="replace")
