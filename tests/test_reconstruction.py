"""Reconstruction: what is kept of a projection stands in for what is dropped, as an independent solver says it can."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import LAYOUTS, same_tensors, saved
from test_merged_forms import model_of
from test_merging import PAIRS, copies, scored
from test_plan import fake_stats
from test_surgery import random_plan, whole_target
from test_switch import cut, question
from tiny import EXPERT_WIDTH, NUM_EXPERTS, families, tiny_batch, tiny_model, tiny_tokenizer
from torch.nn.functional import linear
from torch.testing import assert_close

from slimmoe_hf import layer_repair
from slimmoe_hf.checkpoint import _Run, slim_checkpoint
from slimmoe_hf.describe import compare_plans, describe_plan
from slimmoe_hf.families import FAMILIES, SWITCH, family_of, layer_views, moe_layers
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.loading import load_model, weights_sha256
from slimmoe_hf.merged_forms import duplicate_merged, share_merged, unshare
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.reconstruction import reconstruct, without_repairs
from slimmoe_hf.repairs import FILE
from slimmoe_hf.streamed_repair import stream_reconstruct
from slimmoe_hf.student_training import save_checkpoint
from slimmoe_hf.surgery import apply_plan

BATCHES = [tiny_batch(rows=6, length=40, seed=seed) for seed in (1, 2)]
RIDGE = 0.05
REAL_ROUNDED = layer_repair._rounded
NARROWED, GROUPED = families(lambda row: row.no_width), families(lambda row: row.no_groups)


def given(model):
    """Text; an encoder-decoder's pairs are of unequal length, and some of their tokens find no room in an expert."""
    return cut(question(), 2) if model.config.is_encoder_decoder else BATCHES


def solved(model, plan, batches=None, ridge=RIDGE):
    return reconstruct(model, given(model) if batches is None else batches, plan, ridge, progress=False)


def weights(plan):
    """What a plan writes instead of slices, wherever it is, by the names in its file."""
    kinds = {"down_proj": plan.repairs.down_proj, "o_proj": plan.repairs.o_proj}
    return {f"{kind}.{layer}": weight for kind, found in kinds.items() for layer, weight in found.items()}


@torch.no_grad()
def heard(model, batches=None):
    """What reaches every layer's experts and its attention's last projection in whole forward passes, padding left out."""
    batches, family = batches or given(model), family_of(model.config)
    experts, outputs, views = {}, {}, layer_views(model)
    for view in views:
        out, seen = view.attention.get_submodule(family.projections[-1]), outputs.setdefault(view.index, [])
        out.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        if view.experts is not None:
            seen = experts.setdefault(view.index, [])
            view.experts.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args))
    for batch in batches:
        model(**batch)
    for view in views:
        masks = [b["labels"] != -100 if view.paths.stack else b["attention_mask"].bool() for b in batches]
        calls = list(zip(outputs[view.index], (mask.flatten() for mask in masks), strict=True))
        outputs[view.index] = torch.cat([call.flatten(0, 1)[mask] for call, mask in calls])
        if view.index in experts:
            calls = zip(experts[view.index], (mask.flatten() for mask in masks), strict=True)
            parts = zip(*([part[mask] for part in call] for call, mask in calls), strict=True)
            hidden, index, gate = (torch.cat(part) for part in parts)
            if index.dim() == 3:
                index = torch.where(index.any(-1), index.argmax(-1), -1)
            experts[view.index] = hidden, index, gate
    return experts, outputs


def least_squares(kept_SX, missing_SD, plain_DX, ridge):
    """numpy's solution, float64, of the system with a row for every input that stands for the ridge."""
    kept, missing = kept_SX.double().numpy(), missing_SD.double().numpy()
    size = kept.shape[1]
    mu = ridge * (kept**2).sum() / size
    added = np.linalg.lstsq(
        np.concatenate([kept, np.sqrt(mu) * np.eye(size)]), np.concatenate([missing, np.zeros((size, len(plain_DX)))]), None
    )[0]  # fmt: skip
    return plain_DX.double() + torch.from_numpy(added.T)


def near(found, expected, tolerance=1e-6):
    """Equal but for the rounding of float32 activations, norm by norm."""
    assert (found.double() - expected).norm() <= tolerance * expected.norm(), (found.double() - expected).norm()


