"""Run a recipe: score, plan, slim, distil, evaluate, once per stage, each finished step recorded.

Every stage scores its **current** student and distils from the **original** model. A run that was stopped, however
hard, continues where it was when the same command is given again, and ends with the same weights (on the same number
of threads).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from rich import get_console
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import slimmoe_hf
from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.data import batches, take_rows
from slimmoe_hf.defaults import CALIBRATION_LOSS
from slimmoe_hf.evaluation import evaluate_checkpoint
from slimmoe_hf.free_memory import memory_bytes
from slimmoe_hf.harness import TaskResult, TaskSet, load_tasks
from slimmoe_hf.hub import complete_folder
from slimmoe_hf.launch import FOLDER, HISTORY, Handover, launch, processes_of
from slimmoe_hf.lineage import public_name
from slimmoe_hf.loading import load_config, load_model, weights_sha256
from slimmoe_hf.machines import MACHINES, require_machine, this_machine
from slimmoe_hf.outlook import outlook
from slimmoe_hf.plan import CompressionPlan, make_plan
from slimmoe_hf.preflight import (
    Inputs,
    check,
    device,
    free_disk,
    is_remote,
    outline,
    read_text,
    stage_arguments,
    teacher_dtype,
)
from slimmoe_hf.recipe import Calibration, Evaluation, Recipe, Stage, load_any_recipe, resolved
from slimmoe_hf.reconstruction import cuts_outputs, reconstruct
from slimmoe_hf.remedies import remedies
from slimmoe_hf.report import EvaluationReport, ModelReport, Report, readme
from slimmoe_hf.rundir import CACHE, REPORT, Result, RunFolder, claim
from slimmoe_hf.search_check import save_searched
from slimmoe_hf.seq2seq_pipeline import run_pairs
from slimmoe_hf.seq2seq_recipe import Seq2SeqRecipe
from slimmoe_hf.sizing import DTYPES, wider_dtype
from slimmoe_hf.stage_search import check_rows, found_by_measuring, found_by_prediction, is_met, whole_plan
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.steps import check_room, shown_steps
from slimmoe_hf.streamed_evaluation import stream_measurement
from slimmoe_hf.streamed_repair import stream_reconstruct
from slimmoe_hf.streaming import stream_stats
from slimmoe_hf.student_training import distil, save_checkpoint
from slimmoe_hf.walk import discard

_SCORING, _REPAIRING, _EVALUATING = "scoring", "reconstructing", "evaluating"
"""Folders for what passes between the layers of a model that streams; they go when what they were for is recorded."""
_MET = "met already, nothing to cut"


def run_recipe(
    recipe: str | Path | Recipe | Seq2SeqRecipe,
    output: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: str | None = None,
) -> Report | None:
    """Run a recipe from its first unfinished step to its report.

    Args:
        recipe: A YAML file, or what one holds; with `task: seq2seq` it is for an encoder-decoder.
        output: The run's folder; wins over the recipe's `output`.
        overwrite: Start over in a folder that holds a run.
        dry_run: Check everything, show the plan of work, write nothing. What is on the Hub is not downloaded for it.
        machine: With `dry_run`, a name in `slimmoe_hf.machines.MACHINES` to plan for; None is this machine.

    Returns:
        The report, as in `report.json`; None after a dry run.

    Raises:
        ValueError: The recipe, its model, teacher, data or output folder will not do. Nothing has been written then.
    """
    if isinstance(recipe, str | Path):
        recipe = load_any_recipe(recipe)
    else:
        recipe = resolved(recipe, Path()) if isinstance(recipe, Recipe) else recipe.resolved(Path())
    if output is None and recipe.output is None:
        raise ValueError("the recipe names no output folder. Add `output:` to it, or give --output.")
    folder = Path(output or recipe.output or "").expanduser().resolve()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with claim(folder, recipe, overwrite) as run:
        if run.state == "finished":
            get_console().log(f"{folder}: this run is finished; nothing to do", markup=False)
            if (
                isinstance(recipe, Recipe) and not (folder / "model" / "README.md").exists()
            ):  # stopped between the report and the card
                complete_folder(folder)
            return Report.load(folder / REPORT)
        require_machine(machine, dry_run)
        if isinstance(recipe, Seq2SeqRecipe):
            return run_pairs(recipe, run, dry_run, machine)
        inputs = _look_ahead(recipe, folder, dry_run, machine)
        if inputs is None:
            return None
        tasks = _tasks(recipe.evaluation)
        run.begin(recipe, inputs.hashes, 0 if torch.accelerator.is_available() else torch.get_num_threads())
        return _Pipeline(recipe, inputs, run, tasks).run()


def _look_ahead(recipe: Recipe, folder: Path, dry_run: bool, machine: str | None) -> Inputs | None:
    """Check everything and show the plan of work. Returns None after a dry run."""
    found = outline(recipe, elsewhere=machine is not None)
    here = MACHINES[machine] if machine is not None else this_machine()
    remote = [name for name in (recipe.model, recipe.teacher, recipe.data.source) if name and is_remote(name)]
    text = None if dry_run and recipe.data.source in remote else read_text(recipe, found.tokenizer)
    steps = outlook(recipe, found, here, text)
    if dry_run and (short := remedies(recipe, steps, here, text, elsewhere=machine is not None)):
        get_console().print(shown_steps(steps, here))
        get_console().print("What does not fit:", *short, sep="\n", highlight=False, markup=False, soft_wrap=True)
    check_room(steps, here, free_disk(folder) if machine is None else None)
    inputs = None if text is None or (dry_run and remote) else check(recipe, found, text)
    get_console().print(shown_steps(steps, here))
    if inputs is None:
        get_console().print(f"Not looked at, because it is on the Hub: {', '.join(remote)}", highlight=False)
    return None if dry_run else inputs


def _tasks(evaluation: Evaluation) -> TaskSet | None:
    """The benchmarks that a recipe asks for, their data loaded: what is missing is found before any work."""
    if not evaluation.tasks:
        return None
    folder = Path(evaluation.task_path) if evaluation.task_path is not None else None
    return load_tasks(evaluation.tasks, folder, evaluation.num_fewshot, evaluation.task_limit)


class _Pipeline:
    """The steps of one run."""

    def __init__(self, recipe: Recipe, inputs: Inputs, run: RunFolder, tasks: TaskSet | None) -> None:
        self.recipe = recipe
        self.inputs = inputs
        self.tasks = tasks
        self.step = run.step
        self.folder = run.path
        self.seconds = run.seconds

    def run(self) -> Report:
        """All stages, then what is published."""
        models = [self._measured("teacher", self.inputs.teacher, 0, "teacher", {})]
        source = self.inputs.model
        if self.recipe.teacher_cache is not None:
            self.step(CACHE, [CACHE], self._ask_teacher)
        for number, stage in enumerate(self.recipe.stages, 1):
            models += self._stage(number, stage, source)
            source = self.folder / f"stage-{number}" / "model"
        if self.tasks is not None:
            found = self.step("tasks", [], lambda: self._put_to_tasks(self.inputs.teacher, source))
            models[0] = _with_tasks(models[0], found.get("teacher", []))
            models[-1] = _with_tasks(models[-1], found["model"])
        self.step("publish", ["model"], lambda: self._publish(source))
        report = self._report(models)
        complete_folder(self.folder)
        return report

    def _stage(self, number: int, stage: Stage, source: Path) -> list[ModelReport]:
        """Score, plan, slim, distil; the slimmed and the distilled model, measured."""
        name = f"stage-{number}"
        folder = self.folder / name
        origin = {
            **self.step(f"{name}/score", [f"{name}/stats.safetensors"], lambda: self._score(source, folder, stage)),
            **self.step(f"{name}/plan", [f"{name}/plan"], lambda: self._plan(source, folder, stage)),
        }
        discard(folder / _SCORING)
        discard(folder / _REPAIRING)
        self.step(f"{name}/slim", [f"{name}/slimmed"], lambda: self._slim(source, folder))
        slimmed = self._measured(f"{name} slimmed", folder / "slimmed", number, "slimmed", origin)
        self.step(f"{name}/distil", [f"{name}/model"], lambda: self._distil(number, folder))
        return [slimmed, self._measured(f"{name} distilled", folder / "model", number, "distilled", {})]

    def _score(self, source: Path, folder: Path, stage: Stage) -> Result:
        set_seed(self.recipe.seed)
        calibration = stage.calibration
        asked = stage.loss == CALIBRATION_LOSS and source != self.inputs.teacher  # the first student is its own teacher
        given, where = self._calibration(calibration)
        work = folder / _SCORING
        if calibration.stream:
            other = self.inputs.teacher if asked else None
            stats = stream_stats(
                source, given, stage.loss, other, work=work, dtype=calibration.dtype, device=where, overwrite=True
            )
        else:
            teacher = load_model(self.inputs.teacher, calibration.dtype, where) if asked else None
            model = load_model(source, calibration.dtype, where, whole=True)
            stats = collect_stats(model, given, loss=stage.loss, teacher=teacher)
        stats.save(folder / "stats.safetensors")
        return {"scored_sha256": weights_sha256(source), "stats_sha256": stats.sha256}

    def _plan(self, source: Path, folder: Path, stage: Stage) -> Result:
        stats = ExpertStats.load(folder / "stats.safetensors")
        if stage.target.searched:
            return self._search(source, folder, stage, stats)
        plan = make_plan(stats, stage.target.sizes, stage.criterion, self.recipe.seed, stage.expert_criterion)
        if stage.calibration.reconstruct:
            plan = self._reconstruct(source, plan, stage.calibration, folder / _REPAIRING)
        plan.save(folder / "plan")
        return {"plan_sha256": plan.sha256}

    def _search(self, source: Path, folder: Path, stage: Stage, stats: ExpertStats) -> Result:
        """The plan of the best shape within a budget: by prediction where the model streams, else as measured."""
        seed, calibration = self.recipe.seed, stage.calibration
        if is_met(load_config(source), stage.target):
            plan = whole_plan(stage, stats, seed)
            plan.save(folder / "plan")
            get_console().log(f"{folder.name}: {stage.target}: {_MET}", markup=False)
            return {"plan_sha256": plan.sha256, "found": _MET}
        if calibration.stream:
            found = found_by_prediction(stage, stats, seed)
            plan = found.plan(stats)
            if calibration.reconstruct:
                plan = self._reconstruct(source, plan, calibration, folder / _REPAIRING)
        else:
            given, where = self._calibration(calibration)
            rows_NT = check_rows(self.inputs.validation, self.recipe.data.max_length)
            found, plan = found_by_measuring(stage, stats, seed, source, given, rows_NT, where, self._written(source))
        save_searched(found, plan, folder / "plan", overwrite=True)
        shape = found.name(found.best)
        get_console().log(f"{folder.name}: {stage.target}: {shape} of {len(found.candidates)} shapes", markup=False)
        return {"plan_sha256": plan.sha256, "found": shape}

    def _reconstruct(
        self, source: Path, plan: CompressionPlan, calibration: Calibration, work: Path
    ) -> CompressionPlan:
        if not cuts_outputs(plan):
            return plan
        given, where = self._calibration(calibration)
        if calibration.stream:
            return stream_reconstruct(
                source, given, plan, work=work, dtype=calibration.dtype, device=where,
                written=DTYPES[self.inputs.dtype], overwrite=True,
            )  # fmt: skip
        model = load_model(source, calibration.dtype, where, whole=True)
        return reconstruct(model, given, plan, dtype=self._written(source))

    def _written(self, source: Path) -> torch.dtype:
        """What is solved for a model is kept in: the cut rounds it to what the run saves."""
        return wider_dtype(load_config(source), self.inputs.dtype)

    def _calibration(self, calibration: Calibration) -> tuple[list[dict[str, Tensor]], torch.device]:
        """Batches of text set aside for it, and what they are run on."""
        rows = take_rows(self.inputs.calibration, calibration.tokens)
        where = torch.device("cpu") if calibration.device == "cpu" else device()
        return batches(rows, calibration.batch_size, self.inputs.tokenizer.pad_token_id or 0), where

    def _slim(self, source: Path, folder: Path) -> Result:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a slimmed model that is no more
        plan = CompressionPlan.load(folder / "plan")
        slim_checkpoint(source, plan, folder / "slimmed", dtype=self.inputs.dtype, overwrite=True)
        return {}

    def _ask_teacher(self) -> Result:
        """Its answers to every row that is trained or looked at; a killed one continues."""
        asked, stages = self.recipe.teacher_cache, self.recipe.stages
        assert asked is not None
        if (self.folder / CACHE).exists():
            try:
                TeacherCache.open(self.folder / CACHE).verify()
            except ValueError:
                shutil.rmtree(self.folder / CACHE)
            else:
                return {}  # finished, but stopped before that was noted
        arguments = [stage_arguments(self.recipe, number, self.folder) for number in range(len(stages))]
        rows = [self.inputs.train]
        if any(each.eval_strategy != "no" for each in arguments):
            rows.append(self.inputs.validation)
        write_cache(
            self.inputs.teacher, concatenate_datasets(rows), self.folder / CACHE, tokenizer=self.inputs.tokenizer,
            kind=asked.kind, top_k=asked.top_k, temperatures=sorted({each.temperature for each in arguments}),
            vocab_size=load_config(self.inputs.model).vocab_size, batch_size=asked.batch_size,
            dtype=teacher_dtype(stages[0], device().type == "cpu", self.inputs.dtype), device=device(),
            overwrite=True, stream=asked.stream,
            stream_memory=None if asked.stream_memory is None else memory_bytes(asked.stream_memory),
        )  # fmt: skip
        return {}

    def _distil(self, number: int, folder: Path) -> Result:
        if self.recipe.accelerate is not None:
            return {"history": self._launched(self.recipe.accelerate, number, folder / FOLDER)}
        arguments = stage_arguments(self.recipe, number - 1, self.folder)
        model, history = distil(
            folder / "slimmed", None if self.recipe.teacher_cache else self.inputs.teacher, arguments, self.inputs.tokenizer,
            self.inputs.train, self.inputs.validation, folder.name,
            self.recipe.stages[number - 1].training_dtype, self.recipe.teacher_memory,
        )  # fmt: skip
        self._save(model, folder / "model")
        return {"history": history}

    def _launched(self, config: str, number: int, folder: Path) -> list[dict[str, float]]:
        """Train a stage in processes of their own, which save its model; its log history."""
        rows = {"train": self.inputs.train, "validation": self.inputs.validation}
        hashes = {name: self.inputs.hashes[f"{name} data"] for name in rows}
        Handover(
            tokenizer=self.inputs.model, teacher=self.inputs.teacher, dtype=self.inputs.dtype,
            processes=processes_of(self.recipe), rows=hashes,
        ).write(folder, rows)  # fmt: skip
        torch.cuda.empty_cache()  # the processes share the GPU with this one, which keeps what it once had
        launch(config, self.folder, number)
        history = json.loads((folder / HISTORY).read_text())
        shutil.rmtree(folder)
        return list(history)

    def _save(self, model: PreTrainedModel, path: Path) -> None:
        with replacing(path, overwrite=True) as partial:
            save_checkpoint(model, self.inputs.tokenizer, partial, self.inputs.dtype)

    def _measured(self, name: str, path: Path, stage: int, step: str, origin: Result) -> ModelReport:
        evaluation = self.recipe.evaluation
        work = self.folder / _EVALUATING

        def measure() -> Result:
            same: dict[str, Any] = {
                "batch_size": evaluation.batch_size,
                "device": device(),
                "dtype": self._evaluation_dtype(),
            }
            if step == "teacher" and self.recipe.streams_teacher:
                return stream_measurement(path, self.inputs.test, work=work, **same).model_dump()
            return evaluate_checkpoint(
                path, self.inputs.test, self.inputs.tokenizer, prompts=self.inputs.prompts,
                max_new_tokens=evaluation.max_new_tokens, **same,
            ).model_dump()  # fmt: skip

        found = self.step(f"{name.replace(' ', '/')}/evaluate", [], measure)
        discard(work)
        named = self.recipe.teacher or self.recipe.model
        on_hub = step == "teacher" and not Path(named).exists()
        where = named if on_hub else os.path.relpath(path, self.folder)
        place = {"name": name, "path": where, "stage": stage, "step": step}
        return ModelReport.model_validate({**place, **found, **origin, "teacher_sha256": self.inputs.hashes["teacher"]})

    def _put_to_tasks(self, teacher: Path, model: Path) -> Result:
        assert self.tasks is not None
        rows, place, dtype = self.recipe.evaluation.batch_size, device(), self._evaluation_dtype()
        if self.recipe.streams_teacher:
            get_console().log("the teacher streams: tasks are put to the last model alone")
        both = {"model": model} if self.recipe.streams_teacher else {"teacher": teacher, "model": model}
        return {
            name: [result.model_dump() for result in self.tasks.run(path, rows, place, dtype)]
            for name, path in both.items()
        }

    def _evaluation_dtype(self) -> str:
        """float32 on a CPU, which is slow in less; elsewhere what the model is published in."""
        return "float32" if device().type == "cpu" else self.inputs.dtype

    def _publish(self, source: Path) -> Result:
        with replacing(self.folder / "model", overwrite=True) as partial:
            shutil.copytree(source, partial)
        return {}

    def _report(self, models: list[ModelReport]) -> Report:
        evaluation, test = self.recipe.evaluation, self.inputs.test
        report = Report(
            models=models,
            evaluation=EvaluationReport(
                data=self.recipe.data.source, revision=self.recipe.data.revision, split=evaluation.split,
                max_length=test.rows_NT.shape[1], rows=test.rows_NT.shape[0], tokens=test.tokens,
                documents=test.documents, stream_tokens=test.stream_tokens, stream_bytes=test.stream_bytes,
                token_limit=evaluation.tokens, dtype=self._evaluation_dtype(), prompts=self.inputs.prompts,
            ),
            seconds=self.seconds(),
            threads=torch.get_num_threads(),
            version=slimmoe_hf.__version__,
        )  # fmt: skip
        write_text(self.folder / "README.md", readme(report, public_name(self.recipe.model)))
        write_text(self.folder / REPORT, report.model_dump_json(indent=2) + "\n")
        return report


def _with_tasks(model: ModelReport, found: list[Result]) -> ModelReport:
    return model.model_copy(update={"tasks": [TaskResult.model_validate(result) for result in found]})
