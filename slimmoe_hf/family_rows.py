"""The table of families: one declared row per model type, and why a row says "no" where it does."""

from __future__ import annotations

from dataclasses import replace

from slimmoe_hf.family_types import DiskNames, ExpertLayout, Family, Stack

_MIXTRAL_NAMES = DiskNames(
    gate="block_sparse_moe.experts.{}.w1.weight",
    up="block_sparse_moe.experts.{}.w3.weight",
    down="block_sparse_moe.experts.{}.w2.weight",
    router="block_sparse_moe.gate.weight",
)
_GRANITE_NAMES = DiskNames(
    gate=None, up="block_sparse_moe.input_linear.{}.weight", down="block_sparse_moe.output_linear.{}.weight", fused=True,
    router="block_sparse_moe.router.layer.weight",
)  # fmt: skip
_CORRECTED = DiskNames(router_bias="mlp.gate.e_score_correction_bias")
_NORM_OVER_ALL_HEADS = "{} normalises queries and keys over all heads together, so dropping some changes the others"
_LATENT_ATTENTION = (
    "all heads of {} read one compressed key and value (kv_a_proj_with_mqa), so it has no key/value groups to drop"
)
_SCALED_EMBEDDINGS = "{} multiplies its embeddings before the first layer, so it cannot be begun at another one"
_DENSE_AS_WIDE = "{} has one intermediate_size for its experts and for {}, so narrowing the one would narrow the other"
SWITCH = "switch_transformers"

