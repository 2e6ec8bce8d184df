"""`Target` in, `CompressionPlan` out: the only decision, saved, hashed and readable. Every shape rule lives here.

Shape letters: L layers with experts, E experts, E' the experts kept, F expert width, F' the width kept, A layers with
attention, H query heads, G key/value groups, G' the groups kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from slimmoe_hf.atomic import replacing
from slimmoe_hf.blends import KINDS, Blend, Merging
from slimmoe_hf.criteria import CRITERIA, Chosen, check_criteria, choose, expert_ranking, of_kept_experts, ranking
from slimmoe_hf.defaults import CRITERION
from slimmoe_hf.families import Shape, config_from, expert_size, family_of, routing_groups, shape_of
from slimmoe_hf.layer_summary import LayerSummary
from slimmoe_hf.limits import check_groups, check_shared
from slimmoe_hf.repairs import REPAIR_KINDS, Repairing, Repairs
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.super_experts import super_experts, super_experts_of

VERSION = 1
ALIGNMENT = 8
"""Grouped matrix products need rows of 16 bytes: 8 values in bfloat16."""


class Target(BaseModel):
    """What to cut to. Fields left out stay as they are.

    Attributes:
        expert_width: F', neurons per expert: a multiple of 8, at most the model's.
        kv_groups: G', key/value groups per attention layer, each with its query heads.
        num_experts: E', experts per layer: at least as many as a token is sent to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    expert_width: int | None = None
    kv_groups: int | None = None
    num_experts: int | None = None

    @property
    def asks(self) -> dict[str, bool]:
        """Which criteria it needs: one for `neurons` and groups, one for `experts`."""
        neurons = self.expert_width is not None or self.kv_groups is not None
        return {"neurons": neurons, "experts": self.num_experts is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self if value is not None) or "nothing"


def validate_target(config: PreTrainedConfig, target: Target) -> Shape:
    """The shape that `target` makes of a model, from the model's config alone.

    Raises:
        ValueError: A dense or unknown model, an empty target, or a size the model cannot take; the line says which
            are legal.
    """
    family, before = family_of(config), shape_of(config)
    width, groups, experts = target.expert_width, target.kv_groups, target.num_experts
    if width is None and groups is None and experts is None:
        raise ValueError("the target asks for nothing. Set expert_width, kv_groups, num_experts, or several.")
    if width is not None and width != before.expert_width and family.no_width:
        raise ValueError(f"expert_width={width} cannot be had for {config.model_type}: {family.no_width}.")
    if width is not None:
        _check_width(width, before.expert_width)
        check_shared(config, width)
    if groups is not None and groups != before.kv_groups and family.no_groups:
        raise ValueError(f"kv_groups={groups} cannot be had for {config.model_type}: {family.no_groups}.")
    if groups is not None and not 1 <= groups <= before.kv_groups:
        raise ValueError(f"kv_groups={groups} is not between 1 and the model's {before.kv_groups} key/value groups.")
    if experts is not None and not before.top_k <= experts <= before.num_experts:
        raise ValueError(
            f"num_experts={experts} is not between the {before.top_k} that a token is sent to and the model's "
            f"{before.num_experts} experts per layer."
        )
    if experts is not None:
        check_groups(config, experts)
    groups = groups or before.kv_groups
    return dataclasses.replace(
        before,
        num_experts=experts or before.num_experts,
        expert_width=width or before.expert_width,
        kv_groups=groups,
        query_heads=before.query_heads // before.kv_groups * groups,
    )


def _check_width(width: int, model_width: int) -> None:
    if not ALIGNMENT <= width <= model_width:
        raise ValueError(
            f"expert_width={width} is not between {ALIGNMENT} and the model's width of {model_width}. "
            "Slimming keeps some of the neurons there are; it cannot add any."
        )
    if width % ALIGNMENT and width != model_width:
        low, high = width // ALIGNMENT * ALIGNMENT, -(-width // ALIGNMENT) * ALIGNMENT
        near = f"{low} or {high}" if low >= ALIGNMENT and high <= model_width else str(max(low, ALIGNMENT))
        raise ValueError(
            f"expert_width={width} is not a multiple of {ALIGNMENT}, which grouped matrix products need in bf16. "
            f"Nearest: {near}."
        )


