"""M-SMoE (arXiv 2310.01334): experts of a layer that do alike, aligned neuron by neuron, become one, weighted by usage.

What comes out is a plan like any other, with as many experts in every layer, or with as many on average (the paper's).
Which forms it can take on is in `merged_forms`. A stock checkpoint needs as many in every layer, and its routers keep the
rows of each group's dominant expert: another function than the paper's, whose routers keep all rows, so let the router train
in recovery.

Shape letters: L layers with experts, E experts, E' the merged experts, F expert width, D model width, P weights of a neuron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Literal, get_args

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimmoe_hf.blends import Blend, Merging
from slimmoe_hf.criteria import above, choose_anywhere, expert_ranking
from slimmoe_hf.factored import factorable, refuse_own_form
from slimmoe_hf.families import FAMILIES, ExpertLayout, family_of, moe_layers, shape_of
from slimmoe_hf.identity import model_fingerprint
from slimmoe_hf.limits import refuse_merging
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.super_experts import super_experts, super_experts_of

Reference = Literal["dominant", "first"]
Counts = Literal["uniform", "adaptive"]


def neuron_weights(experts: nn.Module, expert: int, layout: ExpertLayout) -> Tensor:
    """All weights of each neuron of one expert, `[F, P]`, float32: gate (if any) and up rows, and the `W_down` column."""
    into, out = (weight[expert].detach().float() for weight in layout.weights(experts).values())
    into, out = (into.T, out) if layout.transposed else (into, out.T)
    rows = layout.input_index(torch.arange(len(out), device=into.device).unsqueeze(-1), len(out))
    return torch.cat([into[rows].flatten(1), out], dim=-1)


def align(reference_FP: Tensor, other_FP: Tensor) -> Tensor:
    """The order of an expert's neurons in which they are most like another's: the assignment that maximises `<r_f, o_f>`.

    One order serves gate, up and down, so the inner product is over all of a neuron's weights (M-SMoE's cost for plain
    units, extended to gated ones).

    Args:
        reference_FP: Of the expert to be like. other_FP: Of the one to be ordered; both from `neuron_weights`.

    Returns:
        `[F]`: which neuron of the other stands at each place.
    """
    likeness_FF = (reference_FP @ other_FP.T).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(likeness_FF, maximize=True)[1]).long()


def _cosine(vectors_EX: Tensor) -> Tensor:
    unit_EX = nn.functional.normalize(vectors_EX.double(), dim=-1)
    return unit_EX @ unit_EX.T


def _by_router_logits(
    stats: ExpertStats, row: int, experts: nn.Module, router: nn.Module, layout: ExpertLayout, seed: int
) -> Tensor:
    """Cosine between experts' router logits over the calibration tokens, padding left out (the paper has it in)."""
    if stats.router_gram_LEE is None:
        raise ValueError("these statistics are from before router logits were compared. Score again.")
    gram_EE = stats.router_gram_LEE[row]
    norm_E = gram_EE.diagonal().clamp(min=1e-300).sqrt()
    return gram_EE / norm_E / norm_E.unsqueeze(-1)


def _by_router_rows(
    stats: ExpertStats, row: int, experts: nn.Module, router: nn.Module, layout: ExpertLayout, seed: int
) -> Tensor:
    """Cosine between the router's rows."""
    return _cosine(router.get_parameter(FAMILIES[stats.meta.family].router_weight).detach()).cpu()


def _by_weights(
    stats: ExpertStats, row: int, experts: nn.Module, router: nn.Module, layout: ExpertLayout, seed: int
) -> Tensor:
    """Cosine between all weights of two experts, each aligned to expert 0."""
    first_FP = neuron_weights(experts, 0, layout)
    aligned = [first_FP.flatten()]
    for expert in range(1, stats.tokens_LE.shape[1]):
        own_FP = neuron_weights(experts, expert, layout)
        aligned.append(own_FP[align(first_FP, own_FP).to(own_FP.device)].flatten())
    return _cosine(torch.stack(aligned)).cpu()


def _by_outputs(
    stats: ExpertStats, row: int, experts: nn.Module, router: nn.Module, layout: ExpertLayout, seed: int
) -> Tensor:
    """Cosine between the experts' mean outputs over all calibration tokens, routed or not (after HC-SMoE, 2410.08589)."""
    if stats.output_sum_LED is None:
        raise ValueError("similarity 'outputs' needs statistics from collect_stats(expert_outputs=True). Score again.")
    return _cosine(stats.output_sum_LED[row])


def _by_chance(
    stats: ExpertStats, row: int, experts: nn.Module, router: nn.Module, layout: ExpertLayout, seed: int
) -> Tensor:
    """Uniform noise: groups drawn by lot, the baseline every table must carry."""
    layers, number = stats.tokens_LE.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, number, number, generator=generator, dtype=torch.float64)[row]


