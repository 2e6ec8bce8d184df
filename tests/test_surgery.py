"""Promise 1: a slimmed model equals the original with the dropped neurons, groups and experts masked, for every family."""

import copy
import dataclasses
import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from tiny import families, tiny_batch, tiny_model
from torch.testing import assert_close

from slimmoe_hf.disk import auto_class
from slimmoe_hf.families import FAMILIES, layer_views, shape_of
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.plan import CompressionPlan, Target, make_plan, validate_target
from slimmoe_hf.surgery import apply_plan

TARGETS = [
    Target(expert_width=16),
    Target(kv_groups=1),
    Target(expert_width=8, kv_groups=1),
    Target(num_experts=3),
    Target(num_experts=2),
    Target(expert_width=16, num_experts=3),
    Target(expert_width=8, kv_groups=1, num_experts=2),
]
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "no_bias": {"attention_bias": False, "lm_head_bias": False},
    "wide_heads": {"head_dim": 16},
}


def random_plan(model, target: Target, seed: int = 0) -> CompressionPlan:
    """A plan with random indices, made without any sweep."""
    from test_plan import fake_stats

    return make_plan(fake_stats(model), target, criterion="random", seed=seed)


def masked(model, plan: CompressionPlan):
    """The original with the outputs of dropped neurons and heads zeroed; independent of the surgery's code."""
    model = copy.deepcopy(model)
    shape = shape_of(model.config)
    for view in layer_views(model):
        if view.index in plan.neurons:
            stay = plan.experts.get(view.index, torch.arange(shape.num_experts)).tolist()
            for expert, kept in zip(stay, plan.neurons[view.index], strict=True):
                dropped = [f for f in range(shape.expert_width) if f not in kept.tolist()]
                view.experts.down_proj.data[expert][:, dropped] = 0.0
        if view.index in plan.groups:
            per_group = shape.query_heads // shape.kv_groups
            for head in range(shape.query_heads):
                if head // per_group not in plan.groups[view.index].tolist():
                    columns = slice(head * shape.head_width, (head + 1) * shape.head_width)
                    view.attention.o_proj.weight.data[:, columns] = 0.0
    return model


def whole_target(family: str) -> Target:
    """All that the family can lose."""
    row = FAMILIES[family]
    return Target(expert_width=None if row.no_width else 16, kv_groups=None if row.no_groups else 1, num_experts=3)


