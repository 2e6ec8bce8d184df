"""What a cut is predicted to lose, from the statistics of one sweep: before anything is cut, and for every shape at once.

What goes is added up in nats per token: half the mean of a^2 g^2 (a an activation, g = dL/da), the change of the loss at second
order when it is zeroed, with the Fisher matrix for the Hessian (Optimal Brain Damage, LeCun 1989; of experts HEAPr; that a^2 and
g^2 are averaged apart is our `output_fisher`). Three sums are kept apart, because one unit of them is not worth the same:
neurons that experts lose which stay, neurons that go with a whole expert, whose tokens others get, and heads. The loss grows by

    (n * narrowing + d * dropping + g * groups) ** POWER

with weights that are fitted to a few measured shapes. Only differences between shapes of one model mean anything.

Shape letters: L layers with experts, E experts, F expert width, A layers with attention, G key/value groups, W widths,
N measured shapes, P parts of a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from slimmoe_hf.criteria import above, dealt, expert_ranking, output_fisher, ranking
from slimmoe_hf.families import config_from, routing_groups
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.super_experts import super_experts

POWER = 1.5
"""What goes together adds up worse than each by itself: a sum of squares leaves out what the parts have in common. Our choice;
of 1, 1.5, 2 and 2.5 it fits the small teacher best over a half, a quarter and an eighth of its experts' parameters."""


class Lost(NamedTuple):
    """What a shape takes of a model, nats per token at second order: of narrowed experts, with dropped ones, of attention."""

    narrowing: float
    dropping: float
    groups: float


class Weights(NamedTuple):
    """What one unit of each part of `Lost` is worth. Unfitted ones are ours, from the small teacher."""

    narrowing: float = 1.0
    dropping: float = 1.8
    groups: float = 0.08

    def predicted(self, lost: Lost) -> float:
        """What the loss grows by."""
        return float(sum(weight * part for weight, part in zip(self, lost, strict=True)) ** POWER)


def fitted(measured: Sequence[tuple[Lost, float]], before: Weights) -> Weights:
    """Weights for some measured shapes: non-negative least squares of the relative error of `growth ** (1 / POWER)`.

    Of a part that no shape was measured with, the weight keeps the ratio to the others that it has in `before`.

    Args:
        measured: What a shape takes, and what the loss grew by.
        before: Weights where nothing was measured.
    """
    known = [(lost, growth) for lost, growth in measured if growth > 0 and max(lost) > 0]
    if not known:
        return before
    lost_NP = np.array([lost for lost, _ in known])
    wanted_N1 = np.array([[growth ** (1 / POWER)] for _, growth in known])
    seen_P = (lost_NP > 0).any(axis=0)
    found_P = nnls(lost_NP[:, seen_P] / wanted_N1, np.ones(len(known)))[0]
    scale = found_P.sum() / np.array(before)[seen_P].sum()
    weights_P = np.array(before) * scale
    weights_P[seen_P] = found_P
    return Weights(*weights_P.tolist())


class Losses:
    """What every shape of a model takes of it, added up once."""

    def __init__(
        self, stats: ExpertStats, criterion: str, expert_criterion: str, seed: int, widths: Sequence[int]
    ) -> None:
        """Add up.

        Args:
            stats: Of the model.
            criterion: What chooses neurons and groups. expert_criterion: What chooses experts. seed: For `random`.
            widths: Those that will be asked for.
        """
        score, chosen = output_fisher(stats), ranking(stats, criterion, seed)
        neurons_LEF = _per_token(stats)
        left_LEF = _behind(neurons_LEF, chosen.neurons_LEF)
        groups, _ = routing_groups(config_from(stats.meta.config))
        experts_LE = dealt(above(expert_ranking(stats, expert_criterion, seed), super_experts(stats)), groups)
        order_LE = experts_LE.argsort(dim=-1, descending=True, stable=True)
        tails_LEW = left_LEF[..., list(widths)].gather(1, order_LE.unsqueeze(-1).expand(-1, -1, len(widths)))
        self.narrowing_EW = tails_LEW.cumsum(1).sum(0)
        self.dropping_E = _behind(left_LEF[..., 0], experts_LE).sum(0)
        self.groups_G = _behind(score.groups_AG.double() / 2, chosen.groups_AG).sum(0)
        self.places = {width: number for number, width in enumerate(widths)}

    def of(self, experts: int, width: int, groups: int) -> Lost:
        """What is lost with so many experts and groups a layer, of this width."""
        narrowing = self.narrowing_EW[experts - 1, self.places[width]]
        return Lost(float(narrowing), float(self.dropping_E[experts]), float(self.groups_G[groups]))


def wanted_widths(stats: ExpertStats, experts: dict[int, Tensor], width: int) -> dict[int, float]:
    """Where a model would want its neurons, if every layer could have a width of its own.

    As many neurons as `width` in every kept expert are chosen from all of them, of all layers, by what they are predicted to
    take; a layer's share of them is the width that it would want.

    Args:
        stats: Of the model.
        experts: Absolute layer index -> the experts that stay; layers that are not there keep all.
        width: What all have.

    Returns:
        Absolute layer index -> mean width.
    """
    rows = {
        layer: neurons_EF[experts[layer]] if layer in experts else neurons_EF
        for layer, neurons_EF in zip(stats.meta.layers, _per_token(stats), strict=True)
    }
    every = torch.cat([row.flatten() for row in rows.values()])
    chosen = torch.zeros(len(every)).index_fill(0, every.topk(width * sum(map(len, rows.values()))).indices, 1)
    parts = chosen.split([row.numel() for row in rows.values()])
    return {layer: float(part.sum()) / len(row) for (layer, row), part in zip(rows.items(), parts, strict=True)}


def _per_token(stats: ExpertStats) -> Tensor:
    """What each neuron is worth, `[L, E, F]`, nats per token of the text."""
    routed_LE1 = (stats.tokens_LE / stats.meta.tokens).unsqueeze(-1)
    return output_fisher(stats).neurons_LEF.double() * routed_LE1 / 2


def _behind(values: Tensor, scores: Tensor) -> Tensor:
    """What goes where the best 0, 1, 2, ... along the last axis stay: `[..., F] -> [..., F + 1]`."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    left = values.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(left, (0, 1))
