"""What a checkpoint of a model must hold, and where it holds it, without loading it.

Published checkpoints store one linear projection per expert; transformers can also save an expert module fused, as it
is in memory. Names here are always the published ones, and a `Part` says where such a weight lies in either layout.

Shape letters: E experts, F expert width, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from slimmoe_hf.families import Family, family_of
from slimmoe_hf.shards import DTYPES, Buffer, Stored, read_tensor
from slimmoe_hf.shared_experts import GROUPS, is_shared, keep_space

_SCALE = "_scale_inv"
_DEQUANTISED = ("fp8",)


@dataclass(frozen=True)
class Part:
    """One weight by its published name, and the region of a stored tensor that holds it.

    Attributes:
        name: Published name. stored: The tensor it lies in.
        first: Element of that tensor that it starts at. shape: Its own.
        scale: What an FP8 weight is to be multiplied with; None for others.
        block: Rows and columns that one of its scales is for; None where there is one for all.
    """

    name: str
    stored: Stored
    first: int
    shape: tuple[int, ...]
    scale: Stored | None = None
    block: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What `read_part` makes of it."""
        return torch.bfloat16 if self.scale is not None else DTYPES[self.stored.dtype]


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that makes the whole model of a config: with an encoder where it has one."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with no weights, on the meta device; its experts shared where the config says so."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config)
    except (KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"config.json: no {config.model_type} model can be built from it ({type(error).__name__}: {error})."
        ) from error
    if is_shared(config):
        keep_space(model, config.to_dict()[GROUPS])
    return model


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a model consists of, each expert's apart.

    Names are the published ones, but for experts that lie in one tensor on disk: see `families.DiskNames.fused`.

    Raises:
        ValueError: As `family_of`.
    """
    family, model = family_of(config), meta_model(config)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: shape for name, shape in tensors.items() if name not in model.all_tied_weights_keys}
    if family.layout.unit is not None:  # the names in memory are the published ones
        return tensors
    found = {}
    for name, shape in tensors.items():
        if (experts := experts_in(family, name)) is None:
            found[published_name(family, name)] = shape
            continue
        for expert in range(shape[0]):
            for piece, _, own in experts.pieces(shape):
                found[piece.format(expert)] = own
    return found


def published_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that plain transformers wants of a checkpoint.

    Raises:
        ValueError: As `family_of`.
    """
    family, found = family_of(config), {}
    if not family.disk.fused:
        return expected_shapes(config)
    model = meta_model(config)
    for name, tensor in model.state_dict().items():
        experts = experts_in(family, name)
        if name not in model.all_tied_weights_keys:
            new = (
                published_name(family, name)
                if experts is None
                else family.disk.whole(experts.pieces(tensor.shape)[0][0])
            )
            found[new] = tuple(tensor.shape)
    return found


class ExpertsWeight(NamedTuple):
    """One weight of all experts of a layer, as it is in memory.

    Attributes:
        prefix: Path of the layer on disk. names: Published, of what an expert's share of it consists of.
    """

    prefix: str
    names: tuple[str, ...]

    def pieces(self, shape: Sequence[int]) -> list[tuple[str, int, tuple[int, ...]]]:
        """Published name (`{}` is the expert's number), first row in the expert's share, and shape of each."""
        rows, *rest = shape[1:]
        each = rows // len(self.names)
        return [(f"{self.prefix}.{name}", number * each, (each, *rest)) for number, name in enumerate(self.names)]


def experts_in(family: Family, name: str) -> ExpertsWeight | None:
    """What a weight of the model is to the experts of its layer; None where it is no expert's."""
    layout, disk = family.layout, family.disk
    stacks = [stack for stack in family.stacks if name.startswith(f"{stack.layers}.")]
    if not stacks:
        return None
    layer, _, within = name.removeprefix(f"{stacks[0].layers}.").partition(".")
    weight = within.removeprefix(f"{family.experts}.")
    into = (disk.up,) if disk.gate is None else (disk.gate, disk.up)
    parts: dict[str | None, tuple[str, ...]] = {layout.gate_up: into, layout.down: (disk.down,)}
    parts |= {layout.gate_up_bias: (disk.up_bias or "",), layout.down_bias: (disk.down_bias or "",)}
    if weight == within or weight not in parts:
        return None
    return ExpertsWeight(family.rooted(f"{stacks[0].layers}.{layer}"), parts[weight])


def published_name(family: Family, name: str) -> str:
    """The published name of a weight that is no expert's, from its name in memory."""
    for stack in family.stacks:
        if name.startswith(f"{stack.layers}."):
            layer, _, within = name.removeprefix(f"{stack.layers}.").partition(".")
            return family.rooted(f"{stack.layers}.{layer}.{family.published(within)}")
    return family.rooted(name)


