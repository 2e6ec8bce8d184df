"""What the engines that serve models ask of a checkpoint: declared rules, each with the file of the engine that says so.

Read in the engines' own source packages, of the version and on the day named. A family without an entry is not known to be
served, and nothing is said of it. `runs` holds what was really run, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slimmoe_hf.engine_rules import (
    Rule,
    all_biases,
    all_heads_have_keys,
    always,
    byte_level,
    defaults,
    every_layer_sparse,
    fixed,
    full_attention,
    head_width,
    ignored,
    long_factors,
    named,
    no_biases,
    older_rope,
    older_tokenizer,
    per_expert,
    rope_kinds,
    sentencepiece,
    silent_beginning,
    top_two,
    untied,
    vocabulary,
    written,
)

Size = Literal["expert width", "model width", "query heads' width", "key heads' width"]
"""A number of columns or rows that some weights have; that of heads is of all of them together."""
_ROWS: tuple[Size, ...] = ("expert width", "model width", "query heads' width")


@dataclass(frozen=True)
class Quantiser:
    """A quantised form that wants rows of a certain length.

    Attributes:
        name: What it is called. multiple: What these sizes must be multiples of.
        otherwise: What happens to weights that are not. source: Where that is to be read.
        sizes: The ones that it asks that of: of a GGUF or MLX file the lengths of all rows.
    """

    name: str
    multiple: int
    otherwise: str
    source: str
    sizes: tuple[Size, ...] = _ROWS


@dataclass(frozen=True)
class Run:
    """Something that was run.

    Attributes:
        families: With which tiny models. what: What was done, and what came of it.
        versions: Of what ran. date: When.
    """

    families: tuple[str, ...]
    what: str
    versions: str
    date: str


@dataclass(frozen=True)
class Engine:
    """An engine and its rules.

    Attributes:
        title: Its name. version: The one whose code was read. read: When.
        package: Where that code came from.
        families: `model_type` -> its rules.
        quantisers: Quantised forms that it makes or reads.
        runs: What was run with it.
    """

    title: str
    version: str
    read: str
    package: str
    families: Mapping[str, tuple[Rule, ...]]
    quantisers: tuple[Quantiser, ...] = ()
    runs: tuple[Run, ...] = ()


_FOUR = ("phimoe", "mixtral", "olmoe", "qwen3_moe")
_READ = "2026-11-22"

_PHI, _OLMOE, _QWEN = (f"vllm/model_executor/models/{name}.py" for name in ("phimoe", "olmoe", "qwen3_moe"))
_REGISTRY = "vllm/model_executor/models/registry.py"
_MIXTRAL, _ROPE = "vllm/model_executor/models/mixtral.py", "vllm/model_executor/layers/rotary_embedding"
_OF_VLLM = (
    Rule(vocabulary, "no", "vllm/tokenizers/hf.py, CachedHfTokenizer.from_pretrained"),
    Rule(rope_kinds("default", "linear", "llama3", "yarn", "longrope"), "not known", f"{_ROPE}/__init__.py, get_rope"),
    Rule(long_factors(True), "differs", f"{_ROPE}/phi3_long_rope_scaled_rope.py, use_long_rope"),
)
_VLLM = Engine(
    "vLLM", "0.33.0", _READ, "wheel vllm 0.33.0",
    families={
        "phimoe": (
            *_OF_VLLM,
            Rule(named("PhiMoEForCausalLM"), "not known", f"{_REGISTRY}, _TEXT_GENERATION_MODELS", mended=True),
            Rule(per_expert, "no", f"{_PHI}, PhiMoEDecoderLayer: block_sparse_moe", mended=True),
            Rule(all_biases, "no", f"{_PHI}, PhiMoEAttention and PhiMoEForCausalLM: bias=True", mended=True),
            Rule(untied, "no", f"{_PHI}, PhiMoEForCausalLM: lm_head is not tied"),
            Rule(fixed("num_experts_per_tok", 2), "no", f"{_PHI}, phimoe_routing_function: assert topk == 2"),
            Rule(fixed("router_jitter_noise", 0.01), "differs", f"{_PHI}, sparsemixer: jitter_eps=0.01"),
            Rule(fixed("hidden_act", "silu"), "differs", f"{_PHI}, PhiMoE: no activation is named"),
        ),
        "mixtral": (
            *_OF_VLLM,
            Rule(named("MixtralForCausalLM"), "not known", f"{_REGISTRY}, _TEXT_GENERATION_MODELS", mended=True),
            Rule(per_expert, "no", f"{_MIXTRAL}, MixtralDecoderLayer: block_sparse_moe", mended=True),
            Rule(fixed("hidden_act", "silu"), "differs", f"{_MIXTRAL}, MixtralMoE: no activation is named"),
        ),
        "olmoe": (
            *_OF_VLLM,
            Rule(named("OlmoeForCausalLM"), "not known", f"{_REGISTRY}, _TEXT_GENERATION_MODELS", mended=True),
            Rule(untied, "no", f"{_OLMOE}, OlmoeForCausalLM: lm_head is not tied"),
            Rule(no_biases, "no", f"{_OLMOE}, OlmoeAttention: bias=False"),
            Rule(head_width, "no", f"{_OLMOE}, OlmoeAttention: hidden_size // total_num_heads"),
            Rule(fixed("hidden_act", "silu"), "differs", f"{_OLMOE}, OlmoeMoE: no activation is named"),
            Rule(ignored("clip_qkv"), "differs", f"{_OLMOE}, OlmoeAttention.forward"),
            Rule(ignored("norm_topk_prob"), "differs", f"{_OLMOE}, OlmoeMoE: renormalize=False"),
            Rule(fixed("rms_norm_eps", 1e-5), "differs", f"{_OLMOE}, RMSNorm(eps=1e-5)"),
        ),
        "qwen3_moe": (
            *_OF_VLLM,
            Rule(named("Qwen3MoeForCausalLM"), "not known", f"{_REGISTRY}, _TEXT_GENERATION_MODELS", mended=True),
            Rule(no_biases, "no", f"{_QWEN}, Qwen3MoeAttention: o_proj bias=False"),
            Rule(fixed("hidden_act", "silu"), "no", f"{_QWEN}, Qwen3MoeMLP"),
        ),
    },
    quantisers=(
        Quantiser("FP8 blocks", 128, "it refuses to load them (128 times the ranks, with tensor parallelism)",
                  "vllm/model_executor/layers/quantization/utils/fp8_utils.py, validate_fp8_block_shape, ..._moe",
                  ("expert width", "query heads' width", "key heads' width")),
        Quantiser("GPTQ and AWQ, groups of 128", 128, "no Marlin kernel for the experts (128 times the ranks)",
                  "vllm/model_executor/layers/quantization/utils/marlin_utils.py, check_moe_marlin_supports_config",
                  ("expert width", "model width")),
    ),
)  # fmt: skip

_GGUF = "vendor/llama.cpp/src/models"
_CONVERT = "vendor/llama.cpp/conversion"
_PER_EXPERT = "modify_tensors"
_GGUF_RUN = (
    "converter of llama-cpp-python 0.3.36, its name for the pre-tokenizer given by hand; xllamacpp 2026.10.11549"
)
_PINNED = "vendor/llama.cpp/requirements/requirements-convert_legacy_llama.txt: transformers==4.57.6"
_BYTE_LEVEL = (
    Rule(vocabulary, "no", f"{_CONVERT}/base.py, get_vocab_base"),
    Rule(older_tokenizer, "no", _PINNED, mended=True),
    Rule(byte_level, "loads", f"{_CONVERT}/base.py, get_vocab_base_pre"),
)
_FALLBACK = "vendor/llama.cpp/src/llama-quant.cpp, tensor_type_fallback"
_LLAMA = Engine(
    "llama.cpp", "0c1e57098", _READ, "source package llama-cpp-python 0.3.36, vendor/llama.cpp",
    families={
        "phimoe": (
            Rule(named("PhiMoEForCausalLM"), "no", f"{_CONVERT}/phi.py, ModelBase.register", mended=True),
            Rule(per_expert, "no", f"{_CONVERT}/phi.py, PhiMoeModel.{_PER_EXPERT}", mended=True),
            Rule(all_biases, "no", f"{_GGUF}/phimoe.cpp, load_arch_tensors", mended=True),
            Rule(untied, "no", f"{_GGUF}/phimoe.cpp, load_arch_tensors"),
            Rule(head_width, "no", f"{_GGUF}/phimoe.cpp, load_arch_tensors: wo is n_embd x n_embd"),
            Rule(fixed("hidden_act", "silu"), "differs", f"{_GGUF}/phi3.cpp, graph: build_moe_ffn(..., LLM_FFN_SILU, ...)"),
            Rule(top_two, "differs", f"{_CONVERT}/phi.py, PhiMoeModel.set_gguf_parameters"),
            Rule(written("original_max_position_embeddings"), "no",
                 f"{_CONVERT}/phi.py, Phi3MiniModel.set_gguf_parameters", mended=True),
            Rule(sentencepiece, "no", f"{_CONVERT}/phi.py, Phi3MiniModel.set_vocab"),
            Rule(full_attention, "differs", f"{_GGUF}/phimoe.cpp, load_arch_hparams: no window is read"),
            Rule(always("it routes by a softmax over the two best experts, PhiMoE by its sparsemixer; and it normalises by RMS "
                        "alone, PhiMoE takes the mean off too"),
                 "differs", f"{_GGUF}/phi3.cpp, graph: build_moe_ffn(..., SOFTMAX), build_norm(..., LLM_NORM_RMS)"),
        ),
        "mixtral": (
            *_BYTE_LEVEL,
            Rule(fixed("hidden_act", "silu"), "differs", f"{_GGUF}/llama.cpp, graph: build_moe_ffn(..., LLM_FFN_SILU, ...)"),
            Rule(named("MixtralForCausalLM"), "no", f"{_CONVERT}/__init__.py", mended=True),
            Rule(per_expert, "no", f"{_CONVERT}/llama.py, LlamaModel.{_PER_EXPERT}", mended=True),
            Rule(rope_kinds("default", "linear", "yarn", "llama3"), "differs", f"{_CONVERT}/base.py, set_gguf_parameters"),
            Rule(full_attention, "differs", f"{_GGUF}/llama.cpp, load_arch_hparams: no window is read"),
        ),
        "olmoe": (
            *_BYTE_LEVEL,
            Rule(fixed("hidden_act", "silu"), "differs", f"{_GGUF}/olmoe.cpp, graph: build_moe_ffn(..., LLM_FFN_SILU, ...)"),
            Rule(named("OlmoeForCausalLM"), "no", f"{_CONVERT}/__init__.py", mended=True),
            Rule(per_expert, "no", f"{_CONVERT}/olmo.py, OlmoeModel.{_PER_EXPERT}", mended=True),
            Rule(untied, "no", f"{_GGUF}/olmoe.cpp, load_arch_tensors: output is required"),
            Rule(no_biases, "no", f"{_GGUF}/olmoe.cpp, load_arch_tensors: no bias of wo"),
            Rule(head_width, "no", f"{_GGUF}/olmoe.cpp, load_arch_tensors: wo is n_embd x n_embd"),
            Rule(all_heads_have_keys, "no", f"{_GGUF}/olmoe.cpp, load_arch_tensors: attn_k_norm is n_embd"),
            Rule(rope_kinds("default", "linear", "yarn"), "differs", f"{_CONVERT}/base.py, set_gguf_parameters"),
            Rule(ignored("clip_qkv"), "differs", f"{_CONVERT}/olmo.py, OlmoeModel: no clamp is written"),
            Rule(ignored("norm_topk_prob"), "differs", f"{_GGUF}/olmoe.cpp, graph: build_moe_ffn(..., false, ...)"),
            Rule(fixed("rms_norm_eps", 1e-5), "differs", f"{_CONVERT}/olmo.py, OlmoeModel.set_gguf_parameters"),
        ),
        "qwen3_moe": (
            *_BYTE_LEVEL,
            Rule(fixed("hidden_act", "silu"), "differs",
                 f"{_GGUF}/qwen3moe.cpp, graph: build_moe_ffn(..., LLM_FFN_SILU, ...)"),
            Rule(named("Qwen3MoeForCausalLM"), "no", f"{_CONVERT}/__init__.py", mended=True),
            Rule(no_biases, "no", f"{_GGUF}/qwen3moe.cpp, load_arch_tensors: no bias of wo"),
            Rule(every_layer_sparse, "no", f"{_GGUF}/qwen3moe.cpp, load_arch_tensors"),
            Rule(rope_kinds("default", "linear", "yarn"), "differs", f"{_CONVERT}/base.py, set_gguf_parameters"),
            Rule(fixed("norm_topk_prob", True), "differs", f"{_GGUF}/qwen3moe.cpp, graph: build_moe_ffn(..., true, ...)"),
            Rule(full_attention, "differs", f"{_GGUF}/qwen3moe.cpp, load_arch_hparams: no window is read"),
        ),
    },
    quantisers=(
        Quantiser("Q4_0, Q5_0, Q8_0, MXFP4", 32, "such weights become F16", _FALLBACK),
        Quantiser("K-quants", 256, "such weights take another type, of blocks of 32, or F16", _FALLBACK),
    ),
    runs=(
        Run(("mixtral",), "converted to F32, loaded and run on a CPU: next-token log-probabilities of random models within 0.03 "
            "of transformers 5.23: plain, slimmed, tied, with pruned heads, with linear, yarn and llama3 rope; 1 off with gelu, "
            "12 with a window", _GGUF_RUN, _READ),
        Run(("olmoe",), "as for mixtral: within 0.03 plain, slimmed, with linear and yarn rope; 0.1 to 12 off with llama3 rope, "
            "norm_topk_prob, clip_qkv or another rms_norm_eps; refused tied and with fewer key/value heads", _GGUF_RUN, _READ),
        Run(("qwen3_moe",), "as for mixtral: within 0.03 plain, slimmed, tied, with linear and yarn rope; 0.5 off "
            "without norm_topk_prob; refused with biases and with a dense layer", _GGUF_RUN, _READ),
        Run(("phimoe",), "converted to F32, loaded and run on a CPU: next-token log-probabilities 6 to 10 nats off those of "
            "transformers 5.23 on a random model", _GGUF_RUN, _READ),
    ),
)  # fmt: skip

_MLX = "mlx_lm/models"
_SANITIZE = "Model.sanitize"
_OF_MLX = (
    Rule(vocabulary, "no", "mlx_lm/utils.py, load"),
    Rule(fixed("hidden_act", "silu"), "differs", f"{_MLX}/switch_layers.py, SwitchGLU: swiglu"),
)
_MLX_LM = Engine(
    "mlx-lm", "0.32.2", _READ, "wheel mlx-lm 0.32.2",
    families={
        "phimoe": (
            *_OF_MLX,
            Rule(defaults(rms_norm_eps=1e-6, num_key_value_heads=8, router_jitter_noise=0.01), "differs",
                 f"{_MLX}/phimoe.py, ModelArgs", mended=True),
            Rule(top_two, "differs", f"{_MLX}/phimoe.py, sparsemixer"),
            Rule(per_expert, "no", f"{_MLX}/phimoe.py, {_SANITIZE}", mended=True),
            Rule(all_biases, "no", f"{_MLX}/phimoe.py, Attention and Model: bias=True", mended=True),
            Rule(untied, "no", f"{_MLX}/phimoe.py, Model: lm_head is not tied"),
            Rule(head_width, "no", f"{_MLX}/phimoe.py, Attention: hidden_size // n_heads"),
            Rule(older_rope(1e4), "differs", f"{_MLX}/phimoe.py, ModelArgs", mended=True),
            Rule(rope_kinds("default", "longrope"), "no", f"{_MLX}/phimoe.py, Attention: rope_scaling[\"short_factor\"]"),
            Rule(long_factors(False), "differs", f"{_MLX}/rope_utils.py, SuScaledRoPE"),
            Rule(full_attention, "differs", f"{_MLX}/phimoe.py, PhiMoEModel: create_attention_mask without a window"),
        ),
        "mixtral": (
            *_OF_MLX,
            Rule(defaults(rms_norm_eps=1e-5, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
                          tie_word_embeddings=False), "differs", f"{_MLX}/mixtral.py, ModelArgs", mended=True),
            Rule(per_expert, "no", f"{_MLX}/mixtral.py, {_SANITIZE}", mended=True),
            Rule(head_width, "no", f"{_MLX}/mixtral.py, MixtralAttention: hidden_size // num_heads"),
            Rule(older_rope(1e6), "differs", f"{_MLX}/mixtral.py, ModelArgs", mended=True),
            Rule(rope_kinds("default"), "differs", f"{_MLX}/mixtral.py, MixtralAttention: nn.RoPE"),
            Rule(full_attention, "differs", f"{_MLX}/mixtral.py, MixtralModel: create_attention_mask without a window"),
        ),
        "olmoe": (
            Rule(per_expert, "no", f"{_MLX}/olmoe.py, {_SANITIZE}", mended=True),
            *_OF_MLX,
            Rule(written("num_experts", "num_experts_per_tok", "rms_norm_eps"), "no", f"{_MLX}/olmoe.py, ModelArgs", mended=True),
            Rule(defaults(norm_topk_prob=False, tie_word_embeddings=True), "differs", f"{_MLX}/olmoe.py, ModelArgs", mended=True),
            Rule(rope_kinds("default", "linear", "dynamic", "llama3", "yarn", "longrope"), "not known",
                 f"{_MLX}/rope_utils.py, initialize_rope"),
            Rule(long_factors(False), "differs", f"{_MLX}/rope_utils.py, SuScaledRoPE"),
            Rule(older_rope(1e4), "differs", f"{_MLX}/olmoe.py, ModelArgs", mended=True),
            Rule(ignored("clip_qkv"), "differs", f"{_MLX}/olmoe.py, Attention"),
        ),
        "qwen3_moe": (
            *_OF_MLX,
            Rule(written("num_experts", "num_experts_per_tok", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size",
                         "rms_norm_eps", "num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings",
                         "max_position_embeddings", "norm_topk_prob"), "no", f"{_MLX}/qwen3_moe.py, ModelArgs", mended=True),
            Rule(older_rope(1e4), "differs", f"{_MLX}/qwen3_moe.py, ModelArgs", mended=True),
            Rule(per_expert, "no", f"{_MLX}/qwen3_moe.py, {_SANITIZE}", mended=True),
            Rule(no_biases, "no", f"{_MLX}/qwen3_moe.py, Attention: bias=False"),
            Rule(rope_kinds("default"), "differs", f"{_MLX}/qwen3_moe.py, Attention: nn.RoPE"),
            Rule(full_attention, "differs", f"{_MLX}/qwen3_moe.py, Qwen3MoeModel: create_attention_mask without a window"),
        ),
    },
    quantisers=(
        Quantiser("affine, groups of 64", 64, "such layers stay as they are", "mlx_lm/utils.py, quantize_model"),
        Quantiser("mxfp4, mxfp8", 32, "such layers stay as they are", "mlx_lm/utils.py, quantize_model"),
    ),
    runs=(
        Run(_FOUR, "loaded and run on a CPU in float32 (its kernel for experts takes nothing else there): logits within 4e-5 of "
            "transformers 5.23 where these rules say that it loads, off or refused where they say that",
            "mlx-lm 0.32.2, mlx 0.32.4", _READ),
    ),
)  # fmt: skip

_AUTO = "transformers/models/auto/tokenization_auto.py"


def _before_5(family: str, theta: float, *own: Rule) -> tuple[Rule, ...]:
    module = f"transformers/models/{family}"
    return (
        *own,
        Rule(per_expert, "no", f"{module}/modeling_{family}.py: a module list", mended=True),
        Rule(older_rope(theta), "differs", f"{module}/configuration_{family}.py", mended=True),
        Rule(older_tokenizer, "no", f"{_AUTO}, AutoTokenizer.from_pretrained", mended=True),
        Rule(
            silent_beginning, "differs", "transformers/models/llama/tokenization_llama_fast.py, __init__", mended=True
        ),
    )


_TRANSFORMERS_4 = Engine(
    "transformers", "4.57.6", _READ, "wheel transformers 4.57.6",
    families={
        "phimoe": _before_5("phimoe", 1e6, Rule(
            head_width, "no", "transformers/models/phimoe/modeling_phimoe.py, PhimoeAttention: hidden_size // num_heads",
        )),
        "mixtral": _before_5("mixtral", 1e6),
        "olmoe": _before_5("olmoe", 1e4, Rule(
            head_width, "no", "transformers/models/olmoe/modeling_olmoe.py, OlmoeAttention: hidden_size // num_heads",
        )),
        "qwen3_moe": _before_5("qwen3_moe", 1e4, Rule(
            written("num_experts"), "differs", "transformers/models/qwen3_moe/configuration_qwen3_moe.py: 128 otherwise",
            mended=True,
        )),
    },
    runs=(
        Run(_FOUR, "loaded and run on a CPU: logits within 1e-5 of transformers 5.23's; PhiMoE's pruned heads refused",
            "transformers 4.57.6, torch 2.13.0", _READ),
    ),
)  # fmt: skip

ENGINES: dict[str, Engine] = {
    "vllm": _VLLM, "llama.cpp": _LLAMA, "mlx": _MLX_LM, "transformers4": _TRANSFORMERS_4,
}  # fmt: skip
"""By the name that `slimmoe export --for` takes."""
