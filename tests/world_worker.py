"""What each process of tests/test_world.py runs: `torchrun --nproc-per-node N world_worker.py TASK FOLDER`.

Tasks: `equal-VARIANT` trains one of world_variants.py, noting after each step a digest of everything a step
changes; `bytes` counts what is sent; `stop` ends after 7 of 12 steps, and `continue` goes on to the end;
`run` is the stage itself, which its test kills.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import prompt_start
import torch
from conftest import machine, make_dataset, train_config
from picture_files import AUGMENTED
from safetensors.torch import save
from test_training import StopAfter
from world_variants import config_of, dataset_of

from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.training import evaluation
from sdpipe.training import world as world_module
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.compute import choose_compute
from sdpipe.training.interruption import Interruption
from sdpipe.training.loop import train
from sdpipe.training.session import train_run
from sdpipe.training.trainer import Trainer
from sdpipe.training.weights import save_tensors
from sdpipe.training.world import World, joined_world

evaluation.EVALUATION_BATCH = 7  # so that each process has some of the few images
COMPUTE = choose_compute("cpu", "fp32")
NEVER = machine()


def write(folder: Path, world: World, value: object) -> None:
    (folder / f"rank{world.rank}.json").write_text(json.dumps(value))


def equal(world: World, variant: str, folder: Path) -> None:
    """Every rank's state after each step, the history, the final weights, and how often branches ran."""
    config = config_of(variant)
    trainer = Trainer(config, dataset_of(variant, folder / f"data{world.rank}"), COMPUTE, world, workers=1)
    digests, num_forward, num_active = [], 0, 0.0

    def count(*_call: object) -> None:
        nonlocal num_forward
        num_forward += 1

    for block in trainer.network.blocks:
        block.branch.conv1.register_forward_hook(count)
    for _ in range(config.epochs):
        for _ in trainer.steps():
            tensors = {**trainer.network.state_dict(), **trainer.step.momentum()}
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            digests.append(hashlib.sha256(save(plain)).hexdigest())
        num_active += trainer.sums.num_active * len(trainer.step.parts)
        num_training = num_forward
        trainer.validate()
        num_forward = num_training
    forwards = num_forward / num_active
    result = trainer.finish()
    if world.leads:
        save_tensors(folder / "weights.safetensors", result.state, {})
    history = [record.__dict__ for record in trainer.progress.history]
    write(
        folder,
        world,
        {"digests": digests, "history": history, "test_error": result.test_error, "forwards": forwards},
    )


def bytes_sent() -> int:
    """By this process to files and sockets, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def count_bytes(world: World, dataset: DataSet, folder: Path) -> None:
    """Bytes of 30 steps at constant depth and with stochastic depth, and the share of inactive blocks."""
    counted = {}
    for p_L in (1.0, 0.5):
        config = train_config(depth=56, widths=[16, 16, 16], p_L=p_L, epochs=5, milestones=[])
        trainer = Trainer(config, dataset, COMPUTE, world)
        num_bytes, num_active = 0, 0.0
        for _ in range(config.epochs):
            before = bytes_sent()
            for _ in trainer.steps():
                pass
            num_bytes += bytes_sent() - before
            num_active += trainer.sums.num_active
            trainer.validate()
        steps = config.epochs * trainer.steps_per_epoch
        counted[p_L] = (num_bytes, num_active / steps / 27)
    write(folder, world, {"constant": counted[1.0], "stochastic": counted[0.5]})


def stop(world: World, dataset: DataSet, folder: Path) -> None:
    """Only rank 1 is asked to end; all do, after the same step, and the leader saves."""
    checkpoints = CheckpointFolder(folder / "checkpoints", "0123456789abcdef") if world.leads else None
    asked = StopAfter(7) if world.rank == 1 else Interruption(lambda: None)
    try:
        train(
            config_of("arrays"), dataset, COMPUTE, world, checkpoints=checkpoints, machine=NEVER, start=None,
            on_epoch=lambda _progress: None, interruption=asked,
        )  # fmt: skip
    except SystemExit as ended:
        write(folder, world, {"exit": ended.code})


def go_on(world: World, dataset: DataSet, folder: Path) -> None:
    """From the newest checkpoint, if there is one, to the final weights."""
    checkpoints = CheckpointFolder(folder / "checkpoints", "0123456789abcdef") if world.leads else None
    result = train(
        config_of("arrays"), dataset, COMPUTE, world, checkpoints=checkpoints, machine=NEVER,
        start=None if checkpoints is None else checkpoints.load_newest()[0],
        on_epoch=lambda _progress: None, interruption=Interruption(lambda: None),
    )  # fmt: skip
    if world.leads:
        save_tensors(folder / "weights.safetensors", result.state, {})
    write(folder, world, [record.__dict__ for record in result.progress.history])


def run(folder: Path) -> None:
    """The stage, for many epochs; notes its process id first."""
    (folder / f"pid{os.environ.get('RANK', 'alone')}").write_text(str(os.getpid()))
    world_module.TIMEOUT_S = int(os.environ.get("TIMEOUT_S", "25"))
    world_module.PATIENCE_S = int(os.environ.get("PATIENCE_S", "600"))
    epochs = int(os.environ["EPOCHS"])
    how = machine(every_steps=int(os.environ.get("EVERY", "5"))).model_copy(update={"workers": 1})
    pictures = AUGMENTED if "PICTURES" in os.environ else {}
    config = train_config(**pictures, epochs=epochs, milestones=[])
    train_run("plain", config, how, open_dataset(folder / "data"), "code", folder / "out")


def main(task: str, folder: Path) -> None:
    prompt_start.done()
    torch.set_num_threads(1)
    if task == "run":
        with errors_on_one_line():
            run(folder)
        return
    with joined_world("cpu") as world:
        task, _, variant = task.partition("-")
        if task == "equal":
            equal(world, variant, folder)
        else:
            dataset = make_dataset(folder / f"data{world.rank}")
            {"bytes": count_bytes, "stop": stop, "continue": go_on}[task](world, dataset, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
