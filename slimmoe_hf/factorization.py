"""Factor experts into low rank plus structured sparse, and back; how close to low rank they are.

With merging before it this is MC-SMoE (arXiv 2310.01334): `factor_experts`, train with `SparsityCallback`, save.

Shape letters: E experts, O output rows and I inputs of one matrix, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slimmoe_hf.factored import (
    FactoredWeight,
    PackedWeight,
    expert_matrices,
    factorable,
    factored_weights,
    install,
    uninstall,
)
from slimmoe_hf.factored_checkpoint import FactoredModel
from slimmoe_hf.families import family_of
from slimmoe_hf.own_form import class_of

M = TypeVar("M", bound=PreTrainedModel)
RANK = 32
"""The paper's."""


def factor_experts(model: M, rank: int = RANK) -> M:
    """Split every expert matrix into `L R + S`, in place: L and R the best of that rank, S what they leave.

    The function stays the same, to the rounding of the weights' dtype; the model is larger until rows of S go, which is
    `SparsityCallback`'s work. It then saves and loads in a form of its own (`factored_checkpoint`); `densify` leads back.
    In Switch the first sparse encoder layer is left alone (paper). An optimizer made before holds the old parameters.

    Args:
        model: Whole, on real devices, of a family in `FAMILIES`. Experts that were merged and share
            their module or their weights are factored once.
        rank: r, a multiple of 8, less than the smaller side of every matrix.

    Returns:
        The same object, now also a `FactoredModel`.

    Raises:
        ValueError: Another family, a rank that does not fit, a model that is factored already, sharded, quantised or
            without weights. Nothing was changed.
    """
    if isinstance(model, FactoredModel):
        raise ValueError("the experts of this model are factored already. densify(model) undoes it.")
    matrices = expert_matrices(model, factorable(model))
    for path, matrix in matrices.items():
        _refuse(path, matrix, rank)
    owners: dict[int, str] = {}
    first = {path: owners.setdefault(id(matrix), path) for path, matrix in matrices.items()}
    made: dict[str, FactoredWeight] = {}
    with torch.no_grad():
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in first):
            own = [path for path in first if path.rpartition(".")[0] == parent]  # few at a time: dense ones go at once
            for path in own:
                matrix = matrices.pop(path)
                if first[path] not in made:
                    made[first[path]] = FactoredWeight.of(matrix, rank)
            install(model, {path: made[first[path]] for path in own})
    model.__class__ = class_of(FactoredModel, type(model))
    return model


def _refuse(path: str, matrix: Tensor, rank: int) -> None:
    if isinstance(matrix, DTensor):
        raise ValueError("a sharded model cannot be factored: load it whole on every process.")
    if not matrix.is_floating_point() or matrix.is_meta:
        kind = "no weights yet (meta device)" if matrix.is_meta else f"quantised weights ({matrix.dtype})"
        raise ValueError(f"{path}: {kind}, which cannot be factored. Load the model in bfloat16 or float32.")
    check_rank(path, matrix, rank)


def check_rank(path: str, matrix: Tensor, rank: int) -> None:
    """Raise ValueError unless a matrix, which may have no values, can be split at this rank."""
    most = min(matrix.shape[-2:])
    if not 0 < rank < most or rank % 8:
        raise ValueError(
            f"rank={rank} does not fit {path}, {list(matrix.shape)}: give a multiple of 8 (grouped matrix products need "
            f"it in bf16) below {most}."
        )


def densify(model: M) -> M:
    """Multiply factored experts out into stock ones, in place; `save_pretrained` then writes what plain transformers loads.

    Args:
        model: From `factor_experts` or `load_factored`.

    Returns:
        The same object, of its stock class again.

    Raises:
        ValueError: The model is not factored.
    """
    if not isinstance(model, FactoredModel):
        raise ValueError(f"a {type(model).__name__} has no factored experts: it is dense already.")
    uninstall(model)
    model.__class__ = model.stock
    return model


@torch.no_grad()
def stable_rank(weight: Tensor) -> Tensor:
    """`||W||_F^2 / ||W||_2^2`: how many directions a matrix uses, 1 to its rank.

    Args:
        weight: `[..., O, I]`, not all zero.

    Returns:
        `[...]`, float32.
    """
    values = torch.linalg.svdvals(weight.detach().float())
    return values.square().sum(-1) / values[..., 0].square()


def stable_ranks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Stable rank of every expert, by layer and matrix; experts that are one and the same count once.

    Args:
        model: Fused family or Switch, factored or not.

    Returns:
        Path of the experts module and name of the matrix (`...mlp.experts.down_proj`, `...mlp.experts.wi`) -> `[E]`.
    """
    found: dict[str, list[Tensor]] = {}
    matrices, seen = expert_matrices(model), set[int]()
    for path, matrix in matrices.items():
        parts = path.split(".")
        if family_of(model.config).layout.unit is not None:
            del parts[-2]  # the expert's own name
        if id(matrix) in seen:
            continue
        seen.add(id(matrix))
        dense = matrix.dense() if isinstance(matrix, (FactoredWeight, PackedWeight)) else matrix
        found.setdefault(".".join(parts), []).append(stable_rank(dense).flatten())
    return {name: torch.cat(ranks) for name, ranks in found.items()}


class StableRankChange(BaseModel):
    """Mean stable rank of one layer's experts before and after, of one matrix.

    Attributes:
        name: As in `stable_ranks`. experts_before, experts_after: How many there were.
        before, after: The means over them. change: `(after - before) / before`; the paper finds it mostly negative after
            merging, its reason why merged experts bear a low rank.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    experts_before: int
    experts_after: int
    before: float
    after: float
    change: float


def compare_stable_ranks(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[StableRankChange]:
    """Stable ranks of two models of one architecture, such as before and after merging, side by side.

    Args:
        before, after: From `stable_ranks`.

    Raises:
        ValueError: They are not of the same layers.
    """
    if before.keys() != after.keys():
        raise ValueError(f"stable ranks of different layers: {min(before.keys() ^ after.keys())} is in one of the two.")
    rows = []
    for name, old in before.items():
        was, is_ = float(old.mean()), float(after[name].mean())
        rows.append(
            StableRankChange(
                name=name, experts_before=len(old), experts_after=len(after[name]), before=was, after=is_,
                change=(is_ - was) / was,
            )
        )  # fmt: skip
    return rows


def stable_rank_table(rows: list[StableRankChange]) -> str:
    """The comparison as text, a line per layer and matrix."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'experts':{width}}  before        after         change"]
    for row in rows:
        means = f"{row.before:7.2f} ({row.experts_before:3})  {row.after:6.2f} ({row.experts_after:3})"
        lines.append(f"{row.name:{width}}  {means}  {row.change:+7.1%}")
    return "\n".join(lines)


def sparse_density(model: PreTrainedModel) -> float:
    """The share of the elements of all S that are in rows not all zero."""
    kept = whole = 0
    for weight in factored_weights(model).values():
        inputs = weight.right.shape[-1]
        rows = len(weight.index) if isinstance(weight, PackedWeight) else int((weight.sparse != 0).any(-1).sum())
        kept, whole = kept + rows * inputs, whole + weight.left[..., 0].numel() * inputs
    return kept / whole
