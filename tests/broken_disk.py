"""A disk that fails, and files that crash what reads them: libraries to be loaded with LD_PRELOAD."""

import json
import os
import subprocess
from pathlib import Path

from tests.conftest import PATIENCE_S, need

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

_RANDOM_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* While the file SWITCH exists, one call in ONE_IN fails that reads, writes, syncs, cuts or renames a file below
   WRITES, or reads one below READS. A failed write has written half. All are constants: decoders get few variables. */
static __thread unsigned long state;

static unsigned chance(unsigned one_in) {
    if (state == 0) state = SEED * 0x9E3779B97F4A7C15ul ^ (unsigned long)gettid() << 20;
    state = state * 6364136223846793005ul + 1442695040888963407ul;
    return (unsigned)(state >> 33) % one_in == 0;
}

static int fails(const char *path, int is_read) {
    struct stat status;
    if (strncmp(path, WRITES, strlen(WRITES)) != 0 && (!is_read || strncmp(path, READS, strlen(READS)) != 0)) return 0;
    if (stat(SWITCH, &status) != 0 || !chance(ONE_IN)) return 0;
    errno = is_read || chance(2) ? EIO : ENOSPC;
    return 1;
}

static int fd_fails(int fd, int is_read) {
    char link[64], path[4096];
    int before = errno, failed;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) { /* a decoder may not do that; the only file that it reads is a recording */
        struct stat status;
        if (!is_read || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return 0;
        size = snprintf(path, sizeof path, "%s", READS);
        errno = before;
    }
    path[size] = 0;
    failed = fails(path, is_read);
    if (!failed) errno = before;
    return failed;
}

#define REAL(name) static __typeof__(name) *real; if (real == NULL) real = dlsym(RTLD_NEXT, #name)

ssize_t pread64(int fd, void *buffer, size_t size, off_t offset) {
    REAL(pread64);
    return fd_fails(fd, 1) ? -1 : real(fd, buffer, size, offset);
}
ssize_t pread(int fd, void *buffer, size_t size, off_t offset) { return pread64(fd, buffer, size, offset); }

ssize_t read(int fd, void *buffer, size_t size) {
    REAL(read);
    return fd_fails(fd, 1) ? -1 : real(fd, buffer, size);
}

ssize_t pwrite64(int fd, const void *buffer, size_t size, off_t offset) {
    REAL(pwrite64);
    if (!fd_fails(fd, 0)) return real(fd, buffer, size, offset);
    int code = errno;
    real(fd, buffer, size / 2, offset);
    errno = code;
    return -1;
}
ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset) { return pwrite64(fd, buffer, size, offset); }

int fsync(int fd) { REAL(fsync); return fd_fails(fd, 0) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return fd_fails(fd, 0) ? -1 : real(fd); }
int ftruncate64(int fd, off_t size) { REAL(ftruncate64); return fd_fails(fd, 0) ? -1 : real(fd, size); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int rename(const char *from, const char *to) { REAL(rename); return fails(to, 0) ? -1 : real(from, to); }
"""


def build(folder: Path) -> Path:
    """Compile the library of files that are broken for good; without a C compiler: see `report_missing`."""
    return _build(folder, _SOURCE)


def build_random(folder: Path, *, writes: Path, reads: Path, one_in: int, seed: int) -> Path:
    """Compile the library of a disk that fails now and then.

    Args:
        folder: for the library; while the file `broken` is in it, the disk fails.
        writes: all calls for files below this folder may fail.
        reads: reads of files below this folder may fail.
        one_in: one call in so many fails.
        seed: of the chance.
    """
    strings = {"WRITES": f"{writes}/", "READS": f"{reads}/", "SWITCH": str(folder / "broken")}
    constants = {name: json.dumps(value) for name, value in strings.items()} | {"ONE_IN": one_in, "SEED": f"{seed}ul"}
    return _build(folder, "".join(f"#define {name} {value}\n" for name, value in constants.items()) + _RANDOM_SOURCE)


def _build(folder: Path, code: str) -> Path:
    source, library = folder / "broken_disk.c", folder / "broken_disk.so"
    source.write_text(code)
    subprocess.run([need("cc"), "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=PATIENCE_S)
    return library


def break_reads(path: Path, what: int) -> None:
    """Let reads of a file behind its first bytes fail with an error code, `CRASH` or `HANG`."""
    assert path.stat().st_size > 2 * _HEALTHY_BYTES
    os.utime(path, (what, what))
