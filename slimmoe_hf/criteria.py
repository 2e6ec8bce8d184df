"""Scores: plain functions from `ExpertStats` to one number per neuron, per key/value group, or per expert. Higher is kept.

Neurons compete within their expert, groups and experts within their layer. A group's score is the sum over its query
heads. `CRITERIA` score neurons and groups, `EXPERT_CRITERIA` experts; a name in both means the same of each.

Shape letters: L layers with experts, E experts, F expert width, A layers with attention, H query heads, G groups.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slimmoe_hf.defaults import CALIBRATION_LOSS, EXPERT_CRITERION, NO_LOSS
from slimmoe_hf.stats import ExpertStats


class Scores(NamedTuple):
    """Non-negative scores, `neurons_LEF` and `groups_AG`."""

    neurons_LEF: Tensor
    groups_AG: Tensor


Criterion = Callable[[ExpertStats, int], Scores]


def _by_group(stats: ExpertStats, values_AH: Tensor) -> Tensor:
    """Sum over a group's query heads, which are consecutive. `[A, H] -> [A, G]`."""
    layers, groups = stats.group_norm_AG.shape
    return values_AH.view(layers, groups, -1).sum(-1)


def _per_routed_token(stats: ExpertStats, sums_LEF: Tensor) -> Tensor:
    return sums_LEF / stats.tokens_LE.clamp(min=1).unsqueeze(-1)


def of_gradients(values: Tensor | None, what: str, instead: str | None = None) -> Tensor:
    """A sum over gradients, where the statistics have it.

    Args:
        values: Of the statistics.
        what: Asks for it, for people.
        instead: What can be done with these, for people; None is another criterion.

    Raises:
        ValueError: They were taken without gradients.
    """
    if values is None:
        forward = [name for name in (*CRITERIA, *EXPERT_CRITERIA) if name not in OF_GRADIENTS]
        instead = instead or f"take a criterion of: {', '.join(dict.fromkeys(forward))}"
        raise ValueError(
            f"{what} looks at gradients, and these statistics were scored without (loss {NO_LOSS}). Score again with --loss "
            f"{CALIBRATION_LOSS}, or {instead}."
        )
    return values


def taylor(stats: ExpertStats, seed: int = 0) -> Scores:
    """Sum over sequences of the absolute mask gradient, in nats: first-order change of the loss (SlimMoE, 2506.18349).

    The paper does not print its formula; taking the absolute value per sequence is our choice.
    """
    neurons, heads = (of_gradients(each, "criterion 'taylor'") for each in (stats.taylor_LEF, stats.head_taylor_AH))
    return Scores(neurons, _by_group(stats, heads))


def fisher(stats: ExpertStats, seed: int = 0) -> Scores:
    """Sum over sequences of the squared mask gradient: the diagonal of the empirical Fisher matrix of the masks."""
    neurons, heads = (of_gradients(each, "criterion 'fisher'") for each in (stats.fisher_LEF, stats.head_fisher_AH))
    return Scores(neurons, _by_group(stats, heads))


def output_fisher(stats: ExpertStats, seed: int = 0) -> Scores:
    """Mean a^2 times mean g^2 per routed token: expected squared change of the loss (HEAPr; the factorisation is ours).

    For groups the analogue on the heads' outputs (our choice).
    """
    name = "criterion 'output_fisher'"
    grad_sq_LEF, grad_sq_AH = (of_gradients(each, name) for each in (stats.grad_sq_LEF, stats.head_grad_sq_AH))
    neurons = _per_routed_token(stats, stats.act_sq_LEF) * _per_routed_token(stats, grad_sq_LEF)
    heads = stats.head_act_sq_AH * grad_sq_AH / stats.meta.tokens**2
    return Scores(neurons, _by_group(stats, heads))


def energy(stats: ExpertStats, seed: int = 0) -> Scores:
    """Root mean square of (gate weight x activation) times the norm of the `W_down` column (as in CAMERA).

    For groups the analogue: rms of a head's output times the norm of its `o_proj` columns (our choice).
    """
    neurons = _per_routed_token(stats, stats.gated_act_sq_LEF).sqrt() * stats.down_norm_LEF
    heads = (stats.head_act_sq_AH / stats.meta.tokens).sqrt() * stats.head_out_norm_AH
    return Scores(neurons, _by_group(stats, heads))


def activation(stats: ExpertStats, seed: int = 0) -> Scores:
    """Root mean square of the activation; of the heads' outputs for a group."""
    groups = _by_group(stats, stats.head_act_sq_AH / stats.meta.tokens).sqrt()
    return Scores(_per_routed_token(stats, stats.act_sq_LEF).sqrt(), groups)


def magnitude(stats: ExpertStats, seed: int = 0) -> Scores:
    """Norm of all weights of a neuron, or of a group's q, k, v and o. Needs no data."""
    return Scores((stats.input_norm_LEF.square() + stats.down_norm_LEF.square()).sqrt(), stats.group_norm_AG)


