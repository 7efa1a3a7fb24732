"""The command line of the benchmarks; what they measure is not a matter for tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("argument", "code", "told"), [("--help", 0, "ledger, bus"), ("foo", 2, "'foo'")])
def test_a_part_that_is_none_is_named_and_help_is_given(argument: str, code: int, told: str) -> None:
    command = [sys.executable, "-m", "benchmarks", argument]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == code
    assert told in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