def activations(experts, into, hidden):
    if not hasattr(experts, "act_fn"):
        return linear(hidden, into).relu()  # a plain unit
    gate, up = linear(hidden, into).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def expected_down(experts, tokens, expert, kept, ridge=RIDGE):
    """The repaired projection of one narrowed expert, `[D, F']`."""
    hidden, index, gate = tokens
    rows, places = torch.where(index == expert)
    act = (activations(experts, experts.gate_up_proj[expert], hidden[rows]) * gate[rows, places, None]).double()
    down = experts.down_proj[expert].double()
    dropped = [f for f in range(down.shape[1]) if f not in kept.tolist()]
    return least_squares(act[:, kept], act[:, dropped] @ down[:, dropped].T, down[:, kept], ridge)


@pytest.mark.parametrize("ridge", [0.05, 0.5])
@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_repaired_experts_equal_an_independent_solution(family, ridge):
    """Narrowed ones, of which one has gone: its tokens are nobody's."""
    model = tiny_model(family)
    plan = random_plan(model, Target(expert_width=16, num_experts=3))
    repaired = solved(model, plan, ridge=ridge)
    experts, _ = heard(model)
    for layer, module, _router in moe_layers(model):
        for number, (old, kept) in enumerate(zip(plan.experts[layer], plan.neurons[layer], strict=True)):
            expected = expected_down(module, experts[layer], int(old), kept, ridge)
            found = repaired.repairs.down_proj[layer][number]
            near(found, expected)
            assert (expected - module.down_proj[old][:, kept]).abs().max() > 1e-2, "nothing was repaired"


