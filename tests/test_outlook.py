"""What a dry run promises: sizes that are exact, rooms that are refused with the setting to change, times that add up."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import tiny_recipe
from rich.console import Console
from tiny import save_tiny, tiny_batch

from slimmoe_hf import machines
from slimmoe_hf.loading import load_model
from slimmoe_hf.machines import MACHINES, Machine
from slimmoe_hf.memory import training_memory
from slimmoe_hf.outlook import optimizer_of, outlook
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.preflight import Outline, outline, read_text
from slimmoe_hf.recipe import Recipe, TeacherCacheSpec, parse_recipe
from slimmoe_hf.remedies import remedies
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.steps import TEACHER, Step, check_room, shown_steps

CPU = Machine("a CPU", 10**9, None, 1e9, 1e9)
GPU = Machine("a GPU", 10**9, 10**10, 1e12, 1e9)


def planned(home: Path, machine: Machine, **stage: object) -> tuple[Recipe, Outline, list[Step]]:
    values = tiny_recipe(home)
    values["stages"][0] |= stage
    recipe = parse_recipe(values, "recipe.yaml")
    found = outline(recipe)
    return recipe, found, outlook(recipe, found, machine, read_text(recipe, found.tokenizer))


@pytest.mark.slow  # whole runs
@pytest.mark.parametrize("cache", [None, TeacherCacheSpec()], ids=["live", "cached"])
def test_every_step_of_a_run_is_announced_by_the_name_it_then_has(
    cache: TeacherCacheSpec | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe, _, _ = planned(tmp_path, CPU)
    recipe = recipe.model_copy(update={"teacher_cache": cache})
    found = outline(recipe)
    steps = outlook(recipe, found, CPU, read_text(recipe, found.tokenizer))
    run_recipe(recipe, tmp_path / "run")
    finished = [line.split(": done in")[0] for line in capsys.readouterr().out.splitlines() if ": done in" in line]
    assert [line.split()[-1] for line in finished] == [step.name for step in steps]
    if cache is not None:
        written = sum(file.stat().st_size for file in (tmp_path / "run" / CACHE).glob("answers-*"))
        assert next(step.disk for step in steps if step.name == CACHE) == pytest.approx(written, rel=0.1)


def test_what_does_not_fit_is_refused_with_the_step_and_the_setting(tmp_path: Path):
    _, _, steps = planned(tmp_path, CPU)
    check_room(steps, CPU, 10**9)
    small = dataclasses.replace(CPU, memory=max(step.memory for step in steps) // 2)
    with pytest.raises(
        ValueError, match=r"stage-\d/\w+ needs about .* GB of memory, .* are free on a CPU\. Lower stages\.\d"
    ):
        check_room(steps, small, 10**9)
    with pytest.raises(
        ValueError, match=r"the run writes about .* free on the disk. Free some, or lower save_total_limit"
    ):
        check_room(steps, CPU, 1000)


def test_a_model_too_large_to_score_on_the_gpu_is_sent_to_the_cpu(tmp_path: Path):
    _, _, steps = planned(tmp_path, GPU)
    score = next(step for step in steps if step.name == "stage-1/score")
    with pytest.raises(ValueError, match=r"stage-1/score .* Set stages\.0\.calibration\.device to cpu, or its dtype"):
        check_room([score], dataclasses.replace(GPU, memory=score.memory // 2), None)
    _, _, moved = planned(tmp_path, GPU, calibration={"tokens": 512, "loss": "lm", "device": "cpu"})
    score = next(step for step in moved if step.name == "stage-1/score")
    assert score.memory == 0 and score.host > 0 and "on the host's CPU" in score.what


def test_reconstruction_is_a_step_with_its_memory_its_disk_and_the_setting_to_change(tmp_path: Path):
    def steps(machine: Machine, **asked: object) -> list[Step]:
        calibration = {"tokens": 512, "loss": "lm", **asked}
        return planned(tmp_path, machine, calibration=calibration, target={"expert_width": 16})[2]

    before = [step.name for step in steps(CPU, reconstruct=False)]
    found = {step.name: step for step in steps(CPU)}
    assert list(found) == [*before[:2], "stage-1/plan", *before[2:]]
    plan, score = found["stage-1/plan"], found["stage-1/score"]
    assert 0 < plan.memory < score.memory and plan.seconds > 0 and plan.key == score.key
    assert plan.disk == 2 * 4 * 16 * 32 * 4, "two layers of four experts, 16 neurons each, 32 values, float32"
    streamed = next(step for step in steps(CPU, stream=True) if step.name == "stage-1/plan")
    assert streamed.memory < plan.memory and streamed.passing == 2 * 512 * 32 * 4 + streamed.disk
    plan = next(step for step in steps(GPU) if step.name == "stage-1/plan")
    with pytest.raises(ValueError, match=r"stage-1/plan .* Set stages\.0\.calibration\.device to cpu, or its dtype"):
        check_room([plan], dataclasses.replace(GPU, memory=plan.memory // 2), None)
    dropped = planned(tmp_path, CPU, calibration={"tokens": 512, "loss": "lm"}, target={"num_experts": 3})
    assert [step.name for step in dropped[2]] == before, "experts that go leave nothing to be solved"


def test_a_streamed_sweep_needs_two_layers_and_a_disk(tmp_path: Path):
    both = [
        planned(tmp_path, GPU, calibration={"tokens": 512, "loss": "lm", "stream": stream})[2]
        for stream in (False, True)
    ]
    whole, streamed = (next(step for step in steps if step.name == "stage-1/score") for steps in both)
    assert streamed.memory <= whole.memory and streamed.seconds > whole.seconds and streamed.disk == whole.disk
    assert "a layer at a time; meanwhile 0.0 GB on the disk" in streamed.what
    large = dataclasses.replace(streamed, passing=10**9)
    check_room([large], GPU, 10**9)
    with pytest.raises(ValueError, match=r"about 1\.0 GB, 0\.5 GB are free on the disk\. .* lower calibration\.tokens"):
        check_room([large], GPU, 10**9 // 2)
    with pytest.raises(ValueError, match=r"stage-1/score .* Lower stages\.0\.calibration\.batch_size"):
        check_room([streamed], dataclasses.replace(GPU, memory=streamed.memory // 2), None)


def test_a_sweep_without_gradients_takes_less_of_everything(tmp_path: Path):
    """Named, it is as the default is for `energy`."""
    found = {}
    for loss, stream in [*itertools.product(("lm", "none"), (False, True)), (None, True)]:
        steps = planned(tmp_path, GPU, calibration={"tokens": 512, "loss": loss, "stream": stream})[2]
        found[loss, stream] = next(step for step in steps if step.name == "stage-1/score")
    for stream in (False, True):
        whole, forward = found["lm", stream], found["none", stream]
        assert "energy, none, float32" in forward.what
        assert forward.memory < whole.memory and forward.disk < whole.disk
        assert forward.seconds == pytest.approx(whole.seconds / (3 if stream else 2), rel=0.5)
    assert found[None, True] == found["none", True]
    assert 0 < found["none", True].passing < found["lm", True].passing and found["none", False].passing == 0


@pytest.mark.slow  # traces full-size layers
def test_a_streamed_sweep_against_a_teacher_holds_a_layer_of_either(tmp_path: Path):
    """In memory both are there at once; a streamed one is asked first and gone then."""
    more = {"tokens": 512, "loss": "kd_topk"}
    own, other = planned(tmp_path, GPU, calibration={**more, "stream": True})[2], None
    values = tiny_recipe(tmp_path)
    values["teacher"] = str(save_tiny(tmp_path / "original", seed=1, intermediate_size=1024))
    values["stages"][0]["calibration"] = {**more, "stream": True}
    recipe = parse_recipe(values, "recipe.yaml")
    other = outlook(recipe, outline(recipe), GPU)
    whole, streamed = (next(step for step in steps if step.name == "stage-1/score") for steps in (own, other))
    assert streamed.host > 5 * whole.host, "the teacher's layer, which is read ahead, is the larger one"
    assert streamed.seconds > whole.seconds and streamed.passing == whole.passing


def test_a_streamed_teacher_cache_needs_a_layer_and_a_disk(tmp_path: Path):
    recipe = parse_recipe(tiny_recipe(tmp_path), "recipe.yaml")

    def asked(**settings: object) -> dict[str, Step]:
        cached = recipe.model_copy(update={"teacher_cache": TeacherCacheSpec(**settings)})
        found = outline(cached)
        return {step.name: step for step in outlook(cached, found, GPU, read_text(cached, found.tokenizer))}

    held, layered = asked(), asked(stream=True, stream_memory="100KB")
    whole, streamed = held[TEACHER], layered[TEACHER]
    assert "a layer at a time; meanwhile 0.0 GB on the disk" in streamed.what and "layer" not in whole.what
    assert streamed.passing > whole.passing == 0 and streamed.host > whole.host, "the next layer is read ahead"
    with pytest.raises(ValueError, match=r"lower evaluation\.tokens"):
        check_room([dataclasses.replace(streamed, passing=10**9)], GPU, 10**9 // 2)
    whole, streamed = held[CACHE], layered[CACHE]
    assert streamed.disk == whole.disk and streamed.passing == 10**5
    assert "a layer at a time, " in streamed.what and "times over its weights" in streamed.what
    assert asked(stream=True)[CACHE].passing == 0, "it takes what the disk has"
    large = dataclasses.replace(streamed, passing=10**9)
    with pytest.raises(ValueError, match=r"0\.5 GB are free on the disk\. .* lower teacher_cache\.stream_memory"):
        check_room([large], GPU, 10**9 // 2)


@pytest.mark.slow  # traces a full-size step for every setting
def test_a_dry_run_on_a_small_machine_names_the_settings_that_make_each_step_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """And they do: the recipe that follows them is planned without an error."""
    values = tiny_recipe(tmp_path)
    for stage in values["stages"]:
        stage["calibration"] = {"tokens": 512, "loss": "lm", "batch_size": 64}
    recipe = parse_recipe(values, "recipe.yaml")
    steps = outlook(recipe, outline(recipe), GPU)
    scoring = [step for step in steps if step.name.endswith("/score")]
    rest = max(step.memory for step in steps if step not in scoring)
    small = dataclasses.replace(GPU, name="a small GPU", memory=rest)
    assert all(step.memory * 0.85 > rest for step in scoring)
    monkeypatch.setitem(machines.MACHINES, "small", small)
    with pytest.raises(ValueError, match=r"stage-1/score needs about .* a small GPU"):
        run_recipe(recipe, tmp_path / "run", dry_run=True, machine="small")
    said = [line for line in capsys.readouterr().out.splitlines() if "/score: " in line]
    assert len(said) == 2 and all(f"Set stages.{number}.calibration.stream: true" in said[number] for number in (0, 1))
    for number, stage in enumerate(values["stages"]):
        stage["calibration"] |= {"stream": True} | ({"batch_size": 1} if "batch_size: 1" in said[number] else {})
    assert run_recipe(parse_recipe(values, "recipe.yaml"), tmp_path / "run", dry_run=True, machine="small") is None


@pytest.mark.slow  # traces a full-size step for every setting
def test_what_no_setting_makes_fit_is_said_to_need_a_larger_machine(tmp_path: Path):
    recipe, _, steps = planned(tmp_path, GPU)
    tiny = dataclasses.replace(GPU, memory=1000)
    lines = remedies(recipe, steps, tiny, None, elsewhere=True)
    distil = next(line for line in lines if line.startswith("stage-1/distil"))
    assert (
        "it still needs" in distil and "take a larger machine (A100-80GB, H100-80GB, A6000-48GB, 4090-24GB)" in distil
    )
    assert "teacher_cache: {stream: true} and stages.0.distillation.per_device_train_batch_size: 1" in distil


def test_a_cache_that_does_not_serve_the_loss_is_no_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And where there is one already, its setting is named, not the block."""
    values = tiny_recipe(tmp_path)

    def steps(recipe: Recipe, *_: object) -> list[Step]:
        return [Step(TEACHER, "", 0 if recipe.streams_teacher else 10**10, 0, 0, 0.0)]

    def said(loss: dict[str, Any], **changes: Any) -> str:
        stages = [stage | {"distillation": stage["distillation"] | loss} for stage in values["stages"]]
        recipe = parse_recipe({**values, "stages": stages, **changes}, "recipe.yaml")
        (line,) = remedies(recipe, steps(recipe), CPU, None, elsewhere=True)
        return line

    monkeypatch.setattr("slimmoe_hf.remedies.outlook", steps)
    for loss in ({"beta": 0.5}, {"router_logits_weight": 0.1}, {"loss_top_k": 100}):
        assert "with evaluation.batch_size: 1 it still needs 10.0 GB: take a larger machine" in said(loss)
    assert "1.0 free. Set evaluation.batch_size: 1 and teacher_cache: {stream: true}: 0.0 GB" in said({})
    assert "1 and teacher_cache.stream: true: 0.0 GB" in said({}, teacher_cache={"top_k": 8})


