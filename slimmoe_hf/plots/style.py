"""How our pictures look: one sheet of paper with its own background, so that it reads on light and dark pages alike.

Lines are the colours of Okabe and Ito (2008) that have a contrast of 3 or more on white, each with a dash and a marker of
its own; maps are cividis, and for multiples of an even share a diverging one whose middle is 1. All of it is fixed here,
whatever the user's matplotlibrc says, and files carry no date: the same data gives the same bytes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

WIDTH, DPI = 8.0, 150  # inches; a model card's column is about so wide
PAPER, INK, SOFT, RULE, NOTHING = "#ffffff", "#1b1b1b", "#595959", "#d0d0d0", "#e8e8e8"
ALARM, ALARM_PAPER = "#8f3300", "#fdeadb"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
LINES = (BLUE, VERMILLION, GREEN, PURPLE, "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
SMALL, NORMAL, HEADING = 9.0, 9.5, 12.0  # points
LEFT, RIGHT = 0.62, 7.75
MOST_CROSSES = 24
_LEVELS = 31  # colours of a heat map: odd, so that one is the middle
_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": NORMAL, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT,
    "axes.labelsize": NORMAL, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "axes.grid": False, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "xtick.major.size": 3, "ytick.major.size": 3, "legend.fontsize": SMALL, "legend.frameon": False,
    "hatch.linewidth": 0.6, "hatch.color": SOFT,
}  # fmt: skip


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw within this block, and the user's own settings neither show nor change."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


class Sheet:
    """A figure that is laid out in inches from its top left corner.

    Args:
        height: Of everything below the heading.
        title: Its finding. It is wrapped.
        source: What was drawn, below the title.
        alarm: Whether the title is a warning.
    """

    def __init__(self, height: float, title: str, source: str, alarm: bool = False) -> None:
        lines = _balanced(f"\u26a0 {title}" if alarm else title, 78)
        notes = textwrap.wrap(source, 112, break_on_hyphens=False)
        self.top = 0.22 + 0.22 * len(lines) + 0.16 * len(notes) + 0.18
        self.height = self.top + height
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, facecolor=PAPER)
        if alarm:
            band = self.figure.add_axes((0, 1 - (self.top - 0.08) / self.height, 1, (self.top - 0.08) / self.height))
            band.set_facecolor(ALARM_PAPER)
            band.set(xticks=[], yticks=[])
            band.spines[:].set_visible(False)
        for number, line in enumerate(lines):
            self._text(0.16, 0.17 + 0.22 * number, line, HEADING, weight="bold", color=ALARM if alarm else INK)
        for number, line in enumerate(notes):
            self._text(0.16, 0.21 + 0.22 * len(lines) + 0.16 * number, line, SMALL, color=SOFT)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """A panel, its place in inches below the heading."""
        bottom = self.height - self.top - top - height
        return self.figure.add_axes(
            (left / WIDTH, bottom / self.height, width / WIDTH, height / self.height), facecolor=PAPER
        )

    def text(self, left: float, top: float, text: str, size: float = NORMAL, **how: Any) -> None:
        """One line, its upper left corner in inches below the heading."""
        self._text(left, self.top + top, text, size, **how)

    def _text(self, left: float, top: float, text: str, size: float, **how: Any) -> None:
        self.figure.text(left / WIDTH, 1 - top / self.height, text, fontsize=size, va="top", **how)

    def color_bar(
        self, left: float, top: float, width: float, colors: Colormap, norm: Normalize, label: str, show: Callable[[float], str],
        ticks: Sequence[float],
    ) -> None:  # fmt: skip
        """The key of a heat map: a horizontal bar with its ticks and label below."""
        axes = self.axes(left + 0.15, top, width - 0.3, 0.11)  # the numbers at its ends need room
        bar = self.figure.colorbar(matplotlib.cm.ScalarMappable(norm, colors), cax=axes, orientation="horizontal")
        bar.set_ticks(list(ticks), labels=[show(tick) for tick in ticks])
        bar.ax.xaxis.set_minor_locator(NullLocator())
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(label)

    def png(self) -> bytes:
        """The picture as a file."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        stream = io.BytesIO()
        _with_palette(np.asarray(canvas.buffer_rgba())[..., :3]).save(stream, "PNG", optimize=True, dpi=(DPI, DPI))
        return stream.getvalue()


def _with_palette(pixels: NDArray[np.uint8]) -> Image.Image:
    """A third of the bytes: the 256 commonest colours as they are, shades at the edges of letters as the nearest of them."""
    packed = pixels.astype(np.int64) @ (1 << 16, 1 << 8, 1)  # one number a colour: far faster to tell apart
    values, where, counts = np.unique(packed.ravel(), return_inverse=True, return_counts=True)
    found = (values[:, None] >> (16, 8, 0) & 255).astype(np.uint8)
    palette = found[np.argsort(-counts, kind="stable")[:256]]
    distances = [np.square(found - color.astype(int)).sum(-1) for color in palette]
    picture = Image.fromarray(np.argmin(distances, axis=0).astype(np.uint8)[where].reshape(pixels.shape[:2]), "P")
    picture.putpalette(palette.ravel().tolist())
    return picture


