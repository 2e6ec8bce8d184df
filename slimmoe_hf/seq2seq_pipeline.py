"""Run a recipe for an encoder-decoder: score, merge, distil, factor, distil, each finished step recorded.

As in `pipeline`: a run that was stopped continues where it was when the same command is given again, and ends with the
same weights (on the same number of threads); every model is measured as reloaded from disk.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

import slimmoe_hf
from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.data import batches
from slimmoe_hf.factorization import StableRankChange, compare_stable_ranks, factor_experts, stable_ranks
from slimmoe_hf.lineage import public_name
from slimmoe_hf.loading import find_checkpoint, weights_sha256
from slimmoe_hf.machines import MACHINES, this_machine
from slimmoe_hf.merged_forms import share_merged
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.preflight import device, free_disk, is_remote
from slimmoe_hf.progress import TrainingProgress
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.report import EvaluationReport, ModelReport, Report, pair_readme
from slimmoe_hf.rundir import REPORT, Result, RunFolder
from slimmoe_hf.seq2seq import Seq2SeqDistillationTrainer
from slimmoe_hf.seq2seq_models import evaluate_pairs, freeze_routers, load_seq2seq
from slimmoe_hf.seq2seq_outlook import pair_steps
from slimmoe_hf.seq2seq_preflight import (
    PairOutline,
    PairText,
    input_hashes,
    outline_pairs,
    pair_arguments,
    read_pairs,
)
from slimmoe_hf.seq2seq_recipe import Factor, Merge, Seq2SeqRecipe, Seq2SeqStage
from slimmoe_hf.sparsity import SparsityCallback
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.steps import check_room, shown_steps
from slimmoe_hf.student_training import train_on


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, checked."""

    outline: PairOutline
    text: PairText
    hashes: dict[str, str]


def run_pairs(recipe: Seq2SeqRecipe, run: RunFolder, dry_run: bool, machine: str | None) -> Report | None:
    """Run a recipe in a folder that is claimed, from its first unfinished step to its report.

    Args:
        recipe: With absolute paths.
        run: Not finished.
        dry_run: Check everything, show the plan of work, write nothing.
        machine: With `dry_run`, a name in `slimmoe_hf.machines.MACHINES`; None is this machine.

    Returns:
        The report; None after a dry run.

    Raises:
        ValueError: The recipe, its models or its data will not do. Nothing has been written then.
    """
    found = outline_pairs(recipe, elsewhere=machine is not None)
    here = MACHINES[machine] if machine is not None else this_machine()
    remote = [name for name in (recipe.model, recipe.teacher, recipe.data.source) if name and is_remote(name)]
    text = None if dry_run and recipe.data.source in remote else read_pairs(recipe, found.tokenizer)
    steps = pair_steps(recipe, found, here, text)
    check_room(steps, here, free_disk(run.path) if machine is None else None)
    hashes = None if text is None or (dry_run and remote) else input_hashes(recipe, text)
    get_console().print(shown_steps(steps, here))
    if text is not None and text.left_out:
        get_console().print(f"{text.left_out} pairs are longer than data.max_*_length and left out", highlight=False)
    if hashes is None:
        get_console().print(f"Not looked at, because it is on the Hub: {', '.join(remote)}", highlight=False)
    if dry_run or text is None or hashes is None:
        return None
    run.begin(recipe, hashes, 0 if torch.accelerator.is_available() else torch.get_num_threads())
    return _Line(recipe, _Inputs(found, text, hashes), run).run()


