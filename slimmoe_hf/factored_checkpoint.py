"""Factored models on disk: the kept rows of S alone, exact to the bit; otherwise as every form of our own (`own_form`).

In `model.safetensors` every matrix W of a factored expert is four tensors, `W.left`, `W.right`, `W.rows` and `W.index`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from slimmoe_hf.own_form import OwnForm, class_of, distinct, fill, read_config, read_tensors, skeleton, write_form
from slimmoe_hf.shared_checkpoint import SharedModel
from slimmoe_hf.shared_experts import is_shared

_GUARD = "the experts here are factored; load them with slimmoe_hf.factored_checkpoint.load_factored(folder)"


class FactoredModel(OwnForm):
    """What a model becomes with its experts factored: the same class, that saves and loads its own form.

    `save_pretrained` writes the packed form, so that every Trainer's checkpoints are exact, and `from_pretrained` reads
    it, with all rows of S trainable.
    """

    def save_form(self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None) -> None:
        """As `save_factored`."""
        assert isinstance(self, PreTrainedModel)
        save_factored(self, folder, state_dict)

    @classmethod
    def load_form(cls, folder: str | os.PathLike[str], dtype: str | torch.dtype | None) -> PreTrainedModel:
        """As `load_factored(folder, regrow=True)`."""
        return load_factored(folder, regrow=True, dtype=dtype, stock=cls.stock)


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
    tensors = distinct(model, model.state_dict() if state_dict is None else state_dict)
    for name, weight in factored_weights(model).items():
        if isinstance(weight, FactoredWeight):
            sparse = tensors.pop(f"{name}.sparse")
            tensors |= dict(zip((f"{name}.{part}" for part in PACKED), pack(sparse), strict=True))
    write_form(model, folder, FACTORED, _GUARD, tensors)


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
    config, entry = read_config(folder, FACTORED, "factored")
    model = skeleton(config, entry, stock, folder)
    tensors = read_tensors(folder, dtype, model)
    weights = _weights(model, tensors, regrow, folder)
    try:
        install(model, weights)
    except KeyError as error:
        raise ValueError(f"{folder}: does not hold the weights of this model: no {error.args[0]}.") from error
    fill(model, entry, tensors, folder)
    if is_shared(config):
        model.__class__ = class_of(SharedModel, type(model))
    model.__class__ = class_of(FactoredModel, type(model))
    return model


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
