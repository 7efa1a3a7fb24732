"""A hub for tests: the endpoints of the Hugging Face hub that a model download needs, on loopback."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from cesar_mqtt.whisper.hub import REVISIONS

COMMIT = REVISIONS["Systran/faster-whisper-base"]
SMALL = dict.fromkeys(("config.json", "tokenizer.json", "vocabulary.txt"), b'{"model": {}}')
MODEL = bytes(range(256)) * (3 << 12)


class FakeHub:
    """One repository under every name; the ways in which it misbehaves are attributes."""

    def __init__(self) -> None:
        self.files = SMALL | {"model.bin": MODEL, "README.md": b"not needed"}
        self.sizes: dict[str, int] = {}  # what it declares instead
        self.status = 200  # of every response about the repository
        self.cuts: list[int] = []  # after so many bytes of model.bin the connection breaks, once each
        self.stall_after: int | None = None  # after so many bytes of model.bin it sends nothing more
        self.requests: list[tuple[str, str]] = []  # path, range
        self.stalled = threading.Event()
        self.left = threading.Event()  # the client has closed a stalled connection
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments: object) -> None:
                self.hub = hub
                super().__init__(*arguments)  # type: ignore[arg-type]

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def bodies(self, name: str) -> list[str]:
        """The requested ranges of the content of a file, in order."""
        return [part for path, part in self.requests if path.startswith("GET ") and path.endswith("/" + name)]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = self.path.partition("?")[0]
        hub.requests.append((f"{self.command} {path}", self.headers.get("Range", "")))
        commit = next((part for part in path.split("/") if part in REVISIONS.values()), None)
        if path == "/":
            self._answer(b"")
        elif commit is None:
            self._answer(b"{}", status=404)  # another revision than the known one
        elif hub.status != 200:
            self._answer(b"{}", status=hub.status)
        elif path.startswith("/api/models/") and "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(hub.files.items())
            ]
            self._answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": hub.sizes.get(name, len(body))} for name, body in hub.files.items()]
            about = {"id": "Systran/faster-whisper-base", "sha": commit, "siblings": siblings}
            self._answer(json.dumps(about | {"private": False, "tags": [], "downloads": 0, "likes": 0}).encode())
        elif "/resolve/" in path:
            self._file(path.rpartition("/")[2], commit)
        else:
            self._answer(b"{}", status=404)

    def _file(self, name: str, commit: str) -> None:
        content = self.hub.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        extra = {"X-Repo-Commit": commit}
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        size = self.hub.sizes.get(name, len(body))
        self._answer(body, status=206 if start else 200, size=size, whole=name != "model.bin", tag=name, extra=extra)

    def _answer(
        self,
        body: bytes,
        *,
        status: int = 200,
        size: int | None = None,
        whole: bool = True,
        tag: str = "x",
        extra: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        headers = {"ETag": f'"{tag}"', "Content-Length": str(size or len(body))}
        for name, value in (headers | (extra or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if whole:
            self.wfile.write(body)
        elif self.hub.cuts:
            self.wfile.write(body[: self.hub.cuts.pop(0)])
            self.close_connection = True
        elif self.hub.stall_after is not None:
            self.wfile.write(body[: self.hub.stall_after])
            self.hub.stalled.set()
            with suppress(ConnectionError):
                self.connection.recv(1)  # returns when the client has closed the connection
            self.hub.left.set()
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Keep quiet."""


def point_to(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process and its children to a hub and a cache."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(cache.parent / "hf-home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, name="fake-hub")
    thread.start()
    yield hub
    close_session()
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()
