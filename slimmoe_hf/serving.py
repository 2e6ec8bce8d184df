"""The form in which serving engines expect a model, given to checkpoints when they are saved.

It changes no output: plain transformers loads the same function. vLLM and SGLang know PhiMoE by the name in Microsoft's
own files, build its attention and head with biases always. mlx-lm and transformers before 5 read the older spelling of the
rope fields, and where it is not there a default in its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.families import layer_views
from slimmoe_hf.own_form import GUARD, OwnForm

_NAMES = {"phimoe": "PhiMoEForCausalLM"}
# Of a checkpoint as it lay somewhere, or for code that does not come along.
_DROPPED = ("_name_or_path", "auto_map", "quantization_config")
# Layers that predict further tokens, beside the model's own: none are read, cut or written, whatever transformers' class.
_AHEAD = {
    "num_nextn_predict_layers": 0, "num_mtp_layers": 0, "mtp_num_hidden_layers": 0, "num_mtp_modules": 0, "use_mtp": False,
}  # fmt: skip
_EXPERT_KEYS = {"qwen3_moe": ("num_experts", "num_local_experts")}


def serving_config(values: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` in the form that engines expect.

    Args:
        values: Of the config of a model in one of our families.

    Returns:
        A new dict.
    """
    values = {key: value for key, value in values.items() if key not in _DROPPED}
    model_type = values["model_type"]
    values["use_cache"] = True  # the Trainer turns it off, for its own sake
    values |= {key: none for key, none in _AHEAD.items() if values.get(key)}
    if GUARD in values:  # no engine loads a form of our own
        return values
    for key in _EXPERT_KEYS.get(model_type, ()):
        number = next((values[name] for name in _EXPERT_KEYS[model_type] if name in values), None)
        values |= {key: number} if number is not None else {}
    if model_type in _NAMES:
        values["architectures"] = [_NAMES[model_type]]
        values["auto_map"] = {}  # no code comes along; TRL, which finds no class of that name, reads this key unasked
        values["attention_bias"] = values["lm_head_bias"] = True
    if _one_rope(values):
        values |= _both_spellings(values)
    return values


def _one_rope(values: dict[str, Any]) -> bool:
    """Whether a config has rope fields, and the same for all layers: those of one kind of layer have no older spelling."""
    found = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    plain = all(not isinstance(value, dict) for each in found for value in each.values())
    return plain and bool(found or "rope_theta" in values)


def _both_spellings(values: dict[str, Any]) -> dict[str, Any]:
    """The rope fields as transformers 5 writes them and as those before it did."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    parameters = dict(new or old or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or values.get("rope_theta")
    parameters = {key: value for key, value in parameters.items() if key not in ("type", "rope_theta", "rope_type")}
    both: dict[str, Any] = {"rope_parameters": {"rope_type": kind, **parameters}}
    if theta is not None:
        both["rope_theta"] = theta
        both["rope_parameters"]["rope_theta"] = theta
    if kind == "default":
        both["rope_scaling"] = None  # what those before transformers 5 call it
    else:
        both["rope_scaling"] = {"type": kind, **parameters}
        if "original_max_position_embeddings" in parameters:
            both["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return both


def needs_biases(config: PreTrainedConfig) -> bool:
    """Whether engines expect biases in attention and head that this model may lack."""
    return config.model_type in _NAMES


def add_biases(model: PreTrainedModel) -> None:
    """Give a model the biases that engines expect, all zero, in place; nothing where it has them or needs none."""
    if not needs_biases(model.config) or isinstance(model, OwnForm):
        return
    for linear in _without_bias(model):
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
    model.config.attention_bias = model.config.lm_head_bias = True


def missing_biases(model: PreTrainedModel) -> dict[str, Tensor]:
    """The biases that `add_biases` would give a model, by name, for a model that is to stay as it is."""
    if not needs_biases(model.config) or isinstance(model, OwnForm):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(linear)]}.bias": torch.zeros(linear.out_features, dtype=linear.weight.dtype)
        for linear in _without_bias(model)
    }


def _without_bias(model: PreTrainedModel) -> list[Any]:
    linears: list[Any] = [model.get_output_embeddings()]
    for view in layer_views(model):
        attention: Any = view.attention
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [linear for linear in linears if linear.bias is None]


def write_serving_config(folder: Path) -> None:
    """Rewrite the `config.json` in a folder that `save_pretrained` wrote."""
    file = folder / "config.json"
    values = serving_config(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
