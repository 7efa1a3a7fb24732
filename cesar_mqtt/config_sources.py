"""The sources of settings: the command line, the environment and one TOML file, each read into dotted names.

The settings are known here only as a `SettingsSchema`. An error names a setting as its source spells it. The main
thread uses this once at start.
"""

import json
import os
import re
import reprlib
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from platformdirs import PlatformDirs

from cesar_mqtt.errors import ConfigError, nearest

DIRECTORIES = PlatformDirs("cesar-mqtt", appauthor=False)
FILE_NAME = "cesar.toml"

_PREFIX = "CESAR_"
_FLAGS = {
    "audio.directories": "--audio-dir",
    "broker.url": "--broker",
    "consumer.name": "--name",
    "data_dir": "--data-dir",
    "inbox.directories": "--inbox",
    "inbox.move_to": "--move-to",
    "log.format": "--log-format",
    "log.level": "--log-level",
    "models.default": "--model",
    "output.directory": "--output-dir",
    "topic_prefix": "--topic-prefix",
    "web.listen": "--web",
    "wyoming.listen": "--wyoming",
}
_KINDS = {
    "any": "of another kind",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
}


@dataclass(frozen=True, slots=True)
class SettingValue:
    """The value that one source gives one setting."""

    value: object
    origin: str
    """The setting as its source spells it, with the file if it is one: the beginning of an error message."""
    raw: object
    """The value before lists were split and paths made absolute."""


class SettingsSchema:
    """The names of all settings and the JSON Schema of each value.

    Attributes:
        sections: the names before a dot.
        variables: the name of each setting by its environment variable.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]], *, secret: Collection[str] = ()) -> None:
        """Take the schemas by dotted name, and the names whose values no message may show."""
        self._schemas = {name: _without_null(schema) for name, schema in schemas.items()}
        self._secret = frozenset(secret)
        self.sections = frozenset(name[: dot.start()] for name in schemas for dot in re.finditer(r"\.", name))
        self.variables = {variable_name(name): name for name in schemas}

    def schema(self, name: str) -> Mapping[str, Any] | None:
        """Return the JSON Schema of a setting's value; None: there is no such setting."""
        return self._schemas.get(name)

    def unknown_setting(self, origin: str, name: str, *, spell: Callable[[str], str] = str) -> ConfigError:
        """Return the error for a name that is no setting; `spell` writes the nearest one as its source would."""
        if name in self.sections:
            example = next(other for other in self._schemas if other.startswith(f"{name}."))
            return ConfigError(f"{origin}: this is a section of settings; set one of them, such as {spell(example)}")
        leaf = name.rpartition(".")[2]
        same_leaf = (other for other in self._schemas if other.rpartition(".")[2] == leaf)
        meant = next(same_leaf, None) or nearest(name, self._schemas)
        hint = f"; did you mean {spell(meant)}?" if meant else ""
        return ConfigError(f"{origin}: there is no such setting{hint}")

    def wrong_value(self, name: str, given: SettingValue) -> ConfigError:
        """Return the error for a value that does not fit: its origin, the value, what it must be."""
        shown = "" if name in self._secret else f" is {_shown(given.raw)}"
        return ConfigError(f"{given.origin}{shown}: it must be {_requirement(self._schemas[name])}")


def read_file(known: SettingsSchema, config_file: Path | None, *, cwd: Path) -> dict[str, SettingValue]:
    """Read `config_file`, or else the first file that is found; none found: no values.

    Raises:
        ConfigError: `config_file` is missing, a file cannot be read, or a name or value in it is wrong.
    """
    for label, path in _candidates(config_file, cwd=cwd):
        tree = _read_toml(path, label, required=config_file is not None)
        if tree is not None:
            entries = ((name, SettingValue(value, f"{name} in {label}", value)) for name, value in _leaves(known, tree))
            return _checked(known, entries, base=path.parent)
    return {}


def read_environment(
    known: SettingsSchema,
    environ: Mapping[str, str],
    *,
    cwd: Path,
    on_unknown: Callable[[str], None],
) -> dict[str, SettingValue]:
    """Read the variables that begin with `CESAR_`; an empty one gives no value.

    A variable that is not ours is ignored, and `on_unknown` gets a sentence about it: Kubernetes injects `CESAR_PORT`
    and others for a service named `cesar`. One that begins with a section of ours and `__` can only be a typing error.

    Raises:
        ConfigError: a variable of one of our sections names no setting, or a value is wrong.
    """
    entries = []
    for variable in sorted(name for name in environ if name.startswith(_PREFIX)):
        name = variable.removeprefix(_PREFIX).lower().replace("__", ".")
        schema = known.schema(name) if variable in known.variables else None
        if schema is None:
            unknown = known.unknown_setting(variable, name, spell=variable_name)
            section, separator, _ = name.partition(".")
            if separator and section in known.sections:
                raise unknown
            on_unknown(f"Ignoring {unknown}")
        elif environ[variable]:
            value = _split_list(environ[variable], schema)
            entries.append((name, SettingValue(value, variable, environ[variable])))
    return _checked(known, entries, base=cwd)


