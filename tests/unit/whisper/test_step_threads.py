from types import SimpleNamespace

import pytest

from cesar_mqtt.whisper import step_threads
from cesar_mqtt.whisper.step_threads import StepThreads

ALL_LEVELS = 7


class OpenMp:
    """Stands in for the library: notes what is set."""

    def __init__(self) -> None:
        self.levels = [ALL_LEVELS]

    def omp_get_max_active_levels(self) -> int:
        return self.levels[-1]

    def omp_set_max_active_levels(self, levels: int) -> None:
        self.levels.append(levels)


@pytest.fixture
def openmp(monkeypatch: pytest.MonkeyPatch) -> OpenMp:
    library = OpenMp()
    monkeypatch.setattr(step_threads, "bundled_library", lambda _name: library)
    return library


def measure(monkeypatch: pytest.MonkeyPatch, openmp: OpenMp, one_s: float, all_s: float) -> StepThreads:
    """Measure a decoder that takes so many seconds with one thread and with all."""
    now_s = 0.0

    def decode() -> None:
        nonlocal now_s
        now_s += all_s if openmp.levels[-1] else one_s

    monkeypatch.setattr(step_threads, "time", SimpleNamespace(perf_counter=lambda: now_s))
    threads = StepThreads()
    threads.measure(decode)
    return threads


@pytest.mark.parametrize(("one_s", "all_s", "in_one"), [(0.01, 0.02, True), (0.02, 0.01, False), (0.01, 0.01, False)])
def test_the_decoder_uses_one_thread_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, openmp: OpenMp, one_s: float, all_s: float, *, in_one: bool
) -> None:
    threads = measure(monkeypatch, openmp, one_s, all_s)
    assert threads.decodes_in_one is in_one
    assert openmp.levels[-1] == ALL_LEVELS
    with threads.decoding():
        assert openmp.levels[-1] == (0 if in_one else ALL_LEVELS)
    assert openmp.levels[-1] == ALL_LEVELS


def test_a_slow_model_is_measured_once(monkeypatch: pytest.MonkeyPatch, openmp: OpenMp) -> None:
    assert measure(monkeypatch, openmp, 5.0, 6.0).decodes_in_one
    assert openmp.levels == [ALL_LEVELS, 0, ALL_LEVELS]


def test_all_threads_come_back_once_the_last_decoder_has_ended(monkeypatch: pytest.MonkeyPatch, openmp: OpenMp) -> None:
    threads = measure(monkeypatch, openmp, 0.01, 0.02)
    with threads.decoding():
        with pytest.raises(RuntimeError), threads.decoding():
            raise RuntimeError
        assert openmp.levels[-1] == 0
    assert openmp.levels[-1] == ALL_LEVELS


def test_nothing_is_chosen_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_threads, "bundled_library", lambda _name: None)
    threads = StepThreads()
    threads.measure(pytest.fail)
    with threads.decoding():
        assert not threads.decodes_in_one
