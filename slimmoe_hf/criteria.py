"""Scores: plain functions from `ExpertStats` to one number per neuron and one per key/value group. Higher is kept.

Neurons compete within their expert, groups within their layer. A group's score is the sum over its query heads.

Shape letters: L layers with experts, E experts, F expert width, A layers with attention, H query heads, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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


def taylor(stats: ExpertStats, seed: int = 0) -> Scores:
    """Sum over sequences of the absolute mask gradient, in nats: first-order change of the loss (SlimMoE, 2506.18349).

    The paper does not print its formula; taking the absolute value per sequence is our choice.
    """
    return Scores(stats.taylor_LEF, _by_group(stats, stats.head_taylor_AH))


def fisher(stats: ExpertStats, seed: int = 0) -> Scores:
    """Sum over sequences of the squared mask gradient: the diagonal of the empirical Fisher matrix of the masks."""
    return Scores(stats.fisher_LEF, _by_group(stats, stats.head_fisher_AH))


def output_fisher(stats: ExpertStats, seed: int = 0) -> Scores:
    """Mean a^2 times mean g^2 per routed token: expected squared change of the loss (HEAPr; the factorisation is ours).

    For groups the analogue on the heads' outputs (our choice).
    """
    neurons = _per_routed_token(stats, stats.act_sq_LEF) * _per_routed_token(stats, stats.grad_sq_LEF)
    heads = stats.head_act_sq_AH * stats.head_grad_sq_AH / stats.meta.tokens**2
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
    neurons = torch.rand(stats.taylor_LEF.shape, generator=generator, dtype=torch.float64)
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
