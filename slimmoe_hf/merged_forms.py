"""The forms of a merged model in memory (method of M-SMoE, arXiv 2310.01334), in place.

Shared (the canonical one): every merged expert once, routers untouched; needs this package to load, exact, small.
Duplicated: every merged expert in the place of all its members; plain transformers loads it, exact, as large as before.
With as many experts in every layer (`apply_plan`): stock and small, and another function.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from slimmoe_hf.factored import refuse_factored
from slimmoe_hf.families import family_of, moe_layers
from slimmoe_hf.own_form import class_of
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.shared_checkpoint import SharedModel
from slimmoe_hf.shared_experts import GROUPS, point, unpoint
from slimmoe_hf.surgery import merge_experts, refuse_foreign_repairs, repair_experts

M = TypeVar("M", bound=PreTrainedModel)


@torch.no_grad()
def share_merged(model: M, plan: CompressionPlan) -> M:
    """Merge experts and have all rows of the routers that led to one of a group lead to the merged one, in place.

    Routers stay as they are; `config.expert_groups` says, of every layer, which expert each of their rows points to. The
    model then saves and loads in a form of its own (`shared_checkpoint`). An optimizer made before holds the old parameters.

    Args:
        model: The model that the plan is for.
        plan: From `plan_merge`, with counts of either kind.

    Returns:
        The same object, now also a `SharedModel`.

    Raises:
        ValueError: The plan merges nothing, or is for another family or other sizes. Nothing was changed.
    """
    _check_merges(model, plan)
    layout = family_of(model.config).layout
    for layer, experts, _router in moe_layers(model):
        if layer in plan.blends:
            blend, owner = plan.blends[layer], plan.blends[layer].owner.tolist()
            firsts = [owner.index(number) for number in range(blend.number)]
            merge_experts(experts, blend, firsts, model.config)
            places = range(blend.number) if layout.unit is None else firsts
            repair_experts(experts, plan.repairs.down(layer, layout), places, layout)
            point(experts, owner, layout)
    groups: Any = {layer: blend.owner.tolist() for layer, blend in sorted(plan.blends.items())}
    setattr(model.config, GROUPS, groups)
    model.__class__ = class_of(SharedModel, type(model))
    return model


@torch.no_grad()
def duplicate_merged(model: M, plan: CompressionPlan) -> M:
    """Put every merged expert in the place of all its members, in place: the routers stay as they are, and the size too.

    It is what M-SMoE's own models compute, in a form that plain transformers loads.

    Args:
        model: The model that the plan is for.
        plan: From `plan_merge`, with counts of either kind.

    Returns:
        The same object.

    Raises:
        ValueError: The plan merges nothing, or is for another family or other sizes. Nothing was changed.
    """
    _check_merges(model, plan)
    layout = family_of(model.config).layout
    for layer, module, _router in moe_layers(model):
        if layer not in plan.blends:
            continue
        blend = plan.blends[layer]
        for _name, weights, axis, order_EF in layout.averaged(module, blend.order):
            merged = list(blend.each(weights, order_EF, axis))  # all of them, before any is written
            for weight, owner in zip(weights, blend.owner.tolist(), strict=True):
                weight.copy_(merged[owner])
        if (repaired := plan.repairs.down(layer, layout)) is not None:
            repair_experts(module, repaired[blend.owner], range(len(blend.owner)), layout)
    return model


@torch.no_grad()
def unshare(model: M) -> M:
    """Turn a model with shared experts into the duplicated form, in place: exact, and of its full size again.

    Args:
        model: From `share_merged` or `load_shared`.

    Returns:
        The same object, of its stock class again.

    Raises:
        ValueError: Its experts are not shared, or factored.
    """
    refuse_factored(model)
    if not isinstance(model, SharedModel):
        raise ValueError(f"a {type(model).__name__} has no shared experts: every row of its routers has its own.")
    for _layer, experts, _router in moe_layers(model):
        unpoint(experts, family_of(model.config).layout)
    delattr(model.config, GROUPS)
    model.__class__ = model.stock
    return model


def _check_merges(model: PreTrainedModel, plan: CompressionPlan) -> None:
    """Raise ValueError unless the plan merges experts that this model has."""
    plan.refuse_unmerged()
    refuse_factored(model)
    if isinstance(model, SharedModel):
        raise ValueError("the experts of this model are shared already. unshare(model) undoes it.")
    plan.check_fits(model.config)
    refuse_foreign_repairs(model, plan)
    plan.check()
    plan.repairs.check_same(plan.meta.repairing)
    if missing := set(plan.blends) - {layer for layer, _, _ in moe_layers(model)}:
        raise ValueError(f"the plan merges experts in layers {sorted(missing)}, where this model has none.")
