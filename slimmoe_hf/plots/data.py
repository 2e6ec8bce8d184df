"""Read finished runs into what their pictures show. Nothing is drawn here.

Shape letters: L layers with experts, E experts, E' the experts kept, F expert width, F' the width kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from slimmoe_hf.criteria import CRITERIA, expert_ranking, of_kept_experts, ranking
from slimmoe_hf.lineage import public_name
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.plots.models import Kept, KeptStage, Picture, Scores, ScoreStage
from slimmoe_hf.plots.ranks import stable_rank_picture
from slimmoe_hf.plots.recovery import (
    Collapse,
    DriftStage,
    LoadMap,
    Losses,
    LossStage,
    QualitySize,
    RouterLoads,
    SizePoint,
    SizeRun,
)
from slimmoe_hf.plots.runs import Run, length, ranks_of_merging, read_run, run_names
from slimmoe_hf.routing import COLLAPSED, collapsed_experts
from slimmoe_hf.stats import ExpertStats

BINS = 48
_UNITS = {"taylor": "nats", "fisher": "nats²"}
# What must be equal for two losses to stand on one axis; the path of the text need not, its hash must.
_MEASURED_ON = ("split", "max_length", "rows", "tokens", "documents", "stream_tokens", "stream_bytes", "dtype")


def read_pictures(paths: Sequence[Path]) -> tuple[dict[str, Picture], list[str]]:
    """Everything that can be drawn of some runs.

    Args:
        paths: Folders of finished runs.

    Returns:
        Pictures by name (of several runs `RUN/NAME`, but for those that show all), and a line for each that a run has
        no data for.

    Raises:
        ValueError: As `read_run`; no runs, one given twice, or runs whose losses cannot stand on one axis.
    """
    names = run_names(paths)
    for path, name in zip(paths, names, strict=True):
        if ranks := ranks_of_merging(path):
            if len(paths) > 1:
                raise ValueError(f"{path}: a run for an encoder-decoder is drawn alone. Give it without the others.")
            shown = stable_rank_picture(name, ranks)
            return {shown.name: shown}, [f"{name}: of a run for an encoder-decoder only stable ranks are drawn."]
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    together = quality_size(runs)
    pictures: dict[str, Picture] = {}
    notes = []
    for run in runs:
        folder = f"{run.name}/" if len(runs) > 1 else ""
        for picture, without in _of_one_run(run):
            if picture is None:
                notes.append(f"{run.name}: {without}")
            else:
                pictures[folder + picture.name] = picture
    return {**pictures, together.name: together}, notes


def _of_one_run(run: Run) -> list[tuple[Picture | None, str]]:
    """The pictures of one run; None, and what to say, where it has no data for one."""
    kept, scores = [], []
    for number, plan in enumerate(run.plans, 1):
        file = run.path / f"stage-{number}" / "stats.safetensors"
        if not file.exists():  # large, and no longer needed: some people delete them
            continue
        stats = ExpertStats.load(file)
        same = {"model_sha256", "data_sha256", "loss", "teacher_sha256", "family"}
        if stats.meta.model_dump(include=same) != plan.meta.model_dump(include=same):
            raise ValueError(f"{file}: not the statistics that {file.parent / 'plan'} was made from. Put those back.")
        kept.append(kept_stage(number, stats, plan))
        if plan.neurons:
            scores.append(score_stage(number, stats, plan))
    gone = "the statistics (stage-N/stats.safetensors) are gone"
    before, losses, router = run.plans[0].meta, loss_curves(run), router_loads(run)
    return [
        (Kept(run=run.name, family=before.family, num_layers=before.before.layers, stages=kept) if kept else None,
         f"kept is left out: {gone}."),
        (Scores(run=run.name, stages=scores) if scores else None,
         f"scores is left out: {gone if not kept else 'no stage narrows the experts'}."),
        (router, "router_load is left out: the run measured no expert load."),
        (losses, "losses is left out: the trainer logged none. Lower logging_steps."),
    ]  # fmt: skip


def kept_stage(number: int, stats: ExpertStats, plan: CompressionPlan) -> KeptStage:
    """What a plan kept, as shares of the scores that decided.

    Args:
        number: The stage.
        stats: What was scored.
        plan: What was decided.
    """
    meta, layers = plan.meta, stats.meta.layers
    if meta.expert_criterion is not None:
        own_LE = expert_ranking(stats, meta.expert_criterion, meta.seed).clamp(min=0)  # of unreached experts: nothing
    else:
        own_LE = CRITERIA[meta.criterion](stats, meta.seed).neurons_LEF.sum(-1)
    stay_LE = [plan.experts.get(layer, torch.arange(meta.before.num_experts)) for layer in layers]
    share_LE = torch.zeros_like(own_LE).scatter_(-1, torch.stack(stay_LE), 1.0)
    dropped = [(layers[row], expert) for row, expert in (share_LE == 0).nonzero().tolist()]
    if plan.neurons:
        scores_LEF = of_kept_experts(ranking(stats, meta.criterion, meta.seed).neurons_LEF, layers, plan.experts)
        kept_LE = scores_LEF.gather(-1, _kept(stats, plan)).sum(-1) / scores_LEF.sum(-1).clamp(min=1e-300)
        share_LE.scatter_(-1, torch.stack(stay_LE), kept_LE)
    return KeptStage(
        stage=number, criterion=meta.criterion, expert_criterion=meta.expert_criterion, calibration_loss=meta.loss,
        width_before=meta.before.expert_width, width_after=meta.after.expert_width,
        groups_before=meta.before.kv_groups, groups_after=meta.after.kv_groups,
        experts_before=meta.before.num_experts, experts_after=meta.after.num_experts,
        dropped=dropped,
        layers=stats.meta.layers,
        kept_share=_rounded(share_LE),
        score_share=_rounded(own_LE / own_LE.mean(-1, keepdim=True).clamp(min=1e-300)),
        unreached=[(stats.meta.layers[row], expert) for row, expert in (stats.tokens_LE == 0).nonzero().tolist()],
        groups_kept=[plan.groups[n].tolist() if n in plan.groups else [] for n in range(meta.before.layers) if plan.groups],
    )  # fmt: skip


def score_stage(number: int, stats: ExpertStats, plan: CompressionPlan) -> ScoreStage:
    """The histogram of the scores by which a plan kept and dropped neurons, of the experts that stay.

    The axis begins where all but a thousandth of the positive scores lie above; what is below, zeros too, is counted.

    Args:
        number: The stage.
        stats: What was scored.
        plan: What was decided; it narrows the experts.
    """
    meta = plan.meta
    layers, kept_LEf = stats.meta.layers, _kept(stats, plan)
    scores_LEF = of_kept_experts(ranking(stats, meta.criterion, meta.seed).neurons_LEF, layers, plan.experts)
    reached_LE = of_kept_experts(stats.tokens_LE, layers, plan.experts) > 0
    stays_LEF = torch.zeros_like(scores_LEF, dtype=torch.bool).scatter_(-1, kept_LEf, True)
    cuts = scores_LEF.gather(-1, kept_LEf).amin(-1)[reached_LE]
    kept, dropped = scores_LEF[reached_LE.unsqueeze(-1) & stays_LEF], scores_LEF[reached_LE.unsqueeze(-1) & ~stays_LEF]
    every = torch.cat([kept, dropped])
    positive = every[every > 0].sort().values
    low, high = (
        (positive[len(positive) // 1000], positive[-1]) if len(positive) else (torch.tensor(0.1), torch.tensor(1.0))
    )
    edges = torch.linspace(float(low.log10()), float(high.log10()) + 1e-9, BINS + 1, dtype=torch.float64)

    def count(values: Tensor) -> tuple[list[int], int]:
        inside = values[values >= low]
        return torch.histogram(inside.log10(), edges).hist.long().tolist(), len(values) - len(inside)

    (kept_B, kept_below), (dropped_B, dropped_below) = count(kept), count(dropped)
    return ScoreStage(
        stage=number, criterion=meta.criterion, unit=_UNITS.get(meta.criterion, "arbitrary units"),
        edges=[float(f"{10**edge:.6g}") for edge in edges.tolist()],
        kept=kept_B, dropped=dropped_B, kept_below=kept_below, dropped_below=dropped_below,
        zeros=int((every == 0).sum()),
        cut_lowest=float(cuts.min()), cut_median=float(cuts.median()), cut_highest=float(cuts.max()),
        kept_median=float(kept.median()), dropped_median=float(dropped.median()),
        unreached=int((~reached_LE).sum()),
    )  # fmt: skip


def _kept(stats: ExpertStats, plan: CompressionPlan) -> Tensor:
    """Indices of the neurons that stay, `[L, E', F']`."""
    return torch.stack([plan.neurons[layer] for layer in stats.meta.layers])


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.tolist()]


def router_loads(run: Run) -> RouterLoads | None:
    """Expert load before and after, and while it was trained; None where a run has neither."""
    ends = [run.report.models[0], run.after_training[-1]]
    maps = [LoadMap(model=m.name, layers=m.router_layers, load=m.router_load) for m in ends if m.router_load]
    layers = maps[-1].layers if ends[-1].router_load else _layers_with_experts(run)
    stages, offset = [], 0
    for number, history in enumerate(run.histories, 1):
        logged = [(entry.step, torch.tensor(entry.router_load)) for entry in history if entry.router_load]
        if logged and layers:
            stages.append(_drift(number, offset, logged))
        offset += length(history)
    alike = len({tuple(each.layers) for each in maps}) == 1
    maps = maps if len(maps) == len(ends) and alike else []  # a teacher with other layers is another model
    if not maps and not stages:
        return None
    already = set(collapsed_experts(torch.tensor(maps[0].load))) if maps else set()
    in_teacher = len(already)
    if maps and len(maps[0].load[0]) != len(
        maps[1].load[0]
    ):  # experts were dropped, and those that stay have new numbers
        already = set()
    starved = _starved_in_training(run) if stages else {}
    if maps:
        load_LE = torch.tensor(maps[-1].load)
        starved |= {
            place: (float(load_LE[place]), "on held-out text after the last stage")
            for place in collapsed_experts(load_LE)
        }
    collapsed = [
        Collapse(layer=layers[row], expert=expert, load=round(load, 6), where=where)
        for (row, expert), (load, where) in sorted(starved.items(), key=lambda item: item[1][0])
        if (row, expert) not in already
    ]
    return RouterLoads(
        run=run.name, layers=layers, num_layers=run.plans[0].meta.before.layers, threshold=COLLAPSED, maps=maps, stages=stages,
        collapsed=collapsed, starved_in_teacher=in_teacher,
    )  # fmt: skip


def _layers_with_experts(run: Run) -> list[int]:
    """Where a report does not say: the layers that a plan narrows, or those of the first stage's statistics."""
    file = run.path / "stage-1" / "stats.safetensors"
    narrowed = sorted(run.plans[0].neurons)
    return narrowed or (ExpertStats.load(file).meta.layers if file.exists() else [])


