"""The commands `schema asyncapi` and `schema json`: the contract for programs, on stdout or as files."""

import json
from pathlib import Path
from typing import Any

from cesar_mqtt import __version__
from cesar_mqtt.cli.console import out
from cesar_mqtt.config import Settings
from cesar_mqtt.errors import CesarError, ExitCode
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.protocol.asyncapi import document
from cesar_mqtt.protocol.schema import Schema, bundle, payload_schemas


def print_asyncapi(settings: Settings) -> ExitCode:
    """Print the AsyncAPI document of a consumer with these settings. Raises ConfigError."""
    out(_render(document(settings, parse_broker_url(settings.broker.url))))
    return ExitCode.OK


def print_schemas() -> ExitCode:
    """Print one JSON Schema with those of all payloads in its `$defs`."""
    out(_render(whole()))
    return ExitCode.OK


def write_schemas(folder: Path) -> ExitCode:
    """Write a JSON Schema for each payload into a folder, and print the names of the files.

    Each is complete by itself. None names a draft: they mean the same from draft 7 on, and a validator that knows only
    draft 7, such as Node-RED's, rejects a schema that names another.

    Raises:
        CesarError: a file cannot be written.
    """
    schemas = payload_schemas()
    paths = [folder / f"{name}.schema.json" for name in schemas]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in zip(schemas, paths, strict=True):
            path.write_text(_render(bundle(name, schemas)) + "\n", encoding="utf-8")
    except OSError as exc:
        raise CesarError(f"{exc.filename or folder} cannot be written: {exc.strerror}.") from exc
    for path in paths:
        out(str(path))
    return ExitCode.OK


def whole() -> Schema:
    """Return the schemas of all payloads as one document."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cesar-mqtt",
        "description": f"The payloads of cesar-mqtt {__version__} by name, in `$defs`; `cesar-mqtt schema asyncapi` "
        "shows their topics.",
        "$defs": payload_schemas(),
    }


def _render(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
