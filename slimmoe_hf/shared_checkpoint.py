"""Models with shared experts on disk: every merged expert once, exact; otherwise as every form of our own (`own_form`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimmoe_hf.own_form import (
    OwnForm,
    class_of,
    distinct,
    fill,
    read_config,
    read_tensors,
    skeleton,
    stock_of,
    write_form,
)
from slimmoe_hf.shared_config import SHARED

_GUARD = (
    "the experts here are shared; import slimmoe_hf and load them with AutoModelForCausalLM or AutoModelForSeq2SeqLM, or with "
    "slimmoe_hf.shared_checkpoint.load_shared(folder)"
)


class SharedModel(OwnForm):
    """What a model becomes with experts that rows of its routers share: the same class, that saves and loads its own form."""

    def save_form(self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None) -> None:
        """As `save_shared`."""
        assert isinstance(self, PreTrainedModel)
        save_shared(self, folder, state_dict)

    @classmethod
    def load_form(cls, folder: str | os.PathLike[str], dtype: str | torch.dtype | None) -> PreTrainedModel:
        """As `load_shared`."""
        return load_shared(folder, dtype=dtype, stock=cls.stock)


def save_shared(
    model: PreTrainedModel, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model with shared experts: each of them once, and the table of groups in `config.json`.

    Args:
        model: From `merged_forms.share_merged` or `load_shared`.
        folder: Made if need be; what is there under the same names is replaced, each file in one step.
        state_dict: The weights, where they are not to be read from the model.

    Raises:
        ValueError: The model's experts are not shared.
    """
    if not isinstance(model, SharedModel):
        raise ValueError(f"a {type(model).__name__} has no shared experts: call share_merged(model, plan) first.")
    tensors = distinct(model, model.state_dict() if state_dict is None else state_dict)
    write_form(model, folder, SHARED, _GUARD, tensors, SHARED)


def load_shared(
    folder: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    stock: type[PreTrainedModel] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load what `save_shared` or a Trainer of a model with shared experts wrote: the same weights, bit for bit, in eval mode.

    Args:
        folder: Where it is.
        dtype: Of the weights; None leaves each as it was saved.
        stock: The class that it is one of, where transformers does not have it.
        changes: Keys of the config that are to be other than saved.

    Raises:
        ValueError: It is no such checkpoint, is of another version, or does not hold exactly this model's weights.
    """
    folder = Path(folder)
    config, entry = read_config(folder, SHARED, "shared", changes)
    model = skeleton(config, entry, stock, folder)
    fill(model, entry, read_tensors(folder, dtype, model), folder)
    model.__class__ = class_of(SharedModel, stock_of(type(model)))
    return model
