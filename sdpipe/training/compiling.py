"""torch.compile for the branches, so that what is compiled does not depend on what was computed before.

PyTorch compiles for each shape when it is first seen, and computes what is behind a limit without. A training
that is continued sees them in another order; it would compute other parts compiled, and so in other bytes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sdpipe.errors import TrainingError
from sdpipe.network import ResidualBlock, ResNet

_MANY = 64  # there are two shapes a group, each for two sizes of parts


def compile_branches(network: ResNet, *, is_dynamic: bool) -> None:
    """From now on, in training, each active branch of `network` is compiled; all equal ones are so once.

    is_dynamic: for any number of images, where it differs from step to step. It is the branches that change,
    so that recomputation stays around. A branch that cannot be compiled raises TrainingError when it is first
    active.
    """
    torch._dynamo.config.recompile_limit = _MANY
    for block in network.blocks:
        assert isinstance(block, ResidualBlock)
        plain = block.branch.forward
        compiled = torch.compile(plain, dynamic=is_dynamic)
        block.branch.forward = partial(_forward, block.branch, plain, compiled)  # type: ignore[method-assign]


def _forward(
    branch: nn.Module,
    plain: Callable[[Tensor], Tensor],
    compiled: Callable[[Tensor], Tensor],
    hidden_NCHW: Tensor,
) -> Tensor:
    if not branch.training:
        return plain(hidden_NCHW)
    try:
        return compiled(hidden_NCHW)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise TrainingError(
            f"train.compile: PyTorch cannot compile a branch ({str(error).splitlines()[0]}); it needs a C++ "
            "compiler, `compile: false` needs none"
        ) from error
