"""The journey: a recipe runs, is measured honestly, survives being killed, and touches no folder that is not its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from recipes import whole_recipe, write_recipe
from runs import in_child
from tiny import VOCAB_SIZE, tiny_tokenizer, write_text
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from slimmoe_hf import pipeline, student_training
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_writer import CacheWriter
from slimmoe_hf.callbacks import SlimmingCallback
from slimmoe_hf.data import document_hash, load_splits, take_rows
from slimmoe_hf.evaluation import count_parameters
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.loading import load_model, weights_sha256
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.plan import CompressionPlan, Target
from slimmoe_hf.plots import draw
from slimmoe_hf.preflight import Inputs, check, outline, read_text
from slimmoe_hf.recipe import Recipe, load_recipe
from slimmoe_hf.report import Report
from slimmoe_hf.rundir import CACHE, RunFolder, claim
from slimmoe_hf.stats import ExpertStats


@pytest.fixture(scope="module")
def home(whole_run: Path) -> Path:
    """A folder with a recipe, its model and its text."""
    return whole_run


@pytest.fixture(scope="module")
def report(home: Path) -> Report:
    """Of an uninterrupted run in `home/run`."""
    return Report.load(home / "run" / "report.json")


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of that run, which this process may claim."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def test_a_run_leaves_what_the_design_says(home: Path, report: Report):
    names = {path.name for path in (home / "run").iterdir()}
    assert names == {"recipe.yaml", "steps.json", "report.json", "README.md", "model", "stage-1", "stage-2", ".lock"}
    for stage in ("stage-1", "stage-2"):
        inside = {path.name for path in (home / "run" / stage).iterdir()}
        assert inside == {"stats.safetensors", "plan", "slimmed", "checkpoints", "model"}
    assert load_recipe(home / "run" / "recipe.yaml").differences(load_recipe(home / "recipe.yaml")) == []
    assert weights_sha256(home / "run" / "model") == report.models[-1].weights_sha256


def test_the_report_lists_every_model_with_sizes_counted_on_the_models(home: Path, report: Report):
    assert [(model.stage, model.step) for model in report.models] == [
        (0, "teacher"), (1, "slimmed"), (1, "distilled"), (2, "slimmed"), (2, "distilled"),
    ]  # fmt: skip
    for model in report.models:
        loaded = AutoModelForCausalLM.from_pretrained(home / "run" / model.path, dtype=torch.float32)
        assert (model.total_parameters, model.active_parameters) == count_parameters(loaded)
        assert model.bytes == (home / "run" / model.path / "model.safetensors").stat().st_size
        assert model.weights_sha256 == weights_sha256(home / "run" / model.path)
        assert model.tokens_per_second > 0 and len(model.samples) == 2
    final = AutoModelForCausalLM.from_pretrained(home / "run" / "model").config
    assert (final.intermediate_size, final.num_key_value_heads, final.num_attention_heads) == (8, 1, 2)


WITHOUT_US = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, length, texts = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
with torch.no_grad():
    logits = model(input_ids=rows).logits[:, :-1]
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
assert not any(name.startswith("slimmoe") for name in sys.modules)
print(json.dumps([loss.item(), rows[:, 1:].numel()]))
"""


@pytest.mark.slow  # a process of its own that imports everything again
def test_the_published_model_loads_and_its_loss_is_recomputed_without_us(home: Path, report: Report):
    """In a process that never imports slimmoe_hf, from what report.json says alone."""
    told = json.loads((home / "run" / "report.json").read_text())
    evaluation = told["evaluation"]
    texts = load_splits(evaluation["data"])[evaluation["split"]]["text"][:]
    command = [sys.executable, "-c", WITHOUT_US, str(home / "run" / "model"), str(evaluation["max_length"])]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "missing" not in done.stderr.lower(), done.stderr
    loss, tokens = json.loads(done.stdout)
    assert tokens == evaluation["tokens"]
    assert told["models"][-1]["loss"] == pytest.approx(loss, abs=1e-5)


