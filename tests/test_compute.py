"""The device and the precision that are chosen, and that no step waits for the device."""

from pathlib import Path

import pytest
import torch
from conftest import ALONE, train_alone, train_config
from picture_files import AUGMENTED, make_pictures

from sdpipe.data.store import DataSet
from sdpipe.errors import DeviceError
from sdpipe.training.compute import choose_compute
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import joined_world


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's own, at reading .grad of its copies
def test_compiled_blocks_compute_the_same(dataset: DataSet, tmp_path: Path) -> None:
    """To rounding: the compiler may add in another order."""
    plain, compiled = (
        train_alone(
            train_config(depth=8, epochs=2, milestones=[], compile=compile_it),
            dataset,
            tmp_path / str(compile_it),
        )
        for compile_it in (False, True)
    )
    for ours, theirs in zip(plain.progress.history, compiled.progress.history, strict=True):
        assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-4)


def test_cuda_and_precision_are_not_silently_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        choose_compute("cuda", "auto")
    with pytest.raises(DeviceError, match="fp16"):
        choose_compute("cpu", "fp16")
    monkeypatch.setattr("sdpipe.training.compute._cpu_has_bf16", lambda: False)
    assert choose_compute("auto", "auto").precision == "fp32"
    monkeypatch.setattr("sdpipe.training.compute._cpu_has_bf16", lambda: True)
    assert choose_compute("auto", "auto").precision == "bf16"


def test_more_processes_than_cuda_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked of the device that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    says = "process 1 of this machine has no CUDA device; there are 1"
    with pytest.raises(DeviceError, match=says), joined_world("auto"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU")
@pytest.mark.parametrize("overrides", [{}, AUGMENTED], ids=["arrays", "pictures"])
def test_no_step_waits_for_the_device(dataset: DataSet, tmp_path: Path, overrides: dict[str, object]) -> None:
    """The first step warms up; PyTorch raises where one of the next three synchronises."""
    data = make_pictures(tmp_path) if overrides else dataset
    config = train_config(device="cuda", precision="auto", p_L=1.0, **overrides)
    trainer = Trainer(config, data, choose_compute("cuda", "auto"), ALONE, workers=0)
    steps = trainer.steps()
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("one_shape", [True, False])
def test_cudnn_searches_only_where_batches_have_one_shape(
    monkeypatch: pytest.MonkeyPatch, one_shape: bool
) -> None:
    """Segments have many lengths, and it would search again for each."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not one_shape)
    cuda = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "a GPU",
        "is_bf16_supported": True,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_args, value=value, **_keys: value)
    chosen = choose_compute("cuda", "auto", one_shape=one_shape)
    assert torch.backends.cudnn.benchmark == one_shape
    assert ("cuDNN's search" in chosen.reason) == one_shape
