"""How much memory this process may still take: what the machine has free, or what its container allows it if that is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
from accelerate.utils import convert_file_size_to_int

_ROOT = Path("/")
# The limit, what is taken of it, and what of that are files' pages, which the kernel gives up: of cgroup v2, then of v1.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def memory_bytes(text: str) -> int:
    """An amount of memory in bytes.

    Args:
        text: As in `12GB` (10^9), `12GiB` (2^30), `800MB` or `800MiB`.

    Raises:
        ValueError: It is not written so, or nothing.
    """
    try:
        amount = convert_file_size_to_int(text.replace(" ", "").upper())  # which takes a small b for bits
    except ValueError:
        amount = 0
    if amount <= 0:
        raise ValueError(f"expected an amount of memory such as 12GB or 12GiB, found {text!r}")
    return int(amount)


def free_memory(root: Path = _ROOT) -> int:
    """Bytes of host memory that can be had: the least of what is free here and in every cgroup around this process.

    Args:
        root: Where `proc` and `sys` are.
    """
    return max(0, min([psutil.virtual_memory().available, *_left(root)]))


def _left(root: Path) -> Iterator[int]:
    """What each cgroup with a limit has left."""
    for folder, (limit, taken, pages) in _groups(root):
        try:
            most = (folder / limit).read_text().strip()
            used = int((folder / taken).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():  # v2 writes "max" where there is none, v1 a number beyond all memory
            yield int(most) - used + sum(int(stat.get(name, 0)) for name in pages)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """The folders of this process's cgroups, outwards; in a container its own is the mount itself."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, files = root / "sys/fs/cgroup", _V2
        if controllers:
            mount, files = mount / "memory", _V1
        inside = mount / path.lstrip("/")
        for folder in (inside, *inside.parents):
            yield folder, files
            if folder == mount:
                break
