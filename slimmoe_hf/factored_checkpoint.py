"""Factored models on disk: the kept rows of S alone, exact to the bit, and never mistaken for a stock checkpoint.

A folder has the usual files. In `model.safetensors` every matrix W of a factored expert is four tensors, `W.left`,
`W.right`, `W.rows` and `W.index`; all others have the names they have in memory, so that a plain `Trainer` resumes from
it. Stock classes would find no experts there and invent some; so `config.json` names, as the weights file to load, none
but the function to call, and `from_pretrained` of every stock class stops at it with that name in the message.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.factored import (
    PACKED,
    FactoredWeight,
    PackedWeight,
    Weight,
    expert_matrices,
    factored_weights,
    install,
    pack,
    unpack,
)
from slimmoe_hf.loading import FACTORED
from slimmoe_hf.shards import SINGLE

_GUARD_KEY = "transformers_weights"
_GUARD = "the experts here are factored; load them with slimmoe_hf.factored_checkpoint.load_factored(folder)"


class FactoredEntry(BaseModel):
    """What `config.json` says of a factored checkpoint.

    Attributes:
        architecture: The stock class that the model is one of.
        aliases: Path of a module -> path of the one that it is the same as (experts that were merged).
        version: Of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    aliases: dict[str, str] = {}
    version: int = 1


class FactoredModel:
    """What a model becomes with its experts factored: the same class, that saves and loads its own form.

    `save_pretrained` writes the packed form, so that every Trainer's checkpoints are exact, and `from_pretrained` reads
    it, with all rows of S trainable.
    """

    stock: ClassVar[type[PreTrainedModel]]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `save_factored`; other arguments of transformers' (shard size, variant) have no meaning here.

        Raises:
            ValueError: `push_to_hub=True`.
        """
        assert isinstance(self, PreTrainedModel)
        if push_to_hub:
            raise ValueError("a factored model is not pushed by save_pretrained: save it, then upload the folder.")
        if is_main_process:
            save_factored(self, save_directory, state_dict)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        local_files_only: bool = True,
    ) -> Any:
        """As `load_factored(folder, regrow=True)`, with the arguments of transformers that apply; always strict."""
        model = load_factored(folder, regrow=True, dtype=dtype, stock=cls.stock)
        report: dict[str, list[Any]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, report) if output_loading_info else model


_CLASSES: dict[Any, Any] = {}


def factored_class(stock: Any) -> Any:
    """The class of a factored model, for the stock class that it was made from; always the same one."""
    if stock not in _CLASSES:
        own = {"stock": stock, "__module__": stock.__module__}
        _CLASSES[stock] = type(f"Factored{stock.__name__}", (FactoredModel, stock), own)
    return _CLASSES[stock]


def save_factored(
    model: PreTrainedModel, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write a factored model, exactly: of every S the rows that are not zero, of everything else all.

    Args:
        model: From `factor_experts` or `load_factored`.
        folder: Made if need be; what is there under the same names is replaced, each file in one step.
        state_dict: The weights, where they are not to be read from the model.

    Raises:
        ValueError: The model is not factored.
    """
    if not isinstance(model, FactoredModel):
        raise ValueError(f"a {type(model).__name__} has no factored experts: call factor_experts(model) first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _distinct(model, dict(model.state_dict() if state_dict is None else state_dict))
    for name, weight in factored_weights(model).items():
        if isinstance(weight, FactoredWeight):
            sparse = tensors.pop(f"{name}.sparse")
            tensors |= dict(zip((f"{name}.{part}" for part in PACKED), pack(sparse), strict=True))
    entry = FactoredEntry(architecture=model.stock.__name__, aliases=_aliases(model))
    values = model.config.to_dict()
    values |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    values |= {_GUARD_KEY: _GUARD, FACTORED: entry.model_dump()}
    with replacing(folder / SINGLE, overwrite=True) as partial:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    if isinstance(model.generation_config, GenerationConfig):
        model.generation_config.save_pretrained(str(folder))


def _distinct(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second names of tied weights, and of modules that are one and the same."""
    doubles = tuple(f"{alias}." for alias in _aliases(model))
    tied = model.all_tied_weights_keys
    return {name: t for name, t in tensors.items() if not (name in tied or (doubles and name.startswith(doubles)))}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second path -> first path of every module that is in the model twice; of those within it only itself."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), name)
        has_weights = next(module.parameters(), None) is not None
        if known != name and has_weights and not any(name.startswith(f"{alias}.") for alias in found):
            found[name] = known
    return found


def load_factored(
    folder: str | os.PathLike[str],
    *,
    regrow: bool = False,
    dtype: str | torch.dtype | None = None,
    stock: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Load what `save_factored` or a Trainer of a factored model wrote: the same weights, bit for bit, in eval mode.

    Args:
        folder: Where it is.
        regrow: Hold every S whole, so that rows left out may come back in training. False holds the kept rows alone.
        dtype: Of the weights; None leaves each as it was saved.
        stock: The class that it is one of, where transformers does not have it.

    Raises:
        ValueError: It is no factored checkpoint, is of another version, or does not hold exactly this model's weights.
    """
    folder = Path(folder)
    config, entry = _read_config(folder)
    model = _skeleton(config, stock or _stock_class(entry, folder))
    tensors = _read_tensors(folder / SINGLE, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    weights = _weights(model, tensors, regrow, folder)
    try:
        install(model, weights)
        for alias, first in entry.aliases.items():
            model.set_submodule(alias, model.get_submodule(first))
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder}: does not hold the weights of this model: {' '.join(str(error).split())}"
        ) from error
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta] + unexpected
    if left:
        kind = "left over" if left[0] in unexpected else "missing"
        raise ValueError(f"{folder / SINGLE}: {left[0]} is {kind} ({len(left)} such). Fetch or make it again.")
    known = (*model.all_tied_weights_keys, *entry.aliases)
    assert all(name.startswith(known) for name in missing), missing
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.__class__ = factored_class(type(model))
    return model.eval()


