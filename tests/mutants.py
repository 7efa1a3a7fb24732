"""A fixed random sample of mutants of a package, each tried on the unit tests that run its line.

    python -m tests.mutants ledger --sample 300 --seed 1

A mutant is one small change of the code: another comparison, a branch that is never taken, a call left out. A mutant
that no test notices ("survived") shows what the tests do not check. The sample is the same for the same code and seed.

One run of the tests under coverage finds which test runs which line, and how long it takes; it is kept in build/. Then
a process that has imported every library but not this package is forked for each mutant: the mutated module is compiled
from its changed syntax tree, and its tests run, the fastest first, until one fails. The working tree is not changed.
"""

import argparse
import ast
import copy
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest

_ROOT = Path.cwd()
_PACKAGE = "cesar_mqtt"
_LIBRARIES = (
    *(
        "pytest",
        "_pytest.assertion.rewrite",
        "_pytest.legacypath",
        "pytest_timeout",
        "hypothesis",
        "hypothesis.stateful",
    ),
    *(
        "hypothesis.strategies",
        "numpy",
        "pydantic",
        "pydantic_settings",
        "paho.mqtt.client",
        "av",
        "tinydb",
        "filelock",
    ),
    *("faster_whisper", "ctranslate2", "huggingface_hub", "httpcore2", "httpx2", "amqtt.broker", "typer", "rich.table"),
    *("rich.live", "prometheus_client", "jsonschema", "platformdirs", "srt", "webvtt", "concurrent.futures", "asyncio"),
)
_SLOWER, _GRACE_S = 4, 20.0
"""The limit counts processor time, so that other work on the machine changes no verdict. After so many times the limit,
and as much for the start of pytest, a child is given up."""

# -- mutants ---------------------------------------------------------------------------------------------------------

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    new: old
    for one, other in (
        (ast.Lt, ast.LtE),
        (ast.Gt, ast.GtE),
        (ast.Eq, ast.NotEq),
        (ast.Is, ast.IsNot),
        (ast.In, ast.NotIn),
        (ast.And, ast.Or),
        (ast.Add, ast.Sub),
        (ast.Mult, ast.Div),
        (ast.LShift, ast.RShift),
        (ast.BitAnd, ast.BitOr),
    )
    for new, old in ((one, other), (other, one))
} | {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
_LIMIT = "survived so far"
_LOG_METHODS = {"debug", "info", "warning", "error", "critical", "exception", "log", "event"}


class Mutant(NamedTuple):
    """One change: of the `which`-th kind of change at the `node`-th node of a file's tree."""

    file: str
    line: int
    end: int
    column: int
    kind: str
    node: int
    which: int
    is_in_function: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.kind}"


Edit = Callable[[Any], ast.AST]
"""Changes a node, or returns what stands in its place."""


