"""The command line: every command with its flags. The work is in the module that the command imports.

Heavy modules are imported by the command that needs them: `--help` answers at once. For the main thread.
"""

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cesar_mqtt.cli import console
from cesar_mqtt.cli.options import ServeCommand, complete_model, takes_no_settings, takes_settings
from cesar_mqtt.errors import CesarError, ExitCode

if TYPE_CHECKING:
    from cesar_mqtt.config import Settings

# As the modules of `protocol` have them, which are too heavy to be imported here.
_FORMATS = ("txt", "srt", "vtt", "tsv", "json", "md")
_TASKS = ("transcribe", "translate")
_MAX_PRIORITY = 9
_Priority = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=_MAX_PRIORITY, help="0 (default) to 9: jobs of a higher priority go first."),
]
_Diarize = Annotated[bool, typer.Option("--diarize", help="Tell the speakers apart, and name them in the results.")]
_STATES = ("queued", "processing", "completed", "error", "cancelled")


def _group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


app = _group("A durable, offline transcription worker on MQTT: publish audio, subscribe to the transcript.")
ledger = _group("Check, repair, compact or export a ledger that no consumer has open.")
models = _group("List the models that can be used, and download one.")
discovery = _group("Show or remove what a consumer announces to Home Assistant, and what it left at the broker.")
schema = _group("Print the contract for programs.")


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one sentence on stderr."""
    console.open_closed_streams()
    code: int = ExitCode.OK
    try:
        code = _run(arguments)
        console.flush()
    except console.OutputError as exc:
        console.print_message(str(exc))
        return code or exc.exit_code
    return code


def _run(arguments: list[str] | None) -> int:
    try:
        result = app(arguments, prog_name="cesar-mqtt", standalone_mode=False)
    except CesarError as exc:
        console.print_message(str(exc))
        return exc.exit_code
    except SystemExit as exc:
        if isinstance(exc.__context__, BrokenPipeError):  # the reader closed the pipe; no failure
            return ExitCode.OK
        raise
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        console.print_message(f"Nothing more can be written: {exc.strerror}.")
        return ExitCode.FAILED
    except Exception as exc:
        if not hasattr(exc, "show"):  # click's own errors can show themselves
            raise
        with suppress(OSError):
            exc.show()
        return int(getattr(exc, "exit_code", ExitCode.USAGE))
    return result if isinstance(result, int) else ExitCode.OK


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer's way
    if value:
        from cesar_mqtt import __version__

        console.out(f"cesar-mqtt {__version__}")
        raise typer.Exit


def _check_job_id(job_id: str | None) -> str | None:
    from cesar_mqtt.protocol.topics import is_job_id

    if job_id is not None and not is_job_id(job_id):
        raise typer.BadParameter("it is 1 to 64 of A-Z, a-z, 0-9, _ and -")
    return job_id


def _check_choice(value: str | None, choices: Sequence[str]) -> str | None:
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}")
    return value


def _check_formats(formats: list[str] | None) -> list[str] | None:
    for name in formats or ():
        _check_choice(name, _FORMATS)
    return formats


def _check_job_ids(job_ids: list[str] | None) -> list[str] | None:
    for job_id in job_ids or ():
        _check_job_id(job_id)
    return job_ids


def _complete(ctx: typer.Context, find: "Callable[[Settings], list[str]]") -> list[str]:
    """Complete a word from what a consumer knows; a shell that waits for it is told nothing of failures."""
    with suppress(Exception):
        from cesar_mqtt.cli.options import load

        values = {"broker.url": ctx.params.get("broker"), "topic_prefix": ctx.params.get("topic_prefix")}
        return find(load(values, ctx.params.get("config")))
    return []


def _complete_job_id(ctx: typer.Context, incomplete: str) -> list[str]:
    from cesar_mqtt.cli.jobs import job_ids_that_begin

    return _complete(ctx, lambda settings: job_ids_that_begin(settings, incomplete, timeout_s=_COMPLETION_S))


def _complete_model_of_consumer(ctx: typer.Context, incomplete: str) -> list[str]:
    from cesar_mqtt.cli.jobs import model_names

    names = _complete(ctx, lambda settings: model_names(settings, timeout_s=_COMPLETION_S))
    return [name for name in names if name.startswith(incomplete)]


JobId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        callback=_check_job_id,
        autocompletion=_complete_job_id,
        help="The job's id or its beginning, or `current` for the running job.",
    ),
]
JobIds = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ID",
        callback=_check_job_ids,
        autocompletion=_complete_job_id,
        help="Ids of jobs or their beginnings; `current` is the running job.",
    ),
]
Status = Annotated[
    str | None,
    typer.Option(
        metavar="STATE",
        callback=lambda value: _check_choice(value, _STATES),
        autocompletion=lambda: _STATES,
        help="All jobs in this state: " + "|".join(_STATES),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for programs.")]
Timeout = Annotated[
    float, typer.Option(metavar="S", min=0.1, max=3600, help="Seconds to wait for a response (exit 3: none came).")
]
Consumer = Annotated[str | None, typer.Option(metavar="NAME", help="Ask only this consumer, where there are several.")]

_TIMEOUT_S = 5.0
_COMPLETION_S = 2.0


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# -- the consumer ------------------------------------------------------------------------------------------------------


@app.command(cls=ServeCommand)
@takes_settings(
    *("broker", "data_dir", "audio_dir", "model", "name", "topic_prefix", "web", "wyoming"),
    *("inbox", "move_to", "output_dir", "log_format", "log_level"),
    serving=True,
)
def serve(settings: "Settings") -> int:
    """Run the consumer: accept jobs from the broker, transcribe them one at a time, publish their statuses."""
    from cesar_mqtt import logs
    from cesar_mqtt.monitoring.signals import handle_stop_signals

    problem = ""
    try:
        with handle_stop_signals() as stop:
            from cesar_mqtt.service import Service

            service = Service(settings, directory=Path.cwd())
            try:
                code = service.run(stop)
            except CesarError as exc:
                problem = "" if service.refusal_is_logged else f"cesar-mqtt: {exc}"
                code = exc.exit_code
    finally:
        logs.close(problem)
    if code is not ExitCode.OK:
        # The worker's thread may be inside the model, which cannot be interrupted: nothing waits for it.
        os._exit(code)
    return code


@app.command()
@takes_settings("broker", "topic_prefix", "log_format", "log_level")
def web(
    settings: "Settings",
    address: Annotated[
        str | None, typer.Argument(metavar="HOST:PORT", help="Where to listen (default: 127.0.0.1:8188).")
    ] = None,
    *,
    set_password: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Ask for a password, write its hash to FILE for web.password_file, and exit."
        ),
    ] = None,
) -> int:
    """Serve the web page and its HTTP API in a process of its own, beside a consumer."""
    from cesar_mqtt.cli import web

    if set_password is not None:
        return web.set_password(set_password)
    return web.serve(settings, address)


@app.command()
@takes_no_settings
def demo() -> int:
    """Run everything in one process without set-up: a broker, a consumer, a recording, its transcript."""
    from cesar_mqtt.cli import demo

    return demo.run()


# -- producers and subscribers -----------------------------------------------------------------------------------------


@app.command()
@takes_settings("broker", "topic_prefix")
def submit(
    settings: "Settings",
    audio: Annotated[
        list[str], typer.Argument(metavar="AUDIO...", help="The recordings, or folders of recordings; - is stdin.")
    ],
    *,
    by_path: Annotated[
        bool,
        typer.Option(
            "--by-path",
            help="Send only the paths, for files that the consumer can read; "
            "a relative one is looked up in its audio.directories.",
        ),
    ] = False,
    job_id: Annotated[
        str | None, typer.Option(metavar="ID", callback=_check_job_id, help="The job's id; for one recording only.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=_complete_model_of_consumer)] = None,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Such as de; default: detected.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(_TASKS),
            autocompletion=lambda: _TASKS,
            callback=lambda value: _check_choice(value, _TASKS),
        ),
    ] = None,
    priority: _Priority = None,
    diarize: _Diarize = False,
    result_format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="|".join(_FORMATS),
            autocompletion=lambda: _FORMATS,
            callback=_check_formats,
            help="Print the result in this format instead of the transcript; with --output-dir it may be repeated.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a file for each recording and format into this folder (default: txt), and print its path.",
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job ids and exit.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="S", min=0, help="Seconds to wait (exit 3).")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print each job's status as a JSON object; with --format, the result is its field `result`: "
            "of --format json the object in it, else text.",
        ),
    ] = False,
) -> int:
    """Send recordings to a consumer, wait, and print each transcript as soon as it is there.

    Exit code 0: all completed; 1: at least one did not, or its result did not arrive; 3: the time ran out, or no broker
    or consumer is there.
    """
    from cesar_mqtt.cli.submit import SubmitOptions, submit_and_wait

    if job_id is not None and len(audio) > 1:
        raise typer.BadParameter("it takes one recording only", param_hint="--job-id")
    if output_dir is not None and no_wait:
        raise typer.BadParameter("nothing is written with --no-wait", param_hint="--output-dir")
    if result_format and len(result_format) > 1 and output_dir is None:
        raise typer.BadParameter("only with --output-dir it takes several", param_hint="--format")
    fields = {"model_size": model, "language": language, "task": task, "priority": priority, "diarize": diarize or None}
    return submit_and_wait(
        SubmitOptions(
            recordings=tuple(audio),
            by_path=by_path,
            job_id=job_id,
            fields={name: value for name, value in fields.items() if value is not None},
            formats=tuple(dict.fromkeys(result_format or ())),
            output_dir=output_dir,
            wait=not no_wait,
            timeout_s=timeout,
            as_json=as_json,
        ),
        settings,
    )


@app.command()
@takes_settings("broker", "data_dir", "topic_prefix", "output_dir", "move_to", "log_format", "log_level", logs=True)
def inbox(
    settings: "Settings",
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="The folders to watch.")],
    *,
    by_path: Annotated[
        bool,
        typer.Option("--by-path", help="Send only the paths: the consumer sees the same folders, in its directories."),
    ] = False,
    model: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=_complete_model_of_consumer)] = None,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Such as de; default: detected.")] = None,
    priority: _Priority = None,
    diarize: _Diarize = False,
    result_format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="|".join(_FORMATS),
            autocompletion=lambda: _FORMATS,
            callback=_check_formats,
            help="What to write (default: txt); may be repeated.",
        ),
    ] = None,
) -> int:
    """Watch folders: submit each recording once it is complete, and write its transcript beside it, until Ctrl-C."""
    from cesar_mqtt.cli.gateway import run_inbox

    fields = {"model": model, "language": language, "priority": priority, "diarize": diarize or None}
    given = {name: value for name, value in fields.items() if value is not None}
    return run_inbox(settings, folders, given, formats=result_format, by_path=by_path)


@app.command()
@takes_settings("broker", "name", "topic_prefix", "log_format", "log_level", logs=True)
def wyoming(
    settings: "Settings",
    address: Annotated[
        str | None, typer.Argument(metavar="HOST:PORT", help="Where to listen (default: 127.0.0.1:10300).")
    ] = None,
) -> int:
    """Serve speech-to-text in the Wyoming protocol, for Home Assistant's Assist, beside a consumer, until Ctrl-C."""
    from cesar_mqtt.cli.gateway import run_wyoming

    return run_wyoming(settings, address)


