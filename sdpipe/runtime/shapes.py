"""How large what a model file computes becomes, known before anything runs.

onnxruntime takes the memory that a file asks for, and a few bytes can ask for gigabytes: by padding, or by
adding a row to a column. So the shape of every value follows here from the file and the declared image size.
Operators and attributes: https://onnx.ai/onnx/operators, those that sdpipe writes, in the forms it writes.

N: images, BATCH while it is not known; C: channels; H, W: height and width; K: classes; L: blocks.
"""

import math
import struct
from collections.abc import Mapping, Sequence

from sdpipe.runtime.onnx_file import Attribute, Node, OnnxFile, Tensor

Shape = tuple[int, ...]

BATCH = -1

# What an attribute is where a file does not give it. Others are not read here, so not let through.
_WINDOW: dict[str, Attribute] = {
    "auto_pad": "NOTSET", "kernel_shape": [], "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Attribute]] = {
    "Transpose": {"perm": []},
    "Cast": {"to": 0},
    "Sub": {},
    "Div": {},
    "Add": {},
    "Mul": {},
    "Relu": {},
    "Conv": {**_WINDOW, "group": 1},
    "MaxPool": {**_WINDOW, "ceil_mode": 0, "storage_order": 0},
    "AveragePool": {**_WINDOW, "ceil_mode": 0, "count_include_pad": 0},
    "Pad": {"mode": "constant"},
    "ReduceMean": {"keepdims": 1, "noop_with_empty_axes": 0},
    "Gemm": {"alpha": None, "beta": None, "transA": 0, "transB": 0},
    "Softmax": {"axis": -1},
    "Split": {"axis": 0, "num_outputs": 0},
    "QuantizeLinear": {"axis": 1},
    "DequantizeLinear": {"axis": 1},
}
# The only values that these may have.
_ALLOWED: dict[str, tuple[Attribute, ...]] = {
    "auto_pad": ("NOTSET",),
    "dilations": ([1, 1],),
    "group": (1,),
    "ceil_mode": (0, 1),
    "storage_order": (0,),
    "count_include_pad": (0, 1),
    "mode": ("constant",),
    "keepdims": (0,),
    "noop_with_empty_axes": (0,),
    "transA": (0,),
    "transB": (0, 1),
    "perm": ([0, 3, 1, 2],),
    "to": (1, 10),  # float32, float16
}
_QUANTISING = ("QuantizeLinear", "DequantizeLinear")
_MAX_SIDE = 4096  # of a window and of its steps
_MAX_CHANNELS = 4096  # that Pad adds
_PADDING = struct.Struct("<8q")  # before N, C, H, W and behind them
_HEIGHT_AND_WIDTH = struct.pack("<2q", 2, 3)

_PER_PIXEL = 8192  # numbers; ours hold 50 to 500, and at a single pixel three times 2048 channels
_MAX_NUMBERS = 2**27  # 512 MiB; three values of 1024 x 1024 x 32 hold 2**26.6
_SHARED = 1024  # numbers in tensors that several operators may use


def most_numbers(height: int, width: int) -> int:
    """How many numbers a file of ours may hold at a time for one image of that size."""
    return min(_PER_PIXEL * height * width, _MAX_NUMBERS)


def infer_shapes(model: OnnxFile, inputs: Mapping[str, Shape], limit: int) -> dict[str, Shape]:
    """Shapes by name: of the inputs, and of all that follows from them.

    limit: of the numbers that stand in memory at a time for one image, weights aside. Raises ValueError with
    what no file of ours holds.
    """
    values = dict(inputs)
    weights = {name: tensor.shape for name, tensor in model.tensors.items()}
    if values.keys() & weights.keys():
        raise ValueError("weights in place of an input")
    used: set[str] = set()
    last_use = {name: at for at, node in enumerate(model.nodes) for name in node.inputs}
    alive = sum(map(_count, values.values()))
    for at, node in enumerate(model.nodes):
        shape = _output(node, [_known(name, values, weights) for name in node.inputs], model.tensors)
        is_fixed = values.keys().isdisjoint(node.inputs)
        if is_fixed and node.operator != "DequantizeLinear":  # would be computed and kept at opening
            raise ValueError(f"{node.operator} of weights alone")
        if not is_fixed and node.operator in _QUANTISING and any(map(weights.get, node.inputs[1:])):
            # Along axis 0 each image of a batch would have its own.
            raise ValueError(f"{node.operator} of images with several scales")
        for name in node.outputs:
            if name in values or name in weights:
                raise ValueError(f"{name!r:.40}, which is made twice")
            (weights if is_fixed else values)[name] = shape
            alive += 0 if is_fixed else _count(shape)
        if alive > limit:
            raise ValueError(f"{node.operator} that makes {shape} where {limit:,} numbers are enough")
        for name in set(node.inputs):
            if name in values:
                alive -= _count(values[name]) if last_use[name] == at else 0
            elif _count(weights[name]) > _SHARED:
                if name in used:  # each might keep a copy
                    raise ValueError("weights that two operators take")
                used.add(name)
    return values


