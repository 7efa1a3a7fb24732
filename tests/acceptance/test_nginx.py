"""The configuration of nginx that docs/web.md shows, in a real nginx in front of a real page."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.acceptance.harness import PATIENCE_S, SPOKEN, Consumer, wait_until, words
from tests.acceptance.test_documents import blocks
from tests.acceptance.web_page import Page
from tests.conftest import Mosquitto, find_free_port, need

pytestmark = [pytest.mark.mosquitto, pytest.mark.model]

ROOT = Path(__file__).parents[2]
PASSWORD = "open sesame"  # noqa: S105


@contextmanager
def nginx(folder: Path, port: int, location: str) -> Iterator[None]:
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"{user} daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxied;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f"server {{ listen 127.0.0.1:{port};\n{location}\n}} }}\n"
    )
    with subprocess.Popen([need("nginx"), "-c", str(config), "-e", str(folder / "error.log")]) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def test_the_page_works_below_a_path_of_nginx_with_its_password(
    mosquitto: Mosquitto, serve: Callable[..., Consumer], tmp_path: Path
) -> None:
    (shown,) = blocks(ROOT / "docs" / "web.md", "nginx")
    (settings,) = [text for text in blocks(ROOT / "docs" / "web.md", "toml") if "authenticate = false" in text]
    password = tmp_path / "password"
    password.write_text(f"{PASSWORD}\n")
    password.chmod(0o600)
    (tmp_path / "cesar.toml").write_text(re.sub(r'password_file = ".*"', f'password_file = "{password}"', settings))
    inside, front = Page(find_free_port()), find_free_port()
    flags = ["--web", f"127.0.0.1:{inside.port}", "--config", str(tmp_path / "cesar.toml")]
    serve("--broker", mosquitto.url, *flags)
    location = shown.replace("127.0.0.1:8188", f"127.0.0.1:{inside.port}")
    page = Page(front, path="/cesar")
    with closing(inside), closing(page), nginx(tmp_path, front, location):
        wait_until(lambda: page.health().get("status") == "ok")
        assert page.http.get("/api/jobs").status_code == 401
        assert page.http.post("/login", json={"password": PASSWORD}).status_code == 204
        job_id = page.submit()["job_id"]
        with page.http.stream("GET", "/api/events") as events:  # each line as it comes, not when a buffer is full
            assert next(line for line in events.iter_lines() if '"completed"' in line)
        assert words(page.http.get(f"/api/jobs/{job_id}/result.txt").text) == SPOKEN
        assert page.openai.with_options(api_key=PASSWORD).models.list().data
        front_page = page.http.get("/").text
        links = re.findall(r'(?:src|href)="([^"#]+)"', front_page)
        assert [link for link in links if page.http.get(link).status_code != 200] == []