def test_every_stage_scored_its_own_student_and_learned_from_the_original(home: Path, report: Report):
    teacher, first_cut, first, second_cut, _ = report.models
    original = weights_sha256(home / "teacher")
    assert {model.teacher_sha256 for model in report.models} == {original} == {teacher.weights_sha256}
    assert first_cut.scored_sha256 == original and second_cut.scored_sha256 == first.weights_sha256

    def values(folder: str | Path) -> str:  # a hash that the statistics take of the model itself, not of its files
        return model_sha256(load_model(Path(folder)))

    for cut, scored in ((first_cut, home / "teacher"), (second_cut, home / "run" / first.path)):
        stats = ExpertStats.load(home / "run" / f"stage-{cut.stage}" / "stats.safetensors")
        plan = CompressionPlan.load(home / "run" / f"stage-{cut.stage}" / "plan")
        assert stats.meta.model_sha256 == plan.meta.model_sha256 == values(scored)
        assert (
            (stats.sha256, plan.sha256) == (cut.stats_sha256, cut.plan_sha256) == (plan.meta.stats_sha256, plan.sha256)
        )
    assert stats.meta.loss == "none" and stats.meta.teacher_sha256 is None


def inputs_of(recipe: Recipe) -> Inputs:
    found = outline(recipe)
    return check(recipe, found, read_text(recipe, found.tokenizer))


def test_calibration_training_validation_and_test_text_never_overlap(home: Path):
    """Promise 8, on what the run really reads: no row of one set is a row of another, nor is any document."""
    recipe = load_recipe(home / "recipe.yaml")
    inputs = inputs_of(recipe)
    rows = {
        name: {tuple(row) for row in getattr(inputs, name)["input_ids"]}
        for name in ("calibration", "train", "validation")
    }
    rows["test"] = {tuple(row) for row in inputs.test.rows_NT.tolist()}
    names = list(rows)
    assert all(not rows[a] & rows[b] for i, a in enumerate(names) for b in names[:i])
    hashes = [{document_hash(row) for row in split} for split in load_splits(recipe.data.source).values()]
    assert not (hashes[0] & hashes[1] or hashes[0] & hashes[2] or hashes[1] & hashes[2])


def test_training_moved_every_expert_and_the_cut_is_the_plan(home: Path, report: Report):
    slimmed, distilled = (load_model(home / "run" / model.path).state_dict() for model in report.models[1:3])
    assert all(not torch.equal(slimmed[name], distilled[name]) for name in slimmed if "experts" in name)
    assert distilled["model.layers.0.mlp.experts.down_proj"].shape[-1] == 16


def test_the_same_command_on_a_finished_run_changes_nothing(home: Path, run: Path, report: Report):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert run_recipe(home / "recipe.yaml", run) == report
    assert before == {path: path.stat().st_mtime_ns for path in before}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_calibration() -> None:
    true = pipeline.batches

    def dying(*args: Any) -> Any:
        yield from true(*args)[:3]
        _kill()

    pipeline.batches = dying  # type: ignore[assignment]


def _kill_in_training() -> None:
    true = student_training.TrainingProgress.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        true(self, args, state, control, **kwargs)
        if self.label == "stage-2" and state.global_step == 5:
            _kill()

    student_training.TrainingProgress.on_step_end = dying  # type: ignore[method-assign]


def _kill_between_stages() -> None:
    pipeline._Pipeline._score = lambda self, source, folder, stage: (  # type: ignore[method-assign]
        _kill() if folder.name == "stage-2" else _SCORE(self, source, folder, stage)
    )


