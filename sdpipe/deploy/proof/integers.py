"""Proof of an int8 file against the float file that it was made from: its numbers, its ranges, its noise.

A bound on the logits alone lets subtle mistakes through, since rounding to 8 bits moves the logits more than
some of them do. So the file itself is proved: each weight and bias lies within half a step of the float one,
at the step that its channel must have; and on test images each range covers what the float file computes
there, wastes little, and no layer's signal drowns in quantisation noise.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from sdpipe.deploy.config import Int8Parity
from sdpipe.deploy.proof.layers import name_tensors, run_to

INT8_MAX, UINT8_MAX = 127, 255
_ROUNDING = 1e-5  # relative, of what was computed in float32
_QDQ = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What quantisation does to one activation on some images."""

    name: str
    sqnr_db: float  # signal to noise of everything up to here, against the float file
    clipped: float  # fraction of the float file's values that are outside the range
    range_ratio: float  # width of the range over that of the values


class _Graph:
    """A file's nodes and numbers by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.makers = {node.output[0]: node for node in model.graph.node}
        self.nodes = {node.name: node for node in model.graph.node}
        self.numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def constant(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A constant input's values, float64, and its scale if it is quantised, with a zero point of 0."""
        if name in self.numbers:
            return self.numbers[name].astype(np.float64), None
        quantized, scale, zero = (self.numbers[part] for part in self.makers[name].input)
        scale = scale.astype(np.float64)
        shape = (-1,) + (1,) * (quantized.ndim - 1) if scale.ndim else ()
        centred = quantized.astype(np.float64) - zero.astype(np.float64).reshape(shape)
        return centred * scale.reshape(shape), scale

    def wiring(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Node -> its operator and what it reads, without quantisation. A ReLU may be done by a range."""
        return {
            node.name: (node.op_type, tuple(self._source(name) for name in node.input))
            for node in self.model.graph.node
            if node.op_type not in (*_QDQ, "Relu")
        }

    def _source(self, name: str) -> str:
        while name in self.makers and self.makers[name].op_type in _QDQ:
            name = self.makers[name].input[0]
        return name if name in self.makers else name.removesuffix("_quantized")

    def ranges(self) -> dict[str, tuple[float, int]]:
        """Activation -> the scale and zero point that it is quantised with."""
        return {
            node.input[0]: (float(self.numbers[node.input[1]]), int(self.numbers[node.input[2]]))
            for node in self.model.graph.node
            if node.op_type == "QuantizeLinear" and node.input[0] not in self.numbers
        }


def prove_integers(
    float_path: Path, int8_path: Path, images_NHWC: np.ndarray, config: Int8Parity
) -> tuple[list[str], list[QuantizedLayer]]:
    """Everything that is wrong with an int8 file, in words, first layer first, and what was measured.

    images_NHWC: uint8, some of the test part, on which the layers are measured; none is where the file's
    numbers are wrong already.
    """
    model, quantized = onnx.load(float_path), onnx.load(int8_path)
    faults = check_numbers(model, quantized)
    if faults:
        return faults, []
    layers = measure_layers(model, quantized, images_NHWC)
    for layer in layers:
        if not layer.clipped <= config.max_clipped:
            faults.append(f"{layer.name}: its range clips {layer.clipped:.3g} of the values")
        if not layer.range_ratio <= config.max_range_ratio:
            faults.append(f"{layer.name}: its range is {layer.range_ratio:.3g} times as wide as the values")
        if not layer.sqnr_db >= config.min_sqnr_db:
            faults.append(f"{layer.name}: {layer.sqnr_db:.3g} dB of signal to quantisation noise")
    return faults, layers


def check_numbers(model: onnx.ModelProto, quantized: onnx.ModelProto) -> list[str]:
    """The file's constants and operators against those of the float file."""
    float_graph, int8_graph = _Graph(model), _Graph(quantized)
    ours, theirs = float_graph.wiring(), int8_graph.wiring()
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return [f"{name} computes {theirs.get(name)}, and {ours.get(name)} in the float file"]
    names = name_tensors(model)
    faults = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            found = _check_convolution(float_graph, node, int8_graph, int8_graph.nodes[node.name])
            faults += [f"{names[node.output[0]]}: {fault}" for fault in found]
    for name, numbers in float_graph.numbers.items():
        if name in int8_graph.numbers and not np.array_equal(numbers, int8_graph.numbers[name]):
            faults.append(f"{name} differs from the float file's")
    for node in quantized.graph.node:
        maker = int8_graph.makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if maker is not None and list(maker.input[1:]) != list(node.input[1:]):
            faults.append(f"{maker.input[0]} is read with another scale or zero point than written")
    return faults


def _check_convolution(
    float_graph: _Graph, ours: onnx.NodeProto, int8_graph: _Graph, theirs: onnx.NodeProto
) -> list[str]:
    if len(ours.input) != len(theirs.input):
        return [f"{len(theirs.input)} inputs in place of {len(ours.input)}, a bias is missing"]
    weight, _ = float_graph.constant(ours.input[1])
    bias, _ = float_graph.constant(ours.input[2])
    int8_weight, scale = int8_graph.constant(theirs.input[1])
    int8_bias, bias_scale = int8_graph.constant(theirs.input[2])
    maker = int8_graph.makers.get(theirs.input[0])
    if scale is None or bias_scale is None or maker is None or maker.op_type != "DequantizeLinear":
        return ["is not quantised"]
    input_scale = float(int8_graph.numbers[maker.input[1]])
    channels = len(weight)
    if scale.shape != (channels,):
        return [f"its weights have {scale.size} scales for {channels} channels"]
    smallest = float(np.min([input_scale, *scale, *bias_scale.reshape(-1)]))
    if not smallest > 0:  # what follows divides by them
        return [f"has the scale {smallest:.6g} for its input, weights or bias"]
    largest = np.abs(weight).reshape(channels, -1).max(axis=1)
    # A bias is an int32 in steps of both scales' product; where it would not fit, its channel's step grows.
    step = np.maximum(largest / INT8_MAX, np.abs(bias) / (2**31 - 1) / input_scale)
    faults = []
    # Where float32 has no such step, onnxruntime takes 1 and all weights are 0.
    has_step = largest / INT8_MAX >= np.finfo(np.float32).tiny
    wrong = np.flatnonzero((np.abs(scale - step) > 1e-3 * step) & has_step)
    if len(wrong):
        at = wrong[0]
        faults.append(f"channel {at} has the scale {scale[at]:.6g}, expected {step[at]:.6g}")
    off = np.abs(int8_weight - weight).reshape(channels, -1).max(axis=1)
    if (off > scale * (0.5 + 1e-3)).any():
        at = int((off / scale).argmax())
        faults.append(f"channel {at} has a weight that is {off[at] / scale[at]:.3g} steps off")
    bias_off = np.abs(int8_bias - bias)
    if (bias_off > bias_scale / 2 + _ROUNDING * np.abs(bias)).any():
        at = int((bias_off / bias_scale).argmax())
        faults.append(f"the bias of channel {at} is {bias_off[at]:.3g} off")
    if (np.abs(bias_scale - input_scale * scale) > _ROUNDING * bias_scale).any():
        faults.append("its bias has not the scale of input times weights")
    return faults


def measure_layers(
    model: onnx.ModelProto, quantized: onnx.ModelProto, images_NHWC: np.ndarray
) -> list[QuantizedLayer]:
    """Each quantised activation of the int8 file beside the same one of the float file, in order.

    images_NHWC: uint8, which both files are run on. Raises what onnxruntime does.
    """
    names = name_tensors(model)
    for node in model.graph.node:  # a ReLU behind a convolution is done by the convolution's range
        if node.op_type == "Relu" and node.input[0] in names:
            names.setdefault(node.output[0], names[node.input[0]])
    ranges = _Graph(quantized).ranges()
    tensors = [node.output[0] for node in model.graph.node if node.output[0] in ranges]
    floats = run_to(model, tensors, images_NHWC)
    integers = run_to(quantized, [f"{name}_DequantizeLinear_Output" for name in tensors], images_NHWC)
    layers = []
    for tensor, exact, rounded in zip(tensors, floats, integers, strict=True):
        scale, zero = ranges[tensor]
        low, high = -zero * scale, (UINT8_MAX - zero) * scale
        outside = (exact < low - scale / 2) | (exact > high + scale / 2)
        width = max(float(exact.max()), 0.0) - min(float(exact.min()), 0.0)
        layers.append(
            QuantizedLayer(
                name=names.get(tensor, tensor),
                sqnr_db=signal_to_noise_db(exact, rounded),
                clipped=float(outside.mean()),
                range_ratio=(high - low) / width if width > 0 else 1.0,
            )
        )
    return layers


def signal_to_noise_db(exact: np.ndarray, rounded: np.ndarray) -> float:
    """10 log10 of the energy of the values over that of the difference; 0 dB where there is no signal."""
    signal = float(np.square(exact, dtype=np.float64).sum())
    noise = float(np.square(exact.astype(np.float64) - rounded).sum())
    if signal == 0 or not np.isfinite(noise):
        return 0.0 if noise else 200.0
    return 10 * float(np.log10(signal / noise)) if noise else 200.0
