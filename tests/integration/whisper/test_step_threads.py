"""With the real CTranslate2: whether its decoder really uses one thread only."""

import resource

import numpy as np

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.step_threads import StepThreads


def test_one_thread_decodes_without_waiting_for_another_and_finds_the_same() -> None:
    model = ModelStore(ModelSettings(download=False, cpu_threads=4, workers=1)).load("tiny.en")
    encoded = model.encode(np.zeros((model.model.n_mels, 200), np.float32))
    threads = StepThreads()

    def decode(*, in_one: bool) -> tuple[list[int], int]:
        """Return the tokens, and how often the process waited."""
        threads.decodes_in_one = in_one
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        with threads.decoding():
            raw = model.model._model
            (found,) = raw.generate(encoded, [[50257]], max_length=40, suppress_tokens=[50256])
        return found.sequences_ids[0], resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

    (tokens, waits), (same, more_waits) = decode(in_one=True), decode(in_one=False)
    assert tokens == same
    assert len(tokens) > 10
    assert waits < more_waits / 3
