import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cesar_mqtt.whisper import model_steps
from cesar_mqtt.whisper.model_steps import ModelSteps
from cesar_mqtt.whisper.step_threads import StepThreads
from tests.conftest import PATIENCE_S

LONG, SHORT = SimpleNamespace(shape=(1, 80, 3000)), SimpleNamespace(shape=(1, 80, 500))
LONG_ENCODED, SHORT_ENCODED = SimpleNamespace(shape=(1, 1500, 384)), SimpleNamespace(shape=(1, 250, 384))


class Steps:
    """Stands in for CTranslate2's model: each step waits until so many run at once, or until the test ends it."""

    is_multilingual = True

    def __init__(self) -> None:
        self.running = 0
        self.peak = 0
        self.go_on = threading.Event()
        self._changed = threading.Condition()

    def wait_for(self, running: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.running >= running, timeout_s)

    def encode(self, features: SimpleNamespace, *, to_cpu: bool) -> str:
        assert not to_cpu
        return self._step(f"encoded {features.shape}")

    def align(self, encoded: SimpleNamespace, start: list[int], *, median_filter_width: int) -> str:
        return self._step(f"aligned {encoded.shape} {start} {median_filter_width}")

    def generate(self, encoded: SimpleNamespace, prompts: list[int], **options: int) -> list[SimpleNamespace]:
        text = self._step(f"generated {encoded.shape} {prompts} {sorted(options.items())}")
        return [SimpleNamespace(text=text, scores=[-1.0]) for _ in prompts]

    def _step(self, result: str) -> str:
        with self._changed:
            self.running += 1
            self.peak = max(self.peak, self.running)
            self._changed.notify_all()
        assert self.go_on.wait(PATIENCE_S)
        with self._changed:
            self.running -= 1
        return result


def encode(model: ModelSteps) -> None:
    model.encode(SHORT, to_cpu=False)


def align(model: ModelSteps) -> None:
    model.align(SHORT_ENCODED, [1], median_filter_width=7)


def sample(model: ModelSteps) -> None:
    model.generate(SHORT_ENCODED, [1], num_hypotheses=5)


def search(model: ModelSteps) -> None:
    model.generate(SHORT_ENCODED, [1], beam_size=5)


@pytest.mark.parametrize(
    ("calls", "at_once", "peak"),
    [
        ([encode, encode, sample], 1, 1),
        ([encode, encode, sample], 2, 2),
        ([encode, align, align], 1, 1),
        ([encode, search, search], 1, 3),
    ],
)
def test_only_so_many_large_steps_run_at_once(
    calls: list[Callable[[ModelSteps], None]], at_once: int, peak: int
) -> None:
    steps = Steps()
    model = ModelSteps(steps, at_once, StepThreads())
    threads = [threading.Thread(target=call, args=(model,)) for call in calls]
    for thread in threads:
        thread.start()
    assert steps.wait_for(peak, PATIENCE_S)
    assert not steps.wait_for(peak + 1, 0.05)
    steps.go_on.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (steps.running, steps.peak) == (0, peak)


def test_arguments_and_results_are_those_of_the_model() -> None:
    steps = Steps()
    steps.go_on.set()
    model = ModelSteps(steps, 1, StepThreads())
    assert model.encode(SHORT, to_cpu=False) == "encoded (1, 80, 500)"
    (found,) = model.generate(SHORT_ENCODED, [1], beam_size=5)
    assert model.align(SHORT_ENCODED, [1], median_filter_width=7) == "aligned (1, 250, 384) [1] 7"
    assert found.text == "generated (1, 250, 384) [1] [('beam_size', 5)]"
    assert model.is_multilingual


def test_many_samples_are_drawn_two_at_a_time_and_the_most_probable_counts() -> None:
    drawn: list[dict[str, Any]] = []

    def generate(_encoded: SimpleNamespace, prompts: list[str], **options: Any) -> list[SimpleNamespace]:
        drawn.append(options)
        scores = {"a": [-3.0, -1.0, -2.0], "b": [-0.5, -2.0, -1.5]}
        return [SimpleNamespace(name=f"{name}{len(drawn)}", scores=[scores[name][len(drawn) - 1]]) for name in prompts]

    model = ModelSteps(SimpleNamespace(generate=generate), 1, StepThreads())
    best = model.generate(SHORT_ENCODED, ["a", "b"], num_hypotheses=5, beam_size=1)
    assert [one.name for one in best] == ["a2", "b1"]
    assert [options.pop("num_hypotheses") for options in drawn] == [2, 2, 1]
    assert drawn == [{"beam_size": 1}] * 3


@pytest.mark.parametrize(
    ("features", "encoded", "expected"),
    [
        (LONG, LONG_ENCODED, ["trim", "encode", "trim", "generate", "trim", "align"]),
        (SHORT, SHORT_ENCODED, ["encode", "generate", "align"]),
    ],
)
def test_the_heap_is_trimmed_before_a_step_on_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, features: SimpleNamespace, encoded: SimpleNamespace, expected: list[str]
) -> None:
    order: list[str] = []
    monkeypatch.setattr(model_steps, "trim_heap", lambda: order.append("trim"))

    def note(step: str) -> Any:
        def run(*_: Any) -> list[Any]:
            order.append(step)
            return []

        return run

    steps = {name: note(name) for name in ("encode", "generate", "align")}
    model = ModelSteps(SimpleNamespace(**steps), 1, StepThreads())
    model.encode(features)
    model.generate(encoded, [1])
    model.align(encoded, [1])
    assert order == expected
