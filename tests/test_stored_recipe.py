"""A run of an earlier version: its stored recipe means what it meant, and what keeps it from going on is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slimmoe_hf.recipe import Recipe, parse_any_recipe
from slimmoe_hf.rundir import folder_state
from slimmoe_hf.stored_recipe import read_stored

PAIRS = """
task: seq2seq
model: m
teacher: null
revision: null
teacher_revision: null
data: {source: d, revision: null, max_source_length: 512, max_target_length: 64, tokens: null, validation_tokens: 32768}
stages:
- merge: {num_experts: 2, counts: adaptive, similarity: router_logits, grouping: dominant}
  factor: null
  calibration: {tokens: 32768, batch_size: 16, reconstruct: false}
  distillation: {}
- merge: null
  factor: {rank: 8, density: 0.1, initial_steps: 0.1, final_steps: 0.3, beta: 0.85}
  calibration: {tokens: 32768, batch_size: 16, reconstruct: false}
  distillation: {}
evaluation: {split: test, tokens: null, batch_size: 32, max_new_tokens: null}
seed: 0
dtype: null
threads: null
output: run
"""
"""As the version stored it whose default was not to reconstruct."""
STAGES = """
model: m
data: {source: sotu}
stages:
- target: {expert_width: 64, kv_groups: null, num_experts: null}
  criterion: taylor
  expert_criterion: null
  calibration: {tokens: 131072, loss: kd_topk, batch_size: 8, dtype: float32, device: auto, stream: false}
  distillation: {}
  training_dtype: float32
"""
"""As a version stored it that did not know of reconstruction."""


def stored(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    (folder / "steps.json").write_text("{}")
    return folder


def asked(**stage: Any) -> Recipe:
    recipe = parse_any_recipe(
        {"model": "m", "data": {"source": "sotu"}, "stages": [{"target": {"expert_width": 64}, **stage}]}, "r"
    )
    assert isinstance(recipe, Recipe)
    return recipe


def test_a_stored_recipe_of_pairs_goes_on_whatever_its_factoring_stage_spells_out(tmp_path: Path):
    given = {"merge": {"num_experts": 2}, "calibration": {"reconstruct": False}}
    values = {"task": "seq2seq", "model": "m", "data": {"source": "d"}, "stages": [given, {"factor": {"rank": 8}}]}
    assert folder_state(stored(tmp_path, PAIRS), parse_any_recipe(values, "r")) == "unfinished"
    given.pop("calibration")
    with pytest.raises(ValueError, match=r"differs in stages\.0\.calibration\.reconstruct\).*`calibration: {recons"):
        folder_state(tmp_path, parse_any_recipe(values, "r"))


def test_what_a_stored_recipe_lacks_did_not_happen(tmp_path: Path):
    path = stored(tmp_path, STAGES) / "recipe.yaml"
    assert not parse_any_recipe(read_stored(path), "r").stages[0].calibration.reconstruct
    for named in ({"loss": "kd_topk"}, {}):  # which is what `taylor` takes where nothing is said
        old = {"criterion": "taylor", "calibration": {**named, "reconstruct": False}}
        assert folder_state(tmp_path, asked(**old)) == "unfinished"
    path.write_text(yaml.safe_dump({**yaml.safe_load(STAGES), "stages": 3}))
    with pytest.raises(ValueError, match="stages: input should be a valid list"):
        folder_state(tmp_path, asked())


def test_a_run_of_the_old_defaults_says_how_to_go_on(tmp_path: Path):
    stored(tmp_path, STAGES)
    for calibration in ({}, {"loss": "kd_topk"}):
        with pytest.raises(ValueError, match="of another recipe") as caught:
            folder_state(tmp_path, asked(calibration=calibration))
        said = str(caught.value)
        assert "(these defaults changed; to go on, write `criterion: taylor` and `calibration: {" in said
        assert "reconstruct: false}` into the recipe's stages)." in said and "\n" not in said
    with pytest.raises(ValueError, match=r"criterion: taylor` into") as caught:
        folder_state(tmp_path, asked(calibration={"loss": "kd_topk", "reconstruct": False}))
    assert "reconstruct: false" not in str(caught.value), "only what differs"
    with pytest.raises(ValueError, match="of another recipe") as caught:
        folder_state(tmp_path, asked(calibration={"loss": "kd_topk"}, expert_criterion="reap"))
    assert "these defaults" not in str(caught.value), "another difference would stay"
