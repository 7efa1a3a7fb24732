"""What an add-on sees of the Supervisor, in a container: a broker, and the ingress that its page is asked through.

supervisor.py ADDON BROKER: the host of the add-on, and what `/services/mqtt` says, as JSON.
"""

import http.client
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ADDON, BROKER = sys.argv[1], json.loads(sys.argv[2])
INGRESS = "/api/hassio_ingress/"
PORT = 8188
OF_ONE_CONNECTION = {"connection", "transfer-encoding", "content-length"}


class Supervisor(BaseHTTPRequestHandler):
    """Its API for add-ons, and the path below which Home Assistant shows their pages."""

    def do_GET(self) -> None:
        """Answer an add-on, or pass the request of a browser on."""
        if self.path.startswith(INGRESS):
            self._pass_on()
            return
        known = self.path == "/services/mqtt" and self.headers["Authorization"] == "Bearer token"
        body = json.dumps({"result": "ok", "data": BROKER} if known else {"result": "error"}).encode()
        self.send_response(200 if known else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Pass the request of a browser on."""
        self._pass_on()

    def do_DELETE(self) -> None:
        """Pass the request of a browser on."""
        self._pass_on()

    def _pass_on(self) -> None:
        token, _, path = self.path.removeprefix(INGRESS).partition("/")
        connection = http.client.HTTPConnection(ADDON, PORT)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_ONE_CONNECTION}
        headers["X-Ingress-Path"] = f"{INGRESS}{token}"
        headers["X-Forwarded-For"] = self.client_address[0]
        headers["X-Forwarded-Host"] = self.headers["Host"]
        headers["X-Forwarded-Proto"] = "http"
        connection.request(self.command, f"/{path}", body or None, headers)
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in OF_ONE_CONNECTION:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        while part := answer.read1(65536):  # events come one by one
            self.wfile.write(part)
            self.wfile.flush()
        connection.close()
        self.close_connection = True


ThreadingHTTPServer(("0.0.0.0", 80), Supervisor).serve_forever()  # noqa: S104 - of the container