def test_an_offloaded_teacher_moves_from_the_gpu_to_the_host(tmp_path: Path):
    values = tiny_recipe(tmp_path)
    recipe = parse_recipe(values, "recipe.yaml")
    found = outline(recipe)

    def distil(**changes: object) -> Step:
        steps = outlook(recipe.model_copy(update=changes), found, GPU)
        return next(step for step in steps if step.name == "stage-1/distil")

    live, away = distil(), distil(teacher_memory="0.1MB")
    assert away.memory < live.memory and live.host == 0 and away.host > 0 and away.seconds > live.seconds


def test_the_memory_of_a_stage_is_that_of_the_training_it_asks_for(tmp_path: Path):
    recipe, found, steps = planned(tmp_path, CPU)
    arguments = found.arguments[0]
    wanted = training_memory(
        found.after[0], batch=arguments.train_batch_size, length=recipe.data.max_length,
        gradient_checkpointing=arguments.gradient_checkpointing, teacher="live", teacher_config=found.teacher_config,
        teacher_dtype=torch.float32, accumulate=arguments.gradient_accumulation_steps > 1,
        crossentropy=arguments.weights_at(0.0)[1] > 0,
    ).total  # fmt: skip
    assert next(step for step in steps if step.name == "stage-1/distil").memory == wanted


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("adamw_torch_fused", "float32", "adamw"), ("adamw_torch", "bfloat16", "adamw_bf16"),
        ("paged_adamw_8bit", "bfloat16", "adamw_8bit"), ("adafactor", "bfloat16", "adafactor"),
    ],
)  # fmt: skip
def test_optimizers_are_counted_as_what_they_are(name: str, dtype: str, expected: str):
    assert optimizer_of(name, dtype) == expected


