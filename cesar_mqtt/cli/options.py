"""The flags that many commands share, and the settings that come of them; for the main thread.

Nothing heavy is imported here, for `--help` has to answer at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cesar_mqtt.config import Settings

Broker = Annotated[
    str | None, typer.Option(metavar="URL", help="mqtt[s]://[user[:password]@]host[:port], ws[s]://... or embedded.")
]
DataDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the ledger and the spool lie.")]
Prefix = Annotated[str | None, typer.Option(metavar="P", help="What all topics begin with (default: cesar).")]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="A TOML file (default: ./cesar.toml if there).")]

# Every command takes these three. Where one means nothing it is read, not shown in the help, and passed over.
NoBroker = Annotated[str | None, typer.Option("--broker", metavar="URL", hidden=True)]
NoPrefix = Annotated[str | None, typer.Option("--topic-prefix", metavar="P", hidden=True)]
NoConfig = Annotated[Path | None, typer.Option("--config", metavar="FILE", hidden=True)]


def load(flags: dict[str, Any], config: Path | None, *, serving: bool = False) -> "Settings":
    """Read the settings as `config.load_settings` does; only `serve` has a broker inside when none is named.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    from cesar_mqtt.config import EMBEDDED_BROKER, LOCAL_BROKER, load_settings  # noqa: PLC0415 - see above

    return load_settings(
        flags=flags,
        config_file=config,
        cwd=Path.cwd(),
        default_broker=EMBEDDED_BROKER if serving else LOCAL_BROKER,
    )
