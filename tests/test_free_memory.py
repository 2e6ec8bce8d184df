"""In a container the free memory is what its cgroup leaves, not what the machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from slimmoe_hf.free_memory import free_memory

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 GB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 64 * GB}))


def group(root: Path, lines: str, folder: str, files: dict[str, object]) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(lines)
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name).write_text(f"{content}\n")


def v2(limit: object, taken: int, files: int) -> dict[str, object]:
    stat = f"anon {taken - files}\ninactive_file {files // 2}\nactive_file {files - files // 2}"
    return {"memory.max": limit, "memory.current": taken, "memory.stat": stat}


def v1(limit: int, taken: int, files: int) -> dict[str, object]:
    stat = f"cache 1\ntotal_inactive_file {files // 2}\ntotal_active_file {files - files // 2}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": taken, "memory.stat": stat}


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path):
    assert free_memory(tmp_path) == 64 * GB, "no cgroups at all"
    group(tmp_path, "0::/", "", v2("max", 5 * GB, 2 * GB))
    assert free_memory(tmp_path) == 64 * GB


def test_the_pages_of_files_count_as_free(tmp_path: Path):
    group(tmp_path, "0::/", "", v2(8 * GB, 7 * GB, 5 * GB))
    assert free_memory(tmp_path) == 6 * GB


def test_the_tightest_of_nested_groups_counts(tmp_path: Path):
    group(tmp_path, "0::/pod/box", "pod/box", v2(30 * GB, 1 * GB, 0))
    group(tmp_path, "0::/pod/box", "pod", v2(10 * GB, 3 * GB, 0))
    assert free_memory(tmp_path) == 7 * GB


@pytest.mark.parametrize("inside", ["memory", "memory/docker/abc"], ids=["in the container", "on the host"])
def test_the_first_version_of_cgroups_is_read_too(inside: str, tmp_path: Path):
    lines = "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    group(tmp_path, lines, inside, v1(4 * GB, 3 * GB, 1 * GB))
    assert free_memory(tmp_path) == 2 * GB
    group(tmp_path, lines, inside, v1(9223372036854771712, 3 * GB, 1 * GB))
    assert free_memory(tmp_path) == 64 * GB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path):
    group(tmp_path, "0::/", "", v2(1 * GB, 2 * GB, 0))
    assert free_memory(tmp_path) == 0