def locate(config: PreTrainedConfig, stored: Mapping[str, Stored], where: str) -> dict[str, Part]:
    """Find every weight that a model needs among the tensors of its checkpoint, in either layout.

    Args:
        config: The model's.
        stored: From the headers of its files.
        where: The checkpoint, for errors.

    Returns:
        Published name -> part, in the order in which they lie on disk. Tensors that the model has no use for are left
        out.

    Raises:
        ValueError: A weight is missing or of another shape than the config says, or the checkpoint is quantised in a
            way that cannot be undone here.
    """
    quantised = refuse_quantised(config, where)
    sizes = config.to_dict()["quantization_config"].get("weight_block_size") if quantised else None
    block = (int(sizes[0]), int(sizes[1])) if sizes else None
    renamed = _other_parts(config, stored)
    parts = []
    for name, shape in expected_shapes(config).items():
        if name not in renamed and name not in stored:
            raise ValueError(f"{where}: {name} is not in the weight files. Fetch the checkpoint again.")
        tensor, first, found = renamed.get(name) or (stored[name], 0, stored[name].shape)
        if found != shape:
            raise ValueError(
                f"{where}: {name} in {tensor.file} is {list(found)}, config.json says {list(shape)}. Bring the two that "
                "belong together."
            )
        scale = stored.get(f"{tensor.name}{_SCALE}") if quantised else None
        if tensor.dtype not in DTYPES or not (DTYPES[tensor.dtype].is_floating_point):
            raise ValueError(f"{where}: {name} in {tensor.file} has the dtype {tensor.dtype}, which is no weight's.")
        if tensor.dtype.startswith("F8") and scale is None:
            raise ValueError(
                f"{where}: {name} is FP8 without {tensor.name}{_SCALE} or a quantization_config of the method fp8, so it "
                "cannot be undone here. Start from the unquantised checkpoint."
            )
        parts.append(Part(name, tensor, first, shape, scale, block if scale is not None else None))
    parts.sort(key=lambda part: (part.stored.file, part.stored.begin, part.first))
    return {part.name: part for part in parts}


def refuse_quantised(config: PreTrainedConfig, where: str) -> bool:
    """Whether the weights are quantised in a form that is undone while reading (FP8).

    Raises:
        ValueError: They are quantised in another form; it is named.
    """
    values = config.to_dict().get("quantization_config")
    if not values:
        return False
    if not isinstance(values, dict):
        raise ValueError(f"{where}: config.json: quantization_config should be keys and values, found {values!r:.60}.")
    method = str(values.get("quant_method", "unknown"))
    if method not in _DEQUANTISED:
        raise ValueError(
            f"{where}: its weights are quantised ({method}), and neurons cannot be cut out of packed weights. Start "
            "from the unquantised checkpoint, and quantise the slimmed model."
        )
    return True


def _other_parts(
    config: PreTrainedConfig, stored: Mapping[str, Stored]
) -> dict[str, tuple[Stored, int, tuple[int, ...]]]:
    """Name -> tensor, first element and shape, of weights that lie fused or under their name in memory."""
    family, found = family_of(config), {}
    if family.layout.unit is not None:
        return {}
    wholes = {}
    if family.disk.fused:
        pieces = [(family.disk.whole(piece.name), piece.name) for piece in family.pieces]
        wholes = {f"{at.disk}.{whole}": f"{at.disk}.{name}" for at in family.paths(config) for whole, name in pieces}
    for name, tensor in stored.items():
        experts = experts_in(family, name)
        if name in wholes:
            regions = [(wholes[name], 0, tensor.shape[1:])]
        elif experts is None:
            found[published_name(family, name)] = (tensor, 0, tensor.shape)
            continue
        else:
            regions = experts.pieces(tensor.shape) if len(tensor.shape) > 1 else []
        size = math.prod(tensor.shape[1:])
        for piece, row, shape in regions:
            for expert in range(tensor.shape[0]):
                found[piece.format(expert)] = (tensor, expert * size + row * math.prod(shape[1:]), tuple(shape))
    return found


def read_part(folder: Path, part: Part, rows: int | None = None, buffer: Buffer | None = None) -> Tensor:
    """Read a weight, FP8 undone.

    Args:
        folder: Where its file is.
        part: From `locate`.
        rows: Only so many of the first rows; not for FP8.
        buffer: As in `read_tensor`.
    """
    shape = part.shape if rows is None else (rows, *part.shape[1:])
    weight = read_tensor(folder, part.stored, part.first, shape, buffer)
    return weight if part.scale is None else dequantise(weight, read_tensor(folder, part.scale), part.block)


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """An FP8 weight times its scales, in bfloat16.

    Args:
        weight: `[rows, columns]`.
        scale: One per block, `[ceil(rows / b), ceil(columns / c)]`, or one for all.
        block: `(b, c)`; None where there is one scale for all.

    Raises:
        ValueError: There are not as many scales as blocks.
    """
    (rows, columns), (down, across) = weight.shape, block or weight.shape
    expected = (-(-rows // down), -(-columns // across))
    if scale.numel() != expected[0] * expected[1]:
        raise ValueError(f"an FP8 weight of [{rows}, {columns}] has {list(scale.shape)} scales, not {list(expected)}.")
    grid = scale.float().reshape(expected).repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
    return (weight.float() * grid).to(torch.bfloat16)


def check_tied(config: PreTrainedConfig, stored: Mapping[str, Stored], folder: Path) -> None:
    """Raise ValueError where a config ties two weights and the files hold different ones: transformers does not tie them."""
    for name, other in meta_model(config).all_tied_weights_keys.items():
        if name in stored and other in stored:
            rows = torch.equal(read_tensor(folder, stored[name]), read_tensor(folder, stored[other]))
            if not rows:
                raise ValueError(
                    f"{folder}: config.json ties {name} to {other}, and the files hold different ones. Set "
                    "tie_word_embeddings to false, or leave one out."
                )
