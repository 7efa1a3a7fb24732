"""Where settings come from: the command line, the environment and one TOML file, each read into dotted names.

It knows the settings only as a `Vocabulary`, and says what is wrong in the words of the source it stood in. The main
thread uses it once at start.
"""

import difflib
import json
import os
import reprlib
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from platformdirs import PlatformDirs

from cesar_mqtt.errors import ConfigError

DIRECTORIES = PlatformDirs("cesar-mqtt", appauthor=False)
FILE_NAME = "cesar.toml"

_PREFIX = "CESAR_"
_FLAGS = {
    "audio.directories": "--audio-dir",
    "broker.url": "--broker",
    "consumer.name": "--name",
    "data_dir": "--data-dir",
    "log.format": "--log-format",
    "log.level": "--log-level",
    "models.default": "--model",
    "topic_prefix": "--topic-prefix",
}
_KINDS = {
    "any": "of another kind",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
}


@dataclass(frozen=True, slots=True)
class Said:
    """What one source says about one setting."""

    value: object
    where: str
    """The setting as the user wrote it, with the file if it stood in one; how an error message begins."""
    written: object
    """The value as it was before lists were split and paths made absolute."""


class Vocabulary:
    """The names of all settings and what their values have to be.

    Args:
        schemas: the JSON Schema of each value by the setting's dotted name, at most one dot deep.
        secret: the names whose values no message may show.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]], *, secret: Collection[str] = ()) -> None:
        self._schemas = {name: _without_null(schema) for name, schema in schemas.items()}
        self._secret = frozenset(secret)
        self.groups = frozenset(name.partition(".")[0] for name in schemas if "." in name)
        self.variables = {variable_name(name): name for name in schemas}

    def schema(self, name: str) -> Mapping[str, Any] | None:
        """Look up what the value of a setting has to be; None: there is no such setting."""
        return self._schemas.get(name)

    def unknown(self, where: str, name: str, *, spell: Callable[[str], str] = str) -> ConfigError:
        """Build the error for a name that is no setting; `spell` writes the likeliest one as its source would."""
        if name in self.groups:
            example = next(known for known in self._schemas if known.startswith(f"{name}."))
            return ConfigError(f"{where}: this is a group of settings; set them one by one, such as {spell(example)}")
        leaf = name.rpartition(".")[2]
        likely = [known for known in self._schemas if known.rpartition(".")[2] == leaf]
        likely = likely or difflib.get_close_matches(name, self._schemas, n=1)
        hint = f"; did you mean {spell(likely[0])}?" if likely else ""
        return ConfigError(f"{where}: there is no such setting{hint}")

    def wrong(self, name: str, said: Said) -> ConfigError:
        """Build the error for a value that does not fit: where it stood, the value, what it must be."""
        shown = "" if name in self._secret else f" is {_shown(said.written)}"
        return ConfigError(f"{said.where}{shown}: it must be {_requirement(self._schemas[name])}")


def file_says(vocabulary: Vocabulary, config_file: Path | None, *, cwd: Path) -> dict[str, Said]:
    """Read `config_file`, or else the first file that is found; nothing found says nothing.

    Raises:
        ConfigError: `config_file` is missing, a file cannot be read, or it says something wrong.
    """
    for label, path in _candidates(config_file, cwd=cwd):
        tree = _read_toml(path, label, required=config_file is not None)
        if tree is not None:
            entries = ((name, Said(value, f"{name} in {label}", value)) for name, value in _leaves(vocabulary, tree))
            return _checked(vocabulary, entries, base=path.parent)
    return {}


def environment_says(vocabulary: Vocabulary, environ: Mapping[str, str], *, cwd: Path) -> dict[str, Said]:
    """Read the variables that begin with `CESAR_`; an empty one says nothing.

    Raises:
        ConfigError: one of them names no setting, or its value is wrong.
    """
    entries = []
    for variable in sorted(name for name in environ if name.startswith(_PREFIX)):
        name = variable.removeprefix(_PREFIX).lower().replace("__", ".")
        schema = vocabulary.schema(name) if variable in vocabulary.variables else None
        if schema is None:
            raise vocabulary.unknown(variable, name, spell=variable_name)
        if environ[variable]:
            entries.append((name, Said(_listed(environ[variable], schema), variable, environ[variable])))
    return _checked(vocabulary, entries, base=cwd)


def flags_say(vocabulary: Vocabulary, flags: Mapping[str, Any], *, cwd: Path) -> dict[str, Said]:
    """Take what the command line said, nested as the settings are; None and empty lists say nothing.

    Raises:
        ConfigError: a value is wrong.
    """
    given = ((name, value) for name, value in _leaves(vocabulary, flags) if value not in (None, [], ()))
    entries = ((name, Said(value, _FLAGS.get(name, f"{name} on the command line"), value)) for name, value in given)
    return _checked(vocabulary, entries, base=cwd)


def variable_name(name: str) -> str:
    """Spell a setting as an environment variable: `broker.url` is `CESAR_BROKER__URL`."""
    return _PREFIX + name.upper().replace(".", "__")


def _candidates(config_file: Path | None, *, cwd: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files to try, each with the name that messages give it."""
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


def _leaves(vocabulary: Vocabulary, tree: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield dotted names and values; settings are two levels deep, so a deeper table is a value (and refused)."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{inner}", inner_value) for inner, inner_value in value.items())
        elif not (isinstance(value, Mapping) and key in vocabulary.groups):
            yield key, value


def _checked(vocabulary: Vocabulary, entries: Iterable[tuple[str, Said]], *, base: Path) -> dict[str, Said]:
    """Refuse unknown names, and make paths absolute: relative ones start from `base`."""
    checked = {}
    for name, said in entries:
        schema = vocabulary.schema(name)
        if schema is None:
            raise vocabulary.unknown(said.where, name)
        if isinstance(said.value, bool) and schema["type"] != "boolean":
            raise vocabulary.wrong(name, said)  # pydantic would take true for 1
        try:
            checked[name] = replace(said, value=_located(said.value, schema, base=base, where=said.where))
        except ValueError as exc:
            raise vocabulary.wrong(name, said) from exc
    return checked


def _located(value: object, schema: Mapping[str, Any], *, base: Path, where: str) -> object:
    """Make the paths in a value absolute; leave what is no path, or not even text, as it is.

    Raises:
        ValueError: a path is empty or holds a NUL.
    """
    if schema["type"] == "array" and isinstance(value, list | tuple):
        return [_located(item, schema["items"], base=base, where=where) for item in value]
    if schema.get("format") != "path" or not isinstance(value, str | Path):
        return value
    if not str(value) or "\0" in str(value):
        raise ValueError(where)
    return base / _expanded(Path(value), where)


def _expanded(path: Path, where: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{where} is '{path}': there is no such home folder") from exc


def _listed(text: str, schema: Mapping[str, Any]) -> object:
    """Take a list out of a variable's text; broken JSON stays text, which the check then refuses."""
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
    """Choose what a value is when it is not None: no source can say None."""
    chosen = next(option for option in schema.get("anyOf", [schema]) if option.get("type") != "null")
    return {"type": "any", **chosen} | {key: schema[key] for key in ("description",) if key in schema}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return reprlib.repr(str(value) if isinstance(value, Path) else value)


def _requirement(schema: Mapping[str, Any]) -> str:
    """Say what a value has to be, as the end of a sentence."""
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
