"""The command line: reads flags, calls what does the work, and turns errors into one sentence and an exit code.

Heavy modules are imported by the command that needs them: `--help` has to answer at once.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cesar_mqtt.cli import client_commands as commands
from cesar_mqtt.cli import console as terminal
from cesar_mqtt.cli import local_commands as subcommands
from cesar_mqtt.cli.options import Broker, Config, DataDir, NoBroker, NoConfig, NoPrefix, Prefix
from cesar_mqtt.cli.options import load as _settings
from cesar_mqtt.errors import CesarError, ExitCode

# As `formats` and `messages` have them, which are too heavy to be imported here.
_FORMATS = ("txt", "srt", "vtt", "tsv", "json")
_TASKS = ("transcribe", "translate")

app = typer.Typer(
    name="cesar-mqtt",
    help="A durable, offline transcription worker on MQTT: publish audio, subscribe to the transcript.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code and has told the user on stderr what went wrong."""
    terminal.open_closed()
    code: int = ExitCode.OK
    try:
        code = _run(arguments)
        terminal.settle()
    except terminal.OutputError as exc:
        terminal.say(str(exc))
        return code or exc.exit_code
    return code


def _run(arguments: list[str] | None) -> int:
    try:
        result = app(arguments, standalone_mode=False)
    except CesarError as exc:
        terminal.say(str(exc))
        return exc.exit_code
    except SystemExit as exc:
        if isinstance(exc.__context__, BrokenPipeError):  # whoever read has enough; typer makes a failure of that
            return ExitCode.OK
        raise
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        terminal.say(f"Nothing more can be written: {exc.strerror}.")
        return ExitCode.FAILED
    except Exception as exc:
        if not hasattr(exc, "show"):  # click's own errors can show themselves
            raise
        with suppress(OSError):
            exc.show()
        return int(getattr(exc, "exit_code", ExitCode.USAGE))
    return result if isinstance(result, int) else ExitCode.OK


def _version(value: bool) -> None:  # noqa: FBT001 - typer's way
    if value:
        from cesar_mqtt import __version__

        terminal.out(f"cesar-mqtt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    *,
    broker: Broker = None,
    data_dir: DataDir = None,
    audio_dir: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Where audio_path is looked up; may be repeated.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model of jobs that name none.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="This consumer's name and MQTT client id.")] = None,
    topic_prefix: Prefix = None,
    config: Config = None,
    log_format: Annotated[str | None, typer.Option(metavar="text|json")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="L", help="debug, info, warning or error.")] = None,
) -> int:
    """Run the consumer: take jobs from the broker, transcribe them one at a time, publish their statuses."""
    flags = {
        "topic_prefix": topic_prefix,
        "data_dir": data_dir,
        "broker": {"url": broker},
        "consumer": {"name": name},
        "audio": {"directories": audio_dir},
        "models": {"default": model},
        "log": {"format": log_format, "level": log_level},
    }
    settings = _settings(flags, config, serving=True)

    from cesar_mqtt import logs
    from cesar_mqtt.monitoring.signals import handle_stop_signals

    logs.configure(settings.log.format, settings.log.level)
    with handle_stop_signals() as stop:
        from cesar_mqtt.service import Service

        service = Service(settings, directory=Path.cwd())
        try:
            code = service.run(stop)
        except CesarError as exc:
            terminal.say(str(exc))
            code = exc.exit_code
    if code is not ExitCode.OK:
        # The worker's thread may be inside the model, which cannot be interrupted: nothing waits for it.
        os._exit(code)
    return code


@app.command()
def submit(
    audio: Annotated[list[str], typer.Argument(metavar="AUDIO...", help="The recordings; - is stdin.")],
    *,
    by_path: Annotated[
        bool,
        typer.Option(
            "--by-path",
            help="Send only the paths, for files that the consumer can read; "
            "a relative one is looked up in its audio.directories.",
        ),
    ] = False,
    job_id: Annotated[str | None, typer.Option(metavar="ID", help="The job's id; for one recording only.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Such as de; detected when left out.")] = None,
    task: Annotated[str | None, typer.Option(metavar="|".join(_TASKS), autocompletion=lambda: _TASKS)] = None,
    result_format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="|".join(_FORMATS),
            autocompletion=lambda: _FORMATS,
            help="Print such a file instead of the transcript; of several recordings, one file after the other.",
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job ids and leave.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="S", min=0, help="Seconds to wait (exit 3).")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print each job's status as a JSON object; with --format, the file is its field result: "
            "of --format json the object in it, else text.",
        ),
    ] = False,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Send recordings to a consumer, wait, and print their transcripts.

    Exit code 0: all completed; 1: at least one did not, or its file did not come; 3: the time ran out.
    """
    from cesar_mqtt.cli.submit import SubmitOptions, submit_and_wait
    from cesar_mqtt.protocol.topics import is_job_id

    if job_id is not None and (len(audio) > 1 or not is_job_id(job_id)):
        raise typer.BadParameter("it takes one recording and 1 to 64 of A-Z, a-z, 0-9, _ and -", param_hint="--job-id")
    if result_format and (len(result_format) > 1 or result_format[0] not in _FORMATS):
        raise typer.BadParameter(f"it takes one of {', '.join(_FORMATS)}", param_hint="--format")
    if task is not None and task not in _TASKS:
        raise typer.BadParameter(f"{task!r} is none of {', '.join(_TASKS)}", param_hint="--task")
    flags = {"topic_prefix": topic_prefix, "broker": {"url": broker}}
    settings = _settings(flags, config)
    options = {"model_size": model, "language": language, "task": task}
    order = SubmitOptions(
        recordings=tuple(audio),
        by_path=by_path,
        job_id=job_id,
        options={field: value for field, value in options.items() if value is not None},
        result_format=result_format[0] if result_format else None,
        wait=not no_wait,
        timeout_s=timeout,
        as_json=as_json,
    )
    return submit_and_wait(order, settings)


@app.command()
def demo(*, _broker: NoBroker = None, _topic_prefix: NoPrefix = None, _config: NoConfig = None) -> int:
    """Show the whole way in one process, with no set-up: broker, consumer, a recording, its transcript."""
    from cesar_mqtt.cli import demo as demonstration

    return demonstration.run()


commands.add_to(app)

app.add_typer(subcommands.ledger, name="ledger")
app.add_typer(subcommands.models, name="models")
app.add_typer(subcommands.discovery, name="discovery")

schema = typer.Typer(no_args_is_help=True, help="The contract for programs.", rich_markup_mode=None)
app.add_typer(schema, name="schema")


@schema.command("asyncapi")
def schema_asyncapi(*, broker: Broker = None, topic_prefix: Prefix = None, config: Config = None) -> int:
    """Print every topic and message as an AsyncAPI 3.0 document, in JSON."""
    from cesar_mqtt.cli import schema as schemacommands

    return schemacommands.print_asyncapi(_settings({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config))


@schema.command("json")
def schema_json(
    *,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a file for each payload there instead.")
    ] = None,
    _broker: NoBroker = None,
    _topic_prefix: NoPrefix = None,
    _config: NoConfig = None,
) -> int:
    """Print the JSON Schema of every payload, as one document."""
    from cesar_mqtt.cli import schema as schemacommands

    return schemacommands.print_schemas() if output is None else schemacommands.write_schemas(output)
