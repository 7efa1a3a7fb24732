"""A fixed random sample of mutants of a package, each tried on the unit tests that run its line.

    python -m tests.mutants ledger --sample 300 --seed 1

A mutant is one small change of the code: another comparison, a branch that is never taken, a call left out. A mutant
that no test notices ("survived") shows what the tests do not check. The sample is the same for the same code and seed.

One run of the tests under coverage finds which test runs which line, and how long it takes; it is kept in build/. Then
the tests are collected once, and a process is forked for each mutant. It puts the code of the changed function in place
and runs the tests of that line, the fastest first, until one fails. What runs at the import (a constant, a default) is
tried in a process that was forked before this package was imported, so that the changed module is imported; it runs the
tests that enter that module or one that imports it, those of its package first. The working tree is not changed.
"""

import argparse
import ast
import copy
import functools
import gc
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
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import coverage
import pytest
from hypothesis.internal.conjecture import engine

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
and as much for the start of pytest, a child has failed."""

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
        yield "condition -> True", lambda n: _set(n, test=_instead(n.test, value=True))
        yield "condition -> False", lambda n: _set(n, test=_instead(n.test, value=False))


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
            yield "return None", lambda n: _set(n, value=_instead(n.value, value=None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield "statement removed", _removed
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "assignment removed", _removed
        case ast.Break():
            yield "break -> continue", lambda _: ast.Continue()
        case ast.Continue():
            yield "continue -> break", lambda _: ast.Break()
        case ast.While(test=test) if not isinstance(test, ast.Constant):
            yield "while -> False", lambda n: _set(n, test=_instead(n.test, value=False))


def _named(op: ast.AST) -> str:
    return f"{type(op).__name__} -> {_SWAPS[type(op)].__name__}"


def _instead(expression: ast.expr, *, value: bool | None) -> ast.expr:
    """A constant; what it takes the place of stays as dead code, so that the function closes over the same names."""
    return ast.IfExp(ast.Constant(value=True), ast.Constant(value=value), expression)


def _removed(statement: ast.stmt) -> ast.stmt:
    return ast.If(ast.Constant(value=False), [statement], [])


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
        """The tests to try, the fastest first.

        What runs at the import is tried on every test that enters its file or one that imports it. Those that stand
        with the package's tests come first: they are the likeliest to look at a constant.
        """
        if mutant.is_in_function:
            lines = self.lines.get(mutant.file, {})
            numbers = {n for line in range(mutant.line, mutant.end + 1) for n in lines.get(str(line), ())}
            return [self.tests[n] for n in sorted(numbers, key=lambda n: (self.seconds[n], n))]
        files = {mutant.file, *importers()[mutant.file]}
        numbers = {n for file in files for tests in self.lines.get(file, {}).values() for n in tests}
        package = f"/{Path(mutant.file).parent.name}/"
        order = sorted(numbers, key=lambda n: (package not in self.tests[n], self.seconds[n], n))
        return [self.tests[n] for n in order]

    def seconds_of(self, test: str) -> float:
        return self.seconds[self.tests.index(test)]


@functools.cache
def importers() -> dict[str, set[str]]:
    """Which files import each file, by name: `from package.module import ...` or `from package import module`."""
    paths = {path.relative_to(_ROOT).with_suffix(""): path for path in (_ROOT / _PACKAGE).rglob("*.py")}
    files = {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {path.relative_to(_ROOT / _PACKAGE).as_posix(): set() for path in files.values()}
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    if name in files:
                        imported = files[name].relative_to(_ROOT / _PACKAGE).as_posix()
                        found[imported].add(path.relative_to(_ROOT / _PACKAGE).as_posix())
    return found


def kept_file(tests: Sequence[str]) -> Path:
    """Where to keep what was found out about this code with these tests."""
    sources = sorted([*(_ROOT / _PACKAGE).rglob("*.py"), *(_ROOT / "tests").rglob("*.py")])
    sources.remove(Path(__file__).resolve())
    digest = hashlib.sha256("\0".join([*tests, *(path.read_text(encoding="utf-8") for path in sources)]).encode())
    return _ROOT / "build" / f"mutants-{digest.hexdigest()[:12]}.json"


def measure(tests: Sequence[str], kept: Path) -> Reach:
    """Run the tests once under coverage, or read what an earlier run of the same code found."""
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
        environment = {**os.environ, "COVERAGE_FILE": str(data), "MUTANTS_DURATIONS": str(report)}
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
    together: dict[str, list[int]] = {}
    for test, n in number.items():
        together.setdefault(test.partition("::")[0], []).append(n)

    def numbers_of(context: str) -> list[int]:
        test, _, phase = context.partition("|")
        if phase == "setup":  # a fixture may be for the whole file, and is set up by the first test that needs it
            return together.get(test.partition("::")[0], [])
        return [number[test]] if test in number else []

    for file in data.measured_files():
        name = Path(file).relative_to(_ROOT / _PACKAGE).as_posix()
        reach.lines[name] = {
            str(line): sorted({n for context in contexts for n in numbers_of(context)})
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


class Verdict(NamedTuple):
    """`killed ...`, `survived`, `survived so far` (what there was time for) or `not run`; and the seconds it took."""

    outcome: str
    seconds: float


Note = Callable[[Mutant, Verdict], None]
"""Called with each verdict."""


def in_child(work: Callable[[Callable[[str], None], Path], None], limit_s: float) -> Verdict:
    """Fork, and have the child call `work` with a function that reports the outcome, and a folder of its own."""
    began = time.monotonic()
    reading, writing = os.pipe()
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live(work, folder, writing)
    os.close(writing)
    deadline = began + _SLOWER * limit_s + _GRACE_S
    is_ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
    outcome = os.read(reading, 65_536).decode() if is_ready else "killed by hanging"
    os.close(reading)
    try:
        os.killpg(child, signal.SIGKILL)  # with the processes that a test has started
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)  # it has no group of its own yet
    os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return Verdict(outcome or "killed by the end of the process", time.monotonic() - began)


def _live(work: Callable[[Callable[[str], None], Path], None], folder: Path, out: int) -> None:
    """The life of a child; never returns."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.environ.update({"TMPDIR": str(folder), "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"})
    tempfile.tempdir = str(folder)

    def report_outcome(text: str) -> None:
        os.write(out, text.encode())
        os._exit(0)

    try:
        work(report_outcome, folder)
    except BaseException as exc:  # noqa: BLE001 - the parent reports it
        report_outcome(f"failed: {exc!r}")
    os._exit(0)


