"""What `slimmoe size` prints: parameters, bytes, memory by use and GPU, stages. It computes nothing itself."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from slimmoe_hf.command_inputs import target_of
from slimmoe_hf.families import DECODERS
from slimmoe_hf.memory import Memory, inference_memory, training_memory
from slimmoe_hf.plan import Target
from slimmoe_hf.scoring_memory import scoring_memory
from slimmoe_hf.shared_experts import is_shared
from slimmoe_hf.sizing import (
    DTYPES,
    GIB,
    RESERVE_BYTES,
    RESERVE_SHARE,
    Gpu,
    own_dtype,
    parameter_counts,
    parse_gpu,
    read_config,
    slimmed_config,
    suggest_stages,
)

LORA_RANK = 16
_CONVENTIONS = {
    "active": "both embeddings counted",
    "active_without_lookup": "without the input embedding (a lookup)",
    "active_without_embeddings": "without input embedding and head",
}


def size(args: argparse.Namespace) -> None:
    """A config in, numbers out.

    Args:
        args: `model`, `revision`, `expert_width`, `kv_groups`, `num_experts`, `gpu`, `length`, `batch_size`, `dtype`, `target`,
            `stages` and `json`, as the parser has them.

    Raises:
        ValueError: A model, size or GPU that cannot be; the line says what can.
    """
    if args.model is None:
        raise ValueError("size needs a model: a folder, a config.json or a Hub id (see slimmoe size --help)")
    if args.length < 2 or args.batch_size < 1:
        raise ValueError(f"--length {args.length} --batch-size {args.batch_size}: give at least 2 tokens and 1 row.")
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: unknown; use one of {', '.join(DTYPES)}.")
    gpus = [parse_gpu(text) for text in args.gpu]
    config = read_config(args.model, args.revision)
    answer = describe(config, args, gpus)
    if args.json:
        sys.stdout.write(json.dumps({"model": args.model, **answer}, indent=2) + "\n")
    else:
        _show(args, answer, gpus)


def describe(config: PreTrainedConfig, args: argparse.Namespace, gpus: list[Gpu]) -> dict[str, Any]:
    """Everything that `size` answers, as JSON has it.

    Args:
        config: The model's.
        args: As `size` takes them.
        gpus: What to hold the uses against.
    """
    dtype = DTYPES[args.dtype] if args.dtype else own_dtype(config)
    answer: dict[str, Any] = {"model_type": config.model_type, **_sizes(config)}
    sizes = target_of(args)
    target = sizes if args.target is None and sizes != Target() else None
    if is_shared(config) and (target is not None or args.target is not None):
        raise ValueError("the experts of this model are merged and shared: it cannot be cut further. Size it as it is.")
    if args.target is not None:
        if args.expert_width is not None:
            raise ValueError("--target finds the expert width itself. Give --target or --expert-width, not both.")
        if args.num_experts is not None:
            raise ValueError("--target finds a width for all the experts there are. Leave --num-experts out.")
        stages = suggest_stages(config, args.target, args.stages, args.kv_groups)
        answer["suggestions"] = [stage.model_dump() for stage in stages]
        target = stages[-1].target
    after = slimmed_config(config, target) if target is not None else None
    if after is not None:
        answer["slimmed"] = {"target": str(target), **_sizes(after)}
    uses = memory_of(config, after, args.batch_size, args.length, dtype) if config.model_type in DECODERS else {}
    answer["memory"] = {use: memory.model_dump() for use, memory in uses.items()}
    answer["assumed"] = {
        "dtype": str(dtype).removeprefix("torch."), "batch_size": args.batch_size, "length": args.length,
        "lora_rank": LORA_RANK, "gradient_checkpointing": True, "reserve": f"{RESERVE_BYTES} bytes and "
        f"{RESERVE_SHARE:.0%} of a GPU for its context and for fragmentation, not measured",
    }  # fmt: skip
    answer["usable"] = {gpu.name: gpu.usable for gpu in gpus}
    answer["fits"] = {use: {gpu.name: memory.total <= gpu.usable for gpu in gpus} for use, memory in uses.items()}
    return answer


def memory_of(
    config: PreTrainedConfig, slimmed: PreTrainedConfig | None, batch: int, length: int, dtype: torch.dtype
) -> dict[str, Memory]:
    """Memory of every use, by name.

    Args:
        config: The original model's, and the teacher's.
        slimmed: The config after a cut; the model to run and train, where there is one.
        batch: B, rows at a time.
        length: T, tokens per row.
        dtype: Of frozen weights and of inference.
    """
    size: dict[str, Any] = {"batch": batch, "length": length}
    model = slimmed if slimmed is not None else config
    uses = {"inference": inference_memory(model, dtype=dtype, **size)}
    if slimmed is not None:
        uses["inference, before the cut"] = inference_memory(config, dtype=dtype, **size)
    uses[f"LoRA, rank {LORA_RANK}"] = training_memory(model, weights_dtype=dtype, lora_rank=LORA_RANK, **size)
    uses["full, adamw (float32)"] = training_memory(model, optimizer="adamw", **size)
    uses["full, adamw_bf16"] = training_memory(model, optimizer="adamw_bf16", **size)
    uses["full, adamw_8bit"] = training_memory(model, optimizer="adamw_8bit", **size)
    uses["full, adafactor (bfloat16)"] = training_memory(model, optimizer="adafactor", **size)
    settings = {"optimizer": "adafactor", "teacher_config": config, **size}
    uses["distil, adafactor, teacher live"] = training_memory(model, teacher="live", **settings)
    uses["distil, adafactor, teacher offloaded"] = training_memory(model, teacher="offloaded", **settings)
    uses["distil, adafactor, teacher cached"] = training_memory(model, teacher="cached", **settings)
    uses["score before the cut (float32)"] = scoring_memory(config, **size)
    return uses


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    counts, dtype = parameter_counts(config), own_dtype(config)
    return {
        "total_parameters": counts.total,
        "active_parameters": counts.active,
        "bytes": counts.bytes(dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_by_dtype": {name: counts.bytes(each) for name, each in DTYPES.items()},
        "conventions": counts.model_dump(include=set(_CONVENTIONS)),
    }


def _show(args: argparse.Namespace, answer: dict[str, Any], gpus: list[Gpu]) -> None:
    console = Console(highlight=False)
    columns = {"": answer} | ({f"with {answer['slimmed']['target']}": answer["slimmed"]} if "slimmed" in answer else {})
    table = Table(args.model, *(name or "as it is" for name in columns), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("parameters", *(f"{each['total_parameters']:,}" for each in columns.values()))
    for name, meaning in _CONVENTIONS.items():
        label = f"  active, {meaning}"
        table.add_row(label, *(f"{each['conventions'][name]:,}" for each in columns.values()))
    table.add_row(
        "weights on disk", *(f"{each['bytes'] / GIB:,.2f} GiB ({each['dtype']})" for each in columns.values())
    )
    console.print(table)
    if answer["memory"]:
        console.print(_memory_table(answer, gpus))
        assumed = answer["assumed"]
        console.print(
            f"{assumed['batch_size']} row(s) of {assumed['length']:,} tokens; training with gradient checkpointing, "
            f"adapters in float32; inference and LoRA in {assumed['dtype']}.\nOf a GPU's memory {RESERVE_BYTES // GIB} "
            f"GiB and {RESERVE_SHARE:.0%} are kept back for its context and for fragmentation: assumed, not measured.",
            style="dim",
        )
    if len(answer.get("suggestions", [])) > 1:
        console.print("Memory is that of the last stage's model; the stages before it are larger.", style="dim")
    for number, stage in enumerate(answer.get("suggestions", []), 1):
        target = Target(**stage["target"])
        console.print(
            f"stage {number}: {target}: {stage['total']:,} parameters, {stage['active']:,} active\n"
            f"         {stage['alignment']}",
            soft_wrap=True,
        )


def _memory_table(answer: dict[str, Any], gpus: list[Gpu]) -> Table:
    table = Table("memory in GiB for", "needs", "of it weights", *(gpu.name for gpu in gpus), "and", box=None)
    for column in table.columns[1 : 3 + len(gpus)]:
        column.justify = "right"
    for use, memory in answer["memory"].items():
        verdicts = ["fits" if answer["fits"][use][gpu.name] else "no" for gpu in gpus]
        weights = memory["parts"]["weights"] + memory["parts"].get("teacher", 0)
        beside = ""
        if memory["host"]:
            beside = f"{memory['host'] / GIB:,.1f} of the computer's own"
        if memory["disk_per_token"]:
            beside = f"{memory['disk_per_token']} bytes of disk a token"
        table.add_row(use, f"{memory['total'] / GIB:,.1f}", f"{weights / GIB:,.1f}", *verdicts, beside)
    return table
