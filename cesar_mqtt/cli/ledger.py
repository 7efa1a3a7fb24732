"""The commands `ledger check`, `repair`, `compact` and `export`, for a data directory that no consumer has open."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cesar_mqtt import logs
from cesar_mqtt.cli.console import out, print_message
from cesar_mqtt.cli.text import many
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode, LedgerError, LedgerInUseError
from cesar_mqtt.ledger.ledger import Ledger, acquire_lock
from cesar_mqtt.ledger.repair import RecoveredLedger, examine, first_sentences, write_repaired


def path_of(settings: Settings) -> Path:
    return settings.data_dir / "ledger.json"


def check(path: Path) -> ExitCode:
    """Print what the ledger holds and which parts are damaged; changes nothing. Raises LedgerError."""
    with _locked(path):
        found = examine(path)
    _print(path, found)
    return ExitCode.LEDGER_FAILED if found.damaged else ExitCode.OK


def repair(path: Path, *, yes: bool) -> ExitCode:
    """Print what is recovered and what is lost, and write a whole ledger if confirmed. Raises LedgerError."""
    with _locked(path):
        found = examine(path)
        _print(path, found)
        if not found.damaged:
            out("Nothing to repair.")
            return ExitCode.OK
        if not yes and not _is_confirmed():
            out("Nothing was changed.")
            return ExitCode.FAILED
        for old in write_repaired(path, found):
            out(f"The old file is now {old.name}.")
    out(f"Repaired: {many(len(found.jobs), 'job')} kept. Every status is published again at the next start.")
    return ExitCode.OK


def compact(path: Path) -> ExitCode:
    """Write everything into `ledger.json` alone. Raises LedgerError."""
    before = _size(path)
    with _locked(path):
        pass
    logs.configure("text", "warning")  # the ledger logs the jobs that were running at a crash
    Ledger(path).close()
    out(f"{path}: {before} bytes before, {_size(path)} bytes after")
    return ExitCode.OK


def export(path: Path) -> ExitCode:
    """Print every job, one JSON object a line, in the order of acceptance. Raises LedgerError."""
    with _locked(path):
        found = examine(path)
    for key, row in sorted(found.jobs.items(), key=lambda item: int(item[0])):
        out(json.dumps({"seq": int(key), **row}, ensure_ascii=False))
    for sentence in first_sentences(found.lost):
        print_message(sentence)
    return ExitCode.LEDGER_FAILED if found.damaged else ExitCode.OK


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    _must_exist(path)
    try:
        held = acquire_lock(path)
    except LedgerInUseError as exc:
        raise LedgerInUseError(exc.problem, "Stop that consumer, then run this again.") from exc
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
        out(f"The ledger is damaged. `cesar-mqtt ledger repair` can recover {many(len(found.jobs), 'job')}.")
    else:
        out("The ledger is whole.")


def _is_confirmed() -> bool:
    if not sys.stdin.isatty():
        out("Repair it with --yes.")
        return False
    return input("Repair? [y/N] ").strip().lower() in {"y", "yes"}


def _size(path: Path) -> int:
    files = (path, path.with_name(path.name + ".journal"))
    return sum(file.stat().st_size for file in files if file.exists())