def random(stats: ExpertStats, seed: int = 0) -> Scores:
    """Uniform noise from `seed`: the baseline every comparison must carry."""
    generator = torch.Generator().manual_seed(seed)
    neurons = torch.rand(stats.act_sq_LEF.shape, generator=generator, dtype=torch.float64)
    return Scores(neurons, torch.rand(stats.group_norm_AG.shape, generator=generator, dtype=torch.float64))


CRITERIA: dict[str, Criterion] = {
    "taylor": taylor,
    "fisher": fisher,
    "output_fisher": output_fisher,
    "energy": energy,
    "activation": activation,
    "magnitude": magnitude,
    "random": random,
}


ExpertCriterion = Callable[[ExpertStats, int], Tensor]


def _stored(stats: ExpertStats, name: str, values_LE: Tensor | None) -> Tensor:
    if values_LE is None:
        raise ValueError(
            f"criterion {name!r} needs a sum that these statistics lack: they are from before experts were scored. Score "
            "again, or use another criterion."
        )
    return values_LE


def expert_taylor(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Sum over an expert's neurons of `taylor`, as a group's is over its heads (our choice). `[L, E]`, nats."""
    return taylor(stats).neurons_LEF.sum(-1)


def expert_fisher(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Sum over an expert's neurons of `fisher`. `[L, E]`."""
    return fisher(stats).neurons_LEF.sum(-1)


def expert_output_fisher(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Sum over an expert's neurons of `output_fisher`, times its routed tokens, which makes experts comparable. `[L, E]`."""
    return output_fisher(stats).neurons_LEF.sum(-1) * stats.tokens_LE


def frequency(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Routed tokens. `[L, E]`."""
    return stats.tokens_LE


def soft_frequency(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Sum over all tokens of the router's probability, chosen or not (SEER-MoE's soft counting, 2404.05089). `[L, E]`."""
    return _stored(stats, "soft_frequency", stats.probability_LE)


def reap(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Mean over routed tokens of gate weight times the norm of the expert's output (REAP, 2510.13999). `[L, E]`."""
    return _stored(stats, "reap", stats.gated_norm_LE) / stats.tokens_LE.clamp(min=1)


def expert_magnitude(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Norm of all weights of an expert. Needs no data. `[L, E]`."""
    return magnitude(stats).neurons_LEF.square().sum(-1).sqrt()


def expert_random(stats: ExpertStats, seed: int = 0) -> Tensor:
    """Uniform noise from `seed`: the baseline. `[L, E]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(stats.tokens_LE.shape, generator=generator, dtype=torch.float64)


EXPERT_CRITERIA: dict[str, ExpertCriterion] = {
    "taylor": expert_taylor,
    "fisher": expert_fisher,
    "output_fisher": expert_output_fisher,
    "frequency": frequency,
    "soft_frequency": soft_frequency,
    "reap": reap,
    "magnitude": expert_magnitude,
    "random": expert_random,
}
OF_GRADIENTS = ("taylor", "fisher", "output_fisher")
"""Criteria of neurons, groups and experts that the calibration loss matters to; the others look forward only, or at weights."""
WITHOUT_DATA = ("magnitude", "random")
"""Criteria that say something of experts that no calibration token reached too."""


def expert_ranking(stats: ExpertStats, criterion: str, seed: int = 0) -> Tensor:
    """The scores that decide which experts stay, `[L, E]`.

    An expert that no calibration token reached is unknown, not worthless: it comes after all that are known, and among
    its like by its weight norm, as a number between -1 and 0.

    Args:
        stats: What was scored.
        criterion: A name in `EXPERT_CRITERIA`.
        seed: For `random`.
    """
    scores_LE = EXPERT_CRITERIA[criterion](stats, seed)
    if criterion in WITHOUT_DATA:
        return scores_LE
    norm_LE = expert_magnitude(stats)
    return torch.where(stats.tokens_LE > 0, scores_LE, norm_LE / (1 + norm_LE.max()) - 1)


def ranking(stats: ExpertStats, criterion: str, seed: int = 0) -> Scores:
    """The scores that decide which neurons and groups stay: weight norms for neurons of experts that no token reached.

    Args:
        stats: What was scored.
        criterion: A name in `CRITERIA`.
        seed: For `random`.
    """
    scores = CRITERIA[criterion](stats, seed)
    unknown_LE1 = (stats.tokens_LE == 0).unsqueeze(-1)
    return Scores(torch.where(unknown_LE1, magnitude(stats).neurons_LEF, scores.neurons_LEF), scores.groups_AG)


def check_criteria(criterion: str, expert_criterion: str | None = None, *, neurons: bool, experts: bool) -> str:
    """The criterion that experts are chosen by: `expert_criterion`, or `criterion`, or `reap` where that one scores none.

    Args:
        criterion: Of neurons and groups.
        expert_criterion: Of experts.
        neurons: Neurons or groups are to be cut.
        experts: Experts are.

    Raises:
        ValueError: An unknown name, or a criterion that does not score what is to be cut.
    """
    known = list(dict.fromkeys([*CRITERIA, *EXPERT_CRITERIA]))
    of_neurons_alone = criterion in CRITERIA.keys() - EXPERT_CRITERIA.keys()
    chosen = expert_criterion or (EXPERT_CRITERION if of_neurons_alone else criterion)
    for name in (criterion, chosen):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"criterion {name!r} is unknown; use one of {', '.join(known)}.{hint}")
    if criterion not in CRITERIA and neurons:
        raise ValueError(
            f"criterion {criterion!r} scores whole experts only. Choose neurons and groups by one of {', '.join(CRITERIA)}, "
            f"and experts by expert_criterion={criterion!r}."
        )
    if chosen not in EXPERT_CRITERIA and (experts or expert_criterion is not None):
        raise ValueError(
            f"criterion {chosen!r} does not score whole experts. Set expert_criterion to one of {', '.join(EXPERT_CRITERIA)}."
        )
    return chosen


def calibration_loss(
    asked: str | None, criterion: str, expert_criterion: str | None = None, *, searched: bool = False
) -> str:
    """What a sweep differentiates: what was asked for, or else nothing where nobody looks at gradients.

    Args:
        asked: The loss that somebody named; None is nobody.
        criterion: Of neurons and groups. expert_criterion: Of experts, where it has one of its own.
        searched: Shapes within a budget are compared, by `output_fisher`.

    Raises:
        ValueError: `none`, where gradients are looked at.
    """
    looking = [f"criterion {name!r}" for name in (criterion, expert_criterion) if name in OF_GRADIENTS]
    looking += ["a search for a budget"] * searched
    if asked is None:
        return CALIBRATION_LOSS if looking else NO_LOSS
    if asked == NO_LOSS and looking:
        raise ValueError(
            f"loss {NO_LOSS!r}: {looking[0]} looks at gradients, and it has none. Leave the loss out, or take {CALIBRATION_LOSS}."
        )
    return asked


class Chosen(NamedTuple):
    """What stays of every layer, and its share of the layer's summed score."""

    kept: Mapping[int, Tensor]
    shares: Mapping[int, float]

    def listed(self, layer: int) -> list[int] | None:
        """What stays of one layer; None where all does."""
        return self.kept[layer].tolist() if layer in self.kept else None


def above(scores: Tensor, first: Tensor) -> Tensor:
    """The same scores, but those of `first`, a mask of the same shape, all lifted above the others, in their own order."""
    return torch.where(first, scores + (scores.max() - scores.min() + 1), scores)


def dealt(scores: Tensor, groups: int) -> Tensor:
    """The same scores, but the first of each of `groups` stretches of a row above every second one, and so on."""
    if groups == 1:
        return scores
    order = torch.sort(scores.unflatten(-1, (groups, -1)), dim=-1, descending=True, stable=True).indices
    return scores - order.argsort(dim=-1).flatten(-2) * (scores.max() - scores.min() + 1)


def choose(scores: Tensor, number: int, layers: Iterable[int], first: Tensor | None = None, groups: int = 1) -> Chosen:
    """The `number` highest scores along the last axis, ascending; ties go to the lower index.

    Args:
        scores: A row, or rows, per layer.
        number: How many stay.
        layers: Their absolute indices.
        first: Of what is marked here, nothing goes while anything else of its stretch is there.
        groups: Of each of so many stretches of a row as many stay.
    """
    lifted = dealt(scores if first is None else above(scores, first), groups)
    order = torch.sort(lifted, dim=-1, descending=True, stable=True).indices
    best, known, layers = order[..., :number].sort(dim=-1).values, scores.clamp(min=0), list(layers)
    rows = zip(known, best, strict=True)
    shares = [(row.gather(-1, kept).sum() / row.sum().clamp(min=1e-300)).item() for row, kept in rows]
    return Chosen(dict(zip(layers, best, strict=True)), dict(zip(layers, shares, strict=True)))


def choose_anywhere(scores_LE: Tensor, number: int) -> list[Tensor]:
    """Of every layer the highest score, and then the highest of all layers, until `number` a layer stay on average.

    The count is exact; ties go to the lower layer, then to the lower index. (M-SMoE; the paper's threshold loses ties.)

    Args:
        scores_LE: Comparable between layers.
        number: Of those that stay, the mean over the layers.

    Returns:
        What stays of each layer, ascending.
    """
    layers, size = scores_LE.shape
    best_LE = torch.sort(scores_LE, dim=-1, descending=True, stable=True).indices
    marked_LE = scores_LE.scatter(-1, best_LE[:, :1], torch.inf)
    order = torch.sort(marked_LE.flatten(), descending=True, stable=True).indices
    kept = order[: number * layers].sort().values
    return [kept[kept // size == layer] % size for layer in range(layers)]


def of_kept_experts(values: Tensor, layers: Iterable[int], experts: Mapping[int, Tensor]) -> Tensor:
    """Of values per expert, those of the experts that stay: `[L, E, ...] -> [L, E', ...]`.

    Args:
        values: A row per layer with experts. layers: Their absolute indices.
        experts: Of a plan.
    """
    if not experts:
        return values
    return torch.stack([row[experts[layer]] for row, layer in zip(values, layers, strict=True)])
