"""Output projections that were solved anew for what a cut left of their inputs, as a plan carries them.

Shape letters: E' experts kept, F' width kept, D model width, H' query heads kept, C head width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from slimmoe_hf.families import ExpertLayout, Shape

REPAIR_KINDS = ("down_proj", "o_proj")
"""The tensors of a repair in a plan's file; each has its layer behind it."""


class Repairing(BaseModel):
    """What the weights were solved with.

    Attributes:
        ridge: Of the least squares, as a share of the mean square of the kept inputs.
        tokens: Of text, padding excluded.
        data_sha256: The text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ridge: float
    tokens: int
    data_sha256: str


@dataclass(frozen=True)
class Repairs:
    """The weights themselves, whole; every layer that is cut has its own.

    They are in the dtype of the weights that they were solved from: `E' * D * F'` values a layer, and `D * H' * C` where
    groups are dropped.

    Attributes:
        down_proj: Absolute layer index -> `[E', D, F']`, in place of the slices (or the averages) of `W_down`.
        o_proj: Absolute layer index -> `[D, H' * C]`, in place of the slice of `o_proj`.
    """

    down_proj: Mapping[int, Tensor] = field(default_factory=dict)
    o_proj: Mapping[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        kinds = {"down_proj": self.down_proj, "o_proj": self.o_proj}
        return {f"{kind}.{layer}": weight for kind, found in kinds.items() for layer, weight in sorted(found.items())}

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(weight.nbytes for weight in self.tensors().values())

    def down(self, layer: int, layout: ExpertLayout) -> Tensor | None:
        """`down_proj` of a layer, each expert as `layout` has it; None where the plan has none of its own."""
        found = self.down_proj.get(layer)
        return found.mT if found is not None and layout.transposed else found

    def check_size(self, size: int) -> None:
        """Raise ValueError unless the weights of experts have `size` outputs, as the model's own have."""
        for layer, weight in self.down_proj.items():
            if weight.shape[1] != size:
                raise ValueError(
                    f"plan down_proj.{layer}: has {weight.shape[1]} outputs, the model's experts have {size}."
                )

    def check(self, experts: Mapping[int, int], groups: Collection[int], after: Shape) -> None:
        """Raise ValueError unless every layer that is cut has its finite weights, of the shapes that the cut leaves.

        Args:
            experts: Layers whose experts are narrowed or merged -> E' of each.
            groups: Layers that lose key/value groups.
            after: The sizes that the plan ends with.
        """
        sizes = [weight.shape[1] for weight in self.down_proj.values() if weight.dim() == 3]
        down = (sizes[0] if sizes else after.hidden_size, after.expert_width)
        out = (after.hidden_size, after.query_heads * after.head_width)
        wanted: dict[str, tuple[int, ...]] = {
            f"down_proj.{layer}": (number, *down) for layer, number in experts.items()
        }
        wanted |= {f"o_proj.{layer}": out for layer in groups}
        found = self.tensors()
        if stray := sorted(wanted.keys() ^ found.keys()):
            raise ValueError(f"plan repairs: {stray[0]} is {'not' if stray[0] in wanted else 'no part'} of the repair.")
        for name, weight in found.items():
            if tuple(weight.shape) != wanted[name] or not weight.is_floating_point():
                raise ValueError(f"plan {name}: expected weights {wanted[name]}, found {tuple(weight.shape)}.")
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"plan {name}: holds values that are not finite. Make the plan again.")
