"""Draws `docs/watch.svg`, the picture of `cesar-mqtt watch`; run it after a change of `watch`."""  # noqa: INP001

import io
import json
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from cesar_mqtt.cli.watch_model import Board
from cesar_mqtt.cli.watch_view import View

WIDTH, HEIGHT = 100, 16
NOW = datetime(2026, 1, 23, 21, 45, 12, tzinfo=UTC)
FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
"""Left out: the reader's browser would download the font from another host."""

JOBS: dict[str, dict[str, Any]] = {
    "interview-3": {"status": "processing", "progress": 0.42, "audio_duration": 5400.0, "speed": 21.6, "eta": 145.0},
    "porch-18": {"status": "queued", "queue_position": 1},
    "voicemail-112": {"status": "queued", "queue_position": 2},
    "standup-monday": {"status": "queued", "queue_position": 3},
    "porch-17": {"result_text": "Hello, I have a parcel for you. I leave it behind the flower pots.", "second": 2},
    "note-41": {"result_text": "Please call the plumber on Monday morning and order a new lamp.", "second": 1},
    "camera-9": {"no_speech": True, "result_text": "", "audio_duration": 12.0, "second": 0},
}
FAILED = {"error_code": "audio_no_stream", "error_message": "The file has no audio track.", "status": "error"}
STOPPED = {"status": "cancelled", "audio_duration": 3720.0, "speed": None}


def board() -> Board:
    """Return a board with jobs in every state."""
    known = Board("cesar")
    counts = {"completed_total": 128, "error_total": 2, "cancelled_total": 1}
    for name, activity, queued in (("cesar", "processing", 3), ("attic", "idle", 0)):
        queue = {"activity": activity, "queued": queued, "oldest_age": 21.0 if queued else None, **counts}
        known.take(f"cesar/consumer/{name}/state", b'{"state": "online"}')
        known.take(f"cesar/consumer/{name}/queue", json.dumps(queue).encode())
        counts = {"completed_total": 40, "error_total": 0, "cancelled_total": 0}
    for job_id, fields in {**JOBS, "upload-5": FAILED, "lecture-2": STOPPED}.items():
        ended = f"2026-01-23T21:45:0{fields.get('second', 0)}.000Z"
        status = {"status": "completed", "audio_duration": 6.2, "speed": 7.3, "completed_at": ended, **fields}
        if status["status"] in ("queued", "error"):
            status |= {"audio_duration": None, "speed": None}
        known.take(f"cesar/status/{job_id}", json.dumps(status).encode())
    return known


def main() -> None:
    """Draw it; the picture is the same on every machine."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    console = Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True)
    console.print(View(board(), "cesar at mqtt://127.0.0.1:1883", None, NOW, height=HEIGHT))
    template = FONTS.sub("", CONSOLE_SVG_FORMAT)
    picture = console.export_svg(title="cesar-mqtt watch", code_format=template, unique_id="watch")
    lines = (line.rstrip() for line in picture.splitlines())
    Path(__file__).with_name("watch.svg").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
