"""The commands that are front doors in a process of their own; for the main thread."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cesar_mqtt import logs
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import CesarError, ExitCode, ThreadDiedError
from cesar_mqtt.gateway.front_doors import FrontDoor, create_wyoming
from cesar_mqtt.monitoring.signals import StopSignals, handle_stop_signals
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES
from cesar_mqtt.protocol.topics import Topics

_TICK_S = 1.0


def run_inbox(
    settings: Settings,
    folders: Sequence[Path],
    fields: Mapping[str, Any],
    *,
    formats: Sequence[str] | None,
    by_path: bool,
) -> ExitCode:
    """Watch folders until a stop signal.

    Args:
        settings: all of them.
        folders: those of the command line, which replace the setting's.
        fields: settings of the inbox that the command line names.
        formats: of the transcripts; None: those of the settings.
        by_path: whether only the paths are sent.

    Raises:
        CesarError: a setting is wrong, the records are in use, or the broker refuses.
    """
    directories = tuple(Path.cwd() / folder.expanduser() for folder in folders)
    inbox = settings.inbox.model_copy(update={**fields, "directories": directories})
    output = settings.output.model_copy(update={"formats": tuple(formats)} if formats else {})

    def create() -> FrontDoor:
        from cesar_mqtt.gateway.inbox import Inbox  # noqa: PLC0415 - after the signals are handled

        return Inbox(
            inbox,
            output,
            settings.broker,
            Topics(settings.topic_prefix, settings.consumer.name),
            data_dir=settings.data_dir,
            by_path=by_path,
            max_bytes=min(settings.queue.max_payload_bytes, MAX_PACKET_BYTES),
        )

    return run_until_stopped(create)


def run_wyoming(settings: Settings, address: str | None) -> ExitCode:
    """Serve Wyoming until a stop signal; `address`: None: that of the settings. Raises CesarError."""
    wyoming = settings.wyoming.model_copy(update={} if address is None else {"listen": address})
    topics = Topics(settings.topic_prefix, settings.consumer.name)
    return run_until_stopped(lambda: create_wyoming(wyoming, settings.broker, topics))


def run_until_stopped(create: Callable[[], FrontDoor]) -> ExitCode:
    """Run a front door until a stop signal; a second signal ends the process at once. Raises CesarError."""
    problem = ""
    code: ExitCode = ExitCode.OK
    try:
        with handle_stop_signals() as stop:
            stop.on_forced = lambda _number: os._exit(stop.exit_code)
            door = create()
            try:
                door.start()
                _wait(door, stop)
            finally:
                door.close()
    except CesarError as exc:
        problem, code = f"cesar-mqtt: {exc}", exc.exit_code
    finally:
        logs.close(problem)
    return code


def _wait(door: FrontDoor, stop: StopSignals) -> None:
    while not stop.wait(_TICK_S):
        if door.refusal is not None:
            raise door.refusal
        if not door.alive:
            raise ThreadDiedError("Its thread ended unexpectedly.", "See the log for the reason, and start it again.")
