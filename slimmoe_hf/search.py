"""Width against experts against key/value groups: which shape of a size loses least, by prediction. Pure: no model, no data.

Shape letters: E' experts kept, F' width kept, G' key/value groups kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, ConfigDict

from slimmoe_hf.budget import Limits, Sizes
from slimmoe_hf.criteria import check_criteria, of_gradients
from slimmoe_hf.defaults import CRITERION
from slimmoe_hf.families import Shape, config_from
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.predicted_loss import Losses, Lost, Weights, fitted, wanted_widths
from slimmoe_hf.stats import ExpertStats

_POINTS = 16  # of the frontier
_WANTED = 1.25
"""A layer that would want so many times the width that all have is reported (our choice)."""


class Candidate(BaseModel):
    """One shape within the budgets.

    Attributes:
        num_experts, expert_width, kv_groups: E', F' and G'.
        total, active: Parameters, as `slimmoe size` counts them.
        lost: What it takes. predicted: What the loss is predicted to grow by; nats per token once the search is calibrated.
        guessed: What it was predicted to grow by before anything was measured, in no unit.
        plain, reconstructed: Measured growth of the validation loss, with slices and with output projections solved anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: int
    expert_width: int
    kv_groups: int
    total: int
    active: int
    lost: Lost
    predicted: float
    guessed: float = 0.0
    plain: float | None = None
    reconstructed: float | None = None

    @property
    def measured(self) -> float | None:
        """What was measured, reconstructed where it was."""
        return self.plain if self.reconstructed is None else self.reconstructed

    @property
    def size(self) -> tuple[int, int, int]:
        """E', F' and G'."""
        return self.num_experts, self.expert_width, self.kv_groups


