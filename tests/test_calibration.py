"""The sweep against plain weight gradients, and what it must not depend on."""

import copy

import pytest
import torch
from tiny import NUM_EXPERTS, expert_output, families, save_tiny, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

from slimmoe_hf import taps
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.criteria import CRITERIA, EXPERT_CRITERIA, OF_GRADIENTS, calibration_loss
from slimmoe_hf.families import FAMILIES, layer_views, moe_layers, shape_of
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.plan import Target, make_plan
from slimmoe_hf.search import search_plan
from slimmoe_hf.stats import ExpertStats


def split(batch, size):
    rows = batch["input_ids"].shape[0]
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, rows, size)]


def rel(a, b):
    """Norm-wise relative difference (single neurons may differ more in float32)."""
    return ((a - b).norm() / b.norm()).item()


def down_gradients(experts):
    """The output projection of every expert with its gradient."""
    if "down_proj" in dict(experts.named_parameters()):
        return zip(experts.down_proj, experts.down_proj.grad, strict=True)
    weights = [unit.wo.weight for unit in experts.children()]
    return [(weight, torch.zeros_like(weight) if weight.grad is None else weight.grad) for weight in weights]


@pytest.mark.parametrize("loss", ["lm", "kd_topk"])
@pytest.mark.parametrize("family", families())
def test_mask_gradients_equal_weight_gradient_sums(family, loss):
    """dL/dm = sum_d W_down[d, f] grad(W_down)[d, f], sequence by sequence, with the loss written out here."""
    model, batch = tiny_model(family), tiny_batch(rows=3)
    stats = collect_stats(model, [batch], loss, progress=False)
    neuron = {index: torch.zeros(NUM_EXPERTS, 32, dtype=torch.float64) for index in stats.meta.layers}
    heads = torch.zeros(len(layer_views(model)), 4, dtype=torch.float64)
    for row in split(batch, 1):
        model.zero_grad()
        ahead = 0 if FAMILIES[family].encoder_decoder else 1
        logits = model(**row).logits[0, : len(row["labels"][0]) - ahead]
        logprobs = logits.log_softmax(-1)
        if loss == "lm":
            value = -logprobs.gather(-1, row["labels"][0, ahead:, None]).sum()
        else:
            teacher = logprobs.detach()
            top = teacher.topk(8).indices
            value = (teacher.exp() * (teacher - logprobs)).gather(-1, top).sum()
        value.backward()
        for index, experts, _ in moe_layers(model):
            for expert, (weight, gradient) in enumerate(down_gradients(experts)):
                neuron[index][expert] += (weight * gradient).sum(0).abs().double()
        for view in layer_views(model):
            out = view.attention.get_parameter(f"{FAMILIES[family].projections[-1]}.weight")
            columns = (out * out.grad).sum(0)
            heads[view.index] += columns.view(4, -1).sum(-1).abs().double()
    assert rel(stats.taylor_LEF, torch.stack([neuron[i] for i in stats.meta.layers])) < 1e-4
    assert rel(stats.head_taylor_AH, heads) < 1e-4


@pytest.mark.parametrize("family", families())
def test_statistics_do_not_depend_on_the_batch_size(family):
    model, batch = tiny_model(family), tiny_batch(rows=4)
    whole = collect_stats(model, [batch], progress=False)
    single = collect_stats(model, split(batch, 1), progress=False)
    for name, tensor in whole.tensors().items():
        assert rel(single.tensors()[name], tensor) < 1e-4, name
    assert whole.meta == single.meta


