"""Transcripts as files: written aside, synced and renamed, and never over a file that is not their own.

Any thread may call these functions.
"""

import re
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from cesar_mqtt.ledger.fsync import Disk

_UNSAFE = re.compile(r'[\x00-\x1f\x7f"*/:<>?\\|]')
"""What Windows and SMB do not have in names."""
_NAME_BYTES = 200


def file_name(name: str) -> str:
    """Return a producer's name of a recording as a name of a file: of its last part, without what systems reserve."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    plain = _UNSAFE.sub("_", last).strip(" .") or "recording"
    return plain.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")


def write_transcripts(
    folder: Path, name: str, results: Mapping[str, bytes], *, own: Collection[Path] = (), mode: int = 0o644
) -> list[Path]:
    """Write each result as `<name>.<format>`; on return they are on disk.

    The name is that of the recording without its suffix. Where a file has it that is neither among `own` nor equal, the
    suffix stays (`talk.wav.txt`), and then a number is added.

    Args:
        folder: where to; created if it is missing.
        name: the recording's file name.
        results: by format.
        own: files that may be replaced, for they were written for this recording before.
        mode: the permissions of the files.

    Raises:
        OSError: a file cannot be written; those written before it stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = _targets(folder, name, results, own)
    disk = Disk()
    for target, payload in targets.items():
        aside = folder / f".{uuid.uuid4().hex}.tmp"
        disk.create(aside, [payload])
        try:
            aside.chmod(mode)
            disk.replace(aside, target)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
    disk.sync_folder(folder)
    return list(targets)


def _targets(folder: Path, name: str, results: Mapping[str, bytes], own: Collection[Path]) -> dict[Path, bytes]:
    for base in chain((Path(name).stem, name), (f"{name} ({number})" for number in count(2))):
        targets = {folder / f"{base}.{result_format}": payload for result_format, payload in results.items()}
        if all(path in own or _is_free(path, payload) for path, payload in targets.items()):
            break
    return targets


def _is_free(path: Path, payload: bytes) -> bool:
    """Whether nothing has the name, or the same transcript, as after a crash behind the rename."""
    try:
        return path.read_bytes() == payload
    except FileNotFoundError:
        return True
    except OSError:  # a folder, or not readable
        return False
