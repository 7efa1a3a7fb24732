"""Debian's nginx in front of the page, below a path of its own, as its documentation has it."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.acceptance.harness import wait_until
from tests.acceptance.test_documents import blocks
from tests.conftest import PATIENCE_S, find_free_port, need

_PAGE = Path(__file__).parents[2] / "docs" / "web.md"
_CONFIGURATION = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


@contextmanager
def reverse_proxy(page: int, folder: Path, *, scheme: str = "$scheme") -> Iterator[str]:
    """Start it in front of a port; yield the address of the page behind it.

    Args:
        page: the port of the page.
        folder: for its files.
        scheme: what it says the browser speaks.
    """
    port = find_free_port()
    file = folder / "nginx.conf"
    (shown,) = blocks(_PAGE, "nginx")
    location = shown.replace("127.0.0.1:8188", f"127.0.0.1:{page}").replace("$scheme", scheme)
    file.write_text(_CONFIGURATION.format(folder=folder, port=port, location=location))
    process = subprocess.Popen(
        [need("nginx"), "-c", str(file), "-p", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: _is_open(port))
        yield f"http://127.0.0.1:{port}/cesar/"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
