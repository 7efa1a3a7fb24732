"""`web`: the page in a process of its own. For the main thread."""

from pathlib import Path

import typer

from cesar_mqtt import logs
from cesar_mqtt.cli.console import print_message
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode, ThreadDiedError
from cesar_mqtt.gateway import web
from cesar_mqtt.monitoring.signals import handle_stop_signals

_TICK_S = 1.0


def serve(settings: Settings, address: str | None) -> int:
    """Serve the page until a signal asks to stop.

    Raises:
        ConfigError: a setting is wrong, or the port is taken.
        BrokerRefusedError: the broker refused the credentials.
        ThreadDiedError: the server ended unexpectedly.
    """
    logs.configure(settings.log.format, settings.log.level)
    if address is not None:
        settings = settings.model_copy(update={"web": settings.web.model_copy(update={"listen": address})})
    with handle_stop_signals() as stop:
        server = web.create_server(settings, settings.broker)
        server.start()
        try:
            while not stop.wait(_TICK_S):
                if server.refusal is not None:
                    raise server.refusal
                if not server.alive:
                    raise ThreadDiedError("The web server ended unexpectedly.", "See the log for the reason.")
        finally:
            server.close()
        return stop.exit_code if stop.is_forced() else ExitCode.OK


def set_password(file: Path) -> int:
    """Ask for a password twice and write its hash. Raises ConfigError."""
    password = typer.prompt("Password", hide_input=True, err=True, confirmation_prompt=True)
    web.write_password(file, password)
    print_message(f"The password is in {file}: name it in web.password_file.")
    return ExitCode.OK
