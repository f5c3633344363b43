import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import torchvision

from sdpipe.network import (
    SKIPS,
    SURVIVAL_RULES,
    BlockShape,
    NetworkConfig,
    ResidualBlock,
    ResNet,
    expected_depth,
    initialise,
    linear_decay,
    skip,
    uniform,
)
from sdpipe.segment import Segment
from sdpipe.training.config import TrainConfig


def config(depth: int = 20, **overrides: object) -> NetworkConfig:
    values = {
        "family": "cifar",
        "depth": depth,
        "widths": (16, 32, 64),
        "skip": "A",
        "dropout": 0.0,
        "rule": "linear_decay",
        "p_L": 0.5,
        "in_channels": 3,
        "num_classes": 10,
    }
    return NetworkConfig(**(values | overrides))


def test_linear_decay_is_the_papers_equation_4() -> None:
    """L = 54, p_L = 0.5: p_1 = 1 - 1/108, p_27 = 1 - 27/108 = 0.75, p_54 = 0.5; p_1 is not 1."""
    probs = linear_decay(54, 0.5)
    assert len(probs) == 54
    assert probs[0] == pytest.approx(1 - 1 / 108, abs=1e-15)
    assert probs[26] == pytest.approx(0.75, abs=1e-15)
    assert probs[53] == pytest.approx(0.5, abs=1e-15)


def test_expected_depth_of_the_110_layer_net_is_40_25() -> None:
    """(3L - 1)/4 with L = 54 is 161/4 (section 3)."""
    assert expected_depth(config(110).survival_probs) == pytest.approx(40.25, abs=1e-12)


def test_uniform_gives_every_block_the_same() -> None:
    assert uniform(3, 0.7) == (0.7, 0.7, 0.7)


@pytest.mark.parametrize(("depth", "blocks"), [(20, 9), (56, 27), (110, 54), (152, 75), (1202, 600)])
def test_depth_is_6n_plus_2(depth: int, blocks: int) -> None:
    assert config(depth).num_blocks == blocks


@pytest.mark.parametrize("depth", [1, 2, 21, 109])
def test_other_depths_are_refused_with_what_was_expected(depth: int) -> None:
    with pytest.raises(ValueError, match="6n"):
        config(depth)


def test_the_110_layer_net_has_1_7_million_parameters() -> None:
    """Stem 3*16*9; group convolutions 18 blocks each; BatchNorms 2 a channel; head 64*10 + 10.

    432 + (36*16*16 + (16*32 + 35*32*32) + (32*64 + 35*64*64)) * 9 + 2*(16 + 36*(16 + 32 + 64)) + 650
    = 432 + (9216 + 36352 + 145408) * 9 + 2*4048 + 650 = 1,727,962.
    """
    assert sum(parameter.numel() for parameter in ResNet(config(110)).parameters()) == 1_727_962


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (8, 8), (9, 13)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_size_and_1_or_3_channels(size: tuple[int, int], channels: int) -> None:
    network = ResNet(config(in_channels=channels, num_classes=7))
    assert network(torch.zeros(2, channels, *size)).shape == (2, 7)
    assert network(torch.zeros(2, channels, *size), [False] * 9).shape == (2, 7)


def test_training_rule_is_equation_2_and_test_rule_equation_5() -> None:
    """Active: ReLU(f + id), nothing divided by p; inactive: id; test: ReLU(p f + id)."""
    torch.manual_seed(0)
    shape = BlockShape(in_channels=4, width=4, out_channels=4, stride=1)
    block = ResidualBlock(shape, config(), survival_prob=0.3).eval()
    hidden = torch.rand(2, 4, 5, 5)
    branch = block.branch(hidden)
    torch.testing.assert_close(block(hidden, True), F.relu(branch + hidden))
    torch.testing.assert_close(block(hidden, False), hidden)
    torch.testing.assert_close(block(hidden, None), F.relu(0.3 * branch + hidden))