def _read_tensors(file: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The file's tensors in memory of their own: where they lie in the file, products would round otherwise."""
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read ({error}). Fetch or make it again.") from error
    return {
        name: tensor.to(dtype if tensor.is_floating_point() else None, copy=True) for name, tensor in stored.items()
    }


def _weights(model: PreTrainedModel, tensors: dict[str, Tensor], regrow: bool, folder: Path) -> dict[str, Weight]:
    """The factored matrices of a checkpoint, of the shapes the model has; with `regrow` S is unpacked in `tensors`."""
    found: dict[str, Weight] = {}
    matrices = expert_matrices(model)
    for path in [name.removesuffix(".left") for name in tensors if name.endswith(".left")]:
        left, right, rows, index = (
            tensors.get(f"{path}.{part}", torch.empty(0)) for part in ("left", "right", *PACKED)
        )
        shape = (*left.shape[:-1], right.shape[-1])
        whole = left.shape[-1:] == right.shape[-2:-1] and rows.shape == (len(index), shape[-1])
        if path not in matrices or shape != tuple(matrices[path].shape) or not whole or not _ascending(index, shape):
            raise ValueError(
                f"{folder}: {path} is not what config.json makes of it. Bring the two that belong together."
            )
        if regrow:
            sparse = tensors[f"{path}.sparse"] = unpack(rows, index, shape)
            found[path] = FactoredWeight(left, right, sparse)
            del tensors[f"{path}.rows"], tensors[f"{path}.index"]
        else:
            found[path] = PackedWeight(left, right, rows, index)
    return found


def _ascending(index: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether an index names rows of an S of this shape, each once, in order."""
    bounds = torch.tensor([-1, math.prod(shape[:-1])])
    return index.dtype == torch.int32 and bool((torch.cat([bounds[:1], index, bounds[1:]]).diff() > 0).all())


def _read_config(folder: Path) -> tuple[PreTrainedConfig, FactoredEntry]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entry = FactoredEntry.model_validate(values.pop(FACTORED))
    except (OSError, KeyError, AttributeError, ValueError, ValidationError) as error:
        raise ValueError(
            f"{folder}: not a factored checkpoint of this version of slimmoe_hf (config.json lacks a good {FACTORED!r}). "
            "Stock ones load with from_pretrained."
        ) from error
    if entry.version != 1:
        raise ValueError(f"{folder}: a factored checkpoint of version {entry.version}; this slimmoe_hf reads 1.")
    values.pop(_GUARD_KEY, None)
    values["architectures"] = [entry.architecture]
    return transformers.AutoConfig.for_model(**values), entry


def _stock_class(entry: FactoredEntry, folder: Path) -> type[PreTrainedModel]:
    stock = getattr(transformers, entry.architecture, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise ValueError(f"{folder}: transformers has no model {entry.architecture!r}. Pass its class as stock=.")
    return stock


def _skeleton(config: PreTrainedConfig, stock: type[PreTrainedModel]) -> PreTrainedModel:
    """The model without weights; buffers, which no checkpoint holds, are there."""
    with init_empty_weights(include_buffers=False):
        return stock(config)
