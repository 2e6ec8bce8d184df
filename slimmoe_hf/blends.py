"""How the experts of a layer become fewer by averaging: which goes where, how much of it, and in which order of neurons.

Shape letters: E experts, E' the merged experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

KINDS = {"owner": torch.int32, "weight": torch.float32, "order": torch.int32}
"""The tensors of a blend in a file, and what they are stored in."""


class Merging(BaseModel):
    """How it was decided which experts are averaged.

    Attributes:
        similarity, grouping, reference, counts: As `merging.plan_merge` takes them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    similarity: str
    grouping: str
    reference: str
    counts: str = "uniform"


@dataclass(frozen=True)
class Blend:
    """What the merged experts of one layer are made of.

    Attributes:
        owner: `[E]`, which merged expert each one goes into.
        weight: `[E]`, float32, its share there; the shares of a merged expert add up to 1.
        order: `[E, F]`, which of its neurons stands at each place of the merged expert.
    """

    owner: Tensor
    weight: Tensor
    order: Tensor

    def members(self, merged: int) -> list[int]:
        """The experts that go into one."""
        return torch.nonzero(self.owner == merged).flatten().tolist()

    @property
    def number(self) -> int:
        """E'."""
        return int(self.owner.max()) + 1

    def each(self, weights: Sequence[Tensor], order: Tensor, axis: int) -> Iterator[Tensor]:
        """One weight of every merged expert, E' of them in order, in its own dtype.

        Args:
            weights: Of the experts, E of them or `[E, ...]`. order: `[E, ...]`, places along the neuron axis.
            axis: The neuron axis of one expert.
        """
        for number in range(self.number):
            members = self.members(number)
            parts = ((weights[e].detach(), float(self.weight[e]), order[e]) for e in members)
            yield blended(parts, axis).to(weights[members[0]].dtype)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        return {kind: getattr(self, kind).to(dtype).contiguous() for kind, dtype in KINDS.items()}

    def check(self, experts: int, merged: int, width: int, where: str) -> None:
        """Raise ValueError unless every index fits, and the shares add up."""
        shapes = (tuple(self.owner.shape), tuple(self.weight.shape), tuple(self.order.shape))
        sound = shapes == ((experts,), (experts,), (experts, width))
        sound = sound and sorted(set(self.owner.tolist())) == list(range(merged))
        sound = sound and bool((self.order.sort(-1).values == torch.arange(width)).all())
        if sound:
            sums = torch.zeros(merged).scatter_add_(0, self.owner.long(), self.weight)
            sound = bool((self.weight >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all())
        if not sound:
            raise ValueError(
                f"{where}: not a merging of {experts} experts of width {width} into {merged}. Make it again."
            )


def blended(members: Iterable[tuple[Tensor, float, Tensor]], axis: int) -> Tensor:
    """The weighted sum of one weight of some experts, float32; in memory and on disk the same to the last bit.

    Args:
        members: The weight, its share, and the places along `axis` that it is taken from; in the order of the experts.
        axis: Of the neurons.
    """
    total: Tensor | None = None
    for weight, share, order in members:
        part = weight.index_select(axis, order.to(weight.device)).float() * share
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