@pytest.mark.parametrize("family", GROUPED)
@torch.no_grad()
def test_repaired_attention_equals_an_independent_solution(family):
    model = tiny_model(family)
    plan = random_plan(model, Target(kv_groups=1))
    repaired = solved(model, plan)
    _, outputs = heard(model)
    assert repaired.repairs.o_proj.keys() == {view.index for view in layer_views(model)}
    for view in layer_views(model):
        queries, _ = plan.attention_rows(view.index)
        given, weight = outputs[view.index].double(), view.attention.o_proj.weight.double()
        dropped = [x for x in range(weight.shape[1]) if x not in queries.tolist()]
        expected = least_squares(given[:, queries], given[:, dropped] @ weight[:, dropped].T, weight[:, queries], RIDGE)
        near(repaired.repairs.o_proj[view.index], expected)


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_repaired_merged_experts_equal_an_independent_solution(family):
    model = tiny_model(family, **({"expert_capacity": 3} if family == SWITCH else {}))
    plan, layout = plan_merge(model, fake_stats(model), 2), FAMILIES[family].layout
    repaired = solved(model, plan)
    experts, _ = heard(model)
    merged = apply_plan(copy.deepcopy(model), plan)
    for (layer, module, _), (_, fewer, _) in zip(moe_layers(model), moe_layers(merged), strict=True):
        hidden, index, gate = experts[layer]
        assert family != SWITCH or (index == -1).any(), "no token was beyond the capacity"
        (into, down), (new_into, new_down) = (layout.weights(each).values() for each in (module, fewer))
        for number in range(2):
            kept, missing = [], []
            for member in plan.blends[layer].members(number):
                rows, places = torch.where(index == member)
                here, weight = hidden[rows], gate[rows, places, None]
                own = activations(module, into[member], here) @ down[member].T
                act = activations(fewer, new_into[number], here)
                kept.append((act * weight).double())
                missing.append(((own - act @ new_down[number].T) * weight).double())
            expected = least_squares(torch.cat(kept), torch.cat(missing), new_down[number], RIDGE)
            near(repaired.repairs.down_proj[layer][number], expected)


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_nothing_dropped_is_nothing_changed(family):
    """A plan that says of every neuron and group that it stays."""
    model = tiny_model(family)
    shape = random_plan(model, Target(num_experts=3)).meta.before
    whole = CompressionPlan(
        random_plan(model, Target(expert_width=32)).meta,
        {layer: torch.arange(shape.expert_width).expand(NUM_EXPERTS, -1) for layer, _, _ in moe_layers(model)},
        {} if FAMILIES[family].no_groups else {v.index: torch.arange(shape.kv_groups) for v in layer_views(model)},
    )
    repaired = solved(model, whole)
    assert repaired.repairs
    for view in layer_views(model):
        if view.experts is not None:
            assert torch.equal(repaired.repairs.down_proj[view.index], view.experts.down_proj)
        if view.index in whole.groups:
            assert torch.equal(repaired.repairs.o_proj[view.index], view.attention.o_proj.weight)


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_copies_merged_with_their_originals_are_not_changed(family):
    model, layout = copies(family), FAMILIES[family].layout
    stats = scored(model)
    stats.tokens_LE[:, list(PAIRS)] = 1  # or a pair might lead both groups
    merge = plan_merge(model, stats, 2)
    plain, repaired = (apply_plan(copy.deepcopy(model), plan) for plan in (merge, solved(model, merge)))
    for (_, one, _), (_, other, _) in zip(moe_layers(plain), moe_layers(repaired), strict=True):
        for expert in range(2):
            downs = [layout.weights(each)[layout.down][expert] for each in (one, other)]
            assert_close(*downs, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_plan_that_only_drops_experts_comes_back_as_it_is():
    model = tiny_model("phimoe")
    plan = random_plan(model, Target(num_experts=3))
    assert solved(model, plan) is plan


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_experts_with_little_text_do_not_blow_up(family):
    """On one sequence of two tokens most experts see none, the others fewer than they have neurons."""
    model = tiny_model(family)
    plan = random_plan(model, Target(expert_width=16))
    batch = [{name: value[:1, :2] for name, value in BATCHES[0].items()}]
    repaired = solved(model, plan, batch)
    experts, _ = heard(model, batch)
    unused = 0
    for layer, module, _ in moe_layers(model):
        for expert, kept in enumerate(plan.neurons[layer]):
            found, plain = repaired.repairs.down_proj[layer][expert], module.down_proj[expert][:, kept]
            expected = expected_down(module, experts[layer], expert, kept)
            if not bool((experts[layer][1] == expert).any()):
                unused += 1
                assert torch.equal(found, plain)
            else:
                near(found, expected)
                assert found.norm() < 5 * plain.norm()
    assert unused


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_neurons_that_are_copies_do_not_blow_up(family):
    """All kept neurons the same one: the sums have rank one."""
    model = tiny_model(family)
    for _, experts, _ in moe_layers(model):
        experts.gate_up_proj[:, 1:16] = experts.gate_up_proj[:, :1]
        experts.gate_up_proj[:, 33:48] = experts.gate_up_proj[:, 32:33]
    plan = random_plan(model, Target(expert_width=16))
    same = torch.arange(16).expand(NUM_EXPERTS, -1)
    plan = CompressionPlan(plan.meta, dict.fromkeys(plan.neurons, same), {})
    repaired, (experts, _) = solved(model, plan), heard(model)
    for layer, module, _ in moe_layers(model):
        for expert in range(NUM_EXPERTS):
            expected = expected_down(module, experts[layer], expert, same[expert])
            near(repaired.repairs.down_proj[layer][expert], expected)


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_the_repair_does_not_depend_on_how_text_is_cut_into_batches(family):
    """Rows of unequal length, padded: one batch, or a row at a time without padding."""
    model = tiny_model(family)
    plan = random_plan(model, whole_target(family))
    batch = copy.deepcopy(BATCHES[0])
    lengths = [40, 7, 33, 2, 21, 40]
    for row, length in enumerate(lengths):
        batch["attention_mask"][row, length:] = 0
    rows = [
        {name: value[row : row + 1, :length] for name, value in batch.items()} for row, length in enumerate(lengths)
    ]
    whole, apart = solved(model, plan, [batch]), solved(model, plan, rows)
    said = [plan.meta.repairing.model_dump(exclude={"sha256"}) for plan in (whole, apart)]
    assert said[0] == said[1] and said[0]["tokens"] == sum(lengths)
    for name, weight in weights(whole).items():
        other = weights(apart)[name]
        assert (weight - other).norm() <= 1e-6 * weight.norm(), name


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_the_model_is_left_as_it_was(family):
    model = tiny_model(family).train()
    before, batch = copy.deepcopy(model.state_dict()), BATCHES[0]
    modules = [type(module) for module in model.modules()]
    solved(model, random_plan(model, Target(expert_width=16)))
    assert model.training and [type(module) for module in model.modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("family", NARROWED)
@torch.no_grad()
def test_what_the_kept_can_say_for_the_dropped_is_not_lost(family):
    """Every dropped neuron is a copy of a kept one, and the dropped group of the other: the logits stay, on other text."""
    model, other = tiny_model(family), tiny_batch(seed=9)
    plan = random_plan(model, Target(expert_width=16, kv_groups=None if FAMILIES[family].no_groups else 1))
    for view in layer_views(model):
        if view.experts is not None:
            for expert, kept in enumerate(plan.neurons[view.index]):
                dropped = torch.tensor([f for f in range(EXPERT_WIDTH) if f not in kept.tolist()])
                for side in (0, EXPERT_WIDTH):
                    view.experts.gate_up_proj[expert, dropped + side] = view.experts.gate_up_proj[expert, kept + side]
        if plan.groups:
            for name in ("q_proj", "k_proj", "v_proj"):
                projection = dict(view.attention.named_children())[name]
                for weight in projection.parameters():
                    half = len(weight) // 2
                    weight[:half] = weight[half:].clone()
    expected = model(**other).logits
    plain = apply_plan(copy.deepcopy(model), plan)(**other).logits
    repaired = apply_plan(copy.deepcopy(model), solved(model, plan, ridge=1e-9))(**other).logits
    assert (plain - expected).norm() > 0.1 * expected.norm()
    assert (repaired - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("family", "kind", "layout", "dtype"),
    [
        ("phimoe", "cut", "per expert", "float32"),  # Mixtral's names on disk, and a bias in the attention
        ("qwen3_moe", "merged", "fused", "bfloat16"),  # the usual names, after a dense layer
        (SWITCH, "merged", "fused", "float32"),  # units
    ],
)
def test_repaired_on_disk_equals_repaired_in_memory(family, kind, layout, dtype, tmp_path: Path):
    model = tiny_model(family).to(getattr(torch, dtype))
    source = saved(tmp_path / "source", model, LAYOUTS[layout])
    stats = fake_stats(model)
    plan = plan_merge(model, stats, 2) if kind == "merged" else make_plan(stats, whole_target(family))
    repaired = solved(model, plan)
    repaired.save(tmp_path / "plan")
    read = CompressionPlan.load(tmp_path / "plan")
    assert read.sha256 == repaired.sha256 != plan.sha256
    slim_checkpoint(source, read, tmp_path / "on-disk", shard_bytes=10_000)
    whole = apply_plan(model, repaired)
    save_checkpoint(whole, tiny_tokenizer(), tmp_path / "in-memory", dtype)
    same_tensors(tmp_path / "on-disk", tmp_path / "in-memory")
    plain = load_model(tmp_path / "on-disk", dtype)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in plain.state_dict().items())
    names = FAMILIES[family].layout
    for layer, experts, _ in moe_layers(plain):
        for expert, weight in enumerate(repaired.repairs.down_proj[layer]):
            assert torch.equal(names.weights(experts)[names.down][expert], weight), "the repair did not reach the model"


@pytest.mark.parametrize("family", ["qwen3_moe", SWITCH])  # fused and units, neither with experts in every layer
@torch.no_grad()
def test_every_form_of_a_repaired_merging_says_the_same(family, tmp_path: Path):
    """Layers with numbers of experts of their own; duplicated in memory and on disk, shared, and shared no more."""
    model = model_of(family)
    stats = scored(model)
    stats.tokens_LE[:], stats.tokens_LE[-1, 0] = 25, 900
    plan = solved(model, plan_merge(model, stats, 2, counts="adaptive"))
    plan.save(tmp_path / "plan")
    assert len({len(down) for down in plan.repairs.down_proj.values()}) > 1
    plan, source = CompressionPlan.load(tmp_path / "plan"), saved(tmp_path / "source", model)
    slim_checkpoint(source, plan, tmp_path / "on-disk", duplicate=True)
    again = unshare(share_merged(copy.deepcopy(model), plan))
    duplicated = duplicate_merged(model, plan)
    layout = FAMILIES[family].layout
    for layer, experts, _ in moe_layers(duplicated):
        for expert, down in enumerate(layout.weights(experts)[layout.down] if layer in plan.blends else ()):
            assert torch.equal(down, plan.repairs.down_proj[layer][plan.blends[layer].owner[expert]])
    for other in (again, load_model(tmp_path / "on-disk")):
        for name, weight in other.state_dict().items():
            assert torch.equal(weight, duplicated.state_dict()[name]), name


def test_a_plan_says_that_it_is_repaired_and_refuses_weights_that_do_not_fit(tmp_path: Path):
    model = tiny_model("phimoe")
    plan = random_plan(model, whole_target("phimoe"))
    repaired = solved(model, plan)
    text = describe_plan(repaired)
    assert "ridge 0.05" in text and "480 tokens" in text and "ridge" not in describe_plan(plan)
    shares = [layer.experts_repaired for layer in repaired.meta.layers]
    assert all(0 < share < 1 for share in shares) and f"{shares[0]:.1%}" in text
    assert "reconstructed" in compare_plans(plan, repaired)
    for broken, what in (
        ({"down_proj.0": repaired.repairs.down_proj[0][:, :, :8].contiguous()}, "down_proj.0"),
        ({"o_proj.1": None}, "o_proj.1"),
        ({"down_proj.7": repaired.repairs.down_proj[0].clone()}, "down_proj.7"),
        ({"up_proj.0": repaired.repairs.down_proj[0].clone()}, "unknown tensor up_proj.0"),
    ):
        repaired.save(tmp_path / "plan")
        tensors = {name: tensor for name, tensor in (weights(repaired) | broken).items() if tensor is not None}
        save_file(tensors, tmp_path / "plan" / FILE)
        with pytest.raises(ValueError, match=what):
            CompressionPlan.load(tmp_path / "plan")


@pytest.fixture(scope="module")
def repaired():
    model = tiny_model("phimoe")
    return solved(model, random_plan(model, Target(expert_width=16)))


@pytest.mark.parametrize("told", ["tensors", "hash"])
def test_a_plan_whose_repairs_lie_with_its_indices_is_said_to_be_older(told, repaired, tmp_path: Path):
    repaired.save(tmp_path / "plan")
    indices = load_file(tmp_path / "plan" / "plan.safetensors")
    save_file(indices | weights(repaired), tmp_path / "plan" / "plan.safetensors")
    (tmp_path / "plan" / FILE).unlink()
    if told == "hash":
        values = json.loads((tmp_path / "plan" / "plan.json").read_text())
        del values["repairing"]["sha256"]
        (tmp_path / "plan" / "plan.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"plan.*: a plan of an earlier version .*Make it again") as caught:
        CompressionPlan.load(tmp_path / "plan")
    assert "\n" not in str(caught.value)


def _of_unknown_dtype(tensors, file: Path) -> None:
    save_file(tensors, file)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F4_"'))


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (_of_unknown_dtype, r"repairs\.safetensors: down_proj\.[01] has the dtype F4_"),
        (
            lambda tensors, file: save_file({**tensors, "down_proj.\u00b2": torch.zeros(2)}, file),
            r"unknown tensor down_proj\.",
        ),
        (
            lambda tensors, file: save_file({name: tensor.int() for name, tensor in tensors.items()}, file),
            "expected weights that are floats, found int32",
        ),
    ],
    ids=["unknown dtype", "no number", "integers"],
)
def test_repairs_of_another_kind_are_refused_by_what_they_are(write, what, repaired, tmp_path: Path):
    repaired.save(tmp_path / "plan")
    write(weights(repaired), tmp_path / "plan" / FILE)
    with pytest.raises(ValueError, match=what):
        CompressionPlan.load(tmp_path / "plan")


