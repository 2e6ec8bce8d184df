"""Output projections that were solved anew for what a cut left of their inputs, as a plan carries them.

Together they may be larger than memory: those of a plan that was read, or of a model that was streamed, stay in their files,
and whoever wants one reads it.

Shape letters: E' experts kept, F' width kept, D model width, H' query heads kept, C head width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from slimmoe_hf.families import ExpertLayout, Shape
from slimmoe_hf.shards import DTYPES, ShardWriter, Stored, read_header, read_tensor

FILE = "repairs.safetensors"
"""Where they lie in a plan's folder."""

REPAIR_KINDS = ("down_proj", "o_proj")
"""The tensors of a repair in a plan's file; each has its layer behind it."""


class Repairing(BaseModel):
    """What the weights were solved with.

    Attributes:
        ridge: Of the least squares, as a share of the mean square of the kept inputs.
        tokens: Of text, padding excluded.
        data_sha256: The text.
        sha256: The weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ridge: float
    tokens: int
    data_sha256: str
    sha256: str


Size = tuple[torch.dtype, tuple[int, ...]]
"""What a weight is in, and its shape."""


class Held(dict[int, Tensor]):
    """Weights in memory, by layer."""

    def size(self, layer: int) -> Size:
        """Of a layer's."""
        return self[layer].dtype, tuple(self[layer].shape)

    def part(self, layer: int, number: int) -> Tensor:
        """One along the first axis."""
        return self[layer][number]


