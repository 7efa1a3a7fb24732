"""What the whole project is for, tried in earnest: processes are really killed, the broker really restarts."""

from pathlib import Path

import pytest

from tests.acceptance.chaos import run
from tests.conftest import StartMosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]


@pytest.mark.timeout(400)
def test_no_job_is_lost_doubled_or_overtaken_whatever_is_killed(
    tmp_path: Path, start_mosquitto: StartMosquitto
) -> None:
    mosquitto = start_mosquitto("max_queued_messages 0", persistence=True)
    report = run(tmp_path, mosquitto, jobs=60, kills=6, broker_restarts=2, seed=20260123)
    assert report.wrong == 0, report