_QWEN = Family("mlp.experts", "mlp.gate", "moe_intermediate_size", "num_experts")
# Half of the rows of a head's queries are a gate on its output.
_QWEN_GATED = replace(_QWEN, query_parts=2)
_DEEPSEEK = Family(
    "mlp.experts", "mlp.gate", "moe_intermediate_size", "n_routed_experts", routing_keys=("n_group", "topk_group"),
    router_bias="mlp.gate.e_score_correction_bias", shared_key="n_shared_experts", disk=_CORRECTED,
)  # fmt: skip
# Queries are compressed too (q_a_proj, q_b_proj) or are not (q_proj), as the config says.
_LATENT = replace(
    _DEEPSEEK, projections=(), no_groups=_LATENT_ATTENTION.format("DeepSeek"),
    adapted=("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
)  # fmt: skip
_GRANITE = Family(
    "block_sparse_moe.experts", "block_sparse_moe.router", "intermediate_size", "num_local_experts", disk=_GRANITE_NAMES,
    no_stream=_SCALED_EMBEDDINGS.format("Granite"),
)  # fmt: skip

FAMILIES = {
    # Always two experts a token, whatever the config says: sparsemixer asserts it.
    "phimoe": Family("mlp.experts", "mlp.router", "intermediate_size", "num_local_experts", top_k=2, disk=_MIXTRAL_NAMES),
    "mixtral": Family("mlp.experts", "mlp.gate", "intermediate_size", "num_local_experts", disk=_MIXTRAL_NAMES),
    "minimax": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_local_experts", disk=_MIXTRAL_NAMES,
        no_groups="the lightning attention of MiniMax's other layers has num_attention_heads too, and no key/value groups",
    ),
    "minimax_m2": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_local_experts", router_bias="mlp.e_score_correction_bias",
        disk=replace(_MIXTRAL_NAMES, router_bias="block_sparse_moe.e_score_correction_bias"),
        no_groups=_NORM_OVER_ALL_HEADS.format("MiniMax-M2"),
    ),
    "olmoe": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_experts", no_groups=_NORM_OVER_ALL_HEADS.format("OLMoE"),
    ),
    "flex_olmo": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_experts", no_groups=_NORM_OVER_ALL_HEADS.format("FlexOlmo"),
    ),
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN_GATED,
    "qwen3_5_moe_text": _QWEN_GATED,
    "mellum": replace(_QWEN, experts_key="num_local_experts"),
    "flint": replace(
        _QWEN, head_rows=("sinks",), disk=DiskNames(others=(("self_attn.sinks", "self_attn.softmax_offset"),)),
    ),
    "laguna": replace(
        _QWEN, router_bias="mlp.gate.e_score_correction_bias", projections=(), adapted=_QWEN.projections,
        disk=DiskNames(
            router_bias="mlp.experts.e_score_correction_bias", others=(("mlp.shared_experts.", "mlp.shared_expert."),),
        ),
        no_groups="Laguna's layers have numbers of query heads of their own (num_attention_heads_per_layer)",
    ),
    "beam": replace(
        _QWEN, router_bias="mlp.gate.e_score_correction_bias", routing_keys=("n_group", "topk_group"), disk=_CORRECTED,
        query_rows=("gate_proj",), head_rows=("gate_bias",), layout=ExpertLayout(own_gate=True),
    ),
    "exaone_moe": replace(
        _DEEPSEEK, experts_key="num_experts", shared_key="num_shared_experts",
        disk=DiskNames(router_bias="mlp.e_score_correction_bias"),
    ),
    "cohere2_moe": replace(_QWEN, width_key="intermediate_size", shared_key="num_shared_experts"),
    "afmoe": replace(
        _QWEN, router="mlp.router", router_weight="gate.weight", router_bias="mlp.expert_bias",
        shared_key="num_shared_experts", query_rows=("gate_proj",),
        disk=DiskNames(router="mlp.router.gate.weight", router_bias="mlp.expert_bias"),
        no_stream=_SCALED_EMBEDDINGS.format("AFMoE"),
    ),
    "hy_v3": replace(
        _QWEN, router_bias="mlp.e_score_correction_bias", shared_key="num_shared_experts",
        disk=DiskNames(
            router="mlp.router.gate.weight", router_bias="mlp.expert_bias",
            others=(("mlp.shared_experts.", "mlp.shared_mlp."),),
        ),
    ),
    "deepseek_v2": replace(_LATENT, router_bias="", disk=DiskNames()),
    "deepseek_v3": _LATENT,
    "axk1": replace(
        _LATENT, disk=replace(_CORRECTED, others=(("mlp.post_mlp_layernorm.", "post_mlp_layernorm."),)),
        no_groups=_LATENT_ATTENTION.format("A.X-K1"),
    ),
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": replace(_LATENT, no_groups=_LATENT_ATTENTION.format("GLM-4 Lite")),
    "dots1": _DEEPSEEK,
    "solar_open": _DEEPSEEK,
    "mimo_v2_flash": replace(
        _DEEPSEEK, shared_key=None, projections=(), adapted=_DEEPSEEK.projections,
        disk=replace(_CORRECTED, others=(("self_attn.sinks", "self_attn.attention_sink_bias"),)),
        no_groups="MiMo's sliding layers have numbers of heads of their own (swa_num_attention_heads)",
    ),
    "ernie4_5_moe": Family(
        "mlp.experts", "mlp.gate", "moe_intermediate_size", "moe_num_experts", top_k_key="moe_k",
        router_bias="mlp.gate.moe_statics.e_score_correction_bias", shared_key="moe_num_shared_experts",
        disk=DiskNames(router_bias="mlp.moe_statics.e_score_correction_bias"),
    ),
    "hunyuan_v1_moe": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_experts", top_k_key="moe_topk", router_weight="wg.weight",
        disk=DiskNames(router="mlp.gate.wg.weight"), no_width=_DENSE_AS_WIDE.format("HunYuan", "the expert that all share"),
    ),
    "jamba": Family(
        "feed_forward.experts", "feed_forward.router", "intermediate_size", "num_experts",
        disk=DiskNames(
            gate="feed_forward.experts.{}.gate_proj.weight", up="feed_forward.experts.{}.up_proj.weight",
            down="feed_forward.experts.{}.down_proj.weight", router="feed_forward.router.weight",
        ),
        no_width=_DENSE_AS_WIDE.format("Jamba", "its dense feed-forward layers"),
    ),
    "lfm2_moe": Family(
        "feed_forward.experts", "feed_forward.gate", "moe_intermediate_size", "num_experts",
        router_bias="feed_forward.expert_bias", projections=("q_proj", "k_proj", "v_proj", "out_proj"),
        disk=DiskNames(
            gate="feed_forward.experts.{}.w1.weight", up="feed_forward.experts.{}.w3.weight",
            down="feed_forward.experts.{}.w2.weight", router="feed_forward.gate.weight",
            router_bias="feed_forward.expert_bias",
        ),
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoe_swa": replace(
        _GRANITE, head_rows=("sinks",),
        disk=DiskNames(
            gate=None, up="block_sparse_moe.experts.{}.gate_up_proj", down="block_sparse_moe.experts.{}.down_proj", fused=True,
            router="block_sparse_moe.router.weight",
        ),
    ),
    "kolibri1": replace(
        _QWEN, experts_key="num_local_experts", router_bias="mlp.gate.e_score_correction_bias",
        disk=DiskNames(
            router_bias="moe.router.expert_bias",
            others=(("post_self_attn_layernorm.", "post_attn_norm."), ("post_mlp_layernorm.", "post_ffn_norm.")),
        ),
    ),
    "aria_text": Family(
        "mlp.experts", "mlp.router", "intermediate_size", "moe_num_experts", top_k_key="moe_topk",
        shared_key="moe_num_shared_experts", layout=ExpertLayout(transposed=True),
        disk=DiskNames(
            gate=None, up="mlp.experts.fc1.{}.weight", down="mlp.experts.fc2.{}.weight", fused=True, router="mlp.router.weight",
        ),
    ),
    "gpt_oss": Family(
        "mlp.experts", "mlp.router", "intermediate_size", "num_local_experts", router_bias="mlp.router.bias",
        head_rows=("sinks",),
        layout=ExpertLayout(
            transposed=True, interleaved=True, gate_up_bias="gate_up_proj_bias", down_bias="down_proj_bias", own_gate=True,
        ),
        disk=DiskNames(
            gate=None, up="mlp.experts.{}.gate_up_proj", down="mlp.experts.{}.down_proj", fused=True,
            up_bias="mlp.experts.{}.gate_up_proj_bias", down_bias="mlp.experts.{}.down_proj_bias",
            router="mlp.router.weight", router_bias="mlp.router.bias",
        ),
    ),
    "nemotron_h": Family(
        "mixer.experts", "mixer.gate", "moe_intermediate_size", "n_routed_experts", stacks=(Stack(attention="mixer"),),
        routing_keys=("n_group", "topk_group"), router_bias="mixer.gate.e_score_correction_bias",
        layout=ExpertLayout(gate_up="up_proj", gated=False), expert_size_key="moe_latent_size",
        disk=DiskNames(
            gate=None, up="mixer.experts.{}.up_proj.weight", down="mixer.experts.{}.down_proj.weight", root="backbone",
            router="mixer.gate.weight", router_bias="mixer.gate.e_score_correction_bias",
        ),
    ),
    # The router module's own answer leaves out tokens beyond an expert's capacity; its classifier's are the logits.
    SWITCH: Family(
        "mlp.experts", "mlp.router.classifier", "d_ff", "num_experts", top_k=1, capacity_key="expert_capacity",
        stacks=(
            Stack("encoder.block", "num_layers", "layer.0.SelfAttention", "layer.1"),
            Stack("decoder.block", "num_decoder_layers", "layer.0.SelfAttention", "layer.2"),
        ),
        layout=ExpertLayout(gate_up="wi", down="wo", gated=False, unit="expert_{}"),
        disk=DiskNames(
            gate=None, up="mlp.experts.expert_{}.wi.weight", down="mlp.experts.expert_{}.wo.weight",
            router="mlp.router.classifier.weight", router_bias="mlp.router.classifier.bias",
        ),
        projections=("q", "k", "v", "o"),
        no_groups="all blocks of Switch add the position bias of the first one, head by head, so none can drop heads of its own",
        no_width="Switch has one d_ff for experts and dense feed-forward blocks, so narrowing the one would narrow the other",
        no_stream="it is an encoder-decoder",
    ),
}  # fmt: skip
DECODERS = tuple(name for name, row in FAMILIES.items() if not row.encoder_decoder)
"""The families without an encoder."""

UNSUPPORTED = {
    "llama4_text": "its experts are outside transformers' experts interface: all of them run on every token, whose copies the "
    "router has scaled before (Llama4TextMoe.forward), and its shared expert has their intermediate_size",
    "dbrx": "its experts are flat matrices [E * F, D] (DbrxExpertGLU.w1), outside transformers' experts interface",
    "jetmoe": "its experts sort their tokens themselves (JetMoeMoE.forward), outside transformers' experts interface, and its "
    "attention is a mixture of as many experts (JetMoeMoA), so neither can lose some alone",
    "longcat_flash": "its router also chooses from experts that pass a token on (zero_expert_num), numbered after the others",
    "nllb-moe": "its experts read the router's mask of zeros and ones as expert numbers (NllbMoeExperts.forward in transformers "
    "5.23), so which expert runs is not what the router chose",
    "kimi_linear": "its convolutions lie apart on disk and in one tensor in memory (conversion_mapping.py)",
    "bailing_hybrid": "its convolutions lie apart on disk and in one tensor in memory (conversion_mapping.py)",
}
"""Families with experts whose models are refused, and why."""
