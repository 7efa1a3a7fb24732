"""Transcripts in any format, from the consumer that owns the job, else as the broker retains them.

Everything runs on the thread of the event loop, except the wait for a retained message.
"""

import time

from anyio.to_thread import run_sync

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import CesarError
from cesar_mqtt.gateway.session import Session
from cesar_mqtt.gateway.web.board import Board, Document
from cesar_mqtt.gateway.web.bus_link import BusLink
from cesar_mqtt.gateway.web.problems import ProblemError
from cesar_mqtt.mqtt.messages import Subscription
from cesar_mqtt.protocol.topics import Topics

_RETAINED_S = 2.0
"""Retained messages follow a subscription at once."""


class Results:
    """Reads transcripts."""

    def __init__(self, board: Board, bus: BusLink, topics: Topics, broker: BrokerSettings) -> None:
        self._board = board
        self._bus = bus
        self._topics = topics
        self._broker = broker

    def status(self, job_id: str) -> Document:
        """Return what is known of a job. Raises ProblemError: there is none of this id."""
        status = self._board.status(job_id)
        if status is None:
            raise ProblemError(404, f"There is no job {job_id}: it never existed, or it was deleted.", "not_found")
        return status

    async def whole_status(self, job_id: str) -> Document:
        """Return the status of a job with its text, from the consumer if it is not kept here."""
        status = self.status(job_id)
        return (
            await self._bus.ask("get", {"job_id": job_id}, consumer=owner(status)) if "is_dropped" in status else status
        )

    async def text(self, job_id: str) -> str:
        """Return the whole transcript of a completed job."""
        status = await self.whole_status(job_id)
        if status.get("result_truncated"):
            return (await self.file(job_id, "txt")).decode(errors="replace").strip()
        return str(status.get("result_text") or "")

    async def file(self, job_id: str, name: str) -> bytes:
        """Return the transcript of a completed job in a format.

        Raises:
            ProblemError: the job is not completed, the times were not stored, or no folder has the file now.
        """
        status = self.status(job_id)
        if status.get("status") != "completed":
            raise ProblemError(
                409, f"Job {job_id} is {status.get('status')}: only a completed one has a result.", "not_completed"
            )
        consumer = self._board.consumers.get(owner(status))
        if consumer is not None and consumer.online:
            return await self._pages(job_id, name, consumer.name)
        if name in (status.get("formats") or ()):
            retained = await run_sync(self._retained, self._topics.result(job_id, name))
            if retained is not None:
                return retained
        if name == "txt" and "is_dropped" not in status and not status.get("result_truncated"):
            return f"{status.get('result_text') or ''}\n".encode(errors="replace")
        raise ProblemError(503, f"Consumer {owner(status)}, which has this transcript, is offline.", "consumer_offline")

    async def _pages(self, job_id: str, name: str, consumer: str) -> bytes:
        pages: list[bytes] = []
        offset, more = 0, True
        while more:
            page = await self._bus.ask(
                "result", {"job_id": job_id, "format": name, "offset": offset}, consumer=consumer
            )
            pages.append(str(page["text"]).encode(errors="replace"))
            offset += int(page["length"])
            more = bool(page["more"]) and bool(pages[-1])
        return b"".join(pages)

    def _retained(self, topic: str) -> bytes | None:
        """Wait a moment for a retained message, over a connection of its own."""
        wanted = [Subscription(topic, wants_retained=True)]
        try:
            with Session(self._broker, "web-result", wanted) as session:
                session.connect(_RETAINED_S)
                deadline = time.monotonic() + _RETAINED_S
                while (left_s := deadline - time.monotonic()) > 0:
                    for delivery in session.receive(left_s):
                        if delivery.topic == topic and delivery.payload:
                            return delivery.payload
        except CesarError:
            return None
        return None


def owner(status: Document) -> str:
    """Return the name of the consumer that has a job."""
    return str(status.get("consumer") or "")
