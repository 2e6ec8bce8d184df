"""Experts that several rows of the router point to: a layer holds each merged expert once, and a table of groups.

Fused experts get a class of their own, made from the stock one, that sends every token to the expert of its group; in Switch
several names lead to one module. Routers, and in Switch the capacity of every expert, stay the stock ones.

Shape letters: E experts as the router counts them, E' experts that are held, N tokens, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.families import ExpertLayout, family_of, moe_layers, shape_of

GROUPS = "expert_groups"
"""The key of a config that says which expert each row of a layer's router points to: `{layer: [E]}`."""


def is_shared(config: PreTrainedConfig) -> bool:
    """Whether rows of a model's routers share experts."""
    return GROUPS in config.to_dict()


def experts_held(config: PreTrainedConfig, layer: int) -> int:
    """E' of a layer; E where its experts are not shared."""
    groups = config.to_dict().get(GROUPS, {})
    owner = groups.get(layer, groups.get(str(layer)))  # as JSON has them
    return shape_of(config).num_experts if owner is None else max(owner) + 1


class SharedExperts(nn.Module):
    """What fused experts become that are shared: the stock class, called as ever.

    Attributes:
        groups: `[E]`, the expert that each row of the router points to.
        num_experts: E'.
        stock: The class it is made from.
    """

    groups: Tensor
    num_experts: int
    stock: ClassVar[type[nn.Module]]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the stock experts: `top_k_index`, `[N, K]`, counts as the router does."""
        result: Tensor = super().forward(hidden_states, self.groups[top_k_index], top_k_weights)
        return result


_CLASSES: dict[type[nn.Module], type[SharedExperts]] = {}


def _shared(stock: type[nn.Module]) -> type[SharedExperts]:
    """The class of shared experts, for the stock one; always the same."""
    if stock not in _CLASSES:
        own = {"stock": stock, "__module__": stock.__module__}
        _CLASSES[stock] = type(f"Shared{stock.__name__}", (SharedExperts, stock), own)
    return _CLASSES[stock]


def point(experts: Any, owner: Sequence[int], layout: ExpertLayout) -> None:
    """Have the rows of a router share experts, in place.

    Args:
        experts: Fused, E' of them; or a list of units, of which the first of every group stands for all of it.
        owner: `[E]`, from 0 to E' - 1.
        layout: Of the family.
    """
    if layout.unit is not None:
        for number, group in enumerate(owner):
            experts[layout.unit.format(number)] = experts[layout.unit.format(owner.index(group))]
        return
    experts.__class__ = _shared(type(experts))
    experts.num_experts = max(owner) + 1
    first = next(experts.parameters())  # without weights yet: those come, the table does not
    place = torch.device("cpu") if first.is_meta else first.device
    experts.register_buffer("groups", torch.tensor(owner, device=place), persistent=False)


def unpoint(experts: Any, layout: ExpertLayout) -> None:
    """Give every row of a router an expert of its own again, in place: the reverse of `point`."""
    if layout.unit is not None:
        seen: set[int] = set()
        for number, unit in enumerate(layout.units(experts)):
            if id(unit) in seen:
                experts[layout.unit.format(number)] = copy.deepcopy(unit)
            seen.add(id(unit))
        return
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, _own(parameter.detach()[experts.groups], parameter))
    experts.num_experts = len(experts.groups)
    del experts.groups
    experts.__class__ = experts.stock


def _own(data: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def keep_space(model: PreTrainedModel, groups: Mapping[Any, Sequence[int]]) -> None:
    """Turn a model without weights into one that holds an expert per group, in place.

    Args:
        model: On the meta device, stock.
        groups: From its config, by absolute layer index.

    Raises:
        ValueError: The groups are not of this model's layers or experts.
    """
    layers = {layer: experts for layer, experts, _ in moe_layers(model)}
    layout = family_of(model.config).layout
    for layer, owner in ((int(layer), list(owner)) for layer, owner in groups.items()):
        number = layers[layer].num_experts if layer in layers else None
        if len(owner) != number or sorted(set(owner)) != list(range(max(owner) + 1)):
            raise ValueError(
                f"config.json: {GROUPS}.{layer} is not a table of the {number or 'missing'} experts there. Bring the config.json "
                "and the weights that belong together."
            )
        experts: Any = layers[layer]
        for name, parameter in list(experts.named_parameters(recurse=False)):
            setattr(experts, name, _own(parameter.detach()[: max(owner) + 1], parameter))
        point(experts, owner, layout)