class PlanMeta(BaseModel):
    """Everything in `plan.json`.

    Attributes:
        family: The model type. before, after: Sizes. target, criterion, seed, loss: What was asked for.
        expert_criterion: What chose the experts, where any was dropped. merging: How others were averaged into them.
        repairing: What the output projections were solved anew with; None where they are plain slices.
        model_sha256: The weights that were scored. fingerprint: Of a sample of them.
        data_sha256: The text. stats_sha256: The statistics.
        teacher_sha256: The teacher of `kd_topk`; None where the model was its own.
        layers: One summary a layer.
        request: What a `SlimmingCallback` was asked for, so that a changed request is noticed.
        version: Of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    before: Shape
    after: Shape
    target: Target
    criterion: str
    expert_criterion: str | None = None
    merging: Merging | None = None
    repairing: Repairing | None = None
    seed: int
    loss: str
    model_sha256: str
    fingerprint: str | None = None
    data_sha256: str
    stats_sha256: str
    teacher_sha256: str | None = None
    layers: list[LayerSummary]
    request: dict[str, Any] | None = None
    version: int = VERSION


@dataclass(frozen=True)
class CompressionPlan:
    """Which experts, neurons and groups stay.

    Attributes:
        meta: Sizes, origin and summary.
        neurons: Absolute layer index -> `[E', F']`, a row per expert that stays, ascending. Empty where no width is cut.
        groups: Absolute layer index -> `[G']`, ascending. Empty where no group is dropped.
        experts: Absolute layer index -> `[E']`, ascending. Empty where no expert is dropped. Of an adaptive merging, layers
            have numbers of their own, E' on average, and those that stay as they are have none.
        blends: Absolute layer index -> what each of those E' becomes an average of. Empty where experts just go.
        repairs: Output projections to write instead of slices. Empty unless `reconstruct` made them. Of a plan that was read
            they stay in its folder until they are wanted.
    """

    meta: PlanMeta
    neurons: Mapping[int, Tensor]
    groups: Mapping[int, Tensor]
    experts: Mapping[int, Tensor] = field(default_factory=dict)
    blends: Mapping[int, Blend] = field(default_factory=dict)
    repairs: Repairs = field(default_factory=Repairs)

    @property
    def kept(self) -> dict[str, Mapping[int, Tensor]]:
        """All indices by kind."""
        return {"neurons": self.neurons, "groups": self.groups, "experts": self.experts}

    @property
    def sha256(self) -> str:
        """Hash of the decision itself: sizes, kept indices and repaired weights, not where they come from."""
        digest = hashlib.sha256(json.dumps([self.meta.family, *map(dataclasses.asdict, self._shapes())]).encode())
        for kind, kept in self.kept.items():
            for layer, index in sorted(kept.items()):
                digest.update(f"{kind}.{layer}".encode() + index.to(torch.int32).contiguous().numpy().tobytes())
        for layer, blend in sorted(self.blends.items()):
            for kind, tensor in blend.tensors().items():
                digest.update(f"{kind}.{layer}".encode() + tensor.numpy().tobytes())
        if self.meta.repairing is not None and self.repairs:
            digest.update(self.meta.repairing.sha256.encode())
        return digest.hexdigest()

    @property
    def adaptive(self) -> bool:
        """Whether experts are merged into a number of its own in every layer."""
        return self.meta.merging is not None and self.meta.merging.counts == "adaptive"

    def refuse_unmerged(self) -> None:
        """Raise ValueError if the plan merges nothing."""
        if not self.blends:
            raise ValueError("the plan merges no experts: there is nothing to share. Make one with plan_merge.")

    def refuse_adaptive(self) -> None:
        """Raise ValueError if the plan leaves every layer a number of experts of its own: no stock model has that."""
        if self.adaptive:
            sizes = sorted(map(len, self.experts.values()))
            raise ValueError(
                f"the plan leaves every layer a number of experts of its own ({sizes[0]} to {sizes[-1]}), a stock model has one "
                "for all. Use share_merged or duplicate_merged of slimmoe_hf.merged_forms, or merge with counts='uniform'."
            )

    def with_request(self, request: dict[str, Any] | None) -> CompressionPlan:
        """The same decision, with what was asked for."""
        return dataclasses.replace(self, meta=self.meta.model_copy(update={"request": request}))

    def _shapes(self) -> tuple[Shape, Shape]:
        return self.meta.before, self.meta.after

    def check_fits(self, config: PreTrainedConfig) -> None:
        """Raise ValueError unless the plan starts from this config's family and sizes."""
        if config.model_type != self.meta.family:
            raise ValueError(f"the plan is for {self.meta.family}, the model is {config.model_type}.")
        if self.groups and family_of(config).no_groups:
            raise ValueError(f"the plan drops key/value groups: {family_of(config).no_groups}.")
        if self.neurons and family_of(config).no_width:
            raise ValueError(f"the plan narrows experts: {family_of(config).no_width}.")
        self.repairs.check_size(expert_size(config))
        have, want = shape_of(config), self.meta.before
        if have != want:
            differences = [
                f"{name} {value}, the model has {dataclasses.asdict(have)[name]}"
                for name, value in dataclasses.asdict(want).items()
                if value != dataclasses.asdict(have)[name]
            ]
            raise ValueError(
                f"the plan was made for another model: it expects {'; '.join(differences)}. Make a plan for this one."
            )

    def attention_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """What a layer that loses groups keeps: rows of `q_proj` (columns of `o_proj`), and rows of `k_proj` and `v_proj`.

        Returns:
            Indices `[H' * C]` and `[G' * C]`, ascending.
        """
        before, kept_G = self.meta.before, self.groups[layer]
        per_group, width = before.query_heads // before.kv_groups, torch.arange(before.head_width)
        heads = (kept_G[:, None] * per_group + torch.arange(per_group)).flatten()
        return (heads[:, None] * len(width) + width).flatten(), (kept_G[:, None] * len(width) + width).flatten()

    def save(self, folder: str | Path) -> None:
        """Write `plan.json`, `plan.safetensors` and what is repaired into `folder`, beside their place first, then renamed."""
        tensors = {
            f"{kind}.{layer}": index.to(torch.int32)
            for kind, kept in self.kept.items()
            for layer, index in kept.items()
        }
        for layer, blend in self.blends.items():
            tensors |= {f"{kind}.{layer}": tensor for kind, tensor in blend.tensors().items()}
        with replacing(Path(folder), overwrite=True) as beside:
            beside.mkdir()
            save_file(tensors, beside / "plan.safetensors")
            if self.repairs:
                self.repairs.save(beside)
            (beside / "plan.json").write_text(self.meta.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> CompressionPlan:
        """Read a folder written by `save`.

        Raises:
            ValueError: No plan there, damaged, of another version, or its indices do not fit its own sizes. Repaired weights are
                looked at by `repairs.check_same`.
        """
        folder = Path(folder)
        if not (folder / "plan.json").is_file():
            raise ValueError(
                f"{folder}: no plan there (no plan.json). Make one with: slimmoe plan STATS --output {folder}"
            )
        try:
            meta = PlanMeta.model_validate_json((folder / "plan.json").read_text())
            tensors = load_file(folder / "plan.safetensors")
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            what = "a plan of an earlier version" if where == "repairing.sha256" else "not a plan of this version"
            raise ValueError(f"{folder}/plan.json: {what} ({where}). Make it again.") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder}/plan.safetensors: missing or damaged ({error}). Make the plan again."
            ) from error
        found: dict[str, dict[int, Tensor]] = {kind: {} for kind in ("neurons", "groups", "experts", *KINDS)}
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            if kind in REPAIR_KINDS:
                raise ValueError(f"{folder}: a plan of an earlier version ({name} in plan.safetensors). Make it again.")
            if kind not in found or not layer.isdecimal():
                raise ValueError(f"{folder}/plan.safetensors: unknown tensor {name}.")
            found[kind][int(layer)] = tensor if kind == "weight" else tensor.long()
        parts = [found.pop(kind) for kind in KINDS]
        if len({frozenset(part) for part in parts}) > 1:
            raise ValueError(f"{folder}/plan.safetensors: a layer's merging is not whole. Make the plan again.")
        blends = {layer: Blend(*(part[layer] for part in parts)) for layer in parts[0]}
        repairs = Repairs() if meta.repairing is None else Repairs.load(folder)
        plan = cls(meta, **found, blends=blends, repairs=repairs)
        plan.check()
        return plan

    def check(self) -> None:
        """Raise ValueError unless every index fits the plan's own sizes, is unique and ascending."""
        before, after = self._shapes()
        each = {layer: len(kept) if self.adaptive else after.num_experts for layer, kept in self.experts.items()}
        rules = {
            "neurons": ((after.num_experts, after.expert_width), before.expert_width),
            "groups": ((after.kv_groups,), before.kv_groups),
            "experts": ((), before.num_experts),
        }
        for kind, size in (("neurons", "expert_width"), ("groups", "kv_groups"), ("experts", "num_experts")):
            if vars(after)[size] != vars(before)[size] and not self.kept[kind]:
                raise ValueError(f"the plan drops {kind} and does not say which. Make it again.")
        if self.blends and (self.neurons or self.groups or self.blends.keys() != self.experts.keys()):
            raise ValueError("the plan merges experts and cuts something else too. Make a plan for each.")
        if sum(each.values()) != after.num_experts * len(each):
            raise ValueError(f"the plan does not leave {after.num_experts} experts a layer on average. Make it again.")
        for layer, blend in self.blends.items():
            blend.check(before.num_experts, each[layer], before.expert_width, f"plan merging of layer {layer}")
        if self.meta.repairing is not None or self.repairs:
            cut = self.neurons.keys() | self.blends.keys()
            self.repairs.check({n: each.get(n, after.num_experts) for n in cut}, self.groups.keys(), after)
        for kind, kept in self.kept.items():
            for layer, index in kept.items():
                shape, bound = rules[kind][0] or (each[layer],), rules[kind][1]
                ascending = bool((index.diff(dim=-1) > 0).all())
                inside = bool((index >= 0).all() and (index < bound).all())
                if tuple(index.shape) != shape or not ascending or not inside or not 0 <= layer < before.layers:
                    raise ValueError(f"plan {kind}.{layer}: expected {shape} ascending indices below {bound}.")