def read_flags(known: SettingsSchema, flags: Mapping[str, Any], *, cwd: Path) -> dict[str, SettingValue]:
    """Take the flags of the command line, nested as the settings are; None and empty lists give no value.

    Raises:
        ConfigError: a value is wrong.
    """
    given = ((name, value) for name, value in _leaves(known, flags) if value not in (None, [], ()))
    entries = (
        (name, SettingValue(value, _FLAGS.get(name, f"{name} on the command line"), value)) for name, value in given
    )
    return _checked(known, entries, base=cwd)


def variable_name(name: str) -> str:
    """Return a setting's environment variable: `broker.url` is `CESAR_BROKER__URL`."""
    return _PREFIX + name.upper().replace(".", "__")


def _candidates(config_file: Path | None, *, cwd: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files to try, each with its name in messages."""
    if config_file is not None:
        yield str(config_file), cwd / _expanded(config_file, "--config")
    else:
        yield FILE_NAME, cwd / FILE_NAME
        yield from ((str(folder / FILE_NAME), folder / FILE_NAME) for folder in DIRECTORIES.iter_config_paths())


def _read_toml(path: Path, label: str, *, required: bool) -> dict[str, Any] | None:
    """Read one file; None: there is no such file and there need not be."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as exc:
        if not required:
            return None
        raise ConfigError(f"{label} cannot be read: there is no such file") from exc
    except OSError as exc:
        raise ConfigError(f"{label} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{label} cannot be read: it is not UTF-8 text") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{label} is not valid TOML: {exc}") from exc


def _leaves(known: SettingsSchema, tree: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield dotted names and values; a table that is no section is a value, or the values of unknown settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and key in known.sections:
            inner = ((f"{key}.{name}", inner_value) for name, inner_value in value.items())
            yield from _leaves(known, dict(inner))
        elif isinstance(value, Mapping) and value and "." not in key:
            yield from ((f"{key}.{name}", inner_value) for name, inner_value in value.items())
        else:
            yield key, value


def _checked(
    known: SettingsSchema, entries: Iterable[tuple[str, SettingValue]], *, base: Path
) -> dict[str, SettingValue]:
    """Refuse unknown names, and make paths absolute: relative ones start from `base`."""
    checked = {}
    for name, given in entries:
        schema = known.schema(name)
        if schema is None:
            raise known.unknown_setting(given.origin, name)
        if isinstance(given.value, bool) and schema["type"] != "boolean":
            raise known.wrong_value(name, given)  # pydantic would take true for 1
        try:
            checked[name] = replace(given, value=_absolute(given.value, schema, base=base, origin=given.origin))
        except ValueError as exc:
            raise known.wrong_value(name, given) from exc
    return checked


def _absolute(value: object, schema: Mapping[str, Any], *, base: Path, origin: str) -> object:
    """Make the paths in a value absolute; leave what is no path, or not even text, as it is.

    Raises:
        ValueError: a path is empty or holds a NUL.
    """
    if schema["type"] == "array" and isinstance(value, list | tuple):
        return [_absolute(item, schema["items"], base=base, origin=origin) for item in value]
    if schema.get("format") != "path" or not isinstance(value, str | Path):
        return value
    if not str(value) or "\0" in str(value):
        raise ValueError(origin)
    return base / _expanded(Path(value), origin)


def _expanded(path: Path, origin: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{origin} is '{path}': there is no such home folder") from exc


def _split_list(text: str, schema: Mapping[str, Any]) -> object:
    """Split a variable's text into the items of a list; broken JSON stays text, which the check then rejects."""
    if schema["type"] != "array":
        return text
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    separator = os.pathsep if schema["items"].get("format") == "path" else ","
    return [item.strip() for item in text.split(separator) if item.strip()]


def _without_null(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a value other than None: no source can give None."""
    chosen = next(option for option in schema.get("anyOf", [schema]) if option.get("type") != "null")
    return {"type": "any", **chosen} | {key: schema[key] for key in ("description",) if key in schema}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return reprlib.repr(str(value) if isinstance(value, Path) else value)


def _requirement(schema: Mapping[str, Any]) -> str:
    """Return what a value must be, as the end of a sentence."""
    if "description" in schema:
        return str(schema["description"])
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{', '.join(others)} or {last}"
    if schema["type"] == "array":
        return f"a list of {'paths' if schema['items'].get('format') == 'path' else 'texts'}"
    if schema.get("format") == "path":
        return "a path"
    return _KINDS[schema["type"]] + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']:g}"
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    return f", {schema['minimum']} or more" if "minimum" in schema else ""
