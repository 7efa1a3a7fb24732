"""The web page, its HTTP API and OpenAI's API: a client of the bus with an event loop of its own.

Its modules need the extra `web`: these functions import them, with a sentence where it is missing.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.errors import ConfigError, lacks

if TYPE_CHECKING:
    from cesar_mqtt.gateway.web.server import WebServer

_LIBRARIES = frozenset({"anyio", "argon2", "python_multipart", "sse_starlette", "starlette", "uvicorn"})


def create_server(settings: Settings, broker: BrokerSettings, **options: Any) -> "WebServer":
    """Return a `WebServer`, made of these arguments. Raises ConfigError as it does, and where the extra is missing."""
    try:
        from cesar_mqtt.gateway.web.server import WebServer  # noqa: PLC0415 - see above
    except ModuleNotFoundError as exc:
        raise _missing(exc) from exc
    return WebServer(settings, broker, **options)


def write_password(file: Path, password: str) -> None:
    """Write the hash of a password. Raises ConfigError: the file cannot be written, or the extra is missing."""
    try:
        from cesar_mqtt.gateway.web.passwords import write_password as write  # noqa: PLC0415 - see above
    except ModuleNotFoundError as exc:
        raise _missing(exc) from exc
    write(file, password)


def _missing(error: ModuleNotFoundError) -> Exception:
    if not lacks(error, *_LIBRARIES):
        return error
    return ConfigError(
        f"The web page needs {error.name}, which is not installed.",
        "Install it with pip install '.[web]' in the clone of cesar-mqtt.",
    )