Similarity = Callable[[ExpertStats, int, nn.Module, nn.Module, ExpertLayout, int], Tensor]
SIMILARITIES: dict[str, Similarity] = {
    "router_logits": _by_router_logits, "router_rows": _by_router_rows, "weights": _by_weights, "outputs": _by_outputs,
    "random": _by_chance,
}  # fmt: skip
"""`(stats, row of the layer, its experts, its router, layout, seed) -> [E, E]`, 1 where two experts are alike."""


def by_dominant(similarity_EE: Tensor, usage_E: Tensor, dominant: Sequence[int]) -> Tensor:
    """M-SMoE's groups: every expert joins the dominant one that it is most like. `[E]`: the number of its group."""
    owner_E = similarity_EE[:, list(dominant)].argmax(dim=-1)
    owner_E[list(dominant)] = torch.arange(len(dominant))
    return owner_E


def by_clusters(similarity_EE: Tensor, usage_E: Tensor, dominant: Sequence[int]) -> Tensor:
    """HC-SMoE's groups: hierarchical clustering, average linkage, cut where there are as many clusters as wanted. `[E]`."""
    distance_EE = (1 - (similarity_EE + similarity_EE.T) / 2).clamp(min=0).fill_diagonal_(0).numpy()
    if len(distance_EE) == 1:
        return torch.zeros(1, dtype=torch.long)
    tree = linkage(squareform(distance_EE, checks=False), method="average")
    return torch.from_numpy(cut_tree(tree, n_clusters=len(dominant)).flatten()).long()


