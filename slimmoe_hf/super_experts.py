"""Super experts: the few whose outputs are out of all proportion, and without which a model falls apart.

Su et al. (Super Experts, arXiv 2507.23279) find them by the largest absolute value that `down_proj` puts out: above the 99.5th
percentile of all experts, and above a tenth of the largest of all. A percentile names someone in every model, so in its place
stands a rule that may name no one (our choice): an expert's largest output is `TIMES` the median of its layer, and as a
logarithm more than `DEVIATIONS` robust standard deviations from it (Iglewicz and Hoaglin's modified z-score, over all layers).

Shape letters: L layers with experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimmoe_hf.stats import ExpertStats

TIMES = 10.0
"""How many times the median of its layer (our choice)."""
DEVIATIONS = 3.5
"""Robust standard deviations from it (Iglewicz and Hoaglin, 1993)."""
OF_LARGEST = 0.1
"""At least this share of the largest output of all experts (2507.23279)."""


def output_excess(stats: ExpertStats) -> Tensor | None:
    """The largest output of every expert as a multiple of the median of its layer's experts, `[L, E]`.

    Experts that no calibration token reached are unknown: they have 0, and are left out of the median. None of statistics
    from before outputs were looked at.
    """
    most_LE = stats.output_max_LE
    if most_LE is None:
        return None
    known_LE = torch.where(most_LE > 0, most_LE, torch.nan)
    return (known_LE / known_LE.nanmedian(dim=-1, keepdim=True).values).nan_to_num(nan=0.0)


def super_experts(stats: ExpertStats) -> Tensor:
    """Which experts are super experts, `[L, E]`, bool; none of statistics from before outputs were looked at."""
    excess_LE, most_LE = output_excess(stats), stats.output_max_LE
    if excess_LE is None or most_LE is None or not bool((excess_LE > 0).any()):
        return torch.zeros_like(stats.tokens_LE, dtype=torch.bool)
    off_N = excess_LE[excess_LE > 0].log().abs()
    spread = 1.4826 * float(off_N.median())  # of a normal distribution this is the standard deviation
    far_LE = excess_LE.clamp(min=1).log() > DEVIATIONS * spread
    return far_LE & (excess_LE >= TIMES) & (most_LE >= OF_LARGEST * most_LE.max())


def super_experts_of(stats: ExpertStats) -> dict[int, dict[int, float]]:
    """Absolute layer index -> expert -> how many times the median of its layer its largest output is; layers that have any."""
    found, excess_LE = super_experts(stats), output_excess(stats)
    if excess_LE is None:
        return {}
    return {
        layer: {expert: round(float(excess[expert]), 1) for expert in marked.nonzero().flatten().tolist()}
        for layer, marked, excess in zip(stats.meta.layers, found, excess_LE, strict=True)
        if bool(marked.any())
    }
