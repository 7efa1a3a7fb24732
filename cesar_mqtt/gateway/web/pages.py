"""The page's own files, read once at the start, compressed, and sent with a validator. Any thread may read them."""

import gzip
import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
_LANGUAGES = "languages/"


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    compressed: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, _File]:
    """Return the files by their path below the page."""
    folder = files(__package__).joinpath("static")
    found = {}
    for entry, path in _walk(folder, ""):
        ending = path[path.rfind(".") :]
        if ending in _MEDIA_TYPES:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[path] = _File(content, gzip.compress(content, mtime=0), _MEDIA_TYPES[ending], etag)
    return found


def page_languages() -> dict[str, str]:
    """Return the languages of the page: their names by code."""
    names = {
        path.removeprefix(_LANGUAGES).removesuffix(".json"): json.loads(file.content)["_name"]
        for path, file in page_files().items()
        if path.startswith(_LANGUAGES)
    }
    return dict(sorted(names.items(), key=lambda entry: entry[1]))


def routes() -> list[Route]:
    """Return a route for each file, so that no path of a request ever names one."""
    names = {f"/{path}": path for path in page_files()} | {"/": "index.html"}
    return [*(Route(path, _sender(name)) for path, name in names.items()), Route("/languages.json", _send_languages)]


def _sender(name: str) -> Callable[[Request], Awaitable[Response]]:
    file = page_files()[name]

    async def send(request: Request) -> Response:
        headers = {"ETag": file.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(file.content, media_type=file.media_type, headers=headers)
        return Response(file.compressed, media_type=file.media_type, headers={**headers, "Content-Encoding": "gzip"})

    return send


async def _send_languages(_request: Request) -> Response:
    return JSONResponse(page_languages(), headers={"Cache-Control": "no-cache"})


def _walk(folder: Traversable, prefix: str) -> list[tuple[Traversable, str]]:
    found: list[tuple[Traversable, str]] = []
    for entry in folder.iterdir():
        path = f"{prefix}{entry.name}"
        found += _walk(entry, f"{path}/") if entry.is_dir() else [(entry, path)]
    return found
