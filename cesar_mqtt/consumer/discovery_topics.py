"""Which discovery topics this consumer has ever used and not yet withdrawn: a small file in the data directory.

Without it nobody would know what to withdraw after the mode, the discovery prefix or the name was changed: Home
Assistant warns of a withdrawal of what it does not know, so all that could be there is not simply withdrawn. Written
by the main thread.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)


class AnnouncedTopics:
    """The topics on which discovery messages may be retained.

    A file that cannot be read or written is no reason not to serve: what is stale then stays until `discovery remove`.
    """

    def __init__(self, path: Path, *, disk: Disk | None = None) -> None:
        """Name the file; it may be missing."""
        self._path = path
        self._disk = disk or Disk()
        self._topics: frozenset[str] = frozenset()

    def begin(self, topics: Iterable[str]) -> frozenset[str]:
        """Note on disk that these are used from now on, and return the others, which are stale."""
        self._topics = frozenset(topics)
        before = self._read()
        self._write(before | self._topics)
        return before - self._topics

    def settle(self) -> None:
        """Note that the broker has forgotten what was stale."""
        if self._topics:
            self._write(self._topics)

    def _read(self) -> frozenset[str]:
        try:
            document = json.loads(self._path.read_bytes())
            return frozenset(str(topic) for topic in document["topics"])
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, KeyError, TypeError) as exc:
            message = "%s cannot be read (%s): an earlier announcement to Home Assistant may stay"
            log.warning(message, self._path.name, exc, action="announced")
            return frozenset()

    def _write(self, topics: frozenset[str]) -> None:
        if topics == self._read():
            return
        try:
            self._disk.put(self._path, [json.dumps({"topics": sorted(topics)}, indent=1).encode()])
        except OSError as exc:
            message = "%s cannot be written (%s): a later change of how it is announced may leave an entry behind"
            log.warning(message, self._path.name, exc.strerror, action="announced")
