"""How close are the memory estimates of `slimmoe size` to what training really takes?

    python examples/benchmarks/sizing.py --json examples/benchmarks/results/sizing.json

Every row is measured in a process of its own, on a randomly initialised model of real layer widths, through
transformers' Trainer, peft and `DistillationTrainer`. On a CPU the measured number is the peak of the process's
anonymous memory (sampled every 2 ms) above its value before the model exists, freed memory given back at once; with
--device cuda it is `torch.cuda.max_memory_allocated`. The last column is what `accelerate estimate-memory` would say:
the weights to run, four times the weights to train with Adam.

In bfloat16 a CPU needs more than is estimated: in a profile of the olmoe-like LoRA row about 250 MiB stayed resident
outside any of PyTorch's tensors, and in float32 they did not. Inferred, not proven: oneDNN's work buffers.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Trainer, TrainingArguments

from slimmoe_hf import DistillationConfig, DistillationTrainer, lora_config
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.memory import Memory, inference_memory, training_memory
from slimmoe_hf.peak import PeakMemory
from slimmoe_hf.scoring_memory import scoring_memory

# Freed memory goes back at once, and oneDNN keeps no work buffers between matrix products.
CALM = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}  # fmt: skip
BATCH, RANK = 2, 8
SHAPES = {
    "phimoe-like": {
        "model_type": "phimoe", "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 128, "num_local_experts": 16, "vocab_size": 8192,
        "attention_bias": True, "lm_head_bias": True, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "olmoe-like": {
        "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 64, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 8192, "max_position_embeddings": 4096,
    },
}  # fmt: skip
# Use -> dtype, tokens per row, and how much wider than above the experts are: small bfloat16 models would drown in what
# libraries take, and activations show where rows are long.
USES = {
    "inference": ("bfloat16", 512, 6),
    "LoRA": ("float32", 512, 2),
    "LoRA, bfloat16": ("bfloat16", 512, 6),
    "full, adamw": ("float32", 512, 1),
    "full, adafactor": ("bfloat16", 512, 4),
    "full, adafactor, no checkpointing": ("float32", 1024, 1),
    "distillation, live": ("float32", 512, 1),
    "scoring": ("float32", 512, 1),
}


def config_of(name: str, wider: int = 1) -> PreTrainedConfig:
    """A shape as a config, its experts `wider` times as wide."""
    values = dict(SHAPES[name])
    return AutoConfig.for_model(**{**values, "intermediate_size": values["intermediate_size"] * wider})


def estimate(name: str, use: str) -> Memory:
    kind, length, wider = USES[use]
    config, dtype = config_of(name, wider), getattr(torch, kind)
    size = {"batch": BATCH, "length": length}
    if use == "inference":
        return inference_memory(config, dtype=dtype, **size)
    if use == "scoring":
        return scoring_memory(config, dtype=dtype, **size)
    settings = {
        "LoRA": {"lora_rank": RANK},
        "LoRA, bfloat16": {"lora_rank": RANK},
        "full, adamw": {},
        "full, adafactor": {"optimizer": "adafactor"},
        "full, adafactor, no checkpointing": {"optimizer": "adafactor", "gradient_checkpointing": False},
        "distillation, live": {"teacher": "live", "teacher_config": config_of(name, 2), "teacher_dtype": torch.float32},
    }[use]
    return training_memory(config, weights_dtype=dtype, **size, **settings)


def build(name: str, dtype: torch.dtype, device: str, wider: int = 1) -> torch.nn.Module:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(name, wider), dtype=dtype)


def run(name: str, use: str, device: str) -> int:
    """Measure one row, in this process."""
    kind, length, wider = USES[use]
    dtype = getattr(torch, kind)
    rows = Dataset.from_dict({"input_ids": torch.randint(2, 8192, (8, length)).tolist()})
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    settings = {
        "max_steps": 2, "per_device_train_batch_size": BATCH, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": device == "cpu", "bf16": False, "logging_strategy": "no",
        "gradient_checkpointing": "no checkpointing" not in use,
        "optim": "adafactor" if "adafactor" in use else "adamw_torch_fused",
    }  # fmt: skip
    warm_up(config_of(name), dtype, device)
    with tempfile.TemporaryDirectory() as folder, PeakMemory(device) as peak:
        model = build(name, dtype, device, wider)
        if use == "inference":
            ids = torch.randint(2, 8192, (BATCH, length - 2), device=device)
            model.eval().generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        elif use == "scoring":
            collect_stats(
                model, [{"input_ids": torch.randint(2, 8192, (BATCH, length), device=device)}], progress=False
            )
        elif use == "distillation, live":
            arguments = DistillationConfig(
                folder, max_length=length, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, **settings
            )
            DistillationTrainer(
                model, build(name, dtype, device, 2), arguments, processing_class=tokenizer(), train_dataset=rows
            ).train()
        else:
            if use.startswith("LoRA"):
                model = adapted(model)
            Trainer(model, TrainingArguments(folder, **settings), train_dataset=rows).train()
    return peak.bytes


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    model.enable_input_require_grads()  # as TRL does for adapters under gradient checkpointing
    return get_peft_model(model, lora_config(model.config, RANK))


def warm_up(small: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
    """One small step first, of a model like `small` but smaller: libraries that load at first use are no part of one."""
    small.hidden_size, small.num_hidden_layers, small.vocab_size, small.intermediate_size = 512, 1, 256, 32
    small.num_attention_heads = small.num_key_value_heads = 4
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype)
        ids = torch.randint(2, 256, (1, 32))
    model(input_ids=ids, labels=ids).loss.backward()


def tokenizer():
    """A word-level tokenizer with as many tokens as the models: the trainer wants one, the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(8192)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w0", pad_token="w1"
    )


def measure(args: argparse.Namespace) -> dict:
    rows = []
    for name in args.models:
        for use in args.uses:
            started = time.perf_counter()
            child = subprocess.run(
                [sys.executable, __file__, "--row", name, use, "--device", args.device],
                env={**os.environ, **CALM, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"},
                capture_output=True, text=True,
            )  # fmt: skip
            if child.returncode:
                raise RuntimeError(f"{name}, {use}:\n{child.stderr[-3000:]}")
            measured = int(child.stdout.split()[-1])
            found = estimate(name, use)
            weights = found.parts["weights"]
            factor = 1 if use in ("inference", "scoring") else 4
            rows.append({
                "model": name, "use": use, "dtype": USES[use][0], "length": USES[use][1], "wider": USES[use][2],
                "measured": measured, "estimate": found.total, "ratio": found.total / measured,
                "parts": found.parts, "peak": found.peak, "accelerate_ratio": weights * factor / measured,
                "seconds": round(time.perf_counter() - started, 1),
            })  # fmt: skip
            sys.stderr.write(f"{name}, {use}: {found.total / measured:.3f}\n")
    device = (
        torch.cuda.get_device_name(0) if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{device}, torch {torch.__version__}",
        "batch": BATCH, "lora_rank": RANK, "shapes": SHAPES, "rows": rows,
    }  # fmt: skip


def show(result: dict) -> None:
    table = Table("model", "use", "measured", "estimate", "ratio", "accelerate's rule")
    for row in result["rows"]:
        table.add_row(
            row["model"], f"{row['use']} ({row['dtype']})", f"{row['measured'] / 2**30:.3f} GiB",
            f"{row['estimate'] / 2**30:.3f} GiB", f"{row['ratio']:.3f}", f"{row['accelerate_ratio']:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--uses", nargs="+", default=list(USES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "USE"), help="measure one row in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.row:
        sys.stdout.write(f"{run(*args.row, args.device)}\n")
        return
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
