"""Where and how a training computes: device, precision, memory layout, chosen for the machine."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sdpipe.errors import DeviceError
from sdpipe.provenance import hardware, processor_name
from sdpipe.runtime.memory import keep_memory

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The choice, and why."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    reason: str

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[None]:
        """Mixed precision for forward and loss; nothing at fp32. cache: keep weights that were cast."""
        is_mixed = self.precision != "fp32"
        return torch.autocast(
            self.device.type, _DTYPES[self.precision], enabled=is_mixed, cache_enabled=cache
        )

    @property
    def device_name(self) -> str:
        """Of the GPU, or of the processor."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else processor_name()

    def hardware(self, num_processes: int = 1) -> str:
        """The machine in words, with what of it decides how sums are rounded on a processor."""
        num_threads = torch.get_num_threads() if self.device.type == "cpu" else None
        return hardware(self.device_name, num_processes, num_threads)

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, channels last (1.2 to 2.5 times as fast for these convolutions)."""
        return network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def upload(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device without waiting for the copy."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def choose_compute(device: str, precision: str, local_rank: int = 0) -> Compute:
    """Choose what is `auto` for this machine; what is named must be there, or DeviceError is raised.

    local_rank: of this process on its machine; on CUDA each has a device of its own.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("train.device: cuda asked for, and PyTorch finds no CUDA device here")
    if device != "cpu" and torch.cuda.is_available():
        return _choose_on_cuda(precision, local_rank)
    return _choose_on_cpu(precision)


def cuda_device(local_rank: int) -> torch.device:
    """The device of this process. Raises DeviceError where the machine has fewer."""
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"process {local_rank} of this machine has no CUDA device; there are {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def _choose_on_cuda(precision: str, local_rank: int) -> Compute:
    device = cuda_device(local_rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    # The same bytes every time. cuDNN's search for fast algorithms ends otherwise in every process, and saves
    # nothing here (docs/training.md).
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    name = torch.cuda.get_device_name(device)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    chosen, why = _choose(
        precision,
        native={"fp32", "fp16"} | ({"bf16"} if has_bf16 else set()),
        best="bf16" if has_bf16 else "fp16",
        name=name,
        why="which it computes natively" if has_bf16 else "with loss scaling, since it has no bf16",
    )
    return Compute(
        device=device,
        precision=chosen,
        reason=f"{chosen} on {name}, {why}; channels last, TF32 for fp32, deterministic algorithms",
    )


def _choose_on_cpu(precision: str) -> Compute:
    keep_memory()
    has_bf16 = _cpu_has_bf16()
    num_threads = torch.get_num_threads()
    chosen, why = _choose(
        precision,
        native={"fp32"} | ({"bf16"} if has_bf16 else set()),
        best="bf16" if has_bf16 else "fp32",
        name="the processor",
        why="which it computes natively" if has_bf16 else "since it has no bf16 instructions",
    )
    return Compute(
        device=torch.device("cpu"),
        precision=chosen,
        reason=f"{chosen} on the processor, {why}; channels last, "
        f"{num_threads} {'thread' if num_threads == 1 else 'threads'}",
    )


def _choose(
    precision: str, *, native: set[str], best: str, name: str, why: str
) -> tuple[Literal["fp32", "bf16", "fp16"], str]:
    if precision == "auto":
        return best, why  # type: ignore[return-value]
    if precision not in native:
        raise DeviceError(
            f"train.precision: {precision} asked for, and {name} computes in {', '.join(sorted(native))}"
        )
    return precision, "as asked"  # type: ignore[return-value]


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively; emulation would be slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
