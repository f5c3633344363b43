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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import prompt_start
import torch
from soak_bench import EPOCHS, MACHINE, Bench, finish_well, start, wait
from soak_faults import broken_restores, damages
from tqdm import tqdm

from sdpipe.provenance import hardware, processor_name
from sdpipe.training.interruption import ENDING_S

DURABLE = (
    "mkdir,mkdirat,open,openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,chmod,fchmodat,"
    "rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat"
)


def random_kills(bench: Bench, num_kills: int, number: int, chance: random.Random) -> str:
    """Kill at random instants of a session's life, several times for each training.

    A session ends by the signal, before it can catch it, or with the status that says so, and in time.
    """
    trial_number = num_hit = num_late = num_wrong = 0
    expected = {0, -number} if number == signal.SIGKILL else {0, -number, 128 + number}
    with tqdm(total=num_kills, desc=signal.Signals(number).name, disable=None) as bar:
        while num_hit < num_kills:
            trial = bench.new_trial(f"{signal.Signals(number).name}{trial_number}")
            trial_number += 1
            for _ in range(5):
                child = start(trial)
                time.sleep(chance.uniform(0, bench.seconds))
                os.kill(child, number)
                killed = time.monotonic()
                status = wait(child)
                ended_s = time.monotonic() - killed
                assert status in expected, f"{trial}: exit {status}\n{(trial / 'log').read_text()}"
                assert ended_s < ENDING_S, f"{trial}: took {ended_s:.1f} s to end"
                if status == 0:
                    num_late += 1
                    break
                num_hit += 1
                bar.update()
            finish_well(trial)
            faults = bench.faults(trial)
            if "Traceback" in (trial / "log").read_text():
                faults.append("a traceback in the log")
            num_wrong += bool(faults)
            if faults:
                print(f"{trial}: {faults}", file=sys.stderr)
    assert num_wrong == 0, f"{num_wrong} of {trial_number} trainings differ"
    return (
        f"{num_hit} in {trial_number} trainings ({num_late} more came after the end of a session); all "
        f"trainings byte-identical to one never killed, one finished MLflow run each; each end within "
        f"{ENDING_S:.0f} s, with the signal's status and no traceback"
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
    prompt_start.done()
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
