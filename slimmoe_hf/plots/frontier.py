"""The picture of a search: size against loss, what was predicted as a line, what was measured as dots."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pydantic import computed_field

from slimmoe_hf.plots.models import Data, Picture, amount
from slimmoe_hf.plots.style import BLUE, INK, PAPER, RULE, SMALL, SOFT, VERMILLION, Sheet
from slimmoe_hf.search import Search

_ROW = 0.26  # inches
_NAMES, _GAP, _ENDS = 1.55, 0.3, 7.8
_MOST = 16  # rows
_FAR = 4  # what is predicted to grow by so many times the budget's is left out (our choice)


class ShapePlace(Data):
    """One measured shape: parameters, and growth of the loss as predicted, with slices, and reconstructed."""

    name: str
    total: int
    active: int
    predicted: float
    plain: float
    reconstructed: float | None


class SizePlace(Data):
    """The shape that is predicted best of a size."""

    name: str
    total: int
    active: int
    predicted: float


class Frontier(Picture):
    """A search of shapes within a budget.

    Attributes:
        family: The model type. total, active: Its parameters. original: Its validation loss.
        budget, active_budget: Most parameters; None where nothing was asked.
        places: What was measured, best first. frontier: From the smallest size to the budget.
    """

    name = "frontier"

    family: str
    total: int
    active: int
    original: float | None
    budget: int | None
    active_budget: int | None
    places: list[ShapePlace]
    frontier: list[SizePlace]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        if not self.places:
            return f"{self.frontier[-1].name} is predicted to lose least of {self._budget}"
        best = self.places[0]
        return f"Of {self._budget} {best.name} loses least: {_nats(best)} nats per token over the uncut model"

    @property
    def _budget(self) -> str:
        parts = [("parameters", self.budget), ("active parameters", self.active_budget)]
        return " and ".join(f"{amount(limit)} {words}" for words, limit in parts if limit is not None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        found = "; ".join(f"{place.name} {_nats(place)}" for place in self.places)
        line = ", ".join(f"{place.name} at {amount(place.total)}" for place in self.frontier)
        return (
            "Dots, a row a shape (experts x width): growth of the validation loss with slices and reconstructed, and what "
            f"was predicted: {found or 'nothing was measured'}. Below, against size, the shapes that are predicted best: {line}."
        )


def _nats(place: ShapePlace) -> str:
    return f"{place.plain if place.reconstructed is None else place.reconstructed:.3f}"


def _both(place: ShapePlace) -> str:
    return _nats(place) if place.reconstructed is None else f"{place.reconstructed:.3f} (slices {place.plain:.3f})"


def picture_of(found: Search) -> Frontier:
    """The picture of a search."""
    places = [
        ShapePlace(
            name=found.name(each), total=each.total, active=each.active, predicted=each.predicted, plain=each.plain or 0.0,
            reconstructed=each.reconstructed,
        )
        for each in found.measured
    ]  # fmt: skip
    frontier = [
        SizePlace(name=found.name(each), total=each.total, active=each.active, predicted=each.predicted)
        for each in found.frontier
    ]
    return Frontier(
        family=found.family, total=found.total, active=found.active, original=found.original, budget=found.limits.total,
        active_budget=found.limits.active, places=places, frontier=frontier,
    )  # fmt: skip


def draw_frontier(picture: Frontier) -> Sheet:
    """Above a row a measured shape, with what was measured in numbers; below size against predicted loss."""
    shown = picture.places[:_MOST]
    left_out = f"; {len(picture.places) - len(shown)} more in the JSON" if len(picture.places) > len(shown) else ""
    uncut = "not measured" if picture.original is None else f"{picture.original:.3f}"
    source = (
        f"{picture.family}, validation text, growth of the loss over the uncut model ({uncut} nats per token); experts x width; "
        f"open dots: plain slices, filled: reconstructed, bars: predicted, fitted to what was measured{left_out}"
    )
    rows = _ROW * len(shown)
    sheet = Sheet((rows + 0.85 if shown else 0) + 2.55, picture.title, source)
    if shown:
        _draw_places(sheet.axes(_NAMES, 0.05, _ENDS - _NAMES - 0.1, rows), shown)
    _draw_sizes(sheet.axes(0.85, (rows + 0.85 if shown else 0) + 0.05, _ENDS - 0.95, 1.9), picture)
    return sheet


def _draw_places(axes: Axes, places: list[ShapePlace]) -> None:
    values = [
        value for place in places for value in (place.plain, place.reconstructed, place.predicted) if value is not None
    ]
    high = max(values)
    for row, place in enumerate(places):
        axes.plot(
            place.plain, row, color=VERMILLION, marker="o", markersize=7, markerfacecolor=PAPER, markeredgewidth=1.5
        )
        if place.reconstructed is not None:
            axes.plot(place.reconstructed, row, color=BLUE, marker="o", markersize=7, markeredgewidth=1.5)
        axes.plot(place.predicted, row, color=INK, marker="|", markersize=13, markeredgewidth=1.5)
        last = max(value for value in (place.plain, place.reconstructed, place.predicted) if value is not None)
        axes.annotate(
            _both(place), (last, row), (9, 0), textcoords="offset points", va="center", fontsize=SMALL, color=SOFT
        )  # fmt: skip
    axes.set_yticks(range(len(places)), [place.name for place in places])
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlim(min(0.0, *values), high * 1.32)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("growth of the loss right after the cut, nats per token")


def _draw_sizes(axes: Axes, picture: Frontier) -> None:
    key = "total" if picture.budget is not None else "active"
    sizes = [vars(place)[key] for place in picture.frontier]
    axes.plot(
        sizes, [place.predicted for place in picture.frontier], color=INK, linewidth=1.6, marker="|", markersize=8
    )
    for place in picture.places:
        growth = place.plain if place.reconstructed is None else place.reconstructed
        color, face = (VERMILLION, PAPER) if place.reconstructed is None else (BLUE, BLUE)
        axes.plot(vars(place)[key], growth, color=color, marker="o", markerfacecolor=face, markersize=6, zorder=3)
    found = [place.plain for place in picture.places]
    axes.set_ylim(0, max([_FAR * picture.frontier[-1].predicted, *(1.15 * growth for growth in found)]))
    axes.margins(x=0.06)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.set_xlabel(f"{key} parameters")
    axes.set_ylabel("predicted growth" + (", nats" if picture.places else ", no unit"))
