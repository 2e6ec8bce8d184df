"""A plan in words: what `slimmoe plan show A [B]` prints, and what a card says of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor

from slimmoe_hf.plan import ALIGNMENT, CompressionPlan

KERNELS = {
    32: "MXFP4, legacy GGUF and ONNX int4 blocks",
    64: "most kernels, and Microsoft's own 448 and 960",
    128: "FP8 blocks, GPTQ/AWQ/Marlin groups (times the tensor-parallel ranks)",
    256: "GGUF K-quants",
}


def describe_plan(plan: CompressionPlan) -> str:
    """What a plan keeps, layer by layer, and where it comes from."""
    meta = plan.meta
    more = "  expert score kept  experts kept" if plan.experts else ""
    repaired = "  experts repaired  attention repaired" if meta.repairing else ""
    lines = [
        f"{meta.family}: {meta.target}, by {_criteria(plan)} (calibration loss {meta.loss}, seed {meta.seed})",
        f"  expert width {meta.before.expert_width} -> {meta.after.expert_width}, key/value groups "
        f"{meta.before.kv_groups} -> {meta.after.kv_groups}, query heads {meta.before.query_heads} -> "
        f"{meta.after.query_heads}, experts {meta.before.num_experts} -> {meta.after.num_experts}"
        + (" on average" if plan.adaptive else ""),
        *([f"  merged: {', '.join(f'{name} {value}' for name, value in meta.merging)}"] if meta.merging else []),
        *([f"  {_repairing(plan)}"] if meta.repairing else []),
        f"  {alignment_note(meta.after.expert_width)}",
        f"  plan {plan.sha256[:12]}, statistics {meta.stats_sha256[:12]}, model {meta.model_sha256[:12]}, "
        f"data {meta.data_sha256[:12]}",
        "",
        f"  layer  neuron score kept  group score kept{repaired}  groups kept{more}",
    ]
    for layer in meta.layers:
        line = f"  {layer.index:5d}  {_share(layer.neuron_score_kept):>17}  {_share(layer.group_score_kept):>16}  "
        if meta.repairing:
            line += f"{_share(layer.experts_repaired):>16}  {_share(layer.attention_repaired):>18}  "
        groups = _listed(layer.groups_kept)
        if plan.experts:
            groups = f"{groups:11}  {_share(layer.expert_score_kept):>17}  {_listed(layer.experts_kept)}"
        lines.append(line + groups)
    unknown = sum(layer.unknown_experts for layer in meta.layers)
    if unknown:
        plural = "expert" if unknown == 1 else "experts"
        lines.append(
            f"  {unknown} {plural} that no calibration token reached: ranked by weight norms. Calibrate on more text."
        )
    return "\n".join([*lines, *(f"  {note}" for note in super_notes(plan))])


def super_notes(plan: CompressionPlan) -> list[str]:
    """A line on every super expert (arXiv 2507.23279) of a plan: what makes it one, and what becomes of it."""
    before, after, notes = plan.meta.before, plan.meta.after, []
    for layer in plan.meta.layers:
        for expert, times in layer.super_experts.items():
            what = "kept"
            if layer.experts_kept is not None and expert not in layer.experts_kept:
                what = "GOES: there are more of its kind than places"
            elif after.expert_width < before.expert_width:
                what = (
                    f"kept, but narrowed to {after.expert_width} of {before.expert_width} neurons, as stock shapes ask"
                )
            notes.append(
                f"layer {layer.index}, expert {expert} is a super expert, its largest output {times:g} times the median of its "
                f"layer: {what}"
            )
    return notes


def _repairing(plan: CompressionPlan) -> str:
    repairing = plan.meta.repairing
    assert repairing is not None
    return (
        f"reconstructed: output projections solved anew on {repairing.tokens:,} tokens (data {repairing.data_sha256[:12]}), "
        f"ridge {repairing.ridge:g}, {plan.repairs.bytes:,} bytes; of the cut's squared error there, repaired:"
    )


def chosen_by(plan: CompressionPlan) -> dict[str, str]:
    """What chose the `neurons` and groups, and what the `experts`, of those that a plan cuts."""
    meta = plan.meta
    found = {"neurons": meta.criterion} if plan.neurons or plan.groups else {}
    return found | ({"experts": meta.expert_criterion or meta.criterion} if plan.experts else {})


def _criteria(plan: CompressionPlan) -> str:
    names = list(dict.fromkeys(chosen_by(plan).values())) or ["no criterion"]
    named = ", experts by ".join(names)
    return f"{named}, reconstructed" if plan.meta.repairing else named


def _listed(kept: list[int] | None) -> str:
    return "all" if kept is None else ",".join(map(str, kept))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def compare_plans(first: CompressionPlan, second: CompressionPlan) -> str:
    """What two plans have in common: per layer, the share of the smaller plan's neurons that the other keeps too.

    Neurons are compared in the experts that both keep.

    Raises:
        ValueError: The plans start from models of different families or sizes.
    """
    if (first.meta.family, first.meta.before) != (second.meta.family, second.meta.before):
        raise ValueError("the two plans start from models of different families or sizes: nothing to compare.")
    if first.sha256 == second.sha256:
        return f"the same decision: {first.meta.target} (plan {first.sha256[:12]})"
    lines = [
        f"A: {first.meta.target}, by {_criteria(first)}, loss {first.meta.loss} (plan {first.sha256[:12]})",
        f"B: {second.meta.target}, by {_criteria(second)}, loss {second.meta.loss} (plan {second.sha256[:12]})",
        "",
        "  layer  neurons in both  by chance  groups in both"
        + ("  experts in both" if first.experts or second.experts else ""),
    ]
    width = first.meta.before.expert_width
    chance = max(first.meta.after.expert_width, second.meta.after.expert_width) / width
    for layer in range(first.meta.before.layers):
        neurons = _overlap(*_neurons_of_both(first, second, layer), width)
        groups = _overlap(first.groups.get(layer), second.groups.get(layer), first.meta.before.kv_groups)
        expected = _share(chance) if neurons is not None else "-"
        line = f"  {layer:5d}  {_share(neurons):>15}  {expected:>9}  {_share(groups):>14}"
        if first.experts or second.experts:
            experts = _overlap(first.experts.get(layer), second.experts.get(layer), first.meta.before.num_experts)
            line += f"  {_share(experts):>15}"
        lines.append(line)
    return "\n".join(lines)


def _neurons_of_both(
    first: CompressionPlan, second: CompressionPlan, layer: int
) -> tuple[Tensor | None, Tensor | None]:
    """The neurons that two plans keep of the experts that both keep; None where there are none."""
    if layer not in first.neurons or layer not in second.neurons:
        return None, None
    every = torch.arange(first.meta.before.num_experts)
    kept = [plan.experts.get(layer, every) for plan in (first, second)]
    both = kept[0][torch.isin(kept[0], kept[1])]
    if not len(both):
        return None, None
    return tuple(
        plan.neurons[layer][torch.searchsorted(own, both)] for plan, own in zip((first, second), kept, strict=True)
    )  # type: ignore[return-value]


def _overlap(first: Tensor | None, second: Tensor | None, size: int) -> float | None:
    """Share of the smaller set that is in the other, averaged over experts."""
    if first is None or second is None:
        return None
    kept = [
        torch.zeros(*index.shape[:-1], size, dtype=torch.bool).scatter_(-1, index, True) for index in (first, second)
    ]
    smaller = min(first.shape[-1], second.shape[-1])
    return ((kept[0] & kept[1]).sum(-1) / smaller).mean().item()


def scored_parts(plans: Sequence[CompressionPlan]) -> str:
    """What some plans kept by score, for the middle of a sentence."""
    if not any(plan.experts for plan in plans):
        return "neurons (and key/value groups)"
    return "experts" if not any(plan.neurons for plan in plans) else "experts and neurons (and key/value groups)"


def size_rows(plan: CompressionPlan, experts: bool = False) -> dict[str, str]:
    """Name and change of every size that a plan is about.

    Args:
        plan: What was decided.
        experts: Name the experts even where this plan keeps them all.
    """
    before, after = plan.meta.before, plan.meta.after
    rows = {}
    if experts:
        rows["experts per layer"] = _arrow(before.num_experts, after.num_experts)
        if plan.adaptive:
            rows["experts per layer"] += " on average"
        kept = [layer.expert_score_kept for layer in plan.meta.layers if layer.expert_score_kept is not None]
        rows["experts chosen by"] = (
            f"`{plan.meta.expert_criterion}`, {mean(kept):.0%} of its score stayed" if kept else "-"
        )
    rows["neurons per expert"] = _arrow(before.expert_width, after.expert_width)
    rows["key/value groups"] = _arrow(before.kv_groups, after.kv_groups)
    if plan.meta.repairing is not None:
        tokens = plan.meta.repairing.tokens
        rows["output projections"] = f"solved anew on {tokens:,} tokens (not in the published plan)"
    return rows


def _arrow(before: int, after: int) -> str:
    return f"{before:,} → {after:,}" if before != after else f"{before:,} (as they are)"


def alignment_note(width: int) -> str:
    """Which kernels and quantised formats a width opens, in one line."""
    opens = [step for step in KERNELS if width % step == 0]
    closed = [f"{step} ({why})" for step, why in KERNELS.items() if width % step]
    note = f"width {width} is a multiple of {', '.join(map(str, [ALIGNMENT, *opens]))}"
    return f"{note}; not of {'; '.join(closed)}" if closed else note
