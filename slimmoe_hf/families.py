"""Where the experts, the router and the attention heads of each model family live: one declared row per family.

Shape letters: L layers, E experts, F expert width, D model width, H query heads, G key/value groups, C head width.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of a family are laid out: as two fused tensors, or as a list of units with two linear layers each.

    Attributes:
        gate_up: Name of the input projection, `[E, 2F, D]` (`[E, F, D]` without a gate).
        down: Name of the output projection, `[E, D, F]`.
        gated: Whether the input projection holds a gate half.
        transposed: Input projection `[E, D, 2F]` and output projection `[E, F, D]` instead.
        interleaved: Gate and up alternate (`gate0, up0, gate1, ...`) instead of all gates first.
        unit: Name of one expert (`{}` is its number) in a module list whose units hold the two projections as linear
            layers, `[2F, D]` (`[F, D]` without a gate) and `[D, F]`; None where experts are fused.
    """

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    unit: str | None = None

    def weights(self, experts: nn.Module) -> dict[str, Sequence[Tensor]]:
        """Both projections of a layer's experts by name, each to be indexed by the expert's number."""
        if self.unit is None:
            fused: dict[str, Any] = dict(experts.named_parameters())
            return {name: fused[name] for name in (self.gate_up, self.down)}
        units = self.units(experts)
        return {name: [getattr(unit, name).weight for unit in units] for name in (self.gate_up, self.down)}

    def units(self, experts: Any) -> list[Any]:
        """The experts of a module list, in the order of their numbers."""
        assert self.unit is not None
        return [experts[self.unit.format(number)] for number in range(len(experts))]

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
        gate, up, down: One linear projection each, `[F, D]`, `[F, D]` and `[D, F]`; no gate in plain units.
        router: `[E, D]`.
        router_bias: `[E]`, where a model has one.
    """

    gate: str | None = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"
    router: str = "mlp.gate.weight"
    router_bias: str | None = None

    @property
    def projections(self) -> tuple[tuple[str, int], ...]:
        """Name and neuron axis of all that an expert consists of."""
        gate = () if self.gate is None else ((self.gate, 0),)
        return (*gate, (self.up, 0), (self.down, 1))


MIXTRAL_NAMES = DiskNames(
    gate="block_sparse_moe.experts.{}.w1.weight",
    up="block_sparse_moe.experts.{}.w3.weight",
    down="block_sparse_moe.experts.{}.w2.weight",
    router="block_sparse_moe.gate.weight",
)


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other: those of a decoder-only model, of an encoder, or of a decoder.

    Attributes:
        layers: Their path inside the model.
        number_key: Config key of how many they are.
        attention: Path of the (self-)attention inside a layer.
        feed_forward: Path inside a layer of what the paths of experts and router start at; empty for the layer itself.
    """

    layers: str = "model.layers"
    number_key: str = "num_hidden_layers"
    attention: str = "self_attn"
    feed_forward: str = ""


class LayerPaths(NamedTuple):
    """Where one layer is.

    Attributes:
        stack: Number of its stack: in an encoder-decoder 0 for the encoder's, 1 for the decoder's.
        layer: Its path inside the model.
        attention: That of its attention.
        feed_forward: What the names of experts and router, in memory and on disk, follow after.
    """

    stack: int
    layer: str
    attention: str
    feed_forward: str


