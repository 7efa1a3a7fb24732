"""Under which topic prefixes and names a consumer has published, and whether on the embedded broker, in a small file.

The file is in the data directory. After a change of `topic_prefix` or `consumer.name` the broker still retains the
topics of before. The main thread of `serve` records and warns; `discovery remove --all`, which may run beside it,
clears them.
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

    def record(self, topics: Topics, *, embedded: bool = False, jobs: int = 0) -> None:
        """Record on disk what is used from now on; warn of earlier topics, and of jobs that follow to another broker.

        Args:
            topics: of the consumer.
            embedded: whether the broker is the embedded one, which is for trials.
            jobs: how many jobs the ledger holds.
        """
        earlier, was_embedded = self.others(topics), self._read()[1]
        self._write([*earlier, topics], embedded=embedded)
        if was_embedded and not embedded and jobs:
            message = (
                "The data directory %s holds jobs of an earlier start with the embedded broker (%d): those in the "
                "queue run now, and the statuses of all are published to this broker. To leave them behind, stop and "
                "give another --data-dir"
            )
            log.warning(message, self._path.parent, jobs, action="earlier_broker")
        for other in earlier:
            message = (
                "The broker may still retain the topics of the consumer '%s' below %s/, from an earlier start: "
                "`cesar-mqtt discovery remove --all` clears them"
            )
            log.warning(message, other.consumer, other.prefix, action="earlier_topics")

    def others(self, topics: Topics) -> list[Topics]:
        """Return the topics that were used, without these."""
        return [each for each in self._read()[0] if each != topics]

    def remove(self, cleared: Iterable[Topics]) -> None:
        """Record on disk that the broker retains nothing of these topics."""
        gone = set(cleared)
        kept, embedded = self._read()
        if gone & set(kept):
            self._write([each for each in kept if each not in gone], embedded=embedded)

    def _read(self) -> tuple[list[Topics], bool]:
        """Return the topics, and whether the last broker was the embedded one."""
        try:
            document = json.loads(self._path.read_bytes())
            used = [Topics(str(prefix), str(name)) for prefix, name in document["used"]]
            return used, document.get("embedded") is True
        except FileNotFoundError:
            return [], False
        except (OSError, ValueError, KeyError, TypeError) as exc:
            message = "%s cannot be read (%s): topics of an earlier prefix or name may stay"
            log.warning(message, self._path.name, exc, action="earlier_topics")
            return [], False

    def _write(self, used: list[Topics], *, embedded: bool) -> None:
        document = {"used": [[each.prefix, each.consumer] for each in used[-_KEPT:]], "embedded": embedded}
        try:
            self._disk.put(self._path, [json.dumps(document, indent=1).encode()])
        except OSError as exc:
            message = "%s cannot be written (%s): after a change of prefix or name, old topics may stay"
            log.warning(message, self._path.name, exc.strerror, action="earlier_topics")
