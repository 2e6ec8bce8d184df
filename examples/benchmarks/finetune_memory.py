"""Does fine-tuning Phi-mini-MoE and Phi-tiny-MoE fit one 80 GB or 48 GB GPU?

    python examples/benchmarks/finetune_memory.py --json examples/benchmarks/results/finetune_memory.json

Randomly initialised models of exactly their sizes, one row of 4096 tokens, gradient checkpointing: what `slimmoe
finetune` does, a process per row. With a CUDA device all 32 layers are trained under a cap of 80 and of 48 GB
(`set_per_process_memory_fraction`), and the peak is PyTorch's. Without one, models of the same width with two and four
layers are trained on the CPU, and the peak (of the process's anonymous memory, freed memory given back at once) is
extrapolated to 32 layers along the line through the two: the column says so. By the estimate the peak is in the same
place at 2, 4 and 32 layers, so a line is right for it.

TRL's loss takes the logits tile by tile. Its GPU kernel works within one bfloat16 tile; without it, on a CPU, PyTorch makes
seven or eight float32 copies of one. So that the CPU stands for the GPU, tiles are an eighth as wide there.
The last column is what `accelerate estimate-memory` would say: four times the weights to train with Adam.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sizing import CALM, warm_up
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PrinterCallback, TrainerCallback, set_seed

from slimmoe_hf.finetune import FinetuningTrainer
from slimmoe_hf.finetune_settings import Adapter, estimate, finetuning_arguments
from slimmoe_hf.memory import Memory, meta_model
from slimmoe_hf.peak import PeakMemory
from slimmoe_hf.sizing import GIB, parse_gpu

COMMON = {
    "model_type": "phimoe", "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 16, "vocab_size": 32064,
    "attention_bias": True, "lm_head_bias": True, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
# microsoft/Phi-mini-MoE-instruct and Phi-tiny-MoE-instruct, by their config.json
MODELS: dict[str, dict[str, Any]] = {
    "Phi-mini-MoE": {"intermediate_size": 960, "num_attention_heads": 32, "num_key_value_heads": 8},
    "Phi-tiny-MoE": {
        "intermediate_size": 448, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    },
}  # fmt: skip
# Use -> adapter, optimizer, what weights are held in.
USES: dict[str, tuple[Adapter | None, str, str]] = {
    "LoRA": (Adapter(), "adamw_torch_fused", "bfloat16"),
    "full, adafactor": (None, "adafactor", "bfloat16"),
    "full, adamw": (None, "adamw_torch_fused", "float32"),
}
LAYERS, LENGTH = 32, 4096
# Enough for AdamW's float32 states of two and four layers on a machine with 24 GB; of Phi-mini's they would be 18 GB.
CPU_ROWS = [(model, use) for model in MODELS for use in USES if (model, use) != ("Phi-mini-MoE", "full, adamw")]


def config_of(model: str, layers: int, shrink: int = 1) -> PreTrainedConfig:
    """A model's config with fewer layers; `shrink` divides its widths and vocabulary, for tests."""
    values = {**COMMON, **MODELS[model], "num_hidden_layers": layers}
    for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"):
        values = {**values, **({key: values[key] // shrink} if key in values else {})}
    return AutoConfig.for_model(**values)


def arguments_of(use: str, folder: str, length: int, steps: int, device: str) -> Any:
    adapter, optimizer, _ = USES[use]
    given = {
        "max_steps": steps, "per_device_train_batch_size": 1, "save_strategy": "no", "optim": optimizer,
        "use_cpu": device == "cpu", "dataset_kwargs": {"skip_prepare_dataset": True}, "logging_strategy": "no",
    }  # fmt: skip
    return finetuning_arguments(given, folder, length, False, 0, adapter is not None)


def estimated(model: str, use: str, layers: int, args: argparse.Namespace) -> Memory:
    adapter, _, dtype = USES[use]
    arguments = arguments_of(use, "unused", args.length, 2, args.device)
    return estimate(config_of(model, layers, args.shrink), arguments, adapter, dtype)


def narrow_tiles() -> None:
    """See above: 4096 instead of 32768 tokens of the vocabulary at a time."""
    from trl.trainer import utils

    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32768, "TRL's tiles have changed: look again at what a CPU stands for"
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = 4096


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def run(model: str, use: str, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row, in this process."""
    adapter, _, dtype = USES[use]
    config = config_of(model, layers, args.shrink)
    if args.cap:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_gpu(args.cap).usable / whole))
    if args.device == "cpu":
        narrow_tiles()
    rows = Dataset.from_dict({"input_ids": torch.randint(2, config.vocab_size, (4, args.length)).tolist()})
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    warm_up(config_of(model, 1, args.shrink), getattr(torch, dtype), args.device)
    clock = Clock()
    try:
        with tempfile.TemporaryDirectory() as folder, PeakMemory(args.device) as peak:
            arguments = arguments_of(use, folder, args.length, 2 if args.device == "cpu" else 6, args.device)
            train(config, adapter, getattr(torch, dtype), arguments, rows, clock, args.device)
    except torch.OutOfMemoryError:
        return {"measured": None, "tokens_per_second": None}
    return {"measured": peak.bytes, "tokens_per_second": args.length / statistics.median(clock.seconds[1:])}


def train(
    config: PreTrainedConfig, adapter: Adapter | None, dtype: torch.dtype, arguments: Any, rows: Dataset, clock: Clock,
    device: str,
) -> None:  # fmt: skip
    """Build a model and fine-tune it for a few steps."""
    set_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    trainer = FinetuningTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer(config.vocab_size),
        peft_config=adapter.lora_config(config) if adapter else None,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def tokenizer(size: int) -> Any:
    """A word-level tokenizer: the trainer wants one, the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w0", pad_token="w1")


def in_own_process(model: str, use: str, layers: int, cap: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--row", model, use, str(layers), "--device", args.device, "--length", str(args.length),
        "--shrink", str(args.shrink), "--cap", cap,
    ]  # fmt: skip
    environment = {**os.environ, **CALM, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{model}, {use}, {layers} layers:\n{child.stderr[-3000:]}")
    found = estimated(model, use, layers, args)
    row = {
        "model": model, "use": use, "layers": layers, "dtype": USES[use][2], "cap": cap or None,
        **json.loads(child.stdout.splitlines()[-1]), "estimate": found.total, "peak": found.peak, "parts": found.parts,
    }  # fmt: skip
    row["ratio"] = row["estimate"] / row["measured"] if row["measured"] else None
    sys.stderr.write(f"{model}, {use}, {layers} layers{', ' + cap if cap else ''}: {row['measured']}, {row['ratio']}\n")
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda":
        everything = [(model, use) for model in MODELS for use in USES]
        rows = [in_own_process(*row, LAYERS, cap, args) for row in everything for cap in ("80GB", "48GB")]
        summary = [{**row, "how": "measured"} for row in rows]
    else:
        rows = [in_own_process(*row, layers, "", args) for row in CPU_ROWS for layers in (2, 4)]
        summary = [extrapolated(few, more, args) for few, more in zip(rows[::2], rows[1::2], strict=True)]
        left_out = [(model, use) for model in MODELS for use in USES if (model, use) not in CPU_ROWS]
        summary += [only_estimated(model, use, args) for model, use in left_out]
    for row in summary:
        weights = sum(
            weight.numel() for weight in meta_model(config_of(row["model"], LAYERS, args.shrink)).parameters()
        )
        row["parameters"] = weights
        # The rule knows one dtype: it quadruples the weights as they are held.
        row["accelerate"] = 4 * weights * getattr(torch, row["dtype"]).itemsize
    device = (
        torch.cuda.get_device_name(0) if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    )
    return {
        "command": " ".join(["python", *sys.argv]), "machine": f"{device}, torch {torch.__version__}",
        "length": args.length, "shrink": args.shrink, "lora_rank": Adapter().rank, "summary": summary, "rows": rows,
    }  # fmt: skip


def extrapolated(few: dict[str, Any], more: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The line through two numbers of layers, at all of them."""
    per_layer = (more["measured"] - few["measured"]) / (more["layers"] - few["layers"])
    found = estimated(few["model"], few["use"], LAYERS, args)
    straight = few["peak"] == more["peak"] == found.peak
    whole = more["measured"] + per_layer * (LAYERS - more["layers"])
    return {
        "model": few["model"], "use": few["use"], "layers": LAYERS, "dtype": few["dtype"],
        "how": "extrapolated" if straight else "extrapolated, though the peak moves",
        "measured": whole, "per_layer": per_layer, "estimate": found.total, "peak": found.peak,
        "ratio": found.total / whole, "tokens_per_second": None,
    }  # fmt: skip


def only_estimated(model: str, use: str, args: argparse.Namespace) -> dict[str, Any]:
    found = estimated(model, use, LAYERS, args)
    return {
        "model": model, "use": use, "layers": LAYERS, "dtype": USES[use][2], "how": "not measured", "measured": None,
        "estimate": found.total, "peak": found.peak, "ratio": None, "tokens_per_second": None,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    table = Table("model", "use", "how", "32 layers", "estimate", "ratio", "accelerate's rule", "tokens/s", "fits")
    for row in result["summary"]:
        most = row["measured"] or row["estimate"]
        fits = [name for name in ("80GB", "48GB") if most <= parse_gpu(name).usable]
        if row["how"] == "measured":  # under a cap
            fits = [row["cap"] if row["measured"] else f"not {row['cap']}"]
        speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "-"
        table.add_row(
            row["model"], f"{row['use']} ({row['dtype']})", row["how"],
            f"{row['measured'] / GIB:.1f} GiB" if row["measured"] else "-" if row["how"] == "not measured" else "out of memory",
            f"{row['estimate'] / GIB:.1f} GiB",
            f"{row['ratio']:.2f}" if row["ratio"] else "-", f"{row['accelerate'] / most:.2f}", speed, ", ".join(fits) or "no",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths, to try the script")
    parser.add_argument("--row", nargs=3, metavar=("MODEL", "USE", "LAYERS"), help="measure one row in this process")
    parser.add_argument("--cap", default="", help="with --row: the memory of which GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers renames gradient_checkpointing
    if args.row:
        sys.stdout.write(json.dumps(run(args.row[0], args.row[1], int(args.row[2]), args)) + "\n")
        return
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
