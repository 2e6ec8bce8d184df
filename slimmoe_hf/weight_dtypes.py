"""Weights that are in another dtype than the rest of their model: which ones, and casts that leave them so."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from slimmoe_hf.families import FAMILIES


def kept_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> frozenset[str]:
    """Names, inside a model, of the weights that `from_pretrained` loads in float32 though `dtype` is asked for.

    The model's class says which: `_keep_in_fp32_modules_strict` for both half precisions, `_keep_in_fp32_modules` for
    float16 alone, as patterns that are looked for anywhere in a name (transformers' `core_model_loading`).
    """
    plan = {} if dtype is None else model._get_dtype_plan(dtype)
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in plan]
    return frozenset(name for name in model.state_dict() if any(pattern.search(name) for pattern in patterns))


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a model's weights in place, all but those that its family keeps (`Family.keeps_dtype`), as `slim_checkpoint` does.

    Args:
        model: Of any kind; one without a row in the table is cast whole.
        dtype: A floating one.
    """
    family = FAMILIES.get(model.config.model_type)
    own = {name: tensor.data for name, tensor in _held(model).items() if family is not None and family.keeps_dtype(name)}
    model.to(dtype)  # type: ignore[arg-type]
    held = _held(model)
    for name, tensor in own.items():
        held[name].data = tensor


def _held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
