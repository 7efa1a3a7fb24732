"""Which Response Topics of MQTT 5 the consumer publishes on. Pure values; any thread may use them.

The consumer publishes there with its own rights at the broker, and a request with few rights names the topic: without a
restriction a producer could write wherever the consumer may.
"""

from collections.abc import Sequence

from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.topics import Topics, matches_filter

_NOT_IN_A_NAME = frozenset("+#\0")


class ResponseTopics:
    """The Response Topics that are allowed."""

    def __init__(self, topics: Topics, *, allowed: Sequence[str] | None = None, discovery_prefix: str) -> None:
        """Take what is allowed and what never is.

        Args:
            topics: the consumer's own are never allowed.
            allowed: topic filters (`security.response_topics`); None: `response/#` and `replies/#` below the prefix.
            discovery_prefix: Home Assistant acts on every message below it, so nothing there is ever allowed.
        """
        default = f"{topics.prefix}/response/#", f"{topics.prefix}/replies/#"
        self._filters = tuple(default if allowed is None else allowed)
        self._topics = topics
        self._discovery_prefix = discovery_prefix
        self._command_responses = frozenset(map(topics.response, COMMANDS))

    def problem(self, topic: str) -> str | None:
        """Return why the consumer does not publish on this Response Topic; None: it does."""
        if not topic or not _NOT_IN_A_NAME.isdisjoint(topic):
            return "it is no topic name"
        if topic.startswith("$"):
            return "topics that begin with $ belong to the broker"
        if f"{topic}/".startswith(f"{self._discovery_prefix}/"):
            return "it is below the discovery prefix of Home Assistant"
        if self._topics.is_own(topic) or topic in self._command_responses:
            return "it is one of the consumer's own topics"
        if not any(matches_filter(topic, each) for each in self._filters):
            return "security.response_topics does not allow it"
        return None
