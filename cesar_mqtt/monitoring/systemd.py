"""Telling systemd how the service is (sd_notify(3)); without systemd every call does nothing.

Any thread may call it; each call sends one datagram and takes a second at most.
"""

import os
import socket
from collections.abc import Mapping

_TIMEOUT_S = 1.0


class Notifier:
    """The line to the service manager, from the variables that it set for this process.

    Args:
        environ: where NOTIFY_SOCKET is looked up, once.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL of Linux's abstract sockets, which have no file.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self) -> bool:
        """Say that start-up is over. All three return False when nobody was told."""
        return self._send("READY=1")

    def stopping(self) -> bool:
        """Say that the service has begun to stop."""
        return self._send("STOPPING=1")

    def alive(self) -> bool:
        """Say that work goes on, so that the watchdog does not end the process; every second, whatever it allows."""
        return self._send("WATCHDOG=1")

    def _send(self, state: str) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(_TIMEOUT_S)
                channel.sendto(state.encode("ascii"), self._address)
        except OSError:
            return False  # a manager that cannot be told is no reason to stop transcribing
        return True
