"""Tiny models of every family, and a tiny tokenizer, built on the spot: nothing here touches the network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from slimmoe_hf.families import FAMILIES, SWITCH, Family

FAMILY_NAMES = ("phimoe", "mixtral", "olmoe", "qwen3_moe")
"""The decoder-only ones that most tests run on, or with Switch `families()`; `test_conformance` runs on every row."""
VOCAB_SIZE = 320
EXPERT_WIDTH, NUM_EXPERTS, NUM_LAYERS, KV_GROUPS, HEADS = 32, 4, 2, 2, 4

_SHAPE = {
    "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_GROUPS,
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "num_experts_per_tok": 2, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "phimoe": {
        "intermediate_size": EXPERT_WIDTH, "num_local_experts": NUM_EXPERTS, "attention_bias": True,
        "lm_head_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "router_jitter_noise": 0.1,
    },
    "mixtral": {"intermediate_size": EXPERT_WIDTH, "num_local_experts": NUM_EXPERTS},
    "olmoe": {"intermediate_size": EXPERT_WIDTH, "num_experts": NUM_EXPERTS},
    "qwen3_moe": {
        "moe_intermediate_size": EXPERT_WIDTH, "intermediate_size": 48, "num_experts": NUM_EXPERTS, "head_dim": 16,
        "mlp_only_layers": [0], "num_hidden_layers": NUM_LAYERS + 1,
    },
}  # fmt: skip
# What any other family takes of these, if its config has them; the row says the rest.
_COMMON: dict[str, Any] = {
    **_SHAPE, "head_dim": 8, "intermediate_size": 48, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "initializer_range": 0.3,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_dt_rank": 4,
}  # fmt: skip
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
# Of these families, what is not derived: layers of every kind in few, groups of experts.
_SPECIAL: dict[str, dict[str, Any]] = {
    "qwen3_next": _LINEAR_AND_FULL,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_hidden_layers": 4},
    "granitemoe": {"embedding_multiplier": 3.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "embedding_multiplier": 3.0},
    "afmoe": {"mup_enabled": True},
    "hunyuan_v1_moe": {"moe_topk": [2, 2]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4,
                   "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                   "moe_shared_expert_intermediate_size": 16, "moe_latent_size": 24},
    "flint": {"mlp_only_layers": [0]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3},
}  # fmt: skip


def derived_values(family: str) -> dict[str, Any]:
    """A config of a row that has no test code of its own."""
    row, known = FAMILIES[family], AutoConfig.for_model(family).to_dict()
    values = {key: value for key, value in _COMMON.items() if key in known}
    if "kv_lora_rank" in known:
        values.pop("head_dim", None)
        values["num_key_value_heads"] = HEADS  # all heads read what is compressed
    values |= {row.width_key: EXPERT_WIDTH, row.experts_key: NUM_EXPERTS, row.top_k_key: 2}
    if row.routing_keys is not None:
        values |= {row.experts_key: 2 * NUM_EXPERTS, row.routing_keys[0]: 2, row.routing_keys[1]: 1}
    if row.shared_key is not None:
        values[row.shared_key] = 1
    return values | _SPECIAL.get(family, {})


_MADE: dict[str, tuple[PreTrainedModel, torch.Tensor]] = {}
"""Models as they were made, and the state of the random numbers then: copying one takes a part of the time."""


def _copied(make: Callable[..., PreTrainedModel], family: str, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    key = repr((family, seed, sorted(overrides.items())))
    if key not in _MADE:
        torch.manual_seed(seed)
        model = make(family, overrides)
        if sum(parameter.numel() for parameter in model.parameters()) > 10**6:
            return model
        _MADE[key] = model, torch.get_rng_state()
    model, state = _MADE[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised float32 model in eval mode; `overrides` are config keys."""
    if family in SEQ2SEQ_NAMES:
        return tiny_seq2seq(family, seed, **overrides)
    return _copied(_new_decoder, family, seed, overrides)


def _new_decoder(family: str, overrides: dict[str, Any]) -> PreTrainedModel:
    values = {**_SHAPE, **_OWN[family]} if family in _OWN else derived_values(family)
    config = AutoConfig.for_model(family, **{**values, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "sinks")):
                tensor.normal_(std=0.1)
            elif tensor.dim() == 2 and not tensor.any():  # a router that is left at zeros sends all to the same experts
                tensor.normal_(std=0.3)
    return model


SEQ2SEQ_NAMES = ("switch_transformers", "t5", "bart")
_T5_SHAPE = {
    "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": HEADS,
    "dropout_rate": 0.0, "decoder_start_token_id": 1,
}  # fmt: skip
_SEQ2SEQ: dict[str, dict[str, Any]] = {
    "switch_transformers": {
        **_T5_SHAPE, "num_experts": NUM_EXPERTS, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "router_jitter_noise": 0.0,
    },
    "t5": {**_T5_SHAPE, "tie_word_embeddings": False},
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
        "dropout": 0.0, "decoder_start_token_id": 0, "forced_eos_token_id": None, "init_std": 0.3,
    },
}  # fmt: skip


def tiny_seq2seq(family: str = "switch_transformers", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised encoder-decoder, float32 and in eval mode; without noise in training unless `overrides` say so."""
    return _copied(_new_seq2seq, family, seed, overrides)


def _new_seq2seq(family: str, overrides: dict[str, Any]) -> PreTrainedModel:
    ids = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(family, **{**ids, **_SEQ2SEQ[family], **overrides})
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    for name, buffer in model.named_buffers(recurse=False):
        if name == "final_logits_bias":  # zeros by default, learned in Marian
            buffer.normal_()
    return model


def families(refused: Callable[[Family], str] = lambda row: "") -> list[Any]:
    """`FAMILY_NAMES` and Switch, for `parametrize`; skipped, with the reason, where `refused` gives one."""
    reasons = {name: refused(FAMILIES[name]) for name in (*FAMILY_NAMES, SWITCH)}
    return [pytest.param(name, marks=pytest.mark.skip(reason=why)) if why else name for name, why in reasons.items()]


def slow_but(*fast: str) -> list[Any]:
    """`FAMILY_NAMES`, all but `fast` as slow tests: for what takes long and hardly depends on the family."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES]


def decoder_only(reason: str) -> list[Any]:
    """As `families`; those with an encoder are skipped, for `reason`."""
    return families(lambda row: reason if row.encoder_decoder else "")


def expert_output(model: PreTrainedModel, experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert makes of its inputs, `[N, D]`, written out."""
    layout = FAMILIES[model.config.model_type].layout
    if layout.unit is not None:
        return experts[layout.unit.format(expert)](x)
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T


def tiny_batch(rows: int = 4, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, labels equal to the tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCAB_SIZE, (rows, length), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}


@functools.cache
def documents() -> list[str]:
    """Real prose without a dependency: the standard library's language reference."""
    return [text for _, text in sorted(topics.items()) if len(text) > 400]


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents()[:40], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return fast


def save_tiny(folder: Path, family: str = "phimoe", seed: int = 0, **overrides: Any) -> Path:
    """A tiny checkpoint with its tokenizer on disk."""
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, pieces: int = 60) -> Path:
    """A small `.jsonl` of real prose."""
    import json

    path.write_text("".join(json.dumps({"text": text[:2000]}) + "\n" for text in documents()[:pieces]))
    return path
