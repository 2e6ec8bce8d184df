"""Where the experts, the router and the attention heads of each model family live: one declared row per family.

Shape letters: L layers, E experts, F expert width, D model width, H query heads, G key/value groups, C head width.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from slimmoe_hf.family_rows import DECODERS, FAMILIES, SWITCH, UNSUPPORTED
from slimmoe_hf.family_types import DiskNames, ExpertLayout, Family, LayerPaths, Stack

__all__ = [
    "DECODERS", "FAMILIES", "SWITCH", "UNSUPPORTED", "DiskNames", "ExpertLayout", "Family", "LayerPaths", "LayerView",
    "Shape", "Stack", "config_from", "expert_size", "family_of", "layer_views", "moe_layers", "refuse_encoder_decoder",
    "routing_groups", "set_shape", "shape_of", "shape_values",
]  # fmt: skip


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a model's family.

    Raises:
        ValueError: The model is dense, or of a family that has no row.
    """
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in UNSUPPORTED:
        raise ValueError(f"a {model_type} cannot be slimmed: {UNSUPPORTED[model_type]}.")
    part = config.to_dict().get("text_config")
    if isinstance(part, dict) and part.get("model_type") in FAMILIES:
        raise ValueError(
            f"a {model_type} is a model of several parts. Save its language model by itself ({part['model_type']}), and slim it."
        )
    near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.7)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"model_type={model_type!r} is not a Mixture-of-Experts family that slimmoe_hf knows (slimmoe env --families lists "
        f'{len(FAMILIES)}).{hint} A dense model has no experts to slim; to add a family see "Add a family" in CONTRIBUTING.md.'
    )


def refuse_encoder_decoder(config: PreTrainedConfig, what: str) -> None:
    """Raise ValueError if a model is an encoder-decoder; `what` is for decoder-only ones."""
    if config.is_encoder_decoder:
        raise ValueError(f"a {config.model_type} is an encoder-decoder, and {what} takes decoder-only models.")


