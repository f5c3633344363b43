"""Kill a training in every way, again and again, and see that nothing is lost: `make soak`.

Four parts: random SIGKILLs and SIGTERMs; a SIGKILL before every durable system call of one checkpoint (with
Debian's strace); restores that are broken on purpose, which must be noticed; checkpoints damaged at random,
of which none may be used silently. The result is a Markdown page.

Each training is a real session (`train_run`) with MLflow on a database, in a process forked from this one,
where the imports are done already. That is what makes hundreds of starts affordable.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
from conftest import machine as machine_config
from conftest import make_dataset, train_alone, train_config
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from tqdm import tqdm

import sdpipe.training.session  # noqa: F401  (imported before forking)
from sdpipe.data.store import open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.provenance import hardware, processor_name
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.session import train_run
from sdpipe.training.trainer import Trainer

EPOCHS = 10
CONFIG = train_config(epochs=EPOCHS, milestones=[6], micro_batches=2)
MACHINE = machine_config(every_steps=4)  # an epoch has 6 steps, so most checkpoints lie within one
RESULTS = ("weights.safetensors", "history.csv", "train.json")
DURABLE = (
    "mkdir,mkdirat,open,openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,chmod,fchmodat,"
    "rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat"
)


DAMAGES = (
    "flipped bits",
    "a truncated file",
    "a missing file",
    "swapped manifests",
    "swapped tensors",
    "zeros",
    "bytes added",
    "no folder",
)


class Bench:
    """A folder with a data set and an empty store, from which each trial starts afresh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        make_dataset(self.pristine / "data")
        SqlAlchemyStore(f"sqlite:///{self.pristine / 'mlflow.db'}", str(folder / "artifacts"))
        started = time.monotonic()
        reference = self.new_trial("reference")
        assert finish(reference) == 0, (reference / "log").read_text()
        self.seconds = time.monotonic() - started
        self.expected = results(reference)

    def new_trial(self, name: str) -> Path:
        """A project of its own."""
        trial = self.folder / name
        shutil.copytree(self.pristine, trial)
        return trial

    def faults(self, trial: Path) -> list[str]:
        """What is wrong after the end; empty if all is as if nothing had happened."""
        found = [
            f"{name} differs" for name, content in results(trial).items() if content != self.expected[name]
        ]
        return found + tracking_faults(trial)


def results(trial: Path) -> dict[str, bytes]:
    return {name: (trial / "out" / name).read_bytes() for name in RESULTS}


def tracking_faults(trial: Path) -> list[str]:
    """MLflow must hold one run, finished, with each epoch once."""
    client = MlflowClient(f"sqlite:///{trial / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdpipe")
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    if [run.info.status for run in runs] != ["FINISHED"]:
        return [f"MLflow has runs {[run.info.status for run in runs]}"]
    steps = [row.step for row in client.get_metric_history(runs[0].info.run_id, "validation_error")]
    return [] if sorted(steps) == list(range(1, EPOCHS + 1)) else [f"MLflow has epochs {sorted(steps)}"]


# ---------------------------------------------------------------- processes


def start(
    trial: Path, *, broken: Callable[[], None] | None = None, stopped: bool = False, track: bool = True
) -> int:
    """Fork a training session; returns its process id. stopped: it waits for SIGCONT before it begins."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(trial)
        os.environ["DVC_ROOT"] = str(trial)
        if not track:  # a refused address: no thread of MLflow's touches the disk
            os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if broken is not None:
            broken()
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        with errors_on_one_line():
            train_run("plain", CONFIG, MACHINE, open_dataset(Path("data")), "code", Path("out"))
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:  # noqa: BLE001  (the forked process must end here whatever happens)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(trial: Path, **keywords: Callable[[], None]) -> int:
    """Run a session to its end."""
    return wait(start(trial, **keywords))  # type: ignore[arg-type]


def finish_well(trial: Path) -> None:
    status = finish(trial)
    assert status == 0, f"{trial}: exit {status}\n{(trial / 'log').read_text()}"


# ---------------------------------------------------------------- the parts


def random_kills(bench: Bench, num_kills: int, number: int, chance: random.Random) -> str:
    """Kill at random instants of a session's life, several times for each training."""
    trial_number = num_hit = num_late = num_wrong = 0
    with tqdm(total=num_kills, desc=signal.Signals(number).name, disable=None) as bar:
        while num_hit < num_kills:
            trial = bench.new_trial(f"{signal.Signals(number).name}{trial_number}")
            trial_number += 1
            for _ in range(5):
                child = start(trial)
                time.sleep(chance.uniform(0, bench.seconds))
                os.kill(child, number)
                if wait(child) == 0:
                    num_late += 1
                    break
                num_hit += 1
                bar.update()
            finish_well(trial)
            faults = bench.faults(trial)
            num_wrong += bool(faults)
            if faults:
                print(f"{trial}: {faults}", file=sys.stderr)
    assert num_wrong == 0, f"{num_wrong} of {trial_number} trainings differ"
    return (
        f"{num_hit} in {trial_number} trainings ({num_late} more came after the end of a session); all "
        "trainings byte-identical to one never killed, one finished MLflow run each"
    )