def make_plan(
    stats: ExpertStats,
    target: Target,
    criterion: str = CRITERION,
    seed: int = 0,
    expert_criterion: str | None = None,
) -> CompressionPlan:
    """Decide what stays. Pure: no model, no data, and the same answer every time.

    Every layer keeps its own best `num_experts` experts and `kv_groups` groups, every one of those experts its own best
    `expert_width` neurons; ties go to the lower index. An expert that no calibration token reached is unknown, not
    worthless: it stays only where all known ones do, and its neurons are ranked by weight norms. A super expert
    (`super_experts`) goes after all others, whatever the criterion says, and is named in the plan.

    Args:
        stats: From `collect_stats` or `ExpertStats.load`.
        target: The sizes wanted.
        criterion: A name in `CRITERIA`; where only experts are dropped, in `EXPERT_CRITERIA`.
        seed: For `random`.
        expert_criterion: A name in `EXPERT_CRITERIA`; None is `criterion`, or `reap` where that one scores no experts.

    Raises:
        ValueError: As `validate_target` and `check_criteria`; or old statistics that lack what a criterion needs.
    """
    of_experts = check_criteria(criterion, expert_criterion, **target.asks)
    config = config_from(stats.meta.config)
    before, after = shape_of(config), validate_target(config, target)
    layers = stats.meta.layers
    experts = neurons = groups = Chosen({}, {})
    if after.num_experts < before.num_experts:
        scores_LE = expert_ranking(stats, of_experts, seed)
        experts = choose(scores_LE, after.num_experts, layers, super_experts(stats), routing_groups(config)[0])
    if after.expert_width < before.expert_width:
        scores_LEF = of_kept_experts(ranking(stats, criterion, seed).neurons_LEF, layers, experts.kept)
        neurons = choose(scores_LEF, after.expert_width, layers)
    if after.kv_groups < before.kv_groups:
        scores_AG, attending = ranking(stats, criterion, seed).groups_AG, stats.attending
        groups = choose(scores_AG[attending], after.kv_groups, attending)
    unknown = dict(zip(layers, (stats.tokens_LE == 0).sum(-1).tolist(), strict=True))
    supers = super_experts_of(stats)
    summaries = [
        LayerSummary(
            index=layer, neuron_score_kept=neurons.shares.get(layer), unknown_experts=unknown.get(layer, 0),
            groups_kept=groups.listed(layer), group_score_kept=groups.shares.get(layer),
            experts_kept=experts.listed(layer), expert_score_kept=experts.shares.get(layer),
            super_experts=supers.get(layer, {}),
        )
        for layer in range(before.layers)
    ]  # fmt: skip
    meta = PlanMeta(
        family=stats.meta.family, before=before, after=after, target=target, criterion=criterion, seed=seed,
        expert_criterion=of_experts if experts.kept or criterion not in CRITERIA else None,
        loss=stats.meta.loss, model_sha256=stats.meta.model_sha256, fingerprint=stats.meta.fingerprint,
        data_sha256=stats.meta.data_sha256,
        stats_sha256=stats.sha256, teacher_sha256=stats.meta.teacher_sha256,
        layers=summaries,
    )  # fmt: skip
    return CompressionPlan(meta, neurons.kept, groups.kept, experts.kept)
