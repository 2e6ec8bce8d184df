"""A stage whose target is a budget: its shape is found while the run goes on, and stays found."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import rich
from recipes import tiny_recipe, write_recipe
from runs import in_child

from slimmoe_hf import pipeline
from slimmoe_hf.describe import describe_plan, size_rows
from slimmoe_hf.families import shape_of
from slimmoe_hf.loading import load_config
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.preflight import check_targets
from slimmoe_hf.recipe import parse_recipe
from slimmoe_hf.report import Report
from slimmoe_hf.sizing import parameter_counts
from slimmoe_hf.stage_search import is_met

REAL_MEASURING = pipeline.found_by_measuring


def budgeted(folder: Path, *targets: dict[str, Any], **calibration: Any) -> dict[str, Any]:
    """`tiny_recipe` with a stage for every target, a step of training in each."""
    values = tiny_recipe(folder)
    first = values["stages"][0]
    first["calibration"] |= calibration
    first["distillation"] |= {"max_steps": 1}
    values["stages"] = [{**first, "target": target} for target in targets]
    return values


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"budget": "7.6Q"}, "stages.0.target.budget: budget 7.6Q: not a number of parameters"),
        ({"budget": "1.5x"}, "stages.0.target.budget: budget 1.5x: not a share of the model"),
        ({"budget": 0}, "stages.0.target.budget: budget 0: not a number of parameters"),
        ({"budget": "nanx"}, "stages.0.target.budget: budget nanx: not a share of the model"),
        ({"budget": "sNaNx"}, "stages.0.target.budget: budget sNaNx: not a share of the model"),
        ({"active_budget": "infx"}, "stages.0.target.active_budget: active_budget infx: not a share"),
        ({"budget": True}, "stages.0.target.budget: input should be a valid string"),
        ({"active_budget": "x"}, "stages.0.target.active_budget: active_budget x: not a share"),
        ({"budgte": "0.5x"}, "stages.0.target.budgte: unknown key; did you mean budget?"),
        ({"budget": "0.5x", "expert_width": 8}, "stages.0.target: a budget finds the sizes itself; leave expert_width=8 out"),
    ],
)  # fmt: skip
def test_a_bad_budget_is_one_line(target: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError) as caught:
        parse_recipe(budgeted(tmp_path, target), "r.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([{"budget": "10"}], "stages.0.target: the budget of 10 parameters cannot be met: the smallest shape"),
        ([{"budget": "1B"}], "stages.0.target: the budget is met already"),
        ([{"budget": "0.7x"}, {"expert_width": 8}], "stages.1.target: nobody knows yet whether these sizes fit"),
        ([{"budget": "0.7x"}, {"budget": "1.0x"}], "stages.1.target: the budget is met already: the model has at most"),
        ([{"budget": "0.7x"}, {"budget": "0.9x"}, {"budget": "1B"}], "stages.2.target: the budget is met already"),
        ([{"expert_width": 16}, {"budget": "1B"}], "stages.1.target: the budget is met already: the model has"),
    ],
)
def test_a_budget_that_no_shape_meets_is_refused_ahead(targets: list[dict[str, Any]], message: str, tmp_path: Path):
    recipe = parse_recipe(budgeted(tmp_path, *targets), "r")
    with pytest.raises(ValueError) as caught:
        check_targets(load_config(tmp_path / "teacher"), [stage.target for stage in recipe.stages])
    assert message in str(caught.value) and "\n" not in str(caught.value)


MAYBE_MET = ({"budget": "0.6x"}, {"budget": "31000"})
"""What the first stage leaves may keep within the second's budget: nobody knows before it is found."""


def test_a_budget_that_an_earlier_one_may_meet_passes_and_is_looked_at_in_its_turn(tmp_path: Path):
    recipe = parse_recipe(budgeted(tmp_path, *MAYBE_MET), "r")
    first, second = (stage.target for stage in recipe.stages)
    config = load_config(tmp_path / "teacher")
    after = check_targets(config, [first, second])
    assert not is_met(config, second) and not is_met(config, first)
    assert is_met(after[0], second) and shape_of(after[1]) == shape_of(after[0]), "nothing to cut"


