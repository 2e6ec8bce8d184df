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
