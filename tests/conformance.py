"""What the conformance tests share: which rows are fast, a model and its statistics, cuts, and the masked original."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.families import FAMILIES, Family, layer_views, routing_groups, shape_of
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.stats import ExpertStats

FAST = ("deepseek_v3", "granitemoe", "gpt_oss")
"""Of layouts that no other fast test has: routing groups with a bias and shared experts; one tensor on disk for all experts;
that transposed, interleaved and with biases."""


def rows(fast: tuple[str, ...], takes: Callable[[Family], bool] = lambda row: True) -> list[Any]:
    """Every family that `takes` it, for `parametrize`; those that are not in `fast` are slow: it is a second or two each."""
    found = [name for name, row in FAMILIES.items() if takes(row)]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in found]


@functools.cache
def model_and_stats(family: str) -> tuple[PreTrainedModel, ExpertStats]:
    """Only ever to be copied."""
    model = tiny_model(family)
    return model, collect_stats(model, [tiny_batch()], "lm", progress=False)


def fewer_experts(model: PreTrainedModel) -> int:
    """One less than there are, or than there are in each routing group."""
    return shape_of(model.config).num_experts - routing_groups(model.config)[0]


def targets(model: PreTrainedModel) -> list[Target]:
    """Each of the cuts that a family takes, and all at once."""
    row, experts = FAMILIES[model.config.model_type], fewer_experts(model)
    whole = Target(
        expert_width=None if row.no_width else 16, kv_groups=None if row.no_groups else 1, num_experts=experts
    )
    single = [Target(**{name: value}) for name, value in whole if value is not None]
    return [*single, whole] if len(single) > 1 else single


def plan_for(family: str, target: Target) -> CompressionPlan:
    return make_plan(model_and_stats(family)[1], target, "magnitude" if target.num_experts else "random", seed=3)


@contextmanager
def masked(model: PreTrainedModel, plan: CompressionPlan) -> Iterator[PreTrainedModel]:
    """The original whose dropped neurons and heads say nothing, and whose routers cannot choose dropped experts."""
    model, gone = copy.deepcopy(model), {}
    family, shape = FAMILIES[model.config.model_type], shape_of(model.config)
    for view in layer_views(model):
        if view.index in plan.experts:
            lost = torch.ones(shape.num_experts, dtype=torch.bool)
            lost[plan.experts[view.index]] = False
            gone[view.router.get_parameter(family.router_weight).data_ptr()] = lost
            if family.router_bias:  # added after the sigmoid or softmax of the logits
                bias = model.state_dict()[f"{view.paths.feed_forward}.{family.router_bias}"]
                bias[..., lost] = float("-inf")
        if view.index in plan.neurons:
            stay = plan.experts.get(view.index, torch.arange(shape.num_experts)).tolist()
            for expert, kept in zip(stay, plan.neurons[view.index], strict=True):
                lost = torch.ones(shape.expert_width, dtype=torch.bool)
                lost[kept] = False
                down = family.layout.weights(view.experts)[family.layout.down][expert].data
                down.movedim(family.layout.down_axis, 0)[lost] = 0
        if view.index in plan.groups and view.attention is not None:
            lost = torch.ones(shape.kv_groups, dtype=torch.bool)
            lost[plan.groups[view.index]] = False
            out = view.attention.get_parameter(f"{family.projections[-1]}.weight").data
            out.view(len(out), shape.kv_groups, -1)[:, lost] = 0
    linear = torch.nn.functional.linear

    def masking(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output, lost = linear(inputs, weight, bias), gone.get(weight.data_ptr())
        return output if lost is None else output.masked_fill(lost, float("-inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masking)
        yield model


def with_trained_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose corrections of the choice of experts are as large as trained models have them: rounded, they choose others."""
    model = copy.deepcopy(model)
    for name, tensor in model.state_dict().items():
        if FAMILIES[model.config.model_type].keeps_dtype(name):
            tensor.add_(6.0)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def saved(folder: Path, model: PreTrainedModel, published: bool = True) -> Path:
    model.save_pretrained(folder, max_shard_size="100KB", save_original_format=published)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def require_same_checkpoint(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