def _kill_while_saving() -> None:
    true = pipeline.save_checkpoint

    def dying(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
        true(model, tokenizer, folder, dtype)
        if folder.parent.name == "stage-1" and folder.name.endswith("model"):
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
            _kill()

    pipeline.save_checkpoint = dying


_SCORE = pipeline._Pipeline._score


def _run_and_die(arrange: Callable[[], None], recipe: Path, output: Path) -> None:
    arrange()
    run_recipe(recipe, output)


@pytest.mark.parametrize(
    ("arrange", "said", "reused"),
    [
        pytest.param(_kill_in_calibration, "stage-1/score ...", 1, marks=pytest.mark.slow),
        (_kill_in_training, "stage-2: continues from checkpoint-4", 11),
        pytest.param(_kill_between_stages, "stage-2/score ...", 7, marks=pytest.mark.slow),
        pytest.param(_kill_while_saving, "stage-1: continues from checkpoint-6", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_point_the_same_command_ends_with_the_same_weights(
    no_pictures: None, home: Path, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arrange: Callable[[], None], said: str, reused: int,
):  # fmt: skip
    """Promise 4; SIGKILL leaves no handler a chance. What was finished is reused, and the log says so."""
    output = tmp_path / "run"
    assert in_child(_run_and_die, arrange, home / "recipe.yaml", output) == -signal.SIGKILL
    assert not (output / "report.json").exists()
    capsys.readouterr()
    again = run_recipe(home / "recipe.yaml", output)
    assert again is not None
    assert [model.weights_sha256 for model in again.models] == [model.weights_sha256 for model in report.models]
    assert [model.loss for model in again.models] == [model.loss for model in report.models]
    captured = capsys.readouterr()
    log = captured.out + captured.err
    assert said in log and log.count(": reused") == reused
    assert not list(output.rglob(".partial-*"))


def _kill_while_the_teacher_answers() -> None:
    true = CacheWriter.add

    def dying(self: CacheWriter, *args: Any) -> None:
        true(self, *args)
        if self._answers > 1500:
            _kill()

    CacheWriter.add = dying  # type: ignore[method-assign]


def _kill_after_the_teacher_answered() -> None:
    RunFolder._save = lambda self: _kill() if CACHE in self._steps else _SAVE(self)  # type: ignore[method-assign]


_SAVE = RunFolder._save


@pytest.mark.slow  # four runs
def test_a_teacher_that_is_asked_once_teaches_as_a_live_one(
    no_pictures: None, home: Path, report: Report, tmp_path: Path
):
    """All of the vocabulary is kept, in float16; killed among its answers and right after them, nothing changes."""
    recipe, output = _with(home, tmp_path, teacher_cache={"top_k": VOCAB_SIZE}), tmp_path / "run"
    for arrange in (_kill_while_the_teacher_answers, _kill_after_the_teacher_answered):
        assert in_child(_run_and_die, arrange, recipe, output) == -signal.SIGKILL
    shard = next((output / CACHE).glob("answers-*"))
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))  # a disk that forgets: the teacher is asked again
    found = run_recipe(recipe, output)
    assert found is not None and TeacherCache.open(output / CACHE).manifest.answers > 1500
    whole = run_recipe(recipe, tmp_path / "whole")
    assert whole is not None and whole.models[-1].weights_sha256 == found.models[-1].weights_sha256
    # Of the first stage: the second one's plan may choose another of two neurons that score alike.
    ours, theirs = ([model.loss for model in each.models[:3]] for each in (found, report))
    assert ours == pytest.approx(theirs, abs=2e-3) and theirs[1] - theirs[2] > 0.02


def test_a_damaged_output_is_made_again(no_pictures: None, home: Path, report: Report, run: Path):
    """In a run that was stopped right before its report."""
    (run / "report.json").unlink()
    (run / "stage-2" / "slimmed" / "model.safetensors").write_bytes(b"torn")
    again = run_recipe(home / "recipe.yaml", run)
    assert weights_sha256(run / "stage-2" / "slimmed") == report.models[3].weights_sha256
    assert again is not None and again.models[-1].weights_sha256 == report.models[-1].weights_sha256


def test_a_dry_run_shows_the_work_and_writes_nothing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_recipe(home / "recipe.yaml", tmp_path / "run", dry_run=True) is None
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "expert_width=16" in shown and "1,536 tokens" in shown  # 6 steps of 4 rows of 64 tokens


def _with(home: Path, folder: Path, **changes: Any) -> Path:
    return write_recipe(folder, {**whole_recipe(home), **changes}, "changed.yaml")


def test_a_run_of_another_recipe_is_not_continued(home: Path, run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(it differs in seed\)"):
        run_recipe(_with(home, tmp_path, seed=7), run)


def test_a_foreign_folder_is_left_alone_even_with_overwrite(home: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that are no run of slimmoe; they are left alone"):
            run_recipe(home / "recipe.yaml", tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_is_not_continued_on_another_number_of_threads(home: Path, tmp_path: Path):
    """Where a GPU computes (0), CPU threads decide nothing."""
    recipe = load_recipe(home / "recipe.yaml")
    for threads in (2, 0, 2):
        with claim(tmp_path / "run", recipe) as run:
            run.begin(recipe, {}, threads)
            begun = run._threads
        with claim(tmp_path / "run", recipe) as run:
            if begun:
                with pytest.raises(ValueError, match=r"began on 2 CPU threads .* on 3, .* Set OMP_NUM_THREADS=2"):
                    run.begin(recipe, {}, 3)


def test_a_folder_that_another_process_works_in_is_locked(home: Path, run: Path):
    with (
        FileLock(run / ".lock"),
        pytest.raises(ValueError, match="locked: another slimmoe run is working there"),
    ):
        run_recipe(home / "recipe.yaml", run)


def test_overwrite_starts_over(home: Path, run: Path, tmp_path: Path):
    """In the folder of another recipe's run, and dies soon."""
    assert in_child(_overwrite_and_die, _with(home, tmp_path, seed=7), run) == -signal.SIGKILL
    assert list(json.loads((run / "steps.json").read_text())["steps"]) == ["teacher/evaluate"]
    assert not (run / "stage-1" / "model").exists()


def _overwrite_and_die(recipe: Path, output: Path) -> None:
    _kill_in_calibration()
    run_recipe(recipe, output, overwrite=True)


def test_changed_text_is_noticed(home: Path, tmp_path: Path):
    data = write_text(tmp_path / "text.jsonl", 90)
    recipe = _with(home, tmp_path, data={"source": str(data), "max_length": 64})
    assert in_child(_run_and_die, _kill_in_calibration, recipe, tmp_path / "run") == -signal.SIGKILL
    write_text(tmp_path / "text.jsonl", 60)
    with pytest.raises(ValueError, match="data changed since this run began"):
        run_recipe(recipe, tmp_path / "run")


def test_the_callback_and_the_pipeline_cut_alike(home: Path, report: Report, tmp_path: Path):
    """Same model, text, target and criterion: same plan, same starting weights."""
    recipe = load_recipe(home / "recipe.yaml")
    inputs = inputs_of(recipe)
    rows = take_rows(inputs.calibration, recipe.stages[0].calibration.tokens)
    trainer = Trainer(
        model=load_model(home / "teacher"),
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=inputs.train,
        processing_class=tiny_tokenizer(),
        callbacks=[SlimmingCallback(Target(expert_width=16), calibration_dataset=rows, loss="lm", max_length=64)],
    )
    assert CompressionPlan.load(tmp_path / "plan").sha256 == report.models[1].plan_sha256
    slimmed = load_model(home / "run" / report.models[1].path).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, slimmed[name]), name


@pytest.mark.slow  # another whole run
def test_unpacked_rows_run_too(no_pictures: None, home: Path, tmp_path: Path):
    values = whole_recipe(home)
    values["stages"] = values["stages"][:1]
    recipe = write_recipe(tmp_path, {**values, "data": {**values["data"], "packing": False, "max_length": 512}})
    inputs = inputs_of(load_recipe(recipe))
    assert len({len(row) for row in inputs.train["input_ids"]}) > 1
    found = run_recipe(recipe, tmp_path / "run")
    assert found is not None and found.models[-1].loss < found.models[1].loss + 0.5


@pytest.mark.slow  # another whole run
def test_experts_go_over_stages_and_everything_that_is_written_says_so(home: Path, tmp_path: Path):
    """Four experts, three, two: routers, sizes, card, plans and pictures of a run whose models number experts anew."""
    values = whole_recipe(home)
    first, second = values["stages"]
    for stage in (first, second):
        stage["distillation"]["max_steps"] = 2
    first["target"], first["criterion"] = {"num_experts": 3}, "reap"
    second["target"] = {"num_experts": 2, "expert_width": 16}
    second |= {"criterion": "energy", "expert_criterion": "frequency"}
    distillation = {**second["distillation"], "router_logits_weight": 0.1}
    watched = {**values, "stages": [first, {**second, "distillation": distillation}]}
    with pytest.raises(ValueError, match=r"stages\.1\.distillation: router_logits_weight=0\.1 .* num_experts 2 and 4"):
        run_recipe(write_recipe(tmp_path, watched), tmp_path / "watched")
    assert not (tmp_path / "watched").exists(), "refused before anything was scored"
    found = run_recipe(write_recipe(tmp_path, values), tmp_path / "run")
    assert found is not None
    for model in found.models:
        assert model.total_parameters == count_parameters(load_model(tmp_path / "run" / model.path))[0]
    final = load_model(tmp_path / "run" / "model")
    assert [tuple(final.model.layers[1].mlp.experts.down_proj.shape)] == [(2, 32, 16)]
    assert tuple(final.model.layers[1].mlp.router.weight.shape) == (2, 32)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "neurons and experts were scored on real text" in card
    assert "every layer from 4 to 2 experts, every expert from 32 to 16 neurons" in card and "experts stay" not in card
    assert "| experts per layer | 4 → 3 | 3 → 2 |" in card and "`reap`, " in card and "`frequency`, " in card
    assert "| output projections | - | solved anew on 1,024 tokens " in card, (
        "experts that go leave nothing to be solved"
    )
    kept = draw([tmp_path / "run"], tmp_path / "plots")[0]
    assert "Cut: layers to 2 of 4 experts" in json.loads(kept.json.read_text())["title"]
