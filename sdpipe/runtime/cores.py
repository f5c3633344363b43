"""How many cores this process may keep busy: a container's quota is not in what the system lists."""

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def num_cores(groups: Path = _GROUPS, mount: Path = _MOUNT) -> int:
    """The smaller of the cores that this process may run on and its control group's CPU quota.

    The quota is rounded down, but not to 0: a thread more than it has is stopped for a part of each period.
    groups, mount: /proc/self/cgroup and where the control groups are mounted (version 1 or 2).
    """
    cores = len(os.sched_getaffinity(0))
    quota = min(_quotas(groups, mount), default=float(cores))
    return max(1, int(min(cores, quota)))


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
