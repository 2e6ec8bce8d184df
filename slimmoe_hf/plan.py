"""`Target` in, `CompressionPlan` out: the only decision, saved, hashed and readable. Every shape rule lives here.

Shape letters: L layers with experts, E experts, F expert width, F' the width kept, A layers with attention, H query
heads, G key/value groups, G' the groups kept.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from slimmoe_hf.atomic import replacing
from slimmoe_hf.criteria import CRITERIA, Scores, magnitude
from slimmoe_hf.families import Shape, family_of, shape_of
from slimmoe_hf.stats import ExpertStats

VERSION = 1
ALIGNMENT = 8
"""Grouped matrix products need rows of 16 bytes: 8 values in bfloat16."""
KERNELS = {
    32: "MXFP4, legacy GGUF and ONNX int4 blocks",
    64: "most kernels, and Microsoft's own 448 and 960",
    128: "FP8 blocks, GPTQ/AWQ/Marlin groups (times the tensor-parallel ranks)",
    256: "GGUF K-quants",
}


class Target(BaseModel):
    """What to cut to. Fields left out stay as they are.

    Attributes:
        expert_width: F', neurons per expert: a multiple of 8, at most the model's.
        kv_groups: G', key/value groups per attention layer, each with its query heads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    expert_width: int | None = None
    kv_groups: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self if value is not None) or "nothing"


