"""How evenly the routers of a Mixture-of-Experts model spread their tokens.

For `evaluate.load`, whose scanner of imports knows `import X` and `from X import Y` on one line, and nothing else.

Shape letters: L layers with experts, E experts.
"""

from __future__ import annotations

import math

import datasets
import evaluate
import torch

from slimmoe_hf.routing import collapsed_experts, load_shares

_DESCRIPTION = """
Expert load, layer by layer: 1 is the load that every expert of a layer would have if all had the same.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of lists of int): a list for every layer: how often each of its experts was chosen, as
        `slimmoe_hf.routing.RouterLoad.counts().tolist()` gives them; with num_experts: the experts that were chosen,
        in any order.
    num_experts (int): how many experts a layer has, where predictions are choices.

Returns:
    entropy (list of float): of the choices of every layer, divided by log E: 1 is even, 0 is one expert only.
    coefficient_of_variation (list of float): standard deviation of the load over its mean, 0 is even.
    min_load, max_load (list of float): of the least and the most used expert, as multiples of an even load.
    collapsed (int): experts with less than a tenth of an even load.
    collapsed_experts (list of [layer, expert]): which, layers counted as they were given.
"""


class ExpertLoadBalance(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions: list[list[int]], num_experts: int | None = None) -> dict[str, object]:
        counts_LE = _counted(predictions, num_experts)
        share_LE = counts_LE.double() / counts_LE.sum(dim=1, keepdim=True)
        entropy_L = torch.special.entr(share_LE).sum(dim=1) / math.log(counts_LE.shape[1])
        load_LE = load_shares(counts_LE.double())
        collapsed = collapsed_experts(load_LE)
        return {
            "entropy": entropy_L.tolist(),
            "coefficient_of_variation": load_LE.std(dim=1, correction=0).tolist(),  # the mean load is 1
            "min_load": load_LE.amin(dim=1).tolist(),
            "max_load": load_LE.amax(dim=1).tolist(),
            "collapsed": len(collapsed),
            "collapsed_experts": [list(place) for place in collapsed],
        }


def _counted(predictions: list[list[int]], num_experts: int | None) -> torch.Tensor:
    """Counts `[L, E]` of what was given, checked."""
    if num_experts is None:
        if len({len(row) for row in predictions}) != 1:
            raise ValueError("the layers have different numbers of experts; with num_experts, predictions are choices.")
        counts_LE = torch.tensor(predictions)
    else:
        wrong = [expert for row in predictions for expert in row if not 0 <= expert < num_experts]
        if wrong:
            raise ValueError(f"expert {wrong[0]} was chosen, but there are {num_experts}, counted from 0.")
        layers = [torch.tensor(row, dtype=torch.int64) for row in predictions]
        counts_LE = torch.stack([torch.bincount(layer, minlength=num_experts) for layer in layers])
    if counts_LE.shape[1] < 2 or int(counts_LE.min()) < 0:
        raise ValueError("expected counts, none negative, of two experts or more.")
    empty = [layer for layer, total in enumerate(counts_LE.sum(dim=1).tolist()) if total == 0]
    if empty:
        raise ValueError(f"layer {empty[0]}: nothing was counted there.")
    return counts_LE
