"""OpenAI's API for transcriptions and translations, so that programs written for it work unchanged.

A request becomes a job like any other; the response is sent when the job is final. A client that disconnects before
cancels its job, unless it has sent `metadata` with `keep`. OpenAI's clients send a request again that took too long: it
waits for the same job. Everything runs on the thread of the event loop.
"""

import asyncio
import json
import math
import uuid
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
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
_DIARIZED = "diarized_json"
_STREAMED = frozenset({"json", "text", _DIARIZED})
"""The formats of which the events of a stream have the content."""
_GRANULARITIES = frozenset({"word", "segment"})
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
_OWN = frozenset({"model", "prompt", "response_format", "stream", "timestamp_granularities", "languages", "keywords"})
"""Fields of OpenAI's that are used, beside those that a job has as well."""
_NESTED = frozenset({"chunking_strategy", "metadata"})
"""The same, which clients write as `metadata[keep]`."""
_NOT_POSSIBLE = {
    "include": "the probabilities of tokens are not stored; verbose_json has an avg_logprob for each segment.",
    "known_speaker_names": "known voices are files of the consumer (speakers.directory).",
    "known_speaker_references": "known voices are files of the consumer (speakers.directory).",
}
"""Fields of OpenAI's that cannot be used, and why."""
_RETRY_COUNT = "x-stainless-retry-count"
"""How often OpenAI's clients have sent a request before."""
_NO_RETRY = {"x-should-retry": "false"}
"""For these clients: the same request again would be another job, and end in the same way."""
_RETRY_S = 2.0
"""How long the running job of a client that has disconnected goes on: the first two retries come within a second."""
_ARRIVAL_S = 60.0
"""How long the recording of a retry may take to arrive, before jobs are cancelled all the same."""
_MOST_REQUESTS = 1000


@dataclass(slots=True, eq=False)
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
    content: object = None
    """The same for a request that is sent again."""
    job_id: str = ""


