"""The picture of a comparison: every method's loss right after the cut and after recovery, with intervals over seeds."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from pydantic import computed_field

from slimmoe_hf.compare_results import Comparison
from slimmoe_hf.plots.models import Data, Picture
from slimmoe_hf.plots.style import BLUE, INK, PAPER, RULE, SMALL, SOFT, VERMILLION, Sheet, wrapped

_ROW, _NAMES, _GAP, _ENDS = 0.24, 2.35, 0.3, 7.8  # inches
_FAR = 2.5  # our choice


class Place(Data):
    """One method: loss right after the cut and after recovery, each a mean and half the width of its interval."""

    method: str
    shape: str
    before: tuple[float, float | None]
    after: tuple[float, float | None]


class ComparedTable(Data):
    """Methods at one budget. equal: `total` or `active`. words: What is equal, and how much."""

    equal: str
    words: str
    places: list[Place]


class Compared(Picture):
    """Methods at equal size.

    Attributes:
        model: What was made smaller. data, tokens: What losses are measured on. original: Loss of the model itself.
        seeds: How many. recovery_tokens: That every method trained on.
        tables: In the grid's order.
    """

    name = "comparison"

    model: str
    data: str
    tokens: int
    original: float
    seeds: int
    recovery_tokens: int
    tables: list[ComparedTable]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        first = self.tables[0]
        best = min(first.places, key=lambda place: place.after[0])
        lowest = f"\u201c{best.method}\u201d: {_said(best.after)} nats per token"
        return f"At equal {first.equal} parameters the lowest loss after recovery is that of {lowest}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        tables = []
        for table in self.tables:
            ordered = sorted(table.places, key=lambda place: place.after[0])
            tables.append(f"{table.words}: " + ", ".join(f"{p.method} {_said(p.after)}" for p in ordered))
        return (
            f"Dots with 95% confidence intervals over {self.seeds} seeds, a row a method: test loss of {self.model} right "
            f"after it was made smaller and after recovery, from lowest to highest after recovery. {'; '.join(tables)}."
        )


def _said(value: tuple[float, float | None]) -> str:
    mean, half = value
    return f"{mean:.3f}" if half is None else f"{mean:.3f} \u00b1 {half:.3f}"


def picture_of(found: Comparison) -> Compared:
    """The picture of a comparison's results."""
    tables = []
    for table in found.tables:
        places = [
            Place(
                method=row.method, shape=row.shape, before=(row.before.mean, row.before.half_width),
                after=(row.after.mean, row.after.half_width),
            )
            for row in table.rows
        ]  # fmt: skip
        tables.append(ComparedTable(equal=table.equal, words=table.title.partition(" (")[0], places=places))
    return Compared(
        model=found.model, data=found.data, tokens=found.test_tokens, original=found.loss, seeds=len(found.seeds),
        recovery_tokens=found.recovery_tokens, tables=tables,
    )  # fmt: skip


def draw_comparison(picture: Compared) -> Sheet:
    """A block a table, a row a method: on the left right after the cut, on the right after recovery, each to its scale."""
    source = (
        f"{picture.model}, {picture.data} test text, {picture.tokens:,} tokens; {picture.recovery_tokens:,} tokens of recovery "
        f"each; dots are means over {picture.seeds} seeds, bars 95% confidence intervals (Student's t); "
        f"dotted: the original model, {picture.original:.3f}; an arrow: beyond the axis"
    )
    heights = [_ROW * len(table.places) + 0.85 for table in picture.tables]
    sheet = Sheet(sum(heights) + 0.1, picture.title, source)
    width, top = (_ENDS - _NAMES - _GAP) / 2, 0.0
    limits = [_limits(picture, name) for name in ("before", "after")]
    for table, height in zip(picture.tables, heights, strict=True):
        sheet.text(0.16, top, wrapped(table.words)[0], weight="bold")
        panels = [
            sheet.axes(_NAMES + number * (width + _GAP), top + 0.27, width, _ROW * len(table.places))
            for number in range(2)
        ]
        for axes, name, limit in zip(panels, ("before", "after"), limits, strict=True):
            axes.set_xlim(*limit)
            _draw_panel(axes, table, name, picture.original)
        panels[0].set_yticks(range(len(table.places)), [place.method for place in table.places])
        panels[1].set_yticks(range(len(table.places)), [])
        if table is picture.tables[-1]:
            panels[0].set_xlabel("right after the cut, nats per token")
            panels[1].set_xlabel("after recovery, nats per token")
        top += height
    return sheet


def _limits(picture: Compared, name: str) -> tuple[float, float]:
    """Of all tables, with room for the numbers; what is `_FAR` times as far off as the median is left out."""
    values = [getattr(place, name) for table in picture.tables for place in table.places]
    low = min(picture.original, *(mean - (half or 0) for mean, half in values))
    far = low + _FAR * (statistics.median(mean for mean, _ in values) - low)
    high = max(mean + (half or 0) for mean, half in values if mean <= far)
    room = max(high - low, 1e-3)
    return low - 0.06 * room, high + 0.3 * room


def _draw_panel(axes: Axes, table: ComparedTable, name: str, original: float) -> None:
    color, face = (VERMILLION, PAPER) if name == "before" else (BLUE, BLUE)
    axes.axvline(original, color=INK, linewidth=1, linestyle=":")
    _, high = axes.get_xlim()
    for row, place in enumerate(table.places):
        mean, half = place.before if name == "before" else place.after
        how: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL, "color": SOFT}
        if mean > high:
            axes.annotate(f"{mean:.3f} \u2192", (high, row), (-4, 0), ha="right", **how)
            continue
        axes.errorbar(
            mean, row, xerr=half, color=color, marker="o", markersize=6, markerfacecolor=face, markeredgewidth=1.5,
            linewidth=1.6, capsize=3, zorder=3,
        )  # fmt: skip
        axes.annotate(f"{mean:.3f}", (mean + (half or 0), row), (7, 0), **how)
    axes.set_ylim(len(table.places) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4))
