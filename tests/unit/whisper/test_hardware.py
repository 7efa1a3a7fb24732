import ctypes
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

from cesar_mqtt.whisper import hardware
from cesar_mqtt.whisper.hardware import (
    bundled_library,
    divide_cores,
    limit_heap,
    release_memory,
    trim_heap,
    usable_cores,
)


@pytest.mark.parametrize(
    ("cores", "workers", "chosen"),
    [
        (1, None, (1, 1)),
        (2, None, (2, 2)),
        (3, None, (2, 3)),
        (4, None, (2, 4)),
        (8, None, (4, 4)),
        (64, None, (4, 4)),
        (1, 2, (2, 1)),
        (2, 1, (1, 2)),
        (16, 1, (1, 16)),
        (8, 8, (8, 2)),
        (2, 16, (16, 1)),
    ],
)
def test_each_worker_has_the_threads_that_help_it(cores: int, workers: int | None, chosen: tuple[int, int]) -> None:
    assert divide_cores(cores, workers) == chosen


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/system.slice/cesar.service\n", {"system.slice/cesar.service/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/on/the/host/only\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "5:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("4:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, 64),
        ("0::/\n", {"cpu.max": "rubbish"}, 64),
    ],
)
def test_a_quota_on_the_processor_is_heeded(
    membership: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    assert usable_cores(tmp_path / "cgroup", tmp_path / "membership") == cores


def test_without_groups_the_cores_that_may_be_run_on_count(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "missing") == len(os.sched_getaffinity(0))


def test_freed_memory_is_given_back_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=asked.append))
    release_memory()
    assert asked == [0]


def test_mkls_buffers_are_freed_before_the_heap_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    mkl = SimpleNamespace(MKL_Free_Buffers=lambda: order.append("buffers"))
    monkeypatch.setattr(hardware, "bundled_library", {"libctranslate2": mkl}.__getitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=lambda _: order.append("heap")))
    trim_heap()
    assert order == ["buffers", "heap"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only CTranslate2's wheel for x86 brings MKL")
def test_the_wheel_brings_mkl() -> None:
    library = bundled_library("libctranslate2")
    assert library is not None
    assert callable(library.MKL_Free_Buffers)


def test_a_build_without_a_library_has_none() -> None:
    assert bundled_library("libnone") is None


def test_a_c_library_that_cannot_release_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    release_memory()


@pytest.mark.parametrize("library", [SimpleNamespace(), None], ids=["musl", "the real one"])
def test_the_heap_is_limited_where_the_library_can(
    library: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    limit_heap()


def test_the_heap_has_one_arena_and_returns_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=options.__setitem__))
    limit_heap()
    assert options == {-8: 1, -3: 4 << 20, -1: 4 << 20}


@pytest.mark.parametrize(("given", "found"), [(None, "16"), ("3", "3")])
def test_little_is_kept_of_what_is_compiled_for_a_length_of_input(
    given: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "DNNL_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    limit_heap()
    assert os.environ[name] == found
