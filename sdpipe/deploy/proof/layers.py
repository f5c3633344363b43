"""The layers of an exported file by name, and the first in which it departs from its reference.

The file's intermediate tensors are made outputs in memory; the reference's are seen by hooks. The file's
convolutions hold BatchNorm and the block's scale, so the n-th of them belongs to the reference's n-th
BatchNorm output, times that scale behind the last of a branch. N: images, C: channels, H, W: height, width,
K: classes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from sdpipe.deploy.proof.parity import ImageSlices, Reference
from sdpipe.network import ResidualBlock
from sdpipe.runtime.artifact import INPUT

_CONVOLUTION = re.compile(r"blocks\.(?P<block>\d+)\.(?:branch\.conv(?P<conv>\d+)|projection\.conv)\.weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What comes out of a layer for some images."""

    name: str  # normalisation, stem, block 7, conv 2; block 7; skip 1; head
    values: np.ndarray  # float32 (N, C, H, W), of the head (N, K)


def file_layers(model: onnx.ModelProto, images_NHWC: np.ndarray) -> list[Layer]:
    """The layers of a float file, in its order: what convolutions, skips, blocks and the head give.

    images_NHWC: uint8. Of a float16 file the values between its casts are float16.
    """
    tensors = name_tensors(model)
    return [
        Layer(name=name, values=values)
        for name, values in zip(tensors.values(), run_to(model, list(tensors), images_NHWC), strict=True)
    ]


def name_tensors(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> the layer that it comes out of, in the file's order."""
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    names: dict[str, str] = {}
    num_skips = 0
    for node in model.graph.node:
        out = node.output[0]
        if node.op_type == "Conv":
            if not names:
                names[node.input[0]] = "normalisation"
            names[out] = convolution_name(node.input[1])
        elif node.op_type == "Add":
            block = next((names[name] for name in node.input if "conv" in names.get(name, "")), "sum")
            relu = next((after for after in consumers.get(out, ()) if after.op_type == "Relu"), None)
            names[relu.output[0] if relu else out] = block.partition(",")[0]
        elif node.op_type == "AveragePool":
            if any(after.op_type == "Conv" for after in consumers.get(out, ())):
                continue  # within a projection
            num_skips += 1
            pad = next((after for after in consumers.get(out, ()) if after.op_type == "Pad"), None)
            names[pad.output[0] if pad else out] = f"skip {num_skips}"
        elif node.op_type == "Gemm":
            names[out] = "head"
    return names


def convolution_name(weight: str) -> str:
    """`block 7, conv 2` for the weight `network.network.blocks.6.branch.conv2.weight`."""
    found = _CONVOLUTION.search(weight)
    if not found:
        return "stem"
    kind = f"conv {found['conv']}" if found["conv"] else "projection"
    return f"block {int(found['block']) + 1}, {kind}"


def run_to(model: onnx.ModelProto, tensors: Sequence[str], images_NHWC: np.ndarray) -> list[np.ndarray]:
    """The values of some tensors of a file for uint8 images, in that order and of the types that they have.

    Raises what onnxruntime does, also where the file has no such tensor.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    there = {value.name for value in watched.graph.output}
    for name in dict.fromkeys(tensors):
        if name not in there:
            watched.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # for few images more threads wait longer than they save
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(list(tensors), {INPUT: images_NHWC})
    return found


@torch.inference_mode()
def reference_layers(reference: Reference, images_NHWC: np.ndarray) -> list[Layer]:
    """The same layers of the un-folded network for uint8 images; a removed block has none but its skip."""
    network, layers = reference.network, []
    num_skips = 0

    def note(name: str, scale: float = 1.0) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            layers.append(Layer(name=name, values=(scale * output).numpy()))

        return hook

    def note_skip(name: str) -> Callable[[nn.Module, tuple[Tensor, object]], None]:
        def hook(block: nn.Module, inputs: tuple[Tensor, object]) -> None:
            assert isinstance(block, ResidualBlock)
            layers.append(Layer(name=name, values=block.identity(inputs[0]).numpy()))

        return hook

    handles = [
        network.stem.get_submodule("bn").register_forward_hook(note("stem")),
        network.head.register_forward_hook(note("head")),
    ]
    for ell, block in enumerate(network.blocks, start=1):
        assert isinstance(block, ResidualBlock)
        norms = [(at, bn) for at, bn in block.branch.named_children() if isinstance(bn, nn.BatchNorm2d)]
        if block.projection is not None:
            bn = block.projection.get_submodule("bn")
            handles.append(bn.register_forward_hook(note(f"block {ell}, projection")))
        elif block.shape.stride != 1 and not block.is_plain:
            num_skips += 1
            handles.append(block.register_forward_pre_hook(note_skip(f"skip {num_skips}")))
        if block.survival_prob == 0:
            continue
        for at, bn in norms:
            scale = block.survival_prob if at == norms[-1][0] and not block.is_plain else 1.0
            handles.append(
                bn.register_forward_hook(note(f"block {ell}, conv {at.removeprefix('bn')}", scale))
            )
        if not block.is_plain:
            handles.append(block.register_forward_hook(note(f"block {ell}")))
    try:
        layers.append(Layer(name="normalisation", values=reference.normalise(images_NHWC).numpy()))
        reference(images_NHWC)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def first_departure(reference: Sequence[Layer], found: Sequence[Layer], allowed: float) -> str:
    """Where a file first departs, in words: another layer, or values that differ by more than `allowed`.

    allowed: part of the spread of the reference's values in that layer.
    """
    for ours, theirs in zip(reference, found, strict=False):
        if ours.name != theirs.name:
            return f"the file has {theirs.name} where the reference has {ours.name}"
        if ours.values.shape != theirs.values.shape:
            return f"first departs at {ours.name}: {theirs.values.shape} in place of {ours.values.shape}"
        difference = relative_difference(ours.values, theirs.values)
        if not difference <= allowed:
            return f"first departs at {ours.name}: {difference:.3g} of its spread"
    if len(reference) != len(found):
        return f"the file has {len(found)} layers, the reference {len(reference)}"
    return "no layer departs by itself"


def relative_difference(reference: np.ndarray, found: np.ndarray) -> float:
    """Largest difference over the reference's spread; infinite if one is not finite."""
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    difference = float(np.abs(reference - found).max())
    spread = float(np.ptp(reference))
    if not np.isfinite(difference):
        return float("inf")
    return difference / spread if spread > 0 else (0.0 if difference == 0 else float("inf"))


def spread_over(images_NHWC: ImageSlices, count: int) -> np.ndarray:
    """So many images, uint8 (count, H, W, C), at even distances, or all if there are fewer.

    A test part may be in the order of its classes.
    """
    at = np.unique(np.linspace(0, len(images_NHWC) - 1, min(count, len(images_NHWC))).round().astype(int))
    return np.concatenate([images_NHWC[number : number + 1] for number in at])
