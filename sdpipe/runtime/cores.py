"""How many cores this process may keep busy: a container's quota is not in what the system lists."""

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def num_cores(groups: Path = _GROUPS, mount: Path = _MOUNT) -> int:
    """The smaller of the cores that this process may run on and its control group's CPU quota.

    The quota is rounded down, but not to 0: a thread more than it has is stopped for a part of each period.
    groups, mount: /proc/self/cgroup and where the control groups are mounted (version 1 or 2).
    """
    cores = len(_allowed())
    quota = min(_quotas(groups, mount), default=float(cores))
    return max(1, int(min(cores, quota)))


def num_threads(groups: Path = _GROUPS, mount: Path = _MOUNT, topology: Path = _TOPOLOGY) -> int:
    """With how many threads a network is computed: as `num_cores`, but two that share a core's units are one.

    topology: the folder with a folder for each processor, https://docs.kernel.org/admin-guide/cputopology.html.
    """
    cores = {_siblings(topology, number) for number in _allowed()}
    return min(len(cores), num_cores(groups, mount))


def _allowed() -> set[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # a model that is served may be elsewhere than on Linux


def _siblings(topology: Path, number: int) -> str:
    """The numbers of the processors in the same core as this one, where the system tells."""
    words = _words(topology / f"cpu{number}" / "topology" / "thread_siblings_list")
    return words[0] if words else str(number)


def _quotas(groups: Path, mount: Path) -> Iterator[float]:
    """Cores that each group above this process may use, where it says so.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
    https://docs.kernel.org/scheduler/sched-bwc.html (version 1).
    """
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            for folder in _upwards(mount, name):
                yield from _quota(_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for folder in _upwards(mount / "cpu", name):
                yield from _quota(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _upwards(root: Path, name: str) -> list[Path]:
    # A container may see its own group as the root while the name is still the host's.
    folder = root / name.lstrip("/")
    return [root, *(above for above in (folder, *folder.parents) if root in above.parents)]


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


def _quota(words: list[str]) -> Iterator[float]:
    """Quota and period in microseconds; `max` (version 2) and -1 (version 1) are no quota."""
    if len(words) == 2 and words[0].isdigit():
        yield int(words[0]) / int(words[1])
