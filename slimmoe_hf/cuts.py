"""Which rows and columns of which stored weight make up each weight of a slimmed checkpoint, and in which file it goes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from slimmoe_hf.blends import blended
from slimmoe_hf.disk import Part, expected_shapes, read_part
from slimmoe_hf.families import family_of, shape_values
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.serving import needs_biases, serving_config
from slimmoe_hf.shards import DTYPES, SINGLE, Buffer


@dataclass(frozen=True)
class Cut:
    """One weight of the slimmed checkpoint.

    Attributes:
        name: Its published name. shape, dtype: Its own.
        part: The weight it is taken from; None for zeros.
        axis, index: What is selected; None for all of it.
        shares: Of a merged expert, the weights that it is the sum of, each with its share and its order along `axis`.
        given: What is written instead of a selection of `part`, where the plan carries a repaired weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part | None
    axis: int = 0
    index: Tensor | None = None
    shares: tuple[tuple[Part, float, Tensor], ...] = ()
    given: Tensor | None = None

    @property
    def parts(self) -> list[Part]:
        """All that it is made of."""
        if self.part is None:
            return []
        return [part for part, _, _ in self.shares] or [self.part]

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, folder: Path, buffer: Buffer) -> Tensor:
        """Read what it is taken from, into `buffer` where only a selection of it is kept, and select."""
        if self.part is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        if self.given is not None:
            return self.given.to(self.dtype)
        if self.shares:
            members = ((read_part(folder, part), share, order) for part, share, order in self.shares)
            return blended(members, self.axis).to(self.dtype)
        if self.index is None:
            return read_part(folder, self.part).to(self.dtype)
        return read_part(folder, self.part, buffer=buffer).index_select(self.axis, self.index).to(self.dtype)


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
        values |= shape_values(config, plan.meta.after)
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
    wanted = expected_shapes(AutoConfig.for_model(**copy.deepcopy(dict(values))))
    selections = {} if duplicate else _selections(config, parts, plan)
    renumbered = {} if duplicate else _renumbered(config, plan)
    if stray := selections.keys() - parts.keys():
        raise ValueError(f"the plan cuts {min(stray)}, which this model does not have. Make a plan for this one.")
    given = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    cuts = []
    merged, repaired = _merged(config, parts, plan, duplicate), _repaired(config, plan, duplicate)
    for name, part in parts.items():
        new = renumbered.get(name, name)
        if new is None:
            continue
        axis, index = selections.get(name, (0, None))
        own = torch.bfloat16 if part.scale is not None else DTYPES[part.stored.dtype]
        shape = list(part.shape)
        if index is not None:
            shape[axis] = len(index)
        if tuple(shape) != wanted.get(new):
            raise ValueError(
                f"the plan leaves {name} at {shape}, its own sizes ask for {list(wanted.get(new, ()))}. Make a plan for "
                "this model."
            )
        kept = given if given is not None and own.is_floating_point else own
        if name in merged:
            cuts.append(Cut(new, wanted[new], kept, part, *merged[name], given=repaired.get(name)))
            continue
        cuts.append(Cut(new, wanted[new], kept, part, axis, index, given=repaired.get(name)))
    zeros = sorted(wanted.keys() - {cut.name for cut in cuts})
    for name in zeros:
        assert name.endswith(".bias") and needs_biases(config), name
    return cuts + [Cut(name, wanted[name], cuts[0].dtype, None) for name in zeros]


def _selections(
    config: PreTrainedConfig, parts: Mapping[str, Part], plan: CompressionPlan
) -> dict[str, tuple[int, Tensor]]:
    """Published name -> axis and indices, of every weight that loses something."""
    family, found = family_of(config), {}
    paths, disk = family.paths(config), family.disk
    for layer, kept_E in plan.experts.items():
        found[f"{paths[layer].feed_forward}.{disk.router}"] = (0, kept_E)
        if disk.router_bias is not None and f"{paths[layer].feed_forward}.{disk.router_bias}" in parts:
            found[f"{paths[layer].feed_forward}.{disk.router_bias}"] = (0, kept_E)
    for layer, kept_EF in plan.neurons.items():
        for expert, kept_F in zip(_experts(plan, layer), kept_EF, strict=True):
            for name, axis in disk.projections:
                found[f"{paths[layer].feed_forward}.{name.format(expert)}"] = (axis, kept_F)
    biased = config.to_dict().get("attention_bias", False)
    for layer in plan.groups:
        queries, keys = plan.attention_rows(layer)
        prefix = paths[layer].attention
        for name, rows in zip(family.projections, (queries, keys, keys), strict=False):
            found[f"{prefix}.{name}.weight"] = (0, rows)
            if biased:
                found[f"{prefix}.{name}.bias"] = (0, rows)
        found[f"{prefix}.{family.projections[-1]}.weight"] = (1, queries)
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
        for name, _ in family.disk.projections:
            for old in range(plan.meta.before.num_experts):
                place = f"{paths[layer].feed_forward}.{name}"
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
            for name, axis in family.disk.projections:
                place = f"{paths[layer].feed_forward}.{name}"
                members = blend.members(number)
                shares = tuple((parts[place.format(e)], float(blend.weight[e]), blend.order[e]) for e in members)
                found[place.format(expert)] = (axis, None, shares)
    return found


def _repaired(config: PreTrainedConfig, plan: CompressionPlan, duplicate: bool) -> dict[str, Tensor]:
    """Published name of an output projection -> what the plan writes in its place."""
    family, found = family_of(config), {}
    paths = family.paths(config)
    for layer, down_EDF in plan.repairs.down_proj.items():
        numbers = {expert: number for number, expert in enumerate(_experts(plan, layer))}
        if duplicate:
            numbers = dict(enumerate(plan.blends[layer].owner.tolist()))
        for expert, number in numbers.items():
            found[f"{paths[layer].feed_forward}.{family.disk.down.format(expert)}"] = down_EDF[number]
    for layer, weight in plan.repairs.o_proj.items():
        found[f"{paths[layer].attention}.{family.projections[-1]}.weight"] = weight
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
