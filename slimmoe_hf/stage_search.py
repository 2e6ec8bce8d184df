"""A stage whose target is a budget: the shape that its plan has, found on the stage's own statistics while the run goes on.

Shape letters: N rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from slimmoe_hf.budget import Limits, Sizes, StageTarget, already_met, parse_budget
from slimmoe_hf.families import config_from, shape_of
from slimmoe_hf.loading import load_model
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.recipe import Stage
from slimmoe_hf.search import Search, search_plan
from slimmoe_hf.search_check import check_search
from slimmoe_hf.sizing import slimmed_config
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.sweeps import Batch

CHECK_TOKENS = 32768
"""Validation text that shapes are measured on at most, as `slimmoe plan --budget` does unless told otherwise."""


def limits_of(config: PreTrainedConfig, target: StageTarget) -> Limits:
    """The most parameters that a stage's budgets allow.

    Args:
        config: Of the model that the stage starts from.
        target: With a budget.

    Raises:
        ValueError: As `Sizes.allowed`.
    """
    return Sizes(config).allowed(target.budget, target.active_budget)


def most_after(most: Limits, target: StageTarget, known: bool) -> Limits:
    """The most parameters that a model can have after a stage with a budget.

    Args:
        most: The same before it.
        target: With a budget.
        known: The model has just so many before it; otherwise an earlier budget may leave fewer.

    Raises:
        ValueError: As `parse_budget`, or the budget is met by whatever comes before it.
    """
    assert most.total is not None and most.active is not None
    budgets = ((target.budget, most.total, "budget"), (target.active_budget, most.active, "active budget"))
    total, active = (
        min(whole, parse_budget(given, whole, name)) if given is not None else whole for given, whole, name in budgets
    )
    if (total, active) == most:
        raise ValueError(already_met(total, active, "" if known else "at most "))
    return Limits(total, active)


def is_met(config: PreTrainedConfig, target: StageTarget) -> bool:
    """Whether a model keeps within a stage's budgets as it is, because an earlier budget found so small a shape.

    Args:
        config: Of the model that the stage starts from.
        target: With a budget.

    Raises:
        ValueError: As `Sizes.allowed`.
    """
    return Sizes(config).met(limits_of(config, target))


def whole_plan(stage: Stage, stats: ExpertStats, seed: int) -> CompressionPlan:
    """The plan that keeps everything, of a stage whose budgets are met already.

    Args:
        stage: With a budget.
        stats: Of the model that it starts from.
        seed: The recipe's.
    """
    shape = shape_of(config_from(stats.meta.config))
    sizes = Target(expert_width=shape.expert_width, kv_groups=shape.kv_groups, num_experts=shape.num_experts)
    return make_plan(stats, sizes, stage.criterion, seed, stage.expert_criterion)


def supposed(config: PreTrainedConfig, target: StageTarget) -> PreTrainedConfig:
    """The config that estimates are made for until the shape is found: all experts narrowed, or what is nearest to that.

    Args:
        config: Of the model that the stage starts from.
        target: With a budget.

    Raises:
        ValueError: As `Sizes.allowed`.
    """
    return slimmed_config(config, Sizes(config).nearest(limits_of(config, target)))


def found_by_prediction(stage: Stage, stats: ExpertStats, seed: int) -> Search:
    """The shapes within a stage's budgets, by predicted loss: the same ones whenever it is asked.

    Args:
        stage: With a budget.
        stats: Of the model that it starts from.
        seed: The recipe's.

    Raises:
        ValueError: As `search_plan`.
    """
    target = stage.target
    return search_plan(stats, target.budget, target.active_budget, stage.criterion, seed, stage.expert_criterion)


def found_by_measuring(
    stage: Stage, stats: ExpertStats, seed: int, source: Path, given: Sequence[Batch], validation_NT: Tensor,
    device: torch.device, dtype: torch.dtype,
) -> tuple[Search, CompressionPlan]:  # fmt: skip
    """The same, the best of them measured on validation text with the model in memory; and the best one's plan.

    Args:
        stage: With a budget; whether its calibration reconstructs says whether shapes are measured so.
        stats: Of the model that it starts from.
        seed: The recipe's.
        source: Folder of that model.
        given: The calibration text.
        validation_NT: From `check_rows`.
        device: What is computed on.
        dtype: Of what is solved.

    Raises:
        ValueError: As `search_plan`.
    """
    calibration, found = stage.calibration, found_by_prediction(stage, stats, seed)
    model = load_model(source, calibration.dtype, device, whole=True)
    checked = check_search(
        model, stats, found, validation_NT, given, rebuild=calibration.reconstruct, batch_size=calibration.batch_size,
        dtype=dtype,
    )  # fmt: skip
    return checked.search, checked.plan


def check_rows(rows: Dataset, max_length: int) -> Tensor:
    """Validation rows of one length, `[N, T]`, at most `CHECK_TOKENS` of them: documents of unequal length run together.

    Args:
        rows: From `tokenize`, packed or not.
        max_length: T, if there are as many tokens.
    """
    stream = torch.tensor([token for row in rows["input_ids"] for token in row][:CHECK_TOKENS])
    length = min(max_length, len(stream))
    return stream[: len(stream) // length * length].view(-1, length)
