"""A plan applied to a model in memory, in place: the only writer of shapes there.

Shape letters: E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.attention_cuts import attention_cuts
from slimmoe_hf.blends import Blend
from slimmoe_hf.factored import refuse_own_form
from slimmoe_hf.families import ExpertLayout, LayerView, family_of, layer_views, set_shape, shape_of
from slimmoe_hf.identity import model_fingerprint
from slimmoe_hf.plan import CompressionPlan

M = TypeVar("M", bound=PreTrainedModel)


def apply_plan(model: M, plan: CompressionPlan) -> M:
    """Cut a model to a plan, in place.

    Afterwards the config says the new sizes, and `save_pretrained` writes a checkpoint that plain transformers loads.
    An optimizer made before the cut holds the old parameters: cut first.

    Args:
        model: A whole model on real devices, of the plan's family and of the sizes it starts from.
        plan: From `make_plan` or `CompressionPlan.load`.

    Returns:
        The same object.

    Raises:
        ValueError: The model is of another family or of other sizes than the plan starts from. Nothing was changed.
    """
    check_fits(model, plan)
    plan.check()
    plan.repairs.check_same(plan.meta.repairing)
    family, number = family_of(model.config), plan.meta.before.num_experts
    for view in layer_views(model):
        if view.index in plan.experts and view.experts is not None and view.router is not None:
            kept, layout = plan.experts[view.index], family.layout
            if view.index in plan.blends:
                merge_experts(view.experts, plan.blends[view.index], kept.tolist(), model.config)
            if view.index not in plan.blends or layout.unit is not None:
                _drop_experts(view.experts, kept, layout)
            _drop_rows(view.router, kept, number)
            if family.router_bias and not family.router_bias.startswith(f"{family.router}."):
                parent, _, name = f"{view.paths.feed_forward}.{family.router_bias}".rpartition(".")
                _drop_rows(model.get_submodule(parent), kept, number, {name})
        if view.index in plan.neurons and view.experts is not None:
            _narrow_experts(view.experts, plan.neurons[view.index], model)
        if view.index in plan.groups and view.attention is not None:
            _drop_groups(view.attention, attention_cuts(family, plan, view.index), plan)
        _repair(view, plan, model)
    _set_sizes(model, plan)
    return model


def check_fits(model: PreTrainedModel, plan: CompressionPlan) -> None:
    """Raise ValueError unless the plan starts from this model's family and sizes, and from its weights if it carries any."""
    refuse_own_form(model)
    plan.refuse_adaptive()
    plan.check_fits(model.config)
    refuse_foreign_repairs(model, plan)
    views = layer_views(model)
    have = {view.index for view in views if view.experts is not None}
    attending = {view.index for view in views if view.attention is not None}
    if missing := (set(plan.neurons) | set(plan.experts)) - have:
        raise ValueError(f"the plan cuts experts in layers {sorted(missing)}, where this model has none.")
    everywhere = {"neurons": have, "experts": have, "groups": attending}
    for kind, layers in everywhere.items():
        if plan.kept[kind] and (left := layers - plan.kept[kind].keys()):
            raise ValueError(f"the plan drops no {kind} in layers {sorted(left)}; all need the same number.")


def refuse_foreign_repairs(model: PreTrainedModel, plan: CompressionPlan) -> None:
    """Raise ValueError if the plan carries weights that were solved for those of another model."""
    if plan.repairs and plan.meta.fingerprint not in (None, model_fingerprint(model)):
        raise ValueError(
            "the plan carries output projections that were solved anew for a model with other weights. Reconstruct this one's."
        )


def _select(parameter: nn.Parameter, kept: Tensor, axis: int) -> nn.Parameter:
    data = parameter.data.index_select(axis, kept.to(parameter.device)).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _drop_experts(experts: Any, kept_E: Tensor, layout: ExpertLayout) -> None:
    """Keep some experts."""
    if layout.unit is None:
        _drop_rows(experts, kept_E, experts.num_experts)
        return
    units = layout.units(experts)
    experts.clear()
    for number, expert in enumerate(kept_E.tolist()):
        experts[layout.unit.format(number)] = units[expert]


def _drop_rows(module: nn.Module, kept_E: Tensor, number: int, only: set[str] | None = None) -> None:
    """Keep some of `number` experts of fused ones or of a router: all it holds has them along its first or its last axis.

    With `only`, of the parameters and buffers of these names, and nothing of the modules inside.
    """
    for inner in module.modules() if only is None else [module]:
        for name, parameter in list(inner.named_parameters(recurse=False)):
            if only is None or name in only:
                setattr(inner, name, _select(parameter, kept_E, _expert_axis(parameter, number)))
        for name, buffer in list(inner.named_buffers(recurse=False)):
            if only is None or name in only:
                kept = buffer.index_select(_expert_axis(buffer, number), kept_E.to(buffer.device))
                setattr(inner, name, kept.contiguous())
        if isinstance(inner, nn.Linear):
            inner.out_features = len(kept_E)