class Filed(Mapping[int, Tensor]):
    """Weights in files, by layer; what is asked for is read."""

    def __init__(self, places: Mapping[int, tuple[Path, Stored]]) -> None:
        """Take note of where they are.

        Args:
            places: Layer -> a folder, and where in a file there.
        """
        self._places = places

    def __getitem__(self, layer: int) -> Tensor:
        return self._read(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, layer: object) -> bool:
        return layer in self._places

    def size(self, layer: int) -> Size:
        """As `Held.size`; nothing is read."""
        stored = self._places[layer][1]
        return DTYPES[stored.dtype], stored.shape

    def part(self, layer: int, number: int) -> Tensor:
        """As `Held.part`; only that is read."""
        shape = self._places[layer][1].shape[1:]
        return self._read(layer, number * torch.Size(shape).numel(), shape)

    def _read(self, layer: int, first: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        folder, stored = self._places[layer]
        try:
            return read_tensor(folder, stored, first, shape)
        except OSError as error:
            raise ValueError(
                f"{folder / stored.file}: moved or deleted since its plan was read ({error.strerror}). Load the plan again."
            ) from error


@dataclass(frozen=True)
class Repairs:
    """The weights themselves; every layer that is cut has its own.

    They are in the dtype of the checkpoint's: `E' * D * F'` values a layer, and `D * H' * C` where groups are dropped.

    Attributes:
        down_proj: Absolute layer index -> `[E', D, F']`, in place of the slices (or the averages) of `W_down`.
        o_proj: Absolute layer index -> `[D, H' * C]`, in place of the slice of `o_proj`.
        where: They lie, for errors.
    """

    down_proj: Held | Filed = field(default_factory=Held)
    o_proj: Held | Filed = field(default_factory=Held)
    where: str = "plan repairs"

    @classmethod
    def filed(cls, places: Mapping[str, tuple[Path, Stored]], where: str) -> Repairs:
        """Those that lie in files.

        Args:
            places: Name, such as `down_proj.3`, -> a folder, and where in a file there.
            where: What to call that in errors.

        Raises:
            ValueError: A name that no repair has, or a dtype that torch has not.
        """
        kinds: dict[str, dict[int, tuple[Path, Stored]]] = {kind: {} for kind in REPAIR_KINDS}
        for name, (folder, stored) in places.items():
            kind, _, layer = name.partition(".")
            if kind not in kinds or not layer.isdecimal():
                raise ValueError(f"{where}: unknown tensor {name}.")
            if stored.dtype not in DTYPES:
                raise ValueError(f"{where}: {name} has the dtype {stored.dtype}, which is not read here.")
            kinds[kind][int(layer)] = folder.resolve(), stored  # wherever this process goes before it reads them
        return cls(Filed(kinds["down_proj"]), Filed(kinds["o_proj"]), where)

    @classmethod
    def load(cls, folder: Path) -> Repairs:
        """Those in a plan's folder; of their file only the header is read.

        Raises:
            ValueError: They are not there, cut short, or no repairs.
        """
        try:
            header = read_header(folder / FILE)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / FILE}: missing or damaged ({error}). Make the plan again.") from error
        return cls.filed({name: (folder, stored) for name, stored in header.items()}, str(folder / FILE))

    def save(self, folder: Path) -> None:
        """Write them into a plan's folder, a layer in memory at a time."""
        writer = ShardWriter(folder / FILE, self.sizes)
        try:
            for name, (weights, layer) in self._each().items():
                writer.add(name, weights[layer])
            writer.close()
        except BaseException:
            writer.abandon()
            raise

    def __bool__(self) -> bool:
        return bool(self.down_proj or self.o_proj)

    def _each(self) -> dict[str, tuple[Held | Filed, int]]:
        """By the names in the file, where each is to be had."""
        kinds = zip(REPAIR_KINDS, (self.down_proj, self.o_proj), strict=True)
        return {f"{kind}.{layer}": (weights, layer) for kind, weights in kinds for layer in sorted(weights)}

    @property
    def sizes(self) -> dict[str, Size]:
        """Of all weights, by their names in the file; nothing is read."""
        return {name: weights.size(layer) for name, (weights, layer) in self._each().items()}

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.sizes.values())

    @property
    def sha256(self) -> str:
        """Hash of all weights, whether in memory or in files: all of them are read, one expert at a time."""
        digest = hashlib.sha256()
        for name, (weights, layer) in self._each().items():
            dtype, shape = weights.size(layer)
            digest.update(f"{name} {dtype} {list(shape)}\n".encode())
            parts = (weights.part(layer, number) for number in range(shape[0])) if len(shape) > 2 else [weights[layer]]
            for part in parts:
                digest.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def down(self, layer: int, layout: ExpertLayout) -> Tensor | None:
        """`down_proj` of a layer, each expert as `layout` has it; None where the plan has none of its own."""
        found = self.down_proj.get(layer)
        return found.mT if found is not None and layout.transposed else found

    def check_size(self, size: int) -> None:
        """Raise ValueError unless the weights of experts have `size` outputs, as the model's own have."""
        for layer in self.down_proj:
            outputs = self.down_proj.size(layer)[1][1]
            if outputs != size:
                raise ValueError(f"plan down_proj.{layer}: has {outputs} outputs, the model's experts have {size}.")

    def check_same(self, repairing: Repairing | None) -> None:
        """Raise ValueError unless these are the weights that were solved; all of them are read, one expert at a time."""
        if self and (repairing is None or repairing.sha256 != self.sha256):
            raise ValueError(
                f"{self.where}: not the weights that were solved: damaged, or of another plan. Make the plan again."
            )

    def check(self, experts: Mapping[int, int], groups: Collection[int], after: Shape) -> None:
        """Raise ValueError unless every layer that is cut has its weights, of the shapes that the cut leaves.

        Args:
            experts: Layers whose experts are narrowed or merged -> E' of each.
            groups: Layers that lose key/value groups.
            after: The sizes that the plan ends with.
        """
        shapes = [self.down_proj.size(layer)[1] for layer in self.down_proj]
        sizes = [shape[1] for shape in shapes if len(shape) == 3]
        down = (sizes[0] if sizes else after.hidden_size, after.expert_width)
        out = (after.hidden_size, after.query_heads * after.head_width)
        wanted: dict[str, tuple[int, ...]] = {
            f"down_proj.{layer}": (number, *down) for layer, number in experts.items()
        }
        wanted |= {f"o_proj.{layer}": out for layer in groups}
        found = self.sizes
        if stray := sorted(wanted.keys() ^ found.keys()):
            raise ValueError(f"plan repairs: {stray[0]} is {'not' if stray[0] in wanted else 'no part'} of the repair.")
        for name, (dtype, shape) in found.items():
            if shape != wanted[name]:
                raise ValueError(f"plan {name}: expected weights {wanted[name]}, found {shape}.")
            if not dtype.is_floating_point:
                raise ValueError(f"plan {name}: expected weights that are floats, found {str(dtype).split('.')[1]}.")