def test_a_plan_that_was_read_goes_where_the_process_goes_and_says_when_its_folder_went(
    repaired, tmp_path, monkeypatch
):
    repaired.save(tmp_path / "plan")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    read = CompressionPlan.load("plan")
    monkeypatch.chdir(tmp_path / "elsewhere")
    read.repairs.check_same(read.meta.repairing)
    read.save(tmp_path / "plan")
    for plan in (read, CompressionPlan.load(tmp_path / "plan")):
        plan.repairs.check_same(plan.meta.repairing)
    assert plan.sha256 == repaired.sha256
    without_repairs(read).save(tmp_path / "plan")
    assert not CompressionPlan.load(tmp_path / "plan").repairs and not (tmp_path / "plan" / FILE).exists()
    for use in (lambda: read.save(tmp_path / "again"), lambda: apply_plan(tiny_model("phimoe"), read)):
        with pytest.raises(ValueError, match=r"repairs\.safetensors: moved or deleted since its plan was read"):
            use()
    assert not (tmp_path / "again").exists()


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        pytest.param(Path.unlink, "missing or damaged", id="missing"),
        pytest.param(_cut_short, "missing or damaged", id="cut short"),
        pytest.param(_flip, "repairs.safetensors: not the weights that were solved", id="one bit"),
    ],
)
def test_damaged_repairs_are_found_before_anything_is_cut(damage, what, tmp_path: Path):
    model = tiny_model("phimoe")
    solved(model, random_plan(model, whole_target("phimoe"))).save(tmp_path / "plan")
    damage(tmp_path / "plan" / FILE)
    source, before = saved(tmp_path / "source", model), model_sha256(model)
    for cut_to in (lambda plan: apply_plan(model, plan), lambda plan: slim_checkpoint(source, plan, tmp_path / "out")):
        with pytest.raises(ValueError, match=what):
            cut_to(CompressionPlan.load(tmp_path / "plan"))
    assert model_sha256(model) == before and not list(tmp_path.glob("*out*"))


