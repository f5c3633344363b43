"""The papers' update: stochastic gradient descent, Nesterov momentum and weight decay, on every parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class FusedSGD:
    """What `torch.optim.SGD(nesterov=True, fused=True)` does, to the bit, for `torch.amp.GradScaler`, too.

    To make that one imports PyTorch's compiler, which takes 2 s and 150 MB of every start. The update itself
    is PyTorch's.

    The papers' code steps all parameters from one zeroed gradient vector: an inactive block has gradient 0,
    not None, so weight decay and momentum still move it.
    """

    # What GradScaler looks for: `step` leaves out, on the device, an update whose gradient is not finite.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None  # which GradScaler sets around a step
    found_inf: Tensor | None

    def __init__(self, parameters: Sequence[Tensor], *, momentum: float, weight_decay: float) -> None:
        """parameters: on their device. Each gets a gradient of 0."""
        self._parameters = list(parameters)
        self._momentum = momentum
        self._weight_decay = weight_decay
        self.momentum_buffers = [torch.zeros_like(parameter) for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    @property
    def param_groups(self) -> list[dict[str, list[Tensor]]]:
        """One group, whose gradients GradScaler unscales."""
        return [{"params": self._parameters}]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """v = m v + (g + d w), then w = w - r (g + d w + m v), for momentum m, decay d and rate r."""
        sgd(
            self._parameters,
            self.gradients,
            list(self.momentum_buffers),
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=learning_rate,
            dampening=0,
            nesterov=self._momentum > 0,
            maximize=False,
        )

    def clear_gradients(self) -> None:
        """Set gradients to 0."""
        torch._foreach_zero_(self.gradients)