class Judge:
    """A plugin that reports `killed TEST`, or that the time is over."""

    def __init__(self, report_outcome: Callable[[str], None], limit_s: float) -> None:
        self._report_outcome, self._limit_s = report_outcome, limit_s
        self._began = time.process_time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._report_outcome(f"killed {report.nodeid}")
        if report.when == "teardown" and time.process_time() - self._began > self._limit_s:
            self._report_outcome(_LIMIT)


# -- a mutant in a function: the tests are collected, the code is exchanged ------------------------------------------


class Session:
    """A plugin that tries mutants in place of running the tests that were collected."""

    def __init__(self, mutants: Sequence[Mutant], reach: Reach, wanted: argparse.Namespace, note: Note) -> None:
        self.verdicts: dict[Mutant, Verdict] = {}
        self._mutants, self._reach, self._note = mutants, reach, note
        self._limit_s, self._jobs = wanted.limit, wanted.jobs
        self._items: dict[str, pytest.Item] = {}
        self._functions: dict[tuple[str, str, int], list[FunctionType]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise pytest.UsageError("some tests cannot be collected")
        self._items = {item.nodeid: item for item in session.items}
        for found in gc.get_objects():
            if isinstance(found, FunctionType):
                code = found.__code__
                key = (code.co_filename, code.co_qualname, code.co_firstlineno)
                self._functions.setdefault(key, []).append(found)
        gc.freeze()
        with multiprocessing.get_context("fork").Pool(self._jobs) as pool:
            for mutant, verdict in zip(self._mutants, pool.imap(self._try, self._mutants), strict=True):
                self.verdicts[mutant] = verdict
                self._note(mutant, verdict)
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return _the_session, ()  # a worker of the pool has it, for it was forked

    def _try(self, mutant: Mutant) -> Verdict:
        tests = [test for test in self._reach.of(mutant) if test in self._items]
        if not tests:
            return Verdict("not run", 0.0)
        return in_child(lambda report_outcome, folder: self._run(mutant, tests, report_outcome, folder), self._limit_s)

    def _run(self, mutant: Mutant, tests: Sequence[str], report_outcome: Callable[[str], None], folder: Path) -> None:
        items = [self._items[test] for test in tests]
        config = items[0].config
        factory = config._tmp_path_factory  # type: ignore[attr-defined]
        factory._given_basetemp, factory._basetemp = folder / "pytest", None
        engine.MAX_SHRINKING_SECONDS = engine.MAX_SHRINKS = 0  # that it fails is enough
        exchange(mutant, self._functions)
        config.pluginmanager.register(Judge(report_outcome, self._limit_s))
        for item, following in zip(items, [*items[1:], None], strict=True):
            seconds = self._reach.seconds_of(item.nodeid)
            item.add_marker(pytest.mark.timeout(10 + 10 * seconds), append=False)
            try:
                config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            except BaseException as exc:  # noqa: BLE001 - the mutant has broken the runner itself
                report_outcome(f"killed {item.nodeid} ({type(exc).__name__})")
        report_outcome("survived")


_sessions: list[Session] = []


def _the_session() -> Session:
    return _sessions[-1]


def exchange(mutant: Mutant, functions: dict[tuple[str, str, int], list[FunctionType]]) -> None:
    """Give every function object that holds the mutant's line its changed code; closures get it from the outer one."""
    path = str(_ROOT / _PACKAGE / mutant.file)
    changed = compile(mutated(mutant), path, "exec", dont_inherit=True)
    exchanged = 0
    for code in _codes(changed):
        if code.co_firstlineno <= mutant.line <= _last_line(code):
            for function in functions.get((path, code.co_qualname, code.co_firstlineno), ()):
                if function.__code__.co_freevars == code.co_freevars:
                    function.__code__ = code
                    exchanged += 1
    if not exchanged:
        raise LookupError(f"no function has the line of {mutant}")


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _last_line(code: CodeType) -> int:
    own = [line for _, _, line in code.co_lines() if line is not None]
    return max(
        [*own, code.co_firstlineno, *(_last_line(inner) for inner in code.co_consts if isinstance(inner, CodeType))]
    )


def try_collected(
    mutants: Sequence[Mutant], reach: Reach, wanted: argparse.Namespace, note: Note
) -> dict[Mutant, Verdict]:
    session = Session(mutants, reach, wanted, note)
    _sessions.append(session)
    options = ["-q", "-s", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    pytest.main([*options, *wanted.tests], plugins=[session])
    return session.verdicts


# -- a mutant of what runs at the import -----------------------------------------------------------------------------


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


class _Chosen:
    """A plugin that runs the chosen tests, in their order, of all that the files have."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )


def try_imported(mutant: Mutant, reach: Reach, limit_s: float) -> Verdict:
    """Try the tests of the package first: to import a file of tests costs more than to run most of them."""
    tests = reach.of(mutant)
    package = f"/{Path(mutant.file).parent.name}/"
    spent, outcome = 0.0, "not run"
    for some in ([test for test in tests if package in test], [test for test in tests if package not in test]):
        if some:
            outcome, seconds = in_child(functools.partial(_import_and_run, mutant, some, limit_s), limit_s)
            spent += seconds
        if outcome not in {"survived", _LIMIT, "not run"}:
            break
    return Verdict(outcome, spent)


def _import_and_run(
    mutant: Mutant, tests: Sequence[str], limit_s: float, report_outcome: Callable[[str], None], folder: Path
) -> None:
    path, tree = _ROOT / _PACKAGE / mutant.file, mutated(mutant)
    sys.meta_path.insert(0, _Mutated(_Loader(path, tree).name, path, tree))
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={folder}/pytest", "--timeout=60"]
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    code = pytest.main([*options, *files], plugins=[Judge(report_outcome, limit_s), _Chosen(tests)])
    report_outcome("survived" if code == pytest.ExitCode.OK else f"killed before the tests ({code!r})")


def _try_all_imported(
    mutants: Sequence[Mutant], reach: Reach, wanted: argparse.Namespace, note: Note
) -> dict[Mutant, Verdict]:
    for library in _LIBRARIES:
        if importlib.util.find_spec(library.partition(".")[0]):
            importlib.import_module(library)
    verdicts = {}
    with multiprocessing.get_context("fork").Pool(wanted.jobs) as pool:
        attempts = pool.imap(functools.partial(try_imported, reach=reach, limit_s=wanted.limit), mutants)
        for mutant, verdict in zip(mutants, attempts, strict=True):
            verdicts[mutant] = verdict
            note(mutant, verdict)
    return verdicts


# -- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="PACKAGE", help="such as ledger, or a module: consumer/worker.py")
    parser.add_argument("--sample", type=int, default=300, help="how many mutants (300)")
    parser.add_argument("--seed", type=int, default=1, help="which sample (1)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (1)")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of processor time for one mutant (20)")
    parser.add_argument("--tests", nargs="+", default=["tests/unit"], help="where the tests are (tests/unit)")
    wanted = parser.parse_args()
    os.environ["CI"] = "true"  # properties are tried on the same examples each time
    paths: list[Path] = []
    for part in wanted.parts:
        place = _ROOT / _PACKAGE / part
        paths += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    everything = [mutant for path in paths for mutant in find_mutants(path)]
    sample = sorted(random.Random(wanted.seed).sample(everything, min(wanted.sample, len(everything))))  # noqa: S311
    kept = kept_file(wanted.tests)
    reach = measure(wanted.tests, kept)
    _write(f"{len(sample)} of {len(everything)} mutants of {' '.join(wanted.parts)}, {len(reach.tests)} tests")
    known = kept.with_suffix(f".{wanted.limit:g}s.txt")  # of a run that was interrupted, or of another sample
    verdicts = _known(known, sample)
    rest = [mutant for mutant in sample if mutant not in verdicts]
    with known.open("a", encoding="utf-8") as file:

        def note(mutant: Mutant, verdict: Verdict) -> None:
            _write(f"{verdict.seconds:6.1f} s  {mutant}: {verdict.outcome}")
            file.write(f"{mutant}\t{verdict.outcome}\n")
            file.flush()

        verdicts |= _try_all_imported([mutant for mutant in rest if not mutant.is_in_function], reach, wanted, note)
        verdicts |= try_collected([mutant for mutant in rest if mutant.is_in_function], reach, wanted, note)
    survivors = [f"{mutant} ({verdicts[mutant].outcome})" for mutant in sample if not _is_killed(verdicts[mutant])]
    _write("\nSurvivors:\n" + "\n".join(survivors))
    counts = Counter("killed" if _is_killed(verdict) else verdict.outcome for verdict in verdicts.values())
    score = 100 * counts["killed"] / max(1, len(sample))
    _write(f"\n{' '.join(wanted.parts)}: {counts['killed']} of {len(sample)} killed ({score:.1f} %), {dict(counts)}")


def _known(file: Path, sample: Sequence[Mutant]) -> dict[Mutant, Verdict]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    outcomes = dict(line.split("\t", 1) for line in lines)
    return {mutant: Verdict(outcomes[str(mutant)], 0.0) for mutant in sample if str(mutant) in outcomes}


def _is_killed(verdict: Verdict) -> bool:
    return verdict.outcome.startswith("killed")


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
