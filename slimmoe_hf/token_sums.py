"""Sums over tokens for the logs: kept on the device, read once per log, over all processes."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor


class TokenSums:
    """Named sums that stay on the device until they are read, in float64 where the device has it."""

    def __init__(self) -> None:
        """Start at nothing."""
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add the sum of each tensor to the sum of its name; `tokens` and `micro_batches` count."""
        for name, value in values.items():
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            total = value.detach().sum(dtype=dtype)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()

    def means(self, accelerator: Accelerator) -> tuple[dict[str, float], int]:
        """Means over the tokens of all processes (`aux_loss`: over micro-batches), and how many tokens; then clear.

        Every process must call this.
        """
        if not self._sums:
            return {}, 0
        totals = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
        sums = dict(zip(self._sums, totals, strict=True))
        self.clear()
        tokens, micro_batches = sums.pop("tokens"), sums.pop("micro_batches", 0)
        counts = {name: micro_batches if name == "aux_loss" else tokens for name in sums}
        return {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}, round(tokens)
