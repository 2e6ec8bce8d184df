"""Heat maps, layer by expert: what was kept, and where the tokens go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch
from numpy.typing import NDArray

from slimmoe_hf.plots.models import Kept, KeptStage
from slimmoe_hf.plots.recovery import LoadMap, RouterLoads
from slimmoe_hf.plots.style import (
    ALARM,
    BLUE,
    INK,
    LEFT,
    MOST_CROSSES,
    NOTHING,
    PAPER,
    RIGHT,
    RULE,
    SMALL,
    SOFT,
    VERMILLION,
    Sheet,
    even_scale,
    even_ticks,
    heat_map,
    log_ticks,
    mark_cells,
    name_stage,
    ruled,
    share_scale,
    times,
    wrapped,
)

_GAP = 0.22
_GROUPS = ListedColormap([NOTHING, BLUE])


def draw_kept(picture: Kept) -> Sheet:
    """Per stage: kept share, score share and, where any stage cuts them, key/value groups."""
    stages, groups = picture.stages, any(stage.groups_kept for stage in picture.stages)
    panel, words = _panel_height(picture.num_layers, len(stages)), [wrapped(stage.words + ".") for stage in stages]
    row_heights = [0.2 * len(lines) + 0.34 + panel + 0.5 for lines in words]
    grey = ["dense layer"] * (len(stages[0].layers) < picture.num_layers)
    grey += ["dropped expert"] * any(stage.dropped for stage in stages)
    dense = f"; grey: {' or '.join(grey)}" if grey else ""
    crosses = "; \u00d7: no calibration token reached it" if any(stage.unreached for stage in stages) else ""
    source = (
        f"{picture.run}: {picture.family}, {picture.num_layers} layers, {len(stages[0].kept_share[0])} experts each; "
        f"a score says how much a neuron or an expert matters ({_criteria(stages)}){dense}{crosses}"
    )
    sheet = Sheet(sum(row_heights) + 0.62, picture.title, source)
    group_width = 1.0 if groups else 0.0
    width = (RIGHT - LEFT - _GAP - (group_width + _GAP if groups else 0)) / 2
    shares = [_whole(stage.known_shares, stage.layers, picture.num_layers) for stage in stages]
    masses = [_whole(stage.score_share, stage.layers, picture.num_layers) for stage in stages]
    share_norm, share_colors = share_scale(np.concatenate([share.ravel() for share in shares]))
    mass_norm, mass_colors = even_scale(np.concatenate([mass.ravel() for mass in masses]))
    lefts = (LEFT, LEFT + width + _GAP, LEFT + 2 * (width + _GAP))
    top = 0.0
    for stage, lines, share, mass, height in zip(stages, words, shares, masses, row_heights, strict=True):
        for number, line in enumerate(lines):
            sheet.text(0.16, top + 0.2 * number, line, 10)
        below = top + 0.2 * len(lines)
        for left, heading in zip(
            lefts, ("part of the expert's score that stays", "expert's part of its layer's score"), strict=False
        ):
            sheet.text(left, below + 0.1, heading, SMALL, color=SOFT)
        axes = [sheet.axes(left, below + 0.32, width, panel) for left in lefts[:2]]
        heat_map(axes[0], share, share_norm, share_colors, lambda value: f"{value:.0%}", rows=True)
        heat_map(axes[1], mass, mass_norm, mass_colors, lambda value: f"{value:.1f}", rows=False)
        for map_ in axes:
            mark_cells(map_, stage.unreached)
        if groups:
            sheet.text(lefts[2], below + 0.1, "groups kept", SMALL, color=SOFT)
            _draw_groups(sheet.axes(lefts[2], below + 0.32, group_width, panel), stage, picture.num_layers)
        top += height
    ticks = np.linspace(share_norm.vmin or 0.0, share_norm.vmax or 1.0, 3).tolist()
    sheet.color_bar(lefts[0], top, width, share_colors, share_norm, "share that stays", lambda v: f"{v:.0%}", ticks)
    sheet.color_bar(
        lefts[1], top, width, mass_colors, mass_norm, "multiple of an even part", times, even_ticks(mass_norm)
    )
    if groups:
        keys = [Patch(facecolor=_GROUPS(1), label="stayed"), Patch(facecolor=_GROUPS(0), edgecolor=RULE, label="cut")]
        key = sheet.axes(lefts[2], top, group_width, 0.4)
        key.set_axis_off()
        key.legend(handles=keys, loc="upper left", borderpad=0, borderaxespad=0, handlelength=1, labelspacing=0.2)
    return sheet


def _draw_groups(axes: Axes, stage: KeptStage, num_layers: int) -> None:
    """A square for every key/value group; those that stay are dark."""
    stays = np.zeros((num_layers, stage.groups_before))
    kept = stage.groups_kept or [list(range(stage.groups_before))] * num_layers
    for layer, groups in enumerate(kept):
        stays[layer, groups] = 1
    heat_map(axes, stays, Normalize(0, 1), _GROUPS, None, rows=False)
    axes.set_xlabel("group", labelpad=2)
    for line in range(1, stage.groups_before):
        axes.axvline(line - 0.5, color=PAPER, linewidth=1.5)
    for line in range(1, num_layers if num_layers <= 16 else 1):
        axes.axhline(line - 0.5, color=PAPER, linewidth=1.5)


def _criteria(stages: Sequence[KeptStage]) -> str:
    """What scored; stage by stage where they differ."""
    by = [stage.scored_by for stage in stages]
    if len(set(by)) == 1:
        return by[0]
    return "; ".join(f"stage {stage.stage}: {scored}" for stage, scored in zip(stages, by, strict=True))


def _panel_height(layers: int, maps: int = 1) -> float:
    """Inches for so many layers: legible rows where there are few, part of a page where they or the maps are many."""
    return min(max(0.26 * layers, 0.8), 2.9 if maps < 3 else 2.0)


def _whole(values: Sequence[Sequence[float]], layers: Sequence[int], num_layers: int) -> NDArray[np.float64]:
    """`[L, E]` spread over all layers; NaN in dense ones."""
    whole = np.full((num_layers, len(values[0])), np.nan)
    whole[list(layers)] = values
    return whole


def draw_router_loads(picture: RouterLoads) -> Sheet:
    """Expert load before and after, and its drift in between."""
    panel = _panel_height(picture.num_layers)
    maps_height = panel + 1.42 if picture.maps else 0.0
    height = maps_height + (3.05 if picture.stages else 0.0)
    dense = "; grey: dense layer" if len(picture.layers) < picture.num_layers else ""
    text = "1 is an even load, every expert as many tokens as any other"
    sheet = Sheet(height, picture.title, f"{picture.run}: {text}{dense}", alarm=picture.warning is not None)
    if picture.maps:
        _draw_maps(sheet, picture, panel)
    if picture.stages:
        _draw_drift(sheet, picture, maps_height)
    return sheet


def _draw_maps(sheet: Sheet, picture: RouterLoads, panel: float) -> None:
    width = (RIGHT - LEFT - _GAP) / 2
    loads = [_whole(loads.load, loads.layers, picture.num_layers) for loads in picture.maps]
    norm, colors = even_scale(np.concatenate([load.ravel() for load in loads]))
    starved = [_starved(loads, picture.threshold) for loads in picture.maps]
    names = ("teacher", f"final model ({picture.maps[-1].model})")
    for number, (load, name) in enumerate(zip(loads, names, strict=True)):
        left = LEFT + number * (width + _GAP)
        sheet.text(left, 0, f"{name}, on held-out text", SMALL, color=SOFT)
        axes = sheet.axes(left, 0.22, width, panel)
        heat_map(axes, load, norm, colors, lambda value: f"{value:.2f}", rows=number == 0)
        mark_cells(axes, starved[number])
    how = "crossed out" if max(map(len, starved)) <= MOST_CROSSES else "darkest brown"
    crossed = f"; {how}: below {picture.threshold:g}" if any(starved) else ""
    label = f"expert load, multiple of an even load{crossed}"
    sheet.color_bar(LEFT, 0.22 + panel + 0.5, 2 * width + _GAP, colors, norm, label, times, even_ticks(norm))


def _starved(loads: LoadMap, threshold: float) -> list[tuple[int, int]]:
    return [
        (layer, expert)
        for layer, row in zip(loads.layers, loads.load, strict=True)
        for expert, load in enumerate(row)
        if load < threshold
    ]


def _draw_drift(sheet: Sheet, picture: RouterLoads, top: float) -> None:
    """Least and most loaded expert of every layer (thin) and of all layers (bold) over the steps."""
    sheet.text(LEFT, top, "while training: the most and the least loaded expert", SMALL, color=SOFT)
    axes = sheet.axes(LEFT + 0.13, top + 0.42, RIGHT - LEFT - 0.13, 2.1)
    floor = picture.threshold / 4
    highest, end = 1.0, picture.stages[-1].offset + picture.stages[-1].steps[-1]
    for stage in picture.stages:
        steps = np.array(stage.steps) + stage.offset
        first = stage is picture.stages[0]
        for values, color, dash, name, extreme in (
            (stage.most, BLUE, "-", "most loaded", np.max),
            (stage.least, VERMILLION, "--", "least loaded", np.min),
        ):
            array = np.maximum(np.array(values), floor)
            highest = max(highest, float(array.max()))
            axes.plot(steps, array, color=color, linewidth=0.7, alpha=0.4)
            label = f"{name} expert of all layers" if first else None
            axes.plot(steps, extreme(array, axis=1), color=color, linestyle=dash, linewidth=2, label=label)
        axes.axvline(stage.offset, color=SOFT, linewidth=0.8, linestyle=":")
        name_stage(axes, stage.stage, stage.offset, stage.steps[-1] / end)
    ruled(axes)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.axhline(picture.threshold, color=ALARM, linewidth=1.2, linestyle=(0, (1, 1)))
    axes.annotate(
        "an expert below this line is starved", (0, picture.threshold), (4, -2), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", color=ALARM, fontsize=SMALL, va="top",
    )  # fmt: skip
    log_ticks(axes, [floor, *(tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if tick > floor)])
    axes.set_ylim(floor, highest * 1.4)
    axes.set_xlim(0, end * 1.03)
    axes.set(xlabel="optimizer steps, all stages", ylabel="multiple of an even load")
    axes.plot([], [], color=SOFT, linewidth=0.7, label="of each layer")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0, borderaxespad=0.2)
