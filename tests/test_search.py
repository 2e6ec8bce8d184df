"""Experts against width against groups: shapes within a budget, what they are predicted to lose, and what is measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from test_plan import fake_stats
from tiny import (
    EXPERT_WIDTH,
    KV_GROUPS,
    NUM_EXPERTS,
    documents,
    families,
    save_tiny,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
    write_text,
)
from transformers import AutoConfig

from slimmoe_hf import cli, search_command
from slimmoe_hf.budget import Sizes, parse_budget
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.criteria import choose, expert_ranking, output_fisher, ranking
from slimmoe_hf.evaluation import HeldOut, held_out
from slimmoe_hf.families import moe_layers
from slimmoe_hf.plan import CompressionPlan, Target
from slimmoe_hf.predicted_loss import POWER, Losses, Lost, Weights, fitted, wanted_widths
from slimmoe_hf.search import search_plan
from slimmoe_hf.search_check import check_search
from slimmoe_hf.sizing import parameter_counts, slimmed_config
from slimmoe_hf.surgery import apply_plan


@pytest.mark.parametrize("family", families())
def test_sizes_are_what_slimmoe_size_counts(family):
    config = tiny_model(family).config
    sizes = Sizes(config)
    shapes = list(itertools.product(sizes.experts, sizes.widths, sizes.groups))
    assert len(shapes) >= 3
    for experts, width, groups in shapes[:-1:2]:
        target = Target(num_experts=experts, expert_width=width, kv_groups=groups)
        counts = parameter_counts(slimmed_config(config, target))
        assert sizes.of(experts, width, groups) == (counts.total, counts.active)


@pytest.mark.parametrize("budget", ["0.8x", "0.7x"])
@pytest.mark.parametrize("family", families(lambda row: "no width to choose" if row.no_width else ""))
def test_every_shape_is_the_widest_within_the_budget(family, budget):
    stats = fake_stats(tiny_model(family))
    found = search_plan(stats, budget)
    sizes = Sizes(AutoConfig.for_model(**stats.meta.config))
    limit = found.limits.total
    assert limit == int(float(budget[:-1]) * found.total + 1e-9)
    for each in found.candidates:
        assert each.total <= limit and each.num_experts >= 2 and each.expert_width % 8 == 0
        wider = each.expert_width + 8
        assert wider > EXPERT_WIDTH or sizes.of(each.num_experts, wider, each.kv_groups)[0] > limit
    assert len({(each.num_experts, each.kv_groups) for each in found.candidates}) == len(found.candidates)
    assert [each.predicted for each in found.candidates] == sorted(each.predicted for each in found.candidates)
    assert apply_plan(tiny_model(family), found.plan(stats)).num_parameters() == found.best.total


def test_both_budgets_are_kept_and_widths_are_multiples_of_64_where_there_are_many():
    config = AutoConfig.for_model(
        "phimoe", hidden_size=64, intermediate_size=1024, num_local_experts=8, num_hidden_layers=2, vocab_size=320
    )
    sizes = Sizes(config)
    assert sizes.widths == list(range(64, 1025, 64))
    limits = sizes.limits("0.6x", "0.5x")
    assert limits == (int(0.6 * sizes.whole.total), sizes.whole.active // 2)
    for experts in sizes.experts:
        width = sizes.widest(experts, 8, limits)
        if width is not None:
            total, active = sizes.of(experts, width, 8)
            assert total <= limits.total and active <= limits.active
            assert any(a > b for a, b in zip(sizes.of(experts, width + 64, 8), limits, strict=True))


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("7.6B", 7_649_999_999),
        ("500M", 500_499_999),
        ("0.25x", 250),
        (123, 123),
        ("77", 77),
        ("8B", 8_080_000_000),
        ("1e9", 1_010_000_000),
    ],
)
def test_a_budget_is_read_as_it_is_written(text, most):
    assert parse_budget(text, 1000, "budget") == most


@pytest.mark.parametrize(
    ("budget", "active", "message"),
    [
        (None, None, "a search needs a budget"),
        ("lots", None, "budget lots: not a number of parameters. Write it as 7.6B"),
        ("1.5x", None, "budget 1.5x: not a share of the model. Write it as 0.25x"),
        ("-0.5x", None, "budget -0.5x: not a share"),
        ("1x", None, "the budget is met already: the model has"),
        (
            "0.01x",
            None,
            r"the budget of \d+ parameters cannot be met: the smallest shape \(2 experts of width 8.*has [\d,]+",
        ),
        (None, "0.01x", "the active budget of .* cannot be met"),
    ],
)
def test_an_impossible_budget_is_one_line(budget, active, message):
    with pytest.raises(ValueError, match=message) as error:
        search_plan(fake_stats(tiny_model("phimoe")), budget, active)
    assert "\n" not in str(error.value)


def test_the_smallest_size_named_by_the_error_can_be_had():
    stats = fake_stats(tiny_model("phimoe"))
    with pytest.raises(ValueError, match="cannot be met") as error:
        search_plan(stats, 10)
    least = int(str(error.value).split(" has ")[1].split(". Ask")[0].replace(",", ""))
    assert search_plan(stats, least).best.total == least
    with pytest.raises(ValueError, match="cannot be met"):
        search_plan(stats, least - 1)


def test_what_a_shape_takes_is_the_sum_over_what_goes():
    stats = fake_stats(tiny_model("phimoe"))
    losses = Losses(stats, "energy", "reap", 0, [8, 16, EXPERT_WIDTH])
    worth = output_fisher(stats).neurons_LEF * stats.tokens_LE.unsqueeze(-1) / stats.meta.tokens / 2
    experts = choose(expert_ranking(stats, "reap"), 3, stats.meta.layers).kept
    neurons = choose(ranking(stats, "energy").neurons_LEF, 16, stats.meta.layers).kept
    groups = choose(ranking(stats, "energy").groups_AG, 1, stats.meta.layers).kept
    narrowing = dropping = attention = 0.0
    for row, layer in enumerate(stats.meta.layers):
        for expert in range(NUM_EXPERTS):
            if expert not in experts[layer].tolist():
                dropping += float(worth[row, expert].sum())
                continue
            narrowing += float(worth[row, expert].sum() - worth[row, expert, neurons[layer][expert]].sum())
        gone = [group for group in range(KV_GROUPS) if group not in groups[layer].tolist()]
        attention += float(output_fisher(stats).groups_AG[row, gone].sum() / 2)
    assert losses.of(3, 16, 1) == pytest.approx((narrowing, dropping, attention))
    assert losses.of(NUM_EXPERTS, EXPERT_WIDTH, KV_GROUPS) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_weights_of_measured_shapes_are_found_again_and_others_keep_their_ratio():
    true = Weights(3.0, 20.0, 0.5)
    some = [Lost(0.1, 0.0, 0.0), Lost(0.0, 0.2, 0.0), Lost(0.05, 0.1, 0.0)]
    found = fitted([(lost, true.predicted(lost)) for lost in some], Weights(1.0, 2.0, 3.0))
    assert found[:2] == pytest.approx(true[:2]) and found.groups == pytest.approx(3.0 * 23 / 3)
    assert fitted([], true) == true
    assert fitted([(Lost(0.1, 0, 0), -0.01)], true) == true, "a shape that lost nothing says nothing"
    assert Weights(1.0, 1.0, 1.0).predicted(Lost(1.0, 2.0, 0.0)) == pytest.approx(3.0**POWER)


def test_a_layer_whose_neurons_matter_more_would_want_more_width():
    stats = fake_stats(tiny_model("phimoe"))
    louder = stats.act_sq_LEF.clone()
    louder[1] *= 5000
    wanted = wanted_widths(dataclasses.replace(stats, act_sq_LEF=louder), {}, 16)
    assert sum(wanted.values()) == 32 and wanted[1] == EXPERT_WIDTH
    assert search_plan(dataclasses.replace(stats, act_sq_LEF=louder), "0.8x").wider.keys() == {1}


@pytest.fixture(scope="module")
def scored():
    model, given = tiny_model("phimoe"), [tiny_batch(rows=8)]
    return model, given, collect_stats(model, given, progress=False)


def test_what_is_measured_is_the_loss_of_the_plan_and_the_model_stays_as_it_was(scored):
    model, given, stats = scored
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows_NT = tiny_batch(rows=4, seed=7)["input_ids"]
    checked = check_search(model, stats, search_plan(stats, "0.8x"), rows_NT, given, number=2, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = checked.search

    def loss(which):
        logits = which(input_ids=rows_NT).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.double(), rows_NT[:, 1:].flatten()).item()

    with torch.no_grad():
        assert found.original == pytest.approx(loss(model), abs=1e-4)
        student = apply_plan(tiny_model("phimoe"), checked.plan)
        assert found.original + found.best.measured == pytest.approx(loss(student), abs=1e-4)
    assert student.num_parameters() == found.best.total and checked.plan.meta.repairing is not None
    sizes = {each.size for each in found.measured}
    assert len(sizes) == 5 and {found.pure_width.size, found.pure_drop.size} <= sizes
    assert any(groups < KV_GROUPS for _, _, groups in sizes)
    assert found.best.measured == min(each.measured for each in found.measured)
    assert checked.without == {}


def test_without_reconstruction_plans_are_slices(scored):
    model, given, stats = scored
    checked = check_search(
        model, stats, search_plan(stats, "0.8x"), given[0]["input_ids"], rebuild=False, number=1, progress=False
    )
    assert all(each.reconstructed is None for each in checked.search.measured)
    assert checked.plan.sha256 == checked.search.plan(stats).sha256


def test_a_super_expert_is_what_the_loss_falls_apart_without():
    model, given = tiny_model("phimoe", num_local_experts=8), [tiny_batch(rows=8)]
    with torch.no_grad():
        moe_layers(model)[1][1].down_proj[3] *= 1000
    stats = collect_stats(model, given, loss="lm", progress=False)
    checked = check_search(
        model, stats, search_plan(stats, "0.8x"), given[0]["input_ids"], rebuild=False, number=1, progress=False
    )
    assert list(checked.without) == [(1, 3)] and abs(checked.without[1, 3]) > 0.1


def test_from_the_command_line_to_a_slimmed_checkpoint(tmp_path: Path, capsys):
    model = save_tiny(tmp_path / "model")
    data = ("--data", str(write_text(tmp_path / "text.jsonl", 200)), "--max-length", "32", "--tokens", "1000")
    plan, slimmed = str(tmp_path / "plan"), str(tmp_path / "slimmed")
    budget = ("--budget", "0.8x", "--candidates", "1", "--validation-tokens", "500")
    assert cli.main(["plan", str(model), *budget, *data, "--output", plan]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "pure width" in said and "predicted best of smaller sizes" in said
    search = json.loads((tmp_path / "plan" / "search.json").read_text())
    assert {file.name for file in (tmp_path / "plan").iterdir()} == {
        "plan.json", "plan.safetensors", "search.json", "frontier.json", "frontier.png",
    }  # fmt: skip
    assert cli.main(["slim", str(model), "--plan", plan, "--output", slimmed]) == 0
    after = CompressionPlan.load(plan).meta.after
    assert parameter_counts(AutoConfig.from_pretrained(slimmed)).total <= search["limits"][0]
    assert AutoConfig.from_pretrained(slimmed).intermediate_size == after.expert_width


def test_streamed_statistics_are_reconstructed_too_and_those_alone_are_not(tmp_path: Path, capsys):
    model = save_tiny(tmp_path / "model")
    data = ("--data", str(write_text(tmp_path / "text.jsonl", 200)), "--max-length", "32", "--tokens", "1000")
    plan, stats = str(tmp_path / "plan"), str(tmp_path / "stats.safetensors")
    assert cli.main(["plan", str(model), "--budget", "0.8x", "--stream", *data, "--output", plan]) == 0
    made = CompressionPlan.load(plan)
    assert made.meta.repairing is not None and made.repairs.down_proj
    assert cli.main(["score", str(model), *data, "--output", stats]) == 0
    capsys.readouterr()
    alone = ["plan", stats, "--budget", "0.8x", "--output", str(tmp_path / "other")]
    assert cli.main([*alone, "--reconstruct"]) == 2
    assert "of statistics alone nothing is measured or reconstructed" in capsys.readouterr().err
    assert cli.main(alone) == 0
    assert CompressionPlan.load(tmp_path / "other").meta.repairing is None


def test_what_a_search_is_checked_on_is_neither_calibrated_on_nor_tested_on(tmp_path: Path):
    """Validation text that is in the train or the test split too is left out; where nothing is left, that is said."""
    texts = documents()
    splits = {"train": texts[:2], "validation": [texts[0], *texts[5:8], texts[9]], "test": texts[9:11]}

    def validation(**changed: list[str]) -> HeldOut:
        rows = {name: Dataset.from_dict({"text": text}) for name, text in (splits | changed).items()}
        folder = tmp_path / f"data-{len(changed)}"
        DatasetDict(rows).save_to_disk(folder)
        command = ["plan", "MODEL", "--budget", "0.8x", "--data", str(folder), "--max-length", "32", "--output", "o"]
        return search_command._validation(cli.parse(command), model)

    model = save_tiny(tmp_path / "model")
    alone = held_out(Dataset.from_dict({"text": texts[5:8]}), tiny_tokenizer(), 32)
    assert torch.equal(validation().rows_NT, alone.rows_NT)
    with pytest.raises(ValueError, match="every document of the validation split is in train or test too"):
        validation(validation=texts[9:11])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "0.8x", "--expert-width", "16"), "--budget finds the sizes itself"),
        (("--budget", "0.8x"), "plan needs data"),
        (("--budget", "0.8x", "--data", "x", "--split", "validation"), "Score on train"),
        (("--budget", "0.8x", "--data", "x", "--candidates", "0"), "measure at least 1"),
        (("--budget", "10", "--data", "x"), "cannot be met: the smallest shape"),
        (("--budget", "10", "--data", "x", "--stream"), "cannot be met: the smallest shape"),
        (("--expert-width", "16", "--data", "x"), "plan takes --data and --reconstruct with --budget only"),
    ],
)
def test_a_bad_request_is_one_line_and_leaves_nothing(flags, message, tmp_path: Path, capsys):
    model = save_tiny(tmp_path / "model")
    assert cli.main(["plan", str(model), *flags, "--output", str(tmp_path / "plan")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "plan").exists()
