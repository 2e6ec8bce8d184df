"""Weights that are in another dtype than the rest of their model: which ones, and casts that leave them so."""

from __future__ import annotations

import copy
import re

import torch
from transformers import PreTrainedModel

from slimmoe_hf.families import FAMILIES


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each weight of a model, by its name inside, when `from_pretrained` loads it in `dtype`.

    Some are made in a dtype of their own, whatever is asked for. For others the class says so, by patterns that are looked for
    anywhere in a name: `_keep_in_fp32_modules_strict` for both half precisions, `_keep_in_fp32_modules` for float16 alone
    (transformers' `core_model_loading`).

    Args:
        model: Made in `dtype`; it may be on the meta device.
        dtype: A floating one.
    """
    plan = model._get_dtype_plan(dtype)
    patterns = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in plan.items()]
    return {
        name: next((kept for pattern, kept in patterns if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def as_made(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class and config, made in `dtype`, on the meta device."""
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    return made


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's weights in place, all but those that its family keeps (`Family.keeps_dtype`), as `slim_checkpoint` does.

    Args:
        model: Of any kind; one without a row in the table is cast whole.
        dtype: A floating one.
    """
    family = FAMILIES.get(model.config.model_type)
    own = {} if family is None else {n: tensor.data for n, tensor in _held(model).items() if family.keeps_dtype(n)}
    model.to(dtype)  # type: ignore[arg-type]
    held = _held(model)
    for name, tensor in own.items():
        held[name].data = tensor


def _held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
