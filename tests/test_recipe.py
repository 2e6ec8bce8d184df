"""Recipes: strict, with errors that name file, key and remedy; the YAML that people write is understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import write_recipe

from slimmoe_hf.plan import Target
from slimmoe_hf.recipe import Recipe, load_recipe, memory_bytes, parse_recipe, resolved
from slimmoe_hf.schema import suggestion


def minimal(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "data": {"source": "sotu"}, "stages": [{"target": {"expert_width": 64}}], **changes}


def test_defaults_are_spelt_out_and_read_back_equal():
    recipe = parse_recipe(minimal(), "r")
    [stage] = recipe.stages
    assert stage.target.sizes == Target(expert_width=64)
    assert stage.criterion == "energy" and stage.loss == "none" and stage.calibration.reconstruct
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()), "r")
    assert "loss: none" in recipe.to_yaml() and again.to_yaml() == recipe.to_yaml()
    assert again.differences(recipe) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (minimal(modle="x"), "r.yaml: modle: unknown key; did you mean model?"),
        ({"modle": "m", "data": {"source": "sotu"}, "stages": []}, "r.yaml: modle: unknown key; did you mean model?"),
        (minimal(data={"sorce": "sotu"}), "data.sorce: unknown key; did you mean source?"),
        (minimal(stages=[{"target": {"expert_widht": 8}}]), "target.expert_widht: unknown key; did you mean expert_width?"),
        (minimal(stages=[{"target": {}, "calibration": {"token": 9}}]), "calibration.token: unknown key; did you mean tokens?"),
        (
            minimal(stages=[{"target": {"expert_width": 8}, "criterion": "taylor", "calibration": {"loss": "none"}}]),
            "loss 'none': criterion 'taylor' looks at gradients",
        ),
        (
            minimal(stages=[{"target": {"budget": "0.5x"}, "calibration": {"loss": "none"}}]),
            "loss 'none': a search for a budget looks at gradients",
        ),
        (minimal(stages=[{"target": {}, "distillation": {"learning_rat": 1}}]), "did you mean learning_rate?"),
        (minimal(stages=[{"target": {}, "distillation": {"output_dir": "x"}}]), "output_dir cannot be set here: the run's"),
        (minimal(stages=[{"target": {}, "distillation": {"fsdp": True}}]), "fsdp cannot be set here: the config that"),
        (minimal(stages=[{"target": {}, "criterion": "tailor"}]), "did you mean taylor?"),
        (minimal(stages=[{"target": {}, "expert_criterion": "reep"}]), "stages.0.expert_criterion: unknown criterion 'reep'"),
        (minimal(stages=[{"target": {"num_experts": 4}, "expert_criterion": "energy"}]), "'energy' does not score whole experts"),
        (minimal(stages=[{"target": {"expert_width": 8}, "criterion": "reap"}]), "'reap' scores whole experts only"),
        (minimal(stages=[]), "stages: list should have at least 1 item"),
        (minimal(teacher_memory="a lot"), "teacher_memory: expected an amount of memory such as 12GB or 12GiB, found 'a lot'"),
        (
            minimal(teacher_memory="1GB", teacher_cache={}),
            "teacher_cache: no teacher is there while a student trains, so teacher_memory has no place; leave it out",
        ),
        (minimal(teacher_memory="0GB"), "teacher_memory: expected an amount of memory such as 12GB or 12GiB, found '0GB'"),
        (minimal(teacher_memory=12), "teacher_memory: input should be a valid string"),
        (minimal(stages=[{"target": {}, "training_dtype": "float16"}]), "training_dtype: input should be 'float32'"),
        (minimal(stages=[{"target": {}, "training_dtyp": "x"}]), "did you mean training_dtype?"),
        (minimal(seed="0"), "seed: input should be a valid integer"),
        (minimal(stages=[{"target": {"expert_width": 64.5}}]), "stages.0.target.expert_width: input should be a valid integer"),
        ({"data": {"source": "sotu"}, "stages": [{"target": {}}]}, "r.yaml: model: is missing."),
        ([1], "r.yaml: expected keys and values (model, data, stages, ...), found list."),
    ],
)  # fmt: skip
def test_faults_are_named_with_their_place(values: Any, message: str):
    with pytest.raises(ValueError) as caught:
        parse_recipe(values, "r.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["learning_rate", "lr_scheduler_type", "max_steps", "beta", "loss_top_k", "bf16"])
def test_a_stage_takes_every_argument_of_the_trainer(argument: str):
    recipe = parse_recipe(minimal(stages=[{"target": {}, "distillation": {argument: 1}}]), "r")
    assert recipe.stages[0].distillation == {argument: 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1"),
        ("model: a\nmodel: b", "the key 'model' is given twice"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_one_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert message in str(caught.value) and "r.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "1E-03", "0.001"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, written: str):
    text = yaml.safe_dump(minimal()) + f"- target: {{expert_width: 8}}\n  distillation: {{learning_rate: {written}}}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").stages[1].distillation["learning_rate"] == 1e-3


def test_relative_paths_are_the_current_folders_then_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside / "model", beside / "teacher", here / "model"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    recipe = load_recipe(write_recipe(beside, minimal(model="model", teacher="teacher")))
    assert recipe.model == str(here / "model") and recipe.teacher == str(beside / "teacher")
    assert recipe.data.source == "sotu"


@pytest.mark.parametrize(
    ("written", "meant"),
    [("12GB", 12 * 10**9), ("12GiB", 12 * 2**30), ("1.5 GB", 1_500_000_000), ("800mb", 8 * 10**8), (" 1MiB ", 2**20)],
)
def test_amounts_of_memory(written: str, meant: int):
    assert memory_bytes(written) == meant
    assert parse_recipe(minimal(teacher_memory=written), "r").teacher_memory == written


def test_the_config_of_accelerate_is_looked_up_as_the_models_are(tmp_path: Path):
    (tmp_path / "gpus.yaml").write_text("distributed_type: MULTI_GPU")
    recipe = load_recipe(write_recipe(tmp_path, minimal(accelerate="gpus.yaml")))
    assert recipe.accelerate == str(tmp_path / "gpus.yaml")
    assert load_recipe(write_recipe(tmp_path, minimal())).accelerate is None
    with pytest.raises(ValueError, match=r"recipe.yaml: accelerate: cpus.yaml: no such file"):
        load_recipe(write_recipe(tmp_path, minimal(accelerate="cpus.yaml")))


def test_differences_name_what_changed_and_leave_the_output_aside():
    first = parse_recipe(minimal(output="a"), "r")
    second = parse_recipe(minimal(output="b", seed=1, stages=[{"target": {"expert_width": 32}}]), "r")
    assert first.differences(second) == ["seed", "stages.0.target.expert_width"]


def test_suggestion_lists_the_keys_where_none_is_near():
    assert suggestion("zzz", ["one", "two"]) == "; known keys: one, two."


def test_the_quickstart_is_a_recipe():
    recipe = load_recipe(Path(__file__).parent.parent / "examples" / "quickstart.yaml")
    assert isinstance(recipe, Recipe)
    assert [stage.target.expert_width for stage in recipe.stages] == [128, 64]
    assert recipe.stages[-1].target.kv_groups == 3


def test_paths_of_a_recipe_made_in_python_are_made_absolute_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`models/m` would be an id on the Hub from anywhere else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    values = {"model": "models/m", "data": {"source": "sotu"}, "stages": [{"target": {"expert_width": 16}}]}
    recipe = parse_recipe(values, "recipe")
    assert resolved(recipe, Path()).model == str(tmp_path / "models" / "m")
    assert resolved(recipe.model_copy(update={"model": "org/m"}), Path()).model == "org/m"
