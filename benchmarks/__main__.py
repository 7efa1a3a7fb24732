"""Run the benchmarks and print one table: `make bench`, or `python -m benchmarks ledger` for a part."""

import sys
import tempfile
from pathlib import Path

from benchmarks import bus, jobs, ledger, transcription
from benchmarks.table import show

PARTS = {"ledger": ledger.run, "bus": bus.run, "transcription": transcription.run, "jobs": jobs.run}


def main(names: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-bench-") as folder:
        for name in names or PARTS:
            part = Path(folder) / name
            part.mkdir()
            rows += PARTS[name](part)
    show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