@app.command()
@takes_settings("broker", "topic_prefix")
def watch(settings: "Settings", *, as_json: Json = False) -> int:
    """Show jobs and consumers live until q or Ctrl-C; one line for each change where stdout is no terminal.

    With --json each line is an object with a topic and its payload, null if it was cleared.
    """
    from cesar_mqtt.cli.watch import watch

    return watch(settings, as_json=as_json)


# -- commands to a consumer --------------------------------------------------------------------------------------------


@app.command()
@takes_settings("broker", "topic_prefix")
def jobs(
    settings: "Settings",
    *,
    status: Annotated[
        str | None,
        typer.Option(metavar="STATE", callback=lambda value: _check_choice(value, _STATES), help="|".join(_STATES)),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="The most jobs to print; 0: all.")] = 50,
    as_json: JsonLines = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Print the newest jobs, the newest first."""
    from cesar_mqtt.cli.jobs import print_jobs

    return print_jobs(settings, status=status, limit=limit, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def show(
    settings: "Settings",
    job_id: JobId,
    *,
    result_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="|".join(_FORMATS),
            autocompletion=lambda: _FORMATS,
            callback=lambda value: _check_choice(value, _FORMATS),
            help="Print only the result in this format.",
        ),
    ] = None,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Print the whole status of a job, its transcript last."""
    from cesar_mqtt.cli.jobs import show

    return show(settings, job_id, result_format=result_format, consumer=consumer, as_json=as_json, timeout_s=timeout)


