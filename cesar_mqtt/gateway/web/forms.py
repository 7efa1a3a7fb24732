"""Forms of several parts (RFC 7578), of which the file goes to disk as it arrives.

Starlette's own forms are kept in memory or in the system's temporary folder, which may be memory as well, and copied
from there. Everything runs on the thread of the event loop; the disk is written in other threads.
"""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from anyio.to_thread import run_sync
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from cesar_mqtt.errors import SpoolFullError
from cesar_mqtt.gateway.web.problems import ProblemError

PART_SUFFIX = ".part"
"""Of a file that is not complete."""

_WRITE_BYTES = 1 << 20
_FIELD_BYTES = 1 << 20
"""Of all fields beside the file together: two prompts of 65,536 characters fit."""
_MOST_PARTS = 200
_HEADER_BYTES = 16_384
_NAME_CHARACTERS = 200
_AROUND_BYTES = 8 << 20
"""Of everything that is neither the file nor fields: headers, boundaries, what stands before and behind the parts."""
_LENGTH_DIGITS = 18
_DRAIN_BYTES = 64 << 20
_DRAIN_S = 10.0


@dataclass(slots=True)
class UploadedFile:
    """A file that arrived whole; to keep it, move it away."""

    path: Path
    name: str
    """As the client calls it, without folders; "" if it has no name."""
    size_bytes: int
    sha256: str


@dataclass(slots=True)
class UploadForm:
    """The fields of a form in their order, and its file, if there is one."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    file: UploadedFile | None = None


class Room(Protocol):
    """The limit on all uploads together."""

    def take_room(self, size_bytes: int) -> None:
        """Count bytes that are about to be stored. Raises SpoolFullError: there is no room for them."""

    def give_room_back(self, size_bytes: int) -> None:
        """Count them no more."""


@asynccontextmanager
async def receive_form(
    request: Request, folder: Path, *, max_bytes: int, too_large: str, room: Room | None = None
) -> AsyncIterator[UploadForm]:
    """Receive a form, its file into `folder`; what is still there at the end of the block is deleted.

    Args:
        request: its body has not been read.
        folder: on the disk where the file is to stay.
        max_bytes: the largest file.
        too_large: what to say of a larger one.
        room: is asked before bytes are stored; None: there is no limit on all uploads together.

    Raises:
        ProblemError: it is no form, is damaged or too large, or there is no room for it.
        ClientDisconnect: the client is gone.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise ProblemError(
            415, "Send multipart/form-data with the recording in the field `file`.", "unsupported_media_type"
        )
    declared = request.headers.get("content-length", "")
    length = int(declared[:_LENGTH_DIGITS]) if declared.isdecimal() else 0
    if length > max_bytes + _FIELD_BYTES:
        await _drain(request)
        raise ProblemError(413, too_large, "payload_too_large", headers={"Connection": "close"})
    reader = _FormReader(folder, boundary, max_bytes=max_bytes, too_large=too_large, room=room)
    try:
        try:
            reader.take_room(length)
            form = await reader.receive(request)
        except (ProblemError, MultipartParseError, OSError, SpoolFullError):
            await _drain(request)
            raise
        yield form
    except SpoolFullError as exc:
        raise ProblemError(507, str(exc), "storage_full") from exc
    except OSError as exc:
        raise ProblemError(507, f"The upload cannot be stored: {exc.strerror}.", "storage_full") from exc
    except MultipartParseError as exc:
        raise ProblemError(400, f"The form is damaged: {exc}.", "malformed_form") from exc
    finally:
        reader.close()


async def _drain(request: Request) -> None:
    """Read what the client still sends, within bounds: it reads the response only after that, and else sees a reset."""
    left = _DRAIN_BYTES
    with suppress(RuntimeError, ClientDisconnect, TimeoutError):  # RuntimeError: all of it has been read
        async with asyncio.timeout(_DRAIN_S):
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    return


