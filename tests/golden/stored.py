"""The data directory of version 1 in `version_1/`, and how it is to be read; `version_1.py` made it."""

import json
import shutil
from pathlib import Path
from typing import Any

from tinydb import TinyDB

FOLDER = Path(__file__).with_name("version_1")
SETTINGS = {
    "CESAR_MODELS__DEFAULT": "tiny.en",
    "CESAR_TRANSCRIBER__WINDOW": "30",
    "CESAR_RETENTION__DAYS": "100000",
    "CESAR_HOMEASSISTANT__ENABLED": "true",
    "CESAR_HOMEASSISTANT__DISCOVERY": "component",
    "CESAR_AUDIO__ALLOWED_HOSTS": '["127.0.0.1:9"]',
    "CESAR_AUDIO__DOWNLOAD_RETRIES": "0",
    "CESAR_WORKER__RETRIES": "1",
    "CESAR_WORKER__RETRY_DELAY": "0.1",
}
"""The settings that it was made with, as environment variables."""

_PREALLOCATED_BYTES = 1 << 18

Documents = dict[str, dict[int, dict[str, Any]]]
"""Tables by name, documents by id."""


def unpack(target: Path) -> Path:
    """Copy the data directory, with the room that its journal had taken in advance."""
    shutil.copytree(FOLDER / "data", target)
    journal = target / "ledger.json.journal"
    journal.write_bytes(journal.read_bytes().ljust(_PREALLOCATED_BYTES, b"\0"))
    return target


def retained() -> dict[str, str]:
    """What the broker retained, by topic."""
    messages = json.loads((FOLDER / "retained.json").read_text(encoding="utf-8"))
    return {message["topic"]: message["payload"] for message in messages}


def documents(data_dir: Path) -> Documents:
    """The tables of a data directory: stock TinyDB reads the checkpoint, and the journal's lines are applied to it."""
    with TinyDB(data_dir / "ledger.json", access_mode="r") as stock:
        names = stock.tables() - {"checkpoint", "checksum"}
        found: Documents = {name: {row.doc_id: dict(row) for row in stock.table(name)} for name in names}
        transaction = next(iter(stock.table("checkpoint").all()))["transaction"]
    journal = data_dir / "ledger.json.journal"
    if not journal.exists():
        return found
    header, *lines = [json.loads(line[9:]) for line in journal.read_bytes().rstrip(b"\0").splitlines()]
    if header["cesar_journal"] != 1:
        raise ValueError(header)
    for number, _, changes in lines:
        for table, doc_id, fields, *dropped in changes if number > transaction else ():
            rows = found.setdefault(table, {})
            if fields is None:
                rows.pop(doc_id, None)
                continue
            document = {**rows.get(doc_id, {}), **fields}
            rows[doc_id] = {key: value for key, value in document.items() if key not in (dropped or [()])[0]}
    return found