def _change(settings: "Settings", command: str, job_ids: list[str] | None, status: str | None, **options: Any) -> int:
    from cesar_mqtt.cli.jobs import change

    if not job_ids and status is None:
        raise typer.BadParameter("name at least one job, or a state with --status", param_hint="ID")
    return change(settings, command, job_ids or [], status=status, **options)


@app.command()
@takes_settings("broker", "topic_prefix")
def cancel(
    settings: "Settings",
    job_ids: JobIds = None,
    *,
    status: Status = None,
    as_json: JsonLines = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Cancel jobs: a queued one at once, the running one within seconds."""
    return _change(settings, "cancel", job_ids, status, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def retry(
    settings: "Settings",
    job_ids: JobIds = None,
    *,
    status: Status = None,
    as_json: JsonLines = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Queue failed or cancelled jobs again."""
    return _change(settings, "retry", job_ids, status, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def delete(
    settings: "Settings",
    job_ids: JobIds = None,
    *,
    status: Status = None,
    as_json: JsonLines = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Delete jobs that are not running, with their statuses, results and audio."""
    return _change(settings, "delete", job_ids, status, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def rejected(
    settings: "Settings",
    *,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="The most rejections to print.")] = 20,
    as_json: JsonLines = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Print what was rejected since the consumer's start and why, the newest first."""
    from cesar_mqtt.cli.rejected import print_rejections

    return print_rejections(settings, limit=limit, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def pause(
    settings: "Settings", *, as_json: Json = False, consumer: Consumer = None, timeout: Timeout = _TIMEOUT_S
) -> int:
    """Start no further job, also after a restart; jobs are still accepted."""
    from cesar_mqtt.cli.jobs import pause

    return pause(settings, on=True, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def resume(
    settings: "Settings", *, as_json: Json = False, consumer: Consumer = None, timeout: Timeout = _TIMEOUT_S
) -> int:
    """Start queued jobs again."""
    from cesar_mqtt.cli.jobs import pause

    return pause(settings, on=False, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "topic_prefix")
def health(
    settings: "Settings", *, as_json: Json = False, consumer: Consumer = None, timeout: Timeout = _TIMEOUT_S
) -> int:
    """Print the health of each consumer. Exit code 0: worker and connection work; 1: they do not; 3: no response."""
    from cesar_mqtt.cli.jobs import health

    return health(settings, consumer=consumer, as_json=as_json, timeout_s=timeout)


@app.command()
@takes_settings("broker", "data_dir", "topic_prefix")
def doctor(settings: "Settings", *, as_json: JsonLines = False, timeout: Timeout = _TIMEOUT_S) -> int:
    """Check broker, consumer, model and files, with advice for each problem (exit 1)."""
    from cesar_mqtt.cli.doctor import examine

    return examine(settings, as_json=as_json, timeout_s=timeout)


# -- command groups ----------------------------------------------------------------------------------------------------

app.add_typer(ledger, name="ledger")
app.add_typer(models, name="models")
app.add_typer(discovery, name="discovery")
app.add_typer(schema, name="schema")


@ledger.command("check")
@takes_settings("data_dir")
def ledger_check(settings: "Settings") -> int:
    """Print what the ledger holds and which parts are damaged (exit 74); change nothing."""
    from cesar_mqtt.cli.ledger import check, path_of

    return check(path_of(settings))


@ledger.command("repair")
@takes_settings("data_dir")
def ledger_repair(
    settings: "Settings", *, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False
) -> int:
    """Print what can be recovered from a damaged ledger and what is lost, ask, and write a whole one."""
    from cesar_mqtt.cli.ledger import path_of, repair

    return repair(path_of(settings), yes=yes)


@ledger.command("compact")
@takes_settings("data_dir")
def ledger_compact(settings: "Settings") -> int:
    """Write everything into ledger.json alone."""
    from cesar_mqtt.cli.ledger import compact, path_of

    return compact(path_of(settings))


@ledger.command("export")
@takes_settings("data_dir")
def ledger_export(settings: "Settings") -> int:
    """Print every job as JSON, one a line."""
    from cesar_mqtt.cli.ledger import export, path_of

    return export(path_of(settings))


@models.command("list")
@takes_settings("data_dir")
def models_list(settings: "Settings", *, as_json: Json = False) -> int:
    """Print the models that can be used without a network, and those that can be downloaded."""
    from cesar_mqtt.cli.models import list_models

    return list_models(settings, as_json=as_json)


@models.command("pull")
@takes_settings("data_dir")
def models_pull(
    settings: "Settings",
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", autocompletion=complete_model, help="Such as base; `models list` names them."),
    ],
) -> int:
    """Download a model, so that it can be used without a network, and print its folder.

    Exit code 2: there is no such model; 1: the download failed.
    """
    from cesar_mqtt.cli.models import pull

    return pull(name, settings)


@discovery.command("show")
@takes_settings("name", "topic_prefix", "discovery_prefix")
def discovery_show(settings: "Settings") -> int:
    """Print the discovery messages of a consumer with these settings as JSON, without a broker."""
    from cesar_mqtt.cli.discovery import show

    return show(settings)


@discovery.command("remove")
@takes_settings("name", "broker", "data_dir", "topic_prefix", "discovery_prefix")
def discovery_remove(
    settings: "Settings",
    *,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Remove also its own topics, statuses and results, and those of an earlier prefix or name in the data "
            "directory; a consumer that is online stays as it is.",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Remove a consumer's discovery messages from the broker, so that it disappears from Home Assistant."""
    from cesar_mqtt.cli.discovery import remove

    return remove(settings, everything=everything, as_json=as_json)


@schema.command("asyncapi")
@takes_settings("broker", "topic_prefix")
def schema_asyncapi(settings: "Settings") -> int:
    """Print every topic and message as an AsyncAPI 3.0 document, in JSON."""
    from cesar_mqtt.cli.schema import print_asyncapi

    return print_asyncapi(settings)


@schema.command("json")
@takes_no_settings
def schema_json(
    *,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a file for each payload into this folder instead.")
    ] = None,
) -> int:
    """Print the JSON Schema of every payload, as one document."""
    from cesar_mqtt.cli.schema import print_schemas, write_schemas

    return print_schemas() if output is None else write_schemas(output)
