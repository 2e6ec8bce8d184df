"""The settings of a fine-tuning run: an adapter or all weights, the arguments of TRL, and whether it fits the machine."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_torch_bf16_gpu_available
from trl import SFTConfig

from slimmoe_hf.free_memory import free_memory
from slimmoe_hf.lora import lora_config
from slimmoe_hf.memory import Memory, Optimizer, training_memory
from slimmoe_hf.preflight import check_values
from slimmoe_hf.sizing import GIB, own_dtype

ADAPTER_LEARNING_RATE = 1e-4
"""Peak learning rate of adapters, where none is given; all weights take TRL's. Our choice."""
_HELD = ("float32", "bfloat16")
_OF_BITSANDBYTES = ("8bit", "bnb", "paged", "lion", "ademamix", "rmsprop")


class Adapter(BaseModel):
    """A LoRA adapter, as `lora_config` makes it; on attention and experts unless it says otherwise."""

    model_config = ConfigDict(frozen=True)

    rank: int = 16
    alpha: int | None = None
    experts: bool = True
    router: bool = False

    def lora_config(self, config: PreTrainedConfig) -> LoraConfig:
        """The adapter for a model.

        Raises:
            ValueError: As `lora_config`.
        """
        return lora_config(config, self.rank, self.alpha, self.experts, router=self.router)


def finetuning_arguments(
    given: dict[str, Any], folder: str, max_length: int, packing: bool, seed: int, adapter: bool
) -> SFTConfig:
    """The training arguments of a fine-tuning run; text format and loss are added when the data is known.

    Args:
        given: Arguments of `SFTConfig` that the user set.
        folder: Where checkpoints go.
        max_length: T, tokens per row.
        packing: Fill the rows.
        seed: Of everything random.
        adapter: Whether an adapter is trained.

    Raises:
        ValueError: transformers, TRL or we refuse a value, or an optimizer is not installed.
    """
    where = "training arguments"
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: give 2 or more; a token is predicted from those before it.")
    check_values(SFTConfig, given, where)
    bf16 = is_torch_bf16_gpu_available() and not given.get("use_cpu", False) and not given.get("fp16", False)
    # TRL's bf16 is on even on a CPU; its load-balancing loss reads keys that PhiMoE lacks. Measuring must not take more
    # memory than training, which is what was foreseen.
    ours = {
        "report_to": "none", "disable_tqdm": True, "save_total_limit": 2, "bf16": bf16, "router_aux_loss_coef": 0.0,
        "include_num_input_tokens_seen": "non_padding",
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
        **({"learning_rate": ADAPTER_LEARNING_RATE} if adapter else {}),
    }  # fmt: skip
    try:
        arguments = SFTConfig(output_dir=folder, max_length=max_length, packing=packing, seed=seed, **{**ours, **given})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    name = optimizer_name(arguments)
    if any(part in name for part in _OF_BITSANDBYTES) and not is_bitsandbytes_available():
        raise ValueError(f"--optim {name} needs bitsandbytes: pip install bitsandbytes. Without it: --optim adafactor.")
    if arguments.world_size > 1:
        raise ValueError("finetune trains in one process. For several, use SFTTrainer with slimmoe_hf.lora_config.")
    if arguments.n_gpu > 1:
        raise ValueError(f"finetune uses one GPU, and sees {arguments.n_gpu}. Show it one: CUDA_VISIBLE_DEVICES=0.")
    return arguments


def optimizer_name(arguments: SFTConfig) -> str:
    """The optimizer, as `--optim` calls it."""
    return str(OptimizerNames(arguments.optim).value)


def check_auxiliary_loss(config: PreTrainedConfig, arguments: SFTConfig) -> None:
    """Raise ValueError where TRL cannot add the load-balancing loss: it reads a key that some configs lack."""
    if arguments.router_aux_loss_coef == 0.0:
        return
    if "num_experts" not in {*config.to_dict(), *config.attribute_map}:
        raise ValueError(
            f"router_aux_loss_coef={arguments.router_aux_loss_coef}: TRL has no load-balancing loss for a "
            f"{config.model_type} model. Leave it at 0.0."
        )


def check_length(config: PreTrainedConfig, arguments: SFTConfig) -> None:
    """Raise ValueError if rows are longer than the model has positions for."""
    assert arguments.max_length is not None
    if arguments.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length={arguments.max_length} is more than the {config.max_position_embeddings} positions that the model "
            "has. Lower --max-length."
        )


def held_dtype(dtype: str | None, config: PreTrainedConfig, arguments: SFTConfig, adapter: bool) -> str:
    """What the weights are held in: float32, and with an adapter on a GPU as they are stored.

    Raises:
        ValueError: Another one was asked for.
    """
    if dtype is not None:
        if dtype not in _HELD:
            raise ValueError(f"--dtype {dtype}: unknown; use {' or '.join(_HELD)}.")
        return dtype
    own = str(own_dtype(config)).removeprefix("torch.")
    return own if adapter and arguments.device.type == "cuda" and own in _HELD else "float32"


def estimate(config: PreTrainedConfig, arguments: SFTConfig, adapter: Adapter | None, dtype: str) -> Memory:
    """The memory that a run takes at its peak, by `training_memory`: with whole logits, which TRL does not keep."""
    assert arguments.max_length is not None
    return training_memory(
        config,
        optimizer=_counted(optimizer_name(arguments)),
        weights_dtype=getattr(torch, dtype),
        batch=arguments.per_device_train_batch_size,
        length=arguments.max_length,
        gradient_checkpointing=arguments.gradient_checkpointing,
        accumulate=arguments.gradient_accumulation_steps > 1,
        autocast=bool(arguments.bf16),
        lora_rank=adapter.rank if adapter else None,
        lora_experts=adapter.experts if adapter else True,
    )


def _counted(optim: str) -> Optimizer:
    """The optimizer whose state is counted for another; Adam's two moments are more than most have."""
    if "8bit" in optim:
        return "adamw_8bit"
    return "adafactor" if optim == "adafactor" else "adamw"


def check_room(found: Memory, arguments: SFTConfig, adapter: bool, dtype: str) -> str:
    """One line of what a run takes beside what the machine has.

    Raises:
        ValueError: That is more than there is; the settings to lower are named.
    """
    name, room = _room(arguments)
    # A paged optimizer keeps what does not fit in host memory.
    needed = found.total - (found.parts["optimizer"] if "paged" in optimizer_name(arguments) else 0)
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in found.parts.items() if size > GIB / 200)
    line = (
        f"{found.use} takes about {needed / GIB:.2f} GiB at its peak{f' ({parts})' * bool(parts)}; {name} has "
        f"{room / GIB:.2f} GiB free"
    )
    if needed <= room:
        return line
    lower = {
        "--lora": not adapter,
        "--dtype bfloat16": dtype == "float32",
        "--optim adafactor": not adapter and optimizer_name(arguments) != "adafactor",
        "gradient_checkpointing": not arguments.gradient_checkpointing,
        "--per-device-train-batch-size": arguments.per_device_train_batch_size > 1,
        "--max-length": True,
    }
    raise ValueError(f"{line}. It cannot fit; change {', '.join(key for key, helps in lower.items() if helps)}.")


def device_name(arguments: SFTConfig) -> str:
    """Where a run computes, in words."""
    if arguments.device.type == "cuda":
        return torch.cuda.get_device_name(arguments.device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def _room(arguments: SFTConfig) -> tuple[str, int]:
    if arguments.device.type == "cuda":
        return device_name(arguments), torch.cuda.mem_get_info(arguments.device)[0]
    return "this machine", free_memory()
