"""Merging experts: what must not change does not, what is averaged is averaged, in memory and on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_checkpoint import LAYOUTS, same_tensors, saved
from test_plan import fake_stats
from tiny import NUM_EXPERTS, families, save_tiny, tiny_batch, tiny_model, tiny_tokenizer, write_text
from torch.testing import assert_close

from slimmoe_hf import cli, commands
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.families import FAMILIES, family_of, moe_layers, shape_of
from slimmoe_hf.loading import load_model
from slimmoe_hf.merged_forms import duplicate_merged
from slimmoe_hf.merging import GROUPINGS, SIMILARITIES, align, by_clusters, neuron_weights, plan_merge
from slimmoe_hf.pipeline import save_checkpoint
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.surgery import apply_plan

PAIRS = {0: 2, 3: 1}
"""Of the model of copies: the copy, and what it is a copy of."""


def halves(model, into):
    """Gate and up of an expert's input projection; of a plain unit all of it."""
    return into.chunk(2) if family_of(model.config).layout.gated else (into,)


@torch.no_grad()
def copies(family: str, **overrides):
    """A model whose experts 0 and 3 are experts 2 and 1, their neurons in another order, their router rows half as loud."""
    model = tiny_model(family, **overrides)
    generator = torch.Generator().manual_seed(1)
    for _, experts, router in moe_layers(model):
        into, out = family_of(model.config).layout.weights(experts).values()
        for new, old in PAIRS.items():
            order = torch.randperm(shape_of(model.config).expert_width, generator=generator)
            into[new].copy_(torch.cat([half[order] for half in halves(model, into[old])]))
            out[new].copy_(out[old][:, order])
            router.weight[new] = router.weight[old] / 2
    return model


def scored(model, **options):
    return collect_stats(model, [tiny_batch()], progress=False, **options)


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_alignment_leaves_logits_unchanged(family):
    """Nothing is merged, every expert's neurons are put in the first one's order."""
    model, batch = tiny_model(family), tiny_batch()
    expected = model(**batch).logits
    before = copy.deepcopy(model.state_dict())
    plan = plan_merge(model, fake_stats(model), NUM_EXPERTS, reference="first")
    apply_plan(model, plan)
    assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    moved = [not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()]
    others = NUM_EXPERTS - 1 if family_of(model.config).layout.unit else 1  # the first stays, in its own tensor or not
    assert sum(moved) == 2 * others * len(moe_layers(model)), "both weights of the experts, and nothing else"