class Search(BaseModel):
    """Shapes within a budget, best first.

    Attributes:
        family: The model type. before: Its sizes. total, active: Its parameters. stats_sha256: What was searched.
        limits: Most parameters.
        criterion, expert_criterion, seed: What chooses neurons and experts within a shape.
        candidates: The widest shape of every number of experts and of groups, by predicted loss.
        frontier: The best one, by prediction, of some sizes from the smallest to the budget.
        weights: Of the prediction. original: Validation loss of the model itself; None where nothing was measured.
        wanted: Absolute layer index -> the width that it would want of the neurons that the best shape has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    before: Shape
    total: int
    active: int
    stats_sha256: str
    limits: Limits
    criterion: str
    expert_criterion: str
    seed: int
    candidates: list[Candidate]
    frontier: list[Candidate]
    weights: Weights
    original: float | None = None
    wanted: dict[int, float]

    @property
    def measured(self) -> list[Candidate]:
        """Those that were, best first."""
        return sorted(
            (each for each in self.candidates if each.measured is not None), key=lambda each: each.measured or 0
        )

    @property
    def best(self) -> Candidate:
        """The lowest measured loss; the lowest predicted one where nothing was measured."""
        return (self.measured or self.candidates)[0]

    @property
    def pure_width(self) -> Candidate | None:
        """All experts and groups, narrowed; None where the budgets cannot be met so."""
        return self._whole(lambda each: each.num_experts == self.before.num_experts)

    @property
    def pure_drop(self) -> Candidate | None:
        """Whole experts, fewer of them, and all groups; None where the budgets cannot be met so."""
        return self._whole(lambda each: each.expert_width == self.before.expert_width)

    def _whole(self, wanted: Callable[[Candidate], bool]) -> Candidate | None:
        found = (each for each in self.candidates if wanted(each) and each.kv_groups == self.before.kv_groups)
        return max(found, key=lambda each: each.total, default=None)

    @property
    def fewer_groups(self) -> Candidate | None:
        """The one that is predicted best of those that lose groups; None where none may."""
        return next((each for each in self.candidates if each.kv_groups < self.before.kv_groups), None)

    @property
    def wider(self) -> dict[int, float]:
        """Layers that would want clearly more width than the one that all have."""
        width = self.best.expert_width
        return {layer: wanted for layer, wanted in self.wanted.items() if wanted >= _WANTED * width}

    @property
    def misordered(self) -> tuple[int, int]:
        """Of the pairs of shapes that were measured, how many came out in another order than was guessed; and all of them."""
        guesses = [each.guessed for each in self.measured]
        pairs = [(guesses[one], guesses[two]) for two in range(len(guesses)) for one in range(two)]
        return sum(better > worse for better, worse in pairs), len(pairs)

    def name(self, candidate: Candidate) -> str:
        """`6x88`, and its groups where some go."""
        groups = f", {candidate.kv_groups} groups" if candidate.kv_groups != self.before.kv_groups else ""
        return f"{candidate.num_experts}x{candidate.expert_width}{groups}"

    def target(self, candidate: Candidate) -> Target:
        """What to cut to for a shape: only what changes is named."""
        given = {name: vars(candidate)[name] for name in Target.model_fields}
        return Target(**{name: value for name, value in given.items() if value != vars(self.before)[name]})

    def plan(self, stats: ExpertStats, candidate: Candidate | None = None) -> CompressionPlan:
        """The plan of a shape, by default of the best one; it is not reconstructed.

        Args:
            stats: Those that were searched.
            candidate: One of `candidates`.
        """
        target = self.target(candidate or self.best)
        return make_plan(stats, target, self.criterion, self.seed, self.expert_criterion)

    def with_measured(self, candidate: Candidate, plain: float, reconstructed: float | None) -> Search:
        """The same with what was found of one candidate."""
        found = {"plain": plain, "reconstructed": reconstructed}
        named = [each.model_copy(update=found) if each.size == candidate.size else each for each in self.candidates]
        return self.model_copy(update={"candidates": named})


def search_plan(
    stats: ExpertStats,
    budget: int | str | None = None,
    active_budget: int | str | None = None,
    criterion: str = CRITERION,
    seed: int = 0,
    expert_criterion: str | None = None,
) -> Search:
    """Every aligned shape within the budgets, by predicted loss. Pure, as `make_plan` is; `check_search` measures the best.

    Of every number of experts (from as many as a token is sent to) and of key/value groups, the widest experts that the
    budgets leave room for: multiples of 64, or of 8 where the model has few of those.

    Args:
        stats: From `collect_stats` or `ExpertStats.load`.
        budget: Most parameters, counted as `slimmoe size` counts them: a number, `7.6B`, `500M`, or `0.25x` of the model's.
            As written: 7.64 billion are 7.6B.
        active_budget: The same of those that a token meets.
        criterion: What chooses neurons and groups, as `make_plan` takes it. seed: For `random`.
        expert_criterion: What chooses experts, as `make_plan` takes it.

    Returns:
        The shapes with what they are predicted to lose (see `predicted_loss`); `plan` makes the plan of one.

    Raises:
        ValueError: No budget, one that is no number, that the model meets already, or that no shape meets (the line has the
            smallest); or as `check_criteria`.

    Example:
        ```python
        found = search_plan(stats, budget="0.25x")
        student = apply_plan(model, found.plan(stats))
        ```
    """
    of_experts = check_criteria(criterion, expert_criterion, neurons=True, experts=True)
    of_gradients(stats.grad_sq_LEF, "a search for a budget", "name the sizes instead of a budget")
    sizes = _sizes(stats)
    limits = sizes.limits(budget, active_budget)
    losses = Losses(stats, criterion, of_experts, seed, sizes.widths)
    found = Search(
        family=stats.meta.family, before=sizes.shape, total=sizes.whole.total, active=sizes.whole.active,
        stats_sha256=stats.sha256, limits=limits, criterion=criterion, expert_criterion=of_experts, seed=seed,
        candidates=_within(sizes, losses, limits), frontier=[], weights=Weights(), wanted={},
    )  # fmt: skip
    found = calibrated(found)
    guessed = [each.model_copy(update={"guessed": each.predicted}) for each in found.candidates]
    return finished(found.model_copy(update={"candidates": guessed}), stats)


def calibrated(found: Search) -> Search:
    """The same shapes in the order that is predicted with weights fitted to those that were measured."""
    measured = [(each.lost, each.measured or 0.0) for each in found.measured]
    weights = fitted(measured, Weights())
    named = [each.model_copy(update={"predicted": weights.predicted(each.lost)}) for each in found.candidates]
    best_first = sorted(named, key=lambda each: (each.predicted, each.total))
    return found.model_copy(update={"candidates": best_first, "weights": weights})


def finished(found: Search, stats: ExpertStats) -> Search:
    """The same with its frontier, and with the widths that the layers would want of the best shape.

    Args:
        found: From `search_plan`.
        stats: Those that were searched.
    """
    sizes = _sizes(stats)
    losses = Losses(stats, found.criterion, found.expert_criterion, found.seed, sizes.widths)
    least = sizes.of(sizes.experts[0], sizes.widths[0], sizes.groups[0])
    steps = [
        None if most is None else np.geomspace(low, most, _POINTS)
        for low, most in zip(least, found.limits, strict=True)
    ]
    frontier: dict[tuple[int, int, int], Candidate] = {}
    for point in range(_POINTS):
        limits = Limits(*(None if step is None else round(step[point]) for step in steps))
        named = [
            each.model_copy(update={"predicted": found.weights.predicted(each.lost)})
            for each in _within(sizes, losses, limits)
        ]
        if named:
            best = min(named, key=lambda each: (each.predicted, each.total))
            frontier[best.size] = best
    plan = found.plan(stats)
    wanted = wanted_widths(stats, dict(plan.experts), found.best.expert_width)
    rounded = {layer: round(width, 1) for layer, width in wanted.items()}
    return found.model_copy(update={"frontier": list(frontier.values()), "wanted": rounded})


def _sizes(stats: ExpertStats) -> Sizes:
    return Sizes(config_from(stats.meta.config))


def _within(sizes: Sizes, losses: Losses, limits: Limits) -> list[Candidate]:
    """The widest shape of every number of experts and groups."""
    found = []
    for experts in sizes.experts:
        for groups in sizes.groups:
            width = sizes.widest(experts, groups, limits)
            if width is not None:
                total, active = sizes.of(experts, width, groups)
                found.append(
                    Candidate(
                        num_experts=experts, expert_width=width, kv_groups=groups, total=total, active=active,
                        lost=losses.of(experts, width, groups), predicted=0.0,
                    )
                )  # fmt: skip
    return found
