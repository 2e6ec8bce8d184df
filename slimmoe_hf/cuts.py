"""Which rows and columns of which stored weight make up each weight of a slimmed checkpoint, and in which file it goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimmoe_hf.attention_cuts import attention_cuts
from slimmoe_hf.blends import blended
from slimmoe_hf.disk import Part, expected_shapes, published_name, read_part
from slimmoe_hf.families import config_from, family_of, shape_of, shape_values
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.serving import needs_biases, serving_config
from slimmoe_hf.shards import INDEX, SINGLE, Buffer


@dataclass(frozen=True)
class Cut:
    """One weight of the slimmed checkpoint.

    Attributes:
        name: Its published name. shape, dtype: Its own.
        part: The weight it is taken from; None for zeros.
        axis, index: What is selected; None for all of it.
        shares: Of a merged expert, the weights that it is the sum of, each with its share and its order along `axis`.
        given: Gives what is written instead of a selection of `part`, where the plan carries a repaired weight.
        experts: Of a tensor of all experts, what each of them is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part | None
    axis: int = 0
    index: Tensor | None = None
    shares: tuple[tuple[Part, float, Tensor], ...] = ()
    given: Callable[[], Tensor] | None = None
    experts: tuple[Cut, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """All that it is made of."""
        if self.experts:
            return [part for cut in self.experts for part in cut.parts]
        if self.part is None:
            return []
        return [part for part, _, _ in self.shares] or [self.part]

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, folder: Path, buffer: Buffer) -> Tensor:
        """Read what it is taken from, into `buffer` where only a selection of it is kept, and select."""
        if self.experts:
            found = torch.empty(self.shape, dtype=self.dtype)
            for row, cut in zip(found, self.experts, strict=True):
                row.copy_(cut.read(folder, buffer))
            return found
        if self.part is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        if self.given is not None:
            return self.given().to(self.dtype)
        if self.shares:
            members = ((read_part(folder, part), share, order) for part, share, order in self.shares)
            return blended(members, self.axis).to(self.dtype)
        if self.index is None:
            return read_part(folder, self.part).to(self.dtype)
        return read_part(folder, self.part, buffer=buffer).index_select(self.axis, self.index).to(self.dtype)

    def placed(self, place: Callable[[Part], Part]) -> Cut:
        """The same of other parts: `place` says for each which."""
        shares = tuple((place(part), share, order) for part, share, order in self.shares)
        experts = tuple(cut.placed(place) for cut in self.experts)
        return dataclasses.replace(self, part=self.part and place(self.part), shares=shares, experts=experts)


