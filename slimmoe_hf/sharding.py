"""Weights that several processes share, whole for a while: FSDP2's (`DTensor`) and those of DeepSpeed's ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 has taken a weight apart, so that it is empty until it is gathered."""
    return "ds_id" in vars(weight) and not weight.numel()


@contextmanager
def gathered(weights: Iterable[Tensor]) -> Iterator[None]:
    """Have weights that ZeRO-3 took apart whole within the block; others are left as they are.

    Every process must come here with the same weights.
    """
    parts = [weight for weight in weights if is_partitioned(weight)]
    if not parts:
        yield
        return
    import deepspeed  # no dependency of ours: whoever gave us such weights has it

    with deepspeed.zero.GatheredParameters(parts):
        yield


def whole(weight: Any) -> Any:
    """A weight as it is, or, of one in parts, a copy of the whole; None of None.

    A gathered `DTensor` carries its gradient back, the mean over processes as FSDP2 has it; a copy of what ZeRO-3 took
    apart does not: there a weight is whole already in the forward pass of its model.
    """
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        if full.requires_grad:
            full.register_hook(lambda gradient: gradient / mesh.size())
        return full
    if weight is None or not is_partitioned(weight):
        return weight
    with gathered([weight]):
        return weight.detach().clone()
