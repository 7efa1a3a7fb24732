"""What the commands on a ledger say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cesar_mqtt.cli import ledger as ledgercommands
from cesar_mqtt.errors import ExitCode, LedgerInUseError
from cesar_mqtt.ledger.ledger import Ledger
from tests.factories import new_job


def test_compacting_names_the_job_that_was_running_at_a_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.json"
    ledger = Ledger(path)
    ledger.append([new_job("porch-17")])
    assert ledger.claim() is not None
    ledger._release_files()
    assert ledgercommands.compact(path) == 0
    assert "requeued (job porch-17)" in capsys.readouterr().err


def test_counts_of_one_are_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger.json"
    with Ledger(path) as ledger:
        ledger.append([new_job("porch-17")])
    assert ledgercommands.check(path) == 0
    assert ": 1 job (1 queued), " in capsys.readouterr().out
    path.write_text(path.read_text().replace('"1": {', '"1": '))
    ledgercommands.check(path)
    assert "1 line of the checkpoint cannot be read (jobs named in it: porch-17)." in capsys.readouterr().out


@pytest.mark.parametrize("command", [ledgercommands.check, ledgercommands.compact, ledgercommands.export])
def test_where_a_consumer_has_the_ledger_open_the_advice_is_to_stop_it(
    tmp_path: Path, command: Callable[[Path], ExitCode]
) -> None:
    """The advice was that of `serve`: another data directory, and with it another name."""
    path = tmp_path / "ledger.json"
    with Ledger(path), pytest.raises(LedgerInUseError) as caught:
        command(path)
    assert caught.value.advice == "Stop that consumer, then run this again."
    with Ledger(path), pytest.raises(LedgerInUseError, match="--data-dir and its own --name"):
        Ledger(path)
