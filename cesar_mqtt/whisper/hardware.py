"""The cores that this process may use, and for what; the release of freed memory; the libraries beside CTranslate2.

No state; any thread may call it.
"""

import ctypes
import gc
import os
from pathlib import Path

import ctranslate2

_CGROUPS = Path("/sys/fs/cgroup")
_HEAP_OPTIONS = {-8: 1, -3: 4 << 20, -1: 4 << 20}
"""M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3), the latter two in bytes."""
_PRIMITIVE_CACHE = ("DNNL_PRIMITIVE_CACHE_CAPACITY", "16")
"""oneDNN keeps what it compiles for each length of encoder input, two convolutions each: those of short recordings."""
_MAX_WORKERS = _MAX_THREADS_EACH = 4


def usable_cores(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may keep busy: its CPU affinity, limited by the quota of its cgroups.

    A quota is rounded down, to no less than one: one thread too many exhausts the quota and delays all the others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cpu_quotas(cgroups, membership))]))


def divide_cores(cores: int, workers: int | None = None) -> tuple[int, int]:
    """Choose how many workers a model has, and how many threads each of them uses.

    A single short recording keeps one worker busy, so one has as many threads as help its encoder: two take 0.6 of the
    time of one; small models hardly gain from more than four. What the decoder uses is measured (`step_threads`).

    Args:
        cores: that they may keep busy.
        workers: None: as many as help.
    """
    if workers is None:
        workers = 1 if cores == 1 else min(_MAX_WORKERS, max(2, cores // 2))
    if workers == 1:
        return 1, cores
    return workers, max(1, min(cores, _MAX_THREADS_EACH, 2 * cores // workers))


def limit_heap() -> None:
    """Have glibc keep less of what was freed, and oneDNN of what it compiled; before a model is loaded, and for good.

    By default glibc has up to eight heaps for each core, and returns nothing below 32 MB to the system: with two
    workers, tiny.en then takes 370 MB more while it transcribes than after loading, and 140 MB with these options. That
    costs 4 % of the time.
    """
    os.environ.setdefault(*_PRIMITIVE_CACHE)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if set_option is not None:
        for option, value in _HEAP_OPTIONS.items():
            set_option(option, value)


def release_memory() -> None:
    """Return freed memory to the system, as far as the C library can.

    glibc keeps the buffers that a model was loaded through: without this the process stays as large as it was.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return what is free in the heap, between what is in use, to the system: some milliseconds.

    MKL keeps the buffers of its matrix products for the next ones, 20 MB for half a minute of audio with tiny.en; those
    that are in use stay.
    """
    free_buffers = getattr(bundled_library("libctranslate2"), "MKL_Free_Buffers", None)  # only x86 has MKL
    if free_buffers is not None:
        free_buffers()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl and macOS have none and need none
    if trim is not None:
        trim(0)


def bundled_library(name: str) -> ctypes.CDLL | None:
    """Return a library that CTranslate2's wheel brings and has loaded; None: this build has none of that name."""
    folder = Path(ctranslate2.__file__).parent.parent / "ctranslate2.libs"
    found = next(iter(folder.glob(f"{name}*.so*")), None)
    return None if found is None else ctypes.CDLL(str(found))


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
