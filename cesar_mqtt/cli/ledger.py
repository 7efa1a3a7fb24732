"""The commands `ledger check`, `repair`, `compact` and `export`, for a data directory that no consumer has open."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cesar_mqtt import logs
from cesar_mqtt.cli.console import out, say
from cesar_mqtt.cli.text import many
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode, LedgerError
from cesar_mqtt.ledger.ledger import Ledger, acquire_lock
from cesar_mqtt.ledger.repair import RecoveredLedger, examine, first_sentences, write_repaired


def path_of(settings: Settings) -> Path:
    return settings.data_dir / "ledger.json"


def check(path: Path) -> ExitCode:
    """Print what the ledger holds and what of it is damaged; changes nothing. Raises LedgerError."""
    with _alone(path):
        found = examine(path)
    _print(path, found)
    return ExitCode.LEDGER_FAILED if found.damaged else ExitCode.OK


def repair(path: Path, *, yes: bool) -> ExitCode:
    """Print what would be kept and dropped, and do it when told to. Raises LedgerError."""
    with _alone(path):
        found = examine(path)
        _print(path, found)
        if not found.damaged:
            out("Nothing has to be repaired.")
            return ExitCode.OK
        if not yes and not _agreed():
            out("Nothing was changed.")
            return ExitCode.FAILED
        for old in write_repaired(path, found):
            out(f"The old file is now {old.name}.")
    out(f"Repaired: {many(len(found.jobs), 'job')} kept. Every status is published again at the next start.")
    return ExitCode.OK


def compact(path: Path) -> ExitCode:
    """Bring everything into `ledger.json` alone. Raises LedgerError."""
    before = _size(path)
    _must_exist(path)
    logs.configure("text", "warning")  # of a job that was in work at a crash the ledger says so, with its id
    Ledger(path).close()
    out(f"{path}: {before} bytes before, {_size(path)} bytes after")
    return ExitCode.OK


def export(path: Path) -> ExitCode:
    """Print every job, a JSON object a line, in the order of acceptance. Raises LedgerError."""
    with _alone(path):
        found = examine(path)
    for key, row in sorted(found.jobs.items(), key=lambda item: int(item[0])):
        out(json.dumps({"seq": int(key), **row}, ensure_ascii=False))
    for sentence in first_sentences(found.lost):
        say(sentence)
    return ExitCode.LEDGER_FAILED if found.damaged else ExitCode.OK


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    _must_exist(path)
    held = acquire_lock(path)
    try:
        yield
    finally:
        held.release()


def _must_exist(path: Path) -> None:
    if not path.exists() and not path.with_name(path.name + ".journal").exists():
        raise LedgerError(f"There is no ledger at {path}. Name the data directory with --data-dir.")


def _print(path: Path, found: RecoveredLedger) -> None:
    states = Counter(str(row["state"]) for row in found.jobs.values())
    counts = ", ".join(f"{number} {state}" for state, number in sorted(states.items())) or "none"
    out(f"{path}: {many(len(found.jobs), 'job')} ({counts}), {many(found.transaction, 'transaction')}")
    for sentence in found.notes:
        out(f"  note: {sentence}")
    for sentence in first_sentences(found.lost):
        out(f"  lost: {sentence}")
    if found.damaged:
        out(f"The ledger is damaged. `cesar-mqtt ledger repair` keeps {many(len(found.jobs), 'job')}, no more.")
    else:
        out("The ledger is whole.")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        out("Say --yes to do so.")
        return False
    return input("Do so? [y/N] ").strip().lower() in {"y", "yes"}


def _size(path: Path) -> int:
    files = (path, path.with_name(path.name + ".journal"))
    return sum(file.stat().st_size for file in files if file.exists())