GROUPINGS: dict[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {
    "dominant": by_dominant,
    "clusters": by_clusters,
}
"""`(similarity [E, E], usage [E], the E' most used experts) -> [E]`, the number of each expert's group."""


def plan_merge(
    model: PreTrainedModel,
    stats: ExpertStats,
    num_experts: int,
    *,
    counts: Counts = "uniform",
    similarity: str = "router_logits",
    grouping: str = "dominant",
    reference: Reference = "dominant",
    seed: int = 0,
) -> CompressionPlan:
    """Decide which experts of every layer become one; `merged_forms`, or `apply_plan` and `slim_checkpoint`, do it.

    Every expert's neurons are put in the order in which they are most like the reference's; then a group's weights are
    averaged, each expert by its share of the routed tokens, or evenly where no token reached any of them.

    Args:
        model: The model that was scored, for its weights.
        stats: From `collect_stats`.
        num_experts: E', how many stay in every layer; of adaptive counts the mean over the layers.
        counts: `uniform`, E' in every layer, which a stock checkpoint can hold; or `adaptive` (M-SMoE): of every layer the
            most used expert, and then the most used of all layers, by their share of a layer's routed tokens, until there
            are E' a layer. In Switch the first sparse encoder layer is then left alone, and not counted (paper).
        similarity: A name in `SIMILARITIES`.
        grouping: A name in `GROUPINGS`: `dominant` (M-SMoE) or `clusters` (HC-SMoE).
        reference: What an expert is aligned to: the `dominant` (most used) expert of its group (our choice), or the
            `first` of the layer (the paper's).
        seed: Of the similarity `random`.

    A super expert (`super_experts`) stays as it is, and no other joins it, while there is a dominant one for the others.

    Raises:
        ValueError: As `make_plan`; an unknown name; statistics of another model, or without what the similarity needs.
    """
    for name, given, known in (
        ("similarity", similarity, SIMILARITIES), ("grouping", grouping, GROUPINGS), ("counts", counts, get_args(Counts)),
    ):  # fmt: skip
        if given not in known:
            raise ValueError(f"{name} {given!r} is unknown; use one of {', '.join(known)}.")
    refuse_own_form(model)
    refuse_merging(model.config)
    if stats.meta.fingerprint not in (None, model_fingerprint(model)):
        raise ValueError("the statistics are of other weights than the model's. Score this model.")
    most_used = (_adaptive if counts == "adaptive" else _uniform)(model, stats, num_experts, seed)
    layout, supers = family_of(model.config).layout, super_experts_of(stats)
    experts, blends = {}, {}
    for row, (layer, module, router) in enumerate(moe_layers(model)):
        if layer not in most_used.experts:
            continue
        usage_E, likeness_EE = stats.tokens_LE[row], SIMILARITIES[similarity](stats, row, module, router, layout, seed)
        dominant = most_used.experts[layer].tolist()
        owner_E = _grouped(grouping, likeness_EE, usage_E, dominant, supers.get(layer, {}))
        experts[layer], owner_E = _leaders(owner_E, usage_E, dominant)
        blends[layer] = _blend(module, layout, owner_E, usage_E, experts[layer], reference)
    rows = dict(zip(stats.meta.layers, stats.tokens_LE, strict=True))
    summaries = [
        each.model_copy(update=_summary(rows[each.index], experts[each.index])) if each.index in experts else each
        for each in most_used.meta.layers
    ]
    merging = Merging(similarity=similarity, grouping=grouping, reference=reference, counts=counts)
    changes = {"layers": summaries, "merging": merging, "expert_criterion": "frequency"}
    return CompressionPlan(most_used.meta.model_copy(update=changes), {}, {}, experts, blends)


def _uniform(model: PreTrainedModel, stats: ExpertStats, num_experts: int, seed: int) -> CompressionPlan:
    """The most used experts of every layer."""
    plan = make_plan(stats, Target(num_experts=num_experts), "frequency", seed)
    everyone = torch.arange(plan.meta.before.num_experts)
    return dataclasses.replace(plan, experts={layer: plan.experts.get(layer, everyone) for layer in stats.meta.layers})


def _adaptive(model: PreTrainedModel, stats: ExpertStats, num_experts: int, seed: int) -> CompressionPlan:
    """Those of all layers together, but for layers that are left alone."""
    before = shape_of(model.config)
    if not 1 <= num_experts <= before.num_experts:
        raise ValueError(
            f"num_experts={num_experts} on average is not between 1 and the model's {before.num_experts} experts per layer."
        )
    plan = make_plan(stats, Target(num_experts=before.num_experts), "frequency", seed)
    merged = {id(module) for module in factorable(model).values()}
    rows = [row for row, (_, module, _) in enumerate(moe_layers(model)) if id(module) in merged]
    used_LE = stats.tokens_LE[rows] / stats.tokens_LE[rows].sum(-1, keepdim=True).clamp(min=1)
    known_LE = torch.where(stats.tokens_LE[rows] > 0, used_LE, expert_ranking(stats, "frequency")[rows])
    kept = choose_anywhere(above(known_LE, super_experts(stats)[rows]), num_experts)
    changes = {
        "target": Target(num_experts=num_experts),
        "after": dataclasses.replace(before, num_experts=num_experts),
    }
    layers = [stats.meta.layers[row] for row in rows]
    return dataclasses.replace(
        plan, meta=plan.meta.model_copy(update=changes), experts=dict(zip(layers, kept, strict=True))
    )


def _grouped(
    grouping: str, likeness_EE: Tensor, usage_E: Tensor, dominant: Sequence[int], supers: Collection[int]
) -> Tensor:
    """The number of each expert's group; a super expert has one of its own while a dominant one is left for the others."""
    alone = [expert for expert in dominant if expert in supers]
    leaders = [expert for expert in dominant if expert not in supers]
    if not alone or not leaders:
        return GROUPINGS[grouping](likeness_EE, usage_E, dominant)
    rest = [expert for expert in range(len(usage_E)) if expert not in alone]
    owner_E = torch.empty(len(usage_E), dtype=torch.long)
    owner_E[rest] = GROUPINGS[grouping](
        likeness_EE[rest][:, rest], usage_E[rest], [rest.index(expert) for expert in leaders]
    )
    owner_E[alone] = torch.arange(len(leaders), len(dominant))
    return owner_E


def _leaders(owner_E: Tensor, usage_E: Tensor, dominant: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The expert of each group whose router row stays: its most used; and the groups numbered in their order."""
    leaders = []
    for number in range(len(dominant)):
        group = torch.nonzero(owner_E == number).flatten()
        chosen = [expert for expert in group.tolist() if expert in dominant]  # one that no token reached may lead too
        leaders.append(max(chosen or group.tolist(), key=lambda expert: float(usage_E[expert])))
    kept, ranks = torch.tensor(leaders).sort()
    return kept, ranks.argsort()[owner_E]


def _summary(usage_E: Tensor, kept: Tensor) -> dict[str, object]:
    share = float(usage_E[kept].sum() / usage_E.sum().clamp(min=1))
    return {"experts_kept": kept.tolist(), "expert_score_kept": share}


def _blend(
    experts: nn.Module, layout: ExpertLayout, owner_E: Tensor, usage_E: Tensor, leaders: Tensor, reference: Reference
) -> Blend:
    """Shares by usage, and every expert's neurons in its reference's order."""
    total = torch.zeros(len(leaders), dtype=torch.float64).scatter_add_(0, owner_E, usage_E.double())
    number = torch.bincount(owner_E, minlength=len(leaders))
    used = total[owner_E] > 0
    share_E = torch.where(used, usage_E.double() / total[owner_E].clamp(min=1e-300), 1 / number[owner_E])
    orders = []
    for expert, group in enumerate(owner_E.tolist()):
        like = 0 if reference == "first" else int(leaders[group])
        own_FP = neuron_weights(experts, expert, layout)
        same = torch.arange(len(own_FP))
        orders.append(same if expert == like else align(neuron_weights(experts, like, layout), own_FP))
    return Blend(owner_E, share_E.float(), torch.stack(orders))