@pytest.mark.parametrize("family", families())
def test_alignment_finds_the_order_of_a_permuted_copy(family):
    model = copies(family)
    layout = family_of(model.config).layout
    for _, experts, _ in moe_layers(model):
        for new, old in PAIRS.items():
            one, other = neuron_weights(experts, old, layout), neuron_weights(experts, new, layout)
            assert not torch.equal(one, other) and torch.equal(one, other[align(one, other)])


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("similarity", [name for name in SIMILARITIES if name != "random"])
@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_permuted_copies_merge_to_their_originals_without_a_change_in_logits(family, similarity, grouping):
    model, batch = copies(family), tiny_batch()
    expected = model(**batch).logits
    stats = scored(model, expert_outputs=True)
    stats.tokens_LE[:, list(PAIRS)] = 1  # or a pair might lead both groups
    plan = plan_merge(model, stats, 2, similarity=similarity, grouping=grouping)
    for layer, blend in plan.blends.items():
        assert blend.owner[0] == blend.owner[2] != blend.owner[1] == blend.owner[3], (layer, blend.owner)
    duplicated = duplicate_merged(copy.deepcopy(model), plan)
    assert_close(duplicated(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    uniform = apply_plan(model, plan)
    assert shape_of(uniform.config).num_experts == 2
    for (_, whole, _), (_, merged, _) in zip(moe_layers(duplicated), moe_layers(uniform), strict=True):
        layout = family_of(model.config).layout
        assert [len(layout.weights(each)[layout.down]) for each in (whole, merged)] == [NUM_EXPERTS, 2]


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_where_the_chosen_group_is_all_that_counts_the_small_model_says_the_same(family):
    """One expert a token, its weight always 1, copies with the same router row: dropping rows changes nothing then."""
    if FAMILIES[family].encoder_decoder:
        pytest.skip("Switch weighs an expert by its probability among all, which grows when router rows go")
    if family == "phimoe":
        pytest.skip("PhiMoE always sends a token to two experts, so the second of a pair would be missed")
    model, batch = copies(family, num_experts_per_tok=1, norm_topk_prob=True), tiny_batch()
    for _, _, router in moe_layers(model):
        for new, old in PAIRS.items():
            router.weight[new] = router.weight[old]
    expected = model(**batch).logits
    stats = scored(model)
    stats.tokens_LE[:, list(PAIRS)] = 1
    apply_plan(model, plan_merge(model, stats, 2))
    assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_merged_equals_the_explicit_weighted_average(family, grouping):
    model = tiny_model(family)
    stats = fake_stats(model)
    stats.tokens_LE[0, :2] = torch.tensor([0.0, 0.0])
    plan, before = plan_merge(model, stats, 2, grouping=grouping), copy.deepcopy(model)
    apply_plan(model, plan)
    for row, ((layer, old, gate), (_, new, router)) in enumerate(
        zip(moe_layers(before), moe_layers(model), strict=True)
    ):
        blend, layout = plan.blends[layer], family_of(model.config).layout
        (old_into, old_out), (new_into, new_out) = (layout.weights(each).values() for each in (old, new))
        assert torch.equal(router.weight, gate.weight[plan.experts[layer]])
        for number in range(2):
            members = blend.members(number)
            assert int(plan.experts[layer][number]) in members
            usage = stats.tokens_LE[row, members]
            shares = usage / usage.sum() if usage.sum() else torch.full((len(members),), 1 / len(members))
            down = sum(float(a) * old_out[e][:, blend.order[e]] for a, e in zip(shares, members, strict=True))
            assert_close(new_out[number], down, atol=1e-6, rtol=1e-5)
            rows = [torch.cat([half[blend.order[e]] for half in halves(model, old_into[e])]) for e in members]
            into = sum(float(a) * each for a, each in zip(shares, rows, strict=True))
            assert_close(new_into[number], into, atol=1e-6, rtol=1e-5)
            leader = int(plan.experts[layer][number])
            assert torch.equal(blend.order[leader], torch.arange(32)), "others are aligned to the one that leads"


@pytest.mark.parametrize(
    ("layout", "dtype"), [("per expert", "float32"), ("per expert", "bfloat16"), ("fused", "float32")]
)
@pytest.mark.parametrize("family", families())
def test_merged_on_disk_equals_merged_in_memory(family, layout, dtype, tmp_path: Path):
    model = tiny_model(family)
    source = saved(tmp_path / "source", model, LAYOUTS[layout])
    plan = plan_merge(model, scored(model), 3)
    plan.save(tmp_path / "plan")
    loaded = CompressionPlan.load(tmp_path / "plan")
    assert loaded.sha256 == plan.sha256 and loaded.meta == plan.meta
    slim_checkpoint(source, loaded, tmp_path / "on-disk", shard_bytes=10_000, dtype=dtype)
    save_checkpoint(apply_plan(model, plan), tiny_tokenizer(), tmp_path / "in-memory", dtype)
    same_tensors(tmp_path / "on-disk", tmp_path / "in-memory")
    ours, theirs = (load_model(tmp_path / name)(**tiny_batch()).logits for name in ("on-disk", "in-memory"))
    assert torch.equal(ours, theirs)
    assert "merged: similarity router_logits" in describe_plan(loaded)


def test_clusters_are_as_many_as_asked_even_where_all_are_equally_far():
    for number in (1, 2, 3, 4):
        owner = by_clusters(torch.eye(4, dtype=torch.float64), torch.ones(4), list(range(number)))
        assert sorted(set(owner.tolist())) == list(range(number))


def test_router_similarity_leaves_padding_out():
    model, batch = tiny_model("mixtral"), tiny_batch(rows=2)
    pad = torch.nn.functional.pad
    ids, mask = pad(batch["input_ids"], (0, 9), value=1), pad(batch["attention_mask"], (0, 9))
    padded = collect_stats(model, [{"input_ids": ids, "attention_mask": mask}], progress=False, expert_outputs=True)
    plain = collect_stats(model, [batch], progress=False, expert_outputs=True)
    assert_close(padded.router_gram_LEE, plain.router_gram_LEE, atol=1e-3, rtol=1e-4)
    assert_close(padded.output_sum_LED, plain.output_sum_LED, atol=1e-3, rtol=1e-4)


def test_mean_outputs_are_of_all_tokens_routed_or_not():
    model, batch = tiny_model("olmoe"), tiny_batch(rows=2)
    stats, seen = scored(model, expert_outputs=True), {}
    stats = collect_stats(model, [batch], progress=False, expert_outputs=True)
    experts = moe_layers(model)[1][1]
    experts.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    model(input_ids=batch["input_ids"])
    for expert in range(NUM_EXPERTS):
        gate, up = (seen["x"] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        assert_close(stats.output_sum_LED[1, expert].float(), out.sum(0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"similarity": "weight"},
            "similarity 'weight' is unknown; use one of router_logits, router_rows, weights, outputs, random",
        ),
        ({"grouping": "kmeans"}, "grouping 'kmeans' is unknown; use one of dominant, clusters"),
        ({"similarity": "outputs"}, r"needs statistics from collect_stats\(expert_outputs=True\)"),
        ({"num_experts": 1}, "num_experts=1 is not between the 2 that a token is sent to"),
    ],
    ids=str,
)
def test_bad_requests_are_one_line(change, message):
    model = tiny_model("phimoe")
    with pytest.raises(ValueError, match=message) as error:
        plan_merge(model, scored(model), **{"num_experts": 2, **change})
    assert "\n" not in str(error.value)


def test_statistics_of_another_model_and_damaged_plans_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model = tiny_model("phimoe")
    with pytest.raises(ValueError, match="of other weights than the model's"):
        plan_merge(model, scored(tiny_model("phimoe", seed=1)), 2)
    for damage, message in (("weight", "not a merging of 4 experts of width 32 into 2"), ("order", "is not whole")):
        plan_merge(model, scored(model), 2).save(tmp_path / damage)
        tensors = load_file(tmp_path / damage / "plan.safetensors")
        tensors["weight.0"] = tensors["weight.0"] * 2
        kept = {name: tensor for name, tensor in tensors.items() if damage == "weight" or name != "order.0"}
        save_file(kept, tmp_path / damage / "plan.safetensors")
        with pytest.raises(ValueError, match=message):
            CompressionPlan.load(tmp_path / damage)


def test_the_command_merges_a_checkpoint_and_answers_bad_input_in_one_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    source, text = save_tiny(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    given = ["merge", str(source), "--data", str(text), "--max-length", "64", "--tokens", "512", "--output"]
    for more, message in (
        ([], "merge needs num_experts"),
        (["--num-experts", "1"], "num_experts=1 is not between the 2 that"),
        (["--num-experts", "4"], "--num-experts 4: the model has 4 a layer"),
        (["--num-experts", "3", "--similarity", "x"], "--similarity x: unknown; use one of router_logits"),
        (["--num-experts", "3", "--grouping", "x"], "--grouping x: unknown; use one of dominant, clusters"),
    ):
        capsys.readouterr()
        assert cli.main([*given, str(tmp_path / "merged"), *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "merged").exists()
    choices = ["--similarity", "outputs", "--grouping", "clusters"]
    assert cli.main([*given, str(tmp_path / "merged"), "--num-experts", "3", *choices]) == 0
    plan = CompressionPlan.load(tmp_path / "merged" / "plan")
    ours, theirs = load_model(tmp_path / "merged"), apply_plan(load_model(source), plan)
    assert shape_of(ours.config).num_experts == 3 and plan.meta.merging.grouping == "clusters"
    assert torch.equal(ours(**tiny_batch()).logits, theirs(**tiny_batch()).logits)
    assert cli.main([*given, str(tmp_path / "merged"), "--num-experts", "3"]) == 2, "nothing is overwritten unasked"
