"""Run the benchmarks and print one table: `make bench`, or `python -m benchmarks ledger` for a part."""

import argparse
import tempfile
from pathlib import Path

from benchmarks import (
    bus,
    clips,
    cluster,
    decoding,
    diarization,
    jobs,
    ledger,
    memory,
    peers,
    transcription,
    web,
    wyoming,
)
from benchmarks.table import show

PARTS = {
    "ledger": ledger.run,
    "bus": bus.run,
    "decoding": decoding.run,
    "transcription": transcription.run,
    "clips": clips.run,
    "jobs": jobs.run,
    "memory": memory.run,
    "cluster": cluster.run,
    "wyoming": wyoming.run,
    "web": web.run,
}
MORE = {"diarization": diarization.run, "peers": peers.run}
"""Only when named: they need models or an installation of their own."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Run the benchmarks and print one table.")
    parser.add_argument(
        "parts", metavar="PART", nargs="*", help=f"of {', '.join(PARTS | MORE)}; the first {len(PARTS)} when left out"
    )
    names = parser.parse_args().parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS | MORE]:
        parser.error(f"there is no part {unknown[0]!r}: name any of {', '.join(PARTS | MORE)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-bench-") as folder:
        for name in names:
            part = Path(folder) / name
            part.mkdir()
            rows += (PARTS | MORE)[name](part)
    show(rows)


if __name__ == "__main__":
    main()