def _balanced(text: str, width: int) -> list[str]:
    """As few lines as `width` allows, and those about equally long."""
    fewest = len(textwrap.wrap(text, width, break_on_hyphens=False))
    narrow = next(n for n in range(20, width + 1) if len(textwrap.wrap(text, n, break_on_hyphens=False)) <= fewest)
    return textwrap.wrap(text, narrow, break_on_hyphens=False)


def wrapped(text: str, width: int = 106) -> list[str]:
    """Lines of normal text that fit on a sheet."""
    return textwrap.wrap(text, width, break_on_hyphens=False)


def heat_map(
    axes: Axes,
    values: NDArray[np.float64],
    norm: Normalize,
    colors: Colormap,
    show: Callable[[float], str] | None,
    rows: bool,
) -> None:
    """Layers down, experts across; numbers in the cells where there is room for them.

    Args:
        axes: The panel.
        values: `[layers, experts]`, NaN where a layer has no experts.
        norm, colors: From value to colour.
        show: How a cell's number is written; None writes none.
        rows: Whether layers are named here.
    """
    axes.imshow(values, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(RULE)
    for axis, count in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
        axis.set_major_locator(FixedLocator(_every(count)))
    axes.set_xlabel("expert", labelpad=2)
    axes.set_ylabel("layer" if rows else "", labelpad=2)
    if not rows:
        axes.tick_params(axis="y", left=False, labelleft=False)
    box = axes.get_window_extent()
    cell = box.width / DPI / values.shape[1], box.height / DPI / values.shape[0]
    if show is None or cell[0] < 0.34 or cell[1] < 0.2:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = ink_on(to_rgb(colors(norm(value))))
            axes.text(column, row, show(value), ha="center", va="center", fontsize=SMALL, color=color)


def mark_cells(axes: Axes, cells: Sequence[tuple[int, int]]) -> None:
    """A cross in every `(layer, expert)`, unless they are so many that they would hide the map."""
    if 0 < len(cells) <= MOST_CROSSES:
        rows, columns = zip(*cells, strict=True)
        for color, width in ((PAPER, 3.4), (INK, 1.4)):  # to be seen on any colour
            axes.scatter(columns, rows, marker="x", s=26, color=color, linewidths=width, zorder=3)


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return "#000000" if contrast(color, (0, 0, 0)) >= contrast(color, (1, 1, 1)) else "#ffffff"


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """Contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2)."""
    lights = []
    for color in (first, second):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def share_scale(values: NDArray[np.float64]) -> tuple[Normalize, Colormap]:
    """Shares between the round numbers around all of them, a fifth apart or more."""
    colors = matplotlib.colormaps["cividis"].resampled(_LEVELS).with_extremes(bad=NOTHING)
    finite = values[np.isfinite(values)]
    low, high = np.floor(finite.min() * 10) / 10, np.ceil(finite.max() * 10) / 10
    return Normalize(min(low, 0.8), min(1.0, max(high, low + 0.2))), colors


def even_scale(values: NDArray[np.float64]) -> tuple[LogNorm, Colormap]:
    """Multiples of an even share on a logarithmic scale around 1; it spans a factor of 2, 4 or 10 either way."""
    finite = values[np.isfinite(values)]
    farthest = float(np.exp(np.abs(np.log(np.clip(finite, 1e-9, None))).max(initial=0.0)))
    limit = next((limit for limit in (2.0, 4.0) if farthest <= limit), 10.0)
    colors = matplotlib.colormaps["PuOr"].resampled(_LEVELS).with_extremes(bad=NOTHING)
    return LogNorm(1 / limit, limit, clip=True), colors


def even_ticks(norm: Normalize) -> list[float]:
    """Round multiples between the ends of an `even_scale`."""
    assert norm.vmax is not None
    return {2.0: [0.5, 0.7, 1, 1.4, 2], 4.0: [0.25, 0.5, 1, 2, 4], 10.0: [0.1, 0.3, 1, 3, 10]}[float(norm.vmax)]


def times(value: float) -> str:
    """A multiple, as in `0.5x`."""
    return f"{value:g}\u00d7"


def log_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers; at the first tick stands all that is below it, too."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{'' if value > ticks[0] else '≤'}{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def ruled(axes: Axes) -> None:
    """Thin horizontal rules to read heights by."""
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def name_stage(axes: Axes, number: int, start: float, part: float) -> None:
    """A stage's number at its beginning, low in the panel, where curves that fall leave room.

    Args:
        axes: The panel.
        number: The stage's.
        start: Where it begins.
        part: Its part of the whole axis: a narrow one has no room for the word.
    """
    name = f"stage {number}" if part > 0.1 else str(number)
    axes.annotate(
        name, (start, 0), (4, 3), xycoords=("data", "axes fraction"), textcoords="offset points", va="bottom",
        fontsize=SMALL, color=SOFT,
    )  # fmt: skip


def _every(count: int) -> list[int]:
    """Positions of at most ten labels, at a round distance."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if count / step <= 10)
    return list(range(0, count, step))
