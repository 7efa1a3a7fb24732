import threading
from collections.abc import Callable

import pytest

from cesar_mqtt.whisper.large_steps import LargeSteps

WAIT_S = 20.0


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

    def encode(self, features: str, *, to_cpu: bool) -> str:
        assert not to_cpu
        return self._step(f"encoded {features}")

    def generate(self, features: str, prompts: list[int], **options: int) -> str:
        return self._step(f"generated {features} {prompts} {sorted(options.items())}")

    def _step(self, result: str) -> str:
        with self._changed:
            self.running += 1
            self.peak = max(self.peak, self.running)
            self._changed.notify_all()
        assert self.go_on.wait(WAIT_S)
        with self._changed:
            self.running -= 1
        return result


def encode(model: LargeSteps) -> None:
    model.encode("f", to_cpu=False)


def sample(model: LargeSteps) -> None:
    model.generate("f", [1], num_hypotheses=5)


def search(model: LargeSteps) -> None:
    model.generate("f", [1], beam_size=5)


@pytest.mark.parametrize(
    ("calls", "at_once", "peak"),
    [
        ([encode, encode, sample], 1, 1),
        ([encode, encode, sample], 2, 2),
        ([encode, search, search], 1, 3),
    ],
)
def test_only_so_many_large_steps_run_at_once(
    calls: list[Callable[[LargeSteps], None]], at_once: int, peak: int
) -> None:
    steps = Steps()
    model = LargeSteps(steps, at_once)
    threads = [threading.Thread(target=call, args=(model,)) for call in calls]
    for thread in threads:
        thread.start()
    assert steps.wait_for(peak, WAIT_S)
    assert not steps.wait_for(peak + 1, 0.05)
    steps.go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert (steps.running, steps.peak) == (0, peak)


def test_arguments_and_results_are_those_of_the_model() -> None:
    steps = Steps()
    steps.go_on.set()
    model = LargeSteps(steps, 1)
    assert model.encode("f", to_cpu=False) == "encoded f"
    assert model.generate("f", [1], beam_size=5) == "generated f [1] [('beam_size', 5)]"
    assert model.generate("f", [1], num_hypotheses=5) == "generated f [1] [('num_hypotheses', 5)]"
    assert model.is_multilingual
