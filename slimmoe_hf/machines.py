"""Machines that a run may be planned for: this one, and some that are rented."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from slimmoe_hf.free_memory import free_memory
from slimmoe_hf.preflight import device
from slimmoe_hf.sizing import GIB, RESERVE_BYTES, RESERVE_SHARE


@dataclass(frozen=True)
class Machine:
    """Where a run would be done.

    Attributes:
        name: For people.
        memory: Bytes on the device that computes. host: Bytes of the computer's own; None on a CPU, where it is the same.
        flops: Operations per second of a large matrix product, in the dtype of training.
        host_flops: Those of its CPU.
        transfer: Bytes per second from host to device.
    """

    name: str
    memory: int
    host: int | None
    flops: float
    host_flops: float
    transfer: float = 12e9


def _gpu(name: str, gib: int, flops: float) -> Machine:
    usable = int(gib * GIB * (1 - RESERVE_SHARE) - RESERVE_BYTES)
    return Machine(f"{name} with a host of 240 GB", usable, 240 * 10**9, flops, 1e12)


MACHINES = {
    # Dense bfloat16, from the makers' data sheets; the host (240 GB, 1 TFLOP/s) is assumed.
    "A100-80GB": _gpu("one A100-80GB", 80, 312e12),
    "H100-80GB": _gpu("one H100-80GB", 80, 989e12),
    "A6000-48GB": _gpu("one RTX A6000 48GB", 48, 155e12),
    "4090-24GB": _gpu("one RTX 4090 24GB", 24, 165e12),
}


def this_machine() -> Machine:
    """This machine, its speed measured."""
    place = device()
    host = free_memory()
    on_host = _measured_flops(torch.device("cpu"), torch.float32)
    if place.type == "cpu":
        return Machine(f"this machine's CPU, {torch.get_num_threads()} threads", host, None, on_host, on_host)
    name = torch.cuda.get_device_name(place)
    free = torch.cuda.mem_get_info(place)[0]
    return Machine(name, free, host, _measured_flops(place, torch.bfloat16), on_host)


def _measured_flops(place: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if place.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=place, dtype=dtype)
    matrix @ matrix
    repeats, started = 4, time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    product[0, 0].item()  # waits for the device
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def require_machine(name: str | None, dry_run: bool) -> None:
    """Raise ValueError for a machine that is not in `MACHINES`, or that was named for a real run."""
    if name is not None and (not dry_run or name not in MACHINES):
        raise ValueError(
            f"--machine {name}: with --dry-run, one of {', '.join(MACHINES)}; without it, this one is used."
        )
