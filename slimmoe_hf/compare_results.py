"""What a comparison found: means with confidence intervals over seeds, as JSON, as a table in Markdown, and on a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from scipy.special import stdtrit

from slimmoe_hf.grid_sizes import TOLERANCE
from slimmoe_hf.report import aligned, markdown

CONFIDENCE = 0.95


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Mean(_Data):
    """Of one number over seeds.

    Attributes:
        values: One a seed. mean: Theirs.
        half_width: Of the 95% confidence interval of the mean, by Student's t; None of a single value.
    """

    values: list[float]
    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean and interval: `t(.975, n - 1) * s / sqrt(n)` to both sides, s the standard deviation over the n seeds."""
        number, half = len(values), None
        if number > 1:
            t = float(stdtrit(number - 1, (1 + CONFIDENCE) / 2))
            half = t * statistics.stdev(values) / math.sqrt(number)
        return cls(values=list(values), mean=statistics.fmean(values), half_width=half)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half_width is None else f"{self.mean:.3f} \u00b1 {self.half_width:.3f}"


class Row(_Data):
    """A method in a table.

    Attributes:
        method: Its name. settings: What was done, as in the grid.
        shape: Experts x their width; of factored ones rank and density too.
        total_parameters, active_parameters: Of the recovered models; of sparse parts what is not zero. The first seed's.
        before: Test loss right after the (last) cut. after: After recovery. Nats per predicted token.
        seconds: A point took, on average, without shared scores.
        points: Names of the points' folders, one a seed.
    """

    method: str
    settings: dict[str, Any]
    shape: str
    total_parameters: int
    active_parameters: int
    before: Mean
    after: Mean
    seconds: float
    points: list[str]


class Table(_Data):
    """Methods at one budget. equal, expert_share: As in the grid. parameters: The budget."""

    equal: str
    expert_share: float
    parameters: int
    rows: list[Row]

    @property
    def title(self) -> str:
        """Of the table."""
        return f"Equal {self.equal} parameters: {self.parameters:,} ({100 * self.expert_share:.3g}% of the experts')"


class Comparison(_Data):
    """Everything in `results.json`.

    Attributes:
        model: What was made smaller. data: The text's name. model_sha256, test_sha256: Hashes of weights and test rows.
        total_parameters, active_parameters, loss: Of the original model; its test loss.
        test_tokens: Predicted ones. calibration_tokens, recovery_tokens: That every method was given.
        learning_rates: Candidates -> validation loss after recovery, where there were several. tuned_on: With which method.
        learning_rate: The one taken.
        seeds: Of the points. grid: What was asked for. command: With which it was. machine: Where it ran.
        version: Of slimmoe_hf.
        tables: What was found.
    """

    model: str
    data: str
    model_sha256: str
    test_sha256: str
    total_parameters: int
    active_parameters: int
    loss: float
    test_tokens: int
    calibration_tokens: int
    recovery_tokens: int
    learning_rates: dict[str, float]
    tuned_on: str
    learning_rate: float
    seeds: list[int]
    grid: dict[str, Any]
    command: str
    machine: str
    version: str
    tables: list[Table]

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Read a `results.json`."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def rows_of(table: Table) -> list[tuple[str, ...]]:
    """A table's cells, the headings first."""
    headings = ("method", "left", "parameters", "active", "after the cut", "after recovery")
    return [
        headings,
        *(
            (row.method, row.shape, f"{row.total_parameters:,}", f"{row.active_parameters:,}", str(row.before),
             str(row.after))
            for row in table.rows
        ),
    ]  # fmt: skip


def notes(found: Comparison) -> list[str]:
    """What the tables are to be read with."""
    many = len(found.seeds) > 1
    spread = f"mean and {CONFIDENCE:.0%} confidence interval (Student's t) over" if many else "of"
    seeds = f"{len(found.seeds)} seeds" if many else "one seed"
    lines = [
        f"Test loss in nats per predicted token ({found.data}, {found.test_tokens:,} tokens), {spread} {seeds}; a seed is "
        "another calibration sample, another order of the recovery text and other random choices. "
        f"The original model: {found.total_parameters:,} parameters, {found.active_parameters:,} active, {found.loss:.3f}.",
        "`left` is experts per layer x their width; of factored ones the rank r and the share of S that remains.",
        f"Every method was given {found.calibration_tokens:,} tokens of calibration text, if it scores at all, and "
        f"{found.recovery_tokens:,} tokens of recovery, of the same text and the same answers of the original model; which "
        f"of its rows are left over depends on seed and stages. Sizes are within {TOLERANCE:.0%} of the budget.",
    ]
    if found.learning_rates:
        tried = ", ".join(f"{float(rate):g}: {loss:.3f}" for rate, loss in found.learning_rates.items())
        lines.append(
            f"The learning rate, {found.learning_rate:g} for all, was chosen once, on the validation split, with "
            f"`{found.tuned_on}` and the first seed (validation loss {tried})."
        )
    methods = [method for table in found.grid["tables"] for method in table["methods"]]
    if any(method["stages"] > 1 for method in methods):
        lines.append(
            "Where a cut is made in stages, `after the cut` is after the last one, part of the recovery behind it; every stage "
            "has a new optimizer, and the whole warm-up and schedule in its share of the steps."
        )
    if any(method["factor"] for method in methods):
        lines.append(
            "Factored experts are trained from all of S down to the share that is kept; `after the cut` cuts it at once, by "
            "the size of its rows."
        )
    if any(method["merge"] for method in methods):
        lines.append(
            "Merging is in the `uniform` form, which stock classes load: routers keep the rows of the dominant experts only, and "
            "train. M-SMoE's own form keeps all rows, another function; it was not compared."
        )
    return lines


def as_markdown(found: Comparison) -> str:
    """`table.md`."""
    parts = [f"# {found.model}: ways to make it smaller"]
    parts += [f"**{table.title}**\n\n{markdown(rows_of(table), left=2)}" for table in found.tables]
    parts += [*notes(found), f"`{found.command}`, slimmoe_hf {found.version}, on {found.machine}."]
    return "\n\n".join(parts) + "\n"


def shown(found: Comparison) -> Group:
    """The tables for a terminal."""
    return Group(*(aligned(rows_of(table), table.title, left=2) for table in found.tables))
