"""What every row of the table of families promises; a new row is found here and needs no test code of its own.

One family of every layout is in the fast suite, all of them are in the slow one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conformance import (
    FAST,
    fewer_experts,
    masked,
    model_and_stats,
    plan_for,
    require_same_checkpoint,
    rows,
    saved,
    targets,
    tensors_of,
    with_trained_biases,
)
from runs import in_two_processes
from tiny import EXPERT_WIDTH, VOCAB_SIZE, tiny_batch, tiny_model, tiny_tokenizer
from torch.testing import assert_close
from transformers import PreTrainedModel

from slimmoe_hf.blocks import Blocks
from slimmoe_hf.budget import Sizes
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.disk import auto_class, published_shapes
from slimmoe_hf.evaluation import count_parameters, measure_loss
from slimmoe_hf.factored_checkpoint import load_factored
from slimmoe_hf.factorization import densify, factor_experts
from slimmoe_hf.families import FAMILIES, layer_views, moe_layers, routing_groups, shape_of
from slimmoe_hf.identity import combined, model_sha256
from slimmoe_hf.limits import possible_experts, refuse_merging
from slimmoe_hf.loading import load_model
from slimmoe_hf.merged_forms import duplicate_merged, share_merged
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import Target, make_plan, validate_target
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.repairs import REPAIR_KINDS
from slimmoe_hf.search import search_plan
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.streamed_evaluation import stream_loss
from slimmoe_hf.streamed_repair import stream_reconstruct
from slimmoe_hf.streaming import stream_stats
from slimmoe_hf.student_training import save_checkpoint
from slimmoe_hf.super_experts import super_experts_of
from slimmoe_hf.surgery import apply_plan

every_family = pytest.mark.parametrize("family", rows(FAST[:1]))
every_family_and_layout = pytest.mark.parametrize("family", rows(FAST))
every_width_and_layout = pytest.mark.parametrize("family", rows(FAST, lambda row: not row.no_width))
every_output_and_layout = pytest.mark.parametrize(
    "family", rows(FAST, lambda row: not (row.no_width and row.no_groups))
)


@every_family_and_layout
@torch.no_grad()
def test_slimmed_equals_masked(family: str):
    model, batch = model_and_stats(family)[0], tiny_batch()
    before = model(**batch).logits
    for target in targets(model):
        plan = plan_for(family, target)
        with masked(model, plan) as reference:
            expected = reference(**batch).logits
        slimmed = apply_plan(copy.deepcopy(model), plan)
        assert shape_of(slimmed.config) == plan.meta.after, target
        assert_close(
            slimmed(**batch).logits, expected, atol=2e-4, rtol=2e-4, msg=lambda text, at=target: f"{at}: {text}"
        )
        assert not torch.equal(expected, before), f"{target} changed nothing"


def sizes_said(model: PreTrainedModel) -> dict[str, int]:
    """Every whole number that a module inside a model keeps."""
    said = ((f"{path}.{name}", value) for path, module in model.named_modules() for name, value in vars(module).items())
    return {name: value for name, value in said if type(value) is int}


@every_family
def test_every_module_says_the_sizes_that_one_made_anew_would(family: str):
    """Attributes that a forward pass may read: a stale one is a wrong result in another implementation of it."""
    model = copy.deepcopy(model_and_stats(family)[0])
    apply_plan(model, plan_for(family, targets(model)[-1]))
    fresh = auto_class(model.config).from_config(model.config, dtype=torch.float32)
    assert sizes_said(model) == sizes_said(fresh)


@pytest.mark.parametrize("family", rows(("phimoe", "gpt_oss"), lambda row: not row.no_groups))
@torch.no_grad()
def test_several_groups_keep_their_own_query_heads(family: str):
    """Three of four groups with two heads each: a query head that lost its group would attend with another's keys."""
    model = tiny_model(family, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    stats = collect_stats(model, [tiny_batch()], "lm", progress=False)
    plan = make_plan(stats, Target(kv_groups=3), "random", seed=1)
    with masked(model, plan) as reference:
        expected = reference(**tiny_batch()).logits
    assert_close(apply_plan(model, plan)(**tiny_batch()).logits, expected, atol=2e-4, rtol=2e-4)


@every_family_and_layout
@torch.no_grad()
def test_cut_in_memory_equals_cut_on_disk_and_both_reload_plainly(family: str, tmp_path: Path, caplog, capfd):
    """From the published layout and from that in memory; the weights that are saved are those that transformers wants."""
    model = model_and_stats(family)[0]
    plan = plan_for(family, targets(model)[-1])
    slimmed = apply_plan(copy.deepcopy(model), plan)
    save_checkpoint(slimmed, tiny_tokenizer(), tmp_path / "in-memory", "float32")
    for published in (True, False):
        source = saved(tmp_path / f"source-{published}", model, published)
        slim_checkpoint(source, plan, tmp_path / f"on-disk-{published}", shard_bytes=100_000)
        require_same_checkpoint(tmp_path / f"on-disk-{published}", tmp_path / "in-memory")
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(tmp_path / "in-memory").items()}
    assert found == published_shapes(slimmed.config)
    caplog.clear()
    reloaded, info = auto_class(model.config).from_pretrained(
        tmp_path / "on-disk-True", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "LOAD REPORT" not in capfd.readouterr().err
    assert torch.equal(reloaded.eval()(**tiny_batch()).logits, slimmed(**tiny_batch()).logits)


@pytest.mark.parametrize("family", rows(FAST[:1], lambda row: bool(row.router_bias)))
@torch.no_grad()
def test_a_cut_to_bfloat16_in_memory_equals_that_on_disk_and_rounds_no_choice_of_experts(family: str, tmp_path: Path):
    model = with_trained_biases(model_and_stats(family)[0])
    plan = plan_for(family, Target(num_experts=fewer_experts(model)))
    source = saved(tmp_path / "source", model)
    slim_checkpoint(source, plan, tmp_path / "on-disk", dtype="bfloat16")
    slimmed = apply_plan(copy.deepcopy(model), plan)
    exact = tensors_of(saved(tmp_path / "exact", slimmed))
    save_checkpoint(slimmed, tiny_tokenizer(), tmp_path / "in-memory", "bfloat16")
    require_same_checkpoint(tmp_path / "on-disk", tmp_path / "in-memory")
    written = tensors_of(tmp_path / "in-memory")
    kept = [name for name, tensor in written.items() if tensor.dtype != torch.bfloat16]
    assert all(torch.equal(written[name], exact[name]) for name in kept)
    assert len(kept) == (0 if family == "gpt_oss" else len(moe_layers(model)))


@pytest.mark.parametrize("family", rows(FAST[:1], lambda row: not row.no_stream))
def test_what_is_streamed_in_bfloat16_has_the_weights_that_a_load_in_bfloat16_has(family: str, tmp_path: Path):
    """Also those that transformers keeps in float32; rounded, they would send tokens to other experts."""
    path = saved(tmp_path / "model", with_trained_biases(model_and_stats(family)[0]))
    whole, blocks = load_model(path, "bfloat16"), Blocks(path, "bfloat16", "cpu")
    found = blocks.model.state_dict()
    for part in blocks.visit(blocks.parts, fresh=blocks.parts, hashed=True):
        inside = blocks._modules[part].state_dict()
        found |= {f"{blocks._prefixes[part]}.{name}": tensor for name, tensor in inside.items()}
    for name, tensor in whole.state_dict().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    digests = {name: sha for each in blocks.digests.values() for name, sha in each.items()}
    assert combined(digests) == model_sha256(whole)
    held_out = tiny_batch(seed=2)["input_ids"]
    swept = stream_loss(path, held_out, work=tmp_path / "loss", dtype="bfloat16")
    assert swept.router_load == measure_loss(whole, held_out).router_load


@pytest.mark.parametrize("family", rows(FAST[:1], lambda row: row.layout.plain))
def test_a_form_of_our_own_loads_in_bfloat16_what_a_stock_one_has_in_it(family: str, tmp_path: Path):
    model = with_trained_biases(model_and_stats(family)[0])
    stock = load_model(saved(tmp_path / "stock", model), "bfloat16").state_dict()
    factor_experts(model, rank=8).save_pretrained(tmp_path / "factored")
    loaded = load_factored(tmp_path / "factored", dtype="bfloat16").state_dict()
    for name in stock.keys() & loaded.keys():
        assert loaded[name].dtype == stock[name].dtype and torch.equal(loaded[name], stock[name]), name


@every_family
def test_mask_gradients_equal_weight_gradient_sums(family: str):
    """dL/dm = sum_d W_down[d, f] grad(W_down)[d, f], on one sequence, with the loss written out here."""
    model, batch = copy.deepcopy(model_and_stats(family)[0]), tiny_batch(rows=1)
    stats = collect_stats(model, [batch], "lm", progress=False)
    row, shape = FAMILIES[family], shape_of(model.config)
    ahead = 0 if row.encoder_decoder else 1
    logprobs = model(**batch).logits[0, : len(batch["labels"][0]) - ahead].log_softmax(-1)
    (-logprobs.gather(-1, batch["labels"][0, ahead:, None]).sum()).backward()
    for number, (_, experts, _) in enumerate(moe_layers(model)):
        down = row.layout.weights(experts)[row.layout.down]
        whole = isinstance(down, torch.Tensor)
        for expert in range(shape.num_experts):
            weight = down[expert]
            gradient = down.grad[expert] if whole else weight.grad
            product = weight * (torch.zeros_like(weight) if gradient is None else gradient)
            expected = product.sum(1 - row.layout.down_axis).abs().double()
            assert_close(stats.taylor_LEF[number, expert], expected, atol=1e-5, rtol=1e-3)
    assert stats.taylor_LEF.sum() > 0
    for view in layer_views(model):
        if view.attention is not None:
            out = view.attention.get_parameter(f"{row.projections[-1]}.weight")
            heads = (out * out.grad).sum(0).view(shape.query_heads, -1).sum(-1).abs().double()
            assert_close(stats.head_taylor_AH[view.index], heads, atol=1e-5, rtol=1e-3)


@every_family
def test_one_forward_pass_sums_what_a_sweep_with_gradients_does(family: str):
    model, batch = copy.deepcopy(model_and_stats(family)[0]), tiny_batch(rows=1)
    whole, forward = (collect_stats(model, [batch], loss, progress=False).tensors() for loss in ("lm", "none"))
    assert whole.keys() - forward.keys() == set(ExpertStats.GRADIENT_SUMS)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in forward.items())


