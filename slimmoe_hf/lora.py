"""The right LoRA targets for every family: fused experts as parameters, attention as modules, routers where asked for.

PEFT finds nothing by itself here. `target_modules="all-linear"` leaves the experts out, because their weights are fused
tensors and no linear layers, and breaks on PhiMoE's router; names of single experts match nothing and say so nowhere.
"""

from __future__ import annotations

from peft import LoraConfig
from transformers import PreTrainedConfig

from slimmoe_hf.families import family_of, refuse_encoder_decoder


def lora_config(
    config: PreTrainedConfig,
    rank: int = 16,
    alpha: int | None = None,
    experts: bool = True,
    attention: bool = True,
    router: bool = False,
) -> LoraConfig:
    """A LoRA adapter for a Mixture-of-Experts model, for `SFTTrainer(peft_config=...)` or `get_peft_model`.

    Every expert gets an adapter of its own, on both of its fused matrices. There is no dropout, DoRA or bias: PEFT has
    none for fused experts. Routers are left alone by default: the adapter then learns for the experts that a token is
    sent to today.

    Args:
        config: The model's.
        rank: Of the adapter of one matrix.
        alpha: The update is scaled by `alpha / rank`; None is twice the rank.
        experts: Adapt the experts.
        attention: Adapt the query, key, value and output projections, and where they are compressed (DeepSeek's) both steps.
        router: Adapt the routers.

    Raises:
        ValueError: The model is dense or of an unknown family, a number is not positive, or nothing is adapted.

    Example:
        ```python
        trainer = SFTTrainer(model, peft_config=lora_config(AutoConfig.from_pretrained(model)), train_dataset=chats)
        ```
    """
    refuse_encoder_decoder(config, "lora_config")
    family = family_of(config)
    if rank < 1:
        raise ValueError(f"rank={rank}: give 1 or more; 16 is usual.")
    if alpha is not None and alpha < 1:
        raise ValueError(f"alpha={alpha}: give 1 or more; twice the rank is usual.")
    if not (experts or attention or router):
        raise ValueError("experts, attention and router are all off, which leaves nothing to train. Turn one on.")
    adapted = family.adapted or family.projections
    modules = [f"{family.attention}.{name}" for name in adapted] if attention else []
    parameters = [f"{family.experts}.{name}" for name in (family.layout.gate_up, family.layout.down)] if experts else []
    if router:  # a parameter too: what a router module returns is no plain output that an adapter could be added to
        parameters.append(f"{family.router}.{family.router_weight}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=modules,
        target_parameters=parameters or None,
    )
