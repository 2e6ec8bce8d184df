"""`SparsityCallback`: take rows out of the sparse parts of factored experts while any `Trainer` trains.

After MC-SMoE (arXiv 2310.01334) and LoSparse (arXiv 2306.11222).

Shape letters: E experts, O output rows of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimmoe_hf.atomic import replacing
from slimmoe_hf.factored import FactoredWeight, PackedWeight, factored_weights

STATE = "sparsity.safetensors"
"""The file in a checkpoint that holds the callback's state."""
_HEADER = "slimmoe_sparsity"


class SparsitySchedule(BaseModel):
    """How much of S remains at every step.

    Attributes:
        density: P_T, the share of elements that remains in the end.
        steps: T, optimizer steps of the run.
        initial_steps: T_i, steps with all of S. final_steps: T_f, steps at the end with P_T of it.
        beta: Of the moving average of importance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    density: float
    steps: int
    initial_steps: int
    final_steps: int
    beta: float

    def at(self, step: int) -> float:
        """P_t after `step` steps: 1, then down by a cubic, then P_T (paper)."""
        if step <= self.initial_steps:
            return 1.0
        if step >= self.steps - self.final_steps:
            return self.density
        gone = (step - self.initial_steps) / (self.steps - self.initial_steps - self.final_steps)
        return self.density + (1 - self.density) * (1 - gone) ** 3


class SparsityCallback(TrainerCallback):
    """Zero the least important rows of every S after each optimizer step, more of them as training goes on.

    A row's score is the moving average of the mean of `|s ds|` along it. One threshold holds for all matrices; it is set
    so that the rows above it have P_t of all elements (our choice: rows of different matrices differ in length). A row
    below is set to zero, and may regrow and come back until the end: importance is read after the optimizer step, as the
    published code does, when a zeroed row has moved again (read before it, it would be zero for good). The average is
    kept per row, which is the same: the mean of averages is the average of means.

    The state goes into every checkpoint, and a resumed run goes on exactly.

    Args:
        density: Share of the elements of all S that remains.
        initial_steps: Steps before the first row goes; below 1 a share of the run (as `warmup_steps`).
        final_steps: Steps at the end at the final density; below 1 a share of the run.
        beta: Of the moving average; .85 is the paper's.

    Raises:
        ValueError: Settings out of range; from `train()`: no factored experts, S packed or frozen, a sharded model,
            `load_best_model_at_end`, a resumed run with other settings or without its state.

    Example:
        ```python
        model = factor_experts(model)
        trainer = Trainer(model, args, train_dataset=tokenised, callbacks=[SparsityCallback(density=0.10)])
        trainer.train()
        trainer.save_model("packed")
        ```
    """

    def __init__(
        self, density: float = 0.10, *, initial_steps: float = 0.1, final_steps: float = 0.3, beta: float = 0.85
    ) -> None:
        if not 0 < density < 1:
            raise ValueError(f"density={density} is not between 0 and 1: 0.10 keeps a tenth of S.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} is not in [0, 1): 0.85 is the paper's.")
        if min(initial_steps, final_steps) < 0:
            raise ValueError(f"initial_steps={initial_steps} and final_steps={final_steps}: give 0 or more.")
        self.density, self.initial_steps, self.final_steps, self.beta = density, initial_steps, final_steps, beta
        self.schedule: SparsitySchedule | None = None
        self.weights: dict[str, FactoredWeight] = {}
        self.scores: dict[str, Tensor] = {}
        self._written = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what is to be made sparse, and the state of the run that is resumed."""
        model = kwargs["model"]
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True would bring back a step with more of S than density says, for rows go until the "
                "end. Set it to False."
            )
        if args.fsdp or args.deepspeed or any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError(
                "SparsityCallback needs whole matrices: train without FSDP, DeepSpeed and tensor parallelism."
            )
        self.weights = _trainable_weights(model)
        self.schedule = self._schedule(state.max_steps)
        self.scores, self._written = {}, -1
        if state.global_step > 0:
            self._restore(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE)

    def _schedule(self, steps: int) -> SparsitySchedule:
        first, last = (round(n * steps) if n < 1 else int(n) for n in (self.initial_steps, self.final_steps))
        if first + last >= steps:
            raise ValueError(
                f"initial_steps={first} and final_steps={last} leave nothing of {steps} steps for taking rows out. "
                "Train longer, or give fewer."
            )
        return SparsitySchedule(
            density=self.density, steps=steps, initial_steps=first, final_steps=last, beta=self.beta
        )

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read importance while the gradients are there, then zero the rows that are to be out at this step."""
        assert self.schedule is not None
        for name, weight in self.weights.items():
            new = weight.row_scores()
            old = self.scores.setdefault(name, torch.zeros_like(new))
            # a step that a loss scaler skipped has gradients that are not finite
            old.copy_(torch.where(new.isfinite(), old * self.beta + new * (1 - self.beta), old))
        density = self.schedule.at(state.global_step + 1)
        if density < 1:
            for weight, kept in zip(self.weights.values(), kept_rows(self.weights, self.scores, density), strict=True):
                weight.sparse.masked_fill_(~kept.unsqueeze(-1), 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state first where a checkpoint is due: then what vouches for the checkpoint vouches for it too."""
        if control.should_save:
            self._save(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `on_step_end`."""
        self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state where that the checkpoint was due was not known before (`save_strategy="best"`)."""
        self._save(args, state)

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._written == state.global_step or not state.is_world_process_zero:
            return
        assert self.schedule is not None
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        scores = {name: score.cpu().contiguous() for name, score in self.scores.items()}
        with replacing(folder / STATE, overwrite=True) as partial:
            save_file(scores, partial, metadata={_HEADER: self.schedule.model_dump_json()})
        self._written = state.global_step

    def _restore(self, file: Path) -> None:
        assert self.schedule is not None
        if not file.is_file():
            raise ValueError(
                f"{file}: missing, so this run cannot go on exactly. Resume from a checkpoint of output_dir that a run with "
                "this SparsityCallback wrote, or start over."
            )
        try:
            with safe_open(file, framework="pt") as stored:
                before = SparsitySchedule.model_validate_json((stored.metadata() or {}).get(_HEADER, ""))
                scores = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValidationError) as error:
            raise ValueError(
                f"{file}: damaged ({str(error).splitlines()[0]}). Resume from another checkpoint."
            ) from error
        was, is_ = before.model_dump(), self.schedule.model_dump()
        if changed := [f"{key} was {was[key]} and is {is_[key]}" for key in was if was[key] != is_[key]]:
            raise ValueError(
                f"{file.parent} cannot be resumed from: {'; '.join(changed)}. Continue as it began, or start over."
            )
        for name, score in scores.items():
            if name not in self.weights or score.shape != self.weights[name].sparse.shape[:-1]:
                raise ValueError(
                    f"{file}: is of another model ({name}, {list(score.shape)}). Start over in another output_dir."
                )
            self.scores[name] = score.to(self.weights[name].sparse.device)