@every_family
def test_what_is_streamed_equals_what_is_measured_in_memory_or_is_refused_with_the_reason(family: str, tmp_path: Path):
    from streams import worst

    path, batches = (
        saved(tmp_path / "model", model_and_stats(family)[0]),
        [tiny_batch(rows=2), tiny_batch(rows=1, seed=1)],
    )
    if why := FAMILIES[family].no_stream:
        with pytest.raises(ValueError, match=why if not FAMILIES[family].encoder_decoder else "encoder-decoder"):
            stream_stats(path, batches, "lm", work=tmp_path / "work", progress=False)
        return
    whole = collect_stats(load_model(path), batches, "lm", progress=False)
    streamed = stream_stats(path, batches, "lm", work=tmp_path / "work", progress=False)
    assert worst(streamed, whole) < 1e-4
    assert streamed.meta == whole.meta
    held_out = tiny_batch(seed=2)["input_ids"]
    swept, whole_sweep = stream_loss(path, held_out, work=tmp_path / "loss"), measure_loss(load_model(path), held_out)
    assert swept.loss == pytest.approx(whole_sweep.loss, rel=1e-5) and swept.router_load == whole_sweep.router_load


@every_family
@torch.no_grad()
def test_saved_and_slimmed_again(family: str, tmp_path: Path):
    """Slim, save, load, slim on disk, save: the sizes of the second cut, from the weights of the first."""
    model = copy.deepcopy(model_and_stats(family)[0])
    row = FAMILIES[family]
    fewer = fewer_experts(model)
    first = Target(num_experts=fewer) if row.no_width else Target(expert_width=16)
    second = Target(num_experts=fewer - routing_groups(model.config)[0]) if row.no_width else Target(expert_width=8)
    save_checkpoint(apply_plan(model, plan_for(family, first)), tiny_tokenizer(), tmp_path / "once", "float32")
    once = load_model(tmp_path / "once")
    plan = make_plan(collect_stats(once, [tiny_batch()], "lm", progress=False), second, "magnitude")
    slim_checkpoint(tmp_path / "once", plan, tmp_path / "twice")
    save_checkpoint(apply_plan(once, plan), tiny_tokenizer(), tmp_path / "twice-in-memory", "float32")
    require_same_checkpoint(tmp_path / "twice", tmp_path / "twice-in-memory")
    assert shape_of(load_model(tmp_path / "twice").config) == plan.meta.after