def _known(name: str, *shapes: Mapping[str, Shape]) -> Shape:
    for each in shapes:
        if name in each:
            return each[name]
    raise ValueError(f"{name!r:.40}, which nothing before makes")


def _count(shape: Shape) -> int:
    return abs(math.prod(shape))  # BATCH is -1


def _output(node: Node, shapes: list[Shape], tensors: Mapping[str, Tensor]) -> Shape:
    """The shape of each of a node's outputs."""
    attributes = _read_attributes(node)
    shape: Shape
    match node.operator, shapes:
        case "Relu" | "Cast", [shape]:
            pass
        case "Softmax", [shape] if attributes["axis"] in (-1, 1):  # along 0 an image's answer is the batch's
            pass
        case "QuantizeLinear" | "DequantizeLinear", [shape, _, _] if attributes["axis"] in (0, 1):
            pass
        case "Add" | "Sub" | "Mul" | "Div", [first, second]:
            shape = _broadcast(first, second)
        case "Transpose", [(n, h, w, c)]:
            shape = (n, c, h, w)
        case "Conv", [(n, c, h, w), (num, inside, *kernel), (biases,)] if c == inside and num == biases:
            shape = (n, num, *_slide((h, w), kernel, attributes))
        case "MaxPool" | "AveragePool", [(n, c, h, w)]:
            shape = (n, c, *_slide((h, w), (), attributes))
        case "Pad", [(n, c, h, w), _]:
            shape = (n, c + _padded_channels(_raw(node, tensors)), h, w)
        case "ReduceMean", [(n, c, _, _), _] if _raw(node, tensors) == _HEIGHT_AND_WIDTH:
            shape = (n, c)
        case "Gemm", [(n, c), (first, second), (biases,)]:
            inside, num = (second, first) if attributes["transB"] else (first, second)
            if (c, num) != (inside, biases):
                raise ValueError(f"Gemm of {shapes}")
            shape = (n, num)
        case "Split", [(num,)] if attributes["num_outputs"] == num == len(node.outputs):
            return (1,)
        case _:
            raise ValueError(f"{node.operator} of {shapes!r:.80} with {node.attributes!r:.80}")
    if len(node.outputs) != 1 or BATCH in shape[1:]:
        raise ValueError(f"{node.operator} that makes {len(node.outputs)} times {shape!r:.80}")
    return shape


def _read_attributes(node: Node) -> dict[str, Attribute]:
    known = _DEFAULTS[node.operator]
    attributes = {**known, **node.attributes}
    for name, value in attributes.items():
        if name not in known or value not in _ALLOWED.get(name, (value,)):
            raise ValueError(f"{node.operator} with {name!r:.20} {value!r:.40}")
    return attributes


def _raw(node: Node, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of the small tensor that a node's second input names; nothing if that is none in the file."""
    tensor = tensors.get(node.inputs[1])
    return bytes(tensor.raw) if tensor and len(tensor.raw) <= _PADDING.size else b""


def _padded_channels(raw: bytes) -> int:
    """Pad may add zero channels (option A), so many as a network has."""
    padding = _PADDING.unpack(raw) if len(raw) == _PADDING.size else (-1,) * 8
    channels: int = padding[5]
    if padding != (0, 0, 0, 0, 0, channels, 0, 0) or not 0 <= channels <= _MAX_CHANNELS:
        raise ValueError("padding other than by channels")
    return channels


def _slide(sides: Sequence[int], kernel: Sequence[int], attributes: Mapping[str, Attribute]) -> list[int]:
    """H and W behind a window that slides over them and over less than its own length around them.

    kernel: sides of a convolution's weights, or nothing.
    """
    window = _integers(attributes, "kernel_shape", 2)
    strides, pads = _integers(attributes, "strides", 2), _integers(attributes, "pads", 4)
    if kernel and list(kernel) != window:
        raise ValueError(f"kernel_shape {window} of weights {list(kernel)!r:.40}")
    rounds_up = attributes.get("ceil_mode") == 1
    made = []
    for side, length, stride, before, behind in zip(sides, window, strides, pads[:2], pads[2:], strict=True):
        if not (1 <= length <= _MAX_SIDE and 1 <= stride <= _MAX_SIDE):  # onnxruntime divides by these
            raise ValueError(f"kernel_shape {window} with strides {strides}")
        room = side + before + behind - length + (stride - 1) * rounds_up
        if before >= length or behind >= length or room < 0:
            raise ValueError(f"pads {pads} around {side} for a window of {length}")
        made.append(room // stride + 1)
    return made


def _integers(attributes: Mapping[str, Attribute], name: str, number: int) -> list[int]:
    value = attributes[name]
    if not isinstance(value, list) or len(value) != number:
        raise ValueError(f"{name} {value!r:.40}")
    return value


def _broadcast(first: Shape, second: Shape) -> Shape:
    rank = max(len(first), len(second))
    pairs = zip(*((1,) * (rank - len(shape)) + shape for shape in (first, second)), strict=True)
    return tuple(_common(one, other) for one, other in pairs)


def _common(one: int, other: int) -> int:
    if one != other and 1 not in (one, other):
        raise ValueError(f"sides of {one} and {other} together")
    return other if one == 1 else one
