"""The server of the page: it owns the thread `web` with the event loop, and everything that runs there.

`serve` and `web` build one and start it; any thread may call the methods.
"""

import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import BrokerRefusedError, ConfigError
from cesar_mqtt.gateway.address import open_port
from cesar_mqtt.gateway.address import parse_address as parse_host_and_port
from cesar_mqtt.gateway.web.access import AccessRules, access_rules
from cesar_mqtt.gateway.web.app import WebApp
from cesar_mqtt.gateway.web.http_protocol import BoundedProtocol
from cesar_mqtt.gateway.web.passwords import Password
from cesar_mqtt.gateway.web.upload_store import UploadStore
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.topics import Topics
from cesar_mqtt.threads import StoppableThread

log = get_logger(__name__)

DEFAULT_ADDRESS = "127.0.0.1:8188"

_GRACE_S = 3
"""How long a stop waits for requests in progress."""
_STOP_S = 6.0


class WebServer(StoppableThread):
    """The page on one address.

    Attributes:
        url: where it is, for people.
    """

    def __init__(
        self,
        settings: Settings,
        broker: BrokerSettings,
        *,
        uploads: Path | None = None,
        is_needed: Callable[[str], bool | None] = lambda _job_id: None,
        has_ended: Callable[[str], bool] = lambda _job_id: False,
        check_room: Callable[[int], None] = lambda _bytes: None,
        metrics: Callable[[], bytes] = bytes,
    ) -> None:
        """Open the port.

        Args:
            settings: those of `web`, the topics and the limits.
            broker: how to reach the broker.
            uploads: the folder for uploads, in which the consumer of this process looks for audio; None: there is no
                consumer in this process, and they are sent as messages.
            is_needed: whether a job still needs its upload; None: there is no such job.
            has_ended: whether a job is final.
            check_room: raises SpoolFullError where so many bytes more cannot be stored.
            metrics: what `/metrics` returns beside the page's own numbers.

        Raises:
            ConfigError: a setting is wrong, or the port is taken.
        """
        super().__init__("web")
        host, port = parse_address(settings.web.listen or DEFAULT_ADDRESS)
        rules = rules_of(settings)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._store: UploadStore | None = None
        self._folder = uploads or Path()
        try:
            if uploads is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="cesar-mqtt-web-")
                self._folder = Path(self._temporary.name)
            else:
                self._store = UploadStore(uploads, is_needed=is_needed, has_ended=has_ended, check_room=check_room)
        except OSError as exc:
            raise ConfigError(f"The folder for uploads cannot be created: {exc.strerror}") from exc
        self._socket = open_port(host, port, setting="web.listen")
        self.url = settings.web.url or url_of(host, self._socket.getsockname()[1])
        self._app = WebApp(
            Topics(settings.topic_prefix, settings.consumer.name),
            broker,
            rules,
            folder=self._folder,
            store=self._store,
            max_payload_bytes=settings.queue.max_payload_bytes,
            metrics=metrics,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app.asgi,
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws="none",
                http=BoundedProtocol,
                loop="asyncio",
                timeout_graceful_shutdown=_GRACE_S,
            )
        )

    @property
    def stored_bytes(self) -> int:
        """The size of all uploads in the folder."""
        return 0 if self._store is None else self._store.used_bytes

    @property
    def refusal(self) -> BrokerRefusedError | None:
        """Why the broker does not let the page connect; None: it does."""
        return self._app.bus.refusal

    def close(self) -> None:
        """End the event streams, finish the requests in progress and close the port; may be called twice."""
        self.stop(_STOP_S)
        self._socket.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _wake(self) -> None:
        self._server.should_exit = True
        loop = self._app.loop
        if loop is not None:
            with suppress(RuntimeError):  # it is closed already
                loop.call_soon_threadsafe(self._app.close_streams)

    def _run(self) -> None:
        log.info("The page is on %s", self.url, action="web")
        self._server.run(sockets=[self._socket])


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `web.listen`. Raises ConfigError."""
    return parse_host_and_port(text, setting="web.listen", default=DEFAULT_ADDRESS)


def rules_of(settings: Settings) -> AccessRules:
    """Return who may use the page. Raises ConfigError."""
    web = settings.web
    password = None if web.password_file is None else Password(web.password_file)
    host, _ = parse_address(web.listen or DEFAULT_ADDRESS)
    return access_rules(
        host,
        password=password,
        proxies=web.trusted_proxies,
        hosts=web.hosts,
        proxies_authenticate=web.trusted_proxies_authenticate,
    )


def url_of(host: str, port: int) -> str:
    """Return the address of the page, with this machine's name where it listens on all addresses."""
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not listened on
        host = socket.gethostname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
