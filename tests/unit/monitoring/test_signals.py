import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from cesar_mqtt.errors import ExitCode
from cesar_mqtt.monitoring.signals import handle_stop_signals

DEADLINE_S = 10.0


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_requests_a_stop_and_forces_nothing(number: signal.Signals) -> None:
    with handle_stop_signals() as stop:
        assert not stop.requested.is_set()
        assert stop.exit_code is ExitCode.OK
        signal.raise_signal(number)
        assert stop.requested.wait(DEADLINE_S)
        assert not stop.forced.is_set()


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
        assert stop.requested.wait(DEADLINE_S)
        signal.raise_signal(second)
        assert stop.forced.wait(DEADLINE_S)
        assert stop.exit_code == code


def test_a_closed_terminal_stops_nothing_that_was_started_with_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handle_stop_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert not stop.requested.is_set()


def test_two_signals_at_once_are_two_signals() -> None:
    with handle_stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.forced.is_set()


def test_a_third_signal_changes_nothing() -> None:
    with handle_stop_signals() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert stop.exit_code is ExitCode.TERMINATED


def test_a_stop_that_ran_out_of_time_exits_with_the_code_of_the_only_signal() -> None:
    with handle_stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested.wait(DEADLINE_S)
        assert stop.exit_code is ExitCode.INTERRUPTED


def test_the_former_handlers_come_back_and_the_thread_ends() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    threads = threading.active_count()
    with pytest.raises(RuntimeError), handle_stop_signals():
        raise RuntimeError
    signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert threading.active_count() == threads


def test_a_signal_that_finds_the_main_thread_inside_an_event_does_not_hang_it() -> None:
    # Setting the event in the handler itself would wait for this lock, which is held by the thread that it interrupted.
    with handle_stop_signals() as stop:
        with stop.requested._cond:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested.wait(DEADLINE_S)


def test_outside_the_main_thread_it_is_refused_and_leaves_nothing_behind() -> None:
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            with handle_stop_signals():
                pass
        except ValueError as exc:
            raised.append(exc)

    threads = threading.active_count()
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(DEADLINE_S)
    assert len(raised) == 1
    assert threading.active_count() == threads


def test_a_wait_without_end_in_the_main_thread_ends_at_once() -> None:
    script = """
        from cesar_mqtt.monitoring.signals import handle_stop_signals
        with handle_stop_signals() as stop:
            print("waiting", flush=True)
            stop.requested.wait()
            print("requested", flush=True)
            stop.forced.wait()
        raise SystemExit(stop.exit_code)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            os.kill(process.pid, signal.SIGINT)
            assert process.stdout.readline() == "requested\n"
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 143
        finally:
            process.kill()