def test_transitional_skip_pools_and_appends_zero_channels() -> None:
    """Option A: kernel = stride = 2; new channels are 0."""
    hidden = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = skip(hidden, out_channels=3, stride=2)
    # Means of the 2x2 windows: (0+1+4+5)/4 = 2.5 and so on.
    assert out[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert out.shape == (1, 3, 2, 2)
    assert not out[0, 1:].any()


def test_pooling_at_an_odd_size_averages_what_is_there() -> None:
    """3 x 3 becomes 2 x 2; the last window of a row holds one column only."""
    out = skip(torch.tensor([[[[0.0, 2, 4], [2, 4, 6], [8, 10, 9]]]]), out_channels=1, stride=2)
    assert out[0, 0].tolist() == [[2.0, 5.0], [9.0, 9.0]]


def test_inactive_blocks_compute_nothing_and_keep_their_statistics() -> None:
    """No forward, so no backward and no BatchNorm update, in exactly the inactive blocks."""
    network = ResNet(config()).train()
    ran: list[int] = []
    for at, block in enumerate(network.blocks):
        block.branch.register_forward_hook(lambda *_, at=at: ran.append(at))
    before = [block.branch.bn1.running_mean.clone() for block in network.blocks]
    active = [True, False, True, False, False, True, True, False, True]
    network(torch.randn(4, 3, 8, 8), active).sum().backward()
    assert ran == [at for at, is_active in enumerate(active) if is_active]
    for at, block in enumerate(network.blocks):
        assert torch.equal(block.branch.bn1.running_mean, before[at]) != active[at]
        assert (block.branch.conv1.weight.grad is not None) == active[at]


def test_number_of_switches_must_fit() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ResNet(config())(torch.zeros(2, 3, 8, 8), [True] * 8)


def test_he_initialisation() -> None:
    """Normal with variance 2 / fan in (gain of ReLU), biases 0, the same for the same seed."""
    network = ResNet(config())
    initialise(network, 3)
    weight = network.get_parameter("blocks.6.branch.conv1.weight")
    # 32 to 64 channels, 18,432 draws: the standard error of the deviation is 1 / sqrt(2 * 18432) = 0.5 %.
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.02)
    assert not network.head.bias.any()
    other = ResNet(config())
    initialise(other, 3)
    assert torch.equal(other.get_parameter("blocks.6.branch.conv1.weight"), weight)
    initialise(other, 4)
    assert not torch.equal(other.get_parameter("blocks.6.branch.conv1.weight"), weight)


@pytest.mark.parametrize("skip", ["A", "C"])
@pytest.mark.parametrize(("start", "count"), [(0, 5), (3, 4), (2, 6), (5, 6), (7, 2), (1, 7)])
def test_a_segment_is_equation_2_for_each_image(start: int, count: int, skip: str) -> None:
    """Against one image at a time, forward and backward, in eval mode so that BatchNorm joins no images."""
    for stride, ins in ((1, 8), (2, 4)):
        shape = BlockShape(in_channels=ins, width=8, out_channels=8, stride=stride)
        block = ResidualBlock(shape, config(skip=skip), survival_prob=0.5).eval()
        hidden = torch.rand(8, ins, 6, 6, requires_grad=True)
        active = {at % 8 for at in range(start, start + count)}
        expected = torch.cat([block(hidden[at : at + 1], at in active) for at in range(8)])
        computed = block(hidden, Segment(start=start, count=count))
        torch.testing.assert_close(computed, expected)
        towards, wanted = torch.rand_like(expected), [hidden, *block.parameters()]
        gradients = torch.autograd.grad(computed, wanted, towards)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, towards))