@every_family
@torch.no_grad()
def test_generate_with_a_cache_agrees_with_no_cache_after_the_cut(family: str):
    model = copy.deepcopy(model_and_stats(family)[0])
    apply_plan(model, plan_for(family, targets(model)[-1]))
    prompt = tiny_batch(rows=2, length=8)["input_ids"]
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "eos_token_id": None,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    cached, plain = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-3, rtol=1e-3)


@every_family
@torch.no_grad()
def test_merged_in_memory_equals_merged_on_disk_or_is_refused_with_the_reason(family: str, tmp_path: Path):
    model, stats = model_and_stats(family)
    model = copy.deepcopy(model)
    if FAMILIES[family].no_merge or routing_groups(model.config)[0] > 1:
        with pytest.raises(ValueError, match=FAMILIES[family].no_merge or "groups of equal size"):
            plan_merge(model, stats, fewer_experts(model))
        return
    refuse_merging(model.config)
    plan = plan_merge(model, stats, fewer_experts(model))
    slim_checkpoint(saved(tmp_path / "source", model), plan, tmp_path / "on-disk")
    save_checkpoint(apply_plan(model, plan), tiny_tokenizer(), tmp_path / "in-memory", "float32")
    require_same_checkpoint(tmp_path / "on-disk", tmp_path / "in-memory")
    assert load_model(tmp_path / "on-disk")(**tiny_batch()).logits.shape[-1] == VOCAB_SIZE