class _Line:
    """The steps of one run."""

    def __init__(self, recipe: Seq2SeqRecipe, inputs: _Inputs, run: RunFolder) -> None:
        self.recipe, self.inputs = recipe, inputs
        self.step, self.folder, self.seconds = run.step, run.path, run.seconds
        self.tokenizer, self.text = inputs.outline.tokenizer, inputs.text
        self.model = find_checkpoint(recipe.model, recipe.revision)
        self.teacher = find_checkpoint(recipe.teacher, recipe.teacher_revision) if recipe.teacher else self.model
        self.ranks: list[StableRankChange] = []

    def run(self) -> Report:
        """All stages, then what is published."""
        models = [self._measured("teacher", self.teacher, 0, "teacher", {})]
        source = self.model
        for number, stage in enumerate(self.recipe.stages, 1):
            models += self._stage(number, stage, source)
            source = self.folder / f"stage-{number}" / "model"
        self.step("publish", ["model"], lambda: self._publish(source))
        return self._report(models)

    def _stage(self, number: int, stage: Seq2SeqStage, source: Path) -> list[ModelReport]:
        """Merge or factor, then distil; the model before and after, measured."""
        name = f"stage-{number}"
        folder = self.folder / name
        if stage.merge is not None:
            kind, begun = "merged", self._merging(name, source, folder, stage, stage.merge)
        else:
            assert stage.factor is not None
            factor = stage.factor
            kind, begun = "factored", {}
            self.step(f"{name}/factor", [f"{name}/{kind}"], lambda: self._factor(source, folder, factor))
        made = self._measured(f"{name} {kind}", folder / kind, number, kind, begun)
        self.step(f"{name}/distil", [f"{name}/model"], lambda: self._distil(number, folder, kind))
        return [made, self._measured(f"{name} distilled", folder / "model", number, "distilled", {})]

    def _merging(self, name: str, source: Path, folder: Path, stage: Seq2SeqStage, merge: Merge) -> Result:
        found = self.step(f"{name}/score", [f"{name}/stats.safetensors"], lambda: self._score(source, folder, stage))
        outputs = [f"{name}/plan", f"{name}/merged"]
        done = self.step(f"{name}/merge", outputs, lambda: self._merge(source, folder, stage, merge))
        self.ranks = [StableRankChange.model_validate(change) for change in done["stable_ranks"]]
        return {**found, "plan_sha256": done["plan_sha256"]}

    def _score(self, source: Path, folder: Path, stage: Seq2SeqStage) -> Result:
        set_seed(self.recipe.seed)
        assert stage.merge is not None
        model = load_seq2seq(source, device=device())
        stats = collect_stats(
            model, self._calibration(stage), loss="lm", expert_outputs=stage.merge.similarity == "outputs"
        )
        stats.save(folder / "stats.safetensors")
        return {"scored_sha256": weights_sha256(source), "stats_sha256": stats.sha256}

    def _calibration(self, stage: Seq2SeqStage) -> list[dict[str, Tensor]]:
        return batches(self.text.calibration, stage.calibration.batch_size, self.tokenizer.pad_token_id or 0)

    def _merge(self, source: Path, folder: Path, stage: Seq2SeqStage, merge: Merge) -> Result:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a merged model that is no more
        model: Any = load_seq2seq(source)
        stats = ExpertStats.load(folder / "stats.safetensors")
        before = stable_ranks(model)
        plan: CompressionPlan = plan_merge(
            model, stats, merge.num_experts, counts=merge.counts, similarity=merge.similarity, grouping=merge.grouping,
            seed=self.recipe.seed,
        )  # fmt: skip
        if stage.calibration.reconstruct:
            plan = reconstruct(model.to(device()), self._calibration(stage), plan)
            model.to("cpu")
        plan.save(folder / "plan")
        merged = share_merged(model, plan)
        changes = compare_stable_ranks(before, stable_ranks(merged))
        self._save(merged, folder / "merged")
        return {"plan_sha256": plan.sha256, "stable_ranks": [change.model_dump() for change in changes]}

    def _factor(self, source: Path, folder: Path, factor: Factor) -> Result:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self._save(factor_experts(load_seq2seq(source), factor.rank), folder / "factored")
        return {}

    def _distil(self, number: int, folder: Path, kind: str) -> Result:
        arguments = pair_arguments(self.recipe, number - 1, self.folder)
        set_seed(arguments.seed)
        model = load_seq2seq(folder / kind, regrow=True)
        freeze_routers(model)
        use_cache = model.config.use_cache
        progress, factor = TrainingProgress(folder.name), self.recipe.stages[number - 1].factor
        sparsity: list[TrainerCallback] = []
        if factor is not None:
            sparsity.append(
                SparsityCallback(
                    factor.density, initial_steps=factor.initial_steps, final_steps=factor.final_steps, beta=factor.beta
                )
            )
        trainer = Seq2SeqDistillationTrainer(
            model=model,
            teacher_model=load_seq2seq(self.teacher),
            args=arguments,
            train_dataset=self.text.train,
            eval_dataset=self.text.validation if arguments.eval_strategy != "no" else None,
            processing_class=self.tokenizer,
            callbacks=[progress, *sparsity],
        )
        train_on(trainer, progress)
        model.config.use_cache = use_cache  # the trainer turns it off, and it would be published so
        self._save(model, folder / "model")
        return {"history": trainer.state.log_history}

    def _save(self, model: PreTrainedModel, path: Path) -> None:
        with replacing(path, overwrite=True) as partial:
            whole: Any = model
            whole.to("cpu", getattr(torch, self.inputs.outline.dtype)).save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)

    def _measured(self, name: str, path: Path, stage: int, step: str, origin: Result) -> ModelReport:
        evaluation, data = self.recipe.evaluation, self.recipe.data
        found = self.step(
            f"{name.replace(' ', '/')}/evaluate",
            [],
            lambda: evaluate_pairs(
                path, self.text.test, self.text.test_pairs, self.tokenizer, batch_size=evaluation.batch_size,
                max_new_tokens=evaluation.max_new_tokens or data.max_target_length, device=device(),
            ).model_dump(),
        )  # fmt: skip
        named = self.recipe.teacher or self.recipe.model
        on_hub = step == "teacher" and not Path(named).exists()
        place = {
            "name": name,
            "path": named if on_hub else os.path.relpath(path, self.folder),
            "stage": stage,
            "step": step,
        }
        known = {**place, **found, **origin, "teacher_sha256": self.inputs.hashes["teacher"]}
        return ModelReport.model_validate(known)

    def _publish(self, source: Path) -> Result:
        with replacing(self.folder / "model", overwrite=True) as partial:
            shutil.copytree(source, partial)
        return {}

    def _report(self, models: list[ModelReport]) -> Report:
        recipe, text = self.recipe, self.text
        labels = sum(map(len, text.test["labels"]))
        report = Report(
            models=models,
            evaluation=EvaluationReport(
                data=recipe.data.source, revision=recipe.data.revision, split=recipe.evaluation.split,
                max_length=recipe.data.max_source_length, rows=len(text.test), tokens=labels, documents=len(text.test),
                stream_tokens=labels, stream_bytes=sum(len(answer.encode()) for answer in text.test_pairs["completion"]),
                token_limit=recipe.evaluation.tokens, dtype="float32",
                prompts=list(text.test_pairs["prompt"][: len(models[0].samples)]), left_out=text.left_out,
            ),
            seconds=self.seconds(),
            threads=torch.get_num_threads(),
            version=slimmoe_hf.__version__,
            stable_ranks=self.ranks,
        )  # fmt: skip
        write_text(self.folder / "README.md", pair_readme(report, public_name(recipe.model)))
        write_text(self.folder / REPORT, report.model_dump_json(indent=2) + "\n")
        return report