def _drift(number: int, offset: int, logged: list[tuple[int, Tensor]]) -> DriftStage:
    least = [load_LE.min(dim=1) for _, load_LE in logged]
    most = [load_LE.max(dim=1) for _, load_LE in logged]
    return DriftStage(
        stage=number, offset=offset, steps=[step for step, _ in logged],
        least=_rounded(torch.stack([row.values for row in least])),
        least_expert=[row.indices.tolist() for row in least],
        most=_rounded(torch.stack([row.values for row in most])),
        most_expert=[row.indices.tolist() for row in most],
    )  # fmt: skip


def _starved_in_training(run: Run) -> dict[tuple[int, int], tuple[float, str]]:
    """`(row, expert)` of every expert that starved at some log -> its lowest load, and where that was."""
    found: dict[tuple[int, int], tuple[float, str]] = {}
    for number, history in enumerate(run.histories, 1):
        loads = [(entry.step, torch.tensor(entry.router_load)) for entry in history if entry.router_load]
        for step, load_LE in loads:
            for place in collapsed_experts(load_LE):
                load = float(load_LE[place])
                if load < found.get(place, (torch.inf, ""))[0]:
                    end = float(loads[-1][1][place])
                    found[place] = (load, f"at step {step} of stage {number} ({end:.1%} at its end)")
    return found


