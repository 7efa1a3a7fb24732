"""The commands that the pages show are run, in order, in a machine made of folders.

What would change the real machine (services, containers, packages, owners) is a stand-in that notes how it was called;
everything else is the real program, on files below a temporary folder.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, Mosquitto, need

ROOT = Path(__file__).parents[2]
FOLLOWED = ("README.md", "first-job.md", "inbox.md", "web.md", "wyoming.md")
"""Their blocks `sh` are run for real by tests/acceptance/test_documents.py."""
STAND_INS = (
    "nats-server",
    "systemctl",
    "systemd-sysusers",
    "journalctl",
    "docker",
    "chown",
    "python3",
    "pip",
    "cesar-mqtt",
)

pytestmark = [pytest.mark.mosquitto]


def shown(page: str) -> str:
    """All that a page tells the reader to type, as one script; each section begins in the root of the clone."""
    language = "bash" if page == "README.md" else "sh"
    script = ""
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)
        lines = [line.removeprefix(indent) for indent, block in found for line in block.splitlines(keepends=True)]
        script += "".join(['cd "$CLONE"\n', *lines] if lines else [])
    return script


def pages() -> list[str]:
    """README's blocks `bash`, and every page with a block `sh` that is not followed elsewhere."""
    found = [*(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    named = [str(page.relative_to(ROOT)) for page in sorted(found) if page.name not in FOLLOWED]
    return ["README.md", *(page for page in named if shown(page))]


@pytest.fixture
def machine(tmp_path: Path, mosquitto: Mosquitto) -> dict[str, str]:
    """A clone to be in, programs to call, and a broker that answers wherever the page says that one is."""
    work = tmp_path / "work"
    for name in ("deploy", "docs"):
        shutil.copytree(ROOT / name, work / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in STAND_INS:
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/called\n')
    for name in ("mosquitto_pub", "mosquitto_sub"):
        host = 'for word; do shift; case $word in broker.lan|-h) ;; *) set -- "$@" "$word";; esac; done'
        (programs / name).write_text(f'#!/bin/sh\n{host}\nexec {need(name)} -p {mosquitto.port} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    for folder in ("etc/mosquitto/conf.d", "etc/systemd/system", "var/lib/cesar-mqtt", "opt/cesar-mqtt/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "opt/cesar-mqtt/bin/pip").symlink_to(programs / "pip")
    (work / ".venv/bin").mkdir(parents=True)
    (work / ".venv/bin/cesar-mqtt").symlink_to(programs / "cesar-mqtt")
    (tmp_path / "cesar-mqtt").mkdir()
    (tmp_path / "cesar-mqtt" / "bin").symlink_to(programs)
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "CLONE": str(work),
        "PATH": f"{programs}:/usr/sbin:{os.environ['PATH']}",
    }


@pytest.mark.parametrize("page", pages())
def test_what_a_page_shows_can_be_typed_from_its_top_to_its_end(
    page: str, machine: dict[str, str], tmp_path: Path
) -> None:
    script = re.sub(r"(?<=[ >|=])/(?=(etc|opt|var)/)", f"{tmp_path}/", shown(page))
    script = re.sub(r"^/opt/", f"{tmp_path}/opt/", script, flags=re.MULTILINE).replace("HOST", "broker.example")
    (tmp_path / "typed").write_text(script)
    done = subprocess.run(
        ["/bin/sh", "-eu", str(tmp_path / "typed")],
        input="a password\n",
        cwd=tmp_path / "work",
        env=machine,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_deployment_page_leaves_what_it_promises(machine: dict[str, str], tmp_path: Path) -> None:
    test_what_a_page_shows_can_be_typed_from_its_top_to_its_end("docs/deployment.md", machine, tmp_path)
    called = (tmp_path / "called").read_text()
    for line in (
        "systemctl enable --now cesar-mqtt",
        "docker compose up --detach --build",
        "systemctl stop cesar-mqtt",
    ):
        assert line in called
    assert "/mosquitto/config" not in (tmp_path / "etc/mosquitto/conf.d/cesar.conf").read_text()
    for path in ("etc/mosquitto/cesar/acl", "etc/cesar-mqtt/cesar.toml", "etc/systemd/system/cesar-mqtt.service"):
        assert (tmp_path / path).is_file()
    assert (tmp_path / "etc/cesar-mqtt/broker-password").stat().st_mode & 0o077 == 0
    assert (tmp_path / "work/deploy/docker/state/certificates/ca.pem").is_file()
    password = (tmp_path / "etc/cesar-mqtt/broker-password").read_text().strip()
    assert password not in called
