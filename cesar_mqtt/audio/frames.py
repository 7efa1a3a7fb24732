"""What a decoder's process writes to its pipe: frames of a kind, a length and a payload. Values; no I/O of its own.

The reader must trust none of it: the process may have been taken over by the file that it decodes.
"""

import json
import struct
from enum import IntEnum
from typing import Any

HEADER = struct.Struct("=BI")
"""The kind, and the length of the payload in bytes."""
MAX_BYTES = 1 << 24
"""The largest payload: four minutes of samples."""


class FrameKind(IntEnum):
    """What the payload is; all but `SAMPLES` have JSON."""

    OPENED = 1
    """First: `AudioInfo`, and which protections are in force."""
    STATE = 2
    """How far decoding is: before each block, and in between as a sign of life."""
    SAMPLES = 3
    """A block of float32 samples."""
    FAILED = 4
    """Last: why the file cannot be decoded."""
    BROKEN = 5
    """Last: an exception that nothing expected, as text."""
    END = 6
    """Last: there are no more samples."""


def encode(kind: FrameKind, value: dict[str, Any] | None = None) -> bytes:
    """Return a whole frame of JSON."""
    payload = b"{}" if value is None else json.dumps(value).encode()
    return HEADER.pack(kind, len(payload)) + payload
