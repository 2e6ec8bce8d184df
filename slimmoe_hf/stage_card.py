"""What the card of a run says of each of its stages: sizes, scores and training settings, one column each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from slimmoe_hf import card
from slimmoe_hf.arguments import DistillationConfig, schedule
from slimmoe_hf.criteria import OF_GRADIENTS
from slimmoe_hf.describe import chosen_by, size_rows
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.recipe import Recipe, Stage


def stage_settings(
    recipe: Recipe, plans: Sequence[CompressionPlan], stage: Stage, plan: CompressionPlan, history: list[dict[str, Any]]
) -> dict[str, str]:
    """One column of a card's table of settings: what stands in a row -> what it was.

    Args:
        recipe: Of the run.
        plans: Of all its stages.
        stage: The one of the column. plan: Its own. history: The logs of its training.
    """
    said = _arguments(stage)
    kept = [layer.neuron_score_kept for layer in plan.meta.layers if layer.neuron_score_kept is not None]
    rows = int(said["per_device_train_batch_size"]) * int(said["gradient_accumulation_steps"])
    trained = [int(entry["num_tokens"]) for entry in history if "num_tokens" in entry]
    divergences = [float(entry["kl"]) for entry in history if "kl" in entry]
    each = " per process" if recipe.accelerate else ""
    met = "" if chosen_by(plan) else " (met already, nothing was cut)"
    within = {"sizes found within": f"{stage.target}{met}" if stage.target.searched else "-"}
    return {
        **size_rows(plan, any(each.experts for each in plans)),
        **(within if any(each.target.searched for each in recipe.stages) else {}),
        "scored by": _scored(plan, stage),
        "score that stayed": f"{mean(kept):.0%}" if kept else "all",
        "optimizer steps": f"{history[-1]['step']:,}" if history else str(said["max_steps"]),
        "batch": f"{rows:,} rows of {recipe.data.max_length:,} tokens{each}",
        "tokens trained on": f"{trained[-1]:,}" if trained else "-",
        "learning rate": f"{float(said['learning_rate']):g}, {card.word(said['lr_scheduler_type'])}",
        "loss": card.loss_in_words(said),
        "weights while training": stage.training_dtype + _mixed(said),
        "KL to the teacher": f"{divergences[0]:.3f} → {divergences[-1]:.3f}" if divergences else "-",
    }  # fmt: skip


def _scored(plan: CompressionPlan, stage: Stage) -> str:
    names = list(dict.fromkeys(chosen_by(plan).values()))
    if not names:
        return "nothing was cut"
    of_loss = f", loss `{plan.meta.loss}`" if any(name in OF_GRADIENTS for name in names) else ""
    named = ", experts by ".join(f"`{name}`" for name in names)
    return f"{named} on {stage.calibration.tokens:,} tokens{of_loss}"


def _arguments(stage: Stage) -> dict[str, Any]:
    """The training arguments of a stage, defaults filled in and weights read as `DistillationConfig` reads them."""
    defaults = {
        each.name: each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        for each in dataclasses.fields(DistillationConfig)
        if each.init
    }
    said = {**defaults, **stage.distillation}
    return said | {name: schedule(name, said[name]) for name in ("distillation_weight", "crossentropy_weight")}


def _mixed(said: Mapping[str, Any]) -> str:
    """Mixed precision, as far as the settings decide it: on its own it is the GPU's matter, which no file of a run tells."""
    if said["fp16"]:
        return " mixed with float16"
    if said["bf16"] is None and not said["use_cpu"]:
        return " (mixed with bfloat16 on a GPU that has it)"
    return " mixed with bfloat16" if said["bf16"] else ""