def kept_rows(weights: Mapping[str, FactoredWeight], scores: Mapping[str, Tensor], density: float) -> list[Tensor]:
    """Which rows of each S stay: one threshold on their scores holds for all, so that they have `density` of all elements.

    Args:
        weights: Factored matrices by name.
        scores: Of the rows of each, `[O]` or `[E, O]`.
        density: Share of the elements that stays, at most.

    Returns:
        For each matrix `[O]` or `[E, O]`, bool.
    """
    shapes = [weight.sparse.shape for weight in weights.values()]
    device = next(iter(scores.values())).device
    flat = torch.cat([scores[name].flatten().to(device) for name in weights])
    lengths = torch.cat([torch.full((math.prod(shape[:-1]),), shape[-1], device=device) for shape in shapes])
    order = torch.argsort(flat, descending=True, stable=True)
    within = lengths[order].cumsum(0) <= density * int(lengths.sum())
    kept = torch.zeros_like(within).index_copy_(0, order, within)
    parts = kept.split([math.prod(shape[:-1]) for shape in shapes])
    return [
        part.view(shape[:-1]).to(weight.sparse.device)
        for part, shape, weight in zip(parts, shapes, weights.values(), strict=True)
    ]


def _trainable_weights(model: nn.Module) -> dict[str, FactoredWeight]:
    """Every factored matrix.

    Raises:
        ValueError: There is none, or one that cannot be made sparse in training.
    """
    found: dict[str, FactoredWeight] = {}
    for name, weight in factored_weights(model).items():
        if isinstance(weight, PackedWeight):
            raise ValueError(
                "the rows of S are packed, and none can come back: load with load_factored(folder, regrow=True)."
            )
        if not weight.sparse.requires_grad:
            raise ValueError(f"{name}.sparse is frozen, so it has no importance. Train it, or drop SparsityCallback.")
        found[name] = weight
    if not found:
        raise ValueError("this model has no factored experts to make sparse: call factor_experts(model) first.")
    return found
