"""The flags that commands share, and the settings that they make; for the main thread.

Nothing heavy is imported here: `--help` answers at once.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cesar_mqtt.cli.console import print_message

if TYPE_CHECKING:
    from cesar_mqtt.config import Settings

Command = Callable[..., int]

_BARE_FLAGS: Mapping[str, str] = {"--web": "127.0.0.1:8188", "--wyoming": "127.0.0.1:10300"}
"""Flags whose value may be left out, and what it then is."""


def complete_model(incomplete: str) -> list[str]:
    """Complete the name of a model that can be downloaded."""
    from cesar_mqtt.whisper.hub import REPOSITORIES  # noqa: PLC0415 - see above

    return [name for name in REPOSITORIES if name.startswith(incomplete)]


# Each flag that is a setting, by its parameter's name: the setting's dotted name and the flag's type.
_FLAGS: Mapping[str, tuple[str, Any]] = {
    "broker": (
        "broker.url",
        Annotated[
            str | None,
            typer.Option(metavar="URL", help="mqtt[s]://[user[:password]@]host[:port], ws[s]://... or embedded."),
        ],
    ),
    "topic_prefix": (
        "topic_prefix",
        Annotated[str | None, typer.Option(metavar="P", help="The prefix of all topics (default: cesar).")],
    ),
    "data_dir": (
        "data_dir",
        Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of the ledger and the spool.")],
    ),
    "audio_dir": (
        "audio.directories",
        Annotated[
            list[Path] | None, typer.Option(metavar="DIR", help="Where audio_path is looked up; may be repeated.")
        ],
    ),
    "model": (
        "models.default",
        Annotated[
            str | None,
            typer.Option(
                metavar="NAME",
                autocompletion=complete_model,
                help="The model of jobs that name none.",
            ),
        ],
    ),
    "name": (
        "consumer.name",
        Annotated[
            str | None,
            typer.Option(metavar="NAME", help="The consumer's name and MQTT client id (default: cesar)."),
        ],
    ),
    "inbox": (
        "inbox.directories",
        Annotated[
            list[Path] | None,
            typer.Option(metavar="DIR", help="Submit each recording that is put there; may be repeated."),
        ],
    ),
    "output_dir": (
        "output.directory",
        Annotated[Path | None, typer.Option(metavar="DIR", help="Write each finished transcript there, as a file.")],
    ),
    "move_to": (
        "inbox.move_to",
        Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="Move each recording of a watch folder there once it is transcribed."),
        ],
    ),
    "discovery_prefix": (
        "homeassistant.prefix",
        Annotated[
            str | None, typer.Option(metavar="P", help="The prefix of discovery topics (default: homeassistant).")
        ],
    ),
    "web": (
        "web.listen",
        Annotated[
            str | None,
            typer.Option(metavar="[HOST:PORT]", help="Serve the web page, by default on 127.0.0.1:8188."),
        ],
    ),
    "wyoming": (
        "wyoming.listen",
        Annotated[
            str | None,
            typer.Option(metavar="[HOST:PORT]", help="Serve speech-to-text for Assist, by default on 127.0.0.1:10300."),
        ],
    ),
    "log_format": ("log.format", Annotated[str | None, typer.Option(metavar="text|json")]),
    "log_level": (
        "log.level",
        Annotated[str | None, typer.Option(metavar="L", help="debug, info, warning or error.")],
    ),
}
_CONFIG = Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file (default: ./cesar.toml if it exists).")]

# Every command accepts these, so that a script can pass them everywhere. Where one has no effect it is hidden.
_EVERYWHERE: Mapping[str, Any] = {
    "broker": Annotated[str | None, typer.Option("--broker", metavar="URL", hidden=True)],
    "topic_prefix": Annotated[str | None, typer.Option("--topic-prefix", metavar="P", hidden=True)],
    "config": Annotated[Path | None, typer.Option("--config", metavar="FILE", hidden=True)],
}


class ServeCommand(TyperCommand):
    """A command without arguments, some of whose flags need no value; typer knows no such flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the value of each flag in `_BARE_FLAGS` that has none."""
        following = [*args[1:], "-"][: len(args)]
        whole = [
            f"{word}={_BARE_FLAGS[word]}" if word in _BARE_FLAGS and after.startswith("-") else word
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, whole)


def takes_settings(*flags: str, serving: bool = False, logs: bool = False) -> Callable[[Command], Command]:
    """Give a command flags that are settings, and pass it the settings as its first argument.

    Args:
        flags: names in `_FLAGS`; `--config` comes with them.
        serving: for `serve`: see `load`.
        logs: see `load`.
    """

    def decorate(command: Command) -> Command:
        def run(**arguments: Any) -> int:
            values = {_FLAGS[name][0]: arguments.pop(name) for name in flags}
            config = arguments.pop("config")
            return command(load(values, config, serving=serving, logs=logs), **_without_hidden(arguments, flags))

        shown = {name: _FLAGS[name][1] for name in flags} | {"config": _CONFIG}
        return _with_parameters(run, command, list(inspect.signature(command).parameters.values())[1:], shown)

    return decorate


def takes_no_settings(command: Command) -> Command:
    """Let a command that reads no settings accept, and ignore, the flags that every command accepts."""

    def run(**arguments: Any) -> int:
        return command(**_without_hidden(arguments, ()))

    return _with_parameters(run, command, list(inspect.signature(command).parameters.values()), {})


def load(values: Mapping[str, Any], config: Path | None, *, serving: bool = False, logs: bool = False) -> "Settings":
    """Read the settings as `config.load_settings` does, with the flags' values by dotted name.

    Args:
        values: None and empty lists count as not given.
        config: the file of `--config`.
        serving: the embedded broker is the default, and the log is set up; else the default is the broker on this
            machine.
        logs: whether the log is set up for other commands; else warnings go to the terminal.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    from cesar_mqtt import logs as log  # noqa: PLC0415 - see above
    from cesar_mqtt.config import EMBEDDED_BROKER, LOCAL_BROKER, load_settings, nest  # noqa: PLC0415 - see above

    warnings: list[str] = []
    settings = load_settings(
        flags=nest(values),
        config_file=config,
        cwd=Path.cwd(),
        default_broker=EMBEDDED_BROKER if serving else LOCAL_BROKER,
        on_warning=warnings.append,
    )
    logs = logs or serving
    if logs:
        log.configure(settings.log.format, settings.log.level, queued=True)
    for warning in warnings:
        if logs:
            log.get_logger(__name__).warning("%s", warning, action="setting_ignored")
        else:
            print_message(warning)
    return settings


def _without_hidden(arguments: dict[str, Any], flags: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in flags or name not in _EVERYWHERE}


def _with_parameters(run: Command, command: Command, own: list[inspect.Parameter], shown: Mapping[str, Any]) -> Command:
    """Make `run` look like `command` with the further flags, for typer reads signature and annotations."""
    flags = {**shown, **{name: flag for name, flag in _EVERYWHERE.items() if name not in shown}}
    keyword = inspect.Parameter.KEYWORD_ONLY
    further = [inspect.Parameter(name, keyword, default=None, annotation=flags[name]) for name in flags]
    parameters = [*own, *further]
    run.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