def slimmed_config(
    folder: Path, config: PreTrainedConfig, plan: CompressionPlan, dtype: str | torch.dtype | None, dequantised: bool,
    duplicate: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The new `config.json`: the original's own, with the plan's sizes and in the form that engines expect.

    Args:
        folder: Of the original. config: Its own.
        plan: It fits the config.
        dtype: Of the new weights; None keeps their own. dequantised: They were FP8.
        duplicate: As in `list_cuts`: the sizes stay.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not duplicate:
        changed = shape_values(config, plan.meta.after)
        for alias, key in config.attribute_map.items():  # a file may have either, and may have both
            for one, other in ((alias, key), (key, alias)):
                if one in changed and other in values:
                    values[other] = changed[one]
        values |= changed
    if dtype is not None or dequantised:
        values["dtype"] = str(dtype or torch.bfloat16).removeprefix("torch.")
        values.pop("torch_dtype", None)
    return serving_config(values)


def list_cuts(
    config: PreTrainedConfig,
    parts: Mapping[str, Part],
    plan: CompressionPlan,
    values: Mapping[str, Any],
    dtype: str | torch.dtype | None,
    duplicate: bool = False,
) -> list[Cut]:
    """Every weight of the slimmed checkpoint, in the order in which the originals lie on disk.

    Args:
        config: The original's. parts: From `locate`.
        plan: It fits the config.
        values: The new config.
        dtype: Of the new weights; None keeps their own.
        duplicate: Put every merged expert in the place of all its members, and leave the routers as they are.

    Raises:
        ValueError: The plan cuts experts in a layer that has none, or drops some in one layer and none in another.
    """
    wanted = expected_shapes(config_from(values))
    selections = {} if duplicate else _selections(config, parts, plan)
    renumbered = {} if duplicate else _renumbered(config, plan)
    if stray := selections.keys() - parts.keys():
        raise ValueError(f"the plan cuts {min(stray)}, which this model does not have. Make a plan for this one.")
    given = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    cuts, family = [], family_of(config)
    merged, repaired = _merged(config, parts, plan, duplicate), _repaired(config, plan, duplicate)
    for name, part in parts.items():
        new = renumbered.get(name, name)
        if new is None:
            continue
        axis, index = selections.get(name, (0, None))
        shape = list(part.shape)
        if index is not None:
            shape[axis] = len(index)
        if tuple(shape) != wanted.get(new):
            raise ValueError(
                f"the plan leaves {name} at {shape}, its own sizes ask for {list(wanted.get(new, ()))}. Make a plan for "
                "this model."
            )
        castable = part.dtype.is_floating_point and not family.keeps_dtype(name)
        kept = given if given is not None and castable else part.dtype
        if name in merged:
            cuts.append(Cut(new, wanted[new], kept, part, *merged[name], given=repaired.get(name)))
            continue
        cuts.append(Cut(new, wanted[new], kept, part, axis, index, given=repaired.get(name)))
    zeros = sorted(wanted.keys() - {cut.name for cut in cuts})
    for name in zeros:
        assert name.endswith(".bias") and needs_biases(config), name
    cuts += [Cut(name, wanted[name], cuts[0].dtype, None) for name in zeros]
    return as_published(config_from(values), cuts)


def as_published(config: PreTrainedConfig, cuts: Sequence[Cut]) -> list[Cut]:
    """The same, with one weight of all experts of a layer in the place of each expert's where the family is published so.

    Args:
        config: Of the new weights.
        cuts: Of each expert apart.
    """
    family, experts = family_of(config), range(shape_of(config).num_experts)
    if not family.disk.fused:
        return list(cuts)
    names = [
        (at.disk, piece.name, expert) for at in family.paths(config) for piece in family.pieces for expert in experts
    ]
    wholes = {f"{layer}.{name.format(e)}": f"{layer}.{family.disk.whole(name)}" for layer, name, e in names}
    rank = {name: number for number, name in enumerate(wholes)}
    each: dict[str, list[Cut]] = {}
    for cut in cuts:
        each.setdefault(wholes.get(cut.name, cut.name), []).append(cut)
    return [
        _stacked(whole, sorted(found, key=lambda cut: rank[cut.name])) if found[0].name in wholes else found[0]
        for whole, found in each.items()
    ]


def _stacked(name: str, experts: Sequence[Cut]) -> Cut:
    return Cut(name, (len(experts), *experts[0].shape), experts[0].dtype, experts[0].part, experts=tuple(experts))


def _selections(
    config: PreTrainedConfig, parts: Mapping[str, Part], plan: CompressionPlan
) -> dict[str, tuple[int, Tensor]]:
    """Published name -> axis and indices, of every weight that loses something."""
    family, found = family_of(config), {}
    paths, disk = family.paths(config), family.disk
    for layer, kept_E in plan.experts.items():
        found[f"{paths[layer].disk}.{disk.router}"] = (0, kept_E)
        if disk.router_bias is not None and f"{paths[layer].disk}.{disk.router_bias}" in parts:
            name = f"{paths[layer].disk}.{disk.router_bias}"
            found[name] = (len(parts[name].shape) - 1, kept_E)
    for layer, kept_EF in plan.neurons.items():
        for expert, kept_F in zip(_experts(plan, layer), kept_EF, strict=True):
            for piece in family.pieces:
                if piece.axis is not None:
                    kept = family.layout.input_index(kept_F, plan.meta.before.expert_width) if piece.halves else kept_F
                    found[f"{paths[layer].disk}.{piece.name.format(expert)}"] = (piece.axis, kept)
    for layer in plan.groups:
        for name, cut in attention_cuts(family, plan, layer).items():
            full = published_name(family, f"{paths[layer].attention}.{name}")
            if full in parts or not name.endswith(".bias"):
                found[full] = cut
    return found


def _experts(plan: CompressionPlan, layer: int) -> list[int]:
    """The experts of a layer that stay, by their old numbers."""
    return plan.experts[layer].tolist() if layer in plan.experts else list(range(plan.meta.before.num_experts))


def _renumbered(config: PreTrainedConfig, plan: CompressionPlan) -> dict[str, str | None]:
    """Published name -> its new one, None where it goes, of all weights of experts in layers that lose some."""
    family, found = family_of(config), {}
    paths = family.paths(config)
    for layer in plan.experts:
        new = {old: number for number, old in enumerate(_experts(plan, layer))}
        for name in (piece.name for piece in family.pieces):
            for old in range(plan.meta.before.num_experts):
                place = f"{paths[layer].disk}.{name}"
                found[place.format(old)] = place.format(new[old]) if old in new else None
    return found


def _merged(
    config: PreTrainedConfig, parts: Mapping[str, Part], plan: CompressionPlan, duplicate: bool
) -> dict[str, tuple[int, None, tuple[tuple[Part, float, Tensor], ...]]]:
    """Published name of a weight of an expert that others are merged into -> neuron axis, and what it is the sum of."""
    family, found = family_of(config), {}
    paths = family.paths(config)
    for layer, blend in plan.blends.items():
        merged = {expert: number for number, expert in enumerate(_experts(plan, layer))}
        for expert, number in (dict(enumerate(blend.owner.tolist())) if duplicate else merged).items():
            for piece in family.pieces:
                place = f"{paths[layer].disk}.{piece.name}"
                members, order_EF = blend.members(number), blend.order
                if piece.halves:
                    order_EF = family.layout.input_index(order_EF, plan.meta.before.expert_width)
                if piece.axis is None:
                    order_EF = torch.arange(parts[place.format(0)].shape[0]).expand(len(order_EF), -1)
                shares = tuple((parts[place.format(e)], float(blend.weight[e]), order_EF[e]) for e in members)
                found[place.format(expert)] = (piece.axis or 0, None, shares)
    return found


def _repaired(config: PreTrainedConfig, plan: CompressionPlan, duplicate: bool) -> dict[str, Callable[[], Tensor]]:
    """Published name of an output projection -> what gives what the plan writes in its place, when it is wanted."""
    family, found = family_of(config), dict[str, Callable[[], Tensor]]()
    paths, repairs, turned = family.paths(config), plan.repairs, family.disk.fused and family.layout.transposed

    def down(layer: int, number: int) -> Tensor:
        weight = repairs.down_proj.part(layer, number)
        return weight.T if turned else weight

    for layer in repairs.down_proj:
        numbers = {expert: number for number, expert in enumerate(_experts(plan, layer))}
        if duplicate:
            numbers = dict(enumerate(plan.blends[layer].owner.tolist()))
        for expert, number in numbers.items():
            name = f"{paths[layer].disk}.{family.disk.down.format(expert)}"
            found[name] = partial(down, layer, number)
    for layer in repairs.o_proj:
        name = published_name(family, f"{paths[layer].attention}.{family.projections[-1]}.weight")
        found[name] = partial(repairs.o_proj.__getitem__, layer)
    return found


def name_shards(cuts: Sequence[Cut], shard_bytes: int) -> dict[str, list[Cut]]:
    """Deal weights, in order, to files of at most `shard_bytes`; a larger weight has a file of its own."""
    groups: list[list[Cut]] = [[]]
    size = 0
    for cut in cuts:
        if groups[-1] and size + cut.bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(cut)
        size += cut.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Cut]]) -> None:
    """Write which of several files holds which weight; nothing where there is one file."""
    if len(shards) > 1:
        total = sum(cut.bytes for cuts in shards.values() for cut in cuts)
        names = {cut.name: name for name, cuts in shards.items() for cut in cuts}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
