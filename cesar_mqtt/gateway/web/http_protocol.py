"""HTTP connections, bounded in number and time: no client may use up the files of the process.

Inside `serve` the ledger needs files as well. Everything runs on the thread of the event loop.
"""

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_MOST_CONNECTIONS = 600
_REQUEST_S = 30.0
"""How long the head of a request may take, from the end of the one before."""
_SILENT_S = 60.0
"""How long a client may send nothing in the middle of an upload."""
_LOOK_S = 5.0


def most_connections() -> int:
    """Return how many connections there may be: half of the files that this process may have open, at most."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if limit == resource.RLIM_INFINITY else min(_MOST_CONNECTIONS, limit // 2)


class BoundedProtocol(H11Protocol):
    """One connection. Where there are too many, the one that has waited longest without a request is closed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.asked_at = self._received_at = self.loop.time()
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            idle = [each for each in self.connections if isinstance(each, BoundedProtocol) and each.is_idle]
            min(idle, key=lambda each: each.asked_at, default=self).transport.abort()
        self._look = self.loop.call_later(_LOOK_S, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received_at = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.asked_at = self.loop.time()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether there is no request that has no response yet."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _close_if_silent(self) -> None:
        now = self.loop.time()
        is_late = self.is_idle and now - self.asked_at > _REQUEST_S
        is_silent = self.conn.their_state is h11.SEND_BODY and now - self._received_at > _SILENT_S
        if is_late or (is_silent and not self.flow.read_paused):
            self.transport.abort()
        else:
            self._look = self.loop.call_later(_LOOK_S, self._close_if_silent)
