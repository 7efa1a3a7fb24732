"""The flags of the commands that ask consumers over the broker: `watch`, `jobs`, `show`, ..., `health`, `doctor`.

Like `cli`, it imports what does the work only when that is called for; for the main thread.
"""
# ruff: noqa: PLC0415 - see above

from pathlib import Path
from typing import Annotated

import typer

from cesar_mqtt.cli import options as flags
from cesar_mqtt.cli.options import Broker, Config, DataDir, Prefix

_STATES = ("queued", "processing", "completed", "error", "cancelled")

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, or `current` for the one in work.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Timeout = Annotated[
    float, typer.Option(metavar="S", min=0.1, max=3600, help="Seconds to wait for an answer (exit 3: none came).")
]
Consumer = Annotated[
    str | None, typer.Option(metavar="NAME", help="Ask only this one, where several consumers are at work.")
]

_TIMEOUT_S = 5.0


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (watch, jobs, show, cancel, retry, delete, pause, resume, health, doctor):
        app.command()(command)


def watch(*, as_json: Json = False, broker: Broker = None, topic_prefix: Prefix = None, config: Config = None) -> int:
    """Show jobs and consumers live until Ctrl-C; a line for each change where stdout is no terminal.

    With --json each line is an object with the topic and the payload that came there, null if it was cleared.
    """
    from cesar_mqtt.cli.watch import watch as follow

    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return follow(settings, as_json=as_json)


def jobs(
    *,
    status: Annotated[str | None, typer.Option(metavar="STATE", help="|".join(_STATES))] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="How many at most; 0: all.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print each job as a JSON object on a line.")] = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Print the newest jobs, the newest first."""
    if status is not None and status not in _STATES:
        raise typer.BadParameter(f"{status!r} is none of {', '.join(_STATES)}", param_hint="--status")
    from cesar_mqtt.cli import jobs as shell

    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return shell.jobs(settings, status=status, limit=limit, consumer=consumer, as_json=as_json, timeout_s=timeout)


def show(
    job_id: JobId,
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Print all that is known of a job, its transcript last."""
    _check(job_id)
    from cesar_mqtt.cli import jobs as shell

    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return shell.show(settings, job_id, consumer=consumer, as_json=as_json, timeout_s=timeout)


def cancel(
    job_id: JobId,
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Cancel a job: a waiting one at once, the one in work within seconds."""
    return _change(
        "cancel", job_id, (broker, topic_prefix, config), consumer=consumer, as_json=as_json, timeout_s=timeout
    )


def retry(
    job_id: JobId,
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Queue a failed or cancelled job again."""
    return _change(
        "retry", job_id, (broker, topic_prefix, config), consumer=consumer, as_json=as_json, timeout_s=timeout
    )


def delete(
    job_id: JobId,
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Delete a job that is not in work, with its status, its results and its audio."""
    return _change(
        "delete", job_id, (broker, topic_prefix, config), consumer=consumer, as_json=as_json, timeout_s=timeout
    )


def pause(
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Have no further job started, also after a restart; jobs are accepted all the same."""
    from cesar_mqtt.cli import jobs as shell

    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return shell.pause(settings, on=True, consumer=consumer, as_json=as_json, timeout_s=timeout)


def resume(
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Have waiting jobs started again."""
    from cesar_mqtt.cli import jobs as shell

    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return shell.pause(settings, on=False, consumer=consumer, as_json=as_json, timeout_s=timeout)


def health(
    *,
    as_json: Json = False,
    consumer: Consumer = None,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Print how each consumer is. Exit code 0: its worker and its connection work; 1: not so; 3: it does not answer."""
    from cesar_mqtt.cli import jobs as shell

    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return shell.health(settings, consumer=consumer, as_json=as_json, timeout_s=timeout)


def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print each check as a JSON object on a line.")] = False,
    timeout: Timeout = _TIMEOUT_S,
    broker: Broker = None,
    data_dir: DataDir = None,
    topic_prefix: Prefix = None,
    config: Config = None,
) -> int:
    """Check broker, consumer, model and files, and say what to do about what is wrong (exit 1)."""
    from cesar_mqtt.cli.doctor import examine

    said = {"topic_prefix": topic_prefix, "broker": {"url": broker}, "data_dir": data_dir}
    return examine(flags.load(said, config), as_json=as_json, timeout_s=timeout)


def _change(
    command: str,
    job_id: str,
    where: tuple[str | None, str | None, Path | None],
    *,
    consumer: str | None,
    as_json: bool,
    timeout_s: float,
) -> int:
    _check(job_id)
    from cesar_mqtt.cli import jobs as shell

    broker, topic_prefix, config = where
    settings = flags.load({"topic_prefix": topic_prefix, "broker": {"url": broker}}, config)
    return shell.change(settings, command, job_id, consumer=consumer, as_json=as_json, timeout_s=timeout_s)


def _check(job_id: str) -> None:
    from cesar_mqtt.protocol.topics import is_job_id

    if not is_job_id(job_id):
        raise typer.BadParameter("it is 1 to 64 of A-Z, a-z, 0-9, _ and -", param_hint="ID")
