"""Histograms and curves: the scores and their cut, the losses, and quality against size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from slimmoe_hf.plots.models import Scores, ScoreStage, amount
from slimmoe_hf.plots.recovery import Losses, LossStage, QualitySize, SizePoint, SizeRun
from slimmoe_hf.plots.style import (
    BLUE,
    DASHES,
    GREEN,
    INK,
    LEFT,
    LINES,
    MARKERS,
    NOTHING,
    PAPER,
    PURPLE,
    RIGHT,
    SMALL,
    SOFT,
    VERMILLION,
    Sheet,
    name_stage,
    ruled,
    wrapped,
)

_WIDE = 0.85  # where the axis' numbers are long


def draw_scores(picture: Scores) -> Sheet:
    """A histogram a stage: dropped and kept neurons, and where the experts cut."""
    words = [wrapped(stage.words + ".") for stage in picture.stages]
    heights = [0.2 * len(lines) + 2.62 for lines in words]
    source = f"{picture.run}: every neuron of every expert; an expert keeps its highest, so each has a cut of its own"
    sheet = Sheet(sum(heights) + 0.05, picture.title, source)
    top = 0.0
    for stage, lines, height in zip(picture.stages, words, heights, strict=True):
        for number, line in enumerate(lines):
            sheet.text(0.16, top + 0.2 * number, line, 10)
        _draw_histogram(sheet.axes(_WIDE, top + 0.2 * len(lines) + 0.36, RIGHT - _WIDE, 1.6), stage)
        top += height
    return sheet


def _draw_histogram(axes: Axes, stage: ScoreStage) -> None:
    edges = np.array(stage.edges)
    ratio = edges[1] / edges[0]
    if stage.kept_below + stage.dropped_below:  # a bar of its own, apart from the axis it has no place on
        edges = np.concatenate([[edges[0] / ratio**2, edges[0] / ratio], edges])
        kept, dropped = np.array([stage.kept_below, 0, *stage.kept]), np.array([stage.dropped_below, 0, *stage.dropped])
    else:
        kept, dropped = np.array(stage.kept), np.array(stage.dropped)
    axes.stairs(
        dropped, edges, fill=True, facecolor=NOTHING, edgecolor=SOFT, linewidth=0.6, hatch="////", label="dropped"
    )
    axes.stairs(kept + dropped, edges, baseline=dropped, fill=True, color=BLUE, label="kept")
    axes.axvspan(
        max(stage.cut_lowest, edges[0]), stage.cut_highest, color=VERMILLION, alpha=0.2, linewidth=0, zorder=0.4,
        label=f"cuts of the experts, {stage.cut_lowest:.2g} to {stage.cut_highest:.2g}",
    )  # fmt: skip
    axes.axvline(
        max(stage.cut_median, edges[0]), color=VERMILLION, linestyle="--", linewidth=1.6,
        label=f"their median, {stage.cut_median:.2g}",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(edges[0] / ratio**0.5, edges[-1] * ratio**0.5)
    ruled(axes)
    ticks = {value: f"{value:g}" for value in _log_ticks(stage.edges[0], stage.edges[-1])}
    if stage.kept_below + stage.dropped_below:
        ticks = {float(np.sqrt(edges[0] * edges[1])): "0" if stage.zeros else "lower", **ticks}
    _set_ticks(axes, ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(xlabel=f"score of a neuron by {stage.criterion}, {stage.unit} (logarithmic)", ylabel="neurons")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, borderaxespad=0.2, columnspacing=1.4)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two: decades, or more where there are few of them; at most ten."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ([1 + half / 2 for half in range(18)], (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
        ticks = [
            float(f"{step}e{power}") for power in powers for step in steps if low <= float(f"{step}e{power}") <= high
        ]
        if len(ticks) <= 10:
            return ticks
    return ticks[:: -(-len(ticks) // 10)]


def _set_ticks(axes: Axes, ticks: dict[float, str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_losses(picture: Losses) -> Sheet:
    """Held-out losses of the checkpoints; below them, apart because of other text, the curves of training."""
    source = (
        f"{picture.run}: all stages one after the other; {picture.split} loss and training curves are of different text: compare "
        "their course, not their height"
    )
    sheet = Sheet(5.85, picture.title, source)
    panels = []
    for top, height, heading in (
        (0.0, 1.2, f"{picture.split} loss of the checkpoints, reloaded"),
        (1.85, 1.2, "cross-entropy while training"),
        (3.7, 1.35, "KL from the teacher while training"),
    ):
        sheet.text(LEFT, top, heading, SMALL, color=SOFT)
        panels.append(sheet.axes(LEFT, top + 0.24, RIGHT - LEFT, height))
    held_out, entropy, divergence = panels
    for stage in picture.stages:
        _draw_held_out(held_out, stage, first=stage is picture.stages[0])
        _draw_training(entropy, divergence, stage, first=stage is picture.stages[0])
    held_out.axhline(
        picture.teacher, color=INK, linewidth=1.2, linestyle=(0, (1, 1)), label=f"teacher {picture.teacher:.2f}"
    )
    end = picture.stages[-1].offset + picture.stages[-1].length
    for axes in panels:
        for stage in picture.stages:
            axes.axvline(stage.offset, color=SOFT, linewidth=0.8, linestyle=":")
            if axes is not held_out:
                name_stage(axes, stage.stage, stage.offset, stage.length / end)
        axes.set_xlim(-0.015 * end, end * 1.06)
        axes.margins(y=0.2)
        ruled(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylabel("nats per token")
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0, borderaxespad=0.3, columnspacing=1.2
        )
    for axes in panels[:2]:
        axes.set_xticklabels([])
    divergence.set_xlabel("optimizer steps")
    return sheet


def _draw_held_out(axes: Axes, stage: LossStage, first: bool) -> None:
    """From the open mark (just cut) to the filled one (distilled)."""
    ends = stage.offset, stage.offset + stage.length
    how: dict[str, Any] = {
        "color": VERMILLION,
        "marker": "D",
        "markersize": 7,
        "markeredgewidth": 1.6,
        "linestyle": "none",
    }
    axes.plot(ends, (stage.slimmed, stage.distilled), color=VERMILLION, linestyle="--", linewidth=1)
    named = (lambda name: name) if first else (lambda name: None)
    axes.plot(ends[0], stage.slimmed, markerfacecolor=PAPER, label=named("slimmed"), clip_on=False, zorder=3, **how)
    axes.plot(ends[1], stage.distilled, label=named("distilled"), clip_on=False, zorder=3, **how)
    for x, loss, up in ((ends[0], stage.slimmed, 4), (ends[1], stage.distilled, 0)):
        axes.annotate(f"{loss:.2f}", (x, loss), (9, up), textcoords="offset points", va="center", fontsize=SMALL)


def _draw_training(entropy: Axes, divergence: Axes, stage: LossStage, first: bool) -> None:
    named = (lambda name: name) if first else (lambda name: None)
    steps, looked = np.array(stage.steps) + stage.offset, np.array(stage.eval_steps) + stage.offset
    dots: dict[str, Any] = {"color": GREEN, "marker": "o", "markersize": 4, "linestyle": "-.", "linewidth": 1.2}
    for axes, values, seen in ((entropy, stage.ce, stage.eval_ce), (divergence, stage.kl, stage.eval_kl)):
        axes.plot(steps, values, color=BLUE, linewidth=1.6, label=named("training text"))
        if stage.eval_steps:
            axes.plot(looked, seen, label=named("validation text"), **dots)
    divergence.plot(
        steps,
        stage.loss,
        color=PURPLE,
        linestyle="--",
        linewidth=1.6,
        label=named("what was minimised"),
    )


def draw_quality_size(picture: QualitySize) -> Sheet:
    """Every model of every run: open right after a cut, filled when distilled, a star for the teacher."""
    source = (
        f"{picture.data}, {picture.split} split, {picture.tokens:,} tokens; thin line to an open mark: a cut, bold line to a "
        "filled one: distillation"
    )
    several = len(picture.runs) > 1
    keys = -(-len(picture.runs) // 3) * 0.2 + 0.05 if several else 0.0
    sheet = Sheet(4.35 + keys, picture.title, source)
    axes = sheet.axes(0.75, 0.05 + keys, 6.4, 3.7)
    for number, run in enumerate(picture.runs):
        _draw_run(axes, number, run, name_models=not several)
    teacher = picture.runs[0].points[0]
    axes.plot(teacher.total_parameters, teacher.loss, marker="*", markersize=15, color=INK, zorder=4)
    _name(axes, teacher, above=False)
    sizes = [point.total_parameters for run in picture.runs for point in run.points]
    room = (max(sizes) / min(sizes)) ** 0.14
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / room, max(sizes) * room)
    axes.margins(y=0.16)
    ruled(axes)
    _set_ticks(axes, {tick: f"{amount(tick)}" for tick in _log_ticks(*axes.get_xlim())})
    axes.set(xlabel="total parameters (logarithmic)", ylabel=f"{picture.split} loss, nats per token")
    per_nat = teacher.bits_per_byte / teacher.loss
    right = axes.secondary_yaxis(
        "right", functions=(lambda nats: np.asarray(nats) * per_nat, lambda bits: np.asarray(bits) / per_nat)
    )
    right.set_ylabel("bits per byte")
    if several:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, borderaxespad=0.3, handlelength=3.6)
    return sheet


def _draw_run(axes: Axes, number: int, run: SizeRun, name_models: bool) -> None:
    turn = number + number // 5  # after five runs the colours come again, with other dashes and marks
    look: dict[str, Any] = {
        "color": LINES[number % 5],
        "marker": MARKERS[turn % 5],
        "markersize": 8,
        "markeredgewidth": 1.6,
    }
    dash = DASHES[turn % 5]
    for before, after in pairwise(run.points):
        healed = after.step == "distilled"
        axes.plot(
            (before.total_parameters, after.total_parameters), (before.loss, after.loss), color=look["color"],
            linestyle=dash, linewidth=2.4 if healed else 1, zorder=2,
        )  # fmt: skip
        face = look["color"] if healed else PAPER
        axes.plot(after.total_parameters, after.loss, markerfacecolor=face, linestyle="none", zorder=3, **look)
        if name_models:
            _name(axes, after, above=not healed)
    axes.plot([], [], linestyle=dash, label=_short(run.run), **look)


def _name(axes: Axes, point: SizePoint, above: bool) -> None:
    """A model's loss, and on the side where there is room for it its stage."""
    stage = point.model.removesuffix(" distilled").replace("-", " ")
    axes.annotate(
        f"{point.loss:.2f}" if above else f"{stage}\n{point.loss:.2f}", (point.total_parameters, point.loss),
        (0, 9 if above else -9), textcoords="offset points", fontsize=SMALL, ha="center", va="bottom" if above else "top",
        linespacing=1.15, zorder=5,
    )  # fmt: skip


def _short(name: str) -> str:
    """A run's name, cut in the middle where it is too long for a legend."""
    return name if len(name) <= 20 else f"{name[:9]}\u2026{name[-10:]}"
