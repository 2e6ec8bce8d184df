"""The table of families: one declared row per model type, and why a row says "no" where it does."""

from __future__ import annotations

from slimmoe_hf.family_types import DiskNames, ExpertLayout, Family, Stack

MIXTRAL_NAMES = DiskNames(
    gate="block_sparse_moe.experts.{}.w1.weight",
    up="block_sparse_moe.experts.{}.w3.weight",
    down="block_sparse_moe.experts.{}.w2.weight",
    router="block_sparse_moe.gate.weight",
)
SWITCH = "switch_transformers"

FAMILIES = {
    # Always two experts a token, whatever the config says: sparsemixer asserts it.
    "phimoe": Family("mlp.experts", "mlp.router", "intermediate_size", "num_local_experts", top_k=2, disk=MIXTRAL_NAMES),
    "mixtral": Family("mlp.experts", "mlp.gate", "intermediate_size", "num_local_experts", disk=MIXTRAL_NAMES),
    "olmoe": Family(
        "mlp.experts", "mlp.gate", "intermediate_size", "num_experts",
        no_groups="OLMoE normalises queries and keys over all heads together, so dropping some changes the others",
    ),
    "qwen3_moe": Family("mlp.experts", "mlp.gate", "moe_intermediate_size", "num_experts"),
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
    ),
}  # fmt: skip
DECODERS = tuple(name for name, row in FAMILIES.items() if not row.encoder_decoder)
"""The families without an encoder."""
