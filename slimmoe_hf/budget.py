"""A number of parameters as people write it, and the shapes of a model that keep within it.

Shape letters: E experts, F expert width, G key/value groups, K experts per token.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from pydantic import ValidationInfo, field_validator, model_validator
from transformers import PreTrainedConfig

from slimmoe_hf.families import family_of, shape_of
from slimmoe_hf.limits import possible_experts, possible_widths
from slimmoe_hf.plan import ALIGNMENT, Target
from slimmoe_hf.sizing import STEP, expert_parameters, neuron_parameters, parameter_counts, parse_size, slimmed_config

FEW = 8
"""A model with fewer widths than this at steps of `STEP` has them at steps of `ALIGNMENT` (our choice)."""


class Limits(NamedTuple):
    """Most parameters, of all and of those that a token meets; None where there is no limit."""

    total: int | None
    active: int | None


def parse_budget(given: int | str, whole: int, name: str) -> int:
    """The most parameters that a budget allows.

    Args:
        given: A number, `7.6B`, `500M`, or `0.25x`, a share of the model's own. It is met at the precision it is written with, up
            to a hundredth over: 7.648 billion parameters are 7.6B, and 8.1 billion are not 8B.
        whole: The model's own.
        name: What to call it in errors.

    Raises:
        ValueError: None of that.
    """
    text = str(given).strip()
    if text[-1:] in ("x", "X"):
        try:
            share = Decimal(text[:-1])
        except InvalidOperation:
            share = Decimal(0)
        if not share.is_finite() or not 0 < share <= 1:
            raise ValueError(
                f"{name} {text}: not a share of the model. Write it as 0.25x, more than 0x and at most 1x."
            )
        return int(share * whole)
    value, unit = parse_size(text, name)
    return int(value) + min(math.ceil(unit / 2) - 1, int(value) // 100)


class StageTarget(Target):
    """What a stage cuts to: sizes, or budgets within which its own statistics find the sizes.

    Attributes:
        budget: Most parameters, as `slimmoe plan --budget` takes them: `7.6B`, `500M`, a number, or `0.4x` of what the model
            has that the stage starts from.
        active_budget: The same of those that a token meets.
    """

    budget: str | None = None
    active_budget: str | None = None

    @field_validator("budget", "active_budget", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            parse_budget(value, 10**12, str(info.field_name))
        return value

    @model_validator(mode="after")
    def _sizes_or_budgets(self) -> StageTarget:
        if self.searched and self.sizes != Target():
            raise ValueError(f"a budget finds the sizes itself; leave {self.sizes} out")
        return self

    @property
    def searched(self) -> bool:
        """Whether the sizes are to be found."""
        return self.budget is not None or self.active_budget is not None

    @property
    def sizes(self) -> Target:
        """Those that are named."""
        return Target(**{name: vars(self)[name] for name in Target.model_fields})

    @property
    def asks(self) -> dict[str, bool]:
        """As `Target.asks`; a search needs both."""
        return {"neurons": True, "experts": True} if self.searched else super().asks

    def __str__(self) -> str:
        if not self.searched:
            return str(self.sizes)
        most = ((self.budget, "parameters"), (self.active_budget, "active parameters"))
        return "at most " + " and ".join(f"{budget} {what}" for budget, what in most if budget is not None)


class Sizes:
    """Parameters of every shape of a model: linear in groups, in experts, and in experts times width.

    Attributes:
        whole: Of the model itself. shape: Its sizes.
        experts, widths, groups: What shapes may have, ascending.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        """Count.

        Args:
            config: The model's.
        """
        family, shape, self.whole = family_of(config), shape_of(config), parameter_counts(config)
        self.shape, self.experts = shape, possible_experts(config)
        neurons = neuron_parameters(config)
        self.per_neuron = neurons // (shape.num_experts * shape.expert_width)
        self.besides = (expert_parameters(config) - neurons) // shape.num_experts
        self.per_expert = self.per_group = 0
        if len(self.experts) > 1:
            fewer = self.experts[-2]
            gone = self.whole.total - self._total(config, Target(num_experts=fewer))
            self.per_expert = gone // (shape.num_experts - fewer) - self.per_neuron * shape.expert_width
        if shape.kv_groups > 1 and not family.no_groups:
            self.per_group = self.whole.total - self._total(config, Target(kv_groups=shape.kv_groups - 1))
        step = STEP if shape.expert_width >= FEW * STEP else ALIGNMENT
        self.widths = possible_widths(config, step)
        self.groups = [shape.kv_groups] if family.no_groups else list(range(1, shape.kv_groups + 1))

    @staticmethod
    def _total(config: PreTrainedConfig, target: Target) -> int:
        return parameter_counts(slimmed_config(config, target)).total

    def of(self, experts: int, width: int, groups: int) -> tuple[int, int]:
        """`(total, active)` of a shape."""
        shape = self.shape
        gone = self.per_group * (shape.kv_groups - groups) + self.per_expert * (shape.num_experts - experts)
        total = self.whole.total - gone - self.per_neuron * (shape.num_experts * shape.expert_width - experts * width)
        return total, total - (self.per_neuron * width + self.besides) * (experts - shape.top_k)

    def widest(self, experts: int, groups: int, limits: Limits) -> int | None:
        """The widest experts that so many of them and so many groups leave room for; None where there is none."""
        found = len(self.widths)
        for place, limit in enumerate(limits):
            if limit is not None:
                sizes = [self.of(experts, width, groups)[place] for width in self.widths]
                found = min(found, bisect_right(sizes, limit))
        return self.widths[found - 1] if found else None

    def nearest(self, limits: Limits) -> Target:
        """The largest shape within limits, of those with most experts and groups; `Sizes.limits` knows that there is one.

        Args:
            limits: Most parameters.
        """
        shapes = [
            (width is not None, experts, groups, width)
            for experts in self.experts
            for groups in self.groups
            for width in [self.widest(experts, groups, limits)]
        ]
        fits, experts, groups, width = max(shapes, key=lambda shape: shape[:3])
        assert fits
        return Target(num_experts=experts, expert_width=width, kv_groups=groups)

    def limits(self, budget: int | str | None, active_budget: int | str | None) -> Limits:
        """The most parameters that budgets allow.

        Args:
            budget, active_budget: As `parse_budget` takes them; of all parameters, and of active ones.

        Raises:
            ValueError: As `allowed`, or the model meets them already.
        """
        limits = self.allowed(budget, active_budget)
        if self.met(limits):
            raise ValueError(already_met(self.whole.total, self.whole.active))
        return limits

    def met(self, limits: Limits) -> bool:
        """Whether the model itself keeps within limits."""
        return self.widest(self.shape.num_experts, self.shape.kv_groups, limits) == self.shape.expert_width

    def allowed(self, budget: int | str | None, active_budget: int | str | None) -> Limits:
        """As `limits`, of a model that may meet them already.

        Raises:
            ValueError: None is given, as `parse_budget`, or no shape meets them.
        """
        if budget is None and active_budget is None:
            raise ValueError("a search needs a budget, of all parameters or of active ones, such as 7.6B or 0.25x.")
        limits = Limits(
            None if budget is None else parse_budget(budget, self.whole.total, "budget"),
            None if active_budget is None else parse_budget(active_budget, self.whole.active, "active budget"),
        )
        least = self.experts[0], self.widths[0], self.groups[0]
        for name, have, limit in zip(("budget", "active budget"), self.of(*least), limits, strict=True):
            if limit is not None and have > limit:
                raise ValueError(
                    f"the {name} of {limit:,} parameters cannot be met: the smallest shape ({least[0]} experts of width "
                    f"{least[1]}, key/value groups: {least[2]}) has {have:,}. Ask for that or more."
                )
        return limits


def already_met(total: int, active: int, at_most: str = "") -> str:
    """What is wrong with a budget that a model meets as it is.

    Args:
        total, active: Parameters of the model.
        at_most: Said before them.
    """
    return f"the budget is met already: the model has {at_most}{total:,} parameters, {active:,} of them active. Ask for fewer."
