"""From a form or a JSON object to a job: publish the request, and wait for what the consumer makes of it.

Everything runs on the thread of the event loop.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.requests import Request

from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.gateway.web.board import Board, Document
from cesar_mqtt.gateway.web.bus_link import LARGE_RECORDINGS, BusLink
from cesar_mqtt.gateway.web.forms import UploadedFile, UploadForm, receive_form
from cesar_mqtt.gateway.web.problems import ProblemError
from cesar_mqtt.gateway.web.upload_store import UploadStore
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES
from cesar_mqtt.protocol.parsing import Accepted, Refusal, parse_audio, parse_submission
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest

_ACCEPTED_S = 10.0
"""How long a consumer that is online may take to accept a job; after that the broker still has the request."""
_FIELDS_BYTES = 300_000
"""Room in a packet for topic and fields."""
_STATUS_OF = {
    "malformed_json": 400,
    "job_id_conflict": 409,
    "payload_too_large": 413,
    "queue_full": 429,
    "storage_full": 507,
}
"""HTTP statuses of a rejection's reasons; of others: 422."""

Fields = Sequence[tuple[str, str]]


def rejected(reason: str, detail: str) -> ProblemError:
    """Return the error of a request that is rejected."""
    return ProblemError(_STATUS_OF.get(reason, 422), detail, reason)


class Submitter:
    """Publishes requests."""

    def __init__(
        self,
        board: Board,
        bus: BusLink,
        *,
        folder: Path,
        store: UploadStore | None,
        max_payload_bytes: int,
    ) -> None:
        """Take what it works with.

        Args:
            board: where statuses and rejections arrive.
            bus: where requests are published.
            folder: where uploads are received.
            store: where they stay, for the consumer in this process; None: they are sent as messages.
            max_payload_bytes: `queue.max_payload_bytes`.
        """
        self._board = board
        self._bus = bus
        self._store = store
        self._max_payload_bytes = max_payload_bytes
        self.folder = folder

    @property
    def stores_uploads(self) -> bool:
        return self._store is not None

    @property
    def max_upload_bytes(self) -> int:
        """The largest recording that is accepted now."""
        limits = [self._max_payload_bytes]
        if self._store is None:
            connection = self._bus.connection
            packet = (connection.max_packet_bytes if connection else None) or MAX_PACKET_BYTES
            room = max(0, min(packet, MAX_PACKET_BYTES) - _FIELDS_BYTES)
            limits.append(room if connection is None or connection.protocol == "5" else room * 3 // 4)
            known = [consumer.limit("max_payload_bytes") for consumer in self._board.consumers.values()]
            limits += [limit for limit in known if limit is not None]
        return min(limits)

    @property
    def too_large(self) -> str:
        """What to say of a larger recording."""
        size = f"At most {self.max_upload_bytes:,} bytes are accepted"
        return f"{size} (queue.max_payload_bytes)." if self._store else f"{size} in one message. {LARGE_RECORDINGS}"

    def receive(self, request: Request) -> AbstractAsyncContextManager[UploadForm]:
        """Receive a form with a recording, as `receive_form`."""
        limit, sentence = self.max_upload_bytes, self.too_large
        return receive_form(request, self.folder, max_bytes=limit, too_large=sentence, room=self._store)

    async def submit_file(self, fields: Fields, file: UploadedFile) -> Document:
        """Submit a recording that was received; return the job's status, as `_submitted`."""
        if not file.size_bytes:
            raise ProblemError(422, "The file is empty: there is nothing to transcribe.", "audio_empty", field="file")
        if file.size_bytes > self.max_upload_bytes:
            raise ProblemError(413, self.too_large, "payload_too_large")
        values = _values(fields)
        job_id = values.pop("job_id", None) or str(uuid.uuid4())
        options = _options(job_id, values)
        if self._store is not None:
            path = await run_sync(self._store.keep, file, job_id)
            status = await self._submitted(Submission(job_id, None, path, options, file.name))
            if status["status"] is not None:
                self._store.set_accepted(job_id)
            return status
        audio = await run_sync(file.path.read_bytes)
        return await self._submitted(Submission(job_id, audio, file.name, options, file.name))

    async def submit_document(self, payload: bytes) -> Document:
        """Submit a request as `cesar/jobs` takes it, which names its audio; return as `submit_file`."""
        parsed = parse_submission(payload)
        if isinstance(parsed, Refusal):
            raise rejected(parsed.reason, parsed.detail)
        request = parsed.request.model_dump(exclude_unset=True, exclude={"job_id"})
        job_id = parsed.request.job_id or str(uuid.uuid4())
        return await self._submitted(Submission(job_id, None, request.pop("audio_path", ""), request))

    async def _submitted(self, item: Submission) -> Document:
        """Publish a request and return the status that follows; one with `status` None: the broker keeps the request.

        Raises:
            ProblemError: it was rejected, or cannot be published.
        """
        with self._board.follow(item.job_id) as messages:
            await self._bus.submit(item)
            deadline = time.monotonic() + _ACCEPTED_S
            while self._board.has_consumer:
                try:
                    kind, document = await asyncio.wait_for(messages.get(), max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    break
                if kind == "rejected":
                    raise rejected(str(document["reason"]), str(document["detail"]))
                if kind == "status" and document.get("error_code") == "invalid_request":
                    raise rejected("invalid_request", str(document.get("error_message")))
                if kind == "status":
                    return document
        return {"job_id": item.job_id, "status": None}


def _values(fields: Fields) -> dict[str, str]:
    """Return the fields of a form by name; an empty one counts as missing, and one that comes again as a list."""
    values: dict[str, str] = {}
    for name, text in fields:
        name = name.removesuffix("[]")  # noqa: PLW2901 - as many programs write lists
        if name not in JobRequest.model_fields or name in AUDIO_FIELDS:
            raise ProblemError(422, f"There is no field {name[:80]!r}.", "invalid_request", field=name[:80])
        if text.strip():
            values[name] = f"{values[name]},{text}" if name == "formats" and name in values else text
    return values


def _options(job_id: str, values: Mapping[str, str]) -> dict[str, Any]:
    """Check the fields as the consumer does; return those of a JSON request."""
    parsed = parse_audio(job_id, b"-", tuple(values.items()))
    if not isinstance(parsed, Accepted):
        raise rejected(parsed.reason, parsed.detail)
    return parsed.request.model_dump(exclude_unset=True, exclude={"job_id", "audio_path"})
