"""Shape rules, the choice itself, and what a plan keeps on disk."""

import dataclasses
import json

import pytest
import torch
from tiny import EXPERT_WIDTH, NUM_EXPERTS, families, tiny_model
from torch.testing import assert_close

from slimmoe_hf.criteria import CRITERIA, EXPERT_CRITERIA
from slimmoe_hf.describe import alignment_note, compare_plans, describe_plan
from slimmoe_hf.families import layer_views, moe_layers, shape_of
from slimmoe_hf.plan import CompressionPlan, Target, make_plan, validate_target
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
        tokens_LE=100 * numbers(*neuron[:2]).round(decimals=2),
        router_gram_LEE=numbers(*neuron[:2], shape.num_experts),
        **{name: numbers(*neuron[:2]) for name in ExpertStats.EXPERT_SUMS},
        **{name: numbers(*neuron) for name in (*ExpertStats.NEURON_SUMS, "input_norm_LEF", "down_norm_LEF")},
        **{name: numbers(*head) for name in (*ExpertStats.HEAD_SUMS, "head_out_norm_AH")},
        group_norm_AG=numbers(head[0], shape.kv_groups),
    )  # fmt: skip


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", families(lambda row: row.no_width))
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


@pytest.mark.parametrize("criterion", EXPERT_CRITERIA)
@pytest.mark.parametrize("family", families())
def test_each_layer_keeps_its_own_best_experts(family, criterion):
    stats = fake_stats(tiny_model(family))
    plan = make_plan(stats, Target(num_experts=2), criterion)
    scores_LE = EXPERT_CRITERIA[criterion](stats, 0)
    assert sorted(plan.experts) == stats.meta.layers and plan.meta.after.num_experts == 2 and not plan.neurons
    for row, layer in enumerate(stats.meta.layers):
        kept = plan.experts[layer].tolist()
        dropped = [expert for expert in range(NUM_EXPERTS) if expert not in kept]
        assert kept == sorted(kept) and len(kept) == 2
        assert scores_LE[row, kept].min() >= scores_LE[row, dropped].max()
    assert plan.meta.expert_criterion == criterion
    plan.check()


def test_neurons_are_chosen_within_the_experts_that_stay_whatever_chose_those():
    stats = fake_stats(tiny_model("qwen3_moe"))
    both = make_plan(stats, Target(expert_width=16, num_experts=2), "energy", expert_criterion="reap")
    width, experts = (
        make_plan(stats, Target(expert_width=16), "energy"),
        make_plan(stats, Target(num_experts=2), "reap"),
    )
    for layer, kept in experts.experts.items():
        assert torch.equal(both.experts[layer], kept)
        assert torch.equal(both.neurons[layer], width.neurons[layer][kept])
    assert "by energy, experts by reap" in describe_plan(both)
    alone = make_plan(stats, Target(num_experts=2))
    assert "num_experts=2, by reap (" in describe_plan(alone), "energy chose nothing"


def test_the_expert_criteria_are_what_they_say():
    stats = fake_stats(tiny_model("phimoe"))
    assert torch.equal(EXPERT_CRITERIA["taylor"](stats, 0), stats.taylor_LEF.sum(-1))
    mean = stats.act_sq_LEF / stats.tokens_LE[..., None] * stats.grad_sq_LEF / stats.tokens_LE[..., None]
    assert_close(EXPERT_CRITERIA["output_fisher"](stats, 0), mean.sum(-1) * stats.tokens_LE)
    assert torch.equal(EXPERT_CRITERIA["frequency"](stats, 0), stats.tokens_LE)
    assert torch.equal(EXPERT_CRITERIA["soft_frequency"](stats, 0), stats.probability_LE)
    assert_close(EXPERT_CRITERIA["reap"](stats, 0), stats.gated_norm_LE / stats.tokens_LE)
    norms = (stats.input_norm_LEF**2 + stats.down_norm_LEF**2).sum(-1).sqrt()
    assert_close(EXPERT_CRITERIA["magnitude"](stats, 0), norms)
    assert not torch.equal(EXPERT_CRITERIA["random"](stats, 0), EXPERT_CRITERIA["random"](stats, 1))


@pytest.mark.parametrize("criterion", ["taylor", "reap", "soft_frequency"])
def test_an_expert_that_no_token_reached_ranks_after_all_known_ones_and_among_its_like_by_weight_norm(criterion):
    stats = fake_stats(tiny_model("phimoe"))
    stats.tokens_LE[1, [0, 2, 3]] = 0
    kept = make_plan(stats, Target(num_experts=2), criterion).experts[1].tolist()
    norms = EXPERT_CRITERIA["magnitude"](stats, 0)[1]
    assert 1 in kept and (set(kept) - {1}).pop() == max([0, 2, 3], key=lambda expert: norms[expert])
    assert_close(
        make_plan(stats, Target(num_experts=1 + 1), "magnitude").experts[1], norms.topk(2).indices.sort().values
    )