def config_from(values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that JSON's values say; infinity, which JSON has not, is written as `{"__float__": "Infinity"}`."""
    config: PreTrainedConfig = AutoConfig.for_model(**{key: _plain(value) for key, value in values.items()})
    return config


def _plain(value: Any) -> Any:
    """A copy of a value of a config, for configs write into nested ones."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Shape:
    """The sizes a plan can change, and those its rules need.

    Attributes:
        expert_width: F. num_experts: E. top_k: experts per token. query_heads: H. kv_groups: G. head_width: C.
        hidden_size: D. layers: L, dense ones included, of an encoder-decoder both sides'.
    """

    expert_width: int
    num_experts: int
    top_k: int
    query_heads: int
    kv_groups: int
    head_width: int
    hidden_size: int
    layers: int


def shape_of(config: PreTrainedConfig) -> Shape:
    """Read a model's shape from its config alone.

    Raises:
        ValueError: As `family_of`; or the config lacks a key, or has one of the wrong kind.
    """
    family = family_of(config)
    values = config.to_dict()
    heads, hidden = config.num_attention_heads, config.hidden_size
    top_k = {} if family.top_k is not None else {family.top_k_key: _same(getattr(config, family.top_k_key, None))}
    numbers = {
        **top_k,
        family.width_key: getattr(config, family.width_key, None),
        family.experts_key: getattr(config, family.experts_key, None),
        "num_attention_heads": heads,
        "hidden_size": hidden,
        **{stack.number_key: getattr(config, stack.number_key, None) for stack in family.stacks},
    }
    for key, value in numbers.items():
        if isinstance(value, list):
            raise ValueError(f"config.json: {key}={value!r}: layers that differ in it cannot be told apart in a plan.")
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.json: {key}={value!r} should be a positive number for a {config.model_type} model."
            )
    return Shape(
        expert_width=numbers[family.width_key],
        num_experts=numbers[family.experts_key],
        top_k=family.top_k or numbers[family.top_k_key],
        query_heads=heads,
        kv_groups=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or values.get("d_kv") or hidden // heads,
        hidden_size=hidden,
        layers=sum(numbers[stack.number_key] for stack in family.stacks),
    )


def _same(value: Any) -> Any:
    """What all layers have, where a config says it for each (HunYuan's)."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def shape_values(config: PreTrainedConfig, shape: Shape) -> dict[str, int]:
    """The config keys, with their values, that give a model the sizes that a plan can change."""
    family, before = family_of(config), shape_of(config)
    values = {family.width_key: shape.expert_width}
    if family.shared_key is not None and (times := getattr(config, family.shared_key)):
        values[family.shared_key] = times * before.expert_width // shape.expert_width  # as wide as before
    if shape.num_experts != before.num_experts:
        values[family.experts_key] = shape.num_experts
        if family.capacity_key is not None:  # as many tokens find room as before
            capacity = getattr(config, family.capacity_key)
            values[family.capacity_key] = math.ceil(capacity * before.num_experts / shape.num_experts)
    if shape.kv_groups != before.kv_groups:
        values["head_dim"] = shape.head_width  # no longer hidden_size / heads, so it must be said
        values["num_key_value_heads"] = shape.kv_groups
        values["num_attention_heads"] = shape.query_heads
    return values


def routing_groups(config: PreTrainedConfig) -> tuple[int, int]:
    """How many groups the router deals a layer's experts into, and from how many a token takes its own; 1 and 1 without."""
    family = family_of(config)
    if family.routing_keys is None:
        return 1, 1
    groups, kept = (getattr(config, key) or 1 for key in family.routing_keys)
    return groups, min(kept, groups)


def expert_size(config: PreTrainedConfig) -> int:
    """The width of what experts are given and put out: the model's own, unless there are projections around them."""
    key = family_of(config).expert_size_key
    return (None if key is None else getattr(config, key)) or config.hidden_size


def set_shape(config: PreTrainedConfig, shape: Shape) -> None:
    """Write the sizes that a plan can change into a config, in place: the reverse of `shape_of`."""
    for key, value in shape_values(config, shape).items():
        setattr(config, key, value)


@dataclass(frozen=True)
class LayerView:
    """Typed access to one layer.

    Attributes:
        index: The layer's absolute index.
        attention: Its attention module, with the family's `projections`; None in a layer without.
        experts: Its experts, or None in a dense layer.
        router: Its router, or None in a dense layer.
        paths: Where all that is.
    """

    index: int
    attention: nn.Module | None
    experts: nn.Module | None
    router: nn.Module | None
    paths: LayerPaths


def layer_views(model: PreTrainedModel) -> Sequence[LayerView]:
    """All layers of a model, in order: of an encoder-decoder the encoder's first.

    Raises:
        ValueError: As `family_of`; or no layer has experts.
    """
    family = family_of(model.config)
    modules = dict(model.named_modules())
    views = []
    for index, paths in enumerate(family.paths(model.config)):
        experts = modules.get(f"{paths.feed_forward}.{family.experts}")
        router = modules.get(f"{paths.feed_forward}.{family.router}") if experts is not None else None
        attention = modules.get(paths.attention)
        wanted = {f"{paths.attention}.{name}" for name in family.projections}
        if not wanted or not wanted <= modules.keys():
            attention = None
        views.append(LayerView(index, attention, experts, router, paths))
    if all(view.experts is None for view in views):
        raise ValueError(f"this {model.config.model_type} model has no layer with experts: there is nothing to slim.")
    return views


def moe_layers(model: PreTrainedModel) -> list[tuple[int, nn.Module, nn.Module]]:
    """`(absolute index, experts, router)` of every layer that has experts."""
    return [
        (v.index, v.experts, v.router) for v in layer_views(model) if v.experts is not None and v.router is not None
    ]
