"""Stable rank of the experts before and after merging, layer by layer: M-SMoE's reason why merging makes low rank work."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import computed_field

from slimmoe_hf.factorization import StableRankChange
from slimmoe_hf.plots.models import Data, Picture
from slimmoe_hf.plots.style import BLUE, LEFT, PAPER, RIGHT, RULE, SMALL, SOFT, VERMILLION, Sheet

_ROW = 0.22
_NAMES = 1.5
_MANY = 0.005  # a change of less than half a percent is none


class RankChange(Data):
    """Mean stable rank of the experts of one layer, before and after.

    Attributes:
        layer: As it is called in the model, without what all layers share.
        experts_before, experts_after: How many there were.
        before, after: The means. change: `(after - before) / before`.
    """

    layer: str
    experts_before: int
    experts_after: int
    before: float
    after: float
    change: float


class StableRanks(Picture):
    """Of every layer that was merged.

    Attributes:
        model: What was merged. matrices: Matrix of the experts -> its layers, in order.
    """

    name = "stable_rank"

    model: str
    matrices: dict[str, list[RankChange]]

    @property
    def _found(self) -> str:
        changes = [row.change for rows in self.matrices.values() for row in rows]
        fell, rose = sum(change < -_MANY for change in changes), sum(change > _MANY for change in changes)
        mean = sum(changes) / len(changes)
        return f"it fell in {fell} and rose in {rose} of {len(changes)} places, {mean:+.1%} on average"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        return f"Stable rank of the experts by merging: {self._found}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        return (
            f"Mean stable rank of the experts of {self.model}, layer by layer and matrix by matrix, before merging (open) and "
            f"after (filled): {self._found}."
        )


def stable_rank_picture(model: str, rows: Sequence[StableRankChange]) -> StableRanks:
    """What there is to see of `compare_stable_ranks`.

    Args:
        model: What to call it.
        rows: Of the layers that were merged; those where no expert went show nothing and may be left out.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("there are no stable ranks to draw: no layer has experts.")
    matrices: dict[str, list[RankChange]] = {}
    for row in rows:
        layer, _, matrix = row.name.rpartition(".")
        values = row.model_dump(exclude={"name"})
        matrices.setdefault(matrix, []).append(RankChange(layer=_short(layer), **values))
    return StableRanks(model=model, matrices=matrices)


def _short(path: str) -> str:
    """`encoder 3` of `encoder.block.3.layer.1.mlp.experts`, `layer 3` of `model.layers.3.mlp.experts`."""
    parts = path.split(".")
    number = next(part for part in parts if part.isdigit())
    return f"{parts[0] if parts[0] in ('encoder', 'decoder') else 'layer'} {number}"


def draw_stable_ranks(picture: StableRanks) -> Sheet:
    """A panel a matrix, a line a layer: from the open mark (before) to the filled one (after)."""
    most = max(len(rows) for rows in picture.matrices.values())
    width = (RIGHT - _NAMES - 0.35 * (len(picture.matrices) - 1)) / len(picture.matrices)
    sheet = Sheet(
        _ROW * most + 1.15, picture.title, f"{picture.model}: means over a layer's experts; open before, filled after"
    )
    for number, (matrix, rows) in enumerate(picture.matrices.items()):
        left = _NAMES + number * (width + 0.35)
        sheet.text(left, 0.02, matrix, SMALL, color=SOFT)
        axes = sheet.axes(left, 0.25, width, _ROW * most)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        for place, row in enumerate(rows):
            color, marker = (BLUE, "o") if row.change <= 0 else (VERMILLION, "s")
            axes.plot((row.before, row.after), (place, place), color=color, linewidth=1.6)
            axes.plot(row.before, place, marker, color=color, markerfacecolor=PAPER, markersize=6, markeredgewidth=1.4)
            axes.plot(row.after, place, marker, color=color, markersize=6)
        axes.set_ylim(most - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows] if number == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("mean stable rank")
    sheet.text(
        LEFT, 0.25 + _ROW * most + 0.62, "circles, blue: it fell or stayed; squares, red: it rose", SMALL, color=SOFT
    )
    return sheet


def _label(row: RankChange) -> str:
    return f"{row.layer}, {row.experts_before}\u2192{row.experts_after}"
