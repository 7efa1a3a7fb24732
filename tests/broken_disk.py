"""A disk that fails, and files that crash what reads them: a library to be loaded with LD_PRELOAD."""

import os
import subprocess
from pathlib import Path

from tests.conftest import need

CRASH, HANG = 200, 201

_HEALTHY_BYTES = 20_000
_SOURCE = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>

/* Reads of a file that was last changed in the first minutes of 1970 fail, from some byte on. */
static int failure(int fd, off_t offset) {{
    struct stat status;
    if (offset < {_HEALTHY_BYTES} || fstat(fd, &status) != 0 || status.st_mtime > {HANG}) return 0;
    return (int)status.st_mtime;
}}

ssize_t pread64(int fd, void *buffer, size_t size, off_t offset) {{
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (real == NULL) real = dlsym(RTLD_NEXT, "pread64");
    int code = failure(fd, offset);
    if (code == {CRASH}) *(volatile int *)0 = 0;
    while (code == {HANG}) {{ }}
    if (code != 0) {{ errno = code; return -1; }}
    return real(fd, buffer, size, offset);
}}

ssize_t pread(int fd, void *buffer, size_t size, off_t offset) {{ return pread64(fd, buffer, size, offset); }}
"""


def build(folder: Path) -> Path:
    """Compile the library; without a C compiler: see `report_missing`."""
    source, library = folder / "broken_disk.c", folder / "broken_disk.so"
    source.write_text(_SOURCE)
    subprocess.run([need("cc"), "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


def break_reads(path: Path, what: int) -> None:
    """Let reads of a file behind its first bytes fail with an error code, `CRASH` or `HANG`."""
    assert path.stat().st_size > 2 * _HEALTHY_BYTES
    os.utime(path, (what, what))
