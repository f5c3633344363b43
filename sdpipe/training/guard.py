"""A loss or a gradient that is not finite is noticed without waiting for the device."""

import torch
from torch import Tensor

# fp16 gradients overflow now and then by design; the scaler skips the step and halves its scale. After so
# many in a row the scale has fallen from 2^16 below 1, and scaling is not what is wrong.
FP16_STREAK = 20


class Guard:
    """Remembers, on the device, the first bad step.

    On the CPU it is known at once. On CUDA a copy travels to the host while the next steps are queued; the
    bad step's update is left out on the device meanwhile (by the scaler's own check).
    """

    def __init__(self, device: torch.device, tolerated: int) -> None:
        """tolerated: steps in a row whose gradient may be not finite; 0 but for fp16."""
        self._tolerated = tolerated
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((3,), -1.0, dtype=torch.float64, device=device)  # step, loss, norm
        self._on_host = self._first
        if device.type == "cuda":
            self._on_host = torch.full((3,), -1.0, dtype=torch.float64, pin_memory=True)

    def watch(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Look at a step's loss and the norm of all its gradients (scalars on the device)."""
        finite = torch.isfinite(gradient_norm)
        self._streak = torch.where(finite, 0, self._streak + 1)
        bad = ~torch.isfinite(loss) | (self._streak > self._tolerated)
        at = torch.full((), step, dtype=torch.float64, device=loss.device)
        here = torch.stack([at, loss.double(), gradient_norm.double()])
        self._first.copy_(torch.where(bad & (self._first[0] < 0), here, self._first))
        if self._on_host is not self._first:
            self._on_host.copy_(self._first, non_blocking=True)

    def bad_step(self, *, wait: bool = False) -> tuple[int, float, float] | None:
        """(step, loss, norm) of the first bad step, as far as the host knows it.

        wait: ask the device, for a state that is about to be saved.
        """
        step, loss, norm = (self._first if wait else self._on_host).tolist()
        return None if step < 0 else (int(step), loss, norm)
