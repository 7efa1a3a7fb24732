"""The commands that README and docs show: those of the README are run as they stand there, the others are parsed."""

import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import TypeAdapter

from cesar_mqtt.cli.app import app
from cesar_mqtt.config import load_settings
from cesar_mqtt.protocol.payloads import Event, Status
from tests.acceptance.harness import PATIENCE_S, SMALL, SPEECH, SPOKEN, wait_until, words
from tests.conftest import Mosquitto, find_free_port, need, run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str = "sh") -> list[str]:
    """The fenced blocks of one language, in order, also inside of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of the blocks, and every `cesar-mqtt` in the text, as words."""
    text = "\n".join(blocks(page)).replace("\\\n", " ")
    inline = [one for one in re.findall(r"`([^`\n]+)`", page.read_text()) if one.startswith("cesar-mqtt ")]
    for line in [*text.splitlines(), *inline]:
        bare = line.strip().removeprefix("$ ").removeprefix("sudo ")
        if bare and not bare.startswith("#"):
            yield shlex.split(bare, comments=True)


def ours() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for line in commands(page):
            programs = [n for n, word in enumerate(line) if Path(word).name == "cesar-mqtt"]
            found += [(page.name, line[n + 1 :]) for n in programs]
    return found


@pytest.mark.parametrize(("page", "arguments"), ours(), ids=lambda value: value if isinstance(value, str) else None)
def test_every_command_that_a_page_shows_exists_with_its_options(page: str, arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = [word for word in arguments if word not in {"&", "|"}]
    while True:
        try:
            context = command.make_context("cesar-mqtt", list(rest), resilient_parsing=False)
        except Exception as exc:  # noqa: BLE001 - typer has no public name for them
            if type(exc).__name__ in {"NoArgsIsHelpError", "Exit"}:
                return
            pytest.fail(f"{page} shows `cesar-mqtt {' '.join(arguments)}`: {exc}")
        resolve = getattr(command, "resolve_command", None)
        if resolve is None:
            return
        left = [*getattr(context, "_protected_args", []), *context.args]
        _, command, rest = resolve(context, left)


FOLLOWED = ("README.md", "first-job.md", "inbox.md", "web.md", "wyoming.md")
"""Their commands are run by the tests below, those of all other pages by tests/deploy/test_pages.py."""
LANGUAGES = {"sh", "bash", "toml", "ini", "json", "yaml", "python", "nginx"}
"""Each is run, loaded or compared: `yaml` by `make test-homeassistant`, `nginx` by test_web_proxy.py, `sh` and `bash`
see above, the others here."""


def every_block(language: str) -> list[Any]:
    pages = [*PAGES, *sorted((ROOT / "deploy").rglob("*.md"))]
    return [
        pytest.param(text, id=f"{page.stem}-{n}") for page in pages for n, text in enumerate(blocks(page, language))
    ]


def test_every_block_is_of_a_language_that_is_checked() -> None:
    found = {
        language
        for page in [*PAGES, *(ROOT / "deploy").rglob("*.md")]
        for language in re.findall(r"^ *```(\S*)\n(?:.*\n)*?^ *```$", page.read_text(), re.MULTILINE)
    }
    assert found <= LANGUAGES
    for page in PAGES:
        shown = blocks(page, "bash")
        assert not shown or page.name in ("README.md", "web.md"), f"{page.name}: commands that no test runs"


@pytest.mark.parametrize("text", every_block("toml"))
def test_a_toml_block_is_a_file_of_settings(text: str, tmp_path: Path) -> None:
    assert tomllib.loads(text)
    (tmp_path / "cesar.toml").write_text(text)
    load_settings(flags={}, config_file=tmp_path / "cesar.toml", environ={}, cwd=tmp_path)


@pytest.mark.parametrize("text", every_block("ini"))
def test_an_ini_block_is_a_drop_in_of_the_unit(text: str, tmp_path: Path) -> None:
    unit = tmp_path / "cesar-mqtt.service"
    shipped = (ROOT / "deploy" / "systemd" / unit.name).read_text()
    unit.write_text(shipped.replace("/opt/cesar-mqtt/bin/cesar-mqtt", sys.executable))
    (tmp_path / f"{unit.name}.d").mkdir()
    (tmp_path / f"{unit.name}.d" / "override.conf").write_text(text)
    checked = run(need("systemd-analyze"), "verify", "--man=no", str(unit), timeout_s=PATIENCE_S)
    assert [line for line in checked.stderr.splitlines() if str(tmp_path) in line] == []


@pytest.mark.parametrize("text", every_block("json"))
def test_a_json_block_has_the_fields_of_a_message(text: str) -> None:
    shown = json.loads(text)
    if "result_text" in shown:
        model: Any = Status
    elif "event_type" in shown:
        model = Event
    else:
        assert shown.keys() == {"status", "data", "error", "transaction"}
        return
    TypeAdapter(model).validate_json(text)
    assert shown.keys() == model.__required_keys__


def test_no_page_links_to_a_page_or_a_heading_that_is_not_there() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "deploy").rglob("*.md")]:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(linked), f"{page.name}: {target}#{heading}"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}


