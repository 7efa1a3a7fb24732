"""The Node-RED flow, imported into a real Node-RED and run there; `make test-node-red` installs one and calls this."""

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import PATIENCE_S, SPEECH, SPOKEN, Consumer, words
from tests.conftest import Mosquitto, find_free_port
from tests.deploy.conftest import DEPLOY

pytestmark = [pytest.mark.mosquitto, pytest.mark.model, pytest.mark.timeout(300)]

FLOW = DEPLOY / "node-red" / "flow.json"
Serve = Callable[..., Consumer]


class NodeRed:
    """One Node-RED with a folder of its own, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.port = find_free_port()
        self.log: list[str] = []
        self._logged = threading.Condition()
        settings = {
            "uiHost": "127.0.0.1",
            "uiPort": self.port,
            "userDir": str(folder),
            "telemetry": {"enabled": False},
            "credentialSecret": False,
        }
        (folder / "settings.js").write_text(f"module.exports = {json.dumps(settings)};\n")
        self.process = subprocess.Popen(
            [os.environ["NODE_RED"], "--settings", str(folder / "settings.js")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for("Started flows")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._logged:
                self.log.append(line)
                self._logged.notify_all()

    def wait_for(self, text: str, read: int = 0) -> str:
        """Wait for a text in the log, after the lines that had been read before; everything from there on."""
        deadline = time.monotonic() + PATIENCE_S

        def found() -> bool:
            return text in "".join(self.log[read:]) or self.process.poll() is not None

        with self._logged:
            self._logged.wait_for(found, deadline - time.monotonic())
            told = "".join(self.log[read:])
        if text not in told:
            pytest.fail(f"{text!r} was not logged; there was:\n{told}")
        return told[told.index(text) :]

    def call(self, path: str, body: Any) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Node-RED-Deployment-Type": "full"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
            assert answer.status in (200, 204)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def node_red(tmp_path: Path) -> Iterator[NodeRed]:
    folder = tmp_path / "node-red"
    folder.mkdir()
    started = NodeRed(folder)
    yield started
    started.stop()


def test_the_flow_has_recordings_transcribed_by_path_and_by_bytes_and_tells_of_trouble(
    node_red: NodeRed, mosquitto: Mosquitto, serve: Serve, tmp_path: Path
) -> None:
    serve("--broker", mosquitto.url)
    notes = tmp_path / "notes"
    notes.mkdir()
    node_red.call("/flows", _placed(notes, mosquitto.port))
    node_red.wait_for("Connected to broker")

    by_path = len(node_red.log)
    node_red.call(f"/inject/{_node('inject')}", {})
    told = node_red.wait_for("[debug:transcript]", by_path)
    assert words(told)[2 : 2 + len(SPOKEN)] == SPOKEN

    by_bytes = len(node_red.log)
    shutil.copy(SPEECH, notes / "a note.wav")
    told = node_red.wait_for("[debug:transcript]", by_bytes)
    assert words(told)[2 : 2 + len(SPOKEN)] == SPOKEN

    missing = len(node_red.log)
    other = [{"p": "payload", "v": "not-there.wav", "vt": "str"}]
    node_red.call(f"/inject/{_node('inject')}", {"__user_inject_props__": other})
    assert "not-there.wav" in node_red.wait_for("[debug:error]", missing)

    wrong = len(node_red.log)
    node_red.call(f"/inject/{_node('inject')}", {"__user_inject_props__": [{"p": "payload", "v": "7", "vt": "num"}]})
    assert "invalid_request" in node_red.wait_for("[debug:rejected]", wrong)
    assert "[error]" not in "".join(node_red.log)


def _placed(notes: Path, port: int) -> list[dict[str, Any]]:
    """The flow as a user sets it in the editor: where the broker is, and which folder is watched."""
    nodes: list[dict[str, Any]] = json.loads(FLOW.read_text())
    for node in nodes:
        if node["type"] == "mqtt-broker":
            node.update(broker="127.0.0.1", port=str(port))
        if node["type"] == "watch":
            node.update(files=str(notes))
    return nodes


def _node(kind: str) -> str:
    found: str = next(node["id"] for node in json.loads(FLOW.read_text()) if node["type"] == kind)
    return found
