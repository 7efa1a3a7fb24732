"""The systemd unit, as systemd itself reads it."""

import configparser
import sys
import tomllib
from pathlib import Path

import pytest

from cesar_mqtt.config import Settings, load_settings
from cesar_mqtt.errors import ExitCode
from tests.conftest import PATIENCE_S, need, report_missing, run
from tests.deploy.conftest import DEPLOY

UNIT = DEPLOY / "systemd" / "cesar-mqtt.service"
SETTINGS = DEPLOY / "systemd" / "cesar.toml"
MOST_EXPOSURE = 1.9
"""Of 10; most services that come with a distribution are over 9."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is there: systemd looks for it."""
    text = UNIT.read_text()
    assert text.count("ExecStart=/opt/cesar-mqtt/bin/cesar-mqtt serve ") == 1
    placed = tmp_path / UNIT.name
    placed.write_text(text.replace("/opt/cesar-mqtt/bin/cesar-mqtt", sys.executable))
    return placed


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    checked = run(need("systemd-analyze"), "verify", "--man=no", str(unit), timeout_s=PATIENCE_S)
    about_ours = [line for line in checked.stderr.splitlines() if UNIT.name in line]
    assert (checked.returncode, about_ours) == (0, [])


def test_systemd_would_say_so_if_something_were_wrong(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    checked = run(need("systemd-analyze"), "verify", "--man=no", str(unit), timeout_s=PATIENCE_S)
    assert "WatchdogSeconds" in checked.stderr


def test_the_unit_exposes_little(unit: Path) -> None:
    threshold = f"--threshold={MOST_EXPOSURE * 10:.0f}"
    rated = run(need("systemd-analyze"), "security", "--offline=true", threshold, str(unit), timeout_s=PATIENCE_S)
    if "offline" in rated.stderr:
        report_missing("this systemd cannot rate a unit that is not loaded")
    assert rated.returncode == 0, rated.stdout[-400:] + rated.stderr


def test_the_unit_allows_what_the_decoders_of_recordings_need() -> None:
    """Among it the system calls by which they are limited: setrlimit(3) of glibc and Python is prlimit64(2)."""
    sets = _system_call_sets(run(need("systemd-analyze"), "syscall-filter", timeout_s=PATIENCE_S).stdout)
    allowed: set[str] = set()
    for line in UNIT.read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "SystemCallFilter":
            named = set().union(*(sets.get(call, {call}) for call in value.removeprefix("~").split()))
            allowed = allowed - named if value.startswith("~") else allowed | named
    needed = {"clone", "wait4", "kill", "socketpair", "sendmsg", "recvmsg", "pipe2", "poll", "memfd_create"}
    limiting = {"prctl", "prlimit64", "landlock_create_ruleset", "landlock_restrict_self"}
    assert needed | limiting <= allowed
    assert "setrlimit" not in allowed


def _system_call_sets(printed: str) -> dict[str, set[str]]:
    """The sets that systemd knows, each with the calls of the sets in it."""
    sets: dict[str, set[str]] = {}
    for block in printed.split("\n\n"):
        lines = [line.strip() for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]
        if lines and lines[0].startswith("@"):
            sets[lines[0]] = set(lines[1:])
    while any(call.startswith("@") for calls in sets.values() for call in calls):
        sets = {
            name: set().union(*(sets[call] if call.startswith("@") else {call} for call in calls))
            for name, calls in sets.items()
        }
    return sets


def test_what_a_restart_cannot_mend_is_not_restarted() -> None:
    service = _read()["Service"]
    final = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert final == {ExitCode.USAGE, ExitCode.LEDGER_FAILED, ExitCode.CONFIG}
    clean = {int(code) for code in service["SuccessExitStatus"].split()}
    assert clean == {ExitCode.UNACKNOWLEDGED, ExitCode.INTERRUPTED, ExitCode.TERMINATED}


def test_the_stop_waits_longer_than_the_current_job_is_given() -> None:
    minutes = _read()["Service"]["TimeoutStopSec"].removesuffix("min")
    limit_s = _settings().worker.drain_timeout
    assert limit_s is not None
    assert limit_s + 30 < int(minutes) * 60


def test_the_password_is_where_the_unit_puts_it() -> None:
    name, _, _source = _read()["Service"]["LoadCredential"].partition(":")
    assert _settings().broker.password_file == Path("/run/credentials") / UNIT.name / name


def test_the_user_of_the_unit_is_made() -> None:
    lines = (DEPLOY / "systemd" / "cesar-mqtt.sysusers.conf").read_text().splitlines()
    assert lines[-1].split()[:2] == ["u", _read()["Service"]["User"]]


def _read() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def _settings() -> Settings:
    assert tomllib.loads(SETTINGS.read_text())
    return load_settings(flags={}, config_file=SETTINGS, environ={}, cwd=Path("/"))
