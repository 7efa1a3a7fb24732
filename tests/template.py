"""Starts `cesar-mqtt` as a process of its own without importing everything anew, which takes longer than most tests.

The template process, one for each process that runs tests, has imported every module of the package and done nothing
else: it has no further threads, has read no settings and handles no signals. It forks for each start; the child gets
its own arguments, environment, folder and streams, and runs the package as `python -m cesar_mqtt` does.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

_PACKAGE = "cesar_mqtt"
_ROOT = Path(__file__).parents[1]


class Started(Protocol):
    """The part of `subprocess.Popen` that the tests use."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def start(
    arguments: Sequence[str],
    *,
    cwd: Path | None,
    env: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
    fresh: bool = False,
    python: str = sys.executable,
) -> Started:
    """Run `cesar-mqtt` with nothing on stdin.

    Args:
        arguments: what follows `cesar-mqtt`.
        cwd: the folder; None: this process's.
        env: all variables. Libraries may read those that are not the package's own when they are imported: where one
            differs from the template's, the interpreter is started anew.
        stdout: an open file.
        stderr: an open file.
        fresh: whether to start the interpreter anew in any case, as where the start itself is tested.
        python: the interpreter of the environment in which the package is installed.
    """
    if not fresh and hasattr(os, "pidfd_open") and _others(env) == (template := _template(python)).environ:
        return template.fork(arguments, cwd=cwd, env=env, streams=(stdout, stderr))
    command = [python, "-m", _PACKAGE, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


def _others(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that a library may read when it is imported."""
    return {name: value for name, value in env.items() if not name.startswith(("CESAR_", "PYTEST_"))}


# -- in the process that runs the tests --------------------------------------------------------------------------------


class _Forked:
    """A child of the template. Any thread may use it."""

    def __init__(self, pid: int, outcome: socket.socket) -> None:
        self.pid = pid
        self._outcome = outcome
        self._code: int | None = None
        self._reading = threading.Lock()

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        try:
            has_ended = self._code is not None or bool(select.select([self._outcome], [], [], timeout)[0])
        except (OSError, ValueError):  # another thread has read the code, and closed the socket
            has_ended = True
        with self._reading:
            if self._code is None:
                if not has_ended:
                    raise subprocess.TimeoutExpired(_PACKAGE, timeout or 0.0)
                with self._outcome:
                    self._code = int(self._outcome.recv(16))
            return self._code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Template:
    """The template process; children that are left end with it."""

    def __init__(self, python: str) -> None:
        self.environ = _others(os.environ)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [python, "-m", "tests.template", str(theirs.fileno())],
                cwd=_ROOT,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def fork(
        self, arguments: Sequence[str], *, cwd: Path | None, env: Mapping[str, str], streams: Sequence[IO[bytes]]
    ) -> Started:
        request = json.dumps([[*arguments], str(cwd or Path.cwd()), {**env}]).encode()
        outcome, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._control, [request], [*(stream.fileno() for stream in streams), theirs.fileno()])
        return _Forked(int(outcome.recv(16)), outcome)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@functools.cache
def _template(python: str) -> _Template:
    template = _Template(python)
    atexit.register(template.close)
    return template


# -- in the template process -------------------------------------------------------------------------------------------


def _import_all() -> None:
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.walk_packages(package.__path__, f"{_PACKAGE}."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as exc:  # of an extra that is not installed; a test that needs it fails
            if (exc.name or _PACKAGE).startswith(_PACKAGE):
                raise
    gc.collect()
    gc.freeze()


class _Children:
    """The children that run, and where each one's exit code is wanted."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, tuple[int, socket.socket]] = {}

    def serve(self, control: socket.socket) -> list[Any] | None:
        """Fork for each request. Returns the request in a child, and None in the template when the tests have ended."""
        self._selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._running:
                    self._reap(key.fd)
                    continue
                request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
                if not request:
                    self._kill()
                    return None
                if self._fork(descriptors) == 0:
                    control.close()
                    return list(json.loads(request))

    def _fork(self, descriptors: Sequence[int]) -> int:
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            for handle, (_, outcome) in self._running.items():
                os.close(handle)
                outcome.close()
            os.dup2(descriptors[0], 1)
            os.dup2(descriptors[1], 2)
            for descriptor in descriptors:
                os.close(descriptor)
            return 0
        os.close(descriptors[0])
        os.close(descriptors[1])
        outcome = socket.socket(fileno=descriptors[2])
        outcome.send(b"%d" % pid)
        handle = os.pidfd_open(pid)
        self._running[handle] = pid, outcome
        self._selector.register(handle, selectors.EVENT_READ)
        return pid

    def _reap(self, handle: int) -> None:
        pid, outcome = self._running.pop(handle)
        self._selector.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        with outcome, suppress(BrokenPipeError):  # a test may not wait for what it has killed
            outcome.send(b"%d" % os.waitstatus_to_exitcode(status))

    def _kill(self) -> None:
        for pid, _ in self._running.values():
            os.kill(pid, signal.SIGKILL)
        for handle in list(self._running):
            self._reap(handle)


def _run(arguments: list[str], folder: str, environ: dict[str, str]) -> None:
    if seconds := environ.get("PYTEST_TRANSCRIBER_S"):
        from tests.cluster import simulated  # noqa: PLC0415 - most consumers have the real transcriber

        simulated.install(float(seconds))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[0] = folder  # as `python -m` sets it
    sys.argv[1:] = arguments
    runpy.run_module(_PACKAGE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the tests end this one
    _import_all()
    if (request := _Children().serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _run(*request)
