"""Export: the test network, with normalisation in front and probabilities behind, as one ONNX file.

N: images, H, W, C: height, width, channels, K: classes.
"""

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sdpipe.deploy.confidence import read_temperature
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.files_of_run import FP32, MODEL, WEIGHTS
from sdpipe.deploy.fold import TestNetwork, build_test_network
from sdpipe.deploy.switched import SwitchedNetwork, fold_unscaled
from sdpipe.errors import ModelError
from sdpipe.files import replacing
from sdpipe.runtime.artifact import ENSEMBLE, INPUT, OUTPUTS, SWITCHES, open_artifact
from sdpipe.runtime.metadata import SCHEMA_VERSION, Metadata
from sdpipe.training.weights import Weights, load_weights
from sdpipe.version import __version__

EXAMPLE_BATCH = 2  # with 1 the exporter would take the batch dimension for a constant


class DeployedNetwork(nn.Module):
    """uint8 pixels in, logits and probabilities out."""

    def __init__(self, weights: Weights, network: TestNetwork | SwitchedNetwork, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        # NCHW, as the graph needs it behind the transposition.
        self.mean_CHW: Tensor
        self.std: Tensor
        self.register_buffer("mean_CHW", _channels_first(weights.normalisation.mean_HWC))
        self.register_buffer("std", _channels_first(weights.normalisation.std))
        self.network = network

    def forward(self, images_NHWC: Tensor, switches_L: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and probabilities, float32 (N, K), of uint8 images; switches_L is a switched network's."""
        images_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
        switches = () if switches_L is None else (switches_L,)
        logits_NK = self.network((images_NCHW - self.mean_CHW) / self.std, *switches)
        # Dividing by 1 would be an operator that does nothing.
        tempered_NK = logits_NK if self.temperature == 1 else logits_NK / self.temperature
        return logits_NK, torch.softmax(tempered_NK, dim=1)


def _channels_first(statistic: Tensor) -> Tensor:
    return statistic.permute(2, 0, 1).contiguous() if statistic.ndim else statistic


def export_run(folder: Path, config: ExportConfig) -> None:
    """models/<run>/folded.safetensors, weights.safetensors and calibration.json to model.onnx, ensemble.onnx.

    Raises ModelError or DataError if one of them cannot be read.
    """
    temperature = read_temperature(folder / "calibration.json")
    folded = load_weights(folder / "folded.safetensors")
    export_network(folded, folder / MODEL, config, temperature=temperature)
    trained = load_weights(folder / WEIGHTS)
    export_ensemble(trained, folder / f"{ENSEMBLE}.onnx", config, temperature=temperature)


def export_network(
    folded: Weights, onnx_path: Path, config: ExportConfig, *, temperature: float, variant: str = FP32
) -> None:
    """Write folded weights as an ONNX file. The same weights give the same bytes."""
    network = DeployedNetwork(folded, build_test_network(folded), temperature).eval()
    model = _to_onnx(network, {INPUT: _example(folded)}, config)
    save_model(model, onnx_path, describe(folded, temperature=temperature, variant=variant))


def export_ensemble(trained: Weights, onnx_path: Path, config: ExportConfig, *, temperature: float) -> None:
    """Write trained weights as the sub-network ensemble, whose second input are the switches b_1..b_L.

    The temperature is the test network's, so that b_l = p_l gives the test network's probabilities, too.
    """
    folded = fold_unscaled(trained)
    switched = SwitchedNetwork(build_test_network(folded))
    switches_L = torch.ones(folded.info.network.num_blocks)
    network = DeployedNetwork(folded, switched, temperature).eval()
    model = _to_onnx(network, {INPUT: _example(folded), SWITCHES: switches_L}, config)
    save_model(model, onnx_path, describe(folded, temperature=temperature, variant=ENSEMBLE))


def save_model(model: onnx.ModelProto, onnx_path: Path, metadata: Metadata) -> None:
    """Write a model with its description; it appears only after onnx and onnxruntime accepted it."""
    del model.metadata_props[:]
    for name, value in metadata.to_properties().items():
        model.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(model, full_check=True)
    with replacing(onnx_path) as beside:
        beside.write_bytes(model.SerializeToString(deterministic=True))
        open_artifact(beside, device="cpu")


def describe(folded: Weights, *, temperature: float, variant: str) -> Metadata:
    """What the file says of itself."""
    info = folded.info
    return Metadata(
        schema_version=SCHEMA_VERSION,
        variant=variant,
        class_names=list(info.class_names),
        image_size=list(info.image_size),
        channels=info.network.in_channels,
        resize="bilinear with antialiasing, aspect ratio kept, until the picture covers image_size",
        crop="centre; crop_fraction of the largest box of image_size's aspect ratio",
        crop_fraction=info.crop_fraction,
        data_set=info.dataset,
        data_digest=info.dataset_digest,
        depth=info.network.depth,
        rule=info.network.rule,
        p_L=info.network.p_L,
        survival_probs=list(info.network.survival_probs),
        scales=list(info.scales),
        temperature=temperature,
        best_epoch=info.best_epoch,
        fingerprint=info.fingerprint,
        sdpipe_version=__version__,
    )


def _example(folded: Weights) -> Tensor:
    shape = (EXAMPLE_BATCH, *folded.info.image_size, folded.info.network.in_channels)
    return torch.zeros(shape, dtype=torch.uint8)


def _to_onnx(network: nn.Module, examples: dict[str, Tensor], config: ExportConfig) -> onnx.ModelProto:
    """examples: of each input; the images' first dimension becomes the batch."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            network,
            tuple(examples.values()),
            input_names=list(examples),
            output_names=list(OUTPUTS),
            dynamic_shapes=tuple(
                {0: torch.export.Dim("batch", min=1)} if name == INPUT else None for name in examples
            ),
            opset_version=config.opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ModelError("the exporter returned nothing")
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    _give_biases(model.graph)
    return model


def _give_biases(graph: onnx.GraphProto) -> None:
    """To each convolution, and to the head, a bias of its own.

    The exporter leaves out one that is 0 throughout, as of a branch that was never active, and keeps equal
    ones once; in an int8 file the step of a bias depends on the input beside it.
    """
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    taken = set()
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        if len(node.input) == 2:
            bias_C = np.zeros(numbers[node.input[1]].dims[0], dtype=np.float32)
            node.input.append("")
        elif node.input[2] in taken:
            bias_C = onnx.numpy_helper.to_array(numbers[node.input[2]])
        else:
            taken.add(node.input[2])
            continue
        node.input[2] = f"{node.name}.bias"  # not after the weight, which equal convolutions share
        graph.initializer.append(onnx.numpy_helper.from_array(bias_C, node.input[2]))


def _strip(model: onnx.ModelProto) -> None:
    """Take out what the exporter notes of its machine: stack traces with absolute paths in every node."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for part in (graph.node, graph.initializer, graph.input, graph.output, graph.value_info):
        for item in part:
            item.doc_string = ""
            del item.metadata_props[:]