def validate_target(config: PreTrainedConfig, target: Target) -> Shape:
    """The shape that `target` makes of a model, from the model's config alone.

    Raises:
        ValueError: A dense or unknown model, an empty target, or a size the model cannot take; the line says which
            are legal.
    """
    family, before = family_of(config), shape_of(config)
    width, groups = target.expert_width, target.kv_groups
    if width is None and groups is None:
        raise ValueError("the target asks for nothing. Set expert_width, kv_groups, or both.")
    if width is not None:
        _check_width(width, before.expert_width)
    if groups is not None and groups != before.kv_groups and family.no_groups:
        raise ValueError(f"kv_groups={groups} cannot be had for {config.model_type}: {family.no_groups}.")
    if groups is not None and not 1 <= groups <= before.kv_groups:
        raise ValueError(f"kv_groups={groups} is not between 1 and the model's {before.kv_groups} key/value groups.")
    groups = groups or before.kv_groups
    return dataclasses.replace(
        before,
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


class LayerSummary(BaseModel):
    """What a plan keeps of one layer.

    Attributes:
        index: Absolute layer index.
        neuron_score_kept: Share of the layer's summed neuron score that is kept; None in a dense layer.
        unknown_experts: Experts that no calibration token reached; they are ranked by weight norms.
        groups_kept: Indices of the key/value groups that stay; None where no group is dropped.
        group_score_kept: Their share of the layer's summed group score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    neuron_score_kept: float | None = None
    unknown_experts: int = 0
    groups_kept: list[int] | None = None
    group_score_kept: float | None = None


class PlanMeta(BaseModel):
    """Everything in `plan.json`.

    Attributes:
        family: The model type. before, after: Sizes. target, criterion, seed, loss: What was asked for.
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
    """Which neurons and groups stay.

    Attributes:
        meta: Sizes, origin and summary.
        neurons: Absolute layer index -> `[E, F']`, ascending per expert. Empty where no width is cut.
        groups: Absolute layer index -> `[G']`, ascending. Empty where no group is dropped.
    """

    meta: PlanMeta
    neurons: Mapping[int, Tensor]
    groups: Mapping[int, Tensor]

    @property
    def sha256(self) -> str:
        """Hash of the decision itself: sizes and kept indices, not where they come from."""
        digest = hashlib.sha256(json.dumps([self.meta.family, *map(dataclasses.asdict, self._shapes())]).encode())
        for kind, kept in (("neurons", self.neurons), ("groups", self.groups)):
            for layer, index in sorted(kept.items()):
                digest.update(f"{kind}.{layer}".encode() + index.to(torch.int32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _shapes(self) -> tuple[Shape, Shape]:
        return self.meta.before, self.meta.after

    def check_fits(self, config: PreTrainedConfig) -> None:
        """Raise ValueError unless the plan starts from this config's family and sizes."""
        if config.model_type != self.meta.family:
            raise ValueError(f"the plan is for {self.meta.family}, the model is {config.model_type}.")
        if self.groups and family_of(config).no_groups:
            raise ValueError(f"the plan drops key/value groups: {family_of(config).no_groups}.")
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
        """Write `plan.json` and `plan.safetensors` into `folder`, beside their place first, then renamed."""
        tensors = {f"neurons.{layer}": index.to(torch.int32) for layer, index in self.neurons.items()}
        tensors |= {f"groups.{layer}": index.to(torch.int32) for layer, index in self.groups.items()}
        with replacing(Path(folder), overwrite=True) as beside:
            beside.mkdir()
            save_file(tensors, beside / "plan.safetensors")
            (beside / "plan.json").write_text(self.meta.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> CompressionPlan:
        """Read a folder written by `save`.

        Raises:
            ValueError: No plan there, damaged, of another version, or its indices do not fit its own sizes.
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
            raise ValueError(f"{folder}/plan.json: not a plan of this version ({where}). Make it again.") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder}/plan.safetensors: missing or damaged ({error}). Make the plan again."
            ) from error
        kept: dict[str, dict[int, Tensor]] = {"neurons": {}, "groups": {}}
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            if kind not in kept or not layer.isdigit():
                raise ValueError(f"{folder}/plan.safetensors: unknown tensor {name}.")
            kept[kind][int(layer)] = tensor.long()
        plan = cls(meta, kept["neurons"], kept["groups"])
        plan.check()
        return plan

    def check(self) -> None:
        """Raise ValueError unless every index fits the plan's own sizes, is unique and ascending."""
        before, after = self._shapes()
        rules = (("neurons", self.neurons, (before.num_experts, after.expert_width), before.expert_width),
                 ("groups", self.groups, (after.kv_groups,), before.kv_groups))  # fmt: skip
        for kind, kept, shape, bound in rules:
            for layer, index in kept.items():
                ascending = bool((index.diff(dim=-1) > 0).all())
                inside = bool((index >= 0).all() and (index < bound).all())
                if tuple(index.shape) != shape or not ascending or not inside or not 0 <= layer < before.layers:
                    raise ValueError(f"plan {kind}.{layer}: expected {shape} ascending indices below {bound}.")


def make_plan(stats: ExpertStats, target: Target, criterion: str = "taylor", seed: int = 0) -> CompressionPlan:
    """Decide what stays. Pure: no model, no data, and the same answer every time.

    Every expert keeps its own best `expert_width` neurons, every layer its own best `kv_groups` groups; ties go to
    the lower index. An expert that no calibration token reached is unknown, not worthless: its neurons are ranked by
    weight norms.

    Args:
        stats: From `collect_stats` or `ExpertStats.load`.
        target: The sizes wanted.
        criterion: A name in `CRITERIA`.
        seed: For `random`.

    Raises:
        ValueError: As `validate_target`; or an unknown criterion.
    """
    scores = ranking(stats, criterion, seed)
    config = AutoConfig.for_model(**copy.deepcopy(stats.meta.config))  # which writes into nested dicts
    before, after = shape_of(config), validate_target(config, target)
    neurons, groups = {}, {}
    if after.expert_width < before.expert_width:
        neurons = dict(zip(stats.meta.layers, _best(scores.neurons_LEF, after.expert_width), strict=True))
    if after.kv_groups < before.kv_groups:
        groups = dict(enumerate(_best(scores.groups_AG, after.kv_groups)))
    meta = PlanMeta(
        family=stats.meta.family, before=before, after=after, target=target, criterion=criterion, seed=seed,
        loss=stats.meta.loss, model_sha256=stats.meta.model_sha256, fingerprint=stats.meta.fingerprint,
        data_sha256=stats.meta.data_sha256,
        stats_sha256=stats.sha256, teacher_sha256=stats.meta.teacher_sha256,
        layers=_summaries(stats, scores, stats.tokens_LE == 0, neurons, groups),
    )  # fmt: skip
    return CompressionPlan(meta, neurons, groups)


def ranking(stats: ExpertStats, criterion: str, seed: int = 0) -> Scores:
    """The scores that decide: the criterion's, and weight norms for the neurons of experts that no token reached.

    Raises:
        ValueError: An unknown criterion.
    """
    if criterion not in CRITERIA:
        near = difflib.get_close_matches(criterion, CRITERIA, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"criterion {criterion!r} is unknown; use one of {', '.join(CRITERIA)}.{hint}")
    scores = CRITERIA[criterion](stats, seed)
    unknown_LE1 = (stats.tokens_LE == 0).unsqueeze(-1)
    return Scores(torch.where(unknown_LE1, magnitude(stats).neurons_LEF, scores.neurons_LEF), scores.groups_AG)


def _best(scores: Tensor, number: int) -> Tensor:
    """Indices of the `number` highest scores along the last axis, ascending; ties go to the lower index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :number].sort(dim=-1).values


def _summaries(
    stats: ExpertStats, scores: Scores, unknown_LE: Tensor, neurons: Mapping[int, Tensor], groups: Mapping[int, Tensor]
) -> list[LayerSummary]:
    def share(values: Tensor, kept: Tensor) -> float:
        return (values.gather(-1, kept).sum() / values.sum().clamp(min=1e-300)).item()

    summaries = []
    rows = {layer: row for row, layer in enumerate(stats.meta.layers)}
    for layer in range(scores.groups_AG.shape[0]):
        row = rows.get(layer)
        summaries.append(
            LayerSummary(
                index=layer,
                neuron_score_kept=share(scores.neurons_LEF[row], neurons[layer]) if layer in neurons else None,
                unknown_experts=int(unknown_LE[row].sum()) if row is not None else 0,
                groups_kept=groups[layer].tolist() if layer in groups else None,
                group_score_kept=share(scores.groups_AG[layer], groups[layer]) if layer in groups else None,
            )
        )
    return summaries


def alignment_note(width: int) -> str:
    """Which kernels and quantised formats a width opens, in one line."""
    opens = [step for step in KERNELS if width % step == 0]
    closed = [f"{step} ({why})" for step, why in KERNELS.items() if width % step]
    note = f"width {width} is a multiple of {', '.join(map(str, [ALIGNMENT, *opens]))}"
    return f"{note}; not of {'; '.join(closed)}" if closed else note
