"""The command `rejected`; for the main thread."""

import json
from typing import Any

from rich.text import Text

from cesar_mqtt.cli.console import new_table, out, print_message, print_table
from cesar_mqtt.cli.control_client import ControlClient
from cesar_mqtt.cli.jobs import quiet
from cesar_mqtt.cli.text import local_time, many, printable
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import ExitCode


def print_rejections(
    settings: Settings, *, limit: int, consumer: str | None, as_json: bool, timeout_s: float
) -> ExitCode:
    """Print the newest rejections of each consumer, newest first. Raises CesarError as `ControlClient` does."""
    quiet()
    found: list[dict[str, Any]] = []
    total = 0
    with ControlClient(settings, ["rejected"], timeout_s=timeout_s) as client:
        for each in client.targets(consumer):
            answer = client.ask("rejected", {"limit": limit}, consumer=each)
            found += [{**rejection, "consumer": answer["consumer"]} for rejection in answer["rejected"]]
            total += answer["total"]
    found.sort(key=lambda rejection: str(rejection["received_at"]), reverse=True)
    for rejection in found[:limit] if as_json else ():
        out(json.dumps(rejection, ensure_ascii=False))
    if not as_json:
        _print(found[:limit])
        if total > len(found[:limit]):
            print_message(f"{many(total, 'message')} in all; a consumer keeps the newest 100 since its start.")
    return ExitCode.OK


def _print(found: list[dict[str, Any]]) -> None:
    if not found:
        out("Nothing was rejected since the consumer's start.")
        return
    table = new_table()
    for name in ("RECEIVED", "REASON", "TOPIC", "WHY"):
        table.add_column(name, overflow="fold")
    for rejection in found:
        cells = (rejection["reason"], rejection["topic"], rejection["detail"])
        table.add_row(local_time(rejection["received_at"]), *(Text(printable(str(cell))) for cell in cells))
    print_table(table)