def test_a_cut_with_repairs_continues_where_it_was_stopped_with_the_plan_read_anew(tmp_path: Path, monkeypatch):
    model = tiny_model("phimoe")
    source, plan = saved(tmp_path / "source", model), solved(model, random_plan(model, whole_target("phimoe")))
    plan.save(tmp_path / "plan")
    slim_checkpoint(source, plan, tmp_path / "whole", shard_bytes=10_000)
    real, written = _Run._write_shard, []

    def write(run, name, *given):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return real(run, name, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Run, "_write_shard", write)
        slim_checkpoint(source, CompressionPlan.load(tmp_path / "plan"), tmp_path / "out", shard_bytes=10_000)
    again = []
    monkeypatch.setattr(_Run, "_write_shard", lambda run, name, *given: again.append(name) or real(run, name, *given))
    slim_checkpoint(source, CompressionPlan.load(tmp_path / "plan"), tmp_path / "out", shard_bytes=10_000)
    assert again and not set(again) & set(written)
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "whole")


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_what_is_solved_is_rounded_once_to_what_the_checkpoint_is_in(streamed, tmp_path: Path, monkeypatch):
    """Its float64 solutions are those of the model in float32; half the file, and the cut writes them as they are."""
    source = saved(tmp_path / "source", tiny_model("phimoe").to(torch.bfloat16))
    model, exact = load_model(source), []
    plan = random_plan(model, whole_target("phimoe"))
    monkeypatch.setattr(layer_repair, "_rounded", lambda *args: exact.append(args[:2]) or REAL_ROUNDED(*args))
    if streamed:
        found = stream_reconstruct(source, BATCHES, plan, work=tmp_path / "work", progress=False)
    else:
        found = reconstruct(model, BATCHES, plan, dtype=torch.bfloat16, progress=False)
    expected = [(plain.double() + added).bfloat16() for plain, added in exact]
    got = [each for n in range(2) for each in (*found.repairs.down_proj[n], found.repairs.o_proj[n])]
    assert len(got) == len(expected) and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert found.repairs.bytes * 2 == solved(model, plan).repairs.bytes
    slim_checkpoint(source, found, tmp_path / "slimmed")
    for layer, experts, _ in moe_layers(load_model(tmp_path / "slimmed", "bfloat16")):
        assert torch.equal(experts.down_proj, found.repairs.down_proj[layer])


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    model = tiny_model("phimoe")
    with pytest.raises(ValueError, match="ridge="):
        solved(model, random_plan(model, Target(expert_width=16)), ridge=ridge)


def test_text_without_tokens_is_refused():
    model = tiny_model("phimoe")
    with pytest.raises(ValueError, match="no tokens"):
        solved(model, random_plan(model, Target(expert_width=16)), batches=[])


def test_a_plan_for_other_weights_is_refused():
    plan = make_plan(scored(tiny_model("phimoe")), Target(expert_width=16))
    with pytest.raises(ValueError, match="other weights"):
        solved(tiny_model("phimoe", seed=1), plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", NARROWED)
def test_a_gpu_solves_what_a_cpu_does(family):
    model = tiny_model(family)
    plan = random_plan(model, whole_target(family))
    expected = solved(model, plan)
    found = solved(model.cuda(), plan)
    for name, weight in weights(found).items():
        assert weight.device.type == "cpu"
        near(weight, weights(expected)[name].double(), 1e-4)
