"""One layer at a time equals all at once: statistics, plans, teacher caches; killed anywhere or not."""

from __future__ import annotations

import torch
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_batch, tiny_model

from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.loading import load_model
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.streaming import stream_stats


def text():
    """Two batches, of unequal length, one padded."""
    first, second = tiny_batch(rows=3), tiny_batch(rows=2, length=17, seed=1)
    second["attention_mask"][1, 9:] = 0
    return [first, second]


def differences(one: ExpertStats, other: ExpertStats) -> dict[str, float]:
    """Norm-wise relative difference of every statistic, the worst expert's."""
    found = {}
    for name, tensor in one.tensors().items():
        theirs = other.tensors()[name]
        assert tensor.shape == theirs.shape, name
        rows = [t.flatten(0, 1) if t.dim() == 3 else t for t in (tensor, theirs)]
        gap = (rows[0] - rows[1]).norm(dim=-1) / rows[1].norm(dim=-1).clamp(min=1e-30)
        found[name] = gap.max().item()
    return found


@pytest.mark.parametrize("loss", ["lm", "kd_topk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_statistics_equal_those_in_memory(family, loss, tmp_path):
    """1e-5 norm-wise per expert is what the same arithmetic in float32 allows (a sum in another order changes 4e-7)."""
    path = save_tiny(tmp_path / "model", family)
    whole = collect_stats(load_model(path), text(), loss, progress=False)
    streamed = stream_stats(path, text(), loss, work=tmp_path / "work", progress=False)
    assert max(differences(streamed, whole).values()) < 1e-5
    assert streamed.meta == whole.meta
