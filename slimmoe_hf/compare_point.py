"""One point of a comparison: a method with a seed, from the original model to a number. `compare_worker` runs these.

Everything that decides a point is in its `Point`, and the hash of that is its name: two grids that ask for the same point
share it. A point is finished when its result is there, which is written last and in one step.

Shape letters: N rows, T tokens per row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, load_from_disk
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from slimmoe_hf.atomic import write_text
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.data import batches, take_apart, take_rows, tokenize
from slimmoe_hf.defaults import CALIBRATION_LOSS
from slimmoe_hf.evaluation import count_parameters, measure_loss
from slimmoe_hf.factored import FactoredWeight, factored_weights
from slimmoe_hf.factorization import factor_experts
from slimmoe_hf.families import moe_layers, shape_of
from slimmoe_hf.grid import Method, Sweep
from slimmoe_hf.grid_sizes import active_of, left_config
from slimmoe_hf.loading import load_model
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import ALIGNMENT, CompressionPlan, Target, make_plan
from slimmoe_hf.preflight import device, training_arguments
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.sparsity import SparsityCallback, kept_rows
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.student_training import teach
from slimmoe_hf.surgery import apply_plan

SPEC, RESULT, STATS, FAILURE = "point.json", "result.json", "stats.safetensors", "error.txt"
TEXT = "text"
VERSION = 1


class Point(BaseModel):
    """Everything that decides what a point finds.

    Attributes:
        shared: The name of the folder of what all points read, a hash of it: teacher, texts, tokenizer, cached answers.
        method: What is done, its name left empty; None only takes the scores that several methods share.
        seed: Of the calibration sample, the order of recovery, and random choices.
        split: What is measured on; None where nothing is.
        calibration: How scores are taken.
        recovery: Arguments of `DistillationConfig`, the learning rate among them.
        max_length: T. packing: Of calibration text.
        batch_size: Rows at a time when a model is measured.
        threads: CPU threads; 0 where a GPU computes.
        versions: Of what computes.
        version: Of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shared: str
    method: Method | None
    seed: int
    split: Literal["validation", "test"] | None
    calibration: Sweep | None
    recovery: dict[str, Any]
    max_length: int
    packing: bool
    batch_size: int
    threads: int
    versions: dict[str, str]
    version: int = VERSION

    @property
    def key(self) -> str:
        """The name of its folder."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def scores(self) -> Point:
        """The point that takes the scores that this one needs."""
        alone: dict[str, Any] = {"method": None, "split": None, "recovery": {}, "batch_size": 1}
        return self.model_copy(update=alone)


class PointResult(BaseModel):
    """What a point found.

    Attributes:
        total_parameters, active_parameters: Of the recovered model, counted on it; of sparse parts what is not zero.
        before: Loss right after the (last) cut, nats per predicted token. after: After recovery.
        recovery_tokens, calibration_tokens: That were trained on, and scored on.
        seconds: It took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    total_parameters: int = 0
    active_parameters: int = 0
    before: float | None = None
    after: float | None = None
    recovery_tokens: int = 0
    calibration_tokens: int = 0
    seconds: float


