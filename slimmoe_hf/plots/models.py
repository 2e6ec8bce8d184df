"""What the pictures of a cut show: the numbers, and the title and caption that they make. `plot_recovery` has the others.

Every model is dumped whole into the JSON file beside its picture, so that anyone can draw it again.

Shape letters: L layers with experts, E experts, A layers with attention, B bins.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, computed_field


class Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Picture(Data):
    """Of one run, or of several.

    Attributes:
        name: Of the picture's files.
        title: What it found, in words. caption: The same and how to read it, in one sentence.
        warning: What should worry its reader; None where nothing does.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def caption(self) -> str: ...

    @property
    def warning(self) -> str | None:
        return None


class KeptStage(Data):
    """What one stage's plan kept.

    Attributes:
        stage: Counted from 1. criterion, calibration_loss: What scored. expert_criterion: What chose the experts, where
            any was dropped.
        width_before, width_after: Neurons per expert. groups_before, groups_after: Key/value groups per layer.
        experts_before, experts_after: Experts per layer. dropped: `(layer, expert)` of those that went.
        layers: Absolute indices of the L layers with experts.
        kept_share: `[L, E]`, share of an expert's summed neuron score that its kept neurons hold; 0 of a dropped one.
        score_share: `[L, E]`, an expert's summed neuron score as a multiple of its layer's mean; where experts were
            dropped, the score that chose them.
        unreached: `(layer, expert)` of experts that no calibration token reached: their kept share is of weight norms.
        groups_kept: `[A]` lists of the groups that stay, one for each layer and empty where it has no attention; empty where
            none was cut.
    """

    stage: int
    criterion: str
    expert_criterion: str | None = None
    calibration_loss: str
    width_before: int
    width_after: int
    groups_before: int
    groups_after: int
    experts_before: int
    experts_after: int
    dropped: list[tuple[int, int]]
    layers: list[int]
    kept_share: list[list[float]]
    score_share: list[list[float]]
    unreached: list[tuple[int, int]]
    groups_kept: list[list[int]]

    @property
    def known_shares(self) -> list[list[float]]:
        """`kept_share`, NaN for the experts that were ranked by weight norms or dropped."""
        unreached = set(self.unreached) | set(self.dropped)
        return [
            [math.nan if (layer, expert) in unreached else share for expert, share in enumerate(row)]
            for layer, row in zip(self.layers, self.kept_share, strict=True)
        ]

    @property
    def scored_by(self) -> str:
        """What scored what was cut, as in `neurons by energy, experts by reap`."""
        neurons = f"neurons by {self.criterion}"
        if not self.dropped:
            whole = self.width_after == self.width_before and self.groups_after == self.groups_before
            return "nothing was cut" if whole else neurons
        experts = f"experts by {self.expert_criterion or self.criterion}"
        return experts if self.width_after == self.width_before else f"{neurons}, {experts}"

    @property
    def words(self) -> str:
        """One sentence on what stayed."""
        groups = f"{self.groups_after} of {self.groups_before} key/value groups"
        experts = f"{self.experts_after} of {self.experts_before} experts per layer"
        if self.width_after == self.width_before:
            whole = f"{experts} with all their neurons" if self.dropped else "every neuron"
            return f"Stage {self.stage} kept {whole}, and {groups}"
        shares = [share for share in flat(self.known_shares) if share == share]
        text = (
            f"Stage {self.stage} kept {f'{experts} and ' if self.dropped else ''}"
            f"{percent(self.width_after / self.width_before)} of every expert's neurons "
            f"({percent(statistics.median(shares))} of its score, {percent(min(shares))} to {percent(max(shares))})"
        )
        return f"{text} and {groups}" if self.groups_kept else text


class Kept(Picture):
    """Layer by expert: what every stage kept, and where the score was.

    Attributes:
        run: Its folder's name. family: The model type. num_layers: Dense ones included.
    """

    name = "kept"

    run: str
    family: str
    num_layers: int
    stages: list[KeptStage]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        cuts = []
        if last.experts_after < first.experts_before:
            cuts.append(f"layers to {last.experts_after} of {first.experts_before} experts")
        if last.width_after < first.width_before:
            share = percent(last.width_after / first.width_before)
            cuts.append(f"experts to {share} ({first.width_before} to {last.width_after} neurons)")
        if last.groups_after < first.groups_before:
            cuts.append(f"attention to {last.groups_after} of {first.groups_before} key/value groups")
        return f"Cut: {', '.join(cuts) or 'nothing'}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        words = "; ".join(stage.words[0].lower() + stage.words[1:] for stage in self.stages)
        return (
            f"Heat maps, layer by expert, of the share of each expert's neuron score that was kept and of each expert's share "
            f"of its layer's score, for every stage of {self.run}: {words}."
        )


class ScoreStage(Data):
    """The neuron scores of one stage, counted in bins. Experts that no calibration token reached are left out.

    Attributes:
        stage: Counted from 1. criterion: What scored. unit: Of the scores.
        edges: B + 1 bounds of the bins, even on a logarithmic axis.
        kept, dropped: Neurons per bin. kept_below, dropped_below: Neurons below the first bin. zeros: Those that are 0.
        cut_lowest, cut_median, cut_highest: Of the experts' cuts, each the lowest score that an expert kept.
        kept_median, dropped_median: Median scores.
        unreached: Experts left out.
    """

    stage: int
    criterion: str
    unit: str
    edges: list[float]
    kept: list[int]
    dropped: list[int]
    kept_below: int
    dropped_below: int
    zeros: int
    cut_lowest: float
    cut_median: float
    cut_highest: float
    kept_median: float
    dropped_median: float
    unreached: int

    @property
    def words(self) -> str:
        """One sentence on how far apart kept and dropped neurons are."""
        kept = sum(self.kept) + self.kept_below
        total = kept + sum(self.dropped) + self.dropped_below
        if self.dropped_median > 0:
            times = f"{_round(self.kept_median / self.dropped_median)} times as high as"
        else:
            times = "above zero, unlike" if self.kept_median > 0 else "zero, as is"
        experts = "expert" if self.unreached == 1 else "experts"
        left_out = f" ({self.unreached} {experts} without calibration tokens left out)" if self.unreached else ""
        found = f"the median kept score is {times} the median dropped"
        return f"Stage {self.stage} kept {kept:,} of {total:,} neurons{left_out}; {found}"


class Scores(Picture):
    """Histograms of neuron scores, one a stage whose plan narrowed the experts."""

    name = "scores"

    run: str
    stages: list[ScoreStage]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        ends = self.stages if len(self.stages) < 3 else [self.stages[0], self.stages[-1]]
        cuts = ", ".join(f"in stage {s.stage} from {s.cut_lowest:.2g} to {s.cut_highest:.2g} {s.unit}" for s in ends)
        return f"Every expert has a cut of its own: {cuts}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        words = "; ".join(stage.words[0].lower() + stage.words[1:] for stage in self.stages)
        return (
            f"Histograms of neuron scores on a logarithmic axis, kept and dropped neurons stacked, with the median and the "
            f"range of the experts' own cuts, for {self.run}: {words}."
        )


def amount(number: float) -> str:
    """A count in three digits: `7.65B`, `5.98M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g}{letter}"
    return f"{number:g}"


def flat(rows: Iterable[Iterable[float]]) -> list[float]:
    """All values of all rows."""
    return [value for row in rows for value in row]


def percent(value: float) -> str:
    """A share, as in `17%`."""
    return f"{value:.0%}"


def _round(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
