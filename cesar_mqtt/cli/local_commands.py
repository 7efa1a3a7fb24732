"""The command groups `ledger`, `models` and `discovery`: their flags; the work is imported when it is called for.

For the main thread.
"""
# ruff: noqa: PLC0415 - see above

from pathlib import Path
from typing import Annotated

import typer

from cesar_mqtt.cli import options as flags
from cesar_mqtt.cli.options import Broker, Config, DataDir, NoBroker, NoPrefix, Prefix

ledger = typer.Typer(no_args_is_help=True, help="Look after a ledger that no consumer has open.", rich_markup_mode=None)


def _ledger_path(data_dir: Path | None, config: Path | None) -> Path:
    return flags.load({"data_dir": data_dir}, config).data_dir / "ledger.json"


@ledger.command("check")
def ledger_check(
    *, _broker: NoBroker = None, _topic_prefix: NoPrefix = None, data_dir: DataDir = None, config: Config = None
) -> int:
    """Say what the ledger holds, and what of it is damaged (exit 74); changes nothing."""
    from cesar_mqtt.cli import ledger as ledgercommands

    return ledgercommands.check(_ledger_path(data_dir, config))


@ledger.command("repair")
def ledger_repair(
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    _broker: NoBroker = None,
    _topic_prefix: NoPrefix = None,
    config: Config = None,
) -> int:
    """Say what a damaged ledger can keep and what it has lost, ask, and write a whole one."""
    from cesar_mqtt.cli import ledger as ledgercommands

    return ledgercommands.mend(_ledger_path(data_dir, config), yes=yes)


@ledger.command("compact")
def ledger_compact(
    *, _broker: NoBroker = None, _topic_prefix: NoPrefix = None, data_dir: DataDir = None, config: Config = None
) -> int:
    """Bring everything into ledger.json alone."""
    from cesar_mqtt.cli import ledger as ledgercommands

    return ledgercommands.compact(_ledger_path(data_dir, config))


@ledger.command("export")
def ledger_export(
    *, _broker: NoBroker = None, _topic_prefix: NoPrefix = None, data_dir: DataDir = None, config: Config = None
) -> int:
    """Print every job as JSON, one a line."""
    from cesar_mqtt.cli import ledger as ledgercommands

    return ledgercommands.export(_ledger_path(data_dir, config))


discovery = typer.Typer(no_args_is_help=True, help="What Home Assistant is told of a consumer.", rich_markup_mode=None)

Name = Annotated[str | None, typer.Option(metavar="NAME", help="The consumer's name (default: cesar).")]
DiscoveryPrefix = Annotated[
    str | None, typer.Option(metavar="P", help="What discovery topics begin with (default: homeassistant).")
]


@discovery.command("show")
def discovery_show(
    *,
    name: Name = None,
    _broker: NoBroker = None,
    topic_prefix: Prefix = None,
    discovery_prefix: DiscoveryPrefix = None,
    config: Config = None,
) -> int:
    """Print what a consumer with these settings announces, as JSON; asks no broker."""
    from cesar_mqtt.cli import discovery as discoverycommands

    said = {
        "topic_prefix": topic_prefix,
        "consumer": {"name": name},
        "homeassistant": {"prefix": discovery_prefix},
    }
    return discoverycommands.show(flags.load(said, config))


@discovery.command("remove")
def discovery_remove(
    *,
    name: Name = None,
    broker: Broker = None,
    topic_prefix: Prefix = None,
    discovery_prefix: DiscoveryPrefix = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: Config = None,
) -> int:
    """Remove everything that announces a consumer from the broker, so that it vanishes from Home Assistant."""
    from cesar_mqtt.cli import discovery as discoverycommands

    said = {
        "topic_prefix": topic_prefix,
        "broker": {"url": broker},
        "consumer": {"name": name},
        "homeassistant": {"prefix": discovery_prefix},
    }
    return discoverycommands.remove(flags.load(said, config), as_json=as_json)


models = typer.Typer(no_args_is_help=True, help="Which models can be used, and fetching one.", rich_markup_mode=None)


@models.command("list")
def models_list(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data_dir: DataDir = None,
    _broker: NoBroker = None,
    _topic_prefix: NoPrefix = None,
    config: Config = None,
) -> int:
    """Print the models that can be used without a network, and those that may be fetched."""
    from cesar_mqtt.cli import models as modelcommands

    return modelcommands.list_models(flags.load({"data_dir": data_dir}, config), as_json=as_json)


@models.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as base; `models list` names them.")],
    *,
    data_dir: DataDir = None,
    _broker: NoBroker = None,
    _topic_prefix: NoPrefix = None,
    config: Config = None,
) -> int:
    """Fetch a model, so that it can be used without a network, and print its folder.

    Exit code 2: there is no such model; 1: it could not be fetched.
    """
    from cesar_mqtt.cli import models as modelcommands

    return modelcommands.pull(name, flags.load({"data_dir": data_dir}, config))
