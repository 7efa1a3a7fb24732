"""The page of a consumer, or in a process of its own, as a program meets it."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

from tests import template
from tests.acceptance.harness import PATIENCE_S, SMALL, SPEECH, wait_until
from tests.conftest import Mosquitto, find_free_port


class Page:
    """The page of a consumer, as a program meets it."""

    def __init__(self, port: int, path: str = "") -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}{path}"
        self.http = httpx2.Client(base_url=self.url, timeout=PATIENCE_S)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def submit(self, path: Path = SPEECH, **fields: str) -> dict[str, Any]:
        with path.open("rb") as file:
            response = self.http.post("/api/jobs", files={"file": (path.name, file)}, data=fields)
        assert response.status_code == 201, response.text
        body: dict[str, Any] = response.json()
        return body

    def health(self) -> dict[str, Any]:
        """What `/healthz` says; empty: nothing answers."""
        try:
            body: dict[str, Any] = self.http.get("/healthz").json()
        except httpx2.HTTPError:
            return {}
        return body

    def wait_ready(self) -> None:
        wait_until(lambda: self.health().get("status") == "ok")

    def close(self) -> None:
        self.http.close()
        self.openai.close()


@contextmanager
def alone(
    broker: Mosquitto, folder: Path, *, needs_consumer: bool = True, environ: Mapping[str, str] | None = None
) -> Iterator[Page]:
    """`cesar-mqtt web`, ready when it has found the broker, and a consumer if it needs one."""
    page = Page(find_free_port())
    arguments = ["web", f"127.0.0.1:{page.port}", "--broker", broker.url]
    with (folder / "web.log").open("wb") as log:
        process = template.start(
            arguments, cwd=folder, env={**os.environ, **SMALL, **(environ or {})}, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: page.health().get("broker", False))
        if needs_consumer:
            page.wait_ready()
        with closing(page):
            yield page
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, (folder / "web.log").read_text()
    finally:
        process.kill()
        process.wait(PATIENCE_S)