@dataclass(frozen=True)
class Call:
    """A system call of the main thread: which, and the how-many-th of its name since the start."""

    name: str
    ordinal: int
    text: str


def trace(child: int, log: Path, *options: str) -> "subprocess.Popen[bytes]":
    """Attach strace to the main thread of a stopped process, and let that go on."""
    os.waitpid(child, os.WUNTRACED)
    command = ["strace", "-q", "-o", str(log), "-e", f"trace={DURABLE}", *options, "-p", str(child)]
    tracer = subprocess.Popen(command)
    while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{child}/status").read_text():
        assert tracer.poll() is None, "strace could not attach"
        time.sleep(0.005)
    os.kill(child, signal.SIGCONT)
    return tracer


def calls_of_one_checkpoint(bench: Bench) -> list[Call]:
    """The durable calls from the making of the third checkpoint to the end of the removal of the first."""
    trial = bench.new_trial("traced")
    child = start(trial, stopped=True, track=False)
    tracer = trace(child, trial / "strace")
    assert wait(child) == 0
    tracer.wait()
    counts: dict[str, int] = {}
    calls: list[Call] = []
    for line in (trial / "strace").read_text().splitlines():
        if found := re.match(r"(\w+)\((.*)", line):
            counts[found[1]] = counts.get(found[1], 0) + 1
            calls.append(Call(found[1], counts[found[1]], line))
    (first,) = [
        at for at, call in enumerate(calls) if "mkdir" in call.name and ".step-0000000012." in call.text
    ]
    last = max(at for at, call in enumerate(calls) if ".step-0000000004.old" in call.text)
    return [
        call
        for call in calls[first : last + 2]
        if not call.name.startswith("open") or "O_CREAT" in call.text or "O_WRONLY" in call.text
    ]


def kills_at_calls(bench: Bench, every: int) -> str:
    """Kill before every durable call of one checkpoint; the next start ends the same."""
    calls = calls_of_one_checkpoint(bench)
    chosen = calls[::every]
    for at, call in enumerate(tqdm(chosen, desc="system calls", disable=None)):
        trial = bench.new_trial(f"call{at}")
        child = start(trial, stopped=True, track=False)
        inject = f"inject={call.name}:signal=KILL:when={call.ordinal}"
        tracer = trace(child, trial / "strace", "-e", inject)
        assert wait(child) == -signal.SIGKILL, call
        tracer.wait()
        finish_well(trial)
        assert not (faults := bench.faults(trial)), f"{call}: {faults}"
    names = sorted({call.name for call in chosen})
    return f"{len(chosen)} of {len(calls)} calls ({', '.join(names)}); all trainings byte-identical"


def _broken_restores() -> dict[str, Callable[[], None]]:
    """Faults planted in the restoring process."""
    restore = Trainer.restore

    def losing(prefix: str) -> Callable[[], None]:
        def plant() -> None:
            def broken(self: Trainer, checkpoint: object) -> None:
                groups = self._groups()
                lost = {
                    name: tensor.clone()
                    for group, named in groups.items()
                    for name, tensor in named.items()
                    if f"{group}.{name}".startswith(prefix) or prefix in name
                }
                restore(self, checkpoint)  # type: ignore[arg-type]
                for named in self._groups().values():
                    for name, tensor in named.items():
                        if name in lost and lost[name].shape == tensor.shape:
                            with torch.no_grad():
                                tensor.copy_(lost[name])

            Trainer.restore = broken  # type: ignore[method-assign,assignment]

        return plant

    def after(change: Callable[[Trainer], object]) -> Callable[[], None]:
        def plant() -> None:
            def broken(self: Trainer, checkpoint: object) -> None:
                restore(self, checkpoint)  # type: ignore[arg-type]
                change(self)

            Trainer.restore = broken  # type: ignore[method-assign,assignment]

        return plant

    def one_step_back(trainer: Trainer) -> None:
        trainer.sums.num_steps -= 1

    def count_anew(trainer: Trainer) -> None:
        trainer.sums.num_active = 0

    return {
        "momentum is lost": losing("momentum."),
        "BatchNorm's running means are lost": losing("running_mean"),
        "the loss so far is lost": losing("sums.loss"),
        "one step is repeated": after(one_step_back),
        "the count of active blocks starts anew": after(count_anew),
        "one weight is off by 1e-5 of it": after(
            lambda trainer: trainer.network.head.weight.data[0, 0].mul_(1 + 1e-5)
        ),
    }


def broken_restores(bench: Bench) -> str:
    """Each planted fault must show as a difference, or in a crash."""
    planted = _broken_restores()
    for at, (name, plant) in enumerate(tqdm(planted.items(), desc="broken restores", disable=None)):
        trial = bench.new_trial(f"broken{at}")
        child = start(trial)
        while not list(trial.glob(".sdpipe/runs/*/step-0000000008")):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        wait(child)
        status = finish(trial, broken=plant)
        assert status != 0 or bench.faults(trial), f"not noticed: {name}"
    return f"{len(planted)} planted ({'; '.join(planted)}), all noticed"


