"""The config of a checkpoint with shared experts, as `AutoConfig` reads it: all keys as they are, and a model type of its own."""

from __future__ import annotations

from transformers import PreTrainedConfig

SHARED = "slimmoe_shared"
"""That model type, and the key of `config.json` that says what the model is one of (`shared_checkpoint` writes them)."""


class SharedConfig(PreTrainedConfig):
    """Tells `AutoModelForCausalLM` and its kin which class to ask."""

    model_type = SHARED