class _FormReader:
    """Receives one form. python-multipart reports its parts to the `_on_...` methods."""

    def __init__(self, folder: Path, boundary: bytes, *, max_bytes: int, too_large: str, room: Room | None) -> None:
        self._room = room
        self._room_bytes = 0
        self._path = folder / f"{uuid.uuid4().hex}{PART_SUFFIX}"
        self._max_bytes = max_bytes
        self._too_large = too_large
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._field_bytes = 0
        self._parts = 0
        self._form = UploadForm()
        self._complete = False
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._header_bytes = 0
        self._name = ""
        self._text: list[bytes] | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )

    def take_room(self, size_bytes: int) -> None:
        """Have room for a file of so many bytes. Raises SpoolFullError."""
        more_bytes = size_bytes - self._room_bytes
        if self._room is not None and more_bytes > 0:
            self._room.take_room(more_bytes)
            self._room_bytes += more_bytes

    async def receive(self, request: Request) -> UploadForm:
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if received > self._max_bytes + _FIELD_BYTES + _AROUND_BYTES:
                raise ProblemError(413, self._too_large, "payload_too_large", headers={"Connection": "close"})
            self._parser.write(chunk)
            if self._waiting_bytes >= _WRITE_BYTES:
                await self._write()
        if not self._complete:
            raise ProblemError(400, "The form ends before its last part is complete.", "malformed_form")
        await self._write()
        file = self._form.file
        if file is not None:
            await run_sync(self._sync)
            file.sha256 = self._digest.hexdigest()
        return self._form

    def close(self) -> None:
        """Delete the file if it is still where it was received."""
        if self._room is not None:
            self._room.give_room_back(self._room_bytes)
        if self._file is not None:
            self._file.close()
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    async def _write(self) -> None:
        chunks, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if chunks:
            await run_sync(self._append, chunks)

    def _append(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self._digest.update(chunk)
        if self._file is not None:
            self._file.writelines(chunks)

    def _sync(self) -> None:
        """Have the file on disk before any job refers to it, and no longer open: a consumer waits for its writer."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    # -- callbacks of the parser ---------------------------------------------------------------------------------------

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise ProblemError(400, f"The form has more than {_MOST_PARTS} parts.", "malformed_form")
        self._header_name = self._header_value = self._disposition = b""
        self._header_bytes = 0

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += self._counted(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += self._counted(data[start:end])

    def _counted(self, data: bytes) -> bytes:
        self._header_bytes += len(data)
        if self._header_bytes > _HEADER_BYTES:
            raise ProblemError(400, "A part of the form has too long headers.", "malformed_form")
        return data

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        if filename is None:
            self._text = []
            return
        self._text = None
        if self._form.file is not None:
            raise ProblemError(
                400, "The form has more than one file: send each in a request of its own.", "malformed_form"
            )
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._form.file = UploadedFile(self._path, _base_name(filename.decode(errors="replace")), 0, "")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        size = end - start
        if self._text is not None:
            self._field_bytes += size
            if self._field_bytes > _FIELD_BYTES:
                raise ProblemError(413, "The fields beside the file are too long.", "payload_too_large")
            self._text.append(data[start:end])
            return
        if self._form.file is None:
            return
        self._form.file.size_bytes += size
        if self._form.file.size_bytes > self._max_bytes:
            raise ProblemError(413, self._too_large, "payload_too_large", headers={"Connection": "close"})
        self.take_room(self._form.file.size_bytes)
        self._waiting.append(data[start:end])
        self._waiting_bytes += size

    def _on_part_end(self) -> None:
        if self._text is not None:
            self._form.fields.append((self._name, b"".join(self._text).decode(errors="replace")))

    def _on_end(self) -> None:
        self._complete = True


def _base_name(name: str) -> str:
    """Return the last part of a file name, for some browsers send whole paths, without control characters."""
    last = name.replace("\\", "/").rpartition("/")[2][:_NAME_CHARACTERS]
    return "".join(character if character.isprintable() else "_" for character in last)


__all__ = ["PART_SUFFIX", "ClientDisconnect", "UploadForm", "UploadedFile", "receive_form"]
