"""The forms of a merged model: which of them stock classes load, which are exact, which are smaller; and none that lies."""

from __future__ import annotations

import copy

import pytest
import torch
from test_merging import copies, scored
from test_plan import fake_stats
from tiny import FAMILY_NAMES, NUM_EXPERTS, tiny_batch, tiny_model
from torch.testing import assert_close

from slimmoe_hf.criteria import choose_anywhere
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.families import moe_layers
from slimmoe_hf.merged_forms import duplicate_merged, share_merged, unshare
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.shared_checkpoint import load_shared
from slimmoe_hf.surgery import apply_plan


@torch.no_grad()
def logits(model):
    return model(**tiny_batch()).logits


# Adaptive counts


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_adaptive_counts_are_exact_and_keep_the_top_of_every_layer(number):
    """Half of the usages are equal, and one layer has only small ones."""
    used = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.26, 0.25, 0.25, 0.24], [0.4, 0.4, 0.1, 0.1]], dtype=torch.float64)
    kept = choose_anywhere(used, number)
    assert sum(map(len, kept)) == 3 * number
    assert [int(each[0]) for each in kept] == [0, 0, 0]
    if number == 2:
        assert [each.tolist() for each in kept] == [[0, 1], [0, 1], [0, 1]]
    assert all((each.diff() > 0).all() for each in kept)


def test_ties_go_to_the_lower_layer_and_the_lower_expert():
    kept = choose_anywhere(torch.full((3, 4), 0.25, dtype=torch.float64), 2)
    assert [each.tolist() for each in kept] == [[0, 1, 2, 3], [0], [0]]


def test_an_adaptive_plan_is_saved_shown_and_checked(tmp_path):
    model = tiny_model("olmoe")
    stats = fake_stats(model)
    stats.tokens_LE[:] = torch.tensor([[9.0, 8, 7, 1], [9, 1, 0, 0]])
    plan = plan_merge(model, stats, 2, counts="adaptive")
    assert {layer: kept.tolist() for layer, kept in plan.experts.items()} == {0: [0, 1, 2], 1: [0]}
    plan.save(tmp_path / "plan")
    loaded = CompressionPlan.load(tmp_path / "plan")
    assert loaded.sha256 == plan.sha256 != plan_merge(model, stats, 2).sha256
    assert "experts 4 -> 2 on average" in describe_plan(loaded) and "counts adaptive" in describe_plan(loaded)
    for refused in (lambda: apply_plan(model, plan),):
        with pytest.raises(ValueError, match="leaves 1 to 3 experts a layer, and a stock") as error:
            refused()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not leave 2 experts a layer on average"):
        CompressionPlan(plan.meta, {}, {}, {0: plan.experts[0]}, {0: plan.blends[0]}).check()
    with pytest.raises(ValueError, match="num_experts=5 on average is not between 1 and the model's 4"):
        plan_merge(model, stats, 5, counts="adaptive")


def test_random_similarity_is_of_its_seed_alone():
    model = tiny_model("mixtral")
    stats = fake_stats(model)
    plans = [plan_merge(model, stats, 2, similarity="random", seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert plans[0].sha256 == plans[1].sha256 and len({plan.sha256 for plan in plans}) > 1
    assert plans[2].meta.seed == 1


# Forms in memory


@pytest.mark.parametrize("counts", ["uniform", "adaptive"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_shared_equals_duplicated(family, counts):
    """To rounding: some products are of more rows."""
    model = tiny_model(family)
    plan = plan_merge(model, scored(model), 2, counts=counts)
    duplicated, shared = duplicate_merged(copy.deepcopy(model), plan), copy.deepcopy(model)
    assert share_merged(shared, plan) is shared
    assert_close(logits(shared), logits(duplicated), atol=1e-5, rtol=1e-5)
    gone = sum(NUM_EXPERTS - len(kept) for kept in plan.experts.values()) * 3 * 32 * 32
    assert model.num_parameters() - shared.num_parameters() == gone == 2 * 2 * 3 * 32 * 32
    for (_, _, router), (_, _, was) in zip(moe_layers(shared), moe_layers(model), strict=True):
        assert torch.equal(router.weight, was.weight), "routers stay as they are"
    assert shared.config.expert_groups == {layer: blend.owner.tolist() for layer, blend in plan.blends.items()}
    again = unshare(shared)
    assert type(again) is type(model) and again.config.to_dict() == model.config.to_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, duplicated.state_dict()[name]), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_shared_folder_reloads_bit_for_bit(family, tmp_path):
    model = tiny_model(family)
    share_merged(model, plan_merge(model, scored(model), 2, counts="adaptive"))
    model.save_pretrained(tmp_path)
    loaded = load_shared(tmp_path)
    assert type(loaded) is type(model) and loaded.config.expert_groups == model.config.expert_groups
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_permuted_copies_lose_nothing_in_the_shared_form(family):
    model = copies(family)
    expected = logits(model)
    stats = scored(model)
    stats.tokens_LE[:, [0, 3]] = 1  # or a pair might lead both groups
    for counts in ("uniform", "adaptive"):
        plan = plan_merge(model, stats, 2, counts=counts)
        assert_close(logits(share_merged(copy.deepcopy(model), plan)), expected, atol=1e-4, rtol=1e-4)
