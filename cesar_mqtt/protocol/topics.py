"""The topics of the contract under one prefix. Pure values; any thread may use them."""

import re
from dataclasses import dataclass

JOB_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
"""Safe as one level of a topic in every broker and inside Home Assistant's entity ids."""

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OWN_LEVELS = ("jobs", "audio", "request", "status", "result", "segments", "events", "rejected", "consumer")
"""The level after the prefix of each topic that a consumer subscribes or publishes to, except responses."""


def is_job_id(text: str) -> bool:
    """Whether `text` may be the id of a job (and so one level of a topic)."""
    return _JOB_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of the consumer named `consumer` under `prefix`."""

    prefix: str
    consumer: str

    @property
    def jobs(self) -> str:
        """Where producers publish requests."""
        return f"{self.prefix}/jobs"

    @property
    def audio_filter(self) -> str:
        """The subscription for audio files; `#`, so that a topic with an invalid id is rejected instead of missed."""
        return f"{self.prefix}/audio/#"

    @property
    def rejected(self) -> str:
        """Where rejections are published, not retained."""
        return f"{self.prefix}/rejected"

    @property
    def events(self) -> str:
        """Where each change of a job is published, not retained."""
        return f"{self.prefix}/events"

    def audio(self, job_id: str) -> str:
        """Where a producer publishes the bytes of the audio of one job."""
        return f"{self.prefix}/audio/{job_id}"

    def audio_job_id(self, topic: str) -> str | None:
        """Return what `topic` has in place of the job id (not checked); None: not an audio topic."""
        return self._below("audio", topic)

    def is_submission(self, topic: str) -> bool:
        """Whether messages on `topic` submit jobs."""
        return topic == self.jobs or self.audio_job_id(topic) is not None

    def is_own(self, topic: str) -> bool:
        """Whether a message on `topic` would be read as a request, or as published by the consumer."""
        return any(self._below(name, topic) is not None for name in _OWN_LEVELS)

    def status(self, job_id: str) -> str:
        """The retained status of one job."""
        return f"{self.prefix}/status/{job_id}"

    def result(self, job_id: str, name: str) -> str:
        """The retained result of one job as the file `name`, one of the contract's formats."""
        return f"{self.prefix}/result/{job_id}/{name}"

    def segments(self, job_id: str) -> str:
        """Where the segments of one job are published as soon as they are known, not retained."""
        return f"{self.prefix}/segments/{job_id}"

    @property
    def request_filter(self) -> str:
        """The subscription for commands; `#`, so that an unknown command is answered, too."""
        return f"{self.prefix}/request/#"

    def request_command(self, topic: str) -> str | None:
        """Return what `topic` has in place of the command (not checked); None: not a request topic."""
        return self._below("request", topic)

    def response(self, command: str) -> str:
        """Where the response to a command is published, not retained."""
        return f"{self.prefix}/response/{command}"

    def _below(self, name: str, topic: str) -> str | None:
        """Return what follows `name/` in a topic; empty if nothing does, for `#` matches the level above, too."""
        head = f"{self.prefix}/{name}"
        if topic == head:
            return ""
        return topic[len(head) + 1 :] if topic.startswith(f"{head}/") else None

    def own(self, name: str) -> str:
        """A retained topic about the consumer itself: `state`, `queue`, `last`, `last_error`."""
        return f"{self.prefix}/consumer/{self.consumer}/{name}"


def matches_filter(topic: str, topic_filter: str) -> bool:
    """Whether a topic matches a filter (MQTT 5, section 4.7); `#` matches the level above it as well."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(one in ("+", level) for one, level in zip(wanted, levels, strict=True))