class OpenAiApi:
    """The handlers of `/v1`."""

    def __init__(self, board: Board, bus: BusLink, submitter: Submitter, results: Results) -> None:
        self._board = board
        self._bus = bus
        self._submitter = submitter
        self._results = results
        self._closing = asyncio.Event()
        self._cancelling: set[asyncio.Task[None]] = set()
        self._orders: OrderedDict[object, _Order] = OrderedDict()
        """The last request of each content."""
        self._retries = 0
        """How many requests that were sent before are being received: it is not known yet for which jobs they wait."""
        self._no_retries = asyncio.Event()
        self._no_retries.set()

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
        key = request.headers.get("idempotency-key")
        is_retry = request.headers.get(_RETRY_COUNT, "0") != "0" or key is not None
        with self._arrival(is_retry=is_retry):
            async with self._submitter.receive(request) as form:
                if form.file is None:
                    detail = "The field `file` with the recording is missing."
                    raise ProblemError(400, detail, "missing_file", field="file")
                order = _order([*request.query_params.multi_items(), *form.fields], task)
                order.content = key, form.file.sha256, form.file.name, order.fields
                self._note(order, is_retry=is_retry)
                accepted = await self._submit(order, form.file)
        if order.is_streamed:
            return EventSourceResponse(self._stream(accepted, order), ping=_PING_S, sep="\n")
        status = await self._unless_gone(request, accepted, order)
        return await self._response(status, order)

    @contextmanager
    def _arrival(self, *, is_retry: bool) -> Iterator[None]:
        """Cancel no job in the meantime for which a retry may wait."""
        self._retries += is_retry
        if is_retry:
            self._no_retries.clear()
        try:
            yield
        finally:
            self._retries -= is_retry
            if not self._retries:
                self._no_retries.set()

    def _note(self, order: _Order, *, is_retry: bool) -> None:
        """Give a request the id of its job: for one that is sent again, that of the job which it waited for."""
        before = self._orders.pop(order.content, None)
        status = None if before is None else self._board.status(before.job_id)
        if before is not None and is_retry and (status is None or status["status"] not in {"error", "cancelled"}):
            order.job_id = before.job_id
        else:
            order.job_id = str(uuid.uuid4())
        self._orders[order.content] = order
        while len(self._orders) > _MOST_REQUESTS:
            self._orders.popitem(last=False)

    async def _submit(self, order: _Order, file: UploadedFile) -> Document:
        try:
            return await self._submitter.submit_file([*order.fields, ("job_id", order.job_id)], file)
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
                self._cancel(order)
            raise ProblemError(503, f"The server stops; job {order.job_id} goes on.", "stopping", headers=_NO_RETRY)
        except asyncio.CancelledError:
            if not self._closing.is_set():
                self._cancel(order)
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

    def _cancel(self, order: _Order) -> None:
        """Cancel the job of a client that is gone: a running one unless the request is sent again in a moment."""
        if not order.is_kept:
            task = asyncio.create_task(self._send_cancel(order))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def _send_cancel(self, order: _Order) -> None:
        status = self._board.status(order.job_id)
        if status is not None and status["status"] == "processing":
            await asyncio.sleep(_RETRY_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._no_retries.wait(), _ARRIVAL_S)
        last = self._orders.get(order.content, order)
        if last is not order and last.job_id == order.job_id:
            return  # another request waits for it, or has waited
        status = self._board.status(order.job_id)
        if status is not None and status["status"] not in _FINAL:
            with suppress(ProblemError):  # the consumer is gone as well, or was faster
                await self._bus.ask("cancel", {"job_id": order.job_id}, consumer=owner(status))

    async def _response(self, status: Document, order: _Order) -> Response:
        job_id = order.job_id
        if order.response_format in {"srt", "vtt"}:
            return PlainTextResponse(await self._results.file(job_id, order.response_format))
        text = (
            await self._results.text(job_id) if status.get("result_truncated") else str(status.get("result_text") or "")
        )
        if order.response_format == "text":
            return PlainTextResponse(f"{text}\n")
        if order.response_format == "json":
            return JSONResponse({"text": text, "usage": _usage(status.get("audio_duration"))})
        document = document_of(await self._results.file(job_id, "json")) or {}
        make = _diarized if order.response_format == _DIARIZED else _verbose
        return JSONResponse(make(document, status, text, order))

    async def _stream(self, accepted: Document, order: _Order) -> AsyncIterator[bytes]:
        """Yield the segments as they are known, then the whole text, as OpenAI's events."""
        ended = False
        sent = 0
        try:
            with self._board.follow(order.job_id) as messages:
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
            if order.response_format == _DIARIZED:
                document = document_of(await self._results.file(order.job_id, "json")) or {}
                for segment in _diarized(document, status, text, order)["segments"]:
                    yield _event(segment)
            yield _event({"type": "transcript.text.done", "text": text})
            yield b"data: [DONE]\n\n"
        except ProblemError as error:
            ended = True
            yield _event({"error": openai_error(error)})
        finally:
            if not ended and not self._closing.is_set():
                self._cancel(order)

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
    _check_names(given)
    formats = _FORMATS if task == "translate" else (*_FORMATS, _DIARIZED)
    response_format = given.get("response_format", ["json"])[-1]
    if response_format not in formats:
        raise _wrong("response_format", f"response_format must be one of {', '.join(formats)}.")
    granularities = _granularities(given, response_format)
    is_streamed = _is_true(given.get("stream", ["false"])[-1], "stream")
    if is_streamed and response_format not in _STREAMED:
        raise _wrong("stream", f"A stream has no {response_format}: leave out stream, or response_format.")
    metadata = _metadata(given)
    job = _job_fields(given) | {"task": task}
    job["formats"] = response_format if response_format in {"srt", "vtt"} else "json"
    if response_format == _DIARIZED:
        job.setdefault("diarize", "true")
    if is_streamed:
        job["stream"] = "true"
    if "word" in granularities:
        job["word_timestamps"] = "true"
    if metadata:
        job["metadata"] = json.dumps(metadata)
    is_kept = str(metadata.get("keep", "")).lower() in {"true", "1"}
    return _Order(tuple(job.items()), response_format, granularities, is_streamed, is_kept, task)


