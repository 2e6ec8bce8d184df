"""Experts that a model falls apart without: named by their outputs, never dropped, never merged away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import documents, tiny_batch, tiny_model
from transformers import PreTrainedModel

from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.criteria import EXPERT_CRITERIA
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.families import moe_layers
from slimmoe_hf.loading import load_model, load_tokenizer
from slimmoe_hf.merging import GROUPINGS, plan_merge
from slimmoe_hf.plan import Target, make_plan
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.super_experts import TIMES, output_excess, super_experts_of

TEACHER = Path(__file__).parents[1] / "examples" / "teacher" / "model"
SIZES = {"num_local_experts": 8, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def scored() -> tuple[PreTrainedModel, ExpertStats, int]:
    """A model whose least used expert of layer 1 has an output projection 1,000 times as large."""
    plain, given = tiny_model("phimoe", **SIZES), [tiny_batch(rows=8)]
    chosen = int(collect_stats(plain, given, progress=False).tokens_LE[1].argmin())
    with torch.no_grad():
        moe_layers(plain)[1][1].down_proj[chosen] *= 1000
    return plain, collect_stats(plain, given, progress=False), chosen


def test_an_expert_whose_output_is_out_of_proportion_is_named_and_no_other(scored):
    _, stats, chosen = scored
    assert list(super_experts_of(stats)) == [1] and list(super_experts_of(stats)[1]) == [chosen]
    assert super_experts_of(stats)[1][chosen] > 100


def test_random_weights_have_no_super_experts_nor_have_statistics_that_do_not_say():
    stats = collect_stats(tiny_model("phimoe", **SIZES), [tiny_batch(rows=8)], progress=False)
    assert super_experts_of(stats) == {}
    assert super_experts_of(replace(stats, output_max_LE=None)) == {}


@pytest.mark.parametrize("criterion", EXPERT_CRITERIA)
def test_dropping_never_takes_a_super_expert(scored, criterion):
    _, stats, chosen = scored
    plan = make_plan(stats, Target(num_experts=2), criterion)
    assert chosen in plan.experts[1].tolist()
    assert list(plan.meta.layers[1].super_experts) == [chosen] and not plan.meta.layers[0].super_experts
    assert 0 <= plan.meta.layers[1].expert_score_kept <= 1


@pytest.mark.parametrize("counts", ["uniform", "adaptive"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_super_expert_is_merged_with_no_other(scored, grouping, counts):
    model, stats, chosen = scored
    blend = (plan := plan_merge(model, stats, 3, grouping=grouping, counts=counts)).blends[1]
    group = blend.owner[chosen]
    assert blend.owner.tolist().count(group) == 1 and plan.experts[1][group] == chosen
    assert sorted(set(blend.owner.tolist())) == list(range(len(plan.experts[1])))
    assert f"layer 1, expert {chosen} is a super expert" in describe_plan(plan)


def test_more_super_experts_than_places_keep_the_best_and_say_which_goes(scored):
    _, stats, _ = scored
    largest = torch.ones(stats.output_max_LE.shape, dtype=torch.float64)
    largest[0, :3] = torch.tensor([500.0, 900.0, 700.0])
    tokens = stats.tokens_LE.clone()
    tokens[0, :3] = torch.tensor([3.0, 1.0, 2.0])
    plan = make_plan(replace(stats, output_max_LE=largest, tokens_LE=tokens), Target(num_experts=2), "frequency")
    assert plan.experts[0].tolist() == [0, 2]
    assert "layer 0, expert 1 is a super expert" in describe_plan(plan)
    assert [line for line in describe_plan(plan).splitlines() if "GOES" in line and "expert 1 " in line]


def test_narrowing_reports_it(scored):
    _, stats, chosen = scored
    said = describe_plan(make_plan(stats, Target(expert_width=16)))
    assert f"layer 1, expert {chosen} is a super expert" in said and "narrowed to 16 of 32 neurons" in said


def test_the_shipped_teacher_has_none():
    model, tokenizer = load_model(TEACHER), load_tokenizer(TEACHER)
    ids = torch.tensor(tokenizer("\n\n".join(documents()[:12]))["input_ids"][:2048])
    stats = collect_stats(model, [{"input_ids": ids.view(8, 256)}], progress=False)
    assert super_experts_of(stats) == {}
    assert 1 < output_excess(stats).max() < TIMES / 2