@every_family
@torch.no_grad()
def test_shared_experts_and_factored_ones_say_what_dense_ones_say_or_are_refused(family: str):
    model, stats = model_and_stats(family)
    if not (FAMILIES[family].no_merge or routing_groups(model.config)[0] > 1):
        plan = plan_merge(model, stats, fewer_experts(model), counts="adaptive")
        shared, copied = (make(copy.deepcopy(model), plan) for make in (share_merged, duplicate_merged))
        assert torch.equal(shared(**tiny_batch()).logits, copied(**tiny_batch()).logits)
    factored, layout = copy.deepcopy(model), FAMILIES[family].layout
    if not (layout.plain or layout.unit is not None):
        with pytest.raises(ValueError, match=f"the experts of a {family} cannot be factored"):
            factor_experts(factored, rank=8)
        return
    logits = factor_experts(factored, rank=8)(**tiny_batch()).logits
    assert_close(densify(factored)(**tiny_batch()).logits, logits, atol=1e-4, rtol=1e-4)


@every_width_and_layout
@torch.no_grad()
def test_reconstruction_with_all_kept_changes_nothing(family: str):
    model, stats = model_and_stats(family)
    shape, plan = shape_of(model.config), make_plan(stats, Target(expert_width=EXPERT_WIDTH), "random")
    all_EF = torch.arange(shape.expert_width).expand(shape.num_experts, -1)
    groups = [] if FAMILIES[family].no_groups else stats.attending
    whole = dataclasses.replace(
        plan,
        neurons=dict.fromkeys(stats.meta.layers, all_EF),
        groups=dict.fromkeys(groups, torch.arange(shape.kv_groups)),
    )
    repaired = reconstruct(model, [tiny_batch()], whole, progress=False)
    assert repaired.repairs.down_proj.keys() == set(stats.meta.layers) and list(repaired.repairs.o_proj) == list(groups)
    same = apply_plan(copy.deepcopy(model), repaired)
    assert_close(same(**tiny_batch()).logits, model(**tiny_batch()).logits, atol=1e-6, rtol=0)


