"""Sizes that only some families have: what is proposed can be had, and what cannot be told apart is refused."""

from __future__ import annotations

import re

import pytest
from tiny import tiny_model

from slimmoe_hf.families import shape_of
from slimmoe_hf.grid import Budget, Method
from slimmoe_hf.grid_sizes import _nearest
from slimmoe_hf.plan import Target, validate_target
from slimmoe_hf.sizing import parameter_counts


@pytest.mark.parametrize("target", [Target(num_experts=4), Target(expert_width=8)], ids=["experts", "width"])
def test_a_comparison_proposes_a_size_that_the_family_takes(target: Target):
    """DeepSeek deals experts into groups, and its shared experts keep their width."""
    config = tiny_model("deepseek_v3").config
    method, budget = (
        Method(name="any", target=target, criterion="energy", expert_criterion="reap"),
        Budget.model_construct(equal="total", expert_share=0.75),
    )
    nearest = _nearest(config, method, budget, parameter_counts(config).total * 3 // 4)
    found = re.match(r"Nearest: (\w+) (\d+)\.", nearest)
    assert found is not None
    validate_target(config, Target(**{found[1]: int(found[2])}))


def test_layers_that_route_to_different_numbers_of_experts_are_refused():
    config = tiny_model("hunyuan_v1_moe").config
    config.moe_topk = [1, 2]
    with pytest.raises(ValueError, match=r"moe_topk=\[1, 2\]: layers that differ in it cannot be told apart"):
        shape_of(config)
