"""What a checkpoint of a model must hold, and where it holds it, without loading it.

Published checkpoints store one linear projection per expert; transformers can also save an expert module fused, as it
is in memory. Names here are always the published ones, and a `Part` says where such a weight lies in either layout.

Shape letters: E experts, F expert width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from slimmoe_hf.families import family_of, layer_views
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
    """Published name -> shape of every weight that plain transformers wants of a checkpoint.

    Raises:
        ValueError: As `family_of`.
    """
    family, model = family_of(config), meta_model(config)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: shape for name, shape in tensors.items() if name not in model.all_tied_weights_keys}
    if family.layout.unit is not None:  # the names in memory are the published ones
        return tensors
    for view in layer_views(model):
        if view.experts is None:
            continue
        prefix, gate = view.paths.feed_forward, family.disk.gate
        assert gate is not None, "such a family needs its own names here"
        experts, width, hidden = _fused(tensors, prefix, family.experts, family.layout.gate_up, family.layout.down)
        for expert in range(experts):
            tensors[f"{prefix}.{gate.format(expert)}"] = (width, hidden)
            tensors[f"{prefix}.{family.disk.up.format(expert)}"] = (width, hidden)
            tensors[f"{prefix}.{family.disk.down.format(expert)}"] = (hidden, width)
        router = tensors.pop(f"{prefix}.{family.router}.weight")
        tensors[f"{prefix}.{family.disk.router}"] = router
    return tensors


def _fused(
    tensors: dict[str, tuple[int, ...]], prefix: str, experts: str, gate_up: str, down: str
) -> tuple[int, int, int]:
    """E, F and D of a layer; its fused tensors are taken out."""
    number, hidden, width = tensors.pop(f"{prefix}.{experts}.{down}")
    del tensors[f"{prefix}.{experts}.{gate_up}"]
    return number, width, hidden


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
    renamed = _fused_parts(config, stored)
    parts = []
    for name, shape in expected_shapes(config).items():
        if name not in stored and name not in renamed:
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


def _fused_parts(
    config: PreTrainedConfig, stored: Mapping[str, Stored]
) -> dict[str, tuple[Stored, int, tuple[int, ...]]]:
    """Published name -> tensor, first element and shape, of weights that lie fused or under their name in memory."""
    family, found = family_of(config), {}
    layout, gate = family.layout, family.disk.gate
    if layout.unit is not None:
        return {}
    assert gate is not None and layout.gated and not layout.transposed and not layout.interleaved, (
        "such a family needs its own regions here"
    )
    for paths in family.paths(config):
        prefix = paths.feed_forward
        router = stored.get(f"{prefix}.{family.router}.weight")
        if router is not None:
            found[f"{prefix}.{family.disk.router}"] = (router, 0, router.shape)
        gate_up = stored.get(f"{prefix}.{family.experts}.{layout.gate_up}")
        down = stored.get(f"{prefix}.{family.experts}.{layout.down}")
        if gate_up is not None and len(gate_up.shape) == 3:
            experts, rows, hidden = gate_up.shape
            half = rows // 2 * hidden
            for expert in range(experts):
                for number, name in enumerate((gate, family.disk.up)):
                    region = (gate_up, (2 * expert + number) * half, (rows // 2, hidden))
                    found[f"{prefix}.{name.format(expert)}"] = region
        if down is not None and len(down.shape) == 3:
            experts, hidden, width = down.shape
            for expert in range(experts):
                found[f"{prefix}.{family.disk.down.format(expert)}"] = (down, expert * hidden * width, (hidden, width))
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