def _expert_axis(tensor: Tensor, number: int) -> int:
    axis = 0 if tensor.shape[0] == number else tensor.dim() - 1
    assert tensor.shape[axis] == number, f"{list(tensor.shape)} holds nothing of {number} experts"
    return axis


def _set_sizes(model: PreTrainedModel, plan: CompressionPlan) -> None:
    """Write the new sizes into the config, an encoder's and a decoder's own copies of it, and every module that keeps one."""
    after, family = plan.meta.after, family_of(model.config)
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    for config in configs.values():
        set_shape(config, after)
    kept = {key: getattr(model.config, key) for key in (family.capacity_key, family.shared_key) if key is not None}
    if plan.experts:
        kept["num_experts"] = after.num_experts
    if plan.neurons:
        kept["ffn_dim"] = after.expert_width
    for name, value in kept.items():
        for module in model.modules():  # from expert modules to the head that adds the auxiliary loss
            if name in vars(module):
                setattr(module, name, value)


def merge_experts(experts: Any, blend: Blend, places: Sequence[int], config: PreTrainedConfig) -> None:
    """Average the experts of a layer into fewer, one at a time, in place.

    Args:
        experts: All of them; fused ones are E' afterwards, of a list of units none is taken out.
        blend: What becomes of what.
        places: `[E']`, where in a list of units each average goes.
        config: Of the model.
    """
    layout = family_of(config).layout
    for name, old, axis, order_EF in layout.averaged(experts, blend.order):
        if layout.unit is not None:
            merged = list(blend.each(old, order_EF, axis))  # all of them, before any is written
            for place, weight in zip(places, merged, strict=True):
                old[place].data = weight
            continue
        new = torch.empty(blend.number, *old.shape[1:], dtype=old.dtype, device=old.device)
        for number, weight in enumerate(blend.each(old, order_EF, axis)):
            new[number] = weight
        setattr(experts, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _narrow_experts(experts: Any, kept_EF: Tensor, model: PreTrainedModel) -> None:
    """Keep `kept_EF[e]` neurons of expert `e`, one expert at a time."""
    layout, width = family_of(model.config).layout, shape_of(model.config).expert_width
    for name, axis, index_EF in layout.sides(kept_EF, width):
        old = getattr(experts, name)
        shape = list(old.shape)
        shape[axis + 1] = index_EF.shape[-1]
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        for expert, index in enumerate(index_EF.to(old.device)):
            torch.index_select(old.data[expert], axis, index, out=new[expert])
        setattr(experts, name, nn.Parameter(new, requires_grad=old.requires_grad))
    for name in ("intermediate_dim", "intermediate_size"):
        if name in vars(experts):
            setattr(experts, name, kept_EF.shape[-1])


@torch.no_grad()
def repair_experts(experts: nn.Module, repaired: Tensor | None, places: Iterable[int], layout: ExpertLayout) -> None:
    """Write output projections over those of some experts, in place.

    Args:
        experts: Of a layer.
        repaired: A weight for each of them, from `Repairs.down`; None leaves them as they are.
        places: Which expert each is for.
        layout: Of the family.
    """
    if repaired is not None:
        down = layout.weights(experts)[layout.down]
        for place, weight in zip(places, repaired, strict=True):
            down[place].copy_(weight)


@torch.no_grad()
def _repair(view: LayerView, plan: CompressionPlan, model: PreTrainedModel) -> None:
    """Write the output projections that the plan carries over the slices."""
    family = family_of(model.config)
    if view.experts is not None:
        down = plan.repairs.down(view.index, family.layout)
        repair_experts(view.experts, down, range(plan.meta.after.num_experts), family.layout)
    if view.index in plan.repairs.o_proj and view.attention is not None:
        out = view.attention.get_parameter(f"{family.projections[-1]}.weight")
        out.copy_(plan.repairs.o_proj[view.index])


def _drop_groups(attention: nn.Module, cuts: Mapping[str, tuple[int, Tensor]], plan: CompressionPlan) -> None:
    """Keep key/value groups with their query heads: rows of q, k, v (and their biases), columns of o (not its bias)."""
    after, held = plan.meta.after, dict(attention.named_parameters())
    for name, value in (("num_attention_heads", after.query_heads), ("num_key_value_heads", after.kv_groups)):
        if name in vars(attention):
            setattr(attention, name, value)
    for path, (axis, kept) in cuts.items():
        if path not in held:
            continue
        parent, _, name = path.rpartition(".")
        module = attention.get_submodule(parent)
        setattr(module, name, _select(held[path], kept, axis))
        if isinstance(module, nn.Linear):
            setattr(module, ("out_features", "in_features")[axis], len(kept))