def _edits(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    """The changes that can be made to one node, in a fixed order."""
    yield from _edits_of_statement(node) if isinstance(node, ast.stmt) else _edits_of_expression(node)
    if isinstance(node, ast.If | ast.IfExp):
        yield "condition -> True", lambda n: _set(n, test=ast.Constant(value=True))
        yield "condition -> False", lambda n: _set(n, test=ast.Constant(value=False))


def _edits_of_expression(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _SWAPS:
            yield _named(op), lambda n: _set(n, ops=[_SWAPS[type(op)]()])
        case ast.BoolOp(op=op) | ast.BinOp(op=op) if type(op) in _SWAPS:
            yield _named(op), lambda n: _set(n, op=_SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield "not x -> x", lambda n: n.operand
        case ast.Constant(value=bool() as flag):
            yield f"{flag} -> {not flag}", lambda n: _set(n, value=not n.value)
        case ast.Constant(value=int() | float() as number):
            yield f"{number} -> {number + 1}", lambda n: _set(n, value=n.value + 1)
        case ast.Constant(value=str() as text) if text and not any(c.isspace() for c in text):
            yield f"{text!r:.40} -> 'XX...'", lambda n: _set(n, value="XX" + n.value)


def _edits_of_statement(node: ast.stmt) -> Iterator[tuple[str, Edit]]:
    match node:
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "return None", lambda n: _set(n, value=ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield "statement removed", lambda _: ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "assignment removed", lambda _: ast.Pass()
        case ast.Break():
            yield "break -> continue", lambda _: ast.Continue()
        case ast.Continue():
            yield "continue -> break", lambda _: ast.Break()
        case ast.While(test=test) if not isinstance(test, ast.Constant):
            yield "while -> False", lambda n: _set(n, test=ast.Constant(value=False))


def _named(op: ast.AST) -> str:
    return f"{type(op).__name__} -> {_SWAPS[type(op)].__name__}"


def _set(node: ast.AST, **fields: Any) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _walk(tree: ast.AST, *, is_in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node that runs, and whether it runs in a function: without docstrings, annotations, decorators and logs."""
    yield tree, is_in_function
    for name, value in ast.iter_fields(tree):
        if name in {"annotation", "returns", "decorator_list", "type_params", "bases"}:
            continue
        inside = is_in_function or (name == "body" and isinstance(tree, ast.FunctionDef | ast.Lambda))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_silent(child):
                yield from _walk(child, is_in_function=inside)


def _is_silent(node: ast.AST) -> bool:
    """Whether a change of this would change nothing, or only what is written for people."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.JoinedStr():
            return True
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name))):
            return name in _LOG_METHODS
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def find_mutants(path: Path) -> list[Mutant]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(_ROOT / _PACKAGE).as_posix()
    found = []
    for number, (node, is_in_function) in enumerate(_walk(tree)):
        for which, (kind, _) in enumerate(_edits(node)):
            line, end = int(getattr(node, "lineno", 1)), int(getattr(node, "end_lineno", 1))
            if isinstance(node, ast.If | ast.While):  # of these only the condition changes
                end = node.test.end_lineno or line
            found.append(Mutant(name, line, end, getattr(node, "col_offset", 0), kind, number, which, is_in_function))
    return found


def mutated(mutant: Mutant) -> ast.Module:
    """The syntax tree of the mutant's module, changed."""
    tree = ast.parse((_ROOT / _PACKAGE / mutant.file).read_text(encoding="utf-8"))
    target = next(node for number, (node, _) in enumerate(_walk(tree)) if number == mutant.node)
    _, edit = list(_edits(target))[mutant.which]
    replacement = edit(copy.deepcopy(target))
    replacement = replacement if isinstance(replacement, type(target)) else ast.copy_location(replacement, target)
    changed: ast.Module = _Replace(target, replacement).visit(tree)
    return ast.fix_missing_locations(changed)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, replacement: ast.AST) -> None:
        self._target, self._replacement = target, replacement

    def visit(self, node: ast.AST) -> Any:
        return self._replacement if node is self._target else self.generic_visit(node)


# -- which test runs which line --------------------------------------------------------------------------------------


@dataclass
class Reach:
    """What one run of the tests showed. `lines` has the numbers of the tests in `tests` for each line of each file."""

    tests: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests to try, the fastest first; what runs at the import is tried on every test that enters the file."""
        lines = self.lines.get(mutant.file, {})
        wanted = [str(n) for n in range(mutant.line, mutant.end + 1)] if mutant.is_in_function else list(lines)
        numbers = {number for line in wanted for number in lines.get(line, ())}
        return [self.tests[n] for n in sorted(numbers, key=lambda n: (self.seconds[n], n))]

    def seconds_of(self, test: str) -> float:
        return self.seconds[self.tests.index(test)]


def measure(tests: Sequence[str]) -> Reach:
    """Run the tests once under coverage, or read what an earlier run of the same code found."""
    sources = sorted([*(_ROOT / _PACKAGE).rglob("*.py"), *(_ROOT / "tests").rglob("*.py")])
    digest = hashlib.sha256("\0".join([*tests, *(path.read_text(encoding="utf-8") for path in sources)]).encode())
    kept = _ROOT / "build" / f"mutants-{digest.hexdigest()[:12]}.json"
    if kept.exists():
        return Reach(**json.loads(kept.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "coverage", Path(folder) / "durations"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.mutants",
            "--cov=" + _PACKAGE,
            "--cov-context=test",
            "--cov-report=",
            *tests,
        ]
        environment = {**os.environ, "COVERAGE_FILE": str(data), "MUTANTS_DURATIONS": str(report), "CI": "true"}
        subprocess.run(command, env=environment, check=False)
        durations = json.loads(report.read_text(encoding="utf-8"))
        reach = _read(data, durations)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(reach.__dict__), encoding="utf-8")
    return reach


def _read(data_file: Path, durations: dict[str, float]) -> Reach:
    data = coverage.CoverageData(str(data_file))
    data.read()
    reach = Reach(list(durations), list(durations.values()))
    number = {test: n for n, test in enumerate(reach.tests)}
    for file in data.measured_files():
        name = Path(file).relative_to(_ROOT / _PACKAGE).as_posix()
        reach.lines[name] = {
            str(line): sorted({number[c.partition("|")[0]] for c in contexts if c.partition("|")[0] in number})
            for line, contexts in data.contexts_by_lineno(file).items()
        }
    return reach


class _Durations:
    """Notes how long each test that passes takes, set-up included; one that fails is of no use here."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._seconds: dict[str, float] = {}
        self._bad: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.outcome != "passed":
            self._bad.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        good = {test: seconds for test, seconds in self._seconds.items() if test not in self._bad}
        self._report.write_text(json.dumps(good), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """This module is a plugin of the run under coverage."""
    if report := os.environ.get("MUTANTS_DURATIONS"):
        config.pluginmanager.register(_Durations(Path(report)))


# -- one mutant in a child process -----------------------------------------------------------------------------------


class _Mutated(importlib.abc.MetaPathFinder):
    """Finds the mutated module in place of the file."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self._name, self._path, self._tree = name, path, tree

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=_Loader(self._path, self._tree))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, path: Path, tree: ast.Module) -> None:
        name = ".".join(path.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__")
        super().__init__(name, str(path))
        self._tree = tree

    def get_code(self, _fullname: str) -> Any:
        return compile(self._tree, self.path, "exec", dont_inherit=True)


class _Judge:
    """Runs the fastest test first, and writes what came out: `killed TEST`, or that the time is over."""

    def __init__(self, tests: Sequence[str], seconds: dict[str, float], out: int, limit_s: float) -> None:
        self._order = {test: number for number, test in enumerate(tests)}
        self._seconds, self._out, self._limit_s = seconds, out, limit_s
        self._began = time.process_time()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._order.get(item.nodeid, len(self._order)))
        for item in items:
            item.add_marker(pytest.mark.timeout(10 + 10 * self._seconds.get(item.nodeid, 1.0)), append=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._out, f"killed {report.nodeid}".encode())
            os._exit(0)
        if report.when == "teardown" and time.process_time() - self._began > self._limit_s:
            os.write(self._out, _LIMIT.encode())
            os._exit(0)


def _child(mutant: Mutant, tests: Sequence[str], seconds: dict[str, float], out: int, limit_s: float) -> None:
    """Try one mutant; never returns."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    folder = tempfile.mkdtemp(prefix="mutant-")
    os.environ.update({"TMPDIR": folder, "CI": "true", "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"})
    tempfile.tempdir = folder
    code = 1
    try:
        os.write(out, f"{folder}\n".encode())
        path = _ROOT / _PACKAGE / mutant.file
        loader = _Loader(path, mutated(mutant))
        sys.meta_path.insert(0, _Mutated(loader.name, path, loader._tree))
        judge = _Judge(tests, seconds, out, limit_s)
        options = [
            "-x",
            "-q",
            "--assert=plain",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:cov",
            f"--basetemp={folder}/pytest",
        ]
        code = pytest.main([*options, *tests], plugins=[judge])
        if code == pytest.ExitCode.OK:
            os.write(out, b"survived")
        else:
            os.write(out, f"killed before the tests ({code!r})".encode())
    except BaseException as exc:  # noqa: BLE001 - the parent reports it
        os.write(out, f"failed: {exc!r}".encode())
    finally:
        os._exit(int(code))


def try_mutant(mutant: Mutant, reach: Reach, limit_s: float) -> tuple[str, float]:
    """Return `killed ...`, `survived`, `survived so far` (what there was time for) or `not run`; and the seconds."""
    tests = reach.of(mutant)
    if not tests:
        return "not run", 0.0
    seconds = {test: reach.seconds_of(test) for test in tests}
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(mutant, tests, seconds, writing, limit_s)
    os.close(writing)
    said, deadline = b"", began + _SLOWER * limit_s + _GRACE_S
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (part := os.read(reading, 65536)):
            break
        said += part
        if len(said.split(b"\n", 1)[-1]) > 0:
            break
    os.close(reading)
    try:
        os.killpg(child, signal.SIGKILL)  # with the processes that a test has started
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)  # it has no group of its own yet
    os.waitpid(child, 0)
    folder, _, verdict = said.decode().partition("\n")
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    if verdict.startswith("failed"):
        raise RuntimeError(f"{mutant}: {verdict}")
    return verdict or "killed by hanging", time.monotonic() - began


# -- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="PACKAGE", help="such as ledger, or a module: consumer/worker.py")
    parser.add_argument("--sample", type=int, default=300, help="how many mutants (300)")
    parser.add_argument("--seed", type=int, default=1, help="which sample (1)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (1)")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds of processor time for one mutant (5)")
    parser.add_argument("--long", type=float, default=60.0, help="as much for a second try of what took longer (60)")
    parser.add_argument("--tests", nargs="+", default=["tests/unit"], help="where the tests are (tests/unit)")
    wanted = parser.parse_args()
    paths: list[Path] = []
    for part in wanted.parts:
        place = _ROOT / _PACKAGE / part
        paths += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    everything = [mutant for path in paths for mutant in find_mutants(path)]
    # S311: not a secret, but a sample that comes again.
    sample = sorted(random.Random(wanted.seed).sample(everything, min(wanted.sample, len(everything))))  # noqa: S311
    reach = measure(wanted.tests)
    for library in _LIBRARIES:
        if importlib.util.find_spec(library.partition(".")[0]):
            importlib.import_module(library)
    _write(f"{len(sample)} of {len(everything)} mutants of {' '.join(wanted.parts)}, {len(reach.tests)} tests")
    verdicts: dict[Mutant, str] = {}
    for limit_s in (wanted.limit, wanted.long):
        if verdicts:
            sample = [mutant for mutant, verdict in verdicts.items() if verdict == _LIMIT]
            _write(f"{_summary(verdicts)}\n{len(sample)} once more, for {limit_s:g} s each")
        with multiprocessing.get_context("fork").Pool(wanted.jobs) as pool:
            attempts = pool.imap(functools.partial(try_mutant, reach=reach, limit_s=limit_s), sample)
            for mutant, (verdict, seconds) in zip(sample, attempts, strict=True):
                verdicts[mutant] = verdict
                _write(f"{seconds:6.1f} s  {mutant}: {verdict}")
    survivors = [f"{mutant} ({verdict})" for mutant, verdict in verdicts.items() if not verdict.startswith("killed")]
    _write("\nSurvivors:\n" + "\n".join(survivors))
    _write(f"\n{' '.join(wanted.parts)}: {_summary(verdicts)}")


def _summary(verdicts: dict[Mutant, str]) -> str:
    counts = Counter("killed" if verdict.startswith("killed") else verdict for verdict in verdicts.values())
    score = 100 * counts["killed"] / max(1, len(verdicts))
    return f"{counts['killed']} of {len(verdicts)} killed ({score:.1f} %), {dict(counts)}"


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
