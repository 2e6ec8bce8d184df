"""MC-SMoE as a recipe: strict YAML, every model of the line measured as it lies on disk, resumable at every step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import tiny_pairs_recipe, write_pairs, write_recipe
from runs import in_child
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoConfig

from slimmoe_hf import seq2seq_pipeline, student_training
from slimmoe_hf.cli import main
from slimmoe_hf.data import load_splits
from slimmoe_hf.factored_checkpoint import load_factored
from slimmoe_hf.factorization import sparse_density
from slimmoe_hf.families import moe_layers
from slimmoe_hf.generation_evaluation import evaluate_generation
from slimmoe_hf.loading import load_tokenizer, weights_sha256
from slimmoe_hf.machines import MACHINES
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.recipe import load_any_recipe, load_recipe, parse_any_recipe
from slimmoe_hf.report import Report
from slimmoe_hf.seq2seq_models import count_pairs_model, load_seq2seq, measure_pairs
from slimmoe_hf.seq2seq_outlook import pair_steps
from slimmoe_hf.seq2seq_preflight import outline_pairs, pair_arguments, read_pairs
from slimmoe_hf.seq2seq_recipe import Seq2SeqRecipe
from slimmoe_hf.steps import check_room

EXAMPLES = Path(__file__).parents[1] / "examples"
MERGE, FACTOR = {"merge": {"num_experts": 2}}, {"factor": {"rank": 8}}


def minimal(**changes: Any) -> dict[str, Any]:
    return {"task": "seq2seq", "model": "m", "data": {"source": "d"}, "stages": [MERGE, FACTOR], **changes}


def test_defaults_are_spelt_out_and_read_back_equal():
    recipe = parse_any_recipe(minimal(), "r")
    assert isinstance(recipe, Seq2SeqRecipe) and recipe.stages[0].merge is not None
    assert recipe.stages[0].merge.counts == "adaptive"
    again = parse_any_recipe(yaml.safe_load(recipe.to_yaml()), "r")
    assert again == recipe and recipe.differences(again) == []
    other = parse_any_recipe(minimal(seed=1, output="elsewhere"), "r")
    assert recipe.differences(other) == ["seed"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (minimal(task="seq2sec"), "r.yaml: task: input should be 'seq2seq' (found 'seq2sec')"),
        (minimal(teacher_memory="1GB"), "r.yaml: teacher_memory: unknown key; did you mean teacher?"),
        (minimal(data={"sorce": "d"}), "data.sorce: unknown key; did you mean source?"),
        (minimal(stages=[]), "stages: list should have at least 1 item"),
        (minimal(stages=[{}]), "stages.0: a stage has either merge or factor, and this one has both or none"),
        (minimal(stages=[{**MERGE, **FACTOR}]), "stages.0: a stage has either merge or factor"),
        (minimal(stages=[FACTOR, MERGE]), "stages: there are factor, then merge; one merging stage, one factoring stage"),
        (minimal(stages=[MERGE, MERGE]), "stages: there are merge, then merge;"),
        (minimal(stages=[{"merge": {"num_expert": 2}}]), "merge.num_expert: unknown key; did you mean num_experts?"),
        (minimal(stages=[{"merge": {"num_experts": 0}}]), "stages.0.merge.num_experts: input should be greater than or equal"),
        (minimal(stages=[{"merge": {"num_experts": 2, "counts": "x"}}]), "counts: input should be 'adaptive' or 'uniform'"),
        (minimal(stages=[{"merge": {"num_experts": 2, "similarity": "router_logit"}}]), "did you mean router_logits?"),
        (minimal(stages=[{"merge": {"num_experts": 2, "grouping": "none"}}]), "grouping: unknown grouping 'none'"),
        (minimal(stages=[{"factor": {"rank": 12}}]), "factor.rank: input should be a multiple of 8"),
        (minimal(stages=[{"factor": {"density": 1.0}}]), "factor.density: input should be less than 1"),
        (minimal(stages=[{**FACTOR, "calibration": {"tokens": 9}}]), "only a stage that merges is calibrated"),
        (minimal(stages=[{**FACTOR, "distillation": {"output_dir": "x"}}]), "output_dir cannot be set here: the run's"),
        (minimal(stages=[{**FACTOR, "distillation": {"max_lenth": 2}}]), "unknown key 'max_lenth'"),
        (minimal(stages=[{**FACTOR, "target": {}}]), "stages.0.target: unknown key; known keys: calibration, distillation,"),
    ],
)  # fmt: skip
def test_faults_are_named_with_their_place(values: Any, message: str):
    with pytest.raises(ValueError) as caught:
        parse_any_recipe(values, "r.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its Switch Transformer and its pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_recipe(folder, tiny_pairs_recipe(folder))
    return folder


@pytest.fixture(scope="module")
def report(home: Path) -> Report:
    """An uninterrupted run in `home/run`."""
    found = run_recipe(home / "recipe.yaml")
    assert found is not None
    return found


def changed(home: Path, folder: Path, **changes: Any) -> Path:
    return write_recipe(folder, {**tiny_pairs_recipe(home), **changes}, "changed.yaml")


def stages_with(home: Path, number: int, **changes: Any) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = tiny_pairs_recipe(home)["stages"]
    return [{**stage, **(changes if place == number else {})} for place, stage in enumerate(stages)]


def test_the_line_is_in_the_report_as_it_lies_on_disk(home: Path, report: Report):
    """Every row recomputed from its folder: parameters, bytes, loss pair by pair, answers."""
    assert [(model.stage, model.step) for model in report.models] == [
        (0, "teacher"), (1, "merged"), (1, "distilled"), (2, "factored"), (2, "distilled"),
    ]  # fmt: skip
    recipe = load_any_recipe(home / "recipe.yaml")
    assert isinstance(recipe, Seq2SeqRecipe) and load_any_recipe(home / "run" / "recipe.yaml") == recipe
    assert Report.load(home / "run" / "report.json") == report
    tokenizer = load_tokenizer(home / "teacher")
    text = read_pairs(recipe, tokenizer)
    for row in report.models:
        path = home / "run" / row.path
        model = load_seq2seq(path)
        assert (row.total_parameters, row.active_parameters) == count_pairs_model(model)
        assert row.bytes == (path / "model.safetensors").stat().st_size and row.weights_sha256 == weights_sha256(path)
        loss, labels, _ = measure_pairs(model, text.test, batch_size=3)
        assert row.loss == pytest.approx(loss, abs=1e-5) and labels == report.evaluation.tokens
        assert row.generation == evaluate_generation(model, tokenizer, text.test_pairs, max_new_tokens=6)
    teacher, merged, _, factored, last = report.models
    assert factored.loss == pytest.approx(report.models[2].loss, abs=1e-4), "factoring changes no function"
    assert last.bytes < merged.bytes < teacher.bytes and weights_sha256(home / "run" / "model") == last.weights_sha256


def test_the_last_model_is_packed_at_the_density_with_its_routers_untouched(home: Path, report: Report):
    last, teacher = load_factored(home / "run" / "model"), load_seq2seq(home / "teacher")
    assert sparse_density(last) <= 0.1
    routers = {name: weight for name, weight in teacher.state_dict().items() if ".router." in name}
    trained = last.state_dict()
    assert routers and all(torch.equal(trained[name], weight) for name, weight in routers.items())
    assert not torch.equal(trained["shared.weight"], teacher.state_dict()["shared.weight"])


def test_pairs_for_calibration_training_and_measuring_never_overlap(home: Path):
    """Promise 8, on what the run really reads; a pair that is too long is in none of them, and counted."""
    values = tiny_pairs_recipe(home)
    values["data"]["max_source_length"] = 30
    recipe = parse_any_recipe(values, "r")
    assert isinstance(recipe, Seq2SeqRecipe)
    text = read_pairs(recipe, load_tokenizer(home / "teacher"))
    sets = [
        {(tuple(row["input_ids"]), tuple(row["labels"])) for row in part}
        for part in (text.calibration, text.train, text.validation, text.test)
    ]
    assert all(not a & b for number, a in enumerate(sets) for b in sets[:number])
    longest = [max(len(ids) for ids in part["input_ids"]) for part in (text.train, text.validation)]
    assert max(longest) <= 30
    whole = sum(len(split) for split in load_splits(values["data"]["source"]).values())
    assert 0 < text.left_out < whole


def test_the_same_command_on_a_finished_run_changes_nothing(home: Path, report: Report):
    files = [path for path in (home / "run").rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run_recipe(home / "recipe.yaml") == report
    assert before == {path: path.stat().st_mtime_ns for path in before}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at(label: str, step: int) -> Callable[[], None]:
    def arrange() -> None:
        true = student_training.TrainingProgress.on_step_end

        def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            true(self, args, state, control, **kwargs)
            if self.label == label and state.global_step == step:
                _kill()

        student_training.TrainingProgress.on_step_end = dying  # type: ignore[method-assign]

    return arrange


def _kill_after(method: str) -> Callable[[], None]:
    def arrange() -> None:
        true = getattr(seq2seq_pipeline._Line, method)

        def dying(self: Any, *arguments: Any) -> None:
            true(self, *arguments)
            _kill()

        setattr(seq2seq_pipeline._Line, method, dying)

    return arrange


def _run_and_die(arrange: Callable[[], None], recipe: Path, output: Path) -> None:
    arrange()
    run_recipe(recipe, output)


@pytest.mark.parametrize(
    ("arrange", "said", "reused"),
    [
        pytest.param(_kill_at("stage-2", 5), "stage-2: continues from checkpoint-4", 8, marks=pytest.mark.slow),
        pytest.param(_kill_at("stage-1", 5), "stage-1: continues from checkpoint-4", 4, marks=pytest.mark.slow),
        pytest.param(_kill_after("_merge"), "stage-1/merge ...", 2, marks=pytest.mark.slow),
        pytest.param(_kill_after("_factor"), "stage-2/factor ...", 6, marks=pytest.mark.slow),
        pytest.param(_kill_after("_publish"), "publish ...", 10, marks=pytest.mark.slow),
    ],
    ids=["factored training", "merged training", "merging", "factoring", "publishing"],
)
def test_killed_at_any_point_the_same_command_ends_with_the_same_weights(
    home: Path, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arrange: Callable[[], None], said: str, reused: int,
):  # fmt: skip
    """Promise 4: the state of the sparsity schedule, and which experts share, are in the checkpoints."""
    output = tmp_path / "run"
    assert in_child(_run_and_die, arrange, home / "recipe.yaml", output) == -signal.SIGKILL
    assert not (output / "report.json").exists()
    capsys.readouterr()
    again = run_recipe(home / "recipe.yaml", output)
    assert again is not None
    assert [model.weights_sha256 for model in again.models] == [model.weights_sha256 for model in report.models]
    captured = capsys.readouterr()
    log = captured.out + captured.err
    assert said in log and log.count(": reused") == reused
    assert not list(output.rglob(".partial-*"))


def test_a_dry_run_announces_every_step_by_its_name_and_writes_nothing(
    home: Path, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    assert main(["run", str(home / "recipe.yaml"), "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr()
    table = "".join((shown.out + shown.err).split())
    merged = next(model for model in report.models if model.step == "merged")
    assert f"{merged.total_parameters:,}" in table
    recipe = load_any_recipe(home / "recipe.yaml")
    assert isinstance(recipe, Seq2SeqRecipe)
    announced = [step.name for step in pair_steps(recipe, outline_pairs(recipe), MACHINES["A100-80GB"], None)]
    assert announced == list(json.loads((home / "run" / "steps.json").read_text())["steps"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "teacher", "stages": 4}, "stages.0.merge.num_experts=4: the model has 4. Ask for fewer."),
        ({"rank": 32}, "stages.1.factor.rank=32: give a multiple of 8 below 32"),
        ({"initial": 4}, "stages.1.factor: initial_steps=4 and final_steps=2 leave nothing of 6 steps"),
        ({"batch": 0}, "stages.1.distillation: per_device_train_batch_size=0 should be 1 or more."),
        ({"source_length": 2}, "calibration asks for 1024 tokens, which is all the training data there is (0)"),
    ],
    ids=["experts", "rank", "schedule", "training", "lengths"],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    values = tiny_pairs_recipe(home)
    first, second = values["stages"]
    first["merge"]["num_experts"] = changes.get("stages", 2)
    second["factor"]["rank"] = changes.get("rank", 8)
    if "initial" in changes:
        second["factor"]["initial_steps"] = float(changes["initial"])
    second["distillation"]["per_device_train_batch_size"] = changes.get("batch", 8)
    values["data"]["max_source_length"] = changes.get("source_length", 64)
    assert main(["run", str(write_recipe(tmp_path, values)), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_decoder_is_no_model_for_it(home: Path, tmp_path: Path):
    save_tiny(tmp_path / "decoder", "mixtral")
    with pytest.raises(
        ValueError, match=r"is a mixtral, and task: seq2seq merges and factors switch_transformers only"
    ):
        run_recipe(changed(home, tmp_path, model=str(tmp_path / "decoder")), tmp_path / "run")


@pytest.mark.parametrize("command", ["push", "plot", "eval"])  # two runs at once cannot be drawn
def test_other_commands_say_that_the_run_is_not_for_them(
    home: Path, report: Report, command: str, capsys: pytest.CaptureFixture[str]
):
    """In one line, and nothing of the run is touched."""
    run = str(home / "run")
    arguments = {"push": [run, "a/b", "--dry-run"], "plot": [run, str(home), "--json"], "eval": [run, "--tasks", "x"]}[
        command
    ]
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error


def test_merged_experts_are_the_reconstructed_ones(home: Path, report: Report):
    plan = CompressionPlan.load(home / "run" / "stage-1" / "plan")
    assert plan.meta.repairing is not None and plan.meta.repairing.data_sha256 == plan.meta.data_sha256
    merged = load_seq2seq(home / "run" / "stage-1" / "merged")
    layers = {layer: experts for layer, experts, _ in moe_layers(merged)}
    assert plan.repairs.down_proj.keys() == plan.blends.keys()
    for layer, down_EDF in plan.repairs.down_proj.items():
        for expert, owner in enumerate(plan.blends[layer].owner.tolist()):
            assert torch.equal(layers[layer][f"expert_{expert}"].wo.weight, down_EDF[owner])


def test_stable_ranks_of_the_merged_layers_are_drawn(home: Path, report: Report, tmp_path: Path):
    assert main(["plot", str(home / "run"), "--output", str(tmp_path / "plots")]) == 0
    drawn = json.loads((tmp_path / "plots" / "stable_rank.json").read_text())["matrices"]
    merged = [change for change in report.stable_ranks if change.experts_after < change.experts_before]
    assert merged and {row["after"] for rows in drawn.values() for row in rows} == {change.after for change in merged}
    assert sum(map(len, drawn.values())) == len(merged) and (tmp_path / "plots" / "stable_rank.png").is_file()


# google/switch-base-32, as its own config.json has it.
SWITCH_BASE_32 = {
    "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12, "num_experts": 32,
    "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "vocab_size": 32128, "decoder_start_token_id": 0,
}  # fmt: skip


def test_the_recipe_with_the_published_settings_gives_the_published_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """1.98 to 0.733 to 0.381 billion parameters, before any weight is there; its data is the user's."""
    AutoConfig.for_model("switch_transformers", **SWITCH_BASE_32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "copa.jsonl")
    recipe = load_any_recipe(EXAMPLES / "mc-smoe-switch-base-32.yaml")
    assert isinstance(recipe, Seq2SeqRecipe) and recipe.model == "google/switch-base-32"
    data = recipe.data.model_copy(update={"source": str(tmp_path / "copa.jsonl")})
    recipe = recipe.model_copy(update={"model": str(tmp_path / "model"), "data": data})
    found = outline_pairs(recipe, elsewhere=True)
    assert (found.counts.original, found.counts.merged, found.counts.experts) == (1_978_514_688, 732_806_400, 88)
    assert found.counts.factored == pytest.approx(380.7e6, rel=1e-3)
    steps = pair_steps(recipe, found, MACHINES["A100-80GB"], read_pairs(recipe, found.tokenizer))
    check_room(steps, MACHINES["A100-80GB"], None)
    assert 1.4e9 < steps[-1].disk < 1.6e9, "saved in float32"


@pytest.mark.parametrize("name", ["mc-smoe-switch", "mc-smoe-switch-base-32"])
def test_what_the_shipped_recipes_ask_for_is_accepted_by_the_trainer(name: str):
    recipe = load_any_recipe(EXAMPLES / f"{name}.yaml")
    assert isinstance(recipe, Seq2SeqRecipe) and recipe.stages[1].factor is not None
    for number in range(2):
        arguments = pair_arguments(recipe, number, elsewhere=True)
        assert (arguments.adam_epsilon, arguments.adam_beta2, arguments.weight_decay) == (1e-6, 0.98, 0.01)
        assert arguments.temperature**2 * arguments.distillation_weight == pytest.approx(0.2)  # type: ignore[operator]
        assert arguments.crossentropy_weight == 1.0 and arguments.router_aux_loss_coef == 0.0


def test_the_seq2seq_key_is_what_tells_the_kinds_apart(home: Path):
    with pytest.raises(ValueError, match=r"is of an encoder-decoder \(task: seq2seq\), which only `slimmoe run` takes"):
        load_recipe(home / "recipe.yaml")
    assert outline_pairs(load_any_recipe(home / "recipe.yaml")).counts.experts == 2 * 3  # type: ignore[arg-type]
