"""Under which topic prefixes and names a consumer has published, in a small file in the data directory.

After a change of `topic_prefix` or `consumer.name` the broker still retains the topics of before. The main thread of
`serve` records and warns; `discovery remove --all`, which may run beside it, clears them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.topics import Topics

log = get_logger(__name__)

FILE_NAME = "topics.json"
_KEPT = 16
"""More changes than these, without one removal, are not remembered."""


class EarlierTopics:
    """The topics that this consumer has used, the newest last. A file that cannot be read or written is only logged."""

    def __init__(self, path: Path, *, disk: Disk | None = None) -> None:
        """The file may be missing."""
        self._path = path
        self._disk = disk or Disk()

    def record(self, topics: Topics) -> None:
        """Record on disk that these topics are used from now on; warn of earlier ones."""
        earlier = self.others(topics)
        self._write([*earlier, topics])
        for other in earlier:
            message = (
                "The broker may still retain the topics of the consumer '%s' below %s/, from an earlier start: "
                "`cesar-mqtt discovery remove --all` clears them"
            )
            log.warning(message, other.consumer, other.prefix, action="earlier_topics")

    def others(self, topics: Topics) -> list[Topics]:
        """Return the topics that were used, without these."""
        return [each for each in self._read() if each != topics]

    def remove(self, cleared: Iterable[Topics]) -> None:
        """Record on disk that the broker retains nothing of these topics."""
        gone = set(cleared)
        kept = self._read()
        if gone & set(kept):
            self._write([each for each in kept if each not in gone])

    def _read(self) -> list[Topics]:
        try:
            return [Topics(str(prefix), str(name)) for prefix, name in json.loads(self._path.read_bytes())["used"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as exc:
            message = "%s cannot be read (%s): topics of an earlier prefix or name may stay"
            log.warning(message, self._path.name, exc, action="earlier_topics")
            return []

    def _write(self, used: list[Topics]) -> None:
        document = {"used": [[each.prefix, each.consumer] for each in used[-_KEPT:]]}
        try:
            self._disk.put(self._path, [json.dumps(document, indent=1).encode()])
        except OSError as exc:
            message = "%s cannot be written (%s): after a change of prefix or name, old topics may stay"
            log.warning(message, self._path.name, exc.strerror, action="earlier_topics")
