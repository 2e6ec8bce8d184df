"""What merging and factoring leave of a model: parameters and products, from its config alone.

Shape letters: E experts, r rank, D model width, F expert width, A heads times head width, V vocabulary.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedConfig

from slimmoe_hf.disk import meta_model
from slimmoe_hf.factored import expert_matrices, expert_modules, factorable
from slimmoe_hf.factorization import RANK
from slimmoe_hf.families import SWITCH


class FactoredCount(BaseModel):
    """Parameters of a model, step by step; tied tensors count once.

    Attributes:
        original: As it is. merged: With the experts kept, and every router row (the indirect form).
        factored: With those experts factored, of S the elements that are kept.
        experts: How many experts are kept, and factored, in all layers together.
    """

    model_config = ConfigDict(frozen=True)

    original: int
    merged: int
    factored: int
    experts: int


def count_factored(
    config: PreTrainedConfig, experts_kept: float, rank: int = RANK, density: float = 0.10
) -> FactoredCount:
    """Count the parameters that merging and factoring leave (MC-SMoE's table: 2.0B, 733M, 381M for switch-base-32).

    Args:
        config: Fused family or Switch (whose first sparse encoder layer stays as it is).
        experts_kept: Experts per layer after merging, on average.
        rank: r.
        density: Share of the elements of S that is kept.

    Raises:
        ValueError: Another family, or no whole number of experts between one per layer and all.
    """
    model = meta_model(config)
    original = sum(parameter.numel() for parameter in model.parameters())
    layers = factorable(model)
    shapes = [tuple(matrix.shape) for matrix in expert_matrices(model, dict(list(layers.items())[:1])).values()]
    experts = sum(math.prod(shape[:-2]) for shape in shapes) // 2
    size = sum(math.prod(shape) for shape in shapes) // experts
    low_rank = sum(math.prod(shape[:-2]) * rank * (shape[-2] + shape[-1]) for shape in shapes) // experts
    kept = experts_kept * len(layers)
    if kept != round(kept) or not len(layers) <= kept <= experts * len(layers):
        raise ValueError(
            f"experts_kept={experts_kept} over {len(layers)} layers of {experts} experts makes {kept:g}: give an average "
            f"between 1 and {experts} that makes a whole number."
        )
    merged = original - (experts * len(layers) - round(kept)) * size
    factored = merged + round(kept) * (low_rank - size) + round(kept * size * density)
    return FactoredCount(original=original, merged=merged, factored=factored, experts=round(kept))


def switch_flops(
    config: PreTrainedConfig, source: int, target: int, rank: int | None = None, density: float = 0.10
) -> int:
    """Floating-point operations of the matrix products of one forward pass of Switch over one row, two per multiply-add.

    What runs: no token over an expert's capacity, of S the kept rows alone. The 4.65 and 3.83 TFLOPs of the paper come
    from a profiler that also counts element-wise work, over one padded batch of a task, whose lengths are not published.

    Args:
        config: Of Switch Transformers.
        source: Tokens that the encoder reads. target: Tokens that the decoder predicts.
        rank: r of the factored experts; None for experts as they are.
        density: Share of the elements of S that is kept.

    Raises:
        ValueError: Another family.
    """
    if config.model_type != SWITCH:
        raise ValueError(f"model_type={config.model_type!r}: only {SWITCH} is counted so.")
    model = meta_model(config)
    places = list(expert_modules(model))
    factored = list(factorable(model)) if rank is not None else []
    hidden, inner = config.d_model, config.num_heads * config.d_kv
    expert = 2 * hidden * config.d_ff
    saved = expert - (2 * (rank or 0) * (hidden + config.d_ff) + density * expert)

    def blocks(half: str, layers: int, tokens: int) -> float:
        """Self-attention, experts and routers of the encoder or the decoder."""
        sparse = sum(name.startswith(half) for name in places) * hidden * config.num_experts
        attention = layers * (4 * hidden * inner + 2 * tokens * inner)
        gone = sum(name.startswith(half) for name in factored) * saved
        return tokens * (attention + layers * expert + sparse - gone)

    cross = config.num_decoder_layers * (
        target * (2 * hidden * inner + 2 * source * inner) + source * 2 * hidden * inner
    )
    head = target * hidden * config.vocab_size
    encoder = blocks("encoder", config.num_layers, source)
    return round(2 * (encoder + blocks("decoder", config.num_decoder_layers, target) + cross + head))
