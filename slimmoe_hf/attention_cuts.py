"""What a layer's attention keeps when key/value groups go, in memory and on disk.

Shape letters: H query heads, G key/value groups, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimmoe_hf.families import Family
from slimmoe_hf.plan import CompressionPlan


def attention_cuts(family: Family, plan: CompressionPlan, layer: int) -> dict[str, tuple[int, Tensor]]:
    """Name inside the attention -> axis and indices of all that loses something, biases named that it may not have."""
    queries, keys = plan.attention_rows(layer)
    width = plan.meta.before.head_width
    heads, rows = queries[::width] // width, torch.arange(family.query_parts * width)
    own = (heads[:, None] * len(rows) + rows).flatten()
    query, key, value, out = family.projections
    found: dict[str, tuple[int, Tensor]] = {}
    for name, kept in ((query, own), (key, keys), (value, keys), *((name, queries) for name in family.query_rows)):
        found |= {f"{name}.weight": (0, kept), f"{name}.bias": (0, kept)}
    found |= dict.fromkeys(family.head_rows, (0, heads))
    return {**found, f"{out}.weight": (1, queries)}
