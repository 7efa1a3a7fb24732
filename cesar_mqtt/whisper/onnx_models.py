"""The two models of the diarizer, each one ONNX file with one input and one output. A model belongs to one thread."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.errors import CesarError

SEGMENTATION_FILE, EMBEDDING_FILE = "segmentation.onnx", "embedding.onnx"


class DiarizationError(CesarError):
    """The speakers could not be told apart; the message is a sentence for the user."""


class OnnxModel:
    """A model, loaded."""

    def __init__(self, path: Path) -> None:
        """Load a file.

        Raises:
            DiarizationError: it is missing, damaged, or no model with one input and one output.
        """
        self._name = path.name
        if not path.is_file():
            raise DiarizationError(
                f"The speakers cannot be told apart: the model {path.name!r} is not on this machine.",
                "Fetch it with `cesar-mqtt models pull diarization`.",
            )
        import onnxruntime  # noqa: PLC0415 - it starts threads at once: a process that is forked later aborts at its end

        options = onnxruntime.SessionOptions()
        # More threads take more processor time for the same result, and the models are small.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # it would keep the most that the longest input needed
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            (self._input,) = (value.name for value in self._session.get_inputs())
            (self._output,) = (value.name for value in self._session.get_outputs())
        except Exception as exc:  # what onnxruntime raises for a damaged file has no common root
            raise DiarizationError(
                f"The speakers cannot be told apart: the model {path.name!r} is damaged, or another one.",
                "Remove it, and fetch it with `cesar-mqtt models pull diarization`.",
            ) from exc

    def run(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the output for one input.

        Raises:
            DiarizationError: the model failed, mostly for lack of memory.
        """
        try:
            found: NDArray[np.float32] = self._session.run([self._output], {self._input: values})[0]
        except Exception as exc:  # nor has what it raises for an input
            raise DiarizationError(
                f"The speakers could not be told apart: the model {self._name!r} failed, or memory ran out.",
                "Free some memory, and retry.",
            ) from exc
        return found
