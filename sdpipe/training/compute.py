"""Where and how a training computes: device, precision, memory layout, chosen for the machine."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sdpipe.errors import DeviceError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The choice, and why."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    reason: str

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for forward and loss; nothing at fp32."""
        return torch.autocast(self.device.type, _DTYPES[self.precision], enabled=self.precision != "fp32")

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, channels last (1.2 to 2.5 times as fast for these convolutions)."""
        return network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def upload(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device without waiting for the copy."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def choose_compute(device: str, precision: str) -> Compute:
    """Choose what is `auto` for this machine; what is named must be there, or DeviceError is raised."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("train.device: cuda asked for, and PyTorch finds no CUDA device here")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        native = {"fp32", "fp16"} | (
            {"bf16"} if torch.cuda.is_bf16_supported(including_emulation=False) else set()
        )
        best = "bf16" if "bf16" in native else "fp16"
        name = torch.cuda.get_device_name(chosen)
    else:
        native = {"fp32"} | ({"bf16"} if _cpu_has_bf16() else set())
        best = "bf16" if "bf16" in native else "fp32"
        name = "the processor"
    if precision == "auto":
        missing = "" if best == "bf16" else ", which has no bf16"
        return Compute(device=chosen, precision=best, reason=f"{best} on {name}{missing}")  # type: ignore[arg-type]
    if precision not in native:
        raise DeviceError(
            f"train.precision: {precision} asked for, and {name} computes in {', '.join(sorted(native))}"
        )
    return Compute(device=chosen, precision=precision, reason=f"{precision} on {name}, as asked")  # type: ignore[arg-type]


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively; emulation would be slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
