import errno
from pathlib import Path

import pytest

from cesar_mqtt.monitoring import health
from cesar_mqtt.monitoring.health import HealthProbe


def probe_of(folder: Path, *, worker: bool = True, network: bool = True) -> HealthProbe:
    return HealthProbe(
        folder,
        worker_alive=lambda: worker,
        network_alive=lambda: network,
        events_dropped=lambda: 3,
        quarantined=list,
    )


def test_the_files_and_the_process_are_measured(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_bytes(b"x" * 1000)
    (tmp_path / "ledger.json.journal").write_bytes(b"x" * 200)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "one").write_bytes(b"x" * 30)
    (tmp_path / "spool" / "two").write_bytes(b"x" * 4)
    found = probe_of(tmp_path, network=False).measure()
    assert (found.ledger_bytes, found.spool_bytes) == (1200, 34)
    assert (found.worker_alive, found.network_alive) == (True, False)
    assert 5 << 20 < found.rss_bytes < 64 << 30
    assert found.disk_free_bytes is not None
    assert found.disk_free_bytes > 0
    assert found.uptime >= 0


def test_without_file_descriptors_the_sizes_are_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "glob", refuse)
    assert probe_of(tmp_path).measure().ledger_bytes == 0


def test_a_missing_folder_has_no_sizes(tmp_path: Path) -> None:
    found = probe_of(tmp_path / "gone").fields()
    assert (found["ledger_bytes"], found["spool_bytes"], found["disk_free_bytes"]) == (0, 0, None)


def test_without_proc_the_memory_is_the_peak(tmp_path: Path) -> None:
    known = health._STATM
    health._STATM = tmp_path / "nothing"
    try:
        assert 5 << 20 < probe_of(tmp_path).measure().rss_bytes < 64 << 30
    finally:
        health._STATM = known
