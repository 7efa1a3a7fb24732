import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from cesar_mqtt.errors import ExitCode
from cesar_mqtt.monitoring.signals import StopSignals, handle_stop_signals
from tests.conftest import PATIENCE_S, Process


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_requests_a_stop_and_forces_nothing(number: signal.Signals) -> None:
    with handle_stop_signals() as stop:
        assert not stop.is_requested()
        assert stop.exit_code is ExitCode.OK
        signal.raise_signal(number)
        assert stop.wait(PATIENCE_S)
        assert not stop.is_forced()


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 143),
        (signal.SIGHUP, signal.SIGHUP, 143),
    ],
)
def test_the_second_signal_forces_the_stop_and_decides_the_exit_code(
    first: signal.Signals, second: signal.Signals, code: int
) -> None:
    with handle_stop_signals() as stop:
        signal.raise_signal(first)
        assert stop.wait(PATIENCE_S)
        signal.raise_signal(second)
        assert stop.is_forced()
        assert stop.exit_code == code


def test_after_the_second_signal_the_process_ends_whatever_blocks_it() -> None:
    script = textwrap.dedent(
        """
        import sys, threading
        from cesar_mqtt.monitoring import signals
        signals._FORCED_STOP_S = 0.2
        with signals.handle_stop_signals():
            print("ready", flush=True)
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        """
    )
    with Process([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) in {130, 143}, "two signals at once arrive in either order"


def test_under_nohup_a_closed_terminal_does_not_stop_the_process() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handle_stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert not stop.is_requested()


def test_two_signals_at_once_are_two_signals() -> None:
    with handle_stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_forced()


def test_a_third_signal_changes_nothing() -> None:
    with handle_stop_signals() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert stop.exit_code is ExitCode.TERMINATED


def test_a_stop_that_times_out_exits_with_the_code_of_the_only_signal() -> None:
    with handle_stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.wait(PATIENCE_S)
        assert stop.exit_code is ExitCode.INTERRUPTED


def test_the_former_handlers_come_back() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    with pytest.raises(RuntimeError), handle_stop_signals():
        raise RuntimeError
    signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_finds_the_main_thread_inside_a_lock_does_not_hang_it() -> None:
    with handle_stop_signals() as stop:
        with stop._lock:
            signal.raise_signal(signal.SIGTERM)
        assert stop.is_requested()


def test_a_stop_can_be_requested_without_a_signal_and_then_a_signal_forces_it() -> None:
    with handle_stop_signals() as stop:
        stop.request()
        stop.request()
        assert stop.is_requested()
        assert not stop.is_forced()
        signal.raise_signal(signal.SIGINT)
        stop.request()
        assert stop.is_forced()
        assert stop.exit_code is ExitCode.INTERRUPTED


def test_a_request_ends_the_wait_of_another_thread() -> None:
    stop = StopSignals()
    waited: list[bool] = []
    thread = threading.Thread(target=lambda: waited.append(stop.wait(PATIENCE_S)))
    thread.start()
    stop.request()
    thread.join(PATIENCE_S)
    assert waited == [True]


def test_a_wait_without_a_signal_ends_after_its_time() -> None:
    assert not StopSignals().wait(0.01)


def test_outside_the_main_thread_it_is_refused() -> None:
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            with handle_stop_signals():
                pass
        except ValueError as exc:
            raised.append(exc)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(PATIENCE_S)
    assert len(raised) == 1


def test_a_wait_in_the_main_thread_ends_at_once() -> None:
    script = """
        import threading
        from cesar_mqtt.monitoring.signals import handle_stop_signals
        with handle_stop_signals() as stop:
            print("waiting", flush=True)
            stop.wait(60.0)
            print("requested", flush=True)
            while not stop.is_forced():
                threading.Event().wait(0.01)
        raise SystemExit(stop.exit_code)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with Process(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            os.kill(process.pid, signal.SIGINT)
            assert process.stdout.readline() == "requested\n"
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 143
        finally:
            process.kill()
