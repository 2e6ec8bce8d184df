"""What every method of a comparison leaves of a model, from its config alone, and whether that is the budget.

Shape letters: E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from slimmoe_hf.disk import meta_model
from slimmoe_hf.factored import expert_matrices
from slimmoe_hf.factored_size import count_factored
from slimmoe_hf.factorization import check_rank
from slimmoe_hf.families import shape_of
from slimmoe_hf.grid import Budget, Grid, Method
from slimmoe_hf.limits import possible_experts, possible_widths
from slimmoe_hf.plan import ALIGNMENT, Target
from slimmoe_hf.sizing import expert_parameters, parameter_counts, slimmed_config

TOLERANCE = 0.03
"""How far from its budget a method's size may be, as a share of it (our choice)."""


@dataclass(frozen=True)
class Size:
    """Of what a method leaves.

    Attributes:
        total: Parameters; of the sparse part of factored experts those that are kept.
        active: Those that a token meets: K of E experts, everything else whole.
        shape: `ExF`, and of factored experts rank and density.
    """

    total: int
    active: int
    shape: str

    def of(self, equal: str) -> int:
        """`total` or `active`."""
        return self.total if equal == "total" else self.active


def left_config(config: PreTrainedConfig, method: Method) -> PreTrainedConfig:
    """The config of what a method leaves, factored or not.

    Raises:
        ValueError: As `validate_target`.
    """
    if method.target is not None:
        return slimmed_config(config, method.target)
    if method.merge is not None:
        return slimmed_config(config, Target(num_experts=method.merge.num_experts))
    return config


def size_of_method(config: PreTrainedConfig, method: Method) -> Size:
    """Count what a method leaves.

    Args:
        config: Of the original model.
        method: What is done with it.

    Raises:
        ValueError: A size that the model cannot take.
    """
    after = left_config(config, method)
    shape, total = shape_of(after), parameter_counts(after).total
    experts = expert_parameters(after)
    fixed, words = total - experts, f"{shape.num_experts}x{shape.expert_width}"
    if method.factor is not None:
        rank, density = method.factor.rank, method.factor.density
        for path, matrix in expert_matrices(meta_model(after)).items():
            check_rank(path, matrix, rank)
        total = count_factored(after, shape.num_experts, rank, density).factored
        words += f", r{rank} + {100 * density:.3g}%"
    return Size(total, active_of(total, fixed, after), words)


def active_of(total: int, fixed: int, config: PreTrainedConfig) -> int:
    """The parameters that a token meets, where all but `fixed` of them belong to the experts."""
    shape = shape_of(config)
    return total - (total - fixed) * (shape.num_experts - shape.top_k) // shape.num_experts


def budget_of(config: PreTrainedConfig, budget: Budget) -> int:
    """The number of parameters that all methods of a table are to have."""
    experts, total = expert_parameters(config), parameter_counts(config).total
    shape, allowed = shape_of(config), round(budget.expert_share * experts)
    return total - experts + (allowed if budget.equal == "total" else allowed * shape.top_k // shape.num_experts)


def check_sizes(grid: Grid, config: PreTrainedConfig, where: str) -> dict[tuple[int, int], Size]:
    """The size of every method, held against its table's budget.

    Args:
        grid: What is compared.
        config: Of the original model.
        where: The grid's file, for errors.

    Returns:
        By the numbers of table and method, as `Grid.rows` counts them.

    Raises:
        ValueError: A size that the model cannot take, or one that is off the budget; the line names the nearest.
    """
    found = {}
    for table, number, method in grid.rows():
        budget, place = grid.tables[table], f"tables.{table}.methods.{number} ({method.name})"
        try:
            size = size_of_method(config, method)
        except ValueError as error:
            raise ValueError(f"{where}: {place}: {error}") from error
        wanted, have = budget_of(config, budget), size.of(budget.equal)
        if abs(have - wanted) > TOLERANCE * wanted:
            raise ValueError(
                f"{where}: {place}: {have:,} {budget.equal} parameters, {have / wanted - 1:+.1%} of the table's {wanted:,} "
                f"(expert_share {budget.expert_share:g}); {TOLERANCE:.0%} is allowed. {_nearest(config, method, budget, wanted)}"
            )
        found[table, number] = size
    return found


def _nearest(config: PreTrainedConfig, method: Method, budget: Budget, wanted: int) -> str:
    def have(other: Method) -> int:
        return size_of_method(config, other).of(budget.equal)

    sizes = [(abs(have(other) - wanted), words) for words, other in _others(config, method, wanted, have)]
    difference, words = min(sizes)
    best = f"Nearest: {words}."
    return best if difference <= TOLERANCE * wanted else f"{best} It is off too: change something else as well."


def _others(
    config: PreTrainedConfig, method: Method, wanted: int, have: Callable[[Method], int]
) -> Iterator[tuple[str, Method]]:
    """The method at other sizes, one number of it changed: the finest that it has."""
    shape = shape_of(config)
    if method.factor is not None:
        factor = method.factor

        def at(density: float) -> Method:
            return method.model_copy(update={"factor": factor.model_copy(update={"density": density})})

        low, high = have(at(0.25)), have(at(0.75))
        density = round(min(max(0.25 + 0.5 * (wanted - low) / (high - low), 0.001), 0.999), 3)
        yield f"density {density:g}", at(density)
    elif method.merge is not None:
        for number in range(shape.top_k, shape.num_experts + 1):
            yield (
                f"num_experts {number}",
                method.model_copy(update={"merge": method.merge.model_copy(update={"num_experts": number})}),
            )
    elif method.target is not None:
        name, values = "kv_groups", list(range(1, shape.kv_groups + 1))
        if method.target.expert_width is not None:
            name, values = "expert_width", possible_widths(config, ALIGNMENT)
        elif method.target.num_experts is not None:
            name, values = "num_experts", possible_experts(config)
        for value in values:
            yield (
                f"{name} {value}",
                method.model_copy(update={"target": method.target.model_copy(update={name: value})}),
            )