def test_activation_statistics_equal_a_direct_computation():
    model, batch = tiny_model("mixtral"), tiny_batch(rows=2)
    stats = collect_stats(model, [batch], progress=False)
    seen = {}
    experts = moe_layers(model)[1][1]
    experts.register_forward_pre_hook(lambda _m, args: seen.update(zip(("x", "index", "gate"), args, strict=True)))
    model(input_ids=batch["input_ids"])
    for expert in range(NUM_EXPERTS):
        token, slot = (seen["index"] == expert).nonzero(as_tuple=True)
        gate, up = (seen["x"][token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up
        assert stats.tokens_LE[1, expert] == len(token)
        assert rel(stats.act_sq_LEF[1, expert], act.square().sum(0)) < 1e-5
        weighted = act * seen["gate"][token, slot, None]
        assert rel(stats.gated_act_sq_LEF[1, expert], weighted.square().sum(0)) < 1e-5


@pytest.mark.parametrize("family", families())
def test_expert_statistics_equal_a_direct_computation(family):
    model, batch = tiny_model(family), tiny_batch(rows=2)
    stats = collect_stats(model, [batch], progress=False)
    seen = {}
    index, experts, router = moe_layers(model)[-1]
    row = stats.meta.layers.index(index)
    experts.register_forward_pre_hook(lambda _m, args: seen.update(zip(("x", "index", "gate"), args, strict=True)))
    plain = FAMILIES[family].layout.unit is not None
    router.register_forward_hook(lambda _m, _args, output: seen.update(logits=output if plain else output[0]))
    model(**batch)
    assert rel(stats.probability_LE[row], seen["logits"].reshape(-1, NUM_EXPERTS).softmax(-1).sum(0)) < 1e-5
    for expert in range(NUM_EXPERTS):
        chosen = seen["index"][..., expert] == 1 if plain else seen["index"] == expert
        token, slot = chosen.nonzero(as_tuple=True)
        out = expert_output(model, experts, expert, seen["x"][token])
        assert stats.tokens_LE[row, expert] == len(token)
        assert rel(stats.gated_norm_LE[row, expert], (out.norm(dim=-1) * seen["gate"][token, slot]).sum()) < 1e-5
        assert rel(stats.output_max_LE[row, expert], out.abs().max()) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_how_many_neurons_are_recorded_at_a_time_changes_nothing(padded, monkeypatch):
    model, batch = tiny_model("phimoe"), tiny_batch(rows=3)
    if padded:
        batch["attention_mask"][0, 10:] = 0
    whole = collect_stats(model, [batch], progress=False)
    monkeypatch.setattr(taps, "BLOCK", 700)  # 4 or 5 of 32 neurons of 144 token-expert pairs
    for name, tensor in collect_stats(model, [batch], progress=False).tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name


@pytest.mark.parametrize("family", families())
def test_one_forward_pass_sums_what_a_sweep_with_gradients_does(family, monkeypatch):
    """Bit by bit; and nothing is differentiated."""
    model, batch = tiny_model(family), tiny_batch(rows=3)
    batch["attention_mask"][0, 10:] = 0
    whole = collect_stats(model, split(batch, 2), "lm", progress=False)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    forward = collect_stats(model, split(batch, 2), "none", progress=False)
    assert whole.tensors().keys() - forward.tensors().keys() == set(ExpertStats.GRADIENT_SUMS)
    for name, tensor in forward.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
    assert forward.meta == whole.meta.model_copy(update={"loss": "none"})


def test_a_sweep_without_gradients_serves_all_that_look_at_none_and_no_others(tmp_path):
    model, batch = tiny_model("phimoe"), tiny_batch(rows=3)
    collect_stats(model, [batch], "none", progress=False).save(tmp_path / "stats")
    stats, whole = ExpertStats.load(tmp_path / "stats"), collect_stats(model, [batch], progress=False)
    target = Target(expert_width=16, num_experts=3, kv_groups=1)
    for criterion in sorted({*CRITERIA, *EXPERT_CRITERIA}):
        target_of = target if criterion in CRITERIA else Target(num_experts=3)
        if criterion in OF_GRADIENTS:
            with pytest.raises(
                ValueError, match=f"criterion '{criterion}' looks at gradients.* --loss kd_topk, or .*: energy,"
            ):
                make_plan(stats, target_of, criterion)
            with pytest.raises(ValueError, match=f"criterion '{criterion}' looks at gradients"):
                make_plan(stats, target_of, "energy", expert_criterion=criterion)
        else:
            plans = [make_plan(each, target_of, criterion) for each in (stats, whole)]
            assert [plan.meta.loss for plan in plans] == ["none", "kd_topk"]
            layers = [each.model_dump() for plan in plans for each in plan.meta.layers]
            assert layers[: len(layers) // 2] == layers[len(layers) // 2 :], criterion
    with pytest.raises(ValueError, match=r"a search for a budget looks at gradients.* or name the sizes"):
        search_plan(stats, "0.6x")
    with pytest.raises(ValueError, match=r"compares with no teacher"):
        collect_stats(model, [batch], "none", model, progress=False)


@pytest.mark.parametrize(
    ("asked", "criteria", "searched", "loss"),
    [
        (None, ("energy",), False, "none"), (None, ("magnitude", "frequency"), False, "none"), (None, ("reap",), False, "none"),
        (None, ("taylor",), False, "kd_topk"), (None, ("energy", "output_fisher"), False, "kd_topk"),
        (None, ("energy",), True, "kd_topk"), ("lm", ("energy",), False, "lm"), ("kd_topk", ("energy",), False, "kd_topk"),
        ("none", ("energy", "reap"), False, "none"), ("none", ("fisher",), False, "criterion 'fisher' looks at gradients"),
        ("none", ("energy", "taylor"), False, "criterion 'taylor'"), ("none", ("energy",), True, "a search for a budget"),
    ],
)  # fmt: skip
def test_gradients_are_taken_where_somebody_looks_at_them(asked, criteria, searched, loss):
    if " " in loss:
        with pytest.raises(ValueError, match=f"loss 'none': {loss}"):
            calibration_loss(asked, *criteria, searched=searched)
    else:
        assert calibration_loss(asked, *criteria, searched=searched) == loss


def test_padding_counts_for_nothing():
    model, batch = tiny_model("phimoe"), tiny_batch(rows=3)
    pad = torch.nn.functional.pad
    padded = {
        "input_ids": pad(batch["input_ids"], (0, 9), value=1),
        "attention_mask": pad(batch["attention_mask"], (0, 9)),
    }
    without, with_padding = (collect_stats(model, [b], progress=False) for b in (batch, padded))
    for name, tensor in without.tensors().items():
        assert rel(with_padding.tensors()[name], tensor) < 1e-4, name
    assert with_padding.meta == without.meta


def test_a_packed_row_counts_its_documents_apart():
    """Two documents in one row with position ids give the same sums as two rows."""
    model, batch = tiny_model("mixtral"), tiny_batch(rows=2)
    apart = collect_stats(model, [{"input_ids": batch["input_ids"]}], progress=False)
    packed = {"input_ids": batch["input_ids"].reshape(1, -1), "position_ids": torch.arange(24).repeat(2).unsqueeze(0)}
    together = collect_stats(model, [packed], progress=False)
    assert together.meta.sequences == 2
    for name, tensor in apart.tensors().items():
        assert rel(together.tensors()[name], tensor) < 1e-4, name


def test_masked_labels_are_not_differentiated():
    model, batch = tiny_model("phimoe"), tiny_batch(rows=2)
    labels = batch["labels"].clone()
    labels[1] = -100
    first_only = collect_stats(model, [split(batch, 1)[0]], "lm", progress=False)
    masked = collect_stats(model, [{**batch, "labels": labels}], "lm", progress=False)
    assert rel(masked.taylor_LEF, first_only.taylor_LEF) < 1e-4
    assert masked.tokens_LE.sum() == 2 * first_only.tokens_LE.sum(), "but their activations count"


def test_another_teacher_gives_other_scores_and_is_recorded():
    model, teacher, batch = tiny_model("phimoe"), tiny_model("phimoe", seed=1), tiny_batch()
    own, other = (
        collect_stats(model, [batch], progress=False),
        collect_stats(model, [batch], teacher=teacher, progress=False),
    )
    assert own.meta.teacher_sha256 is None
    assert other.meta.teacher_sha256 == model_sha256(teacher)
    assert rel(own.taylor_LEF, other.taylor_LEF) > 0.1
    assert own.taylor_LEF.sum() > 0, "the top-8 loss against itself has a gradient"


def test_the_sweep_leaves_the_model_as_it_was():
    model = tiny_model("phimoe").train()
    model.model.norm.weight.requires_grad_(False)
    before, config, implementation = (
        copy.deepcopy(model.state_dict()),
        model.config.to_dict(),
        model.config._experts_implementation,
    )
    collect_stats(model, [tiny_batch()], progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.config.to_dict() == config
    assert model.config._experts_implementation == implementation
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_user_function_can_be_the_loss():
    def entropy(logits_NV, teacher_logits_NV, labels_N):
        return -(logits_NV.softmax(-1) * logits_NV.log_softmax(-1)).sum(-1)

    stats = collect_stats(tiny_model("olmoe"), [tiny_batch()], entropy, progress=False)
    assert stats.meta.loss == "entropy" and stats.taylor_LEF.sum() > 0


def test_saved_and_loaded_statistics_are_the_same(tmp_path):
    stats = collect_stats(tiny_model("qwen3_moe"), [tiny_batch()], progress=False)
    stats.save(tmp_path / "stats.safetensors")
    loaded = ExpertStats.load(tmp_path / "stats.safetensors")
    assert loaded.sha256 == stats.sha256 and loaded.meta == stats.meta
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    (tmp_path / "cut").write_bytes((tmp_path / "stats.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        ExpertStats.load(tmp_path / "cut")


def test_statistics_do_not_say_where_the_model_was_loaded_from(tmp_path):
    hashes = set()
    for name in ("here", "there"):
        save_tiny(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        stats = collect_stats(model, [tiny_batch()], progress=False)
        assert str(tmp_path) not in stats.meta.model_dump_json()
        hashes.add(stats.sha256)
    assert len(hashes) == 1


def test_non_finite_weights_stop_the_sweep_with_the_batch_named():
    model = tiny_model("phimoe")
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="calibration loss of batch 0 is nan"):
        collect_stats(model, [tiny_batch()], progress=False)
    assert all(p.requires_grad for p in model.parameters()), "and the model is put back"


def test_unknown_loss_and_empty_data_are_refused():
    with pytest.raises(ValueError, match="calibration loss 'ce' is unknown; use one of lm, kd_topk, none"):
        collect_stats(tiny_model("phimoe"), [tiny_batch()], "ce", progress=False)
    with pytest.raises(ValueError, match="no tokens"):
        collect_stats(tiny_model("phimoe"), [], progress=False)


@pytest.mark.parametrize("family", families())
def test_the_weights_hash_is_of_the_values_whatever_the_dtype(family):
    model = tiny_model(family).to(torch.bfloat16)
    assert model_sha256(model) == model_sha256(copy.deepcopy(model).float())
    changed = copy.deepcopy(model)
    next(moe_layers(changed)[0][1].parameters()).data.flatten()[0] += 1
    assert model_sha256(model) != model_sha256(changed)
    assert shape_of(model.config) == shape_of(changed.config)


@pytest.mark.parametrize("family", families())
def test_what_the_teacher_is_asked_does_not_count_though_it_be_the_model_itself(family):
    model = tiny_model(family)
    alone, taught = (collect_stats(model, [tiny_batch()], teacher=teacher, progress=False) for teacher in (None, model))
    for name, tensor in alone.tensors().items():
        assert rel(taught.tensors()[name], tensor) < 1e-5, name