def test_the_table_shows_every_step_and_the_sum(tmp_path: Path):
    _, _, steps = planned(tmp_path, CPU)
    console = Console(width=160, file=io.StringIO())
    console.print(shown_steps(steps, CPU))
    text = console.file.getvalue()
    assert all(step.name in text for step in steps) and "in all" in text


def test_planning_for_another_machine_is_for_dry_runs_only(tmp_path: Path):
    recipe = parse_recipe(tiny_recipe(tmp_path), "recipe.yaml")
    with pytest.raises(ValueError, match="--machine A100-80GB: with --dry-run, one of A100-80GB"):
        run_recipe(recipe, tmp_path / "run", machine="A100-80GB")
    with pytest.raises(ValueError, match="--machine TPU: with --dry-run, one of A100-80GB"):
        run_recipe(recipe, tmp_path / "run", dry_run=True, machine="TPU")
    assert run_recipe(recipe, tmp_path / "run", dry_run=True, machine=next(iter(MACHINES))) is None
    assert not (tmp_path / "run").exists()


def test_a_recipe_for_a_gpu_can_be_planned_where_there_is_none(tmp_path: Path):
    values = tiny_recipe(tmp_path)
    values["stages"][0]["distillation"]["bf16"] = True
    recipe = parse_recipe(values, "recipe.yaml")
    assert run_recipe(recipe, tmp_path / "run", dry_run=True, machine="A100-80GB") is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 should be 1 or more"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 should be 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 should not be negative"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(tmp_path: Path, setting: dict[str, float], message: str):
    values = tiny_recipe(tmp_path)
    values["stages"][1]["distillation"] |= setting
    with pytest.raises(ValueError, match=f"stages.1.distillation: {message}"):
        outline(parse_recipe(values, "recipe.yaml"))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: accelerate spreads a model between a GPU and the host"
)
def test_a_model_larger_than_its_room_on_the_gpu_is_spread_and_says_the_same(tmp_path: Path):
    folder = save_tiny(tmp_path)
    ids = tiny_batch()["input_ids"].cuda()
    whole, spread = load_model(folder, device="cuda"), load_model(folder, device="cuda", room=100_000)
    assert {str(place) for place in spread.hf_device_map.values()} == {"0", "cpu"}
    assert torch.equal(whole(input_ids=ids).logits, spread(input_ids=ids).logits)