def damages(bench: Bench, num_damages: int, chance: random.Random) -> str:
    """Damage one or both of two checkpoints; what is loaded must be one of them, bit for bit, or nothing."""
    sound = bench.folder / "sound"
    train_alone(CONFIG, open_dataset(bench.pristine / "data"), sound, every_steps=4)
    checkpoints = CheckpointFolder(sound, "0123456789abcdef")
    newest, _ = checkpoints.load_newest()
    assert newest is not None
    names = sorted(path.name for path in sound.iterdir())
    originals = {name: checkpoints._read(sound / name) for name in names}
    kinds: dict[str, int] = {}
    for at in tqdm(range(num_damages), desc="damaged checkpoints", disable=None):
        folder = bench.folder / "damaged"
        shutil.copytree(sound, folder)
        both = chance.random() < 0.2
        kind = _damage(folder, names if both else names[1:], names, chance)
        kinds[kind] = kinds.get(kind, 0) + 1
        found, told = CheckpointFolder(folder, "0123456789abcdef").load_newest()
        if found is not None:
            original = originals[f"step-{found.num_steps:010d}"]
            assert found.state == original.state, (at, kind)
            assert found.tensors.keys() == original.tensors.keys(), (at, kind)
            for name, tensor in found.tensors.items():
                assert tensor.numpy().tobytes() == original.tensors[name].numpy().tobytes(), (at, kind)
            assert found.num_steps < newest.num_steps, f"{kind} was not noticed"
        assert told or kind == "no folder", f"{kind} was passed over silently"
        shutil.rmtree(folder)
    listed = ", ".join(f"{count} with {kind}" for kind, count in sorted(kinds.items()))
    return f"{num_damages} ({listed}); none used, each one named"


def _damage(folder: Path, victims: list[str], names: list[str], chance: random.Random) -> str:
    kind = chance.choice(DAMAGES)
    for name in victims:
        path = chance.choice(sorted((folder / name).iterdir()))
        raw = bytearray(path.read_bytes())
        if kind == "flipped bits":
            for _ in range(chance.choice((1, 1, 2, 8))):
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        elif kind == "a truncated file":
            raw = raw[: chance.randrange(len(raw))]
        elif kind == "zeros":
            start_at = chance.randrange(len(raw))
            raw[start_at : start_at + 512] = bytes(len(raw[start_at : start_at + 512]))
            raw[-1] ^= 255  # a region may have been zeros already
        elif kind == "bytes added":
            raw += chance.randbytes(chance.randrange(1, 100))
        if kind == "a missing file":
            path.unlink()
        elif kind == "no folder":
            shutil.rmtree(folder / name)
        elif kind.startswith("swapped"):
            swap = "SHA256SUMS" if kind == "swapped manifests" else "tensors.safetensors"
            first, second = (folder / other / swap for other in names)
            one, two = first.read_bytes(), second.read_bytes()
            first.write_bytes(two)
            second.write_bytes(one)
            break
        else:
            path.write_bytes(raw)
    return kind


# ---------------------------------------------------------------- the command


@contextmanager
def working_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        yield Path(folder)


@click.command()
@click.option("--kills", type=click.IntRange(min=1), required=True, help="Random SIGKILLs.")
@click.option("--terms", type=click.IntRange(min=1), required=True, help="Random SIGTERMs.")
@click.option("--every-call", type=click.IntRange(min=1), required=True, help="Kill at every n-th call.")
@click.option("--damages", "num_damages", type=click.IntRange(min=1), required=True, help="Checkpoints.")
@click.option("--seed", type=int, default=None, help="Of the random choices; by default another each time.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Markdown page to write.")
def main(
    kills: int, terms: int, every_call: int, num_damages: int, seed: int | None, out: Path | None
) -> None:
    """Kill a training in every way; exit 0 only if nothing was lost."""
    torch.set_num_threads(1)
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    chance = random.Random(seed)
    started = time.monotonic()
    with working_folder() as folder:
        bench = Bench(folder)
        lines = {
            "SIGKILL at a random instant": random_kills(bench, kills, signal.SIGKILL, chance),
            "SIGTERM at a random instant": random_kills(bench, terms, signal.SIGTERM, chance),
            "SIGKILL before each durable system call of one checkpoint": kills_at_calls(bench, every_call),
            "restores broken on purpose": broken_restores(bench),
            "damaged checkpoints": damages(bench, num_damages, chance),
        }
        seconds = bench.seconds
    minutes = (time.monotonic() - started) / 60
    page = f"""# The kill harness

`make soak` on {datetime.now(UTC):%Y-%m-%d}, seed {seed}, {hardware(processor_name())}, {minutes:.1f} minutes.
Each training takes {seconds:.1f} s undisturbed: {EPOCHS} epochs of 6 steps in two micro-batches, a checkpoint
every {MACHINE.checkpoint.every_steps} steps, MLflow on a database. `tests/soak.py` says how each part works.

| what | result |
|---|---|
""" + "".join(f"| {name} | {result} |\n" for name, result in lines.items())
    click.echo(page)
    if out is not None:
        out.write_text(page)


if __name__ == "__main__":
    main()
