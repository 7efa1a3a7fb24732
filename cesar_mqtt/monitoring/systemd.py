"""Notifications to systemd (sd_notify(3)); without systemd every call does nothing.

Any thread may call it; each call sends one datagram and takes a second at most.
"""

import os
import socket
from collections.abc import Mapping

_TIMEOUT_S = 1.0
"""A service manager that does not read must not hold up the main thread."""


class Notifier:
    """Sends the state of this process to the service manager. The methods return False when it was not sent.

    Args:
        environ: where NOTIFY_SOCKET is looked up, once.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL of Linux's abstract sockets, which have no file.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self) -> bool:
        """Notify that start-up is complete."""
        return self._send("READY=1")

    def stopping(self) -> bool:
        """Notify that the service has begun to stop."""
        return self._send("STOPPING=1")

    def alive(self) -> bool:
        """Reset the watchdog; called every second, whatever its timeout is."""
        return self._send("WATCHDOG=1")

    def _send(self, state: str) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(_TIMEOUT_S)
                channel.sendto(state.encode("ascii"), self._address)
        except OSError:
            return False  # the consumer works without a service manager
        return True
