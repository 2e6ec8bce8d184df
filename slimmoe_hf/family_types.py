"""What a row of the table of families says: paths inside a layer, names on disk, config keys, and what cannot be cut.

Shape letters: E experts, F expert width, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of a family are laid out: as two fused tensors, or as a list of units with two linear layers each.

    Attributes:
        gate_up: Name of the input projection, `[E, 2F, D]` (`[E, F, D]` without a gate).
        down: Name of the output projection, `[E, D, F]`.
        gated: Whether the input projection holds a gate half.
        transposed: Input projection `[E, D, 2F]` and output projection `[E, F, D]` instead.
        interleaved: Gate and up alternate (`gate0, up0, gate1, ...`) instead of all gates first.
        gate_up_bias, down_bias: Names of their biases in fused experts, `[E, 2F]` and `[E, D]`; None without.
        own_gate: Whether the module joins gate and up in a way of its own (`_apply_gate`), not as `act(gate) * up`.
        unit: Name of one expert (`{}` is its number) in a module list whose units hold the two projections as linear
            layers, `[2F, D]` (`[F, D]` without a gate) and `[D, F]`; None where experts are fused.
    """

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    gate_up_bias: str | None = None
    down_bias: str | None = None
    own_gate: bool = False
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

    def sides(self, neurons: Tensor, width: int) -> list[tuple[str, int, Tensor]]:
        """Name, neuron axis of one expert, and positions of `neurons` along it, of all that has them; as `input_index`."""
        into = self.input_index(neurons, width)
        bias = [] if self.gate_up_bias is None else [(self.gate_up_bias, 0, into)]
        return [(self.gate_up, self.input_axis, into), *bias, (self.down, self.down_axis, neurons)]

    def averaged(self, experts: nn.Module, order_EF: Tensor) -> list[tuple[str, Any, int, Tensor]]:
        """Name, weights of all experts, axis and order along it of all that experts consist of, for averaging them.

        Args:
            experts: Of one layer. order_EF: Of their neurons.
        """
        weights: dict[str, Any] = {**dict(experts.named_parameters(recurse=False)), **self.weights(experts)}
        sides = self.sides(order_EF, order_EF.shape[-1])
        if self.down_bias is not None:
            sides.append((self.down_bias, 0, torch.arange(weights[self.down_bias].shape[-1]).expand(len(order_EF), -1)))
        return [(name, weights[name], axis, order) for name, axis, order in sides]

    @property
    def plain(self) -> bool:
        """Whether fused experts are `down @ (act(gate) * up)`, stored the usual way round."""
        usual = self.gated and not (self.transposed or self.interleaved or self.own_gate)
        return usual and self.gate_up_bias is None and self.unit is None

    @property
    def input_axis(self) -> int:
        """The neuron axis of the input projection of one expert."""
        return 1 if self.transposed else 0

    @property
    def down_axis(self) -> int:
        """The neuron axis of the output projection of one expert."""
        return 0 if self.transposed else 1


class Piece(NamedTuple):
    """One of the weights that an expert consists of on disk.

    Attributes:
        name: Published, after the layer's path; `{}` is the expert's number.
        axis: Its neuron axis; None where it has none, as the bias of an output.
        halves: Whether gate and up share that axis, as in the input projection in memory.
    """

    name: str
    axis: int | None
    halves: bool = False