@dataclass(frozen=True)
class Family:
    """One model family: paths inside a layer, config keys, and what may not be cut and why.

    Attributes:
        experts: Path of the experts module inside a layer (its feed-forward part, where the stack names one).
        router: Path of the router there.
        width_key: Config key of the expert width F.
        experts_key: Config key of the number of experts E.
        stacks: Where the layers are; those of an encoder before those of its decoder, and so they are numbered.
        top_k: Experts per token where the code fixes it; otherwise the config says `num_experts_per_tok`.
        layout: How the experts are laid out.
        disk: What a published checkpoint calls them.
        projections: Names of the attention's query, key, value and output projections.
        capacity_key: Config key of how many tokens of a row an expert takes at most; fewer experts take more each.
        no_groups: Why key/value groups cannot be cut; empty where they can.
        no_width: Why experts cannot be narrowed; empty where they can.
    """

    experts: str
    router: str
    width_key: str
    experts_key: str
    stacks: tuple[Stack, ...] = (Stack(),)
    top_k: int | None = None
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    disk: DiskNames = field(default_factory=DiskNames)
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    capacity_key: str | None = None
    no_groups: str = ""
    no_width: str = ""

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads and a decoder answers."""
        return len(self.stacks) > 1

    @property
    def layers(self) -> str:
        """Path of the layers inside the model, of a family that has one stack."""
        (stack,) = self.stacks
        return stack.layers

    @property
    def attention(self) -> str:
        """Path of the attention inside a layer, of a family that has one stack."""
        (stack,) = self.stacks
        return stack.attention

    def paths(self, config: PreTrainedConfig) -> list[LayerPaths]:
        """Where the layers are, by their absolute index."""
        found = []
        for number, stack in enumerate(self.stacks):
            for index in range(getattr(config, stack.number_key)):
                layer = f"{stack.layers}.{index}"
                within = f"{layer}.{stack.feed_forward}" if stack.feed_forward else layer
                found.append(LayerPaths(number, layer, f"{layer}.{stack.attention}", within))
        return found


SWITCH = "switch_transformers"

FAMILIES = {
    # Always two experts a token, whatever the config says: sparsemixer asserts it.
    "phimoe": Family("mlp.experts", "mlp.router", "intermediate_size", "num_local_experts", top_k=2, disk=MIXTRAL_NAMES),
    "mixtral": Family("mlp.experts", "mlp.gate", "intermediate_size", "num_local_experts", disk=MIXTRAL_NAMES),
    "olmoe": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_experts",
        no_groups="OLMoE normalises queries and keys over all heads together, so dropping some changes the others",
    ),
    "qwen3_moe": Family("mlp.experts", "mlp.gate", "moe_intermediate_size", "num_experts"),
    # The router module's own answer leaves out tokens beyond an expert's capacity; its classifier's are the logits.
    SWITCH: Family(
        "mlp.experts", "mlp.router.classifier", "d_ff", "num_experts", top_k=1, capacity_key="expert_capacity",
        stacks=(
            Stack("encoder.block", "num_layers", "layer.0.SelfAttention", "layer.1"),
            Stack("decoder.block", "num_decoder_layers", "layer.0.SelfAttention", "layer.2"),
        ),
        layout=ExpertLayout(gate_up="wi", down="wo", gated=False, unit="expert_{}"),
        disk=DiskNames(
            gate=None, up="mlp.experts.expert_{}.wi.weight", down="mlp.experts.expert_{}.wo.weight",
            router="mlp.router.classifier.weight", router_bias="mlp.router.classifier.bias",
        ),
        projections=("q", "k", "v", "o"),
        no_groups="all blocks of Switch add the position bias of the first one, head by head, so none can drop heads of its own",
        no_width="Switch has one d_ff for experts and dense feed-forward blocks, so narrowing the one would narrow the other",
    ),
}  # fmt: skip
DECODERS = tuple(name for name, row in FAMILIES.items() if not row.encoder_decoder)
"""The families without an encoder."""


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


def refuse_encoder_decoder(config: PreTrainedConfig, what: str) -> None:
    """Raise ValueError if a model is an encoder-decoder; `what` is for decoder-only ones."""
    if config.is_encoder_decoder:
        raise ValueError(f"a {config.model_type} is an encoder-decoder, and {what} takes decoder-only models.")


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
    numbers = {
        family.width_key: getattr(config, family.width_key, None),
        family.experts_key: getattr(config, family.experts_key, None),
        "num_attention_heads": heads,
        "hidden_size": hidden,
        **{stack.number_key: getattr(config, stack.number_key, None) for stack in family.stacks},
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
        kv_groups=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or values.get("d_kv") or hidden // heads,
        hidden_size=hidden,
        layers=sum(numbers[stack.number_key] for stack in family.stacks),
    )


def shape_values(config: PreTrainedConfig, shape: Shape) -> dict[str, int]:
    """The config keys, with their values, that give a model the sizes that a plan can change."""
    family, before = family_of(config), shape_of(config)
    values = {family.width_key: shape.expert_width}
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


def set_shape(config: PreTrainedConfig, shape: Shape) -> None:
    """Write the sizes that a plan can change into a config, in place: the reverse of `shape_of`."""
    for key, value in shape_values(config, shape).items():
        setattr(config, key, value)


@dataclass(frozen=True)
class LayerView:
    """Typed access to one layer.

    Attributes:
        index: The layer's absolute index.
        attention: Its attention module, with the family's `projections`.
        experts: Its experts, or None in a dense layer.
        router: Its router, or None in a dense layer.
        paths: Where all that is.
    """

    index: int
    attention: nn.Module
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
        views.append(LayerView(index, modules[paths.attention], experts, router, paths))
    if all(view.experts is None for view in views):
        raise ValueError(f"this {model.config.model_type} model has no layer with experts: there is nothing to slim.")
    return views


def moe_layers(model: PreTrainedModel) -> list[tuple[int, nn.Module, nn.Module]]:
    """`(absolute index, experts, router)` of every layer that has experts."""
    return [
        (v.index, v.experts, v.router) for v in layer_views(model) if v.experts is not None and v.router is not None
    ]
