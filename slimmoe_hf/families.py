"""Where the experts, the router and the attention heads of each model family live: one declared row per family.

Shape letters: L layers, E experts, F expert width, D model width, H query heads, G key/value groups, C head width.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ExpertLayout:
    """How the fused expert tensors of a family are laid out.

    Attributes:
        gate_up: Name of the input projection, `[E, 2F, D]` (`[E, F, D]` without a gate).
        down: Name of the output projection, `[E, D, F]`.
        gated: Whether the input projection holds a gate half.
        transposed: Input projection `[E, D, 2F]` and output projection `[E, F, D]` instead.
        interleaved: Gate and up alternate (`gate0, up0, gate1, ...`) instead of all gates first.
    """

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False

    def input_index(self, neurons: Tensor, width: int) -> Tensor:
        """Positions of `neurons` (`[..., F']`, of `width` F) along the neuron axis of the input projection."""
        if not self.gated:
            return neurons
        if self.interleaved:
            return torch.stack([2 * neurons, 2 * neurons + 1], dim=-1).flatten(-2)
        return torch.cat([neurons, neurons + width], dim=-1)

    def sides(self, neurons: Tensor, width: int) -> tuple[tuple[str, int, Tensor], ...]:
        """Name, neuron axis of one expert, and positions of `neurons` along it, of both projections; as `input_index`."""
        into = self.input_index(neurons, width)
        return (self.gate_up, self.input_axis, into), (self.down, self.down_axis, neurons)

    @property
    def input_axis(self) -> int:
        """The neuron axis of the input projection of one expert."""
        return 1 if self.transposed else 0

    @property
    def down_axis(self) -> int:
        """The neuron axis of the output projection of one expert."""
        return 0 if self.transposed else 1


@dataclass(frozen=True)
class DiskNames:
    """What a published checkpoint calls the weights of a layer's experts (`{}` is the expert's number) and router.

    Attributes:
        gate, up, down: One linear projection each, `[F, D]`, `[F, D]` and `[D, F]`.
        router: `[E, D]`.
    """

    gate: str = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"
    router: str = "mlp.gate.weight"


MIXTRAL_NAMES = DiskNames(
    gate="block_sparse_moe.experts.{}.w1.weight",
    up="block_sparse_moe.experts.{}.w3.weight",
    down="block_sparse_moe.experts.{}.w2.weight",
    router="block_sparse_moe.gate.weight",
)


@dataclass(frozen=True)
class Family:
    """One model family: paths inside a decoder layer, config keys, and what may not be cut and why.

    Attributes:
        experts: Path of the fused experts module inside a decoder layer.
        router: Path of the router inside a decoder layer.
        width_key: Config key of the expert width F.
        experts_key: Config key of the number of experts E.
        layers: Path of the decoder layers inside the model.
        attention: Path of the attention inside a decoder layer.
        top_k: Experts per token where the code fixes it; otherwise the config says `num_experts_per_tok`.
        layout: How the fused expert tensors are laid out.
        disk: What a published checkpoint calls them.
        no_groups: Why key/value groups cannot be cut; empty where they can.
    """

    experts: str
    router: str
    width_key: str
    experts_key: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    top_k: int | None = None
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    disk: DiskNames = field(default_factory=DiskNames)
    no_groups: str = ""


FAMILIES = {
    # Always two experts a token, whatever the config says: sparsemixer asserts it.
    "phimoe": Family("mlp.experts", "mlp.router", "intermediate_size", "num_local_experts", top_k=2, disk=MIXTRAL_NAMES),
    "mixtral": Family("mlp.experts", "mlp.gate", "intermediate_size", "num_local_experts", disk=MIXTRAL_NAMES),
    "olmoe": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_experts",
        no_groups="OLMoE normalises queries and keys over all heads together, so dropping some changes the others",
    ),
    "qwen3_moe": Family("mlp.experts", "mlp.gate", "moe_intermediate_size", "num_experts"),
}  # fmt: skip


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a model's family.

    Raises:
        ValueError: The model is dense, or of a family that has no row.
    """
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"model_type={model_type!r} is not a Mixture-of-Experts family that slimmoe_hf knows "
        f"({', '.join(FAMILIES)}).{hint} A dense model has no experts to slim; to add a family see CONTRIBUTING.md."
    )


@dataclass(frozen=True)
class Shape:
    """The sizes a plan can change, and those its rules need.

    Attributes:
        expert_width: F. num_experts: E. top_k: experts per token. query_heads: H. kv_groups: G. head_width: C.
        hidden_size: D. layers: L, dense ones included.
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
    numbers = {
        family.width_key: getattr(config, family.width_key, None),
        family.experts_key: getattr(config, family.experts_key, None),
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "num_hidden_layers": config.num_hidden_layers,
    }
    for key, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.json: {key}={value!r} should be a positive number for a {config.model_type} model."
            )
    return Shape(
        expert_width=numbers[family.width_key],
        num_experts=numbers[family.experts_key],
        top_k=family.top_k or config.num_experts_per_tok,
        query_heads=heads,
        kv_groups=config.num_key_value_heads or heads,
        head_width=values.get("head_dim") or hidden // heads,
        hidden_size=hidden,
        layers=config.num_hidden_layers,
    )


def shape_values(config: PreTrainedConfig, shape: Shape) -> dict[str, int]:
    """The config keys, with their values, that give a model the sizes that a plan can change."""
    family, before = family_of(config), shape_of(config)
    values = {family.width_key: shape.expert_width}
    if shape.num_experts != before.num_experts:
        values[family.experts_key] = shape.num_experts
    if shape.kv_groups != before.kv_groups:
        values["head_dim"] = shape.head_width  # no longer hidden_size / heads, so it must be said
        values["num_key_value_heads"] = shape.kv_groups
        values["num_attention_heads"] = shape.query_heads
    return values


def set_shape(config: PreTrainedConfig, shape: Shape) -> None:
    """Write the sizes that a plan can change into a config, in place: the reverse of `shape_of`."""
    for key, value in shape_values(config, shape).items():
        setattr(config, key, value)


@dataclass(frozen=True)
class LayerView:
    """Typed access to one decoder layer.

    Attributes:
        index: The layer's absolute index.
        attention: Its attention module, with `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        experts: Its fused experts, or None in a dense layer.
        router: Its router, or None in a dense layer.
    """

    index: int
    attention: nn.Module
    experts: nn.Module | None
    router: nn.Module | None


def layer_views(model: PreTrainedModel) -> Sequence[LayerView]:
    """All decoder layers of a model, in order.

    Raises:
        ValueError: As `family_of`; or no layer has experts.
    """
    family = family_of(model.config)
    modules = dict(model.named_modules())
    views = []
    for index in range(model.config.num_hidden_layers):
        prefix = f"{family.layers}.{index}"
        experts = modules.get(f"{prefix}.{family.experts}")
        router = modules.get(f"{prefix}.{family.router}") if experts is not None else None
        views.append(LayerView(index, modules[f"{prefix}.{family.attention}"], experts, router))
    if all(view.experts is None for view in views):
        raise ValueError(f"this {model.config.model_type} model has no layer with experts: there is nothing to slim.")
    return views


def moe_layers(model: PreTrainedModel) -> list[tuple[int, nn.Module, nn.Module]]:
    """`(absolute index, experts, router)` of every layer that has experts."""
    return [
        (v.index, v.experts, v.router) for v in layer_views(model) if v.experts is not None and v.router is not None
    ]
