"""How evenly a router spreads its tokens: expert load, counted where the routers decide.

Shape letters: L layers with experts, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimmoe_hf.families import moe_layers

COLLAPSED = 0.1
"""An expert that gets less than this share of an even load is as good as dead (our choice)."""


class RouterLoad:
    """Counts, on the device, which experts the routers of a model choose.

    Tokens are counted as the model sees them, padding too.

    Args:
        model: Of a family in `FAMILIES`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = moe_layers(model)
        self.layers = [index for index, _, _ in found]
        self.routers: list[Any] = [router for _, _, router in found]
        self._experts = [int(router.weight.shape[0]) for router in self.routers]
        self._counts: list[Tensor | None] = [None] * len(found)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count every forward within the block."""
        hooks = [router.register_forward_hook(self._counter(row)) for row, router in enumerate(self.routers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def counts(self) -> Tensor:
        """Choices so far, `[L, E]`, int64; on the device of the first router that was called."""
        device = next((counts.device for counts in self._counts if counts is not None), torch.device("cpu"))
        zeros = [torch.zeros(experts, dtype=torch.int64) for experts in self._experts]
        rows = [zero if counts is None else counts for counts, zero in zip(self._counts, zeros, strict=True)]
        return torch.stack([row.to(device) for row in rows])

    def clear(self) -> None:
        """Forget what was counted."""
        self._counts = [None] * len(self.routers)

    def _counter(self, number: int) -> Any:
        def count(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen = outputs[2].detach().flatten()
            counts = self._counts[number]
            if counts is None:
                counts = self._counts[number] = torch.zeros(
                    self._experts[number], device=chosen.device, dtype=torch.int64
                )
            counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))  # bincount would wait for the GPU

        return count


def load_shares(counts_LE: Tensor) -> Tensor:
    """Counts as multiples of an even load: `[L, E]`, each row with mean 1 (zeros where nothing was counted)."""
    total_L1 = counts_LE.sum(dim=1, keepdim=True)
    return counts_LE * counts_LE.shape[1] / total_L1.clamp(min=1)


def collapsed_experts(shares_LE: Tensor, threshold: float = COLLAPSED) -> list[tuple[int, int]]:
    """`(row, expert)` of every expert below `threshold` of an even load, in layers where anything was counted."""
    starved_LE = (shares_LE < threshold) & (shares_LE.sum(dim=1, keepdim=True) > 0)
    return [(int(row), int(expert)) for row, expert in starved_LE.nonzero()]