class Bench:
    """What the points of one comparison read, opened once in a process.

    Args:
        folder: Of everything shared, as `comparison` prepared it.
        model: Folder of the original model.
        tokenizer: Its own.
    """

    def __init__(self, folder: Path, model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.train: Dataset = load_from_disk(folder / TEXT / "train")
        self.calibration: Dataset = load_from_disk(folder / TEXT / "calibration")
        self.held_out = {
            split: torch.tensor(load_from_disk(folder / TEXT / split)["input_ids"][:])
            for split in ("validation", "test")
        }


def run_point(bench: Bench, folder: Path) -> None:
    """Do a point and leave its result.

    Args:
        bench: What it reads.
        folder: Where its `point.json` is.

    Raises:
        ValueError: What the method, the data or the training refuses.
    """
    point = Point.model_validate_json((folder / SPEC).read_text())
    started = time.perf_counter()
    set_seed(point.seed)
    if point.method is None:
        stats = _sweep(bench, point, load_model(bench.model, device=device(), whole=True), 0, 1)
        stats.save(folder / STATS)
        result = PointResult(seconds=0, calibration_tokens=stats.meta.tokens)
    else:
        result = _Run(bench, point, point.method, folder).run()
    seconds = round(time.perf_counter() - started, 3)
    write_text(folder / RESULT, result.model_copy(update={"seconds": seconds}).model_dump_json(indent=2) + "\n")


def read_result(folder: Path, point: Point) -> PointResult | None:
    """What a finished point found; None where it is not finished, or its folder holds another's."""
    try:
        if Point.model_validate_json((folder / SPEC).read_text()) != point:
            return None
        return PointResult.model_validate_json((folder / RESULT).read_text())
    except (OSError, ValueError):
        return None


def _calibration(bench: Bench, point: Point, part: int, parts: int) -> list[dict[str, Tensor]]:
    """One of the equal parts of a seed's calibration sample."""
    assert point.calibration is not None
    asked = point.calibration
    documents, _ = take_apart(bench.calibration, asked.tokens, bench.tokenizer, point.seed)
    rows = take_rows(tokenize(documents, bench.tokenizer, point.max_length, point.packing), asked.tokens)
    rows = rows.select(range(part * len(rows) // parts, (part + 1) * len(rows) // parts))
    return batches(rows, asked.batch_size, bench.tokenizer.pad_token_id or 0)


def _sweep(bench: Bench, point: Point, model: PreTrainedModel, part: int, parts: int) -> ExpertStats:
    """Statistics on a part of the calibration sample; after the first, against the original model."""
    assert point.calibration is not None and point.calibration.loss is not None
    loss = point.calibration.loss
    teacher = load_model(bench.model, device=device()) if part and loss == CALIBRATION_LOSS else None
    given = _calibration(bench, point, part, parts)
    return collect_stats(model, given, loss=loss, teacher=teacher, progress=False)


class _Run:
    """A method with a seed."""

    def __init__(self, bench: Bench, point: Point, method: Method, folder: Path) -> None:
        self.bench, self.point, self.method, self.folder = bench, point, method, folder
        self.scored = 0

    def run(self) -> PointResult:
        """Make it small, measure, recover, measure. A learning rate that is only tried may diverge: `after` is None then."""
        try:
            return self._run()
        except FloatingPointError:
            if self.point.split != "validation":
                raise
            return PointResult(seconds=0)

    def _run(self) -> PointResult:
        model, method = self._start(), self.method
        before, trained = 0.0, 0
        for stage in range(method.stages):
            if method.target is not None and not method.from_scratch:
                model = self._cut(model, stage)
            callbacks: list[TrainerCallback] = []
            if method.factor is not None:
                model = factor_experts(model, method.factor.rank)
                callbacks.append(SparsityCallback(method.factor.density))
            if stage == method.stages - 1:
                before = self._measure(model)
            trained += self._recover(model, callbacks, stage)
        total, active = _count(model)
        return PointResult(
            total_parameters=total, active_parameters=active, before=before, after=self._loss(model),
            recovery_tokens=trained, calibration_tokens=self.scored, seconds=0,
        )  # fmt: skip

    def _start(self) -> PreTrainedModel:
        """The model that recovery, or the first cut, begins with."""
        model = load_model(self.bench.model, device=device(), whole=True)
        if self.method.from_scratch:
            config = left_config(model.config, self.method)
            set_seed(self.point.seed)
            fresh: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            return fresh.to(device=device()).eval()  # type: ignore[call-arg]
        if self.method.merge is not None:
            merge = self.method.merge
            stats = self._shared_scores()
            plan = plan_merge(
                model,
                stats,
                merge.num_experts,
                similarity=merge.similarity,
                grouping=merge.grouping,
                seed=self.point.seed,
            )
            return apply_plan(model, self._repaired(model, plan, 0))
        return model

    def _shared_scores(self) -> ExpertStats:
        path = self.folder.parent / self.point.scores.key / STATS
        stats = ExpertStats.load(path)
        self.scored = stats.meta.tokens
        return stats

    def _cut(self, model: PreTrainedModel, stage: int) -> PreTrainedModel:
        method, seed = self.method, self.point.seed
        assert method.target is not None and method.criterion is not None
        if method.stages == 1:
            stats = self._shared_scores()
        else:
            stats = _sweep(self.bench, self.point, model, stage, method.stages)
            self.scored += stats.meta.tokens
        target = stage_target(model, method.target, stage, method.stages)
        plan = make_plan(stats, target, method.criterion, seed, method.expert_criterion)
        return apply_plan(model, self._repaired(model, plan, stage))

    def _repaired(self, model: PreTrainedModel, plan: CompressionPlan, stage: int) -> CompressionPlan:
        """The plan, reconstructed if the method says so, on the part of the sample that the stage was scored on."""
        if not self.method.reconstruct:
            return plan
        given = _calibration(self.bench, self.point, stage, self.method.stages)
        return reconstruct(model, given, plan, progress=False)

    def _measure(self, model: PreTrainedModel) -> float:
        """The loss before recovery. Of factored experts with S cut at once, by the size of its rows: uncut, nothing is lost."""
        if self.method.factor is None:
            return self._loss(model)
        small = copy.deepcopy(model)
        weights = {name: w for name, w in factored_weights(small).items() if isinstance(w, FactoredWeight)}
        sizes = {name: weight.sparse.detach().float().abs().mean(-1) for name, weight in weights.items()}
        kept = kept_rows(weights, sizes, self.method.factor.density)
        with torch.no_grad():
            for weight, rows in zip(weights.values(), kept, strict=True):
                weight.sparse.masked_fill_(~rows.unsqueeze(-1), 0)
        return self._loss(small)

    def _loss(self, model: PreTrainedModel) -> float:
        assert self.point.split is not None
        rows_NT = self.bench.held_out[self.point.split]
        return measure_loss(model.eval(), rows_NT, self.point.batch_size, progress=False).loss

    def _recover(self, model: PreTrainedModel, callbacks: list[TrainerCallback], stage: int) -> int:
        """Train one stage's part of the steps. Returns the tokens of it."""
        steps, stages = self.point.recovery["max_steps"], self.method.stages
        steps = steps * (stage + 1) // stages - steps * stage // stages
        given = {
            **self.point.recovery, "max_steps": steps, "save_strategy": "no", "dataloader_drop_last": True,
            "teacher_logits_path": str(self.bench.folder / CACHE),
        }  # fmt: skip
        arguments = training_arguments(
            given, self.folder / f"stage-{stage + 1}", self.point.max_length, self.point.seed, "recovery"
        )
        label = f"seed {self.point.seed}, stage {stage + 1} of {stages}"
        train = self.bench.train
        if stages > 1:  # each on its own part: on one order all would begin with the same rows
            train = train.shuffle(seed=self.point.seed).shard(stages, stage, contiguous=True)
        if len(train) < arguments.train_batch_size:
            raise ValueError(
                f"{len(train)} rows of recovery text a stage are no batch of {arguments.train_batch_size}. Raise data.tokens."
            )
        teach(model, None, arguments, self.bench.tokenizer, train, None, label, callbacks)
        shutil.rmtree(str(arguments.output_dir), ignore_errors=True)  # the trainer makes it, and saves nothing
        rows = steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
        return rows * self.point.max_length


def stage_target(model: PreTrainedModel, target: Target, stage: int, stages: int) -> Target:
    """The target of one of the stages that are left: geometric from the model as it is to `target`, the last one exact.

    Args:
        model: As the stage before left it.
        target: Of the last stage.
        stage: Counted from 0. stages: How many there are.
    """
    left, shape = stages - stage, shape_of(model.config)
    if left == 1:
        return target

    def between(now: int, then: int | None, step: int, least: int) -> int | None:
        if then is None:
            return None
        return max(least, round(now * (then / now) ** (1 / left) / step) * step)

    return Target(
        expert_width=between(shape.expert_width, target.expert_width, ALIGNMENT, ALIGNMENT),
        num_experts=between(shape.num_experts, target.num_experts, 1, shape.top_k),
        kv_groups=between(shape.kv_groups, target.kv_groups, 1, 1),
    )


def _count(model: PreTrainedModel) -> tuple[int, int]:
    """`(total, active)` parameters, of sparse parts what is not zero."""
    weights = [weight for weight in factored_weights(model).values() if isinstance(weight, FactoredWeight)]
    if not weights:
        return count_parameters(model)
    zero = sum(int((~(weight.sparse != 0).any(-1)).sum()) * weight.sparse.shape[-1] for weight in weights)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for _, module, _ in moe_layers(model) for parameter in module.parameters())
    return total - zero, active_of(total - zero, total - experts, model.config)
