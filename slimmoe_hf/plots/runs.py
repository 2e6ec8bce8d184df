"""A finished run's folder, read: its report, its plans, and what its trainers logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from slimmoe_hf.factorization import StableRankChange
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.report import ModelReport, Report
from slimmoe_hf.rundir import RECIPE, REPORT, STEPS


class Entry(BaseModel):
    """What pictures need of one entry of a trainer's log history."""

    step: int
    loss: float | None = None
    kl: float | None = None
    ce: float | None = None
    eval_kl: float | None = None
    eval_ce: float | None = None
    router_load: list[list[float]] | None = None


class _Step(BaseModel):
    result: dict[str, Any]


class _Steps(BaseModel):
    inputs: dict[str, str]
    steps: dict[str, _Step]


@dataclass(frozen=True)
class Run:
    """A finished run's folder, read.

    Attributes:
        path: The folder. name: What it is called in pictures.
        report: Its `report.json`. inputs: Hashes of what it read.
        plans: One a stage. histories: Likewise, what the trainer logged.
    """

    path: Path
    name: str
    report: Report
    inputs: dict[str, str]
    plans: list[CompressionPlan]
    histories: list[list[Entry]]

    @property
    def before_training(self) -> list[ModelReport]:
        """Every stage's slimmed model."""
        return [model for model in self.report.models if model.step == "slimmed"]

    @property
    def after_training(self) -> list[ModelReport]:
        """Every stage's distilled model."""
        return [model for model in self.report.models if model.step == "distilled"]


def read_run(path: Path, name: str | None = None) -> Run:
    """Read a finished run.

    Args:
        path: The output folder of `slimmoe run`.
        name: What to call it; the folder's name by default.

    Raises:
        ValueError: It is no run's folder, not finished, or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder. Give the output folder of a finished `slimmoe run`.")
    missing = [file for file in (RECIPE, STEPS) if not (path / file).is_file()]
    if missing:
        raise ValueError(f"{path}: not a run of slimmoe (no {missing[0]}). Give the output folder of `slimmoe run`.")
    if not (path / REPORT).is_file():
        raise ValueError(f"{path}: this run is not finished (no {REPORT}). Give `slimmoe run` its recipe again first.")
    report = Report.load(path / REPORT)
    try:
        steps = _Steps.model_validate_json((path / STEPS).read_bytes())
        stages = range(1, max(model.stage for model in report.models) + 1)
        results = [steps.steps[f"stage-{stage}/distil"].result["history"] for stage in stages]
        histories = [TypeAdapter(list[Entry]).validate_python(result) for result in results]
    except (ValidationError, KeyError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error.errors()[0]["msg"]
        raise ValueError(
            f"{path / STEPS}: damaged, or of another version ({what}). Run the recipe again with --overwrite."
        ) from None
    plans = [CompressionPlan.load(path / f"stage-{stage}" / "plan") for stage in stages]
    return Run(path, name or path.resolve().name, report, steps.inputs, plans, histories)


def ranks_of_merging(path: Path) -> list[StableRankChange]:
    """Stable ranks of the layers whose experts a run merged, as its report has them; none of any other folder."""
    if not (path / REPORT).is_file():
        return []
    return [row for row in Report.load(path / REPORT).stable_ranks if row.experts_after < row.experts_before]


def run_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as much of what is above them as tells them apart.

    Raises:
        ValueError: No runs, or one given twice.
    """
    if not paths:
        raise ValueError("no run given. Give the output folder of a finished `slimmoe run`.")
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise ValueError(f"{path}: given twice. Give each run once.")
    for length in range(1, max(len(path.parts) for path in whole)):
        names = ["-".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(number) for number in range(1, len(whole) + 1)]


def length(history: list[Entry]) -> int:
    """Optimizer steps of a stage."""
    return max((entry.step for entry in history), default=0)
