"""Where a result comes from: the fingerprint of a run, the git commit, the hardware."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def code_digest(root: Path, files: Iterable[str]) -> str:
    """SHA-256 over the names and contents of source files, given relative to `root`."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def fingerprint(*, params: Mapping[str, Any], data: str, code: str, compute: Mapping[str, str]) -> str:
    """A name for a training: a hash over everything that decides its result, 16 hexadecimal digits.

    params: the run's section; data, code: digests; compute: device, precision and library versions.
    """
    facts = {"params": params, "data": data, "code": code, "compute": compute}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def git_state(root: Path) -> dict[str, Any]:
    """{"git_commit", "git_dirty"} of the checkout; None where there is no git or no commit.

    `git_dirty` is of the code: params.yaml does not count, whose values stand beside every result and which
    `dvc exp run -S` and `sdpipe recipe use` change, nor dvc.lock, which DVC writes after each stage.
    """
    commit = _git(root, "rev-parse", "HEAD")
    code = (".", ":(exclude)params.yaml", ":(exclude)dvc.lock")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return {"git_commit": commit, "git_dirty": None if changed is None else bool(changed)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def hardware(device_name: str, num_processes: int = 1, num_threads: int | None = None) -> str:
    """The machine in words: the computing device, the cores of a process, the number of processes.

    num_threads: those that compute, where the result depends on them; said where they are not one a core.
    """
    num_cores = len(os.sched_getaffinity(0))
    words = [device_name, counted(num_cores, "core"), platform.machine()]
    if num_threads is not None and num_threads != num_cores:
        words.append(counted(num_threads, "thread"))
    if num_processes > 1:
        words.append(f"{num_processes} processes")
    return ", ".join(words)


def counted(number: int, what: str) -> str:
    """1 core, 2 cores."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def processor_name() -> str:
    """The processor's model name where the system tells, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