def test_every_page_is_linked_from_the_readme_or_from_a_page_that_is() -> None:
    linked, new = set(), {ROOT / "README.md"}
    while new:
        linked |= new
        targets = {
            (page.parent / target).resolve()
            for page in new
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        }
        new = {target for target in targets if target.suffix == ".md"} - linked
    pages = {page for folder in ("docs", "deploy") for page in (ROOT / folder).rglob("*.md")}
    assert sorted(str(page.relative_to(ROOT)) for page in pages - linked) == []


def test_contributing_names_modules_and_functions_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:cesar_mqtt|tests|docs|deploy)/[\w./-]+?)(?:::(\w+))?`", text)
    assert named
    for path, name in named:
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_the_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+ [^`]+)`", row) if "_" not in quote]
    assert quotes
    trees = [ast.parse(path.read_text()) for path in (ROOT / "cesar_mqtt").rglob("*.py")]
    constants = [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for quote in quotes:
        fixed = max(re.split(r"\.\.\.|'[^']*'|\d+(?:\.\d+)*|mqtt://|: ", quote), key=len)
        assert any(fixed.strip() in constant for constant in constants), quote


OUTSIDE_THE_GLOSSARY = (
    r"\b(thanked|mend(ed|s)?|whoever|whomever|somebody|nobody|is told|are told|gives? up its|put back|in work"
    r"|the way of)\b"
)


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "deploy").rglob("*.*")],
    ids=lambda path: path.name,
)
def test_texts_use_the_words_of_the_glossary(page: Path) -> None:
    text = page.read_text() if page.suffix != ".whl" else ""
    assert [found[0] for found in re.finditer(OUTSIDE_THE_GLOSSARY, text, re.IGNORECASE)] == []


@pytest.mark.model
@pytest.mark.mosquitto
def test_the_readme_can_be_followed_from_the_top(mosquitto: Mosquitto, free_port: int, tmp_path: Path) -> None:
    printed = follow(ROOT / "README.md", mosquitto, free_port, tmp_path)
    assert "Every recording you publish becomes a job on disk." in printed["make demo"]
    assert words(printed[".venv/bin/cesar-mqtt submit tests/data/speech.wav"]) == SPOKEN
    (status,) = [text for text in printed.values() if text.startswith("{")]
    assert words(json.loads(status)["result_text"]) == SPOKEN, "mosquitto_sub printed it"


@pytest.mark.model
@pytest.mark.mosquitto
def test_the_first_job_can_be_followed_from_the_top(mosquitto: Mosquitto, free_port: int, tmp_path: Path) -> None:
    printed = follow(ROOT / "docs" / "first-job.md", mosquitto, free_port, tmp_path)
    submitted, written, published, shown, changed = printed.values()
    assert words(submitted.partition("\n")[0]) == SPOKEN
    assert "00:00:00,000 -->" in submitted
    assert sorted(Path(line).name for line in written.splitlines()) == [
        "long.srt",
        "long.txt",
        "speech.srt",
        "speech.txt",
    ]
    assert words("\n".join(published.splitlines()[2:])) == SPOKEN
    assert "note-3" in shown
    assert "note-5" in changed


@pytest.mark.model
@pytest.mark.mosquitto
def test_the_page_of_the_watch_folder_can_be_followed(mosquitto: Mosquitto, tmp_path: Path) -> None:
    inside, beside = (block.replace("/srv/", f"{tmp_path}/srv/") for block in blocks(ROOT / "docs" / "inbox.md"))
    notes, texts = tmp_path / "srv" / "voice-notes", tmp_path / "srv" / "texts"
    notes.mkdir(parents=True)
    shutil.copy(SPEECH, notes / "porch.wav")
    environ = environment(tmp_path, mosquitto.url)
    running = [start(inside, environ, tmp_path)]
    try:
        wait_until((notes / "porch.txt").exists)
        assert words((notes / "porch.txt").read_text()) == SPOKEN

        stop(running.pop())
        other = tmp_path / "other"
        other.mkdir()
        running.append(start("cesar-mqtt serve", environ, tmp_path))
        command = beside.replace("mqtt://broker.example", mosquitto.url)
        running.append(start(command, {**environ, "CESAR_DATA_DIR": str(other / "data")}, other))
        shutil.copy(SPEECH, notes / "yard.wav")
        wait_until(lambda: (texts / "yard.srt").exists() and (texts / "yard.txt").exists())
        assert words((texts / "yard.txt").read_text()) == SPOKEN
    finally:
        for process in reversed(running):
            stop(process)


@pytest.mark.model
@pytest.mark.mosquitto
def test_the_page_of_the_web_page_can_be_followed(mosquitto: Mosquitto, tmp_path: Path) -> None:
    page = ROOT / "docs" / "web.md"
    ports = find_free_port(), find_free_port()
    inside, beside = blocks(page)
    environ = environment(tmp_path, mosquitto.url)
    shutil.copy(SPEECH, tmp_path / "note.wav")
    serving = start(inside.replace("--web", f"--web 127.0.0.1:{ports[0]}"), environ, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    command = beside.replace(" web ", f" web 127.0.0.1:{ports[1]} ").replace("mqtt://127.0.0.1:1883", mosquitto.url)
    alone = start(command, environ, other)
    try:
        addresses = [f"http://127.0.0.1:{port}/api/consumers" for port in ports]
        wait_until(lambda: all("consumers" in get(address) for address in addresses))
        (curl,) = blocks(page, "bash")
        need("curl")
        for program in (["/bin/sh", "-ec", curl], [sys.executable, "-c", *blocks(page, "python")]):
            # tiny.en knows English only.
            placed = [part.replace("127.0.0.1:8188", f"127.0.0.1:{ports[0]}").replace("=de", "=en") for part in program]
            done = subprocess.run(placed, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            assert done.returncode == 0, done.stderr
            assert (
                json.loads(done.stdout)["status"] == "queued" if "curl" in placed[-1] else words(done.stdout) == SPOKEN
            )
    finally:
        stop(alone)
        stop(serving)


@pytest.mark.mosquitto
def test_the_page_of_wyoming_can_be_followed(mosquitto: Mosquitto, tmp_path: Path) -> None:
    port = find_free_port()
    (inside,) = blocks(ROOT / "docs" / "wyoming.md")
    serving = start(
        inside.replace("--wyoming", f"--wyoming 127.0.0.1:{port}"), environment(tmp_path, mosquitto.url), tmp_path
    )
    try:
        wait_until(lambda: "Wyoming is on " in (tmp_path / "serve.log").read_text())
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(b'{"type": "describe"}\n')
            assert json.loads(connection.makefile("rb").readline())["type"] == "info"
    finally:
        stop(serving)


def get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:  # noqa: S310 - http, on loopback
            text: str = response.read().decode()
    except OSError:
        return ""
    return text


def environment(folder: Path, url: str) -> dict[str, str]:
    """A shell in which `cesar-mqtt` is this one, with data of its own and this broker."""
    shims = folder / "bin"
    shims.mkdir()
    (shims / "cesar-mqtt").write_text(f'#!/bin/sh\nexec {sys.executable} -m cesar_mqtt "$@"\n')
    (shims / "cesar-mqtt").chmod(0o755)
    path = f"{shims}:{os.environ['PATH']}"
    return {**os.environ, **SMALL, "PATH": path, "CESAR_DATA_DIR": str(folder / "data"), "CESAR_BROKER__URL": url}


def follow(page: Path, mosquitto: Mosquitto, free_port: int, tmp_path: Path) -> dict[str, str]:
    """Give every block to a shell, in order; what serves continues in the background until the next one serves.

    Nothing is changed but the port, which may be taken on this machine, and the folder of the data. `watch` is left
    out: it has no end. Returns what the blocks print, by their first lines.
    """
    environ = environment(tmp_path, f"mqtt://127.0.0.1:{free_port}")
    shims = tmp_path / "bin"
    port_file = tmp_path / "port"
    port_file.write_text(str(free_port))
    for program in ("mosquitto_pub", "mosquitto_sub"):
        (shims / program).write_text(f'#!/bin/sh\nexec {need(program)} -p "$(cat {port_file})" "$@"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)
    serving: subprocess.Popen[str] | None = None
    printed: dict[str, str] = {}
    try:
        for block in blocks(page):
            shown = block.replace(".venv/bin/cesar-mqtt", "cesar-mqtt")
            if " serve" in shown:
                stop(serving)
                shown = shown.replace(" serve --broker mqtt://127.0.0.1:1883", f" serve --broker {mosquitto.url}")
                port = mosquitto.port if mosquitto.url in shown else free_port
                scheme = "mqtt" if mosquitto.url in shown else "embedded"
                port_file.write_text(str(port))
                environ["CESAR_BROKER__URL"] = f"mqtt://127.0.0.1:{port}"
                serving = start(shown, {**environ, "CESAR_BROKER__URL": f"{scheme}://127.0.0.1:{port}"}, tmp_path)
                continue
            command = shown.replace("make demo", "cesar-mqtt demo")
            command = re.sub(r"^cesar-mqtt watch$", "", command, flags=re.MULTILINE)
            done = subprocess.run(
                ["/bin/sh", "-ec", command],
                cwd=ROOT,
                env=environ,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, (block, done.stdout, done.stderr)
            printed[block.split("\n")[0]] = done.stdout
    finally:
        stop(serving)
    return printed


def start(command: str, environ: dict[str, str], folder: Path) -> "subprocess.Popen[str]":
    log = (folder / "serve.log").open("a+")
    read = log.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command}"], cwd=ROOT, env=environ, stdout=log, stderr=log, text=True
    )
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while "Connected to" not in (folder / "serve.log").read_text()[read:]:
        assert process.poll() is None, (folder / "serve.log").read_text()
        assert time.monotonic() < deadline
        pause.wait(0.05)
    log.close()
    return process


def stop(process: "subprocess.Popen[str] | None") -> None:
    if process is not None:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
