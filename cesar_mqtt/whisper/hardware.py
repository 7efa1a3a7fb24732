"""The cores that this process may use, and the release of freed memory. No state; any thread may call it."""

import ctypes
import gc
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may keep busy: its CPU affinity, limited by the quota of its cgroups.

    A quota is rounded down, to no less than one: one thread too many exhausts the quota and delays all the others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cpu_quotas(cgroups, membership))]))


def release_memory() -> None:
    """Return freed memory to the system, as far as the C library can.

    glibc keeps the buffers that a model was loaded through: without this the process stays as large as it was.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl and macOS have none and need none
    if trim is not None:
        trim(0)


def _cpu_quotas(cgroups: Path, membership: Path) -> list[float]:
    """The quota in cores of every group that this process is in (cgroups(7); both versions)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    quotas: list[float | None] = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = cgroups / controllers / inside.lstrip("/")
        # In a container the path may be the host's, of which only the upper end exists.
        quotas += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(cgroups)]
    return [quota for quota in quotas if quota is not None]


def _quota(group: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((group / name).read_text() for name in names).split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # not there, or "max 100000": no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
