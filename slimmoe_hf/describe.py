"""A plan in words: what `slimmoe plan show A [B]` prints."""

from __future__ import annotations

import torch
from torch import Tensor

from slimmoe_hf.plan import CompressionPlan, alignment_note


def describe_plan(plan: CompressionPlan) -> str:
    """What a plan keeps, layer by layer, and where it comes from."""
    meta = plan.meta
    lines = [
        f"{meta.family}: {meta.target}, by {meta.criterion} (calibration loss {meta.loss}, seed {meta.seed})",
        f"  expert width {meta.before.expert_width} -> {meta.after.expert_width}, key/value groups "
        f"{meta.before.kv_groups} -> {meta.after.kv_groups}, query heads {meta.before.query_heads} -> "
        f"{meta.after.query_heads}, {meta.before.num_experts} experts",
        f"  {alignment_note(meta.after.expert_width)}",
        f"  plan {plan.sha256[:12]}, statistics {meta.stats_sha256[:12]}, model {meta.model_sha256[:12]}, "
        f"data {meta.data_sha256[:12]}",
        "",
        "  layer  neuron score kept  group score kept  groups kept",
    ]
    for layer in meta.layers:
        groups = ",".join(map(str, layer.groups_kept)) if layer.groups_kept is not None else "all"
        lines.append(
            f"  {layer.index:5d}  {_share(layer.neuron_score_kept):>17}  {_share(layer.group_score_kept):>16}  {groups}"
        )
    unknown = sum(layer.unknown_experts for layer in meta.layers)
    if unknown:
        plural = "expert" if unknown == 1 else "experts"
        lines.append(
            f"  {unknown} {plural} that no calibration token reached: ranked by weight norms. Calibrate on more text."
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def compare_plans(first: CompressionPlan, second: CompressionPlan) -> str:
    """What two plans have in common: per layer, the share of the smaller plan's neurons that the other keeps too.

    Raises:
        ValueError: The plans start from models of different families or sizes.
    """
    if (first.meta.family, first.meta.before) != (second.meta.family, second.meta.before):
        raise ValueError("the two plans start from models of different families or sizes: nothing to compare.")
    if first.sha256 == second.sha256:
        return f"the same decision: {first.meta.target} (plan {first.sha256[:12]})"
    lines = [
        f"A: {first.meta.target}, by {first.meta.criterion}, loss {first.meta.loss} (plan {first.sha256[:12]})",
        f"B: {second.meta.target}, by {second.meta.criterion}, loss {second.meta.loss} (plan {second.sha256[:12]})",
        "",
        "  layer  neurons in both  by chance  groups in both",
    ]
    width = first.meta.before.expert_width
    chance = max(first.meta.after.expert_width, second.meta.after.expert_width) / width
    for layer in range(first.meta.before.layers):
        neurons = _overlap(first.neurons.get(layer), second.neurons.get(layer), width)
        groups = _overlap(first.groups.get(layer), second.groups.get(layer), first.meta.before.kv_groups)
        expected = _share(chance) if neurons is not None else "-"
        lines.append(f"  {layer:5d}  {_share(neurons):>15}  {expected:>9}  {_share(groups):>14}")
    return "\n".join(lines)


def _overlap(first: Tensor | None, second: Tensor | None, size: int) -> float | None:
    """Share of the smaller set that is in the other, averaged over experts."""
    if first is None or second is None:
        return None
    kept = [
        torch.zeros(*index.shape[:-1], size, dtype=torch.bool).scatter_(-1, index, True) for index in (first, second)
    ]
    smaller = min(first.shape[-1], second.shape[-1])
    return ((kept[0] & kept[1]).sum(-1) / smaller).mean().item()