def loss_curves(run: Run) -> Losses | None:
    """The losses that the trainer logged, and those measured on held-out text; None where it logged none."""
    stages, offset = [], 0
    both = zip(run.histories, run.before_training, run.after_training, strict=True)
    for number, (history, slimmed, distilled) in enumerate(both, 1):
        train = [
            (e.step, e.loss, e.kl, e.ce)
            for e in history
            if e.loss is not None and e.kl is not None and e.ce is not None
        ]
        looked = [(e.step, e.eval_kl, e.eval_ce) for e in history if e.eval_kl is not None and e.eval_ce is not None]
        if train:
            stages.append(
                LossStage(
                    stage=number, offset=offset, length=length(history),
                    steps=[row[0] for row in train], loss=[row[1] for row in train],
                    kl=[row[2] for row in train], ce=[row[3] for row in train],
                    eval_steps=[row[0] for row in looked], eval_kl=[row[1] for row in looked],
                    eval_ce=[row[2] for row in looked], slimmed=slimmed.loss, distilled=distilled.loss,
                )
            )  # fmt: skip
        offset += length(history)
    if not stages:
        return None
    return Losses(run=run.name, split=run.report.evaluation.split, teacher=run.report.models[0].loss, stages=stages)


def quality_size(runs: Sequence[Run]) -> QualitySize:
    """Held-out loss against size of every model of some runs.

    Raises:
        ValueError: Two runs were measured on different text, or have different teachers; it says what differs.
    """
    for first, second in pairwise(runs):
        if differences := _differences(first, second):
            raise ValueError(
                f"{first.name} and {second.name} cannot stand on one axis: they differ in {'; '.join(differences)}. Plot "
                "them one by one."
            )
    evaluation = runs[0].report.evaluation
    return QualitySize(
        data=public_name(evaluation.data), split=evaluation.split, tokens=evaluation.tokens,
        runs=[
            SizeRun(
                run=run.name,
                points=[
                    SizePoint(
                        model=model.name, step=model.step, total_parameters=model.total_parameters,
                        active_parameters=model.active_parameters, loss=model.loss, bits_per_byte=model.bits_per_byte,
                    )
                    for model in run.report.models
                ],
            )
            for run in runs
        ],
    )  # fmt: skip


def _differences(first: Run, second: Run) -> list[str]:
    """What keeps two runs' losses from being compared."""
    one, other = first.report.evaluation.model_dump(), second.report.evaluation.model_dump()
    found = [f"evaluation {key} ({one[key]} and {other[key]})" for key in _MEASURED_ON if one[key] != other[key]]
    found = found if len(found) <= 3 else [*found[:3], f"{len(found) - 3} more of what they were measured on"]
    texts = [run.inputs.get("test data", "")[:12] for run in (first, second)]
    if texts[0] != texts[1] and not found:
        found.append(f"the held-out text (sha256 {texts[0]}... and {texts[1]}...)")
    teachers = [run.report.models[0].teacher_sha256[:12] for run in (first, second)]
    if teachers[0] != teachers[1]:
        found.append(f"the teacher (sha256 {teachers[0]}... and {teachers[1]}...)")
    return found
