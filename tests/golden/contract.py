"""The public contract as text: schemas, AsyncAPI document, discovery messages, helps and examples.

Everything comes from the command line, so that it is what a user gets, however the package is cut inside.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cesar_mqtt import __version__
from cesar_mqtt.cli.app import app

FOLDER = Path(__file__).parent
STRUCTURE = "structure.json"

_WIDTH = "80"
_WORDS = frozenset({"description", "title", "summary", "examples"})
_NAMED = frozenset({"properties", "$defs", "schemas", "channels", "operations", "messages", "parameters", "servers"})
"""Their keys are names, not keywords: a payload field called `title` stays."""


def golden_files() -> dict[str, str]:
    """The golden files that may be regenerated, by name."""
    document = json.loads(output("schema", "asyncapi"))
    messages = document["components"]["messages"]
    examples = {
        name: [example["payload"] for example in message.get("examples", ())] for name, message in messages.items()
    }
    files = {
        "asyncapi.json": pretty(document),
        "schemas.json": pretty(json.loads(output("schema", "json"))),
        "payloads.json": pretty(examples),
        "help.txt": "\n".join(f"$ {name} --help\n{output(*name.split()[1:], '--help')}" for name in commands()),
    }
    for mode in ("device", "component"):
        text = output("discovery", "show", CESAR_HOMEASSISTANT__DISCOVERY=mode)
        files[f"discovery-{mode}.json"] = pretty(json.loads(text))
    return {name: text.replace(__version__, "VERSION") for name, text in files.items()}


def structure() -> dict[str, dict[str, Any]]:
    """What the schemas and the AsyncAPI document mean: without texts, and with schemas in place of references."""
    bundle = json.loads(output("schema", "json"))
    document = json.loads(output("schema", "asyncapi").replace(__version__, "VERSION"))
    definitions, components = bundle["$defs"], document["components"]
    known = {
        **{f"#/$defs/{name}": schema for name, schema in definitions.items()},
        **{f"#/components/schemas/{name}": schema for name, schema in components["schemas"].items()},
    }
    parts = {
        "schemas": {name: bare(schema, known) for name, schema in definitions.items()},
        "asyncapi schemas": {name: bare(schema, known) for name, schema in components["schemas"].items()},
        "files": _written_schemas(),
        "messages": bare(components["messages"], known, named=True),
        "parameters": bare(components["parameters"], known, named=True),
        "channels": bare(document["channels"], known, named=True),
        "operations": bare(document["operations"], known, named=True),
        "rest": {key: bare(document[key], known) for key in ("asyncapi", "info", "defaultContentType", "servers")},
    }
    for part in ("asyncapi schemas", "files"):
        for name, schema in parts[part].items():
            if schema == parts["schemas"].get(name.removesuffix(".schema.json")):
                parts[part][name] = "as in schemas"
    return parts


def bare(value: Any, known: dict[str, Any], *, named: bool = False) -> Any:
    """Return the value without descriptions, in one spelling: schemas inlined, keys and `required` sorted."""
    if isinstance(value, list):
        return [bare(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    if not named and value.get("$ref") in known:
        beside = {key: item for key, item in value.items() if key != "$ref"}
        return bare({**known[value["$ref"]], **beside}, known)
    kept = {key: item for key, item in sorted(value.items()) if named or key not in _WORDS}
    result = {key: bare(item, known, named=not named and key in _NAMED) for key, item in kept.items()}
    if not named and isinstance(result.get("required"), list):
        result["required"] = sorted(result["required"])
    return result


def render_structure(parts: dict[str, dict[str, Any]]) -> str:
    """One line for each schema, message and channel."""
    lines = [
        f'"{part}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {_compact(value)}" for name, value in values.items())
        + "\n}"
        for part, values in parts.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def commands() -> Iterator[str]:
    """Every command as it is typed, groups before their commands."""
    yield from _below(typer.main.get_command(app), "cesar-mqtt")


def _below(command: Any, name: str) -> Iterator[str]:
    yield name
    for word, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _below(inner, f"{name} {word}")


def output(*arguments: str, **environment: str) -> str:
    """What a command prints on stdout, in an empty folder, with no settings but these."""
    text = io.StringIO()
    with _plain_environment(environment), contextlib.redirect_stdout(text):
        code = app(list(arguments), prog_name="cesar-mqtt", standalone_mode=False)
    if code:
        raise RuntimeError(f"{arguments} ended with {code}")
    return text.getvalue()


@contextlib.contextmanager
def _plain_environment(extra: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in before:
            if name.startswith(("CESAR_", "_TYPER", "_CESAR")):
                del os.environ[name]
        os.environ.update({"COLUMNS": _WIDTH, "HOME": folder, "XDG_CONFIG_HOME": folder, **extra})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _written_schemas() -> dict[str, Any]:
    """The files of `schema json --output`, each as it stands for itself."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        output("schema", "json", "--output", folder)
        for path in sorted(Path(folder).iterdir()):
            schema = json.loads(path.read_text(encoding="utf-8"))
            known = {f"#/$defs/{name}": part for name, part in schema.pop("$defs", {}).items()}
            files[path.name] = bare(schema, known)
    return files