@dataclass(frozen=True)
class DiskNames:
    """What a published checkpoint calls the weights of a layer, after the layer's path (`{}` is an expert's number).

    Attributes:
        gate, up, down: One linear projection each, `[F, D]`, `[F, D]` and `[D, F]`. Without a gate, or where `up` holds it
            too, `gate` is None.
        root: What the model's own path, `model`, is called; empty where it is called that.
        fused: All experts are in one tensor, as they are in memory; its name is that of an expert without `.{}`.
        up_bias, down_bias: Where experts have them.
        router: `[E, D]`.
        router_bias: `[.., E]`: what is added to the router's answer, for all or for the choice alone.
        others: Beginnings of names that differ, in memory and published.
    """

    gate: str | None = "mlp.experts.{}.gate_proj.weight"
    up: str = "mlp.experts.{}.up_proj.weight"
    down: str = "mlp.experts.{}.down_proj.weight"
    root: str = ""
    fused: bool = False
    up_bias: str | None = None
    down_bias: str | None = None
    router: str = "mlp.gate.weight"
    router_bias: str | None = None
    others: tuple[tuple[str, str], ...] = ()

    def pieces(self, layout: ExpertLayout) -> list[Piece]:
        """All that an expert consists of."""
        gate = [] if self.gate is None else [Piece(self.gate, 0)]
        halves = self.gate is None and layout.gated
        up = Piece(self.up, layout.input_axis if self.fused else 0, halves)
        down = Piece(self.down, layout.down_axis if self.fused else 1)
        biases = [] if self.up_bias is None else [Piece(self.up_bias, 0, halves)]
        biases += [] if self.down_bias is None else [Piece(self.down_bias, None)]
        return [*gate, up, down, *biases]

    def whole(self, name: str) -> str:
        """The published name of what a weight of one expert lies in: of all experts where they are fused."""
        return name.replace(".{}", "") if self.fused else name


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
        feed_forward: What the names of experts and router follow after in memory, and `disk` on disk.
    """

    stack: int
    layer: str
    attention: str
    feed_forward: str
    disk: str


@dataclass(frozen=True)
class Family:
    """One model family: paths inside a layer, config keys, and what may not be cut and why.

    Attributes:
        experts: Path of the experts module inside a layer (its feed-forward part, where the stack names one).
        router: Path of the router there.
        router_weight: Path inside the router of its weight, `[E, D]`.
        router_bias: Path, from where those of experts and router start, of `DiskNames.router_bias`; empty without.
        width_key: Config key of the expert width F.
        experts_key: Config key of the number of experts E.
        stacks: Where the layers are; those of an encoder before those of its decoder, and so they are numbered.
        top_k: Experts per token where the code fixes it. top_k_key: Config key that says it otherwise.
        routing_keys: Config keys of how many groups the router deals the experts into, and from how many of them a token
            takes its own; none where it has no groups.
        shared_key: Config key of how many times the expert width the shared experts are wide; None where nothing depends on
            that width.
        layout: How the experts are laid out.
        disk: What a published checkpoint calls them.
        projections: Names of the attention's query, key, value and output projections; empty where it has none such. A
            layer without them counts as one without attention.
        adapted: Names of the attention's linear layers that an adapter goes on, as far as a layer has them; empty where those
            are `projections`.
        query_parts: How many times the head width a head's rows in the query projection are.
        query_rows: Further weights of the attention with as many rows as the output projection has columns.
        head_rows: Those with a row per query head.
        expert_size_key: Config key of the width of what experts are given and put out; without a key or a value it is D.
        capacity_key: Config key of how many tokens of a row an expert takes at most; fewer experts take more each.
        no_groups: Why key/value groups cannot be cut; empty where they can.
        no_width: Why experts cannot be narrowed; empty where they can.
        no_merge: Why experts cannot be averaged; empty where they can.
        no_stream: Why a model cannot be run one layer at a time; empty where it can.
    """

    experts: str
    router: str
    width_key: str
    experts_key: str
    stacks: tuple[Stack, ...] = (Stack(),)
    top_k: int | None = None
    top_k_key: str = "num_experts_per_tok"
    router_weight: str = "weight"
    router_bias: str = ""
    routing_keys: tuple[str, str] | None = None
    shared_key: str | None = None
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    disk: DiskNames = field(default_factory=DiskNames)
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapted: tuple[str, ...] = ()
    query_parts: int = 1
    query_rows: tuple[str, ...] = ()
    head_rows: tuple[str, ...] = ()
    expert_size_key: str | None = None
    capacity_key: str | None = None
    no_groups: str = ""
    no_width: str = ""
    no_merge: str = ""
    no_stream: str = ""

    @property
    def pieces(self) -> list[Piece]:
        """All that an expert consists of on disk."""
        return self.disk.pieces(self.layout)

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
                found.append(LayerPaths(number, layer, f"{layer}.{stack.attention}", within, self.rooted(within)))
        return found

    def rooted(self, name: str) -> str:
        """A name in memory under what the model's own path is called on disk."""
        inside = self.disk.root and name.startswith("model.")
        return self.disk.root + name.removeprefix("model") if inside else name

    def keeps_dtype(self, name: str) -> bool:
        """Whether a weight stays in its own dtype where the others are cast: what is added for the choice of experts alone.

        Differences that rounding such a bias would swallow decide where tokens go, so it is often kept finer than the rest.

        Args:
            name: Its name in memory or published.
        """
        if self.router_bias in ("", f"{self.router}.bias"):  # none, or one that the router's own answer holds
            return False
        return name.endswith((f".{self.router_bias}", f".{self.disk.router_bias}"))

    def published(self, within: str) -> str:
        """The published name, after its layer's path, of a weight that is no expert's, from its name in memory there."""
        if within == f"{self.router}.{self.router_weight}":
            return self.disk.router
        if self.router_bias and within == self.router_bias:
            assert self.disk.router_bias is not None
            return self.disk.router_bias
        for memory, disk in self.disk.others:
            if within.startswith(memory):
                return disk + within.removeprefix(memory)
        return within
