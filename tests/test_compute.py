"""The device and the precision that are chosen, and that no step waits for the device."""

from pathlib import Path

import pytest
import torch
from conftest import same, train_alone, train_config
from test_training import StopAfter
from torch._dynamo.utils import counters

from sdpipe.data.store import DataSet
from sdpipe.errors import DeviceError, TrainingError
from sdpipe.training.compute import choose_compute
from sdpipe.training.interruption import Interruption
from sdpipe.training.progress import TrainResult
from sdpipe.training.world import joined_world


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's own, at reading .grad of its copies
def test_without_a_compiler_compiling_is_one_line(dataset: DataSet, tmp_path: Path) -> None:
    """PyTorch brings none; slim containers have none."""
    torch.compiler.reset()  # of what other tests compiled
    config = train_config(depth=8, epochs=1, milestones=[], compile=True)
    compiler = {"cpp.cxx": (None, str(tmp_path / "c++")), "force_disable_caches": True}
    with torch._inductor.config.patch(compiler), pytest.raises(TrainingError) as raised:  # type: ignore[no-untyped-call]
        train_alone(config, dataset, tmp_path)
    assert "train.compile: PyTorch cannot compile a branch" in str(raised.value)
    assert "needs a C++ compiler" in str(raised.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # as above
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"micro_batches": 3}, marks=pytest.mark.long),
        pytest.param({"draw": "sample"}, marks=pytest.mark.long),
        {"dropout": 0.2, "recompute": True},
    ],
    ids=str,
)
def test_compiled_blocks_compute_the_same_and_the_same_bytes_after_a_stop(
    dataset: DataSet, tmp_path: Path, overrides: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """As plain ones to rounding, since the compiler may add in another order; each branch in one graph.

    Stopped in a validation, the next process computes test networks before it trains.
    """
    config = train_config(compile=True, epochs=2, milestones=[], **overrides)
    counters.clear()

    def in_a_new_process(folder: str, interruption: Interruption | None = None) -> TrainResult:
        torch.compiler.reset()
        return train_alone(config, dataset, tmp_path / folder, interruption=interruption)

    whole = in_a_new_process("whole")
    assert counters["stats"]["unique_graphs"] >= 5, "of each group, but the first, two kinds of blocks"
    assert not counters["graph_break"]
    plain = train_alone(config.model_copy(update={"compile": False}), dataset, tmp_path / "plain")
    for ours, theirs in zip(whole.progress.history, plain.progress.history, strict=True):
        assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-4)
    with pytest.raises(SystemExit):
        in_a_new_process("stopped", StopAfter(7))
    assert (tmp_path / "stopped" / "step-0000000006-unvalidated").exists()
    continued = in_a_new_process("stopped")
    assert same(whole.state, continued.state)
    assert whole.progress.history == continued.progress.history
    assert "recompile_limit" not in caplog.text


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


def test_cuda_has_the_same_bytes_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN neither searches for algorithms nor takes any that add in an order of their own."""
    for name, was in (("benchmark", True), ("deterministic", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, was)
    cuda = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "a GPU",
        "is_bf16_supported": True,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_args, value=value, **_keys: value)
    chosen = choose_compute("cuda", "auto")
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert "bf16 on a GPU" in chosen.reason
    assert "deterministic algorithms" in chosen.reason
