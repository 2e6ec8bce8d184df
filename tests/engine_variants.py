"""Tiny models that keep or break one rule each, and what every engine makes of them. Random weights, made on the spot.

The effects of mlx-lm, transformers 4 and llama.cpp are what was seen when they were run; those of vLLM its rules say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from test_surgery import random_plan
from tiny import tiny_model, tiny_tokenizer

from slimmoe_hf import Target, apply_plan

TEXT = "def f(): return <|user|> ü"
IDS = [5, 9, 33, 70, 12, 300, 41, 8, 77, 150, 222, 19]
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + 0.1 * n for n in range(8)], "short_mscale": 1.2, "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 5000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
_OWN: dict[str, dict[str, Any]] = {
    "phimoe": {"router_jitter_noise": 0.01},
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"moe_intermediate_size": 96, "intermediate_size": 64, "mlp_only_layers": [], "norm_topk_prob": True},
}
ORDER = ("vllm", "llama.cpp", "mlx", "transformers4")
EFFECTS = {"l": "loads", "d": "differs", "n": "no"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # effects in ORDER, and what is not as in a plain model
    "phimoe": ("ldll", {}),
    "phimoe-slimmed": ("ldll", {}),
    "phimoe-jitter": ("ddll", {"router_jitter_noise": 0.1}),
    "phimoe-unbiased": ("ldll", {"attention_bias": False, "lm_head_bias": False}),
    "phimoe-heads": ("lnnn", _HEADS),
    "phimoe-longrope": ("dddl", {"rope_parameters": _LONG, "original_max_position_embeddings": 64}),
    "phimoe-window": ("lddl", {"sliding_window": 4}),
    "mixtral": ("llll", {}),
    "mixtral-slimmed": ("llnl", {}),
    "mixtral-heads": ("llnl", _HEADS),
    "mixtral-window": ("lddl", {"sliding_window": 4}),
    "mixtral-linear": ("lldl", {"rope_parameters": _LINEAR}),
    "mixtral-yarn": ("lldl", {"rope_parameters": _YARN, "head_dim": 16}),
    "mixtral-llama3": ("lldl", {"rope_parameters": _LLAMA3}),
    "mixtral-gelu": ("dddl", {"hidden_act": "gelu"}),
    "mixtral-tied": ("llll", {"tie_word_embeddings": True}),
    "olmoe": ("llll", {}),
    "olmoe-slimmed": ("llll", {}),
    "olmoe-gqa": ("lnll", {"num_key_value_heads": 2}),
    "olmoe-linear": ("llll", {"rope_parameters": _LINEAR}),
    "olmoe-yarn": ("llll", {"rope_parameters": _YARN, "head_dim": 16}),
    "olmoe-llama3": ("ldll", {"rope_parameters": _LLAMA3}),
    "olmoe-clip": ("dddl", {"clip_qkv": 0.2}),
    "olmoe-norm": ("ddll", {"norm_topk_prob": True}),
    "olmoe-tied": ("nnll", {"tie_word_embeddings": True}),
    "olmoe-eps": ("ddll", {"rms_norm_eps": 1e-2}),
    "qwen3_moe": ("llll", {}),
    "qwen3_moe-slimmed": ("llll", {}),
    "qwen3_moe-unnormed": ("ldll", {"norm_topk_prob": False}),
    "qwen3_moe-dense": ("lnll", {"mlp_only_layers": [0]}),
    "qwen3_moe-heads": ("llll", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3_moe-biased": ("nnnl", {"attention_bias": True}),
    "qwen3_moe-yarn": ("lldl", {"rope_parameters": _YARN}),
    "qwen3_moe-tied": ("llll", {"tie_word_embeddings": True}),
}
_CUTS = {  # mlx-lm and transformers 4 take PhiMoE's heads to be D/H wide, mlx-lm Mixtral's too; OLMoE's cannot be pruned
    "phimoe-slimmed": Target(expert_width=64, num_experts=3),
    "mixtral-slimmed": Target(expert_width=64, kv_groups=1),
    "olmoe-slimmed": Target(expert_width=64, num_experts=3),
    "qwen3_moe-slimmed": Target(expert_width=64, num_experts=3, kv_groups=1),
}


def effects(name: str) -> dict[str, str]:
    """Engine -> what it makes of a variant."""
    return {engine: EFFECTS[letter] for engine, letter in zip(ORDER, VARIANTS[name][0], strict=True)}


@torch.no_grad()
def save_variant(name: str, folder: Path) -> torch.Tensor:
    """Write a variant, as transformers saves it, and give its logits for `IDS`, `[N, V]`."""
    family = name.split("-")[0]
    model = tiny_model(family, **{**_SIZES, "rope_parameters": _ROPE, **_OWN[family], **VARIANTS[name][1]})
    if name in _CUTS:
        model = apply_plan(model, random_plan(model, _CUTS[name]))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"")  # a rule asks only whether it is there
    return model(torch.tensor([IDS])).logits[0]


def save_expected(folder: Path, logits: dict[str, torch.Tensor]) -> None:
    """What `engine_runs.py` compares with."""
    (folder / "tokens.json").write_text(json.dumps({"text": TEXT, "ids": tiny_tokenizer()(TEXT).input_ids}))
    (folder / "expected.json").write_text(json.dumps({name: values.tolist() for name, values in logits.items()}))
