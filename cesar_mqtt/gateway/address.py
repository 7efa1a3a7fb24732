"""The address that a front door listens on. Any thread may call these functions."""

import socket

from cesar_mqtt.errors import ConfigError

_LAST_PORT = 65_535
_BACKLOG = 128


def parse_address(text: str, *, setting: str, default: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, `[::1]:8188`, a host or a port alone.

    Args:
        text: what is set.
        setting: its name, for the error.
        default: `HOST:PORT`, for the part that is left out.

    Raises:
        ConfigError: it is none of these.
    """
    default_host, _, default_port = default.rpartition(":")
    host, separator, port = text.rpartition(":")
    if not separator:
        host, port = (default_host, text) if text.isdigit() else (text, default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or int(port[:6]) > _LAST_PORT:
        raise ConfigError(f"{setting} is {text!r}: it must be HOST:PORT, such as {default}")
    return host, int(port)


def open_port(host: str, port: int, *, setting: str) -> socket.socket:
    """Listen on an address. Raises ConfigError that names the setting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise ConfigError(
            f"{setting} {host}:{port} cannot be opened: {exc.strerror or exc}. Choose another address."
        ) from exc