@pytest.mark.parametrize(("start", "count"), [(0, 5), (3, 5), (3, 4), (5, 6)])
def test_a_segment_keeps_channels_last(start: int, count: int) -> None:
    """Forward and backward, also at the batch's ends: an empty row would cost the gradient its layout."""
    shape = BlockShape(in_channels=4, width=4, out_channels=4, stride=1)
    block = ResidualBlock(shape, config(), survival_prob=0.5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    hidden = torch.rand(8, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    computed = block(hidden, Segment(start=start, count=count))
    (gradient,) = torch.autograd.grad(computed, hidden, torch.rand_like(computed))
    assert computed.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_batchnorm_sees_the_active_images_only() -> None:
    """Running mean by hand: 0.9 * 0 + 0.1 mean over images 6, 7, 0 of the first convolution's output."""
    shape = BlockShape(in_channels=4, width=4, out_channels=4, stride=1)
    block, hidden = ResidualBlock(shape, config(), survival_prob=0.5).train(), torch.rand(8, 4, 5, 5)
    block(hidden, Segment(start=6, count=3))
    expected = 0.1 * block.branch.conv1(hidden[[6, 7, 0]]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(block.branch.bn1.running_mean, expected)


# ---------------------------------------------------------------- ResNet's other networks


IMAGENET = {"family": "imagenet", "widths": (64, 128, 256, 512), "num_classes": 1000, "p_L": 1.0, "skip": "B"}


def to_ours(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's names in ours: layer1.0.conv1 -> blocks.0.branch.conv1, downsample -> projection."""
    layers = [name for name in theirs if name.startswith("layer")]
    numbers = sorted({tuple(name.split(".")[:2]) for name in layers}, key=_natural)
    prefixes = {".".join(number): f"blocks.{at}" for at, number in enumerate(numbers)}
    ours = {}
    for name, tensor in theirs.items():
        first, _, rest = name.partition(".")
        if first in ("conv1", "bn1"):
            ours[f"stem.{first[:-1]}.{rest}"] = tensor
        elif first == "fc":
            ours[f"head.{rest}"] = tensor
        else:
            group, number, rest = name.split(".", 2)
            rest = rest.replace("downsample.0", "projection.conv").replace("downsample.1", "projection.bn")
            inside = rest if rest.startswith("projection") else f"branch.{rest}"
            ours[f"{prefixes[f'{group}.{number}']}.{inside}"] = tensor
    return ours


def _natural(number: tuple[str, ...]) -> tuple[str, int]:
    return number[0], int(number[1])


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_imagenet_networks_are_torchvisions(depth: int) -> None:
    """The same parameters; the same output of both, with torchvision's (untrained) weights in ours."""
    with torch.no_grad():
        torch.manual_seed(depth)
        theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        network = ResNet(config(depth, **IMAGENET)).eval()
        network.load_state_dict(to_ours(theirs.state_dict()))
        images = torch.randn(2, 3, 64, 64)
        expected = theirs(images)
        spread = expected.max() - expected.min()
        assert spread > 0.01
        assert (network(images) - expected).abs().max() <= 1e-5 * spread
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_parameter_counts_of_resnets_table_6(depth: int, millions: float) -> None:
    with torch.device("meta"):
        network = ResNet(config(depth))
    counted = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert counted == pytest.approx(millions, abs=0.5 * 10 ** -len(str(millions).split(".")[1]) + 0.03)


def test_options_a_b_and_c_differ_by_their_projections() -> None:
    """B has one in both transitional blocks, C in all nine: weights, and 2 numbers of BatchNorm a channel."""
    counts = {
        skip: sum(parameter.numel() for parameter in ResNet(config(20, skip=skip, p_L=1.0)).parameters())
        for skip in ("A", "B", "C", "plain")
    }
    assert counts["plain"] == counts["A"]
    projection_b = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert counts["B"] - counts["A"] == projection_b
    rest_of_c = 3 * (16 * 16 + 2 * 16) + 2 * (32 * 32 + 2 * 32) + 2 * (64 * 64 + 2 * 64)
    assert counts["C"] - counts["A"] == projection_b + rest_of_c


def test_a_learned_skip_stays_when_its_block_is_inactive() -> None:
    """ReLU(0 + id(H)), with id the projection (eq. 2 with b_l = 0): here ReLU is not idle."""
    shape = BlockShape(in_channels=4, width=8, out_channels=8, stride=2)
    block = ResidualBlock(shape, config(skip="B"), survival_prob=0.5).eval()
    hidden = torch.randn(2, 4, 6, 6).relu()
    identity = block.projection(hidden)
    assert (identity < 0).any()
    torch.testing.assert_close(block(hidden, False), F.relu(identity))
    torch.testing.assert_close(block(hidden, True), F.relu(identity + block.branch(hidden)))


def test_a_plain_net_has_no_skips_and_cannot_skip() -> None:
    network = ResNet(config(20, skip="plain", p_L=1.0)).eval()
    block, hidden = network.blocks[0], torch.rand(2, 16, 5, 5)
    torch.testing.assert_close(block(hidden, True), F.relu(block.branch(hidden)))
    with pytest.raises(ValueError, match="expected p_L 1 without skips"):
        config(20, skip="plain", p_L=0.5)


def test_a_skip_or_rule_that_is_not_built_is_refused() -> None:
    """By the network itself, and params.yaml may name those that are built: another skip was built as A."""
    with pytest.raises(ValueError, match="expected one of the skips A, B, C, plain, got 'D'"):
        config(20, skip="D")
    fields = TrainConfig.model_fields
    assert get_args(fields["skip"].annotation) == SKIPS
    assert set(get_args(fields["rule"].annotation)) == set(SURVIVAL_RULES)


def test_dropout_stands_before_the_last_convolution() -> None:
    names = list(dict(ResNet(config(dropout=0.2)).blocks[0].branch.named_children()))
    assert names == ["conv1", "bn1", "relu1", "dropout", "conv2", "bn2"]
    bottleneck = ResNet(config(50, **IMAGENET | {"dropout": 0.2})).blocks[0].branch
    assert list(dict(bottleneck.named_children()))[-3:] == ["dropout", "conv3", "bn3"]
