"""Which package may import which, where third-party libraries stop, and that docs/operations.md lists every log action.

A module may import from its own package and from the layers above it in `_LAYERS`. Packages of one layer do not import
each other; the modules of the first one do.
"""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cesar_mqtt

_ROOT = Path(__file__).parents[2]
_PACKAGE = _ROOT / "cesar_mqtt"
_FILES = sorted(_PACKAGE.rglob("*.py"))

_LAYERS = [
    [
        *("__init__", "errors", "logs", "threads", "json_codec", "redaction"),
        *("jobs", "transcript", "config_sources", "config"),
    ],
    ["protocol"],
    ["audio", "mqtt", "ledger", "engines"],
    ["whisper"],
    ["consumer", "monitoring"],
    ["gateway"],
    ["service"],
    ["cli"],
    ["__main__"],
]
_RANK = {name: rank for rank, layer in enumerate(_LAYERS) for name in layer}

_WALLS = {
    "paho": {"mqtt"},
    "amqtt": {"mqtt"},
    "tinydb": {"ledger"},
    "nats": {"engines"},
    "av": {"audio"},
    "httpcore2": {"audio"},
    "watchfiles": {"gateway"},
    "wyoming": {"gateway"},
    "zeroconf": {"gateway"},
    "httpx2": {"audio", "gateway", "whisper"},  # whisper/hub.py catches its errors
    "faster_whisper": {"whisper"},
    "ctranslate2": {"whisper"},
    "onnxruntime": {"whisper"},
    "huggingface_hub": {"whisper"},
    "prometheus_client": {"monitoring"},
    "argon2": {"gateway"},
    "python_multipart": {"gateway"},
    "sse_starlette": {"gateway"},
    "starlette": {"gateway"},
    "uvicorn": {"gateway"},
    "typer": {"cli"},
    "rich": {"cli"},
}

# Imports that break a rule. The list only shrinks: an entry whose import is gone fails the test, too.
_EXCEPTIONS = {
    "audio.vad -> faster_whisper.vad",  # the voice activity detector comes with faster-whisper
}

_MOST_ROOT_MODULES = 12
_LOG_METHODS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
_COMMANDS = {"cancel", "cancel_all", "retry", "retry_last", "delete", "set", "pause", "resume"}
"""What `action=command` stands for."""


def _part(path: Path) -> str:
    """The package of a file, or the module at the root."""
    return path.relative_to(_PACKAGE).with_suffix("").parts[0]


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, by their dotted names, those inside functions and for types included."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            module = node.module or ""
            is_package = (_ROOT / module.replace(".", "/")).is_dir()
            yield from [f"{module}.{alias.name}" for alias in node.names] if is_package else [module]


def _listed(what: str, found: set[str]) -> str:
    return "\n    ".join([f"{what}:", *sorted(found)])


def _is_allowed(importer: str, imported: str) -> bool:
    parts = imported.split(".")
    if parts[0] != "cesar_mqtt":
        return importer in _WALLS.get(parts[0], {importer})
    target = parts[1] if len(parts) > 1 and parts[1] in _RANK else "__init__"
    same = importer == target or {importer, target} <= set(_LAYERS[0])
    return same or _RANK[target] < _RANK[importer]


def test_every_module_belongs_to_a_layer() -> None:
    assert {_part(path) for path in _FILES} - set(_RANK) == set()


