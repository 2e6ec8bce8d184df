"""Sums over tokens for the logs: kept on the device, read once per log, over all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from slimmoe_hf.losses import IGNORED


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


class TokenEvaluation(Trainer):
    """A `Trainer` that evaluates by means over the tokens of the whole set, instead of a mean of batch means.

    `prediction_step` adds each batch to `_eval_sums`.
    """

    _tokens_metric = "num_tokens"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as those of the `Trainer`."""
        self._eval_sums = TokenSums()
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop, with means over tokens; also reports how many they are."""
        self._eval_sums.clear()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        means, tokens = self._eval_sums.means(self.accelerator)
        own = {f"{metric_key_prefix}_{name}": value for name, value in {**means, self._tokens_metric: tokens}.items()}
        return output._replace(metrics={**(output.metrics or {}), **own})

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mask the rows that only fill up the last batch of several processes, as `gather_for_metrics` drops them."""
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        row = self.accelerator.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
        return {**inputs, "labels": labels.masked_fill((row >= state.remainder).unsqueeze(-1), IGNORED)}