@contextmanager
def deselected(model, plan: CompressionPlan):
    """Every router's logits of dropped experts are -inf before softmax and top-k."""
    gone = {}
    for view in layer_views(model):
        if view.index in plan.experts:
            row = torch.ones(shape_of(model.config).num_experts, dtype=torch.bool)
            row[plan.experts[view.index]] = False
            gone[view.router.weight.data_ptr()] = row
    linear = torch.nn.functional.linear

    def masking(inputs, weight, bias=None):
        output = linear(inputs, weight, bias)
        row = gone.get(weight.data_ptr())
        return output if row is None else output.masked_fill(row, float("-inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masking)
        yield


def supported(family: str, target: Target, variant: str) -> None:
    if target.kv_groups and FAMILIES[family].no_groups:
        pytest.skip(FAMILIES[family].no_groups)
    if target.expert_width and FAMILIES[family].no_width:
        pytest.skip(FAMILIES[family].no_width)
    if variant == "attention_bias" and family in ("mixtral", "switch_transformers"):
        pytest.skip("Mixtral's and Switch's attention have no bias")
    if variant == "wide_heads" and family == "switch_transformers":
        pytest.skip("Switch's head width is d_kv, and its heads stay")
    if variant == "no_bias" and family != "phimoe":
        pytest.skip("the other families have no bias by default")
    if variant == "wide_heads" and family == "olmoe":
        pytest.skip("OLMoE's q/k norm is declared as wide as the model, so its heads are D/H wide")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_slimmed_equals_masked(family, target, variant):
    supported(family, target, variant)
    model, batch = tiny_model(family, **VARIANTS[variant]), tiny_batch()
    plan = random_plan(model, target)
    reference = masked(model, plan)
    with deselected(reference, plan):
        expected = reference(**batch).logits
    slimmed = apply_plan(model, plan)
    assert slimmed is model
    assert shape_of(model.config) == plan.meta.after
    assert_close(slimmed(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(expected, tiny_model(family, **VARIANTS[variant])(**batch).logits), "the cut changed nothing"


@pytest.mark.parametrize("variant", ["plain", "tied", "wide_heads"])
@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_slimmed_checkpoint_loads_with_plain_transformers(family, variant, tmp_path, caplog, capfd):
    target = whole_target(family)
    supported(family, target, variant)
    model, batch = tiny_model(family, **VARIANTS[variant]), tiny_batch()
    apply_plan(model, random_plan(model, target))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = auto_class(model.config)
        reloaded, info = plain.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "LOAD REPORT" not in capfd.readouterr().err
    assert torch.equal(reloaded.eval()(**batch).logits, model(**batch).logits)
    assert json.loads((tmp_path / "config.json").read_text()).get("head_dim", 0) is not None


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_generate_with_a_cache_agrees_with_no_cache_after_the_cut(family):
    target = whole_target(family)
    model = tiny_model(family)
    apply_plan(model, random_plan(model, target))
    prompt = tiny_batch(rows=2, length=8)["input_ids"]
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
        "eos_token_id": None,
    }
    cached = model.generate(prompt, use_cache=True, output_logits=True, return_dict_in_generate=True, **options)
    plain = model.generate(prompt, use_cache=False, output_logits=True, return_dict_in_generate=True, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", families())
def test_after_experts_went_the_auxiliary_loss_is_that_of_the_reloaded_model(family, tmp_path):
    """It divides by the number of experts, which several modules keep a copy of."""
    model, batch = tiny_model(family, router_aux_loss_coef=0.5), tiny_batch()
    apply_plan(model, random_plan(model, Target(num_experts=3)))
    model.save_pretrained(tmp_path)
    reloaded = auto_class(model.config).from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, theirs = (each(**batch, output_router_logits=True) for each in (model, reloaded))
    for name in ("encoder_aux_loss", "decoder_aux_loss") if FAMILIES[family].encoder_decoder else ("aux_loss",):
        assert ours[name] > 0 and torch.equal(ours[name], theirs[name]) and torch.equal(ours.loss, theirs.loss)
    numbers = {name: vars(each)["num_experts"] for name, each in model.named_modules() if "num_experts" in vars(each)}
    assert numbers and set(numbers.values()) == {3}, numbers


@pytest.mark.parametrize(
    ("kind", "target"),
    [("experts", Target(num_experts=3)), ("neurons", Target(expert_width=16)), ("groups", Target(kv_groups=1))],
    ids=str,
)
def test_a_plan_that_forgets_a_layer_is_refused_and_nothing_is_changed(kind, target):
    model = tiny_model("phimoe")
    plan = random_plan(model, target)
    lacking = dataclasses.replace(plan, **{kind: {0: plan.kept[kind][0]}})
    with pytest.raises(ValueError, match=rf"drops no {kind} in layers \[1\]; all need the same number"):
        apply_plan(model, lacking)
    with pytest.raises(ValueError, match=f"drops {kind} and does not say which"):
        apply_plan(model, dataclasses.replace(plan, **{kind: {}}))
    assert model_sha256(model) == model_sha256(tiny_model("phimoe"))


def test_frozen_parameters_stay_frozen_and_trainable_ones_trainable():
    model = tiny_model("phimoe")
    view = layer_views(model)[0]
    view.experts.down_proj.requires_grad_(False)
    apply_plan(model, random_plan(model, Target(expert_width=16)))
    assert not view.experts.down_proj.requires_grad
    assert view.experts.gate_up_proj.requires_grad
    view.router.weight.requires_grad_(False)
    apply_plan(model, random_plan(model, Target(num_experts=3)))
    assert not view.experts.down_proj.requires_grad and not view.router.weight.requires_grad
    assert view.experts.gate_up_proj.requires_grad


def test_a_plan_of_another_model_is_refused_and_nothing_is_changed():
    model = tiny_model("phimoe")
    plan = random_plan(tiny_model("phimoe", intermediate_size=64), Target(expert_width=16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="expert_width 64, the model has 32"):
        apply_plan(model, plan)
    with pytest.raises(ValueError, match="the plan is for phimoe, the model is mixtral"):
        apply_plan(tiny_model("mixtral"), plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_two_cuts_in_a_row_equal_one():
    """Slimming a slimmed model composes: 32 -> 16 -> 8 with nested choices is 32 -> 8."""
    once, twice = tiny_model("phimoe"), tiny_model("phimoe")
    wide = random_plan(once, Target(expert_width=16))
    apply_plan(twice, wide)
    narrow = random_plan(twice, Target(expert_width=8), seed=1)
    apply_plan(twice, narrow)
    both = {layer: wide.neurons[layer].gather(-1, narrow.neurons[layer]) for layer in wide.neurons}
    after = validate_target(once.config, Target(expert_width=8))
    apply_plan(once, CompressionPlan(wide.meta.model_copy(update={"after": after}), both, {}))
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