@pytest.mark.slow  # a run of two stages
def test_a_stage_whose_budget_is_met_already_only_trains(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(rich.get_console(), "_width", 400)
    report = run_recipe(write_recipe(tmp_path, budgeted(tmp_path, *MAYBE_MET)))
    said = " ".join(capsys.readouterr().out.split())
    assert "stage-2: at most 31000 parameters: met already, nothing to cut" in said
    plan = CompressionPlan.load(tmp_path / "run" / "stage-2" / "plan")
    assert plan.meta.before == plan.meta.after and not any(plan.kept.values())
    _, _, first, slimmed, second = report.models
    assert slimmed.found == "met already, nothing to cut" and slimmed.loss == pytest.approx(first.loss, abs=1e-6)
    assert slimmed.weights_sha256 == first.weights_sha256 != second.weights_sha256
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "at most 31000 parameters (met already, nothing was cut)" in card and "nothing was cut |" in card
    assert "by no criterion" in describe_plan(plan)


def test_a_dry_run_says_what_is_known_of_a_budget_and_what_is_not(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(rich.get_console(), "_width", 400)
    values = budgeted(tmp_path, {"budget": "0.8x", "active_budget": "0.9x"}, {"budget": "0.9x"}, reconstruct=True)
    values["stages"][1]["calibration"] = {"tokens": 1024, "stream": True}
    assert run_recipe(write_recipe(tmp_path, values), dry_run=True) is None
    said = capsys.readouterr().out
    whole = parameter_counts(load_config(tmp_path / "teacher"))
    assert (
        f"chosen at run time, at most {int(0.8 * whole.total):,} parameters and {int(0.9 * whole.active):,} active"
        in said
    )
    assert "at most 8 shapes within the budget measured on 32,768 validation tokens" in said
    assert said.count("chosen at run time") == 2 and not (tmp_path / "run").exists()
    assert said.count("shape chosen by prediction, none is measured") == 1


def _kill_in_training(recipe: Path) -> None:
    pipeline.distil = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
    run_recipe(recipe)


@pytest.mark.slow  # a run of two stages, killed once
@pytest.mark.parametrize("stream", [False, True], ids=["measured", "streamed"])
def test_a_run_finds_its_shape_once(stream: bool, tmp_path: Path, monkeypatch):
    values = budgeted(tmp_path, {"budget": "0.85x"}, {"budget": "0.9x"}, reconstruct=True, stream=stream)
    recipe = write_recipe(tmp_path, values)
    assert in_child(_kill_in_training, recipe) == -signal.SIGKILL
    found = CompressionPlan.load(tmp_path / "run" / "stage-1" / "plan")
    searched, real = [], pipeline.found_by_prediction
    monkeypatch.setattr(pipeline, "found_by_prediction", lambda *given: searched.append(1) or real(*given))
    monkeypatch.setattr(
        pipeline, "found_by_measuring", lambda *given, **kw: searched.append(1) or REAL_MEASURING(*given, **kw)
    )
    report = run_recipe(recipe)
    assert len(searched) == 1, "the first stage's shape was found by the run that was killed"
    assert CompressionPlan.load(tmp_path / "run" / "stage-1" / "plan").sha256 == found.sha256
    limit = int(0.85 * report.models[0].total_parameters)
    shapes = [model for model in report.models if model.step == "slimmed"]
    assert shapes[0].total_parameters <= limit and shapes[1].total_parameters <= int(0.9 * shapes[0].total_parameters)
    after = found.meta.after
    assert shapes[0].found.startswith(f"{after.num_experts}x{after.expert_width}")
    assert (found.meta.repairing is not None) == bool(found.neurons or found.groups)
    search = json.loads((tmp_path / "run" / "stage-1" / "plan" / "search.json").read_text())
    assert (search["original"] is None) == stream, "streamed, nothing is measured"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert all(row in card for row in size_rows(found, bool(found.experts)).values())
    assert "at most 0.85x parameters" in card and Report.load(tmp_path / "run" / "report.json") == report