def error_of(experts: Any, whole: Any, hidden: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Squared error of each expert's own outputs, on the tokens that it is sent, over all experts."""
    total = torch.zeros(())
    for expert in range(whole.num_experts):
        args = hidden, index, gate * (index == expert)
        total = total + (experts(*args) - whole(*args).detach()).square().sum()
    return total


@every_width_and_layout
def test_reconstructed_experts_are_as_near_as_can_be_to_those_that_were_not_cut(family: str):
    """On the text that they were solved on, given what the uncut layer is given: no step lessens the squared error there."""
    model, heard = copy.deepcopy(model_and_stats(family)[0]), {}
    plan = plan_for(family, Target(expert_width=16))
    repaired = reconstruct(model, [tiny_batch()], plan, ridge=1e-6, progress=False)
    for index, experts, _ in moe_layers(model):
        hook = experts.register_forward_pre_hook(lambda _module, args, at=index: heard.update({at: args}))
        with torch.no_grad():
            model(**tiny_batch())
        hook.remove()
    cut, solved = (apply_plan(copy.deepcopy(model), each) for each in (plan, repaired))
    name, steps = FAMILIES[family].layout.down, zip(*map(moe_layers, (model, cut, solved)), strict=True)
    for (index, whole, _), (_, plain, _), (_, better, _) in steps:
        lost, left = (error_of(experts, whole, *heard[index]) for experts in (plain, better))
        assert 0 < float(left) < 0.98 * float(lost), f"layer {index}: {lost} without, {left} with"
        steep, flat = (
            torch.autograd.grad(error, experts.get_parameter(name))[0].norm()
            for error, experts in ((lost, plain), (left, better))
        )
        assert flat < 0.01 * steep, f"layer {index}: {flat} is left of a gradient of {steep}"


@every_output_and_layout
@torch.no_grad()
def test_reconstructed_in_memory_equals_streamed_and_on_disk(family: str, tmp_path: Path):
    model, text = model_and_stats(family)[0], [tiny_batch(rows=3), tiny_batch(rows=2, length=17, seed=1)]
    path, plan = saved(tmp_path / "source", model), plan_for(family, targets(model)[-1])
    repaired = reconstruct(model, text, plan, progress=False)
    if why := FAMILIES[family].no_stream:
        with pytest.raises(ValueError, match=why):
            stream_reconstruct(path, text, plan, work=tmp_path / "work", progress=False)
    else:
        streamed = stream_reconstruct(path, text, plan, work=tmp_path / "work", progress=False).repairs
        assert streamed.sizes == repaired.repairs.sizes
        for kind in REPAIR_KINDS:
            solved = getattr(streamed, kind)
            for layer, weight in getattr(repaired.repairs, kind).items():
                assert (solved[layer] - weight).norm() <= 1e-4 * weight.norm(), f"{kind}.{layer}"
    slim_checkpoint(path, repaired, tmp_path / "on-disk")
    save_checkpoint(apply_plan(copy.deepcopy(model), repaired), tiny_tokenizer(), tmp_path / "in-memory", "float32")
    require_same_checkpoint(tmp_path / "on-disk", tmp_path / "in-memory")


@every_family_and_layout
def test_a_search_proposes_all_that_a_row_takes_and_nothing_else(family: str):
    model, stats = model_and_stats(family)
    shape, sizes = shape_of(model.config), Sizes(model.config)
    for name, most, step, proposed in (
        ("expert_width", shape.expert_width, 8, sizes.widths), ("num_experts", shape.num_experts, 1, sizes.experts),
        ("kv_groups", shape.kv_groups, 1, sizes.groups),
    ):  # fmt: skip
        for number in range(step, most + 1, step):
            if number in proposed:
                validate_target(model.config, Target(**{name: number}))
            else:
                with pytest.raises(ValueError, match=f"{name}={number} "):
                    validate_target(model.config, Target(**{name: number}))
    found = search_plan(stats, sizes.whole.total - 1)
    fewest = min(found.candidates, key=lambda each: each.num_experts)
    for each in {candidate.size: candidate for candidate in (found.best, fewest, found.candidates[-1])}.values():
        cut = apply_plan(copy.deepcopy(model), found.plan(stats, each))
        assert count_parameters(cut) == (each.total, each.active), each.size
        assert torch.isfinite(cut(**tiny_batch()).logits).all()


@every_family
def test_a_super_expert_is_named_and_stays(family: str):
    model, before = model_and_stats(family)
    model, row = copy.deepcopy(model), FAMILIES[family]
    layer, experts, _ = moe_layers(model)[0]
    reached = before.tokens_LE[0].masked_fill(before.tokens_LE[0] == 0, torch.inf)
    chosen = int(reached.argmin())
    with torch.no_grad():
        row.layout.weights(experts)[row.layout.down][chosen].mul_(1e4)
    stats = collect_stats(model, [tiny_batch()], "lm", progress=False)
    assert list(super_experts_of(stats)[layer]) == [chosen]
    plan = make_plan(stats, Target(num_experts=possible_experts(model.config)[0]), "frequency")
    assert chosen in plan.experts[layer].tolist() and plan.meta.layers[layer].super_experts.keys() == {chosen}


def _sweep_in_process(folder: Path) -> None:
    """Each of two processes has half of the rows."""
    rank, found = PartialState(cpu=True).process_index, {}
    for family in FAMILIES:
        model = tiny_model(family)
        batch = {name: value[2 * rank : 2 * rank + 2] for name, value in tiny_batch().items()}
        stats = collect_stats(model, [batch], "lm", progress=False)
        plan = reconstruct(model, [batch], make_plan(stats, targets(model)[-1], "fisher"), progress=False)
        found[family] = [plan.sha256, float(stats.taylor_LEF.sum()), stats.meta.tokens]
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow  # two processes that import torch and build every family
def test_two_processes_agree_and_see_what_one_sees(tmp_path: Path):
    assert in_two_processes(_sweep_in_process, tmp_path) == [0, 0]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and one.keys() == FAMILIES.keys()
    for family in FAMILIES:
        if FAMILIES[family].capacity_key is not None:
            continue  # an expert's room is counted batch by batch
        alone = collect_stats(tiny_model(family), [tiny_batch()], "lm", progress=False)
        assert one[family][2] == alone.meta.tokens
        assert_close(one[family][1], float(alone.taylor_LEF.sum()), rtol=1e-4, atol=0)