def test_imports_point_downward_and_libraries_stop_at_their_package() -> None:
    broken = {
        f"{'.'.join(path.relative_to(_PACKAGE).with_suffix('').parts)} -> {name.removeprefix('cesar_mqtt.')}"
        for path in _FILES
        for name in _imports(path)
        if not _is_allowed(_part(path), name)
    }

    assert not broken - _EXCEPTIONS, _listed("these imports break the layering", broken - _EXCEPTIONS)
    assert not _EXCEPTIONS - broken, _listed("no longer needed in _EXCEPTIONS", _EXCEPTIONS - broken)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("mqtt", "cesar_mqtt.protocol.topics", True),
        ("mqtt", "cesar_mqtt.ledger.ledger", False),
        ("protocol", "cesar_mqtt.mqtt.client", False),
        ("config", "cesar_mqtt.errors", True),
        ("errors", "cesar_mqtt.protocol.topics", False),
        ("ledger", "cesar_mqtt.ledger.journal", True),
        ("cli", "cesar_mqtt.__version__", True),
        ("consumer", "cesar_mqtt.monitoring.health", False),
        ("mqtt", "paho.mqtt.client", True),
        ("consumer", "paho.mqtt.client", False),
        ("consumer", "json", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, *, allowed: bool) -> None:
    assert _is_allowed(importer, imported) is allowed


def test_the_root_of_the_package_stays_small() -> None:
    assert len(list(_PACKAGE.glob("*.py"))) <= _MOST_ROOT_MODULES


def test_nothing_asserts_or_sleeps() -> None:
    found = [
        f"{path.relative_to(_ROOT)}:{node.lineno}"
        for path in _FILES
        for node in _nodes(path)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep")
        or (isinstance(node, ast.ImportFrom) and node.module == "time" and "sleep" in {a.name for a in node.names})
    ]

    assert found == []


def test_every_log_action_is_documented_and_every_documented_one_is_logged() -> None:
    logged = {word for path in _FILES for word in _actions(path)}

    table = (_ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("| `action` |")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    documented = {word for row in rows for word in re.findall(r"`([a-z_]+)`", row.split("|")[1])}

    assert not logged - documented, _listed("logged, but not in the table of docs/operations.md", logged - documented)
    assert not documented - logged, _listed("in docs/operations.md, but logged nowhere", documented - logged)


def _actions(path: Path) -> Iterator[str]:
    """The `action` words that a file logs, by `event(logger, level, "word", ...)` or `log.info(..., action="word")`."""
    for function in _nodes(path):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for call in ast.walk(function):
                action = _action(call) if isinstance(call, ast.Call) else None
                if action is not None:
                    yield from _words(action, function, path)


def _action(call: ast.Call) -> ast.expr | None:
    if ast.unparse(call.func) in {"event", "logs.event"}:
        return call.args[2]
    if isinstance(call.func, ast.Attribute) and call.func.attr in _LOG_METHODS:
        return next((keyword.value for keyword in call.keywords if keyword.arg == "action"), None)
    return None


def _words(action: ast.expr, function: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> set[str]:
    """What an `action` can be: a literal, either side of a condition, or what the function assigns to the name."""
    if isinstance(action, ast.Constant):
        return {str(action.value)}
    if isinstance(action, ast.IfExp):
        return _words(action.body, function, path) | _words(action.orelse, function, path)
    assert isinstance(action, ast.Name), f"{path}:{action.lineno}: write the action as a literal"
    words = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            words |= {word for value in _assigned(node.targets[0], node.value, action.id) for word in value}
    if not words:
        assert action.id == "command", f"{path}:{action.lineno}: write the action as a literal"
    return words or _COMMANDS


def _assigned(target: ast.expr, value: ast.expr, name: str) -> Iterator[set[str]]:
    """The literals that `target = value` gives to a name, by position in a tuple, and on both sides of a condition."""
    if isinstance(value, ast.IfExp):
        yield from _assigned(target, value.body, name)
        yield from _assigned(target, value.orelse, name)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for inner, part in zip(target.elts, value.elts, strict=True):
            yield from _assigned(inner, part, name)
    elif isinstance(target, ast.Name) and target.id == name and isinstance(value, ast.Constant):
        yield {str(value.value)}


def test_the_life_of_a_job_names_functions_that_exist() -> None:
    """The stops in the package's docstring are where a reader starts."""
    stops = re.findall(r"`([a-z_]+\.[a-z_]+)\.([A-Za-z_.]+)`", cesar_mqtt.__doc__ or "")
    assert len(stops) >= 10
    for module, name in stops:
        found: object = importlib.import_module(f"cesar_mqtt.{module}")
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name