@pytest.mark.parametrize(
    ("target", "criteria", "message"),
    [
        (Target(num_experts=3), ("energy", "activation"), r"'activation' does not score whole experts. Set expert_criterion to"),
        (Target(expert_width=8), ("reap", None), r"'reap' scores whole experts only.*expert_criterion='reap'"),
        (Target(num_experts=3), ("taylor", "frequencey"), r"'frequencey' is unknown.*Did you mean frequency\?"),
        (Target(expert_width=8), ("taylor", "energy"), r"'energy' does not score whole experts"),
    ],
    ids=str,
)  # fmt: skip
def test_a_criterion_that_does_not_score_what_is_cut_is_refused(target, criteria, message):
    with pytest.raises(ValueError, match=message) as error:
        make_plan(fake_stats(tiny_model("phimoe")), target, criteria[0], expert_criterion=criteria[1])
    assert "\n" not in str(error.value)


def test_the_defaults_are_energy_and_where_a_criterion_scores_no_experts_reap():
    """A criterion that scores experts too chooses them, as ever; `energy` does not, and then `reap` does."""
    stats, target = fake_stats(tiny_model("phimoe")), Target(expert_width=16, kv_groups=1, num_experts=3)
    assert make_plan(stats, target).sha256 == make_plan(stats, target, "energy", expert_criterion="reap").sha256
    assert make_plan(stats, target, "activation").meta.expert_criterion == "reap"
    assert make_plan(stats, target, "taylor").meta.expert_criterion == "taylor"


def test_plans_and_statistics_from_before_experts_could_be_dropped_still_load(tmp_path):
    stats = fake_stats(tiny_model("phimoe"))
    old = dataclasses.replace(stats, probability_LE=None, gated_norm_LE=None)
    old.save(tmp_path / "stats")
    loaded = ExpertStats.load(tmp_path / "stats")
    assert loaded.sha256 == old.sha256 != stats.sha256
    plan = make_plan(loaded, Target(expert_width=16, num_experts=3), "taylor")
    assert plan.sha256 == make_plan(stats, Target(expert_width=16, num_experts=3), "taylor").sha256
    with pytest.raises(ValueError, match=r"'reap' needs a sum that these statistics lack.*Score again"):
        make_plan(loaded, Target(num_experts=3))
    narrow = make_plan(loaded, Target(expert_width=16))
    narrow.save(tmp_path / "plan")
    values = json.loads((tmp_path / "plan" / "plan.json").read_text())
    del values["target"]["num_experts"], values["expert_criterion"]
    for layer in values["layers"]:
        del layer["experts_kept"], layer["expert_score_kept"]
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(values))
    assert CompressionPlan.load(tmp_path / "plan").meta == narrow.meta


def test_what_is_shown_names_the_experts_and_compares_neurons_of_those_that_both_keep():
    stats = fake_stats(tiny_model("phimoe"))
    one = make_plan(stats, Target(expert_width=16, num_experts=3))
    other = make_plan(stats, Target(expert_width=16, num_experts=2))
    shown = describe_plan(one)
    assert "experts 4 -> 3" in shown and ",".join(map(str, one.experts[1].tolist())) in shown.splitlines()[-1]
    rows = compare_plans(one, other).splitlines()[-2:]
    assert all(row.split()[-4:] == ["100.0%", "50.0%", "-", "100.0%"] for row in rows), "a subset, scored alike"


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
    plan = make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=16, kv_groups=1, num_experts=3))
    plan.save(tmp_path / "plan")
    loaded = CompressionPlan.load(tmp_path / "plan")
    assert loaded.meta == plan.meta
    assert loaded.sha256 == plan.sha256
    for kind, kept in plan.kept.items():
        assert kept and all(torch.equal(loaded.kept[kind][layer], index) for layer, index in kept.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan"], "nothing is left beside it"


def test_the_hash_is_of_the_decision():
    stats = fake_stats(tiny_model("phimoe"))
    plan = make_plan(stats, Target(expert_width=16))
    assert plan.sha256 == make_plan(stats, Target(expert_width=16), "energy", seed=7).sha256
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
        (Target(num_experts=1), "num_experts=1 is not between the 2 that a token is sent to and the model's 4 experts"),
        (Target(num_experts=5), "num_experts=5 is not between the 2 that a token is sent to and the model's 4 experts"),
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


@pytest.mark.parametrize(
    "damage", ["no json", "not json", "no tensors", "cut short", "duplicate index", "too large", "no experts"]
)
def test_a_damaged_plan_is_refused_by_name(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "plan"
    make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=16, num_experts=3)).save(folder)
    if damage == "no json":
        (folder / "plan.json").unlink()
    elif damage == "not json":
        (folder / "plan.json").write_text("{")
    elif damage == "no tensors":
        (folder / "plan.safetensors").unlink()
    elif damage == "cut short":
        (folder / "plan.safetensors").write_bytes((folder / "plan.safetensors").read_bytes()[:-64])
    elif damage == "no experts":
        tensors = load_file(folder / "plan.safetensors")
        save_file({n: t for n, t in tensors.items() if "experts" not in n}, folder / "plan.safetensors")
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
        "num_experts": None,
    }


def test_alignment_says_what_a_width_opens():
    assert alignment_note(960).startswith("width 960 is a multiple of 8, 32, 64; not of 128 (FP8")
    assert alignment_note(512) == "width 512 is a multiple of 8, 32, 64, 128, 256"
