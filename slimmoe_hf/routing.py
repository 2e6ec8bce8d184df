"""How evenly a router spreads its tokens: expert load, counted where the routers decide.

Shape letters: L layers with experts, E experts, K experts per token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState

from slimmoe_hf.families import LayerView, layer_views, shape_of

logger = logging.getLogger(__name__)
COLLAPSED = 0.1
"""An expert that gets less than this share of an even load is as good as dead (our choice)."""


class RouterLoad:
    """Counts, on the device, which experts the routers of a model choose.

    Tokens are counted as the model sees them, padding too.

    Args:
        model: Of a family in `FAMILIES`.
        views: Of the layers that are looked at; None is all of them.
    """

    def __init__(self, model: PreTrainedModel, views: Sequence[LayerView] | None = None) -> None:
        found = [view for view in (layer_views(model) if views is None else views) if view.router is not None]
        self.layers = [view.index for view in found]
        self.routers: list[Any] = [view.router for view in found]
        self._experts = shape_of(model.config).num_experts  # a router's weight may be in parts
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
        zero_E = torch.zeros(self._experts, dtype=torch.int64)
        rows = [zero_E if counts is None else counts for counts in self._counts]
        return torch.stack([row.to(device) for row in rows])

    def clear(self) -> None:
        """Forget what was counted."""
        self._counts = [None] * len(self.routers)

    def _counter(self, number: int) -> Any:
        def count(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen = outputs[2].detach().flatten()
            counts = self._counts[number]
            if counts is None:
                counts = self._counts[number] = torch.zeros(self._experts, device=chosen.device, dtype=torch.int64)
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


class LoadMonitor(RouterLoad):
    """Expert load while a model trains, for its logs; warns, once, of every expert that starves."""

    KEPT = 100
    """Of how many logs of a run the whole matrix is kept: of a large model it is a hundred kilobytes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._starved: set[tuple[int, int]] = set()

    def read(self, accelerator: Accelerator, state: TrainerState) -> tuple[dict[str, float], list[list[float]] | None]:
        """The load since the last call, over all processes; every one of them must call this.

        Args:
            accelerator: Of the trainer.
            state: Of the trainer.

        Returns:
            `router_load_min` and `router_load_max`, as multiples of an even load; and of every expert, `[L, E]`, where the
            history is to keep it.
        """
        counts_LE = self.counts().to(accelerator.device)
        self.clear()
        shares_LE = load_shares(accelerator.reduce(counts_LE, reduction="sum"))
        starved, known = set(collapsed_experts(shares_LE)), set(self._starved)
        for row, expert in sorted(starved - known) if state.is_world_process_zero else ():
            logger.warning(
                "step %d: the router of layer %d sends expert %d only %.0f%% of an even load: it is collapsing. Lower "
                "learning_rate, or set router_aux_loss_coef.",
                state.global_step, self.layers[row], expert, 100 * float(shares_LE[row, expert]),
            )  # fmt: skip
        self._starved |= starved
        kept = [entry["step"] for entry in state.log_history if "router_load" in entry]
        due = not kept or state.global_step - kept[-1] >= state.max_steps / self.KEPT or bool(starved - known)
        numbers = {"router_load_min": float(shares_LE.min()), "router_load_max": float(shares_LE.max())}
        return numbers, [[round(share, 4) for share in row] for row in shares_LE.tolist()] if due else None
