"""Shape rules, the choice itself, and what a plan keeps on disk."""

import json

import pytest
import torch
from tiny import EXPERT_WIDTH, tiny_model

from slimmoe_hf.criteria import CRITERIA
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.families import FAMILIES, layer_views, moe_layers, shape_of
from slimmoe_hf.plan import CompressionPlan, Target, alignment_note, make_plan, validate_target
from slimmoe_hf.stats import ExpertStats, StatsMeta


def fake_stats(model, seed: int = 0) -> ExpertStats:
    """Statistics with made-up positive numbers of the right shapes."""
    shape, layers = shape_of(model.config), [index for index, _, _ in moe_layers(model)]
    generator = torch.Generator().manual_seed(100 + seed)

    def numbers(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64) + 0.1

    neuron = (len(layers), shape.num_experts, shape.expert_width)
    head = (len(layer_views(model)), shape.query_heads)
    return ExpertStats(
        meta=StatsMeta(
            family=model.config.model_type, config=model.config.to_dict(), layers=layers, loss="lm", tokens=1000,
            sequences=10, data_sha256="d", model_sha256="m",
        ),
        tokens_LE=torch.full(neuron[:2], 100.0, dtype=torch.float64),
        **{name: numbers(*neuron) for name in (*ExpertStats.NEURON_SUMS, "input_norm_LEF", "down_norm_LEF")},
        **{name: numbers(*head) for name in (*ExpertStats.HEAD_SUMS, "head_out_norm_AH")},
        group_norm_AG=numbers(head[0], shape.kv_groups),
    )  # fmt: skip


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_keeps_its_own_best_neurons(family, criterion):
    model = tiny_model(family)
    stats = fake_stats(model)
    plan = make_plan(stats, Target(expert_width=16), criterion)
    scores_LEF = CRITERIA[criterion](stats, 0).neurons_LEF
    for row, layer in enumerate(stats.meta.layers):
        for expert, kept in enumerate(plan.neurons[layer].tolist()):
            scores = scores_LEF[row, expert]
            dropped = [f for f in range(EXPERT_WIDTH) if f not in kept]
            assert len(set(kept)) == 16 and kept == sorted(kept)
            assert scores[kept].min() >= scores[dropped].max()
    plan.check()


def test_each_layer_keeps_its_own_best_groups():
    model = tiny_model("qwen3_moe")
    stats = fake_stats(model)
    plan = make_plan(stats, Target(kv_groups=1), "taylor")
    assert set(plan.groups) == {0, 1, 2}, "dense layers have attention too"
    for layer, kept in plan.groups.items():
        heads = stats.head_taylor_AH[layer]
        assert kept.item() == int(heads[2:].sum() > heads[:2].sum())


def test_ties_go_to_the_lower_index():
    stats = fake_stats(tiny_model("phimoe"))
    stats.taylor_LEF.fill_(1.0)
    plan = make_plan(stats, Target(expert_width=8), "taylor")
    assert all(index.tolist() == [list(range(8))] * 4 for index in plan.neurons.values())


def test_an_expert_that_no_token_reached_is_ranked_by_weight_norms():
    stats = fake_stats(tiny_model("phimoe"))
    stats.tokens_LE[1, 2] = 0
    stats.taylor_LEF[1, 2] = 0.0
    plan, by_norm = (make_plan(stats, Target(expert_width=8), name) for name in ("taylor", "magnitude"))
    assert torch.equal(plan.neurons[1][2], by_norm.neurons[1][2])
    assert not torch.equal(plan.neurons[1][1], by_norm.neurons[1][1])
    assert [layer.unknown_experts for layer in plan.meta.layers] == [0, 1]
    assert "1 expert that no calibration token reached" in describe_plan(plan)


def test_saved_and_loaded_a_plan_is_the_same(tmp_path):
    plan = make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=16, kv_groups=1))
    plan.save(tmp_path / "plan")
    loaded = CompressionPlan.load(tmp_path / "plan")
    assert loaded.meta == plan.meta
    assert loaded.sha256 == plan.sha256
    assert all(torch.equal(loaded.neurons[layer], plan.neurons[layer]) for layer in plan.neurons)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan"], "nothing is left beside it"


def test_the_hash_is_of_the_decision():
    stats = fake_stats(tiny_model("phimoe"))
    plan = make_plan(stats, Target(expert_width=16))
    assert plan.sha256 == make_plan(stats, Target(expert_width=16), "taylor", seed=7).sha256
    assert plan.sha256 != make_plan(stats, Target(expert_width=16), "random").sha256
    assert plan.sha256 != make_plan(stats, Target(expert_width=8)).sha256


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(), "the target asks for nothing"),
        (Target(expert_width=0), "expert_width=0 is not between 8 and the model's width of 32"),
        (Target(expert_width=64), "expert_width=64 is not between 8 and the model's width of 32"),
        (Target(expert_width=20), r"expert_width=20 is not a multiple of 8.* Nearest: 16 or 24"),
        (Target(kv_groups=0), "kv_groups=0 is not between 1 and the model's 2"),
        (Target(kv_groups=3), "kv_groups=3 is not between 1 and the model's 2"),
    ],
    ids=str,
)
def test_an_illegal_target_is_one_line_with_the_legal_sizes(target, message):
    model = tiny_model("phimoe")
    with pytest.raises(ValueError, match=message) as error:
        validate_target(model.config, target)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        make_plan(fake_stats(model), target)


def test_what_a_family_cannot_do_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="OLMoE normalises queries and keys over all heads"):
        validate_target(tiny_model("olmoe").config, Target(kv_groups=1))


def test_a_misspelt_criterion_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"criterion 'tailor' is unknown.*Did you mean taylor\?"):
        make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=8), "tailor")


@pytest.mark.parametrize("damage", ["no json", "not json", "no tensors", "cut short", "duplicate index", "too large"])
def test_a_damaged_plan_is_refused_by_name(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "plan"
    make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=16)).save(folder)
    if damage == "no json":
        (folder / "plan.json").unlink()
    elif damage == "not json":
        (folder / "plan.json").write_text("{")
    elif damage == "no tensors":
        (folder / "plan.safetensors").unlink()
    elif damage == "cut short":
        (folder / "plan.safetensors").write_bytes((folder / "plan.safetensors").read_bytes()[:-64])
    else:
        tensors = load_file(folder / "plan.safetensors")
        tensors["neurons.0"][0, -1] = tensors["neurons.0"][0, -2] if damage == "duplicate index" else EXPERT_WIDTH
        save_file(tensors, folder / "plan.safetensors")
    with pytest.raises(ValueError, match=r"plan|neurons\.0") as error:
        CompressionPlan.load(folder)
    assert "\n" not in str(error.value)


def test_a_plan_is_json_and_safetensors_only(tmp_path):
    make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=16)).save(tmp_path / "plan")
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.safetensors"]
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["target"] == {
        "expert_width": 16,
        "kv_groups": None,
    }


def test_alignment_says_what_a_width_opens():
    assert alignment_note(960).startswith("width 960 is a multiple of 8, 32, 64; not of 128 (FP8")
    assert alignment_note(512) == "width 512 is a multiple of 8, 32, 64, 128, 256"
