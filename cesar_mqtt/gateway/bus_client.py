"""What the front doors have in common: a thread beside a bus of its own. Any thread may call the methods."""

from cesar_mqtt.errors import BrokerRefusedError
from cesar_mqtt.gateway.bus import Bus
from cesar_mqtt.threads import StoppableThread


class BusClient(StoppableThread):
    """A thread, and the thread of its bus, which hands it what arrives.

    A subclass makes `_bus`, and closes in `_release` what both threads use.
    """

    _bus: Bus

    @property
    def refusal(self) -> BrokerRefusedError | None:
        """Why the broker refused the connection, for good; None: it did not."""
        return self._bus.refusal

    def start(self) -> None:
        self._bus.start()
        super().start()

    def close(self) -> None:
        """End both threads; what is not finished goes on at the next start. May be called twice, and before `start`."""
        self.request_stop()
        self._bus.close()
        self.join()
        self._release()

    def _release(self) -> None:
        """Close what the threads have used; called at each `close`."""
