"""What a decoder's process may use: memory, processor time, and nothing but the two files that it was given.

Called in that process, before it reads the recording, and in the template that it is forked from. Each protection is
best effort: what the kernel, or the unit that the consumer runs in, does not allow is left out, and the others hold.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_UNLIMITED = resource.RLIM_INFINITY
_OOM_SCORE = "1000"
"""The kernel ends the decoder first when memory runs out, and not the consumer."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

# linux/landlock.h; the numbers of its system calls are the same on every architecture.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RIGHTS = ((0, 0, 0), (13, 0, 0), (14, 0, 0), (15, 0, 0), (15, 2, 0), (16, 2, 0), (16, 2, 2))
"""By version of the interface: how many bits it knows of the rights to files, to the network, and of the scopes."""

# linux/seccomp.h and linux/filter.h.
_RETURN_ALLOW = 0x7FFF_0000
_RETURN_EPERM = 0x0005_0001
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_FIRST_ARGUMENT = 0, 4, 16

_ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
"""AUDIT_ARCH_... of linux/audit.h."""
# The numbers on the architectures above.
_PRLIMIT64 = (302, 261)
_ALLOWED_CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "getrandom": (318, 278),
}


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the one that forked it ends. Linux; elsewhere the pipe ends it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before that
        os._exit(0)


def address_space_bytes() -> int | None:
    """What the process has mapped; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None


def prepare() -> tuple[str, ...]:
    """Drop, in the template, what neither it nor a decoder needs: each decoder inherits that at no cost.

    Returns:
        The protections that are in force: `landlock`, or none.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        with suppress(OSError, ValueError):
            _limit(kind, 0)
    return ("landlock",) if _try(_forbid_files_and_network) else ()


def confine(*, has_bytes: int | None, memory_bytes: int, cpu_s: float, most_cpu_s: float) -> tuple[str, ...]:
    """Drop, in a decoder's process, what decoding does not need, for good.

    Args:
        has_bytes: `address_space_bytes` of the process; None: its memory cannot be limited.
        memory_bytes: how much more it may map.
        cpu_s: seconds of processor time; `extend_cpu` extends them.
        most_cpu_s: the longest that they can be extended to.

    Returns:
        The protections that are in force: any of `memory`, `cpu`, `files`, `seccomp`.
    """
    steps: dict[str, Callable[[], bool]] = {
        "memory": lambda: has_bytes is not None and _limit(resource.RLIMIT_AS, has_bytes + memory_bytes),
        "cpu": lambda: _limit(resource.RLIMIT_CPU, _whole(cpu_s), _whole(most_cpu_s)),
        # No further descriptor means no further file and no socket; the two that are open stay.
        "files": _forbid_descriptors,
        "seccomp": _allow_few_system_calls,
    }
    return tuple(name for name, step in steps.items() if _try(step))


def extend_cpu(cpu_s: float) -> None:
    """Set the seconds of processor time that the process may have used by its end."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (_whole(cpu_s), resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _whole(seconds: float) -> int:
    return max(1, min(round(seconds), 1 << 30))


def _try(step: Callable[[], bool]) -> bool:
    try:
        return step()
    except (OSError, ValueError, AttributeError):
        return False


def _limit(kind: int, soft: int, hard: int | None = None) -> bool:
    most = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if most != _UNLIMITED:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))
    return True


def _forbid_descriptors() -> bool:
    with suppress(OSError, ValueError):
        _limit(resource.RLIMIT_NPROC, 0)
    return _limit(resource.RLIMIT_NOFILE, 0)


def _prctl(option: int, *arguments: object) -> bool:
    if sys.platform != "linux":
        return False
    padded = [*arguments, *[ctypes.c_ulong(0)] * (4 - len(arguments))]
    return int(_LIBC.prctl(ctypes.c_int(option), *map(_as_word, padded))) == 0


def _as_word(value: object) -> object:
    return ctypes.c_ulong(value) if isinstance(value, int) else value


def _forbid_files_and_network() -> bool:
    """Restrict the process with a Landlock ruleset that has no rule (Linux 5.13; the network from 6.7)."""
    if sys.platform != "linux" or not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    version = _landlock(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    bits = _LANDLOCK_RIGHTS[min(version, len(_LANDLOCK_RIGHTS) - 1)]
    # An older kernel accepts a longer structure if what it does not know is zero.
    rights = struct.pack("=QQQ", *((1 << count) - 1 for count in bits))
    ruleset = _landlock(_LANDLOCK_CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0)
    if ruleset < 0:
        return False
    try:
        return _landlock(_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), 0) == 0
    finally:
        os.close(ruleset)


def _landlock(number: int, *arguments: object) -> int:
    return int(_LIBC.syscall(ctypes.c_long(number), *arguments))


def _allow_few_system_calls() -> bool:
    """Have the kernel answer every system call but those that decoding needs with EPERM."""
    if _FILTER is None or not _prctl(_PR_SET_NO_NEW_PRIVS, 1):
        return False
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_FILTER))


def _filter(column: int) -> bytes:
    """Return the filter as a classic BPF program (linux/filter.h: code, jump if true, jump if false, value)."""
    architecture = list(_ARCHITECTURES.values())[column]
    allowed = [numbers[column] for numbers in _ALLOWED_CALLS.values()]
    instructions = [
        (_LOAD_WORD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 0, len(allowed) + 2, architecture),  # else to the refusal
        (_LOAD_WORD, 0, 0, _OFFSET_NUMBER),
        *((_JUMP_IF_EQUAL, len(allowed) - index + 1, 0, number) for index, number in enumerate(allowed)),
        (_JUMP_IF_EQUAL, 2, 0, _PRLIMIT64[column]),
        (_RETURN, 0, 0, _RETURN_EPERM),
        (_RETURN, 0, 0, _RETURN_ALLOW),
    ]
    # The limits of this process only, for its processor time: both words of the first argument, the process, are 0.
    for offset in (_OFFSET_FIRST_ARGUMENT, _OFFSET_FIRST_ARGUMENT + 4):
        instructions += [(_LOAD_WORD, 0, 0, offset), (_JUMP_IF_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _RETURN_EPERM)]
    instructions.append((_RETURN, 0, 0, _RETURN_ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


class _Program(ctypes.Structure):
    """The filter as the kernel reads it, with the memory that its instructions are in."""

    _fields_ = (("length", ctypes.c_ushort), ("address", ctypes.c_void_p))

    def __init__(self, instructions: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(instructions, len(instructions))
        super().__init__(len(instructions) // 8, ctypes.addressof(self._instructions))


def _program() -> _Program | None:
    """Return the filter; None where the numbers of the system calls are not known."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize <= 1 << 32:
        return None
    return _Program(_filter(list(_ARCHITECTURES).index(platform.machine())))


_LIBC = ctypes.CDLL(None, use_errno=True)
_FILTER = _program()
"""Made before any decoder is forked: what a child need not touch, it need not copy."""