def _granularities(given: Mapping[str, list[str]], response_format: str) -> frozenset[str]:
    name = "timestamp_granularities"
    found = frozenset(given.get(name, ["segment"]))
    if not found <= _GRANULARITIES:
        raise _wrong(name, f"{name} are word and segment.")
    if name in given and response_format != "verbose_json":
        raise _wrong(name, f"{name} need the response_format verbose_json.")
    return found


def _wrong(name: str, detail: str, code: str = "invalid_value") -> ProblemError:
    return ProblemError(400, detail, code, field=name)


def _check_names(given: Mapping[str, list[str]]) -> None:
    """Refuse what is not used: a client that asks for it would take the response for something else."""
    for name in given:
        known, _, inner = name.partition("[")
        if known in _NOT_POSSIBLE:
            raise _wrong(known, f"{known} is not possible: {_NOT_POSSIBLE[known]}", "unsupported_parameter")
        if known == "chunking_strategy" and (
            inner not in {"", "type]"} or not set(given[name]) <= {"auto", "server_vad"}
        ):
            detail = "chunking_strategy is auto or server_vad, without bounds of its own: pauses are found by the VAD."
            raise _wrong(known, detail, "unsupported_parameter")
        if known not in _OWN | _TAKEN | _NESTED or (inner and known not in _NESTED):
            raise _wrong(name[:80], f"There is no field {name[:80]!r}.", "unknown_parameter")
    if len(given.get("languages", ())) > 1:
        detail = "Of several languages none can be preferred: give one, or none, and it is detected."
        raise _wrong("languages", detail, "unsupported_parameter")


def _is_true(text: str, name: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise _wrong(name, f"{name} must be true or false.")
    return text.lower() == "true"


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
    text = given.get("metadata", ["{}"])[-1]
    if (metadata := document_of(text.encode(errors="replace"))) is None:
        raise _wrong("metadata", "metadata must be a JSON object.")
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
    detail = str(status.get("error_message") or f"The job was {status['status']}.")
    raise ProblemError(http_status, detail, code, headers=_NO_RETRY)


def _verbose(document: Document, status: Document, text: str, order: _Order) -> dict[str, Any]:
    segments = [segment for segment in document.get("segments") or () if isinstance(segment, dict)]
    body: dict[str, Any] = {
        "task": order.task,
        "language": language_name(str(document.get("language") or status.get("language") or _assumed(status))).lower(),
        "duration": document.get("duration") or 0.0,
        "text": text,
        "usage": _usage(document.get("duration")),
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


def _diarized(document: Document, status: Document, text: str, order: _Order) -> dict[str, Any]:
    """Return `diarized_json`. Raises ProblemError: the speakers were not told apart."""
    if error := status.get("diarization_error"):
        detail = f"Job {order.job_id} is completed, but its speakers are not told apart: {error}"
        raise ProblemError(503, detail, "diarization_failed", headers=_NO_RETRY)
    return {
        "task": order.task,
        "duration": document.get("duration") or 0.0,
        "text": text,
        "segments": [
            {
                "type": "transcript.text.segment",
                "id": f"seg_{segment['id'] - 1}",
                "start": segment["start"],
                "end": segment["end"],
                "text": segment["text"],
                "speaker": segment.get("speaker") or "",
            }
            for segment in document.get("segments") or ()
        ],
        "usage": _usage(document.get("duration")),
    }


def _usage(duration_s: Any) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(float(duration_s or 0.0))}


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
